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
fn rounded(x: f32, (mantissa, low, most): (i32, i32, f64)) -> f64 {
    let x = f64::from(x);
    let step = 2f64.powi((x.abs().log2().floor() as i32).max(low) - mantissa);
    if x == 0.0 {
        return 0.0;
    }
    ((x / step).round_ties_even() * step).clamp(-most, most)
}

const E4M3: (i32, i32, f64) = (3, -6, 448.0);
const E5M2: (i32, i32, f64) = (2, -14, 57344.0);

/// A tensor's factor, and its numbers without it.
fn narrowed(x: &[f64], format: (i32, i32, f64)) -> (f64, V) {
    let most = x.iter().fold(1e-30f32, |m, &v| m.max((v as f32).abs()));
    let factor = format.2 as f32 / most;
    let q = x.iter().map(|&v| rounded(v as f32 * factor, format));
    (f64::from(most / format.2 as f32), q.collect())
}

/// A tensor narrowed with one factor, and widened again.
fn through(x: &[f64], format: (i32, i32, f64)) -> V {
    let (scale, q) = narrowed(x, format);
    q.iter().map(|v| v * scale).collect()
}

fn pad(n: usize) -> usize {
    n.next_multiple_of(16)
}

/// `[rows cols]` with zeros up to multiples of 16, transposed or not.
fn laid(q: &[f64], (rows, cols): (usize, usize), turned: bool) -> V {
    let (tall, wide) = (pad(rows), pad(cols));
    let at = |r: usize, c: usize| {
        if r < rows && c < cols {
            q[r * cols + c]
        } else {
            0.0
        }
    };
    match turned {
        true => (0..tall * wide).map(|e| at(e % tall, e / tall)).collect(),
        false => (0..tall * wide).map(|e| at(e / wide, e % wide)).collect(),
    }
}

fn has_fp8(g: &Gpu) -> bool {
    let there = g.device.borrow().target().fp8;
    if !there {
        eprintln!("skipped: this GPU has no products of 8 bits");
    }
    there
}

/// Numbers in 8 bits are those of arithmetic in f32, bit for bit, and the same as they lie and transposed, together and alone.
#[test]
fn tensors_in_8_bits() {
    assert_eq!(rounded(0.3, E4M3), 0.3125);
    assert_eq!(rounded(1000.0, E4M3), 448.0);
    assert_eq!(rounded(1.1e-3, E4M3), 2f64.powi(-9) * 1.0);
    with_device(|g| {
        if !has_fp8(g) {
            return;
        }
        for (rows, cols) in [
            (5, 3),
            (33, 40),
            (64, 48),
            (130, 264),
            (257, 72),
            (300, 1024),
        ] {
            let x: V = g.noise(1, rows * cols).iter().map(|v| v * 16.0).collect();
            for (format, eight) in [(E4M3, Eight::E4m3), (E5M2, Eight::E5m2)] {
                let (scale, want) = narrowed(&x, format);
                for (plain, turned) in [(true, false), (false, true), (true, true)] {
                    let (tall, wide) = (pad(rows), pad(cols));
                    let mut results = vec![R::S(vec![1])];
                    let mut ways = Vec::new();
                    if plain {
                        results.push(R::Q(eight, vec![tall, wide]));
                        ways.push(false);
                    }
                    if turned {
                        results.push(R::Q(eight, vec![wide, tall]));
                        ways.push(true);
                    }
                    let out = g.run(&[F(vec![rows, cols], x.clone())], &results, |r, a| {
                        narrow(r, a, plain, turned);
                    });
                    assert_eq!(out[0], [scale]);
                    for (got, way) in out[1..].iter().zip(ways) {
                        let want = laid(&want, (rows, cols), way);
                        let wrong = got.iter().zip(&want).position(|(g, w)| g != w);
                        assert_eq!(wrong, None, "{rows} x {cols} {eight:?} transposed: {way}");
                    }
                }
            }
        }
    });
}

