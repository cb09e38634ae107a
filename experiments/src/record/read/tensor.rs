//! Numbers out of TensorFlow's `TensorProto`: written as values of their type, or as raw bytes.

use super::proto::Tensor;
use half::{bf16, f16};

// Numbers of TensorFlow's `types.proto`.
pub(super) const DT_FLOAT: i32 = 1;
pub(super) const DT_DOUBLE: i32 = 2;
pub(super) const DT_INT32: i32 = 3;
pub(super) const DT_STRING: i32 = 7;
pub(super) const DT_INT64: i32 = 9;
pub(super) const DT_BFLOAT16: i32 = 14;
pub(super) const DT_HALF: i32 = 19;

/// The number in a tensor of one element, however it is stored.
pub(super) fn scalar(t: &Tensor) -> Option<f64> {
    let n = t
        .tensor_shape
        .iter()
        .flat_map(|s| &s.dim)
        .try_fold(1i64, |n, d| n.checked_mul(d.size))?;
    if n != 1 {
        return None;
    }
    let raw = &t.tensor_content;
    // 16-bit floats are written as whole numbers that hold their bits.
    let bits = || {
        first(&t.half_val, raw, |b: [u8; 2]| {
            i32::from(u16::from_le_bytes(b))
        })
    };
    match t.dtype {
        DT_FLOAT => first(&t.float_val, raw, f32::from_le_bytes).map(f64::from),
        DT_DOUBLE => first(&t.double_val, raw, f64::from_le_bytes),
        DT_INT32 => first(&t.int_val, raw, i32::from_le_bytes).map(f64::from),
        DT_INT64 => first(&t.int64_val, raw, i64::from_le_bytes).map(|v| v as f64),
        DT_HALF => bits().map(|b| f16::from_bits(b as u16).to_f64()),
        DT_BFLOAT16 => bits().map(|b| bf16::from_bits(b as u16).to_f64()),
        _ => None,
    }
}

/// The first of `values`, else what the raw bytes say.
fn first<T: Copy, const N: usize>(values: &[T], raw: &[u8], decode: fn([u8; N]) -> T) -> Option<T> {
    let from_raw = || raw.try_into().ok().map(decode);
    values.first().copied().or_else(from_raw)
}
