//! Half precision as storage: what a graph types as bf16 or f16, or as one of the formats of 8 bits, is kept rounded to that format, in f32
//! memory, and computed with in f32, as matrix units with f32 accumulators do. It shows what a format does to a model's numbers, not how fast it is.
//!
//! Rounding is to nearest, ties to even; beyond the largest f16 (65504, from 65520 on) it gives infinity. What happens inside one op
//! (sums of a product, a scan's state, a softmax, the logits of the loss) stays f32, and what the lowering types as f32 is untouched.

use half::{bf16, f16};
use marimba_ir::{DType, Graph, ValueId};

/// The half-precision values of a graph; none for a graph that is f32 throughout.
#[derive(Default)]
pub(super) struct Halves(Vec<Option<DType>>);

impl Halves {
    /// Takes the half types out of a graph: values keep their ids and become f32.
    pub(super) fn take(graph: &mut Graph) -> Halves {
        let mut any = false;
        let types = graph
            .values
            .iter_mut()
            .map(|v| {
                let half = is_half(v.ty.dtype).then_some(v.ty.dtype)?;
                v.ty = v.ty.with_dtype(DType::F32);
                any = true;
                Some(half)
            })
            .collect();
        Halves(if any { types } else { Vec::new() })
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The format of a value, if it is half.
    pub(super) fn of(&self, v: ValueId) -> Option<DType> {
        self.0.get(v.index()).copied().flatten()
    }
}

/// Largest magnitude of e4m3 and of e5m2.
pub(super) const E4M3_MOST: f32 = 448.0;
pub(super) const E5M2_MOST: f32 = 57344.0;

/// Whether a type is stored in 16 bits or 8.
pub(super) fn is_half(dtype: DType) -> bool {
    match dtype {
        DType::Bf16 | DType::F16 | DType::E4m3 | DType::E5m2 => true,
        DType::F32 | DType::I32 => false,
    }
}

/// Rounds to a format; f32 and integers stay as they are.
pub(super) fn round(dtype: DType, x: &mut [f32]) {
    match dtype {
        DType::F16 => x.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
        DType::Bf16 => x.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
        DType::E4m3 => x.iter_mut().for_each(|x| *x = eight(*x, 3, -6, E4M3_MOST)),
        DType::E5m2 => x.iter_mut().for_each(|x| *x = eight(*x, 2, -14, E5M2_MOST)),
        DType::F32 | DType::I32 => {}
    }
}

/// A number as 8 bits hold it: `mantissa` bits, exponents from `low` on, magnitudes up to `most`, to which larger ones are cut.
fn eight(x: f32, mantissa: i32, low: i32, most: f32) -> f32 {
    if !x.is_finite() {
        return x.clamp(-most, most);
    }
    let exponent = ((x.to_bits() >> 23 & 0xff) as i32 - 127).max(low);
    let step = 2f32.powi(exponent - mantissa);
    ((x / step).round_ties_even() * step).clamp(-most, most)
}

#[cfg(test)]
mod tests {
    use super::super::CpuEngine;
    use super::*;
    use crate::{BackendError, Engine, HostTensor, Outputs};
    use marimba_ir::op::{Cast, Linear, Pointwise, Un};
    use marimba_ir::{External, Phase, Place, Type, dims, plan};

    #[test]
    fn formats_round_and_overflow() {
        let mut x = [1.0 + 1.0 / 2048.0, 65_519.0, 65_520.0, -1e6, 6e-8, 2e-8];
        round(DType::F16, &mut x);
        let down = f16::from_bits(1).to_f32();
        assert_eq!(
            x,
            [1.0, 65_504.0, f32::INFINITY, f32::NEG_INFINITY, down, 0.0]
        );
        let mut x = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 1e6, -3e38];
        round(DType::Bf16, &mut x);
        assert_eq!(
            x,
            [1.0, 1.0 + 4.0 / 256.0, 999_424.0, -226.0 * 2f32.powi(120)]
        );
        let mut x = [0.3, 1.0625, 1.1875, 1e3, -449.0, 1.1e-3, 1e-4, 0.0];
        round(DType::E4m3, &mut x);
        let least = 2f32.powi(-9);
        assert_eq!(x, [0.3125, 1.0, 1.25, 448.0, -448.0, least, 0.0, 0.0]);
        let mut x = [0.3, 1.125, -6e4, f32::INFINITY, 7e-6, f32::MIN_POSITIVE];
        round(DType::E5m2, &mut x);
        let least = 2f32.powi(-16);
        assert_eq!(x, [0.3125, 1.0, -57344.0, 57344.0, 0.0, 0.0]);
        let mut x = [8e-6, f32::NAN];
        round(DType::E5m2, &mut x);
        assert_eq!(x[0], least);
        assert!(x[1].is_nan());
        let mut x = [1.0 + f32::EPSILON, 1e38];
        round(DType::F32, &mut x);
        assert_eq!(x, [1.0 + f32::EPSILON, 1e38]);
    }

    /// `y = 100 (x w^T)` with x and w in `dtype`, and y widened to f32.
    fn run(dtype: DType, half: bool, x: &[f32], w: f32) -> Result<Outputs, BackendError> {
        let place = Place {
            path: "layer".into(),
            block: None,
            phase: Phase::Forward,
        };
        let mut g = Graph::new();
        let weight = Type::new(dtype, dims![D 1, F 1]);
        let wide = g.add_external(External::Input, "x", Type::f32(dims![T x.len(), F 1]));
        let wv = g.add_external(External::Param, "w", weight.clone());
        let mut push = |op: marimba_ir::op::Op, args: &[Option<ValueId>]| {
            g.push(op, args.to_vec(), &place).expect("well typed")[0]
        };
        let xv = push(Cast { to: dtype }.into(), &[Some(wide)]);
        let y = push(Linear.into(), &[Some(xv), Some(wv), None]);
        let y = push(Pointwise::map(Un::Scale(100.0)).into(), &[Some(y)]);
        let y = push(Cast { to: DType::F32 }.into(), &[Some(y)]);
        g.outputs.push(("y".into(), y));
        let mut engine = CpuEngine::new(1)?;
        engine.set_half_storage(half);
        let p = plan(&g);
        let id = engine.load(g, p)?;
        engine.write("param:w", &weight, &HostTensor::F32(vec![w]))?;
        engine.run(id, &[("x", HostTensor::F32(x.to_vec()))])
    }

    #[test]
    fn every_result_is_rounded_to_its_type() {
        // 3.3 and 1.7 round before the product, the product before the factor, and that again.
        let f = |x: f32| f16::from_f32(x).to_f32();
        let want = f(100.0 * f(f(3.3) * f(1.7)));
        let got = run(DType::F16, true, &[3.3, 500.0], 1.7).expect("runs");
        assert_eq!(got["y"].f32(), [want, f32::INFINITY]);
        let b = |x: f32| bf16::from_f32(x).to_f32();
        let want = [3.3, 500.0].map(|x| b(100.0 * b(b(x) * b(1.7))));
        let got = run(DType::Bf16, true, &[3.3, 500.0], 1.7).expect("runs");
        assert_eq!(got["y"].f32(), want);
        let got = run(DType::F32, true, &[3.3], 1.7).expect("runs");
        assert_eq!(got["y"].f32(), [100.0 * (3.3f32 * 1.7)]);
    }

    #[test]
    fn without_being_asked_half_types_are_refused() {
        let refused = run(DType::F16, false, &[1.0], 1.0);
        assert!(matches!(refused, Err(BackendError::Unsupported { .. })));
    }
}
