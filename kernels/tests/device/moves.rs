//! What moves, sums and updates.

use super::*;

/// More choices than one chunk, experts that nobody chose, and rows of whole 16 bytes.
#[test]
fn moves_of_many_choices() {
    with_device(|g| {
        let (t, e, k, d) = (501, 37, 3, 24);
        let rows = t * k;
        let chosen: Vec<i32> = (0..rows)
            .map(|i| (i * i * 7 + i / 5) as i32 % (e as i32 - 2))
            .collect();
        let out = g.run(
            &[I(vec![t, k], chosen.clone())],
            &[R::I(vec![rows]), R::I(vec![rows]), R::I(vec![e + 1])],
            |r, a| dispatch(r, a, e),
        );
        let mut order: Vec<usize> = (0..rows).collect();
        order.sort_by_key(|&f| chosen[f]);
        assert_eq!(out[0], order.iter().map(|&f| f as f64).collect::<V>());
        for (r, &f) in order.iter().enumerate() {
            assert_eq!(out[1][f], r as f64);
        }
        for i in 0..=e {
            let before = chosen.iter().filter(|&&c| (c as usize) < i).count();
            assert_eq!(out[2][i], before as f64);
        }
        let int = |v: &V| v.iter().map(|&x| x as i32).collect::<Vec<i32>>();
        let (ord, slot) = (I(vec![rows], int(&out[0])), I(vec![rows], int(&out[1])));
        let x = g.f(3, &[t, d]);
        let xs = data(std::slice::from_ref(&x)).remove(0);
        let want: V = (0..rows * d)
            .map(|i| xs[order[i / d] / k * d + i % d])
            .collect();
        let got = g.run(
            &[x, ord.clone(), slot.clone()],
            &[R::F(vec![rows, d])],
            gather_rows,
        );
        g.close("gather_rows", &got[0], &want);
        let (y, weights, dx) = (g.f(6, &[rows, d]), g.s(7, &[t, k]), g.f(8, &[t, d]));
        let a = data(&[y.clone(), weights.clone(), dx.clone()]);
        let mut want = vec![0.0; t * d];
        let mut dy = vec![0.0; rows * d];
        let mut dw = vec![0.0; rows];
        for (r, &f) in order.iter().enumerate() {
            for i in 0..d {
                want[f / k * d + i] += a[1][f] * a[0][r * d + i];
                dy[r * d + i] = a[1][f] * a[2][f / k * d + i];
                dw[f] += a[0][r * d + i] * a[2][f / k * d + i];
            }
        }
        let args = [y.clone(), ord.clone(), slot.clone(), weights.clone()];
        let got = g.run(&args, &[R::F(vec![t, d])], combine);
        g.close("combine", &got[0], &want);
        let got = g.run(
            &[y, ord, slot, weights, dx],
            &[R::F(vec![rows, d]), R::S(vec![t, k])],
            combine_bwd,
        );
        g.close("dy of combine", &got[0], &dy);
        g.close("dweights of combine", &got[1], &dw);
    });
}

