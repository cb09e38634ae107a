//! Attention.

use super::*;

#[test]
fn attention_ops() {
    with_device(|g| {
        for (t, p, window, packed) in [
            (9, 5, None, false),
            (45, 4, Some(7), true),
            (5, 200, None, true),
            (40, 8, Some(7), true),
        ] {
            let (b, h, gr) = (1, 4, 2);
            let pos = if packed { positions(b, t) } else { No };
            let args = [
                g.f(1, &[b, t, h, p]),
                g.f(2, &[b, t, gr, p]),
                g.f(3, &[b, t, gr, p]),
                pos,
            ];
            let scale = 0.3;
            let forward = |a: &[V]| -> V {
                let mut y = vec![0.0; b * t * h * p];
                for hh in 0..h {
                    for q in 0..t {
                        let kk = hh / (h / gr);
                        let sees = |s: usize| {
                            s <= q
                                && (a[3].is_empty() || (q - s) as f64 <= a[3][q])
                                && window.is_none_or(|w| q - s < w)
                        };
                        let score = |s: usize| {
                            scale
                                * (0..p)
                                    .map(|i| {
                                        a[0][(q * h + hh) * p + i] * a[1][(s * gr + kk) * p + i]
                                    })
                                    .sum::<f64>()
                        };
                        let e: V = (0..t)
                            .map(|s| if sees(s) { score(s).exp() } else { 0.0 })
                            .collect();
                        let sum: f64 = e.iter().sum();
                        for s in 0..t {
                            for i in 0..p {
                                y[(q * h + hh) * p + i] += e[s] / sum * a[2][(s * gr + kk) * p + i];
                            }
                        }
                    }
                }
                y
            };
            let a = data(&args);
            let out = g.run(
                &args,
                &[R::F(vec![b, t, h, p]), R::S(vec![b, h, t])],
                |r, a| attention(r, a, scale as f32, window),
            );
            g.close("attention", &out[0], &forward(&a));
            let dy = g.f(9, &[b, t, h, p]);
            let c = data(std::slice::from_ref(&dy)).remove(0);
            let mut bwd = args.to_vec();
            bwd.extend([
                F(vec![b, t, h, p], out[0].clone()),
                S(vec![b, h, t], out[1].clone()),
                dy,
            ]);
            let d = g.run(
                &bwd,
                &[
                    R::F(vec![b, t, h, p]),
                    R::F(vec![b, t, gr, p]),
                    R::F(vec![b, t, gr, p]),
                ],
                |r, a| attention_bwd(r, a, scale as f32, window),
            );
            for (k, d) in d.iter().enumerate() {
                g.gradient("attention", d, &a, k, &c, forward);
            }
        }
    });
}

/// Attention and its derivative in f64, by their formulas: out, dq, dk, dv.
fn attention_in_full(
    [q, k, v, dout]: [&V; 4],
    (b, t, h, g, p): (usize, usize, usize, usize, usize),
    sees: impl Fn(usize, usize, usize) -> bool,
    scale: f64,
) -> [V; 4] {
    let mut r = [
        vec![0.0; b * t * h * p],
        vec![0.0; b * t * h * p],
        vec![0.0; b * t * g * p],
        vec![0.0; b * t * g * p],
    ];
    let [out, dq, dk, dv] = &mut r;
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    for i in 0..b * t * h {
        let (row, at, head) = (i / (t * h), i / h % t, i % h);
        let q_at = i * p..(i + 1) * p;
        let kv = |s: usize| {
            let e = (row * t + s) * g + head / (h / g);
            e * p..(e + 1) * p
        };
        let e: V = (0..=at)
            .map(|s| match sees(row, at, s) {
                true => (scale * dot(&q[q_at.clone()], &k[kv(s)])).exp(),
                false => 0.0,
            })
            .collect();
        let sum: f64 = e.iter().sum();
        for s in 0..=at {
            for j in 0..p {
                out[i * p + j] += e[s] / sum * v[kv(s)][j];
            }
        }
        let delta = dot(&out[q_at.clone()], &dout[q_at.clone()]);
        for s in 0..=at {
            let w = e[s] / sum;
            let d = w * (dot(&dout[q_at.clone()], &v[kv(s)]) - delta) * scale;
            let to = kv(s).start;
            for j in 0..p {
                dq[i * p + j] += d * k[to + j];
                dk[to + j] += d * q[i * p + j];
                dv[to + j] += w * dout[i * p + j];
            }
        }
    }
    r
}

