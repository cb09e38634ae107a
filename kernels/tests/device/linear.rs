//! Matrix products, in 8 bits too.

use super::*;

#[test]
fn linear_ops() {
    with_device(|g| {
        let (m, n, k) = (37, 19, 23);
        let args = [g.f(1, &[m, k]), g.f(2, &[n, k]), g.s(3, &[n])];
        let forward = |a: &[V]| -> V {
            (0..m * n)
                .map(|e| {
                    a[2][e % n]
                        + (0..k)
                            .map(|i| a[0][e / n * k + i] * a[1][e % n * k + i])
                            .sum::<f64>()
                })
                .collect()
        };
        let a = data(&args);
        g.close(
            "linear",
            &g.run(&args, &[R::F(vec![m, n])], linear)[0],
            &forward(&a),
        );
        let dy = g.f(4, &[m, n]);
        let c = data(std::slice::from_ref(&dy)).remove(0);
        let dx = g.run(
            &[dy.clone(), args[1].clone()],
            &[R::F(vec![m, k])],
            linear_dx,
        );
        g.gradient("linear", &dx[0], &a, 0, &c, forward);
        let dw = g.run(
            &[args[0].clone(), dy.clone(), No, No],
            &[R::S(vec![n, k])],
            |r, a| linear_dw(r, a, 0),
        );
        g.gradient("linear", &dw[0], &a, 1, &c, forward);
        for beta in [0.0, 1.0] {
            let mut into = g.noise(9, (n + 5) * k);
            if beta == 0.0 {
                into[2 * k..(n + 2) * k].fill(f64::NAN);
            }
            let out = g.run(
                &[
                    args[0].clone(),
                    dy.clone(),
                    S(vec![n + 5, k], into.clone()),
                    S(vec![1], vec![beta]),
                ],
                &[R::Arg(2)],
                |r, a| linear_dw(r, a, 2),
            );
            let want: V = (0..into.len())
                .map(|e| {
                    if e < 2 * k || e >= (n + 2) * k {
                        into[e]
                    } else {
                        dw[0][e - 2 * k] + if beta == 0.0 { 0.0 } else { into[e] }
                    }
                })
                .collect();
            g.close("linear_dw into", &out[0], &want);
        }
    });
}

/// Few rows, as in decoding: odd counts of columns, long and short sums, a bias, something added.
#[test]
fn linear_of_few_rows() {
    with_device(|g| {
        for (m, n, k) in [
            (1, 4096, 2048),
            (1, 17, 8),
            (3, 33, 72),
            (8, 200, 1000),
            (5, 16, 7168),
            (11, 50, 3000),
            (2, 8200, 264),
            (16, 8209, 264),
        ] {
            for more in [false, true] {
                let (bias, add) = match more {
                    true => (g.s(3, &[n]), g.f(4, &[m, n])),
                    false => (No, No),
                };
                let args = [g.f(1, &[m, k]), g.f(2, &[n, k]), bias, add];
                let a = data(&args);
                let want: V = (0..m * n)
                    .map(|e| {
                        let sum: f64 = (0..k)
                            .map(|i| a[0][e / n * k + i] * a[1][e % n * k + i])
                            .sum();
                        sum + if more { a[2][e % n] + a[3][e] } else { 0.0 }
                    })
                    .collect();
                let out = g.run(&args, &[R::F(vec![m, n])], linear);
                g.close(&format!("linear of {:?}", (m, n, k, more)), &out[0], &want);
            }
        }
    });
}

/// A number as 8 bits hold it: `mantissa` bits, exponents from `low`, magnitudes up to `most`.
fn eight(x: f32, (mantissa, low, most): (i32, i32, f64)) -> f64 {
    let x = f64::from(x);
    let step = 2f64.powi((x.abs().log2().floor() as i32).max(low) - mantissa);
    if x == 0.0 {
        return 0.0;
    }
    ((x / step).round_ties_even() * step).clamp(-most, most)
}

/// A tensor narrowed with one factor, and widened again.
fn through(x: &[f64], format: (i32, i32, f64)) -> V {
    let most = x.iter().fold(1e-30f32, |m, &v| m.max((v as f32).abs()));
    let factor = format.2 as f32 / most;
    let back = f64::from(most / format.2 as f32);
    let narrow = |&v: &f64| eight(v as f32 * factor, format) * back;
    x.iter().map(narrow).collect()
}

