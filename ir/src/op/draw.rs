//! Drawing a token from logits: greedily, or by temperature, top-k and top-p (Holtzman et al. 2020, arXiv 1904.09751).
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | draw | logits | f32[.. V] | |
//! | | settings | f32[X3] | temperature, top-k, top-p |
//! | | bits | i32[.. X2] | 64 random bits a row, the lower 32 first |
//! | | -> token | i32[..] | |
//!
//! A row's tokens are in order of falling logits, equal ones in order of their numbers; NaN comes last, and both zeros are one. With a
//! temperature of 0 or less the token is the first of this order. Otherwise:
//!
//! * the weight of a token is `exp((logit - largest) / temperature)`, computed in f64 and rounded to a multiple of 2^-[`WEIGHT_BITS`]; all that
//!   follows is in integers, so that backends agree but where an exponential rounds otherwise;
//! * of the first top-k tokens (0: of all), which weigh `all`, the first ones are kept that reach `top-p * all`; together they weigh `kept`;
//! * the token is the first with which the sum of weights exceeds `bits * kept / 2^64`.

use super::{ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{DType, Type, TypeError};

/// Binary places of a token's weight, of which the most likely has 1: as many of them as a vocabulary may have fit 64 bits.
pub const WEIGHT_BITS: u32 = 36;

/// Draws one token a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw;

impl OpDef for Draw {
    const NAME: &'static str = "draw";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (logits, bits) = (a.req(0, "logits")?, a.req(2, "bits")?);
        a.req(1, "settings")?;
        a.sizes(1, "settings", &[3])?;
        let v = logits.last();
        a.check(
            logits.dtype == DType::F32
                && logits.rank() > 1
                && (1..1 << (63 - WEIGHT_BITS)).contains(&v),
            logits,
            "f32[.. V], V at least 1 and less than 2^27",
        )?;
        let rows = logits.dims[..logits.rank() - 1].to_vec();
        let mut want: Vec<usize> = rows.iter().map(|d| d.size).collect();
        want.push(2);
        a.check(
            bits.dtype == DType::I32 && bits.sizes() == want,
            bits,
            format!("i32 of sizes {want:?}"),
        )?;
        Ok(vec![Type::i32(rows)])
    }
    fn flops(&self, _: &[Option<&Type>], _: &[&Type]) -> f64 {
        0.0
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["logits", "settings", "bits"]
    }
}

impl Differentiable for Draw {
    /// What is drawn is a number of a token.
    fn vjp(&self, _: &mut Vjp) -> Result<(), TypeError> {
        Ok(())
    }
}
