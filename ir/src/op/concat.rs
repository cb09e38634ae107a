//! Joining and splitting along the last dimension (copies).
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | concat | x... | f[.. n_i] | equal leading sizes |
//! | | -> y | f[.. sum n_i] | |
//! | split | x | f[.. sum n_i] | |
//! | | -> y... | f[.. n_i] | one result per entry of `sizes` |

use super::{ArgTypes, Differentiable, OpDef, Pointwise};
use crate::vjp::Vjp;
use crate::{Dim, Letter, Type, TypeError};

/// Joins its arguments along the last dimension.
#[derive(Clone, Debug, PartialEq)]
pub struct Concat {
    /// Letter of the joined dimension.
    pub letter: Letter,
}

/// Splits the last dimension.
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    /// Parts, in order.
    pub sizes: Vec<Dim>,
}

impl OpDef for Concat {
    const NAME: &'static str = "concat";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let first = a.req(0, "x")?;
        let mut size = 0;
        for i in 0..a.types.len() {
            let x = a.req(i, "x")?;
            a.check(
                x.dtype == first.dtype && x.rank() == first.rank() && x.rows() == first.rows(),
                x,
                first,
            )?;
            size += x.last();
        }
        Ok(vec![first.with_last(Dim {
            letter: self.letter,
            size,
        })])
    }
    fn flops(&self, _: &[Option<&Type>], _: &[&Type]) -> f64 {
        0.0
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x"]
    }
}

impl Differentiable for Concat {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        let Some(dy) = cx.d_result(0) else {
            return Ok(());
        };
        let sizes = cx
            .args()
            .iter()
            .flatten()
            .filter_map(|&v| cx.ty(v).dims.last().copied())
            .collect();
        for (i, d) in cx
            .push(Split { sizes }, vec![Some(dy)])?
            .into_iter()
            .enumerate()
        {
            cx.set(i, d);
        }
        Ok(())
    }
}

impl OpDef for Split {
    const NAME: &'static str = "split";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let x = a.req(0, "x")?;
        let sum: usize = self.sizes.iter().map(|d| d.size).sum();
        a.check(sum == x.last(), x, format!("a last dimension of {sum}"))?;
        Ok(self.sizes.iter().map(|&d| x.with_last(d)).collect())
    }
    fn flops(&self, _: &[Option<&Type>], _: &[&Type]) -> f64 {
        0.0
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x"]
    }
    fn attrs(&self) -> String {
        self.sizes
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("|")
    }
}

impl Differentiable for Split {
    /// Parts that nothing depends on contribute zeros.
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        let mut parts = Vec::new();
        for i in 0..self.sizes.len() {
            parts.push(Some(match cx.d_result(i) {
                Some(d) => d,
                None => cx.push1(Pointwise::constant(0.0), vec![Some(cx.result(i))])?,
            }));
        }
        let letter = cx
            .arg(0)
            .and_then(|x| cx.ty(x).dims.last().copied())
            .map_or(Letter::X, |d| d.letter);
        let dx = cx.push1(Concat { letter }, parts)?;
        cx.set(0, dx);
        Ok(())
    }
}
