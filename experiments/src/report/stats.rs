//! Estimates over seeds and tests between groups.
//!
//! A mean needs one value, a spread or an interval two; a test needs two seeds on each side. Less is said as such, never
//! papered over by a number.

use std::collections::BTreeMap;

use serde::Serialize;
use statrs::distribution::{ContinuousCDF, StudentsT};

pub use crate::record::Goal;

/// Largest p-value that is called a difference.
pub const ALPHA: f64 = 0.05;

/// Mean and spread of the values that are finite.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    /// Values used.
    pub n: usize,
    /// Values left out because they are NaN or infinite.
    pub n_non_finite: usize,
    /// Their mean; `None` where `n` is 0.
    pub mean: Option<f64>,
    /// Sample standard deviation (n - 1); `None` where `n` < 2.
    pub sd: Option<f64>,
    /// 95% confidence interval of the mean by Student's t; `None` where `n` < 2.
    pub ci95: Option<(f64, f64)>,
}

impl Estimate {
    /// Summarises `values`.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Estimate {
        let (finite, rest): (Vec<f64>, Vec<f64>) = values.into_iter().partition(|v| v.is_finite());
        let n = finite.len();
        let mean = (n > 0).then(|| mean(&finite));
        let sd = mean.filter(|_| n > 1).map(|m| sd(&finite, m));
        let ci95 = mean.zip(sd).and_then(|(m, s)| {
            let half = t_quantile((n - 1) as f64)? * s / (n as f64).sqrt();
            Some((m - half, m + half))
        });
        Estimate {
            n,
            n_non_finite: rest.len(),
            mean,
            sd,
            ci95,
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn sd(values: &[f64], mean: f64) -> f64 {
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (values.len() - 1) as f64).sqrt()
}

/// The 97.5% quantile of Student's t, the factor of a 95% interval.
fn t_quantile(dof: f64) -> Option<f64> {
    let p = 0.975;
    let t = StudentsT::new(0.0, 1.0, dof).ok()?;
    // Bisection on the distribution function: exact to rounding, unlike a closed-form approximation.
    let (mut low, mut high) = (0.0, 1.0);
    while t.cdf(high) < p {
        high *= 2.0;
    }
    for _ in 0..200 {
        let mid = 0.5 * (low + high);
        if t.cdf(mid) < p {
            low = mid
        } else {
            high = mid
        }
    }
    Some(0.5 * (low + high))
}

/// Two-sided p-value of a t statistic.
fn p_value(t: f64, dof: f64) -> Option<f64> {
    let dist = StudentsT::new(0.0, 1.0, dof).ok()?;
    Some((2.0 * dist.cdf(-t.abs())).min(1.0))
}

/// How two groups were tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Paired t test over the seeds that both groups have.
    Paired,
    /// Welch's t test: too few seeds in common.
    Welch,
    /// No test: fewer than two values on a side.
    Untested,
}

impl Method {
    /// In a word, as JSON has it.
    pub fn word(self) -> &'static str {
        match self {
            Method::Paired => "paired",
            Method::Welch => "welch",
            Method::Untested => "untested",
        }
    }
}

/// What a test says of the first group against the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Better, p < 0.05.
    Better,
    /// Worse, p < 0.05.
    Worse,
    /// p >= 0.05: the data do not tell them apart, which is not to say that they are equal.
    NoDifferenceShown,
    /// Fewer than two seeds on a side.
    NotTested,
}

impl Verdict {
    /// In words, for tables.
    pub fn words(self) -> &'static str {
        match self {
            Verdict::Better => "better",
            Verdict::Worse => "worse",
            Verdict::NoDifferenceShown => "no difference shown",
            Verdict::NotTested => "not tested",
        }
    }
}

/// A test of group `a` against group `b`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Test {
    /// How.
    pub method: Method,
    /// Pairs of a paired test, else the smaller of the two numbers of values.
    pub n: usize,
    /// Mean of `a` minus mean of `b`; `None` where a side is empty.
    pub difference: Option<f64>,
    /// 95% confidence interval of the difference.
    pub ci95: Option<(f64, f64)>,
    /// Two-sided p-value, not corrected for several comparisons.
    pub p: Option<f64>,
    /// Corrected by [`holm`]; the verdict goes by this one.
    pub p_adjusted: Option<f64>,
    /// The outcome.
    pub verdict: Verdict,
}

