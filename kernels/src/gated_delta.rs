//! Launches of the gated delta rule.
//!
//! bf16 over 16 tokens and more goes in tiles on tensor cores: what the tokens of a tile do to each other (the inverse of a triangle, and
//! scores) for all tiles at once, then one walk over the tiles, whose blocks share the columns of the state and keep them in registers.
//! Backward: states before each tile (from the saved ones), one walk in reverse for dv and the gradients of the states after each tile, then
//! what is left of a tile in one block, heads of a group one after the other (Yang et al. 2024, arXiv 2406.06484; decays as in arXiv
//! 2412.06464). Everything else goes token by token, a column of the state shared by a few lanes. All sums are in a fixed order.

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
    if let Some(tiled) = Tiled::of(a, chunk, &[q, a.arg(1), v, a.res(0)]) {
        return tiled.forward(r, a);
    }
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
    let typed = [q, a.arg(1), v, a.arg(7), a.res(0), a.res(1), a.res(2)];
    if let Some(tiled) = Tiled::of(a, chunk, &typed) {
        return tiled.backward(r, a);
    }
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
        if sum.ptr != y.ptr {
            fold(r, sum, y, *count, *width);
        }
    }
}

/// Sums over `count` of parts `[.., count, width]`.
fn fold(r: &mut Recorder, part: &Tensor, y: &Tensor, count: usize, width: usize) {
    r.launch(
        ("gated_delta", "delta_fold"),
        types(&[("TR0", y.dtype)]),
        over(y.len()),
        THREADS,
        vec![part.into(), y.into(), long(y.len()), int(count), int(width)],
    );
}

/// Threads of a block that makes the gradients of a tile.
const GRADERS: usize = 512;

/// Multiprocessors of a large device: fewer blocks than that are divided further where they can be.
const FULL: usize = 132;

/// Sizes of the tiled form.
struct Tiled {
    b: usize,
    t: usize,
    g: usize,
    h: usize,
    n: usize,
    p: usize,
    chunk: usize,
    chunks: usize,
    /// Tokens of a tile, and tiles of a row of tokens.
    q: usize,
    tiles: usize,
    /// Padded width of keys; columns of a block that walks; columns of which the gradients are made at a time.
    nn: usize,
    columns: usize,
    slice: usize,
    defines: Vec<(String, String)>,
}

/// What the tokens of a tile do to each other: see the source.
struct Within {
    inv: Tensor,
    mix: Tensor,
    ends: Tensor,
}

impl Tiled {
    /// `None` when the op goes token by token.
    fn of(a: &Args, chunk: usize, typed: &[&Tensor]) -> Option<Tiled> {
        let (q, v) = (a.arg(0), a.arg(2));
        let (b, t, h, p) = (v.size(0), v.size(1), v.size(2), v.size(3));
        let (g, n) = (q.size(2), q.size(3));
        let fits = typed.iter().all(|t| t.dtype == DType::Bf16);
        if !fits || n > 256 || t < 16 || chunk < t.min(16) || v.is_empty() || n == 0 {
            return None;
        }
        let nn = n.next_power_of_two().max(64);
        let tokens = if nn > 128 { 32 } else { 64 };
        let mut columns = p.next_power_of_two().clamp(16, 64);
        while columns > 32 && b * h * p.div_ceil(columns) < FULL {
            columns /= 2;
        }
        let slice = if p <= 32 || nn > 128 { 32 } else { 64 };
        let chunk = chunk.min(t);
        let chunks = t.div_ceil(chunk);
        let vector = p.is_multiple_of(8)
            && n.is_multiple_of(8)
            && typed.iter().all(|t| t.ptr.is_multiple_of(16));
        Some(Tiled {
            b,
            t,
            g,
            h,
            n,
            p,
            chunk,
            chunks,
            q: tokens,
            tiles: chunks * chunk.div_ceil(tokens),
            nn,
            columns,
            slice,
            defines: vec![
                define("TILED", 1),
                define("VEC", u8::from(vector)),
                define("Q", tokens),
                define("NN", nn),
                define("PB", columns),
            ],
        })
    }

    fn sizes(&self) -> [Param; 6] {
        [self.t, self.g, self.h, self.n, self.p, self.chunk].map(int)
    }

    fn prepare(&self, r: &mut Recorder, a: &Args) -> Within {
        let heads = self.b * self.tiles * self.h;
        let within = Within {
            inv: r.scratch(DType::Bf16, heads * self.q * self.q),
            mix: r.scratch(DType::Bf16, heads * self.q * self.q),
            ends: r.scratch(DType::F32, heads * 4 * self.q),
        };
        let mut params: Vec<Param> = [0, 1, 3, 4, 5].map(|i| a.arg(i).into()).into();
        params.extend([
            (&within.inv).into(),
            (&within.mix).into(),
            (&within.ends).into(),
        ]);
        params.extend([self.t, self.g, self.h, self.n, self.chunk].map(int));
        r.launch_shared(
            ("gated_delta", "delta_prepare"),
            self.defines.clone(),
            [self.tiles, self.g, self.b],
            2 * self.q,
            2 * self.shared()[0] + 2 * self.q * (self.q + 4) * 4,
            params,
        );
        within
    }

