//! Attention with the whole score matrix and a dense mask. The contract is `marimba_ir::op::Attention`'s.

use super::tape::{Args, Cx, Fault, Res, Value};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::Attention;

/// Added to scores that are not seen: their exponentials are exactly zero.
const UNSEEN: f64 = -1e30;

pub(super) fn attention<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &Attention,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let (q, k, v) = (a.var(0)?, a.var(1)?, a.var(2)?);
    let (b, t, h, p) = (q.sizes[0], q.sizes[1], q.sizes[2], q.sizes[3]);
    let (s, g) = (k.sizes[1], k.sizes[2]);
    let slot = match a.opt_ints(4) {
        Some(slot) => i64::from(*slot.first().ok_or_else(|| Fault("empty slot".into()))?),
        None => 0,
    };
    let mut mask = vec![UNSEEN; b * t * s];
    for r in 0..b * t {
        let here = slot + (r % t) as i64;
        let seen = match a.opt_ints(3) {
            Some(pos) => i64::from(pos[r]),
            None => i64::MAX,
        };
        for key in 0..s {
            let back = here - key as i64;
            if back >= 0 && back <= seen && op.window.is_none_or(|w| back < w as i64) {
                mask[r * s + key] = 0.0;
            }
        }
    }
    let mask = cx.constant(&mask, &[b, t * s])?;

    let heads = |x: &_, n: usize| -> Res<_> { cx.swap(x, (b, n, g, p)) };
    let spread = |x: &_| -> Res<_> { cx.expand(x, (b * g, h / g, s * p)) };
    let qh = cx.swap(q, (b, t, h, p))?;
    let kh = spread(&heads(k, s)?)?;
    let vh = spread(&heads(v, s)?)?;
    let scores = cx.scale(&cx.mm_t(&qh, &kh, (b * h, t, p, s))?, op.scale)?;
    let scores = cx.add_mid(&scores, &mask, (b, h, t * s))?;
    let lse = cx.log_sum_exp(&scores)?;
    let weights = cx.softmax(&scores, &lse)?;
    let out = cx.mm(&weights, &vh, (b * h, t, s, p))?;
    let out = cx.swap(&out, (b, h, t, p))?;
    Ok(vec![out.into(), lse.view(&[b, h, t]).into()])
}
