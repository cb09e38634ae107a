//! RMS norm by rows: one read of the row into the mean square, one to write. The gradient of the weight is summed per task and then
//! over tasks in order.

use super::math::{d_silu, silu};
use super::simd::{dot, simd};
use super::tensor::{Args, Cx, Results};
use marimba_ir::op::{Gate, RmsNorm, RmsNormBwd};

/// Tasks of the backward pass at most: as many partial gradients of the weight are kept.
const TASKS: usize = 16;

/// Sizes and constants of the rows.
#[derive(Clone, Copy)]
struct Shape {
    width: usize,
    group: usize,
    eps: f32,
    gate: Gate,
    /// Added to the weight.
    offset: f32,
}

fn shape(op: &RmsNorm, width: usize) -> Shape {
    Shape {
        width: width.max(1),
        group: op.group,
        eps: op.eps as f32,
        gate: op.gate,
        offset: if op.zero_centered { 1.0 } else { 0.0 },
    }
}

/// The weights of group `g` of a row, which a short weight repeats.
#[inline(always)]
fn weights(w: &[f32], g: usize, group: usize) -> &[f32] {
    if w.len() == group {
        w
    } else {
        &w[g * group..(g + 1) * group]
    }
}

/// `w'`: the weight with its offset, or ones of the length of a group.
fn weight_or_one(w: Option<&[f32]>, s: Shape) -> Vec<f32> {
    match w {
        Some(w) => w.iter().map(|w| w + s.offset).collect(),
        None => vec![1.0; s.group],
    }
}

/// `y`, `rstd`.
pub(super) fn rms_norm(op: &RmsNorm, a: &Args, r: &mut Results, cx: &Cx) {
    let s = shape(op, a.ty(0).last());
    let w = weight_or_one(a.opt_f(1), s);
    let (x, z) = (a.f(0), a.opt_f(2));
    let groups = s.width / s.group;
    let rows = rows_per_task(a.ty(0).rows(), s.width);
    let tasks = r
        .take_f(0)
        .chunks_mut(rows * s.width)
        .zip(r.take_f(1).chunks_mut(rows * groups))
        .collect();
    cx.for_each(tasks, |task, (y, rstd): (&mut [f32], &mut [f32]), _| {
        let at = task * rows * s.width;
        let n = y.len();
        let z = z.map_or(&[][..], |z| &z[at..at + n]);
        forward(s, &x[at..at + n], &w, z, y, rstd);
    });
}

/// Rows of a task: at least 16 Ki elements, and at most [`TASKS`] tasks.
fn rows_per_task(rows: usize, width: usize) -> usize {
    rows.div_ceil(TASKS).max((16 * 1024 / width).max(1))
}

simd! {
    fn forward(s: Shape, x: &[f32], w: &[f32], z: &[f32], y: &mut [f32], rstd: &mut [f32]) {
        let groups = s.width / s.group;
        let n = s.group;
        for (i, rstd) in rstd.iter_mut().enumerate() {
            let at = i * n;
            let (x, y) = (&x[at..at + n], &mut y[at..at + n]);
            let w = weights(w, i % groups, n);
            match s.gate {
                Gate::None => {
                    let inv = 1.0 / (dot(x, x) / n as f32 + s.eps).sqrt();
                    *rstd = inv;
                    for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                        *y = x * inv * w;
                    }
                }
                Gate::Before => {
                    for ((y, &x), &z) in y.iter_mut().zip(x).zip(&z[at..at + n]) {
                        *y = x * silu(z);
                    }
                    let inv = 1.0 / (dot(y, y) / n as f32 + s.eps).sqrt();
                    *rstd = inv;
                    for (y, &w) in y.iter_mut().zip(w) {
                        *y = *y * inv * w;
                    }
                }
                Gate::After => {
                    let inv = 1.0 / (dot(x, x) / n as f32 + s.eps).sqrt();
                    *rstd = inv;
                    for (((y, &x), &w), &z) in y.iter_mut().zip(x).zip(w).zip(&z[at..at + n]) {
                        *y = x * inv * w * silu(z);
                    }
                }
            }
        }
    }
}

