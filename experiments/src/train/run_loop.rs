//! The loop over phases and steps: logging, evaluation, checkpoints, interruption, resuming.

use super::eval::{evaluate, metrics};
use super::{EvalResult, StepOutcome, TrainError, Trainer};
use crate::checkpoint::{self, Checkpoint, Contents};
use crate::data::{Batch, Loader, LoaderState, Worker, open};
use crate::facts::{Facts, facts};
use crate::program::{self, CompileError, Program, TrainOptions};
use crate::record::metrics::{curve_facts, read_metrics};
use crate::record::{
    HParam, Histogram, Recorder, RunDir, RunFiles, RunState, RunSummary, run_dir, tags,
};
use crate::{engine, interrupt, record::files::content_hash, transfer};
use marimba_backend::{HostTensor, cuda_bytes};
use marimba_dsl::Valid;
use marimba_dsl::run::Run;
use marimba_ir::op::{STAT_BUCKETS, STAT_LEN};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What to train and where it goes.
pub struct TrainRequest<'a> {
    /// The run.
    pub run: &'a Valid<Run>,
    /// Text of the file that the user gave.
    pub source: &'a str,
    /// Text of the resolved run.
    pub resolved: &'a str,
    /// Run folder.
    pub out: &'a Path,
    /// Continue what is there.
    pub resume: bool,
    /// Evaluate, write a checkpoint and pause after this step, where it lies before the last one.
    pub until: Option<usize>,
    /// Threads of the engine.
    pub threads: usize,
    /// Whether a GPU replays programs as CUDA graphs; without, it launches kernel by kernel.
    pub graphs: bool,
    /// Members of a sweep that differ only by seed share a group.
    pub group: &'a str,
    /// The point of the sweep.
    pub axes: BTreeMap<String, String>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// All steps done, or the early-stop threshold reached.
    Finished,
    /// Stopped by the user; a checkpoint was written.
    Interrupted,
    /// Reached [`TrainRequest::until`]; a checkpoint was written.
    Paused,
}

/// The end of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How.
    pub finish: Finish,
    /// Steps done.
    pub step: usize,
    /// Facts and metrics.
    pub summary: RunSummary,
    /// The last checkpoint.
    pub checkpoint: Option<PathBuf>,
}

/// One log interval.
#[derive(Clone, Debug)]
pub struct LogLine {
    /// Step, from 1.
    pub step: usize,
    /// Steps of the run.
    pub steps: usize,
    /// Mean cross entropy of the interval.
    pub loss: f64,
    /// Of the last step.
    pub lr: f64,
    /// Of the last step.
    pub grad_norm: f64,
    /// Over the interval.
    pub tokens_per_sec: f64,
    /// Seconds to the end at this rate.
    pub eta_secs: f64,
}

/// Watches a run: a progress bar, plain lines, a sweep's table.
pub trait Observer {
    /// The run begins at this step of so many.
    fn begin(&mut self, step: usize, steps: usize, facts: &Facts);
    /// A step is done.
    fn step(&mut self, step: usize, outcome: &StepOutcome);
    /// A log interval is done.
    fn log(&mut self, line: &LogLine);
    /// An evaluation is done.
    fn eval(&mut self, step: usize, metrics: &BTreeMap<String, f64>);
    /// Something to tell that is no error.
    fn note(&mut self, text: &str);
}

