//! Matrix product with an `[out, in]` weight: `y[r,n] = sum_k x[r,k] w[n,k] + b[n] + add[r,n]`.
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | linear | x | f[.. K] | rows are all leading dims |
//! | | w | f[N K] | |
//! | | b? | f32[N] | |
//! | | add? | f[.. N] | as y; put there by `fold_sums` |
//! | | -> y | f[.. N] | dtype of x; accumulated in f32 |
//! | linear_dx | dy | f[.. N] | |
//! | | w | f[N K] | |
//! | | add? | f[.. K] | as dx; put there by `fold_sums` |
//! | | -> dx | f[.. K] | `dy w + add` |
//! | linear_dw | x | f[.. K] | |
//! | | dy | f[.. N] | |
//! | | into?, beta? | f32[M K], f32[X1] | when present the result is written over rows `start..start+N` of `into`: `into = beta*into + dy^T x` (beta 0 never reads) |
//! | | -> dw | f32[N K] or f32[M K] | `dy^T x` |
//! | narrow | x | f[.. K] | R rows; `R'` and `K'` are R and K rounded up to multiples of 16 |
//! | | -> scale | f32[X1] | largest magnitude of x over the largest of the format |
//! | | -> q? | e[R' K'] | `x / scale` in 8 bits, zeros beyond x |
//! | | -> t? | e[K' R'] | the same transposed |
//! | linear_fp8 | a, a_scale | e[M' K'], f32[X1] | as `narrow` made them |
//! | | b, b_scale | e[N' K'], f32[X1] | |
//! | | bias? | f32[N] | |
//! | | add? | f[.. N] | as y |
//! | | into?, beta? | f32[L N], f32[X1] | as for linear_dw |
//! | | -> y | f[.. N] or f32[L N] | `a_scale b_scale sum_k a[m,k] b[n,k] + bias + add`, accumulated in f32 |
//!
//! The last two are what the pass `narrow` makes of a linear layer's product and of both of its derivative's in 8 bits: all three sum over
//! the last dimension of both operands, which matrix units of 8 bits ask for. Narrowing computes in f32 and rounds to nearest even
//! (per-tensor current scaling: Micikevicius et al. 2022, arXiv 2209.05433).

use super::{Alias, ArgTypes, Differentiable, OpDef, SumTo};
use crate::vjp::Vjp;
use crate::{DType, Dim, Type, TypeError, dims};

/// `y = x w^T + b + add`.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear;

/// `dx = dy w + add`.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearDx;

/// `dw = dy^T x`, optionally accumulated into rows of a gradient buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearDw {
    /// First row of `into` that is written; 0 without `into`.
    pub start: usize,
    /// Whether `into` and `beta` are present.
    pub accumulate: bool,
}

/// A tensor in 8 bits with one factor.
#[derive(Clone, Debug, PartialEq)]
pub struct Narrow {
    /// Format.
    pub to: DType,
    /// Whether it is wanted as it lies.
    pub plain: bool,
    /// Whether it is wanted transposed.
    pub turned: bool,
}

/// `y = a b^T + bias + add` of operands of 8 bits, optionally accumulated into rows of a gradient buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearFp8 {
    /// Type of the product.
    pub y: Type,
    /// How many of the columns of a and b are no padding.
    pub k: usize,
    /// Whether every partial sum is kept in f32; otherwise matrix units may keep fewer bits for a while.
    pub exact: bool,
    /// First row of `into` that is written; 0 without `into`.
    pub start: usize,
    /// Whether `into` and `beta` are present.
    pub accumulate: bool,
}

/// Sizes of operands of 8 bits are multiples of this.
const EIGHT_STEP: usize = 16;

/// A size of an operand of 8 bits.
fn padded(n: usize) -> usize {
    n.next_multiple_of(EIGHT_STEP)
}

fn is_eight(t: DType) -> bool {
    matches!(t, DType::E4m3 | DType::E5m2)
}

fn matrix<'a>(a: &ArgTypes<'a>, i: usize, name: &str) -> Result<&'a Type, TypeError> {
    let w = a.req(i, name)?;
    a.check(w.rank() == 2, w, "a matrix")?;
    Ok(w)
}

/// What is added to a product has its type.
fn added(a: &ArgTypes, i: usize, y: &Type) -> Result<(), TypeError> {
    match a.opt(i) {
        Some(add) => a.check(add.same_shape(y) && add.dtype == y.dtype, add, y),
        None => Ok(()),
    }
}

impl OpDef for Linear {
    const NAME: &'static str = "linear";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (x, w) = (a.req(0, "x")?, matrix(a, 1, "w")?);
        a.check(
            x.last() == w.size(1),
            format!("x {x}, w {w}"),
            "x[.. K], w[N K]",
        )?;
        a.sizes(2, "b", &[w.size(0)])?;
        let y = x.with_last(w.dims[0]);
        added(a, 3, &y)?;
        Ok(vec![y])
    }
    fn flops(&self, args: &[Option<&Type>], results: &[&Type]) -> f64 {
        2.0 * results[0].len() as f64 * args[0].map_or(0, Type::last) as f64
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "w", "b", "add"]
    }
}

impl Differentiable for Linear {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        let Some(dy) = cx.d_result(0) else {
            return Ok(());
        };
        if cx.needs(1) {
            let dw = cx.push1(
                LinearDw {
                    start: 0,
                    accumulate: false,
                },
                vec![cx.arg(0), Some(dy), None, None],
            )?;
            cx.set(1, dw);
        }
        if let (Some(b), true) = (cx.arg(2), cx.needs(2)) {
            let dims = cx.ty(b).dims.clone();
            let db = cx.push1(SumTo { dims }, vec![Some(dy)])?;
            cx.set(2, db);
        }
        if cx.arg(3).is_some() {
            cx.set(3, dy);
        }
        if cx.needs(0) {
            let dx = cx.push1(LinearDx, vec![Some(dy), cx.arg(1)])?;
            cx.set(0, dx);
        }
        Ok(())
    }
}

