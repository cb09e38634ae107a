//! Depthwise causal convolution: see `ir/src/op/causal_conv1d.rs`. Channels are the vector lanes, taps slide over tokens.
//!
//! A task owns a run of tokens of one batch row (all channels), reading the K-1 tokens before it where they lie. Backward recomputes
//! the pre-activation `u` and walks the same runs: `du = dy act'(u)`, `dx[s] = sum_j w[K-1-j] du[s+j]` over taps valid at s+j (so a run
//! also computes `du` of K-1 tokens after it), and partial sums of dw and db per run, added in run order.

use super::math;
use super::simd::simd;
use super::tensor::{Args, Cx, Results};
use marimba_ir::op;

/// Tokens of a task.
const RUN: usize = 64;

simd! {
    /// `w [I K]` to taps `[K I]`, tap j first for the token j back.
    fn taps(out: &mut [f32], w: &[f32], i_len: usize, k: usize) {
        for j in 0..k {
            for (i, o) in out[j * i_len..][..i_len].iter_mut().enumerate() {
                *o = w[i * k + k - 1 - j];
            }
        }
    }

    /// `u = b + sum_j w[j] x[j]` for the taps there are; x[j] is the row j tokens back.
    fn weigh(u: &mut [f32], bias: Option<&[f32]>, w: &[f32], rows: &[&[f32]]) {
        let n = u.len();
        if let [x0, x1, x2, x3] = *rows {
            // The usual four taps in one pass.
            let (x0, x1, x2, x3) = (&x0[..n], &x1[..n], &x2[..n], &x3[..n]);
            let (w0, w1, w2, w3) = (&w[..n], &w[n..][..n], &w[2 * n..][..n], &w[3 * n..][..n]);
            match bias {
                Some(b) => {
                    let b = &b[..n];
                    for i in 0..n {
                        let v = x0[i].mul_add(w0[i], b[i]);
                        u[i] = x3[i].mul_add(w3[i], x2[i].mul_add(w2[i], x1[i].mul_add(w1[i], v)));
                    }
                }
                None => {
                    for i in 0..n {
                        let v = x0[i].mul_add(w0[i], 0.0);
                        u[i] = x3[i].mul_add(w3[i], x2[i].mul_add(w2[i], x1[i].mul_add(w1[i], v)));
                    }
                }
            }
            return;
        }
        match bias {
            Some(b) => u.copy_from_slice(b),
            None => u.fill(0.0),
        }
        for (j, x) in rows.iter().enumerate() {
            let w = &w[j * n..][..n];
            for ((u, &x), &w) in u.iter_mut().zip(*x).zip(w) {
                *u = x.mul_add(w, *u);
            }
        }
    }

    fn silu_all(u: &mut [f32]) {
        for v in u {
            *v = math::silu(*v);
        }
    }

    /// `du = dy silu'(u)`, in place of u.
    fn silu_bwd(u: &mut [f32], dy: &[f32]) {
        for (u, &d) in u.iter_mut().zip(dy) {
            *u = d * math::d_silu(*u);
        }
    }

    /// `out += x y`.
    fn gather(out: &mut [f32], x: &[f32], y: &[f32]) {
        for ((o, &x), &y) in out.iter_mut().zip(x).zip(y) {
            *o = x.mul_add(y, *o);
        }
    }

    fn add(out: &mut [f32], x: &[f32]) {
        for (o, &x) in out.iter_mut().zip(x) {
            *o += x;
        }
    }
}

/// Sizes and arguments.
struct In<'a> {
    t: usize,
    i: usize,
    k: usize,
    x: &'a [f32],
    bias: Option<&'a [f32]>,
    pos: Option<&'a [i32]>,
}

impl<'a> In<'a> {
    fn new(a: &Args<'a>) -> Self {
        let x = a.ty(0);
        In {
            t: x.size(1),
            i: x.size(2),
            k: a.ty(1).size(1),
            x: a.f(0),
            bias: a.opt_f(2),
            pos: a.opt_i(3),
        }
    }

