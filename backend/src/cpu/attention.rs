//! Attention in blocks of [`BLOCK`] queries by [`BLOCK`] keys: see `ir/src/op/attention.rs` for the equations and the table.
//!
//! Forward: a task owns a block of queries of one head and walks the key blocks that any of them sees, with a running maximum and sum
//! (FlashAttention). Keys are transposed once per block for all queries and heads of a group. Backward: a task owns one or all heads of
//! a group of one batch row; per key block and query block it rebuilds the probabilities from `lse`, then `dv += P^T dout`,
//! `dS = P o (dout V^T - delta)`, `dk += dS^T q`, `dq += dS k`, with `delta = dout . out`. Blocks on the diagonal cost half.
//! Key/value heads are never copied per query head.
//!
//! Runs of fewer than [`STEP_TOKENS`] queries (decode) take dot products with the cache where it lies.

use super::math;
use super::panel::{Left, Part, product, transpose};
use super::simd::{axpy, dot, max, simd};
use super::tensor::{Args, Columns, Cx, Results, Scratch, tiles};
use marimba_ir::op;

/// Queries and keys of a block: two blocks of operands and one of scores fit the first two caches.
const BLOCK: usize = 64;

/// Below this many queries a block of keys is not worth transposing.
const STEP_TOKENS: usize = 8;

/// Tasks wanted in backward: enough for any desktop, and fixed, so that sums do not depend on threads.
const TASKS: usize = 16;

/// Everything the tasks read.
struct In<'a> {
    b: usize,
    t: usize,
    s: usize,
    h: usize,
    g: usize,
    p: usize,
    scale: f32,
    window: usize,
    slot: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    pos: Option<&'a [i32]>,
}

impl<'a> In<'a> {
    fn new(op: &op::Attention, a: &Args<'a>, slot: usize) -> Self {
        let (q, k) = (a.ty(0), a.ty(1));
        In {
            b: q.size(0),
            t: q.size(1),
            s: k.size(1),
            h: q.size(2),
            g: k.size(2),
            p: q.size(3),
            scale: op.scale as f32,
            window: op.window.unwrap_or(usize::MAX),
            slot,
            q: a.f(0),
            k: a.f(1),
            v: a.f(2),
            pos: a.opt_i(3),
        }
    }

    /// First key that query t of row b sees.
    fn first(&self, b: usize, t: usize) -> usize {
        let back = self
            .pos
            .map_or(usize::MAX, |p| p[b * self.t + t].max(0) as usize);
        (self.slot + t).saturating_sub(back.min(self.window.saturating_sub(1)))
    }

    /// One past the last key that query t sees.
    fn end(&self, t: usize) -> usize {
        (self.slot + t + 1).min(self.s)
    }

    /// First key that any of `n` queries from t0 sees.
    fn first_of(&self, b: usize, t0: usize, n: usize) -> usize {
        (t0..t0 + n).map(|t| self.first(b, t)).min().unwrap_or(0)
    }

    fn group(&self, h: usize) -> usize {
        h / (self.h / self.g)
    }

