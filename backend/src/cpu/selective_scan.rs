//! Selective scan of Mamba-1: see `ir/src/op/selective_scan.rs` for the equations and the table.
//!
//! Channels are the vector lanes. A task owns some channels of one group of one batch row and walks the chunks; inside a chunk it takes
//! [`L`] channels at a time and one state n after the other, so that `h[n]` and `A[n]` stay in registers while time runs, and the
//! vectors over time (`dt'`, `dt' x`, y) stay in the first cache. Documents split a chunk into segments. Backward walks the chunks in
//! reverse: per state it recomputes `h` and the decays from the saved state, then runs time backwards. Sums over channels (db, dc) keep
//! [`FOLD`] lanes per token and state until the chunk ends; partial sums of tasks are added in task order.

use super::math;
use super::simd::simd;
use super::tensor::{Args, Columns, Cx, Results, Scratch, tiles};
use marimba_ir::op;

/// Channels processed together.
const L: usize = 16;

/// Lanes of a sum over channels.
const FOLD: usize = 8;

/// Tasks wanted: enough for any desktop, and fixed, so that sums do not depend on threads.
const TASKS: usize = 16;

type Lanes = [f32; L];

/// Everything the tasks read.
struct In<'a> {
    b: usize,
    t: usize,
    i: usize,
    g: usize,
    n: usize,
    chunk: usize,
    /// Channels of a task; divides a group's.
    width: usize,
    x: &'a [f32],
    dt: &'a [f32],
    av: &'a [f32],
    bm: &'a [f32],
    cm: &'a [f32],
    d: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    z: Option<&'a [f32]>,
    pos: Option<&'a [i32]>,
}

impl<'a> In<'a> {
    fn new(op: &op::SelectiveScan, a: &Args<'a>) -> Self {
        let (x, b) = (a.ty(0), a.ty(3));
        let (bs, i, g) = (x.size(0), x.size(2), b.size(2));
        let per_group = i / g;
        let wanted = TASKS.div_ceil((bs * g).max(1));
        let parts = (wanted..=per_group / L)
            .find(|k| per_group.is_multiple_of(*k) && (per_group / k).is_multiple_of(L))
            .unwrap_or(1);
        In {
            b: bs,
            t: x.size(1),
            i,
            g,
            n: b.size(3),
            chunk: op.chunk.min(x.size(1)).max(1),
            width: per_group / parts,
            x: a.f(0),
            dt: a.f(1),
            av: a.f(2),
            bm: a.f(3),
            cm: a.f(4),
            d: a.opt_f(5),
            bias: a.opt_f(6),
            z: a.opt_f(7),
            pos: a.opt_i(8),
        }
    }

    /// Tasks per batch row.
    fn parts(&self) -> usize {
        self.i / self.width
    }

    /// Batch row, first channel and group of task `i`.
    fn task(&self, i: usize) -> (usize, usize, usize) {
        let i0 = i % self.parts() * self.width;
        (i / self.parts(), i0, i0 / (self.i / self.g))
    }

    /// Lane blocks of a task.
    fn blocks(&self) -> usize {
        self.width.div_ceil(L)
    }

    /// First channels of a task's lane blocks, from the task's first, and how many lanes are used.
    fn block(&self, j: usize) -> (usize, usize) {
        (j * L, L.min(self.width - j * L))
    }

    /// Cuts q tokens from `t0` of row b where documents start: ends of segments. Whether the first starts a document comes first.
    fn segments(&self, b: usize, t0: usize, q: usize, ends: &mut Vec<usize>) -> bool {
        ends.clear();
        let starts = |t: usize| self.pos.is_some_and(|p| p[b * self.t + t0 + t] == 0);
        ends.extend((1..q).filter(|&t| starts(t)));
        ends.push(q);
        starts(0)
    }

    /// A of a task as lane blocks `[blocks][N][L]`, times log2 e.
    fn decay_rates(&self, i0: usize, out: &mut [Lanes]) {
        for j in 0..self.blocks() {
            let (c0, used) = self.block(j);
            for n in 0..self.n {
                let row = &mut out[j * self.n + n];
                *row = [0.0; L];
                for l in 0..used {
                    row[l] = self.av[(i0 + c0 + l) * self.n + n] * std::f32::consts::LOG2_E;
                }
            }
        }
    }
}

