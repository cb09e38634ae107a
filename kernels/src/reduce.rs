//! Launches of sums. Every sum has two stages and a fixed order: runs are bitwise equal.

use crate::record::{
    Args, DType, Param, Recorder, THREADS, Tensor, aligned, chunks, flag, int, long, over, types,
};

/// Blocks of the first stage of a sum of everything.
const BLOCKS: usize = 1024;

/// Most parts that are added up at once.
const PARTS: usize = 1024;

/// `y[c] = sum_k part[k][from + c]` over `n` parts; the last dimension of `part` is the distance between parts, or `cols` when it has
/// one dimension only.
pub(crate) fn sum_parts(
    r: &mut Recorder,
    part: &Tensor,
    from: usize,
    n: usize,
    cols: usize,
    y: &Tensor,
) {
    sum_parts_of_two(r, part, from, n, (cols, 0), (y, &Tensor::ABSENT));
}

/// The same for two neighbouring ranges of columns.
pub(crate) fn sum_parts_of_two(
    r: &mut Recorder,
    part: &Tensor,
    from: usize,
    n: usize,
    (first, second): (usize, usize),
    (y, more): (&Tensor, &Tensor),
) {
    let cols = first + second;
    let stride = if part.dims.len() > 1 {
        part.last()
    } else {
        cols
    };
    let at = part.ptr + 4 * from as u64;
    let per = n.div_ceil(n.div_ceil(PARTS).max(1)).max(1);
    let rows = n.div_ceil(per);
    if rows <= 1 {
        add_up(r, (at, n, per, stride), cols, (y, more), first);
        return;
    }
    let between = r.scratch(DType::F32, rows * cols);
    add_up(
        r,
        (at, n, per, stride),
        cols,
        (&between, &Tensor::ABSENT),
        cols,
    );
    add_up(r, (between.ptr, rows, rows, cols), cols, (y, more), first);
}

/// Rows of `per` of the `n` parts at an address, each `stride` from the next.
fn add_up(
    r: &mut Recorder,
    (at, n, per, stride): (u64, usize, usize, usize),
    cols: usize,
    (y, more): (&Tensor, &Tensor),
    split: usize,
) {
    r.launch(
        ("reduce", "col_sum"),
        Vec::new(),
        [cols.div_ceil(32), n.div_ceil(per).max(1), 1],
        32 * per.min(32),
        vec![
            Param::Ptr(at),
            y.into(),
            more.into(),
            int(n),
            int(per),
            long(stride),
            long(cols),
            long(split),
        ],
    );
}

/// `into = beta into`; a beta of 0 never reads.
pub(crate) fn scale_into(r: &mut Recorder, into: &Tensor, beta: &Tensor) {
    accumulate_at(r, into.ptr, beta, &Tensor::ABSENT, into.len());
}

fn accumulate_at(r: &mut Recorder, into: u64, beta: &Tensor, x: &Tensor, n: usize) {
    let wide = into.is_multiple_of(16) && aligned(&[x]) && n.is_multiple_of(8);
    let (function, steps) = match wide {
        true => ("accumulate8", n / 8),
        false => ("accumulate", n),
    };
    r.launch(
        ("reduce", function),
        types(&[("TA2", x.dtype)]),
        over(steps),
        THREADS,
        vec![Param::Ptr(into), beta.into(), x.into(), long(n)],
    );
}

/// Additions of one launch: `TABLE` of the source.
const TABLE: usize = 64;

/// Several accumulations with one factor, of which none reads or writes where another writes: where each goes, and the f32 numbers that are
/// added there.
pub fn accumulate_all(r: &mut Recorder, beta: &Tensor, sums: &[(u64, Tensor)]) {
    let all: Vec<_> = sums.iter().filter(|(_, x)| !x.is_empty()).collect();
    for list in all.chunks(TABLE) {
        let column = |of: fn(&(u64, Tensor)) -> u64| {
            let mut words: Vec<u64> = list.iter().map(|s| of(s)).collect();
            words.resize(TABLE, 0);
            words
        };
        let mut words = column(|s| s.0);
        words.extend(column(|s| s.1.ptr));
        words.extend(column(|s| s.1.len() as u64));
        let longest = list.iter().map(|s| s.1.len()).max().unwrap_or(0);
        r.launch(
            ("reduce", "accumulate_all"),
            Vec::new(),
            [longest.div_ceil(THREADS).min(BLOCKS), list.len(), 1],
            THREADS,
            vec![Param::Words(words), beta.into()],
        );
    }
}

/// `y` of `x`: sums down to the sizes of y, whose elements are each repeated `repeat` times within every `repeat * y.len()` elements of x:
/// repeat 1 sums rows (y a suffix), `x.len() / y.len()` sums what follows (y a prefix).
pub fn sum_to(r: &mut Recorder, a: &Args, prefix: bool) {
    let (x, y) = (a.arg(0), a.res(0));
    let (n, cols) = (x.len(), y.len());
    if n == cols {
        crate::cast::convert(r, x, y);
    } else if cols == 1 {
        sum_all(r, x, y, false, 1.0);
    } else if prefix {
        r.launch(
            ("reduce", "row_sum"),
            types(&[("TA0", x.dtype)]),
            [cols, 1, 1],
            THREADS,
            vec![x.into(), y.into(), long(n / cols.max(1))],
        );
    } else {
        let rows = n / cols.max(1);
        let parts = chunks(rows);
        let part = r.scratch(DType::F32, parts * cols);
        r.launch(
            ("reduce", "col_part"),
            types(&[("TA0", x.dtype)]),
            [cols.div_ceil(THREADS), parts, 1],
            THREADS,
            vec![x.into(), (&part).into(), long(rows), long(cols)],
        );
        sum_parts(r, &part, 0, parts, cols, y);
    }
}

fn sum_all(r: &mut Recorder, x: &Tensor, y: &Tensor, square: bool, over: f64) {
    let blocks = x.len().div_ceil(4 * THREADS).clamp(1, BLOCKS);
    let part = r.scratch_raw(blocks * 8);
    r.launch(
        ("reduce", "all_part"),
        types(&[("TA0", x.dtype)]),
        [blocks, 1, 1],
        THREADS,
        vec![x.into(), Param::Ptr(part), long(x.len()), flag(square)],
    );
    finish_sum(r, part, blocks, y, over, false);
}

/// `y = sum of n doubles / over`, or its root.
pub(crate) fn finish_sum(r: &mut Recorder, part: u64, n: usize, y: &Tensor, over: f64, root: bool) {
    r.launch(
        ("reduce", "all_sum"),
        Vec::new(),
        [1, 1, 1],
        n.next_multiple_of(32).clamp(THREADS, 1024),
        vec![
            Param::Ptr(part),
            y.into(),
            int(n),
            Param::Double(over),
            flag(root),
        ],
    );
}

/// `mean(x^2)`.
pub fn mean_square(r: &mut Recorder, a: &Args) {
    let x = a.arg(0);
    sum_all(r, x, a.res(0), true, x.len().max(1) as f64);
}

/// `into` of `into, beta, x?`, rows `start..start+len`.
pub fn accumulate(r: &mut Recorder, a: &Args, start: usize, len: usize) {
    let into = a.res(0);
    let width = into.len() / into.size(0).max(1);
    accumulate_at(
        r,
        into.ptr + (start * width * 4) as u64,
        a.arg(1),
        a.arg(2),
        len * width,
    );
}
