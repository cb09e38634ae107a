//! Sums over dimensions, means of squares, and accumulation into gradient buffers.
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | sum_to | x | f[..] | |
//! | | -> y | f32[dims] | x summed over what [`super::pointwise::Broadcast`] would repeat: the derivative of broadcasting |
//! | mean_square | x | f[..] | |
//! | | -> y | f32[X1] | `mean(x^2)` |
//! | accumulate | into | f32[M ..] | a gradient buffer |
//! | | beta | f32[X1] | factor on what was there; 0 never reads |
//! | | x? | f[N ..] | added to rows `start..start+len`; absent: 0 |
//! | | -> into | f32[M ..] | the same memory; other rows are untouched |

use super::pointwise::Broadcast;
use super::{Alias, ArgTypes, Bin, Differentiable, OpDef, Pointwise, Un};
use crate::vjp::Vjp;
use crate::{Dim, Type, TypeError};

/// Sum down to smaller dims.
#[derive(Clone, Debug, PartialEq)]
pub struct SumTo {
    /// Dims of the result.
    pub dims: Vec<Dim>,
}

/// Mean of squares.
#[derive(Clone, Debug, PartialEq)]
pub struct MeanSquare;

/// `into[start..start+len] = beta * into[..] + x`.
#[derive(Clone, Debug, PartialEq)]
pub struct Accumulate {
    /// First row.
    pub start: usize,
    /// Rows.
    pub len: usize,
}

impl OpDef for SumTo {
    const NAME: &'static str = "sum_to";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let x = a.req(0, "x")?;
        let y = Type::f32(self.dims.clone());
        a.check(
            Broadcast::of(&y, x).is_some(),
            x,
            format!("a type that {y} broadcasts to"),
        )?;
        Ok(vec![y])
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        args[0].map_or(0.0, |x| x.len() as f64)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x"]
    }
}

impl OpDef for MeanSquare {
    const NAME: &'static str = "mean_square";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        a.req(0, "x")?;
        Ok(vec![Type::scalar()])
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        args[0].map_or(0.0, |x| 2.0 * x.len() as f64)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x"]
    }
}

impl Differentiable for MeanSquare {
    /// `dx = 2/n x dy`.
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        if let (Some(dy), Some(x), true) = (cx.d_result(0), cx.arg(0), cx.needs(0)) {
            let n = cx.ty(x).len().max(1) as f32;
            let mut p = Pointwise::new(2);
            let m = p.bin(Bin::Mul, 0, 1);
            let s = p.un(Un::Scale(2.0 / n), m);
            let dx = cx.push1(p.out(s), vec![Some(x), Some(dy)])?;
            cx.set(0, dx);
        }
        Ok(())
    }
}

impl OpDef for Accumulate {
    const NAME: &'static str = "accumulate";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let into = a.req(0, "into")?;
        a.req(1, "beta")?;
        a.check(
            into.rank() > 0 && self.start + self.len <= into.size(0),
            into,
            "rows inside the buffer",
        )?;
        if let Some(x) = a.opt(2) {
            a.check(
                x.len() == into.len() / into.size(0).max(1) * self.len,
                x,
                format!("{} rows of {into}", self.len),
            )?;
        }
        Ok(vec![into.clone()])
    }
    fn alias(&self, _: usize) -> Option<Alias> {
        Some(Alias::InPlace { arg: 0 })
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        args.get(2)
            .copied()
            .flatten()
            .map_or(0.0, |x| x.len() as f64)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["into", "beta", "x"]
    }
    fn attrs(&self) -> String {
        format!("rows={}..{}", self.start, self.start + self.len)
    }
}