/// `2^x` for x up to 127; below -125 it stays at 2^-125. Relative error below 2e-7.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -125.0 { -125.0 } else { x };
    let x = if x > 127.0 { 127.0 } else { x };
    let shifted = x + ROUND;
    let r = x - (shifted - ROUND);
    // Minimax in relative error on [-1/2, 1/2]: 9.2e-8.
    let p = 1.326_472_7e-3f32;
    let p = p.mul_add(r, 9.671_513e-3);
    let p = p.mul_add(r, 5.550_733_7e-2);
    let p = p.mul_add(r, 0.240_222_42);
    let p = p.mul_add(r, 0.693_146_97);
    let p = p.mul_add(r, 1.0);
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// Rows of up to L floats, `ld` apart, as lanes; unused lanes 0.
#[inline(always)]
fn load(x: &[f32], ld: usize, used: usize, q: usize, out: &mut [Lanes]) {
    for (t, o) in out[..q].iter_mut().enumerate() {
        let row = &x[t * ld..];
        match row.first_chunk::<L>() {
            Some(r) if used == L => *o = *r,
            _ => {
                *o = [0.0; L];
                o[..used].copy_from_slice(&row[..used]);
            }
        }
    }
}

/// `[N][L]` lanes from `[used][N]`.
#[inline(always)]
fn load_states(x: &[f32], n: usize, used: usize, out: &mut [Lanes]) {
    for (k, o) in out[..n].iter_mut().enumerate() {
        *o = [0.0; L];
        for l in 0..used {
            o[l] = x[l * n + k];
        }
    }
}

/// `[used][N]` from `[N][L]` lanes.
#[inline(always)]
fn store_states(x: &mut [f32], n: usize, used: usize, lanes: &[Lanes]) {
    for l in 0..used {
        for (k, o) in x[l * n..][..n].iter_mut().enumerate() {
            *o = lanes[k][l];
        }
    }
}

/// Lanes of one chunk: rows over time.
struct Work<'w> {
    dt: &'w mut [Lanes],
    /// dt' x.
    u: &'w mut [Lanes],
    x: &'w mut [Lanes],
    z: &'w mut [Lanes],
    /// Sum over states of C h.
    y: &'w mut [Lanes],
}

/// What one chunk of one lane block reads: slices start at its first token and channel, rows are `ld` apart.
struct Block<'a> {
    x: &'a [f32],
    dt: &'a [f32],
    z: Option<&'a [f32]>,
    /// Per channel; unused lanes 0.
    d: Lanes,
    bias: Lanes,
    ld: usize,
    used: usize,
    q: usize,
}

impl<'a> Block<'a> {
    fn new(f: &In<'a>, b: usize, c: usize, used: usize, t0: usize, q: usize) -> Self {
        let at = (b * f.t + t0) * f.i + c;
        let per_channel = |v: Option<&[f32]>| {
            let mut out = [0.0; L];
            if let Some(v) = v {
                out[..used].copy_from_slice(&v[c..][..used]);
            }
            out
        };
        Block {
            x: &f.x[at..],
            dt: &f.dt[at..],
            z: f.z.map(|z| &z[at..]),
            d: per_channel(f.d),
            bias: per_channel(f.bias),
            ld: f.i,
            used,
            q,
        }
    }
}

