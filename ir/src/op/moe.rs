//! Moving tokens to experts and back, and products with one matrix per expert (Shazeer et al. 2017, arXiv 1701.06538; grouped, without
//! padding or dropping, as in MegaBlocks, arXiv 2211.15841).
//!
//! `R = B*T*K` routed rows. Flat choice index `f = token*K + k`. `order[r]` is the flat choice at routed row r: sorted by expert, then
//! by f (stable). `slot[f]` is its inverse. Rows `offsets[e]..offsets[e+1]` belong to expert e. A shape never depends on the routing.
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | dispatch | experts | i32[B T K] | |
//! | | -> order, slot | i32[R] | |
//! | | -> offsets | i32[E+1] | |
//! | gather_rows | x | f[B T D] | |
//! | | order, slot | i32[R] | |
//! | | -> y | f[R D] | `y[r] = x[order[r] / K]` |
//! | combine | y | f[R D] | |
//! | | order, slot | i32[R] | |
//! | | weights? | f32[B T K] | absent: 1 (the derivative of gather_rows) |
//! | | -> x | f[B T D] | `x[token] = sum_k weights[token,k] y[slot[token*K+k]]`, k ascending |
//! | combine_bwd | y, order, slot, weights, dx | | |
//! | | -> dy | f[R D] | |
//! | | -> dweights | f32[B T K] | |
//! | grouped_linear | x | f[R K] | |
//! | | w | f[E N K] | |
//! | | offsets | i32[E+1] | |
//! | | -> y | f[R N] | row r times the matrix of its expert |
//! | grouped_linear_dx | dy, w, offsets | | |
//! | | -> dx | f[R K] | |
//! | grouped_linear_dw | x, dy, offsets, into?, beta? | | |
//! | | -> dw | f32[E N K] | zero for experts without rows; written over `into` (`beta*into + dw`) when given |

use super::{Alias, ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{DType, Dim, Letter, Type, TypeError, dims};

/// Sorts choices by expert.
#[derive(Clone, Debug, PartialEq)]
pub struct Dispatch {
    /// E.
    pub n_experts: usize,
}

/// Copies token rows to routed rows.
#[derive(Clone, Debug, PartialEq)]
pub struct GatherRows;

/// Weighted sum of routed rows back into tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Combine {
    /// Dims of the tokens, such as `[B T]`.
    pub tokens: Vec<Dim>,
}

/// Derivative of [`Combine`] with weights.
#[derive(Clone, Debug, PartialEq)]
pub struct CombineBwd;

/// One product per expert.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupedLinear;

/// `dx`.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupedLinearDx;

/// `dw`.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupedLinearDw {
    /// E.
    pub n_experts: usize,
    /// Whether `into` and `beta` are present.
    pub accumulate: bool,
}

fn flops_of(args: &[Option<&Type>], x: usize, results_last: usize) -> f64 {
    args[x].map_or(0.0, |x| 2.0 * x.len() as f64 * results_last as f64)
}

impl OpDef for Dispatch {
    const NAME: &'static str = "dispatch";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let experts = a.req(0, "experts")?;
        a.check(experts.dtype == DType::I32, experts, "i32 experts")?;
        let r = Type::i32(dims![R experts.len()]);
        Ok(vec![r.clone(), r, Type::i32(dims![E self.n_experts + 1])])
    }
    fn flops(&self, _: &[Option<&Type>], _: &[&Type]) -> f64 {
        0.0
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["experts"]
    }
    fn attrs(&self) -> String {
        format!("E{}", self.n_experts)
    }
}

impl Differentiable for Dispatch {
    /// Integers have no gradient.
    fn vjp(&self, _: &mut Vjp) -> Result<(), TypeError> {
        Ok(())
    }
}

impl OpDef for GatherRows {
    const NAME: &'static str = "gather_rows";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (x, order) = (a.req(0, "x")?, a.req(1, "order")?);
        a.req(2, "slot")?;
        a.check(
            x.rows() > 0 && order.len() % x.rows() == 0,
            order,
            format!("a multiple of the rows of {x}"),
        )?;
        let d = *x.dims.last().ok_or_else(|| a.error(x, "[.. D]"))?;
        Ok(vec![Type::new(
            x.dtype,
            vec![
                Dim {
                    letter: Letter::R,
                    size: order.len(),
                },
                d,
            ],
        )])
    }
    fn flops(&self, _: &[Option<&Type>], _: &[&Type]) -> f64 {
        0.0
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "order", "slot"]
    }
}

impl Differentiable for GatherRows {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        if let (Some(dy), Some(x)) = (cx.d_result(0), cx.arg(0)) {
            let mut tokens = cx.ty(x).dims.clone();
            tokens.pop();
            let dx = cx.push1(
                Combine { tokens },
                vec![Some(dy), cx.arg(1), cx.arg(2), None],
            )?;
            cx.set(0, dx);
        }
        Ok(())
    }
}

