//! Gated delta rule: see `ir/src/op/gated_delta.rs` for the equations and the table.
//!
//! The columns of a head's state `[N P]` never meet: each is a recurrence of its own under shared k, q, g and beta. So [`L`] columns are
//! the vector lanes and the state of a lane block stays in the first cache; the recurrence itself runs near the rate of matrix
//! products, so there is no chunked form. Backward recomputes the states inside a chunk from the saved one, keeps them, and runs
//! time backwards; a task owns a key head with its value heads, so sums over heads (dq, dk) need no second pass.

use super::math;
use super::simd::simd;
use super::tensor::{Args, Columns, Cx, Results, Scratch, tiles};
use marimba_ir::op;

/// Columns of the state processed together.
const L: usize = 16;

type Lanes = [f32; L];

/// Everything the tasks read.
struct In<'a> {
    t: usize,
    g: usize,
    h: usize,
    n: usize,
    p: usize,
    chunk: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    gate: &'a [f32],
    beta: &'a [f32],
    pos: Option<&'a [i32]>,
}

impl<'a> In<'a> {
    fn new(op: &op::GatedDelta, a: &Args<'a>) -> Self {
        let (q, v) = (a.ty(0), a.ty(2));
        In {
            t: q.size(1),
            g: q.size(2),
            h: v.size(2),
            n: q.size(3),
            p: v.size(3),
            chunk: op.chunk.min(q.size(1)).max(1),
            q: a.f(0),
            k: a.f(1),
            v: a.f(2),
            gate: a.f(3),
            beta: a.f(4),
            pos: a.opt_i(5),
        }
    }

    /// The token in row `row` of [B T] as head h sees it, with columns from p0.
    fn token(&self, row: usize, h: usize, p0: usize) -> Token<'a> {
        let key = (row * self.g + h / (self.h / self.g)) * self.n;
        let mut v = [0.0; L];
        let used = L.min(self.p - p0);
        v[..used].copy_from_slice(&self.v[(row * self.h + h) * self.p + p0..][..used]);
        let fresh = self.pos.is_some_and(|p| p[row] == 0);
        Token {
            q: &self.q[key..][..self.n],
            k: &self.k[key..][..self.n],
            v,
            // Before a document there is nothing: a decay of 0 forgets it.
            keep: if fresh {
                0.0
            } else {
                math::exp(self.gate[row * self.h + h])
            },
            beta: self.beta[row * self.h + h],
        }
    }
}

/// One token, one head, one lane block.
struct Token<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: Lanes,
    keep: f32,
    beta: f32,
}

/// `sum_n x[n] s[n]` in two interleaved sums.
#[inline(always)]
fn read(x: &[f32], s: &[Lanes]) -> Lanes {
    let mut acc = [[0.0f32; L]; 2];
    let (xs, ss) = (x.chunks_exact(2), s.chunks_exact(2));
    for (x, s) in xs.remainder().iter().zip(ss.remainder()) {
        for l in 0..L {
            acc[0][l] = x.mul_add(s[l], acc[0][l]);
        }
    }
    for (x, s) in xs.zip(ss) {
        for l in 0..L {
            acc[0][l] = x[0].mul_add(s[0][l], acc[0][l]);
            acc[1][l] = x[1].mul_add(s[1][l], acc[1][l]);
        }
    }
    std::array::from_fn(|l| acc[0][l] + acc[1][l])
}

/// Sum over lanes, as a tree.
#[inline(always)]
fn fold(x: Lanes) -> f32 {
    let mut x = x;
    let mut n = L / 2;
    while n > 0 {
        for i in 0..n {
            x[i] += x[i + n];
        }
        n /= 2;
    }
    x[0]
}

