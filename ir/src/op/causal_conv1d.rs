//! Depthwise causal convolution over time, with SiLU: `y[t,c] = act(b[c] + sum_j w[c,K-1-j] x[t-j,c])`, j = 0..K-1.
//!
//! Tap j of token t is read iff `j <= pos[b,t]` and token t-j lies in this run or in the carried state.
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | causal_conv1d | x | f[B T I] | channel last |
//! | | w | f32[I K] | last tap = the current token |
//! | | b? | f32[I] | |
//! | | pos? | i32[B T] | position within the document |
//! | | state? | f[B K-1 I] | the K-1 inputs before this run, oldest first |
//! | | -> y | f[B T I] | |
//! | | -> state | f[B K-1 I] | only when state is given; the same memory |
//! | causal_conv1d_bwd | x, w, b?, pos?, dy | | |
//! | | -> dx | f[B T I] | |
//! | | -> dw | f32[I K] | |
//! | | -> db | f32[I] | only when b is present |

use super::{Alias, ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{Type, TypeError};

/// The convolution.
#[derive(Clone, Debug, PartialEq)]
pub struct CausalConv1d {
    /// Apply SiLU.
    pub silu: bool,
}

/// Its derivative; recomputes the pre-activation.
#[derive(Clone, Debug, PartialEq)]
pub struct CausalConv1dBwd {
    /// The forward op.
    pub of: CausalConv1d,
}

fn check<'a>(a: &ArgTypes<'a>) -> Result<(&'a Type, &'a Type), TypeError> {
    let (x, w) = (a.req(0, "x")?, a.req(1, "w")?);
    a.check(
        x.rank() == 3 && w.rank() == 2 && w.size(0) == x.size(2) && w.size(1) > 0,
        format!("x {x}, w {w}"),
        "x [B T I], w [I K]",
    )?;
    a.sizes(2, "b", &[x.size(2)])?;
    a.sizes(3, "pos", &x.sizes()[..2])?;
    Ok((x, w))
}

impl OpDef for CausalConv1d {
    const NAME: &'static str = "causal_conv1d";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (x, w) = check(a)?;
        a.sizes(4, "state", &[x.size(0), w.size(1) - 1, x.size(2)])?;
        let mut out = vec![x.clone()];
        out.extend(a.opt(4).cloned());
        Ok(out)
    }
    fn alias(&self, result: usize) -> Option<Alias> {
        (result == 1).then_some(Alias::InPlace { arg: 4 })
    }
    fn flops(&self, args: &[Option<&Type>], results: &[&Type]) -> f64 {
        (2 * results[0].len() * args[1].map_or(0, Type::last)) as f64
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "w", "b", "pos", "state"]
    }
    fn attrs(&self) -> String {
        if self.silu {
            "silu".into()
        } else {
            String::new()
        }
    }
}

impl Differentiable for CausalConv1d {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        let Some(dy) = cx.d_result(0) else {
            return Ok(());
        };
        let args = vec![cx.arg(0), cx.arg(1), cx.arg(2), cx.arg(3), Some(dy)];
        let r = cx.push(CausalConv1dBwd { of: self.clone() }, args)?;
        for (i, d) in r.into_iter().enumerate() {
            cx.set(i, d);
        }
        Ok(())
    }
}

impl OpDef for CausalConv1dBwd {
    const NAME: &'static str = "causal_conv1d_bwd";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (x, w) = check(a)?;
        a.req(4, "dy")?;
        a.sizes(4, "dy", &x.sizes())?;
        let mut out = vec![x.clone(), Type::f32(w.dims.clone())];
        out.extend(a.opt(2).map(|b| Type::f32(b.dims.clone())));
        Ok(out)
    }
    fn flops(&self, args: &[Option<&Type>], results: &[&Type]) -> f64 {
        (4 * results[0].len() * args[1].map_or(0, Type::last)) as f64
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "w", "b", "pos", "dy"]
    }
    fn attrs(&self) -> String {
        if self.of.silu {
            "silu".into()
        } else {
            String::new()
        }
    }
}
