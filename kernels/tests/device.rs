//! Every launcher on a GPU, in f32 and bf16, on memory poisoned with NaN: results against loops in f64, gradients against central
//! differences of those loops. Without a GPU, or without its libraries, the tests say so and pass.

#![allow(unsafe_code)] // memory of the device
#![allow(clippy::unwrap_used)] // in helpers of tests too

use marimba_kernels::*;
use std::cell::{OnceCell, RefCell};
use std::sync::Mutex;

type V = Vec<f64>;

static DEVICE: Mutex<Option<Device>> = Mutex::new(None);

fn with_device(test: impl Fn(&Gpu)) {
    let mut guard = DEVICE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if guard.is_none() {
        match Device::open(0) {
            Ok(d) => *guard = Some(d),
            Err(e) => {
                eprintln!("skipped: {e}");
                return;
            }
        }
    }
    let device = guard.as_mut().unwrap();
    // With the kernels for this device, those of them that add in a fixed order, and those for any device.
    let here = device.target();
    let fixed = Target {
        deterministic: true,
        ..here
    };
    for target in [here, fixed, Target::default()] {
        for dtype in [DType::F32, DType::Bf16] {
            if dtype == DType::F32 && target != here {
                continue;
            }
            test(&Gpu {
                device: RefCell::new(device),
                dtype,
                target,
            });
        }
    }
}

struct Gpu<'a> {
    device: RefCell<&'a mut Device>,
    dtype: DType,
    target: Target,
}

/// An argument: floats in the type under test, floats that are always f32, or integers.
#[derive(Clone)]
enum A {
    No,
    F(Vec<usize>, V),
    S(Vec<usize>, V),
    I(Vec<usize>, Vec<i32>),
}
use A::{F, I, No, S};

/// A result: in the type under test, f32, integers, or the memory of an argument.
enum R {
    F(Vec<usize>),
    S(Vec<usize>),
    I(Vec<usize>),
    Arg(usize),
}

fn bf16(x: f32) -> u16 {
    let b = x.to_bits();
    ((b + 0x7fff + ((b >> 16) & 1)) >> 16) as u16
}

fn encode(x: &[f64], t: DType) -> Vec<u8> {
    match t {
        DType::Bf16 => x
            .iter()
            .flat_map(|&v| bf16(v as f32).to_ne_bytes())
            .collect(),
        _ => x.iter().flat_map(|&v| (v as f32).to_ne_bytes()).collect(),
    }
}

fn decode(b: &[u8], t: DType) -> V {
    match t {
        DType::Bf16 => b
            .chunks_exact(2)
            .map(|b| {
                f64::from(f32::from_bits(
                    u32::from(u16::from_ne_bytes([b[0], b[1]])) << 16,
                ))
            })
            .collect(),
        DType::I32 => b
            .chunks_exact(4)
            .map(|b| f64::from(i32::from_ne_bytes([b[0], b[1], b[2], b[3]])))
            .collect(),
        _ => b
            .chunks_exact(4)
            .map(|b| f64::from(f32::from_ne_bytes([b[0], b[1], b[2], b[3]])))
            .collect(),
    }
}

