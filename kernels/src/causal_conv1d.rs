//! Launches of the causal convolution; sums over tokens in two stages, in a fixed order.

use crate::record::{Args, DType, Recorder, THREADS, Tensor, define, flag, int};
use crate::reduce::sum_parts;

/// Threads of a block.
const BLOCK: usize = 128;

/// Tokens that a thread walks over, forward and backward.
const RUN: usize = 32;
const RUN_BWD: usize = 128;

/// Neighbouring channels of a thread: `most` where rows and addresses allow whole loads.
fn channels(i: usize, most: usize, tensors: &[&Tensor]) -> usize {
    let aligned = |t: &&Tensor| t.ptr.is_multiple_of(16);
    match i.is_multiple_of(8) && tensors.iter().all(aligned) {
        true => most,
        false => 1,
    }
}

fn defines(a: &Args, channels: usize) -> Vec<(String, String)> {
    let mut d = a.types();
    d.extend([define("K", a.arg(1).size(1)), define("V", channels)]);
    d
}

/// `y`, `state` of `x, w, b?, pos?, state?`.
pub fn causal_conv1d(r: &mut Recorder, a: &Args, silu: bool) {
    let (x, state) = (a.arg(0), a.arg(4));
    let (t, i) = (x.size(1), x.size(2));
    let v = channels(i, 8, &[x, a.res(0)]);
    r.launch(
        ("causal_conv1d", "conv"),
        defines(a, v),
        [(i / v).div_ceil(BLOCK), t.div_ceil(RUN), x.size(0)],
        BLOCK,
        vec![
            x.into(),
            a.arg(1).into(),
            a.arg(2).into(),
            a.arg(3).into(),
            state.into(),
            a.res(0).into(),
            int(t),
            int(i),
            flag(silu),
            int(RUN),
        ],
    );
    if !state.is_empty() && state.is_present() {
        r.launch(
            ("causal_conv1d", "conv_state"),
            defines(a, v),
            [(x.size(0) * i).div_ceil(THREADS), 1, 1],
            THREADS,
            vec![x.into(), a.res(1).into(), int(x.size(0)), int(t), int(i)],
        );
    }
}

/// `dx`, `dw`, `db` (when b is present) of `x, w, b?, pos?, dy`.
pub fn causal_conv1d_bwd(r: &mut Recorder, a: &Args, silu: bool) {
    let (x, w, b, dy) = (a.arg(0), a.arg(1), a.arg(2), a.arg(4));
    let (t, i, k) = (x.size(1), x.size(2), w.size(1));
    let v = channels(i, 4, &[x, dy, a.res(0)]);
    let runs = t.div_ceil(RUN_BWD);
    let n = runs * x.size(0);
    let stride = i * (k + 1);
    let mut part = r.scratch(DType::F32, n * stride);
    part.dims = vec![n, stride];
    r.launch(
        ("causal_conv1d", "conv_bwd"),
        defines(a, v),
        [(i / v).div_ceil(BLOCK), runs, x.size(0)],
        BLOCK,
        vec![
            x.into(),
            w.into(),
            b.into(),
            a.arg(3).into(),
            dy.into(),
            a.res(0).into(),
            (&part).into(),
            int(t),
            int(i),
            flag(silu),
            int(RUN_BWD),
        ],
    );
    sum_parts(r, &part, 0, n, i * k, a.res(1));
    if b.is_present() {
        sum_parts(r, &part, i * k, n, i, a.res(2));
    }
}
