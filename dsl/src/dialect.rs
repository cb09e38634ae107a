//! Layouts in the dialects of other projects, and back. Lossless: what a dialect cannot say is an error, never dropped.
//!
//! A dialect speaks of *kinds* only: which layer holds attention, a state space mixer, a plain ffn, experts. Sizes are not its affair.
//!
//! | dialect | form | says |
//! | --- | --- | --- |
//! | Megatron | `"M-M*-ME"` | one sublayer a layer: `M` state space, `*` attention, `-` ffn, `E` experts |
//! | Hugging Face | `["mamba", "attention", ..]` | `layer_types`: the mixer of each layer; also `layers_block_type` with `mlp` and `moe` as layers |
//! | Jamba | period and offset of attention and of experts | mixers and ffns on two independent rhythms |
//! | Bamba | `attn_layer_indices` | indices of attention, all other mixers alike, one kind of ffn |

use crate::model::{Ffn, Layer, Mixer};

/// What may act over time, as dialects see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MixerKind {
    /// Softmax attention.
    Attention,
    /// Mamba-1, Mamba-2 or Gated DeltaNet: constant state.
    Recurrent,
}

/// What may act over channels, as dialects see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FfnKind {
    /// `Glu` or `Mlp`.
    Dense,
    /// Mixture of experts.
    Moe,
}

/// The kinds in one layer.
pub type LayerKinds = (Option<MixerKind>, Option<FfnKind>);

/// Why a layout and a dialect do not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DialectError {
    /// Megatron's and Nemotron-H's patterns have one sublayer a layer.
    #[error(
        "layer {layer} has a mixer and an ffn, a {dialect} layer has one of them: split it into two layers"
    )]
    TwoHalves {
        /// Index.
        layer: usize,
        /// Name of the dialect.
        dialect: &'static str,
    },
    /// An empty layer, or one without a half that the dialect presumes.
    #[error("layer {layer} has no {half}, which every {dialect} layer has")]
    NoHalf {
        /// Index.
        layer: usize,
        /// `mixer`, `ffn` or `mixer or ffn`.
        half: &'static str,
        /// Name of the dialect.
        dialect: &'static str,
    },
    /// Parallel groups and injected blocks.
    #[error("layer {layer} has {what}, which the {dialect} layout cannot say")]
    Unsayable {
        /// Index.
        layer: usize,
        /// `a parallel group` or `an injected block`.
        what: &'static str,
        /// Name of the dialect.
        dialect: &'static str,
    },
    /// Kinds that do not follow one period and offset.
    #[error("{what} does not follow one period and offset: first departure at layer {layer}")]
    NoRhythm {
        /// `attention` or `experts`.
        what: &'static str,
        /// Index.
        layer: usize,
    },
    /// A layer's ffn differs from the others'.
    #[error("layer {layer} has another kind of ffn than layer 0, the {dialect} layout knows one")]
    MixedFfns {
        /// Index.
        layer: usize,
        /// Name of the dialect.
        dialect: &'static str,
    },
    /// A character or word that means nothing.
    #[error("`{word}` at layer {layer} means nothing in the {dialect} layout: it knows {known}")]
    Unknown {
        /// Index.
        layer: usize,
        /// As read.
        word: String,
        /// Name of the dialect.
        dialect: &'static str,
        /// What would be understood.
        known: &'static str,
    },
    /// Numbers out of range.
    #[error("{what} {found} is out of range: {wanted}")]
    Range {
        /// Name of the number.
        what: &'static str,
        /// As read.
        found: usize,
        /// What would be right.
        wanted: String,
    },
}

use DialectError as E;

