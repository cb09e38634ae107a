//! State space duality in chunks of matrix products: see `ir/src/op/ssd.rs` for the equations and the table.
//!
//! A task owns some heads of one group of one batch row and walks the chunks. With `cum` the sums of `dt' a` inside a chunk,
//! `M[t,s] = (C B^T)[t,s] exp(cum[t] - cum[s])` for s <= t in the same document, `xd = dt' x`, `S` the state `[N P]` before the chunk:
//! `y = [exp(cum) C | M] [S; xd] + d x`, `S' = exp(cum_last) S + (w B)^T xd`, `w[s] = exp(cum_last - cum[s])`.
//! `C B^T` is shared by the heads of a task. Backward walks the chunks in reverse from the saved states; the gradient of `cum` needs
//! no product of its own: row sums of `dM o M` and of `dC o C`, less `xd . dxd`.
//!
//! Runs of fewer than [`STEP_TOKENS`] tokens with a state (decode) follow the recurrence instead.

use super::math;
use super::panel::{Left, Part, product, transpose};
use super::simd::{dot, simd};
use super::tensor::{Args, Columns, Cx, Results, Scratch, tiles};
use marimba_ir::op;

/// Below this many tokens the recurrence costs less than products of tiny chunks.
const STEP_TOKENS: usize = 8;

/// Tasks wanted: enough for any desktop, and fixed, so that sums do not depend on threads.
const TASKS: usize = 16;

/// Everything the tasks read.
struct In<'a> {
    b: usize,
    t: usize,
    h: usize,
    p: usize,
    g: usize,
    n: usize,
    /// Heads of a task.
    hb: usize,
    chunk: usize,
    limit: (f32, f32),
    x: &'a [f32],
    dt: &'a [f32],
    av: &'a [f32],
    bm: &'a [f32],
    cm: &'a [f32],
    d: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    pos: Option<&'a [i32]>,
}

impl<'a> In<'a> {
    fn new(op: &op::Ssd, a: &Args<'a>) -> Self {
        let (x, b) = (a.ty(0), a.ty(3));
        let (bs, h, g) = (x.size(0), x.size(2), b.size(2));
        let per_group = h / g;
        // As many heads as leave TASKS tasks, a divisor of the group's heads.
        let mut hb = (bs * h).div_ceil(TASKS).clamp(1, per_group);
        while per_group % hb != 0 {
            hb -= 1;
        }
        In {
            b: bs,
            t: x.size(1),
            h,
            p: x.size(3),
            g,
            n: b.size(3),
            hb,
            chunk: op.chunk.min(x.size(1)).max(1),
            limit: (op.dt_limit.0 as f32, op.dt_limit.1 as f32),
            x: a.f(0),
            dt: a.f(1),
            av: a.f(2),
            bm: a.f(3),
            cm: a.f(4),
            d: a.opt_f(5),
            bias: a.opt_f(6),
            pos: a.opt_i(7),
        }
    }

    /// Tasks per batch row.
    fn blocks(&self) -> usize {
        self.h / self.hb
    }

    /// Batch row, first head and group of task `i`.
    fn task(&self, i: usize) -> (usize, usize, usize) {
        let h0 = i % self.blocks() * self.hb;
        (i / self.blocks(), h0, h0 / (self.h / self.g))
    }

    /// Steps of head `h` for `q` tokens from token `t0` of row `b`.
    fn steps(&self, b: usize, h: usize, t0: usize, q: usize, s: &mut Steps) {
        let bias = self.bias.map_or(0.0, |v| v[h]);
        for (i, raw) in s.raw[..q].iter_mut().enumerate() {
            *raw = self.dt[(b * self.t + t0 + i) * self.h + h] + bias;
        }
        softplus(&mut s.dt[..q], &s.raw[..q], self.limit.0, self.limit.1);
        let mut sum = 0.0;
        for i in 0..q {
            sum += s.dt[i] * self.av[h];
            s.cum[i] = sum;
        }
        decays(&mut s.from_start[..q], &mut s.to_end[..q], &s.cum[..q], sum);
        // What lies before a document does not reach into it.
        for i in s.open..q {
            s.from_start[i] = 0.0;
        }
        s.to_end[..s.last].fill(0.0);
        s.keep = if s.open == q { exp1(sum) } else { 0.0 };
    }

