//! Choosing experts row by row, and the load-balance loss. Rows are short (one number per expert): scalar code, parallel over rows.

use super::math::{exp, sigmoid};
use super::tensor::{Args, Cx, Results, Scratch};
use marimba_ir::op::{Balance, BalanceBwd, Normalize, Route, RouteBwd, Score};

/// Rows per task.
const ROWS: usize = 128;

/// Added to the sum that sigmoid weights are divided by.
const TINY: f32 = 1e-20;

/// Softmax of a row.
fn softmax(x: &[f32], y: &mut [f32]) {
    let max = x.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let mut sum = 0.0;
    for (y, &x) in y.iter_mut().zip(x) {
        *y = exp(x - max);
        sum += *y;
    }
    for y in y.iter_mut() {
        *y /= sum;
    }
}

/// Scores that the choice is made by.
fn scores(score: Score, logits: &[f32], s: &mut [f32]) {
    match score {
        Score::SoftmaxAll | Score::SoftmaxChosen => softmax(logits, s),
        Score::Sigmoid => {
            for (s, &x) in s.iter_mut().zip(logits) {
                *s = sigmoid(x);
            }
        }
    }
}

/// Unscaled, unnormalised weights of the chosen, from scores and logits.
fn chosen_scores(score: Score, logits: &[f32], s: &[f32], chosen: &[i32], u: &mut [f32]) {
    match score {
        Score::SoftmaxAll | Score::Sigmoid => {
            for (u, &e) in u.iter_mut().zip(chosen) {
                *u = s[e as usize];
            }
        }
        Score::SoftmaxChosen => {
            let max = chosen
                .iter()
                .fold(f32::NEG_INFINITY, |m, &e| m.max(logits[e as usize]));
            let mut sum = 0.0;
            for (u, &e) in u.iter_mut().zip(chosen) {
                *u = exp(logits[e as usize] - max);
                sum += *u;
            }
            for u in u.iter_mut() {
                *u /= sum;
            }
        }
    }
}

fn floor_of(score: Score) -> f32 {
    match score {
        Score::Sigmoid => TINY,
        Score::SoftmaxAll | Score::SoftmaxChosen => 0.0,
    }
}

/// Index of the largest of `x`, the lower of equals; NaN loses to everything.
fn largest(x: &[f32]) -> usize {
    let mut best = 0;
    for (i, &v) in x.iter().enumerate() {
        if v > x[best] || (x[best].is_nan() && !v.is_nan()) {
            best = i;
        }
    }
    best
}

/// `weights`, `experts`.
pub(super) fn route(op: &Route, a: &Args, r: &mut Results, cx: &Cx) {
    let (logits, bias, n) = (a.f(0), a.opt_f(1), a.ty(0).last());
    let k = op.top_k;
    let tasks = r
        .take_f(0)
        .chunks_mut(ROWS * k)
        .zip(r.take_i(1).chunks_mut(ROWS * k))
        .collect();
    cx.for_each(
        tasks,
        |task, (weights, experts): (&mut [f32], &mut [i32]), scratch: &mut Scratch| {
            let [s, choice, groups] = scratch.split([n, n, op.n_groups]);
            for (i, (w, chosen)) in weights
                .chunks_exact_mut(k)
                .zip(experts.chunks_exact_mut(k))
                .enumerate()
            {
                let logits = &logits[(task * ROWS + i) * n..][..n];
                scores(op.score, logits, s);
                for (e, c) in choice.iter_mut().enumerate() {
                    *c = s[e] + bias.map_or(0.0, |b| b[e]);
                }
                if op.top_groups < op.n_groups {
                    keep_groups(op, choice, groups);
                }
                for c in chosen.iter_mut() {
                    let e = largest(choice);
                    *c = e as i32;
                    choice[e] = f32::NAN;
                }
                chosen_scores(op.score, logits, s, chosen, w);
                let sum = match op.normalize {
                    Normalize::None => 1.0,
                    Normalize::Sum => w.iter().sum::<f32>() + floor_of(op.score),
                };
                for w in w.iter_mut() {
                    *w = *w / sum * op.scale as f32;
                }
            }
        },
    );
}

