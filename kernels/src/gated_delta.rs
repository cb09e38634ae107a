//! Launches of the gated delta rule: token by token, a column of the state shared by a few lanes. Sums over columns and heads have a fixed
//! order.

use crate::record::{
    Args, DType, Param, Recorder, THREADS, Tensor, define, int, long, over, types,
};
use crate::ssd::lanes;

/// Threads of a block, forward.
const BLOCK: usize = 128;

/// Most bytes of shared memory of a block: what every architecture has.
const SHARED: usize = 96 << 10;

/// `o`, then `state` or `saved`, of `q, k, v, g, beta, pos?, state?`.
pub fn gated_delta(r: &mut Recorder, a: &Args, chunk: usize) {
    let (q, v) = (a.arg(0), a.arg(2));
    let (n, p) = (q.size(3), v.size(3));
    let (l, s) = lanes(n);
    let absent = crate::Tensor::ABSENT;
    let (state, saved) = match a.arg(6).is_present() {
        true => (a.res(1), &absent),
        false => (&absent, a.res(1)),
    };
    let mut defines = a.types();
    defines.extend([define("L", l), define("S", s)]);
    let mut params: Vec<Param> = (0..6).map(|i| a.arg(i).into()).collect();
    params.extend([
        state.into(),
        a.res(0).into(),
        saved.into(),
        int(v.size(1)),
        int(q.size(2)),
        int(v.size(2)),
        int(n),
        int(p),
        int(chunk),
    ]);
    let grid = [(p * l).div_ceil(BLOCK), v.size(2), v.size(0)];
    r.launch(("gated_delta", "delta_fwd"), defines, grid, BLOCK, params);
}

/// `dq, dk, dv, dg, dbeta` of `q, k, v, g, beta, pos?, saved, do`.
pub fn gated_delta_bwd(r: &mut Recorder, a: &Args, chunk: usize) {
    let (q, v) = (a.arg(0), a.arg(2));
    let (g, n, h, p) = (q.size(2), q.size(3), v.size(2), v.size(3));
    let (l, s) = lanes(n);
    // Sums of two tokens for each warp.
    let warp_bytes = 2 * (2 * n + 2) * 4;
    let warps = (p * l)
        .div_ceil(32)
        .clamp(1, (SHARED / warp_bytes).clamp(1, 16));
    let blocks = (p * l).div_ceil(32 * warps);
    let states = v.size(0) * h * n * p;
    let hist = r.scratch(DType::F32, chunk.min(v.size(1)) * states);
    let rows = v.size(0) * v.size(1) * h;
    // Over the columns of all blocks and, of q and k, over the heads that share them.
    let sums: Vec<(Tensor, usize, usize)> = [(0, h / g, n), (1, h / g, n), (3, 1, 1), (4, 1, 1)]
        .into_iter()
        .map(|(i, heads, width)| {
            let y = a.res(i);
            let count = heads * blocks;
            match count == 1 && y.dtype == DType::F32 {
                true => (y.clone(), 1, width),
                false => (r.scratch(DType::F32, rows * blocks * width), count, width),
            }
        })
        .collect();
    let mut defines = a.types();
    defines.retain(|(name, _)| name.starts_with("TA") || name == "TR2");
    defines.extend([define("L", l), define("S", s)]);
    let mut params: Vec<Param> = (0..8).map(|i| a.arg(i).into()).collect();
    params.extend([
        (&sums[0].0).into(),
        (&sums[1].0).into(),
        a.res(2).into(),
        (&sums[2].0).into(),
        (&sums[3].0).into(),
        (&hist).into(),
        int(v.size(1)),
        int(g),
        int(h),
        int(n),
        int(p),
        int(chunk),
    ]);
    r.launch_shared(
        ("gated_delta", "delta_bwd"),
        defines,
        [blocks, h, v.size(0)],
        32 * warps,
        warps * warp_bytes,
        params,
    );
    for ((sum, count, width), i) in sums.iter().zip([0, 1, 3, 4]) {
        let y = a.res(i);
        if sum.ptr == y.ptr {
            continue;
        }
        r.launch(
            ("gated_delta", "delta_fold"),
            types(&[("TR0", y.dtype)]),
            over(y.len()),
            THREADS,
            vec![
                sum.into(),
                y.into(),
                long(y.len()),
                int(*count),
                int(*width),
            ],
        );
    }
}
