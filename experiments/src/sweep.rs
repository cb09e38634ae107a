//! Sweeps: members run in a local pool, fail alone, resume, and are never run twice.
//!
//! A member's folder is `<out>/<member>`. Whether it is done is decided by its `summary.json`: finished, and of the same configuration,
//! graph and data. A member whose folder holds anything else is refused, never overwritten.
//!
//! With successive halving all groups train to a rung, pause there, and only the best go on. What decides is read from the members'
//! own records, so a sweep that is killed and resumed decides the same.

use crate::engine;
use crate::facts::{Facts, facts};
use crate::interrupt;
use crate::record::files::content_hash;
use crate::record::metrics::read_metrics;
use crate::record::sweep_file::tag;
use crate::record::{RecordError, RunDir, RunState, RunStatus, RunSummary, run_dir, summary};
use crate::train::{
    Finish, LogLine, Observer, StepOutcome, TrainRequest, data_hash, device_bytes, graph_hash,
    memory_bytes, train,
};
use marimba_backend::Engine;
use marimba_dsl::run::{Backend, Run};
use marimba_dsl::sweep::{Counts, Halving, Member, Sweep};
use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// What stands in a member's folder before the sweep.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// Finished, the same run.
    Done(Box<RunSummary>),
    /// Begun, the same configuration.
    Begun,
    /// Ended by successive halving at this step, the same configuration.
    Stopped(u64),
    /// Another run, with what is different.
    Other(&'static str),
}

/// How a member ended.
#[derive(Clone, Debug)]
pub enum Ended {
    /// It had been finished before.
    AlreadyDone,
    /// It finished now.
    Finished(Box<RunSummary>),
    /// Successive halving ended it, with why.
    Halved(String),
    /// It waits at a rung, after this step.
    Paused(usize),
    /// The user stopped it.
    Interrupted,
    /// It failed; the others went on.
    Failed(String),
    /// Never begun, because the user stopped the sweep.
    NotBegun,
}

impl Ended {
    /// Whether there is nothing left to run.
    fn is_over(&self) -> bool {
        match self {
            Ended::AlreadyDone | Ended::Finished(_) | Ended::Halved(_) | Ended::Failed(_) => true,
            Ended::Paused(_) | Ended::Interrupted | Ended::NotBegun => false,
        }
    }
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
    /// It ended, pauses, or was left as it is.
    End(&'a Ended),
}

/// Watches a sweep. Called from several threads, one at a time.
pub trait SweepObserver: Send {
    /// Something happened to the member of this index.
    fn event(&mut self, member: usize, event: Event<'_>);
}

/// The counts that a sweep can hold equal, at the length of the run's first phase: those of `marimba show`.
pub fn counts(run: &Run) -> Counts {
    let seq_len = run
        .phases
        .first()
        .map_or(run.model.context_len, |p| p.seq_len);
    // A model that cannot be lowered is a bug that training will tell; no quantity of it is near any target.
    facts(&run.model, seq_len).map_or(
        Counts {
            params_total: f64::NAN,
            params_active: f64::NAN,
            flops_per_token: f64::NAN,
            state_bytes: f64::NAN,
            decode_bytes: f64::NAN,
        },
        |f| Counts {
            params_total: f.params_total as f64,
            params_active: f.params_active as f64,
            flops_per_token: f.flops_per_token,
            state_bytes: f.state_bytes_per_seq as f64,
            decode_bytes: (f.state_bytes_per_seq + seq_len as u64 * f.kv_bytes_per_token) as f64,
        },
    )
}

/// The folder of a member.
pub fn member_dir(out: &Path, member: &Member) -> PathBuf {
    out.join(&member.name)
}

/// Looks into members' folders. Digests of data are remembered: members share theirs.
#[derive(Default)]
pub struct Finder {
    data: Mutex<HashMap<String, Option<String>>>,
}

impl Finder {
    /// Looks at a member's folder.
    pub fn find(&self, out: &Path, member: &Member) -> Found {
        let dir = member_dir(out, member);
        let hash = content_hash(&member.run.to_ron());
        let status: Option<RunStatus> =
            summary::read_json(&dir.join(run_dir::STATUS_JSON)).unwrap_or_default();
        if let Ok(Some(s)) = summary::read_json::<RunSummary>(&dir.join(run_dir::SUMMARY_JSON)) {
            return match s.status {
                _ if s.config_hash != hash => Found::Other("configuration"),
                RunState::Finished => match self.differs(&s, &member.run) {
                    Some(what) => Found::Other(what),
                    None => Found::Done(Box::new(s)),
                },
                RunState::Stopped => Found::Stopped(status.map_or(0, |s| s.step)),
                RunState::Running | RunState::Failed | RunState::Interrupted | RunState::Paused => {
                    Found::Begun
                }
            };
        }
        // The status is written last: a folder without one is a creation that died halfway, and is begun anew.
        match std::fs::read_to_string(dir.join(run_dir::RESOLVED_RON)) {
            Ok(text) if status.is_some() && content_hash(&text) == hash => Found::Begun,
            Ok(_) if status.is_some() => Found::Other("configuration"),
            _ => Found::Nothing,
        }
    }