/// Trains a run to its end, or until interrupted.
///
/// # Errors
/// [`TrainError`]. Whatever was recorded and checkpointed before stays; the run's status says why it failed.
pub fn train(request: &TrainRequest, observer: &mut dyn Observer) -> Result<Outcome, TrainError> {
    let run: &Run = request.run;
    let seq_len = run
        .phases
        .first()
        .map_or(run.model.context_len, |p| p.seq_len);
    let counts = facts(&run.model, seq_len).map_err(CompileError::from)?;

    // Everything that can be refused is refused before the run folder exists.
    let mut trainer = Trainer::new(
        run,
        engine::open_with(run.backend, request.threads, request.graphs)?,
    )?;
    let mut loaders = open_loaders(run)?;
    for phase in &run.phases {
        trainer.prepare(phase.batch, phase.seq_len)?;
    }

    let graph = graph_text(run)?;
    let identity = Identity::of(request.resolved, &graph, &loaders);
    let mut before = Before::default();
    let (mut dir, mut recorder, mut at) = if request.resume {
        let dir = RunDir::resume(request.out)?;
        let (at, place) = restore(&mut trainer, &mut loaders, &dir)?;
        let recorder = Recorder::resume(&dir, at as u64)?;
        before = Before::read(run, &dir, place)?;
        observer.note(&format!(
            "continuing {} after step {at}",
            request.out.display()
        ));
        (dir, recorder, at)
    } else {
        let files = RunFiles {
            run_ron: request.source,
            resolved_ron: request.resolved,
            env: run_dir::environment([("backend".to_string(), trainer.engine().name().into())]),
            graph: Some(&graph),
            group: request.group,
            seed: run.seed,
        };
        let dir = RunDir::create(request.out, &files)?;
        let mut recorder = Recorder::create(&dir)?;
        recorder.code(0, "run/resolved", request.resolved);
        recorder.hparams(
            request.group,
            &hyperparameters(run, request, &counts),
            &metric_tags(),
        );
        (dir, recorder, 0)
    };
    dir.set_status(RunState::Running, at as u64, None)?;

    let mut summary = RunSummary {
        name: request
            .out
            .file_name()
            .map_or_else(|| run.name.clone(), |n| n.to_string_lossy().into_owned()),
        group: request.group.to_string(),
        seed: run.seed,
        status: RunState::Running,
        params_total: counts.params_total,
        params_active: counts.params_active,
        state_bytes_per_seq: counts.state_bytes_per_seq,
        kv_bytes_per_token: counts.kv_bytes_per_token,
        seq_len: seq_len as u64,
        flops_per_token: counts.flops_per_token,
        tokens_per_sec: 0.0,
        final_metrics: before.finals,
        best_metrics: before.bests,
        config_hash: identity.config,
        graph_hash: identity.graph,
        data_hash: identity.data,
        axes: request.axes.clone(),
    };
    observer.begin(at, run.total_steps(), &counts);
    let result = Loop {
        run,
        trainer: &mut trainer,
        loaders: &mut loaders,
        dir: &mut dir,
        recorder: &mut recorder,
        observer,
        summary: &mut summary,
        resolved: request.resolved,
        rates: before.rates,
        watched: before.watched,
        interval: before.interval,
        stopped: before.stopped,
        checkpoint: None,
    }
    .run(&mut at, request.until);
    let (state, message) = match &result {
        Ok((Finish::Finished, _)) => (RunState::Finished, None),
        Ok((Finish::Interrupted, _)) => (RunState::Interrupted, None),
        Ok((Finish::Paused, _)) => (RunState::Paused, None),
        Err(e) => (RunState::Failed, Some(e.to_string())),
    };
    summary.status = state;
    // The error of the run itself is the one to tell, should recording its end fail too.
    let ended = recorder
        .finish(state)
        .and_then(|()| dir.set_summary(&summary))
        .and_then(|()| dir.set_status(state, at as u64, message));
    let (finish, checkpoint) = result?;
    ended?;
    Ok(Outcome {
        finish,
        step: at,
        summary,
        checkpoint,
    })
}

/// What decides a run: two runs of equal identity are the same run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Hash of the resolved configuration.
    pub config: String,
    /// Hash of the training graph's text.
    pub graph: String,
    /// Hash of the digests of all training data, in order of phases.
    pub data: String,
}

impl Identity {
    fn of(resolved: &str, graph: &str, loaders: &[Box<dyn Loader>]) -> Identity {
        Identity {
            config: content_hash(resolved),
            graph: content_hash(graph),
            data: digest(loaders),
        }
    }
}

fn digest(loaders: &[Box<dyn Loader>]) -> String {
    let digests: Vec<String> = loaders.iter().map(|l| l.state().fingerprint).collect();
    content_hash(&digests.join("\n"))
}

