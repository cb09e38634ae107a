//! Mixture of experts: sorting choices, moving rows, and one matrix product per expert over its rows.

use super::matmul::{Mat, MatMut, par_matmul};
use super::simd::{axpy, dot, simd};
use super::tensor::{Args, Cx, Results};
use marimba_ir::op::{
    Combine, CombineBwd, Dispatch, GatherRows, GroupedLinear, GroupedLinearDw, GroupedLinearDx,
};

/// Rows per task.
const ROWS: usize = 128;

/// `order`, `slot`, `offsets`: a counting sort, stable.
pub(super) fn dispatch(op: &Dispatch, a: &Args, r: &mut Results, _: &Cx) {
    let experts = a.i(0);
    let (order, slot, offsets) = (r.take_i(0), r.take_i(1), r.take_i(2));
    offsets.fill(0);
    for &e in experts {
        offsets[e as usize + 1] += 1;
    }
    for e in 0..op.n_experts {
        offsets[e + 1] += offsets[e];
    }
    let mut next = offsets.to_vec();
    for (f, &e) in experts.iter().enumerate() {
        let r = next[e as usize];
        next[e as usize] += 1;
        order[r as usize] = f as i32;
        slot[f] = r;
    }
}

/// `y[r] = x[order[r] / K]`.
pub(super) fn gather_rows(_: &GatherRows, a: &Args, r: &mut Results, cx: &Cx) {
    let (x, order, d) = (a.f(0), a.i(1), a.ty(0).last().max(1));
    let k = order.len() / a.ty(0).rows().max(1);
    cx.for_each(
        r.take_f(0).chunks_mut(ROWS * d).collect(),
        |task, chunk: &mut [f32], _| {
            for (y, &f) in chunk.chunks_exact_mut(d).zip(&order[task * ROWS..]) {
                let token = f as usize / k;
                y.copy_from_slice(&x[token * d..(token + 1) * d]);
            }
        },
    );
}

/// `x[token] = sum_k weights[token,k] y[slot[token K + k]]`.
pub(super) fn combine(_: &Combine, a: &Args, r: &mut Results, cx: &Cx) {
    let (y, slot, weights, d) = (a.f(0), a.i(2), a.opt_f(3), a.ty(0).last().max(1));
    let k = slot.len() / r.ty(0).rows().max(1);
    cx.for_each(
        r.take_f(0).chunks_mut(ROWS * d).collect(),
        |task, chunk: &mut [f32], _| {
            combine_rows(
                chunk,
                task * ROWS * k,
                k,
                y,
                slot,
                weights.unwrap_or_default(),
                d,
            );
        },
    );
}

/// `dy[r] = weights[order[r]] dx[order[r] / K]`, `dweights[f] = y[slot[f]] . dx[f / K]`.
pub(super) fn combine_bwd(_: &CombineBwd, a: &Args, r: &mut Results, cx: &Cx) {
    let (y, order, slot, weights, dx) = (a.f(0), a.i(1), a.i(2), a.f(3), a.f(4));
    let d = a.ty(0).last().max(1);
    let k = a.ty(3).last().max(1);
    let (dy, dw) = (r.take_f(0), r.take_f(1));
    let tasks = dy.chunks_mut(ROWS * d).zip(dw.chunks_mut(ROWS)).collect();
    cx.for_each(tasks, |task, (dy, dw): (&mut [f32], &mut [f32]), _| {
        combine_bwd_rows(dy, dw, task * ROWS, k, y, order, slot, weights, dx, d);
    });
}

simd! {
    fn combine_rows(chunk: &mut [f32], first: usize, k: usize, y: &[f32], slot: &[i32], weights: &[f32], d: usize) {
        for (i, x) in chunk.chunks_exact_mut(d).enumerate() {
            x.fill(0.0);
            for f in first + i * k..first + (i + 1) * k {
                let w = if weights.is_empty() { 1.0 } else { weights[f] };
                let row = slot[f] as usize;
                axpy(w, &y[row * d..(row + 1) * d], x);
            }
        }
    }

    fn combine_bwd_rows(dy: &mut [f32], dw: &mut [f32], first: usize, k: usize, y: &[f32], order: &[i32], slot: &[i32],
        weights: &[f32], dx: &[f32], d: usize) {
        for (i, dy) in dy.chunks_exact_mut(d).enumerate() {
            let f = order[first + i] as usize;
            let (w, dx) = (weights[f], &dx[f / k * d..][..d]);
            for (dy, &dx) in dy.iter_mut().zip(dx) {
                *dy = w * dx;
            }
        }
        for (i, dw) in dw.iter_mut().enumerate() {
            let f = first + i;
            let row = slot[f] as usize;
            *dw = dot(&y[row * d..(row + 1) * d], &dx[f / k * d..][..d]);
        }
    }
}

