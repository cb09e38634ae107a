//! Routed rows: sorting on the host, moving by `gather`, one product per expert. The contract is that of
//! `marimba_ir::op::{Dispatch, GatherRows, Combine, GroupedLinear}`.

use super::tape::{Args, Cx, Fault, Res, Value, indices};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::{Combine, Dispatch};

pub(super) fn dispatch<E: Dtype, D: Device<E>>(
    op: &Dispatch,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let experts = indices(a.ints(0)?, op.n_experts)?;
    let mut order: Vec<usize> = (0..experts.len()).collect();
    order.sort_by_key(|&f| experts[f]);
    let mut slot = vec![0i32; order.len()];
    for (r, &f) in order.iter().enumerate() {
        slot[f] = r as i32;
    }
    let offsets: Vec<i32> = (0..=op.n_experts)
        .map(|e| experts.iter().filter(|&&x| x < e).count() as i32)
        .collect();
    let order: Vec<i32> = order.iter().map(|&f| f as i32).collect();
    Ok(vec![order.into(), slot.into(), offsets.into()])
}

pub(super) fn gather_rows<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let x = a.var(0)?;
    let order = indices(a.ints(1)?, a.ints(1)?.len())?;
    let k = order.len() / x.rows();
    let tokens: Vec<usize> = order.iter().map(|f| f / k).collect();
    Ok(vec![cx.rows(x, x.rows(), &tokens)?.into()])
}

pub(super) fn combine<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &Combine,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let y = a.var(0)?;
    let (r, d) = (y.sizes[0], y.sizes[1]);
    let slot = indices(a.ints(2)?, r)?;
    let mut sizes: Vec<usize> = op.tokens.iter().map(|d| d.size).collect();
    let tokens: usize = sizes.iter().product();
    sizes.push(d);
    let mut rows = cx.rows(y, r, &slot)?;
    if let Some(w) = a.opt(3) {
        rows = cx.mul_mid(&rows, w, (r, d, 1))?;
    }
    Ok(vec![
        cx.sum(&rows, (tokens, r / tokens, d))?.view(&sizes).into(),
    ])
}

pub(super) fn grouped_linear<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let (x, w) = (a.var(0)?, a.var(1)?);
    let (e, n, k) = (w.sizes[0], w.sizes[1], w.sizes[2]);
    let rows = x.rows();
    let offsets = indices(a.ints(2)?, rows + 1)?;
    let mut y = None;
    for expert in 0..e {
        let range: Vec<usize> = (offsets[expert]..offsets[expert + 1]).collect();
        if range.is_empty() {
            continue;
        }
        let matrix = cx.rows(w, e, &[expert])?;
        let part = cx.mm_t(&cx.rows(x, rows, &range)?, &matrix, (1, range.len(), k, n))?;
        y = Some(match y {
            Some(before) => cx.concat(&before, &part, 1)?,
            None => part,
        });
    }
    let y = y.ok_or_else(|| Fault("no routed rows".into()))?;
    if y.len() != rows * n {
        return Err(Fault(format!(
            "offsets end at row {}, not {rows}",
            y.len() / n
        )));
    }
    let mut sizes = x.sizes.clone();
    sizes.pop();
    sizes.push(n);
    Ok(vec![y.view(&sizes).into()])
}