impl OpDef for Combine {
    const NAME: &'static str = "combine";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let y = a.req(0, "y")?;
        a.req(1, "order")?;
        a.req(2, "slot")?;
        let n: usize = self.tokens.iter().map(|d| d.size).product();
        a.check(
            y.rank() == 2 && n > 0 && y.size(0) % n == 0,
            y,
            format!("a multiple of {n} rows"),
        )?;
        if let Some(w) = a.opt(3) {
            a.check(w.len() == y.size(0), w, format!("one weight a row of {y}"))?;
        }
        let mut dims = self.tokens.clone();
        dims.push(y.dims[1]);
        Ok(vec![Type::new(y.dtype, dims)])
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        args[0].map_or(0.0, |y| 2.0 * y.len() as f64)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["y", "order", "slot", "weights"]
    }
}

impl Differentiable for Combine {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        let Some(dx) = cx.d_result(0) else {
            return Ok(());
        };
        if cx.arg(3).is_some() {
            let r = cx.push(
                CombineBwd,
                vec![cx.arg(0), cx.arg(1), cx.arg(2), cx.arg(3), Some(dx)],
            )?;
            cx.set(0, r[0]);
            cx.set(3, r[1]);
        } else {
            let dy = cx.push1(GatherRows, vec![Some(dx), cx.arg(1), cx.arg(2)])?;
            cx.set(0, dy);
        }
        Ok(())
    }
}

impl OpDef for CombineBwd {
    const NAME: &'static str = "combine_bwd";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        a.req(1, "order")?;
        a.req(2, "slot")?;
        a.req(4, "dx")?;
        Ok(vec![a.req(0, "y")?.clone(), a.req(3, "weights")?.clone()])
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        args[0].map_or(0.0, |y| 3.0 * y.len() as f64)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["y", "order", "slot", "weights", "dx"]
    }
}

impl OpDef for GroupedLinear {
    const NAME: &'static str = "grouped_linear";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (x, w, offsets) = (a.req(0, "x")?, a.req(1, "w")?, a.req(2, "offsets")?);
        a.check(
            w.rank() == 3 && x.last() == w.size(2),
            format!("x {x}, w {w}"),
            "x [R K], w [E N K]",
        )?;
        a.check(offsets.len() == w.size(0) + 1, offsets, "E + 1 offsets")?;
        Ok(vec![x.with_last(w.dims[1])])
    }
    fn flops(&self, args: &[Option<&Type>], results: &[&Type]) -> f64 {
        flops_of(args, 0, results[0].last())
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "w", "offsets"]
    }
}

impl Differentiable for GroupedLinear {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        let (Some(dy), Some(w)) = (cx.d_result(0), cx.arg(1)) else {
            return Ok(());
        };
        if cx.needs(1) {
            let op = GroupedLinearDw {
                n_experts: cx.ty(w).size(0),
                accumulate: false,
            };
            let dw = cx.push1(op, vec![cx.arg(0), Some(dy), cx.arg(2), None, None])?;
            cx.set(1, dw);
        }
        if cx.needs(0) {
            let dx = cx.push1(GroupedLinearDx, vec![Some(dy), Some(w), cx.arg(2)])?;
            cx.set(0, dx);
        }
        Ok(())
    }
}

impl OpDef for GroupedLinearDx {
    const NAME: &'static str = "grouped_linear_dx";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (dy, w) = (a.req(0, "dy")?, a.req(1, "w")?);
        a.req(2, "offsets")?;
        a.check(
            w.rank() == 3 && dy.last() == w.size(1),
            format!("dy {dy}, w {w}"),
            "dy [R N], w [E N K]",
        )?;
        Ok(vec![dy.with_last(w.dims[2])])
    }
    fn flops(&self, args: &[Option<&Type>], results: &[&Type]) -> f64 {
        flops_of(args, 0, results[0].last())
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["dy", "w", "offsets"]
    }
}

impl OpDef for GroupedLinearDw {
    const NAME: &'static str = "grouped_linear_dw";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (x, dy) = (a.req(0, "x")?, a.req(1, "dy")?);
        a.req(2, "offsets")?;
        a.check(
            x.rank() == 2 && dy.rank() == 2 && x.size(0) == dy.size(0),
            format!("x {x}, dy {dy}"),
            "x [R K], dy [R N]",
        )?;
        let dw = Type::f32(vec![
            Dim {
                letter: Letter::E,
                size: self.n_experts,
            },
            dy.dims[1],
            x.dims[1],
        ]);
        if self.accumulate {
            a.req(3, "into")?;
            a.sizes(3, "into", &dw.sizes())?;
            a.req(4, "beta")?;
        }
        Ok(vec![dw])
    }
    fn alias(&self, _: usize) -> Option<Alias> {
        self.accumulate.then_some(Alias::InPlace { arg: 3 })
    }
    fn flops(&self, args: &[Option<&Type>], results: &[&Type]) -> f64 {
        flops_of(args, 0, results[0].size(1))
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "dy", "offsets", "into", "beta"]
    }
}
