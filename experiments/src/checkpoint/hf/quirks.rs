//! Where transformers computes something else in decoding or training than its own full forward pass: all such switches, by name.
//!
//! Marimba's default is the mathematically consistent behaviour (decoding equals prefill equals training). A quirk is put on to
//! reproduce transformers' numbers, as `verify` does.

use marimba_dsl::model::{Mixer, Model};

/// A quirk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quirk {
    /// Mamba-2's one-token step does not clamp dt to its limit, though prefill does.
    DecodeIgnoresDtLimit,
}

impl Quirk {
    /// All of them, with their names.
    pub const ALL: &'static [(Quirk, &'static str)] =
        &[(Quirk::DecodeIgnoresDtLimit, "decode-ignores-dt-limit")];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        Quirk::ALL
            .iter()
            .find(|(q, _)| *q == self)
            .map_or("", |(_, n)| n)
    }

    /// The quirk of this name.
    pub fn named(name: &str) -> Option<Quirk> {
        Quirk::ALL.iter().find(|(_, n)| *n == name).map(|(q, _)| *q)
    }

    /// Changes a model to have it.
    pub fn put_on(self, model: &mut Model) {
        fn mixer(body: &mut Mixer) {
            match body {
                Mixer::Mamba2(s) => s.dt_limit_in_decode = false,
                Mixer::Parallel(branches) => branches.iter_mut().for_each(|b| mixer(&mut b.mixer)),
                Mixer::Attention(_) | Mixer::Mamba1(_) | Mixer::GatedDeltaNet(_) => {}
            }
        }
        match self {
            Quirk::DecodeIgnoresDtLimit => {
                model
                    .layers
                    .iter_mut()
                    .filter_map(|l| l.mixer.as_mut())
                    .for_each(|s| mixer(&mut s.body));
            }
        }
    }
}
