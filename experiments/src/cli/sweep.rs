//! `marimba sweep FILE`

use super::{CliError, Sets, live, print_json};
use crate::record::SweepFile;
use crate::report;
use crate::slurm::ArrayJob;
use crate::sweep::{self, Ended, Finder, Found, SweepRequest};
use crate::train::device_bytes;
use crate::{engine, interrupt};
use clap::{Args, ValueEnum};

use marimba_dsl::sweep::Sweep;
use marimba_dsl::{Residual, Source, parse_sweep};
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Run all members of a sweep.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  marimba sweep experiments/quickstart.ron\n  marimba sweep experiments/quickstart.ron --dry-run\n  marimba sweep experiments/quickstart.ron --jobs 4 --resume\n  marimba sweep experiments/quickstart.ron --launcher slurm --out /shared/quickstart --slurm-option=--partition=cpu"
)]
pub(super) struct SweepArgs {
    /// A sweep file
    file: PathBuf,
    #[command(flatten)]
    sets: Sets,
    /// Members that run at the same time, as far as their memory fits; threads are shared out among them [default: one per core]
    #[arg(long)]
    jobs: Option<usize>,
    /// Threads of a member [default: the cores over the jobs; with slurm: 1]
    #[arg(long)]
    threads: Option<usize>,
    /// List the members, what they were adjusted to, and what stands in their folders; run nothing
    #[arg(long)]
    dry_run: bool,
    /// Continue members that were begun but not finished
    #[arg(long)]
    resume: bool,
    /// Folder of the sweep [default: runs/NAME]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Run only the member of this number, from 0 (may be repeated); continues it where it was begun, and makes no report
    #[arg(long = "member", value_name = "N")]
    members: Vec<usize>,
    /// Where members run
    #[arg(long, value_enum, default_value = "local")]
    launcher: Launcher,
    /// With slurm: an option of sbatch, such as --slurm-option=--partition=cpu (may be repeated)
    #[arg(long = "slurm-option", value_name = "OPTION")]
    slurm_options: Vec<String>,
    /// With slurm: wait for all tasks, then compare the members
    #[arg(long)]
    wait: bool,
    /// Print the comparison (with --dry-run: the members) as JSON on stdout
    #[arg(long)]
    json: bool,
    /// Plain lines instead of the live view, also on a terminal
    #[arg(long)]
    plain: bool,
}

/// Launchers.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Launcher {
    /// In this process, several at a time
    Local,
    /// As one array job of a Slurm cluster, a task a member
    Slurm,
}

pub(super) fn run(args: &SweepArgs) -> Result<(), CliError> {
    let source = Source::read(&args.file)?;
    let sweep = parse_sweep(&source, &args.sets.sets)?;
    let (sweep, residuals) = sweep.solve(&sweep::counts)?;
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| PathBuf::from("runs").join(&sweep.name));
    let finder = Finder::default();
    let found: Vec<Found> = sweep.members.iter().map(|m| finder.find(&out, m)).collect();
    if args.dry_run {
        return dry_run(&sweep, &residuals, &found, args.json);
    }
    if let Some(n) = args.members.iter().find(|n| **n >= sweep.members.len()) {
        return Err(CliError::Other(format!(
            "there is no member {n}; {} has members 0 to {}",
            args.file.display(),
            sweep.members.len().saturating_sub(1)
        )));
    }
    let file = SweepFile::of(&sweep, residuals.first().map(|r| r.target));
    if args.launcher == Launcher::Slurm {
        return slurm(args, &sweep, &file, &out, &found);
    }
    let begun = found.iter().filter(|f| **f == Found::Begun).count();
    if begun > 0 && !args.resume && args.members.is_empty() {
        return Err(CliError::Other(format!(
            "{begun} members in {} were begun but not finished; add --resume to continue them, or give another --out",
            out.display()
        )));
    }
    interrupt::install();
    let only = (!args.members.is_empty()).then_some(args.members.as_slice());
    if only.is_none() {
        file.write(&out)?;
    } else if sweep.halving.is_some() {
        return Err(CliError::Other(
            "a member of a sweep with halving cannot run alone: the others decide how far it goes; leave --member out"
                .into(),
        ));
    }
    let request = SweepRequest {
        sweep: &sweep,
        source: &source.text,
        out: &out,
        jobs: args.jobs.unwrap_or_else(engine::cores).max(1),
        threads: args.threads,
        only,
    };
    // A member that runs alone is a task of a cluster's job, whose output is a log.
    let plain = args.plain || only.is_some();
    let ended = sweep::run(&request, live::observer(&sweep, &found, plain));

    let failed: Vec<&str> = ended
        .iter()
        .filter_map(|e| match e {
            Ended::Failed(why) => Some(why.as_str()),
            Ended::AlreadyDone
            | Ended::Finished(_)
            | Ended::Halved(_)
            | Ended::Paused(_)
            | Ended::Interrupted
            | Ended::NotBegun => None,
        })
        .collect();
    let chosen = |i: &usize| only.is_none_or(|o| o.contains(i));
    let stopped = (0..ended.len()).filter(chosen).any(|i| {
        matches!(
            ended[i],
            Ended::Interrupted | Ended::NotBegun | Ended::Paused(_)
        )
    });
    if only.is_none() {
        conclude(&file, &out, args.json)?;
    }
    if stopped {
        eprintln!(
            "stopped; continue with: marimba sweep {} --out {} --resume",
            args.file.display(),
            out.display()
        );
        return Err(CliError::Interrupted);
    }
    match failed[..] {
        [] => Ok(()),
        [why] if only.is_some() => Err(CliError::Other(why.to_owned())),
        _ if failed.len() == ended.len() => Err(CliError::Other(
            "all members failed, as said above".to_owned(),
        )),
        _ => Err(CliError::Other(format!(
            "{} of {} members failed, as said above; the others are in the table",
            failed.len(),
            ended.len()
        ))),
    }
}

