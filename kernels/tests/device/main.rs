//! Every launcher on a GPU, in f32 and bf16, on memory poisoned with NaN: results against loops in f64, gradients against central
//! differences of those loops. Without a GPU, or without its libraries, the tests say so and pass.

#![allow(unsafe_code)] // memory of the device
#![allow(clippy::unwrap_used)] // in helpers of tests too

mod attention;
mod causal_conv1d;
mod draw;
mod gated_delta;
mod linear;
mod linear_cross_entropy;
mod moe;
mod moves;
mod rms_norm;
mod selective_scan;
mod ssd;

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

/// A result: in the type under test, f32, integers, of 8 bits, or the memory of an argument.
enum R {
    F(Vec<usize>),
    S(Vec<usize>),
    I(Vec<usize>),
    Q(Eight, Vec<usize>),
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

/// A finite number of 8 bits.
fn eight(bits: u8, mantissa: u32) -> f64 {
    let (magnitude, bias) = (u32::from(bits & 0x7f), (1 << (6 - mantissa)) - 1);
    let (exponent, m) = (
        magnitude >> mantissa,
        f64::from(magnitude % (1 << mantissa)),
    );
    let lead = if exponent == 0 {
        0.0
    } else {
        f64::from(1u32 << mantissa)
    };
    let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
    sign * (lead + m) * 2f64.powi(exponent.max(1) as i32 - bias - mantissa as i32)
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
        DType::Eight(e) => {
            let mantissa = if e == Eight::E4m3 { 3 } else { 2 };
            b.iter().map(|&b| eight(b, mantissa)).collect()
        }
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
        let written: Vec<usize> = results
            .iter()
            .filter_map(|r| match r {
                R::Arg(i) => Some(*i),
                R::F(_) | R::S(_) | R::I(_) | R::Q(..) => None,
            })
            .collect();
        let results: Vec<Tensor> = results
            .iter()
            .map(|r| match r {
                R::F(d) => new(device, t, d, None),
                R::S(d) => new(device, DType::F32, d, None),
                R::I(d) => new(device, DType::I32, d, None),
                R::Q(e, d) => new(device, DType::Eight(*e), d, None),
                R::Arg(i) => args[*i].clone().unwrap(),
            })
            .collect();
        let fixed: Vec<bool> = (0..args.len()).map(|i| !written.contains(&i)).collect();
        let a = Args {
            args: &args,
            results: &results,
            fixed: &fixed,
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
