//! Training: the loop, its checkpoints, its evaluation, and what it reports.
//!
//! A step reads `accumulate` micro-batches, sums their gradients, and updates once. The loss is the mean over all valid targets of the
//! step, whatever the split into micro-batches. Everything that decides the next step is in the checkpoint, so a resumed run continues
//! bitwise.

mod eval;
mod run_loop;
mod step;

pub use eval::{EvalResult, Forward, evaluate, score};
pub use run_loop::{
    Finish, Identity, LogLine, Observer, Outcome, TrainRequest, data_hash, device_bytes,
    graph_hash, memory_bytes, train,
};
pub(crate) use step::loss_inputs;
pub use step::{StepOutcome, Trainer};

use crate::checkpoint::CheckpointError;
use crate::data::DataError;
use crate::program::CompileError;
use crate::record::RecordError;
use crate::transfer::TransferError;
use marimba_backend::{BackendError, NonFinite};

/// What can end a run early.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The run folder.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The backend.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// Compilation.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// The base of a learning-rate transfer.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// A loss or gradient that is not a number.
    #[error(
        "{what} is not finite at step {step}: {explanation}; lower the learning rate, clip gradients, or look at the statistics with probe_every"
    )]
    NonFinite {
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// Step, from 1.
        step: usize,
        /// The first node that produced it.
        explanation: String,
    },
    /// The run asks for what this backend cannot do.
    #[error("{what} is not available on the {backend} backend; {help}")]
    Unsupported {
        /// What.
        what: String,
        /// Where.
        backend: &'static str,
        /// What would work.
        help: &'static str,
    },
    /// What the loop kept in a checkpoint cannot be written or understood.
    #[error("training state: {0}")]
    State(String),
    /// Data and model do not fit.
    #[error(
        "the data uses token ids up to {needs}, the model's vocab_size is {has}; set model.vocab_size to at least {needs}"
    )]
    Vocabulary {
        /// Of the data.
        needs: usize,
        /// Of the model.
        has: usize,
    },
}

/// Says which node made the first value that is not finite.
fn explain(found: Option<NonFinite>) -> String {
    match found {
        Some(n) => format!(
            "first seen in {} elements of result {} of {} at {} (node {}), whose largest finite argument is {:e}",
            n.count, n.result, n.op, n.path, n.node, n.largest_arg
        ),
        None => "running the step again did not reproduce it".into(),
    }
}
