//! Joining and splitting along the last dimension. The contract is that of `marimba_ir::op::{Concat, Split}`.

use super::tape::{Args, Cx, Res, Value};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::Split;

pub(super) fn concat<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let first = a.var(0)?;
    let mut y = first.clone();
    for i in 1..a.0.len() {
        y = cx.concat(&y, a.var(i)?, first.rows())?;
    }
    let mut sizes = first.sizes.clone();
    sizes.pop();
    sizes.push(y.len() / first.rows().max(1));
    Ok(vec![y.view(&sizes).into()])
}

pub(super) fn split<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &Split,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let x = a.var(0)?;
    let mut start = 0;
    let mut out = Vec::new();
    for part in &op.sizes {
        out.push(cx.cols(x, start, part.size)?.into());
        start += part.size;
    }
    Ok(out)
}
