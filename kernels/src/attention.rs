//! Launches of attention: tiles of 32 queries or keys in f32, no atomics.

use crate::record::{Args, DType, Param, Recorder, define, int, long};

/// Rows of a block's own tile.
const ROWS: usize = 32;

/// Rows of the tiles it walks over: fewer for wide heads, so that a block fits 99 KiB of shared memory.
fn walked(p: usize) -> usize {
    if p > 192 { 8 } else { 32 }
}

fn launch(
    r: &mut Recorder,
    a: &Args,
    name: &'static str,
    (grid, tiles, scores): ([usize; 3], (usize, usize), usize),
    params: Vec<Param>,
) {
    let p = a.arg(0).size(3);
    let bn = walked(p);
    let mut defines = a.types();
    defines.extend([define("P", p), define("BN", bn)]);
    let shared = 4 * ((tiles.0 * ROWS + tiles.1 * bn) * (p + 1) + scores * ROWS * (bn + 1));
    r.launch_shared(("attention", name), defines, grid, 256, shared, params);
}

fn window_param(window: Option<usize>) -> Param {
    int(window.unwrap_or(i32::MAX as usize))
}

/// `out`, `lse` of `q, k, v, pos?, slot?`.
pub fn attention(r: &mut Recorder, a: &Args, scale: f32, window: Option<usize>) {
    let (q, k) = (a.arg(0), a.arg(1));
    let mut params: Vec<Param> = (0..5).map(|i| a.arg(i).into()).collect();
    params.extend([
        a.res(0).into(),
        a.res(1).into(),
        int(q.size(1)),
        int(k.size(1)),
        int(q.size(2)),
        int(k.size(2)),
        Param::Float(scale),
        window_param(window),
    ]);
    let grid = [q.size(1).div_ceil(ROWS), q.size(2), q.size(0)];
    launch(r, a, "attn_fwd", (grid, (1, 1), 1), params);
}

/// `dq, dk, dv` of `q, k, v, pos?, out, lse, dout`.
pub fn attention_bwd(r: &mut Recorder, a: &Args, scale: f32, window: Option<usize>) {
    let (q, k) = (a.arg(0), a.arg(1));
    let (b, t, h, g) = (q.size(0), q.size(1), q.size(2), k.size(2));
    let rows = b * t * h;
    let delta = r.scratch(DType::F32, rows);
    launch(
        r,
        a,
        "attn_delta",
        ([rows.div_ceil(8), 1, 1], (0, 0), 0),
        vec![
            a.arg(4).into(),
            a.arg(6).into(),
            (&delta).into(),
            long(rows),
            int(t),
            int(h),
        ],
    );
    let common: Vec<Param> = [0, 1, 2, 3, 5, 6].map(|i| a.arg(i).into()).to_vec();
    let sizes = [
        int(t),
        int(h),
        int(g),
        Param::Float(scale),
        window_param(window),
    ];
    let mut params = common.clone();
    params.extend([(&delta).into(), a.res(0).into()]);
    params.extend(sizes.clone());
    launch(
        r,
        a,
        "attn_dq",
        ([t.div_ceil(ROWS), h, b], (2, 1), 1),
        params,
    );
    let mut params = common;
    params.extend([(&delta).into(), a.res(1).into(), a.res(2).into()]);
    params.extend(sizes);
    launch(
        r,
        a,
        "attn_dkv",
        ([t.div_ceil(ROWS), g, b], (2, 2), 2),
        params,
    );
}
