//! Measures the sequence ops at the sizes of the speed models, one thread, best of many runs:
//! `cargo test --release -p marimba-backend speed -- --ignored --nocapture`.

use super::check::{floats, noise};
use super::exec;
use super::tensor::{Args, Cx, Results, Slot, SlotMut};
use crate::HostTensor;
use marimba_ir::op::{self, ArgTypes, Op};
use marimba_ir::{Dim, Type, dims};
use std::time::Instant;

type Given = Vec<Option<(Type, HostTensor)>>;

/// Runs the op, prints its best time and rate, returns its results.
fn measure(op: impl Into<Op>, args: &Given) -> Vec<(Type, Vec<f32>)> {
    let op = op.into();
    let types: Vec<Option<Type>> = args
        .iter()
        .map(|a| a.as_ref().map(|(t, _)| t.clone()))
        .collect();
    let results = op
        .infer(&ArgTypes {
            op: op.name(),
            types: &types,
        })
        .unwrap();
    let slots: Vec<Slot> = args
        .iter()
        .map(|a| match a {
            Some((_, HostTensor::F32(x))) => Slot::F32(x),
            Some((_, HostTensor::I32(x))) => Slot::I32(x),
            None => Slot::Absent,
        })
        .collect();
    let mut memory: Vec<Vec<f32>> = results.iter().map(|t| vec![0.0; t.len()]).collect();
    let cx = Cx::new(1);
    let mut best = f64::INFINITY;
    for _ in 0..60 {
        let out: Vec<SlotMut> = memory.iter_mut().map(|m| SlotMut::F32(m)).collect();
        let begin = Instant::now();
        exec::call(
            &op,
            &Args {
                slots: &slots,
                types: &types,
            },
            &mut Results {
                slots: out,
                types: &results,
            },
            &cx,
        );
        best = best.min(begin.elapsed().as_secs_f64());
    }
    let arg_types: Vec<Option<&Type>> = types.iter().map(Option::as_ref).collect();
    let flops = op.flops(&arg_types, &results.iter().collect::<Vec<_>>());
    println!(
        "{:24} {:8.3} ms {:7.1} GFLOP/s",
        op.name(),
        best * 1e3,
        flops / best * 1e-9
    );
    results.into_iter().zip(memory).collect()
}

fn some(seed: u64, dims: Vec<Dim>, scale: f32) -> Option<(Type, HostTensor)> {
    let n = Type::f32(dims.clone()).len();
    floats(dims, &noise(seed, n, scale))
}

fn negative(seed: u64, dims: Vec<Dim>) -> Option<(Type, HostTensor)> {
    let n = Type::f32(dims.clone()).len();
    floats(
        dims,
        &noise(seed, n, 0.4)
            .iter()
            .map(|v| v - 0.5)
            .collect::<Vec<_>>(),
    )
}

fn result(r: &(Type, Vec<f32>)) -> Option<(Type, HostTensor)> {
    floats(r.0.dims.clone(), &r.1)
}

#[test]
#[ignore = "a measurement"]
fn speed() {
    let (b, t, i) = (8, 256, 512);
    let n = 1024;
    let (x, y) = (noise(1, n * n, 1.0), noise(2, n * n, 1.0));
    let mut z = vec![0.0; n * n];
    let mut best = f64::INFINITY;
    for _ in 0..20 {
        let begin = Instant::now();
        #[allow(unsafe_code)]
        // SAFETY: three square matrices of n * n floats.
        unsafe {
            gemm::gemm(
                n,
                n,
                n,
                z.as_mut_ptr(),
                1,
                n as isize,
                false,
                x.as_ptr(),
                1,
                n as isize,
                y.as_ptr(),
                1,
                n as isize,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
        best = best.min(begin.elapsed().as_secs_f64());
    }
    println!(
        "{:24} {:8.3} ms {:7.1} GFLOP/s",
        "gemm 1024",
        best * 1e3,
        2.0 * (n as f64).powi(3) / best * 1e-9
    );

    let ssd = op::Ssd {
        chunk: 64,
        dt_limit: (0.0, f64::INFINITY),
    };
    let (h, p, n) = (8, 64, 64);
    let mut a = vec![
        some(1, dims![B b, T t, H h, P p], 1.0),
        some(2, dims![B b, T t, H h], 1.0),
        negative(3, dims![H h]),
        some(4, dims![B b, T t, G 1, N n], 1.0),
        some(5, dims![B b, T t, G 1, N n], 1.0),
        some(6, dims![H h], 1.0),
        some(7, dims![H h], 1.0),
        None,
    ];
    let r = measure(ssd.clone(), &a);
    a.extend([result(&r[1]), some(8, dims![B b, T t, H h, P p], 1.0)]);
    measure(op::SsdBwd { of: ssd }, &a);

    let scan = op::SelectiveScan { chunk: 64 };
    let mut a = vec![
        some(1, dims![B b, T t, I i], 1.0),
        some(2, dims![B b, T t, I i], 1.0),
        negative(3, dims![I i, N 16]),
        some(4, dims![B b, T t, G 1, N 16], 1.0),
        some(5, dims![B b, T t, G 1, N 16], 1.0),
        some(6, dims![I i], 1.0),
        some(7, dims![I i], 1.0),
        some(8, dims![B b, T t, I i], 1.0),
        None,
    ];
    let r = measure(scan.clone(), &a);
    a.extend([result(&r[1]), some(8, dims![B b, T t, I i], 1.0)]);
    measure(op::SelectiveScanBwd { of: scan }, &a);

    let attention = op::Attention {
        scale: 0.125,
        window: None,
    };
    for (b, t) in [(8, 256), (1, 2048)] {
        let q = dims![B b, T t, H 4, P 64];
        let kv = dims![B b, T t, G 2, P 64];
        let mut a = vec![
            some(1, q.clone(), 1.0),
            some(2, kv.clone(), 1.0),
            some(3, kv, 1.0),
            None,
        ];
        let r = measure(attention.clone(), &a);
        a.extend([result(&r[0]), result(&r[1]), some(4, q, 1.0)]);
        measure(
            op::AttentionBwd {
                of: attention.clone(),
            },
            &a,
        );
    }

    let conv = op::CausalConv1d { silu: true };
    let mut a = vec![
        some(1, dims![B b, T t, I 640], 1.0),
        some(2, dims![I 640, K 4], 1.0),
        some(3, dims![I 640], 1.0),
        None,
    ];
    measure(conv.clone(), &a);
    a.push(some(4, dims![B b, T t, I 640], 1.0));
    measure(op::CausalConv1dBwd { of: conv }, &a);

    let delta = op::GatedDelta { chunk: 64 };
    let mut a = vec![
        some(1, dims![B b, T t, G 4, N 64], 0.2),
        some(2, dims![B b, T t, G 4, N 64], 0.2),
        some(3, dims![B b, T t, H 4, P 64], 1.0),
        negative(4, dims![B b, T t, H 4]),
        some(5, dims![B b, T t, H 4], 0.5),
        None,
    ];
    let r = measure(delta.clone(), &a);
    a.extend([result(&r[1]), some(6, dims![B b, T t, H 4, P 64], 1.0)]);
    measure(op::GatedDeltaBwd { of: delta }, &a);

    let rope = op::Rope {
        dims: 64,
        factor: 1.0,
        inverse: false,
    };
    measure(
        rope,
        &vec![
            some(1, dims![B b, T t, H 4, P 64], 1.0),
            None,
            some(2, dims![X 32], 1.0),
        ],
    );
}
