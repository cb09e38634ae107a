//! Each composed forward against a loop over its equation in f64, and each tape gradient against central differences.

use super::DfdxEngine;
use super::reference::{Numbers, evaluate};
use crate::{Engine, HostTensor};
use marimba_ir::op::*;
use marimba_ir::{
    DType, Dim, External, Graph, Letter, Param, ParamInit, Phase, Place, Type, differentiate, dims,
    plan,
};

/// Uniform numbers in [-1, 1] from a linear congruence (Knuth's MMIX constants).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    fn vec(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.next()).collect()
    }
}

type Slot = Option<(Type, Numbers)>;

fn ty(sizes: &[usize]) -> Type {
    Type::f32(
        sizes
            .iter()
            .map(|&size| Dim {
                letter: Letter::X,
                size,
            })
            .collect(),
    )
}

fn f(sizes: &[usize], x: Vec<f64>) -> Slot {
    Some((ty(sizes), Numbers::Float(x)))
}

fn i(sizes: &[usize], x: &[i32]) -> Slot {
    Some((ty(sizes).with_dtype(DType::I32), Numbers::Int(x.to_vec())))
}

fn floats(slot: &Slot) -> &[f64] {
    match slot {
        Some((_, Numbers::Float(x))) => x,
        _ => &[],
    }
}

fn run(
    op: &Op,
    args: &[Slot],
    cot: Option<&[Option<Vec<f64>>]>,
) -> (Vec<Numbers>, Vec<Option<Vec<f64>>>) {
    let types: Vec<_> = args
        .iter()
        .map(|a| a.as_ref().map(|(t, _)| t.clone()))
        .collect();
    let data: Vec<_> = args
        .iter()
        .map(|a| a.as_ref().map(|(_, n)| n.clone()))
        .collect();
    evaluate(op, &types, &data, cot).unwrap()
}

fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
    for (k, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(
            (g - w).abs() <= tolerance * scale,
            "{what}[{k}]: {g} instead of {w}"
        );
    }
}

