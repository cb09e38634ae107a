//! Launch of the rotary embedding.

use crate::record::{Args, Param, Recorder, THREADS, flag, int, long, over};

/// `y` of `x, pos?, inv_freq`.
pub fn rope(r: &mut Recorder, a: &Args, dims: usize, factor: f32, inverse: bool) {
    let x = a.arg(0);
    r.launch(
        ("rope", "rope"),
        a.types(),
        over(x.len()),
        THREADS,
        vec![
            x.into(),
            a.arg(1).into(),
            a.arg(2).into(),
            a.res(0).into(),
            long(x.len()),
            int(x.size(1)),
            int(x.size(2)),
            int(x.size(3)),
            int(dims),
            Param::Float(factor),
            flag(inverse),
        ],
    );
}
