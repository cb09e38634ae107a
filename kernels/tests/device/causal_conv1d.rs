//! The convolution.

use super::*;

#[test]
fn convolution() {
    with_device(|g| {
        for (b, t, i, k, documents, act) in [
            (2, 11, 5, 4, false, true),
            (2, 11, 5, 4, true, true),
            (2, 11, 5, 3, false, false),
            (1, 141, 8, 4, true, true),
            (2, 131, 8, 2, false, true),
        ] {
            let pos = match documents {
                true => positions(b, t),
                false => No,
            };
            let args = [
                g.f(1, &[b, t, i]),
                g.s(2, &[i, k]),
                g.s(3, &[i]),
                pos.clone(),
                No,
            ];
            let forward = |a: &[V]| -> V {
                (0..b * t * i)
                    .map(|e| {
                        let (c, row) = (e % i, e / i);
                        let s = a[2][c]
                            + (0..k)
                                .filter(|&j| {
                                    j <= row % t && (a[3].is_empty() || j as f64 <= a[3][row])
                                })
                                .map(|j| a[1][c * k + k - 1 - j] * a[0][(row - j) * i + c])
                                .sum::<f64>();
                        if act { silu(s) } else { s }
                    })
                    .collect()
            };
            let a = data(&args);
            g.close(
                "conv",
                &g.run(&args[..4], &[R::F(vec![b, t, i])], |r, a| {
                    causal_conv1d(r, a, act)
                })[0],
                &forward(&a),
            );
            let dy = g.f(4, &[b, t, i]);
            let c = data(std::slice::from_ref(&dy)).remove(0);
            let d = g.run(
                &[args[0].clone(), args[1].clone(), args[2].clone(), pos, dy],
                &[R::F(vec![b, t, i]), R::S(vec![i, k]), R::S(vec![i])],
                |r, a| causal_conv1d_bwd(r, a, act),
            );
            for (n, d) in d.iter().enumerate() {
                g.gradient("conv", d, &a, n, &c, forward);
            }
        }
        // Two runs through a state are one run.
        let (t, i, k) = (11, 5, 4);
        let x = g.noise(7, t * i);
        let (w, bias) = (g.s(2, &[i, k]), g.s(3, &[i]));
        let whole = g.run(
            &[
                F(vec![1, t, i], x.clone()),
                w.clone(),
                bias.clone(),
                No,
                F(vec![1, k - 1, i], vec![0.0; (k - 1) * i]),
            ],
            &[R::F(vec![1, t, i]), R::Arg(4)],
            |r, a| causal_conv1d(r, a, true),
        );
        let mut state = vec![0.0; (k - 1) * i];
        let mut y = Vec::new();
        for (from, to) in [(0, 2), (2, 3), (3, t)] {
            let part = x[from * i..to * i].to_vec();
            let out = g.run(
                &[
                    F(vec![1, to - from, i], part),
                    w.clone(),
                    bias.clone(),
                    No,
                    F(vec![1, k - 1, i], state),
                ],
                &[R::F(vec![1, to - from, i]), R::Arg(4)],
                |r, a| causal_conv1d(r, a, true),
            );
            y.extend(out[0].clone());
            state = out[1].clone();
        }
        g.close("conv state", &y, &whole[0]);
        g.close("conv state", &state, &whole[1]);
    });
}

/// As wide and as narrow as layers are: long and short runs; gradients by their formula.
#[test]
fn convolution_of_many_and_few_channels() {
    with_device(|g| {
        for (b, t, i, k) in [
            (2, 1101, 4104, 4),
            (3, 517, 128, 4),
            (1, 300, 20, 4),
            // Four channels a thread backward, short sequences; other kernels.
            (64, 5, 4224, 4),
            (2, 40, 8, 3),
            (2, 40, 8, 7),
            (2, 9, 8, 1),
        ] {
            let pos: Vec<i32> = (0..b * t).map(|e| (e % t % 61) as i32).collect();
            let (x, dy) = (g.f(1, &[b, t, i]), g.f(4, &[b, t, i]));
            let (w, bias) = (g.s(2, &[i, k]), g.s(3, &[i]));
            let pos = I(vec![b, t], pos);
            let a = data(&[x.clone(), w.clone(), bias.clone(), pos.clone(), dy.clone()]);
            let n = b * t * i;
            let (mut y, mut dx) = (vec![0.0; n], vec![0.0; n]);
            let (mut dw, mut db) = (vec![0.0; i * k], vec![0.0; i]);
            for e in 0..n {
                let (row, c) = (e / i, e % i);
                let reach = (k - 1).min(row % t).min(a[3][row] as usize);
                let tap = |j: usize| a[1][c * k + k - 1 - j];
                let s = a[2][c] + (0..=reach).map(|j| tap(j) * a[0][e - j * i]).sum::<f64>();
                let sg = sigmoid(s);
                y[e] = s * sg;
                let d = a[4][e] * sg * (1.0 + s * (1.0 - sg));
                db[c] += d;
                for j in 0..=reach {
                    dx[e - j * i] += d * tap(j);
                    dw[c * k + k - 1 - j] += d * a[0][e - j * i];
                }
            }
            let wide = vec![b, t, i];
            let args = [x, w, bias, pos, dy];
            let got = g.run(&args[..4], &[R::F(wide.clone())], |r, a| {
                causal_conv1d(r, a, true)
            });
            g.close("conv", &got[0], &y);
            let got = g.run(
                &args,
                &[R::F(wide), R::S(vec![i, k]), R::S(vec![i])],
                |r, a| causal_conv1d_bwd(r, a, true),
            );
            for (got, want) in got.iter().zip([&dx, &dw, &db]) {
                g.close("conv_bwd", got, want);
            }
        }
    });
}
