//! `marimba check FILE...`

use super::files::{FileKind, check_file};
use super::{CliError, Sets, print_json};
use clap::Args;
use marimba_dsl::{Report, Source};
use serde_json::json;
use std::path::PathBuf;

/// Check files.
#[derive(Args)]
#[command(
    after_help = "Example:\n  marimba check experiments/quickstart.ron experiments/models/*.ron"
)]
pub(super) struct CheckArgs {
    /// Model, run or sweep files
    #[arg(required = true)]
    files: Vec<PathBuf>,
    #[command(flatten)]
    sets: Sets,
    /// Print the findings as JSON on stdout
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &CheckArgs) -> Result<(), CliError> {
    let mut facts = Vec::new();
    let mut failed = String::new();
    for file in &args.files {
        let result: Result<FileKind, Report> =
            Source::read(file).and_then(|source| check_file(&source, &args.sets.sets));
        match result {
            Ok(kind) => {
                if !args.json {
                    eprintln!("{}: a {kind}, no errors", file.display());
                }
                facts.push(json!({ "file": file, "ok": true, "kind": kind.to_string(), "diagnostics": [] }));
            }
            Err(report) => {
                facts.push(json!({ "file": file, "ok": false, "diagnostics": report.facts() }));
                failed.push_str(&report.for_stderr());
            }
        }
    }
    if args.json {
        print_json(&facts)?;
    }
    if failed.is_empty() {
        Ok(())
    } else {
        Err(CliError::Report(failed))
    }
}
