//! Drawing a token from logits: see `ir/src/op/draw.rs`. A row a task, by sorting.

use super::tensor::{Args, Cx, Results};
use marimba_ir::op::{self, WEIGHT_BITS};
use std::cmp::Ordering;

/// `token` of `logits, settings, bits`.
pub(super) fn draw(_: &op::Draw, a: &Args, r: &mut Results, cx: &Cx) {
    let (logits, settings, bits) = (a.f(0), a.f(1), a.i(2));
    let v = a.ty(0).last().max(1);
    cx.for_each(
        r.take_i(0).chunks_mut(1).collect(),
        |row, token: &mut [i32], _| {
            let word = |i: usize| u64::from(bits[2 * row + i] as u32);
            let bits = word(0) | word(1) << 32;
            token[0] = drawn(&logits[row * v..(row + 1) * v], settings, bits) as i32;
        },
    );
}

/// The larger first, NaN last.
fn falling(x: f32, y: f32) -> Ordering {
    y.partial_cmp(&x)
        .unwrap_or_else(|| x.is_nan().cmp(&y.is_nan()))
}

fn drawn(logits: &[f32], settings: &[f32], bits: u64) -> usize {
    let (temperature, top_k, top_p) = (settings[0], settings[1], settings[2]);
    let order = |&a: &usize, &b: &usize| falling(logits[a], logits[b]).then(a.cmp(&b));
    let first = (0..logits.len()).min_by(order).unwrap_or(0);
    if temperature.is_nan() || temperature <= 0.0 {
        return first;
    }
    let top = logits[first];
    let weight = |i: &usize| {
        let l = logits[*i];
        if l >= top {
            return 1 << WEIGHT_BITS;
        }
        let e = ((f64::from(l) - f64::from(top)) / f64::from(temperature)).exp();
        // NaN gives 0.
        (e * (1u64 << WEIGHT_BITS) as f64).round_ties_even() as u64
    };
    let mut best: Vec<usize> = (0..logits.len()).collect();
    let k = top_k as usize;
    if (1..best.len()).contains(&k) {
        best.select_nth_unstable_by(k - 1, order);
        best.truncate(k);
    }
    best.sort_unstable_by(order);
    let weights: Vec<u64> = best.iter().map(weight).collect();
    // The sum of weights up to the first token with which it exceeds `x`, and that token.
    let reach = |x: u64| {
        let mut sum = 0;
        for (i, w) in best.iter().zip(&weights) {
            sum += w;
            if sum > x {
                return (sum, *i);
            }
        }
        (sum, first)
    };
    let all: u64 = weights.iter().sum();
    let wanted = ((f64::from(top_p) * all as f64).ceil() as u64).min(all);
    let (kept, _) = reach(wanted.saturating_sub(1));
    let x = (u128::from(bits) * u128::from(kept)) >> 64;
    reach(x as u64).1
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use marimba_ir::op::Draw;
    use marimba_ir::{Type, dims};

    fn draws(logits: &[f32], settings: [f32; 3], bits: &[u64]) -> Vec<i32> {
        let words = bits.iter().flat_map(|b| [*b as i32, (b >> 32) as i32]);
        let words: Vec<i32> = words.collect();
        let out = run(
            Draw,
            &[
                f(
                    Type::f32(dims![B bits.len(), V logits.len()]),
                    &logits.repeat(bits.len()),
                ),
                f(Type::f32(dims![X 3]), &settings),
                i(Type::i32(dims![B bits.len(), X 2]), &words),
            ],
        );
        ints(&out[0]).to_vec()
    }

    fn draw(logits: &[f32], settings: [f32; 3], bits: u64) -> i32 {
        draws(logits, settings, &[bits])[0]
    }

    /// Tokens of 1000 draws at even distances.
    fn spread(logits: &[f32], settings: [f32; 3]) -> Vec<i32> {
        let step = u64::MAX / 1000;
        let bits: Vec<u64> = (0..1000).map(|n| step / 2 + n * step).collect();
        draws(logits, settings, &bits)
    }

    #[test]
    fn without_temperature_the_first_of_the_largest() {
        let nan = f32::NAN;
        for (logits, want) in [
            (vec![0.0, 3.0, 1.0, 3.0], 1),
            (vec![nan, -1.0, nan], 1),
            (vec![nan, nan], 0),
            (vec![-0.0, 0.0], 0),
            (vec![f32::NEG_INFINITY; 3], 0),
            (vec![1.0, f32::INFINITY, 2.0], 1),
        ] {
            assert_eq!(draw(&logits, [0.0, 2.0, 0.5], u64::MAX), want, "{logits:?}");
        }
    }

    #[test]
    fn frequencies_are_probabilities() {
        let logits = [0.0f32, 3.0, 1.0, 2.0, -1.0];
        for temperature in [1.0f32, 0.5] {
            let seen = spread(&logits, [temperature, 0.0, 1.0]);
            let weight = |l: f32| (f64::from(l) / f64::from(temperature)).exp();
            let sum: f64 = logits.iter().map(|&l| weight(l)).sum();
            for (token, &l) in logits.iter().enumerate() {
                let n = seen.iter().filter(|t| **t == token as i32).count();
                assert!(
                    (n as f64 - 1000.0 * weight(l) / sum).abs() <= 1.0,
                    "{token}: {n}"
                );
            }
            // In the order of probabilities.
            assert!(
                seen.windows(2)
                    .all(|w| logits[w[0] as usize] >= logits[w[1] as usize])
            );
        }
    }

    #[test]
    fn top_k_and_top_p_keep_the_first_tokens() {
        let logits = [0.0f32, 3.0, 1.0, 2.0, 2.0];
        let kept = |settings| {
            let mut seen = spread(&logits, settings);
            seen.dedup();
            seen
        };
        assert_eq!(kept([1.0, 0.0, 1.0]), [1, 3, 4, 2, 0]);
        assert_eq!(kept([1.0, 2.0, 1.0]), [1, 3]);
        assert_eq!(kept([1.0, 9.0, 1.0]), [1, 3, 4, 2, 0]);
        // exp(3), 2 exp(2), exp(1), 1 of 38.6: the first weighs 0.52.
        assert_eq!(kept([1.0, 0.0, 0.5]), [1]);
        assert_eq!(kept([1.0, 0.0, 0.53]), [1, 3]);
        assert_eq!(kept([1.0, 0.0, 0.0]), [1]);
        // Of the first two together the first weighs 0.73.
        assert_eq!(kept([1.0, 2.0, 0.7]), [1]);
        assert_eq!(kept([1.0, 2.0, 0.75]), [1, 3]);
    }

    #[test]
    fn the_ends_of_the_range_and_numbers_that_are_none() {
        let logits = [1.0f32, f32::NAN, 2.0, f32::NEG_INFINITY];
        assert_eq!(draw(&logits, [1.0, 0.0, 1.0], 0), 2);
        assert_eq!(draw(&logits, [1.0, 0.0, 1.0], u64::MAX), 0);
        assert_eq!(draw(&[f32::NAN; 3], [1.0, 0.0, 1.0], u64::MAX), 0);
        let one = [1.0f32, f32::INFINITY];
        assert_eq!(draw(&one, [1.0, 0.0, 1.0], u64::MAX), 1);
    }
}