simd! {
    /// Advances the state by one token in place; returns `v - S'^T k` and o.
    fn advance(s: &mut [Lanes], token: &Token<'_>) -> (Lanes, Lanes) {
        for s in s.iter_mut() {
            for l in 0..L {
                s[l] *= token.keep;
            }
        }
        let seen = read(token.k, s);
        let error: Lanes = std::array::from_fn(|l| token.v[l] - seen[l]);
        for (s, &k) in s.iter_mut().zip(token.k) {
            let write = k * token.beta;
            for l in 0..L {
                s[l] = write.mul_add(error[l], s[l]);
            }
        }
        (error, read(token.q, s))
    }

    /// One token backwards: `ds` is the gradient of the state after the token, then of the state before it. Adds to dq and dk; returns
    /// dv and the sums over lanes for dg and dbeta.
    fn retreat(
        ds: &mut [Lanes], before: &[Lanes], after: &[Lanes], token: &Token<'_>, error: &Lanes, dout: &Lanes,
        dq: &mut [f32], dk: &mut [f32],
    ) -> (Lanes, f32, f32) {
        let n = token.k.len();
        let (ds, before, after, dq, dk) = (&mut ds[..n], &before[..n], &after[..n], &mut dq[..n], &mut dk[..n]);
        for i in 0..n {
            for l in 0..L {
                ds[i][l] = token.q[i].mul_add(dout[l], ds[i][l]);
            }
        }
        let dwrite = read(token.k, ds);
        let dv: Lanes = std::array::from_fn(|l| token.beta * dwrite[l]);
        let mut dbeta = [0.0; L];
        for l in 0..L {
            dbeta[l] = dwrite[l] * error[l];
        }
        let mut dg = [0.0; L];
        for i in 0..n {
            let (mut of_q, mut of_k) = ([0.0; L], [0.0; L]);
            for l in 0..L {
                of_q[l] = after[i][l] * dout[l];
                // dS (outer) beta error, less S' (outer) dv.
                let decayed = token.keep * before[i][l];
                of_k[l] = (token.beta * ds[i][l]) * error[l] - decayed * dv[l];
                ds[i][l] = (-token.k[i]).mul_add(dv[l], ds[i][l]);
                dg[l] = decayed.mul_add(ds[i][l], dg[l]);
                ds[i][l] *= token.keep;
            }
            dq[i] += fold(of_q);
            dk[i] += fold(of_k);
        }
        (dv, fold(dg), fold(dbeta))
    }
}

/// Floats as rows of lanes.
fn lanes(x: &mut [f32]) -> &mut [Lanes] {
    x.as_chunks_mut::<L>().0
}

/// Columns from p0 of a state `[N P]` into lanes; unused lanes 0.
fn load(x: &[f32], p: usize, p0: usize, out: &mut [Lanes]) {
    let used = L.min(p - p0);
    for (row, o) in x.chunks_exact(p).zip(out) {
        *o = [0.0; L];
        o[..used].copy_from_slice(&row[p0..][..used]);
    }
}

/// The reverse of [`load`].
fn store(x: &mut [f32], p: usize, p0: usize, lanes: &[Lanes]) {
    let used = L.min(p - p0);
    for (row, s) in x.chunks_exact_mut(p).zip(lanes) {
        row[p0..][..used].copy_from_slice(&s[..used]);
    }
}

/// Forward.
pub(super) fn gated_delta(op: &op::GatedDelta, a: &Args, r: &mut Results, cx: &Cx) {
    let f = In::new(op, a);
    let (out, state) = (r.take_f(0), r.take_f(1));
    if out.is_empty() {
        return;
    }
    let size = f.n * f.p;
    let outs = tiles(out, f.h * f.p, f.p, f.t);
    if a.has(6) {
        let items: Vec<_> = outs.into_iter().zip(state.chunks_mut(size)).collect();
        cx.for_each(items, |i, (mut out, state), scratch| {
            forward(&f, i, &mut out, States::Carried(state), scratch);
        });
    } else {
        let saved = tiles(state, f.h * size, size, f.t.div_ceil(f.chunk));
        let items: Vec<_> = outs.into_iter().zip(saved).collect();
        cx.for_each(items, |i, (mut out, saved), scratch| {
            forward(&f, i, &mut out, States::Saved(saved), scratch);
        });
    }
}

