//! Launches of the Mamba-1 scan: two lanes or more share two channels, warps need nothing of each other. With few channels time is split
//! into parts: states of the parts, their joining, then outputs. Backward goes over short runs in reverse, states made again from the saved
//! ones; all sums are in a fixed order.

use crate::record::{Args, DType, Param, Recorder, THREADS, Tensor, define, flag, int, long, over};
use crate::reduce::sum_parts;

/// Threads of a block forward.
const FORWARD: usize = 128;

/// Tokens of the runs backward, longest first, and between states that a run keeps.
const RUNS: [usize; 3] = [32, 16, 8];
const SUB: usize = 4;

/// Multiples of tokens that forward takes at once.
const TILE: usize = 8;

/// Shared memory that a block may ask for on every architecture, less what it has besides.
const SHARED: usize = 98 << 10;

/// Blocks forward that fill a large device once: two on each of 132 multiprocessors.
const FULL: usize = 264;

struct Shape {
    b: usize,
    t: usize,
    i: usize,
    g: usize,
    n: usize,
    /// Blocks of a group forward.
    wide: usize,
    /// Threads that share two channels, and padded states of one of them for one channel.
    lanes: usize,
    held: usize,
    defines: Vec<(String, String)>,
}

impl Shape {
    fn of(a: &Args, chunk: usize) -> Shape {
        let (x, g, n) = (a.arg(0), a.arg(3).size(2).max(1), a.arg(2).size(1));
        let per = x.size(2) / g;
        let whole = [a.arg(0), a.arg(1), a.arg(3), a.arg(4), a.arg(7), a.arg(10)];
        let vector = per.is_multiple_of(8) && whole.iter().all(|t| t.ptr.is_multiple_of(16));
        // As in the kernels.
        let lanes = n.div_ceil(8).next_power_of_two().clamp(2, 32);
        let mut defines = a.types();
        defines.retain(|(name, _)| name.starts_with("TA") || name == "TR0" || name == "TR1");
        defines.extend([
            define("STATES", n),
            define("WIDTH", x.size(2)),
            define("GROUPS", g),
            define("VEC", u8::from(vector)),
            define("EVEN", u8::from(chunk.is_multiple_of(TILE))),
        ]);
        Shape {
            b: x.size(0),
            t: x.size(1),
            i: x.size(2),
            g,
            n,
            wide: per.div_ceil(2 * FORWARD / lanes),
            lanes,
            held: n.div_ceil(lanes).next_multiple_of(4),
            defines,
        }
    }

    fn sizes(&self, chunk: usize) -> [Param; 2] {
        [int(self.t), int(chunk)]
    }
}

/// The states alone: from `starts` (of each part, or absent), where parts end, the sum of their steps, and states every `fine` tokens.
fn states(
    r: &mut Recorder,
    a: &Args,
    s: &Shape,
    (chunk, part, fine): (usize, usize, usize),
    [starts, ends, total, saved]: [&Tensor; 4],
) {
    let (x, dt) = (a.arg(0), a.arg(1));
    let parts = s.t.div_ceil(part);
    let mut params: Vec<Param> = [
        x,
        dt,
        a.arg(2),
        a.arg(3),
        a.arg(4),
        a.arg(6),
        a.arg(8),
        starts,
    ]
    .into_iter()
    .map(Param::from)
    .collect();
    params.push(int(2));
    params.extend([ends, total, saved].map(Param::from));
    params.extend(s.sizes(chunk));
    params.extend([int(part), int(fine)]);
    r.launch(
        ("selective_scan", "scan_states"),
        s.defines.clone(),
        [s.wide, s.g * parts, s.b],
        FORWARD,
        params,
    );
}

/// `y`, then `state` or `saved`, of `x, dt, a, b, c, d?, dt_bias?, z?, pos?, state?`.
pub fn selective_scan(r: &mut Recorder, a: &Args, chunk: usize) {
    let absent = Tensor::ABSENT;
    let (state, saved) = match a.arg(9).is_present() {
        true => (a.res(1), &absent),
        false => (&absent, a.res(1)),
    };
    let s = Shape::of(a, chunk);
    let blocks = s.wide * s.g * s.b;
    let chunks = s.t.div_ceil(chunk);
    let parts = match blocks {
        0 | 132.. => 1,
        _ => (FULL / blocks).clamp(1, chunks.max(1)),
    };
    let part = chunks.div_ceil(parts).max(1) * chunk;
    let parts = s.t.div_ceil(part);
    let mut starts = state.clone();
    if parts > 1 {
        let ends = r.scratch(DType::F32, s.b * parts * s.i * s.n);
        let total = r.scratch(DType::F32, s.b * parts * s.i);
        let to = [&absent, &ends, &total, &absent];
        states(r, a, &s, (chunk, part, chunk), to);
        r.launch(
            ("selective_scan", "scan_join"),
            s.defines.clone(),
            over(s.b * s.i * s.n),
            THREADS,
            vec![
                (&ends).into(),
                (&total).into(),
                a.arg(2).into(),
                state.into(),
                int(s.b),
                int(parts),
                long(s.i),
                flag(false),
            ],
        );
        starts = ends;
    }
    let mut params: Vec<Param> = (0..9).map(|i| a.arg(i).into()).collect();
    params.extend([
        (&starts).into(),
        int(parts),
        state.into(),
        a.res(0).into(),
        saved.into(),
    ]);
    params.extend(s.sizes(chunk));
    params.push(int(part));
    r.launch(
        ("selective_scan", "scan_fwd"),
        s.defines.clone(),
        [s.wide, s.g * parts, s.b],
        FORWARD,
        params,
    );
}

