//! Launches of the Mamba-2 scan.
//!
//! bf16 over 16 tokens and more goes in tiles on tensor cores, with the state in registers. When there are few heads, time is split into
//! parts: states of the parts, their joining, then outputs. Backward: states before each tile (from the saved ones), gradients of the
//! states after each tile, then all gradients of a tile in one block, heads one after the other. Everything else goes token by token; its
//! backward is three more runs of the same recurrence and a sum over time. All sums are in a fixed order.

use crate::record::{Args, DType, Param, Recorder, THREADS, Tensor, define, flag, int, long, over};
use crate::reduce::sum_parts;

/// Threads of a block of the recurrence.
const BLOCK: usize = 128;

/// Lanes that share a row of the state, and the states of each: at most 16 where 32 lanes suffice.
pub(crate) fn lanes(others: usize) -> (usize, usize) {
    let lanes = others.div_ceil(16).next_power_of_two().clamp(1, 32);
    (lanes, others.div_ceil(lanes).max(1))
}

struct Shape {
    b: usize,
    t: usize,
    h: usize,
    p: usize,
    g: usize,
    n: usize,
}

impl Shape {
    fn of(a: &Args) -> Shape {
        let (x, b) = (a.arg(0), a.arg(3));
        Shape {
            b: x.size(0),
            t: x.size(1),
            h: x.size(2),
            p: x.size(3),
            g: b.size(2),
            n: b.size(3),
        }
    }

    fn defines(&self, a: &Args) -> Vec<(String, String)> {
        let mut d = a.types();
        d.retain(|(name, _)| name.starts_with("TA") || name == "TR0" || name == "TR1");
        let ((ln, sn), (lp, sp)) = (lanes(self.n), lanes(self.p));
        d.extend([
            define("LN", ln),
            define("SN", sn),
            define("LP", lp),
            define("SP", sp),
        ]);
        d
    }

    fn grid(&self, own: usize, others: usize) -> [usize; 3] {
        [(own * lanes(others).0).div_ceil(BLOCK), self.h, self.b]
    }

    fn sizes(&self) -> [Param; 5] {
        [
            int(self.t),
            int(self.h),
            int(self.p),
            int(self.g),
            int(self.n),
        ]
    }
}

fn steps(r: &mut Recorder, a: &Args, s: &Shape, limit: (f32, f32)) -> (Tensor, Tensor) {
    let n = s.b * s.t * s.h;
    let (dts, decay) = (r.scratch(DType::F32, n), r.scratch(DType::F32, n));
    r.launch(
        ("ssd", "ssd_dt"),
        s.defines(a),
        over(n),
        THREADS,
        vec![
            a.arg(1).into(),
            a.arg(2).into(),
            a.arg(6).into(),
            a.arg(7).into(),
            (&dts).into(),
            (&decay).into(),
            long(n),
            int(s.h),
            Param::Float(limit.0),
            Param::Float(limit.1),
        ],
    );
    (dts, decay)
}

/// `y`, then `state` or `saved`, of `x, dt, a, b, c, d?, dt_bias?, pos?, state?`.
pub fn ssd(r: &mut Recorder, a: &Args, chunk: usize, limit: (f32, f32)) {
    let s = Shape::of(a);
    if let Some(tiled) = Tiled::of(a, &s, chunk, &[a.arg(0), a.arg(3), a.arg(4), a.res(0)]) {
        return tiled.forward(r, a, limit);
    }
    let (dts, decay) = steps(r, a, &s, limit);
    let absent = Tensor::ABSENT;
    let (state, saved) = match a.arg(8).is_present() {
        true => (a.res(1), &absent),
        false => (&absent, a.res(1)),
    };
    let mut params = vec![
        a.arg(0).into(),
        a.arg(3).into(),
        a.arg(4).into(),
        a.arg(5).into(),
        (&dts).into(),
        (&decay).into(),
        a.res(0).into(),
        state.into(),
        saved.into(),
    ];
    params.extend(s.sizes());
    params.push(int(chunk));
    r.launch(
        ("ssd", "ssd_y"),
        s.defines(a),
        s.grid(s.p, s.n),
        BLOCK,
        params,
    );
}

