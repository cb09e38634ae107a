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
