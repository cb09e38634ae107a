//! `marimba import`, `export` and `verify`: Hugging Face checkpoints in, out, and number by number.

use super::{CliError, print_json};
use crate::checkpoint::hf::{self, ExportOptions, Quirk};
use crate::engine;
use crate::verify::verify_in;
use clap::{Args, ValueEnum};
use marimba_backend::CpuEngine;
use marimba_dsl::run::Backend;
use marimba_ir::DType;
use safetensors::Dtype;
use std::path::PathBuf;

/// Import a checkpoint.
#[derive(Args)]
#[command(after_help = "Example:\n  marimba import ~/models/Bamba-9B checkpoints/bamba-9b")]
pub(super) struct ImportArgs {
    /// Folder with config.json and safetensors
    dir: PathBuf,
    /// Checkpoint folder to make
    out: PathBuf,
    /// Print what was done as JSON on stdout
    #[arg(long)]
    json: bool,
}

pub(super) fn import(args: &ImportArgs) -> Result<(), CliError> {
    let report = hf::import(&args.dir, &args.out)?;
    for name in &report.not_finite {
        eprintln!("warning: {name} holds NaN or infinity");
    }
    if args.json {
        return print_json(&report);
    }
    eprintln!(
        "{}: {} parameters of family {}",
        report.path.display(),
        report.n_params,
        report.family
    );
    Ok(())
}

/// Export a checkpoint.
#[derive(Args)]
#[command(after_help = "Example:\n  marimba export runs/text/checkpoints exported/")]
pub(super) struct ExportArgs {
    /// A checkpoint, or a folder of checkpoints
    checkpoint: PathBuf,
    /// Folder to make, as transformers loads it
    out: PathBuf,
    /// model_type to write [default: the imported one, else the first that has words for the model]
    #[arg(long)]
    family: Option<String>,
    /// Element type of all tensors: f32, bf16 or f16 [default: as stored]
    #[arg(long)]
    dtype: Option<String>,
}

pub(super) fn export(args: &ExportArgs) -> Result<(), CliError> {
    let dtype = match args.dtype.as_deref() {
        None => None,
        Some("f32") => Some(Dtype::F32),
        Some("bf16") => Some(Dtype::BF16),
        Some("f16") => Some(Dtype::F16),
        Some(other) => {
            return Err(CliError::Other(format!(
                "no element type {other}; f32, bf16 and f16 exist"
            )));
        }
    };
    let options = ExportOptions {
        family: args.family.clone(),
        dtype,
    };
    let family = hf::export(&args.checkpoint, &args.out, &options)?;
    eprintln!("{}: written as {}", args.out.display(), family.model_type);
    Ok(())
}

/// Number formats in which a checkpoint can be run.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(super) enum FormatArg {
    F32,
    Bf16,
}

impl FormatArg {
    pub(super) fn dtype(self) -> DType {
        match self {
            FormatArg::F32 => DType::F32,
            FormatArg::Bf16 => DType::Bf16,
        }
    }
}

/// Verify a checkpoint.
#[derive(Args)]
#[command(
    after_help = "Example:\n  marimba verify tests/fixtures/hf/public/bamba-a --expected tests/fixtures/hf/public/bamba-a/expected.safetensors"
)]
pub(super) struct VerifyArgs {
    /// Folder with config.json and safetensors
    dir: PathBuf,
    /// Expected tensors, laid out as tests/fixtures/hf/README.md says
    #[arg(long)]
    expected: PathBuf,
    /// auto, cpu, dfdx or cuda
    #[arg(long, default_value = "auto")]
    backend: String,
    /// Number format of activations and matrices; bf16 needs a GPU, or --backend cpu, which computes in f32 and rounds what is stored
    #[arg(long, value_enum, default_value = "f32")]
    precision: FormatArg,
    /// A quirk of transformers to leave off (see ARCHITECTURE.md); by default all that the numbers may carry are on
    #[arg(long = "without-quirk", value_name = "NAME")]
    without: Vec<String>,
    /// Threads of the cpu backend [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Print the comparison as JSON on stdout
    #[arg(long)]
    json: bool,
}

pub(super) fn check(args: &VerifyArgs) -> Result<(), CliError> {
    let backend = backend_of(&args.backend)?;
    let threads = args.threads.unwrap_or_else(engine::cores);
    if let Some(unknown) = args.without.iter().find(|w| Quirk::named(w).is_none()) {
        let names: Vec<&str> = Quirk::ALL.iter().map(|(_, n)| *n).collect();
        return Err(CliError::Other(format!(
            "no quirk {unknown}; there are {}",
            names.join(", ")
        )));
    }
    let quirks: Vec<Quirk> = Quirk::ALL
        .iter()
        .map(|(q, _)| *q)
        .filter(|q| !args.without.iter().any(|w| w == q.name()))
        .collect();
    let compute = args.precision.dtype();
    let report = verify_in(
        compute,
        &args.dir,
        &args.expected,
        &quirks,
        &|| match (backend, compute) {
            (Backend::Cpu, DType::Bf16 | DType::F16) => {
                let mut engine = CpuEngine::new(threads)?;
                engine.set_half_storage(true);
                Ok(Box::new(engine))
            }
            _ => engine::open(backend, threads),
        },
    )
    .map_err(|e| CliError::Other(e.to_string()))?;
    if args.json {
        print_json(&report)?;
    } else {
        print!("{}", report.table());
    }
    if report.pass {
        Ok(())
    } else {
        Err(CliError::Other(
            "the checkpoint does not reproduce the expected numbers".into(),
        ))
    }
}

/// The backend of this name.
pub(super) fn backend_of(name: &str) -> Result<Backend, CliError> {
    match name {
        "auto" => Ok(Backend::Auto),
        "cpu" => Ok(Backend::Cpu),
        "dfdx" => Ok(Backend::Dfdx),
        "cuda" => Ok(Backend::Cuda),
        other => Err(CliError::Other(format!(
            "no backend {other}; auto, cpu, dfdx and cuda exist"
        ))),
    }
}
