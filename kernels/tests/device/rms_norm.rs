//! Norms.

use super::*;

#[test]
fn norms() {
    with_device(|g| {
        let (rows, l) = (6, 12);
        for (gate, group, wlen, zc) in [
            (0, 12, 12, false),
            (1, 4, 12, false),
            (2, 4, 4, true),
            (1, 12, 12, true),
            (0, 6, 0, false),
        ] {
            let op = RmsNorm {
                eps: 1e-5,
                group,
                zero_centered: zc,
                gate,
            };
            let w = if wlen > 0 { g.s(2, &[wlen]) } else { No };
            let z = if gate > 0 { g.f(3, &[rows, l]) } else { No };
            let args = [g.f(1, &[rows, l]), w.clone(), z.clone()];
            let forward = |a: &[V]| -> V {
                let v: V = (0..rows * l)
                    .map(|e| a[0][e] * if gate == 1 { silu(a[2][e]) } else { 1.0 })
                    .collect();
                (0..rows * l)
                    .map(|e| {
                        let b = e / group * group;
                        let ms = v[b..b + group].iter().map(|x| x * x).sum::<f64>() / group as f64;
                        let w = if wlen > 0 {
                            a[1][e % l % wlen] + f64::from(u8::from(zc))
                        } else {
                            1.0
                        };
                        v[e] / (ms + 1e-5).sqrt() * w * if gate == 2 { silu(a[2][e]) } else { 1.0 }
                    })
                    .collect()
            };
            let a = data(&args);
            let out = g.run(
                &args,
                &[R::F(vec![rows, l]), R::S(vec![rows, l / group])],
                |r, a| rms_norm(r, a, &op),
            );
            g.close("rms_norm", &out[0], &forward(&a));
            let dy = g.f(4, &[rows, l]);
            let c = data(std::slice::from_ref(&dy)).remove(0);
            let mut results = vec![R::F(vec![rows, l])];
            if wlen > 0 {
                results.push(R::S(vec![wlen]));
            }
            if gate > 0 {
                results.push(R::F(vec![rows, l]));
            }
            let d = g.run(
                &[
                    args[0].clone(),
                    w,
                    z,
                    S(vec![rows, l / group], out[1].clone()),
                    dy,
                ],
                &results,
                |r, a| rms_norm_bwd(r, a, &op),
            );
            let mut slots = vec![0];
            if wlen > 0 {
                slots.push(1);
            }
            if gate > 0 {
                slots.push(2);
            }
            for (d, slot) in d.iter().zip(slots) {
                g.gradient("rms_norm", d, &a, slot, &c, forward);
            }
        }
    });
}

/// Rows in vectors of 8, shared by a part of a warp, a warp and a block, more of them than there are blocks; gradients by their formula.
#[test]
fn norms_over_many_rows() {
    with_device(|g| {
        for (rows, l, group, wlen, gate, zc, add) in [
            (9001, 64, 64, 64, 0, false, false),
            (4501, 48, 24, 48, 2, true, true),
            (300, 1056, 264, 264, 1, false, true),
            (1301, 1288, 1288, 1288, 0, false, true),
            (601, 2056, 2056, 2056, 1, false, false),
            (7, 4104, 4104, 4104, 2, true, true),
            (9, 4096, 4096, 4096, 1, false, false),
            (130, 1288, 1288, 0, 1, false, false),
        ] {
            let op = RmsNorm {
                eps: 1e-5,
                group,
                zero_centered: zc,
                gate,
            };
            let n = rows * l;
            let wide = [rows, l];
            let (x, dy) = (g.f(1, &wide), g.f(4, &wide));
            let w = if wlen > 0 { g.s(2, &[wlen]) } else { No };
            let z = if gate > 0 { g.f(3, &wide) } else { No };
            let more = if add { g.f(5, &wide) } else { No };
            let a = data(&[x.clone(), w.clone(), z.clone(), dy.clone(), more.clone()]);
            let weight = |e: usize| match wlen {
                0 => 1.0,
                _ => a[1][e % l % wlen] + f64::from(u8::from(zc)),
            };
            let gate_of = |e: usize, at: i32| if gate == at { silu(a[2][e]) } else { 1.0 };
            let slope = |e: usize| {
                let s = sigmoid(a[2][e]);
                s * (1.0 + a[2][e] * (1.0 - s))
            };
            let (mut y, mut dx, mut dz) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
            let mut dw = vec![0.0; wlen];
            for b in (0..n).step_by(group) {
                let at = b..b + group;
                let v: V = at.clone().map(|e| a[0][e] * gate_of(e, 1)).collect();
                let ms = v.iter().map(|v| v * v).sum::<f64>() / group as f64;
                let r = 1.0 / (ms + 1e-5).sqrt();
                let d: V = at
                    .clone()
                    .map(|e| a[3][e] * weight(e) * gate_of(e, 2))
                    .collect();
                let s = v.iter().zip(&d).map(|(v, d)| v * r * d).sum::<f64>() / group as f64;
                for e in at {
                    let (v, d) = (v[e - b], d[e - b]);
                    y[e] = v * r * weight(e) * gate_of(e, 2);
                    let dv = r * (d - v * r * s);
                    dx[e] = dv * gate_of(e, 1) + if add { a[4][e] } else { 0.0 };
                    dz[e] = match gate {
                        0 => 0.0,
                        1 => dv * a[0][e] * slope(e),
                        _ => a[3][e] * weight(e) * v * r * slope(e),
                    };
                    if wlen > 0 {
                        dw[e % l % wlen] += a[3][e] * v * r * gate_of(e, 2);
                    }
                }
            }
            let rstd = vec![rows, l / group];
            let args = [x.clone(), w.clone(), z.clone()];
            let out = g.run(&args, &[R::F(wide.to_vec()), R::S(rstd.clone())], |r, a| {
                rms_norm(r, a, &op)
            });
            g.close("rms_norm", &out[0], &y);
            let mut results = vec![R::F(wide.to_vec())];
            let mut want = vec![dx];
            if wlen > 0 {
                results.push(R::S(vec![wlen]));
                want.push(dw);
            }
            if gate > 0 {
                results.push(R::F(wide.to_vec()));
                want.push(dz);
            }
            let d = g.run(
                &[x, w, z, S(rstd, out[1].clone()), dy, more],
                &results,
                |r, a| rms_norm_bwd(r, a, &op),
            );
            for (got, want) in d.iter().zip(&want) {
                g.close("rms_norm_bwd", got, want);
            }
        }
    });
}
