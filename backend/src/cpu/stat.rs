//! Activation statistics: one pass per part of the tensor, parts joined in order. Magnitudes that are not finite are counted, and left
//! out of everything else.

use super::tensor::{Args, Cx, Results};
use marimba_ir::op::{STAT_BUCKETS, STAT_LEN, Stat, stat_bucket};

/// Elements of a task.
const TASK: usize = 16 * 1024;

/// Largest finite f16.
const F16_MAX: f32 = 65504.0;

/// What a part contributes.
#[derive(Clone)]
struct Part {
    squares: f64,
    sum: f64,
    max_abs: f32,
    min: f32,
    max: f32,
    beyond: u64,
    finite: u64,
    buckets: [u32; STAT_BUCKETS],
}

const EMPTY: Part = Part {
    squares: 0.0,
    sum: 0.0,
    max_abs: 0.0,
    min: f32::INFINITY,
    max: f32::NEG_INFINITY,
    beyond: 0,
    finite: 0,
    buckets: [0; STAT_BUCKETS],
};

/// Statistics of x.
pub(super) fn stat(_: &Stat, a: &Args, r: &mut Results, cx: &Cx) {
    let x = a.f(0);
    let mut parts = vec![EMPTY; x.len().div_ceil(TASK)];
    cx.for_each(parts.iter_mut().collect(), |task, part: &mut Part, _| {
        for &x in &x[task * TASK..x.len().min((task + 1) * TASK)] {
            add(part, x);
        }
    });
    let mut all = EMPTY;
    for p in parts {
        all.squares += p.squares;
        all.sum += p.sum;
        all.max_abs = all.max_abs.max(p.max_abs);
        all.min = all.min.min(p.min);
        all.max = all.max.max(p.max);
        all.beyond += p.beyond;
        all.finite += p.finite;
        for (a, b) in all.buckets.iter_mut().zip(p.buckets) {
            *a += b;
        }
    }
    let n = all.finite.max(1) as f64;
    let s = r.take_f(0);
    s[0] = (all.squares / n).sqrt() as f32;
    s[1] = all.max_abs;
    s[2] = all.beyond as f32;
    s[3] = if all.finite > 0 { all.min } else { 0.0 };
    s[4] = if all.finite > 0 { all.max } else { 0.0 };
    s[5] = (all.sum / n) as f32;
    for (s, b) in s[STAT_LEN - STAT_BUCKETS..].iter_mut().zip(all.buckets) {
        *s = b as f32;
    }
}

fn add(p: &mut Part, x: f32) {
    let magnitude = x.abs();
    p.beyond += u64::from(magnitude > F16_MAX || x.is_nan());
    p.buckets[stat_bucket(x)] += 1;
    if x.is_finite() {
        p.squares += f64::from(x) * f64::from(x);
        p.sum += f64::from(x);
        p.max_abs = p.max_abs.max(magnitude);
        p.min = p.min.min(x);
        p.max = p.max.max(x);
        p.finite += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use marimba_ir::{Type, dims};

    #[test]
    fn counts_and_moments() {
        let mut x: Vec<f32> = randn(1, 50_000).iter().map(|x| x * 3.0 + 1.0).collect();
        x[40_000] = -70_000.0;
        let w = wide(&x);
        let n = x.len() as f64;
        let got = run(Stat, &[f(Type::f32(dims![T 50, D 1000]), &x)]);
        let s = floats(&got[0]);
        let want = [
            (w.iter().map(|v| v * v).sum::<f64>() / n).sqrt(),
            70_000.0,
            1.0,
            -70_000.0,
            w.iter().copied().fold(f64::MIN, f64::max),
            w.iter().sum::<f64>() / n,
        ];
        for (got, want) in s.iter().zip(want) {
            assert!(
                (f64::from(*got) - want).abs() <= 1e-5 * want.abs(),
                "{got}, not {want}"
            );
        }
        let mut buckets = vec![0.0f32; STAT_BUCKETS];
        for &v in &x {
            buckets[stat_bucket(v)] += 1.0;
        }
        assert_eq!(&s[6..], &buckets[..]);
    }

    #[test]
    fn what_is_not_finite_is_counted() {
        let got = run(
            Stat,
            &[f(
                Type::f32(dims![X 4]),
                &[f32::NAN, f32::INFINITY, 2.0, -2.0],
            )],
        );
        let s = floats(&got[0]);
        assert_eq!(&s[..6], &[2.0, 2.0, 2.0, -2.0, 2.0, 0.0]);
    }
}