/// Results `want` by slot (`None`: not compared), then the gradients of all float arguments that `moves` by central differences
/// through the results that `carries` a gradient.
fn check(
    op: impl Into<Op>,
    args: &[Slot],
    want: &[Option<Vec<f64>>],
    moves: &[usize],
    carries: &[usize],
) {
    let op = op.into();
    let (got, _) = run(&op, args, None);
    for (k, (g, w)) in got.iter().zip(want).enumerate() {
        if let (Numbers::Float(g), Some(w)) = (g, w) {
            close(&format!("{} result {k}", op.name()), g, w, 1e-10);
        }
    }
    let mut rng = Rng(7);
    let cot: Vec<Option<Vec<f64>>> = got
        .iter()
        .enumerate()
        .map(|(k, g)| match g {
            Numbers::Float(g) if carries.contains(&k) => Some(rng.vec(g.len())),
            Numbers::Float(_) | Numbers::Int(_) => None,
        })
        .collect();
    let (_, grads) = run(&op, args, Some(&cot));
    let loss = |args: &[Slot]| -> f64 {
        run(&op, args, None)
            .0
            .iter()
            .zip(&cot)
            .map(|(y, c)| match (y, c) {
                (Numbers::Float(y), Some(c)) => y.iter().zip(c).map(|(y, c)| y * c).sum(),
                _ => 0.0,
            })
            .sum()
    };
    let eps = 1e-5;
    for &slot in moves {
        let n = floats(&args[slot]).len();
        let mut numeric = Vec::new();
        for k in 0..n {
            let moved = |by: f64| {
                let mut args = args.to_vec();
                if let Some((_, Numbers::Float(x))) = &mut args[slot] {
                    x[k] += by;
                }
                loss(&args)
            };
            numeric.push((moved(eps) - moved(-eps)) / (2.0 * eps));
        }
        close(
            &format!("{} gradient of argument {slot}", op.name()),
            grads[slot].as_ref().unwrap(),
            &numeric,
            1e-7,
        );
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn softplus(x: f64) -> f64 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

#[test]
fn embed_picks_rows() {
    let table = Rng(1).vec(8);
    let want = [3, 0, 3]
        .iter()
        .flat_map(|&t| table[2 * t..2 * t + 2].to_vec())
        .collect();
    let args = [i(&[1, 3], &[3, 0, 3]), f(&[4, 2], table.clone())];
    check(Embed, &args, &[Some(want)], &[1], &[0]);
}

#[test]
fn linear_is_a_product() {
    let mut r = Rng(2);
    let (x, w, b) = (r.vec(6), r.vec(12), r.vec(4));
    let mut want = Vec::new();
    for row in 0..2 {
        for n in 0..4 {
            want.push(b[n] + (0..3).map(|k| x[row * 3 + k] * w[n * 3 + k]).sum::<f64>());
        }
    }
    let args = [f(&[1, 2, 3], x), f(&[4, 3], w), f(&[4], b)];
    check(Linear, &args, &[Some(want)], &[0, 1, 2], &[0]);
}

#[test]
fn rms_norm_in_all_forms() {
    for gate in [Gate::None, Gate::Before, Gate::After] {
        for zero_centered in [false, true] {
            for (group, wlen) in [(6, 6), (3, 6), (3, 3), (6, 0)] {
                let mut r = Rng(3);
                let (x, w, z) = (r.vec(12), r.vec(wlen), r.vec(12));
                let s: Vec<f64> = z.iter().map(|z| z * sigmoid(*z)).collect();
                let (mut y, mut rstd) = (vec![0.0; 12], Vec::new());
                for g in 0..12 / group {
                    let range = g * group..(g + 1) * group;
                    let u = |k: usize| {
                        if gate == Gate::Before {
                            x[k] * s[k]
                        } else {
                            x[k]
                        }
                    };
                    let ms: f64 = range.clone().map(|k| u(k) * u(k)).sum::<f64>() / group as f64;
                    let inv = 1.0 / (ms + 1e-3).sqrt();
                    rstd.push(inv);
                    for k in range {
                        let w = match wlen {
                            0 => 1.0,
                            n => w[k % n] + if zero_centered { 1.0 } else { 0.0 },
                        };
                        y[k] = u(k) * inv * w * if gate == Gate::After { s[k] } else { 1.0 };
                    }
                }
                let op = RmsNorm {
                    eps: 1e-3,
                    group,
                    zero_centered,
                    gate,
                };
                let args = [
                    f(&[2, 6], x),
                    (wlen > 0).then(|| f(&[wlen], w)).flatten(),
                    (gate != Gate::None).then(|| f(&[2, 6], z)).flatten(),
                ];
                let moves: Vec<usize> = (0..3).filter(|&k| args[k].is_some()).collect();
                check(op, &args, &[Some(y), Some(rstd)], &moves, &[0]);
            }
        }
    }
}

#[test]
fn rope_rotates_pairs() {
    for (dims, inverse, pos) in [
        (4, false, None),
        (2, true, Some([5, 0, 1])),
        (0, false, None),
    ] {
        let (mut r, h, p) = (Rng(4), 2, 5);
        let x = r.vec(3 * h * p);
        let freq: Vec<f64> = [1.0, 0.5][..dims / 2].to_vec();
        let mut y = x.clone();
        for t in 0..3 {
            let at = pos.map_or(t as i32, |p: [i32; 3]| p[t]);
            for head in 0..h {
                for k in 0..dims / 2 {
                    let angle = f64::from(at) * freq[k];
                    let (c, s) = (1.5 * angle.cos(), 1.5 * angle.sin());
                    let s = if inverse { -s } else { s };
                    let (a, b) = ((t * h + head) * p + k, (t * h + head) * p + k + dims / 2);
                    y[a] = x[a] * c - x[b] * s;
                    y[b] = x[b] * c + x[a] * s;
                }
            }
        }
        let op = Rope {
            dims,
            factor: 1.5,
            inverse,
        };
        let args = [
            f(&[1, 3, h, p], x),
            pos.and_then(|p| i(&[1, 3], &p)),
            f(&[dims / 2], freq),
        ];
        check(op, &args, &[Some(y)], &[0], &[0]);
    }
}

#[test]
fn attention_sees_what_it_may() {
    for (window, pos, slot, t, s) in [
        (None, None, None, 4, 4),
        (Some(2), None, None, 4, 4),
        (None, Some([0, 1, 0, 1]), None, 4, 4),
        (Some(3), None, Some(2), 2, 6),
    ] {
        let (mut r, b, h, g, p) = (Rng(5), 2, 4, 2, 3);
        let (q, k, v) = (
            r.vec(b * t * h * p),
            r.vec(b * s * g * p),
            r.vec(b * s * g * p),
        );
        let pos: Option<Vec<i32>> = pos.map(|p: [i32; 4]| [p, p].concat());
        let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; b * h * t]);
        for bi in 0..b {
            for ti in 0..t {
                for hi in 0..h {
                    let here = slot.unwrap_or(0) + ti;
                    let reach = pos.as_ref().map_or(i32::MAX, |p| p[bi * t + ti]) as usize;
                    let qrow = &q[((bi * t + ti) * h + hi) * p..][..p];
                    let row = |x: &[f64], key: usize| {
                        x[((bi * s + key) * g + hi / (h / g)) * p..][..p].to_vec()
                    };
                    let seen: Vec<usize> = (0..s)
                        .filter(|&key| {
                            key <= here
                                && here - key <= reach
                                && window.is_none_or(|w| here - key < w)
                        })
                        .collect();
                    let e: Vec<f64> = seen
                        .iter()
                        .map(|&key| {
                            let dot: f64 = qrow.iter().zip(row(&k, key)).map(|(a, b)| a * b).sum();
                            (0.7 * dot).exp()
                        })
                        .collect();
                    let sum: f64 = e.iter().sum();
                    lse[(bi * h + hi) * t + ti] = sum.ln();
                    for (e, &key) in e.iter().zip(&seen) {
                        for (c, v) in row(&v, key).iter().enumerate() {
                            out[((bi * t + ti) * h + hi) * p + c] += e / sum * v;
                        }
                    }
                }
            }
        }
        let args = [
            f(&[b, t, h, p], q),
            f(&[b, s, g, p], k),
            f(&[b, s, g, p], v),
            pos.and_then(|p| i(&[b, t], &p)),
            slot.and_then(|x| i(&[1], &[x as i32])),
        ];
        let op = Attention { scale: 0.7, window };
        check(op, &args, &[Some(out), Some(lse)], &[0, 1, 2], &[0, 1]);
    }
}