/// Where a head's states go.
enum States<'a> {
    /// `[N P]`, in and out.
    Carried(&'a mut [f32]),
    /// Row c: `[N P]` before chunk c.
    Saved(Columns<'a>),
}

/// Task: one value head of one batch row.
fn forward(f: &In, task: usize, out: &mut Columns, mut states: States, scratch: &mut Scratch) {
    let (b, h) = (task / f.h, task % f.h);
    let s = lanes(scratch.f32(f.n * L));
    for p0 in (0..f.p).step_by(L) {
        let used = L.min(f.p - p0);
        match &states {
            States::Carried(state) => load(state, f.p, p0, s),
            States::Saved(_) => s.fill([0.0; L]),
        }
        for t in 0..f.t {
            if let States::Saved(saved) = &mut states
                && t % f.chunk == 0
            {
                store(saved.row(t / f.chunk), f.p, p0, s);
            }
            let (_, o) = advance(s, &f.token(b * f.t + t, h, p0));
            out.row(t)[p0..][..used].copy_from_slice(&o[..used]);
        }
        if let States::Carried(state) = &mut states {
            store(state, f.p, p0, s);
        }
    }
}

/// What a backward task writes.
struct Grads<'a> {
    dq: Columns<'a>,
    dk: Columns<'a>,
    dv: Columns<'a>,
    dg: Columns<'a>,
    dbeta: Columns<'a>,
}

/// Backward.
pub(super) fn gated_delta_bwd(op: &op::GatedDeltaBwd, a: &Args, r: &mut Results, cx: &Cx) {
    let f = In::new(&op.of, a);
    let (saved, dout) = (a.f(6), a.f(7));
    let (dq, dk, dv, dg, dbeta) = (
        r.take_f(0),
        r.take_f(1),
        r.take_f(2),
        r.take_f(3),
        r.take_f(4),
    );
    if f.t == 0 {
        return;
    }
    let hg = f.h / f.g;
    let items: Vec<_> = tiles(dq, f.g * f.n, f.n, f.t)
        .into_iter()
        .zip(tiles(dk, f.g * f.n, f.n, f.t))
        .zip(tiles(dv, f.h * f.p, hg * f.p, f.t))
        .zip(
            tiles(dg, f.h, hg, f.t)
                .into_iter()
                .zip(tiles(dbeta, f.h, hg, f.t)),
        )
        .map(|(((dq, dk), dv), (dg, dbeta))| Grads {
            dq,
            dk,
            dv,
            dg,
            dbeta,
        })
        .collect();
    cx.for_each(items, |i, grads, scratch| {
        backward(&f, i, grads, saved, dout, scratch)
    });
}

