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

use super::{Alias, ArgTypes, Differentiable, OpDef, SumTo};
use crate::vjp::Vjp;
use crate::{Dim, Type, TypeError};

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