    /// First visible token of each of `q` tokens of a chunk, how many tokens see the state before the chunk, and the first token
    /// that the state after it holds.
    fn documents(&self, b: usize, t0: usize, q: usize, first: &mut Vec<usize>) -> (usize, usize) {
        first.clear();
        let (mut open, mut start) = (q, 0);
        for i in 0..q {
            if self.pos.is_some_and(|p| p[b * self.t + t0 + i] == 0) {
                start = i;
                open = open.min(i);
            }
            first.push(start);
        }
        (open, start)
    }
}

/// One head's steps and decays in a chunk.
struct Steps<'a> {
    /// dt + bias.
    raw: &'a mut [f32],
    /// After softplus and clamp.
    dt: &'a mut [f32],
    cum: &'a mut [f32],
    /// Decay from before the chunk to each token; 0 behind a document's start.
    from_start: &'a mut [f32],
    /// Decay from each token to the end of the chunk; 0 before the last document's start.
    to_end: &'a mut [f32],
    /// Decay over the chunk; 0 when a document starts in it.
    keep: f32,
    /// Tokens that see the state before the chunk.
    open: usize,
    /// First token of the chunk's last document.
    last: usize,
}

fn exp1(x: f32) -> f32 {
    math::exp(x)
}

simd! {
    fn softplus(out: &mut [f32], x: &[f32], low: f32, high: f32) {
        for (o, &x) in out.iter_mut().zip(x) {
            let y = math::softplus(x);
            let y = if y < low { low } else { y };
            *o = if y > high { high } else { y };
        }
    }

    /// Derivative of [`softplus`].
    fn softplus_slope(out: &mut [f32], x: &[f32], low: f32, high: f32) {
        for (o, &x) in out.iter_mut().zip(x) {
            let y = math::softplus(x);
            let slope = if x > 20.0 { 1.0 } else { math::sigmoid(x) };
            let slope = if y < low { 0.0 } else { slope };
            *o = if y > high { 0.0 } else { slope };
        }
    }

    fn decays(from_start: &mut [f32], to_end: &mut [f32], cum: &[f32], sum: f32) {
        for ((f, e), &c) in from_start.iter_mut().zip(to_end).zip(cum) {
            *f = math::exp(c);
            *e = math::exp(sum - c);
        }
    }

    /// `out[i,:] = scale[i] x[i,:]`.
    fn scale_rows(out: &mut [f32], ld_out: usize, x: &[f32], ld_x: usize, scale: &[f32], width: usize) {
        for (i, &s) in scale.iter().enumerate() {
            for (o, &v) in out[i * ld_out..][..width].iter_mut().zip(&x[i * ld_x..][..width]) {
                *o = s * v;
            }
        }
    }

    fn scale_all(x: &mut [f32], c: f32) {
        for v in x {
            *v *= c;
        }
    }

    /// `M[t,s] = G[t,s] exp(cum[t] - cum[s])` for s in first[t]..=t, else 0; rows `ld` apart.
    fn decay_mask(m: &mut [f32], ld: usize, g: &[f32], ld_g: usize, cum: &[f32], first: &[usize]) {
        let q = cum.len();
        for t in 0..q {
            let row = &mut m[t * ld..][..q];
            row[..first[t]].fill(0.0);
            row[t + 1..].fill(0.0);
            let g = &g[t * ld_g..][..q];
            let c = cum[t];
            for ((m, &g), &cs) in row[first[t]..=t].iter_mut().zip(&g[first[t]..=t]).zip(&cum[first[t]..=t]) {
                *m = g * math::exp(c - cs);
            }
        }
    }

    /// `y[t,:] = x[t,:] d + y`.
    fn axpy_rows(y: &mut [f32], x: &[f32], d: f32) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = d.mul_add(x, *y);
        }
    }

    fn turn(dst: &mut [f32], ld_dst: usize, src: &[f32], ld_src: usize, rows: usize, cols: usize) {
        transpose(dst, ld_dst, src, ld_src, rows, cols);
    }

    /// From `dM` and `G`: `M` (as [`decay_mask`]), `dG += dM o L`, and the row sums of `dM o M` into `rows`.
    fn decay_mask_bwd(m: &mut [f32], dg: &mut [f32], dm: &[f32], g: &[f32], ld: usize, cum: &[f32], first: &[usize], rows: &mut [f32]) {
        let q = cum.len();
        for t in 0..q {
            let row = &mut m[t * ld..][..q];
            row[..first[t]].fill(0.0);
            row[t + 1..].fill(0.0);
            let span = first[t]..t + 1;
            let (row, dg) = (&mut row[span.clone()], &mut dg[t * ld..][span.clone()]);
            let (dm, g, cs) = (&dm[t * ld..][span.clone()], &g[t * ld..][span.clone()], &cum[span]);
            let c = cum[t];
            let len = row.len();
            let (dg, dm, g, cs) = (&mut dg[..len], &dm[..len], &g[..len], &cs[..len]);
            for i in 0..len {
                let l = math::exp(c - cs[i]);
                row[i] = g[i] * l;
                dg[i] = dm[i].mul_add(l, dg[i]);
            }
            rows[t] = dot(dm, row);
        }
    }

    /// `acc[i,:] += scale[i] x[i,:]`, `dots[i] = scale[i] x[i,:] . with[i,:]`.
    fn gather_rows(acc: &mut [f32], x: &[f32], n: usize, scale: &[f32], with: &[f32], ld_with: usize, dots: &mut [f32]) {
        for (i, (&s, dots)) in scale.iter().zip(dots).enumerate() {
            let x = &x[i * n..][..n];
            *dots = s * dot(x, &with[i * ld_with..][..n]);
            for (a, &v) in acc[i * n..][..n].iter_mut().zip(x) {
                *a = s.mul_add(v, *a);
            }
        }
    }

    fn dot_all(x: &[f32], y: &[f32]) -> f32 {
        dot(x, y)
    }

    /// `dx = dt dxd + d dy`; returns `(x . dxd, x . dy)`.
    fn dx_row(dx: &mut [f32], dxd: &[f32], dy: &[f32], x: &[f32], dt: f32, d: f32) -> (f32, f32) {
        for ((o, &a), &b) in dx.iter_mut().zip(dxd).zip(dy) {
            *o = d.mul_add(b, dt * a);
        }
        (dot(x, dxd), dot(x, dy))
    }

    fn add_to(out: &mut [f32], x: &[f32]) {
        for (o, &v) in out.iter_mut().zip(x) {
            *o += v;
        }
    }

    /// One token: `S[p,:] = keep S[p,:] + xd[p] b`, `y[p] = S[p,:] . c + d x[p]`.
    fn step(state: &mut [f32], y: &mut [f32], x: &[f32], b: &[f32], c: &[f32], keep: f32, dt: f32, d: f32) {
        let n = b.len();
        for ((row, y), &x) in state.chunks_exact_mut(n).zip(y).zip(x) {
            let xd = dt * x;
            for (s, &b) in row.iter_mut().zip(b) {
                *s = keep.mul_add(*s, xd * b);
            }
            *y = d.mul_add(x, dot(row, c));
        }
    }
}

