//! One node: which launcher, and its attributes as numbers.

use marimba_ir::Type;
use marimba_ir::op::{
    Bin, Broadcast, Gate, Instr, LinearCrossEntropy, Normalize, Op, RmsNorm, Route, Score, Un,
    WEIGHT_BITS,
};
use marimba_kernels as k;

/// Records what `op` runs. `args` and `results` are the types of its arguments and results.
pub(super) fn record(
    op: &Op,
    r: &mut k::Recorder,
    a: &k::Args,
    args: &[Option<Type>],
    results: &[Type],
) {
    match op {
        Op::Embed(_) => k::embed(r, a),
        Op::EmbedBwd(_) => k::embed_bwd(r, a),
        Op::Linear(_) => k::linear(r, a),
        Op::LinearDx(_) => k::linear_dx(r, a),
        Op::LinearDw(op) => k::linear_dw(r, a, op.start),
        Op::Narrow(op) => k::narrow(r, a, op.plain, op.turned),
        Op::LinearFp8(op) => {
            let product = k::LinearFp8 {
                sizes: (op.y.rows(), op.y.last(), op.k),
                output: super::dtype(op.y.dtype),
                exact: op.exact,
                start: op.start,
            };
            k::linear_fp8(r, a, &product);
        }
        Op::RmsNorm(op) => k::rms_norm(r, a, &norm(op)),
        Op::RmsNormBwd(op) => k::rms_norm_bwd(r, a, &norm(&op.of)),
        Op::Rope(op) => k::rope(r, a, op.dims, op.factor as f32, op.inverse),
        Op::Attention(op) => k::attention(r, a, op.scale as f32, op.window),
        Op::AttentionBwd(op) => k::attention_bwd(r, a, op.of.scale as f32, op.of.window),
        Op::CausalConv1d(op) => k::causal_conv1d(r, a, op.silu),
        Op::CausalConv1dBwd(op) => k::causal_conv1d_bwd(r, a, op.of.silu),
        Op::SelectiveScan(op) => k::selective_scan(r, a, op.chunk),
        Op::SelectiveScanBwd(op) => k::selective_scan_bwd(r, a, op.of.chunk),
        Op::Ssd(op) => k::ssd(r, a, op.chunk, limit(op.dt_limit)),
        Op::SsdBwd(op) => k::ssd_bwd(r, a, op.of.chunk, limit(op.of.dt_limit)),
        Op::GatedDelta(op) => k::gated_delta(r, a, op.chunk),
        Op::GatedDeltaBwd(op) => k::gated_delta_bwd(r, a, op.of.chunk),
        Op::CacheWrite(_) => k::cache_write(r, a),
        Op::Draw(_) => k::draw(r, a, WEIGHT_BITS),
        Op::Pointwise(op) => {
            let Some(out) = results.first() else { return };
            let program = k::Program {
                code: op.code.iter().map(instr).collect(),
                outs: op.outs.clone(),
                broadcast: args
                    .iter()
                    .map(|t| match t.as_ref().and_then(|t| Broadcast::of(t, out)) {
                        Some(Broadcast::Scalar) => k::Broadcast::Scalar,
                        Some(Broadcast::Suffix { period }) => k::Broadcast::Suffix(period),
                        Some(Broadcast::Prefix { repeat }) => k::Broadcast::Prefix(repeat),
                        Some(Broadcast::Full) | None => k::Broadcast::Full,
                    })
                    .collect(),
            };
            k::pointwise(r, a, &program);
        }
        Op::Route(op) => k::route(r, a, &route(op)),
        Op::RouteBwd(op) => k::route_bwd(r, a, &route(&op.of)),
        Op::Balance(_) => k::balance(r, a),
        Op::BalanceBwd(_) => k::balance_bwd(r, a),
        Op::Dispatch(op) => k::dispatch(r, a, op.n_experts),
        Op::GatherRows(_) => k::gather_rows(r, a),
        Op::Combine(_) => k::combine(r, a),
        Op::CombineBwd(_) => k::combine_bwd(r, a),
        Op::GroupedLinear(_) => k::grouped_linear(r, a),
        Op::GroupedLinearDx(_) => k::grouped_linear_dx(r, a),
        Op::GroupedLinearDw(_) => k::grouped_linear_dw(r, a),
        Op::LinearCrossEntropy(op) => k::linear_cross_entropy(r, a, &loss(op)),
        Op::LinearCrossEntropyBwd(op) => k::linear_cross_entropy_bwd(r, a, &loss(&op.of)),
        Op::LinearCrossEntropyGrad(op) => k::linear_cross_entropy_grad(r, a, &loss(&op.of)),
        Op::Cast(_) => k::cast(r, a),
        Op::Concat(_) => k::concat(r, a),
        Op::Split(_) => k::split(r, a),
        Op::Last(_) => k::last(r, a),
        Op::LastBwd(_) => k::last_bwd(r, a),
        Op::Reshape(_) | Op::Rows(_) => {}
        Op::MeanSquare(_) => k::mean_square(r, a),
        Op::SumTo(_) => {
            let prefix = match (args.first(), results.first()) {
                (Some(Some(x)), Some(y)) => {
                    matches!(Broadcast::of(y, x), Some(Broadcast::Prefix { .. }))
                }
                _ => false,
            };
            k::sum_to(r, a, prefix);
        }
        Op::Accumulate(op) => k::accumulate(r, a, op.start, op.len),
        Op::Stat(_) => k::stat(r, a),
        Op::GlobalNorm(_) => k::global_norm(r, a),
        Op::AdamW(op) => {
            let op = k::AdamW {
                betas: op.betas,
                eps: op.eps as f32,
                clip: op.clip.unwrap_or(0.0) as f32,
                tensors: op
                    .tensors
                    .iter()
                    .map(|t| (t.decay as f32, t.lr_scale as f32))
                    .collect(),
                copies: op.copies.clone(),
            };
            k::adamw(r, a, &op);
        }
    }
}

