//! Choosing experts, and the load-balance loss.
//!
//! Scores `s`: softmax over all experts, or sigmoids; chosen are the `top_k` largest of `s + bias` (ties: the lower index), with
//! groups only within the `top_groups` groups whose two best `s + bias` sum highest. Weights are `s` of the chosen (without bias), or
//! with `Score::SoftmaxChosen` the softmax of the chosen logits; divided by their sum (`Normalize::Sum`, + 1e-20 with sigmoids), times
//! `scale`. The order of the chosen is by falling choice score.
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | route | logits | f32[B T E] | |
//! | | bias? | f32[E] | for the choice only |
//! | | -> weights | f32[B T K] | K = top_k |
//! | | -> experts | i32[B T K] | |
//! | route_bwd | logits, experts, dweights | | |
//! | | -> dlogits | f32[B T E] | the choice itself has no gradient |
//! | balance | logits, experts | | |
//! | | -> loss | f32[X1] | `E * sum_e f_e P_e`: f_e share of choices that are e, P_e mean softmax probability (arXiv 2101.03961 eq. 4) |
//! | balance_bwd | logits, experts, dloss | | |
//! | | -> dlogits | f32[B T E] | f has no gradient |

use super::{ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{DType, Dim, Letter, Type, TypeError};

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts.
    SoftmaxAll,
    /// Softmax over the chosen logits.
    SoftmaxChosen,
    /// Independent sigmoids.
    Sigmoid,
}

/// Whether chosen weights are made to sum to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Normalize {
    /// As scored.
    None,
    /// Divided by their sum.
    Sum,
}

/// The choice.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// Experts per token.
    pub top_k: usize,
    /// Score function.
    pub score: Score,
    /// Normalisation.
    pub normalize: Normalize,
    /// Groups of consecutive experts; 1 is off.
    pub n_groups: usize,
    /// Groups that may be chosen from.
    pub top_groups: usize,
    /// Factor on weights.
    pub scale: f64,
}

/// Derivative of the weights.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteBwd {
    /// The forward op.
    pub of: Route,
}

/// Load-balance loss.
#[derive(Clone, Debug, PartialEq)]
pub struct Balance;

/// Its derivative.
#[derive(Clone, Debug, PartialEq)]
pub struct BalanceBwd;

impl Route {
    fn text(&self) -> String {
        let mut s = format!("top_k={} {:?}", self.top_k, self.score);
        if self.normalize == Normalize::Sum {
            s.push_str(" normalized");
        }
        if self.n_groups > 1 {
            s.push_str(&format!(" groups={}/{}", self.top_groups, self.n_groups));
        }
        if self.scale != 1.0 {
            s.push_str(&format!(" scale={}", self.scale));
        }
        s
    }
}

impl OpDef for Route {
    const NAME: &'static str = "route";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let logits = a.req(0, "logits")?;
        let e = logits.last();
        a.sizes(1, "bias", &[e])?;
        a.check(
            self.n_groups > 0
                && e % self.n_groups == 0
                && self.top_groups <= self.n_groups
                && self.top_k > 0
                && self.top_k <= e / self.n_groups * self.top_groups,
            logits,
            format!("experts for {}", self.text()),
        )?;
        let chosen = logits.with_last(Dim {
            letter: Letter::K,
            size: self.top_k,
        });
        Ok(vec![
            chosen.with_dtype(DType::F32),
            chosen.with_dtype(DType::I32),
        ])
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        args[0].map_or(0.0, |t| 5.0 * t.len() as f64)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["logits", "bias"]
    }
    fn attrs(&self) -> String {
        self.text()
    }
}

impl Differentiable for Route {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        if let Some(dw) = cx.d_result(0) {
            let d = cx.push1(
                RouteBwd { of: self.clone() },
                vec![cx.arg(0), Some(cx.result(1)), Some(dw)],
            )?;
            cx.set(0, d);
        }
        Ok(())
    }
}

impl OpDef for RouteBwd {
    const NAME: &'static str = "route_bwd";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let logits = a.req(0, "logits")?;
        a.req(1, "experts")?;
        a.req(2, "dweights")?;
        Ok(vec![logits.clone()])
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        args[0].map_or(0.0, |t| 8.0 * t.len() as f64)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["logits", "experts", "dweights"]
    }
    fn attrs(&self) -> String {
        self.of.text()
    }
}

impl OpDef for Balance {
    const NAME: &'static str = "balance";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        a.req(0, "logits")?;
        a.req(1, "experts")?;
        Ok(vec![Type::scalar()])
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        args[0].map_or(0.0, |t| 5.0 * t.len() as f64)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["logits", "experts"]
    }
}

impl Differentiable for Balance {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        if let Some(dloss) = cx.d_result(0) {
            let d = cx.push1(BalanceBwd, vec![cx.arg(0), cx.arg(1), Some(dloss)])?;
            cx.set(0, d);
        }
        Ok(())
    }
}

impl OpDef for BalanceBwd {
    const NAME: &'static str = "balance_bwd";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let logits = a.req(0, "logits")?;
        a.req(1, "experts")?;
        a.req(2, "dloss")?;
        Ok(vec![logits.clone()])
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        args[0].map_or(0.0, |t| 8.0 * t.len() as f64)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["logits", "experts", "dloss"]
    }
}