#[test]
fn causal_conv1d_reads_its_document_and_state() {
    for (taps, with_pos, with_state, with_b) in [
        (3, false, false, true),
        (3, true, false, false),
        (3, true, true, true),
        (1, false, false, true),
    ] {
        let (mut r, b, t, c) = (Rng(6), 2, 4, 2);
        let (x, w, bias) = (r.vec(b * t * c), r.vec(c * taps), r.vec(c));
        let state = r.vec(b * (taps - 1) * c);
        let pos: Vec<i32> = vec![7, 8, 0, 1, 0, 1, 2, 0];
        let mut y = vec![0.0; x.len()];
        let input = |bi: usize, at: i64, ch: usize| {
            if at >= 0 {
                x[(bi * t + at as usize) * c + ch]
            } else if with_state {
                state[(bi * (taps - 1) + (at + taps as i64 - 1) as usize) * c + ch]
            } else {
                0.0
            }
        };
        for bi in 0..b {
            for ti in 0..t {
                for ch in 0..c {
                    let mut a = if with_b { bias[ch] } else { 0.0 };
                    for j in 0..taps {
                        if !with_pos || j as i32 <= pos[bi * t + ti] {
                            a += w[ch * taps + taps - 1 - j] * input(bi, ti as i64 - j as i64, ch);
                        }
                    }
                    y[(bi * t + ti) * c + ch] = a * sigmoid(a);
                }
            }
        }
        let mut want = vec![Some(y)];
        if with_state {
            let mut next = Vec::new();
            for bi in 0..b {
                for k in 0..taps - 1 {
                    for ch in 0..c {
                        next.push(input(bi, (t + k) as i64 - (taps as i64 - 1), ch));
                    }
                }
            }
            want.push(Some(next));
        }
        let args = [
            f(&[b, t, c], x.clone()),
            f(&[c, taps], w.clone()),
            with_b.then(|| f(&[c], bias.clone())).flatten(),
            with_pos.then(|| i(&[b, t], &pos)).flatten(),
            with_state
                .then(|| f(&[b, taps - 1, c], state.clone()))
                .flatten(),
        ];
        let moves: Vec<usize> = [0, 1, 2, 4]
            .into_iter()
            .filter(|&k| args[k].is_some())
            .collect();
        check(CausalConv1d { silu: true }, &args, &want, &moves, &[0, 1]);
    }
}

/// Which optional arguments a scan gets.
#[derive(Clone, Copy)]
struct Some3 {
    extras: bool,
    pos: bool,
    state: bool,
}

const SCANS: [Some3; 3] = [
    Some3 {
        extras: true,
        pos: true,
        state: false,
    },
    Some3 {
        extras: false,
        pos: false,
        state: true,
    },
    Some3 {
        extras: true,
        pos: true,
        state: true,
    },
];
const POS: [i32; 10] = [0, 1, 2, 0, 1, 4, 5, 0, 0, 1];

#[test]
fn selective_scan_follows_its_recurrence() {
    for on in SCANS {
        let (mut r, b, t, c, g, n) = (Rng(8), 2, 5, 4, 2, 3);
        let (x, dt) = (r.vec(b * t * c), r.vec(b * t * c));
        let a: Vec<f64> = r.vec(c * n).iter().map(|a| -a.abs() - 0.1).collect();
        let (bm, cm) = (r.vec(b * t * g * n), r.vec(b * t * g * n));
        let (d, bias, z, state) = (r.vec(c), r.vec(c), r.vec(b * t * c), r.vec(b * c * n));
        let mut h = if on.state {
            state.clone()
        } else {
            vec![0.0; b * c * n]
        };
        let (mut y, mut saved) = (vec![0.0; b * t * c], vec![0.0; b * 3 * c * n]);
        for bi in 0..b {
            for ti in 0..t {
                if ti % 2 == 0 {
                    let row = h[bi * c * n..][..c * n].to_vec();
                    saved[(bi * 3 + ti / 2) * c * n..][..c * n].copy_from_slice(&row);
                }
                for ch in 0..c {
                    let at = (bi * t + ti) * c + ch;
                    let delta = softplus(dt[at] + if on.extras { bias[ch] } else { 0.0 });
                    let mut sum = if on.extras { d[ch] * x[at] } else { 0.0 };
                    for k in 0..n {
                        let hk = &mut h[(bi * c + ch) * n + k];
                        let bc = ((bi * t + ti) * g + ch / (c / g)) * n + k;
                        if on.pos && POS[bi * t + ti] == 0 {
                            *hk = 0.0;
                        }
                        *hk = (delta * a[ch * n + k]).exp() * *hk + delta * bm[bc] * x[at];
                        sum += cm[bc] * *hk;
                    }
                    y[at] = if on.extras {
                        sum * z[at] * sigmoid(z[at])
                    } else {
                        sum
                    };
                }
            }
        }
        let args = [
            f(&[b, t, c], x),
            f(&[b, t, c], dt),
            f(&[c, n], a),
            f(&[b, t, g, n], bm),
            f(&[b, t, g, n], cm),
            on.extras.then(|| f(&[c], d)).flatten(),
            on.extras.then(|| f(&[c], bias)).flatten(),
            on.extras.then(|| f(&[b, t, c], z)).flatten(),
            on.pos.then(|| i(&[b, t], &POS)).flatten(),
            on.state.then(|| f(&[b, c, n], state)).flatten(),
        ];
        let moves: Vec<usize> = (0..10).filter(|&k| k != 8 && args[k].is_some()).collect();
        let second = if on.state { h } else { saved };
        let op = SelectiveScan { chunk: 2 };
        check(op, &args, &[Some(y), Some(second)], &moves, &[0, 1]);
    }
}

