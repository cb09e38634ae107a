//! Launches of the gated delta rule: token by token, a column of the state shared by a few lanes. Backward, all gradients but that of v
//! add atomically.

use crate::record::{Args, DType, Param, Recorder, define, int};
use crate::ssd::lanes;

/// Threads of a block.
const BLOCK: usize = 128;

fn launch(r: &mut Recorder, a: &Args, name: &'static str, mut params: Vec<Param>, chunk: usize) {
    let (q, v) = (a.arg(0), a.arg(2));
    let (n, p) = (q.size(3), v.size(3));
    let (l, s) = lanes(n);
    let mut defines = a.types();
    if name == "delta_bwd" {
        defines.retain(|(name, _)| name.starts_with("TA") || name == "TR2");
    }
    defines.extend([define("L", l), define("S", s)]);
    params.extend([
        int(v.size(1)),
        int(q.size(2)),
        int(v.size(2)),
        int(n),
        int(p),
        int(chunk),
    ]);
    let grid = [(p * l).div_ceil(BLOCK), v.size(2), v.size(0)];
    r.launch(("gated_delta", name), defines, grid, BLOCK, params);
}

/// `o`, then `state` or `saved`, of `q, k, v, g, beta, pos?, state?`.
pub fn gated_delta(r: &mut Recorder, a: &Args, chunk: usize) {
    let absent = crate::Tensor::ABSENT;
    let (state, saved) = match a.arg(6).is_present() {
        true => (a.res(1), &absent),
        false => (&absent, a.res(1)),
    };
    let mut params: Vec<Param> = (0..6).map(|i| a.arg(i).into()).collect();
    params.extend([state.into(), a.res(0).into(), saved.into()]);
    launch(r, a, "delta_fwd", params, chunk);
}

/// `dq, dk, dv, dg, dbeta` of `q, k, v, g, beta, pos?, saved, do`.
pub fn gated_delta_bwd(r: &mut Recorder, a: &Args, chunk: usize) {
    let (q, v) = (a.arg(0), a.arg(2));
    let sums = [0, 1, 3, 4].map(|i| r.sums_of(a.res(i)));
    let states = v.size(0) * v.size(2) * q.size(3) * v.size(3);
    let hist = r.scratch(DType::F32, chunk.min(v.size(1)) * states);
    let mut params: Vec<Param> = (0..8).map(|i| a.arg(i).into()).collect();
    params.extend([
        (&sums[0]).into(),
        (&sums[1]).into(),
        a.res(2).into(),
        (&sums[2]).into(),
        (&sums[3]).into(),
        (&hist).into(),
    ]);
    launch(r, a, "delta_bwd", params, chunk);
    for (sum, i) in sums.iter().zip([0, 1, 3, 4]) {
        r.settle(sum, a.res(i));
    }
}
