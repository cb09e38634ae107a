//! Launch of conversions.

use crate::record::{Args, Recorder, THREADS, Tensor, long, over, types};

/// `y = x` in the element type of y.
pub(crate) fn convert(r: &mut Recorder, x: &Tensor, y: &Tensor) {
    r.launch(
        ("cast", "cast"),
        types(&[("TA0", x.dtype), ("TR0", y.dtype)]),
        over(x.len()),
        THREADS,
        vec![x.into(), y.into(), long(x.len())],
    );
}

/// `y` of `x`.
pub fn cast(r: &mut Recorder, a: &Args) {
    convert(r, a.arg(0), a.res(0));
}
