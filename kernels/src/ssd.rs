//! Launches of the Mamba-2 scan.
//!
//! bf16 over 16 tokens and more goes in tiles on tensor cores, with the state in registers. When there are few heads, time is split into
//! parts: states of the parts, their joining, then outputs. Backward: states before each tile (from the saved ones), gradients of the
//! states after each tile, then all gradients of a tile in one block, heads one after the other. Everything else goes token by token; its
//! backward is three more runs of the same recurrence and a sum over time. All sums are in a fixed order.

use crate::record::{
    Args, DType, Param, Recorder, THREADS, Target, Tensor, define, flag, int, long, over,
};
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
    r.early();
    (dts, decay)
}

/// `y`, then `state` or `saved`, of `x, dt, a, b, c, d?, dt_bias?, pos?, state?`.
pub fn ssd(r: &mut Recorder, a: &Args, chunk: usize, limit: (f32, f32)) {
    let s = Shape::of(a);
    let typed = [a.arg(0), a.arg(3), a.arg(4), a.res(0)];
    if let Some(tiled) = Tiled::of(r.target(), a, &s, chunk, &typed) {
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
    r.early();
}

/// `dx, ddt, da, db, dc`, then `dd, ddt_bias` where their arguments are present, of
/// `x, dt, a, b, c, d?, dt_bias?, pos?, saved, dy`; `saved` holds a state every `chunk` tokens.
pub fn ssd_bwd(r: &mut Recorder, a: &Args, chunk: usize, limit: (f32, f32)) {
    debug_assert_eq!(a.arg(8).size(1), a.arg(0).size(1).div_ceil(chunk.max(1)));
    let s = Shape::of(a);
    let (x, d, dy) = (a.arg(0), a.arg(5), a.arg(9));
    let (b, c) = (a.arg(3), a.arg(4));
    let typed = [x, b, c, dy, a.res(0), a.res(3), a.res(4)];
    if let Some(tiled) = Tiled::of(r.target(), a, &s, chunk, &typed) {
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
    /// Whether a warpgroup walks with 64 rows (sm_90a).
    crew: bool,
    /// Threads of a block that walks: with warpgroups one a head and one that brings what they read.
    walkers: usize,
    /// Shared memory of a block that makes outputs, and of one that makes states alone.
    shared: [usize; 2],
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
    fn of(target: Target, a: &Args, s: &Shape, chunk: usize, typed: &[&Tensor]) -> Option<Tiled> {
        let fits = typed.iter().all(|t| t.dtype == DType::Bf16);
        if !fits || s.n > 256 || s.t < 16 || chunk < s.t.min(16) {
            return None;
        }
        let nn = s.n.next_power_of_two().max(64);
        let (q, block_rows) = if nn > 128 { (32, 64) } else { (64, 128) };
        // A warpgroup to 64 rows, where there are such and their tiles fit.
        let crew = target.hopper && q == 64 && target.shared >= 200 << 10;
        let narrow = if crew || (s.p > 32 && s.p <= 64) {
            64
        } else if s.p <= 32 {
            32
        } else {
            block_rows
        };
        let pair =
            2 * narrow <= block_rows && s.p <= block_rows / 2 && (s.h / s.g).is_multiple_of(2);
        let heads = if pair { 2 } else { 1 };
        let ps = narrow.max(64 / heads);
        let slice = if s.p <= 32 && q == 64 && !crew {
            32
        } else {
            64
        };
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
        let walkers = if crew { (heads + 1) * 128 } else { WALKERS };
        defines.push(define("WALKERS", walkers));
        let mut tiled = Tiled {
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
            crew,
            walkers,
            shared: [0; 2],
            defines,
        };
        tiled.shared = match crew {
            true => {
                // b and c of a tile, and its outputs; one of them alone.
                let (tiles, tiles_shared) = tiled.crew_shared(target.shared, (2, 1), 3);
                let (walk, walk_shared) = tiled.crew_shared(target.shared, (1, 0), 4);
                tiled.defines.extend([
                    define("WG", 1),
                    define("TILE_STAGES", tiles),
                    define("WALK_STAGES", walk),
                ]);
                [tiles_shared, walk_shared]
            }
            false => {
                let block_rows = heads * ps;
                let stages = 2 * ((nn + block_rows) * q * 2 + tiled.scalars());
                [
                    stages + (nn + heads * q) * q * 2,
                    stages + block_rows * nn * 2,
                ]
            }
        };
        Some(tiled)
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
        let full = if self.crew { FULL / 2 } else { FULL };
        let parts = match blocks {
            0 | 100.. => 1,
            _ => (full / blocks).clamp(1, self.chunks),
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

    /// Stages of a warpgroups' walk, at most so many, and its shared memory: each stage holds `streams` tiles of b or c, a tile of each
    /// head's rows and its numbers; each head holds the state and `own` planes of [64 64] more.
    fn crew_shared(
        &self,
        room: usize,
        (streams, own): (usize, usize),
        most: usize,
    ) -> (usize, usize) {
        let plane = 64 * 64 * 2;
        let stage = (streams * self.nn / 64 + self.heads) * plane + self.scalars();
        // What aligns the first plane, and barriers.
        let fixed = 1024 + 128 + self.heads * (self.nn / 64 + own) * plane;
        let stages = (room.saturating_sub(fixed) / stage).clamp(2, most);
        (stages, fixed + stages * stage)
    }

    /// Bytes of cum, key and first of a walk.
    fn scalars(&self) -> usize {
        (2 * self.heads + 1) * self.q * 4
    }

    /// States alone: `init`, of which there are `init_all` a batch, every `init_step`th of them a part's; then where each part ends, the
    /// parts' decays and the states at each tile.
    fn walk(
        &self,
        r: &mut Recorder,
        name: &'static str,
        (u, v): (&Tensor, &Tensor),
        steps: &Steps,
        (parts, each): (usize, usize),
        (init_all, init_step): (usize, usize),
        states: [&Tensor; 4],
    ) {
        let mut params: Vec<Param> = [u, v, &steps.cum, &steps.key, &steps.first]
            .into_iter()
            .chain(states)
            .map(Param::from)
            .collect();
        params.extend(self.sizes());
        params.extend([int(each), int(self.rows), int(init_all), int(init_step)]);
        r.launch_shared(
            ("ssd", name),
            self.defines.clone(),
            [self.own(), parts, self.s.b],
            self.walkers,
            self.shared[1],
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
        self.walk(r, name, inputs, steps, (parts, each), (parts, 1), states);
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
            self.walkers,
            self.shared[0],
            params,
        );
    }

    /// Threads of a block of `ssd_grads`, its shared memory without stages, and that of a stage.
    fn grads_shared(&self) -> (usize, usize, usize) {
        if self.crew {
            let plane = 64 * 64 * 2;
            // Tiles of b and c, two of m and one of dx; steps and sums of four heads, and where documents begin.
            let fixed =
                1024 + (2 * self.nn / 64 + 3) * plane + ((4 * 3 + 4 * 2 + 1) * self.q + 4 * 12) * 4;
            return (GRADERS + 128, fixed, (2 + 2 * self.nn / 64) * plane);
        }
        let (token, state) = (self.q * self.slice * 2, self.slice * self.nn * 2);
        let m_tiles = self.q / 16;
        let warps = GRADERS / 32;
        let sums = ((3 * m_tiles + 4 + warps / m_tiles) * self.q + 2 * warps) * 4;
        let fixed = (self.nn + self.q) * self.q * 2 + token + (8 + 1) * self.q * 4 + 2 * sums;
        (GRADERS, fixed, 2 * (token + state))
    }

    fn backward(&self, r: &mut Recorder, a: &Args, limit: (f32, f32)) {
        let s = &self.s;
        let (x, b, c, d, dy) = (a.arg(0), a.arg(3), a.arg(4), a.arg(5), a.arg(9));
        let steps = self.prepare(r, a, limit);
        let absent = Tensor::ABSENT;
        let tiles = s.b * self.tiles;
        let len = tiles * s.h * self.rows * self.nn;
        let (states, dstates) = (r.scratch(DType::Bf16, len), r.scratch(DType::Bf16, len));
        // From the saved state where a part begins; those between are made again on the way.
        let (parts, each) = self.parts();
        let from_saved = [a.arg(8), &absent, &absent, &states];
        let spread = (self.chunks, each);
        self.walk(
            r,
            "ssd_states",
            (x, b),
            &steps,
            (parts, each),
            spread,
            from_saved,
        );
        let end = self.starts(r, "ssd_dstates", (dy, c), &steps, &absent);
        let from_end = [&end, &absent, &absent, &dstates];
        self.walk(
            r,
            "ssd_dstates",
            (dy, c),
            &steps,
            (parts, each),
            (parts, 1),
            from_end,
        );
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
        let (threads, fixed, stage) = self.grads_shared();
        let stages = match r.target().shared {
            s if self.crew && fixed + 3 * stage <= s => 3,
            s if fixed + 2 * stage <= s => 2,
            _ => 1,
        };
        let mut defines = self.defines.clone();
        defines.extend([
            define("GRADS", 1),
            define("PP", self.slice),
            define("STAGES", stages),
            define("GRADERS", threads),
        ]);
        let mut params: Vec<Param> = [x, a.arg(2), b, c, d, dy, &steps.dts, &steps.cum]
            .into_iter()
            .chain([
                &steps.key,
                &steps.first,
                &states,
                &dstates,
                a.res(0),
                a.res(1),
                &part,
            ])
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
            threads,
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
        let absent = Tensor::ABSENT;
        let dd = if d.is_present() { a.res(5) } else { &absent };
        let dbias = match a.arg(6).is_present() {
            true => a.res(5 + usize::from(d.is_present())),
            false => &absent,
        };
        r.launch(
            ("ssd", "ssd_total"),
            self.defines.clone(),
            [s.h, 1, 1],
            THREADS,
            vec![
                (&part).into(),
                a.res(2).into(),
                dbias.into(),
                dd.into(),
                int(tiles),
                int(s.h),
            ],
        );
    }
}