    /// What of a finished run is not what it would be now. Data that can no longer be read says nothing against it.
    fn differs(&self, summary: &RunSummary, run: &Run) -> Option<&'static str> {
        if !summary.graph_hash.is_empty()
            && graph_hash(run).is_ok_and(|now| now != summary.graph_hash)
        {
            return Some("graph (it was made by another version of marimba)");
        }
        if summary.data_hash.is_empty() {
            return None;
        }
        let key: Vec<_> = run
            .phases
            .iter()
            .map(|p| (&p.data, p.seq_len, run.seed))
            .collect();
        let now = locked(&self.data)
            .entry(format!("{key:?}"))
            .or_insert_with(|| data_hash(run).ok())
            .clone();
        (now.is_some_and(|now| now != summary.data_hash))
            .then_some("data (its files have changed since)")
    }
}

/// What to run, and where.
pub struct SweepRequest<'a> {
    /// The sweep.
    pub sweep: &'a Sweep,
    /// Text of its file.
    pub source: &'a str,
    /// Its folder.
    pub out: &'a Path,
    /// Members that run at the same time.
    pub jobs: usize,
    /// Threads of a member; `None` shares the cores out.
    pub threads: Option<usize>,
    /// Only these members, by index; `None` is all.
    pub only: Option<&'a [usize]>,
}

/// Runs all members that are not done, `jobs` at a time, and returns how each ended.
pub fn run(request: &SweepRequest, observer: Box<dyn SweepObserver>) -> Vec<Ended> {
    let members = &request.sweep.members;
    let chosen: Vec<usize> = match request.only {
        Some(only) => only.to_vec(),
        None => (0..members.len()).collect(),
    };
    let pool = Pool {
        request,
        room: Room::of(chosen.iter().map(|&i| members[i].run.backend)),
        finder: Finder::default(),
        observer: Mutex::new(observer),
        ended: members
            .iter()
            .map(|_| Mutex::new(Ended::NotBegun))
            .collect(),
        threads: request
            .threads
            .unwrap_or_else(|| engine::cores() / request.jobs.clamp(1, chosen.len().max(1)))
            .max(1),
    };
    match request.sweep.halving {
        Some(halving) => pool.halve(&chosen, halving),
        None => pool.run(&chosen, None),
    }
    pool.ended.into_iter().map(into_inner).collect()
}

/// Where members find room: on the GPU those that train there, in this machine's memory the others.
struct Room {
    host: Memory,
    device: Option<Memory>,
    /// Keeps the GPU open between members.
    _gpu: Option<Mutex<Box<dyn Engine>>>,
}

impl Room {
    /// Asks for a GPU where a backend may be one. What an engine takes when it is opened is part of what a member is said to need.
    fn of(mut backends: impl Iterator<Item = Backend>) -> Room {
        let gpu = backends
            .any(|b| matches!(b, Backend::Auto | Backend::Cuda))
            .then(|| engine::open(Backend::Cuda, 1).ok())
            .flatten();
        let free = gpu
            .as_ref()
            .map(|g| g.memory().map(|m| free_of(m.total, m.in_use)));
        Room {
            host: Memory::of(marimba_backend::available_bytes().map(|bytes| bytes as u64)),
            device: free.map(Memory::of),
            _gpu: gpu.map(Mutex::new),
        }
    }

    /// The memory that a run trains in, and how much of it its plans say it needs.
    fn of_run(&self, run: &Run) -> (&Memory, u64) {
        match (&self.device, run.backend) {
            (Some(device), Backend::Auto | Backend::Cuda) => (device, device_bytes(run)),
            (_, Backend::Auto | Backend::Cpu | Backend::Cuda | Backend::Dfdx) => {
                (&self.host, memory_bytes(run))
            }
        }
    }
}