    /// Bytes in shared memory: rows of keys, the block's columns of tokens, a triangle, decays to the ends of a tile.
    fn shared(&self) -> [usize; 4] {
        let q = self.q;
        [q * self.nn * 2, q * self.columns * 2, q * q * 2, 2 * q * 4]
    }

    fn walk(
        &self,
        r: &mut Recorder,
        name: &'static str,
        (defines, parts): (&[(String, String)], usize),
        shared: usize,
        tensors: &[&Tensor],
    ) {
        let mut params: Vec<Param> = tensors.iter().map(|&t| t.into()).collect();
        params.extend(self.sizes());
        r.launch_shared(
            ("gated_delta", name),
            defines.to_vec(),
            [self.h * self.p.div_ceil(self.columns), parts, self.b],
            2 * self.columns,
            shared,
            params,
        );
    }

    fn forward(&self, r: &mut Recorder, a: &Args) {
        let w = self.prepare(r, a);
        let absent = &Tensor::ABSENT;
        let (state, saved) = match a.arg(6).is_present() {
            true => (a.res(1), absent),
            false => (absent, a.res(1)),
        };
        let [keys, columns, triangle, ends] = self.shared();
        self.walk(
            r,
            "delta_tiles",
            (&self.defines, 1),
            2 * (keys + columns + triangle + ends) + keys + triangle,
            &[
                a.arg(0),
                a.arg(1),
                a.arg(2),
                &w.inv,
                &w.mix,
                &w.ends,
                a.res(0),
                state,
                saved,
            ],
        );
    }

    fn backward(&self, r: &mut Recorder, a: &Args) {
        let (q, k, v, pos) = (a.arg(0), a.arg(1), a.arg(2), a.arg(5));
        let (saved, dout, dv) = (a.arg(6), a.arg(7), a.res(2));
        let w = self.prepare(r, a);
        let len = self.b * self.tiles * self.h * self.p * self.nn;
        let (states, dstates) = (r.scratch(DType::Bf16, len), r.scratch(DType::Bf16, len));
        let written = r.scratch(DType::Bf16, v.len());
        let [keys, columns, triangle, ends] = self.shared();
        // Two stages where they fit; the sums as the source has them.
        let (warps, tokens) = (GRADERS / 32, self.q * self.slice * 2);
        let stage = 3 * tokens + 2 * self.slice * self.nn * 2;
        let rows = self.q / 16;
        let sums = ((3 * rows + 2 * warps / rows + 1) * self.q + warps) * 4;
        let fixed = 2 * keys + 4 * 4 * self.q * 4;
        let stages = match fixed + 2 * (stage + sums) + 1024 <= r.target().shared {
            true => 2,
            false => 1,
        };
        let mut defines = self.defines.clone();
        defines.extend([
            define("GRADS", 1),
            define("PP", self.slice),
            define("STAGES", stages),
        ]);
        self.walk(
            r,
            "delta_states",
            (&defines, self.chunks),
            2 * (keys + columns + triangle + ends),
            &[k, v, &w.inv, &w.ends, saved, &written, &states],
        );
        self.walk(
            r,
            "delta_dstates",
            (&defines, 1),
            2 * (2 * keys + columns + ends) + 2 * triangle,
            &[q, k, dout, &w.inv, &w.mix, &w.ends, dv, &dstates],
        );
        let blocks = self.b * self.tiles * self.g;
        let splits = FULL.div_ceil(blocks).clamp(1, self.h / self.g);
        let parts = [0, 1].map(|i| match splits {
            1 => Tensor::ABSENT,
            _ => r.scratch(DType::F32, a.res(i).len() * splits),
        });
        let mut params: Vec<Param> = [q, k, pos, &w.ends, dout, &written, dv, &states, &dstates]
            .into_iter()
            .chain([a.res(0), a.res(1), a.res(3), a.res(4), &parts[0], &parts[1]])
            .map(Param::from)
            .collect();
        params.extend(self.sizes());
        params.push(int(splits));
        r.launch_shared(
            ("gated_delta", "delta_grads"),
            defines,
            [self.tiles, self.g * splits, self.b],
            GRADERS,
            fixed + stages * (stage + sums),
            params,
        );
        if splits > 1 {
            for (part, i) in parts.iter().zip([0, 1]) {
                fold(r, part, a.res(i), splits, self.n);
            }
        }
    }
}
