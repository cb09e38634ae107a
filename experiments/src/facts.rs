//! What a model costs: folds over its graphs, never formulas beside the model.

use marimba_dsl::model::Model;
use marimba_ir::{Options, TypeError, cost, lower};
use serde::Serialize;

/// Counts of a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Facts {
    /// All parameters; shared ones once.
    pub params_total: u64,
    /// Parameters that work on one token: of experts only the chosen share.
    pub params_active: u64,
    /// The embedding table (an untied head is not part of it).
    pub params_embedding: u64,
    /// Floating point operations of a forward pass per token at the context length asked for.
    pub flops_per_token: f64,
    /// Growth of the KV caches per token of context and sequence, f32.
    pub kv_bytes_per_token: u64,
    /// Recurrent state of one sequence while decoding, f32: convolution windows and scan states.
    pub state_bytes_per_seq: u64,
}

/// Counts of a model; FLOPs at sequences of `seq_len` tokens.
///
/// # Errors
/// [`TypeError`]: a bug.
pub fn facts(model: &Model, seq_len: usize) -> Result<Facts, TypeError> {
    let train = lower(
        model,
        &Options {
            router_loss: false,
            ..Options::train(1, seq_len)
        },
    )?;
    let params = cost::params(&train);
    let states = cost::states(&lower(model, &Options::decode(1, 1))?);
    Ok(Facts {
        params_total: params.total as u64,
        params_active: params.active as u64,
        params_embedding: params.embedding as u64,
        flops_per_token: cost::costs(&train).forward_flops / seq_len as f64,
        kv_bytes_per_token: states.kv_per_token as u64,
        state_bytes_per_seq: states.recurrent as u64,
    })
}
