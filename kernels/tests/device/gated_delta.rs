//! The gated delta rule.

use super::*;

#[test]
fn delta_rule() {
    with_device(|g| {
        let (b, t, gr, h, n, p) = (2, 7, 2, 4, 18, 3);
        for pos in [No, positions(b, t)] {
            let small = |g: &Gpu, seed| {
                F(
                    vec![b, t, gr, n],
                    decode(
                        &encode(
                            &g.noise(seed, b * t * gr * n)
                                .iter()
                                .map(|x| x * 0.25)
                                .collect::<V>(),
                            DType::Bf16,
                        ),
                        DType::Bf16,
                    ),
                )
            };
            let gate = S(
                vec![b, t, h],
                g.noise(4, b * t * h).iter().map(|x| -x.abs()).collect(),
            );
            let beta = S(
                vec![b, t, h],
                g.noise(5, b * t * h).iter().map(|x| sigmoid(*x)).collect(),
            );
            let args = [
                small(g, 1),
                small(g, 2),
                g.f(3, &[b, t, h, p]),
                gate,
                beta,
                pos,
            ];
            let forward = |a: &[V]| -> V {
                let mut y = vec![0.0; b * t * h * p];
                for bi in 0..b {
                    for hh in 0..h {
                        for pp in 0..p {
                            let mut s = vec![0.0; n];
                            for tt in 0..t {
                                let row = bi * t + tt;
                                let th = row * h + hh;
                                let m = (row * gr + hh / (h / gr)) * n;
                                if !a[5].is_empty() && a[5][row] == 0.0 {
                                    s.fill(0.0);
                                }
                                let mut r = 0.0;
                                for k in 0..n {
                                    s[k] *= a[3][th].exp();
                                    r += s[k] * a[1][m + k];
                                }
                                let delta = a[4][th] * (a[2][th * p + pp] - r);
                                for k in 0..n {
                                    s[k] += a[1][m + k] * delta;
                                    y[th * p + pp] += s[k] * a[0][m + k];
                                }
                            }
                        }
                    }
                }
                y
            };
            let a = data(&args);
            let saved = vec![b, t.div_ceil(4), h, n, p];
            let out = g.run(
                &args,
                &[R::F(vec![b, t, h, p]), R::S(saved.clone())],
                |r, a| gated_delta(r, a, 4),
            );
            g.close("gated_delta", &out[0], &forward(&a));
            let dy = g.f(9, &[b, t, h, p]);
            let c = data(std::slice::from_ref(&dy)).remove(0);
            let mut bwd = args.to_vec();
            bwd.extend([S(saved, out[1].clone()), dy]);
            let q = vec![b, t, gr, n];
            let d = g.run(
                &bwd,
                &[
                    R::F(q.clone()),
                    R::F(q),
                    R::F(vec![b, t, h, p]),
                    R::S(vec![b, t, h]),
                    R::S(vec![b, t, h]),
                ],
                |r, a| gated_delta_bwd(r, a, 4),
            );
            for (k, d) in d.iter().enumerate() {
                g.gradient("gated_delta", d, &a, k, &c, forward);
            }
        }
    });
}

/// Sizes of a case.
#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    t: usize,
    g: usize,
    h: usize,
    n: usize,
    p: usize,
    chunk: usize,
}

fn sizes([b, t, g, h, n, p, chunk]: [usize; 7]) -> Sizes {
    Sizes {
        b,
        t,
        g,
        h,
        n,
        p,
        chunk,
    }
}

/// What the rule and its derivative give, token by token: o, the last state, then dq, dk, dv, dg, dbeta.
fn reference(z: Sizes, a: &[V], state: &[f64], dout: &[f64]) -> (V, V, Vec<V>) {
    let Sizes {
        b, t, g, h, n, p, ..
    } = z;
    let (mut o, mut last) = (vec![0.0; b * t * h * p], vec![0.0; b * h * n * p]);
    let (keys, scalars) = (b * t * g * n, b * t * h);
    let mut d: Vec<V> = [keys, keys, b * t * h * p, scalars, scalars]
        .iter()
        .map(|&len| vec![0.0; len])
        .collect();
    for (bi, hh) in (0..b).flat_map(|bi| (0..h).map(move |hh| (bi, hh))) {
        let th = |tt: usize| (bi * t + tt) * h + hh;
        let key = |tt: usize| ((bi * t + tt) * g + hh / (h / g)) * n;
        let decay: V = (0..t)
            .map(|tt| match !a[5].is_empty() && a[5][bi * t + tt] == 0.0 {
                true => 0.0,
                false => a[3][th(tt)].exp(),
            })
            .collect();
        for pp in 0..p {
            let own = (bi * h + hh) * n * p + pp;
            let mut s = vec![0.0; (t + 1) * n];
            for k in 0..n {
                s[k] = state.get(own + k * p).copied().unwrap_or(0.0);
            }
            let mut error = vec![0.0; t];
            for tt in 0..t {
                let (at, m) = (th(tt), key(tt));
                let (before, after) = s.split_at_mut((tt + 1) * n);
                let before = &before[tt * n..];
                let seen: f64 = (0..n).map(|k| a[1][m + k] * decay[tt] * before[k]).sum();
                error[tt] = a[2][at * p + pp] - seen;
                for k in 0..n {
                    after[k] = decay[tt] * before[k] + a[1][m + k] * a[4][at] * error[tt];
                    o[at * p + pp] += after[k] * a[0][m + k];
                }
            }
            for k in 0..n {
                last[own + k * p] = s[t * n + k];
            }
            let mut ds = vec![0.0; n];
            for tt in (0..t).rev() {
                let (at, m) = (th(tt), key(tt));
                let (beta, go) = (a[4][at], dout[at * p + pp]);
                let mut write = 0.0;
                for k in 0..n {
                    d[0][m + k] += s[(tt + 1) * n + k] * go;
                    ds[k] += a[0][m + k] * go;
                    write += ds[k] * a[1][m + k];
                }
                d[2][at * p + pp] = beta * write;
                d[4][at] += write * error[tt];
                for k in 0..n {
                    let decayed = decay[tt] * s[tt * n + k];
                    d[1][m + k] += beta * (ds[k] * error[tt] - decayed * write);
                    ds[k] -= a[1][m + k] * beta * write;
                    d[3][at] += ds[k] * decayed;
                    ds[k] *= decay[tt];
                }
            }
        }
    }
    (o, last, d)
}