impl Gpu<'_> {
    /// Numbers in [-1, 1] that the type under test holds exactly.
    fn noise(&self, seed: u64, n: usize) -> V {
        let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1;
        let x: V = (0..n)
            .map(|_| {
                s ^= s << 13;
                s ^= s >> 7;
                s ^= s << 17;
                (s >> 40) as f64 / (1u64 << 23) as f64 - 1.0
            })
            .collect();
        decode(&encode(&x, DType::Bf16), DType::Bf16)
    }

    fn f(&self, seed: u64, dims: &[usize]) -> A {
        F(dims.to_vec(), self.noise(seed, dims.iter().product()))
    }

    fn s(&self, seed: u64, dims: &[usize]) -> A {
        S(dims.to_vec(), self.noise(seed, dims.iter().product()))
    }

    fn run(&self, args: &[A], results: &[R], launch: impl Fn(&mut Recorder, &Args)) -> Vec<V> {
        let mut guard = self.device.borrow_mut();
        let device: &mut Device = &mut guard;
        let mut memory = Vec::new();
        let mut new = |device: &Device, t: DType, dims: &[usize], data: Option<Vec<u8>>| {
            let bytes = dims.iter().product::<usize>() * t.bytes();
            let ptr = device.allocate(bytes.max(256)).unwrap();
            memory.push(ptr);
            unsafe {
                match data {
                    Some(data) => device.write(ptr, &data).unwrap(),
                    None => device.fill(ptr, 0xff, bytes).unwrap(),
                }
            }
            Tensor {
                ptr,
                dtype: t,
                dims: dims.to_vec(),
            }
        };
        let t = self.dtype;
        let args: Vec<Option<Tensor>> = args
            .iter()
            .map(|a| match a {
                No => None,
                F(d, x) => Some(new(device, t, d, Some(encode(x, t)))),
                S(d, x) => Some(new(device, DType::F32, d, Some(encode(x, DType::F32)))),
                I(d, x) => Some(new(
                    device,
                    DType::I32,
                    d,
                    Some(x.iter().flat_map(|v| v.to_ne_bytes()).collect()),
                )),
            })
            .collect();
        let results: Vec<Tensor> = results
            .iter()
            .map(|r| match r {
                R::F(d) => new(device, t, d, None),
                R::S(d) => new(device, DType::F32, d, None),
                R::I(d) => new(device, DType::I32, d, None),
                R::Arg(i) => args[*i].clone().unwrap(),
            })
            .collect();
        let a = Args {
            args: &args,
            results: &results,
        };
        let mut sizing = Recorder::new(256).on(self.target);
        launch(&mut sizing, &a);
        let scratch = new(device, DType::F32, &[sizing.scratch_bytes() / 4], None);
        let mut r = Recorder::new(scratch.ptr).on(self.target);
        launch(&mut r, &a);
        let prepared = device.prepare(&r.commands, |_| {}).unwrap();
        unsafe { device.run(&prepared, 0..r.commands.len()).unwrap() };
        let out = results
            .iter()
            .map(|t| {
                let mut bytes = vec![0; t.bytes()];
                unsafe { device.read(t.ptr, &mut bytes).unwrap() };
                decode(&bytes, t.dtype)
            })
            .collect();
        for ptr in memory {
            unsafe { device.free(ptr) };
        }
        out
    }

    fn close(&self, what: &str, got: &[f64], want: &[f64]) {
        assert_eq!(got.len(), want.len(), "{what}");
        let tol = if self.dtype == DType::F32 { 2e-5 } else { 2e-2 };
        let top = want.iter().fold(1e-3f64, |m, v| m.max(v.abs()));
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!(
                (g - w).abs() <= tol * top,
                "{what} {:?} [{i}]: {g}, not {w} (largest {top})",
                self.dtype
            );
        }
    }

    /// Gradient of `sum cot * forward` to argument `which` by central differences.
    fn gradient(
        &self,
        what: &str,
        got: &[f64],
        args: &[V],
        which: usize,
        cot: &[f64],
        forward: impl Fn(&[V]) -> V,
    ) {
        let loss = |a: &[V]| -> f64 { forward(a).iter().zip(cot).map(|(y, c)| y * c).sum() };
        let mut a = args.to_vec();
        let want: V = (0..args[which].len())
            .map(|i| {
                let x = a[which][i];
                a[which][i] = x + 1e-5;
                let up = loss(&a);
                a[which][i] = x - 1e-5;
                let down = loss(&a);
                a[which][i] = x;
                (up - down) / 2e-5
            })
            .collect();
        self.close(&format!("{what}: gradient {which}"), got, &want);
    }
}

fn data(args: &[A]) -> Vec<V> {
    args.iter()
        .map(|a| match a {
            No => Vec::new(),
            F(_, x) | S(_, x) => x.clone(),
            I(_, x) => x.iter().map(|&v| f64::from(v)).collect(),
        })
        .collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}
