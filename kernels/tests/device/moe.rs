//! Experts.

use super::*;

#[test]
fn experts() {
    with_device(|g| {
        let (t, e, k, d, n) = (70, 5, 2, 9, 11);
        let logits = g.s(1, &[t, e]);
        let op = Route {
            top_k: k,
            score: 0,
            normalize: true,
            groups: 1,
            top_groups: 1,
            scale: 1.5,
        };
        let out = g.run(
            &[logits.clone(), No],
            &[R::S(vec![t, k]), R::I(vec![t, k])],
            |r, a| route(r, a, &op),
        );
        let chosen: Vec<i32> = out[1].iter().map(|&x| x as i32).collect();
        let a = data(std::slice::from_ref(&logits));
        let forward = |a: &[V]| -> V {
            (0..t * k)
                .map(|f| {
                    let row = f / k;
                    let x = |j: usize| a[0][row * e + chosen[row * k + j] as usize].exp();
                    1.5 * x(f % k) / (0..k).map(x).sum::<f64>()
                })
                .collect()
        };
        g.close("route", &out[0], &forward(&a));
        for row in 0..t {
            let best = (0..e)
                .max_by(|&i, &j| a[0][row * e + i].total_cmp(&a[0][row * e + j]))
                .unwrap();
            assert_eq!(chosen[row * k] as usize, best);
        }
        let dw = g.s(2, &[t, k]);
        let c = data(std::slice::from_ref(&dw)).remove(0);
        let choice = I(vec![t, k], chosen.clone());
        let dl = g.run(
            &[logits.clone(), choice.clone(), dw],
            &[R::S(vec![t, e])],
            |r, a| route_bwd(r, a, &op),
        );
        g.gradient("route", &dl[0], &a, 0, &c, forward);
        let balanced = |a: &[V]| -> V {
            let mut s = 0.0;
            for i in 0..e {
                let f = chosen.iter().filter(|&&c| c as usize == i).count() as f64 / (t * k) as f64;
                s += f
                    * (0..t)
                        .map(|r| {
                            a[0][r * e + i].exp()
                                / (0..e).map(|j| a[0][r * e + j].exp()).sum::<f64>()
                        })
                        .sum::<f64>()
                    / t as f64;
            }
            vec![s * e as f64]
        };
        g.close(
            "balance",
            &g.run(&[logits.clone(), choice.clone()], &[R::S(vec![1])], balance)[0],
            &balanced(&a),
        );
        let db = g.run(
            &[logits, choice.clone(), S(vec![1], vec![2.0])],
            &[R::S(vec![t, e])],
            balance_bwd,
        );
        g.gradient("balance", &db[0], &a, 0, &[2.0], balanced);
        let rows = t * k;
        let out = g.run(
            &[choice],
            &[R::I(vec![rows]), R::I(vec![rows]), R::I(vec![e + 1])],
            |r, a| dispatch(r, a, e),
        );
        let mut order: Vec<usize> = (0..rows).collect();
        order.sort_by_key(|&f| chosen[f]);
        assert_eq!(out[0], order.iter().map(|&f| f as f64).collect::<V>());
        let int = |v: &V| v.iter().map(|&x| x as i32).collect::<Vec<i32>>();
        let (ord, slot, off) = (
            I(vec![rows], int(&out[0])),
            I(vec![rows], int(&out[1])),
            I(vec![e + 1], int(&out[2])),
        );
        let x = g.f(3, &[t, d]);
        let gathered = g.run(
            &[x.clone(), ord.clone(), slot.clone()],
            &[R::F(vec![rows, d])],
            gather_rows,
        );
        let xs = data(std::slice::from_ref(&x)).remove(0);
        let want: V = (0..rows * d)
            .map(|i| xs[order[i / d] / k * d + i % d])
            .collect();
        g.close("gather_rows", &gathered[0], &want);
        // Products.
        let args = [F(vec![rows, d], want), g.f(4, &[e, n, d]), off.clone()];
        let a = data(&args);
        let expert = |r: usize| chosen[order[r]] as usize;
        let forward = |a: &[V]| -> V {
            (0..rows * n)
                .map(|i| {
                    (0..d)
                        .map(|j| a[0][i / n * d + j] * a[1][(expert(i / n) * n + i % n) * d + j])
                        .sum()
                })
                .collect()
        };
        g.close(
            "grouped_linear",
            &g.run(&args, &[R::F(vec![rows, n])], grouped_linear)[0],
            &forward(&a),
        );
        let dy = g.f(5, &[rows, n]);
        let c = data(std::slice::from_ref(&dy)).remove(0);
        let dx = g.run(
            &[dy.clone(), args[1].clone(), off.clone()],
            &[R::F(vec![rows, d])],
            grouped_linear_dx,
        );
        g.gradient("grouped_linear", &dx[0], &a, 0, &c, forward);
        let dw = g.run(
            &[
                args[0].clone(),
                dy,
                off,
                S(vec![e, n, d], vec![f64::NAN; e * n * d]),
                S(vec![1], vec![0.0]),
            ],
            &[R::Arg(3)],
            grouped_linear_dw,
        );
        g.gradient("grouped_linear", &dw[0], &a, 1, &c, forward);
        // Back to tokens.
        let args = [g.f(6, &[rows, d]), ord, slot, g.s(7, &[t, k])];
        let a = data(&args);
        let forward = |a: &[V]| -> V {
            (0..t * d)
                .map(|i| {
                    (0..k)
                        .map(|j| {
                            let f = i / d * k + j;
                            a[3][f] * a[0][a[2][f] as usize * d + i % d]
                        })
                        .sum()
                })
                .collect()
        };
        g.close(
            "combine",
            &g.run(&args, &[R::F(vec![t, d])], combine)[0],
            &forward(&a),
        );
        let dx = g.f(8, &[t, d]);
        let c = data(std::slice::from_ref(&dx)).remove(0);
        let mut bwd = args.to_vec();
        bwd.push(dx);
        let back = g.run(&bwd, &[R::F(vec![rows, d]), R::S(vec![t, k])], combine_bwd);
        g.gradient("combine", &back[0], &a, 0, &c, forward);
        g.gradient("combine", &back[1], &a, 3, &c, forward);
    });
}

