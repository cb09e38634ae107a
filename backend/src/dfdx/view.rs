//! Other sizes, rows of a parameter, the last token. The contract is that of `marimba_ir::op::{Reshape, Rows, Last}`.

use super::tape::{Args, Cx, Res, Value};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::{Reshape, Rows};

pub(super) fn reshape<E: Dtype, D: Device<E>>(
    op: &Reshape,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let sizes: Vec<usize> = op.dims.iter().map(|d| d.size).collect();
    Ok(vec![a.var(0)?.view(&sizes).into()])
}

pub(super) fn rows<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &Rows,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let w = a.var(0)?;
    let mut sizes = w.sizes.clone();
    sizes[0] = op.len;
    let idx: Vec<usize> = (op.start..op.start + op.len).collect();
    Ok(vec![cx.rows(w, w.sizes[0], &idx)?.view(&sizes).into()])
}

pub(super) fn last<E: Dtype, D: Device<E>>(cx: &Cx<E, D>, a: &Args<E, D>) -> Res<Vec<Value<E, D>>> {
    let x = a.var(0)?;
    let (b, t, d) = (x.sizes[0], x.sizes[1], x.sizes[2]);
    let idx: Vec<usize> = (0..b).map(|r| r * t + t - 1).collect();
    Ok(vec![cx.rows(x, b * t, &idx)?.view(&[b, 1, d]).into()])
}