#[test]
fn ssd_follows_its_recurrence() {
    for on in SCANS {
        let (mut r, b, t, hs, p, g, n) = (Rng(9), 2, 5, 4, 2, 2, 3);
        let (x, dt) = (r.vec(b * t * hs * p), r.vec(b * t * hs));
        let a: Vec<f64> = r.vec(hs).iter().map(|a| -a.abs() - 0.1).collect();
        let (bm, cm) = (r.vec(b * t * g * n), r.vec(b * t * g * n));
        let (d, bias, state) = (r.vec(hs), r.vec(hs), r.vec(b * hs * p * n));
        let limit = if on.extras {
            (0.5, 0.9)
        } else {
            (0.0, f64::INFINITY)
        };
        let size = hs * p * n;
        let mut s = if on.state {
            state.clone()
        } else {
            vec![0.0; b * size]
        };
        let (mut y, mut saved) = (vec![0.0; x.len()], vec![0.0; b * 3 * size]);
        for bi in 0..b {
            for ti in 0..t {
                if ti % 2 == 0 {
                    let row = s[bi * size..][..size].to_vec();
                    saved[(bi * 3 + ti / 2) * size..][..size].copy_from_slice(&row);
                }
                for h in 0..hs {
                    let raw = dt[(bi * t + ti) * hs + h] + if on.extras { bias[h] } else { 0.0 };
                    let delta = softplus(raw).clamp(limit.0, limit.1);
                    for c in 0..p {
                        let at = ((bi * t + ti) * hs + h) * p + c;
                        let mut sum = if on.extras { d[h] * x[at] } else { 0.0 };
                        for k in 0..n {
                            let sk = &mut s[((bi * hs + h) * p + c) * n + k];
                            let bc = ((bi * t + ti) * g + h / (hs / g)) * n + k;
                            if on.pos && POS[bi * t + ti] == 0 {
                                *sk = 0.0;
                            }
                            *sk = (delta * a[h]).exp() * *sk + delta * x[at] * bm[bc];
                            sum += *sk * cm[bc];
                        }
                        y[at] = sum;
                    }
                }
            }
        }
        let args = [
            f(&[b, t, hs, p], x),
            f(&[b, t, hs], dt),
            f(&[hs], a),
            f(&[b, t, g, n], bm),
            f(&[b, t, g, n], cm),
            on.extras.then(|| f(&[hs], d)).flatten(),
            on.extras.then(|| f(&[hs], bias)).flatten(),
            on.pos.then(|| i(&[b, t], &POS)).flatten(),
            on.state.then(|| f(&[b, hs, p, n], state)).flatten(),
        ];
        let moves: Vec<usize> = (0..9).filter(|&k| k != 7 && args[k].is_some()).collect();
        let second = if on.state { s } else { saved };
        let op = Ssd {
            chunk: 2,
            dt_limit: limit,
        };
        check(op, &args, &[Some(y), Some(second)], &moves, &[0, 1]);
    }
}

#[test]
fn gated_delta_follows_its_rule() {
    for on in SCANS {
        let (mut r, b, t, hs, p, g, n) = (Rng(10), 2, 5, 4, 2, 2, 3);
        let (q, k) = (r.vec(b * t * g * n), r.vec(b * t * g * n));
        let v = r.vec(b * t * hs * p);
        let gate: Vec<f64> = r.vec(b * t * hs).iter().map(|x| -x.abs()).collect();
        let beta: Vec<f64> = r.vec(b * t * hs).iter().map(|x| x.abs()).collect();
        let state = r.vec(b * hs * n * p);
        let mut s = if on.state {
            state.clone()
        } else {
            vec![0.0; b * hs * n * p]
        };
        let mut out = vec![0.0; v.len()];
        for bi in 0..b {
            for ti in 0..t {
                for h in 0..hs {
                    let scalar = (bi * t + ti) * hs + h;
                    let key = &k[((bi * t + ti) * g + h / (hs / g)) * n..][..n];
                    let query = &q[((bi * t + ti) * g + h / (hs / g)) * n..][..n];
                    let sh = &mut s[(bi * hs + h) * n * p..][..n * p];
                    let decay = if on.pos && POS[bi * t + ti] == 0 {
                        0.0
                    } else {
                        gate[scalar].exp()
                    };
                    sh.iter_mut().for_each(|x| *x *= decay);
                    for c in 0..p {
                        let read: f64 = (0..n).map(|j| sh[j * p + c] * key[j]).sum();
                        let write = beta[scalar] * (v[scalar * p + c] - read);
                        (0..n).for_each(|j| sh[j * p + c] += key[j] * write);
                        out[scalar * p + c] = (0..n).map(|j| sh[j * p + c] * query[j]).sum();
                    }
                }
            }
        }
        let args = [
            f(&[b, t, g, n], q),
            f(&[b, t, g, n], k),
            f(&[b, t, hs, p], v),
            f(&[b, t, hs], gate),
            f(&[b, t, hs], beta),
            on.pos.then(|| i(&[b, t], &POS)).flatten(),
            on.state.then(|| f(&[b, hs, n, p], state)).flatten(),
        ];
        let moves: Vec<usize> = (0..7).filter(|&k| k != 5 && args[k].is_some()).collect();
        let second = on.state.then_some(s);
        let op = GatedDelta { chunk: 2 };
        check(op, &args, &[Some(out), second], &moves, &[0, 1]);
    }
}

/// `erf` by its Maclaurin series, good to 1e-15 for |x| < 2.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for k in 1..60 {
        term *= -x * x / f64::from(k);
        sum += term / f64::from(2 * k + 1);
    }
    2.0 / std::f64::consts::PI.sqrt() * sum
}

