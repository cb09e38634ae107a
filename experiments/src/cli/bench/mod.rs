//! `marimba bench`: speed beside this machine's own ceilings, measured in the same run.

mod ops;
mod step;
mod train;

use super::{CliError, human};
use clap::{Subcommand, ValueEnum};
use marimba_backend::{Engine, HostTensor, ProgramId};
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

/// Time by op over these programs, largest first, on stderr.
pub(super) fn profile(
    engine: &mut dyn Engine,
    programs: &[(ProgramId, &[(&str, HostTensor)])],
) -> Result<(), CliError> {
    let mut rows = Vec::new();
    for (program, inputs) in programs {
        rows.extend(engine.profile(*program, inputs)?);
    }
    let total: f64 = rows.iter().map(|r| r.secs).sum();
    let mut by_op: Vec<(String, f64, usize, f64)> = Vec::new();
    for r in rows {
        match by_op.iter_mut().find(|(op, ..)| *op == r.op) {
            Some((_, secs, n, flops)) => {
                *secs += r.secs;
                *n += 1;
                *flops += r.flops;
            }
            None => by_op.push((r.op.to_string(), r.secs, 1, r.flops)),
        }
    }
    by_op.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (op, secs, n, flops) in by_op {
        eprintln!(
            "  {op:28} {:8.2} ms {:5.1}%  {n:4} nodes  {:>10}FLOP/s",
            secs * 1e3,
            100.0 * secs / total,
            human(flops / secs)
        );
    }
    Ok(())
}
