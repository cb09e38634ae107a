//! Appends keys or values to a cache: `cache[b, slot + t, :, :] = x[b, t, :, :]`, in place. Decode and prefill only.
//!
//! | arg/result | type | meaning |
//! |---|---|---|
//! | cache | f[B S G P] | a `state` external |
//! | x | f[B T G P] | |
//! | slot | i32[X1] | first slot written; slot + T <= S, checked by the host before the run |
//! | -> cache | f[B S G P] | the same memory |

use super::{Alias, ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{Type, TypeError};

/// Writes rows of a KV cache.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheWrite;

impl OpDef for CacheWrite {
    const NAME: &'static str = "cache_write";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (cache, x) = (a.req(0, "cache")?, a.req(1, "x")?);
        a.req(2, "slot")?;
        a.check(
            cache.rank() == 4
                && x.rank() == 4
                && cache.size(0) == x.size(0)
                && cache.sizes()[2..] == x.sizes()[2..],
            format!("cache {cache}, x {x}"),
            "cache [B S G P], x [B T G P]",
        )?;
        Ok(vec![cache.clone()])
    }
    fn alias(&self, _: usize) -> Option<Alias> {
        Some(Alias::InPlace { arg: 0 })
    }
    fn flops(&self, _: &[Option<&Type>], _: &[&Type]) -> f64 {
        0.0
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["cache", "x", "slot"]
    }
}

impl Differentiable for CacheWrite {
    /// Caches exist only where nothing is differentiated.
    fn vjp(&self, _: &mut Vjp) -> Result<(), TypeError> {
        Ok(())
    }
}
