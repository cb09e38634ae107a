//! The gated delta rule, token by token from its equation. The contract is `marimba_ir::op::GatedDelta`'s.

use super::selective_scan::Steps;
use super::tape::{Args, Cx, Res, Value};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::GatedDelta;

pub(super) fn gated_delta<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &GatedDelta,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let (q, k, v, gate, beta) = (a.var(0)?, a.var(1)?, a.var(2)?, a.var(3)?, a.var(4)?);
    let (b, t, h, p) = (v.sizes[0], v.sizes[1], v.sizes[2], v.sizes[3]);
    let (g, n) = (q.sizes[2], q.sizes[3]);
    let steps = Steps { b, t };
    let (q, k) = (steps.cut(cx, q)?, steps.cut(cx, k)?);
    let values = steps.cut(cx, v)?;
    let (gate, beta) = (steps.cut(cx, &cx.exp(gate)?)?, steps.cut(cx, beta)?);
    let mut s = match a.opt(6) {
        Some(state) => state.clone(),
        None => cx.full(0.0, &[b, h, n, p])?,
    };
    let (mut out, mut saved) = (Vec::new(), Vec::new());
    for i in 0..t {
        if i % op.chunk == 0 {
            saved.push(s.clone());
        }
        let key = cx.expand(&k[i], (b * g, h / g, n))?;
        let query = cx.expand(&q[i], (b * g, h / g, n))?;
        s = steps.restart(cx, &s, a.opt_ints(5), i)?;
        s = cx.mul_mid(&s, &gate[i], (b * h, n * p, 1))?;
        let read = cx.mm(&key, &s, (b * h, 1, n, p))?;
        let write = cx.sub(&values[i], &read)?;
        let write = cx.mul_mid(&write, &beta[i], (b * h, p, 1))?;
        s = cx.add(&s, &cx.mm(&key, &write, (b * h, n, 1, p))?)?;
        out.push(cx.mm(&query, &s, (b * h, 1, n, p))?.view(&[b, h * p]));
    }
    let out = steps.join(cx, &out)?.view(&v.sizes);
    let state = match a.opt(6) {
        Some(_) => s.view(&[b, h, n, p]),
        None => steps.join(cx, &saved)?.view(&[b, saved.len(), h, n, p]),
    };
    Ok(vec![out.into(), state.into()])
}