/// Tests `a` against `b`, values by seed. Seeds in common are paired; with fewer than two of those, Welch's test is
/// used; with fewer than two values on a side nothing is tested.
pub fn test(a: &BTreeMap<u64, f64>, b: &BTreeMap<u64, f64>, goal: Goal) -> Test {
    let finite = |m: &BTreeMap<u64, f64>| -> BTreeMap<u64, f64> {
        m.iter()
            .filter(|(_, v)| v.is_finite())
            .map(|(k, v)| (*k, *v))
            .collect()
    };
    let (a, b) = (finite(a), finite(b));
    let pairs: Vec<f64> = a
        .iter()
        .filter_map(|(seed, x)| b.get(seed).map(|y| x - y))
        .collect();
    let (va, vb): (Vec<f64>, Vec<f64>) = (a.into_values().collect(), b.into_values().collect());
    let (method, n, difference, error, dof) = if pairs.len() >= 2 {
        let d = mean(&pairs);
        let n = pairs.len();
        (
            Method::Paired,
            n,
            Some(d),
            sd(&pairs, d) / (n as f64).sqrt(),
            (n - 1) as f64,
        )
    } else if va.len() >= 2 && vb.len() >= 2 {
        let (ma, mb) = (mean(&va), mean(&vb));
        let (ea, eb) = (
            sd(&va, ma).powi(2) / va.len() as f64,
            sd(&vb, mb).powi(2) / vb.len() as f64,
        );
        let dof = if ea + eb > 0.0 {
            (ea + eb).powi(2)
                / (ea.powi(2) / (va.len() - 1) as f64 + eb.powi(2) / (vb.len() - 1) as f64)
        } else {
            1.0
        };
        (
            Method::Welch,
            va.len().min(vb.len()),
            Some(ma - mb),
            (ea + eb).sqrt(),
            dof,
        )
    } else {
        let difference = (!va.is_empty() && !vb.is_empty()).then(|| mean(&va) - mean(&vb));
        (
            Method::Untested,
            va.len().min(vb.len()),
            difference,
            0.0,
            0.0,
        )
    };
    let (p, ci95) = match (method, difference) {
        (Method::Untested, _) | (_, None) => (None, None),
        // Without any spread the statistic is 0/0 or infinite; the limits are these.
        (_, Some(d)) if error == 0.0 => (Some(if d == 0.0 { 1.0 } else { 0.0 }), Some((d, d))),
        (_, Some(d)) => {
            let half = t_quantile(dof).map(|t| t * error);
            (p_value(d / error, dof), half.map(|h| (d - h, d + h)))
        }
    };
    let mut test = Test {
        method,
        n,
        difference,
        ci95,
        p,
        p_adjusted: p,
        verdict: Verdict::NotTested,
    };
    test.verdict = judge(&test, goal);
    test
}

fn judge(test: &Test, goal: Goal) -> Verdict {
    match (test.p_adjusted, test.difference) {
        (Some(p), Some(d)) if p < ALPHA && d != 0.0 => {
            if (d > 0.0) == (goal == Goal::Higher) {
                Verdict::Better
            } else {
                Verdict::Worse
            }
        }
        (Some(_), _) => Verdict::NoDifferenceShown,
        (None, _) => Verdict::NotTested,
    }
}

