//! Launch of conversions.

use crate::record::{Args, Recorder, THREADS, Tensor, aligned, long, over, types};

/// `y = x` in the element type of y.
pub(crate) fn convert(r: &mut Recorder, x: &Tensor, y: &Tensor) {
    let (function, n) = match aligned(&[x, y]) && x.len().is_multiple_of(8) {
        true => ("cast8", x.len() / 8),
        false => ("cast", x.len()),
    };
    r.launch(
        ("cast", function),
        types(&[("TA0", x.dtype), ("TR0", y.dtype)]),
        over(n),
        THREADS,
        vec![x.into(), y.into(), long(x.len())],
    );
    r.early();
}

/// `y` of `x`.
pub fn cast(r: &mut Recorder, a: &Args) {
    convert(r, a.arg(0), a.res(0));
}