impl OpDef for LinearDx {
    const NAME: &'static str = "linear_dx";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (dy, w) = (a.req(0, "dy")?, matrix(a, 1, "w")?);
        a.check(
            dy.last() == w.size(0),
            format!("dy {dy}, w {w}"),
            "dy[.. N], w[N K]",
        )?;
        let dx = dy.with_last(w.dims[1]);
        added(a, 2, &dx)?;
        Ok(vec![dx])
    }
    fn flops(&self, args: &[Option<&Type>], results: &[&Type]) -> f64 {
        2.0 * results[0].len() as f64 * args[0].map_or(0, Type::last) as f64
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["dy", "w", "add"]
    }
}

impl OpDef for LinearDw {
    const NAME: &'static str = "linear_dw";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (x, dy) = (a.req(0, "x")?, a.req(1, "dy")?);
        a.check(
            x.rows() == dy.rows(),
            format!("x {x}, dy {dy}"),
            "as many rows of x as of dy",
        )?;
        let last = |t: &Type| -> Result<Dim, TypeError> {
            t.dims.last().copied().ok_or_else(|| a.error(t, "a matrix"))
        };
        let dw = Type::f32(vec![last(dy)?, last(x)?]);
        if !self.accumulate {
            return Ok(vec![dw]);
        }
        let into = matrix(a, 2, "into")?;
        a.req(3, "beta")?;
        a.check(
            into.size(1) == dw.size(1) && self.start + dw.size(0) <= into.size(0),
            format!("into {into}, dw {dw} at row {}", self.start),
            "rows inside the buffer",
        )?;
        Ok(vec![into.clone()])
    }
    fn alias(&self, _: usize) -> Option<Alias> {
        self.accumulate.then_some(Alias::InPlace { arg: 2 })
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        2.0 * args[0].map_or(0, Type::len) as f64 * args[1].map_or(0, Type::last) as f64
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "dy", "into", "beta"]
    }
    fn attrs(&self) -> String {
        if self.accumulate {
            format!("row={}", self.start)
        } else {
            String::new()
        }
    }
}

impl Narrow {
    /// Types of the results of narrowing `x`.
    pub(crate) fn types(&self, x: &Type) -> Vec<Type> {
        let (rows, cols) = (padded(x.rows()), padded(x.last()));
        let mut results = vec![Type::scalar()];
        if self.plain {
            results.push(Type::new(self.to, dims![X rows, K cols]));
        }
        if self.turned {
            results.push(Type::new(self.to, dims![K cols, X rows]));
        }
        results
    }
}

impl OpDef for Narrow {
    const NAME: &'static str = "narrow";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let x = a.req(0, "x")?;
        a.check(
            is_eight(self.to) && (self.plain || self.turned),
            self.to,
            "a format of 8 bits, as it lies or transposed",
        )?;
        a.check(
            x.dtype.is_float() && x.rank() > 0 && !x.is_empty(),
            x,
            "floats",
        )?;
        Ok(self.types(x))
    }
    fn flops(&self, _: &[Option<&Type>], _: &[&Type]) -> f64 {
        0.0
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x"]
    }
    fn attrs(&self) -> String {
        let ways = match (self.plain, self.turned) {
            (_, false) => "",
            (false, true) => " transposed",
            (true, true) => " both",
        };
        format!("{}{ways}", self.to)
    }
}

impl OpDef for LinearFp8 {
    const NAME: &'static str = "linear_fp8";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        for (i, name, rows) in [(0, "a", self.y.rows()), (2, "b", self.y.last())] {
            let t = matrix(a, i, name)?;
            a.check(
                is_eight(t.dtype) && t.sizes() == [padded(rows), padded(self.k)],
                t,
                format!("{rows} rows of {} in 8 bits, padded to 16", self.k),
            )?;
            a.check(a.req(i + 1, "a factor")?.len() == 1, name, "one factor")?;
        }
        a.check(
            !self.y.is_empty() && self.k > 0,
            &self.y,
            "a product of operands that are not empty",
        )?;
        a.sizes(4, "bias", &[self.y.last()])?;
        added(a, 5, &self.y)?;
        if !self.accumulate {
            return Ok(vec![self.y.clone()]);
        }
        let into = matrix(a, 6, "into")?;
        a.req(7, "beta")?;
        a.check(
            self.y.dtype == DType::F32
                && a.opt(4).is_none()
                && a.opt(5).is_none()
                && into.size(1) == self.y.last()
                && self.start + self.y.rows() <= into.size(0),
            format!("into {into}, product {} at row {}", self.y, self.start),
            "rows inside the buffer, and nothing else to add",
        )?;
        Ok(vec![into.clone()])
    }
    fn alias(&self, _: usize) -> Option<Alias> {
        self.accumulate.then_some(Alias::InPlace { arg: 6 })
    }
    fn flops(&self, _: &[Option<&Type>], _: &[&Type]) -> f64 {
        2.0 * self.y.len() as f64 * self.k as f64
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &[
            "a", "a_scale", "b", "b_scale", "bias", "add", "into", "beta",
        ]
    }
    fn attrs(&self) -> String {
        let exact = if self.exact { " exact" } else { "" };
        let row = match self.accumulate {
            true => format!(" row={}", self.start),
            false => String::new(),
        };
        format!("k={}{exact}{row}", self.k)
    }
}
