//! Small matrix products inside one task: the blocks of attention and of chunked scans, which fit the first caches.
//!
//! Operands are read where they lie (no packing): `a` with any strides, `b` and `c` with contiguous rows. Triangular operands and
//! results cost their triangle. Each element is one fused sum in ascending k, so results have the same bits on every machine and
//! for every blocking. Large products go through `matmul.rs`.

#![allow(unsafe_code)] // unchecked loads in the innermost loop: 96 against 46 GFLOP/s for 64^3 on one Zen 3 core (2026-11-21)

use super::simd::{Level, level};

/// Element (i, k) of the left operand is `data[i * row + k * col]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    /// First element and what follows.
    pub(super) data: &'a [f32],
    /// Elements between rows.
    pub(super) row: usize,
    /// Elements between columns.
    pub(super) col: usize,
}

impl<'a> Left<'a> {
    /// A matrix with contiguous rows, `row` elements apart.
    pub(super) fn rows(data: &'a [f32], row: usize) -> Self {
        Left { data, row, col: 1 }
    }

    /// The transpose of a matrix with contiguous rows, `row` elements apart.
    pub(super) fn transposed(data: &'a [f32], row: usize) -> Self {
        Left {
            data,
            row: 1,
            col: row,
        }
    }
}

/// Which part of a product is needed. Skipping is by blocks of rows: parts next to the boundary are read and written as well, so
/// operands are zero there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// All of it.
    Full,
    /// Left operand: row i is zero from column `i + 1 + .0` on.
    LeftLower(usize),
    /// Left operand: row i is zero before column `i`.
    LeftUpper,
    /// Result: only columns up to i of row i are wanted; others may hold anything.
    Lower,
}

/// `c[m n] = a[m k] b[k n]`, or `c += ..` with `add`; `ldb` and `ldc` are elements between rows.
pub(super) fn product(
    c: &mut [f32],
    ldc: usize,
    a: Left,
    b: &[f32],
    ldb: usize,
    (m, n, k): (usize, usize, usize),
    part: Part,
    add: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(c.len() >= (m - 1) * ldc + n);
    assert!(k == 0 || a.data.len() > (m - 1) * a.row + (k - 1) * a.col);
    assert!(k == 0 || b.len() >= (k - 1) * ldb + n);
    let job = Job {
        c: c.as_mut_ptr(),
        ldc,
        a,
        b,
        ldb,
        m,
        n,
        k,
        part,
        add,
    };
    match level() {
        // SAFETY: `level` has just found these instruction sets.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512(&job) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2(&job) },
        #[cfg(not(target_arch = "x86_64"))]
        Level::Avx512 | Level::Avx2 => base(&job),
        Level::Base => base(&job),
    }
}

