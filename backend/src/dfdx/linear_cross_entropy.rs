//! Head and loss with all logits at once. The contract is `marimba_ir::op::LinearCrossEntropy`'s.

use super::linear::product;
use super::tape::{Args, Cx, Fault, Res, Value};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::LinearCrossEntropy;

pub(super) fn linear_cross_entropy<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &LinearCrossEntropy,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let (x, w, targets) = (a.var(0)?, a.var(1)?, a.ints(2)?);
    let (rows, v) = (x.rows(), w.sizes[0]);
    if let Some(t) = targets.iter().find(|&&t| t >= v as i32) {
        return Err(Fault(format!("target {t} is not below {v}")));
    }
    let mut logits = product(cx, x, w)?.view(&[rows, v]);
    if op.multiplier != 1.0 {
        logits = cx.scale(&logits, op.multiplier)?;
    }
    let lse = cx.log_sum_exp(&logits)?;
    let valid: Vec<f64> = targets
        .iter()
        .map(|&t| if t < 0 { 0.0 } else { 1.0 })
        .collect();
    let idx = targets.iter().map(|&t| t.max(0) as usize).collect();
    let target = cx.pick(&logits, 1, idx)?.view(&[rows]);
    let valid = cx.constant(&valid, &[rows])?;
    let nll = cx.mul(&cx.sub(&lse, &target)?, &valid)?;
    let mut loss = cx.sum_all(&nll)?;
    if op.z_loss != 0.0 {
        let mut squares = cx.square(&lse)?;
        if !op.z_all {
            squares = cx.mul(&squares, &valid)?;
        }
        let z = cx.scale(&cx.sum_all(&squares)?, op.z_loss)?;
        loss = cx.add(&loss, &z)?;
    }
    let loss = cx.mul(&loss, a.var(3)?)?;

    let hit: Vec<f64> = logits
        .host()
        .chunks(v)
        .zip(targets)
        .map(|(row, &t)| {
            // `max_by` keeps the last of equals, so the row is read from its end.
            let best = (0..v).rev().max_by(|&i, &j| row[i].total_cmp(&row[j]));
            f64::from(u8::from(t >= 0 && best == Some(t as usize)))
        })
        .collect();
    let mut sizes = x.sizes.clone();
    sizes.pop();
    Ok(vec![
        loss.into(),
        nll.view(&sizes).into(),
        lse.view(&sizes).into(),
        cx.constant(&hit, &sizes)?.into(),
    ])
}