/// Many tokens, odd ones, documents, groups, wide and narrow heads: what goes through tensor cores in bf16.
#[test]
fn delta_rule_in_tiles() {
    in_tiles(sizes([2, 150, 2, 4, 128, 128, 64]), false, 1.0);
}

#[test]
fn delta_rule_in_tiles_of_documents() {
    in_tiles(sizes([1, 330, 2, 4, 128, 64, 100]), true, 0.2);
}

#[test]
fn delta_rule_in_small_tiles() {
    in_tiles(sizes([2, 75, 3, 3, 21, 5, 16]), true, 1.0);
    in_tiles(sizes([1, 200, 1, 3, 64, 24, 256]), true, 0.05);
}

#[test]
fn delta_rule_in_wide_tiles() {
    in_tiles(sizes([1, 130, 1, 3, 96, 200, 64]), true, 0.2);
    in_tiles(sizes([1, 75, 1, 2, 200, 72, 50]), true, 0.2);
    in_tiles(sizes([1, 70, 1, 1, 256, 256, 64]), false, 0.2);
}

/// `rate`: the largest log decay.
fn in_tiles(z: Sizes, documents: bool, rate: f64) {
    let (plain, carried_on) = (OnceCell::new(), OnceCell::new());
    with_device(|gpu| {
        // No kernel here chooses its order.
        if gpu.target.deterministic {
            return;
        }
        let Sizes {
            b,
            t,
            g,
            h,
            n,
            p,
            chunk,
        } = z;
        let pos = match documents {
            // At 5, at both sides of the edge of a tile, and one token long.
            true => {
                let mut from = 0;
                let row = (0..t as i32).map(|i| {
                    if [0, 5, 63, 64, 100, 101].contains(&i) {
                        from = i;
                    }
                    i - from
                });
                let row: Vec<i32> = row.collect();
                I(vec![b, t], row.repeat(b))
            }
            false => No,
        };
        // Keys and queries of length 1, as the layer gives them.
        let unit = |seed| {
            let mut x = gpu.noise(seed, b * t * g * n);
            for row in x.chunks_mut(n) {
                let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
                row.iter_mut().for_each(|v| *v /= norm);
            }
            F(
                vec![b, t, g, n],
                decode(&encode(&x, DType::Bf16), DType::Bf16),
            )
        };
        let scalar = |seed, f: &dyn Fn(f64) -> f64| {
            let x = gpu.noise(seed, b * t * h);
            // As f32 holds them.
            let x = x.iter().map(|&x| f64::from(f(x) as f32)).collect();
            S(vec![b, t, h], x)
        };
        let args = [
            unit(1),
            unit(2),
            gpu.f(3, &[b, t, h, p]),
            scalar(4, &|x| -rate * x.abs()),
            scalar(5, &|x| sigmoid(2.0 * x)),
            pos,
        ];
        let a = data(&args);
        let dout = gpu.f(9, &[b, t, h, p]);
        let c = data(std::slice::from_ref(&dout)).remove(0);
        let (o, _, want) = plain.get_or_init(|| reference(z, &a, &[], &c));
        let saved = vec![b, t.div_ceil(chunk), h, n, p];
        let results = [R::F(vec![b, t, h, p]), R::S(saved.clone())];
        let out = gpu.run(&args, &results, |r, a| gated_delta(r, a, chunk));
        gpu.close("gated_delta", &out[0], o);
        let mut bwd = args.to_vec();
        bwd.extend([S(saved, out[1].clone()), dout]);
        let (keys, scalars) = (vec![b, t, g, n], vec![b, t, h]);
        let results = [
            R::F(keys.clone()),
            R::F(keys),
            R::F(vec![b, t, h, p]),
            R::S(scalars.clone()),
            R::S(scalars),
        ];
        let d = gpu.run(&bwd, &results, |r, a| gated_delta_bwd(r, a, chunk));
        for (k, (d, want)) in d.iter().zip(want).enumerate() {
            gpu.close(&format!("gated_delta gradient {k} T{t} N{n} P{p}"), d, want);
        }
        let again = gpu.run(&bwd, &results, |r, a| gated_delta_bwd(r, a, chunk));
        assert!(again == d, "runs differ");
        // From a state, and to one.
        let start = gpu.s(8, &[b, h, n, p]);
        let s0 = data(std::slice::from_ref(&start)).remove(0);
        let (o, last, _) = carried_on.get_or_init(|| reference(z, &a, &s0, &c));
        let mut carried = args.to_vec();
        carried.push(start);
        let results = [R::F(vec![b, t, h, p]), R::Arg(6)];
        let out = gpu.run(&carried, &results, |r, a| gated_delta(r, a, chunk));
        gpu.close("gated_delta from a state", &out[0], o);
        gpu.close("gated_delta state", &out[1], last);
    });
}
