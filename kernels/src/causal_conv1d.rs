//! Launches of the causal convolution; sums over tokens in two stages, in a fixed order.

use crate::record::{Args, DType, Recorder, Tensor, aligned, define, flag, int, long};
use crate::reduce::sum_parts_of_two;

/// Tokens that a thread walks over, forward and backward: at most, and at least where that leaves too few threads.
const RUN: (usize, usize) = (32, 8);
const RUN_BWD: (usize, usize) = (128, 16);

/// Tokens that a thread computes at a time, and how many times that lie in shared memory or are under way to it.
const STEP: usize = 4;
const AHEAD: usize = 4;

/// Threads of a block that keeps states.
const STATE_BLOCK: usize = 256;

/// Threads for which runs and neighbouring channels are shortened: a quarter of what an H200 holds.
const THREADS: usize = 132 * 512;

/// How the work is divided.
struct Shape {
    /// Neighbouring channels of a thread.
    channels: usize,
    /// Tokens of a thread.
    run: usize,
    /// Threads of a block.
    block: usize,
    grid: [usize; 3],
}

impl Shape {
    /// Bytes of shared memory of a block that reads these.
    fn shared(&self, tensors: &[&Tensor]) -> usize {
        let bytes: usize = tensors.iter().map(|t| t.dtype.bytes()).sum();
        self.block * self.channels * STEP * AHEAD * bytes
    }
}

/// For sizes B, T, I.
fn shape((b, t, i): (usize, usize, usize), run: (usize, usize), tensors: &[&Tensor]) -> Shape {
    let (mut channels, mut length) = match i.is_multiple_of(8) && aligned(tensors) {
        true => (4, run.0),
        false => (1, run.0),
    };
    while length > run.1 && i / channels * t.div_ceil(length) * b < THREADS {
        length /= 2;
        channels = channels.min(2);
    }
    let threads = i / channels;
    // The size of blocks that leaves the fewest threads without channels.
    let block = [128, 96, 160, 64, 32]
        .into_iter()
        .min_by_key(|&n| threads.next_multiple_of(n))
        .unwrap_or(128);
    Shape {
        channels,
        run: length,
        block,
        grid: [threads.div_ceil(block), t.div_ceil(length), b],
    }
}

fn defines(a: &Args, channels: usize, silu: bool) -> Vec<(String, String)> {
    let mut d = a.types();
    d.extend([
        define("K", a.arg(1).size(1)),
        define("V", channels),
        define("ACT", i32::from(silu)),
        define("STEP", STEP),
        define("AHEAD", AHEAD),
    ]);
    d
}

/// `y`, `state` of `x, w, b?, pos?, state?`.
pub fn causal_conv1d(r: &mut Recorder, a: &Args, silu: bool) {
    let (x, state) = (a.arg(0), a.arg(4));
    let (t, i) = (x.size(1), x.size(2));
    if t == 1 && state.is_present() && !state.is_empty() {
        return step(r, a, silu);
    }
    let (w, b) = (a.arg(1), a.arg(2));
    let s = shape((x.size(0), t, i), RUN, &[x, w, b, a.res(0)]);
    r.launch_shared(
        ("causal_conv1d", "conv"),
        defines(a, s.channels, silu),
        s.grid,
        s.block,
        s.shared(&[x]),
        vec![
            x.into(),
            w.into(),
            b.into(),
            a.arg(3).into(),
            state.into(),
            a.res(0).into(),
            int(t),
            int(i),
            int(s.run),
        ],
    );
    r.early();
    if !state.is_empty() && state.is_present() {
        r.launch(
            ("causal_conv1d", "conv_state"),
            defines(a, s.channels, silu),
            [(x.size(0) * i).div_ceil(STATE_BLOCK), 1, 1],
            STATE_BLOCK,
            vec![x.into(), a.res(1).into(), int(x.size(0)), int(t), int(i)],
        );
        r.early();
    }
}

/// [`causal_conv1d`] of one token a sequence with what came before in the state.
fn step(r: &mut Recorder, a: &Args, silu: bool) {
    let x = a.arg(0);
    let mut defines = a.types();
    defines.push(define("K", a.arg(1).size(1)));
    let params = vec![
        x.into(),
        a.arg(1).into(),
        a.arg(2).into(),
        a.arg(3).into(),
        a.res(1).into(),
        a.res(0).into(),
        long(x.len()),
        int(x.size(2)),
        flag(silu),
    ];
    let grid = [x.len().div_ceil(STATE_BLOCK), 1, 1];
    r.launch(
        ("causal_conv1d", "conv_step"),
        defines,
        grid,
        STATE_BLOCK,
        params,
    );
    r.early();
}

/// `dx`, `dw`, `db` (when b is present) of `x, w, b?, pos?, dy`.
pub fn causal_conv1d_bwd(r: &mut Recorder, a: &Args, silu: bool) {
    let (x, w, b, dy) = (a.arg(0), a.arg(1), a.arg(2), a.arg(4));
    let (t, i, k) = (x.size(1), x.size(2), w.size(1));
    let s = shape((x.size(0), t, i), RUN_BWD, &[x, w, b, dy, a.res(0)]);
    let n = s.grid[1] * x.size(0);
    let stride = i * (k + 1);
    let mut part = r.scratch(DType::F32, n * stride);
    part.dims = vec![n, stride];
    r.launch_shared(
        ("causal_conv1d", "conv_bwd"),
        defines(a, s.channels, silu),
        s.grid,
        s.block,
        s.shared(&[x, dy]),
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
            int(s.run),
        ],
    );
    let second = if b.is_present() { i } else { 0 };
    sum_parts_of_two(r, &part, 0, n, (i * k, second), (a.res(1), a.res(2)));
}