#[test]
fn pointwise_functions_and_broadcasts() {
    let x: Vec<f64> = Rng(11).vec(6).iter().map(|x| 2.0 * x).collect();
    let phi = |x: f64| (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt();
    let cdf = |x: f64| 0.5 * (1.0 + erf(x / std::f64::consts::SQRT_2));
    let tanh = |x: f64| ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh();
    type F<'a> = Box<dyn Fn(f64) -> f64 + 'a>;
    let table: Vec<(Un, F, bool)> = vec![
        (Un::Neg, Box::new(|x| -x), true),
        (Un::Exp, Box::new(f64::exp), true),
        (Un::Sigmoid, Box::new(sigmoid), true),
        (Un::Silu, Box::new(|x| x * sigmoid(x)), true),
        (Un::Softplus, Box::new(softplus), true),
        (Un::Gelu, Box::new(|x| x * cdf(x)), true),
        (Un::GeluTanh, Box::new(|x| 0.5 * x * (1.0 + tanh(x))), true),
        (Un::Relu, Box::new(|x| x.max(0.0)), true),
        (Un::Step, Box::new(|x| f64::from(x > 0.0)), false),
        (
            Un::DSilu,
            Box::new(|x| sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x)))),
            false,
        ),
        (Un::DGelu, Box::new(|x| cdf(x) + x * phi(x)), false),
        (
            Un::DGeluTanh,
            Box::new(|x| {
                let slope = (2.0 / std::f64::consts::PI).sqrt() * (1.0 + 3.0 * 0.044715 * x * x);
                0.5 * (1.0 + tanh(x)) + 0.5 * x * (1.0 - tanh(x) * tanh(x)) * slope
            }),
            false,
        ),
        (Un::Scale(0.5), Box::new(|x| 0.5 * x), true),
        (Un::Offset(0.25), Box::new(|x| x + 0.25), true),
    ];
    for (un, by_hand, differentiable) in table {
        let want = x.iter().map(|&x| by_hand(x)).collect();
        let moves: &[usize] = if differentiable { &[0] } else { &[] };
        let args = [f(&[2, 3], x.clone())];
        check(Pointwise::map(un), &args, &[Some(want)], moves, &[0]);
    }
    // x * x, and every way to repeat: [2 3] with [1], [3], [2 1].
    let mut p = Pointwise::new(4);
    let square = p.bin(Bin::Mul, 0, 0);
    let a = p.bin(Bin::Add, square, 1);
    let b = p.bin(Bin::Mul, a, 2);
    let c = p.bin(Bin::Sub, b, 3);
    let p = p.out(c).out(square);
    let (s, v, w) = (vec![0.3], vec![1.0, -2.0, 0.5], vec![0.7, -0.4]);
    let want = (0..6)
        .map(|k| (x[k] * x[k] + s[0]) * v[k % 3] - w[k / 3])
        .collect();
    let args = [f(&[2, 3], x.clone()), f(&[1], s), f(&[3], v), f(&[2, 1], w)];
    let squares = x.iter().map(|x| x * x).collect();
    check(
        p,
        &args,
        &[Some(want), Some(squares)],
        &[0, 1, 2, 3],
        &[0, 1],
    );
}

#[test]
fn softplus_is_linear_far_out_and_small_near_minus_infinity() {
    let x = vec![-30.0, 0.0, 19.0, 21.0, 300.0];
    let want = x.iter().map(|&x| softplus(x)).collect();
    let args = [f(&[5], x)];
    check(
        Pointwise::map(Un::Softplus),
        &args,
        &[Some(want)],
        &[0],
        &[0],
    );
}

#[test]
fn route_weights_and_choices() {
    let logits = vec![0.1, 2.0, -1.0, 0.5, 1.0, 0.9, 3.0, -2.0];
    let e: Vec<f64> = logits.iter().map(|x: &f64| x.exp()).collect();
    let soft = |r: usize, k: usize| e[4 * r + k] / e[4 * r..4 * r + 4].iter().sum::<f64>();
    let base = Route {
        top_k: 2,
        score: Score::SoftmaxAll,
        normalize: Normalize::None,
        n_groups: 1,
        top_groups: 1,
        scale: 1.0,
    };
    let choice = [[1, 3], [2, 0]];
    let args = [f(&[1, 2, 4], logits.clone()), None];
    let weights = |w: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
        (0..2).flat_map(|r| choice[r].map(|k| w(r, k))).collect()
    };
    check(base.clone(), &args, &[Some(weights(&soft))], &[0], &[0]);
    let share =
        |r: usize, k: usize| soft(r, k) / choice[r].iter().map(|&k| soft(r, k)).sum::<f64>();
    let chosen = Route {
        score: Score::SoftmaxChosen,
        ..base.clone()
    };
    check(chosen, &args, &[Some(weights(&share))], &[0], &[0]);
    let normed = Route {
        normalize: Normalize::Sum,
        ..base.clone()
    };
    check(normed, &args, &[Some(weights(&share))], &[0], &[0]);
    let sig = |r: usize, k: usize| sigmoid(logits[4 * r + k]);
    let sigmoid_normed = Route {
        score: Score::Sigmoid,
        normalize: Normalize::Sum,
        scale: 2.5,
        ..base.clone()
    };
    let want = weights(&|r, k| 2.5 * sig(r, k) / choice[r].iter().map(|&k| sig(r, k)).sum::<f64>());
    check(sigmoid_normed.clone(), &args, &[Some(want)], &[0], &[0]);
    // The bias moves the choice, not the weights; groups limit it.
    let grouped = Route {
        n_groups: 2,
        top_groups: 1,
        ..sigmoid_normed
    };
    let biased = [args[0].clone(), f(&[4], vec![0.0, 0.0, 5.0, 0.0])];
    let (results, _) = run(&grouped.into(), &biased, None);
    assert_eq!(results[1], Numbers::Int(vec![2, 3, 2, 3]));
    let ties = [
        f(&[1, 2, 4], vec![1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 4.0, 3.0]),
        None,
    ];
    let (results, _) = run(&base.into(), &ties, None);
    assert_eq!(results[1], Numbers::Int(vec![1, 2, 2, 0]));
}