/// Several tiles, odd lengths, wide and narrow heads, windows and documents.
#[test]
fn attention_over_many_tiles() {
    attention_of_shapes(&[
        (1, 300, 4, 1, 128, None, 0),
        (2, 129, 2, 2, 64, None, 0),
        (1, 261, 2, 1, 128, Some(70), 0),
        (2, 333, 2, 1, 128, None, 100),
        (1, 290, 3, 3, 80, Some(130), 177),
        (1, 200, 2, 1, 200, None, 90),
        (1, 131, 2, 1, 256, Some(64), 0),
        (1, 150, 2, 1, 33, None, 0),
        (1, 16, 2, 1, 16, None, 0),
        (1, 2, 2, 1, 128, None, 0),
    ]);
}

/// Little work in all loops of the kernels: for tools that watch every access.
#[test]
fn attention_over_three_tiles() {
    attention_of_shapes(&[(1, 261, 2, 1, 128, None, 0), (1, 261, 1, 1, 64, None, 0)]);
}

/// Batch, tokens, heads, groups, width, window and tokens of a document (0: all).
type Shape = (usize, usize, usize, usize, usize, Option<usize>, usize);

fn attention_of_shapes(shapes: &[Shape]) {
    with_device(|g| {
        for &(b, t, h, gr, p, window, document) in shapes {
            let of = |i: usize| if document == 0 { i } else { i % document };
            let pos = match document {
                0 => No,
                _ => I(vec![b, t], (0..b * t).map(|i| of(i % t) as i32).collect()),
            };
            let args = [
                g.f(1, &[b, t, h, p]),
                g.f(2, &[b, t, gr, p]),
                g.f(3, &[b, t, gr, p]),
                pos,
            ];
            let a = data(&args);
            let dout = g.f(9, &[b, t, h, p]);
            let c = data(std::slice::from_ref(&dout)).remove(0);
            let scale = 0.2;
            let sees = |_: usize, q: usize, s: usize| {
                s <= q && q - s <= of(q) && window.is_none_or(|w| q - s < w)
            };
            let sizes = (b, t, h, gr, p);
            let want = attention_in_full([&a[0], &a[1], &a[2], &c], sizes, sees, scale);
            let results = [R::F(vec![b, t, h, p]), R::S(vec![b, h, t])];
            let out = g.run(&args, &results, |r, a| {
                attention(r, a, scale as f32, window);
            });
            let what = format!("attention of {sizes:?} {window:?} {document}");
            g.close(&what, &out[0], &want[0]);
            let mut bwd = args.to_vec();
            bwd.extend([
                F(vec![b, t, h, p], out[0].clone()),
                S(vec![b, h, t], out[1].clone()),
                dout,
            ]);
            let results = [&[b, t, h, p], &[b, t, gr, p], &[b, t, gr, p]];
            let d = g.run(&bwd, &results.map(|d| R::F(d.to_vec())), |r, a| {
                attention_bwd(r, a, scale as f32, window);
            });
            for (name, (d, want)) in ["dq", "dk", "dv"].iter().zip(d.iter().zip(&want[1..])) {
                g.close(&format!("{name} of {what}"), d, want);
            }
        }
    });
}

