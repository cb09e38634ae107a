//! `marimba sweep FILE`

use super::{CliError, Sets, live};
use crate::report;
use crate::sweep::{self, Ended, Found};
use crate::{engine, interrupt};
use clap::Args;
use marimba_dsl::sweep::Sweep;
use marimba_dsl::{Source, parse_sweep};
use std::path::{Path, PathBuf};

/// Run all members of a sweep.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  marimba sweep experiments/quickstart.ron\n  marimba sweep experiments/quickstart.ron --dry-run\n  marimba sweep experiments/quickstart.ron --jobs 4 --resume"
)]
pub(super) struct SweepArgs {
    /// A sweep file
    file: PathBuf,
    #[command(flatten)]
    sets: Sets,
    /// Members that run at the same time; threads are shared out among them [default: one per core]
    #[arg(long)]
    jobs: Option<usize>,
    /// List the members and what stands in their folders; run nothing
    #[arg(long)]
    dry_run: bool,
    /// Continue members that were begun but not finished
    #[arg(long)]
    resume: bool,
    /// Folder of the sweep [default: runs/NAME]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Print the comparison as JSON on stdout
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &SweepArgs) -> Result<(), CliError> {
    let source = Source::read(&args.file)?;
    let sweep = parse_sweep(&source, &args.sets.sets)?;
    if sweep.hold.is_some() || sweep.halving.is_some() {
        return Err(CliError::Other(format!(
            "{}: hold and halving are checked but cannot be run yet; take them out to run all members as they are written",
            args.file.display()
        )));
    }
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| PathBuf::from("runs").join(&sweep.name));
    let found: Vec<Found> = sweep.members.iter().map(|m| sweep::find(&out, m)).collect();
    if args.dry_run {
        for (member, found) in sweep.members.iter().zip(&found) {
            let word = match found {
                Found::Nothing => "to run",
                Found::Done(_) => "done",
                Found::Begun => "begun",
                Found::Other => "another configuration is there",
            };
            println!("{:32} {word}", member.name);
        }
        return Ok(());
    }
    let begun = found.iter().filter(|f| **f == Found::Begun).count();
    if begun > 0 && !args.resume {
        return Err(CliError::Other(format!(
            "{begun} members in {} were begun but not finished; add --resume to continue them, or give another --out",
            out.display()
        )));
    }
    interrupt::install();
    let jobs = args.jobs.unwrap_or_else(engine::cores).max(1);
    let ended = sweep::run(&sweep, &source.text, &out, jobs, live::observer(&sweep));

    let failed = ended
        .iter()
        .filter(|e| matches!(e, Ended::Failed(_)))
        .count();
    let stopped = ended
        .iter()
        .any(|e| matches!(e, Ended::Interrupted | Ended::NotBegun));
    conclude(&sweep, &out, args.json)?;
    if stopped {
        eprintln!(
            "stopped; continue with: marimba sweep {} --out {} --resume",
            args.file.display(),
            out.display()
        );
        return Err(CliError::Interrupted);
    }
    if failed > 0 {
        return Err(CliError::Other(format!(
            "{failed} of {} members failed; the table shows the others",
            ended.len()
        )));
    }
    Ok(())
}

/// Table, report and what to do next.
fn conclude(sweep: &Sweep, out: &Path, json: bool) -> Result<(), CliError> {
    let runs =
        report::load::load(&[out.to_path_buf()]).map_err(|e| CliError::Other(e.to_string()))?;
    let goal = match sweep.goal {
        marimba_dsl::run::Goal::Max => report::stats::Goal::Higher,
        marimba_dsl::run::Goal::Min => report::stats::Goal::Lower,
    };
    let metric = if sweep.metric.contains('/') {
        sweep.metric.clone()
    } else {
        format!("eval/{}", sweep.metric)
    };
    let options = report::compare::Options {
        metric: Some(metric),
        goal: Some(goal),
        baseline: None,
        title: Some(sweep.name.clone()),
        question: None,
    };
    let comparison = report::compare::compare(&runs, &options);
    let html = out.join("report.html");
    report::html::write(&html, &comparison, &runs)?;
    if json {
        super::print_json(&comparison)?;
    } else {
        print!(
            "{}",
            report::table::terminal(&comparison, super::compare::terminal_width())
        );
    }
    eprintln!(
        "report: {}   curves: tensorboard --logdir {}",
        html.display(),
        out.display()
    );
    Ok(())
}
