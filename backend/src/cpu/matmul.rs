//! Matrix products over strided views, checked for bounds, through the `gemm` crate.
//!
//! `c = beta c + alpha a b`; beta 0 never reads c. Transposes are strides, so nothing is copied to be transposed. [`matmul`] runs on the
//! calling thread (for tasks), [`par_matmul`] on all threads; both add along k in the same order, so they agree bitwise.

#![allow(unsafe_code)] // the gemm crate takes pointers and strides

use super::tensor::Cx;
use gemm::{Parallelism, gemm};
use std::marker::PhantomData;

/// A matrix to read.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// Whether a view of these strides stays below `len`.
fn fits(len: usize, rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> bool {
    rows == 0 || cols == 0 || (rows - 1) * row_stride + (cols - 1) * col_stride < len
}

impl<'a> Mat<'a> {
    /// Row-major `[rows, cols]`.
    pub(super) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Mat::strided(data, rows, cols, cols)
    }

    /// Row-major with `row_stride` elements from row to row.
    pub(super) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, row_stride, 1));
        Mat {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// Its transpose, without a copy.
    pub(super) fn t(self) -> Self {
        Mat {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A row-major matrix to write.
pub(super) struct MatMut<'a> {
    start: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    life: PhantomData<&'a mut [f32]>,
}

impl<'a> MatMut<'a> {
    /// `[rows, cols]`.
    pub(super) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        MatMut::strided(data, rows, cols, cols)
    }

    /// With `row_stride` elements from row to row.
    pub(super) fn strided(
        data: &'a mut [f32],
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Self {
        assert!(cols <= row_stride.max(1) && fits(data.len(), rows, cols, row_stride, 1));
        MatMut {
            start: data.as_mut_ptr(),
            rows,
            cols,
            row_stride,
            life: PhantomData,
        }
    }
}

/// `c = beta c + alpha a b` on the calling thread.
pub(super) fn matmul(c: MatMut, beta: f32, alpha: f32, a: Mat, b: Mat) {
    run(c, beta, alpha, a, b, Parallelism::None);
}

/// `c = beta c + alpha a b` on all threads of the engine. Not from within a task.
pub(super) fn par_matmul(cx: &Cx, c: MatMut, beta: f32, alpha: f32, a: Mat, b: Mat) {
    match cx.threads() {
        1 => matmul(c, beta, alpha, a, b),
        n => run(c, beta, alpha, a, b, Parallelism::Rayon(n)),
    }
}

fn run(c: MatMut, beta: f32, alpha: f32, a: Mat, b: Mat, parallelism: Parallelism) {
    assert!(
        a.rows == c.rows && a.cols == b.rows && b.cols == c.cols,
        "[{} {}] = [{} {}] [{} {}]",
        c.rows,
        c.cols,
        a.rows,
        a.cols,
        b.rows,
        b.cols
    );
    // SAFETY: the views were checked to stay in their slices when they were made, c is borrowed mutably and so apart from a and b, and
    // the sizes agree. gemm calls `alpha` what multiplies dst, and `beta` what multiplies the product.
    unsafe {
        gemm(
            c.rows,
            c.cols,
            a.cols,
            c.start,
            1,
            c.row_stride as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{close, in_pool, randn};
    use super::*;

    #[test]
    fn products_of_all_layouts_agree_with_f64_and_across_threads() {
        for (m, n, k) in [
            (1, 1, 1),
            (63, 65, 7),
            (1, 100, 63),
            (100, 1, 63),
            (200, 130, 1000),
            (3, 5, 0),
        ] {
            let (a, b) = (randn(1, m * k), randn(2, k * n));
            for (ta, tb) in [(false, false), (true, false), (false, true), (true, true)] {
                let at = |i: usize, p: usize| a[if ta { p * m + i } else { i * k + p }];
                let bt = |p: usize, j: usize| b[if tb { j * k + p } else { p * n + j }];
                let ma = if ta {
                    Mat::new(&a, k, m).t()
                } else {
                    Mat::new(&a, m, k)
                };
                let mb = if tb {
                    Mat::new(&b, n, k).t()
                } else {
                    Mat::new(&b, k, n)
                };
                let c0 = randn(3, m * n);
                let want: Vec<f64> = (0..m * n)
                    .map(|e| {
                        let (i, j) = (e / n, e % n);
                        let dot: f64 = (0..k)
                            .map(|p| f64::from(at(i, p)) * f64::from(bt(p, j)))
                            .sum();
                        0.5 * f64::from(c0[e]) + 2.0 * dot
                    })
                    .collect();
                let mut one = c0.clone();
                matmul(MatMut::new(&mut one, m, n), 0.5, 2.0, ma, mb);
                close(&one, &want, 1e-5);
                for threads in [2, 3] {
                    let mut par = c0.clone();
                    in_pool(threads, |cx| {
                        par_matmul(cx, MatMut::new(&mut par, m, n), 0.5, 2.0, ma, mb)
                    });
                    assert_eq!(one, par, "{m} {n} {k} {ta} {tb} {threads}");
                }
                let mut fresh = vec![f32::NAN; m * n];
                matmul(MatMut::new(&mut fresh, m, n), 0.0, 1.0, ma, mb);
                assert!(fresh.iter().all(|x| x.is_finite()));
            }
        }
    }
}