simd! {
    /// Loads a chunk: dt' and dt' x; y starts at zero.
    fn begin(k: &Block<'_>, w: &mut Work<'_>) {
        load(k.x, k.ld, k.used, k.q, w.x);
        load(k.dt, k.ld, k.used, k.q, w.dt);
        if let Some(z) = k.z {
            load(z, k.ld, k.used, k.q, w.z);
        }
        for t in 0..k.q {
            for l in 0..L {
                w.dt[t][l] = math::softplus(w.dt[t][l] + k.bias[l]);
                w.u[t][l] = w.dt[t][l] * w.x[t][l];
            }
            w.y[t] = [0.0; L];
        }
    }

    /// Runs time for all states: `h = 2^(dt' a) h + u b`, `y += c h`. b and c have rows `ld` apart.
    fn scan(h: &mut [Lanes], a: &[Lanes], dt: &[Lanes], u: &[Lanes], b: &[f32], c: &[f32], ld: usize, y: &mut [Lanes]) {
        let q = dt.len();
        let (u, y) = (&u[..q], &mut y[..q]);
        for (n, (h, a)) in h.iter_mut().zip(a).enumerate() {
            let mut s = *h;
            for t in 0..q {
                let (bv, cv) = (b[t * ld + n], c[t * ld + n]);
                for l in 0..L {
                    s[l] = exp2(dt[t][l] * a[l]).mul_add(s[l], u[t][l] * bv);
                    y[t][l] = cv.mul_add(s[l], y[t][l]);
                }
            }
            *h = s;
        }
    }

    /// `y = (y + d x) silu(z)`.
    fn finish(k: &Block<'_>, w: &mut Work<'_>) {
        for t in 0..k.q {
            for l in 0..L {
                let y = k.d[l].mul_add(w.x[t][l], w.y[t][l]);
                w.y[t][l] = if k.z.is_some() { y * math::silu(w.z[t][l]) } else { y };
            }
        }
    }

    fn add_to(out: &mut [f32], x: &[f32]) {
        for (o, &v) in out.iter_mut().zip(x) {
            *o += v;
        }
    }

    fn states_in(x: &[f32], n: usize, used: usize, out: &mut [Lanes]) {
        load_states(x, n, used, out);
    }

    fn states_out(x: &mut [f32], n: usize, used: usize, lanes: &[Lanes]) {
        store_states(x, n, used, lanes);
    }

    /// Gradient of y without gate: `dy silu(z)`, in place of dy.
    fn begin_bwd(k: &Block<'_>, w: &mut Work<'_>, dy: &[f32], v: &mut [Lanes]) {
        load(dy, k.ld, k.used, k.q, v);
        if k.z.is_some() {
            for t in 0..k.q {
                for l in 0..L {
                    v[t][l] *= math::silu(w.z[t][l]);
                }
            }
        }
    }

    /// One segment, all states: recomputes from `h`, then runs time backwards. `carry` holds the gradient of the state after the
    /// segment, then that of the state before it. dt, u, v (gradient of y), y, du, ddt (over a) are rows of the segment; db and dc rows
    /// of `[N][q][FOLD]` sums, `q` apart.
    fn scan_bwd(
        start: Option<&[Lanes]>, carry: &mut [Lanes], a: &[Lanes], da: &mut [Lanes],
        dt: &[Lanes], u: &[Lanes], v: &[Lanes], y: &mut [Lanes], du: &mut [Lanes], ddt: &mut [Lanes],
        b: &[f32], c: &[f32], ld: usize, db: &mut [[f32; FOLD]], dc: &mut [[f32; FOLD]], q_max: usize,
        hs: &mut [Lanes], es: &mut [Lanes],
    ) {
        let q = dt.len();
        let (u, v, y, du, ddt) = (&u[..q], &v[..q], &mut y[..q], &mut du[..q], &mut ddt[..q]);
        let (hs, es) = (&mut hs[..q + 1], &mut es[..q]);
        for n in 0..a.len() {
            let an = a[n];
            let mut s = start.map_or([0.0; L], |h| h[n]);
            hs[0] = s;
            for t in 0..q {
                let (bv, cv) = (b[t * ld + n], c[t * ld + n]);
                for l in 0..L {
                    let e = exp2(dt[t][l] * an[l]);
                    es[t][l] = e;
                    s[l] = e.mul_add(s[l], u[t][l] * bv);
                    y[t][l] = cv.mul_add(s[l], y[t][l]);
                }
                hs[t + 1] = s;
            }
            let (db, dc) = (&mut db[n * q_max..][..q], &mut dc[n * q_max..][..q]);
            let (mut g, mut sum) = (carry[n], da[n]);
            for t in (0..q).rev() {
                let (bv, cv) = (b[t * ld + n], c[t * ld + n]);
                let (vt, ut, dtt, h, old, e) = (&v[t], &u[t], &dt[t], &hs[t + 1], &hs[t], &es[t]);
                for l in 0..L {
                    g[l] = cv.mul_add(vt[l], g[l]);
                }
                for l in 0..FOLD {
                    let mut pc = dc[t][l];
                    let mut pb = db[t][l];
                    for k in (l..L).step_by(FOLD) {
                        pc = h[k].mul_add(vt[k], pc);
                        pb = g[k].mul_add(ut[k], pb);
                    }
                    dc[t][l] = pc;
                    db[t][l] = pb;
                }
                for l in 0..L {
                    du[t][l] = g[l].mul_add(bv, du[t][l]);
                    g[l] *= e[l];
                    let w = g[l] * old[l];
                    sum[l] = w.mul_add(dtt[l], sum[l]);
                    ddt[t][l] = w.mul_add(an[l], ddt[t][l]);
                }
            }
            carry[n] = g;
            da[n] = sum;
        }
    }

    /// The gradients of a chunk's x, dt (into `du` and `ddt`) and z (into `v`) from the sums of [`scan_bwd`]; adds to dd and dbias.
    fn finish_bwd(k: &Block<'_>, w: &mut Work<'_>, dy: &[f32], v: &mut [Lanes], du: &mut [Lanes], ddt: &mut [Lanes], dd: &mut Lanes, dbias: &mut Lanes) {
        for t in 0..k.q {
            for l in 0..L {
                let raw = w.dt[t][l];
                // sigmoid of the raw value from its softplus: 1 - e^-dt'; exact 1 in the linear part.
                let slope = if raw > 20.0 { 1.0 } else { one_minus_exp(raw) };
                let step = ddt[t][l].mul_add(std::f32::consts::LN_2, du[t][l] * w.x[t][l]) * slope;
                dbias[l] += step;
                ddt[t][l] = step;
                du[t][l] = k.d[l].mul_add(v[t][l], du[t][l] * w.dt[t][l]);
                dd[l] = v[t][l].mul_add(w.x[t][l], dd[l]);
            }
        }
        if k.z.is_some() {
            load(dy, k.ld, k.used, k.q, v);
            for t in 0..k.q {
                for l in 0..L {
                    let y = k.d[l].mul_add(w.x[t][l], w.y[t][l]);
                    v[t][l] *= y * math::d_silu(w.z[t][l]);
                }
            }
        }
    }
}