/// The kinds of each layer of a resolved model.
///
/// # Errors
/// [`DialectError::Unsayable`] for parallel groups and injected blocks.
pub fn kinds(layers: &[Layer], dialect: &'static str) -> Result<Vec<LayerKinds>, DialectError> {
    let kind = |(layer, l): (usize, &Layer)| {
        if l.inject.is_some() {
            return Err(E::Unsayable {
                layer,
                what: "an injected block",
                dialect,
            });
        }
        let mixer = match l.mixer.as_ref().map(|m| &m.body) {
            None => None,
            Some(Mixer::Attention(_)) => Some(MixerKind::Attention),
            Some(Mixer::Mamba1(_) | Mixer::Mamba2(_) | Mixer::GatedDeltaNet(_)) => {
                Some(MixerKind::Recurrent)
            }
            Some(Mixer::Parallel(_)) => {
                return Err(E::Unsayable {
                    layer,
                    what: "a parallel group",
                    dialect,
                });
            }
        };
        let ffn = l.ffn.as_ref().map(|f| match &f.body {
            Ffn::Glu(_) | Ffn::Mlp(_) => FfnKind::Dense,
            Ffn::Moe(_) => FfnKind::Moe,
        });
        Ok((mixer, ffn))
    };
    layers.iter().enumerate().map(kind).collect()
}

/// The one half of a layer that has one.
fn single(
    (layer, kinds): (usize, &LayerKinds),
    dialect: &'static str,
) -> Result<Half, DialectError> {
    match kinds {
        (Some(m), None) => Ok(Half::Mixer(*m)),
        (None, Some(f)) => Ok(Half::Ffn(*f)),
        (Some(_), Some(_)) => Err(E::TwoHalves { layer, dialect }),
        (None, None) => Err(E::NoHalf {
            layer,
            half: "mixer or ffn",
            dialect,
        }),
    }
}

enum Half {
    Mixer(MixerKind),
    Ffn(FfnKind),
}

/// Megatron's and Nemotron-H's pattern string.
///
/// # Errors
/// Layers with both halves or none.
pub fn to_megatron(layers: &[LayerKinds]) -> Result<String, DialectError> {
    let symbol = |at| {
        Ok(match single(at, "megatron")? {
            Half::Mixer(MixerKind::Recurrent) => 'M',
            Half::Mixer(MixerKind::Attention) => '*',
            Half::Ffn(FfnKind::Dense) => '-',
            Half::Ffn(FfnKind::Moe) => 'E',
        })
    };
    layers.iter().enumerate().map(symbol).collect()
}

/// Reads [`to_megatron`]'s form.
///
/// # Errors
/// Characters other than `M * - E`.
pub fn from_megatron(pattern: &str) -> Result<Vec<LayerKinds>, DialectError> {
    let kinds = |(layer, c)| {
        Ok(match c {
            'M' => (Some(MixerKind::Recurrent), None),
            '*' => (Some(MixerKind::Attention), None),
            '-' => (None, Some(FfnKind::Dense)),
            'E' => (None, Some(FfnKind::Moe)),
            c => {
                return Err(E::Unknown {
                    layer,
                    word: c.into(),
                    dialect: "megatron",
                    known: "`M`, `*`, `-`, `E`",
                });
            }
        })
    };
    pattern.chars().enumerate().map(kinds).collect()
}

/// Hugging Face's list of words: with one half a layer `layers_block_type` (Nemotron-H: `mamba attention mlp moe`), otherwise
/// `layer_types` (Granite, Bamba: `mamba attention`), which presumes one kind of ffn in all layers.
///
/// # Errors
/// Layers without a mixer beside layers with both halves; ffns of two kinds.
pub fn to_hf(layers: &[LayerKinds]) -> Result<Vec<&'static str>, DialectError> {
    let paired = layers.iter().any(|(m, f)| m.is_some() && f.is_some());
    let word = |at: (usize, &LayerKinds)| {
        if !paired {
            return Ok(match single(at, "hf")? {
                Half::Mixer(m) => mixer_word(m),
                Half::Ffn(FfnKind::Dense) => "mlp",
                Half::Ffn(FfnKind::Moe) => "moe",
            });
        }
        let (layer, (mixer, ffn)) = at;
        same_ffn(layers, layer, *ffn, "hf")?;
        mixer.map(mixer_word).ok_or(E::NoHalf {
            layer,
            half: "mixer",
            dialect: "hf",
        })
    };
    layers.iter().enumerate().map(word).collect()
}

