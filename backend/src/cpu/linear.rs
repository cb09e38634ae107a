//! Products with an `[out, in]` weight: one call of the matrix product each; transposes are strides.

use super::halves::{E4M3_MOST, E5M2_MOST};
use super::matmul::{Mat, MatMut, par_matmul};
use super::tensor::{Args, Cx, Results};
use marimba_ir::DType;
use marimba_ir::op::{Linear, LinearDw, LinearDx, LinearFp8, Narrow};

/// `y [R N] = x [R K] w^T [K N] (+ b) (+ add)`.
pub(super) fn linear(_: &Linear, a: &Args, r: &mut Results, cx: &Cx) {
    let (n, k) = (a.ty(1).size(0), a.ty(1).size(1));
    let rows = r.ty(0).len() / n.max(1);
    let y = r.take_f(0);
    let beta = start(y, a.opt_f(3));
    let beta = match (a.opt_f(2), beta) {
        (Some(b), 0.0) => {
            for row in y.chunks_exact_mut(n.max(1)) {
                row.copy_from_slice(b);
            }
            1.0
        }
        (Some(b), _) => {
            for row in y.chunks_exact_mut(n.max(1)) {
                for (y, b) in row.iter_mut().zip(b) {
                    *y += b;
                }
            }
            1.0
        }
        (None, beta) => beta,
    };
    par_matmul(
        cx,
        MatMut::new(y, rows, n),
        beta,
        1.0,
        Mat::new(a.f(0), rows, k),
        Mat::new(a.f(1), n, k).t(),
    );
}

/// What a product is to be added to; the factor on it: 0 where there is nothing.
fn start(y: &mut [f32], add: Option<&[f32]>) -> f32 {
    match add {
        Some(add) => {
            y.copy_from_slice(add);
            1.0
        }
        None => 0.0,
    }
}

/// `dx [R K] = dy [R N] w [N K] (+ add)`.
pub(super) fn linear_dx(_: &LinearDx, a: &Args, r: &mut Results, cx: &Cx) {
    let (n, k) = (a.ty(1).size(0), a.ty(1).size(1));
    let rows = r.ty(0).len() / k.max(1);
    let dx = r.take_f(0);
    let beta = start(dx, a.opt_f(2));
    par_matmul(
        cx,
        MatMut::new(dx, rows, k),
        beta,
        1.0,
        Mat::new(a.f(0), rows, n),
        Mat::new(a.f(1), n, k),
    );
}

/// `dw [N K] = dy^T [N R] x [R K]`, or the same added to `beta` times rows `start..start+N` of the buffer.
pub(super) fn linear_dw(op: &LinearDw, a: &Args, r: &mut Results, cx: &Cx) {
    let (k, n) = (a.ty(0).last(), a.ty(1).last());
    let rows = a.ty(0).rows();
    let dw = r.take_f(0);
    let (dw, beta) = if op.accumulate {
        (&mut dw[op.start * k..(op.start + n) * k], a.f(3)[0])
    } else {
        (dw, 0.0)
    };
    par_matmul(
        cx,
        MatMut::new(dw, n, k),
        beta,
        1.0,
        Mat::new(a.f(1), rows, n).t(),
        Mat::new(a.f(0), rows, k),
    );
}

/// `scale`, and `x / scale` as it lies and transposed, with zeros beyond x; the engine rounds them to their format.
pub(super) fn narrow(op: &Narrow, a: &Args, r: &mut Results, _: &Cx) {
    let (x, cols) = (a.f(0), a.ty(0).last());
    let largest = match op.to {
        DType::E5m2 => E5M2_MOST,
        _ => E4M3_MOST,
    };
    // The floor keeps the factor finite.
    let most = x.iter().fold(1e-30f32, |m, v| m.max(v.abs()));
    let factor = largest / most;
    r.take_f(0)[0] = most / largest;
    let mut result = 1;
    for turned in [false, true] {
        if !(if turned { op.turned } else { op.plain }) {
            continue;
        }
        let wide = r.ty(result).last();
        let q = r.take_f(result);
        q.fill(0.0);
        for (e, v) in x.iter().enumerate() {
            let (row, col) = (e / cols, e % cols);
            let at = if turned {
                col * wide + row
            } else {
                row * wide + col
            };
            q[at] = v * factor;
        }
        result += 1;
    }
}

