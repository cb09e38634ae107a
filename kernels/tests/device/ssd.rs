//! Mamba-2's scan.

use super::*;

#[test]
fn mamba2() {
    with_device(|g| {
        let (b, t, h, p, gr, n) = (2, 11, 4, 3, 2, 21);
        for (pos, low) in [(No, 0.0), (positions(b, t), 0.4)] {
            let av = S(
                vec![h],
                g.noise(3, h).iter().map(|x| -0.1 - x.abs()).collect(),
            );
            let args = [
                g.f(1, &[b, t, h, p]),
                g.f(2, &[b, t, h]),
                av,
                g.f(4, &[b, t, gr, n]),
                g.f(5, &[b, t, gr, n]),
                g.s(6, &[h]),
                g.s(7, &[h]),
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
                                if !a[7].is_empty() && a[7][row] == 0.0 {
                                    s.fill(0.0);
                                }
                                let dt = softplus(a[1][th] + a[6][hh]).max(low);
                                let x = a[0][th * p + pp];
                                let mut v = a[5][hh] * x;
                                for k in 0..n {
                                    s[k] = (dt * a[2][hh]).exp() * s[k] + dt * x * a[3][m + k];
                                    v += s[k] * a[4][m + k];
                                }
                                y[th * p + pp] = v;
                            }
                        }
                    }
                }
                y
            };
            let a = data(&args);
            let limit = (low as f32, f32::INFINITY);
            let saved = vec![b, t.div_ceil(4), h, p, n];
            let out = g.run(
                &args,
                &[R::F(vec![b, t, h, p]), R::S(saved.clone())],
                |r, a| ssd(r, a, 4, limit),
            );
            g.close("ssd", &out[0], &forward(&a));
            let dy = g.f(9, &[b, t, h, p]);
            let c = data(std::slice::from_ref(&dy)).remove(0);
            let mut bwd = args.to_vec();
            bwd.extend([S(saved, out[1].clone()), dy]);
            let bc = vec![b, t, gr, n];
            let d = g.run(
                &bwd,
                &[
                    R::F(vec![b, t, h, p]),
                    R::F(vec![b, t, h]),
                    R::S(vec![h]),
                    R::F(bc.clone()),
                    R::F(bc),
                    R::S(vec![h]),
                    R::S(vec![h]),
                ],
                |r, a| ssd_bwd(r, a, 4, limit),
            );
            for (k, d) in d.iter().enumerate() {
                g.gradient("ssd", d, &a, k, &c, forward);
            }
        }
    });
}

/// Sizes of a case of the Mamba-2 scan.
#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    t: usize,
    h: usize,
    p: usize,
    g: usize,
    n: usize,
    chunk: usize,
}

/// What the Mamba-2 scan and its derivative give, token by token: y, the last state, then dx, ddt, da, db, dc, dd, ddt_bias.
fn ssd_reference(z: Sizes, a: &[V], state: &[f64], low: f64, dy: &[f64]) -> (V, V, Vec<V>) {
    let Sizes {
        b, t, h, p, g, n, ..
    } = z;
    let (mut y, mut last) = (vec![0.0; b * t * h * p], vec![0.0; b * h * p * n]);
    let mut d: Vec<V> = [
        b * t * h * p,
        b * t * h,
        h,
        b * t * g * n,
        b * t * g * n,
        h,
        h,
    ]
    .iter()
    .map(|&len| vec![0.0; len])
    .collect();
    for (bi, hh) in (0..b).flat_map(|bi| (0..h).map(move |hh| (bi, hh))) {
        let th = |tt: usize| (bi * t + tt) * h + hh;
        let m = |tt: usize| ((bi * t + tt) * g + hh / (h / g)) * n;
        let raw: V = (0..t).map(|tt| a[1][th(tt)] + a[6][hh]).collect();
        let dt: V = raw.iter().map(|&x| softplus(x).max(low)).collect();
        let decay: V = (0..t)
            .map(|tt| match !a[7].is_empty() && a[7][bi * t + tt] == 0.0 {
                true => 0.0,
                false => (dt[tt] * a[2][hh]).exp(),
            })
            .collect();
        let (mut d_log, mut d_dt) = (vec![0.0; t], vec![0.0; t]);
        for pp in 0..p {
            let own = ((bi * h + hh) * p + pp) * n;
            let mut s = vec![0.0; (t + 1) * n];
            if !state.is_empty() {
                s[..n].copy_from_slice(&state[own..own + n]);
            }
            for tt in 0..t {
                let x = a[0][th(tt) * p + pp];
                let mut v = a[5][hh] * x;
                for k in 0..n {
                    let now = decay[tt] * s[tt * n + k] + dt[tt] * x * a[3][m(tt) + k];
                    s[(tt + 1) * n + k] = now;
                    v += now * a[4][m(tt) + k];
                }
                y[th(tt) * p + pp] = v;
            }
            last[own..own + n].copy_from_slice(&s[t * n..]);
            let mut ds = vec![0.0; n];
            for tt in (0..t).rev() {
                let e = th(tt) * p + pp;
                let (x, v, mut sb) = (a[0][e], dy[e], 0.0);
                for k in 0..n {
                    d[4][m(tt) + k] += v * s[(tt + 1) * n + k];
                    ds[k] += v * a[4][m(tt) + k];
                    sb += ds[k] * a[3][m(tt) + k];
                    d[3][m(tt) + k] += ds[k] * dt[tt] * x;
                    d_log[tt] += ds[k] * decay[tt] * s[tt * n + k];
                    ds[k] *= decay[tt];
                }
                d[0][e] = dt[tt] * sb + a[5][hh] * v;
                d_dt[tt] += sb * x;
                d[5][hh] += v * x;
            }
        }
        for tt in 0..t {
            d[2][hh] += d_log[tt] * dt[tt];
            if softplus(raw[tt]) >= low {
                let v = (d_dt[tt] + d_log[tt] * a[2][hh]) * sigmoid(raw[tt]);
                d[1][th(tt)] = v;
                d[6][hh] += v;
            }
        }
    }
    (y, last, d)
}

