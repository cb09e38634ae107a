//! The native CPU backend: executes plans in one arena, in f32, multi-threaded. One file per op, as on every floor.

#![allow(dead_code, unused_imports)] // until the ops land

pub(crate) mod math;
mod memory;
pub(crate) mod simd;
pub(crate) mod tensor;

mod cache_write;
mod causal_conv1d;
#[cfg(test)]
mod check;
mod panel;
mod rope;
mod ssd;
