//! CUDA kernels and their launchers: one `.cu` (with parts in a folder where it is long) and one `.rs` per op, under the names of the
//! ops' files in the IR.
//!
//! A launcher turns an op with device addresses into [`Command`]s; a [`Device`] compiles what they need and runs them. Launchers need no
//! device, so what they launch can be looked at anywhere. Memory that a kernel needs besides its arguments comes from a scratch area
//! whose size the [`Recorder`] adds up before anything is allocated.

mod adamw;
mod attention;
mod cache_write;
mod cast;
mod causal_conv1d;
mod choices;
mod compile;
mod concat;
mod device;
mod draw;
mod embed;
mod fp8;
mod gated_delta;
mod linear;
mod linear_cross_entropy;
mod moe;
mod pointwise;
mod record;
mod reduce;
mod rms_norm;
mod rope;
mod route;
mod selective_scan;
mod ssd;
mod stat;
mod view;

pub use adamw::{AdamW, adamw, global_norm};
pub use attention::{attention, attention_bwd};
pub use cache_write::cache_write;
pub use cast::cast;
pub use causal_conv1d::{causal_conv1d, causal_conv1d_bwd};
pub use compile::{Compiler, KernelError};
pub use concat::{concat, split};
pub use device::{Captured, Device, PRODUCT_SCRATCH, Pinned, Prepared};
pub use draw::draw;
pub use embed::{embed, embed_bwd};
pub use fp8::{LinearFp8, linear_fp8, narrow};
pub use gated_delta::{gated_delta, gated_delta_bwd};
pub use linear::{linear, linear_dw, linear_dx, noise};
pub use linear_cross_entropy::{
    CrossEntropy, linear_cross_entropy, linear_cross_entropy_bwd, linear_cross_entropy_grad,
};
pub use moe::{
    combine, combine_bwd, dispatch, gather_rows, grouped_linear, grouped_linear_dw,
    grouped_linear_dx,
};
pub use pointwise::{Bin, Broadcast, Instr, Program, Un, pointwise};
pub use record::{
    Args, Command, DType, Eight, Eights, Launch, Module, Param, Product, Recorder, Target, Tensor,
    View,
};
pub use reduce::{accumulate, accumulate_all, mean_square, sum_to};
pub use rms_norm::{RmsNorm, rms_norm, rms_norm_bwd};
pub use rope::rope;
pub use route::{Route, balance, balance_bwd, route, route_bwd};
pub use selective_scan::{selective_scan, selective_scan_bwd};
pub use ssd::{ssd, ssd_bwd};
pub use stat::stat;
pub use view::{last, last_bwd};
