//! The command line: arguments become checked requests here, and nowhere else.
//!
//! Facts go to stdout, everything else to stderr. Exit codes: 0 done, 1 an error that was explained, 130 interrupted.

mod bench;
mod check;
mod compare;
pub mod data;
mod doctor;
mod eval;
mod files;
mod generate;
mod hf;
mod live;
mod progress;
mod show;
mod sweep;
mod train;

use clap::{Args, CommandFactory, Parser, Subcommand};
use marimba_dsl::{Report, Set};
use std::io::IsTerminal;
use std::process::ExitCode;

/// A research workbench for hybrid sequence models.
#[derive(Parser)]
#[command(
    name = "marimba",
    version,
    max_term_width = 110,
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

/// The verbs.
#[derive(Subcommand)]
enum Verb {
    /// Check model, run and sweep files and report everything wrong with them
    Check(check::CheckArgs),
    /// Show a model: layers, parameters, FLOPs, memory; its graph and plan
    Show(show::ShowArgs),
    /// Train a run
    Train(train::TrainArgs),
    /// Run all members of a sweep and compare them
    Sweep(sweep::SweepArgs),
    /// Compare runs: a table, and a report with learning curves
    Compare(compare::CompareArgs),
    /// Evaluate checkpoints, in several number formats side by side
    Eval(eval::EvalArgs),
    /// Continue a prompt with a trained model
    Generate(generate::GenerateArgs),
    /// Make a checkpoint of a Hugging Face folder
    Import(hf::ImportArgs),
    /// Write a checkpoint as a Hugging Face folder
    Export(hf::ExportArgs),
    /// Compare a Hugging Face checkpoint with expected numbers
    Verify(hf::VerifyArgs),
    /// Look at data, prepare it, and ask what a run reads
    #[command(subcommand)]
    Data(data::DataCmd),
    /// Measure speed against this machine's own ceilings
    #[command(subcommand)]
    Bench(bench::BenchCmd),
    /// Say what this machine has and what that means
    Doctor(doctor::DoctorArgs),
    /// Print a completion script: marimba completions bash > /etc/bash_completion.d/marimba
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Overrides, on every verb that reads RON.
#[derive(Args, Clone, Debug, Default)]
pub struct Sets {
    /// Override a value of the file, such as --set model.d_model=512 (may be repeated)
    #[arg(long = "set", value_name = "PATH=VALUE", value_parser = parse_set)]
    sets: Vec<Set>,
}

fn parse_set(text: &str) -> Result<Set, String> {
    match text.split_once('=') {
        Some((path, value)) if !path.trim().is_empty() => Ok(Set::new(path.trim(), value)),
        _ => Err("expected PATH=VALUE, such as model.d_model=512".to_string()),
    }
}

/// An error that the user can read.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Violations of a file, already rendered with their places.
    #[error("{0}")]
    Report(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
    /// The user stopped it; what to do next was said.
    #[error("interrupted")]
    Interrupted,
}

impl From<Report> for CliError {
    fn from(report: Report) -> Self {
        CliError::Report(report.for_stderr())
    }
}

macro_rules! other {
    ($($ty:ty),* $(,)?) => { $(impl From<$ty> for CliError {
        fn from(e: $ty) -> Self {
            CliError::Other(e.to_string())
        }
    })* };
}

other!(
    crate::train::TrainError,
    crate::bench::BenchError,
    crate::program::CompileError,
    crate::record::RecordError,
    crate::checkpoint::CheckpointError,
    crate::data::DataError,
    crate::generate::GenerateError,
    crate::chat::ChatError,
    marimba_backend::BackendError,
    marimba_ir::TypeError,
    std::io::Error,
    serde_json::Error,
);

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.verb {
        Verb::Check(args) => check::run(&args),
        Verb::Show(args) => show::run(&args),
        Verb::Train(args) => train::run(&args),
        Verb::Sweep(args) => sweep::run(&args),
        Verb::Compare(args) => compare::run(&args),
        Verb::Eval(args) => eval::run(&args),
        Verb::Generate(args) => generate::run(&args),
        Verb::Import(args) => hf::import(&args),
        Verb::Export(args) => hf::export(&args),
        Verb::Verify(args) => hf::check(&args),
        Verb::Data(cmd) => data::run(&cmd).map_err(|e| CliError::Other(e.to_string())),
        Verb::Bench(cmd) => bench::run(&cmd),
        Verb::Doctor(args) => doctor::run(&args),
        Verb::Completions { shell } => {
            let mut command = Cli::command();
            clap_complete::generate(shell, &mut command, "marimba", &mut std::io::stdout());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(CliError::Interrupted) => ExitCode::from(130),
        Err(CliError::Report(text)) => {
            eprint!("{text}");
            ExitCode::FAILURE
        }
        Err(CliError::Other(text)) => {
            eprintln!("error: {text}");
            ExitCode::FAILURE
        }
    }
}

/// Whether a person watches.
fn interactive() -> bool {
    std::io::stderr().is_terminal()
}

/// Prints a JSON document on stdout.
fn print_json(value: &impl serde::Serialize) -> Result<(), CliError> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// `1234567` as `1.23 M`.
fn human(n: f64) -> String {
    let units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match units.iter().find(|(size, _)| n.abs() >= *size) {
        Some((size, unit)) => format!("{:.2} {unit}", n / size),
        None => format!("{n:.0}"),
    }
}

/// Bytes with a binary unit.
fn human_bytes(n: u64) -> String {
    let units = [
        (1u64 << 40, "TiB"),
        (1 << 30, "GiB"),
        (1 << 20, "MiB"),
        (1 << 10, "KiB"),
    ];
    match units.iter().find(|(size, _)| n >= *size) {
        Some((size, unit)) => format!("{:.2} {unit}", n as f64 / *size as f64),
        None => format!("{n} B"),
    }
}