/// Rows of each expert.
fn ranges(offsets: &[i32]) -> impl Iterator<Item = (usize, usize)> + '_ {
    offsets.windows(2).map(|w| (w[0] as usize, w[1] as usize))
}

/// `y[rows of e] = x[rows of e] w[e]^T`.
pub(super) fn grouped_linear(_: &GroupedLinear, a: &Args, r: &mut Results, cx: &Cx) {
    let (x, w, offsets) = (a.f(0), a.f(1), a.i(2));
    let (n, k) = (a.ty(1).size(1), a.ty(1).size(2));
    let y = r.take_f(0);
    for (e, (first, last)) in ranges(offsets).enumerate() {
        let rows = last - first;
        par_matmul(
            cx,
            MatMut::new(&mut y[first * n..last * n], rows, n),
            0.0,
            1.0,
            Mat::new(&x[first * k..last * k], rows, k),
            Mat::new(&w[e * n * k..(e + 1) * n * k], n, k).t(),
        );
    }
}

/// `dx[rows of e] = dy[rows of e] w[e]`.
pub(super) fn grouped_linear_dx(_: &GroupedLinearDx, a: &Args, r: &mut Results, cx: &Cx) {
    let (dy, w, offsets) = (a.f(0), a.f(1), a.i(2));
    let (n, k) = (a.ty(1).size(1), a.ty(1).size(2));
    let dx = r.take_f(0);
    for (e, (first, last)) in ranges(offsets).enumerate() {
        let rows = last - first;
        par_matmul(
            cx,
            MatMut::new(&mut dx[first * k..last * k], rows, k),
            0.0,
            1.0,
            Mat::new(&dy[first * n..last * n], rows, n),
            Mat::new(&w[e * n * k..(e + 1) * n * k], n, k),
        );
    }
}

