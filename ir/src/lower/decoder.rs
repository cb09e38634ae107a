//! What reads the layers' result where it is not the head alone: the auto-encoder of MAD's compression task (Poli et al. 2024,
//! arXiv 2403.17844): the last state of a row, the place's sines and cosines added, goes through two layers of width D.

use super::Cx;
use super::ffn::act_program;
use crate::op::{Embed, Last};
use crate::{DType, Type, TypeError, ValueId, dims};
use marimba_dsl::model::{Act, Decoder};

/// Longest wavelength of the sines, over 2 pi, in tokens.
const TEMPERATURE: f64 = 1e4;

/// Parameters below `decoder.0` and `decoder.1`: `norm [D]`, `proj [D, D]`, `proj.bias [D]`.
pub(super) fn lower(cx: &mut Cx, spec: Decoder, x: ValueId) -> Result<ValueId, TypeError> {
    match spec {
        Decoder::LastState => last_state(cx, x),
    }
}

fn last_state(cx: &mut Cx, x: ValueId) -> Result<ValueId, TypeError> {
    let (b, t, d) = (cx.options().batch, cx.options().seq_len, cx.model().d_model);
    let dtype = cx.ty(x).dtype;
    // The state of row b stands for all of its places: a look-up of row number b, whose derivative is the sum over them.
    let h = cx.push1(Last, vec![Some(x)])?;
    let h = cx.cast(h, DType::F32)?;
    let h = cx.reshape(h, dims![B b, D d])?;
    let rows = (0..b * t).map(|i| (i / t) as f32).collect();
    let rows = cx.constant_of("decoder.rows", rows, Type::i32(dims![B b, T t]));
    let h = cx.push1(Embed, vec![Some(rows), Some(h)])?;
    let places = cx.constant_of("decoder.places", sines(t, d), Type::f32(dims![T t, D d]));
    let h = cx.add(h, places)?;
    let mut h = cx.cast(h, dtype)?;
    for i in 0..2 {
        let norm = cx.model().final_norm;
        h = cx.norm(&format!("decoder.{i}.norm"), h, &norm)?;
        h = cx.linear(
            &format!("decoder.{i}.proj"),
            h,
            dims![D d],
            cx.normal(),
            true,
        )?;
        h = cx.push1(act_program(Act::Gelu), vec![Some(h)])?;
    }
    cx.tap("decoder.out", h);
    Ok(h)
}

/// `[T D]`: sines of t over D/2 wavelengths in geometric steps from 1 to [`TEMPERATURE`], then their cosines.
fn sines(t: usize, d: usize) -> Vec<f32> {
    let half = d / 2;
    let mut out = vec![0.0; t * d];
    for (place, row) in out.chunks_exact_mut(d.max(1)).enumerate() {
        for i in 0..half {
            let step = i as f64 / (half.max(2) - 1) as f64;
            let angle = place as f64 * TEMPERATURE.powf(-step);
            row[i] = angle.sin() as f32;
            row[half + i] = angle.cos() as f32;
        }
    }
    out
}
