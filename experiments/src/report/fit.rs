//! The scaling law `y = e + a * x^-b` fitted by least squares.
//!
//! For a given exponent the other two are linear, so only the exponent is searched (variable projection; Golub and
//! Pereyra 1973): no starting point, the same answer every time. `e >= 0` and `a >= 0` are enforced, as both are losses.

use serde::Serialize;

/// Exponents searched; published ones lie between 0.05 and 1 (Kaplan 2020, Hoffmann 2022).
pub(super) const B_RANGE: (f64, f64) = (0.005, 5.0);
/// Points of the first grid over the exponent's logarithm.
const N_GRID: usize = 200;

/// A fitted law.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PowerLaw {
    /// Irreducible part.
    pub e: f64,
    /// Factor.
    pub a: f64,
    /// Exponent.
    pub b: f64,
}

impl PowerLaw {
    /// The law's value at `x`.
    pub fn at(&self, x: f64) -> f64 {
        self.e + self.a * x.powf(-self.b)
    }
}

/// A law with its uncertainty.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fit {
    /// Least-squares law.
    pub law: PowerLaw,
    /// Root of the mean squared residual.
    pub rmse: f64,
    /// Points fitted.
    pub n: usize,
    /// 95% bootstrap intervals of `e`, `a`, `b` (percentiles over resampled points).
    pub ci95: [(f64, f64); 3],
    /// Resamples that could be fitted.
    pub n_resamples: usize,
}

/// Why there is no fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FitError {
    /// Three unknowns and no point to spare.
    #[error(
        "a scaling law has three unknowns: {distinct} different sizes were given, at least 4 are needed"
    )]
    TooFewPoints {
        /// Different `x` given.
        distinct: usize,
    },
    /// A power of a size needs it above zero; means of diverged runs are no numbers.
    #[error("point {index} cannot be fitted: sizes must be above zero and values finite")]
    BadPoint {
        /// Index of the point.
        index: usize,
    },
}

/// Fits `points` (x, y); intervals from `n_boot` bootstrap resamples drawn by `seed`.
///
/// # Errors
/// Fewer than four different `x`, or a point that is not finite and positive in `x`.
pub fn power_law(points: &[(f64, f64)], n_boot: usize, seed: u64) -> Result<Fit, FitError> {
    if let Some(index) = points
        .iter()
        .position(|(x, y)| !(x.is_finite() && *x > 0.0 && y.is_finite()))
    {
        return Err(FitError::BadPoint { index });
    }
    if distinct(points) < 4 {
        return Err(FitError::TooFewPoints {
            distinct: distinct(points),
        });
    }
    let (law, sse) = least_squares(points);
    let mut laws = Vec::with_capacity(n_boot);
    let mut state = seed;
    let mut resample = Vec::with_capacity(points.len());
    // A resample of fewer than three sizes determines no law and is left out.
    for _ in 0..n_boot {
        resample.clear();
        resample.extend(
            (0..points.len())
                .map(|_| points[(split_mix(&mut state) % points.len() as u64) as usize]),
        );
        if distinct(&resample) >= 3 {
            laws.push(least_squares(&resample).0);
        }
    }
    let interval = |of: fn(&PowerLaw) -> f64| {
        let mut values: Vec<f64> = laws.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        let at = |q: f64| {
            values
                .get(((values.len().max(1) - 1) as f64 * q).round() as usize)
                .copied()
        };
        (at(0.025).unwrap_or(f64::NAN), at(0.975).unwrap_or(f64::NAN))
    };
    Ok(Fit {
        law,
        rmse: (sse / points.len() as f64).sqrt(),
        n: points.len(),
        ci95: [interval(|l| l.e), interval(|l| l.a), interval(|l| l.b)],
        n_resamples: laws.len(),
    })
}

fn distinct(points: &[(f64, f64)]) -> usize {
    let mut xs: Vec<f64> = points.iter().map(|p| p.0).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    xs.len()
}

fn least_squares(points: &[(f64, f64)]) -> (PowerLaw, f64) {
    // Sizes relative to their geometric mean: the two columns of the linear problem stay comparable.
    let centre = (points.iter().map(|(x, _)| x.ln()).sum::<f64>() / points.len() as f64).exp();
    let at = |log_b: f64| linear(points, centre, log_b.exp());
    let (low, high) = (B_RANGE.0.ln(), B_RANGE.1.ln());
    let step = (high - low) / N_GRID as f64;
    let best = (0..=N_GRID)
        .map(|i| low + step * i as f64)
        .min_by(|x, y| at(*x).2.total_cmp(&at(*y).2))
        .unwrap_or(low);
    // Golden section inside the two neighbours of the best grid point.
    let ratio = 0.5 * (5f64.sqrt() - 1.0);
    let (mut a, mut b) = ((best - step).max(low), (best + step).min(high));
    while b - a > 1e-12 {
        let (c, d) = (b - ratio * (b - a), a + ratio * (b - a));
        if at(c).2 < at(d).2 { b = d } else { a = c }
    }
    let exponent = (0.5 * (a + b)).exp();
    let (e, factor, sse) = linear(points, centre, exponent);
    (
        PowerLaw {
            e,
            a: factor * centre.powf(exponent),
            b: exponent,
        },
        sse,
    )
}