/// [`Identity::graph`] that training a run would give it now.
///
/// # Errors
/// [`TrainError`]: a bug, or an unreachable memory budget.
pub fn graph_hash(run: &Run) -> Result<String, TrainError> {
    Ok(content_hash(&graph_text(run)?))
}

/// [`Identity::data`] that training a run would give it now. Opens its data.
///
/// # Errors
/// [`TrainError`] when the data cannot be read or does not fit the model.
pub fn data_hash(run: &Run) -> Result<String, TrainError> {
    Ok(digest(&open_loaders(run)?))
}

/// Bytes that training a run needs by its plans: the largest arena, and four numbers a parameter. 0 for what cannot be compiled, which
/// training will tell.
pub fn memory_bytes(run: &Run) -> u64 {
    let Ok(scaled) = transfer::apply(run) else {
        return 0;
    };
    let arenas = run.phases.iter().map(|p| {
        let program = program::training(&scaled.model, &TrainOptions::of(run), p.batch, p.seq_len);
        program.map_or(0, |p| p.plan.arena_bytes as u64)
    });
    let params: usize = scaled.params.iter().map(|p| p.ty.bytes()).sum();
    arenas.max().unwrap_or(0) + 4 * params as u64
}

/// Bytes that training a run takes on a GPU by the plans of all its programs: the optimiser, and training and evaluation in every shape.
/// 0 for what cannot be compiled or read, which training will tell.
pub fn device_bytes(run: &Run) -> u64 {
    let programs = || -> Result<Vec<Program>, TrainError> {
        let scaled = transfer::apply(run)?;
        let options = TrainOptions::of(run);
        let mut programs = vec![program::optimizer(&scaled.params, run, &scaled.lr)?];
        for (phase, loader) in run.phases.iter().zip(open_loaders(run)?) {
            for probe in [false, true] {
                if !probe || run.probe_every.is_some() {
                    let options = TrainOptions {
                        probe,
                        ..options.clone()
                    };
                    let (batch, seq_len) = (phase.batch, phase.seq_len);
                    programs.push(program::training(&scaled.model, &options, batch, seq_len)?);
                }
            }
            let mut lengths: BTreeSet<usize> = BTreeSet::new();
            if phase.eval.sets.is_empty() {
                lengths.extend(loader.eval_sets().iter().map(|s| s.seq_len));
            }
            for (_, data) in &phase.eval.sets {
                let loader = open::open(data, phase.seq_len, run.seed, Worker::ALL)?;
                lengths.extend(loader.eval_sets().iter().map(|s| s.seq_len));
            }
            for seq_len in lengths {
                let compute = options.compute;
                let program = program::evaluation(&scaled.model, compute, phase.batch, seq_len)?;
                programs.push(program);
            }
        }
        Ok(programs)
    };
    programs().map_or(0, |all| {
        cuda_bytes(all.iter().map(|p| (&p.graph, &p.plan))).total() as u64
    })
}

/// The training graph of the first phase as text, runs of equal layers once.
fn graph_text(run: &Run) -> Result<String, TrainError> {
    let (batch, seq_len) = run
        .phases
        .first()
        .map_or((1, run.model.context_len), |p| (p.batch, p.seq_len));
    let model = transfer::apply(run)?.model;
    let program = program::training(&model, &TrainOptions::of(run), batch, seq_len)?;
    Ok(marimba_ir::print::compact(&program.graph))
}

/// What a resumed run takes over from its earlier part.
#[derive(Default)]
struct Before {
    finals: BTreeMap<String, f64>,
    bests: BTreeMap<String, f64>,
    rates: Vec<f64>,
    watched: Vec<f64>,
    interval: Vec<f64>,
    stopped: bool,
}