#[test]
fn balance_weighs_shares_by_probabilities() {
    let logits = Rng(12).vec(9);
    let experts = [0, 1, 0, 2, 0, 1];
    let mut want = 0.0;
    for e in 0..3 {
        let share = experts.iter().filter(|&&x| x == e as i32).count() as f64 / 6.0;
        let mean: f64 = (0..3)
            .map(|r| {
                let row = &logits[3 * r..3 * r + 3];
                row[e].exp() / row.iter().map(|x| x.exp()).sum::<f64>()
            })
            .sum::<f64>()
            / 3.0;
        want += 3.0 * share * mean;
    }
    let args = [f(&[1, 3, 3], logits), i(&[1, 3, 2], &experts)];
    check(Balance, &args, &[Some(vec![want])], &[0], &[0]);
}

#[test]
fn routed_rows_go_there_and_back() {
    let experts = [2, 0, 0, 3, 2, 0];
    let (results, _) = run(
        &Dispatch { n_experts: 4 }.into(),
        &[i(&[1, 3, 2], &experts)],
        None,
    );
    let order: [usize; 6] = [1, 2, 5, 0, 4, 3];
    let slot: [usize; 6] = [3, 0, 1, 5, 4, 2];
    let offsets: [usize; 5] = [0, 3, 3, 5, 6];
    let rows = |v: &[usize]| v.iter().map(|&x| x as i32).collect::<Vec<i32>>();
    assert_eq!(results[0], Numbers::Int(rows(&order)));
    assert_eq!(results[1], Numbers::Int(rows(&slot)));
    assert_eq!(results[2], Numbers::Int(rows(&offsets)));

    let mut r = Rng(13);
    let x = r.vec(6);
    let want: Vec<f64> = order
        .iter()
        .flat_map(|&f| x[f / 2 * 2..f / 2 * 2 + 2].to_vec())
        .collect();
    let (o, s) = (i(&[6], &rows(&order)), i(&[6], &rows(&slot)));
    let args = [f(&[1, 3, 2], x), o.clone(), s.clone()];
    check(GatherRows, &args, &[Some(want)], &[0], &[0]);

    let (y, w) = (r.vec(12), r.vec(6));
    for weighted in [true, false] {
        let mut want = vec![0.0; 6];
        for k in 0..6 {
            let weight = if weighted { w[k] } else { 1.0 };
            for c in 0..2 {
                want[k / 2 * 2 + c] += weight * y[slot[k] * 2 + c];
            }
        }
        let args = [
            f(&[6, 2], y.clone()),
            o.clone(),
            s.clone(),
            weighted.then(|| f(&[1, 3, 2], w.clone())).flatten(),
        ];
        let moves: &[usize] = if weighted { &[0, 3] } else { &[0] };
        let op = Combine {
            tokens: dims![B 1, T 3],
        };
        check(op, &args, &[Some(want)], moves, &[0]);
    }

    let m = r.vec(4 * 3 * 2);
    let mut want = Vec::new();
    for row in 0..6 {
        let e = (0..4).find(|&e| row < offsets[e + 1]).unwrap();
        for n in 0..3 {
            want.push(
                (0..2)
                    .map(|k| y[2 * row + k] * m[(e * 3 + n) * 2 + k])
                    .sum(),
            );
        }
    }
    let args = [f(&[6, 2], y), f(&[4, 3, 2], m), i(&[5], &rows(&offsets))];
    check(GroupedLinear, &args, &[Some(want)], &[0, 1], &[0]);
}

#[test]
fn linear_cross_entropy_by_hand() {
    for (z_loss, z_all) in [(0.0, false), (0.1, false), (0.1, true)] {
        let mut r = Rng(14);
        let (x, w, targets) = (r.vec(6), r.vec(8), [2, -1, 0]);
        let (mut loss, mut nll, mut lses) = (0.0, vec![], vec![]);
        for row in 0..3 {
            let l: Vec<f64> = (0..4)
                .map(|v| 1.5 * (x[2 * row] * w[2 * v] + x[2 * row + 1] * w[2 * v + 1]))
                .collect();
            let lse = l.iter().map(|l| l.exp()).sum::<f64>().ln();
            let valid = targets[row] >= 0;
            let one = if valid {
                lse - l[targets[row] as usize]
            } else {
                0.0
            };
            loss += one;
            if valid || z_all {
                loss += z_loss * lse * lse;
            }
            nll.push(one);
            lses.push(lse);
        }
        let args = [
            f(&[1, 3, 2], x),
            f(&[4, 2], w),
            i(&[1, 3], &targets),
            f(&[1], vec![0.5]),
        ];
        let op = LinearCrossEntropy {
            multiplier: 1.5,
            z_loss,
            z_all,
        };
        let want = [Some(vec![0.5 * loss]), Some(nll), Some(lses)];
        check(op, &args, &want, &[0, 1], &[0]);
    }
    // The first of equal logits is the answer.
    let args = [
        f(&[1, 3, 1], vec![1.0, -1.0, 1.0]),
        f(&[3, 1], vec![2.0, 2.0, 1.0]),
        i(&[1, 3], &[0, 2, 1]),
        f(&[1], vec![1.0]),
    ];
    let op = LinearCrossEntropy {
        multiplier: 1.0,
        z_loss: 0.0,
        z_all: false,
    };
    let (results, _) = run(&op.into(), &args, None);
    assert_eq!(results[3], Numbers::Float(vec![1.0, 1.0, 0.0]));
}

