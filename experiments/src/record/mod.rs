//! What a run leaves on disk, and how it is read back: the run folder, `metrics.jsonl` (the truth), TensorBoard event
//! files (a rendering of it), the summary that tables are made from.
//!
//! Nothing here knows models or training; the loop hands over numbers with a step and a tag. Tags are text, never paths.

pub mod error;
pub mod events;
pub mod files;
pub mod goal;
pub mod histogram;
pub mod metrics;
pub mod read;
pub mod recorder;
pub mod run_dir;
pub mod series;
pub mod summary;
pub mod sweep_file;

pub use error::RecordError;
pub use events::{EventFile, HParam, LayoutChart};
pub use goal::Goal;
pub use histogram::Histogram;
pub use metrics::{CurveFacts, curve_facts};
pub use recorder::Recorder;
pub use run_dir::{RunDir, RunFiles};
pub use series::{Point, Series};
pub use summary::{RunState, RunStatus, RunSummary};
pub use sweep_file::SweepFile;

/// Tags that the training loop writes and the reports look for; names shared with torchtitan and flame where they have one.
pub mod tags {
    /// Mean training loss per token of the step, nats.
    pub const TRAIN_LOSS: &str = "train/loss";
    /// Learning rate of the step.
    pub const TRAIN_LR: &str = "train/lr";
    /// Global gradient norm before clipping.
    pub const TRAIN_GRAD_NORM: &str = "train/grad_norm";
    /// Training throughput over the log interval, tokens per second.
    pub const TOKENS_PER_SEC: &str = "perf/tokens_per_sec";
    /// Share of the time that training waited for data.
    pub const DATA_WAIT: &str = "perf/data_wait";
    /// Tokens seen since the start of the run.
    pub const TOKENS: &str = "train/tokens";

    /// `eval/<metric>`, for instance `eval/accuracy`.
    pub fn eval(metric: &str) -> String {
        format!("eval/{metric}")
    }

    /// `act/<path>/<stat>`: activation statistic `rms`, `max` or `over_f16` (count of |x| > 65504) at a graph path.
    pub fn act(path: &str, stat: &str) -> String {
        format!("act/{path}/{stat}")
    }

    /// `grad/<path>/norm`: gradient norm of one parameter tensor.
    pub fn grad_norm(path: &str) -> String {
        format!("grad/{path}/norm")
    }
}