    /// Keys or values of group g of row b from slot s; rows are `g * p` apart.
    fn rows(&self, kv: &'a [f32], b: usize, s: usize, g: usize) -> &'a [f32] {
        &kv[((b * self.s + s) * self.g + g) * self.p..]
    }

    /// Key blocks with anything to see.
    fn key_blocks(&self) -> usize {
        if self.t == 0 {
            0
        } else {
            self.end(self.t - 1).div_ceil(BLOCK)
        }
    }
}

simd! {
    fn turn(dst: &mut [f32], ld_dst: usize, src: &[f32], ld_src: usize, rows: usize, cols: usize) {
        transpose(dst, ld_dst, src, ld_src, rows, cols);
    }

    fn scaled(out: &mut [f32], x: &[f32], c: f32) {
        for (o, &x) in out.iter_mut().zip(x) {
            *o = c * x;
        }
    }

    fn dot_rows(x: &[f32], y: &[f32]) -> f32 {
        dot(x, y)
    }

    fn add_to(out: &mut [f32], x: &[f32]) {
        for (o, &v) in out.iter_mut().zip(x) {
            *o += v;
        }
    }

    /// One row of scores into `e^(score - new maximum)`, zero outside `lo..hi`; updates maximum and sum, rescales the output row.
    fn soften(row: &mut [f32], lo: usize, hi: usize, state: &mut (f32, f32), out: &mut [f32]) {
        row[..lo].fill(0.0);
        row[hi..].fill(0.0);
        let row = &mut row[lo..hi];
        let top = max(row);
        let (old, sum) = *state;
        let new = if top > old { top } else { old };
        for v in row.iter_mut() {
            *v = math::exp(*v - new);
        }
        let fix = math::exp(old - new);
        *state = (new, fix.mul_add(sum, super::simd::sum(row)));
        if fix != 1.0 {
            for o in out {
                *o *= fix;
            }
        }
    }

    /// `P = e^(score - lse)` inside `lo..hi`, else 0, in place; `dS = P o (dP - delta)` in place of dP.
    fn soften_bwd(row: &mut [f32], dp: &mut [f32], lo: usize, hi: usize, lse: f32, delta: f32) {
        row[..lo].fill(0.0);
        row[hi..].fill(0.0);
        dp[..lo].fill(0.0);
        dp[hi..].fill(0.0);
        for (s, d) in row[lo..hi].iter_mut().zip(&mut dp[lo..hi]) {
            *s = math::exp(*s - lse);
            *d = *s * (*d - delta);
        }
    }

    /// One query against the keys and values of slots lo..hi, whose rows are `ld` apart from slot lo on. Returns the log-sum-exp.
    fn step(out: &mut [f32], q: &[f32], k: &[f32], v: &[f32], ld: usize, scale: f32, scores: &mut [f32]) -> f32 {
        let p = q.len();
        for (i, s) in scores.iter_mut().enumerate() {
            *s = scale * dot(q, &k[i * ld..][..p]);
        }
        let top = max(scores);
        for s in scores.iter_mut() {
            *s = math::exp(*s - top);
        }
        let sum = super::simd::sum(scores);
        out.fill(0.0);
        for (i, &s) in scores.iter().enumerate() {
            axpy(s / sum, &v[i * ld..][..p], out);
        }
        top + math::ln(sum)
    }
}

/// Forward.
pub(super) fn attention(op: &op::Attention, a: &Args, r: &mut Results, cx: &Cx) {
    let slot = a.opt_i(4).map_or(0, |s| s[0].max(0) as usize);
    let f = In::new(op, a, slot);
    let (out, lse) = (r.take_f(0), r.take_f(1));
    if out.is_empty() {
        lse.fill(f32::NEG_INFINITY);
        return;
    }
    if f.t < STEP_TOKENS {
        return steps(&f, out, lse, cx);
    }
    // Keys transposed: [B G blocks P BLOCK].
    let (blocks, size) = (f.key_blocks(), f.p * BLOCK);
    let ld = f.g * f.p;
    let mut shared = cx.shared();
    let kt = shared.f32(f.b * f.g * blocks * size);
    let seen = f.end(f.t - 1);
    cx.for_each(kt.chunks_mut(blocks * size).collect(), |i, kt, _| {
        for (j, kt) in kt.chunks_mut(size).enumerate() {
            let keys = BLOCK.min(seen - j * BLOCK);
            turn(
                kt,
                BLOCK,
                f.rows(f.k, i / f.g, j * BLOCK, i % f.g),
                ld,
                keys,
                f.p,
            );
        }
    });
    let kt = &*kt;
    let mut lses: Vec<_> = lse
        .chunks_mut(f.t)
        .map(|row| row.chunks_mut(BLOCK))
        .collect();
    let mut items = Vec::new();
    for (b, row) in out.chunks_mut(f.t * f.h * f.p).enumerate() {
        for (i, out) in tiles(row, f.h * f.p, f.p, BLOCK).into_iter().enumerate() {
            let (h, t0) = (i % f.h, i / f.h * BLOCK);
            let lse = lses[b * f.h + h].next().unwrap_or_default();
            items.push((b, h, t0, out, lse));
        }
    }
    cx.for_each(items, |_, (b, h, t0, mut out, lse), scratch| {
        let g = f.group(h);
        forward(
            &f,
            (b, h, t0),
            &kt[(b * f.g + g) * blocks * size..][..blocks * size],
            &mut out,
            lse,
            scratch,
        );
    });
}

fn forward(
    f: &In,
    (b, h, t0): (usize, usize, usize),
    kt: &[f32],
    out: &mut Columns,
    lse: &mut [f32],
    scratch: &mut Scratch,
) {
    let (p, n) = (f.p, out.rows());
    let ld = f.g * p;
    let [q, s, acc] = scratch.split([BLOCK * p, BLOCK * BLOCK, BLOCK * p]);
    for i in 0..n {
        scaled(
            &mut q[i * p..][..p],
            &f.q[((b * f.t + t0 + i) * f.h + h) * p..][..p],
            f.scale,
        );
    }
    let mut states = [(f32::NEG_INFINITY, 0.0f32); BLOCK];
    acc[..n * p].fill(0.0);
    let (first, end) = (f.first_of(b, t0, n), f.end(t0 + n - 1));
    for j in first / BLOCK..end.div_ceil(BLOCK) {
        let s0 = j * BLOCK;
        let keys = BLOCK.min(end - s0);
        let (part, left) = match f.slot + t0 == s0 {
            true => (Part::Lower, Part::LeftLower(0)),
            false => (Part::Full, Part::Full),
        };
        product(
            s,
            BLOCK,
            Left::rows(q, p),
            &kt[j * p * BLOCK..],
            BLOCK,
            (n, keys, p),
            part,
            false,
        );
        for i in 0..n {
            let lo = f.first(b, t0 + i).saturating_sub(s0).min(keys);
            let hi = f.end(t0 + i).saturating_sub(s0).min(keys);
            let row = &mut s[i * BLOCK..][..keys];
            if lo < hi {
                soften(row, lo, hi, &mut states[i], &mut acc[i * p..][..p]);
            } else {
                row.fill(0.0);
            }
        }
        product(
            acc,
            p,
            Left::rows(s, BLOCK),
            f.rows(f.v, b, s0, f.group(h)),
            ld,
            (n, p, keys),
            left,
            true,
        );
    }
    for (i, lse) in lse.iter_mut().enumerate() {
        let (top, sum) = states[i];
        scaled(out.row(i), &acc[i * p..][..p], 1.0 / sum);
        *lse = top + math::ln(sum);
    }
}

/// Few queries: one task per row and group.
fn steps(f: &In, out: &mut [f32], lse: &mut [f32], cx: &Cx) {
    let hg = f.h / f.g;
    let items: Vec<_> = tiles(out, f.h * f.p, hg * f.p, f.t)
        .into_iter()
        .zip(lse.chunks_mut(hg * f.t))
        .collect();
    cx.for_each(items, |i, (mut out, lse), scratch| {
        let (b, g) = (i / f.g, i % f.g);
        for hi in 0..hg {
            for t in 0..f.t {
                let (lo, hi_end) = (f.first(b, t), f.end(t));
                let scores = scratch.f32(hi_end - lo);
                let q = &f.q[((b * f.t + t) * f.h + g * hg + hi) * f.p..][..f.p];
                let row = &mut out.row(t)[hi * f.p..][..f.p];
                lse[hi * f.t + t] = step(
                    row,
                    q,
                    f.rows(f.k, b, lo, g),
                    f.rows(f.v, b, lo, g),
                    f.g * f.p,
                    f.scale,
                    scores,
                );
            }
        }
    });
}

/// Backward.
pub(super) fn attention_bwd(op: &op::AttentionBwd, a: &Args, r: &mut Results, cx: &Cx) {
    let f = In::new(&op.of, a, 0);
    let given = Given {
        out: a.f(4),
        lse: a.f(5),
        dout: a.f(6),
    };
    let (dq, dk, dv) = (r.take_f(0), r.take_f(1), r.take_f(2));
    if dq.is_empty() {
        return;
    }
    let hg = f.h / f.g;
    // All heads of a group in one task when that leaves tasks enough; else each its own sum of dk and dv.
    let hb = if f.b * f.g >= TASKS { hg } else { 1 };
    let wide = hb * f.p;
    let outs = tiles(dq, f.h * f.p, wide, f.t);
    if hb == hg {
        let kv = tiles(dk, f.g * f.p, f.p, f.s)
            .into_iter()
            .zip(tiles(dv, f.g * f.p, f.p, f.s));
        let items: Vec<_> = outs.into_iter().zip(kv).collect();
        cx.for_each(items, |i, (mut dq, (mut dk, mut dv)), scratch| {
            backward(&f, i, hb, &given, &mut dq, &mut dk, &mut dv, scratch);
        });
        return;
    }
    let mut shared = cx.shared();
    let len = f.b * f.s * f.h * f.p;
    let [dks, dvs] = shared.split([len, len]);
    let kv = tiles(dks, f.h * f.p, f.p, f.s)
        .into_iter()
        .zip(tiles(dvs, f.h * f.p, f.p, f.s));
    let items: Vec<_> = outs.into_iter().zip(kv).collect();
    cx.for_each(items, |i, (mut dq, (mut dk, mut dv)), scratch| {
        backward(&f, i, hb, &given, &mut dq, &mut dk, &mut dv, scratch);
    });
    for (partial, total) in [(&*dks, dk), (&*dvs, dv)] {
        cx.for_each(
            total.chunks_mut(BLOCK * f.g * f.p).collect(),
            |i, total, _| {
                let partial = &partial[i * BLOCK * f.h * f.p..];
                for (total, partial) in total
                    .chunks_exact_mut(f.p)
                    .zip(partial.chunks_exact(hg * f.p))
                {
                    for (k, part) in partial.chunks_exact(f.p).enumerate() {
                        if k == 0 {
                            total.copy_from_slice(part)
                        } else {
                            add_to(total, part)
                        }
                    }
                }
            },
        );
    }
}

/// What backward reads beside the forward's arguments.
struct Given<'a> {
    out: &'a [f32],
    lse: &'a [f32],
    dout: &'a [f32],
}

