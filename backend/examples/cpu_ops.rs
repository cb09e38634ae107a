//! Speed of single ops on the native CPU backend: milliseconds, GFLOP/s and GB/s, the least of many runs.
//!
//! `cargo run --release -p marimba-backend --example cpu_ops -- [threads] [part of a name]`
//!
//! The sizes are those of a model of width 256 on 2048 tokens. The first line is a product of 1024 x 1024 matrices: what the machine can.

use marimba_backend::{BackendError, CpuEngine, Engine, HostTensor};
use marimba_ir::op::{
    AdamW, AdamWTensor, Bin, Embed, Gate, GlobalNorm, Linear, LinearCrossEntropy,
    LinearCrossEntropyGrad, LinearDw, LinearDx, Op, Pointwise, RmsNorm, RmsNormBwd, SumTo, Un,
};
use marimba_ir::{DType, External, Graph, Phase, Place, Type, TypeError, dims, plan};

const ROWS: usize = 2048;
const D: usize = 256;
const F: usize = 768;

/// A case: what is printed, the op, and its argument types.
type Case = (String, Op, Vec<Option<Type>>);

fn cases() -> Vec<Case> {
    let x = |n: usize| Some(Type::f32(dims![B 8, T ROWS / 8, D n]));
    let w = |n: usize, k: usize| Some(Type::f32(dims![I n, D k]));
    let mut list: Vec<Case> = vec![(
        "linear 1024^3".into(),
        Linear.into(),
        vec![Some(Type::f32(dims![T 1024, D 1024])), w(1024, 1024), None],
    )];
    for (n, k) in [(128, D), (D, D), (F, D), (1024, D), (D, F)] {
        list.push((
            format!("linear N{n} K{k}"),
            Linear.into(),
            vec![x(k), w(n, k), None],
        ));
        list.push((
            format!("linear_dx N{n} K{k}"),
            LinearDx.into(),
            vec![x(n), w(n, k)],
        ));
        let dw = LinearDw {
            start: 0,
            accumulate: false,
        };
        list.push((
            format!("linear_dw N{n} K{k}"),
            dw.into(),
            vec![x(k), x(n), None, None],
        ));
    }
    for (gate, name) in [
        (Gate::None, ""),
        (Gate::Before, " gated before"),
        (Gate::After, " gated after"),
    ] {
        let norm = RmsNorm {
            eps: 1e-5,
            group: D,
            zero_centered: false,
            gate,
        };
        let weight = Some(Type::f32(dims![D D]));
        let z = if gate == Gate::None { None } else { x(D) };
        list.push((
            format!("rms_norm{name}"),
            norm.clone().into(),
            vec![x(D), weight.clone(), z.clone()],
        ));
        list.push((
            format!("rms_norm_bwd{name}"),
            RmsNormBwd { of: norm }.into(),
            vec![
                x(D),
                weight,
                z,
                Some(Type::f32(dims![B 8, T ROWS / 8, G 1])),
                x(D),
            ],
        ));
    }
    let mut gate_bwd = Pointwise::new(3);
    let (silu, slope) = (gate_bwd.un(Un::Silu, 0), gate_bwd.un(Un::DSilu, 0));
    let du = gate_bwd.bin(Bin::Mul, 2, silu);
    let dg = gate_bwd.bin(Bin::Mul, 2, 1);
    let dg = gate_bwd.bin(Bin::Mul, dg, slope);
    let gate_bwd = gate_bwd.out(dg).out(du);
    list.push((
        "pointwise add".into(),
        Pointwise::add().into(),
        vec![x(D), x(D)],
    ));
    list.push((
        "pointwise silu gate".into(),
        Pointwise::gate(Un::Silu).into(),
        vec![x(F), x(F)],
    ));
    list.push((
        "pointwise silu gate bwd".into(),
        gate_bwd.into(),
        vec![x(F), x(F), x(F)],
    ));
    list.push((
        "pointwise gelu".into(),
        Pointwise::map(Un::Gelu).into(),
        vec![x(F)],
    ));
    list.push((
        "sum_to columns".into(),
        SumTo { dims: dims![D F] }.into(),
        vec![x(F)],
    ));
    let tokens = Some(Type::i32(dims![B 8, T ROWS / 8]));
    list.push((
        "embed".into(),
        Embed.into(),
        vec![tokens.clone(), w(256, D)],
    ));
    let head = LinearCrossEntropy {
        multiplier: 1.0,
        z_loss: 0.0,
        z_all: false,
    };
    let one = Some(Type::scalar());
    for v in [256, 8192] {
        list.push((
            format!("linear_cross_entropy V{v}"),
            head.clone().into(),
            vec![x(D), w(v, D), tokens.clone(), one.clone()],
        ));
        let grad = LinearCrossEntropyGrad {
            of: head.clone(),
            accumulate: false,
        };
        let args = vec![
            x(D),
            w(v, D),
            tokens.clone(),
            one.clone(),
            one.clone(),
            None,
            None,
        ];
        list.push((format!("linear_cross_entropy_grad V{v}"), grad.into(), args));
    }
    let big = Some(Type::f32(dims![X 6_000_000]));
    list.push((
        "global_norm 6M".into(),
        GlobalNorm.into(),
        vec![big.clone()],
    ));
    let adamw = AdamW {
        copies: Vec::new(),
        betas: (0.9, 0.95),
        eps: 1e-8,
        clip: Some(1.0),
        tensors: vec![AdamWTensor {
            decay: 0.1,
            lr_scale: 1.0,
        }],
    };
    let mut args = vec![one.clone(), one.clone(), one];
    args.extend([big.clone(), big.clone(), big.clone(), big]);
    list.push(("adamw 6M".into(), adamw.into(), args));
    list
}

