//! Head and loss by blocks of rows: the logits of a block live in scratch memory, become their own gradient in place, and are gone.

use super::math::{exp, ln};
use super::matmul::{Mat, MatMut, par_matmul};
use super::simd::{self, simd};
use super::tensor::{Args, Cx, Results};
use marimba_ir::op::{LinearCrossEntropy, LinearCrossEntropyBwd, LinearCrossEntropyGrad};

/// Logits of a block at most: 1 MiB, half of a large second-level cache.
const BLOCK: usize = 256 * 1024;

/// Rows of a block at least: below, the products over rows lose their speed.
const MIN_ROWS: usize = 64;

/// Rows that one task of the softmax handles.
const ROWS: usize = 32;

/// The parts that all three ops share.
struct Head<'a> {
    x: &'a [f32],
    w: &'a [f32],
    targets: &'a [i32],
    rows: usize,
    d: usize,
    v: usize,
    op: &'a LinearCrossEntropy,
    scale: f32,
}

impl<'a> Head<'a> {
    fn new(op: &'a LinearCrossEntropy, a: &Args<'a>) -> Self {
        let (v, d) = (a.ty(1).size(0), a.ty(1).size(1));
        Head {
            x: a.f(0),
            w: a.f(1),
            targets: a.i(2),
            rows: a.ty(2).len(),
            d,
            v,
            op,
            scale: a.f(3)[0],
        }
    }

    fn block_rows(&self) -> usize {
        (BLOCK / self.v.max(1)).max(MIN_ROWS)
    }

    /// Multiplied logits of rows `first..last`.
    fn logits(&self, cx: &Cx, first: usize, last: usize, out: &mut [f32]) {
        let x = &self.x[first * self.d..last * self.d];
        par_matmul(
            cx,
            MatMut::new(out, last - first, self.v),
            0.0,
            self.op.multiplier as f32,
            Mat::new(x, last - first, self.d),
            Mat::new(self.w, self.v, self.d).t(),
        );
    }

    /// Turns logits of rows `first..` into the gradient of `x w^T`, given lse.
    fn gradient(&self, cx: &Cx, first: usize, logits: &mut [f32], lse: &[f32], dloss: f32) {
        let (g, m, z) = (
            dloss * self.scale,
            self.op.multiplier as f32,
            self.op.z_loss as f32,
        );
        cx.for_each(
            logits.chunks_mut(ROWS * self.v).collect(),
            |task, rows: &mut [f32], _| {
                for (i, row) in rows.chunks_exact_mut(self.v).enumerate() {
                    let r = first + task * ROWS + i;
                    let (lse, target) = (lse[r], self.targets[r]);
                    let valid = if target >= 0 { g } else { 0.0 };
                    let squared = if target >= 0 || self.op.z_all {
                        2.0 * g * z * lse
                    } else {
                        0.0
                    };
                    softmax_times(row, lse, m * (valid + squared));
                    if let Some(l) = usize::try_from(target).ok().and_then(|t| row.get_mut(t)) {
                        *l -= m * valid;
                    }
                }
            },
        );
    }

    /// `dx` of the rows of a block, and `dw` with `beta` on what was there.
    fn products(
        &self,
        cx: &Cx,
        first: usize,
        last: usize,
        dlogits: &[f32],
        dx: &mut [f32],
        dw: &mut [f32],
        beta: f32,
    ) {
        let rows = last - first;
        let dl = Mat::new(dlogits, rows, self.v);
        let dx = MatMut::new(&mut dx[first * self.d..last * self.d], rows, self.d);
        par_matmul(cx, dx, 0.0, 1.0, dl, Mat::new(self.w, self.v, self.d));
        let x = Mat::new(&self.x[first * self.d..last * self.d], rows, self.d);
        par_matmul(cx, MatMut::new(dw, self.v, self.d), beta, 1.0, dl.t(), x);
    }

    /// `nll`, `lse`, `hit` of rows `first..`.
    fn losses(
        &self,
        cx: &Cx,
        first: usize,
        logits: &[f32],
        nll: &mut [f32],
        lse: &mut [f32],
        hit: &mut [f32],
    ) {
        let tasks = nll
            .chunks_mut(ROWS)
            .zip(lse.chunks_mut(ROWS))
            .zip(hit.chunks_mut(ROWS))
            .collect();
        cx.for_each(
            tasks,
            |task, ((nll, lse), hit): ((&mut [f32], &mut [f32]), &mut [f32]), _| {
                for i in 0..nll.len() {
                    let r = task * ROWS + i;
                    let row = &logits[r * self.v..(r + 1) * self.v];
                    let (max, sum) = max_and_sum(row);
                    let l = max + ln(sum);
                    let target = self.targets[first + r];
                    lse[i] = l;
                    (nll[i], hit[i]) = match usize::try_from(target).ok().map(|t| (t, row.get(t))) {
                        None => (0.0, 0.0),
                        Some((t, Some(&at))) => {
                            (l - at, f32::from(at == max && !row[..t].contains(&max)))
                        }
                        // A target outside the vocabulary: no loss to speak of.
                        Some((_, None)) => (f32::NAN, 0.0),
                    };
                }
            },
        );
    }