/// `dw[e] = (beta into[e]) + dy[rows of e]^T x[rows of e]`.
pub(super) fn grouped_linear_dw(op: &GroupedLinearDw, a: &Args, r: &mut Results, cx: &Cx) {
    let (x, dy, offsets) = (a.f(0), a.f(1), a.i(2));
    let (k, n) = (a.ty(0).last(), a.ty(1).last());
    let beta = if op.accumulate { a.f(4)[0] } else { 0.0 };
    let dw = r.take_f(0);
    for (e, (first, last)) in ranges(offsets).enumerate() {
        let rows = last - first;
        par_matmul(
            cx,
            MatMut::new(&mut dw[e * n * k..(e + 1) * n * k], n, k),
            beta,
            1.0,
            Mat::new(&dy[first * n..last * n], rows, n).t(),
            Mat::new(&x[first * k..last * k], rows, k),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use marimba_ir::{Type, dims};

    const E: usize = 5;
    const K: usize = 2;
    const TOKENS: usize = 333;

    /// Choices that leave expert 3 without rows.
    fn experts() -> Vec<i32> {
        (0..TOKENS * K)
            .map(|i| [0, 1, 4, 2, 1, 0, 0][(i * i + i / 3) % 7])
            .collect()
    }

    fn sorted() -> (Vec<i32>, Vec<i32>, Vec<i32>) {
        let out = run(
            Dispatch { n_experts: E },
            &[i(Type::i32(dims![B 1, T TOKENS, K K]), &experts())],
        );
        (
            ints(&out[0]).to_vec(),
            ints(&out[1]).to_vec(),
            ints(&out[2]).to_vec(),
        )
    }

    fn ti() -> Type {
        Type::i32(dims![R TOKENS * K])
    }

    #[test]
    fn dispatch_sorts_stably() {
        let (order, slot, offsets) = sorted();
        let experts = experts();
        let mut want: Vec<i32> = (0..experts.len() as i32).collect();
        want.sort_by_key(|&f| experts[f as usize]);
        assert_eq!(order, want);
        assert!((0..slot.len()).all(|f| order[slot[f] as usize] == f as i32));
        for e in 0..E {
            let n = experts.iter().filter(|&&x| x as usize == e).count() as i32;
            assert_eq!(offsets[e + 1] - offsets[e], n);
        }
        assert_eq!(offsets[3], offsets[4]);
    }

    #[test]
    fn rows_go_out_and_come_back() {
        let d = 63;
        let (order, slot, _) = sorted();
        let (x, y, w, dx) = (
            randn(1, TOKENS * d),
            randn(2, TOKENS * K * d),
            randn(3, TOKENS * K),
            randn(4, TOKENS * d),
        );
        let tx = Type::f32(dims![B 1, T TOKENS, D d]);
        let ty = Type::f32(dims![R TOKENS * K, D d]);
        let tw = Type::f32(dims![B 1, T TOKENS, K K]);
        let out = run(
            GatherRows,
            &[f(tx.clone(), &x), i(ti(), &order), i(ti(), &slot)],
        );
        for (r, row) in floats(&out[0]).chunks(d).enumerate() {
            assert_eq!(row, &x[order[r] as usize / K * d..][..d]);
        }
        let forward = |y: &[f64], w: Option<&[f64]>| -> Vec<f64> {
            (0..TOKENS * d)
                .map(|i| {
                    let (t, c) = (i / d, i % d);
                    (0..K)
                        .map(|k| {
                            w.map_or(1.0, |w| w[t * K + k]) * y[slot[t * K + k] as usize * d + c]
                        })
                        .sum()
                })
                .collect()
        };
        let op = Combine {
            tokens: dims![B 1, T TOKENS],
        };
        for with_w in [false, true] {
            let aw = if with_w { f(tw.clone(), &w) } else { None };
            let out = run(
                op.clone(),
                &[f(ty.clone(), &y), i(ti(), &order), i(ti(), &slot), aw],
            );
            close(
                floats(&out[0]),
                &forward(&wide(&y), with_w.then_some(&wide(&w))),
                1e-6,
            );
        }
        let out = run(
            CombineBwd,
            &[
                f(ty, &y),
                i(ti(), &order),
                i(ti(), &slot),
                f(tw, &w),
                f(tx, &dx),
            ],
        );
        check_grad(floats(&out[0]), &y, |y| {
            dot64(&forward(y, Some(&wide(&w))), &dx)
        });
        check_grad(floats(&out[1]), &w, |w| {
            dot64(&forward(&wide(&y), Some(w)), &dx)
        });
    }

    #[test]
    fn each_row_meets_the_matrix_of_its_expert() {
        let (n, k) = (40, 17);
        let (_, _, offsets) = sorted();
        let rows = TOKENS * K;
        let expert = |r: usize| (0..E).find(|&e| (r as i32) < offsets[e + 1]).unwrap();
        let (x, w, dy, into) = (
            randn(1, rows * k),
            randn(2, E * n * k),
            randn(3, rows * n),
            randn(4, E * n * k),
        );
        let (tx, tw, ty) = (
            Type::f32(dims![R rows, D k]),
            Type::f32(dims![E E, F n, D k]),
            Type::f32(dims![R rows, F n]),
        );
        let to = i(Type::i32(dims![X E + 1]), &offsets);
        let forward = |x: &[f64], w: &[f64]| -> Vec<f64> {
            (0..rows * n)
                .map(|i| {
                    let (r, j) = (i / n, i % n);
                    (0..k)
                        .map(|p| x[r * k + p] * w[(expert(r) * n + j) * k + p])
                        .sum()
                })
                .collect()
        };
        let y = run(
            GroupedLinear,
            &[f(tx.clone(), &x), f(tw.clone(), &w), to.clone()],
        );
        close(floats(&y[0]), &forward(&wide(&x), &wide(&w)), 1e-5);
        let dx = run(
            GroupedLinearDx,
            &[f(ty.clone(), &dy), f(tw.clone(), &w), to.clone()],
        );
        check_grad(floats(&dx[0]), &x, |x| dot64(&forward(x, &wide(&w)), &dy));
        let op = |accumulate| GroupedLinearDw {
            n_experts: E,
            accumulate,
        };
        let dw = run(
            op(false),
            &[
                f(tx.clone(), &x),
                f(ty.clone(), &dy),
                to.clone(),
                None,
                None,
            ],
        );
        let dw = floats(&dw[0]);
        check_grad(dw, &w, |w| dot64(&forward(&wide(&x), w), &dy));
        assert!(dw[3 * n * k..4 * n * k].iter().all(|&v| v == 0.0));
        for beta in [0.0f32, 0.5] {
            let start = if beta == 0.0 {
                vec![f32::NAN; into.len()]
            } else {
                into.clone()
            };
            let args = [
                f(tx.clone(), &x),
                f(ty.clone(), &dy),
                to.clone(),
                f(tw.clone(), &start),
                f(Type::scalar(), &[beta]),
            ];
            let want: Vec<f64> = dw
                .iter()
                .zip(&into)
                .map(|(&d, &o)| f64::from(d) + f64::from(beta * o))
                .collect();
            close(floats(&run(op(true), &args)[0]), &want, 1e-5);
        }
    }
}