/// Strikes out (NaN) all experts but those of the `top_groups` groups whose two best sum highest.
fn keep_groups(op: &Route, choice: &mut [f32], groups: &mut [f32]) {
    let size = choice.len() / op.n_groups;
    for (g, group) in groups.iter_mut().zip(choice.chunks_exact(size)) {
        let first = largest(group);
        let second = group
            .iter()
            .enumerate()
            .filter(|&(i, _)| i != first)
            .fold(f32::NEG_INFINITY, |m, (_, &v)| m.max(v));
        *g = group[first] + if size > 1 { second } else { 0.0 };
    }
    for _ in 0..op.top_groups {
        let g = largest(groups);
        groups[g] = f32::NAN;
    }
    for (g, group) in groups.iter().zip(choice.chunks_exact_mut(size)) {
        if !g.is_nan() {
            group.fill(f32::NAN);
        }
    }
}

/// `dlogits`.
pub(super) fn route_bwd(op: &RouteBwd, a: &Args, r: &mut Results, cx: &Cx) {
    let op = &op.of;
    let (logits, experts, dweights, n, k) = (a.f(0), a.i(1), a.f(2), a.ty(0).last(), op.top_k);
    cx.for_each(
        r.take_f(0).chunks_mut(ROWS * n).collect(),
        |task, chunk: &mut [f32], scratch| {
            let [s, u, du] = scratch.split([n, k, k]);
            for (i, dx) in chunk.chunks_exact_mut(n).enumerate() {
                let row = task * ROWS + i;
                let logits = &logits[row * n..][..n];
                let (chosen, dw) = (&experts[row * k..][..k], &dweights[row * k..][..k]);
                scores(op.score, logits, s);
                chosen_scores(op.score, logits, s, chosen, u);
                let scale = op.scale as f32;
                match op.normalize {
                    Normalize::None => {
                        for (du, &dw) in du.iter_mut().zip(dw) {
                            *du = scale * dw;
                        }
                    }
                    Normalize::Sum => {
                        let sum = u.iter().sum::<f32>() + floor_of(op.score);
                        let mean: f32 = u.iter().zip(dw).map(|(u, dw)| u * dw).sum::<f32>() / sum;
                        for (du, &dw) in du.iter_mut().zip(dw) {
                            *du = scale * (dw - mean) / sum;
                        }
                    }
                }
                dx.fill(0.0);
                let inner: f32 = u.iter().zip(du.iter()).map(|(u, du)| u * du).sum();
                match op.score {
                    Score::SoftmaxAll => {
                        for (dx, &s) in dx.iter_mut().zip(s.iter()) {
                            *dx = -s * inner;
                        }
                        for (&e, &du) in chosen.iter().zip(du.iter()) {
                            dx[e as usize] += s[e as usize] * du;
                        }
                    }
                    Score::SoftmaxChosen => {
                        for ((&e, &u), &du) in chosen.iter().zip(u.iter()).zip(du.iter()) {
                            dx[e as usize] = u * (du - inner);
                        }
                    }
                    Score::Sigmoid => {
                        for (&e, &du) in chosen.iter().zip(du.iter()) {
                            let s = s[e as usize];
                            dx[e as usize] = du * s * (1.0 - s);
                        }
                    }
                }
            }
        },
    );
}

/// Share of choices that are each expert.
fn shares(experts: &[i32], n: usize) -> Vec<f32> {
    let mut count = vec![0u32; n];
    for &e in experts {
        count[e as usize] += 1;
    }
    count
        .iter()
        .map(|&c| c as f32 / experts.len().max(1) as f32)
        .collect()
}