fn softplus(x: f64) -> f64 {
    (1.0 + x.exp()).ln()
}
/// 0 .. with a new document at token 5 of each row of `t`.
fn positions(b: usize, t: usize) -> A {
    I(
        vec![b, t],
        (0..b * t)
            .map(|i| {
                let p = (i % t) as i32;
                if p >= 5 { p - 5 } else { p }
            })
            .collect(),
    )
}

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

#[test]
fn norms() {
    with_device(|g| {
        let (rows, l) = (6, 12);
        for (gate, group, wlen, zc) in [
            (0, 12, 12, false),
            (1, 4, 12, false),
            (2, 4, 4, true),
            (1, 12, 12, true),
            (0, 6, 0, false),
        ] {
            let op = RmsNorm {
                eps: 1e-5,
                group,
                zero_centered: zc,
                gate,
            };
            let w = if wlen > 0 { g.s(2, &[wlen]) } else { No };
            let z = if gate > 0 { g.f(3, &[rows, l]) } else { No };
            let args = [g.f(1, &[rows, l]), w.clone(), z.clone()];
            let forward = |a: &[V]| -> V {
                let v: V = (0..rows * l)
                    .map(|e| a[0][e] * if gate == 1 { silu(a[2][e]) } else { 1.0 })
                    .collect();
                (0..rows * l)
                    .map(|e| {
                        let b = e / group * group;
                        let ms = v[b..b + group].iter().map(|x| x * x).sum::<f64>() / group as f64;
                        let w = if wlen > 0 {
                            a[1][e % l % wlen] + f64::from(u8::from(zc))
                        } else {
                            1.0
                        };
                        v[e] / (ms + 1e-5).sqrt() * w * if gate == 2 { silu(a[2][e]) } else { 1.0 }
                    })
                    .collect()
            };
            let a = data(&args);
            let out = g.run(
                &args,
                &[R::F(vec![rows, l]), R::S(vec![rows, l / group])],
                |r, a| rms_norm(r, a, &op),
            );
            g.close("rms_norm", &out[0], &forward(&a));
            let dy = g.f(4, &[rows, l]);
            let c = data(std::slice::from_ref(&dy)).remove(0);
            let mut results = vec![R::F(vec![rows, l])];
            if wlen > 0 {
                results.push(R::S(vec![wlen]));
            }
            if gate > 0 {
                results.push(R::F(vec![rows, l]));
            }
            let d = g.run(
                &[
                    args[0].clone(),
                    w,
                    z,
                    S(vec![rows, l / group], out[1].clone()),
                    dy,
                ],
                &results,
                |r, a| rms_norm_bwd(r, a, &op),
            );
            let mut slots = vec![0];
            if wlen > 0 {
                slots.push(1);
            }
            if gate > 0 {
                slots.push(2);
            }
            for (d, slot) in d.iter().zip(slots) {
                g.gradient("rms_norm", d, &a, slot, &c, forward);
            }
        }
    });
}