/// Several tiles, experts without rows, sizes that fill no tile.
#[test]
fn experts_over_many_tiles() {
    with_device(|g| {
        for (e, n, k, counts) in [
            (4, 264, 136, vec![130, 0, 257, 65]),
            (3, 72, 200, vec![1, 63, 64]),
            (2, 16, 8, vec![0, 5]),
            (3, 33, 17, vec![40, 0, 100]),
        ] {
            let rows: usize = counts.iter().sum();
            let mut offsets = vec![0];
            let mut of = Vec::new();
            for (i, c) in counts.iter().enumerate() {
                of.extend(std::iter::repeat_n(i, *c));
                offsets.push(of.len() as i32);
            }
            let offsets = I(vec![e + 1], offsets);
            let args = [g.f(1, &[rows, k]), g.f(2, &[e, n, k]), g.f(3, &[rows, n])];
            let a = data(&args);
            let [x, w, dy] = args;
            let mut y = vec![0.0; rows * n];
            let mut dx = vec![0.0; rows * k];
            let mut dw = vec![0.0; e * n * k];
            for r in 0..rows {
                for i in 0..n {
                    let c = (of[r] * n + i) * k;
                    for j in 0..k {
                        y[r * n + i] += a[0][r * k + j] * a[1][c + j];
                        dx[r * k + j] += a[2][r * n + i] * a[1][c + j];
                        dw[c + j] += a[2][r * n + i] * a[0][r * k + j];
                    }
                }
            }
            let what = format!("{counts:?} rows of experts [{n} {k}]");
            let got = g.run(
                &[x.clone(), w.clone(), offsets.clone()],
                &[R::F(vec![rows, n])],
                grouped_linear,
            );
            g.close(&format!("y of {what}"), &got[0], &y);
            let got = g.run(
                &[dy.clone(), w, offsets.clone()],
                &[R::F(vec![rows, k])],
                grouped_linear_dx,
            );
            g.close(&format!("dx of {what}"), &got[0], &dx);
            let got = g.run(
                &[x.clone(), dy.clone(), offsets.clone(), No, No],
                &[R::S(vec![e, n, k])],
                grouped_linear_dw,
            );
            g.close(&format!("dw of {what}"), &got[0], &dw);
            let held = g.noise(7, e * n * k);
            let beta = S(vec![1], vec![0.5]);
            let got = g.run(
                &[x, dy, offsets, S(vec![e, n, k], held.clone()), beta],
                &[R::Arg(3)],
                grouped_linear_dw,
            );
            for (d, h) in dw.iter_mut().zip(&held) {
                *d += 0.5 * h;
            }
            g.close(&format!("dw added for {what}"), &got[0], &dw);
        }
    });
}
