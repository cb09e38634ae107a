//! `marimba compare DIR...`

use super::{CliError, print_json};
use crate::record::SweepFile;
use crate::record::files::write_atomic;
use crate::report;
use clap::Args;
use std::path::PathBuf;

/// Compare runs.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  marimba compare runs/quickstart --html report.html\n  marimba compare runs/a runs/b            # also explains the difference"
)]
pub(super) struct CompareArgs {
    /// Run folders, folders of runs, or folders with TensorBoard event files of any writer
    #[arg(required = true)]
    dirs: Vec<PathBuf>,
    /// Metric that decides, such as eval/accuracy [default: one that all runs share]
    #[arg(long)]
    metric: Option<String>,
    /// Group that the others are tested against [default: the best]
    #[arg(long)]
    baseline: Option<String>,
    /// Write a self-contained report with learning curves
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the table as CSV
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Print the comparison as JSON on stdout
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &CompareArgs) -> Result<(), CliError> {
    let runs = report::load::load(&args.dirs).map_err(|e| CliError::Other(e.to_string()))?;
    let mut options = match &args.dirs[..] {
        [dir] => SweepFile::read(dir)?
            .map(|f| report::compare::Options::of_sweep(&f))
            .unwrap_or_default(),
        _ => report::compare::Options::default(),
    };
    if args.metric.is_some() {
        (options.metric, options.goal) = (args.metric.clone(), None);
    }
    options.baseline = args.baseline.clone().or(options.baseline);
    let comparison = report::compare::compare(&runs, &options);
    if let Some(path) = &args.html {
        report::html::write(path, &comparison, &runs)?;
    }
    if let Some(path) = &args.csv {
        write_atomic(path, report::table::csv(&comparison).as_bytes())?;
    }
    if args.json {
        return print_json(&comparison);
    }
    print!("{}", report::table::terminal(&comparison, terminal_width()));
    if let [a, b] = &runs[..] {
        print!("\n{}", report::explain::explain(a, b).text());
    }
    Ok(())
}

/// Columns of the terminal; 110 where there is none.
pub(super) fn terminal_width() -> usize {
    use std::io::IsTerminal;
    let asked = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok());
    if std::io::stdout().is_terminal() {
        asked
            .or_else(|| terminal_size::terminal_size().map(|(w, _)| usize::from(w.0)))
            .unwrap_or(110)
    } else {
        asked.unwrap_or(110)
    }
}
