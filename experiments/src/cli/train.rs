//! `marimba train RUN`

use super::progress::RunProgress;
use super::{CliError, Sets, interactive, print_json};
use crate::train::{Finish, TrainRequest, train};
use crate::{engine, interrupt};
use clap::Args;
use marimba_dsl::{Set, Source, parse_run};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Train a run.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  marimba train experiments/text.ron --set data.path=book.txt\n  marimba train experiments/text.ron --out runs/text --resume"
)]
pub(super) struct TrainArgs {
    /// A run file
    run: PathBuf,
    #[command(flatten)]
    sets: Sets,
    /// Run folder [default: runs/NAME]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Continue the run in the folder from its newest checkpoint
    #[arg(long)]
    resume: bool,
    /// auto, cpu, dfdx or cuda
    #[arg(long)]
    backend: Option<String>,
    /// Threads of the cpu backend [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Launch kernel by kernel instead of replaying CUDA graphs
    #[arg(long)]
    no_graph: bool,
    /// Print the summary as JSON on stdout
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &TrainArgs) -> Result<(), CliError> {
    let source = Source::read(&args.run)?;
    let mut sets = args.sets.sets.clone();
    sets.extend(args.backend.as_ref().map(|b| Set::new("backend", b)));
    let run = parse_run(&source, &sets)?;
    let resolved = run.to_ron();
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| PathBuf::from("runs").join(&run.name));
    interrupt::install();
    let request = TrainRequest {
        run: &run,
        source: &source.text,
        resolved: &resolved,
        out: &out,
        resume: args.resume,
        until: None,
        threads: args.threads.unwrap_or_else(engine::cores),
        graphs: !args.no_graph,
        group: &run.name,
        axes: BTreeMap::new(),
    };
    let outcome = train(&request, &mut RunProgress::new(interactive()))?;
    if args.json {
        print_json(&outcome.summary)?;
    }
    let checkpoint = outcome
        .checkpoint
        .map_or_else(|| "none".to_string(), |p| p.display().to_string());
    match outcome.finish {
        Finish::Finished => {
            eprintln!(
                "finished after {} steps; checkpoint {checkpoint}; look at it with: tensorboard --logdir {}",
                outcome.step,
                out.display()
            );
            Ok(())
        }
        Finish::Interrupted | Finish::Paused => {
            eprintln!(
                "stopped after step {}; checkpoint {checkpoint}; continue with: {}",
                outcome.step,
                again(&out)
            );
            Err(CliError::Interrupted)
        }
    }
}

/// This command line, made to resume.
fn again(out: &std::path::Path) -> String {
    let quote = |a: String| {
        let plain = a
            .chars()
            .all(|c| c.is_alphanumeric() || "-_./=,:+%@".contains(c));
        if plain {
            a
        } else {
            format!("'{}'", a.replace('\'', "'\\''"))
        }
    };
    let mut words: Vec<String> = std::env::args().map(quote).collect();
    if !words
        .iter()
        .any(|w| w == "--out" || w.starts_with("--out="))
    {
        words.push(format!("--out {}", quote(out.display().to_string())));
    }
    if !words.iter().any(|w| w == "--resume") {
        words.push("--resume".into());
    }
    words.join(" ")
}
