//! Mamba-1's scan.

use super::*;

#[test]
fn mamba1() {
    mamba1_of(&[
        (2, 11, 6, 3, 2, 4, false),
        (2, 11, 6, 3, 2, 4, true),
        (1, 41, 8, 16, 1, 32, true),
        (1, 75, 2, 2, 1, 70, false),
    ]);
}

#[test]
fn mamba1_of_odd_widths() {
    mamba1_of(&[
        (2, 7, 1, 16, 1, 100, false),
        (2, 7, 3, 16, 1, 4, true),
        (1, 9, 33, 4, 1, 4, false),
    ]);
}

#[test]
fn mamba1_of_wide_states() {
    mamba1_of(&[(1, 19, 4, 70, 1, 16, true), (1, 21, 6, 24, 2, 32, true)]);
}

#[test]
fn mamba1_in_runs() {
    mamba1_of(&[(1, 75, 10, 16, 2, 32, true), (1, 9, 70, 16, 1, 32, true)]);
}

/// Batch, tokens, channels, states, groups, chunk and whether there are documents.
fn mamba1_of(shapes: &[(usize, usize, usize, usize, usize, usize, bool)]) {
    with_device(|g| {
        for &(b, t, i, n, gr, chunk, documents) in shapes {
            let pos = match documents {
                true => positions(b, t),
                false => No,
            };
            let a_mat = S(
                vec![i, n],
                g.noise(3, i * n).iter().map(|x| -0.1 - x.abs()).collect(),
            );
            let args = [
                g.f(1, &[b, t, i]),
                g.f(2, &[b, t, i]),
                a_mat,
                g.f(4, &[b, t, gr, n]),
                g.f(5, &[b, t, gr, n]),
                g.s(6, &[i]),
                g.s(7, &[i]),
                g.f(8, &[b, t, i]),
                pos,
            ];
            let forward = |a: &[V]| -> V {
                let mut y = vec![0.0; b * t * i];
                for bi in 0..b {
                    for c in 0..i {
                        let mut h = vec![0.0; n];
                        for s in 0..t {
                            let row = bi * t + s;
                            let e = row * i + c;
                            let m = (row * gr + c / (i / gr)) * n;
                            if !a[8].is_empty() && a[8][row] == 0.0 {
                                h.fill(0.0);
                            }
                            let dt = softplus(a[1][e] + a[6][c]);
                            let mut v = a[5][c] * a[0][e];
                            for k in 0..n {
                                h[k] = (dt * a[2][c * n + k]).exp() * h[k]
                                    + dt * a[3][m + k] * a[0][e];
                                v += a[4][m + k] * h[k];
                            }
                            y[e] = v * silu(a[7][e]);
                        }
                    }
                }
                y
            };
            let a = data(&args);
            let chunks = t.div_ceil(chunk);
            let out = g.run(
                &args,
                &[R::F(vec![b, t, i]), R::S(vec![b, chunks, i, n])],
                |r, a| selective_scan(r, a, chunk),
            );
            g.close("selective_scan", &out[0], &forward(&a));
            let dy = g.f(9, &[b, t, i]);
            let c = data(std::slice::from_ref(&dy)).remove(0);
            let mut bwd = args.to_vec();
            bwd.extend([S(vec![b, chunks, i, n], out[1].clone()), dy]);
            let x = vec![b, t, i];
            let bc = vec![b, t, gr, n];
            let d = g.run(
                &bwd,
                &[
                    R::F(x.clone()),
                    R::F(x.clone()),
                    R::S(vec![i, n]),
                    R::F(bc.clone()),
                    R::F(bc),
                    R::S(vec![i]),
                    R::S(vec![i]),
                    R::F(x),
                ],
                |r, a| selective_scan_bwd(r, a, chunk),
            );
            for (k, d) in d.iter().enumerate() {
                g.gradient("selective_scan", d, &a, k, &c, forward);
            }
        }
    });
}