/// What members may share of a GPU: what is free, less a sixteenth for what no plan knows: the code of kernels, the driver's tables, and
/// the pages that allocations do not fill.
fn free_of(total: usize, in_use: usize) -> u64 {
    let free = total.saturating_sub(in_use) as u64;
    free - free / 16
}

/// Memory that members share out among them by what their plans say they need.
struct Memory {
    /// Free bytes and members that hold some; `None` where this system does not say what is free.
    free: Option<Mutex<(u64, usize)>>,
    given_back: Condvar,
}

impl Memory {
    fn of(bytes: Option<u64>) -> Memory {
        Memory {
            free: bytes.map(|bytes| Mutex::new((bytes, 0))),
            given_back: Condvar::new(),
        }
    }

    /// Waits until so much is free, or nobody holds any: alone a member may try, and is told what it lacks.
    fn with<T>(&self, bytes: u64, f: impl FnOnce() -> T) -> T {
        let Some(free) = &self.free else { return f() };
        let mut state = locked(free);
        while state.0 < bytes && state.1 > 0 && !interrupt::requested() {
            state = self
                .given_back
                .wait_timeout(state, Duration::from_secs(1))
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
        let taken = bytes.min(state.0);
        *state = (state.0 - taken, state.1 + 1);
        drop(state);
        let result = f();
        let mut state = locked(free);
        *state = (state.0 + taken, state.1 - 1);
        drop(state);
        self.given_back.notify_all();
        result
    }
}

struct Pool<'a> {
    request: &'a SweepRequest<'a>,
    room: Room,
    finder: Finder,
    observer: Mutex<Box<dyn SweepObserver>>,
    ended: Vec<Mutex<Ended>>,
    threads: usize,
}

