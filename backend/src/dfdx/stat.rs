//! Activation statistics, counted on the host: they are read, never differentiated. The contract is `marimba_ir::op::Stat`'s.

use super::tape::{Args, Cx, Res, Value};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::{STAT_LEN, stat_bucket};

/// Largest finite f16.
const F16_MAX: f64 = 65504.0;

pub(super) fn stat<E: Dtype, D: Device<E>>(cx: &Cx<E, D>, a: &Args<E, D>) -> Res<Vec<Value<E, D>>> {
    let x = a.var(0)?.host();
    let n = x.len().max(1) as f64;
    let mut s = vec![0.0; STAT_LEN];
    s[0] = (x.iter().map(|x| x * x).sum::<f64>() / n).sqrt();
    s[1] = x.iter().fold(0.0, |m, x| x.abs().max(m));
    s[2] = x
        .iter()
        .filter(|x| !x.is_finite() || x.abs() > F16_MAX)
        .count() as f64;
    s[3] = x.iter().copied().fold(f64::INFINITY, f64::min);
    s[4] = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    s[5] = x.iter().sum::<f64>() / n;
    for &v in &x {
        s[6 + stat_bucket(v as f32)] += 1.0;
    }
    Ok(vec![cx.constant(&s, &[STAT_LEN])?.into()])
}
