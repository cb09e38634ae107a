//! Learning-rate transfer over widths by maximal update parametrisation (muP; Yang et al. 2022, "Tensor Programs V", arXiv 2203.03466).
//!
//! A learning rate found on a narrow base model serves wider ones: initial values, learning rates, attention's scale and the head's
//! multiplier follow the width such that activations, and their change in a step, keep their size. With `m` the fan-in over the
//! base's fan-in, after table 8 of the paper for Adam:
//!
//! | parameter | initial values | learning rate | elsewhere |
//! |---|---|---|---|
//! | matrix whose both sides grow (projections, experts) | base's over sqrt(m) | over m | |
//! | matrix from a width to a fixed size (router, gates) | base's over m | over m | table 3's form of an output |
//! | head, tied or not | base's | as is | logits over m |
//! | embedding, norms, biases, convolutions, A, D, dt | base's | as is | |
//! | attention | | | q.k over `head_dim / base's head_dim`, not its root |
//!
//! Which dimensions are widths is read off two models: those in which the parameters of this one differ from the base's. Decoupled
//! weight decay is divided by the factor on the learning rate, so that their product stays.
//!
//! The theory covers attention and feed-forward layers. For selective state spaces the paper does not speak; Vankadara et al. 2024
//! (arXiv 2405.20457) find that their selection needs factors of its own in the limit. A test measures that activations of all mixers keep
//! their size over the widths of this project's runs.

use marimba_dsl::model::{Mixer, Model};
use marimba_dsl::run::Run;
use marimba_ir::{Param, ParamInit, TypeError};
use std::collections::BTreeMap;

/// What a run trains once its transfer is applied.
#[derive(Clone, Debug)]
pub struct Scaled {
    /// The model, with attention's scales and the head's multiplier as they are trained.
    pub model: Model,
    /// Its parameters, with their initial values.
    pub params: Vec<Param>,
    /// Factors on the learning rate, by parameter; 1 for those not named.
    pub lr: BTreeMap<String, f64>,
}

/// Why a base does not fit.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// A lowering failed.
    #[error(transparent)]
    Type(#[from] TypeError),
    /// The models differ in more than widths.
    #[error(
        "transfer: {what}; the base must be the same model with other widths (d_model, heads, d_ff), for example `transfer: (base: File(path: \"model.ron\", set: {{\"d_model\": 64}}))`"
    )]
    Unlike {
        /// How.
        what: String,
    },
}

/// The model and parameters of a run, scaled as its `transfer` says.
///
/// # Errors
/// [`TransferError`] when the base is another model.
pub fn apply(run: &Run) -> Result<Scaled, TransferError> {
    let compute = crate::program::compute(run.precision);
    let params = marimba_ir::lower::params_in(&run.model, compute)?;
    let Some(transfer) = &run.transfer else {
        return Ok(Scaled {
            model: run.model.clone(),
            params,
            lr: BTreeMap::new(),
        });
    };
    let base = &transfer.base;
    let model = scaled_model(&run.model, base)?;
    let narrow: BTreeMap<String, Param> = marimba_ir::lower::params(base)?
        .into_iter()
        .map(|p| (p.name.clone(), p))
        .collect();
    if let Some(extra) = narrow
        .keys()
        .find(|name| params.iter().all(|p| p.name != **name))
    {
        return Err(unlike(format!("only the base has {extra}")));
    }
    let mut lr = BTreeMap::new();
    let mut scaled = Vec::with_capacity(params.len());
    for p in params {
        let Some(b) = narrow.get(&p.name) else {
            return Err(unlike(format!("the base has no {}", p.name)));
        };
        let (sizes, base_sizes) = (p.ty.sizes(), b.ty.sizes());
        if sizes.len() != base_sizes.len() {
            return Err(unlike(format!("{} has other dimensions", p.name)));
        }
        let Some((init, rate)) = factors(&p, &sizes, &base_sizes) else {
            scaled.push(p);
            continue;
        };
        lr.insert(p.name.clone(), rate);
        scaled.push(Param {
            init: times(b.init.clone(), init),
            ..p
        });
    }
    Ok(Scaled {
        model,
        params: scaled,
        lr,
    })
}

/// Factors on initial values and learning rate of a matrix that reads a width; `None` for all else.
fn factors(p: &Param, sizes: &[usize], base: &[usize]) -> Option<(f64, f64)> {
    // Matrices are stored [out.., in]; look-ups and the head keep their rates, vectors and taps of convolutions have no fan-in that grows.
    let read_by_rows = p.decay && sizes.len() >= 2 && p.name != "embedding" && p.name != "head";
    let (Some((&fan_in, outs)), Some((&base_in, base_outs))) =
        (sizes.split_last(), base.split_last())
    else {
        return None;
    };
    if !read_by_rows || fan_in == base_in {
        return None;
    }
    let m = fan_in as f64 / base_in as f64;
    let init = if outs == base_outs {
        1.0 / m
    } else {
        m.powf(-0.5)
    };
    Some((init, 1.0 / m))
}

fn times(init: ParamInit, factor: f64) -> ParamInit {
    match init {
        ParamInit::Normal(std) => ParamInit::Normal(std * factor),
        ParamInit::Uniform(bound) => ParamInit::Uniform(bound * factor),
        ParamInit::Zeros
        | ParamInit::Ones
        | ParamInit::LogUniformA(..)
        | ParamInit::LogArange
        | ParamInit::DtBias { .. } => init,
    }
}

fn scaled_model(model: &Model, base: &Model) -> Result<Model, TransferError> {
    if model.layers.len() != base.layers.len() {
        return Err(unlike(format!(
            "{} layers and {} in the base",
            model.layers.len(),
            base.layers.len()
        )));
    }
    if model.vocab_size != base.vocab_size {
        return Err(unlike(format!(
            "a vocabulary of {} and {} in the base",
            model.vocab_size, base.vocab_size
        )));
    }
    let mut out = model.clone();
    out.head.multiplier = base.head.multiplier * base.d_model as f64 / model.d_model as f64;
    for (layer, narrow) in out.layers.iter_mut().zip(&base.layers) {
        if let (Some(mixer), Some(narrow)) = (&mut layer.mixer, &narrow.mixer) {
            scale_attention(&mut mixer.body, &narrow.body);
        }
    }
    Ok(out)
}

fn scale_attention(mixer: &mut Mixer, base: &Mixer) {
    match (mixer, base) {
        (Mixer::Attention(a), Mixer::Attention(b)) => {
            a.scale = b.scale * b.head_dim as f64 / a.head_dim as f64;
        }
        (Mixer::Parallel(all), Mixer::Parallel(narrow)) => {
            for (branch, narrow) in all.iter_mut().zip(narrow) {
                scale_attention(&mut branch.mixer, &narrow.mixer);
            }
        }
        // Kinds that differ have parameters that differ, which is refused.
        _ => {}
    }
}

fn unlike(what: String) -> TransferError {
    TransferError::Unlike { what }
}
