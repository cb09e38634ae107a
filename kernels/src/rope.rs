//! Launch of the rotary embedding.

use crate::record::{Args, Param, Recorder, THREADS, aligned, flag, int, long, over};

/// Vectors of 8 elements that a block should have at least, and most angles that it keeps.
const VECTORS: usize = 512;
const ANGLES: usize = 4096;

/// `y` of `x, pos?, inv_freq`.
pub fn rope(r: &mut Recorder, a: &Args, dims: usize, factor: f32, inverse: bool) {
    let (x, y) = (a.arg(0), a.res(0));
    let (h, p, half) = (x.size(2), x.size(3), dims / 2);
    let tokens = x.size(0) * x.size(1);
    let wide = p.is_multiple_of(8)
        && half.is_multiple_of(8)
        && half <= ANGLES
        && aligned(&[x, y])
        && !x.is_empty();
    let n = if wide { tokens } else { x.len() };
    let mut params: Vec<Param> = [x, a.arg(1), a.arg(2), y].map(Param::from).to_vec();
    params.extend([
        long(n),
        int(x.size(1)),
        int(h),
        int(p),
        int(dims),
        Param::Float(factor),
        flag(inverse),
    ]);
    if !wide {
        r.launch(("rope", "rope"), a.types(), over(n), THREADS, params);
        r.early();
        return;
    }
    let block = (VECTORS / (h * p / 8)).clamp(1, (ANGLES / half.max(1)).max(1));
    params.push(int(block));
    r.launch_shared(
        ("rope", "rope8"),
        a.types(),
        [tokens.div_ceil(block), 1, 1],
        THREADS,
        8 * block * half,
        params,
    );
    r.early();
}
