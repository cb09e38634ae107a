//! Token embedding: rows of the table by `gather`. The contract is `marimba_ir::op::Embed`'s.

use super::tape::{Args, Cx, Res, Value, indices};
use dfdx::prelude::{Device, Dtype};

pub(super) fn embed<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    a: &Args<E, D>,
    result: &[usize],
) -> Res<Vec<Value<E, D>>> {
    let table = a.var(1)?;
    let tokens = indices(a.ints(0)?, table.sizes[0])?;
    let rows = cx.rows(table, table.sizes[0], &tokens)?;
    Ok(vec![rows.view(result).into()])
}