/// A product of two tensors `[rows cols]`, each narrowed as it lies or transposed.
fn product(
    g: &Gpu,
    operands: [(&A, (usize, usize), Eight, bool); 2],
    more: &[A],
    result: R,
    op: &LinearFp8,
) -> V {
    let mut args: Vec<A> = operands.iter().map(|o| o.0.clone()).collect();
    args.extend_from_slice(more);
    let mut results = vec![match result {
        R::Arg(k) => R::Arg(2 + k),
        other => other,
    }];
    for (_, (rows, cols), eight, turned) in operands {
        let (tall, wide) = (pad(rows), pad(cols));
        let dims = if turned {
            vec![wide, tall]
        } else {
            vec![tall, wide]
        };
        results.extend([R::S(vec![1]), R::Q(eight, dims)]);
    }
    let out = g.run(&args, &results, |r, a| {
        for (i, (_, _, _, turned)) in operands.iter().enumerate() {
            let from = Args {
                args: &a.args[i..=i],
                results: &a.results[1 + 2 * i..3 + 2 * i],
                fixed: &[],
            };
            narrow(r, &from, !turned, *turned);
        }
        let made = |i: usize| Some(a.results[i].clone());
        let mut all = vec![made(2), made(1), made(4), made(3)];
        all.extend_from_slice(&a.args[2..]);
        let of = Args {
            args: &all,
            results: &a.results[..1],
            fixed: &[],
        };
        linear_fp8(r, &of, op);
    });
    out[0].clone()
}

/// Products in 8 bits are those of the narrowed numbers, in any size and from any row of a buffer.
#[test]
fn products_in_8_bits() {
    with_device(|g| {
        if g.dtype != DType::Bf16 || !has_fp8(g) {
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
            let (x, w, dy) = (F(vec![m, k], x), F(vec![n, k], w), F(vec![m, n], dy));
            let op = |sizes, output, exact, start| LinearFp8 {
                sizes,
                output,
                exact,
                start,
            };
            let want: V = (0..m * n)
                .map(|e| {
                    let at = |i: usize| xq[e / n * k + i] * wq[e % n * k + i];
                    bias[e % n] + (0..k).map(at).sum::<f64>()
                })
                .collect();
            let forward = [
                (&x, (m, k), Eight::E4m3, false),
                (&w, (n, k), Eight::E4m3, false),
            ];
            let of = op((m, n, k), DType::Bf16, false, 0);
            let bias = S(vec![n], bias.clone());
            let y = product(
                g,
                forward,
                std::slice::from_ref(&bias),
                R::F(vec![m, n]),
                &of,
            );
            g.close("linear in 8 bits", &y, &want);
            let more = g.noise(5, m * n);
            let all = [bias, F(vec![m, n], more.clone())];
            let y = product(g, forward, &all, R::F(vec![m, n]), &of);
            let want: V = want.iter().zip(&more).map(|(w, m)| w + m).collect();
            g.close("linear in 8 bits with a sum", &y, &want);
            let want: V = (0..m * k)
                .map(|e| (0..n).map(|j| dq[e / k * n + j] * wq[j * k + e % k]).sum())
                .collect();
            let backward = [
                (&dy, (m, n), Eight::E5m2, false),
                (&w, (n, k), Eight::E4m3, true),
            ];
            let of = op((m, k, n), DType::Bf16, true, 0);
            let dx = product(g, backward, &[], R::F(vec![m, k]), &of);
            relative(g, "its derivative to x", &dx, &want);
            let dw: V = (0..n * k)
                .map(|e| (0..m).map(|r| dq[r * n + e / k] * xq[r * k + e % k]).sum())
                .collect();
            let backward = [
                (&dy, (m, n), Eight::E5m2, true),
                (&x, (m, k), Eight::E4m3, true),
            ];
            let of = op((n, k, m), DType::F32, true, 2);
            for beta in [0.0, 0.5] {
                let mut into = scaled(9, (n + 5) * k, 0.01);
                if beta == 0.0 {
                    into[2 * k..(n + 2) * k].fill(f64::NAN);
                }
                let more = [
                    No,
                    No,
                    S(vec![n + 5, k], into.clone()),
                    S(vec![1], vec![beta]),
                ];
                let out = product(g, backward, &more, R::Arg(2), &of);
                let want: V = (0..into.len())
                    .map(|e| match e < 2 * k || e >= (n + 2) * k {
                        true => into[e],
                        false => dw[e - 2 * k] + if beta == 0.0 { 0.0 } else { beta * into[e] },
                    })
                    .collect();
                relative(g, "its derivative to w", &out, &want);
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