/// Lists what would run.
fn dry_run(
    sweep: &Sweep,
    residuals: &[Residual],
    found: &[Found],
    as_json: bool,
) -> Result<(), CliError> {
    let word = |f: &Found| match f {
        Found::Nothing => "to run".to_owned(),
        Found::Done(_) => "done".to_owned(),
        Found::Begun => "begun".to_owned(),
        Found::Stopped(step) => format!("ended by halving at step {step}"),
        Found::Other(what) => format!("another {what} is there"),
    };
    let held = sweep.hold.as_ref().map(|h| h.quantity.name());
    if as_json {
        let rows = sweep.members.iter().zip(found).enumerate().map(|(i, (m, f))| {
            let mut row = json!({ "member": m.name, "group": m.group, "state": word(f), "device_bytes": device_bytes(&m.run), "set": m.set.iter().cloned().collect::<BTreeMap<_, _>>() });
            if let (Some(r), Some(map)) = (residuals.get(i), row.as_object_mut()) {
                map.insert("held".into(), json!({ "quantity": held, "target": r.target, "reached": r.reached, "residual": r.relative(), "knobs": r.knobs.iter().cloned().collect::<BTreeMap<_, _>>() }));
            }
            row
        });
        return print_json(&rows.collect::<Vec<_>>());
    }
    let width = sweep.members.iter().map(|m| m.name.chars().count()).max();
    let width = width.unwrap_or(0).max("member".len());
    let mut text = String::new();
    if let (Some(quantity), Some(first)) = (held, residuals.first()) {
        let _ = writeln!(text, "held: {quantity} = {}\n", first.target);
        let _ = writeln!(
            text,
            "{:width$}  {:>16}  {:>8}  {:34}  state",
            "member", quantity, "off", "turned"
        );
    }
    for (i, (member, found)) in sweep.members.iter().zip(found).enumerate() {
        let _ = write!(text, "{:width$}  ", member.name);
        if let Some(r) = residuals.get(i) {
            let knobs: Vec<String> = r.knobs.iter().map(|(k, v)| format!("{k} = {v}")).collect();
            let knobs = if knobs.is_empty() {
                "–".into()
            } else {
                knobs.join(", ")
            };
            let _ = write!(
                text,
                "{:>16}  {:>8}  {knobs:34}  ",
                r.reached,
                report::table::percent(r.relative())
            );
        }
        let _ = writeln!(text, "{}", word(found));
    }
    print!("{text}");
    if let Some(h) = sweep.halving {
        let total = sweep.members.iter().map(|m| m.run.total_steps()).max();
        let rungs = h.rungs(total.unwrap_or(0));
        println!(
            "\nhalving: one in {} goes on after the steps {rungs:?}",
            h.factor
        );
    }
    Ok(())
}

/// Submits what is not done as an array job.
fn slurm(
    args: &SweepArgs,
    sweep: &Sweep,
    file: &SweepFile,
    out: &Path,
    found: &[Found],
) -> Result<(), CliError> {
    if sweep.halving.is_some() {
        return Err(CliError::Other(
            "halving compares members while they run, which tasks of an array job cannot do; take halving out, or run with --launcher local"
                .into(),
        ));
    }
    let wanted = |i: &usize| args.members.is_empty() || args.members.contains(i);
    let members: Vec<usize> = (0..found.len())
        .filter(wanted)
        .filter(|&i| !matches!(found[i], Found::Done(_)))
        .collect();
    file.write(out)?;
    if members.is_empty() {
        eprintln!("all members are done");
        return conclude(file, out, args.json);
    }
    let absolute = |p: &Path| std::path::absolute(p);
    let (out, cwd) = (absolute(out)?, std::env::current_dir()?);
    let threads = args.threads.unwrap_or(1).max(1);
    let mut command = vec![
        std::env::current_exe()?.display().to_string(),
        "sweep".to_owned(),
        absolute(&args.file)?.display().to_string(),
    ];
    for set in &args.sets.sets {
        command.extend(["--set".to_owned(), format!("{}={}", set.path, set.value)]);
    }
    command.extend(["--out".to_owned(), out.display().to_string()]);
    command.extend(["--threads".to_owned(), threads.to_string()]);
    let job = ArrayJob {
        name: &sweep.name,
        members: &members,
        at_once: args.jobs,
        threads,
        command: &command,
        options: &args.slurm_options,
        out: &out,
        cwd: &cwd,
    };
    if args.wait {
        eprintln!("waiting for {} tasks", members.len());
    }
    let id = job
        .submit(args.wait)
        .map_err(|e| CliError::Other(e.to_string()))?;
    if args.wait {
        return conclude(file, &out, args.json);
    }
    eprintln!(
        "submitted job {id}: {} members; logs in {}; once done (or before): marimba compare {}",
        members.len(),
        out.join(crate::slurm::SLURM_DIR).display(),
        out.display()
    );
    Ok(())
}

/// Table, report and what to do next.
fn conclude(file: &SweepFile, out: &Path, json: bool) -> Result<(), CliError> {
    let runs = match report::load::load(&[out.to_path_buf()]) {
        Ok(runs) => runs,
        Err(report::LoadError::NoRuns { .. }) => {
            eprintln!("no member has come as far as a run; there is nothing to compare");
            return Ok(());
        }
        Err(e) => return Err(CliError::Other(e.to_string())),
    };
    let options = report::compare::Options::of_sweep(file);
    let comparison = report::compare::compare(&runs, &options);
    let html = out.join("report.html");
    report::html::write(&html, &comparison, &runs)?;
    if json {
        print_json(&comparison)?;
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