impl Before {
    /// Of the curves up to the checkpoint, and of what the checkpoint says of the log interval that it cut.
    fn read(run: &Run, dir: &RunDir, place: Option<Place>) -> Result<Before, TrainError> {
        let path = dir.metrics_path();
        let facts = curve_facts(&path)?;
        let summed = |tag: &String| tag == tags::TRAIN_LOSS || tag.starts_with("eval/");
        let curves = read_metrics(&path, usize::MAX)?.series;
        let values = |tag: &str| -> Vec<f64> {
            let points = curves.get(tag).into_iter().flat_map(|s| s.points());
            points.map(|p| p.value).collect()
        };
        let place = place.as_ref();
        Ok(Before {
            finals: facts
                .finals
                .into_iter()
                .filter(|(t, _)| summed(t))
                .collect(),
            bests: facts.bests.into_iter().filter(|(t, _)| summed(t)).collect(),
            rates: values(tags::TOKENS_PER_SEC),
            watched: run
                .early_stop
                .as_ref()
                .map_or_else(Vec::new, |e| values(&tags::eval(&e.metric))),
            interval: place.map_or_else(Vec::new, |p| {
                p.interval
                    .iter()
                    .map(|&bits| f64::from_bits(bits))
                    .collect()
            }),
            stopped: place.is_some_and(|p| p.stopped),
        })
    }
}

/// One loader per phase.
fn open_loaders(run: &Run) -> Result<Vec<Box<dyn Loader>>, TrainError> {
    let mut loaders = Vec::new();
    for phase in &run.phases {
        let loader = open::open(&phase.data, phase.seq_len, run.seed, Worker::ALL)?;
        if loader.vocab_size() > run.model.vocab_size {
            return Err(TrainError::Vocabulary {
                needs: loader.vocab_size(),
                has: run.model.vocab_size,
            });
        }
        loaders.push(loader);
    }
    Ok(loaders)
}

struct Loop<'a> {
    run: &'a Run,
    trainer: &'a mut Trainer,
    loaders: &'a mut [Box<dyn Loader>],
    dir: &'a mut RunDir,
    recorder: &'a mut Recorder,
    observer: &'a mut dyn Observer,
    summary: &'a mut RunSummary,
    resolved: &'a str,
    rates: Vec<f64>,
    /// Values so far of the metric of early stopping.
    watched: Vec<f64>,
    /// Losses of the log interval begun.
    interval: Vec<f64>,
    /// Early stopping ended the run.
    stopped: bool,
    checkpoint: Option<PathBuf>,
}