    /// The loss, from its rows in order.
    fn total(&self, nll: &[f32], lse: &[f32]) -> f32 {
        let sum: f64 = nll.iter().map(|&n| f64::from(n)).sum();
        let squares: f64 = if self.op.z_loss == 0.0 {
            0.0
        } else {
            lse.iter()
                .zip(self.targets)
                .filter(|&(_, &t)| t >= 0 || self.op.z_all)
                .map(|(&l, _)| f64::from(l) * f64::from(l))
                .sum()
        };
        (f64::from(self.scale) * (sum + self.op.z_loss * squares)) as f32
    }

    /// Calls `f(first, last)` for each block.
    fn blocks(&self, mut f: impl FnMut(usize, usize)) {
        let step = self.block_rows();
        for first in (0..self.rows).step_by(step) {
            f(first, (first + step).min(self.rows));
        }
    }
}

/// `loss`, `nll`, `lse`, `hit`.
pub(super) fn linear_cross_entropy(op: &LinearCrossEntropy, a: &Args, r: &mut Results, cx: &Cx) {
    let head = Head::new(op, a);
    let (loss, nll, lse, hit) = (r.take_f(0), r.take_f(1), r.take_f(2), r.take_f(3));
    let mut shared = cx.shared();
    let buffer = shared.f32(head.block_rows().min(head.rows) * head.v);
    head.blocks(|first, last| {
        let logits = &mut buffer[..(last - first) * head.v];
        head.logits(cx, first, last, logits);
        head.losses(
            cx,
            first,
            logits,
            &mut nll[first..last],
            &mut lse[first..last],
            &mut hit[first..last],
        );
    });
    loss[0] = head.total(nll, lse);
}

/// `dx`, `dw`.
pub(super) fn linear_cross_entropy_bwd(
    op: &LinearCrossEntropyBwd,
    a: &Args,
    r: &mut Results,
    cx: &Cx,
) {
    let head = Head::new(&op.of, a);
    let (lse, dloss) = (a.f(4), a.f(5)[0]);
    let (dx, dw) = (r.take_f(0), r.take_f(1));
    let mut shared = cx.shared();
    let buffer = shared.f32(head.block_rows().min(head.rows) * head.v);
    let mut beta = 0.0;
    head.blocks(|first, last| {
        let logits = &mut buffer[..(last - first) * head.v];
        head.logits(cx, first, last, logits);
        head.gradient(cx, first, logits, lse, dloss);
        head.products(cx, first, last, logits, dx, dw, beta);
        beta = 1.0;
    });
}

/// `loss`, `nll`, `lse`, `hit`, `dx`, `dw`.
pub(super) fn linear_cross_entropy_grad(
    op: &LinearCrossEntropyGrad,
    a: &Args,
    r: &mut Results,
    cx: &Cx,
) {
    let head = Head::new(&op.of, a);
    let dloss = a.f(4)[0];
    let (loss, nll, lse, hit) = (r.take_f(0), r.take_f(1), r.take_f(2), r.take_f(3));
    let (dx, dw) = (r.take_f(4), r.take_f(5));
    let mut shared = cx.shared();
    let buffer = shared.f32(head.block_rows().min(head.rows) * head.v);
    let mut beta = if op.accumulate { a.f(6)[0] } else { 0.0 };
    head.blocks(|first, last| {
        let logits = &mut buffer[..(last - first) * head.v];
        head.logits(cx, first, last, logits);
        head.losses(
            cx,
            first,
            logits,
            &mut nll[first..last],
            &mut lse[first..last],
            &mut hit[first..last],
        );
        head.gradient(cx, first, logits, lse, dloss);
        head.products(cx, first, last, logits, dx, dw, beta);
        beta = 1.0;
    });
    loss[0] = head.total(nll, lse);
}

