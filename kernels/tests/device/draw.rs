//! Drawing tokens.

use super::*;

const WEIGHT_BITS: u32 = 36;

/// The token by sorting the row.
fn drawn(logits: &[f64], (temperature, top_k, top_p): (f32, f32, f32), bits: u64) -> usize {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let place = |i: usize| {
        (
            !logits[i].is_nan(),
            if logits[i].is_nan() { 0.0 } else { logits[i] },
        )
    };
    order.sort_by(|&a, &b| place(b).partial_cmp(&place(a)).unwrap());
    if temperature <= 0.0 {
        return order[0];
    }
    if top_k >= 1.0 {
        order.truncate(top_k as usize);
    }
    let top = logits[order[0]];
    let one = f64::from(WEIGHT_BITS).exp2();
    let weights: Vec<u128> = order
        .iter()
        .map(|&i| match logits[i] == top {
            true => one as u128,
            false => {
                (((logits[i] - top) / f64::from(temperature)).exp() * one).round_ties_even() as u128
            }
        })
        .collect();
    let reach = |x: u128| {
        let mut sum = 0;
        for (i, w) in order.iter().zip(&weights) {
            sum += w;
            if sum > x {
                return (sum, *i);
            }
        }
        (sum, order[0])
    };
    let all: u128 = weights.iter().sum();
    let wanted = ((f64::from(top_p) * all as f64).ceil() as u128).min(all);
    let (kept, _) = reach(wanted.max(1) - 1);
    reach((u128::from(bits) * kept) >> 64).1
}

/// Many equals, numbers that are none, all settings: the same tokens as by sorting.
#[test]
fn tokens_are_drawn_as_by_sorting() {
    with_device(|g| {
        if g.dtype != DType::F32 {
            return;
        }
        for (rows, v, step) in [
            (3, 1, 1.0),
            (4, 7, 0.5),
            (2, 3000, 0.25),
            (5, 128_256, 1.0 / 64.0),
            (3, 50_000, 1e-6),
        ] {
            let mut logits: V = g
                .noise(v as u64, rows * v)
                .iter()
                .enumerate()
                .map(|(i, x)| {
                    f64::from((((12.0 * x + 1e-3 * (i % 977) as f64) / step).round() * step) as f32)
                })
                .collect();
            if v > 6 {
                logits[3] = f64::NAN;
                logits[v + 1] = f64::NEG_INFINITY;
                logits[v + 5] = -0.0;
            }
            if v == 7 {
                logits[2 * v..3 * v].fill(f64::NAN);
                logits[3 * v + 2] = f64::INFINITY;
            }
            for settings in [
                (0.0, 0.0, 1.0),
                (1.0, 0.0, 1.0),
                (0.7, 50.0, 1.0),
                (1.5, 0.0, 0.9),
                (1.0, 2000.0, 0.5),
                (3.0, 1e6, 0.0),
                (0.01, 1.0, 1.0),
            ] {
                let (temperature, top_k, top_p) = settings;
                for turn in 0..3u64 {
                    let bits: Vec<u64> = (0..rows as u64)
                        .map(|r| match turn {
                            0 => u64::MAX - r,
                            1 => r,
                            _ => (r + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15),
                        })
                        .collect();
                    let words = bits.iter().flat_map(|b| [*b as i32, (b >> 32) as i32]);
                    let args = [
                        S(vec![rows, v], logits.clone()),
                        S(
                            vec![3],
                            vec![f64::from(temperature), f64::from(top_k), f64::from(top_p)],
                        ),
                        I(vec![rows, 2], words.collect()),
                    ];
                    let out = g.run(&args, &[R::I(vec![rows])], |r, a| draw(r, a, WEIGHT_BITS));
                    for (row, (got, bits)) in out[0].iter().zip(&bits).enumerate() {
                        let want = drawn(&logits[row * v..(row + 1) * v], settings, *bits);
                        assert_eq!(
                            *got as usize, want,
                            "row {row} of {v}, {settings:?}, {bits:x}"
                        );
                    }
                }
            }
        }
    });
}
