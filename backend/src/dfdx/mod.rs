//! The reference backend: every forward op composed of dfdx primitives, with dfdx's own tape for the gradients.
//!
//! Nothing here is shared with the native backends, so that a mistake would have to be made twice to pass their tests: scans run
//! token by token from the equations, attention has its whole score matrix, and no derivative is written by hand. Generic over dfdx's
//! device and, for the op suite, over its float: [`reference`](mod@reference) computes in f64, [`DfdxEngine`] in f32.
//!
//! Deliberately absent: speed, bf16 and f16 storage (dfdx has no bf16; values stay in f32, `cast` rounds them), several devices. A
//! training step keeps every intermediate value and gradient until it ends, so this is for small models.

mod adamw;
mod attention;
mod cache_write;
mod cast;
mod causal_conv1d;
mod concat;
mod draw;
mod embed;
mod engine;
mod gated_delta;
mod linear;
mod linear_cross_entropy;
mod moe;
mod pointwise;
mod reduce;
pub mod reference;
mod rms_norm;
mod rope;
mod route;
mod selective_scan;
mod ssd;
mod stat;
mod tape;
#[cfg(test)]
mod tests;
mod usable;
mod view;

pub use engine::DfdxEngine;
pub use usable::usable;

use ::dfdx::prelude::{Device as DfdxDevice, Dtype};
use marimba_ir::Type;
use marimba_ir::op::Op;
use std::any::Any;
use std::cell::RefCell;
use tape::{Args, Cx, Fault, Res, Value};

/// dfdx's device of this build: its `Cuda` with the cargo feature `dfdx-cuda`, else its `Cpu`.
pub type Device = ::dfdx::prelude::AutoDevice;

/// The device of this thread: dfdx's `Cuda` cannot move to another, so each thread has one of its own, made when it first needs it.
fn device<D: Clone + Default + 'static>() -> D {
    thread_local! {
        static DEVICES: RefCell<Vec<Box<dyn Any>>> = const { RefCell::new(Vec::new()) };
    }
    DEVICES.with_borrow_mut(|devices| {
        if let Some(found) = devices.iter().find_map(|d| d.downcast_ref::<D>()) {
            return found.clone();
        }
        let made = D::default();
        devices.push(Box::new(made.clone()));
        made
    })
}

/// Runs one forward or update op. `types` are those of the arguments, `results` those that the op inferred.
fn run_op<E: Dtype, D: DfdxDevice<E>>(
    cx: &Cx<E, D>,
    op: &Op,
    args: &[Option<Value<E, D>>],
    types: &[Option<Type>],
    results: &[Type],
) -> Res<Vec<Value<E, D>>> {
    let a = &Args(args);
    match op {
        Op::Embed(_) => match results.first() {
            Some(result) => embed::embed(cx, a, &result.sizes()),
            None => Ok(Vec::new()),
        },
        Op::Linear(_) => linear::linear(cx, a),
        Op::RmsNorm(op) => rms_norm::rms_norm(cx, op, a),
        Op::Rope(op) => rope::rope(cx, op, a),
        Op::Attention(op) => attention::attention(cx, op, a),
        Op::CausalConv1d(op) => causal_conv1d::causal_conv1d(cx, op, a),
        Op::SelectiveScan(op) => selective_scan::selective_scan(cx, op, a),
        Op::Ssd(op) => ssd::ssd(cx, op, a),
        Op::GatedDelta(op) => gated_delta::gated_delta(cx, op, a),
        Op::Pointwise(op) => match results.first() {
            Some(result) => pointwise::pointwise(cx, op, a, types, result),
            None => Ok(Vec::new()),
        },
        Op::Route(op) => route::route(cx, op, a),
        Op::Balance(_) => route::balance(cx, a),
        Op::Dispatch(op) => moe::dispatch(op, a),
        Op::GatherRows(_) => moe::gather_rows(cx, a),
        Op::GroupedLinear(_) => moe::grouped_linear(cx, a),
        Op::Combine(op) => moe::combine(cx, op, a),
        Op::LinearCrossEntropy(op) => linear_cross_entropy::linear_cross_entropy(cx, op, a),
        // Its gradients come from the tape.
        Op::LinearCrossEntropyGrad(op) => linear_cross_entropy::linear_cross_entropy(cx, &op.of, a),
        Op::CacheWrite(_) => cache_write::cache_write(cx, a),
        Op::Draw(_) => draw::draw(a),
        Op::Cast(op) => cast::cast(cx, op, a),
        Op::Concat(_) => concat::concat(cx, a),
        Op::Split(op) => concat::split(cx, op, a),
        Op::Last(_) => view::last(cx, a),
        Op::Reshape(op) => view::reshape(op, a),
        Op::Rows(op) => view::rows(cx, op, a),
        Op::MeanSquare(_) => reduce::mean_square(cx, a),
        Op::Stat(_) => stat::stat(cx, a),
        Op::GlobalNorm(_) => adamw::global_norm(cx, a),
        Op::AdamW(op) => adamw::adamw(cx, op, a),
        Op::EmbedBwd(_)
        | Op::LinearDx(_)
        | Op::LinearDw(_)
        | Op::RmsNormBwd(_)
        | Op::AttentionBwd(_)
        | Op::CausalConv1dBwd(_)
        | Op::SelectiveScanBwd(_)
        | Op::SsdBwd(_)
        | Op::GatedDeltaBwd(_)
        | Op::RouteBwd(_)
        | Op::BalanceBwd(_)
        | Op::GroupedLinearDx(_)
        | Op::GroupedLinearDw(_)
        | Op::CombineBwd(_)
        | Op::LinearCrossEntropyBwd(_)
        | Op::LastBwd(_)
        | Op::SumTo(_)
        | Op::Accumulate(_)
        | Op::Narrow(_)
        | Op::LinearFp8(_) => Err(Fault(
            "the tape gives gradients here, backward ops are not run".into(),
        )),
    }
}
