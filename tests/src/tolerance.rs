//! The one table of tolerances: how far a backend may be from the reference, per tensor.
//!
//! The measure is an error *ratio*, `norm(got - want) / norm(want)`, so that one bound serves tensors of all sizes. Samples are numbers of
//! size 1; where a gradient of them cancels to almost nothing (a softmax over one expert), [`FLOOR`] stands for its size.

/// Root mean square below which a tensor counts as having this one.
pub const FLOOR: f64 = 1e-2;

/// Largest error ratio of results and of gradients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Of results.
    pub forward: f64,
    /// Of gradients of arguments.
    pub backward: f64,
}

const fn both(forward: f64, backward: f64) -> Tolerance {
    Tolerance { forward, backward }
}

/// Moving numbers changes none of them.
const EXACT: Tolerance = both(0.0, 1e-6);
/// A few roundings of f32 (epsilon 1.2e-7) an element.
const FEW: Tolerance = both(1e-6, 5e-6);
/// Sums of up to a thousand products, or exponentials of such.
const SUMS: Tolerance = both(5e-6, 2e-5);
/// Recurrences over up to a thousand tokens.
const SCANS: Tolerance = both(2e-5, 5e-5);

/// Ops in f32 by name. Backward ops are measured through the gradients of the op they belong to.
pub const F32: &[(&str, Tolerance)] = &[
    ("embed", EXACT),
    ("linear", SUMS),
    ("rms_norm", SUMS),
    ("rope", FEW),
    ("attention", SUMS),
    ("causal_conv1d", FEW),
    ("selective_scan", SCANS),
    ("ssd", SCANS),
    ("gated_delta", SCANS),
    ("pointwise", SUMS),
    ("route", FEW),
    ("balance", SUMS),
    ("dispatch", EXACT),
    ("gather_rows", EXACT),
    ("grouped_linear", SUMS),
    ("combine", FEW),
    ("linear_cross_entropy", SUMS),
    ("cache_write", EXACT),
    ("draw", EXACT),
    ("cast", EXACT),
    ("concat", EXACT),
    ("split", EXACT),
    ("last", EXACT),
    ("reshape", EXACT),
    ("rows", EXACT),
    ("mean_square", SUMS),
    ("stat", SUMS),
    ("global_norm", SUMS),
    ("adamw", FEW),
];

/// The tolerance of an op in f32.
pub fn f32(op: &str) -> Option<Tolerance> {
    F32.iter().find(|(n, _)| *n == op).map(|(_, t)| *t)
}

/// `norm(got - want) / norm(want)`, the latter at least [`FLOOR`] an element; infinite where lengths differ or something is NaN.
pub fn error_ratio(got: &[f32], want: &[f32]) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(
        &mut got
            .iter()
            .zip(want)
            .map(|(&g, &w)| f64::from(g) - f64::from(w)),
    );
    let size = norm(&mut want.iter().map(|&w| f64::from(w)));
    let ratio = error / size.max(FLOOR * (want.len() as f64).sqrt());
    if error == 0.0 {
        0.0
    } else if ratio.is_nan() {
        f64::INFINITY
    } else {
        ratio
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios() {
        assert_eq!(error_ratio(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(error_ratio(&[3.0, 5.0], &[3.0, 4.0]), 0.2);
        assert_eq!(error_ratio(&[0.5], &[0.0]), 50.0);
        assert_eq!(error_ratio(&[], &[]), 0.0);
        assert_eq!(error_ratio(&[f32::NAN], &[1.0]), f64::INFINITY);
        assert_eq!(error_ratio(&[1.0], &[1.0, 1.0]), f64::INFINITY);
    }
}
