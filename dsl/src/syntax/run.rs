//! The surface syntax of a run file.
//!
//! ```ron
//! (
//!     name: "text",
//!     model: "models/small.ron",
//!     data: Text(path: "../data/book.txt"),
//!     steps: 1000, batch: 8, seq_len: 256,
//!     optimizer: (lr: 1e-3),
//!     schedule: (warmup: Linear(50), decay: Cosine(final_fraction: 0.1)),
//! )
//! ```
//! With `phases: [(steps: 1000), (name: "anneal", steps: 200, lr: 1e-4, data: ..)]`, the fields above are what phases do not state.
//!
//! `model` is a path, `File(path: "x.ron", set: {"d_model": 512})`, or the model itself, plain or as `Inline(..)`.
//! Parts whose defaults depend on nothing else are the resolved types of [`crate::run`] themselves.

use super::Named;
use super::model::Model;
use crate::data::Data;
use crate::run::{
    ActivationLoss, AdamW, Backend, Checkpoint, EarlyStop, Precision, Recompute, Schedule,
};
use serde::{Deserialize, Serialize};

/// A run file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Run {
    /// Name of the run folder. Default: the model's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What is trained. Required.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<Box<Model>>,
    /// F32 (default), Bf16 or Bf16Fp8.
    pub precision: Precision,
    /// Default 0.
    pub seed: u64,
    /// Optimiser steps. Required here or in every phase.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Training rows. Required here or in every phase.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Data>,
    /// Rows per micro-batch. Default 8. Activations grow with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// T, tokens per row. Default: the data's where it says, else the model's `context_len`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq_len: Option<usize>,
    /// Micro-batches per step. Default 1. Time grows with it, memory does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accumulate: Option<usize>,
    /// Warm-up and decay. Default: constant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
    /// Evaluation. Default: at the end, on the data's own evaluation sets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<Eval>,
    /// Phases in sequence. Default: one, of the fields above.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<Phase>,
    /// AdamW, and the peak learning rate.
    pub optimizer: AdamW,
    /// Largest global gradient norm, above 0. Default 1; `None` is off.
    pub grad_clip: Option<f64>,
    /// Coefficient of the z-loss, 0 or more. Default 0.
    pub z_loss: f64,
    /// Activation loss. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activation_loss: Option<ActivationLoss>,
    /// Learning-rate transfer over widths (muP). Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
    /// None (default), Block or Budget(bytes).
    pub recompute: Recompute,
    /// Steps between log lines, 1 or more. Default 10.
    pub log_every: usize,
    /// Checkpoints.
    pub checkpoint: Checkpoint,
    /// Steps between activation statistics. Default never. One probed step costs a few percent more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe_every: Option<usize>,
    /// Stop when a metric is good enough. Default never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stop: Option<EarlyStop>,
    /// auto (default), cpu, dfdx or cuda.
    pub backend: Backend,
    /// Forbid what is not bitwise reproducible. Default true; false may be faster on GPUs.
    pub deterministic: bool,
}

impl Default for Run {
    fn default() -> Self {
        Run {
            name: None,
            model: None,
            precision: Precision::default(),
            seed: 0,
            steps: None,
            data: None,
            batch: None,
            seq_len: None,
            accumulate: None,
            schedule: None,
            eval: None,
            phases: Vec::new(),
            optimizer: AdamW::default(),
            grad_clip: Some(1.0),
            z_loss: 0.0,
            activation_loss: None,
            transfer: None,
            recompute: Recompute::default(),
            log_every: 10,
            checkpoint: Checkpoint::default(),
            probe_every: None,
            early_stop: None,
            backend: Backend::default(),
            deterministic: true,
        }
    }
}

/// Learning-rate transfer over widths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transfer {
    /// The same model with other widths, on which `optimizer.lr` was found: a path, `File(..)`, or the model itself. Required.
    pub base: Box<Model>,
}

/// One phase; what it leaves out is taken from the run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Phase {
    /// For logs. Default `"phase-0"`, `"phase-1"`, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Optimiser steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Training rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Data>,
    /// Rows per micro-batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// Tokens per row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq_len: Option<usize>,
    /// Micro-batches per step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accumulate: Option<usize>,
    /// Peak learning rate. Default: the optimiser's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Warm-up and decay over this phase.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
    /// Evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<Eval>,
}

/// Evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Eval {
    /// Steps between evaluations. Default: only at the end of the phase.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<usize>,
    /// At most this many rows of each set. Default 256.
    pub rows: usize,
    /// Sets by name. Default: those of the training data.
    #[serde(skip_serializing_if = "Named::is_empty")]
    pub sets: Named<Data>,
}

impl Default for Eval {
    fn default() -> Self {
        Eval {
            every: None,
            rows: 256,
            sets: Named::default(),
        }
    }
}
