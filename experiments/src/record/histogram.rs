//! Distributions of values, as TensorBoard's histograms hold them.

/// Ratio between neighbouring bucket borders; TensorFlow's own summaries use 1.1, a tenth of a bucket more is not visible.
const RATIO: f64 = 1.2;
/// Magnitudes below this share the bucket around zero.
const SMALLEST: f64 = 1e-12;
/// Magnitudes above this share the outermost bucket.
const LARGEST: f64 = 1e20;

/// A histogram with buckets that widen geometrically away from zero.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    /// Smallest finite value.
    pub min: f64,
    /// Largest finite value.
    pub max: f64,
    /// Number of finite values.
    pub num: f64,
    /// Sum of the finite values.
    pub sum: f64,
    /// Sum of their squares.
    pub sum_squares: f64,
    /// Upper border of each bucket, strictly rising.
    pub limits: Vec<f64>,
    /// Number of values in each bucket; as long as `limits`.
    pub counts: Vec<f64>,
    /// Values that were NaN or infinite: counted here and nowhere else, since TensorBoard cannot draw them.
    pub non_finite: u64,
}

/// Buckets on either side of zero.
fn n_side() -> usize {
    ((LARGEST / SMALLEST).ln() / RATIO.ln()).ceil() as usize
}

/// Upper border of bucket `index` in `0..2 * n_side() + 1`, where bucket `n_side()` holds zero.
fn limit(index: usize) -> f64 {
    let side = n_side();
    if index < side {
        -SMALLEST * RATIO.powi((side - 1 - index) as i32)
    } else if index == 2 * side {
        f64::MAX
    } else {
        SMALLEST * RATIO.powi((index - side) as i32)
    }
}

fn bucket(value: f64) -> usize {
    let side = n_side();
    let size = value.abs();
    if size < SMALLEST {
        return side;
    }
    let k = ((size / SMALLEST).ln() / RATIO.ln())
        .floor()
        .min((side - 1) as f64) as usize;
    if value > 0.0 {
        side + 1 + k
    } else {
        side - 1 - k
    }
}

impl Histogram {
    /// Counts `values`. An empty or wholly non-finite input gives an empty histogram (`num` 0).
    pub fn of(values: &[f32]) -> Histogram {
        let mut counts = vec![0u64; 2 * n_side() + 1];
        let mut h = Histogram {
            min: f64::INFINITY,
            max: f64::NEG_INFINITY,
            num: 0.0,
            sum: 0.0,
            sum_squares: 0.0,
            limits: Vec::new(),
            counts: Vec::new(),
            non_finite: 0,
        };
        for v in values.iter().map(|&v| f64::from(v)) {
            if !v.is_finite() {
                h.non_finite += 1;
                continue;
            }
            h.min = h.min.min(v);
            h.max = h.max.max(v);
            h.num += 1.0;
            h.sum += v;
            h.sum_squares += v * v;
            counts[bucket(v)] += 1;
        }
        if h.num == 0.0 {
            (h.min, h.max) = (0.0, 0.0);
            return h;
        }
        let first = counts.iter().position(|&c| c > 0).unwrap_or(0);
        let last = counts.iter().rposition(|&c| c > 0).unwrap_or(0);
        // One empty bucket below the first gives TensorBoard the first one's lower border.
        for index in first.saturating_sub(1)..=last {
            h.limits.push(limit(index));
            h.counts.push(counts[index] as f64);
        }
        h
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_under_its_bucket_border() {
        for v in [
            0.0, 1e-13, 1e-12, 3.5, -3.5, 1e-5, -1e-5, 65504.0, 3e38, -3e38,
        ] {
            let b = bucket(v);
            assert!(
                v <= limit(b) * (1.0 + 1e-9) || limit(b) < 0.0,
                "{v} {}",
                limit(b)
            );
            if b > 0 {
                assert!(
                    v >= limit(b - 1) - limit(b - 1).abs() * 1e-9,
                    "{v} above {}",
                    limit(b - 1)
                );
            }
        }
        let side = n_side();
        assert!((1..=2 * side).all(|i| limit(i - 1) < limit(i)));
    }

    #[test]
    fn counts_add_up_and_non_finite_values_stay_out() {
        let h = Histogram::of(&[1.0, -1.0, 0.0, 2.0, f32::NAN, f32::INFINITY]);
        assert_eq!(
            (h.num, h.sum, h.sum_squares, h.non_finite),
            (4.0, 2.0, 6.0, 2)
        );
        assert_eq!((h.min, h.max), (-1.0, 2.0));
        assert_eq!(h.counts.iter().sum::<f64>(), 4.0);
        assert_eq!(h.limits.len(), h.counts.len());
        assert_eq!(Histogram::of(&[f32::NAN]).num, 0.0);
    }
}