impl Loop<'_> {
    fn run(
        mut self,
        at: &mut usize,
        until: Option<usize>,
    ) -> Result<(Finish, Option<PathBuf>), TrainError> {
        let total = self.run.total_steps();
        let mut clock = Instant::now();
        let (mut tokens, mut waited) = (0usize, 0.0);
        let begin = *at;
        let started = Instant::now();
        while *at < total && !self.stopped {
            if until.is_some_and(|n| *at >= n) {
                return Ok((Finish::Paused, self.checkpoint));
            }
            if interrupt::requested() {
                self.save(*at)?;
                return Ok((Finish::Interrupted, self.checkpoint));
            }
            let (phase_idx, phase_step) = self.run.phase_at(*at);
            let phase = &self.run.phases[phase_idx];
            let asked = Instant::now();
            let batches: Vec<Batch> = (0..phase.accumulate)
                .map(|_| self.loaders[phase_idx].next(phase.batch))
                .collect::<Result<_, _>>()?;
            waited += asked.elapsed().as_secs_f64();
            let step = *at + 1;
            let lr = self.run.lr_at(*at);
            let probe = self.run.probe_every.is_some_and(|n| step.is_multiple_of(n));
            let outcome = self.trainer.step(step, lr, &batches, probe)?;
            *at = step;
            tokens += outcome.tokens;
            self.interval.push(outcome.cross_entropy);
            self.observer.step(step, &outcome);
            self.record_stats(step, &outcome)?;

            let phase_ends = phase_step + 1 == phase.steps;
            if step.is_multiple_of(self.run.log_every.max(1)) || phase_ends {
                let secs = clock.elapsed().as_secs_f64().max(1e-9);
                let line = LogLine {
                    step,
                    steps: total,
                    loss: self.interval.iter().sum::<f64>() / self.interval.len() as f64,
                    lr,
                    grad_norm: outcome.grad_norm,
                    tokens_per_sec: tokens as f64 / secs,
                    eta_secs: started.elapsed().as_secs_f64() / (step - begin) as f64
                        * (total - step) as f64,
                };
                self.recorder
                    .scalar(step as u64, tags::DATA_WAIT, waited / secs)?;
                self.record_line(&line, &outcome)?;
                waited = 0.0;
                self.observer.log(&line);
                tokens = 0;
                self.interval.clear();
                clock = Instant::now();
            }
            let pause = until == Some(step) && step < total;
            if phase.eval.every.is_some_and(|n| step.is_multiple_of(n)) || phase_ends || pause {
                let paused = Instant::now();
                self.stopped = self.evaluate(step, phase_idx)?;
                clock += paused.elapsed();
            }
            let due = self
                .run
                .checkpoint
                .every
                .is_some_and(|n| step.is_multiple_of(n));
            if (due || pause) && step < total && !self.stopped {
                let paused = Instant::now();
                self.save(step)?;
                clock += paused.elapsed();
            }
        }
        // A run that died between its last checkpoint and its summary has nothing left to write.
        if *at == begin && begin > 0 {
            self.checkpoint = checkpoint::latest(&self.dir.checkpoints_dir())?;
        } else {
            self.save(*at)?;
        }
        Ok((Finish::Finished, self.checkpoint))
    }

    fn record_line(&mut self, line: &LogLine, outcome: &StepOutcome) -> Result<(), TrainError> {
        let step = line.step as u64;
        let per_step: usize = self.run.phases[self.run.phase_at(line.step - 1).0].tokens_per_step();
        self.rates.push(line.tokens_per_sec);
        let mut values = vec![
            (tags::TRAIN_LOSS.to_string(), line.loss),
            ("train/loss_total".to_string(), outcome.loss),
            ("train/accuracy".to_string(), outcome.accuracy),
            (tags::TRAIN_LR.to_string(), line.lr),
            (tags::TRAIN_GRAD_NORM.to_string(), line.grad_norm),
            (tags::TOKENS_PER_SEC.to_string(), line.tokens_per_sec),
            (tags::TOKENS.to_string(), (line.step * per_step) as f64),
        ];
        values.extend(
            outcome
                .aux
                .iter()
                .map(|(n, v)| (format!("train/aux/{n}"), *v)),
        );
        let phase = self.run.phase_at(line.step - 1).0;
        let datasets = self.loaders[phase].tokens_by_dataset();
        values.extend(
            datasets
                .into_iter()
                .map(|(n, v)| (format!("data/tokens/{n}"), v as f64)),
        );
        for s in self.loaders[phase].skip_counts() {
            for (why, n) in [("empty", s.empty), ("short", s.short), ("bad", s.bad)] {
                if n > 0 {
                    values.push((format!("data/skipped/{}/{why}", s.dataset), n as f64));
                }
            }
        }
        for (tag, value) in &values {
            self.recorder.scalar(step, tag, *value)?;
        }
        self.summary
            .final_metrics
            .insert(tags::TRAIN_LOSS.into(), line.loss);
        let best = self
            .summary
            .best_metrics
            .entry(tags::TRAIN_LOSS.into())
            .or_insert(line.loss);
        *best = best.min(line.loss);
        let mut rates = self.rates.clone();
        rates.sort_by(f64::total_cmp);
        self.summary.tokens_per_sec = rates[rates.len() / 2];
        self.recorder.flush()?;
        if let Some(warning) = self.recorder.take_warning() {
            self.observer
                .note(&format!("warning: {warning}; metrics.jsonl goes on"));
        }
        Ok(())
    }

    fn record_stats(&mut self, step: usize, outcome: &StepOutcome) -> Result<(), TrainError> {
        for (path, s) in &outcome.stats {
            let [rms, max, over, ..] = s[..] else {
                continue;
            };
            let (kind, path) = match path.strip_prefix("grad:") {
                Some(p) => ("grad", p),
                None => ("act", path.as_str()),
            };
            for (name, value) in [("rms", rms), ("max", max), ("over_f16", over)] {
                self.recorder.scalar(
                    step as u64,
                    &format!("{kind}/{path}/{name}"),
                    f64::from(value),
                )?;
            }
            let h = histogram(s);
            self.recorder
                .histogram(step as u64, &format!("{kind}/{path}"), &h);
        }
        Ok(())
    }

    /// Returns whether the run may stop early.
    fn evaluate(&mut self, step: usize, phase_idx: usize) -> Result<bool, TrainError> {
        let phase = &self.run.phases[phase_idx];
        let mut results: Vec<EvalResult> = Vec::new();
        if phase.eval.sets.is_empty() {
            results = evaluate(
                self.trainer,
                self.loaders[phase_idx].as_ref(),
                "",
                phase.eval.rows,
                phase.batch,
            )?;
        } else {
            for (name, data) in &phase.eval.sets {
                let loader = open::open(data, phase.seq_len, self.run.seed, Worker::ALL)?;
                let prefix = format!("{name}/");
                results.extend(evaluate(
                    self.trainer,
                    loader.as_ref(),
                    &prefix,
                    phase.eval.rows,
                    phase.batch,
                )?);
            }
        }
        let scores = metrics(&results);
        for (name, value) in &scores {
            let tag = tags::eval(name);
            self.recorder.scalar(step as u64, &tag, *value)?;
            self.summary.final_metrics.insert(tag.clone(), *value);
            let best = self.summary.best_metrics.entry(tag).or_insert(*value);
            *best = if name.ends_with("loss") {
                best.min(*value)
            } else {
                best.max(*value)
            };
        }
        self.recorder.flush()?;
        self.observer.eval(step, &scores);
        let Some(e) = &self.run.early_stop else {
            return Ok(false);
        };
        self.watched.extend(scores.get(&e.metric));
        Ok(e.stops(&self.watched))
    }

    fn save(&mut self, step: usize) -> Result<(), TrainError> {
        self.recorder.sync()?;
        let (phase, _) = self.run.phase_at(step.saturating_sub(1));
        let place = Place {
            phase,
            loader: self.loaders[phase].state(),
            interval: self.interval.iter().map(|v| v.to_bits()).collect(),
            stopped: self.stopped,
        };
        let state = serde_json::to_value(&place).map_err(|e| TrainError::State(e.to_string()))?;
        let contents = Contents {
            step: step as u64,
            tokens: (0..step)
                .map(|s| self.run.phases[self.run.phase_at(s).0].tokens_per_step() as u64)
                .sum(),
            state: &state,
            model_ron: &self.trainer.model().to_ron(),
            run_ron: Some(self.resolved),
            params: self.trainer.params(),
            moments: true,
        };
        let trainer = &self.trainer;
        let root = self.dir.checkpoints_dir();
        let path = checkpoint::save(&root, &contents, &mut |key, _| match trainer.read(key) {
            Ok(HostTensor::F32(v)) => Ok(v),
            Ok(HostTensor::I32(_)) => Err("holds integers".into()),
            Err(e) => Err(e.to_string()),
        })?;
        // The new one stands whole, so older ones may go.
        let all = checkpoint::list(&root)?;
        for (_, old) in &all[..all.len().saturating_sub(self.run.checkpoint.keep.max(1))] {
            std::fs::remove_dir_all(old)
                .map_err(|e| TrainError::State(format!("cannot remove {}: {e}", old.display())))?;
        }
        self.dir.set_status(RunState::Running, step as u64, None)?;
        self.checkpoint = Some(path);
        Ok(())
    }
}