/// `dx, ddt, da, db, dc`, then `dd, ddt_bias` where their arguments are present, of
/// `x, dt, a, b, c, d?, dt_bias?, pos?, saved, dy`; `saved` holds a state every `chunk` tokens.
pub fn ssd_bwd(r: &mut Recorder, a: &Args, chunk: usize, limit: (f32, f32)) {
    debug_assert_eq!(a.arg(8).size(1), a.arg(0).size(1).div_ceil(chunk.max(1)));
    let s = Shape::of(a);
    let (x, d, dy) = (a.arg(0), a.arg(5), a.arg(9));
    let (b, c) = (a.arg(3), a.arg(4));
    let typed = [x, b, c, dy, a.res(0), a.res(3), a.res(4)];
    if let Some(tiled) = Tiled::of(a, &s, chunk, &typed) {
        return tiled.backward(r, a, limit);
    }
    let (dts, decay) = steps(r, a, &s, limit);
    let rows = s.b * s.t * s.h;
    // Sums over a head's own dimension, by warps; sums over heads.
    let warps = |own: usize, others: usize| s.grid(own, others)[0] * BLOCK / 32;
    let (yc_parts, xb_parts) = (warps(s.n, s.p), warps(s.p, s.n));
    // Doubles.
    let yc = r.scratch(DType::F32, 2 * yc_parts * rows);
    let xb = r.scratch(DType::F32, 2 * xb_parts * rows);
    let heads = r.scratch(DType::F32, rows * s.n);
    let scan =
        |r: &mut Recorder, name: &'static str, own: usize, others: usize, tensors: &[&Tensor]| {
            let mut params: Vec<Param> = tensors.iter().map(|&t| t.into()).collect();
            params.extend(s.sizes());
            r.launch(
                ("ssd", name),
                s.defines(a),
                s.grid(own, others),
                BLOCK,
                params,
            );
        };
    let over_heads = |r: &mut Recorder, to: &Tensor| {
        let mut defines = s.defines(a);
        defines.extend(crate::record::types(&[("TR3", to.dtype)]));
        let n = s.b * s.t * s.g * s.n;
        r.launch(
            ("ssd", "ssd_heads"),
            defines,
            over(n),
            THREADS,
            vec![
                (&heads).into(),
                to.into(),
                long(n),
                int(s.h),
                int(s.g),
                int(s.n),
            ],
        );
    };
    scan(
        r,
        "ssd_dc",
        s.n,
        s.p,
        &[x, b, c, dy, &dts, &decay, &heads, &yc],
    );
    over_heads(r, a.res(4));
    scan(
        r,
        "ssd_dx",
        s.p,
        s.n,
        &[x, b, c, d, dy, &dts, &decay, a.res(0), &xb],
    );
    scan(r, "ssd_db", s.n, s.p, &[x, c, dy, &dts, &decay, &heads]);
    over_heads(r, a.res(3));
    let mut part = r.scratch(DType::F32, s.b * 2 * s.h);
    part.dims = vec![s.b, 2 * s.h];
    r.launch(
        ("ssd", "ssd_ddt"),
        s.defines(a),
        [(s.b * s.h).div_ceil(32), 1, 1],
        32,
        vec![
            a.arg(1).into(),
            a.arg(2).into(),
            a.arg(6).into(),
            a.arg(7).into(),
            (&dts).into(),
            (&yc).into(),
            (&xb).into(),
            a.res(1).into(),
            (&part).into(),
            int(yc_parts),
            int(xb_parts),
            int(s.b),
            int(s.t),
            int(s.h),
            Param::Float(limit.0),
            Param::Float(limit.1),
        ],
    );
    sum_parts(r, &part, 0, s.b, s.h, a.res(2));
    if d.is_present() {
        r.launch(
            ("ssd", "ssd_dd"),
            s.defines(a),
            [s.h, 1, 1],
            THREADS,
            vec![
                x.into(),
                dy.into(),
                a.res(5).into(),
                long(s.b * s.t),
                int(s.h),
                int(s.p),
            ],
        );
    }
    if a.arg(6).is_present() {
        let at = 5 + usize::from(d.is_present());
        sum_parts(r, &part, s.h, s.b, s.h, a.res(at));
    }
}

