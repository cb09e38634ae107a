//! Head and loss together, block by block over rows, so that the logits `[B T V]` never exist at once.
//!
//! With `l = multiplier * x w^T`, `lse = log sum_v exp l[v]`, `nll = lse - l[target]`:
//! `loss = scale * sum_valid nll + scale * z_loss * sum_z lse^2`; a row is valid iff its target is not negative; z runs over valid
//! rows, or over all rows with `z_all` (Bamba in transformers). `scale` is 1 / (number of valid targets of the whole step).
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | linear_cross_entropy | x | f[B T D] | normed hidden states |
//! | | w | f[V D] | head |
//! | | targets | i32[B T] | negative: ignored |
//! | | scale | f32[X1] | |
//! | | -> loss | f32[X1] | the only differentiable result |
//! | | -> nll | f32[B T] | 0 where ignored |
//! | | -> lse | f32[B T] | |
//! | | -> hit | f32[B T] | 1 where the largest logit is the target (first of equals) |
//! | linear_cross_entropy_bwd | x, w, targets, scale, lse, dloss | | recomputes logits by blocks |
//! | | -> dx, dw | f[B T D], f32[V D] | |
//! | linear_cross_entropy_grad | x, w, targets, scale, dloss, into?, beta? | | forward and backward in one walk: three products, not four |
//! | | -> loss, nll, lse, hit, dx, dw | | dw written over `into` (`beta*into + dw`) when given |

use super::{Alias, ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{DType, Type, TypeError};

/// The loss.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearCrossEntropy {
    /// Factor on logits.
    pub multiplier: f64,
    /// Coefficient of the squared log-sum-exp (PaLM, arXiv 2204.02311, section 5); 0 is off.
    pub z_loss: f64,
    /// z-loss over ignored rows too.
    pub z_all: bool,
}

/// Its derivative.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearCrossEntropyBwd {
    /// The forward op.
    pub of: LinearCrossEntropy,
}

/// Both at once; made by a pass where the loss's gradient is known beforehand.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearCrossEntropyGrad {
    /// The forward op.
    pub of: LinearCrossEntropy,
    /// Whether `into` and `beta` are present.
    pub accumulate: bool,
}

impl LinearCrossEntropy {
    fn text(&self) -> String {
        let mut s = String::new();
        if self.multiplier != 1.0 {
            s.push_str(&format!("multiplier={} ", self.multiplier));
        }
        if self.z_loss != 0.0 {
            s.push_str(&format!(
                "z_loss={:e}{}",
                self.z_loss,
                if self.z_all { " all" } else { "" }
            ));
        }
        s.trim_end().to_string()
    }
    fn product(args: &[Option<&Type>]) -> f64 {
        match (args[0], args[1]) {
            (Some(x), Some(w)) => 2.0 * x.len() as f64 * w.size(0) as f64,
            _ => 0.0,
        }
    }
}

fn forward(a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
    let (x, w, targets) = (a.req(0, "x")?, a.req(1, "w")?, a.req(2, "targets")?);
    a.check(
        w.rank() == 2 && x.last() == w.size(1),
        format!("x {x}, w {w}"),
        "x [B T D], w [V D]",
    )?;
    a.check(
        targets.dtype == DType::I32 && targets.len() == x.rows(),
        targets,
        format!("i32 targets for {x}"),
    )?;
    a.req(3, "scale")?;
    let row = Type::f32(targets.dims.clone());
    Ok(vec![Type::scalar(), row.clone(), row.clone(), row])
}

impl OpDef for LinearCrossEntropy {
    const NAME: &'static str = "linear_cross_entropy";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        forward(a)
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        Self::product(args)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "w", "targets", "scale"]
    }
    fn attrs(&self) -> String {
        self.text()
    }
}

impl Differentiable for LinearCrossEntropy {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        let Some(dloss) = cx.d_result(0) else {
            return Ok(());
        };
        let args = vec![
            cx.arg(0),
            cx.arg(1),
            cx.arg(2),
            cx.arg(3),
            Some(cx.result(2)),
            Some(dloss),
        ];
        let r = cx.push(LinearCrossEntropyBwd { of: self.clone() }, args)?;
        cx.set(0, r[0]);
        cx.set(1, r[1]);
        Ok(())
    }
}

impl OpDef for LinearCrossEntropyBwd {
    const NAME: &'static str = "linear_cross_entropy_bwd";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        forward(a)?;
        a.req(4, "lse")?;
        a.req(5, "dloss")?;
        Ok(vec![
            a.req(0, "x")?.clone(),
            Type::f32(a.req(1, "w")?.dims.clone()),
        ])
    }
    /// Two products; the third, of the recomputed logits, is the kernel's own affair.
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        2.0 * LinearCrossEntropy::product(args)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "w", "targets", "scale", "lse", "dloss"]
    }
    fn attrs(&self) -> String {
        self.of.text()
    }
}

impl OpDef for LinearCrossEntropyGrad {
    const NAME: &'static str = "linear_cross_entropy_grad";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let mut out = forward(a)?;
        a.req(4, "dloss")?;
        let (x, w) = (a.req(0, "x")?, a.req(1, "w")?);
        out.push(x.clone());
        let dw = Type::f32(w.dims.clone());
        if self.accumulate {
            a.req(5, "into")?;
            a.sizes(5, "into", &w.sizes())?;
            a.req(6, "beta")?;
        }
        out.push(dw);
        Ok(out)
    }
    fn alias(&self, result: usize) -> Option<Alias> {
        (self.accumulate && result == 5).then_some(Alias::InPlace { arg: 5 })
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        3.0 * LinearCrossEntropy::product(args)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "w", "targets", "scale", "dloss", "into", "beta"]
    }
    fn attrs(&self) -> String {
        self.of.text()
    }
}