fn mixer_word(m: MixerKind) -> &'static str {
    match m {
        MixerKind::Attention => "attention",
        MixerKind::Recurrent => "mamba",
    }
}

fn same_ffn(
    layers: &[LayerKinds],
    layer: usize,
    ffn: Option<FfnKind>,
    dialect: &'static str,
) -> Result<(), DialectError> {
    match layers.first() {
        Some((_, first)) if *first != ffn => Err(E::MixedFfns { layer, dialect }),
        _ => Ok(()),
    }
}

/// Reads [`to_hf`]'s form and its published spellings. `ffn` is what every layer has beside its mixer, when the list names mixers
/// only; `None` for lists in which `mlp` and `moe` are layers of their own.
///
/// # Errors
/// Unknown words; `mlp` or `moe` where `ffn` is given.
pub fn from_hf<S: AsRef<str>>(
    words: &[S],
    ffn: Option<FfnKind>,
) -> Result<Vec<LayerKinds>, DialectError> {
    let kinds = |(layer, word): (usize, &S)| {
        let word = word.as_ref();
        Ok(match (word, ffn) {
            ("attention" | "full_attention" | "sliding_attention", _) => {
                (Some(MixerKind::Attention), ffn)
            }
            ("mamba" | "mamba2" | "linear_attention", _) => (Some(MixerKind::Recurrent), ffn),
            ("mlp", None) => (None, Some(FfnKind::Dense)),
            ("moe", None) => (None, Some(FfnKind::Moe)),
            _ => {
                let known = if ffn.is_some() {
                    "`mamba`, `attention`"
                } else {
                    "`mamba`, `attention`, `mlp`, `moe`"
                };
                return Err(E::Unknown {
                    layer,
                    word: word.to_owned(),
                    dialect: "hf",
                    known,
                });
            }
        })
    };
    words.iter().enumerate().map(kinds).collect()
}

/// Jamba's four numbers and the depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jamba {
    /// Layers.
    pub n_layers: usize,
    /// Distance of attention layers; one more than any index where there is none.
    pub attn_layer_period: usize,
    /// First attention layer.
    pub attn_layer_offset: usize,
    /// Distance of expert layers.
    pub expert_layer_period: usize,
    /// First expert layer.
    pub expert_layer_offset: usize,
}

/// Period and offset of attention and of experts. A kind that never occurs has period n + 1 and offset n.
///
/// # Errors
/// Layers without one of the halves, kinds off one rhythm.
pub fn to_jamba(layers: &[LayerKinds]) -> Result<Jamba, DialectError> {
    let (mut attention, mut experts) = (Vec::new(), Vec::new());
    for (layer, (m, f)) in layers.iter().enumerate() {
        let lacks = |half| E::NoHalf {
            layer,
            half,
            dialect: "jamba",
        };
        attention.push(m.ok_or(lacks("mixer"))? == MixerKind::Attention);
        experts.push(f.ok_or(lacks("ffn"))? == FfnKind::Moe);
    }
    let (attn_layer_period, attn_layer_offset) = period(&attention, "attention")?;
    let (expert_layer_period, expert_layer_offset) = period(&experts, "experts")?;
    Ok(Jamba {
        n_layers: layers.len(),
        attn_layer_period,
        attn_layer_offset,
        expert_layer_period,
        expert_layer_offset,
    })
}

fn period(row: &[bool], what: &'static str) -> Result<(usize, usize), DialectError> {
    let n = row.len();
    let mut at = row.iter().enumerate().filter(|(_, x)| **x).map(|(i, _)| i);
    let (period, offset) = match (at.next(), at.next()) {
        (None, _) => (n + 1, n),
        // A single one: any period that reaches past the end, and is above the offset.
        (Some(i), None) => (n.max(i + 1), i),
        (Some(i), Some(j)) => (j - i, i),
    };
    match (0..n).find(|i| row[*i] != (i % period == offset)) {
        Some(layer) => Err(E::NoRhythm { what, layer }),
        None => Ok((period, offset)),
    }
}