    /// Taps of token t of row b that its document allows.
    fn reach(&self, b: usize, t: usize) -> usize {
        self.pos.map_or(self.k, |p| {
            self.k.min(p[b * self.t + t].max(0) as usize + 1)
        })
    }

    /// Token t of row b.
    fn token(&self, b: usize, t: usize) -> &'a [f32] {
        &self.x[(b * self.t + t) * self.i..][..self.i]
    }

    /// The rows under the taps of token t; `before` holds the K-1 rows before the run, oldest first.
    fn window<'r>(
        &'r self,
        b: usize,
        t: usize,
        before: Option<&'r [f32]>,
        rows: &mut Vec<&'r [f32]>,
    ) {
        rows.clear();
        for j in 0..self.reach(b, t) {
            match before {
                _ if j <= t => rows.push(self.token(b, t - j)),
                Some(old) => rows.push(&old[(self.k - 1 + t - j) * self.i..][..self.i]),
                None => break,
            }
        }
    }
}

/// Forward.
pub(super) fn causal_conv1d(op: &op::CausalConv1d, a: &Args, r: &mut Results, cx: &Cx) {
    let f = In::new(a);
    let y = r.take_f(0);
    let state = a.has(4).then(|| r.take_f(1));
    if y.is_empty() {
        return;
    }
    let (i, t_len) = (f.i, f.t);
    let keep = (f.k - 1) * i;
    let mut shared = cx.shared();
    let [w] = shared.split([f.k * i]);
    taps(w, a.f(1), i, f.k);
    let w = &*w;
    let old = state.as_deref();
    let runs = t_len.div_ceil(RUN);
    let items: Vec<_> = y
        .chunks_mut(t_len * i)
        .flat_map(|row| row.chunks_mut(RUN * i))
        .collect();
    cx.for_each(items, |n, y, _| {
        let (b, t0) = (n / runs, n % runs * RUN);
        let before = old.map(|s| &s[b * keep..][..keep]);
        let mut rows = Vec::with_capacity(f.k);
        for (t, y) in y.chunks_exact_mut(i).enumerate() {
            f.window(b, t0 + t, before, &mut rows);
            weigh(y, f.bias, w, &rows);
            if op.silu {
                silu_all(y);
            }
        }
    });
    if let Some(state) = state.filter(|s| !s.is_empty()) {
        for (b, state) in state.chunks_exact_mut(keep).enumerate() {
            let new = t_len.min(f.k - 1);
            state.copy_within(new * i.., 0);
            state[keep - new * i..].copy_from_slice(&f.x[((b + 1) * t_len - new) * i..][..new * i]);
        }
    }
}

