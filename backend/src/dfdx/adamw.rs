//! Global norm and the AdamW step in dfdx arithmetic, without a tape. The contract is that of `marimba_ir::op::{GlobalNorm, AdamW}`.

use super::tape::{Args, Cx, Res, Value, Var};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::AdamW;

pub(super) fn global_norm<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let mut sum = cx.full(0.0, &[1])?;
    for i in 0..a.0.len() {
        sum = cx.add(&sum, &cx.sum_all(&cx.square(a.var(i)?)?)?)?;
    }
    Ok(vec![cx.sqrt(&sum)?.into()])
}

pub(super) fn adamw<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &AdamW,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let number =
        |i: usize| -> Res<f64> { Ok(a.var(i)?.host().first().copied().unwrap_or(f64::NAN)) };
    let (lr, step, norm) = (number(0)?, number(1)?, number(2)?);
    let clip = match op.clip {
        Some(clip) if norm > clip => clip / norm,
        _ => 1.0,
    };
    let (b1, b2) = op.betas;
    let average = |old: &Var<E, D>, new: &Var<E, D>, beta: f64| -> Res<Var<E, D>> {
        cx.add(&cx.scale(old, beta)?, &cx.scale(new, 1.0 - beta)?)
    };
    let mut out: Vec<Value<E, D>> = Vec::new();
    for (i, tensor) in op.tensors.iter().enumerate() {
        let [p, g, m, v] = [0, 1, 2, 3].map(|k| a.var(3 + 4 * i + k));
        if !norm.is_finite() {
            out.extend([p?.clone().into(), m?.clone().into(), v?.clone().into()]);
            continue;
        }
        let (p, g) = (p?, cx.scale(g?, clip)?);
        let m = average(m?, &g, b1)?;
        let v = average(v?, &cx.square(&g)?, b2)?;
        let root = cx.sqrt(&cx.scale(&v, 1.0 / (1.0 - b2.powf(step)))?)?;
        let ratio = cx.mul(
            &cx.scale(&m, 1.0 / (1.0 - b1.powf(step)))?,
            &cx.recip(&cx.offset(&root, op.eps)?)?,
        )?;
        let lr = lr * tensor.lr_scale;
        let p = cx.sub(
            &cx.scale(p, 1.0 - lr * tensor.decay)?,
            &cx.scale(&ratio, lr)?,
        )?;
        out.extend([p.into(), m.into(), v.into()]);
    }
    for &i in &op.copies {
        out.push(out[3 * i].clone());
    }
    Ok(out)
}