/// Reads [`to_jamba`]'s form.
///
/// # Errors
/// A period of 0, an offset that is not below its period.
pub fn from_jamba(j: &Jamba) -> Result<Vec<LayerKinds>, DialectError> {
    let fine = |what, period: usize, offset: usize| {
        if period == 0 || offset >= period {
            return Err(E::Range {
                what,
                found: offset,
                wanted: format!("below the period, which is {period}"),
            });
        }
        Ok(())
    };
    fine(
        "attn_layer_offset",
        j.attn_layer_period,
        j.attn_layer_offset,
    )?;
    fine(
        "expert_layer_offset",
        j.expert_layer_period,
        j.expert_layer_offset,
    )?;
    let kinds = |i: usize| {
        let attention = i % j.attn_layer_period == j.attn_layer_offset;
        let experts = i % j.expert_layer_period == j.expert_layer_offset;
        (
            Some(if attention {
                MixerKind::Attention
            } else {
                MixerKind::Recurrent
            }),
            Some(if experts {
                FfnKind::Moe
            } else {
                FfnKind::Dense
            }),
        )
    };
    Ok((0..j.n_layers).map(kinds).collect())
}

/// Bamba's `attn_layer_indices`.
///
/// # Errors
/// Layers without a mixer, ffns of two kinds.
pub fn to_bamba(layers: &[LayerKinds]) -> Result<Vec<usize>, DialectError> {
    let mut indices = Vec::new();
    for (layer, (m, f)) in layers.iter().enumerate() {
        same_ffn(layers, layer, *f, "bamba")?;
        match m {
            Some(MixerKind::Attention) => indices.push(layer),
            Some(MixerKind::Recurrent) => {}
            None => {
                return Err(E::NoHalf {
                    layer,
                    half: "mixer",
                    dialect: "bamba",
                });
            }
        }
    }
    Ok(indices)
}