/// What the loop wants back from a checkpoint.
#[derive(Serialize, Deserialize)]
struct Place {
    phase: usize,
    loader: LoaderState,
    /// Losses of the log interval begun, as bits of f64, so that its mean is the same as without the interruption.
    #[serde(default)]
    interval: Vec<u64>,
    /// Early stopping ended the run here.
    #[serde(default)]
    stopped: bool,
}

/// Loads the newest checkpoint into the trainer and the loaders; returns its step and place.
fn restore(
    trainer: &mut Trainer,
    loaders: &mut [Box<dyn Loader>],
    dir: &RunDir,
) -> Result<(usize, Option<Place>), TrainError> {
    let root = dir.checkpoints_dir();
    // What a process that died while writing left behind; the folder's lock is ours.
    checkpoint::sweep_unfinished(&root)?;
    if checkpoint::latest(&root)?.is_none() {
        return Ok((0, None));
    }
    let found = Checkpoint::open(&root)?;
    let params = trainer.params().to_vec();
    found.restore(&params, true, &mut |key, ty, data| {
        trainer
            .write(key, ty, &HostTensor::F32(data))
            .map_err(|e| e.to_string())
    })?;
    let place: Place = serde_json::from_value(found.state.state.clone())
        .map_err(|e| TrainError::State(e.to_string()))?;
    let loader = loaders.get_mut(place.phase).ok_or_else(|| {
        TrainError::State(format!(
            "the checkpoint is of phase {}, the run has no such phase",
            place.phase
        ))
    })?;
    loader.restore(&place.loader)?;
    Ok((found.state.step as usize, Some(place)))
}