/// `E sum_e f_e P_e`.
pub(super) fn balance(_: &Balance, a: &Args, r: &mut Results, cx: &Cx) {
    let (logits, n) = (a.f(0), a.ty(0).last());
    let f = shares(a.i(1), n);
    let rows = a.ty(0).rows();
    let mut parts = vec![0.0f64; rows.div_ceil(ROWS)];
    cx.for_each(
        parts.iter_mut().collect(),
        |task, part: &mut f64, scratch| {
            let p = scratch.f32(n);
            for row in task * ROWS..rows.min((task + 1) * ROWS) {
                softmax(&logits[row * n..][..n], p);
                *part += p.iter().zip(&f).map(|(p, f)| f64::from(p * f)).sum::<f64>();
            }
        },
    );
    r.take_f(0)[0] = (n as f64 * parts.iter().sum::<f64>() / rows.max(1) as f64) as f32;
}

/// `dlogits[r,e] = dloss E/rows p_e (f_e - sum_j f_j p_j)`.
pub(super) fn balance_bwd(_: &BalanceBwd, a: &Args, r: &mut Results, cx: &Cx) {
    let (logits, n, rows) = (a.f(0), a.ty(0).last(), a.ty(0).rows());
    let f = shares(a.i(1), n);
    let c = a.f(2)[0] * n as f32 / rows.max(1) as f32;
    cx.for_each(
        r.take_f(0).chunks_mut(ROWS * n).collect(),
        |task, chunk: &mut [f32], scratch| {
            let p = scratch.f32(n);
            for (i, dx) in chunk.chunks_exact_mut(n).enumerate() {
                softmax(&logits[(task * ROWS + i) * n..][..n], p);
                let inner: f32 = p.iter().zip(&f).map(|(p, f)| p * f).sum();
                for ((dx, &p), &f) in dx.iter_mut().zip(p.iter()).zip(&f) {
                    *dx = c * p * (f - inner);
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use marimba_ir::{Type, dims};

    fn softmax64(x: &[f64]) -> Vec<f64> {
        let max = x.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = x.iter().map(|v| (v - max).exp()).sum();
        x.iter().map(|v| (v - max).exp() / sum).collect()
    }

    /// Weights of given choices, in f64.
    fn weights(op: &Route, logits: &[f64], chosen: &[usize]) -> Vec<f64> {
        let picked: Vec<f64> = chosen.iter().map(|&e| logits[e]).collect();
        let u: Vec<f64> = match op.score {
            Score::SoftmaxAll => {
                let s = softmax64(logits);
                chosen.iter().map(|&e| s[e]).collect()
            }
            Score::SoftmaxChosen => softmax64(&picked),
            Score::Sigmoid => picked.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        };
        let sum: f64 = if op.normalize == Normalize::Sum {
            u.iter().sum()
        } else {
            1.0
        };
        u.iter().map(|u| u / sum * op.scale).collect()
    }

    /// Choices by sorting, in f64.
    fn choose(op: &Route, logits: &[f64], bias: Option<&[f32]>) -> Vec<usize> {
        let n = logits.len();
        let s = match op.score {
            Score::SoftmaxAll | Score::SoftmaxChosen => softmax64(logits),
            Score::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        };
        let c: Vec<f64> = (0..n)
            .map(|e| s[e] + bias.map_or(0.0, |b| f64::from(b[e])))
            .collect();
        let size = n / op.n_groups;
        let mut groups: Vec<usize> = (0..op.n_groups).collect();
        let best2 = |g: usize| {
            let mut v = c[g * size..(g + 1) * size].to_vec();
            v.sort_by(|a, b| b.total_cmp(a));
            v[0] + v.get(1).copied().unwrap_or(0.0)
        };
        groups.sort_by(|&a, &b| best2(b).total_cmp(&best2(a)).then(a.cmp(&b)));
        groups.truncate(op.top_groups);
        let mut all: Vec<usize> = (0..n).filter(|e| groups.contains(&(e / size))).collect();
        all.sort_by(|&a, &b| c[b].total_cmp(&c[a]).then(a.cmp(&b)));
        all.truncate(op.top_k);
        all
    }

    #[test]
    fn choices_weights_and_gradients() {
        let (b, t) = (3, 63);
        for (n, top_k, n_groups, top_groups, with_bias) in [
            (4, 2, 1, 1, false),
            (16, 4, 4, 2, true),
            (64, 1, 1, 1, true),
            (8, 3, 8, 4, false),
        ] {
            for score in [Score::SoftmaxAll, Score::SoftmaxChosen, Score::Sigmoid] {
                for normalize in [Normalize::None, Normalize::Sum] {
                    let op = Route {
                        top_k,
                        score,
                        normalize,
                        n_groups,
                        top_groups,
                        scale: 1.5,
                    };
                    let rows = b * t;
                    let (logits, bias, dw) =
                        (randn(1, rows * n), randn(2, n), randn(3, rows * top_k));
                    let ty = Type::f32(dims![B b, T t, E n]);
                    let out = run(
                        op.clone(),
                        &[
                            f(ty.clone(), &logits),
                            if with_bias {
                                f(Type::f32(dims![E n]), &bias)
                            } else {
                                None
                            },
                        ],
                    );
                    let experts = ints(&out[1]);
                    let mut want = Vec::new();
                    for row in 0..rows {
                        let x = wide(&logits[row * n..][..n]);
                        let chosen = choose(&op, &x, with_bias.then_some(&bias));
                        let got: Vec<usize> = experts[row * top_k..][..top_k]
                            .iter()
                            .map(|&e| e as usize)
                            .collect();
                        assert_eq!(got, chosen, "{op:?} row {row}");
                        want.extend(weights(&op, &x, &chosen));
                    }
                    close(floats(&out[0]), &want, 1e-6);
                    let tk = ty.with_last(marimba_ir::Dim {
                        letter: marimba_ir::Letter::K,
                        size: top_k,
                    });
                    let d = run(
                        RouteBwd { of: op.clone() },
                        &[
                            f(ty.clone(), &logits),
                            i(tk.with_dtype(marimba_ir::DType::I32), experts),
                            f(tk.clone(), &dw),
                        ],
                    );
                    check_grad(floats(&d[0]), &logits, |x| {
                        let w: Vec<f64> = (0..rows)
                            .flat_map(|row| {
                                let chosen: Vec<usize> = experts[row * top_k..][..top_k]
                                    .iter()
                                    .map(|&e| e as usize)
                                    .collect();
                                weights(&op, &x[row * n..][..n], &chosen)
                            })
                            .collect();
                        dot64(&w, &dw)
                    });
                }
            }
        }
    }

    #[test]
    fn equal_scores_choose_the_lower_index() {
        let op = Route {
            top_k: 2,
            score: Score::SoftmaxAll,
            normalize: Normalize::Sum,
            n_groups: 1,
            top_groups: 1,
            scale: 1.0,
        };
        let out = run(
            op,
            &[
                f(Type::f32(dims![B 1, T 1, E 4]), &[0.0, 1.0, 1.0, 1.0]),
                None,
            ],
        );
        assert_eq!(ints(&out[1]), &[1, 2]);
    }

    #[test]
    fn balance_and_its_gradient() {
        let (rows, n, k) = (300, 6, 2);
        let logits = randn(1, rows * n);
        let experts: Vec<i32> = (0..rows * k).map(|i| ((i * i) % n) as i32).collect();
        let ty = Type::f32(dims![B 1, T rows, E n]);
        let te = Type::i32(dims![B 1, T rows, K k]);
        let loss = |x: &[f64]| {
            let mut p = vec![0.0; n];
            for row in x.chunks(n) {
                for (p, s) in p.iter_mut().zip(softmax64(row)) {
                    *p += s / rows as f64;
                }
            }
            let share = |e: usize| {
                experts.iter().filter(|&&x| x as usize == e).count() as f64 / experts.len() as f64
            };
            n as f64 * (0..n).map(|e| share(e) * p[e]).sum::<f64>()
        };
        let out = run(Balance, &[f(ty.clone(), &logits), i(te.clone(), &experts)]);
        close(floats(&out[0]), &[loss(&wide(&logits))], 1e-6);
        let d = run(
            BalanceBwd,
            &[f(ty, &logits), i(te, &experts), f(Type::scalar(), &[2.0])],
        );
        check_grad(floats(&d[0]), &logits, |x| 2.0 * loss(x));
    }
}