/// Reads [`to_bamba`]'s form; `ffn` stands in every layer.
///
/// # Errors
/// Indices beyond the layers.
pub fn from_bamba(
    indices: &[usize],
    n_layers: usize,
    ffn: Option<FfnKind>,
) -> Result<Vec<LayerKinds>, DialectError> {
    if let Some(&found) = indices.iter().find(|i| **i >= n_layers) {
        return Err(E::Range {
            what: "attention layer",
            found,
            wanted: format!("below the number of layers, which is {n_layers}"),
        });
    }
    let mixer = |i| {
        if indices.contains(&i) {
            MixerKind::Attention
        } else {
            MixerKind::Recurrent
        }
    };
    Ok((0..n_layers).map(|i| (Some(mixer(i)), ffn)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    /// NVIDIA's 8B hybrid and Nemotron-H-8B, as published.
    const NVIDIA: &str = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-";
    const NEMOTRON_H: &str = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-";

    fn mixer() -> impl Strategy<Value = MixerKind> {
        prop_oneof![Just(MixerKind::Attention), Just(MixerKind::Recurrent)]
    }

    fn ffn() -> impl Strategy<Value = FfnKind> {
        prop_oneof![Just(FfnKind::Dense), Just(FfnKind::Moe)]
    }

    #[test]
    fn published_patterns() {
        for (pattern, attention) in [(NVIDIA, [10, 22, 33, 45]), (NEMOTRON_H, [7, 18, 29, 40])] {
            let layers = from_megatron(pattern).unwrap();
            let found: Vec<usize> = (0..layers.len())
                .filter(|i| layers[*i].0 == Some(MixerKind::Attention))
                .collect();
            assert_eq!(found, attention);
            assert_eq!(to_megatron(&layers).unwrap(), pattern);
            assert_eq!(from_hf(&to_hf(&layers).unwrap(), None).unwrap(), layers);
        }
        let jamba = Jamba {
            n_layers: 32,
            attn_layer_period: 8,
            attn_layer_offset: 4,
            expert_layer_period: 2,
            expert_layer_offset: 1,
        };
        assert_eq!(to_jamba(&from_jamba(&jamba).unwrap()).unwrap(), jamba);
        let bamba = from_bamba(&[9, 18, 27], 32, Some(FfnKind::Dense)).unwrap();
        assert_eq!(to_bamba(&bamba).unwrap(), [9, 18, 27]);
        assert_eq!(
            to_jamba(&bamba),
            Err(E::NoRhythm {
                what: "attention",
                layer: 9
            })
        );
        assert_eq!(
            to_megatron(&bamba),
            Err(E::TwoHalves {
                layer: 0,
                dialect: "megatron"
            })
        );
    }

    #[test]
    fn what_cannot_be_said() {
        assert!(matches!(
            from_megatron("M-X"),
            Err(E::Unknown { layer: 2, .. })
        ));
        assert!(matches!(
            from_hf(&["mamba", "mlp"], Some(FfnKind::Dense)),
            Err(E::Unknown { layer: 1, .. })
        ));
        assert!(matches!(from_bamba(&[4], 4, None), Err(E::Range { .. })));
        let both = [
            (Some(MixerKind::Recurrent), Some(FfnKind::Dense)),
            (Some(MixerKind::Recurrent), Some(FfnKind::Moe)),
        ];
        assert_eq!(
            to_bamba(&both),
            Err(E::MixedFfns {
                layer: 1,
                dialect: "bamba"
            })
        );
        assert_eq!(
            to_hf(&both),
            Err(E::MixedFfns {
                layer: 1,
                dialect: "hf"
            })
        );
        assert!(matches!(
            to_megatron(&[(None, None)]),
            Err(E::NoHalf { .. })
        ));
    }

    proptest! {
        #[test]
        fn single_halves_survive_megatron_and_hf(pattern in "[M*E-]{0,60}") {
            let layers = from_megatron(&pattern).unwrap();
            prop_assert_eq!(to_megatron(&layers).unwrap(), pattern);
            prop_assert_eq!(from_hf(&to_hf(&layers).unwrap(), None).unwrap(), layers);
        }

        #[test]
        fn whole_layers_survive_hf_and_bamba(mixers in vec(mixer(), 0..40), f in option::of(ffn())) {
            let layers: Vec<LayerKinds> = mixers.into_iter().map(|m| (Some(m), f)).collect();
            prop_assert_eq!(from_hf(&to_hf(&layers).unwrap(), f).unwrap(), layers.clone());
            prop_assert_eq!(from_bamba(&to_bamba(&layers).unwrap(), layers.len(), f).unwrap(), layers);
        }

        #[test]
        fn rhythms_survive_jamba(n_layers in 0usize..60, (ap, ao) in (1usize..70).prop_flat_map(|p| (Just(p), 0..p)), (ep, eo) in (1usize..70).prop_flat_map(|p| (Just(p), 0..p))) {
            let j = Jamba { n_layers, attn_layer_period: ap, attn_layer_offset: ao, expert_layer_period: ep, expert_layer_offset: eo };
            let layers = from_jamba(&j).unwrap();
            prop_assert_eq!(from_jamba(&to_jamba(&layers).unwrap()).unwrap(), layers);
        }

        #[test]
        fn any_layout_is_said_exactly_or_refused(layers in vec((option::of(mixer()), option::of(ffn())), 0..6)) {
            if let Ok(p) = to_megatron(&layers) {
                prop_assert_eq!(from_megatron(&p).unwrap(), layers.clone());
            }
            if let Ok(j) = to_jamba(&layers) {
                prop_assert_eq!(from_jamba(&j).unwrap(), layers.clone());
            }
            if let Ok(b) = to_bamba(&layers) {
                let f = layers.first().and_then(|l| l.1);
                prop_assert_eq!(from_bamba(&b, layers.len(), f).unwrap(), layers.clone());
            }
            if let Ok(w) = to_hf(&layers) {
                let paired = layers.iter().any(|(m, f)| m.is_some() && f.is_some());
                let f = if paired { layers[0].1 } else { None };
                prop_assert_eq!(from_hf(&w, f).unwrap(), layers);
            }
        }
    }
}