/// `1 - e^-x` for x >= 0, without cancellation near 0.
#[inline(always)]
fn one_minus_exp(x: f32) -> f32 {
    // Taylor to x^5: relative error below 2e-7 for x < 0.1 (next term x^5/720).
    let small = x
        * (-x).mul_add(
            (-x).mul_add(
                (-x).mul_add((-x).mul_add(1.0 / 120.0, 1.0 / 24.0), 1.0 / 6.0),
                0.5,
            ),
            1.0,
        );
    let large = 1.0 - math::exp(-x);
    if x < 0.1 { small } else { large }
}

/// Forward.
pub(super) fn selective_scan(op: &op::SelectiveScan, a: &Args, r: &mut Results, cx: &Cx) {
    let f = In::new(op, a);
    let (y, state) = (r.take_f(0), r.take_f(1));
    if y.is_empty() {
        return;
    }
    let outs = tiles(y, f.i, f.width, f.t);
    let wide = f.width * f.n;
    if a.has(9) {
        let items: Vec<_> = outs.into_iter().zip(state.chunks_mut(wide)).collect();
        cx.for_each(items, |i, (mut y, state), scratch| {
            forward(&f, i, &mut y, States::Carried(state), scratch);
        });
    } else {
        let saved = tiles(state, f.i * f.n, wide, f.t.div_ceil(f.chunk));
        let items: Vec<_> = outs.into_iter().zip(saved).collect();
        cx.for_each(items, |i, (mut y, saved), scratch| {
            forward(&f, i, &mut y, States::Saved(saved), scratch);
        });
    }
}

/// Where a task's states go.
enum States<'a> {
    /// `[width N]`, in and out.
    Carried(&'a mut [f32]),
    /// Row c: `[width N]` before chunk c.
    Saved(Columns<'a>),
}

/// Floats as rows of lanes.
fn lanes<const W: usize>(x: &mut [f32]) -> &mut [[f32; W]] {
    x.as_chunks_mut::<W>().0
}

fn forward(f: &In, task: usize, y: &mut Columns, mut states: States, scratch: &mut Scratch) {
    let (b, i0, g) = f.task(task);
    let (q_max, n) = (f.chunk, f.n);
    let all = f.blocks() * n * L;
    let [h, av, dt, u, x, z, sum] = scratch
        .split([
            all,
            all,
            q_max * L,
            q_max * L,
            q_max * L,
            q_max * L,
            q_max * L,
        ])
        .map(lanes::<L>);
    let mut w = Work {
        dt,
        u,
        x,
        z,
        y: sum,
    };
    f.decay_rates(i0, av);
    match &states {
        States::Carried(state) => {
            for j in 0..f.blocks() {
                let (c0, used) = f.block(j);
                states_in(&state[c0 * n..], n, used, &mut h[j * n..][..n]);
            }
        }
        States::Saved(_) => h.fill([0.0; L]),
    }
    let mut ends = Vec::new();
    for (c, t0) in (0..f.t).step_by(q_max).enumerate() {
        let q = q_max.min(f.t - t0);
        let starts = f.segments(b, t0, q, &mut ends);
        let at = ((b * f.t + t0) * f.g + g) * n;
        let ld = f.g * n;
        for j in 0..f.blocks() {
            let (c0, used) = f.block(j);
            let (h, av) = (&mut h[j * n..][..n], &av[j * n..][..n]);
            if let States::Saved(saved) = &mut states {
                states_out(&mut saved.row(c)[c0 * n..][..used * n], n, used, h);
            }
            let k = Block::new(f, b, i0 + c0, used, t0, q);
            begin(&k, &mut w);
            let mut from = 0;
            for &end in &ends {
                if from > 0 || starts {
                    h.fill([0.0; L]);
                }
                let at = at + from * ld;
                scan(
                    h,
                    av,
                    &w.dt[from..end],
                    &w.u[from..end],
                    &f.bm[at..],
                    &f.cm[at..],
                    ld,
                    &mut w.y[from..end],
                );
                from = end;
            }
            finish(&k, &mut w);
            for t in 0..q {
                y.row(t0 + t)[c0..][..used].copy_from_slice(&w.y[t][..used]);
            }
        }
    }
    if let States::Carried(state) = &mut states {
        for j in 0..f.blocks() {
            let (c0, used) = f.block(j);
            states_out(&mut state[c0 * n..][..used * n], n, used, &h[j * n..][..n]);
        }
    }
}

/// What a backward task writes.
struct Grads<'a> {
    dx: Columns<'a>,
    ddt: Columns<'a>,
    dz: Option<Columns<'a>>,
    /// Partial over the task's channels: `[T N]`.
    db: &'a mut [f32],
    dc: &'a mut [f32],
    /// Partial over time: `[width N]`.
    da: &'a mut [f32],
    /// Partial over time: dd, then dbias, `[2 width]`.
    channels: &'a mut [f32],
}