/// Holm's correction for several comparisons (Holm 1979, "A simple sequentially rejective multiple test procedure"):
/// sets `p_adjusted` and the verdicts.
pub fn holm<'a>(tests: impl IntoIterator<Item = &'a mut Test>, goal: Goal) {
    let mut tests: Vec<&mut Test> = tests.into_iter().filter(|t| t.p.is_some()).collect();
    tests.sort_by(|a, b| a.p.partial_cmp(&b.p).unwrap_or(std::cmp::Ordering::Equal));
    let m = tests.len();
    let mut floor = 0.0f64;
    for (rank, test) in tests.into_iter().enumerate() {
        floor = floor
            .max(test.p.unwrap_or(1.0) * (m - rank) as f64)
            .min(1.0);
        test.p_adjusted = Some(floor);
        test.verdict = judge(test, goal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Reference values: scipy 1.17.1, scipy.stats.t.ppf, t.interval, ttest_rel, ttest_ind(equal_var=False).
    const A: [f64; 5] = [0.912, 0.934, 0.921, 0.945, 0.907];
    const B: [f64; 5] = [0.880, 0.915, 0.902, 0.919, 0.895];

    fn close(x: f64, y: f64) {
        assert!((x - y).abs() <= 1e-9 * y.abs().max(1e-3), "{x} is not {y}");
    }

    fn seeds(values: &[f64]) -> BTreeMap<u64, f64> {
        values
            .iter()
            .enumerate()
            .map(|(i, v)| (i as u64, *v))
            .collect()
    }

    #[test]
    fn quantiles_of_student_t() {
        for (dof, t) in [
            (1.0, 12.706204736174694),
            (2.0, 4.302652729749462),
            (9.0, 2.262157162798205),
        ] {
            close(t_quantile(dof).unwrap(), t);
        }
    }

    #[test]
    fn estimates() {
        let e = Estimate::of(A);
        close(e.mean.unwrap(), 0.9238);
        close(e.sd.unwrap(), 0.015674820573135732);
        close(e.ci95.unwrap().0, 0.9043371396160336);
        close(e.ci95.unwrap().1, 0.9432628603839663);
        let one = Estimate::of([2.0, f64::NAN]);
        assert_eq!(
            (one.n, one.n_non_finite, one.mean, one.sd, one.ci95),
            (1, 1, Some(2.0), None, None)
        );
        assert_eq!(Estimate::of([]).mean, None);
    }

    #[test]
    fn paired_and_welch() {
        let t = test(&seeds(&A), &seeds(&B), Goal::Higher);
        assert_eq!(
            (t.method, t.n, t.verdict),
            (Method::Paired, 5, Verdict::Better)
        );
        close(t.p.unwrap(), 0.0031961757089230772);
        close(t.ci95.unwrap().0, 0.012119344487717046);
        close(t.ci95.unwrap().1, 0.03108065551228295);
        assert_eq!(
            test(&seeds(&A), &seeds(&B), Goal::Lower).verdict,
            Verdict::Worse
        );

        let other: BTreeMap<u64, f64> = [(10, 0.95), (11, 0.97), (12, 0.91)].into();
        let t = test(&seeds(&A), &other, Goal::Higher);
        assert_eq!(
            (t.method, t.verdict),
            (Method::Welch, Verdict::NoDifferenceShown)
        );
        close(t.p.unwrap(), 0.3880790472454267);

        let t = test(&seeds(&A[..2]), &seeds(&B[..2]), Goal::Higher);
        close(t.p.unwrap(), 0.15889197165761765);
    }

    #[test]
    fn too_little_is_said_as_such() {
        let t = test(&seeds(&A[..1]), &seeds(&B), Goal::Higher);
        assert_eq!(
            (t.method, t.verdict, t.p),
            (Method::Untested, Verdict::NotTested, None)
        );
        assert!(t.difference.is_some());
        let t = test(&seeds(&[]), &seeds(&B), Goal::Higher);
        assert_eq!(t.difference, None);
        let same = test(&seeds(&A), &seeds(&A), Goal::Higher);
        assert_eq!(
            (same.p, same.verdict),
            (Some(1.0), Verdict::NoDifferenceShown)
        );
        let shifted = test(&seeds(&[1.0, 2.0]), &seeds(&[0.5, 1.5]), Goal::Higher);
        assert_eq!((shifted.p, shifted.verdict), (Some(0.0), Verdict::Better));
    }

    #[test]
    fn holm_adjusts_like_the_paper() {
        let mut tests: Vec<Test> = [0.01, 0.04, 0.03, 0.005]
            .map(|p| Test {
                p: Some(p),
                ..test(&seeds(&A), &seeds(&B), Goal::Higher)
            })
            .into();
        holm(&mut tests, Goal::Higher);
        let adjusted: Vec<f64> = tests.iter().map(|t| t.p_adjusted.unwrap()).collect();
        for (x, y) in adjusted.iter().zip([0.03, 0.06, 0.06, 0.02]) {
            close(*x, y);
        }
        assert_eq!(tests[1].verdict, Verdict::NoDifferenceShown);
        assert_eq!(tests[0].verdict, Verdict::Better);
    }
}