/// Threads of a block that walks over tiles, and of one that makes all gradients of a tile. Twice as many were slower.
const WALKERS: usize = 128;
const GRADERS: usize = 256;

/// Blocks that fill a large device once: two on each of 132 multiprocessors.
const FULL: usize = 264;

/// Sizes of the tiled form.
struct Tiled {
    s: Shape,
    chunk: usize,
    chunks: usize,
    /// Tokens of a tile, and tiles of a row of tokens.
    q: usize,
    tiles: usize,
    /// Padded width of the state; rows of the state of a block that walks, of `heads` heads; rows of a head in scratch memory, of which
    /// the gradients take `slice` at a time.
    nn: usize,
    heads: usize,
    ps: usize,
    slice: usize,
    rows: usize,
    defines: Vec<(String, String)>,
}

/// What `prepare` makes.
struct Steps {
    dts: Tensor,
    cum: Tensor,
    key: Tensor,
    first: Tensor,
}

impl Tiled {
    /// `None` when the op goes token by token.
    fn of(a: &Args, s: &Shape, chunk: usize, typed: &[&Tensor]) -> Option<Tiled> {
        let fits = typed.iter().all(|t| t.dtype == DType::Bf16);
        if !fits || s.n > 256 || s.t < 16 || chunk < s.t.min(16) {
            return None;
        }
        let nn = s.n.next_power_of_two().max(64);
        let (q, block_rows) = if nn > 128 { (32, 64) } else { (64, 128) };
        let narrow = if s.p <= 32 {
            32
        } else if s.p <= 64 {
            64
        } else {
            block_rows
        };
        let pair = 2 * narrow <= block_rows && (s.h / s.g).is_multiple_of(2);
        let heads = if pair { 2 } else { 1 };
        let ps = narrow.max(64 / heads);
        let slice = if s.p <= 32 && q == 64 { 32 } else { 64 };
        let rows = s.p.next_multiple_of(slice);
        let chunks = s.t.div_ceil(chunk);
        let vector = s.p.is_multiple_of(8)
            && s.n.is_multiple_of(8)
            && typed.iter().all(|t| t.ptr.is_multiple_of(16));
        let mut defines = a.types();
        defines.retain(|(name, _)| name.starts_with("TA") || name == "TR0" || name == "TR1");
        defines.extend([
            define("TILED", 1),
            define("VEC", u8::from(vector)),
            define("Q", q),
            define("NN", nn),
            define("PS", ps),
            define("HEADS", heads),
            define("R", heads * ps),
        ]);
        Some(Tiled {
            s: Shape { ..*s },
            chunk,
            chunks,
            q,
            tiles: chunks * chunk.div_ceil(q),
            nn,
            heads,
            ps,
            slice,
            rows,
            defines,
        })
    }

    fn sizes(&self) -> [Param; 6] {
        let [t, h, p, g, n] = self.s.sizes();
        [t, h, p, g, n, int(self.chunk)]
    }

    /// Blocks over heads and slices of them.
    fn own(&self) -> usize {
        self.s.h / self.heads * self.s.p.div_ceil(self.ps)
    }

    /// Parts of time and the chunks of each.
    fn parts(&self) -> (usize, usize) {
        let blocks = self.own() * self.s.b;
        let parts = match blocks {
            0 | 100.. => 1,
            _ => (FULL / blocks).clamp(1, self.chunks),
        };
        let each = self.chunks.div_ceil(parts).max(1);
        (self.chunks.div_ceil(each), each)
    }