#[test]
fn moving_and_reducing() {
    let mut r = Rng(15);
    let x = r.vec(12);
    let mean = x.iter().map(|x| x * x).sum::<f64>() / 12.0;
    let args = [f(&[2, 3, 2], x.clone())];
    check(MeanSquare, &args, &[Some(vec![mean])], &[0], &[0]);
    let last = vec![x[4], x[5], x[10], x[11]];
    check(Last, &args, &[Some(last)], &[0], &[0]);
    let op = Reshape {
        dims: dims![B 6, D 2],
    };
    check(op, &args, &[Some(x.clone())], &[0], &[0]);
    let op = Rows { start: 1, len: 1 };
    check(op, &args, &[Some(x[6..].to_vec())], &[0], &[0]);
    let y = r.vec(6);
    let both = (0..6)
        .flat_map(|k| [x[2 * k], x[2 * k + 1], y[k]])
        .collect::<Vec<f64>>();
    let joined = [args[0].clone(), f(&[2, 3, 1], y.clone())];
    let op = Concat { letter: Letter::D };
    check(op, &joined, &[Some(both.clone())], &[0, 1], &[0]);
    let op = Split {
        sizes: dims![D 2, D 1],
    };
    let args = [f(&[2, 3, 3], both)];
    check(op, &args, &[Some(x.clone()), Some(y)], &[0], &[0, 1]);

    let (cache, new) = (r.vec(8), r.vec(4));
    let mut want = cache.clone();
    want[2..4].copy_from_slice(&new[..2]);
    want[6..8].copy_from_slice(&new[2..]);
    let args = [
        f(&[2, 4, 1, 1], cache),
        f(&[2, 2, 1, 1], new),
        i(&[1], &[2]),
    ];
    check(CacheWrite, &args, &[Some(want)], &[], &[]);
}

#[test]
fn cast_rounds_to_nearest_even() {
    let args = [f(&[3], vec![1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 0.1])];
    let (results, grads) = run(
        &Cast { to: DType::Bf16 }.into(),
        &args,
        Some(&[Some(vec![2.0; 3])]),
    );
    assert_eq!(
        results[0],
        Numbers::Float(vec![1.0, 1.0 + 4.0 / 256.0, 0.10009765625])
    );
    assert_eq!(grads[0], Some(vec![2.0; 3]));
}

#[test]
fn stat_counts() {
    let x = vec![-3.0, 0.0, 1e6, 0.5];
    let (results, _) = run(&Stat.into(), &[f(&[4], x.clone())], None);
    let Numbers::Float(s) = &results[0] else {
        panic!("floats")
    };
    let square: f64 = x.iter().map(|x| x * x).sum();
    let head = [
        (square / 4.0).sqrt(),
        1e6,
        1.0,
        -3.0,
        1e6,
        (1e6 - 2.5) / 4.0,
    ];
    close("stat", &s[..6], &head, 1e-12);
    assert_eq!(s[6..].iter().sum::<f64>(), 4.0);
    assert_eq!(s[6 + stat_bucket(-3.0)], 1.0);
}

#[test]
fn adamw_steps() {
    let (p, g, m, v) = (0.5, -3.0, 0.2, 0.3);
    let op = AdamW {
        copies: Vec::new(),
        betas: (0.9, 0.99),
        eps: 1e-8,
        clip: Some(1.0),
        tensors: vec![AdamWTensor {
            decay: 0.1,
            lr_scale: 2.0,
        }],
    };
    let norm = 4.0;
    let args: Vec<Slot> = [0.01, 3.0, norm, p, g, m, v]
        .iter()
        .map(|&x| f(&[1], vec![x]))
        .collect();
    let g = g / norm;
    let (m, v) = (0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g);
    let (mh, vh) = (m / (1.0 - 0.9f64.powi(3)), v / (1.0 - 0.99f64.powi(3)));
    let p = p - 0.02 * (mh / (vh.sqrt() + 1e-8) + 0.1 * p);
    check(
        op,
        &args,
        &[Some(vec![p]), Some(vec![m]), Some(vec![v])],
        &[],
        &[],
    );
    let args = [f(&[2], vec![3.0, 0.0]), f(&[1, 1], vec![4.0])];
    check(GlobalNorm, &args, &[Some(vec![5.0])], &[], &[]);
}

#[test]
fn bad_numbers_are_errors() {
    let table = (ty(&[4, 2]), Numbers::Float(vec![0.0; 8]));
    let tokens = ty(&[1, 1]).with_dtype(DType::I32);
    let run = |id: i32, n: usize| {
        evaluate(
            &Embed.into(),
            &[Some(tokens.clone()), Some(table.0.clone())],
            &[
                Some(Numbers::Int(vec![id])),
                Some(Numbers::Float(vec![0.0; n])),
            ],
            None,
        )
    };
    assert!(run(3, 8).is_ok());
    for (id, n) in [(4, 8), (-1, 8), (0, 7)] {
        assert!(run(id, n).is_err(), "token {id}, {n} numbers");
    }
}