/// `y [M N] = scales * a [M K] b^T [K N] (+ bias) (+ add)`, or the same added to `beta` times rows from `start` of the buffer.
pub(super) fn linear_fp8(op: &LinearFp8, a: &Args, r: &mut Results, cx: &Cx) {
    let (m, n) = (op.y.rows(), op.y.last());
    let whole = a.ty(0).last();
    let all = r.take_f(0);
    let (y, beta) = match (op.accumulate, a.opt_f(5)) {
        (true, _) => (&mut all[op.start * n..(op.start + m) * n], a.f(7)[0]),
        (false, Some(add)) => {
            all.copy_from_slice(add);
            (all, 1.0)
        }
        (false, None) => (all, 0.0),
    };
    par_matmul(
        cx,
        MatMut::new(&mut *y, m, n),
        beta,
        a.f(1)[0] * a.f(3)[0],
        Mat::new(&a.f(0)[..m * whole], m, whole),
        Mat::new(&a.f(2)[..n * whole], n, whole).t(),
    );
    if let Some(bias) = a.opt_f(4) {
        for row in y.chunks_exact_mut(n) {
            row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use marimba_ir::{Type, dims};

    #[test]
    fn agrees_with_f64_loops() {
        for (b, t, k, n) in [(2, 63, 17, 40), (1, 1, 64, 33), (1, 1000, 8, 5)] {
            let rows = b * t;
            let (x, w, bias, dy) = (
                randn(1, rows * k),
                randn(2, n * k),
                randn(3, n),
                randn(4, rows * n),
            );
            let (tx, tw, ty) = (
                Type::f32(dims![B b, T t, D k]),
                Type::f32(dims![I n, D k]),
                Type::f32(dims![B b, T t, I n]),
            );
            for with_bias in [false, true] {
                let tb = with_bias
                    .then(|| (Type::f32(dims![I n]), crate::HostTensor::F32(bias.clone())));
                let args = [f(tx.clone(), &x), f(tw.clone(), &w), tb];
                let y = run(Linear, &args);
                let want: Vec<f64> = (0..rows * n)
                    .map(|e| {
                        let (r, j) = (e / n, e % n);
                        let bias = if with_bias { f64::from(bias[j]) } else { 0.0 };
                        bias + (0..k)
                            .map(|p| f64::from(x[r * k + p]) * f64::from(w[j * k + p]))
                            .sum::<f64>()
                    })
                    .collect();
                close(floats(&y[0]), &want, 1e-5);
                // And with a matrix added.
                let [x, w, b] = args;
                let y = run(Linear, &[x, w, b, f(ty.clone(), &dy)]);
                let want: Vec<f64> = want
                    .iter()
                    .zip(&dy)
                    .map(|(y, a)| y + f64::from(*a))
                    .collect();
                close(floats(&y[0]), &want, 1e-5);
            }
            let dx = run(LinearDx, &[f(ty.clone(), &dy), f(tw.clone(), &w)]);
            let want: Vec<f64> = (0..rows * k)
                .map(|e| {
                    (0..n)
                        .map(|j| f64::from(dy[e / k * n + j]) * f64::from(w[j * k + e % k]))
                        .sum()
                })
                .collect();
            close(floats(&dx[0]), &want, 1e-5);
            let args = [f(ty.clone(), &dy), f(tw.clone(), &w), f(tx.clone(), &x)];
            let want: Vec<f64> = want
                .iter()
                .zip(&x)
                .map(|(y, a)| y + f64::from(*a))
                .collect();
            close(floats(&run(LinearDx, &args)[0]), &want, 1e-5);
            let dw: Vec<f64> = (0..n * k)
                .map(|e| {
                    (0..rows)
                        .map(|r| f64::from(dy[r * n + e / k]) * f64::from(x[r * k + e % k]))
                        .sum()
                })
                .collect();
            let op = LinearDw {
                start: 0,
                accumulate: false,
            };
            let got = run(op, &[f(tx.clone(), &x), f(ty.clone(), &dy), None, None]);
            close(floats(&got[0]), &dw, 1e-5);
            // Over rows 2..2+n of a buffer: kept and scaled, or (beta 0) never read.
            for beta in [0.0f32, 1.0, 0.5] {
                let mut into = randn(5, (n + 3) * k);
                if beta == 0.0 {
                    into[2 * k..(2 + n) * k].fill(f32::NAN);
                }
                let op = LinearDw {
                    start: 2,
                    accumulate: true,
                };
                let got = run(
                    op,
                    &[
                        f(tx.clone(), &x),
                        f(ty.clone(), &dy),
                        f(Type::f32(dims![I n + 3, D k]), &into),
                        f(Type::scalar(), &[beta]),
                    ],
                );
                let mut want = wide(&into);
                for (e, d) in dw.iter().enumerate() {
                    let old = if beta == 0.0 {
                        0.0
                    } else {
                        f64::from(beta) * want[2 * k + e]
                    };
                    want[2 * k + e] = old + d;
                }
                close(floats(&got[0]), &want, 1e-5);
            }
        }
    }
}
