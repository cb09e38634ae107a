//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves convention, on the first `dims` channels of each head:
//! with `a = pos * inv_freq[i]`, `c = factor cos a`, `s = factor sin a`:
//! `y[i] = x[i] c - x[i+dims/2] s`, `y[i+dims/2] = x[i+dims/2] c + x[i] s`; the other channels pass. Angles in f32.
//! `inverse` uses -s: the derivative.
//!
//! | arg/result | type | meaning |
//! |---|---|---|
//! | x | f[B T H P] | |
//! | pos? | i32[B T] | position within the document; absent: t |
//! | inv_freq | f32[X dims/2] | a constant, or an input where it changes with the length (LongRoPE) |
//! | -> y | f[B T H P] | |

use super::{ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{Type, TypeError};

/// Rotates channel pairs by position.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Rotated channels, even.
    pub dims: usize,
    /// Multiplies cos and sin.
    pub factor: f64,
    /// Rotate backwards.
    pub inverse: bool,
}

impl OpDef for Rope {
    const NAME: &'static str = "rope";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let x = a.req(0, "x")?;
        a.check(
            x.rank() == 4 && self.dims <= x.last() && self.dims.is_multiple_of(2),
            x,
            "x [B T H P], dims even, at most P",
        )?;
        a.sizes(1, "pos", &x.sizes()[..2])?;
        a.req(2, "inv_freq")?;
        a.sizes(2, "inv_freq", &[self.dims / 2])?;
        Ok(vec![x.clone()])
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        args[0].map_or(0.0, |x| 3.0 * (x.rows() * self.dims) as f64)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "pos", "inv_freq"]
    }
    fn attrs(&self) -> String {
        let mut s = format!("dims={}", self.dims);
        if self.factor != 1.0 {
            s.push_str(&format!(" factor={}", self.factor));
        }
        if self.inverse {
            s.push_str(" inverse");
        }
        s
    }
}

impl Differentiable for Rope {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        let Some(dy) = cx.d_result(0) else {
            return Ok(());
        };
        let back = Rope {
            inverse: !self.inverse,
            ..self.clone()
        };
        let dx = cx.push1(back, vec![Some(dy), cx.arg(1), cx.arg(2)])?;
        cx.set(0, dx);
        Ok(())
    }
}
