//! `y = x w^T + b + add` as dfdx's matrix product. The contract is `marimba_ir::op::Linear`'s.

use super::tape::{Args, Cx, Res, Value, Var};
use dfdx::prelude::{Device, Dtype};

/// `x w^T` over the last dimension of x.
pub(super) fn product<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    x: &Var<E, D>,
    w: &Var<E, D>,
) -> Res<Var<E, D>> {
    let (n, k) = (w.sizes[0], w.sizes[1]);
    let mut sizes = x.sizes.clone();
    sizes.pop();
    sizes.push(n);
    Ok(cx.mm_t(x, w, (1, x.rows(), k, n))?.view(&sizes))
}

pub(super) fn linear<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let y = product(cx, a.var(0)?, a.var(1)?)?;
    let y = match a.opt(2) {
        Some(b) => cx.add_mid(&y, b, (1, y.rows(), y.last()))?,
        None => y,
    };
    let y = match a.opt(3) {
        Some(add) => cx.add(&y, add)?,
        None => y,
    };
    Ok(vec![y.into()])
}