fn limit((low, high): (f64, f64)) -> (f32, f32) {
    (low as f32, high as f32)
}

fn norm(op: &RmsNorm) -> k::RmsNorm {
    k::RmsNorm {
        eps: op.eps as f32,
        group: op.group,
        zero_centered: op.zero_centered,
        gate: match op.gate {
            Gate::None => 0,
            Gate::Before => 1,
            Gate::After => 2,
        },
    }
}

fn loss(op: &LinearCrossEntropy) -> k::CrossEntropy {
    k::CrossEntropy {
        multiplier: op.multiplier as f32,
        z_loss: op.z_loss as f32,
        z_all: op.z_all,
    }
}

fn route(op: &Route) -> k::Route {
    k::Route {
        top_k: op.top_k,
        score: match op.score {
            Score::SoftmaxAll => 0,
            Score::SoftmaxChosen => 1,
            Score::Sigmoid => 2,
        },
        normalize: op.normalize == Normalize::Sum,
        groups: op.n_groups,
        top_groups: op.top_groups,
        scale: op.scale as f32,
    }
}

fn instr(i: &Instr) -> k::Instr {
    match *i {
        Instr::Arg(a) => k::Instr::Arg(a),
        Instr::Const(c) => k::Instr::Const(c),
        Instr::Un(f, x) => k::Instr::Un(
            match f {
                Un::Neg => k::Un::Neg,
                Un::Exp => k::Un::Exp,
                Un::Sigmoid => k::Un::Sigmoid,
                Un::Silu => k::Un::Silu,
                Un::Softplus => k::Un::Softplus,
                Un::Gelu => k::Un::Gelu,
                Un::GeluTanh => k::Un::GeluTanh,
                Un::Relu => k::Un::Relu,
                Un::DSilu => k::Un::DSilu,
                Un::DGelu => k::Un::DGelu,
                Un::DGeluTanh => k::Un::DGeluTanh,
                Un::Step => k::Un::Step,
                Un::Scale(c) => k::Un::Scale(c),
                Un::Offset(c) => k::Un::Offset(c),
            },
            x,
        ),
        Instr::Bin(f, x, y) => k::Instr::Bin(
            match f {
                Bin::Add => k::Bin::Add,
                Bin::Sub => k::Bin::Sub,
                Bin::Mul => k::Bin::Mul,
            },
            x,
            y,
        ),
    }
}