/// Best `e >= 0`, `a >= 0` for a given exponent, and the sum of squared residuals; `a` at sizes relative to `centre`.
fn linear(points: &[(f64, f64)], centre: f64, exponent: f64) -> (f64, f64, f64) {
    let n = points.len() as f64;
    let rows: Vec<(f64, f64)> = points
        .iter()
        .map(|(x, y)| ((x / centre).powf(-exponent), *y))
        .collect();
    let (mean_z, mean_y) = (
        rows.iter().map(|r| r.0).sum::<f64>() / n,
        rows.iter().map(|r| r.1).sum::<f64>() / n,
    );
    let cov: f64 = rows.iter().map(|(z, y)| (z - mean_z) * (y - mean_y)).sum();
    let var: f64 = rows.iter().map(|(z, _)| (z - mean_z).powi(2)).sum();
    let mut a = if var > 0.0 { cov / var } else { 0.0 };
    let mut e = mean_y - a * mean_z;
    if a < 0.0 {
        (a, e) = (0.0, mean_y.max(0.0));
    } else if e < 0.0 {
        let zz: f64 = rows.iter().map(|(z, _)| z * z).sum();
        (a, e) = (
            (rows.iter().map(|(z, y)| z * y).sum::<f64>() / zz).max(0.0),
            0.0,
        );
    }
    (
        e,
        a,
        rows.iter().map(|(z, y)| (y - e - a * z).powi(2)).sum(),
    )
}

/// SplitMix64 (Steele, Lea and Flood 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const X: [f64; 6] = [1e6, 3e6, 1e7, 3e7, 1e8, 3e8];

    #[test]
    fn finds_the_law_that_made_the_points() {
        let law = PowerLaw {
            e: 1.7,
            a: 400.0,
            b: 0.34,
        };
        let points = X.map(|x| (x, law.at(x)));
        let fit = power_law(&points, 100, 1).unwrap();
        assert!(
            (fit.law.e - 1.7).abs() < 1e-5 && (fit.law.b - 0.34).abs() < 1e-5,
            "{:?}",
            fit.law
        );
        assert!((fit.law.a / 400.0 - 1.0).abs() < 1e-4 && fit.rmse < 1e-6);
    }

    #[test]
    fn agrees_with_scipy_on_noisy_points() {
        // y = (1.7 + 400 x^-0.34) with noise up to 0.3%; scipy 1.17.1 curve_fit gives e 1.708964317409343,
        // a 412.2423456361962, b 0.34226734627268607.
        let y = [
            5.355339444138486,
            4.203421184663743,
            3.369145011415222,
            2.851170621778235,
            2.460659918610928,
            2.2246126574740215,
        ];
        let points: Vec<(f64, f64)> = X.into_iter().zip(y).collect();
        let fit = power_law(&points, 500, 7).unwrap();
        assert!(
            (fit.law.e - 1.708964317409343).abs() < 1e-5,
            "{:?}",
            fit.law
        );
        assert!((fit.law.b - 0.34226734627268607).abs() < 1e-6);
        assert!((fit.law.a / 412.2423456361962 - 1.0).abs() < 1e-4);
        for ((low, high), value) in fit.ci95.into_iter().zip([fit.law.e, fit.law.a, fit.law.b]) {
            assert!(
                low <= value && value <= high && low < high,
                "{low} {value} {high}"
            );
        }
        assert_eq!(fit, power_law(&points, 500, 7).unwrap());
    }

    #[test]
    fn says_why_there_is_no_fit() {
        let flat = [(1.0, 2.0), (2.0, 2.0), (3.0, 2.0), (1.0, 2.0)];
        assert_eq!(
            power_law(&flat, 10, 0),
            Err(FitError::TooFewPoints { distinct: 3 })
        );
        let bad = [(1.0, 2.0), (0.0, 1.0)];
        assert_eq!(power_law(&bad, 10, 0), Err(FitError::BadPoint { index: 1 }));
        let rising = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (4.0, 4.0)];
        assert_eq!(power_law(&rising, 10, 0).unwrap().law.a, 0.0);
    }
}