/// Forward.
pub(super) fn ssd(op: &op::Ssd, a: &Args, r: &mut Results, cx: &Cx) {
    let f = In::new(op, a);
    let y = r.take_f(0);
    let state = r.take_f(1);
    if y.is_empty() {
        return;
    }
    let carried = a.has(8);
    if carried && f.t < STEP_TOKENS {
        return steps(&f, y, state, cx);
    }
    let outs = tiles(y, f.h * f.p, f.hb * f.p, f.t);
    if carried {
        let items: Vec<_> = outs
            .into_iter()
            .zip(state.chunks_mut(f.hb * f.p * f.n))
            .collect();
        cx.for_each(items, |i, (mut y, state), scratch| {
            forward(&f, i, &mut y, States::Carried(state), scratch);
        });
    } else {
        let chunks = f.t.div_ceil(f.chunk);
        let width = f.hb * f.p * f.n;
        let items: Vec<_> = outs
            .into_iter()
            .zip(tiles(state, f.h * f.p * f.n, width, chunks))
            .collect();
        cx.for_each(items, |i, (mut y, saved), scratch| {
            forward(&f, i, &mut y, States::Saved(saved), scratch);
        });
    }
}

/// Where a task's states go.
enum States<'a> {
    /// `[hb P N]`, in and out.
    Carried(&'a mut [f32]),
    /// Row c: `[hb P N]` before chunk c.
    Saved(Columns<'a>),
}

fn forward(f: &In, task: usize, y: &mut Columns, mut states: States, scratch: &mut Scratch) {
    let (b, h0, g) = f.task(task);
    let (p, n, q_max) = (f.p, f.n, f.chunk);
    let (ld_a, stack) = (n + q_max, (n + q_max) * p);
    // `right` holds for each head the state [N P] and below it xd [Q P].
    let [
        bt,
        gm,
        left,
        right,
        wb,
        out,
        raw,
        dt,
        cum,
        from_start,
        to_end,
    ] = scratch.split([
        n * q_max,
        q_max * q_max,
        q_max * ld_a,
        f.hb * stack,
        q_max * n,
        q_max * p,
        q_max,
        q_max,
        q_max,
        q_max,
        q_max,
    ]);
    let mut s = Steps {
        raw,
        dt,
        cum,
        from_start,
        to_end,
        keep: 0.0,
        open: 0,
        last: 0,
    };
    for hi in 0..f.hb {
        let into = &mut right[hi * stack..][..n * p];
        match &states {
            States::Carried(state) => turn(into, p, &state[hi * p * n..], n, p, n),
            States::Saved(_) => into.fill(0.0),
        }
    }
    let mut first = Vec::with_capacity(q_max);
    let chunks = f.t.div_ceil(q_max);
    for c in 0..chunks {
        let t0 = c * q_max;
        let q = q_max.min(f.t - t0);
        let row0 = b * f.t + t0;
        let ld = f.g * n;
        let (bm, cm) = (&f.bm[row0 * ld + g * n..], &f.cm[row0 * ld + g * n..]);
        turn(bt, q_max, bm, ld, q, n);
        product(
            gm,
            q_max,
            Left::rows(cm, ld),
            bt,
            q_max,
            (q, q, n),
            Part::Lower,
            false,
        );
        (s.open, s.last) = f.documents(b, t0, q, &mut first);
        for hi in 0..f.hb {
            let h = h0 + hi;
            f.steps(b, h, t0, q, &mut s);
            let right = &mut right[hi * stack..][..stack];
            if let States::Saved(saved) = &mut states {
                turn(&mut saved.row(c)[hi * p * n..][..p * n], n, right, p, n, p);
            }
            let x = &f.x[(row0 * f.h + h) * p..];
            scale_rows(&mut right[n * p..], p, x, f.h * p, &s.dt[..q], p);
            scale_rows(left, ld_a, cm, ld, &s.from_start[..q], n);
            decay_mask(&mut left[n..], ld_a, gm, q_max, &s.cum[..q], &first);
            product(
                out,
                p,
                Left::rows(left, ld_a),
                right,
                p,
                (q, p, n + q),
                Part::LeftLower(n),
                false,
            );
            let d = f.d.map_or(0.0, |d| d[h]);
            for i in 0..q {
                let y = &mut y.row(t0 + i)[hi * p..][..p];
                y.copy_from_slice(&out[i * p..][..p]);
                if f.d.is_some() {
                    axpy_rows(y, &x[i * f.h * p..][..p], d);
                }
            }
            if c + 1 < chunks || matches!(states, States::Carried(_)) {
                scale_rows(wb, n, bm, ld, &s.to_end[..q], n);
                let (state, xd) = right.split_at_mut(n * p);
                scale_all(state, s.keep);
                product(
                    state,
                    p,
                    Left::transposed(wb, n),
                    xd,
                    p,
                    (n, p, q),
                    Part::Full,
                    true,
                );
            }
        }
    }
    if let States::Carried(state) = &mut states {
        for hi in 0..f.hb {
            turn(
                &mut state[hi * p * n..][..p * n],
                n,
                &right[hi * stack..],
                p,
                n,
                p,
            );
        }
    }
}

/// The recurrence, token by token.
fn steps(f: &In, y: &mut [f32], state: &mut [f32], cx: &Cx) {
    let items: Vec<_> = tiles(y, f.h * f.p, f.hb * f.p, f.t)
        .into_iter()
        .zip(state.chunks_mut(f.hb * f.p * f.n))
        .collect();
    cx.for_each(items, |i, (mut y, state), _| {
        let (b, h0, g) = f.task(i);
        for (hi, state) in state.chunks_mut(f.p * f.n).enumerate() {
            let h = h0 + hi;
            for t in 0..f.t {
                let row = b * f.t + t;
                let mut dt = [0.0];
                softplus(
                    &mut dt,
                    &[f.dt[row * f.h + h] + f.bias.map_or(0.0, |v| v[h])],
                    f.limit.0,
                    f.limit.1,
                );
                if f.pos.is_some_and(|p| p[row] == 0) {
                    state.fill(0.0);
                }
                let at = (row * f.g + g) * f.n;
                step(
                    state,
                    &mut y.row(t)[hi * f.p..][..f.p],
                    &f.x[(row * f.h + h) * f.p..][..f.p],
                    &f.bm[at..][..f.n],
                    &f.cm[at..][..f.n],
                    exp1(dt[0] * f.av[h]),
                    dt[0],
                    f.d.map_or(0.0, |d| d[h]),
                );
            }
        }
    });
}

/// What a backward task writes.
struct Grads<'a> {
    dx: Columns<'a>,
    ddt: Columns<'a>,
    /// Partial over the task's heads: `[T N]`.
    db: &'a mut [f32],
    dc: &'a mut [f32],
    /// Partial over time, per head: da, dd, dbias.
    heads: &'a mut [f32],
}