/// Backward.
pub(super) fn selective_scan_bwd(op: &op::SelectiveScanBwd, a: &Args, r: &mut Results, cx: &Cx) {
    let f = In::new(&op.of, a);
    let (saved, dy) = (a.f(9), a.f(10));
    let (dx, ddt, da, db, dc) = (
        r.take_f(0),
        r.take_f(1),
        r.take_f(2),
        r.take_f(3),
        r.take_f(4),
    );
    let mut next = 5;
    let mut optional = |present: bool| {
        present.then(|| {
            next += 1;
            r.take_f(next - 1)
        })
    };
    let dd = optional(f.d.is_some());
    let dbias = optional(f.bias.is_some());
    let dz = optional(f.z.is_some());
    if f.b * f.t * f.i == 0 {
        da.fill(0.0);
        dd.into_iter().chain(dbias).for_each(|v| v.fill(0.0));
        db.fill(0.0);
        dc.fill(0.0);
        return;
    }
    let tasks = f.b * f.parts();
    let (tn, wn) = (f.t * f.n, f.width * f.n);
    let mut shared = cx.shared();
    let [dbs, dcs, das, channels] =
        shared.split([tasks * tn, tasks * tn, tasks * wn, tasks * 2 * f.width]);
    let dzs: Vec<Option<Columns>> = match dz {
        Some(dz) => tiles(dz, f.i, f.width, f.t).into_iter().map(Some).collect(),
        None => (0..tasks).map(|_| None).collect(),
    };
    let items: Vec<_> = tiles(dx, f.i, f.width, f.t)
        .into_iter()
        .zip(tiles(ddt, f.i, f.width, f.t))
        .zip(dzs)
        .zip(dbs.chunks_mut(tn).zip(dcs.chunks_mut(tn)))
        .zip(das.chunks_mut(wn).zip(channels.chunks_mut(2 * f.width)))
        .map(|((((dx, ddt), dz), (db, dc)), (da, channels))| Grads {
            dx,
            ddt,
            dz,
            db,
            dc,
            da,
            channels,
        })
        .collect();
    cx.for_each(items, |i, grads, scratch| {
        backward(&f, i, grads, saved, dy, scratch)
    });
    // Sums over the tasks of a group and over the batch, in task order.
    let per_group = f.parts() / f.g;
    for (partial, total) in [(&*dbs, db), (&*dcs, dc)] {
        cx.for_each(tiles(total, f.g * f.n, f.n, f.t), |i, mut out, _| {
            for t in 0..f.t {
                let row = out.row(t);
                for k in 0..per_group {
                    let part = &partial[((i * per_group + k) * f.t + t) * f.n..][..f.n];
                    if k == 0 {
                        row.copy_from_slice(part)
                    } else {
                        add_to(row, part)
                    }
                }
            }
        });
    }
    for b in 0..f.b {
        let part = &das[b * f.i * f.n..][..f.i * f.n];
        if b == 0 {
            da.copy_from_slice(part)
        } else {
            add_to(da, part)
        }
    }
    for (k, out) in [(0, dd), (1, dbias)] {
        let Some(out) = out else { continue };
        out.fill(0.0);
        for (i, part) in channels.chunks(2 * f.width).enumerate() {
            let (_, i0, _) = f.task(i);
            add_to(&mut out[i0..][..f.width], &part[k * f.width..][..f.width]);
        }
    }
}