    fn prepare(&self, r: &mut Recorder, a: &Args, limit: (f32, f32)) -> Steps {
        let (tiles, s) = (self.s.b * self.tiles, &self.s);
        let steps = Steps {
            dts: r.scratch(DType::F32, tiles * s.h * self.q),
            cum: r.scratch(DType::F32, tiles * s.h * self.q),
            key: r.scratch(DType::F32, tiles * s.h * self.q),
            first: r.scratch(DType::I32, tiles * self.q),
        };
        r.launch(
            ("ssd", "ssd_prepare"),
            self.defines.clone(),
            [s.h.div_ceil(32), self.tiles, s.b],
            128,
            vec![
                a.arg(1).into(),
                a.arg(2).into(),
                a.arg(6).into(),
                a.arg(7).into(),
                (&steps.dts).into(),
                (&steps.cum).into(),
                (&steps.key).into(),
                (&steps.first).into(),
                int(s.t),
                int(s.h),
                int(self.chunk),
                int(self.chunk.div_ceil(self.q)),
                int(self.tiles),
                Param::Float(limit.0),
                Param::Float(limit.1),
            ],
        );
        steps
    }

    /// Bytes of cum, key and first of a walk.
    fn scalars(&self) -> usize {
        (2 * self.heads + 1) * self.q * 4
    }

    /// States alone: `init`, then where each part ends, the parts' decays and the states at each tile.
    fn walk(
        &self,
        r: &mut Recorder,
        name: &'static str,
        (u, v): (&Tensor, &Tensor),
        steps: &Steps,
        (parts, each): (usize, usize),
        states: [&Tensor; 4],
    ) {
        let block_rows = self.heads * self.ps;
        let tile = (self.nn + block_rows) * self.q * 2;
        let shared = 2 * (tile + self.scalars()) + block_rows * self.nn * 2;
        let mut params: Vec<Param> = [u, v, &steps.cum, &steps.key, &steps.first]
            .into_iter()
            .chain(states)
            .map(Param::from)
            .collect();
        params.extend(self.sizes());
        params.extend([int(each), int(self.rows)]);
        r.launch_shared(
            ("ssd", name),
            self.defines.clone(),
            [self.own(), parts, self.s.b],
            WALKERS,
            shared,
            params,
        );
    }

    /// Where the parts start: `init` itself when there is one part.
    fn starts(
        &self,
        r: &mut Recorder,
        name: &'static str,
        inputs: (&Tensor, &Tensor),
        steps: &Steps,
        init: &Tensor,
    ) -> Tensor {
        let (parts, each) = self.parts();
        if parts == 1 {
            return init.clone();
        }
        let absent = Tensor::ABSENT;
        let s = &self.s;
        let ends = r.scratch(DType::F32, s.b * parts * s.h * s.p * s.n);
        let total = r.scratch(DType::F32, s.b * parts * s.h);
        let states = [&absent, &ends, &total, &absent];
        self.walk(r, name, inputs, steps, (parts, each), states);
        r.launch(
            ("ssd", "ssd_join"),
            self.defines.clone(),
            over(s.b * s.h * s.p * s.n),
            THREADS,
            vec![
                (&ends).into(),
                (&total).into(),
                init.into(),
                int(s.b),
                int(parts),
                int(s.h),
                long(s.p * s.n),
                flag(name == "ssd_dstates"),
            ],
        );
        ends
    }

    fn forward(&self, r: &mut Recorder, a: &Args, limit: (f32, f32)) {
        let steps = self.prepare(r, a, limit);
        let absent = Tensor::ABSENT;
        let (state, saved) = match a.arg(8).is_present() {
            true => (a.res(1), &absent),
            false => (&absent, a.res(1)),
        };
        let (x, b) = (a.arg(0), a.arg(3));
        let start = self.starts(r, "ssd_states", (x, b), &steps, state);
        let (parts, each) = self.parts();
        let block_rows = self.heads * self.ps;
        let shared = 2 * ((self.nn + block_rows) * self.q * 2 + self.scalars())
            + (self.nn + self.heads * self.q) * self.q * 2;
        let mut params = vec![
            x.into(),
            b.into(),
            a.arg(4).into(),
            a.arg(5).into(),
            (&steps.cum).into(),
            (&steps.key).into(),
            (&steps.first).into(),
            a.res(0).into(),
            (&start).into(),
            state.into(),
            saved.into(),
        ];
        params.extend(self.sizes());
        params.push(int(each));
        r.launch_shared(
            ("ssd", "ssd_tiles"),
            self.defines.clone(),
            [self.own(), parts, self.s.b],
            WALKERS,
            shared,
            params,
        );
    }

