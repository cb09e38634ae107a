//! Matrix products, by cuBLASLt, accumulated in f32.

use crate::cast::convert;
use crate::record::{
    Args, Command, DType, Param, Product, Recorder, THREADS, Tensor, aligned, define, int, long,
    over, types,
};
use crate::reduce::scale_into;

/// Operand of a product.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    /// Memory.
    pub(crate) t: &'a Tensor,
    /// Stored transposed.
    pub(crate) transposed: bool,
}

/// `c = op(a) op(b) + add` with sizes m, n, k; nothing is added where `add` is absent.
fn product_and(
    r: &mut Recorder,
    a: Mat,
    b: Mat,
    add: &Tensor,
    c: &Tensor,
    (m, n, k): (usize, usize, usize),
) {
    if !add.is_present() {
        product(r, a, b, c, (m, n, k), 1.0, 0.0);
    } else if k > 0 && add.dtype == c.dtype {
        multiply(r, a, b, c, (m, n, k), (1.0, 1.0, 0), add.ptr);
    } else {
        convert(r, add, c);
        product(r, a, b, c, (m, n, k), 1.0, 1.0);
    }
}

/// `c = alpha op(a) op(b) + beta c` with sizes m, n, k. Operands of different types are widened first.
pub(crate) fn product(
    r: &mut Recorder,
    a: Mat,
    b: Mat,
    c: &Tensor,
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    beta: f32,
) {
    if k == 0 {
        if beta == 0.0 {
            r.zero(c);
        }
        return;
    }
    multiply(r, a, b, c, (m, n, k), (alpha, beta, 0), 0);
}

/// The same with the factors `(alpha, beta, beta_at)` and the address `add` of [`Product`].
fn multiply(
    r: &mut Recorder,
    a: Mat,
    b: Mat,
    c: &Tensor,
    (m, n, k): (usize, usize, usize),
    (alpha, beta, beta_at): (f32, f32, u64),
    add: u64,
) {
    if m * n == 0 {
        return;
    }
    let input = match (a.t.dtype, b.t.dtype) {
        (x, y) if x == y => x,
        _ => DType::F32,
    };
    let mut widened = |t: &Tensor| {
        if t.dtype == input {
            return t.clone();
        }
        let wide = r.scratch(input, t.len());
        convert(r, t, &wide);
        wide
    };
    let (wa, wb) = (widened(a.t), widened(b.t));
    let direct = c.dtype == DType::F32 || c.dtype == input;
    let out = match direct {
        true => c.clone(),
        false => r.scratch(DType::F32, c.len()),
    };
    let mut add = add;
    if !direct && (beta != 0.0 || beta_at != 0) {
        let old = Tensor {
            ptr: if add == 0 { c.ptr } else { add },
            ..c.clone()
        };
        convert(r, &old, &out);
        add = 0;
    }
    r.commands.push(Command::Product(Product {
        a: wa.ptr,
        b: wb.ptr,
        c: out.ptr,
        transposed: (a.transposed, b.transposed),
        sizes: (m, n, k),
        input,
        eights: None,
        output: out.dtype,
        alpha,
        beta,
        beta_at,
        add,
    }));
    if !direct {
        convert(r, &out, c);
    }
}

/// As stored.
pub(crate) fn plain(t: &Tensor) -> Mat<'_> {
    Mat {
        t,
        transposed: false,
    }
}

/// Transposed.
pub(crate) fn flipped(t: &Tensor) -> Mat<'_> {
    Mat {
        t,
        transposed: true,
    }
}

/// Fills memory with numbers of about one, in any float type: what products are timed on.
pub fn noise(r: &mut Recorder, ptr: u64, bytes: usize) {
    let n = bytes / 4;
    r.launch(
        ("linear", "noise"),
        Vec::new(),
        over(n),
        THREADS,
        vec![Param::Ptr(ptr), long(n)],
    );
}

/// `y` of `x, w, b?, add?`.
pub fn linear(r: &mut Recorder, a: &Args) {
    let (x, w, y) = (a.arg(0), a.arg(1), a.res(0));
    let (m, n, k) = (x.rows(), w.size(0), w.size(1));
    if is_few(a, (m, n, k)) {
        return linear_few(r, a, (m, n, k));
    }
    product_and(r, plain(x), flipped(w), a.arg(3), y, (m, n, k));
    add_bias(r, a.arg(2), y, n);
}