/// Rows in vectors of 8, shared by a part of a warp, a warp and a block, more of them than there are blocks; gradients by their formula.
#[test]
fn norms_over_many_rows() {
    with_device(|g| {
        for (rows, l, group, wlen, gate, zc, add) in [
            (9001, 64, 64, 64, 0, false, false),
            (4501, 48, 24, 48, 2, true, true),
            (300, 1056, 264, 264, 1, false, true),
            (1301, 1288, 1288, 1288, 0, false, true),
            (601, 2056, 2056, 2056, 1, false, false),
            (7, 4104, 4104, 4104, 2, true, true),
            (130, 1288, 1288, 0, 1, false, false),
        ] {
            let op = RmsNorm {
                eps: 1e-5,
                group,
                zero_centered: zc,
                gate,
            };
            let n = rows * l;
            let wide = [rows, l];
            let (x, dy) = (g.f(1, &wide), g.f(4, &wide));
            let w = if wlen > 0 { g.s(2, &[wlen]) } else { No };
            let z = if gate > 0 { g.f(3, &wide) } else { No };
            let more = if add { g.f(5, &wide) } else { No };
            let a = data(&[x.clone(), w.clone(), z.clone(), dy.clone(), more.clone()]);
            let weight = |e: usize| match wlen {
                0 => 1.0,
                _ => a[1][e % l % wlen] + f64::from(u8::from(zc)),
            };
            let gate_of = |e: usize, at: i32| if gate == at { silu(a[2][e]) } else { 1.0 };
            let slope = |e: usize| {
                let s = sigmoid(a[2][e]);
                s * (1.0 + a[2][e] * (1.0 - s))
            };
            let (mut y, mut dx, mut dz) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
            let mut dw = vec![0.0; wlen];
            for b in (0..n).step_by(group) {
                let at = b..b + group;
                let v: V = at.clone().map(|e| a[0][e] * gate_of(e, 1)).collect();
                let ms = v.iter().map(|v| v * v).sum::<f64>() / group as f64;
                let r = 1.0 / (ms + 1e-5).sqrt();
                let d: V = at
                    .clone()
                    .map(|e| a[3][e] * weight(e) * gate_of(e, 2))
                    .collect();
                let s = v.iter().zip(&d).map(|(v, d)| v * r * d).sum::<f64>() / group as f64;
                for e in at {
                    let (v, d) = (v[e - b], d[e - b]);
                    y[e] = v * r * weight(e) * gate_of(e, 2);
                    let dv = r * (d - v * r * s);
                    dx[e] = dv * gate_of(e, 1) + if add { a[4][e] } else { 0.0 };
                    dz[e] = match gate {
                        0 => 0.0,
                        1 => dv * a[0][e] * slope(e),
                        _ => a[3][e] * weight(e) * v * r * slope(e),
                    };
                    if wlen > 0 {
                        dw[e % l % wlen] += a[3][e] * v * r * gate_of(e, 2);
                    }
                }
            }
            let rstd = vec![rows, l / group];
            let args = [x.clone(), w.clone(), z.clone()];
            let out = g.run(&args, &[R::F(wide.to_vec()), R::S(rstd.clone())], |r, a| {
                rms_norm(r, a, &op)
            });
            g.close("rms_norm", &out[0], &y);
            let mut results = vec![R::F(wide.to_vec())];
            let mut want = vec![dx];
            if wlen > 0 {
                results.push(R::S(vec![wlen]));
                want.push(dw);
            }
            if gate > 0 {
                results.push(R::F(wide.to_vec()));
                want.push(dz);
            }
            let d = g.run(
                &[x, w, z, S(rstd, out[1].clone()), dy, more],
                &results,
                |r, a| rms_norm_bwd(r, a, &op),
            );
            for (got, want) in d.iter().zip(&want) {
                g.close("rms_norm_bwd", got, want);
            }
        }
    });
}