/// Task: `hb` heads of one group of one batch row.
fn backward(
    f: &In,
    task: usize,
    hb: usize,
    given: &Given,
    dq_out: &mut Columns,
    dk_out: &mut Columns,
    dv_out: &mut Columns,
    scratch: &mut Scratch,
) {
    let per_row = f.h / hb;
    let (b, h0) = (task / per_row, task % per_row * hb);
    let (g, p, t_len) = (f.group(h0), f.p, f.t);
    let ld = f.g * p;
    let tp = t_len * p;
    let [q, dout, dq, delta, s, ds, k, kt, vt, dk, dv] = scratch.split([
        hb * tp,
        hb * tp,
        hb * tp,
        hb * t_len,
        BLOCK * BLOCK,
        BLOCK * BLOCK,
        BLOCK * p,
        p * BLOCK,
        p * BLOCK,
        BLOCK * p,
        BLOCK * p,
    ]);
    for hi in 0..hb {
        for t in 0..t_len {
            let at = ((b * t_len + t) * f.h + h0 + hi) * p;
            let row = hi * tp + t * p;
            scaled(&mut q[row..][..p], &f.q[at..][..p], f.scale);
            dout[row..][..p].copy_from_slice(&given.dout[at..][..p]);
            delta[hi * t_len + t] = dot_rows(&given.out[at..][..p], &given.dout[at..][..p]);
        }
    }
    dq.fill(0.0);
    let blocks = t_len.div_ceil(BLOCK);
    let first: Vec<usize> = (0..t_len).map(|t| f.first(b, t)).collect();
    let block_first: Vec<usize> = first
        .chunks(BLOCK)
        .map(|c| c.iter().copied().min().unwrap_or(0))
        .collect();
    for j in 0..blocks {
        let s0 = j * BLOCK;
        let keys = BLOCK.min(t_len - s0);
        for i in 0..keys {
            k[i * p..][..p].copy_from_slice(&f.rows(f.k, b, s0 + i, g)[..p]);
        }
        turn(kt, BLOCK, k, p, keys, p);
        turn(vt, BLOCK, f.rows(f.v, b, s0, g), ld, keys, p);
        dk[..keys * p].fill(0.0);
        dv[..keys * p].fill(0.0);
        for hi in 0..hb {
            for i in j..blocks {
                if block_first[i] >= s0 + keys {
                    continue;
                }
                let t0 = i * BLOCK;
                let n = BLOCK.min(t_len - t0);
                let (part, lower, upper) = match i == j {
                    true => (Part::Lower, Part::LeftLower(0), Part::LeftUpper),
                    false => (Part::Full, Part::Full, Part::Full),
                };
                let (q, dout) = (
                    &q[hi * tp + t0 * p..][..n * p],
                    &dout[hi * tp + t0 * p..][..n * p],
                );
                product(
                    s,
                    BLOCK,
                    Left::rows(q, p),
                    kt,
                    BLOCK,
                    (n, keys, p),
                    part,
                    false,
                );
                product(
                    ds,
                    BLOCK,
                    Left::rows(dout, p),
                    vt,
                    BLOCK,
                    (n, keys, p),
                    part,
                    false,
                );
                for r in 0..n {
                    let t = t0 + r;
                    let lo = first[t].saturating_sub(s0).min(keys);
                    let hi_end = (t + 1 - s0).min(keys).max(lo);
                    soften_bwd(
                        &mut s[r * BLOCK..][..keys],
                        &mut ds[r * BLOCK..][..keys],
                        lo,
                        hi_end,
                        given.lse[(b * f.h + h0 + hi) * t_len + t],
                        delta[hi * t_len + t],
                    );
                }
                product(
                    dv,
                    p,
                    Left::transposed(s, BLOCK),
                    dout,
                    p,
                    (keys, p, n),
                    upper,
                    true,
                );
                product(
                    dk,
                    p,
                    Left::transposed(ds, BLOCK),
                    q,
                    p,
                    (keys, p, n),
                    upper,
                    true,
                );
                product(
                    &mut dq[hi * tp + t0 * p..],
                    p,
                    Left::rows(ds, BLOCK),
                    k,
                    p,
                    (n, p, keys),
                    lower,
                    true,
                );
            }
        }
        for i in 0..keys {
            dk_out.row(s0 + i).copy_from_slice(&dk[i * p..][..p]);
            dv_out.row(s0 + i).copy_from_slice(&dv[i * p..][..p]);
        }
    }
    for hi in 0..hb {
        for t in 0..t_len {
            scaled(
                &mut dq_out.row(t)[hi * p..][..p],
                &dq[hi * tp + t * p..][..p],
                f.scale,
            );
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
        s: usize,
        h: usize,
        g: usize,
        p: usize,
    }

    const SCALE: f64 = 0.7;

    /// Query by query. Arguments q, k, v.
    fn reference(
        s: Shape,
        window: Option<usize>,
        a: &[Vec<f64>],
        pos: Option<&[i32]>,
        slot: usize,
    ) -> (Vec<f64>, Vec<f64>) {
        let mut out = vec![0.0; s.b * s.t * s.h * s.p];
        let mut lse = vec![0.0; s.b * s.h * s.t];
        for b in 0..s.b {
            for t in 0..s.t {
                for h in 0..s.h {
                    let g = h / (s.h / s.g);
                    let q = ((b * s.t + t) * s.h + h) * s.p;
                    let key = |x: usize| ((b * s.s + x) * s.g + g) * s.p;
                    let seen: Vec<usize> = (0..s.s)
                        .filter(|&x| x <= slot + t)
                        .filter(|&x| pos.is_none_or(|p| slot + t - x <= p[b * s.t + t] as usize))
                        .filter(|&x| window.is_none_or(|w| slot + t - x < w))
                        .collect();
                    let scores: Vec<f64> = seen
                        .iter()
                        .map(|&x| {
                            SCALE
                                * (0..s.p)
                                    .map(|c| a[0][q + c] * a[1][key(x) + c])
                                    .sum::<f64>()
                        })
                        .collect();
                    let sum: f64 = scores.iter().map(|v| v.exp()).sum();
                    lse[(b * s.h + h) * s.t + t] = sum.ln();
                    for (&x, v) in seen.iter().zip(&scores) {
                        for c in 0..s.p {
                            out[q + c] += v.exp() / sum * a[2][key(x) + c];
                        }
                    }
                }
            }
        }
        (out, lse)
    }

    fn values(s: Shape) -> Vec<Vec<f32>> {
        vec![
            noise(1, s.b * s.t * s.h * s.p, 1.0),
            noise(2, s.b * s.s * s.g * s.p, 1.0),
            noise(3, s.b * s.s * s.g * s.p, 1.0),
        ]
    }

    fn args(s: Shape, v: &[Vec<f32>], pos: Option<&[i32]>) -> Vec<Arg> {
        let (b, t, g, h, p) = (s.b, s.t, s.g, s.h, s.p);
        vec![
            floats(dims![B b, T t, H h, P p], &v[0]),
            floats(dims![B b, S s.s, G g, P p], &v[1]),
            floats(dims![B b, S s.s, G g, P p], &v[2]),
            pos.and_then(|x| ints(dims![B b, T t], x)),
        ]
    }

    #[test]
    fn softmax_and_its_gradients() {
        for t in [1, 2, 9, 63, 65, 140, 300] {
            for (b, h, g, p, window) in [
                (2, 4, 2, 5, None),
                (1, 3, 1, 8, Some(20)),
                (9, 2, 2, 16, None),
                (1, 2, 2, 16, Some(1)),
            ] {
                if b == 9 && t > 65 {
                    continue;
                }
                let s = Shape {
                    b,
                    t,
                    s: t,
                    h,
                    g,
                    p,
                };
                let v = values(s);
                let w: Vec<_> = v.iter().map(|x| wide(x)).collect();
                for pos in [None, Some(positions(b, t, 2, &[5, 90, 1, 70]))] {
                    let op = op::Attention {
                        scale: SCALE,
                        window,
                    };
                    let (out, lse) = reference(s, window, &w, pos.as_deref(), 0);
                    let mut a = args(s, &v, pos.as_deref());
                    a.push(None);
                    let got = run(&op, &a, attention);
                    close("out", &got[0], &out, 2e-6);
                    close("lse", &got[1], &lse, 2e-6);
                    if t == 300 {
                        continue;
                    }
                    a.pop();
                    let dout = noise(4, v[0].len(), 1.0);
                    a.push(floats(dims![B b, T t, H h, P p], &got[0]));
                    a.push(floats(dims![B b, H h, T t], &got[1]));
                    a.push(floats(dims![B b, T t, H h, P p], &dout));
                    let got = run(&op::AttentionBwd { of: op }, &a, attention_bwd);
                    let loss = |w: &[Vec<f64>]| -> f64 {
                        let (y, _) = reference(s, window, w, pos.as_deref(), 0);
                        y.iter().zip(&dout).map(|(y, &d)| y * f64::from(d)).sum()
                    };
                    for (k, name) in ["dq", "dk", "dv"].iter().enumerate() {
                        gradient(name, loss, &w, k, &got[k], 6, 1e-5);
                    }
                }
            }
        }
    }

    /// Queries that continue a cache, in runs of any length, and slots behind the last query hold garbage.
    #[test]
    fn runs_continue_a_cache() {
        let s = Shape {
            b: 2,
            t: 150,
            s: 160,
            h: 4,
            g: 2,
            p: 8,
        };
        let mut v = values(s);
        let w: Vec<_> = v.iter().map(|x| wide(x)).collect();
        for row in 0..s.b {
            for x in &mut v[1..] {
                x[(row * s.s + s.t) * s.g * s.p..(row + 1) * s.s * s.g * s.p].fill(f32::NAN);
            }
        }
        for (window, pos) in [
            (None, None),
            (Some(30), Some(positions(s.b, s.t, 0, &[80, 70]))),
        ] {
            let (want, _) = reference(s, window, &w, pos.as_deref(), 0);
            for cuts in [
                vec![0, 150],
                vec![0, 1, 70, 71, 100, 150],
                (0..=150).collect(),
            ] {
                for cut in cuts.windows(2) {
                    let width = s.h * s.p;
                    let t = cut[1] - cut[0];
                    let q: Vec<f32> = v[0]
                        .chunks(s.t * width)
                        .flat_map(|r| r[cut[0] * width..cut[1] * width].to_vec())
                        .collect();
                    let cut_pos: Option<Vec<i32>> = pos.as_ref().map(|p| {
                        p.chunks(s.t)
                            .flat_map(|r| r[cut[0]..cut[1]].to_vec())
                            .collect()
                    });
                    let part = Shape { t, ..s };
                    let mut a = args(part, &[q, v[1].clone(), v[2].clone()], cut_pos.as_deref());
                    a.push(ints(dims![X 1], &[cut[0] as i32]));
                    let got = run(
                        &op::Attention {
                            scale: SCALE,
                            window,
                        },
                        &a,
                        attention,
                    );
                    let want: Vec<f64> = want
                        .chunks(s.t * width)
                        .flat_map(|r| r[cut[0] * width..cut[1] * width].to_vec())
                        .collect();
                    close("out", &got[0], &want, 2e-6);
                }
            }
        }
    }
}
