//! Launches of drawing a token: the first token of each part of a row by many blocks, and where there is a temperature, the rest by one block
//! a row, which looks for the token by the bits of its logit instead of sorting.

use crate::record::{Args, DType, Param, Recorder, define, int};

/// Fewest tokens of a part, and most parts of a row.
const PART: usize = 2048;
const PARTS: usize = 256;

/// Bins into which tokens are counted, and threads of a row's block; `BINS` and what lies in shared memory in the source.
const BINS: usize = 2048;
const THREADS: usize = 1024;

/// `token` of `logits, settings, bits`, with weights of so many binary places.
pub fn draw(r: &mut Recorder, a: &Args, weight_bits: u32) {
    let (logits, settings, bits, token) = (a.arg(0), a.arg(1), a.arg(2), a.res(0));
    let (rows, v) = (logits.rows(), logits.last());
    let each = v.div_ceil(PARTS).max(PART);
    let parts = v.div_ceil(each);
    let best = r.scratch(DType::F32, 2 * rows * parts);
    let defines = vec![define("WEIGHT_BITS", weight_bits)];
    let params = vec![logits.into(), (&best).into(), int(v), int(each)];
    let grid = [parts, rows, 1];
    r.launch(("draw", "draw_first"), defines.clone(), grid, 256, params);
    r.early();
    let params: Vec<Param> = vec![
        logits.into(),
        (&best).into(),
        settings.into(),
        bits.into(),
        token.into(),
        int(v),
        int(parts),
    ];
    let shared = 2 * BINS * (8 + 4) + 64 * 8;
    let grid = [rows, 1, 1];
    r.launch_shared(
        ("draw", "draw_token"),
        defines,
        grid,
        THREADS,
        shared,
        params,
    );
    r.early();
}