/// `dx` (with `add` added), `dw`, `dz`.
pub(super) fn rms_norm_bwd(op: &RmsNormBwd, a: &Args, r: &mut Results, cx: &Cx) {
    let s = shape(&op.of, a.ty(0).last());
    let w = weight_or_one(a.opt_f(1), s);
    let (x, z, rstd, dy) = (a.f(0), a.opt_f(2), a.f(3), a.f(4));
    let add = a.opt_f(5);
    let groups = s.width / s.group;
    let rows = rows_per_task(a.ty(0).rows(), s.width);
    let n_tasks = a.ty(0).rows().div_ceil(rows);
    let dx = r.take_f(0);
    let mut next = 1;
    let dw = a.has(1).then(|| {
        next += 1;
        r.take_f(1)
    });
    let dz: &mut [f32] = if z.is_some() { r.take_f(next) } else { &mut [] };
    let n_w = dw.as_ref().map_or(0, |dw| dw.len());
    let mut shared = cx.shared();
    let partial = shared.f32(n_tasks * n_w);
    partial.fill(0.0);
    {
        let mut dzs = dz.chunks_mut(rows * s.width);
        let mut partials = partial.chunks_mut(n_w.max(1));
        let tasks = dx
            .chunks_mut(rows * s.width)
            .map(|dx| {
                (
                    dx,
                    dzs.next().unwrap_or_default(),
                    partials.next().unwrap_or_default(),
                )
            })
            .collect();
        cx.for_each(
            tasks,
            |task, (dx, dz, dw): (&mut [f32], &mut [f32], &mut [f32]), scratch| {
                let at = task * rows * s.width;
                let n = dx.len();
                let z = z.map_or(&[][..], |z| &z[at..at + n]);
                let g_at = task * rows * groups;
                let rstd = &rstd[g_at..g_at + n / s.group];
                let [v, dn] = scratch.split([s.group, s.group]);
                backward(
                    s,
                    &x[at..at + n],
                    &w,
                    z,
                    rstd,
                    &dy[at..at + n],
                    dx,
                    dw,
                    dz,
                    v,
                    dn,
                );
                if let Some(add) = add {
                    for (d, &a) in dx.iter_mut().zip(&add[at..at + n]) {
                        *d += a;
                    }
                }
            },
        );
    }
    if let Some(dw) = dw {
        sum_parts(partial, dw);
    }
}

