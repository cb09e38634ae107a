//! Token embedding: `y[b,t,:] = table[tokens[b,t],:]`.
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | embed | tokens | i32[B T] | ids in 0..V |
//! | | table | f[V D] | |
//! | | -> y | f[B T D] | |
//! | embed_bwd | tokens | i32[B T] | |
//! | | dy | f[B T D] | |
//! | | into?, beta? | f32[V D], f32[X1] | when present: `into = beta*into + scatter(dy)` in place (beta 0 never reads) |
//! | | -> dtable | f32[V D] | rows of tokens that do not occur are zero without `into` |

use super::{Alias, ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{DType, Dim, Type, TypeError};

/// Row look-up.
#[derive(Clone, Debug, PartialEq)]
pub struct Embed;

/// Scatter-add of rows.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbedBwd {
    /// V.
    pub vocab: Dim,
    /// Whether `into` and `beta` are present.
    pub accumulate: bool,
}

impl OpDef for Embed {
    const NAME: &'static str = "embed";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (tokens, table) = (a.req(0, "tokens")?, a.req(1, "table")?);
        a.check(tokens.dtype == DType::I32, tokens, "i32 tokens")?;
        a.check(table.rank() == 2, table, "a table [V D]")?;
        let mut dims = tokens.dims.clone();
        dims.push(table.dims[1]);
        Ok(vec![Type::new(table.dtype, dims)])
    }
    fn flops(&self, _: &[Option<&Type>], _: &[&Type]) -> f64 {
        0.0
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["tokens", "table"]
    }
}

impl Differentiable for Embed {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        if let (Some(dy), Some(table), true) = (cx.d_result(0), cx.arg(1), cx.needs(1)) {
            let vocab = cx.ty(table).dims[0];
            let d = cx.push1(
                EmbedBwd {
                    vocab,
                    accumulate: false,
                },
                vec![cx.arg(0), Some(dy), None, None],
            )?;
            cx.set(1, d);
        }
        Ok(())
    }
}

impl OpDef for EmbedBwd {
    const NAME: &'static str = "embed_bwd";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let dy = a.req(1, "dy")?;
        let d = *dy.dims.last().ok_or_else(|| a.error(dy, "[B T D]"))?;
        if self.accumulate {
            a.req(3, "beta")?;
            a.sizes(2, "into", &[self.vocab.size, d.size])?;
            return Ok(vec![a.req(2, "into")?.clone()]);
        }
        Ok(vec![Type::f32(vec![self.vocab, d])])
    }
    fn alias(&self, _: usize) -> Option<Alias> {
        self.accumulate.then_some(Alias::InPlace { arg: 2 })
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        args[1].map_or(0.0, |t| t.len() as f64)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["tokens", "dy", "into", "beta"]
    }
    fn attrs(&self) -> String {
        format!("{}", self.vocab)
    }
}