/// Many tokens, odd ones, parts of time, groups, wide and narrow heads and states: what goes through tensor cores in bf16.
fn sizes([b, t, h, p, g, n, chunk]: [usize; 7]) -> Sizes {
    Sizes {
        b,
        t,
        h,
        p,
        g,
        n,
        chunk,
    }
}

#[test]
fn mamba2_in_tiles() {
    in_tiles(&[
        (sizes([2, 150, 4, 64, 1, 128, 128]), false, 0.0),
        (sizes([1, 320, 6, 64, 1, 128, 256]), true, 0.0),
    ]);
}

#[test]
fn mamba2_in_tiles_of_documents() {
    in_tiles(&[(sizes([1, 330, 4, 64, 2, 128, 100]), true, 0.4)]);
}

#[test]
fn mamba2_in_small_tiles() {
    in_tiles(&[
        (sizes([2, 75, 3, 5, 1, 21, 16]), true, 0.0),
        (sizes([1, 90, 4, 32, 2, 64, 256]), true, 0.0),
    ]);
}

/// So many heads that a block takes several of them one after the other.
#[test]
fn mamba2_in_tiles_of_many_heads() {
    in_tiles(&[
        (sizes([4, 130, 96, 8, 1, 16, 64]), false, 0.0),
        (sizes([2, 129, 100, 72, 1, 24, 64]), true, 0.0),
    ]);
}

#[test]
fn mamba2_in_wide_tiles() {
    in_tiles(&[
        (sizes([1, 130, 2, 96, 1, 128, 64]), true, 0.0),
        (sizes([1, 33, 2, 200, 2, 48, 32]), true, 0.0),
    ]);
}

#[test]
fn mamba2_in_tiles_of_wide_states() {
    in_tiles(&[(sizes([1, 75, 2, 64, 1, 256, 50]), true, 0.0)]);
}

fn in_tiles(shapes: &[(Sizes, bool, f64)]) {
    for &(z, documents, low) in shapes {
        let (plain, carried_on) = (OnceCell::new(), OnceCell::new());
        with_device(|gpu| {
            // No kernel here chooses its order.
            if gpu.target.deterministic {
                return;
            }
            let Sizes {
                b,
                t,
                h,
                p,
                g,
                n,
                chunk,
            } = z;
            let av = gpu
                .noise(3, h)
                .iter()
                .map(|x| -0.1 - x.abs() / 2.0)
                .collect();
            // Documents begin in and at the ends of tiles, one right after another, and elsewhere in each row.
            let pos = match documents {
                true => {
                    let begins = [0, 5, 6, 15, 16, 63, 64, 100, 150, 200, 256, 300];
                    let first = |i: usize| (i % t) as i32 - (i / t) as i32;
                    let since = |p: i32| {
                        begins
                            .iter()
                            .filter(|&&f| f <= p)
                            .max()
                            .map_or(1, |f| p - f)
                    };
                    I(vec![b, t], (0..b * t).map(|i| since(first(i))).collect())
                }
                false => No,
            };
            let args = [
                gpu.f(1, &[b, t, h, p]),
                gpu.f(2, &[b, t, h]),
                S(vec![h], av),
                gpu.f(4, &[b, t, g, n]),
                gpu.f(5, &[b, t, g, n]),
                gpu.s(6, &[h]),
                gpu.s(7, &[h]),
                pos,
            ];
            let a = data(&args);
            let limit = (low as f32, f32::INFINITY);
            let dy = gpu.f(9, &[b, t, h, p]);
            let c = data(std::slice::from_ref(&dy)).remove(0);
            let (y, _, want) = plain.get_or_init(|| ssd_reference(z, &a, &[], low, &c));
            let saved = vec![b, t.div_ceil(chunk), h, p, n];
            let results = [R::F(vec![b, t, h, p]), R::S(saved.clone())];
            let out = gpu.run(&args, &results, |r, a| ssd(r, a, chunk, limit));
            gpu.close("ssd", &out[0], y);
            let mut bwd = args.to_vec();
            bwd.extend([S(saved, out[1].clone()), dy]);
            let bc = vec![b, t, g, n];
            let results = [
                R::F(vec![b, t, h, p]),
                R::F(vec![b, t, h]),
                R::S(vec![h]),
                R::F(bc.clone()),
                R::F(bc),
                R::S(vec![h]),
                R::S(vec![h]),
            ];
            let d = gpu.run(&bwd, &results, |r, a| ssd_bwd(r, a, chunk, limit));
            for (k, (d, want)) in d.iter().zip(want).enumerate() {
                gpu.close(&format!("ssd gradient {k} T{t} P{p} N{n}"), d, want);
            }
            let again = gpu.run(&bwd, &results, |r, a| ssd_bwd(r, a, chunk, limit));
            assert!(again == d, "runs differ");
            // From a state, and to one.
            let start = gpu.s(8, &[b, h, p, n]);
            let s0 = data(std::slice::from_ref(&start)).remove(0);
            let (y, last, _) = carried_on.get_or_init(|| ssd_reference(z, &a, &s0, low, &c));
            let mut carried = args.to_vec();
            carried.push(start);
            let results = [R::F(vec![b, t, h, p]), R::Arg(8)];
            let out = gpu.run(&carried, &results, |r, a| ssd(r, a, chunk, limit));
            gpu.close("ssd from a state", &out[0], y);
            gpu.close("ssd state", &out[1], last);
        });
    }
}
