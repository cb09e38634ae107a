//! What the tests of ops share: runs a kernel on poisoned results, numbers, comparison with f64 loops and central differences.

use super::tensor::{Args, Cx, Results, Slot, SlotMut};
use crate::HostTensor;
use marimba_ir::op::{ArgTypes, Op};
use marimba_ir::{DType, Dim, Type};

/// An argument: absent, or a type and its elements.
pub(super) type Arg = Option<(Type, HostTensor)>;

/// Floats of these dims.
pub(super) fn floats(dims: Vec<Dim>, x: &[f32]) -> Arg {
    let ty = Type::f32(dims);
    assert_eq!(ty.len(), x.len(), "{ty}");
    Some((ty, HostTensor::F32(x.to_vec())))
}

/// Integers of these dims.
pub(super) fn ints(dims: Vec<Dim>, x: &[i32]) -> Arg {
    let ty = Type::i32(dims);
    assert_eq!(ty.len(), x.len(), "{ty}");
    Some((ty, HostTensor::I32(x.to_vec())))
}

/// Runs a kernel on one and on three threads; results start as NaN (in-place ones as their argument) and must not depend on threads.
pub(super) fn run<O: Clone + Sync + Into<Op>>(
    op: &O,
    args: &[Arg],
    kernel: impl Fn(&O, &Args, &mut Results, &Cx) + Sync,
) -> Vec<Vec<f32>> {
    let one = run_on(1, op, args, &kernel);
    let three = run_on(3, op, args, &kernel);
    for (a, b) in one.iter().zip(&three) {
        assert!(
            a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()),
            "depends on threads"
        );
    }
    one
}

/// Runs a kernel on this many threads.
pub(super) fn run_on<O: Clone + Sync + Into<Op>>(
    threads: usize,
    op: &O,
    args: &[Arg],
    kernel: impl Fn(&O, &Args, &mut Results, &Cx) + Sync,
) -> Vec<Vec<f32>> {
    let ir: Op = op.clone().into();
    let types: Vec<Option<Type>> = args
        .iter()
        .map(|a| a.as_ref().map(|(t, _)| t.clone()))
        .collect();
    let results = ir
        .infer(&ArgTypes {
            op: ir.name(),
            types: &types,
        })
        .unwrap();
    let mut slots: Vec<Slot> = args
        .iter()
        .map(|a| match a {
            Some((_, HostTensor::F32(x))) => Slot::F32(x),
            Some((_, HostTensor::I32(x))) => Slot::I32(x),
            None => Slot::Absent,
        })
        .collect();
    let mut memory: Vec<Vec<f32>> = Vec::new();
    for (k, ty) in results.iter().enumerate() {
        assert_eq!(ty.dtype, DType::F32);
        let in_place = ir
            .alias(k)
            .map(|alias| alias.arg())
            .filter(|&i| types.get(i).is_some_and(Option::is_some));
        memory.push(match in_place {
            Some(i) => {
                slots[i] = Slot::Absent;
                args[i].as_ref().map(|(_, x)| x.f32().to_vec()).unwrap()
            }
            None => vec![f32::NAN; ty.len()],
        });
    }
    let out: Vec<SlotMut> = memory.iter_mut().map(|m| SlotMut::F32(m)).collect();
    let cx = Cx::new(threads);
    let a = Args {
        slots: &slots,
        types: &types,
    };
    let mut r = Results {
        slots: out,
        types: &results,
    };
    if threads == 1 {
        kernel(op, &a, &mut r, &cx);
    } else {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| kernel(op, &a, &mut r, &cx));
    }
    memory
}

/// Numbers in [-scale, scale], the same for the same seed.
pub(super) fn noise(seed: u64, n: usize, scale: f32) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            ((s >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale
        })
        .collect()
}

/// Positions of `b` rows of `t` tokens whose documents hold `lengths` tokens in turn (row i starts with the i-th length); the first
/// document of each row began `first` tokens before the row.
pub(super) fn positions(b: usize, t: usize, first: usize, lengths: &[usize]) -> Vec<i32> {
    let mut out = Vec::new();
    for row in 0..b {
        let mut start = first;
        for doc in row.. {
            let end = out.len() + lengths[doc % lengths.len()];
            out.extend(
                (start..)
                    .map(|p| p as i32)
                    .take(end.min((row + 1) * t) - out.len()),
            );
            start = 0;
            if out.len() == (row + 1) * t {
                break;
            }
        }
    }
    out
}

/// f64 of f32.
pub(super) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

/// Largest difference is at most `tol` of the largest wanted magnitude.
#[track_caller]
pub(super) fn close(what: &str, got: &[f32], want: &[f64], tol: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1e-6f64, |m, v| m.max(v.abs()));
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let err = (f64::from(g) - w).abs() / scale;
        assert!(err <= tol, "{what}[{i}]: {g}, not {w} (scale {scale})");
    }
}

/// Gradient `got` of argument `which` of `loss` against central differences at up to `samples` elements.
#[track_caller]
pub(super) fn gradient(
    what: &str,
    loss: impl Fn(&[Vec<f64>]) -> f64,
    args: &[Vec<f64>],
    which: usize,
    got: &[f32],
    samples: usize,
    tol: f64,
) {
    assert_eq!(got.len(), args[which].len(), "{what}");
    assert!(got.iter().all(|g| g.is_finite()), "{what}: not all finite");
    let scale = got.iter().fold(1e-1f64, |m, &v| m.max(f64::from(v).abs()));
    let mut args = args.to_vec();
    // A step without common factors with usual sizes visits all residues.
    let step = (got.len() / samples).max(1) | 1;
    for i in (0..got.len()).step_by(step) {
        let x = args[which][i];
        let h = 1e-5;
        args[which][i] = x + h;
        let up = loss(&args);
        args[which][i] = x - h;
        let down = loss(&args);
        args[which][i] = x;
        let want = (up - down) / (2.0 * h);
        let err = (f64::from(got[i]) - want).abs() / scale;
        assert!(
            err <= tol,
            "{what}[{i}]: {}, not {want} (scale {scale})",
            got[i]
        );
    }
}