#[test]
fn convolution() {
    with_device(|g| {
        for (b, t, i, k, documents, act) in [
            (2, 11, 5, 4, false, true),
            (2, 11, 5, 4, true, true),
            (2, 11, 5, 3, false, false),
            (1, 141, 8, 4, true, true),
            (2, 131, 8, 2, false, true),
        ] {
            let pos = match documents {
                true => positions(b, t),
                false => No,
            };
            let args = [
                g.f(1, &[b, t, i]),
                g.s(2, &[i, k]),
                g.s(3, &[i]),
                pos.clone(),
                No,
            ];
            let forward = |a: &[V]| -> V {
                (0..b * t * i)
                    .map(|e| {
                        let (c, row) = (e % i, e / i);
                        let s = a[2][c]
                            + (0..k)
                                .filter(|&j| {
                                    j <= row % t && (a[3].is_empty() || j as f64 <= a[3][row])
                                })
                                .map(|j| a[1][c * k + k - 1 - j] * a[0][(row - j) * i + c])
                                .sum::<f64>();
                        if act { silu(s) } else { s }
                    })
                    .collect()
            };
            let a = data(&args);
            g.close(
                "conv",
                &g.run(&args[..4], &[R::F(vec![b, t, i])], |r, a| {
                    causal_conv1d(r, a, act)
                })[0],
                &forward(&a),
            );
            let dy = g.f(4, &[b, t, i]);
            let c = data(std::slice::from_ref(&dy)).remove(0);
            let d = g.run(
                &[args[0].clone(), args[1].clone(), args[2].clone(), pos, dy],
                &[R::F(vec![b, t, i]), R::S(vec![i, k]), R::S(vec![i])],
                |r, a| causal_conv1d_bwd(r, a, act),
            );
            for (n, d) in d.iter().enumerate() {
                g.gradient("conv", d, &a, n, &c, forward);
            }
        }
        // Two runs through a state are one run.
        let (t, i, k) = (11, 5, 4);
        let x = g.noise(7, t * i);
        let (w, bias) = (g.s(2, &[i, k]), g.s(3, &[i]));
        let whole = g.run(
            &[
                F(vec![1, t, i], x.clone()),
                w.clone(),
                bias.clone(),
                No,
                F(vec![1, k - 1, i], vec![0.0; (k - 1) * i]),
            ],
            &[R::F(vec![1, t, i]), R::Arg(4)],
            |r, a| causal_conv1d(r, a, true),
        );
        let mut state = vec![0.0; (k - 1) * i];
        let mut y = Vec::new();
        for (from, to) in [(0, 2), (2, 3), (3, t)] {
            let part = x[from * i..to * i].to_vec();
            let out = g.run(
                &[
                    F(vec![1, to - from, i], part),
                    w.clone(),
                    bias.clone(),
                    No,
                    F(vec![1, k - 1, i], state),
                ],
                &[R::F(vec![1, to - from, i]), R::Arg(4)],
                |r, a| causal_conv1d(r, a, true),
            );
            y.extend(out[0].clone());
            state = out[1].clone();
        }
        g.close("conv state", &y, &whole[0]);
        g.close("conv state", &state, &whole[1]);
    });
}

/// As wide and as narrow as layers are: long and short runs; gradients by their formula.
#[test]
fn convolution_of_many_and_few_channels() {
    with_device(|g| {
        for (b, t, i, k) in [(2, 1101, 4104, 4), (3, 517, 128, 4), (1, 300, 20, 4)] {
            let pos: Vec<i32> = (0..b * t).map(|e| (e % t % 61) as i32).collect();
            let (x, dy) = (g.f(1, &[b, t, i]), g.f(4, &[b, t, i]));
            let (w, bias) = (g.s(2, &[i, k]), g.s(3, &[i]));
            let pos = I(vec![b, t], pos);
            let a = data(&[x.clone(), w.clone(), bias.clone(), pos.clone(), dy.clone()]);
            let n = b * t * i;
            let (mut y, mut dx) = (vec![0.0; n], vec![0.0; n]);
            let (mut dw, mut db) = (vec![0.0; i * k], vec![0.0; i]);
            for e in 0..n {
                let (row, c) = (e / i, e % i);
                let reach = (k - 1).min(row % t).min(a[3][row] as usize);
                let tap = |j: usize| a[1][c * k + k - 1 - j];
                let s = a[2][c] + (0..=reach).map(|j| tap(j) * a[0][e - j * i]).sum::<f64>();
                let sg = sigmoid(s);
                y[e] = s * sg;
                let d = a[4][e] * sg * (1.0 + s * (1.0 - sg));
                db[c] += d;
                for j in 0..=reach {
                    dx[e - j * i] += d * tap(j);
                    dw[c * k + k - 1 - j] += d * a[0][e - j * i];
                }
            }
            let wide = vec![b, t, i];
            let args = [x, w, bias, pos, dy];
            let got = g.run(&args[..4], &[R::F(wide.clone())], |r, a| {
                causal_conv1d(r, a, true)
            });
            g.close("conv", &got[0], &y);
            let got = g.run(
                &args,
                &[R::F(wide), R::S(vec![i, k]), R::S(vec![i])],
                |r, a| causal_conv1d_bwd(r, a, true),
            );
            for (got, want) in got.iter().zip([&dx, &dw, &db]) {
                g.close("conv_bwd", got, want);
            }
        }
    });
}

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
    mamba1_of(&[(1, 19, 4, 70, 1, 16, true)]);
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
    in_tiles(&[(sizes([2, 150, 4, 64, 1, 128, 128]), false, 0.0)]);
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
            let pos = match documents {
                true => positions(b, t),
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