simd! {
    /// `total = sum of the parts`, in order.
    fn sum_parts(parts: &[f32], total: &mut [f32]) {
        total.fill(0.0);
        for part in parts.chunks_exact(total.len().max(1)) {
            for (t, &p) in total.iter_mut().zip(part) {
                *t += p;
            }
        }
    }

    fn backward(s: Shape, x: &[f32], w: &[f32], z: &[f32], rstd: &[f32], dy: &[f32], dx: &mut [f32], dw: &mut [f32], dz: &mut [f32],
        v: &mut [f32], dn: &mut [f32]) {
        let groups = s.width / s.group;
        let n = s.group;
        for (i, &inv) in rstd.iter().enumerate() {
            let at = i * n;
            let (x, dy, dx) = (&x[at..at + n], &dy[at..at + n], &mut dx[at..at + n]);
            let g = i % groups;
            let w = weights(w, g, n);
            // n(v) and its gradient.
            match s.gate {
                Gate::None => {
                    for j in 0..n {
                        v[j] = x[j] * inv;
                        dn[j] = dy[j] * w[j];
                    }
                }
                Gate::Before => {
                    let z = &z[at..at + n];
                    for j in 0..n {
                        v[j] = x[j] * silu(z[j]) * inv;
                        dn[j] = dy[j] * w[j];
                    }
                }
                Gate::After => {
                    let (z, dz) = (&z[at..at + n], &mut dz[at..at + n]);
                    for j in 0..n {
                        let gated = dy[j] * silu(z[j]);
                        v[j] = x[j] * inv;
                        dz[j] = dy[j] * v[j] * w[j] * d_silu(z[j]);
                        dn[j] = gated * w[j];
                        dx[j] = gated;
                    }
                }
            }
            if !dw.is_empty() {
                let dw = if dw.len() == n { &mut dw[..] } else { &mut dw[g * n..(g + 1) * n] };
                match s.gate {
                    Gate::None | Gate::Before => {
                        for j in 0..n {
                            dw[j] = dy[j].mul_add(v[j], dw[j]);
                        }
                    }
                    Gate::After => {
                        for j in 0..n {
                            dw[j] = dx[j].mul_add(v[j], dw[j]);
                        }
                    }
                }
            }
            let mean = dot(&dn[..n], &v[..n]) / n as f32;
            match s.gate {
                Gate::None | Gate::After => {
                    for j in 0..n {
                        dx[j] = inv * (-mean).mul_add(v[j], dn[j]);
                    }
                }
                Gate::Before => {
                    let (z, dz) = (&z[at..at + n], &mut dz[at..at + n]);
                    for j in 0..n {
                        let dv = inv * (-mean).mul_add(v[j], dn[j]);
                        dx[j] = dv * silu(z[j]);
                        dz[j] = dv * x[j] * d_silu(z[j]);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use marimba_ir::{Type, dims};

    fn silu64(x: f64) -> f64 {
        x / (1.0 + (-x).exp())
    }

    /// The table's equation, in f64.
    fn reference(
        op: &RmsNorm,
        x: &[f64],
        w: Option<&[f64]>,
        z: Option<&[f64]>,
        width: usize,
    ) -> (Vec<f64>, Vec<f64>) {
        let mut y = vec![0.0; x.len()];
        let mut rstd = Vec::new();
        for g in 0..x.len() / op.group {
            let range = g * op.group..(g + 1) * op.group;
            let v: Vec<f64> = range
                .clone()
                .map(|i| match op.gate {
                    Gate::Before => x[i] * silu64(z.unwrap()[i]),
                    Gate::None | Gate::After => x[i],
                })
                .collect();
            let inv =
                1.0 / (v.iter().map(|v| v * v).sum::<f64>() / op.group as f64 + op.eps).sqrt();
            rstd.push(inv);
            for (i, v) in range.zip(v) {
                let w = w.map_or(1.0, |w| {
                    w[i % width % w.len()] + f64::from(op.zero_centered)
                });
                y[i] = v * inv * w;
                if op.gate == Gate::After {
                    y[i] *= silu64(z.unwrap()[i]);
                }
            }
        }
        (y, rstd)
    }

    #[test]
    fn forward_and_gradients() {
        for (rows, width, group, short_w) in [
            (63, 40, 40, false),
            (7, 1000, 1000, false),
            (33, 96, 24, false),
            (33, 96, 24, true),
            (600, 64, 64, false),
        ] {
            for gate in [Gate::None, Gate::Before, Gate::After] {
                for (with_w, zero_centered) in [(true, false), (true, true), (false, false)] {
                    let op = RmsNorm {
                        eps: 1e-5,
                        group,
                        zero_centered,
                        gate,
                    };
                    let n_w = if short_w { group } else { width };
                    let (x, w, z, dy) = (
                        randn(1, rows * width),
                        randn(2, n_w),
                        randn(3, rows * width),
                        randn(4, rows * width),
                    );
                    let ty = Type::f32(dims![T rows, D width]);
                    let tw = Type::f32(dims![D n_w]);
                    let (aw, az) = (
                        if with_w { f(tw.clone(), &w) } else { None },
                        if gate == Gate::None {
                            None
                        } else {
                            f(ty.clone(), &z)
                        },
                    );
                    let (has_w, has_z) = (aw.is_some(), az.is_some());
                    let out = run(op.clone(), &[f(ty.clone(), &x), aw.clone(), az.clone()]);
                    let refer = |x: &[f64], w: &[f64], z: &[f64]| {
                        reference(&op, x, has_w.then_some(w), has_z.then_some(z), width)
                    };
                    let (y, rstd) = refer(&wide(&x), &wide(&w), &wide(&z));
                    close(floats(&out[0]), &y, 2e-6);
                    close(floats(&out[1]), &rstd, 2e-6);
                    let trstd = Type::f32(dims![T rows, G width / group]);
                    let bwd = RmsNormBwd { of: op.clone() };
                    let mut args = vec![
                        f(ty.clone(), &x),
                        aw,
                        az,
                        f(trstd, floats(&out[1])),
                        f(ty.clone(), &dy),
                    ];
                    let d = run(bwd.clone(), &args);
                    args.push(f(ty.clone(), &dy));
                    let more = run(bwd, &args);
                    for ((m, d), dy) in floats(&more[0]).iter().zip(floats(&d[0])).zip(&dy) {
                        assert_eq!(*m, d + dy);
                    }
                    let (wx, ww, wz) = (wide(&x), wide(&w), wide(&z));
                    check_grad(floats(&d[0]), &x, |x| dot64(&refer(x, &ww, &wz).0, &dy));
                    if has_w {
                        check_grad(floats(&d[1]), &w, |w| dot64(&refer(&wx, w, &wz).0, &dy));
                    }
                    if has_z {
                        check_grad(floats(&d[1 + usize::from(has_w)]), &z, |z| {
                            dot64(&refer(&wx, &ww, z).0, &dy)
                        });
                    }
                }
            }
        }
    }
}
