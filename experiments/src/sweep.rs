//! Sweeps: members run in a local pool, fail alone, resume, and are never run twice.
//!
//! A member's folder is `<out>/<member>`. Whether it is done is decided by its `summary.json`: finished, and of the same configuration
//! hash. A member whose folder holds another configuration is refused, never overwritten.

use crate::engine;
use crate::facts::Facts;
use crate::interrupt;
use crate::record::files::content_hash;
use crate::record::{RunState, RunSummary, run_dir, summary};
use crate::train::{Finish, LogLine, Observer, StepOutcome, TrainRequest, train};
use marimba_dsl::sweep::{Member, Sweep};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What stands in a member's folder before the sweep.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// Finished with the same configuration.
    Done(Box<RunSummary>),
    /// Begun with the same configuration.
    Begun,
    /// A run of another configuration.
    Other,
}

/// How a member ended.
#[derive(Clone, Debug)]
pub enum Ended {
    /// It had been finished before.
    AlreadyDone,
    /// It finished now.
    Finished(Box<RunSummary>),
    /// The user stopped it.
    Interrupted,
    /// It failed; the others went on.
    Failed(String),
    /// Never begun, because the user stopped the sweep.
    NotBegun,
}

/// Something that happened to a member.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// It begins, or goes on, after `step` of `steps`.
    Begin {
        /// Steps done before.
        step: usize,
        /// Steps in all.
        steps: usize,
        /// What its model costs.
        facts: &'a Facts,
    },
    /// It did a step, from 1, with this cross entropy.
    Step {
        /// The step.
        step: usize,
        /// Mean over its targets, nats.
        loss: f64,
    },
    /// A log interval is done.
    Log(&'a LogLine),
    /// It was evaluated.
    Eval {
        /// The step.
        step: usize,
        /// By name, without `eval/`.
        metrics: &'a BTreeMap<String, f64>,
    },
    /// It has something to say.
    Note(&'a str),
    /// It ended, or was left as it is.
    End(&'a Ended),
}

/// Watches a sweep. Called from several threads, one at a time.
pub trait SweepObserver: Send {
    /// Something happened to the member of this index.
    fn event(&mut self, member: usize, event: Event<'_>);
}

/// The folder of a member.
pub fn member_dir(out: &Path, member: &Member) -> PathBuf {
    out.join(&member.name)
}

/// Looks at a member's folder.
pub fn find(out: &Path, member: &Member) -> Found {
    let dir = member_dir(out, member);
    let hash = content_hash(&member.run.to_ron());
    if let Ok(Some(s)) = summary::read_json::<RunSummary>(&dir.join(run_dir::SUMMARY_JSON)) {
        if s.config_hash != hash {
            return Found::Other;
        }
        if s.status == RunState::Finished {
            return Found::Done(Box::new(s));
        }
        return Found::Begun;
    }
    match std::fs::read_to_string(dir.join(run_dir::RESOLVED_RON)) {
        Ok(text) if content_hash(&text) == hash => Found::Begun,
        Ok(_) => Found::Other,
        Err(_) => Found::Nothing,
    }
}

/// Runs all members that are not done, `jobs` at a time, and returns how each ended.
pub fn run(
    sweep: &Sweep,
    source: &str,
    out: &Path,
    jobs: usize,
    observer: Box<dyn SweepObserver>,
) -> Vec<Ended> {
    let next = AtomicUsize::new(0);
    let observer = Mutex::new(observer);
    let ended: Vec<Mutex<Ended>> = sweep
        .members
        .iter()
        .map(|_| Mutex::new(Ended::NotBegun))
        .collect();
    let threads = (engine::cores() / jobs.max(1)).max(1);
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, sweep.members.len().max(1)) {
            scope.spawn(|| {
                while !interrupt::requested() {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(member) = sweep.members.get(i) else {
                        break;
                    };
                    let result = run_member(
                        member,
                        source,
                        out,
                        threads,
                        &mut Tap {
                            member: i,
                            observer: &observer,
                        },
                    );
                    locked(&observer).event(i, Event::End(&result));
                    *locked(&ended[i]) = result;
                }
            });
        }
    });
    ended
        .into_iter()
        .map(|m| {
            m.into_inner()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
        })
        .collect()
}

fn run_member(
    member: &Member,
    source: &str,
    out: &Path,
    threads: usize,
    observer: &mut Tap,
) -> Ended {
    let resume = match find(out, member) {
        Found::Done(_) => return Ended::AlreadyDone,
        Found::Begun => true,
        Found::Nothing => false,
        Found::Other => {
            return Ended::Failed(format!(
                "{} holds a run of another configuration; move it away or give another --out",
                member_dir(out, member).display()
            ));
        }
    };
    let dir = member_dir(out, member);
    let resolved = member.run.to_ron();
    let axes = member.set.iter().cloned().collect();
    let request = TrainRequest {
        run: &member.run,
        source,
        resolved: &resolved,
        out: &dir,
        resume,
        threads,
        group: &member.group,
        axes,
    };
    // A bug in one member must not take the others' results with it.
    match catch_unwind(AssertUnwindSafe(|| train(&request, observer))) {
        Ok(Ok(outcome)) => match outcome.finish {
            Finish::Finished => Ended::Finished(Box::new(outcome.summary)),
            Finish::Interrupted => Ended::Interrupted,
        },
        Ok(Err(e)) => Ended::Failed(e.to_string()),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
                .unwrap_or_else(|| "no message".into());
            Ended::Failed(format!("panicked ({text}); this is a bug in marimba"))
        }
    }
}

fn locked<T: ?Sized>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Passes one member's events on.
struct Tap<'a> {
    member: usize,
    observer: &'a Mutex<Box<dyn SweepObserver>>,
}

impl Tap<'_> {
    fn tell(&self, event: Event<'_>) {
        locked(self.observer).event(self.member, event);
    }
}

impl Observer for Tap<'_> {
    fn begin(&mut self, step: usize, steps: usize, facts: &Facts) {
        self.tell(Event::Begin { step, steps, facts });
    }
    fn step(&mut self, step: usize, outcome: &StepOutcome) {
        let loss = outcome.cross_entropy;
        self.tell(Event::Step { step, loss });
    }
    fn log(&mut self, line: &LogLine) {
        self.tell(Event::Log(line));
    }
    fn eval(&mut self, step: usize, metrics: &BTreeMap<String, f64>) {
        self.tell(Event::Eval { step, metrics });
    }
    fn note(&mut self, text: &str) {
        self.tell(Event::Note(text));
    }
}
