//! RMS norm by squares, sums and reciprocal roots. The contract is `marimba_ir::op::RmsNorm`'s.

use super::tape::{Args, Cx, Res, Value};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::{Gate, RmsNorm};

pub(super) fn rms_norm<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &RmsNorm,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let x = a.var(0)?;
    let gate = match op.gate {
        Gate::None => None,
        Gate::Before | Gate::After => Some(cx.silu(a.var(2)?)?),
    };
    let u = match (&gate, op.gate) {
        (Some(s), Gate::Before) => cx.mul(x, s)?,
        (_, Gate::None | Gate::Before | Gate::After) => x.clone(),
    };
    let groups = u.len() / op.group;
    let mean = cx.scale(
        &cx.sum(&cx.square(&u)?, (groups, op.group, 1))?,
        1.0 / op.group as f64,
    )?;
    let rstd = cx.recip(&cx.sqrt(&cx.offset(&mean, op.eps)?)?)?;
    let mut y = cx.mul_mid(&u, &rstd, (groups, op.group, 1))?;
    if let Some(w) = a.opt(1) {
        let w = if op.zero_centered {
            cx.offset(w, 1.0)?
        } else {
            w.clone()
        };
        y = cx.mul_mid(&y, &w, (1, y.len() / w.len(), w.len()))?;
    }
    if let (Some(s), Gate::After) = (&gate, op.gate) {
        y = cx.mul(&y, s)?;
    }
    let mut sizes = x.sizes.clone();
    sizes.pop();
    sizes.push(x.last() / op.group);
    Ok(vec![y.view(&x.sizes).into(), rstd.view(&sizes).into()])
}
