//! `marimba sweep FILE`

use super::{CliError, Sets, human, interactive};
use crate::report;
use crate::sweep::{self, Ended, Found, SweepObserver};
use crate::{engine, interrupt};
use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use marimba_dsl::sweep::Sweep;
use marimba_dsl::{Source, parse_sweep};
use std::collections::{BTreeMap, HashMap};
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
    let ended = sweep::run(&sweep, &source.text, &out, jobs, display(&sweep));

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

fn display(sweep: &Sweep) -> Box<dyn SweepObserver> {
    let names: Vec<String> = sweep.members.iter().map(|m| m.name.clone()).collect();
    if interactive() {
        Box::new(Bars::new(names))
    } else {
        Box::new(Lines { names })
    }
}

/// Plain lines, for logs.
struct Lines {
    names: Vec<String>,
}

impl SweepObserver for Lines {
    fn begin(&mut self, member: usize, steps: usize) {
        eprintln!("{}: begins, {steps} steps", self.names[member]);
    }
    fn step(&mut self, _: usize, _: usize, _: f64) {}
    fn eval(&mut self, member: usize, step: usize, metrics: &BTreeMap<String, f64>) {
        eprintln!("{}: step {step}  {}", self.names[member], scores(metrics));
    }
    fn note(&mut self, member: usize, text: &str) {
        eprintln!("{}: {text}", self.names[member]);
    }
    fn end(&mut self, member: usize, ended: &Ended) {
        eprintln!("{}: {}", self.names[member], words(ended));
    }
}

/// A bar for the sweep and one for each member that runs.
struct Bars {
    names: Vec<String>,
    all: MultiProgress,
    total: ProgressBar,
    bars: HashMap<usize, (ProgressBar, f64)>,
    scores: HashMap<usize, String>,
}

impl Bars {
    fn new(names: Vec<String>) -> Self {
        let all = MultiProgress::new();
        let total = all.add(ProgressBar::new(names.len() as u64));
        total.set_style(style("{bar:30} {pos}/{len} members  {elapsed}"));
        total.enable_steady_tick(std::time::Duration::from_millis(500));
        Bars {
            names,
            all,
            total,
            bars: HashMap::new(),
            scores: HashMap::new(),
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl SweepObserver for Bars {
    fn begin(&mut self, member: usize, steps: usize) {
        let bar = self.all.add(ProgressBar::new(steps as u64));
        bar.set_style(style("  {prefix:32} {bar:20} {pos}/{len}  {msg}"));
        bar.set_prefix(self.names[member].clone());
        self.bars.insert(member, (bar, f64::NAN));
    }
    fn step(&mut self, member: usize, step: usize, loss: f64) {
        if let Some((bar, mean)) = self.bars.get_mut(&member) {
            *mean = if mean.is_finite() {
                0.95 * *mean + 0.05 * loss
            } else {
                loss
            };
            bar.set_position(step as u64);
            bar.set_message(format!(
                "loss {mean:.3}  {}",
                self.scores.get(&member).map_or("", String::as_str)
            ));
        }
    }
    fn eval(&mut self, member: usize, _: usize, metrics: &BTreeMap<String, f64>) {
        self.scores.insert(member, scores(metrics));
    }
    fn note(&mut self, member: usize, text: &str) {
        let _ = self
            .all
            .println(format!("  {}: {text}", self.names[member]));
    }
    fn end(&mut self, member: usize, ended: &Ended) {
        if let Some((bar, _)) = self.bars.remove(&member) {
            bar.finish_and_clear();
        }
        let _ = self
            .all
            .println(format!("  {:32} {}", self.names[member], words(ended)));
        self.total.inc(1);
    }
}

fn scores(metrics: &BTreeMap<String, f64>) -> String {
    let shown = metrics.iter().filter(|(n, _)| !n.contains('/'));
    shown
        .map(|(n, v)| format!("{n} {v:.3}"))
        .collect::<Vec<_>>()
        .join("  ")
}

fn words(ended: &Ended) -> String {
    match ended {
        Ended::AlreadyDone => "was done before".into(),
        Ended::Finished(s) => {
            let metrics: BTreeMap<String, f64> = s
                .final_metrics
                .iter()
                .filter_map(|(n, v)| n.strip_prefix("eval/").map(|n| (n.to_string(), *v)))
                .collect();
            format!(
                "done  {}  {} tokens/s",
                scores(&metrics),
                human(s.tokens_per_sec)
            )
        }
        Ended::Interrupted => "stopped, checkpoint written".into(),
        Ended::Failed(why) => format!("failed: {why}"),
        Ended::NotBegun => "not begun".into(),
    }
}