/// A model of one embedding and one tied head, differentiated, with an optimiser.
fn tiny() -> Graph {
    let mut g = Graph::new();
    let at = |phase| Place {
        path: "tiny".into(),
        block: None,
        phase,
    };
    let table = Type::f32(dims![V 5, D 4]);
    let tokens = g.add_external(External::Input, "tokens", Type::i32(dims![B 2, T 3]));
    let targets = g.add_external(External::Input, "targets", Type::i32(dims![B 2, T 3]));
    let scale = g.add_external(External::Input, "scale", Type::scalar());
    let w = g.add_external(External::Param, "w", table.clone());
    g.params.push(Param {
        name: "w".into(),
        ty: table.clone(),
        compute: DType::F32,
        init: ParamInit::Normal(1.0),
        decay: true,
        trainable: true,
        active: (1, 1),
        path: "tiny".into(),
    });
    let f = at(Phase::Forward);
    let x = g.push(Embed, vec![Some(tokens), Some(w)], &f).unwrap()[0];
    let x = g.push(Pointwise::map(Un::Silu), vec![Some(x)], &f).unwrap()[0];
    let op = LinearCrossEntropy {
        multiplier: 1.0,
        z_loss: 0.0,
        z_all: false,
    };
    let r = g
        .push(op, vec![Some(x), Some(w), Some(targets), Some(scale)], &f)
        .unwrap();
    g.outputs.push(("loss".into(), r[0]));
    differentiate(&mut g, r[0]).unwrap();
    let lr = g.add_external(External::Input, "lr", Type::scalar());
    let step = g.add_external(External::Input, "step", Type::scalar());
    let m = g.add_external(External::Moment1, "w", table.clone());
    let v = g.add_external(External::Moment2, "w", table);
    let w = g.find_external("param", "w").unwrap();
    let grad = g.output("grad:w").unwrap();
    let u = at(Phase::Update);
    let norm = g.push(GlobalNorm, vec![Some(grad)], &u).unwrap()[0];
    g.outputs.push(("grad_norm".into(), norm));
    let op = AdamW {
        copies: Vec::new(),
        betas: (0.9, 0.95),
        eps: 1e-8,
        clip: Some(1.0),
        tensors: vec![AdamWTensor {
            decay: 0.0,
            lr_scale: 1.0,
        }],
    };
    let args = [lr, step, norm, w, grad, m, v].map(Some).to_vec();
    g.push(op, args, &u).unwrap();
    g
}

#[test]
fn engine_trains_a_tiny_model() {
    let g = tiny();
    let mut engine = DfdxEngine::<super::Device>::default();
    let plan = plan(&g);
    let program = engine.load(g, plan).unwrap();
    let mut r = Rng(16);
    let w: Vec<f32> = r.vec(20).iter().map(|x| *x as f32).collect();
    let table = Type::f32(dims![V 5, D 4]);
    engine
        .write("param:w", &table, &HostTensor::F32(w.clone()))
        .unwrap();
    let mut inputs = vec![
        ("tokens", HostTensor::I32(vec![0, 1, 2, 3, 4, 0])),
        ("targets", HostTensor::I32(vec![1, 2, 3, 4, -1, 1])),
        ("scale", HostTensor::F32(vec![0.2])),
        ("grad_keep", HostTensor::F32(vec![0.0])),
        ("lr", HostTensor::F32(vec![0.0])),
        ("step", HostTensor::F32(vec![1.0])),
    ];
    // The gradient against central differences of the loss, with a step of no length.
    let loss = |engine: &mut DfdxEngine, w: &[f32], inputs: &[(&str, HostTensor)]| {
        engine
            .write("param:w", &table, &HostTensor::F32(w.to_vec()))
            .unwrap();
        f64::from(engine.run(program, inputs).unwrap()["loss"].f32()[0])
    };
    loss(&mut engine, &w, &inputs);
    let grad = engine.read("grad:w").unwrap();
    for k in 0..20 {
        let mut moved = |by: f32| {
            let mut w = w.clone();
            w[k] += by;
            loss(&mut engine, &w, &inputs)
        };
        let numeric = (moved(1e-2) - moved(-1e-2)) / 0.02;
        assert!((f64::from(grad.f32()[k]) - numeric).abs() < 1e-3, "{k}");
    }
    // A second micro-batch adds to the first.
    loss(&mut engine, &w, &inputs);
    inputs[3].1 = HostTensor::F32(vec![1.0]);
    let outputs = engine.run(program, &inputs).unwrap();
    let twice = engine.read("grad:w").unwrap();
    for (a, b) in grad.f32().iter().zip(twice.f32()) {
        assert!((2.0 * a - b).abs() < 1e-5);
    }
    let norm = twice.f32().iter().map(|x| x * x).sum::<f32>().sqrt();
    assert!((outputs["grad_norm"].f32()[0] - norm).abs() < 1e-5);
    assert!(!outputs.contains_key("grad:w"));
    // Steps lower the loss.
    inputs[3].1 = HostTensor::F32(vec![0.0]);
    inputs[4].1 = HostTensor::F32(vec![0.1]);
    let first = loss(&mut engine, &w, &inputs);
    let mut last = first;
    for step in 2..30 {
        inputs[5].1 = HostTensor::F32(vec![step as f32]);
        last = f64::from(engine.run(program, &inputs).unwrap()["loss"].f32()[0]);
    }
    assert!(last < 0.7 * first, "{first} to {last}");
    assert_eq!(engine.run_checked(program, &inputs).unwrap(), None);
    // The first node that is not finite is named; what is missing too.
    engine
        .write("param:w", &table, &HostTensor::F32(vec![f32::NAN; 20]))
        .unwrap();
    let found = engine.run_checked(program, &inputs).unwrap().unwrap();
    assert_eq!((found.node, found.op, found.count), (0, "embed", 24));
    assert!(engine.run(program, &inputs[1..]).is_err());
    engine.zero("param");
    assert_eq!(engine.read("param:w").unwrap().f32(), &[0.0; 20]);
    assert!(engine.read("param:nobody").is_err());
}
