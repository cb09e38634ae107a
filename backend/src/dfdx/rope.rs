//! Rotary embedding: tables of cos and sin are constants, halves are picked, rotated and joined. The contract is
//! `marimba_ir::op::Rope`'s; angles are formed in f32, as there.

use super::tape::{Args, Cx, Res, Value};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::Rope;

pub(super) fn rope<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &Rope,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let x = a.var(0)?;
    let (b, t, h, p) = (x.sizes[0], x.sizes[1], x.sizes[2], x.sizes[3]);
    let half = op.dims / 2;
    if half == 0 {
        return Ok(vec![x.clone().into()]);
    }
    let freq = a.var(2)?.host();
    let sign = if op.inverse { -1.0 } else { 1.0 };
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    for r in 0..b * t {
        let pos = match a.opt_ints(1) {
            Some(pos) => pos[r],
            None => (r % t) as i32,
        };
        for f in &freq {
            let angle = f64::from(pos as f32 * *f as f32);
            cos.push(op.factor * angle.cos());
            sin.push(sign * op.factor * angle.sin());
        }
    }
    let cos = cx.constant(&cos, &[b * t, half])?;
    let sin = cx.constant(&sin, &[b * t, half])?;
    let over_heads = (b * t, h, half);
    let (x1, x2) = (cx.cols(x, 0, half)?, cx.cols(x, half, half)?);
    let y1 = cx.sub(
        &cx.mul_mid(&x1, &cos, over_heads)?,
        &cx.mul_mid(&x2, &sin, over_heads)?,
    )?;
    let y2 = cx.add(
        &cx.mul_mid(&x2, &cos, over_heads)?,
        &cx.mul_mid(&x1, &sin, over_heads)?,
    )?;
    let rows = b * t * h;
    let mut y = cx.concat(&y1, &y2, rows)?;
    if op.dims < p {
        y = cx.concat(&y, &cx.cols(x, op.dims, p - op.dims)?, rows)?;
    }
    Ok(vec![y.view(&x.sizes).into()])
}
