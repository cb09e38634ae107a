//! Helpers of the op tests: random numbers, comparison with f64, running one op on poisoned results.

use super::exec;
use super::tensor::{Args, Cx, Results, Slot, SlotMut};
use crate::HostTensor;
use marimba_ir::op::{ArgTypes, Op};
use marimba_ir::{DType, Type};

/// `n` normal numbers (splitmix64, Box-Muller).
pub(super) fn randn(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut uniform = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..n)
        .map(|_| {
            let (u, v) = (uniform().max(1e-12), uniform());
            ((-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()) as f32
        })
        .collect()
}

/// Widened to f64.
pub(super) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

/// Requires `|got - want| <= tol * (rms(want) + |want|) + 1e-8` everywhere, and no NaN.
pub(super) fn close(got: &[f32], want: &[f64], tol: f64) {
    assert_eq!(got.len(), want.len());
    let rms = (want.iter().map(|w| w * w).sum::<f64>() / want.len().max(1) as f64).sqrt();
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let err = (f64::from(g) - w).abs();
        assert!(
            err <= tol * (rms + w.abs()) + 1e-8,
            "element {i}: {g}, not {w} (rms {rms})"
        );
    }
}

/// Runs `f` with a context of `threads` threads, inside its pool.
pub(super) fn in_pool<R: Send>(threads: usize, f: impl FnOnce(&Cx) -> R + Send) -> R {
    let cx = Cx::new(threads);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .expect("a thread pool")
        .install(|| f(&cx))
}

/// Runs one op on given arguments (type and numbers), as the executor would: results start as NaN unless they overwrite an argument.
/// Runs with 1, 2 and 3 threads and requires the same bits.
pub(super) fn run(op: impl Into<Op>, args: &[Option<(Type, HostTensor)>]) -> Vec<HostTensor> {
    let op = op.into();
    let types: Vec<Option<Type>> = args
        .iter()
        .map(|a| a.as_ref().map(|a| a.0.clone()))
        .collect();
    for (ty, data) in args.iter().flatten() {
        assert_eq!(ty.len(), data.len(), "{ty}");
    }
    let result_types = op
        .infer(&ArgTypes {
            op: op.name(),
            types: &types,
        })
        .expect("well-typed arguments");
    let bits = |x: &HostTensor| -> Vec<u32> {
        match x {
            HostTensor::F32(v) => v.iter().map(|x| x.to_bits()).collect(),
            HostTensor::I32(v) => v.iter().map(|&x| x as u32).collect(),
        }
    };
    let mut all: Vec<Vec<HostTensor>> = Vec::new();
    for threads in [1, 2, 3] {
        let aliased: Vec<Option<usize>> = (0..result_types.len())
            .map(|k| {
                op.alias(k)
                    .map(|a| a.arg())
                    .filter(|&i| args.get(i).is_some_and(Option::is_some))
            })
            .collect();
        let mut results: Vec<HostTensor> = result_types
            .iter()
            .zip(&aliased)
            .map(|(ty, alias)| match (alias, ty.dtype) {
                (Some(i), _) => args[*i].clone().expect("a present argument").1,
                (None, DType::I32) => HostTensor::I32(vec![i32::MIN; ty.len()]),
                (None, DType::F32 | DType::Bf16 | DType::F16 | DType::E4m3 | DType::E5m2) => {
                    HostTensor::F32(vec![f32::NAN; ty.len()])
                }
            })
            .collect();
        let slots: Vec<Slot> = args
            .iter()
            .enumerate()
            .map(|(i, a)| match a {
                Some(_) if aliased.contains(&Some(i)) => Slot::Absent,
                Some((_, HostTensor::F32(x))) => Slot::F32(x),
                Some((_, HostTensor::I32(x))) => Slot::I32(x),
                None => Slot::Absent,
            })
            .collect();
        let out: Vec<SlotMut> = results
            .iter_mut()
            .map(|r| match r {
                HostTensor::F32(x) => SlotMut::F32(x),
                HostTensor::I32(x) => SlotMut::I32(x),
            })
            .collect();
        in_pool(threads, |cx| {
            exec::call(
                &op,
                &Args {
                    slots: &slots,
                    types: &types,
                },
                &mut Results {
                    slots: out,
                    types: &result_types,
                },
                cx,
            )
        });
        all.push(results);
    }
    for other in &all[1..] {
        for (k, (a, b)) in all[0].iter().zip(other).enumerate() {
            assert_eq!(
                bits(a),
                bits(b),
                "{}: result {k} depends on the number of threads",
                op.name()
            );
        }
    }
    all.swap_remove(0)
}

/// An f32 argument.
pub(super) fn f(ty: Type, data: &[f32]) -> Option<(Type, HostTensor)> {
    Some((ty, HostTensor::F32(data.to_vec())))
}

/// An i32 argument.
pub(super) fn i(ty: Type, data: &[i32]) -> Option<(Type, HostTensor)> {
    Some((ty, HostTensor::I32(data.to_vec())))
}

/// Central differences of the scalar `loss` at `x`, at the elements in `at`.
pub(super) fn numeric(x: &[f64], at: &[usize], loss: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    at.iter()
        .map(|&i| {
            let h = 1e-5 * (1.0 + x[i].abs());
            let mut p = x.to_vec();
            p[i] += h;
            let up = loss(&p);
            p[i] = x[i] - h;
            (up - loss(&p)) / (2.0 * h)
        })
        .collect()
}

/// Requires the gradient `got` to agree with central differences of `loss` at up to 60 spread elements.
pub(super) fn check_grad(got: &[f32], x: &[f32], loss: impl Fn(&[f64]) -> f64) {
    assert_eq!(got.len(), x.len());
    assert!(got.iter().all(|g| g.is_finite()));
    let step = (x.len() / 60).max(1);
    let at: Vec<usize> = (0..x.len()).step_by(step).collect();
    let picked: Vec<f32> = at.iter().map(|&i| got[i]).collect();
    close(&picked, &numeric(&wide(x), &at, loss), 2e-4);
}

/// Sum of products: a scalar loss that gives gradient `dy`.
pub(super) fn dot64(y: &[f64], dy: &[f32]) -> f64 {
    assert_eq!(y.len(), dy.len());
    y.iter().zip(dy).map(|(a, &b)| a * f64::from(b)).sum()
}

/// Floats of a result.
pub(super) fn floats(x: &HostTensor) -> &[f32] {
    match x {
        HostTensor::F32(v) => v,
        HostTensor::I32(_) => panic!("floats wanted"),
    }
}

/// Integers of a result.
pub(super) fn ints(x: &HostTensor) -> &[i32] {
    match x {
        HostTensor::I32(v) => v,
        HostTensor::F32(_) => panic!("integers wanted"),
    }
}
