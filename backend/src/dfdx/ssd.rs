//! The Mamba-2 scan as a recurrence, token by token from its equations: no chunks. The contract is `marimba_ir::op::Ssd`'s.

use super::selective_scan::Steps;
use super::tape::{Args, Cx, Res, Value};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::Ssd;

pub(super) fn ssd<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &Ssd,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let (x, dt, av, bm, cm) = (a.var(0)?, a.var(1)?, a.var(2)?, a.var(3)?, a.var(4)?);
    let (b, t, h, p) = (x.sizes[0], x.sizes[1], x.sizes[2], x.sizes[3]);
    let (g, n) = (bm.sizes[2], bm.sizes[3]);
    let steps = Steps { b, t };
    let dt = match a.opt(6) {
        Some(bias) => cx.add_mid(dt, bias, (1, b * t, h))?,
        None => dt.clone(),
    };
    let mut dt = cx.softplus(&dt)?;
    if op.dt_limit != (0.0, f64::INFINITY) {
        dt = cx.clamp(&dt, op.dt_limit.0, op.dt_limit.1)?;
    }
    let decay = cx.exp(&cx.mul_mid(&dt, av, (1, b * t, h))?)?;
    let decay = steps.cut(cx, &decay)?;
    let dtx = steps.cut(cx, &cx.mul_mid(x, &dt, (b * t * h, p, 1))?)?;
    let (bs, cs) = (steps.cut(cx, bm)?, steps.cut(cx, cm)?);
    let mut s = match a.opt(8) {
        Some(state) => state.clone(),
        None => cx.full(0.0, &[b, h, p, n])?,
    };
    // Heads of a group lie side by side, so a group's heads and channels are rows of one outer product.
    let rows = h / g * p;
    let (mut y, mut saved) = (Vec::new(), Vec::new());
    for k in 0..t {
        if k % op.chunk == 0 {
            saved.push(s.clone());
        }
        s = steps.restart(cx, &s, a.opt_ints(7), k)?;
        s = cx.mul_mid(&s, &decay[k], (b * h, p * n, 1))?;
        s = cx.add(&s, &cx.mm(&dtx[k], &bs[k], (b * g, rows, 1, n))?)?;
        y.push(cx.mm(&s, &cs[k], (b * g, rows, n, 1))?.view(&[b, h * p]));
    }
    let mut y = steps.join(cx, &y)?.view(&x.sizes);
    if let Some(d) = a.opt(5) {
        let d = cx.expand(d, (h, p, 1))?;
        y = cx.add(&y, &cx.mul_mid(x, &d, (1, b * t, h * p))?)?;
    }
    let state = match a.opt(8) {
        Some(_) => s.view(&[b, h, p, n]),
        None => steps.join(cx, &saved)?.view(&[b, saved.len(), h, p, n]),
    };
    Ok(vec![y.into(), state.into()])
}
