//! The optimiser step over all tensors, and the norm before it. One list of tasks over all tensors, so that many small ones cost no
//! more than their bytes.

use super::simd::simd;
use super::tensor::{Args, Cx, Results};
use marimba_ir::op::{AdamW, GlobalNorm};

/// Elements of a task.
const TASK: usize = 16 * 1024;

/// `sqrt(sum g^2)`, in f64.
pub(super) fn global_norm(_: &GlobalNorm, a: &Args, r: &mut Results, cx: &Cx) {
    let tasks: Vec<&[f32]> = (0..a.len())
        .filter_map(|i| a.opt_f(i))
        .flat_map(|g| g.chunks(TASK))
        .collect();
    let mut parts = vec![0.0; tasks.len()];
    cx.for_each(
        parts.iter_mut().zip(tasks).collect(),
        |_, (part, g): (&mut f64, &[f32]), _| {
            *part = squares(g);
        },
    );
    r.take_f(0)[0] = parts.iter().sum::<f64>().sqrt() as f32;
}

/// Constants of one tensor's step.
#[derive(Clone, Copy)]
struct Step {
    b1: f32,
    b2: f32,
    eps: f32,
    /// Factor on gradients from clipping.
    clip: f32,
    /// `lr / (1 - b1^step)`.
    rate: f32,
    /// `1 / (1 - b2^step)`.
    unbias: f32,
    /// `lr decay`.
    shrink: f32,
}

/// Chunks of p, g, m, v, of the copy of p where there is one, and the constants of their tensor.
type Task<'a> = (
    Step,
    &'a mut [f32],
    &'a [f32],
    &'a mut [f32],
    &'a mut [f32],
    &'a mut [f32],
);

/// `p`, `m`, `v` and copies of `p` in place.
pub(super) fn adamw(op: &AdamW, a: &Args, r: &mut Results, cx: &Cx) {
    let (lr, step, norm) = (f64::from(a.f(0)[0]), f64::from(a.f(1)[0]), a.f(2)[0]);
    if !norm.is_finite() {
        // The results are the arguments' memory: leaving them alone keeps the step from having happened.
        return;
    }
    let (b1, b2) = op.betas;
    let clip = match op.clip {
        Some(clip) if norm > clip as f32 => clip as f32 / norm,
        Some(_) | None => 1.0,
    };
    let mut tasks: Vec<Task> = Vec::new();
    for (i, tensor) in op.tensors.iter().enumerate() {
        let lr = lr * tensor.lr_scale;
        let constants = Step {
            b1: b1 as f32,
            b2: b2 as f32,
            eps: op.eps as f32,
            clip,
            rate: (lr / (1.0 - b1.powf(step))) as f32,
            unbias: (1.0 / (1.0 - b2.powf(step))) as f32,
            shrink: (lr * tensor.decay) as f32,
        };
        let g = a.f(4 + 4 * i).chunks(TASK);
        let (p, m, v) = (r.take_f(3 * i), r.take_f(3 * i + 1), r.take_f(3 * i + 2));
        let copy = op.copies.iter().position(|&c| c == i);
        let mut copy = copy
            .map_or(&mut [][..], |c| r.take_f(3 * op.tensors.len() + c))
            .chunks_mut(TASK);
        let chunks = p
            .chunks_mut(TASK)
            .zip(g)
            .zip(m.chunks_mut(TASK).zip(v.chunks_mut(TASK)));
        tasks.extend(
            chunks.map(|((p, g), (m, v))| (constants, p, g, m, v, copy.next().unwrap_or_default())),
        );
    }
    cx.for_each(tasks, |_, (s, p, g, m, v, copy): Task, _| {
        update(s, p, g, m, v);
        if !copy.is_empty() {
            copy.copy_from_slice(p);
        }
    });
}