impl Pool<'_> {
    /// Runs these members to their ends, or to a step.
    fn run(&self, chosen: &[usize], until: Option<usize>) {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..self.request.jobs.clamp(1, chosen.len().max(1)) {
                scope.spawn(|| {
                    while !interrupt::requested() {
                        let Some(&i) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) else {
                            break;
                        };
                        let result = self.member(i, until);
                        locked(&self.observer).event(i, Event::End(&result));
                        *locked(&self.ended[i]) = result;
                    }
                });
            }
        });
    }

    fn member(&self, i: usize, until: Option<usize>) -> Ended {
        let (member, out) = (&self.request.sweep.members[i], self.request.out);
        let dir = member_dir(out, member);
        let resume = match self.finder.find(out, member) {
            Found::Done(_) => {
                return match mend(&dir) {
                    Ok(()) => Ended::AlreadyDone,
                    Err(e) => Ended::Failed(e.to_string()),
                };
            }
            Found::Begun | Found::Stopped(_) => true,
            Found::Nothing => false,
            Found::Other(what) => {
                return Ended::Failed(format!(
                    "{} holds a run of another {what}; move it away or give another --out",
                    dir.display()
                ));
            }
        };
        if let Some(step) = until.filter(|&n| resume && reached(&dir, n)) {
            return Ended::Paused(step);
        }
        let resolved = member.run.to_ron();
        let request = TrainRequest {
            run: &member.run,
            source: self.request.source,
            resolved: &resolved,
            out: &dir,
            resume,
            until,
            threads: self.threads,
            graphs: true,
            group: &member.group,
            axes: member.set.iter().cloned().collect(),
        };
        let mut tap = Tap {
            member: i,
            observer: &self.observer,
        };
        // A bug in one member must not take the others' results with it.
        let (memory, bytes) = self.room.of_run(&member.run);
        let outcome = memory.with(bytes, || {
            catch_unwind(AssertUnwindSafe(|| train(&request, &mut tap)))
        });
        match outcome {
            Ok(Ok(outcome)) => match outcome.finish {
                Finish::Finished => Ended::Finished(Box::new(outcome.summary)),
                Finish::Interrupted => Ended::Interrupted,
                Finish::Paused => Ended::Paused(outcome.step),
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

    /// Successive halving.
    fn halve(&self, chosen: &[usize], halving: Halving) {
        let members = &self.request.sweep.members;
        let total = |i: &usize| members[*i].run.total_steps();
        let rungs = halving.rungs(chosen.iter().map(total).max().unwrap_or(0));
        let mut alive = chosen.to_vec();
        for rung in rungs {
            let left: Vec<usize> = alive
                .iter()
                .copied()
                .filter(|&i| !locked(&self.ended[i]).is_over())
                .collect();
            self.run(&left, Some(rung));
            if interrupt::requested() {
                return;
            }
            alive = self.cut(alive, halving, rung);
        }
        alive.retain(|&i| !locked(&self.ended[i]).is_over());
        self.run(&alive, None);
    }

    /// Compares groups at a rung and ends the worse ones; gives the members of those that go on.
    fn cut(&self, alive: Vec<usize>, halving: Halving, rung: usize) -> Vec<usize> {
        let sweep = self.request.sweep;
        let metric = tag(&sweep.metric);
        let mut groups: Vec<(&str, Vec<f64>)> = Vec::new();
        for &i in &alive {
            let member = &sweep.members[i];
            let value = score(&member_dir(self.request.out, member), &metric, rung);
            let at = match groups.iter().position(|(g, _)| *g == member.group) {
                Some(at) => at,
                None => {
                    groups.push((&member.group, Vec::new()));
                    groups.len() - 1
                }
            };
            groups[at].1.extend(value.filter(|v| v.is_finite()));
        }
        let mut ranked: Vec<(&str, Option<f64>)> = groups
            .into_iter()
            .map(|(g, v)| {
                (
                    g,
                    (!v.is_empty()).then(|| v.iter().sum::<f64>() / v.len() as f64),
                )
            })
            .collect();
        // A stable sort: of equals the first of the file goes on.
        ranked.sort_by(|(_, a), (_, b)| match (a, b) {
            (Some(a), Some(b)) if sweep.goal.better(*a, *b) => std::cmp::Ordering::Less,
            (Some(a), Some(b)) if sweep.goal.better(*b, *a) => std::cmp::Ordering::Greater,
            (Some(_), Some(_)) | (None, None) => std::cmp::Ordering::Equal,
            (a, b) => b.is_some().cmp(&a.is_some()),
        });
        let n = ranked.len();
        let kept = halving.survivors(n);
        let mut on = Vec::new();
        for i in alive {
            let member = &sweep.members[i];
            let place = ranked.iter().position(|(g, _)| *g == member.group);
            let over = locked(&self.ended[i]).is_over();
            if let Some(p) = place.filter(|p| *p < kept) {
                if !over {
                    let text = format!("goes on after step {rung}: {} of {n} by {metric}", p + 1);
                    locked(&self.observer).event(i, Event::Note(&text));
                }
                on.push(i);
                continue;
            }
            if over {
                continue;
            }
            let why = format!(
                "ended by halving at step {rung}: {} of {n} by {metric}",
                place.map_or(n, |p| p + 1)
            );
            let ended = match stop(&member_dir(self.request.out, member), &why) {
                Ok(()) => Ended::Halved(why),
                Err(e) => Ended::Failed(e.to_string()),
            };
            locked(&self.observer).event(i, Event::End(&ended));
            *locked(&self.ended[i]) = ended;
        }
        on
    }
}

/// Step of a run's last checkpoint. The status may lag behind it: a process can die between the two.
fn last_checkpoint(dir: &Path) -> Option<u64> {
    let all = crate::checkpoint::list(&dir.join(run_dir::CHECKPOINTS_DIR));
    all.ok()?.last().map(|(step, _)| *step)
}

/// Whether a run has a checkpoint at or after a step, and has written down how it stood there. One that died before it could is resumed
/// once more, which takes no step and writes it.
fn reached(dir: &Path, step: usize) -> bool {
    let status: Option<RunStatus> =
        summary::read_json(&dir.join(run_dir::STATUS_JSON)).unwrap_or_default();
    let at_rest = status.is_some_and(|s| match s.state {
        RunState::Paused | RunState::Stopped | RunState::Interrupted | RunState::Finished => true,
        RunState::Running | RunState::Failed => false,
    });
    at_rest && last_checkpoint(dir).is_some_and(|s| s >= step as u64)
}

/// Value of a metric at a step, or the last one before it.
fn score(dir: &Path, metric: &str, step: usize) -> Option<f64> {
    let log = read_metrics(&dir.join(run_dir::METRICS_JSONL), usize::MAX).ok()?;
    let points = log.series.get(metric)?.points();
    points
        .take_while(|p| p.step <= step as i64)
        .last()
        .map(|p| p.value)
}

/// Corrects the status of a run that died between its summary, which says that it has finished, and its status.
fn mend(dir: &Path) -> Result<(), RecordError> {
    let status: Option<RunStatus> = summary::read_json(&dir.join(run_dir::STATUS_JSON))?;
    match status {
        Some(s) if s.state != RunState::Finished => {
            let mut run = RunDir::resume(dir)?;
            let step = last_checkpoint(dir).unwrap_or(s.step);
            run.set_status(RunState::Finished, step, None)
        }
        _ => Ok(()),
    }
}

/// Records that a run was ended from outside.
fn stop(dir: &Path, why: &str) -> Result<(), RecordError> {
    let mut run = RunDir::resume(dir)?;
    let status = run.status();
    if status.state == RunState::Stopped && status.message.as_deref() == Some(why) {
        return Ok(());
    }
    let path = dir.join(run_dir::SUMMARY_JSON);
    if let Some(summary) = summary::read_json::<RunSummary>(&path)? {
        run.set_summary(&RunSummary {
            status: RunState::Stopped,
            ..summary
        })?;
    }
    let step = last_checkpoint(dir).unwrap_or(run.status().step);
    run.set_status(RunState::Stopped, step, Some(why.to_owned()))
}

fn locked<T: ?Sized>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn into_inner<T>(m: Mutex<T>) -> T {
    m.into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Passes one member's events on.
struct Tap<'a> {
    member: usize,
    observer: &'a Mutex<Box<dyn SweepObserver>>,
}

impl Tap<'_> {
    fn send(&self, event: Event<'_>) {
        locked(self.observer).event(self.member, event);
    }
}

impl Observer for Tap<'_> {
    fn begin(&mut self, step: usize, steps: usize, facts: &Facts) {
        self.send(Event::Begin { step, steps, facts });
    }
    fn step(&mut self, step: usize, outcome: &StepOutcome) {
        self.send(Event::Step {
            step,
            loss: outcome.cross_entropy,
        });
    }
    fn log(&mut self, line: &LogLine) {
        self.send(Event::Log(line));
    }
    fn eval(&mut self, step: usize, metrics: &BTreeMap<String, f64>) {
        self.send(Event::Eval { step, metrics });
    }
    fn note(&mut self, text: &str) {
        self.send(Event::Note(text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_takes_room_where_it_trains() {
        let run = |backend: &str| {
            let text = format!(
                "(model: (vocab_size: 32, d_model: 16, n_layers: 1, mixers: {{ \"m\": Mamba1(d_state: 4) }}), steps: 1, batch: 4, \
                 seq_len: 16, data: Mqar(vocab_size: 32, n_pairs: 4, eval: [(n_pairs: 4, seq_len: 16)]), backend: {backend})"
            );
            let source = marimba_dsl::Source::new("r.ron", text);
            marimba_dsl::parse_run(&source, &[]).unwrap_or_else(|r| panic!("{r}"))
        };
        let room = |device| Room {
            host: Memory::of(Some(1)),
            device,
            _gpu: None,
        };
        let with_gpu = room(Some(Memory::of(Some(2))));
        let free = |room: &Room, backend: &str| {
            let (memory, bytes) = room.of_run(&run(backend));
            assert!(bytes > 0);
            (locked(memory.free.as_ref().unwrap()).0, bytes)
        };
        let (host, device) = (free(&with_gpu, "cpu"), free(&with_gpu, "cuda"));
        assert_eq!((host.0, device.0), (1, 2));
        assert_eq!(free(&with_gpu, "auto"), device);
        assert_eq!(free(&with_gpu, "dfdx"), host);
        assert_eq!(free(&room(None), "auto"), host);
        // On a GPU also what matrix products and the optimiser need besides, in every shape of training and evaluation.
        assert!(device.1 > host.1, "{device:?} {host:?}");
        let (free, total) = (free_of(1600, 0), free_of(1600, 1600));
        assert_eq!((free, total), (1500, 0));
    }

    #[test]
    fn members_wait_for_memory_and_a_large_one_runs_alone() {
        let memory = Memory::of(Some(100));
        let (held, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for bytes in [60, 60, 60, 500] {
                let (memory, held, most) = (&memory, &held, &most);
                scope.spawn(move || {
                    memory.with(bytes, || {
                        let now = held.fetch_add(1, Ordering::SeqCst) + 1;
                        most.fetch_max(now, Ordering::SeqCst);
                        std::thread::sleep(Duration::from_millis(30));
                        held.fetch_sub(1, Ordering::SeqCst);
                    });
                });
            }
        });
        assert_eq!(most.into_inner(), 1);
        assert_eq!(*locked(memory.free.as_ref().unwrap()), (100, 0));
    }
}
