//! Change of element type. dfdx has no bf16, so a value keeps its element type here and only its numbers are rounded, with the
//! gradient passing straight through. The contract is `marimba_ir::op::Cast`'s.

use super::tape::{Args, Cx, Res, Value};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::DType;
use marimba_ir::op::Cast;

pub(super) fn cast<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &Cast,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let x = a.var(0)?;
    let round: fn(f64) -> f64 = match op.to {
        DType::F32 | DType::E4m3 | DType::E5m2 | DType::I32 => |x| x,
        DType::Bf16 => |x| f64::from(half::bf16::from_f64(x).to_f32()),
        DType::F16 => |x| f64::from(half::f16::from_f64(x).to_f32()),
    };
    let error: Vec<f64> = x.host().iter().map(|&x| round(x) - x).collect();
    let y = cx.add(x, &cx.constant(&error, &x.sizes)?)?;
    Ok(vec![y.into()])
}