fn backward(f: &In, task: usize, mut out: Grads, saved: &[f32], dy: &[f32], scratch: &mut Scratch) {
    let (b, i0, g) = f.task(task);
    let (q_max, n) = (f.chunk, f.n);
    let all = f.blocks() * n * L;
    let ql = q_max * L;
    let [
        carry,
        av,
        da,
        start,
        per_channel,
        dt,
        u,
        x,
        z,
        y,
        v,
        du,
        ddt,
        hs,
        es,
        db,
        dc,
    ] = scratch.split([
        all,
        all,
        all,
        n * L,
        f.blocks() * 2 * L,
        ql,
        ql,
        ql,
        ql,
        ql,
        ql,
        ql,
        ql,
        ql + L,
        ql,
        n * q_max * FOLD,
        n * q_max * FOLD,
    ]);
    let (db, dc) = (lanes::<FOLD>(db), lanes::<FOLD>(dc));
    let [
        carry,
        av,
        da,
        start,
        per_channel,
        dt,
        u,
        x,
        z,
        y,
        v,
        du,
        ddt,
        hs,
        es,
    ] = [
        carry,
        av,
        da,
        start,
        per_channel,
        dt,
        u,
        x,
        z,
        y,
        v,
        du,
        ddt,
        hs,
        es,
    ]
    .map(lanes::<L>);
    let mut w = Work { dt, u, x, z, y };
    f.decay_rates(i0, av);
    carry.fill([0.0; L]);
    da.fill([0.0; L]);
    per_channel.fill([0.0; L]);
    let mut ends = Vec::new();
    let chunks = f.t.div_ceil(q_max);
    let ld = f.g * n;
    for c in (0..chunks).rev() {
        let t0 = c * q_max;
        let q = q_max.min(f.t - t0);
        let starts = f.segments(b, t0, q, &mut ends);
        let at = ((b * f.t + t0) * f.g + g) * n;
        db.fill([0.0; FOLD]);
        dc.fill([0.0; FOLD]);
        for j in 0..f.blocks() {
            let (c0, used) = f.block(j);
            let (carry, av, da) = (
                &mut carry[j * n..][..n],
                &av[j * n..][..n],
                &mut da[j * n..][..n],
            );
            let k = Block::new(f, b, i0 + c0, used, t0, q);
            let dy = &dy[(b * f.t + t0) * f.i + i0 + c0..];
            begin(&k, &mut w);
            begin_bwd(&k, &mut w, dy, v);
            du[..q].fill([0.0; L]);
            ddt[..q].fill([0.0; L]);
            states_in(
                &saved[((b * chunks + c) * f.i + i0 + c0) * n..],
                n,
                used,
                start,
            );
            for s in (0..ends.len()).rev() {
                let from = if s == 0 { 0 } else { ends[s - 1] };
                let end = ends[s];
                let fresh = s > 0 || starts;
                let at = at + from * ld;
                scan_bwd(
                    (!fresh).then_some(&*start),
                    carry,
                    av,
                    da,
                    &w.dt[from..end],
                    &w.u[from..end],
                    &v[from..end],
                    &mut w.y[from..end],
                    &mut du[from..end],
                    &mut ddt[from..end],
                    &f.bm[at..],
                    &f.cm[at..],
                    ld,
                    &mut db[from..],
                    &mut dc[from..],
                    q_max,
                    hs,
                    es,
                );
                if fresh {
                    carry.fill([0.0; L]);
                }
            }
            let [dd, dbias] = &mut per_channel[2 * j..][..2] else {
                continue;
            };
            finish_bwd(&k, &mut w, dy, v, du, ddt, dd, dbias);
            for t in 0..q {
                out.dx.row(t0 + t)[c0..][..used].copy_from_slice(&du[t][..used]);
                out.ddt.row(t0 + t)[c0..][..used].copy_from_slice(&ddt[t][..used]);
                if let Some(dz) = &mut out.dz {
                    dz.row(t0 + t)[c0..][..used].copy_from_slice(&v[t][..used]);
                }
            }
        }
        for (sums, total) in [(&*db, &mut *out.db), (&*dc, &mut *out.dc)] {
            for t in 0..q {
                for (k, o) in total[(t0 + t) * n..][..n].iter_mut().enumerate() {
                    let s = &sums[k * q_max + t];
                    *o = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
                }
            }
        }
    }
    for j in 0..f.blocks() {
        let (c0, used) = f.block(j);
        states_out(
            &mut out.da[c0 * n..][..used * n],
            n,
            used,
            &da[j * n..][..n],
        );
        for (k, v) in per_channel[2 * j..][..2].iter().enumerate() {
            out.channels[k * f.width + c0..][..used].copy_from_slice(&v[..used]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{Arg, close, floats, gradient, ints, noise, positions, run, wide};
    use super::*;
    use marimba_ir::dims;

    #[derive(Clone, Copy)]
    struct Shape {
        b: usize,
        t: usize,
        i: usize,
        g: usize,
        n: usize,
    }

    /// Token by token. Arguments x, dt, a, b, c, d, dt_bias, z (the last three empty: absent).
    fn reference(s: Shape, v: &[Vec<f64>], pos: Option<&[i32]>, state: &mut [f64]) -> Vec<f64> {
        let mut y = vec![0.0; s.b * s.t * s.i];
        for b in 0..s.b {
            for t in 0..s.t {
                let row = b * s.t + t;
                for i in 0..s.i {
                    let g = i / (s.i / s.g);
                    let raw = v[1][row * s.i + i] + v[6].get(i).unwrap_or(&0.0);
                    let dt = if raw > 20.0 { raw } else { raw.exp().ln_1p() };
                    let x = v[0][row * s.i + i];
                    let mut sum = v[5].get(i).unwrap_or(&0.0) * x;
                    for n in 0..s.n {
                        let h = &mut state[(b * s.i + i) * s.n + n];
                        if pos.is_some_and(|p| p[row] == 0) {
                            *h = 0.0;
                        }
                        *h = (dt * v[2][i * s.n + n]).exp() * *h
                            + dt * v[3][(row * s.g + g) * s.n + n] * x;
                        sum += v[4][(row * s.g + g) * s.n + n] * *h;
                    }
                    let gate = v[7]
                        .get(row * s.i + i)
                        .map_or(1.0, |z| z / (1.0 + (-z).exp()));
                    y[row * s.i + i] = sum * gate;
                }
            }
        }
        y
    }

    fn values(s: Shape, optional: bool) -> Vec<Vec<f32>> {
        let bt = s.b * s.t;
        let mut dt = noise(2, bt * s.i, 3.0);
        dt[0] = 22.0;
        let mut v = vec![
            noise(1, bt * s.i, 1.0),
            dt,
            noise(3, s.i * s.n, 0.7).iter().map(|v| v - 0.8).collect(),
            noise(4, bt * s.g * s.n, 1.0),
            noise(5, bt * s.g * s.n, 1.0),
        ];
        if optional {
            v.extend([
                noise(6, s.i, 1.0),
                noise(7, s.i, 1.0),
                noise(8, bt * s.i, 2.0),
            ]);
        } else {
            v.extend([vec![], vec![], vec![]]);
        }
        v
    }

    fn args(s: Shape, v: &[Vec<f32>], pos: Option<&[i32]>) -> Vec<Arg> {
        let (b, t, i, g, n) = (s.b, s.t, s.i, s.g, s.n);
        let opt = |x: &Vec<f32>, d| (!x.is_empty()).then(|| floats(d, x)).flatten();
        vec![
            floats(dims![B b, T t, I i], &v[0]),
            floats(dims![B b, T t, I i], &v[1]),
            floats(dims![I i, N n], &v[2]),
            floats(dims![B b, T t, G g, N n], &v[3]),
            floats(dims![B b, T t, G g, N n], &v[4]),
            opt(&v[5], dims![I i]),
            opt(&v[6], dims![I i]),
            opt(&v[7], dims![B b, T t, I i]),
            pos.and_then(|x| ints(dims![B b, T t], x)),
        ]
    }

    #[test]
    fn exponentials_are_close() {
        for i in -12500..1000 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp2();
            assert!((f64::from(exp2(x)) / exact - 1.0).abs() < 3e-7, "{x}");
        }
        for i in 0..3000 {
            let x = i as f32 / 1000.0;
            let exact = -(-f64::from(x)).exp_m1();
            assert!(
                (f64::from(one_minus_exp(x)) - exact).abs() <= 1e-6 * exact,
                "{x}"
            );
        }
    }

    #[test]
    fn follows_the_recurrence_for_any_chunk() {
        for t in [1, 2, 63, 65, 300] {
            for (s, optional) in [
                (
                    Shape {
                        b: 2,
                        t,
                        i: 10,
                        g: 2,
                        n: 3,
                    },
                    true,
                ),
                (
                    Shape {
                        b: 1,
                        t,
                        i: 48,
                        g: 1,
                        n: 16,
                    },
                    false,
                ),
                (
                    Shape {
                        b: 1,
                        t,
                        i: 20,
                        g: 1,
                        n: 4,
                    },
                    true,
                ),
            ] {
                let v = values(s, optional);
                let w: Vec<_> = v.iter().map(|x| wide(x)).collect();
                for pos in [None, Some(positions(s.b, t, 2, &[5, 40, 1, 70]))] {
                    let want = reference(s, &w, pos.as_deref(), &mut vec![0.0; s.b * s.i * s.n]);
                    for chunk in [1, 7, 64, 1000] {
                        let op = op::SelectiveScan { chunk };
                        let got = run(&op, &args(s, &v, pos.as_deref()), selective_scan);
                        close("y", &got[0], &want, 5e-6);
                        assert!(got[1].iter().all(|v| v.is_finite()));
                    }
                }
            }
        }
    }

    #[test]
    fn carried_state_continues() {
        let s = Shape {
            b: 2,
            t: 40,
            i: 36,
            g: 2,
            n: 5,
        };
        let v = values(s, true);
        let w: Vec<_> = v.iter().map(|x| wide(x)).collect();
        let begin = noise(9, s.b * s.i * s.n, 1.0);
        for pos in [None, Some(positions(s.b, s.t, 3, &[30, 11]))] {
            let mut want_state = wide(&begin);
            let want = reference(s, &w, pos.as_deref(), &mut want_state);
            for cuts in [vec![0, 40], vec![0, 20, 21, 33, 40], (0..=40).collect()] {
                let mut state = begin.clone();
                for cut in cuts.windows(2) {
                    let part = Shape {
                        t: cut[1] - cut[0],
                        ..s
                    };
                    let take = |x: &[f32], width: usize| -> Vec<f32> {
                        x.chunks(s.t * width)
                            .flat_map(|r| r[cut[0] * width..cut[1] * width].to_vec())
                            .collect()
                    };
                    let widths = [s.i, s.i, 0, s.g * s.n, s.g * s.n, 0, 0, s.i];
                    let cut_v: Vec<Vec<f32>> = v
                        .iter()
                        .zip(widths)
                        .map(|(x, w)| if w == 0 { x.clone() } else { take(x, w) })
                        .collect();
                    let cut_pos: Option<Vec<i32>> = pos.as_ref().map(|p| {
                        p.chunks(s.t)
                            .flat_map(|r| r[cut[0]..cut[1]].to_vec())
                            .collect()
                    });
                    let mut a = args(part, &cut_v, cut_pos.as_deref());
                    a.push(floats(dims![B s.b, I s.i, N s.n], &state));
                    let got = run(&op::SelectiveScan { chunk: 16 }, &a, selective_scan);
                    let want: Vec<f64> = want
                        .chunks(s.t * s.i)
                        .flat_map(|r| r[cut[0] * s.i..cut[1] * s.i].to_vec())
                        .collect();
                    close("y", &got[0], &want, 5e-6);
                    state.copy_from_slice(&got[1]);
                }
                close("state", &state, &want_state, 5e-6);
            }
        }
    }

    #[test]
    fn gradients_match_differences() {
        for (t, chunk, optional, packed, i, g) in [
            (1, 64, true, false, 6, 2),
            (2, 1, false, true, 16, 1),
            (23, 8, true, true, 10, 2),
            (65, 64, true, false, 20, 1),
            (63, 16, false, true, 48, 1),
        ] {
            let s = Shape {
                b: 2,
                t,
                i,
                g,
                n: 5,
            };
            let v = values(s, optional);
            let pos = packed.then(|| positions(s.b, t, 4, &[9, 20, 1]));
            let dy = noise(10, v[0].len(), 1.0);
            let mut a = args(s, &v, pos.as_deref());
            let op = op::SelectiveScan { chunk };
            let fwd = run(&op, &a, selective_scan);
            a.push(floats(
                dims![B s.b, C t.div_ceil(chunk), I s.i, N s.n],
                &fwd[1],
            ));
            a.push(floats(dims![B s.b, T t, I s.i], &dy));
            let got = run(&op::SelectiveScanBwd { of: op }, &a, selective_scan_bwd);
            let loss = |w: &[Vec<f64>]| -> f64 {
                let y = reference(s, w, pos.as_deref(), &mut vec![0.0; s.b * s.i * s.n]);
                y.iter().zip(&dy).map(|(y, &d)| y * f64::from(d)).sum()
            };
            let w: Vec<_> = v.iter().map(|x| wide(x)).collect();
            for (k, name) in ["dx", "ddt", "da", "db", "dc", "dd", "ddt_bias", "dz"]
                .iter()
                .enumerate()
                .take(got.len())
            {
                gradient(name, loss, &w, k, &got[k], 50, 2e-5);
            }
        }
    }
}