/// Most rows of x for which the weights are read by a kernel of our own.
const FEW: usize = 16;

/// From so many columns of y on there are blocks enough for smaller ones, that hold more of x.
const MANY: usize = 8192;

/// Whether a product is little more than reading the weights, in types and at addresses that [`linear_few`] takes.
fn is_few(a: &Args, (m, n, k): (usize, usize, usize)) -> bool {
    let (x, w, add, y) = (a.arg(0), a.arg(1), a.arg(3), a.res(0));
    (1..=FEW).contains(&m)
        && n > 0
        && k > 0
        && k.is_multiple_of(8)
        && [x, w].iter().all(|t| t.dtype == DType::Bf16)
        && aligned(&[x, w])
        && (!add.is_present() || add.dtype == y.dtype)
}

/// [`linear`] for few rows: the sum of each element is shared by the warps of a block.
fn linear_few(r: &mut Recorder, a: &Args, (m, n, k): (usize, usize, usize)) {
    let (x, w, b, add, y) = (a.arg(0), a.arg(1), a.arg(2), a.arg(3), a.res(0));
    let mut defines = a.types();
    defines.retain(|(name, _)| name == "TA2" || name == "TR0");
    let many = n >= MANY;
    let (tiles, warps) = (1, if many { 8 } else { 16 });
    defines.extend([
        define("TILES", tiles),
        define("COLUMNS", m.div_ceil(8)),
        define("WARPS", warps),
        define("DEPTH", 2),
    ]);
    if many {
        defines.extend([define("HOLD", 3), define("BOTH", u8::from(m <= 8))]);
    }
    if a.is_fixed(1) {
        defines.push(define("FIXED", 1));
    }
    let params = vec![
        x.into(),
        w.into(),
        b.into(),
        add.into(),
        y.into(),
        int(m),
        int(n),
        int(k),
    ];
    let grid = [n.div_ceil(16 * tiles), 1, 1];
    r.launch(
        ("linear_few", "linear_few"),
        defines,
        grid,
        32 * warps,
        params,
    );
    r.early();
}

/// `y += b` of a product with rows of `n`, where there is a bias.
pub(crate) fn add_bias(r: &mut Recorder, b: &Tensor, y: &Tensor, n: usize) {
    if b.is_present() {
        r.launch(
            ("linear", "add_bias"),
            types(&[("TA2", b.dtype), ("TR0", y.dtype)]),
            over(y.len()),
            THREADS,
            vec![y.into(), b.into(), long(y.len()), int(n)],
        );
    }
}

/// Rows `start..start + n` of a gradient buffer of `k` columns.
pub(crate) fn rows_from(whole: &Tensor, start: usize, n: usize, k: usize) -> Tensor {
    Tensor {
        ptr: whole.ptr + (start * k * 4) as u64,
        dtype: whole.dtype,
        dims: vec![n, k],
    }
}

/// `dx` of `dy, w, add?`.
pub fn linear_dx(r: &mut Recorder, a: &Args) {
    let (dy, w) = (a.arg(0), a.arg(1));
    let sizes = (dy.rows(), w.size(1), w.size(0));
    product_and(r, plain(dy), plain(w), a.arg(2), a.res(0), sizes);
}

/// `dw` of `x, dy, into?, beta?`, over rows from `start`.
pub fn linear_dw(r: &mut Recorder, a: &Args, start: usize) {
    let (x, dy, beta) = (a.arg(0), a.arg(1), a.arg(3));
    let (rows, n, k) = (x.rows(), dy.last(), x.last());
    let dw = rows_from(a.res(0), start, n, k);
    let (a, b, sizes) = (flipped(dy), plain(x), (n, k, rows));
    match (beta.is_present(), rows) {
        (false, _) => product(r, a, b, &dw, sizes, 1.0, 0.0),
        (true, 0) => scale_into(r, &dw, beta),
        (true, _) => multiply(r, a, b, &dw, sizes, (1.0, 1.0, beta.ptr), 0),
    }
}
