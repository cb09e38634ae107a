//! Sums over dimensions, means of squares, accumulation into gradient buffers. Tasks sum their part in f32 lanes; parts are added in
//! order, in f64 where the result is one number.

use super::simd::{self, simd};
use super::tensor::{Args, Cx, Results};
use marimba_ir::op::{Accumulate, Broadcast, MeanSquare, SumTo};

/// Elements of a task.
const TASK: usize = 16 * 1024;

/// Tasks of a column sum at most: as many partial rows are kept.
const PARTS: usize = 16;

/// `y = x` summed to the dims of the result.
pub(super) fn sum_to(_: &SumTo, a: &Args, r: &mut Results, cx: &Cx) {
    let x = a.f(0);
    // Type inference has seen that the result broadcasts to the argument.
    let how = Broadcast::of(r.ty(0), a.ty(0)).unwrap_or(Broadcast::Scalar);
    let y = r.take_f(0);
    match how {
        Broadcast::Full => y.copy_from_slice(x),
        Broadcast::Scalar => y[0] = total(cx, x, sum_of) as f32,
        Broadcast::Suffix { period } => column_sums(cx, x, period.max(1), y),
        Broadcast::Prefix { repeat } => {
            let per_task = (TASK / repeat.max(1)).max(1);
            let chunks = y.chunks_mut(per_task).collect();
            cx.for_each(chunks, |task, y: &mut [f32], _| {
                for (i, y) in y.iter_mut().enumerate() {
                    let at = (task * per_task + i) * repeat;
                    *y = sum_of(&x[at..at + repeat]) as f32;
                }
            });
        }
    }
}

/// `y[c] = sum_r x[r,c]`.
fn column_sums(cx: &Cx, x: &[f32], cols: usize, y: &mut [f32]) {
    let rows = x.len() / cols;
    let per_task = rows.div_ceil(PARTS).max(TASK / cols).max(1);
    let n_tasks = rows.div_ceil(per_task);
    let mut shared = cx.shared();
    let parts = shared.f32(n_tasks * cols);
    cx.for_each(
        parts.chunks_mut(cols).collect(),
        |task, part: &mut [f32], _| {
            let first = task * per_task * cols;
            let last = (first + per_task * cols).min(x.len());
            add_rows(part, &x[first..last]);
        },
    );
    add_rows(y, parts);
}

/// `mean(x^2)`.
pub(super) fn mean_square(_: &MeanSquare, a: &Args, r: &mut Results, cx: &Cx) {
    let x = a.f(0);
    r.take_f(0)[0] = (total(cx, x, square_sum) / x.len().max(1) as f64) as f32;
}

/// Sum of `part` over tasks, in order.
fn total(cx: &Cx, x: &[f32], part: fn(&[f32]) -> f64) -> f64 {
    let mut parts = vec![0.0; x.len().div_ceil(TASK)];
    cx.for_each(parts.iter_mut().collect(), |task, out: &mut f64, _| {
        *out = part(&x[task * TASK..x.len().min((task + 1) * TASK)]);
    });
    parts.iter().sum()
}

/// `into[start..start+len] = beta into[..] + x`.
pub(super) fn accumulate(op: &Accumulate, a: &Args, r: &mut Results, cx: &Cx) {
    let ty = r.ty(0);
    let row = ty.len() / ty.size(0).max(1);
    let beta = a.f(1)[0];
    let x = a.opt_f(2);
    let into = &mut r.take_f(0)[op.start * row..(op.start + op.len) * row];
    cx.for_each(
        into.chunks_mut(TASK).collect(),
        |task, into: &mut [f32], _| {
            let n = into.len();
            let x = x.map_or(&[][..], |x| &x[task * TASK..task * TASK + n]);
            scale_add(into, beta, x);
        },
    );
}

simd! {
    /// Sum in blocks: f32 within 4096 elements, f64 over blocks.
    fn sum_of(x: &[f32]) -> f64 {
        x.chunks(4096).map(|x| f64::from(simd::sum(x))).sum()
    }

    fn square_sum(x: &[f32]) -> f64 {
        x.chunks(4096).map(|x| f64::from(simd::dot(x, x))).sum()
    }

    fn add_rows(y: &mut [f32], x: &[f32]) {
        y.fill(0.0);
        for row in x.chunks_exact(y.len().max(1)) {
            for (y, &x) in y.iter_mut().zip(row) {
                *y += x;
            }
        }
    }

    /// `y = beta y + x`; beta 0 never reads, no x is zero.
    fn scale_add(y: &mut [f32], beta: f32, x: &[f32]) {
        match (x.is_empty(), beta == 0.0) {
            (true, true) => y.fill(0.0),
            (true, false) => {
                for y in y.iter_mut() {
                    *y *= beta;
                }
            }
            (false, true) => y.copy_from_slice(x),
            (false, false) => {
                for (y, &x) in y.iter_mut().zip(x) {
                    *y = beta.mul_add(*y, x);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use marimba_ir::{Type, dims};

    #[test]
    fn sums_to_every_shape_that_broadcasts() {
        for (b, t, d) in [(3, 63, 65), (1, 1000, 7), (2, 40, 1000)] {
            let full = Type::f32(dims![B b, T t, D d]);
            // Not centred: a sum that cancels has no relative precision to test.
            let x: Vec<f32> = randn(1, full.len()).iter().map(|x| x + 0.5).collect();
            for y in [
                full.clone(),
                Type::f32(dims![D d]),
                Type::f32(dims![T t, D d]),
                Type::f32(dims![B b, T t, D 1]),
                Type::f32(dims![B b, T 1, D 1]),
                Type::scalar(),
            ] {
                let mut want = vec![0.0; y.len()];
                for (e, &x) in x.iter().enumerate() {
                    let at = match Broadcast::of(&y, &full).unwrap() {
                        Broadcast::Full => e,
                        Broadcast::Scalar => 0,
                        Broadcast::Suffix { period } => e % period,
                        Broadcast::Prefix { repeat } => e / repeat,
                    };
                    want[at] += f64::from(x);
                }
                let got = run(
                    SumTo {
                        dims: y.dims.clone(),
                    },
                    &[f(full.clone(), &x)],
                );
                close(floats(&got[0]), &want, 1e-5);
            }
            let want = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / x.len() as f64;
            close(
                floats(&run(MeanSquare, &[f(full.clone(), &x)])[0]),
                &[want],
                1e-6,
            );
        }
    }

    #[test]
    fn accumulates_into_rows_only() {
        let (m, row) = (70, 333);
        let ty = Type::f32(dims![I m, D row]);
        for beta in [0.0f32, 1.0, 0.5] {
            for with_x in [false, true] {
                let op = Accumulate { start: 5, len: 60 };
                let mut into = randn(1, m * row);
                let x = randn(2, 60 * row);
                let mut want = wide(&into);
                for i in 0..60 * row {
                    let old = f64::from(beta) * want[5 * row + i];
                    want[5 * row + i] = old + if with_x { f64::from(x[i]) } else { 0.0 };
                }
                if beta == 0.0 {
                    into[5 * row..65 * row].fill(f32::NAN);
                }
                let ax = if with_x {
                    f(Type::f32(dims![I 60, D row]), &x)
                } else {
                    None
                };
                let got = run(op, &[f(ty.clone(), &into), f(Type::scalar(), &[beta]), ax]);
                close(floats(&got[0]), &want, 1e-6);
            }
        }
    }
}
