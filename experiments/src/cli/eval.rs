//! `marimba eval CHECKPOINT...`

use super::{CliError, Sets, print_json};
use crate::checkpoint::Weights;
use crate::engine;
use crate::formats::{Format, FormatScore, score_formats};
use crate::record::files::write_atomic;
use crate::report::table::quote;
use clap::Args;
use marimba_dsl::{Source, parse_run};
use serde_json::json;
use std::path::PathBuf;

/// Evaluate checkpoints, in several number formats side by side.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  marimba eval runs/text\n  marimba eval runs/text --formats f32,bf16,f16 --rows 64\n  marimba eval ./Bamba-9B --run my-text.ron --csv formats.csv\n\nThe native backend computes: activations and matrices are rounded to the format after every op, sums stay in f32."
)]
pub(super) struct EvalArgs {
    /// Run folders, Marimba checkpoints, folders of them (the latest counts), or Hugging Face folders
    #[arg(required = true)]
    checkpoints: Vec<PathBuf>,
    /// Number formats: f32, bf16, f16
    #[arg(long, value_delimiter = ',', default_value = "f32", value_parser = parse_format)]
    formats: Vec<Format>,
    /// A run file whose evaluation sets are used [default: the run that made the checkpoint]
    #[arg(long)]
    run: Option<PathBuf>,
    #[command(flatten)]
    sets: Sets,
    /// At most this many rows of each set [default: as the run says]
    #[arg(long)]
    rows: Option<usize>,
    /// Threads [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Write one line per checkpoint, format and set as CSV
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Print everything, with the range of every activation, as JSON on stdout
    #[arg(long)]
    json: bool,
}

fn parse_format(text: &str) -> Result<Format, String> {
    Format::named(text).ok_or_else(|| {
        let names: Vec<&str> = Format::ALL.iter().map(|f| f.name()).collect();
        format!("no number format {text}; there are {}", names.join(", "))
    })
}

/// One line of the table: a checkpoint in a format on a set.
struct Line {
    cells: [String; 11],
}

const HEAD: [&str; 11] = [
    "checkpoint",
    "step",
    "format",
    "set",
    "loss",
    "accuracy",
    "targets",
    "not_finite",
    "largest",
    "largest_at",
    "share_beyond_f16",
];

pub(super) fn run(args: &EvalArgs) -> Result<(), CliError> {
    let threads = args.threads.unwrap_or_else(engine::cores);
    let (mut lines, mut facts) = (Vec::new(), Vec::new());
    for path in &args.checkpoints {
        let weights = Weights::open(path)?;
        let source = match (&args.run, weights.run_ron()) {
            (Some(file), _) => Source::read(file)?,
            (None, Some(text)) => Source::new("run.ron", text),
            (None, None) => {
                return Err(CliError::Other(format!(
                    "{} was not made by a run, so nothing says what to evaluate on; give a run file with --run",
                    path.display()
                )));
            }
        };
        let run = parse_run(&source, &args.sets.sets)?;
        let rows = args
            .rows
            .or_else(|| run.phases.last().map(|p| p.eval.rows))
            .unwrap_or(256);
        let scores = score_formats(&weights, &run, &args.formats, rows, threads)?;
        for s in &scores {
            lines.extend(table(&path.display().to_string(), weights.step(), s));
        }
        facts.push(json!({ "checkpoint": path, "step": weights.step(), "formats": scores }));
    }
    if let Some(path) = &args.csv {
        let row = |cells: &[String]| {
            cells
                .iter()
                .cloned()
                .map(quote)
                .collect::<Vec<_>>()
                .join(",")
        };
        let mut text = HEAD.join(",");
        for line in &lines {
            text.push_str("\r\n");
            text.push_str(&row(&line.cells));
        }
        text.push_str("\r\n");
        write_atomic(path, text.as_bytes())?;
    }
    if args.json {
        return print_json(&facts);
    }
    let width = |i: usize| {
        let cells = lines.iter().map(|l| l.cells[i].len());
        cells.chain([HEAD[i].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let head = HEAD.map(str::to_owned);
    for cells in std::iter::once(&head).chain(lines.iter().map(|l| &l.cells)) {
        let padded: Vec<String> = cells
            .iter()
            .zip(&widths)
            .map(|(c, w)| format!("{c:w$}"))
            .collect();
        println!("{}", padded.join("  ").trim_end());
    }
    Ok(())
}

fn table(checkpoint: &str, step: Option<u64>, s: &FormatScore) -> Vec<Line> {
    let (largest, at) = s.largest().map_or((0.0, ""), |t| (t.max, t.tap.as_str()));
    let sets = s.sets.iter().map(|r| Line {
        cells: [
            checkpoint.to_owned(),
            step.map(|n| n.to_string()).unwrap_or_default(),
            s.format.name().to_owned(),
            r.set.clone(),
            format!("{:.6}", r.loss),
            r.accuracy.map(|a| format!("{a:.6}")).unwrap_or_default(),
            r.targets.to_string(),
            r.lost.to_string(),
            format!("{largest:.6e}"),
            at.to_owned(),
            format!("{:.3e}", s.share_beyond_f16()),
        ],
    });
    sets.collect()
}
