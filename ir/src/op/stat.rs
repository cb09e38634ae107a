//! Activation statistics for the probe pass.
//!
//! | arg/result | type | meaning |
//! |---|---|---|
//! | x | f[..] | |
//! | -> s | f32[X STAT_LEN] | see below |
//!
//! `s[0]` root mean square, `s[1]` largest magnitude, `s[2]` count of magnitudes above 65504 (beyond f16) or not finite,
//! `s[3]` smallest, `s[4]` largest, `s[5]` mean, then [`STAT_BUCKETS`] counts by sign and magnitude ([`stat_bucket`]).

use super::{ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{Type, TypeError, dims};

/// Histogram buckets: 32 binary orders of magnitude (2^-16 .. 2^16) for each sign.
pub const STAT_BUCKETS: usize = 64;

/// Length of the result.
pub const STAT_LEN: usize = 6 + STAT_BUCKETS;

/// Bucket of a value: negative values 0..32 from large to small magnitude, others 32..64 from small to large. Magnitudes are
/// clamped to [2^-16, 2^16); NaN counts as zero.
pub fn stat_bucket(x: f32) -> usize {
    let exponent = ((x.abs().to_bits() >> 23) as i32 - 127).clamp(-16, 15);
    let m = if x.is_nan() {
        0
    } else {
        (exponent + 16) as usize
    };
    if x < 0.0 { 31 - m } else { 32 + m }
}

/// Statistics of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Stat;

impl OpDef for Stat {
    const NAME: &'static str = "stat";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        a.req(0, "x")?;
        Ok(vec![Type::f32(dims![X STAT_LEN])])
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        args[0].map_or(0.0, |x| 4.0 * x.len() as f64)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x"]
    }
}

impl Differentiable for Stat {
    /// Statistics are read, never optimised ([`super::MeanSquare`] is the differentiable one).
    fn vjp(&self, _: &mut Vjp) -> Result<(), TypeError> {
        Ok(())
    }
}
