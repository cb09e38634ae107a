//! `marimba bench`: speed beside this machine's own ceilings, measured in the same run.

mod ops;
mod step;
mod train;

use super::CliError;
use clap::{Subcommand, ValueEnum};
use marimba_dsl::run::Recompute;
use marimba_ir::DType;

/// What to measure.
#[derive(Subcommand)]
pub(super) enum BenchCmd {
    /// Training steps: forward, backward, clip, AdamW
    Train(train::BenchTrainArgs),
    /// Decoding steps: one token for every row
    Step(step::BenchStepArgs),
    /// Single ops and mixers
    Ops(ops::BenchOpsArgs),
    /// Reading data
    Data(super::data::BenchDataArgs),
}

/// Number formats.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(super) enum PrecisionArg {
    F32,
    Bf16,
    /// bf16 with the products of projections in 8 bits
    #[value(name = "bf16-fp8")]
    Bf16Fp8,
}

impl PrecisionArg {
    pub(super) fn dtype(self) -> DType {
        match self {
            PrecisionArg::F32 => DType::F32,
            PrecisionArg::Bf16 | PrecisionArg::Bf16Fp8 => DType::Bf16,
        }
    }

    pub(super) fn fp8(self) -> bool {
        self == PrecisionArg::Bf16Fp8
    }
}

/// The policy of `--activations`.
pub(super) fn recompute(gib: Option<f64>) -> Recompute {
    match gib {
        Some(gib) => Recompute::Budget((gib * (1u64 << 30) as f64) as u64),
        None => Recompute::None,
    }
}

pub(super) fn run(cmd: &BenchCmd) -> Result<(), CliError> {
    match cmd {
        BenchCmd::Train(args) => train::run(args),
        BenchCmd::Step(args) => step::run(args),
        BenchCmd::Ops(args) => ops::run(args),
        BenchCmd::Data(args) => {
            super::data::run_bench(args).map_err(|e| CliError::Other(e.to_string()))
        }
    }
}

/// Says no where a backend computes in f32 only.
fn require(precision: PrecisionArg, backend: &str) -> Result<(), CliError> {
    if precision == PrecisionArg::F32 || backend == "cuda" {
        return Ok(());
    }
    Err(CliError::Other(format!(
        "the {backend} backend computes in f32 only; leave bf16 out"
    )))
}