/// Task: one key head of one batch row, with its value heads.
fn backward(
    f: &In,
    task: usize,
    mut out: Grads,
    saved: &[f32],
    dout: &[f32],
    scratch: &mut Scratch,
) {
    let (b, g) = (task / f.g, task % f.g);
    let hg = f.h / f.g;
    let size = f.n * f.p;
    let chunks = f.t.div_ceil(f.chunk);
    for t in 0..f.t {
        out.dq.row(t).fill(0.0);
        out.dk.row(t).fill(0.0);
        out.dg.row(t).fill(0.0);
        out.dbeta.row(t).fill(0.0);
    }
    let [ds, states, errors] = scratch
        .split([f.n * L, (f.chunk + 1) * f.n * L, f.chunk * L])
        .map(lanes);
    for hi in 0..hg {
        let h = g * hg + hi;
        for p0 in (0..f.p).step_by(L) {
            let used = L.min(f.p - p0);
            ds.fill([0.0; L]);
            for c in (0..chunks).rev() {
                let t0 = c * f.chunk;
                let q = f.chunk.min(f.t - t0);
                load(
                    &saved[((b * chunks + c) * f.h + h) * size..][..size],
                    f.p,
                    p0,
                    &mut states[..f.n],
                );
                for t in 0..q {
                    let (old, new) = states[t * f.n..].split_at_mut(f.n);
                    new[..f.n].copy_from_slice(old);
                    (errors[t], _) = advance(&mut new[..f.n], &f.token(b * f.t + t0 + t, h, p0));
                }
                for t in (0..q).rev() {
                    let row = b * f.t + t0 + t;
                    let mut d = [0.0; L];
                    d[..used].copy_from_slice(&dout[(row * f.h + h) * f.p + p0..][..used]);
                    let (before, after) = states[t * f.n..].split_at(f.n);
                    let (dv, dg, dbeta) = retreat(
                        ds,
                        before,
                        after,
                        &f.token(row, h, p0),
                        &errors[t],
                        &d,
                        out.dq.row(t0 + t),
                        out.dk.row(t0 + t),
                    );
                    out.dv.row(t0 + t)[hi * f.p + p0..][..used].copy_from_slice(&dv[..used]);
                    out.dg.row(t0 + t)[hi] += dg;
                    out.dbeta.row(t0 + t)[hi] += dbeta;
                }
            }
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
        g: usize,
        h: usize,
        n: usize,
        p: usize,
    }

    impl Shape {
        fn widths(self) -> [usize; 5] {
            [
                self.g * self.n,
                self.g * self.n,
                self.h * self.p,
                self.h,
                self.h,
            ]
        }
    }

    /// Token by token. Arguments q, k, v, g, beta.
    fn reference(s: Shape, a: &[Vec<f64>], pos: Option<&[i32]>, state: &mut [f64]) -> Vec<f64> {
        let mut out = vec![0.0; s.b * s.t * s.h * s.p];
        for b in 0..s.b {
            for t in 0..s.t {
                let row = b * s.t + t;
                for h in 0..s.h {
                    let key = (row * s.g + h / (s.h / s.g)) * s.n;
                    let st = &mut state[(b * s.h + h) * s.n * s.p..][..s.n * s.p];
                    if pos.is_some_and(|p| p[row] == 0) {
                        st.fill(0.0);
                    }
                    for p in 0..s.p {
                        let mut seen = 0.0;
                        for n in 0..s.n {
                            st[n * s.p + p] *= a[3][row * s.h + h].exp();
                            seen += st[n * s.p + p] * a[1][key + n];
                        }
                        let at = (row * s.h + h) * s.p + p;
                        let write = a[4][row * s.h + h] * (a[2][at] - seen);
                        for n in 0..s.n {
                            st[n * s.p + p] += a[1][key + n] * write;
                            out[at] += st[n * s.p + p] * a[0][key + n];
                        }
                    }
                }
            }
        }
        out
    }

    fn values(s: Shape) -> Vec<Vec<f32>> {
        let bt = s.b * s.t;
        let scale = 1.0 / (s.n as f32).sqrt();
        vec![
            noise(1, bt * s.g * s.n, 1.0),
            noise(2, bt * s.g * s.n, 1.7 * scale),
            noise(3, bt * s.h * s.p, 1.0),
            noise(4, bt * s.h, 0.5).iter().map(|v| v - 0.5).collect(),
            noise(5, bt * s.h, 0.5).iter().map(|v| v + 0.5).collect(),
        ]
    }

    fn args(s: Shape, v: &[Vec<f32>], pos: Option<&[i32]>) -> Vec<Arg> {
        let (b, t, g, h, n, p) = (s.b, s.t, s.g, s.h, s.n, s.p);
        vec![
            floats(dims![B b, T t, G g, N n], &v[0]),
            floats(dims![B b, T t, G g, N n], &v[1]),
            floats(dims![B b, T t, H h, P p], &v[2]),
            floats(dims![B b, T t, H h], &v[3]),
            floats(dims![B b, T t, H h], &v[4]),
            pos.and_then(|x| ints(dims![B b, T t], x)),
        ]
    }

    #[test]
    fn follows_the_recurrence_and_differentiates() {
        for t in [1, 2, 63, 65, 300] {
            for (s, chunk) in [
                (
                    Shape {
                        b: 2,
                        t,
                        g: 2,
                        h: 4,
                        n: 5,
                        p: 3,
                    },
                    16,
                ),
                (
                    Shape {
                        b: 1,
                        t,
                        g: 1,
                        h: 1,
                        n: 8,
                        p: 20,
                    },
                    64,
                ),
                (
                    Shape {
                        b: 1,
                        t,
                        g: 1,
                        h: 2,
                        n: 4,
                        p: 16,
                    },
                    1,
                ),
            ] {
                let v = values(s);
                let w: Vec<_> = v.iter().map(|x| wide(x)).collect();
                for pos in [None, Some(positions(s.b, t, 2, &[5, 40, 1, 70]))] {
                    let zeros = vec![0.0; s.b * s.h * s.n * s.p];
                    let want = reference(s, &w, pos.as_deref(), &mut zeros.clone());
                    let mut a = args(s, &v, pos.as_deref());
                    let op = op::GatedDelta { chunk };
                    let got = run(&op, &a, gated_delta);
                    close("o", &got[0], &want, 5e-6);
                    if t == 300 {
                        continue;
                    }
                    let dout = noise(8, v[2].len(), 1.0);
                    a.push(floats(
                        dims![B s.b, C t.div_ceil(chunk), H s.h, N s.n, P s.p],
                        &got[1],
                    ));
                    a.push(floats(dims![B s.b, T t, H s.h, P s.p], &dout));
                    let got = run(&op::GatedDeltaBwd { of: op }, &a, gated_delta_bwd);
                    let loss = |w: &[Vec<f64>]| -> f64 {
                        let y = reference(s, w, pos.as_deref(), &mut zeros.clone());
                        y.iter().zip(&dout).map(|(y, &d)| y * f64::from(d)).sum()
                    };
                    for (k, name) in ["dq", "dk", "dv", "dg", "dbeta"].iter().enumerate() {
                        gradient(name, loss, &w, k, &got[k], 30, 2e-5);
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
            g: 2,
            h: 4,
            n: 5,
            p: 18,
        };
        let v = values(s);
        let w: Vec<_> = v.iter().map(|x| wide(x)).collect();
        let begin = noise(9, s.b * s.h * s.n * s.p, 1.0);
        for pos in [None, Some(positions(s.b, s.t, 3, &[30, 11]))] {
            let mut want_state = wide(&begin);
            let want = reference(s, &w, pos.as_deref(), &mut want_state);
            for cuts in [vec![0, 40], vec![0, 20, 21, 40], (0..=40).collect()] {
                let mut state = begin.clone();
                for cut in cuts.windows(2) {
                    let take = |x: &[f32], width: usize| -> Vec<f32> {
                        x.chunks(s.t * width)
                            .flat_map(|r| r[cut[0] * width..cut[1] * width].to_vec())
                            .collect()
                    };
                    let cut_v: Vec<Vec<f32>> =
                        v.iter().zip(s.widths()).map(|(x, w)| take(x, w)).collect();
                    let cut_pos: Option<Vec<i32>> = pos.as_ref().map(|p| {
                        p.chunks(s.t)
                            .flat_map(|r| r[cut[0]..cut[1]].to_vec())
                            .collect()
                    });
                    let mut a = args(
                        Shape {
                            t: cut[1] - cut[0],
                            ..s
                        },
                        &cut_v,
                        cut_pos.as_deref(),
                    );
                    a.push(floats(dims![B s.b, H s.h, N s.n, P s.p], &state));
                    let got = run(&op::GatedDelta { chunk: 16 }, &a, gated_delta);
                    let width = s.h * s.p;
                    let want: Vec<f64> = want
                        .chunks(s.t * width)
                        .flat_map(|r| r[cut[0] * width..cut[1] * width].to_vec())
                        .collect();
                    close("o", &got[0], &want, 5e-6);
                    state.copy_from_slice(&got[1]);
                }
                close("state", &state, &want_state, 5e-6);
            }
        }
    }
}