/// Backward.
pub(super) fn causal_conv1d_bwd(op: &op::CausalConv1dBwd, a: &Args, r: &mut Results, cx: &Cx) {
    let f = In::new(a);
    let dy = a.f(4);
    let (dx, dw) = (r.take_f(0), r.take_f(1));
    let db = f.bias.is_some().then(|| r.take_f(2));
    let (i, k, t_len) = (f.i, f.k, f.t);
    let runs = t_len.div_ceil(RUN);
    let tasks = if i == 0 {
        0
    } else {
        dx.len() / (t_len.max(1) * i) * runs
    };
    let part_len = (k + 1) * i;
    let mut shared = cx.shared();
    let [w, parts] = shared.split([k * i, tasks * part_len]);
    taps(w, a.f(1), i, k);
    let w = &*w;
    if tasks > 0 {
        let items: Vec<_> = dx
            .chunks_mut(t_len * i)
            .flat_map(|row| row.chunks_mut(RUN * i))
            .zip(parts.chunks_mut(part_len))
            .collect();
        cx.for_each(items, |n, (dx, part), scratch| {
            let (b, t0) = (n / runs, n % runs * RUN);
            let own = dx.len() / i;
            let end = t_len.min(t0 + own + k - 1);
            let [du] = scratch.split([(RUN + k - 1) * i]);
            let mut rows = Vec::with_capacity(k);
            part.fill(0.0);
            for t in t0..end {
                let du = &mut du[(t - t0) * i..][..i];
                let dy = &dy[(b * t_len + t) * i..][..i];
                f.window(b, t, None, &mut rows);
                if op.of.silu {
                    weigh(du, f.bias, w, &rows);
                    silu_bwd(du, dy);
                } else {
                    du.copy_from_slice(dy);
                }
                if t < t0 + own {
                    for (j, x) in rows.iter().enumerate() {
                        gather(&mut part[j * i..][..i], x, du);
                    }
                    add(&mut part[k * i..], du);
                }
            }
            let du = &*du;
            let mut weights: Vec<&[f32]> = Vec::with_capacity(k);
            for (s, dx) in dx.chunks_exact_mut(i).enumerate() {
                rows.clear();
                weights.clear();
                for j in 0..k {
                    let t = t0 + s + j;
                    if t < end && j < f.reach(b, t) {
                        rows.push(&du[(s + j) * i..][..i]);
                        weights.push(&w[j * i..][..i]);
                    }
                }
                if rows.len() == k {
                    weigh(dx, None, w, &rows);
                } else {
                    dx.fill(0.0);
                    for (du, w) in rows.iter().zip(&weights) {
                        gather(dx, du, w);
                    }
                }
            }
        });
    }
    let (total, rest) = parts.split_at_mut(part_len.min(tasks * part_len));
    for part in rest
        .chunks_exact(part_len.max(1))
        .take(tasks.saturating_sub(1))
    {
        add(total, part);
    }
    if tasks == 0 {
        dw.fill(0.0);
        db.into_iter().for_each(|v| v.fill(0.0));
        return;
    }
    for (c, dw) in dw.chunks_exact_mut(k).enumerate() {
        for (tap, dw) in dw.iter_mut().enumerate() {
            *dw = total[(k - 1 - tap) * i + c];
        }
    }
    if let Some(db) = db {
        db.copy_from_slice(&total[k * i..][..i]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{Arg, close, floats, gradient, ints, noise, positions, run, wide};
    use super::*;
    use marimba_ir::dims;

    /// x, w, b (may be empty), state (may be empty).
    fn reference(
        size: (usize, usize, usize, usize),
        silu: bool,
        v: &[Vec<f64>],
        pos: Option<&[i32]>,
        state: &[f64],
    ) -> Vec<f64> {
        let (b_len, t_len, i_len, k) = size;
        let mut y = vec![0.0; b_len * t_len * i_len];
        for b in 0..b_len {
            for t in 0..t_len {
                for i in 0..i_len {
                    let mut u = v[2].get(i).copied().unwrap_or(0.0);
                    for j in 0..k {
                        if pos.is_some_and(|p| (p[b * t_len + t] as usize) < j) {
                            continue;
                        }
                        let x = if j <= t {
                            v[0][(b * t_len + t - j) * i_len + i]
                        } else if state.is_empty() {
                            0.0
                        } else {
                            state[(b * (k - 1) + k - 1 + t - j) * i_len + i]
                        };
                        u += v[1][i * k + k - 1 - j] * x;
                    }
                    y[(b * t_len + t) * i_len + i] = if silu { u / (1.0 + (-u).exp()) } else { u };
                }
            }
        }
        y
    }

    fn args(size: (usize, usize, usize, usize), v: &[Vec<f32>], pos: Option<&[i32]>) -> Vec<Arg> {
        let (b, t, i, k) = size;
        vec![
            floats(dims![B b, T t, I i], &v[0]),
            floats(dims![I i, K k], &v[1]),
            (!v[2].is_empty())
                .then(|| floats(dims![I i], &v[2]))
                .flatten(),
            pos.and_then(|p| ints(dims![B b, T t], p)),
        ]
    }

    fn values(size: (usize, usize, usize, usize), bias: bool) -> Vec<Vec<f32>> {
        let (b, t, i, k) = size;
        vec![
            noise(1, b * t * i, 1.0),
            noise(2, i * k, 1.0),
            if bias { noise(3, i, 1.0) } else { vec![] },
        ]
    }

    #[test]
    fn slides_and_differentiates() {
        for t in [1, 2, 63, 65, 300] {
            for (i, k, bias, silu) in [
                (5, 4, true, true),
                (16, 4, false, false),
                (3, 1, true, true),
                (4, 7, false, true),
            ] {
                let size = (2, t, i, k);
                let v = values(size, bias);
                let w: Vec<_> = v.iter().map(|x| wide(x)).collect();
                for pos in [None, Some(positions(2, t, 2, &[1, 40, 2, 30]))] {
                    let mut a = args(size, &v, pos.as_deref());
                    let got = run(&op::CausalConv1d { silu }, &a, causal_conv1d);
                    close(
                        "y",
                        &got[0],
                        &reference(size, silu, &w, pos.as_deref(), &[]),
                        2e-6,
                    );
                    let dy = noise(4, v[0].len(), 1.0);
                    a.push(floats(dims![B 2, T t, I i], &dy));
                    let got = run(
                        &op::CausalConv1dBwd {
                            of: op::CausalConv1d { silu },
                        },
                        &a,
                        causal_conv1d_bwd,
                    );
                    let loss = |w: &[Vec<f64>]| -> f64 {
                        let y = reference(size, silu, w, pos.as_deref(), &[]);
                        y.iter().zip(&dy).map(|(y, &d)| y * f64::from(d)).sum()
                    };
                    for (n, name) in ["dx", "dw", "db"].iter().enumerate().take(got.len()) {
                        gradient(name, loss, &w, n, &got[n], 40, 1e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn carried_state_continues() {
        let (b, t, i, k) = (2, 40, 5, 4);
        let v = values((b, t, i, k), true);
        let w: Vec<_> = v.iter().map(|x| wide(x)).collect();
        let begin = noise(5, b * (k - 1) * i, 1.0);
        for pos in [None, Some(positions(b, t, 2, &[3, 11]))] {
            let want = reference((b, t, i, k), true, &w, pos.as_deref(), &wide(&begin));
            for cuts in [vec![0, 40], vec![0, 1, 3, 20, 22, 40], (0..=40).collect()] {
                let mut state = begin.clone();
                for cut in cuts.windows(2) {
                    let part = |x: &[f32], n: usize| -> Vec<f32> {
                        x.chunks(t * n)
                            .flat_map(|r| r[cut[0] * n..cut[1] * n].to_vec())
                            .collect()
                    };
                    let cut_pos: Option<Vec<i32>> = pos.as_ref().map(|p| {
                        p.chunks(t)
                            .flat_map(|r| r[cut[0]..cut[1]].to_vec())
                            .collect()
                    });
                    let x = part(&v[0], i);
                    let mut a = args(
                        (b, cut[1] - cut[0], i, k),
                        &[x, v[1].clone(), v[2].clone()],
                        cut_pos.as_deref(),
                    );
                    a.push(floats(dims![B b, K k - 1, I i], &state));
                    let got = run(&op::CausalConv1d { silu: true }, &a, causal_conv1d);
                    let want: Vec<f64> = want
                        .chunks(t * i)
                        .flat_map(|r| r[cut[0] * i..cut[1] * i].to_vec())
                        .collect();
                    close("y", &got[0], &want, 2e-6);
                    state.copy_from_slice(&got[1]);
                }
                for row in 0..b {
                    let last = &v[0][((row + 1) * t - (k - 1)) * i..(row + 1) * t * i];
                    assert_eq!(&state[row * (k - 1) * i..][..(k - 1) * i], last);
                }
            }
        }
    }
}