simd! {
    fn squares(g: &[f32]) -> f64 {
        const LANES: usize = 16;
        let mut acc = [0.0f64; LANES];
        let mut chunks = g.chunks_exact(LANES);
        for g in &mut chunks {
            for i in 0..LANES {
                let g = f64::from(g[i]);
                acc[i] = g.mul_add(g, acc[i]);
            }
        }
        for (i, &g) in chunks.remainder().iter().enumerate() {
            acc[i] += f64::from(g) * f64::from(g);
        }
        acc.iter().sum()
    }

    fn update(s: Step, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * s.clip;
            let m1 = s.b1.mul_add(*m, (1.0 - s.b1) * g);
            let v1 = s.b2.mul_add(*v, (1.0 - s.b2) * g * g);
            *m = m1;
            *v = v1;
            let direction = m1 / ((v1 * s.unbias).sqrt() + s.eps);
            *p -= s.rate.mul_add(direction, s.shrink * *p);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use marimba_ir::op::AdamWTensor;
    use marimba_ir::{Type, dims};

    #[test]
    fn norm_is_that_of_all_tensors_together() {
        let (a, b) = (randn(1, 63), randn(2, 40_000));
        let want = (wide(&a).iter().chain(&wide(&b)).map(|g| g * g).sum::<f64>()).sqrt();
        let got = run(
            GlobalNorm,
            &[
                f(Type::f32(dims![X 63]), &a),
                f(Type::f32(dims![X 40_000]), &b),
            ],
        );
        close(floats(&got[0]), &[want], 1e-7);
    }

    #[test]
    fn a_norm_that_is_no_number_leaves_everything_as_it_was() {
        for norm in [f32::NAN, f32::INFINITY] {
            let tensors = vec![AdamWTensor {
                decay: 0.1,
                lr_scale: 1.0,
            }];
            let op = AdamW {
                copies: Vec::new(),
                betas: (0.9, 0.95),
                eps: 1e-8,
                clip: Some(1.0),
                tensors,
            };
            let (p, g, m) = (randn(1, 63), randn(2, 63), randn(3, 63));
            let v: Vec<f32> = randn(4, 63).iter().map(|v| v * v).collect();
            let scalar = |x: f32| f(Type::scalar(), &[x]);
            let mut args = vec![scalar(1e-2), scalar(1.0), scalar(norm)];
            args.extend([&p, &g, &m, &v].map(|x| f(Type::f32(dims![X 63]), x)));
            let got = run(op, &args);
            assert_eq!(
                [floats(&got[0]), floats(&got[1]), floats(&got[2])],
                [&p[..], &m[..], &v[..]]
            );
        }
    }

    #[test]
    fn steps_as_the_equations_say() {
        for (clip, norm, step) in [
            (None, 5.0f32, 1.0f32),
            (Some(1.0), 5.0, 7.0),
            (Some(1.0), 0.5, 1000.0),
        ] {
            let op = AdamW {
                copies: Vec::new(),
                betas: (0.9, 0.95),
                eps: 1e-8,
                clip,
                tensors: vec![
                    AdamWTensor {
                        decay: 0.1,
                        lr_scale: 1.0,
                    },
                    AdamWTensor {
                        decay: 0.0,
                        lr_scale: 0.5,
                    },
                ],
            };
            let lr = 1e-2f32;
            let sizes = [63, 40_000];
            let mut args = vec![
                f(Type::scalar(), &[lr]),
                f(Type::scalar(), &[step]),
                f(Type::scalar(), &[norm]),
            ];
            let mut tensors = Vec::new();
            for (i, n) in sizes.into_iter().enumerate() {
                let s = 10 * i as u64;
                let (p, g, m) = (randn(s + 1, n), randn(s + 2, n), randn(s + 3, n));
                let v: Vec<f32> = randn(s + 4, n).iter().map(|v| v * v).collect();
                for x in [&p, &g, &m, &v] {
                    args.push(f(Type::f32(dims![X n]), x));
                }
                tensors.push((wide(&p), wide(&g), wide(&m), wide(&v)));
            }
            let got = run(op.clone(), &args);
            for (i, (p, g, m, v)) in tensors.iter().enumerate() {
                let t = &op.tensors[i];
                let c = clip.map_or(1.0, |c| (c / f64::from(norm)).min(1.0));
                let lr = f64::from(lr) * t.lr_scale;
                let m1: Vec<f64> = m
                    .iter()
                    .zip(g)
                    .map(|(m, g)| 0.9 * m + 0.1 * c * g)
                    .collect();
                let v1: Vec<f64> = v
                    .iter()
                    .zip(g)
                    .map(|(v, g)| 0.95 * v + 0.05 * c * g * c * g)
                    .collect();
                let step = f64::from(step);
                let p1: Vec<f64> = (0..p.len())
                    .map(|j| {
                        let (mh, vh) = (
                            m1[j] / (1.0 - 0.9f64.powf(step)),
                            v1[j] / (1.0 - 0.95f64.powf(step)),
                        );
                        p[j] - lr * (mh / (vh.sqrt() + 1e-8) + t.decay * p[j])
                    })
                    .collect();
                close(floats(&got[3 * i]), &p1, 1e-6);
                close(floats(&got[3 * i + 1]), &m1, 1e-6);
                close(floats(&got[3 * i + 2]), &v1, 1e-6);
            }
        }
    }
}
