//! The Mamba-1 scan, token by token from its equations. The contract is `marimba_ir::op::SelectiveScan`'s.

use super::tape::{Args, Cx, Res, Value, Var};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::SelectiveScan;

/// The tokens of a scan: every input cut into one tensor per token, and which batch rows start a document there.
pub(super) struct Steps {
    /// Batch rows.
    pub(super) b: usize,
    /// Tokens.
    pub(super) t: usize,
}

impl Steps {
    /// `x [B T ..]` as T tensors of B rows.
    pub(super) fn cut<E: Dtype, D: Device<E>>(
        &self,
        cx: &Cx<E, D>,
        x: &Var<E, D>,
    ) -> Res<Vec<Var<E, D>>> {
        let width = x.len() / (self.b * self.t);
        let by_time = cx.swap(x, (1, self.b, self.t, width))?;
        (0..self.t)
            .map(|t| Ok(cx.rows(&by_time, self.t, &[t])?.view(&[self.b, width])))
            .collect()
    }

    /// T tensors of B rows as `[B T ..]`.
    pub(super) fn join<E: Dtype, D: Device<E>>(
        &self,
        cx: &Cx<E, D>,
        parts: &[Var<E, D>],
    ) -> Res<Var<E, D>> {
        let width = parts[0].len() / self.b;
        cx.swap(&cx.stack(parts)?, (1, parts.len(), self.b, width))
    }

    /// The state with the rows that start a document at token t zeroed.
    pub(super) fn restart<E: Dtype, D: Device<E>>(
        &self,
        cx: &Cx<E, D>,
        state: &Var<E, D>,
        pos: Option<&[i32]>,
        t: usize,
    ) -> Res<Var<E, D>> {
        let keep: Vec<f64> = (0..self.b)
            .map(|r| match pos {
                Some(pos) if pos[r * self.t + t] == 0 => 0.0,
                _ => 1.0,
            })
            .collect();
        if keep.iter().all(|&k| k == 1.0) {
            return Ok(state.clone());
        }
        let keep = cx.constant(&keep, &[self.b])?;
        cx.mul_mid(state, &keep, (self.b, state.len() / self.b, 1))
    }
}

pub(super) fn selective_scan<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &SelectiveScan,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let (x, dt, am, bm, cm) = (a.var(0)?, a.var(1)?, a.var(2)?, a.var(3)?, a.var(4)?);
    let (b, t, i) = (x.sizes[0], x.sizes[1], x.sizes[2]);
    let (g, n) = (bm.sizes[2], bm.sizes[3]);
    let steps = Steps { b, t };
    let dt = match a.opt(6) {
        Some(bias) => cx.add_mid(dt, bias, (1, b * t, i))?,
        None => dt.clone(),
    };
    let dt = cx.softplus(&dt)?;
    let dtx = steps.cut(cx, &cx.mul(&dt, x)?)?;
    let dt = steps.cut(cx, &dt)?;
    let (bs, cs) = (steps.cut(cx, bm)?, steps.cut(cx, cm)?);
    let mut h = match a.opt(9) {
        Some(state) => state.clone(),
        None => cx.full(0.0, &[b, i, n])?,
    };
    let (mut y, mut saved) = (Vec::new(), Vec::new());
    for k in 0..t {
        if k % op.chunk == 0 {
            saved.push(h.clone());
        }
        h = steps.restart(cx, &h, a.opt_ints(8), k)?;
        let decay = cx.expand(&dt[k], (b * i, n, 1))?;
        let decay = cx.exp(&cx.mul_mid(&decay, am, (1, b, i * n))?)?;
        let input = cx.mm(&dtx[k], &bs[k], (b * g, i / g, 1, n))?;
        h = cx.add(&cx.mul(&decay, &h)?, &input)?.view(&[b, i, n]);
        y.push(cx.mm(&h, &cs[k], (b * g, i / g, n, 1))?.view(&[b, i]));
    }
    let mut y = steps.join(cx, &y)?;
    if let Some(d) = a.opt(5) {
        y = cx.add(&y, &cx.mul_mid(x, d, (1, b * t, i))?)?;
    }
    if let Some(z) = a.opt(7) {
        y = cx.mul(&y, &cx.silu(z)?)?;
    }
    let state = match a.opt(9) {
        Some(_) => h,
        None => steps.join(cx, &saved)?.view(&[b, saved.len(), i, n]),
    };
    Ok(vec![y.view(&x.sizes).into(), state.into()])
}
