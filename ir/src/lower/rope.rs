//! Frequencies of rotary position embedding under the context-extension methods of the field.

use marimba_dsl::model::{Mixer, Model, Rope, RopeScaling};
use std::f64::consts::TAU;

/// The `dims/2` inverse frequencies for a sequence of `len` tokens in all (only LongRoPE depends on it).
pub fn inv_freq(rope: &Rope, len: usize) -> Vec<f32> {
    let half = rope.dims / 2;
    let base = |i: usize| rope.theta.powf(-2.0 * i as f64 / rope.dims as f64);
    let f: Vec<f64> = match &rope.scaling {
        RopeScaling::None => (0..half).map(base).collect(),
        RopeScaling::Linear { factor } => (0..half).map(|i| base(i) / factor).collect(),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context_len,
        } => (0..half)
            .map(|i| {
                let f = base(i);
                let (wavelength, original) = (TAU / f, *original_context_len as f64);
                if wavelength < original / high_freq_factor {
                    f
                } else if wavelength > original / low_freq_factor {
                    f / factor
                } else {
                    let smooth = (original / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            })
            .collect(),
        RopeScaling::Yarn {
            factor,
            original_context_len,
            beta_fast,
            beta_slow,
            truncate,
            ..
        } => {
            // The dimension that turns `rotations` times over the original context (arXiv 2309.00071, section 3.2).
            let dim = |rotations: f64| {
                rope.dims as f64 * (*original_context_len as f64 / (rotations * TAU)).ln()
                    / (2.0 * rope.theta.ln())
            };
            let (mut low, mut high) = (dim(*beta_fast), dim(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, high) = (low.max(0.0), high.min(rope.dims as f64 - 1.0));
            let high = if low == high { high + 0.001 } else { high };
            (0..half)
                .map(|i| {
                    let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    base(i) / factor * ramp + base(i) * (1.0 - ramp)
                })
                .collect()
        }
        RopeScaling::LongRope {
            short_factor,
            long_factor,
            original_context_len,
            ..
        } => {
            let ext = if len > *original_context_len {
                long_factor
            } else {
                short_factor
            };
            (0..half)
                .map(|i| base(i) / ext.get(i).copied().unwrap_or(1.0))
                .collect()
        }
    };
    f.into_iter().map(|f| f as f32).collect()
}

/// What cos and sin are multiplied by.
pub fn attention_factor(rope: &Rope) -> f64 {
    match &rope.scaling {
        RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
        RopeScaling::Yarn {
            attention_factor, ..
        }
        | RopeScaling::LongRope {
            attention_factor, ..
        } => *attention_factor,
    }
}

/// Whether frequencies change with the length of the sequence, so that decoding takes them as an input.
pub fn is_dynamic(rope: &Rope) -> bool {
    matches!(rope.scaling, RopeScaling::LongRope { .. })
}

/// Name of the input or constant that holds the frequencies of such an embedding: equal embeddings share it, whatever mixer they are
/// declared in (FNV-1a of the parameters).
pub fn input_name(rope: &Rope) -> String {
    let hash = format!("{rope:?}")
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
        });
    format!("inv_freq.{hash:016x}")
}

/// The frequency inputs of prefill and decode graphs of this model for sequences of `len` tokens in all.
pub fn dynamic_inputs(model: &Model, len: usize) -> Vec<(String, Vec<f32>)> {
    let mut out: Vec<(String, Vec<f32>)> = Vec::new();
    let mut visit = |rope: &Option<Rope>| {
        if let Some(rope) = rope.as_ref().filter(|r| is_dynamic(r)) {
            let name = input_name(rope);
            if !out.iter().any(|(n, _)| *n == name) {
                out.push((name, inv_freq(rope, len)));
            }
        }
    };
    fn mixers(visit: &mut impl FnMut(&Option<Rope>), mixer: &Mixer) {
        match mixer {
            Mixer::Attention(a) => visit(&a.rope),
            Mixer::Parallel(branches) => branches.iter().for_each(|b| mixers(visit, &b.mixer)),
            Mixer::Mamba1(_) | Mixer::Mamba2(_) | Mixer::GatedDeltaNet(_) => {}
        }
    }
    for layer in &model.layers {
        if let Some(sub) = &layer.mixer {
            mixers(&mut visit, &sub.body);
        }
        if let Some(inject) = &layer.inject {
            visit(&inject.mixer.rope);
        }
    }
    out
}

/// The lengths at which frequencies change, and whether the cache must then be recomputed.
pub fn crossing(model: &Model) -> Option<(usize, bool)> {
    let mut found = None;
    let mut visit = |rope: &Option<Rope>| {
        if let Some(RopeScaling::LongRope {
            original_context_len,
            recompute_on_crossing,
            ..
        }) = rope.as_ref().map(|r| &r.scaling)
        {
            found = Some((*original_context_len, *recompute_on_crossing));
        }
    };
    for layer in &model.layers {
        match layer.mixer.as_ref().map(|s| &s.body) {
            Some(Mixer::Attention(a)) => visit(&a.rope),
            Some(Mixer::Parallel(branches)) => branches.iter().for_each(|b| {
                if let Mixer::Attention(a) = &b.mixer {
                    visit(&a.rope);
                }
            }),
            Some(Mixer::Mamba1(_) | Mixer::Mamba2(_) | Mixer::GatedDeltaNet(_)) | None => {}
        }
    }
    found
}
