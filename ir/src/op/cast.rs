//! Change of element type, rounding to nearest even.
//!
//! | arg/result | type | meaning |
//! |---|---|---|
//! | x | f[..] | |
//! | into? | to[..] | when present the result is written over it |
//! | -> y | to[..] | |

use super::{Alias, ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{DType, Type, TypeError};

/// Converts elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Cast {
    /// Element type of the result.
    pub to: DType,
}

impl OpDef for Cast {
    const NAME: &'static str = "cast";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let x = a.req(0, "x")?;
        a.check(x.dtype.is_float() && self.to.is_float(), x, "a float type")?;
        let y = x.with_dtype(self.to);
        if let Some(into) = a.opt(1) {
            a.check(*into == y, into, &y)?;
        }
        Ok(vec![y])
    }
    fn alias(&self, _: usize) -> Option<Alias> {
        Some(Alias::InPlace { arg: 1 })
    }
    fn flops(&self, _: &[Option<&Type>], _: &[&Type]) -> f64 {
        0.0
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "into"]
    }
    fn attrs(&self) -> String {
        self.to.to_string()
    }
}

impl Differentiable for Cast {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        if let (Some(dy), Some(x), true) = (cx.d_result(0), cx.arg(0), cx.needs(0)) {
            let to = cx.ty(x).dtype;
            let dx = cx.push1(Cast { to }, vec![Some(dy)])?;
            cx.set(0, dx);
        }
        Ok(())
    }
}
