//! Rotary position embedding: see `ir/src/op/rope.rs`. Its own derivative, with `inverse`. Sines and cosines are taken once per token
//! and shared by the heads; angles are products in f32, as in the equation, their sine and cosine the standard library's.

use super::simd::simd;
use super::tensor::{Args, Cx, Results};
use marimba_ir::op;

/// Tokens of a task.
const TOKENS: usize = 64;

simd! {
    /// Rotates one token's heads.
    fn rotate(y: &mut [f32], x: &[f32], p: usize, cos: &[f32], sin: &[f32]) {
        let half = cos.len();
        let sin = &sin[..half];
        for (y, x) in y.chunks_exact_mut(p).zip(x.chunks_exact(p)) {
            let (y1, rest) = y.split_at_mut(half);
            let (y2, pass) = rest.split_at_mut(half);
            let (x1, x2) = (&x[..half], &x[half..2 * half]);
            for i in 0..half {
                y1[i] = x1[i] * cos[i] - x2[i] * sin[i];
                y2[i] = x2[i] * cos[i] + x1[i] * sin[i];
            }
            pass.copy_from_slice(&x[2 * half..]);
        }
    }
}

/// Forward.
pub(super) fn rope(op: &op::Rope, a: &Args, r: &mut Results, cx: &Cx) {
    let (x, pos, inv_freq) = (a.f(0), a.opt_i(1), a.f(2));
    let ty = a.ty(0);
    let (t, p) = (ty.size(1), ty.size(3));
    let width = ty.size(2) * p;
    let y = r.take_f(0);
    if y.is_empty() {
        return;
    }
    let half = op.dims / 2;
    let sign = if op.inverse { -1.0 } else { 1.0 };
    let factor = op.factor as f32;
    cx.for_each(y.chunks_mut(TOKENS * width).collect(), |i, y, scratch| {
        let [cos, sin] = scratch.split([half, half]);
        let mut last = None;
        for (j, y) in y.chunks_exact_mut(width).enumerate() {
            let row = i * TOKENS + j;
            let at = pos.map_or((row % t) as i32, |p| p[row]);
            if last != Some(at) {
                for ((c, s), &f) in cos.iter_mut().zip(&mut *sin).zip(inv_freq) {
                    let (sine, cosine) = (at as f32 * f).sin_cos();
                    (*c, *s) = (factor * cosine, sign * factor * sine);
                }
                last = Some(at);
            }
            rotate(y, &x[row * width..][..width], p, cos, sin);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::check::{close, floats, ints, noise, positions, run};
    use super::*;
    use marimba_ir::dims;

    #[test]
    fn rotates_pairs_and_back() {
        for t in [1, 2, 63, 65, 300] {
            for (h, p, dims, factor) in [(3, 8, 8, 1.0), (2, 10, 6, 1.25), (1, 4, 0, 1.0)] {
                let b = 2;
                let x = noise(1, b * t * h * p, 1.0);
                let freq: Vec<f32> = (0..dims / 2).map(|i| 0.5f32.powi(i as i32)).collect();
                for pos in [None, Some(positions(b, t, 7, &[20, 33]))] {
                    let mut args = vec![
                        floats(dims![B b, T t, H h, P p], &x),
                        pos.as_ref().and_then(|v| ints(dims![B b, T t], v)),
                        floats(dims![X dims / 2], &freq),
                    ];
                    for inverse in [false, true] {
                        let op = op::Rope {
                            dims,
                            factor,
                            inverse,
                        };
                        let got = run(&op, &args, rope);
                        let mut want = vec![0.0; x.len()];
                        for i in 0..x.len() {
                            let (row, ch, head) = (i / (h * p), i % p, i / p * p);
                            let at = pos.as_ref().map_or((row % t) as f64, |v| f64::from(v[row]));
                            let v = |c: usize| f64::from(x[head + c]);
                            want[i] = if ch >= dims {
                                v(ch)
                            } else {
                                let k = ch % (dims / 2);
                                let angle =
                                    at * f64::from(freq[k]) * if inverse { -1.0 } else { 1.0 };
                                let (s, c) = angle.sin_cos();
                                let (other, sign) = if ch < dims / 2 {
                                    (ch + dims / 2, -1.0)
                                } else {
                                    (k, 1.0)
                                };
                                factor * (v(ch) * c + sign * v(other) * s)
                            };
                        }
                        close("y", &got[0], &want, 3e-6);
                    }
                    // The inverse rotates back.
                    let there = run(
                        &op::Rope {
                            dims,
                            factor: 1.0,
                            inverse: false,
                        },
                        &args,
                        rope,
                    );
                    args[0] = floats(dims![B b, T t, H h, P p], &there[0]);
                    let back = run(
                        &op::Rope {
                            dims,
                            factor: 1.0,
                            inverse: true,
                        },
                        &args,
                        rope,
                    );
                    let want: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
                    close("back", &back[0], &want, 3e-6);
                }
            }
        }
    }
}