/// Backward.
pub(super) fn ssd_bwd(op: &op::SsdBwd, a: &Args, r: &mut Results, cx: &Cx) {
    let f = In::new(&op.of, a);
    let (saved, dy) = (a.f(8), a.f(9));
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
    if f.b * f.t == 0 {
        da.fill(0.0);
        dd.into_iter().chain(dbias).for_each(|v| v.fill(0.0));
        return;
    }
    let tasks = f.b * f.blocks();
    let mut shared = cx.shared();
    let [dbs, dcs, heads] = shared.split([tasks * f.t * f.n, tasks * f.t * f.n, tasks * f.hb * 3]);
    let items: Vec<_> = tiles(dx, f.h * f.p, f.hb * f.p, f.t)
        .into_iter()
        .zip(tiles(ddt, f.h, f.hb, f.t))
        .zip(dbs.chunks_mut(f.t * f.n))
        .zip(dcs.chunks_mut(f.t * f.n))
        .zip(heads.chunks_mut(f.hb * 3))
        .map(|((((dx, ddt), db), dc), heads)| Grads {
            dx,
            ddt,
            db,
            dc,
            heads,
        })
        .collect();
    cx.for_each(items, |i, grads, scratch| {
        backward(&f, i, grads, saved, dy, scratch)
    });
    // Sums over the tasks of a group and over the batch, in task order.
    let per_group = f.blocks() / f.g;
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
    for (k, out) in [(0, Some(da)), (1, dd), (2, dbias)] {
        for (h, out) in out.into_iter().flatten().enumerate() {
            *out = (0..f.b).map(|b| heads[(b * f.h + h) * 3 + k]).sum();
        }
    }
}

