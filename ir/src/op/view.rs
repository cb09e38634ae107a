//! Reading memory as another shape, and picking rows.
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | reshape | x | f[..] | |
//! | | -> y | f[dims] | the same bytes |
//! | rows | w | f[M ..] | a parameter |
//! | | -> y | f[len ..] | rows `start..start+len`, the same bytes |
//! | last | x | f[B T D] | |
//! | | -> y | f[B 1 D] | the last token of each batch row |
//! | last_bwd | dy | f[B 1 D] | |
//! | | -> dx | f[B T D] | zero elsewhere |

use super::{Alias, ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{Dim, Letter, Type, TypeError};

/// The same elements under other dims.
#[derive(Clone, Debug, PartialEq)]
pub struct Reshape {
    /// Dims of the result.
    pub dims: Vec<Dim>,
}

/// Consecutive rows of a parameter, so that one stored matrix serves several products. Its gradient goes to those rows
/// (`vjp::differentiate` routes it; verify admits it on parameters only).
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// First row.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
}

/// The last token of each row.
#[derive(Clone, Debug, PartialEq)]
pub struct Last;

/// Its derivative.
#[derive(Clone, Debug, PartialEq)]
pub struct LastBwd {
    /// T.
    pub time: usize,
}

impl OpDef for Reshape {
    const NAME: &'static str = "reshape";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let x = a.req(0, "x")?;
        let y = Type::new(x.dtype, self.dims.clone());
        a.check(y.len() == x.len(), x, format!("as many elements as {y}"))?;
        Ok(vec![y])
    }
    fn alias(&self, _: usize) -> Option<Alias> {
        Some(Alias::View {
            arg: 0,
            first_row: 0,
        })
    }
    fn flops(&self, _: &[Option<&Type>], _: &[&Type]) -> f64 {
        0.0
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x"]
    }
}

impl Differentiable for Reshape {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        if let (Some(dy), Some(x)) = (cx.d_result(0), cx.arg(0)) {
            let dims = cx.ty(x).dims.clone();
            let dx = cx.push1(Reshape { dims }, vec![Some(dy)])?;
            cx.set(0, dx);
        }
        Ok(())
    }
}

impl OpDef for Rows {
    const NAME: &'static str = "rows";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let w = a.req(0, "w")?;
        a.check(
            w.rank() > 0 && self.start + self.len <= w.size(0),
            w,
            format!("rows {}..", self.start + self.len),
        )?;
        let mut y = w.clone();
        y.dims[0].size = self.len;
        Ok(vec![y])
    }
    fn alias(&self, _: usize) -> Option<Alias> {
        Some(Alias::View {
            arg: 0,
            first_row: self.start,
        })
    }
    fn flops(&self, _: &[Option<&Type>], _: &[&Type]) -> f64 {
        0.0
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["w"]
    }
    fn attrs(&self) -> String {
        format!("{}..{}", self.start, self.start + self.len)
    }
}

impl Differentiable for Rows {
    /// Never called: `differentiate` sends the gradient straight to the rows of the buffer.
    fn vjp(&self, _: &mut Vjp) -> Result<(), TypeError> {
        Ok(())
    }
}

impl OpDef for Last {
    const NAME: &'static str = "last";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let x = a.req(0, "x")?;
        a.check(x.rank() == 3 && x.size(1) > 0, x, "x [B T D]")?;
        let mut y = x.clone();
        y.dims[1] = Dim {
            letter: Letter::T,
            size: 1,
        };
        Ok(vec![y])
    }
    fn flops(&self, _: &[Option<&Type>], _: &[&Type]) -> f64 {
        0.0
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x"]
    }
}

impl Differentiable for Last {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        if let (Some(dy), Some(x)) = (cx.d_result(0), cx.arg(0)) {
            let time = cx.ty(x).size(1);
            let dx = cx.push1(LastBwd { time }, vec![Some(dy)])?;
            cx.set(0, dx);
        }
        Ok(())
    }
}

impl OpDef for LastBwd {
    const NAME: &'static str = "last_bwd";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let dy = a.req(0, "dy")?;
        a.check(dy.rank() == 3 && dy.size(1) == 1, dy, "dy [B 1 D]")?;
        let mut dx = dy.clone();
        dx.dims[1].size = self.time;
        Ok(vec![dx])
    }
    fn flops(&self, _: &[Option<&Type>], _: &[&Type]) -> f64 {
        0.0
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["dy"]
    }
    fn attrs(&self) -> String {
        format!("T{}", self.time)
    }
}
