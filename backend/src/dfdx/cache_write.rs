//! Writing rows of a cache: old and new rows are joined and picked from. The contract is `marimba_ir::op::CacheWrite`'s.

use super::tape::{Args, Cx, Fault, Res, Value};
use dfdx::prelude::{Device, Dtype};

pub(super) fn cache_write<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let (cache, x) = (a.var(0)?, a.var(1)?);
    let (b, s, t) = (cache.sizes[0], cache.sizes[1], x.sizes[1]);
    let first = a
        .ints(2)?
        .first()
        .and_then(|&f| usize::try_from(f).ok())
        .filter(|f| f + t <= s)
        .ok_or_else(|| Fault(format!("{t} rows do not fit a cache of {s} at this slot")))?;
    let both = cx.concat(cache, x, 1)?;
    let mut idx = Vec::new();
    for r in 0..b {
        for k in 0..s {
            idx.push(if (first..first + t).contains(&k) {
                b * s + r * t + k - first
            } else {
                r * s + k
            });
        }
    }
    let y = cx.rows(&both, b * (s + t), &idx)?;
    Ok(vec![y.view(&cache.sizes).into()])
}
