//! Mean of squares. The contract is `marimba_ir::op::MeanSquare`'s.

use super::tape::{Args, Cx, Res, Value};
use dfdx::prelude::{Device, Dtype};

pub(super) fn mean_square<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let x = a.var(0)?;
    let sum = cx.sum_all(&cx.square(x)?)?;
    Ok(vec![cx.scale(&sum, 1.0 / x.len().max(1) as f64)?.into()])
}