/// `dx, ddt, da, db, dc`, then `dd, ddt_bias, dz` where their arguments are present, of
/// `x, dt, a, b, c, d?, dt_bias?, z?, pos?, saved, dy`.
pub fn selective_scan_bwd(r: &mut Recorder, a: &Args, chunk: usize) {
    let mut next = 5;
    let mut optional = |slot: usize| match a.arg(slot).is_present() {
        true => {
            next += 1;
            a.res(next - 1).clone()
        }
        false => Tensor::ABSENT,
    };
    let (dd, ddt_bias, dz) = (optional(5), optional(6), optional(7));
    let s = Shape::of(a, chunk);
    let element: usize = [0, 1, 7, 10].map(|k| a.arg(k).dtype.bytes()).iter().sum();
    // Runs as long, and then warps as many, as shared memory allows.
    let (kinds, row) = (s.lanes.min(4), s.lanes * s.held);
    let shared = |(run, warps): (usize, usize)| {
        let kept = (run / SUB).saturating_sub(2) * s.held * 2 * 32 * warps;
        let columns = if s.lanes <= 4 { 4 } else { 8 };
        let sums = kinds * s.held * columns;
        let channels = 64 / s.lanes * warps;
        4 * (kept + run * (2 * row + 4) + 2 * warps * SUB * sums + run * 2 * channels)
            + SUB * channels * element
    };
    let sizes = RUNS.map(|run| [4, 2, 1].map(|warps| (run, warps)));
    let sizes = sizes.as_flattened();
    let fits = sizes.iter().find(|&&size| shared(size) <= SHARED);
    let &(run, warps) = fits.unwrap_or(&(8, 1));
    let (shared, fine) = (shared((run, warps)), run.min(chunk));
    let blocks = (s.i / s.g).div_ceil(64 / s.lanes * warps);
    let mut defines = s.defines.clone();
    defines.extend([define("FINE", run), define("WARPS", warps)]);
    let absent = Tensor::ABSENT;
    let mut saved = a.arg(9).clone();
    if fine < chunk {
        let runs = s.t.div_ceil(chunk) * chunk.div_ceil(fine);
        saved = r.scratch(DType::F32, s.b * runs * s.i * s.n);
        let to = [a.arg(9), &absent, &absent, &saved];
        states(r, a, &s, (chunk, chunk, fine), to);
    }
    let rows = s.b * s.t * s.g;
    let narrow = r.scratch(DType::F32, blocks * rows * 2 * s.n);
    // Rows of 16 bytes: the states in them are written four at a time.
    let stride = (s.i * (s.n + 2)).next_multiple_of(4);
    let mut part = r.scratch(DType::F32, s.b * stride);
    part.dims = vec![s.b, stride];
    let mut params: Vec<Param> = (0..9).map(|k| a.arg(k).into()).collect();
    params.extend([
        (&saved).into(),
        a.arg(10).into(),
        a.res(0).into(),
        a.res(1).into(),
        (&dz).into(),
        (&narrow).into(),
        (&part).into(),
    ]);
    params.extend(s.sizes(chunk));
    params.push(int(fine));
    r.launch_shared(
        ("selective_scan", "scan_bwd"),
        defines.clone(),
        [blocks, s.g, s.b],
        32 * warps,
        shared,
        params,
    );
    let (db, dc) = (a.res(3), a.res(4));
    defines.extend(crate::record::types(&[
        ("TR3", db.dtype),
        ("TR4", dc.dtype),
    ]));
    r.launch(
        ("selective_scan", "scan_narrow"),
        defines,
        over(rows * 2 * s.n),
        THREADS,
        vec![
            (&narrow).into(),
            db.into(),
            dc.into(),
            int(blocks),
            long(rows),
        ],
    );
    sum_parts(r, &part, 0, s.b, s.i * s.n, a.res(2));
    if dd.is_present() {
        sum_parts(r, &part, s.i * s.n, s.b, s.i, &dd);
    }
    if ddt_bias.is_present() {
        sum_parts(r, &part, s.i * (s.n + 1), s.b, s.i, &ddt_bias);
    }
}
