//! `marimba compare DIR...`

use super::{CliError, print_json};
use crate::record::SweepFile;
use crate::record::files::write_atomic;
use crate::record::{Goal, tags};
use crate::report;
use crate::report::compare::Comparison;
use crate::report::explain::Explanation;
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::path::PathBuf;

/// Compare runs.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  marimba compare runs/quickstart --html report.html\n  marimba compare runs/a runs/b            # also explains the difference",
    after_long_help = long_help()
)]
pub(super) struct CompareArgs {
    /// Run folders, folders of runs, or folders with TensorBoard event files of any writer
    #[arg(required = true)]
    dirs: Vec<PathBuf>,
    /// Metric that decides, such as eval/accuracy [default: one that all runs share]
    #[arg(long)]
    metric: Option<String>,
    /// Which direction of it is good [default: by its name]
    #[arg(long, value_enum)]
    goal: Option<Good>,
    /// Group that the others are tested against [default: the best]
    #[arg(long)]
    baseline: Option<String>,
    /// Write a self-contained report with learning curves
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the table as CSV
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write the scaling laws as CSV
    #[arg(long, value_name = "FILE")]
    laws: Option<PathBuf>,
    /// Print the comparison as JSON on stdout
    #[arg(long)]
    json: bool,
}

/// Directions.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Good {
    /// More is better
    Higher,
    /// Less is better
    Lower,
}

fn long_help() -> String {
    format!(
        "Examples:\n  marimba compare runs/quickstart --html report.html\n  marimba compare runs/a runs/b            # also explains the difference\n  \
         marimba compare lightning_logs --metric val_loss\n\nColumns of --csv, one line per configuration:\n{}\n\nColumns of --laws, one line per scaling law:\n{}\n\n\
         Fields of --json: title, question, metric, goal, reference, verdict (sentences), notes, metrics, groups, laws (scaling laws),\n\
         members (runs), and explanation where there are two runs. A group has the columns above as fields; each metric is\n\
         {{n, n_non_finite, mean, sd, ci95}}, test is {{method, n, difference, ci95, p, p_adjusted, verdict}}; null is unknown.",
        report::table::CSV_COLUMNS,
        report::table::LAW_COLUMNS
    )
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    #[serde(flatten)]
    comparison: &'a Comparison,
    #[serde(skip_serializing_if = "Option::is_none")]
    explanation: Option<Explanation>,
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
    if let Some(goal) = args.goal {
        options.goal = Some(match goal {
            Good::Higher => Goal::Higher,
            Good::Lower => Goal::Lower,
        });
    }
    options.baseline = args.baseline.clone().or(options.baseline);
    let comparison = report::compare::compare(&runs, &options);
    refuse_unknown(args, &comparison)?;
    if let Some(path) = &args.html {
        report::html::write(path, &comparison, &runs)?;
    }
    if let Some(path) = &args.csv {
        write_atomic(path, report::table::csv(&comparison).as_bytes())?;
    }
    if let Some(path) = &args.laws {
        write_atomic(path, report::table::laws_csv(&comparison).as_bytes())?;
    }
    let explanation = match &runs[..] {
        [a, b] => Some(report::explain::explain(a, b)),
        _ => None,
    };
    if args.json {
        return print_json(&Output {
            comparison: &comparison,
            explanation,
        });
    }
    print!("{}", report::table::terminal(&comparison, terminal_width()));
    if let Some(explanation) = explanation {
        print!("\n{}", explanation.text());
    }
    Ok(())
}

/// What was asked for by name must be there: a table of something else would be taken for it.
fn refuse_unknown(args: &CompareArgs, c: &Comparison) -> Result<(), CliError> {
    let metric = |m: &String| {
        c.metric
            .as_ref()
            .is_some_and(|found| found == m || found == &tags::eval(m))
    };
    let group = |g: &String| c.groups.iter().any(|found| &found.name == g);
    let metric_known = args.metric.as_ref().is_none_or(metric);
    if metric_known && args.baseline.as_ref().is_none_or(group) {
        return Ok(());
    }
    let why = c.notes.iter().find(|n| {
        n.starts_with(if metric_known {
            "There is no group"
        } else {
            "No run has"
        })
    });
    let why = why.map_or("no run has a metric", |n| n.trim_end_matches('.'));
    let mut chars = why.chars();
    let first = chars.next().map(|c| c.to_lowercase().to_string());
    Err(CliError::Other(format!(
        "{}{}",
        first.unwrap_or_default(),
        chars.as_str()
    )))
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