/// Products in 8 bits are those of the narrowed numbers, in any size and from any row of a buffer.
#[test]
fn products_in_8_bits() {
    const E4M3: (i32, i32, f64) = (3, -6, 448.0);
    const E5M2: (i32, i32, f64) = (2, -14, 57344.0);
    assert_eq!(eight(0.3, E4M3), 0.3125);
    assert_eq!(eight(1000.0, E4M3), 448.0);
    assert_eq!(eight(1.1e-3, E4M3), 2f64.powi(-9) * 1.0);
    with_device(|g| {
        if g.dtype != DType::Bf16 {
            return;
        }
        if !g.device.borrow().target().fp8 {
            eprintln!("skipped: this GPU has no products of 8 bits");
            return;
        }
        for (m, n, k) in [
            (5, 3, 7),
            (33, 17, 40),
            (64, 48, 32),
            (130, 256, 264),
            (96, 80, 72),
        ] {
            let scaled = |seed, len: usize, by: f64| -> V {
                g.noise(seed, len).iter().map(|v| v * by).collect()
            };
            // Magnitudes far from one, so that a factor left out is seen.
            let (x, w, dy) = (
                scaled(1, m * k, 16.0),
                scaled(2, n * k, 1.0 / 64.0),
                scaled(3, m * n, 1.0 / 1024.0),
            );
            let bias = g.noise(4, n);
            let (xq, wq, dq) = (through(&x, E4M3), through(&w, E4M3), through(&dy, E5M2));
            let args = [
                F(vec![m, k], x.clone()),
                F(vec![n, k], w.clone()),
                S(vec![n], bias.clone()),
            ];
            let want: V = (0..m * n)
                .map(|e| {
                    let at = |i: usize| xq[e / n * k + i] * wq[e % n * k + i];
                    bias[e % n] + (0..k).map(at).sum::<f64>()
                })
                .collect();
            let y = g.run(&args, &[R::F(vec![m, n])], linear_fp8);
            g.close("linear in 8 bits", &y[0], &want);
            let more = g.noise(5, m * n);
            let mut args = args.to_vec();
            args.push(F(vec![m, n], more.clone()));
            let y = g.run(&args, &[R::F(vec![m, n])], linear_fp8);
            let want: V = want.iter().zip(&more).map(|(w, m)| w + m).collect();
            g.close("linear in 8 bits with a sum", &y[0], &want);
            let want: V = (0..m * k)
                .map(|e| (0..n).map(|j| dq[e / k * n + j] * wq[j * k + e % k]).sum())
                .collect();
            let d = F(vec![m, n], dy.clone());
            let dx = g.run(
                &[d.clone(), args[1].clone()],
                &[R::F(vec![m, k])],
                linear_dx_fp8,
            );
            relative(g, "linear_dx in 8 bits", &dx[0], &want);
            let dw: V = (0..n * k)
                .map(|e| (0..m).map(|r| dq[r * n + e / k] * xq[r * k + e % k]).sum())
                .collect();
            for beta in [0.0, 0.5] {
                let mut into = scaled(9, (n + 5) * k, 0.01);
                if beta == 0.0 {
                    into[2 * k..(n + 2) * k].fill(f64::NAN);
                }
                let out = g.run(
                    &[
                        args[0].clone(),
                        d.clone(),
                        S(vec![n + 5, k], into.clone()),
                        S(vec![1], vec![beta]),
                    ],
                    &[R::Arg(2)],
                    |r, a| linear_dw_fp8(r, a, 2),
                );
                let want: V = (0..into.len())
                    .map(|e| match e < 2 * k || e >= (n + 2) * k {
                        true => into[e],
                        false => dw[e - 2 * k] + if beta == 0.0 { 0.0 } else { beta * into[e] },
                    })
                    .collect();
                relative(g, "linear_dw in 8 bits", &out[0], &want);
            }
        }
    });
}

/// [`Gpu::close`] for numbers that are all small.
fn relative(g: &Gpu, what: &str, got: &[f64], want: &[f64]) {
    let top = want.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
    let by = |x: &[f64]| -> V { x.iter().map(|v| v / top).collect() };
    g.close(what, &by(got), &by(want));
}