/// A product whose extents `product` has checked.
struct Job<'a> {
    c: *mut f32,
    ldc: usize,
    a: Left<'a>,
    b: &'a [f32],
    ldb: usize,
    m: usize,
    n: usize,
    k: usize,
    part: Part,
    add: bool,
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi1,bmi2")]
fn avx512(job: &Job) {
    blocks::<8, 32>(job);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi1,bmi2")]
fn avx2(job: &Job) {
    blocks::<6, 16>(job);
}

fn base(job: &Job) {
    blocks::<4, 8>(job);
}

#[inline(always)]
fn blocks<const MR: usize, const NR: usize>(job: &Job) {
    let mut j = 0;
    while j + NR <= job.n {
        column::<MR, NR>(job, j);
        j += NR;
    }
    while j + 8 <= job.n {
        column::<MR, 8>(job, j);
        j += 8;
    }
    while j < job.n {
        column::<MR, 1>(job, j);
        j += 1;
    }
}

#[inline(always)]
fn column<const MR: usize, const NR: usize>(job: &Job, j: usize) {
    let mut i = if job.part == Part::Lower {
        j / MR * MR
    } else {
        0
    };
    while i + MR <= job.m {
        tile::<MR, NR>(job, i, j);
        i += MR;
    }
    while i + 2 <= job.m {
        tile::<2, NR>(job, i, j);
        i += 2;
    }
    while i < job.m {
        tile::<1, NR>(job, i, j);
        i += 1;
    }
}

#[inline(always)]
fn tile<const MR: usize, const NR: usize>(job: &Job, i: usize, j: usize) {
    let (k0, k1) = match job.part {
        Part::Full | Part::Lower => (0, job.k),
        Part::LeftLower(off) => (0, job.k.min(i + MR + off)),
        Part::LeftUpper => (i.min(job.k), job.k),
    };
    let mut acc = [[0.0f32; NR]; MR];
    // SAFETY: i + MR <= m and j + NR <= n, and `product` has checked that all of m, n, k lies in the slices; rows of c do not
    // overlap in what is read and written here.
    unsafe {
        let c = job.c.add(i * job.ldc + j);
        if job.add {
            for r in 0..MR {
                acc[r] = *c.add(r * job.ldc).cast::<[f32; NR]>();
            }
        }
        let a = job.a.data.as_ptr().add(i * job.a.row);
        let b = job.b.as_ptr().add(j);
        for p in k0..k1 {
            let row = &*b.add(p * job.ldb).cast::<[f32; NR]>();
            for r in 0..MR {
                let x = *a.add(r * job.a.row + p * job.a.col);
                for q in 0..NR {
                    acc[r][q] = x.mul_add(row[q], acc[r][q]);
                }
            }
        }
        for r in 0..MR {
            *c.add(r * job.ldc).cast::<[f32; NR]>() = acc[r];
        }
    }
}

/// `dst[c * ld_dst + r] = src[r * ld_src + c]` for a block of `rows x cols` of src.
#[inline(always)]
pub(super) fn transpose(
    dst: &mut [f32],
    ld_dst: usize,
    src: &[f32],
    ld_src: usize,
    rows: usize,
    cols: usize,
) {
    const S: usize = 8;
    for r0 in (0..rows).step_by(S) {
        for c0 in (0..cols).step_by(S) {
            if r0 + S <= rows && c0 + S <= cols {
                let mut t = [[0.0f32; S]; S];
                for r in 0..S {
                    let row = &src[(r0 + r) * ld_src + c0..][..S];
                    for c in 0..S {
                        t[c][r] = row[c];
                    }
                }
                for c in 0..S {
                    dst[(c0 + c) * ld_dst + r0..][..S].copy_from_slice(&t[c]);
                }
            } else {
                for r in r0..rows.min(r0 + S) {
                    for c in c0..cols.min(c0 + S) {
                        dst[c * ld_dst + r] = src[r * ld_src + c];
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(i: usize) -> f32 {
        ((i * 37 + 11) % 64) as f32 / 16.0 - 2.0
    }

    /// Every shape around the block sizes, both orientations, all parts, against the plain sum (exact: few bits).
    #[test]
    fn products_are_sums() {
        for (m, n, k) in [
            (1, 1, 1),
            (6, 16, 8),
            (7, 17, 9),
            (13, 41, 5),
            (64, 64, 64),
            (33, 48, 0),
            (3, 31, 33),
        ] {
            for (part, transposed, add) in [
                (Part::Full, false, false),
                (Part::Full, true, true),
                (Part::Lower, true, false),
                (Part::Lower, false, true),
                (Part::LeftLower(3), false, false),
                (Part::LeftLower(0), true, true),
                (Part::LeftUpper, false, true),
                (Part::LeftUpper, true, false),
            ] {
                let (lda, ldb, ldc) = (if transposed { m + 1 } else { k + 3 }, n + 2, n + 5);
                let zero = |i: usize, p: usize| match part {
                    Part::Full | Part::Lower => false,
                    Part::LeftLower(off) => p > i + off,
                    Part::LeftUpper => p < i,
                };
                let mut a = vec![f32::NAN; lda * (if transposed { k } else { m }) + 1];
                for i in 0..m {
                    for p in 0..k {
                        let at = if transposed { p * lda + i } else { i * lda + p };
                        a[at] = if zero(i, p) { 0.0 } else { number(i * 7 + p) };
                    }
                }
                let b: Vec<f32> = (0..ldb * k + 1).map(number).collect();
                let mut c: Vec<f32> = (0..ldc * m).map(|i| number(i + 5)).collect();
                let old = c.clone();
                let left = if transposed {
                    Left::transposed(&a, lda)
                } else {
                    Left::rows(&a, lda)
                };
                product(&mut c, ldc, left, &b, ldb, (m, n, k), part, add);
                for i in 0..m {
                    for j in 0..ldc {
                        if j >= n {
                            assert_eq!(c[i * ldc + j], old[i * ldc + j]);
                        } else if part != Part::Lower || j <= i {
                            let mut want = if add { old[i * ldc + j] } else { 0.0 };
                            for p in 0..k {
                                want += a[if transposed { p * lda + i } else { i * lda + p }]
                                    * b[p * ldb + j];
                            }
                            assert_eq!(c[i * ldc + j], want, "{m} {n} {k} {part:?} {i} {j}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn transposes() {
        for (rows, cols) in [(1, 1), (8, 8), (9, 17), (64, 16)] {
            let src: Vec<f32> = (0..rows * (cols + 1)).map(|i| i as f32).collect();
            let mut dst = vec![-1.0; cols * (rows + 2)];
            transpose(&mut dst, rows + 2, &src, cols + 1, rows, cols);
            for r in 0..rows {
                for c in 0..cols {
                    assert_eq!(dst[c * (rows + 2) + r], src[r * (cols + 1) + c]);
                }
            }
        }
    }
}