#[test]
fn moves_sums_and_updates() {
    with_device(|g| {
        let x = g.f(1, &[3, 4, 6]);
        let v = data(std::slice::from_ref(&x)).remove(0);
        let parts = g.run(
            std::slice::from_ref(&x),
            &[R::F(vec![3, 4, 2]), R::F(vec![3, 4, 4])],
            split,
        );
        let joined = g.run(
            &[
                F(vec![3, 4, 2], parts[0].clone()),
                F(vec![3, 4, 4], parts[1].clone()),
            ],
            &[R::F(vec![3, 4, 6])],
            concat,
        );
        assert_eq!(joined[0], v);
        assert_eq!(parts[1][..4], v[2..6]);
        let out = g.run(std::slice::from_ref(&x), &[R::F(vec![3, 1, 6])], last);
        assert_eq!(out[0][6..12], v[42..48]);
        let back = g.run(
            &[F(vec![3, 1, 6], out[0].clone())],
            &[R::F(vec![3, 4, 6])],
            last_bwd,
        );
        let want: V = (0..72)
            .map(|e| if e / 6 % 4 == 3 { v[e] } else { 0.0 })
            .collect();
        assert_eq!(back[0], want);
        let sum = |n: usize, f: &dyn Fn(usize) -> usize| -> V {
            let mut s = vec![0.0; n];
            for (e, x) in v.iter().enumerate() {
                s[f(e)] += x;
            }
            s
        };
        g.close(
            "sum of rows",
            &g.run(std::slice::from_ref(&x), &[R::S(vec![6])], |r, a| {
                sum_to(r, a, false)
            })[0],
            &sum(6, &|e| e % 6),
        );
        g.close(
            "sum of columns",
            &g.run(std::slice::from_ref(&x), &[R::S(vec![3, 4, 1])], |r, a| {
                sum_to(r, a, true)
            })[0],
            &sum(12, &|e| e / 6),
        );
        g.close(
            "sum",
            &g.run(std::slice::from_ref(&x), &[R::S(vec![1])], |r, a| {
                sum_to(r, a, false)
            })[0],
            &sum(1, &|_| 0),
        );
        let ms = v.iter().map(|x| x * x).sum::<f64>();
        g.close(
            "mean_square",
            &g.run(std::slice::from_ref(&x), &[R::S(vec![1])], mean_square)[0],
            &[ms / 72.0],
        );
        g.close(
            "global_norm",
            &g.run(&[x.clone(), No, x.clone()], &[R::S(vec![1])], global_norm)[0],
            &[(2.0 * ms).sqrt()],
        );
        let s = &g.run(std::slice::from_ref(&x), &[R::S(vec![70])], stat)[0];
        g.close(
            "stat",
            &[s[0], s[5], s[6..].iter().sum()],
            &[(ms / 72.0).sqrt(), v.iter().sum::<f64>() / 72.0, 72.0],
        );
        let wide = g.run(std::slice::from_ref(&x), &[R::S(vec![3, 4, 6])], cast);
        assert_eq!(wide[0], v);
        // Rows 1..3 of a buffer.
        let out = g.run(
            &[
                S(vec![4, 6], vec![1.0; 24]),
                S(vec![1], vec![0.5]),
                F(vec![2, 6], v[..12].to_vec()),
            ],
            &[R::Arg(0)],
            |r, a| accumulate(r, a, 1, 2),
        );
        let want: V = (0..24)
            .map(|e| {
                if (6..18).contains(&e) {
                    0.5 + v[e - 6]
                } else {
                    1.0
                }
            })
            .collect();
        g.close("accumulate", &out[0], &want);
        // More of them than a launch takes, long and short.
        let lengths: Vec<usize> = (0..70).map(|i| 1 + i * i * 37 % 900).collect();
        let all: usize = lengths.iter().sum();
        let (into, term) = (g.s(5, &[all]), g.s(6, &[all]));
        let sums = data(&[into.clone(), term.clone()]);
        let out = g.run(
            &[into, term, S(vec![1], vec![0.5])],
            &[R::Arg(0)],
            |r, a| {
                let mut at = 0;
                let list: Vec<(u64, Tensor)> = lengths
                    .iter()
                    .map(|&n| {
                        let x = Tensor {
                            ptr: a.arg(1).ptr + at,
                            dtype: DType::F32,
                            dims: vec![n],
                        };
                        let to = a.res(0).ptr + at;
                        at += 4 * n as u64;
                        (to, x)
                    })
                    .collect();
                accumulate_all(r, a.arg(2), &list);
            },
        );
        let want: V = (0..all).map(|e| 0.5 * sums[0][e] + sums[1][e]).collect();
        g.close("accumulate_all", &out[0], &want);
        // A look-up and its derivative.
        let tokens = I(vec![5], vec![2, 0, 2, 3, 2]);
        let table = g.f(2, &[4, 6]);
        let tv = data(std::slice::from_ref(&table)).remove(0);
        let y = g.run(&[tokens.clone(), table], &[R::F(vec![5, 6])], embed);
        assert_eq!(y[0][24..], tv[12..18]);
        let dy = F(vec![5, 6], v[..30].to_vec());
        let d = g.run(
            &[
                tokens,
                dy,
                S(vec![4, 6], vec![f64::NAN; 24]),
                S(vec![1], vec![0.0]),
            ],
            &[R::Arg(2)],
            embed_bwd,
        );
        let want: V = (0..24)
            .map(|e| {
                [1, 9, 0, 3]
                    .iter()
                    .enumerate()
                    .filter(|(r, _)| *r == e / 6)
                    .map(|_| match e / 6 {
                        2 => v[e % 6] + v[12 + e % 6] + v[24 + e % 6],
                        0 => v[6 + e % 6],
                        3 => v[18 + e % 6],
                        _ => 0.0,
                    })
                    .sum()
            })
            .collect();
        g.close("embed_bwd", &d[0], &want);
        let cache = g.run(
            &[
                F(vec![1, 4, 1, 6], vec![0.0; 24]),
                F(vec![1, 2, 1, 6], v[..12].to_vec()),
                I(vec![1], vec![1]),
            ],
            &[R::Arg(0)],
            cache_write,
        );
        let want: V = (0..24)
            .map(|e| if (6..18).contains(&e) { v[e - 6] } else { 0.0 })
            .collect();
        assert_eq!(cache[0], want);
        // Rotation by position, and back; the second one in vectors.
        for (t, h, width, dims) in [(7, 2, 6, 4), (37, 3, 40, 32)] {
            let half = dims / 2;
            let inv: V = (0..half).map(|i| 0.1f64.powi(i as i32 % 3)).collect();
            let shape = vec![1, t, h, width];
            let q = g.f(3, &shape);
            let qv = data(std::slice::from_ref(&q)).remove(0);
            let inv_freq = S(vec![half], inv.clone());
            let r = g.run(
                &[q, No, inv_freq.clone()],
                &[R::F(shape.clone())],
                |r, a| rope(r, a, dims, 1.0, false),
            );
            let want: V = (0..t * h * width)
                .map(|e| {
                    let (p, t) = (e % width, e / (h * width));
                    if p >= dims {
                        return qv[e];
                    }
                    let a = t as f64 * inv[p % half];
                    if p < half {
                        qv[e] * a.cos() - qv[e + half] * a.sin()
                    } else {
                        qv[e] * a.cos() + qv[e - half] * a.sin()
                    }
                })
                .collect();
            g.close("rope", &r[0], &want);
            let back = g.run(
                &[F(shape.clone(), r[0].clone()), No, inv_freq],
                &[R::F(shape)],
                |r, a| rope(r, a, dims, 1.0, true),
            );
            g.close("rope back", &back[0], &qv);
        }
        // A step of the optimiser.
        for (n, master) in [(30, false), (30, true), (64, true)] {
            let p = if master { g.s(4, &[n]) } else { g.f(4, &[n]) };
            let gr = g.s(5, &[n]);
            let d = data(&[p.clone(), gr.clone()]);
            let op = AdamW {
                betas: (0.9, 0.999),
                eps: 1e-8,
                clip: 1.0,
                tensors: vec![(0.1, 2.0)],
                copies: vec![0],
            };
            let out = g.run(
                &[
                    S(vec![1], vec![0.01]),
                    S(vec![1], vec![1.0]),
                    S(vec![1], vec![4.0]),
                    p,
                    gr,
                    S(vec![n], vec![0.0; n]),
                    S(vec![n], vec![0.0; n]),
                    F(vec![n], vec![0.0; n]),
                ],
                &[R::Arg(3), R::Arg(5), R::Arg(6), R::Arg(7)],
                |r, a| adamw(r, a, &op),
            );
            let want: V = (0..n)
                .map(|i| {
                    let x = d[1][i] / 4.0;
                    d[0][i] - 0.02 * (x / (x.abs() + 1e-8) + 0.1 * d[0][i])
                })
                .collect();
            g.close("adamw", &out[0], &want);
            g.close("adamw copy", &out[3], &want);
            g.close(
                "adamw m",
                &out[1],
                &d[1].iter().map(|x| 0.1 * x / 4.0).collect::<V>(),
            );
        }
        // An elementwise program: silu(x0) * x1 + 2 x2, x1 by column, x2 by row.
        let program = Program {
            code: vec![
                Instr::Arg(0),
                Instr::Arg(1),
                Instr::Arg(2),
                Instr::Un(Un::Silu, 0),
                Instr::Bin(Bin::Mul, 3, 1),
                Instr::Un(Un::Scale(2.0), 2),
                Instr::Bin(Bin::Add, 4, 5),
            ],
            outs: vec![6],
            broadcast: vec![Broadcast::Full, Broadcast::Suffix(6), Broadcast::Prefix(6)],
        };
        let (c, w) = (g.s(6, &[6]), g.f(7, &[12, 1]));
        let d = data(&[c.clone(), w.clone()]);
        let out = g.run(&[x, c, w], &[R::F(vec![12, 6])], |r, a| {
            pointwise(r, a, &program)
        });
        let want: V = (0..72)
            .map(|e| silu(v[e]) * d[0][e % 6] + 2.0 * d[1][e / 6])
            .collect();
        g.close("pointwise", &out[0], &want);
    });
}