/// Queries from a slot on, over keys of which the later ones are not to be seen.
#[test]
fn attention_from_a_slot() {
    with_device(|g| {
        for (t, s, p, slot) in [(1, 300, 128, 200), (40, 300, 128, 150), (17, 90, 64, 0)] {
            let (h, gr, scale) = (2, 1, 0.2);
            // What stands after the last query's slot was never written.
            let cache = |seed| {
                let mut x = g.noise(seed, s * gr * p);
                x[(slot as usize + t) * gr * p..].fill(f64::NAN);
                F(vec![1, s, gr, p], x)
            };
            let args = [
                g.f(1, &[1, t, h, p]),
                cache(2),
                cache(3),
                No,
                I(vec![1], vec![slot]),
            ];
            let a = data(&args);
            let mut want = vec![0.0; t * h * p];
            for (i, y) in want.chunks_exact_mut(p).enumerate() {
                let last = slot as usize + i / h;
                let e: V = (0..=last)
                    .map(|k| {
                        let d: f64 = (0..p).map(|j| a[0][i * p + j] * a[1][k * p + j]).sum();
                        (d * scale).exp()
                    })
                    .collect();
                let sum: f64 = e.iter().sum();
                for (k, e) in e.iter().enumerate() {
                    for (j, y) in y.iter_mut().enumerate() {
                        *y += e / sum * a[2][k * p + j];
                    }
                }
            }
            let results = [R::F(vec![1, t, h, p]), R::S(vec![1, h, t])];
            let out = g.run(&args, &results, |r, a| {
                attention(r, a, scale as f32, None);
            });
            g.close(&format!("attention of {t} from {slot}"), &out[0], &want);
        }
    });
}

/// One query a sequence over many slots: shares of slots, windows, documents, heads of a group that fill more than one tile, odd widths.
#[test]
fn attention_of_one_query() {
    with_device(|g| {
        for (b, s, h, gr, p, window, slot) in [
            (3, 700, 8, 2, 128, None, 650),
            (2, 333, 6, 2, 64, Some(100), 332),
            (1, 2000, 4, 1, 80, None, 1999),
            (2, 150, 12, 1, 256, None, 140),
            (1, 400, 40, 2, 64, Some(37), 399),
            (2, 300, 9, 3, 33, None, 200),
            (70, 90, 8, 8, 16, None, 89),
            (2, 64, 2, 1, 128, None, 0),
        ] {
            let slots = |seed| {
                let mut x = g.noise(seed, b * s * gr * p);
                // What stands after the query's slot was never written.
                for row in x.chunks_exact_mut(s * gr * p) {
                    row[(slot + 1) * gr * p..].fill(f64::NAN);
                }
                F(vec![b, s, gr, p], x)
            };
            for packed in [false, true] {
                let back = |row: usize| match packed {
                    true => slot - (29 * row + 3).min(slot),
                    false => slot,
                };
                let pos = match packed {
                    true => I(vec![b, 1], (0..b).map(|i| back(i) as i32).collect()),
                    false => No,
                };
                let args = [
                    g.f(1, &[b, 1, h, p]),
                    slots(2),
                    slots(3),
                    pos,
                    I(vec![1], vec![slot as i32]),
                ];
                let a = data(&args);
                let scale = 0.2;
                let (mut want, mut sums) = (vec![0.0; b * h * p], vec![0.0; b * h]);
                for (i, y) in want.chunks_exact_mut(p).enumerate() {
                    let row = i / h;
                    let least = window.map_or(0, |w| (slot + 1).saturating_sub(w));
                    let seen = least.max(slot - back(row))..=slot;
                    let at = |k: usize| ((row * s + k) * gr + i % h / (h / gr)) * p;
                    let e: V = seen
                        .clone()
                        .map(|k| {
                            let d: f64 = (0..p).map(|j| a[0][i * p + j] * a[1][at(k) + j]).sum();
                            (d * scale).exp()
                        })
                        .collect();
                    let sum: f64 = e.iter().sum();
                    sums[i] = sum.ln();
                    for (k, e) in seen.zip(&e) {
                        for (j, y) in y.iter_mut().enumerate() {
                            *y += e / sum * a[2][at(k) + j];
                        }
                    }
                }
                let results = [R::F(vec![b, 1, h, p]), R::S(vec![b, h, 1])];
                let out = g.run(&args, &results, |r, a| {
                    attention(r, a, scale as f32, window);
                });
                let what = format!("attention of one of {:?}", (b, s, h, gr, p, window, packed));
                g.close(&what, &out[0], &want);
                g.close(&format!("sums of {what}"), &out[1], &sums);
                let again = g.run(&args, &results, |r, a| {
                    attention(r, a, scale as f32, window);
                });
                assert!(out == again, "{what}: other bits in a second run");
            }
        }
    });
}
