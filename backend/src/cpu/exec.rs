//! From op to function. The list of ops exists in `marimba_ir::op`; this match follows it and has no catch-all.

use super::tensor::{Args, Cx, Results};
use super::{
    adamw, attention, cache_write, cast, causal_conv1d, concat, draw, embed, gated_delta, linear,
    linear_cross_entropy, moe, pointwise, reduce, rms_norm, rope, route, selective_scan, ssd, stat,
    view,
};
use marimba_ir::op::Op;

/// Runs one op. Views have nothing to run.
pub(super) fn call(op: &Op, a: &Args, r: &mut Results, cx: &Cx) {
    match op {
        Op::Embed(op) => embed::embed(op, a, r, cx),
        Op::EmbedBwd(op) => embed::embed_bwd(op, a, r, cx),
        Op::Linear(op) => linear::linear(op, a, r, cx),
        Op::LinearDx(op) => linear::linear_dx(op, a, r, cx),
        Op::LinearDw(op) => linear::linear_dw(op, a, r, cx),
        Op::Narrow(op) => linear::narrow(op, a, r, cx),
        Op::LinearFp8(op) => linear::linear_fp8(op, a, r, cx),
        Op::RmsNorm(op) => rms_norm::rms_norm(op, a, r, cx),
        Op::RmsNormBwd(op) => rms_norm::rms_norm_bwd(op, a, r, cx),
        Op::Rope(op) => rope::rope(op, a, r, cx),
        Op::Attention(op) => attention::attention(op, a, r, cx),
        Op::AttentionBwd(op) => attention::attention_bwd(op, a, r, cx),
        Op::CausalConv1d(op) => causal_conv1d::causal_conv1d(op, a, r, cx),
        Op::CausalConv1dBwd(op) => causal_conv1d::causal_conv1d_bwd(op, a, r, cx),
        Op::SelectiveScan(op) => selective_scan::selective_scan(op, a, r, cx),
        Op::SelectiveScanBwd(op) => selective_scan::selective_scan_bwd(op, a, r, cx),
        Op::Ssd(op) => ssd::ssd(op, a, r, cx),
        Op::SsdBwd(op) => ssd::ssd_bwd(op, a, r, cx),
        Op::GatedDelta(op) => gated_delta::gated_delta(op, a, r, cx),
        Op::GatedDeltaBwd(op) => gated_delta::gated_delta_bwd(op, a, r, cx),
        Op::CacheWrite(op) => cache_write::cache_write(op, a, r, cx),
        Op::Draw(op) => draw::draw(op, a, r, cx),
        Op::Pointwise(op) => pointwise::pointwise(op, a, r, cx),
        Op::Route(op) => route::route(op, a, r, cx),
        Op::RouteBwd(op) => route::route_bwd(op, a, r, cx),
        Op::Balance(op) => route::balance(op, a, r, cx),
        Op::BalanceBwd(op) => route::balance_bwd(op, a, r, cx),
        Op::Dispatch(op) => moe::dispatch(op, a, r, cx),
        Op::GatherRows(op) => moe::gather_rows(op, a, r, cx),
        Op::Combine(op) => moe::combine(op, a, r, cx),
        Op::CombineBwd(op) => moe::combine_bwd(op, a, r, cx),
        Op::GroupedLinear(op) => moe::grouped_linear(op, a, r, cx),
        Op::GroupedLinearDx(op) => moe::grouped_linear_dx(op, a, r, cx),
        Op::GroupedLinearDw(op) => moe::grouped_linear_dw(op, a, r, cx),
        Op::LinearCrossEntropy(op) => linear_cross_entropy::linear_cross_entropy(op, a, r, cx),
        Op::LinearCrossEntropyBwd(op) => {
            linear_cross_entropy::linear_cross_entropy_bwd(op, a, r, cx)
        }
        Op::LinearCrossEntropyGrad(op) => {
            linear_cross_entropy::linear_cross_entropy_grad(op, a, r, cx)
        }
        Op::Cast(op) => cast::cast(op, a, r, cx),
        Op::Concat(op) => concat::concat(op, a, r, cx),
        Op::Split(op) => concat::split(op, a, r, cx),
        Op::Last(op) => view::last(op, a, r, cx),
        Op::LastBwd(op) => view::last_bwd(op, a, r, cx),
        Op::Reshape(_) | Op::Rows(_) => {}
        Op::MeanSquare(op) => reduce::mean_square(op, a, r, cx),
        Op::SumTo(op) => reduce::sum_to(op, a, r, cx),
        Op::Accumulate(op) => reduce::accumulate(op, a, r, cx),
        Op::Stat(op) => stat::stat(op, a, r, cx),
        Op::GlobalNorm(op) => adamw::global_norm(op, a, r, cx),
        Op::AdamW(op) => adamw::adamw(op, a, r, cx),
    }
}
