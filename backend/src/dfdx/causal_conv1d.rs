//! Depthwise causal convolution: one gathered, masked copy of the input per tap. The contract is
//! `marimba_ir::op::CausalConv1d`'s.

use super::tape::{Args, Cx, Res, Value};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::CausalConv1d;

pub(super) fn causal_conv1d<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &CausalConv1d,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let (x, w) = (a.var(0)?, a.var(1)?);
    let (b, t, i, taps) = (x.sizes[0], x.sizes[1], x.sizes[2], w.sizes[1]);
    let before = taps - 1;
    // Time with the inputs before this run in front: [B before+T I].
    let past = match a.opt(4) {
        Some(state) => state.clone(),
        None => cx.full(0.0, &[b, before, i])?,
    };
    let long = if before == 0 {
        x.clone()
    } else {
        cx.concat(&past, x, b)?
    };
    let rows = b * (before + t);
    let mut y = None;
    for j in 0..taps {
        let (mut idx, mut mask) = (Vec::new(), Vec::new());
        for r in 0..b * t {
            idx.push(r / t * (before + t) + before + r % t - j);
            let in_document = a
                .opt_ints(3)
                .is_none_or(|pos| j as i64 <= i64::from(pos[r]));
            mask.push(if in_document { 1.0 } else { 0.0 });
        }
        let tap = cx.rows(&long, rows, &idx)?;
        let tap = cx.mul_mid(&tap, &cx.constant(&mask, &[b * t])?, (b * t, i, 1))?;
        let tap = cx.mul_mid(&tap, &cx.cols(w, taps - 1 - j, 1)?, (1, b * t, i))?;
        y = Some(match y {
            Some(sum) => cx.add(&sum, &tap)?,
            None => tap,
        });
    }
    let mut y = match y {
        Some(y) => y,
        None => cx.full(0.0, &[b * t, i])?,
    };
    if let Some(bias) = a.opt(2) {
        y = cx.add_mid(&y, bias, (1, b * t, i))?;
    }
    if op.silu {
        y = cx.silu(&y)?;
    }
    let mut out = vec![y.view(&x.sizes).into()];
    if a.opt(4).is_some() {
        let idx: Vec<usize> = (0..b)
            .flat_map(|r| (0..before).map(move |k| r * (before + t) + t + k))
            .collect();
        let state = if before == 0 {
            past
        } else {
            cx.rows(&long, rows, &idx)?.view(&[b, before, i])
        };
        out.push(state.into());
    }
    Ok(out)
}