fn backward(f: &In, task: usize, mut out: Grads, saved: &[f32], dy: &[f32], scratch: &mut Scratch) {
    let (b, h0, g) = f.task(task);
    let (p, n, q_max) = (f.p, f.n, f.chunk);
    let ld = f.g * n;
    let left_len = (q_max + n) * q_max;
    let right_len = (q_max + n) * p;
    // Of each head `right` holds dy [Q P] and below it the gradient of the state after the chunk [N P].
    let [bt, gm, dg, dm, left, right, xd, xdt, dst, dxd, offs, ec] = scratch.split([
        n * q_max,
        q_max * q_max,
        q_max * q_max,
        q_max * q_max,
        left_len,
        f.hb * right_len,
        q_max * p,
        p * q_max,
        p * n,
        q_max * p,
        q_max * n,
        q_max * n,
    ]);
    let mut vectors = vec![0.0f32; 9 * q_max];
    let mut parts = vectors.chunks_mut(q_max);
    let mut part = || parts.next().unwrap_or_default();
    let (rows, dots, dcum, slope) = (part(), part(), part(), part());
    let mut s = Steps {
        raw: part(),
        dt: part(),
        cum: part(),
        from_start: part(),
        to_end: part(),
        keep: 0.0,
        open: 0,
        last: 0,
    };
    let mut first = Vec::with_capacity(q_max);
    out.heads.fill(0.0);
    let chunks = f.t.div_ceil(q_max);
    for c in (0..chunks).rev() {
        let t0 = c * q_max;
        let q = q_max.min(f.t - t0);
        let last_chunk = c + 1 == chunks;
        let row0 = b * f.t + t0;
        let (bm, cm) = (&f.bm[row0 * ld + g * n..], &f.cm[row0 * ld + g * n..]);
        turn(bt, q_max, bm, ld, q, n);
        product(
            gm,
            q_max,
            Left::rows(cm, ld),
            bt,
            q_max,
            (q, q, n),
            Part::Lower,
            false,
        );
        dg.fill(0.0);
        let (dbc, dcc) = (
            &mut out.db[t0 * n..][..q * n],
            &mut out.dc[t0 * n..][..q * n],
        );
        dbc.fill(0.0);
        dcc.fill(0.0);
        (s.open, s.last) = f.documents(b, t0, q, &mut first);
        for hi in 0..f.hb {
            let h = h0 + hi;
            f.steps(b, h, t0, q, &mut s);
            let x = &f.x[(row0 * f.h + h) * p..];
            let dy = &dy[(row0 * f.h + h) * p..];
            let state = &saved[((b * chunks + c) * f.h + h) * p * n..][..p * n];
            let (right_dy, dstate) = right[hi * right_len..][..right_len].split_at_mut(q_max * p);
            for i in 0..q {
                right_dy[i * p..][..p].copy_from_slice(&dy[i * f.h * p..][..p]);
            }
            scale_rows(xd, p, x, f.h * p, &s.dt[..q], p);
            turn(xdt, q_max, xd, p, q, p);
            product(
                dm,
                q_max,
                Left::rows(right_dy, p),
                xdt,
                q_max,
                (q, q, p),
                Part::Lower,
                false,
            );
            decay_mask_bwd(left, dg, dm, gm, q_max, &s.cum[..q], &first, rows);
            // What the state before the chunk did to y.
            product(
                offs,
                n,
                Left::rows(right_dy, p),
                state,
                n,
                (q, n, p),
                Part::Full,
                false,
            );
            gather_rows(dcc, offs, n, &s.from_start[..q], cm, ld, dots);
            for i in 0..q {
                dcum[i] = rows[i] + dots[i];
            }
            if last_chunk {
                product(
                    dxd,
                    p,
                    Left::transposed(left, q_max),
                    right_dy,
                    p,
                    (q, p, q),
                    Part::LeftUpper,
                    false,
                );
            } else {
                // Chunks before the last are whole: dy fills its rows, the state's gradient lies right below.
                for i in 0..n {
                    for ((o, &v), &w) in left[(q + i) * q_max..][..q]
                        .iter_mut()
                        .zip(&bt[i * q_max..][..q])
                        .zip(&s.to_end[..q])
                    {
                        *o = v * w;
                    }
                }
                turn(dst, n, dstate, p, n, p);
                product(
                    offs,
                    n,
                    Left::rows(xd, p),
                    dst,
                    n,
                    (q, n, p),
                    Part::Full,
                    false,
                );
                gather_rows(dbc, offs, n, &s.to_end[..q], bm, ld, dots);
                let stacked = &right[hi * right_len..][..right_len];
                product(
                    dxd,
                    p,
                    Left::transposed(left, q_max),
                    stacked,
                    p,
                    (q, p, q + n),
                    Part::LeftUpper,
                    false,
                );
                dcum[q - 1] += dots[..q].iter().sum::<f32>() + s.keep * dot_all(dst, state);
            }
            if c > 0 {
                let (right_dy, dstate) =
                    right[hi * right_len..][..right_len].split_at_mut(q_max * p);
                if last_chunk {
                    dstate.fill(0.0);
                } else {
                    scale_all(dstate, s.keep);
                }
                scale_rows(ec, n, cm, ld, &s.from_start[..q], n);
                product(
                    dstate,
                    p,
                    Left::transposed(ec, n),
                    right_dy,
                    p,
                    (n, p, q),
                    Part::Full,
                    true,
                );
            }
            let d = f.d.map_or(0.0, |d| d[h]);
            let (mut sum_d, mut sum_bias, mut sum_a) = (0.0, 0.0, 0.0);
            for i in 0..q {
                let row = &mut out.dx.row(t0 + i)[hi * p..][..p];
                let (xdxd, xdy) = dx_row(
                    row,
                    &dxd[i * p..][..p],
                    &dy[i * f.h * p..][..p],
                    &x[i * f.h * p..][..p],
                    s.dt[i],
                    d,
                );
                dcum[i] -= s.dt[i] * xdxd;
                dots[i] = xdxd;
                sum_d += xdy;
            }
            softplus_slope(&mut slope[..q], &s.raw[..q], f.limit.0, f.limit.1);
            let mut dsum = 0.0;
            for i in (0..q).rev() {
                // cum[i..] all hold dt'[i] a; a document's first token has nothing to decay.
                dsum += dcum[i];
                let reset = f.pos.is_some_and(|pos| pos[row0 + i] == 0);
                let da = if reset { 0.0 } else { dsum };
                sum_a += da * s.dt[i];
                let step = dots[i] + da * f.av[h];
                let grad = slope[i] * step;
                sum_bias += grad;
                out.ddt.row(t0 + i)[hi] = grad;
            }
            for (o, v) in out.heads[hi * 3..].iter_mut().zip([sum_a, sum_d, sum_bias]) {
                *o += v;
            }
        }
        product(
            dcc,
            n,
            Left::rows(dg, q_max),
            bm,
            ld,
            (q, n, q),
            Part::LeftLower(0),
            true,
        );
        product(
            dbc,
            n,
            Left::transposed(dg, q_max),
            cm,
            ld,
            (q, n, q),
            Part::LeftUpper,
            true,
        );
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
        h: usize,
        p: usize,
        g: usize,
        n: usize,
    }

    const LIMIT: (f64, f64) = (0.05, 1.2);

    /// Token by token. Arguments x, dt, a, b, c, d, dt_bias (empty: absent), state.
    fn reference(
        s: Shape,
        limit: (f64, f64),
        v: &[Vec<f64>],
        pos: Option<&[i32]>,
        state: &mut [f64],
    ) -> Vec<f64> {
        let mut y = vec![0.0; s.b * s.t * s.h * s.p];
        for b in 0..s.b {
            for t in 0..s.t {
                let row = b * s.t + t;
                for h in 0..s.h {
                    let g = h / (s.h / s.g);
                    let raw = v[1][row * s.h + h] + v[6].get(h).unwrap_or(&0.0);
                    let dt = if raw > 20.0 { raw } else { raw.exp().ln_1p() };
                    let dt = dt.clamp(limit.0, limit.1);
                    let decay = (dt * v[2][h]).exp();
                    for p in 0..s.p {
                        let x = v[0][(row * s.h + h) * s.p + p];
                        let mut sum = v[5].get(h).unwrap_or(&0.0) * x;
                        for n in 0..s.n {
                            let st = &mut state[((b * s.h + h) * s.p + p) * s.n + n];
                            if pos.is_some_and(|q| q[row] == 0) {
                                *st = 0.0;
                            }
                            *st = decay * *st + dt * x * v[3][(row * s.g + g) * s.n + n];
                            sum += *st * v[4][(row * s.g + g) * s.n + n];
                        }
                        y[(row * s.h + h) * s.p + p] = sum;
                    }
                }
            }
        }
        y
    }

    fn values(s: Shape, optional: bool) -> Vec<Vec<f32>> {
        let bt = s.b * s.t;
        let mut dt = noise(2, bt * s.h, 2.0);
        if bt > 3 {
            dt[3] = 25.0;
        }
        vec![
            noise(1, bt * s.h * s.p, 1.0),
            dt,
            noise(3, s.h, 0.7).iter().map(|v| v - 0.8).collect(),
            noise(4, bt * s.g * s.n, 1.0),
            noise(5, bt * s.g * s.n, 1.0),
            if optional { noise(6, s.h, 1.0) } else { vec![] },
            if optional { noise(7, s.h, 1.0) } else { vec![] },
        ]
    }

    fn args(s: Shape, v: &[Vec<f32>], pos: Option<&[i32]>) -> Vec<Arg> {
        let (b, t, h, p, g, n) = (s.b, s.t, s.h, s.p, s.g, s.n);
        let opt = |x: &Vec<f32>| (!x.is_empty()).then(|| floats(dims![H h], x)).flatten();
        vec![
            floats(dims![B b, T t, H h, P p], &v[0]),
            floats(dims![B b, T t, H h], &v[1]),
            floats(dims![H h], &v[2]),
            floats(dims![B b, T t, G g, N n], &v[3]),
            floats(dims![B b, T t, G g, N n], &v[4]),
            opt(&v[5]),
            opt(&v[6]),
            pos.and_then(|x| ints(dims![B b, T t], x)),
        ]
    }

    fn op(chunk: usize, limit: (f64, f64)) -> op::Ssd {
        op::Ssd {
            chunk,
            dt_limit: limit,
        }
    }

    const NONE: (f64, f64) = (0.0, f64::INFINITY);

    #[test]
    fn follows_the_recurrence_for_any_chunk() {
        for t in [1, 2, 63, 65, 300] {
            for (s, optional) in [
                (
                    Shape {
                        b: 2,
                        t,
                        h: 4,
                        p: 5,
                        g: 2,
                        n: 3,
                    },
                    true,
                ),
                (
                    Shape {
                        b: 1,
                        t,
                        h: 2,
                        p: 16,
                        g: 1,
                        n: 16,
                    },
                    false,
                ),
            ] {
                let v = values(s, optional);
                let w: Vec<_> = v.iter().map(|x| wide(x)).collect();
                for pos in [None, Some(positions(s.b, t, 2, &[5, 40, 1, 70]))] {
                    let limit = if optional { LIMIT } else { NONE };
                    let mut state = vec![0.0; s.b * s.h * s.p * s.n];
                    let want = reference(s, limit, &w, pos.as_deref(), &mut state);
                    for chunk in [1, 7, 64, 1000] {
                        let got = run(&op(chunk, limit), &args(s, &v, pos.as_deref()), ssd);
                        close("y", &got[0], &want, 2e-5);
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
            t: 75,
            h: 4,
            p: 8,
            g: 2,
            n: 9,
        };
        let v = values(s, true);
        let w: Vec<_> = v.iter().map(|x| wide(x)).collect();
        let begin = noise(9, s.b * s.h * s.p * s.n, 1.0);
        for pos in [None, Some(positions(s.b, s.t, 3, &[30, 11]))] {
            let mut want_state = wide(&begin);
            let want = reference(s, NONE, &w, pos.as_deref(), &mut want_state);
            for cuts in [vec![0, 75], vec![0, 20, 21, 60, 75], (0..=75).collect()] {
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
                    let widths = [s.h * s.p, s.h, 0, s.g * s.n, s.g * s.n, 0, 0];
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
                    a.push(floats(dims![B s.b, H s.h, P s.p, N s.n], &state));
                    let got = run(&op(16, NONE), &a, ssd);
                    let want: Vec<f64> = want
                        .chunks(s.t * widths[0])
                        .flat_map(|r| r[cut[0] * widths[0]..cut[1] * widths[0]].to_vec())
                        .collect();
                    close("y", &got[0], &want, 2e-5);
                    state.copy_from_slice(&got[1]);
                }
                close("state", &state, &want_state, 2e-5);
            }
        }
    }

    #[test]
    fn gradients_match_differences() {
        for (t, chunk, optional, packed) in [
            (1, 64, true, false),
            (2, 1, false, true),
            (23, 8, true, true),
            (65, 64, true, false),
            (63, 16, false, true),
            (70, 16, true, true),
        ] {
            let s = Shape {
                b: 2,
                t,
                h: 4,
                p: 3,
                g: 2,
                n: 5,
            };
            let limit = if optional { LIMIT } else { NONE };
            let v = values(s, optional);
            let pos = packed.then(|| positions(s.b, t, 4, &[9, 20, 1]));
            let dy = noise(8, v[0].len(), 1.0);
            let mut a = args(s, &v, pos.as_deref());
            let fwd = run(&op(chunk, limit), &a, ssd);
            a.push(floats(
                dims![B s.b, C t.div_ceil(chunk), H s.h, P s.p, N s.n],
                &fwd[1],
            ));
            a.push(floats(dims![B s.b, T t, H s.h, P s.p], &dy));
            let got = run(
                &op::SsdBwd {
                    of: op(chunk, limit),
                },
                &a,
                ssd_bwd,
            );
            let loss = |w: &[Vec<f64>]| -> f64 {
                let y = reference(
                    s,
                    limit,
                    w,
                    pos.as_deref(),
                    &mut vec![0.0; s.b * s.h * s.p * s.n],
                );
                y.iter().zip(&dy).map(|(y, &d)| y * f64::from(d)).sum()
            };
            let w: Vec<_> = v.iter().map(|x| wide(x)).collect();
            for (k, name) in ["dx", "ddt", "da", "db", "dc", "dd", "ddt_bias"]
                .iter()
                .enumerate()
                .take(got.len())
            {
                gradient(name, loss, &w, k, &got[k], 60, 5e-5);
            }
        }
    }
}