simd! {
    /// The largest, and the sum of `exp(x - largest)`.
    fn max_and_sum(x: &[f32]) -> (f32, f32) {
        let max = simd::max(x);
        (max, simd::fold2(x, x, |acc, x, _| acc + exp(x - max)))
    }

    /// `x = c exp(x - lse)`.
    fn softmax_times(x: &mut [f32], lse: f32, c: f32) {
        for x in x {
            *x = c * exp(*x - lse);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use marimba_ir::{Type, dims};

    /// loss, nll, lse, hit.
    fn reference(
        op: &LinearCrossEntropy,
        x: &[f64],
        w: &[f64],
        targets: &[i32],
        scale: f64,
        d: usize,
    ) -> (f64, Vec<f64>, Vec<f64>, Vec<f64>) {
        let (mut loss, mut nll, mut lse, mut hit) = (0.0, Vec::new(), Vec::new(), Vec::new());
        for (x, &t) in x.chunks(d).zip(targets) {
            let logits: Vec<f64> = w
                .chunks(d)
                .map(|w| op.multiplier * w.iter().zip(x).map(|(a, b)| a * b).sum::<f64>())
                .collect();
            let max = logits.iter().copied().fold(f64::MIN, f64::max);
            let l = max + logits.iter().map(|v| (v - max).exp()).sum::<f64>().ln();
            lse.push(l);
            if t >= 0 {
                nll.push(l - logits[t as usize]);
                hit.push(f64::from(
                    logits.iter().position(|&v| v == max) == Some(t as usize),
                ));
                loss += l - logits[t as usize];
            } else {
                nll.push(0.0);
                hit.push(0.0);
            }
            if t >= 0 || op.z_all {
                loss += op.z_loss * l * l;
            }
        }
        (loss * scale, nll, lse, hit)
    }

    #[test]
    fn loss_and_gradients_agree_with_f64() {
        for (rows, d, v) in [(63, 20, 100), (130, 24, 7), (65, 2, 4200)] {
            for (multiplier, z_loss, z_all) in
                [(1.0, 0.0, false), (0.5, 1e-2, false), (2.0, 1e-2, true)]
            {
                let op = LinearCrossEntropy {
                    multiplier,
                    z_loss,
                    z_all,
                };
                let x = randn(1, rows * d);
                let w: Vec<f32> = randn(2, v * d).iter().map(|w| w * 0.3).collect();
                let targets: Vec<i32> = (0..rows as i32)
                    .map(|i| if i % 5 == 3 { -1 } else { (i * 31) % v as i32 })
                    .collect();
                let (scale, dloss) = (1.0 / 50.0f32, 1.5f32);
                let (tx, tw, tt) = (
                    Type::f32(dims![B 1, T rows, D d]),
                    Type::f32(dims![V v, D d]),
                    Type::i32(dims![B 1, T rows]),
                );
                let head = [
                    f(tx.clone(), &x),
                    f(tw.clone(), &w),
                    i(tt.clone(), &targets),
                    f(Type::scalar(), &[scale]),
                ];
                let (loss, nll, lse, hit) =
                    reference(&op, &wide(&x), &wide(&w), &targets, f64::from(scale), d);
                let out = run(op.clone(), &head);
                close(floats(&out[0]), &[loss], 1e-5);
                close(floats(&out[1]), &nll, 1e-5);
                close(floats(&out[2]), &lse, 1e-5);
                close(floats(&out[3]), &hit, 0.0);
                let mut args = head.to_vec();
                args.push(f(tt.with_dtype(marimba_ir::DType::F32), floats(&out[2])));
                args.push(f(Type::scalar(), &[dloss]));
                let d_out = run(LinearCrossEntropyBwd { of: op.clone() }, &args);
                let f64_loss = |x: &[f64], w: &[f64]| {
                    f64::from(dloss) * reference(&op, x, w, &targets, f64::from(scale), d).0
                };
                check_grad(floats(&d_out[0]), &x, |x| f64_loss(x, &wide(&w)));
                check_grad(floats(&d_out[1]), &w, |w| f64_loss(&wide(&x), w));
                // Both at once: the same numbers, and the gradient of w added to a buffer.
                for beta in [None, Some(0.0f32), Some(0.5)] {
                    let mut args = head.to_vec();
                    args.push(f(Type::scalar(), &[dloss]));
                    let into = randn(7, v * d);
                    if let Some(beta) = beta {
                        let start = if beta == 0.0 {
                            vec![f32::NAN; v * d]
                        } else {
                            into.clone()
                        };
                        args.push(f(tw.clone(), &start));
                        args.push(f(Type::scalar(), &[beta]));
                    } else {
                        args.extend([None, None]);
                    }
                    let both = LinearCrossEntropyGrad {
                        of: op.clone(),
                        accumulate: beta.is_some(),
                    };
                    let got = run(both, &args);
                    for k in 0..4 {
                        assert_eq!(got[k], out[k]);
                    }
                    assert_eq!(got[4], d_out[0]);
                    let want: Vec<f64> = floats(&d_out[1])
                        .iter()
                        .zip(&into)
                        .map(|(&g, &o)| f64::from(g) + f64::from(beta.unwrap_or(0.0) * o))
                        .collect();
                    close(floats(&got[5]), &want, 1e-5);
                }
            }
        }
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_nan_not_a_crash() {
        let op = LinearCrossEntropy {
            multiplier: 1.0,
            z_loss: 0.0,
            z_all: false,
        };
        let out = run(
            op,
            &[
                f(Type::f32(dims![B 1, T 1, D 1]), &[1.0]),
                f(Type::f32(dims![V 2, D 1]), &[1.0, 2.0]),
                i(Type::i32(dims![B 1, T 1]), &[2]),
                f(Type::scalar(), &[1.0]),
            ],
        );
        assert!(floats(&out[0])[0].is_nan());
    }
}