/// More tokens than a block looks at in one go, and words that come back near and far.
#[test]
fn embedding_of_many_tokens() {
    with_device(|g| {
        for (n, words, d) in [(2500, 700, 24), (1100, 3, 20)] {
            let tokens: Vec<i32> = (0..n)
                .map(|i: usize| (i * i * 31 + i / 7) as i32 % words)
                .collect();
            let dy = g.f(1, &[n, d]);
            let from = data(std::slice::from_ref(&dy)).remove(0);
            let table = S(vec![words as usize, d], vec![f64::NAN; words as usize * d]);
            let args = [I(vec![n], tokens.clone()), dy, table, S(vec![1], vec![0.0])];
            let out = g.run(&args, &[R::Arg(2)], embed_bwd);
            let mut want = vec![0.0; words as usize * d];
            for (j, &t) in tokens.iter().enumerate() {
                for c in 0..d {
                    want[t as usize * d + c] += from[j * d + c];
                }
            }
            g.close("embed_bwd", &out[0], &want);
            let table = g.f(2, &[words as usize, d]);
            let rows = data(std::slice::from_ref(&table)).remove(0);
            let y = g.run(
                &[I(vec![n], tokens.clone()), table],
                &[R::F(vec![n, d])],
                embed,
            );
            for (j, &t) in tokens.iter().enumerate() {
                assert_eq!(y[0][j * d..][..d], rows[t as usize * d..][..d]);
            }
        }
    });
}