    fn backward(&self, r: &mut Recorder, a: &Args, limit: (f32, f32)) {
        let s = &self.s;
        let (x, b, c, d, dy) = (a.arg(0), a.arg(3), a.arg(4), a.arg(5), a.arg(9));
        let steps = self.prepare(r, a, limit);
        let absent = Tensor::ABSENT;
        let tiles = s.b * self.tiles;
        let len = tiles * s.h * self.rows * self.nn;
        let (states, dstates) = (r.scratch(DType::Bf16, len), r.scratch(DType::Bf16, len));
        let by_chunk = (self.chunks, 1);
        let from_saved = [a.arg(8), &absent, &absent, &states];
        self.walk(r, "ssd_states", (x, b), &steps, by_chunk, from_saved);
        let end = self.starts(r, "ssd_dstates", (dy, c), &steps, &absent);
        let from_end = [&end, &absent, &absent, &dstates];
        self.walk(r, "ssd_dstates", (dy, c), &steps, self.parts(), from_end);
        let blocks = tiles * s.g;
        let splits = match blocks {
            0 | 132.. => 1,
            _ => FULL.div_ceil(blocks).clamp(1, s.h / s.g),
        };
        let n = s.b * s.t * s.g * s.n;
        let part_len = if splits > 1 { splits * n } else { 0 };
        let (db_part, dc_part) = (
            r.scratch(DType::F32, part_len),
            r.scratch(DType::F32, part_len),
        );
        let part = r.scratch(DType::F32, tiles * 3 * s.h);
        let (token, state) = (self.q * self.slice * 2, self.slice * self.nn * 2);
        let stage = 2 * (token + state);
        let m_tiles = self.q / 16;
        let warps = GRADERS / 32;
        let sums = ((3 * m_tiles + 4 + warps / m_tiles) * self.q + 2 * warps) * 4;
        let fixed = (self.nn + self.q) * self.q * 2 + token + (8 + 1) * self.q * 4 + 2 * sums;
        let stages = if fixed + 2 * stage <= r.target().shared {
            2
        } else {
            1
        };
        let mut defines = self.defines.clone();
        defines.extend([
            define("GRADS", 1),
            define("PP", self.slice),
            define("STAGES", stages),
        ]);
        let mut params: Vec<Param> = [x, a.arg(2), b, c, d, dy, &steps.dts, &steps.cum]
            .into_iter()
            .chain([&steps.first, &states, &dstates, a.res(0), a.res(1), &part])
            .chain([a.res(3), a.res(4), &db_part, &dc_part])
            .map(Param::from)
            .collect();
        params.extend(self.sizes());
        params.extend([
            int(self.rows),
            int(splits),
            Param::Float(limit.0),
            Param::Float(limit.1),
        ]);
        r.launch_shared(
            ("ssd", "ssd_grads"),
            defines.clone(),
            [self.tiles, s.g * splits, s.b],
            GRADERS,
            fixed + stages * stage,
            params,
        );
        if splits > 1 {
            for (part, to) in [(&db_part, a.res(3)), (&dc_part, a.res(4))] {
                r.launch(
                    ("ssd", "ssd_merge"),
                    defines.clone(),
                    over(n),
                    THREADS,
                    vec![part.into(), to.into(), int(splits), long(n)],
                );
            }
        }
        let total = |r: &mut Recorder, skip: usize, to: &Tensor| {
            r.launch(
                ("ssd", "ssd_total"),
                self.defines.clone(),
                [s.h, 1, 1],
                THREADS,
                vec![
                    (&part).into(),
                    to.into(),
                    int(tiles),
                    int(3 * s.h),
                    int(skip * s.h),
                ],
            );
        };
        total(r, 0, a.res(2));
        if d.is_present() {
            total(r, 2, a.res(5));
        }
        if a.arg(6).is_present() {
            total(r, 1, a.res(5 + usize::from(d.is_present())));
        }
    }
}
