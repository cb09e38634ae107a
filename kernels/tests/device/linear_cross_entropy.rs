//! Head and loss.

use super::*;

#[test]
fn head_and_loss() {
    with_device(|g| {
        for (v, z_loss, z_all) in [
            (21, 0.0, false),
            (21, 0.1, false),
            (21, 0.1, true),
            (24, 0.1, true),
        ] {
            let (n, d) = (13, 8);
            let targets: Vec<i32> = (0..n as i32)
                .map(|i| if i % 4 == 1 { -1 } else { i * 7 % v as i32 })
                .collect();
            let op = CrossEntropy {
                multiplier: 1.5,
                z_loss,
                z_all,
            };
            let args = [
                g.f(1, &[n, d]),
                g.f(2, &[v, d]),
                I(vec![n], targets.clone()),
                S(vec![1], vec![0.25]),
            ];
            let forward = |a: &[V]| -> V {
                let mut loss = 0.0;
                for r in 0..n {
                    let l: V = (0..v)
                        .map(|j| {
                            1.5 * (0..d)
                                .map(|k| a[0][r * d + k] * a[1][j * d + k])
                                .sum::<f64>()
                        })
                        .collect();
                    let lse = l.iter().map(|x| x.exp()).sum::<f64>().ln();
                    let t = a[2][r];
                    if t >= 0.0 {
                        loss += lse - l[t as usize];
                    }
                    if t >= 0.0 || z_all {
                        loss += f64::from(z_loss) * lse * lse;
                    }
                }
                vec![loss * 0.25]
            };
            let a = data(&args);
            let rows = || R::S(vec![n]);
            let out = g.run(&args, &[R::S(vec![1]), rows(), rows(), rows()], |r, a| {
                linear_cross_entropy(r, a, &op)
            });
            g.close("loss", &out[0], &forward(&a));
            let dloss = S(vec![1], vec![1.25]);
            let mut bwd = args.to_vec();
            bwd.extend([S(vec![n], out[2].clone()), dloss.clone()]);
            let grads = g.run(&bwd, &[R::F(vec![n, d]), R::S(vec![v, d])], |r, a| {
                linear_cross_entropy_bwd(r, a, &op)
            });
            for (k, x) in grads.iter().enumerate() {
                g.gradient("loss", x, &a, k, &[1.25], forward);
            }
            let mut both = args.to_vec();
            both.extend([
                dloss,
                S(vec![v, d], vec![f64::NAN; v * d]),
                S(vec![1], vec![0.0]),
            ]);
            let all = g.run(
                &both,
                &[
                    R::S(vec![1]),
                    rows(),
                    rows(),
                    rows(),
                    R::F(vec![n, d]),
                    R::Arg(5),
                ],
                |r, a| linear_cross_entropy_grad(r, a, &op),
            );
            g.close("loss with gradient", &all[0], &out[0]);
            g.close("dx with loss", &all[4], &grads[0]);
            g.close("dw with loss", &all[5], &grads[1]);
        }
    });
}
