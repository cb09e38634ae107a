//! Launches of joining and splitting: one copy a part.

use crate::record::{Args, DType, Param, Recorder, THREADS, Tensor, int, long, over, types};

/// Copies `[rows cols]` with these distances between rows, in elements.
fn copy(
    r: &mut Recorder,
    dtype: DType,
    (from, xs): (u64, usize),
    (to, ys): (u64, usize),
    rows: usize,
    cols: usize,
) {
    r.launch(
        ("concat", "copy_cols"),
        types(&[("TA0", dtype)]),
        over(rows * cols),
        THREADS,
        vec![
            Param::Ptr(from),
            long(xs),
            Param::Ptr(to),
            long(ys),
            long(rows * cols),
            int(cols),
        ],
    );
}

/// Address of column `c` of the first row.
fn column(t: &Tensor, c: usize) -> u64 {
    t.ptr + (c * t.dtype.bytes()) as u64
}

/// `y` of `x...`.
pub fn concat(r: &mut Recorder, a: &Args) {
    let y = a.res(0);
    let mut at = 0;
    for x in a.args.iter().flatten() {
        let n = x.last();
        copy(
            r,
            x.dtype,
            (x.ptr, n),
            (column(y, at), y.last()),
            y.rows(),
            n,
        );
        at += n;
    }
}

/// `y...` of `x`.
pub fn split(r: &mut Recorder, a: &Args) {
    let x = a.arg(0);
    let mut at = 0;
    for y in a.results {
        let n = y.last();
        copy(
            r,
            x.dtype,
            (column(x, at), x.last()),
            (y.ptr, n),
            x.rows(),
            n,
        );
        at += n;
    }
}