/// Buckets of the `stat` op as a TensorBoard histogram.
fn histogram(s: &[f32]) -> Histogram {
    let get = |i: usize| s.get(i).copied().map_or(0.0, f64::from);
    let counts: Vec<f64> = s
        .iter()
        .skip(STAT_LEN - STAT_BUCKETS)
        .map(|&c| f64::from(c))
        .collect();
    let num: f64 = counts.iter().sum();
    let side = (STAT_BUCKETS / 2) as i32;
    // Bucket i of the negative side holds magnitudes from 2^(side/2-1-i) up; of the positive side from 2^(i-side/2) up.
    let limits = (0..STAT_BUCKETS as i32)
        .map(|i| {
            if i < side {
                -(2f64.powi(side / 2 - 1 - i))
            } else {
                2f64.powi(i - side - side / 2 + 1)
            }
        })
        .collect();
    Histogram {
        min: get(3),
        max: get(4),
        num,
        sum: get(5) * num,
        sum_squares: get(0).powi(2) * num,
        limits,
        counts,
        non_finite: 0,
    }
}

fn metric_tags() -> Vec<String> {
    vec![
        tags::TRAIN_LOSS.into(),
        tags::eval("loss"),
        tags::eval("accuracy"),
        tags::TOKENS_PER_SEC.into(),
    ]
}

fn hyperparameters(run: &Run, request: &TrainRequest, counts: &Facts) -> Vec<(String, HParam)> {
    let first = run.phases.first();
    let mut h = vec![
        ("model".to_string(), HParam::Text(run.model.name.clone())),
        ("seed".to_string(), HParam::Number(run.seed as f64)),
        (
            "lr".to_string(),
            HParam::Number(first.map_or(0.0, |p| p.lr)),
        ),
        (
            "batch".to_string(),
            HParam::Number(first.map_or(0, |p| p.batch * p.accumulate) as f64),
        ),
        (
            "seq_len".to_string(),
            HParam::Number(first.map_or(0, |p| p.seq_len) as f64),
        ),
        (
            "d_model".to_string(),
            HParam::Number(run.model.d_model as f64),
        ),
        (
            "n_layers".to_string(),
            HParam::Number(run.model.layers.len() as f64),
        ),
        (
            "params_total".to_string(),
            HParam::Number(counts.params_total as f64),
        ),
        (
            "params_active".to_string(),
            HParam::Number(counts.params_active as f64),
        ),
    ];
    // An axis of the same name says it as the sweep does.
    h.retain(|(name, _)| !request.axes.contains_key(name));
    h.extend(request.axes.iter().map(|(k, v)| (k.clone(), hparam(v))));
    h
}

/// A value of an axis: TensorBoard draws numbers on scales and words as choices.
fn hparam(text: &str) -> HParam {
    match (text.parse::<f64>(), text.parse::<bool>()) {
        (Ok(x), _) if x.is_finite() => HParam::Number(x),
        (_, Ok(b)) => HParam::Flag(b),
        _ => HParam::Text(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_numbers_switches_or_words() {
        assert_eq!(hparam("1e-3"), HParam::Number(1e-3));
        assert_eq!(hparam("true"), HParam::Flag(true));
        assert_eq!(hparam("inf"), HParam::Text("inf".into()));
        assert_eq!(hparam("\"a.ron\""), HParam::Text("\"a.ron\"".into()));
    }
}