/// A graph of one node whose arguments are inputs (states where the op writes in place).
fn graph(op: &Op, types: &[Option<Type>]) -> Result<Graph, TypeError> {
    let mut g = Graph::new();
    let kind = || match op {
        Op::AdamW(_) => External::State,
        _ => External::Input,
    };
    let args = types
        .iter()
        .enumerate()
        .map(|(i, t)| {
            t.as_ref()
                .map(|t| g.add_external(kind(), &format!("x{i}"), t.clone()))
        })
        .collect();
    let at = Place {
        path: "bench".into(),
        block: None,
        phase: Phase::Forward,
    };
    g.push(op.clone(), args, &at)?;
    Ok(g)
}

fn data(ty: &Type) -> HostTensor {
    match ty.dtype {
        DType::I32 => HostTensor::I32((0..ty.len() as i32).map(|i| i * 7919 % 251).collect()),
        DType::F32 | DType::Bf16 | DType::F16 | DType::E4m3 | DType::E5m2 => HostTensor::F32(
            (0..ty.len())
                .map(|i| (i * 7919 % 1009) as f32 / 1009.0 + 0.01)
                .collect(),
        ),
    }
}

fn time(
    threads: usize,
    op: &Op,
    types: &[Option<Type>],
) -> Result<(f64, f64), Box<dyn std::error::Error>> {
    let g = graph(op, types)?;
    let p = plan(&g);
    let mut engine = CpuEngine::new(threads)?;
    let program = engine.load(g, p)?;
    let inputs: Vec<(String, HostTensor)> = types
        .iter()
        .enumerate()
        .filter_map(|(i, t)| t.as_ref().map(|t| (format!("x{i}"), data(t))))
        .collect();
    let inputs: Vec<(&str, HostTensor)> = inputs
        .iter()
        .map(|(n, x)| (n.as_str(), x.clone()))
        .collect();
    let mut run = || -> Result<(f64, f64), BackendError> {
        let (_, times) = engine.run_profiled(program, &inputs)?;
        Ok((times[0].secs, times[0].flops))
    };
    let (mut best, flops) = run()?;
    for _ in 0..30 {
        best = best.min(run()?.0);
    }
    Ok((best, flops))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let threads = args.first().map_or(Ok(2), |t| t.parse())?;
    let part = args.get(1).map_or("", String::as_str);
    for (name, op, types) in cases() {
        if !name.contains(part) {
            continue;
        }
        let (secs, flops) = time(threads, &op, &types)?;
        let results = graph(&op, &types)?;
        let written: usize = results.nodes[0]
            .results
            .iter()
            .map(|&v| results.ty(v).bytes())
            .sum();
        let read: usize = types.iter().flatten().map(Type::bytes).sum();
        println!(
            "{name:32} {:9.3} ms {:8.1} GFLOP/s {:8.1} GB/s",
            secs * 1e3,
            flops / secs / 1e9,
            (read + written) as f64 / secs / 1e9
        );
    }
    Ok(())
}
