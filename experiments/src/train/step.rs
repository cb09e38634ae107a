//! One optimiser step on an engine: micro-batches in, loss and gradient norm out.

use super::{TrainError, explain};
use crate::data::{Batch, IGNORED};
use crate::init;
use crate::program::{self, ACTIVATION_ALPHA, Program, TrainOptions};
use crate::transfer::{self, Scaled};
use marimba_backend::{BackendError, Engine, HostTensor, Outputs, ProgramId};
use marimba_dsl::model::Model;
use marimba_dsl::run::{Precision, Reduction, Run};
use marimba_ir::{DType, Param, Plan, Type};
use std::collections::{BTreeSet, HashMap};

/// What a program was compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    Train {
        batch: usize,
        seq_len: usize,
        probe: bool,
    },
    Eval {
        batch: usize,
        seq_len: usize,
    },
}

/// What a step did.
#[derive(Clone, Debug, Default)]
pub struct StepOutcome {
    /// What was minimised: cross entropy, z-loss, router and activation losses.
    pub loss: f64,
    /// Mean cross entropy of the valid targets, nats.
    pub cross_entropy: f64,
    /// Share of valid targets whose logit was the largest.
    pub accuracy: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens read.
    pub tokens: usize,
    /// Unweighted router losses, means over micro-batches.
    pub aux: Vec<(String, f64)>,
    /// Statistics of activations and gradients, of the last micro-batch, when probed.
    pub stats: Vec<(String, Vec<f32>)>,
}

/// Parameters and programs of one run on one engine.
pub struct Trainer {
    engine: Box<dyn Engine>,
    model: Model,
    options: TrainOptions,
    /// Names of parameters whose `master` the optimiser moves.
    masters: BTreeSet<String>,
    alpha_from: Option<(f64, usize)>,
    params: Vec<Param>,
    optimizer: ProgramId,
    programs: HashMap<Key, ProgramId>,
    plans: HashMap<Key, Plan>,
}

impl Trainer {
    /// Loads the optimiser and writes initial parameters.
    ///
    /// # Errors
    /// [`TrainError`] when the run does not fit the engine.
    pub fn new(run: &Run, mut engine: Box<dyn Engine>) -> Result<Trainer, TrainError> {
        let help = match (run.precision, engine.name()) {
            (Precision::F32, _) | (Precision::Bf16 | Precision::Bf16Fp8, "cuda") => None,
            (Precision::Bf16 | Precision::Bf16Fp8, _) => {
                Some("set precision: F32, or train on a GPU")
            }
        };
        if let Some(help) = help {
            return Err(TrainError::Unsupported {
                what: format!("precision {:?}", run.precision),
                backend: engine.name(),
                help,
            });
        }
        engine.set_deterministic(run.deterministic);
        let Scaled { model, params, lr } = transfer::apply(run)?;
        let has_master = |p: &&Param| p.trainable && p.compute != DType::F32;
        let masters = params.iter().filter(has_master);
        let masters: BTreeSet<String> = masters.map(|p| p.name.clone()).collect();
        init::init_all(&params, run.seed, crate::engine::cores(), |p, data| {
            write_param(engine.as_mut(), &masters, p, &HostTensor::F32(data))
        })?;
        // The graph takes the mean over taps; a sum is that many times as much.
        let alpha_from = match &run.activation_loss {
            Some(a) => {
                let taps = program::count_activation_taps(&model, a)?;
                let factor = if a.reduction == Reduction::Sum {
                    taps as f64
                } else {
                    1.0
                };
                (taps > 0).then_some((a.alpha * factor, a.from_step))
            }
            None => None,
        };
        let optimizer = program::optimizer(&params, run, &lr)?;
        let optimizer = engine.load(optimizer.graph, optimizer.plan)?;
        Ok(Trainer {
            engine,
            model,
            options: TrainOptions::of(run),
            masters,
            alpha_from,
            params,
            optimizer,
            programs: HashMap::new(),
            plans: HashMap::new(),
        })
    }

    /// The parameters' descriptions.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// The model as it is trained: the run's, scaled by its transfer.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The engine, for reading parameters and moments.
    pub fn engine(&self) -> &dyn Engine {
        self.engine.as_ref()
    }

    /// The engine, for loading parameters and moments.
    pub fn engine_mut(&mut self) -> &mut dyn Engine {
        self.engine.as_mut()
    }

    /// Reads what checkpoints hold: `param:NAME` is the f32 number that the optimiser moves.
    ///
    /// # Errors
    /// As [`Engine::read`].
    pub fn read(&self, key: &str) -> Result<HostTensor, BackendError> {
        match key.strip_prefix("param:") {
            Some(name) if self.masters.contains(name) => {
                self.engine.read(&format!("master:{name}"))
            }
            Some(_) | None => self.engine.read(key),
        }
    }

    /// Overwrites what checkpoints hold: a parameter is written in every precision in which it is kept.
    ///
    /// # Errors
    /// As [`Engine::write`].
    pub fn write(&mut self, key: &str, ty: &Type, data: &HostTensor) -> Result<(), BackendError> {
        let name = key.strip_prefix("param:");
        match name.and_then(|name| self.params.iter().find(|p| p.name == name)) {
            Some(p) => write_param(self.engine.as_mut(), &self.masters, p, data),
            None => self.engine.write(key, ty, data),
        }
    }

    /// Loads the training program of a shape; nothing is allocated when it does not fit.
    ///
    /// # Errors
    /// [`TrainError`] when it does not fit.
    pub fn prepare(&mut self, batch: usize, seq_len: usize) -> Result<&Plan, TrainError> {
        let key = Key::Train {
            batch,
            seq_len,
            probe: false,
        };
        self.program(key)?;
        Ok(&self.plans[&key])
    }

    fn program(&mut self, key: Key) -> Result<ProgramId, TrainError> {
        if let Some(&id) = self.programs.get(&key) {
            return Ok(id);
        }
        let Program { graph, plan } = match key {
            Key::Train {
                batch,
                seq_len,
                probe,
            } => program::training(
                &self.model,
                &TrainOptions {
                    probe,
                    ..self.options.clone()
                },
                batch,
                seq_len,
            )?,
            Key::Eval { batch, seq_len } => {
                program::evaluation(&self.model, self.options.compute, batch, seq_len)?
            }
        };
        let id = self.engine.load(graph, plan.clone())?;
        self.programs.insert(key, id);
        self.plans.insert(key, plan);
        Ok(id)
    }

    /// Runs step number `step` (from 1) on micro-batches of one shape.
    ///
    /// # Errors
    /// [`TrainError::NonFinite`] when the loss or the gradient norm is not finite; parameters are then as before the step.
    pub fn step(
        &mut self,
        step: usize,
        lr: f64,
        batches: &[Batch],
        probe: bool,
    ) -> Result<StepOutcome, TrainError> {
        let targets: usize = batches.iter().map(Batch::n_targets).sum();
        let scale = 1.0 / targets.max(1) as f32;
        let alpha = match self.alpha_from {
            Some((alpha, from)) if step > from => alpha as f32 / batches.len().max(1) as f32,
            _ => 0.0,
        };
        let mut out = StepOutcome::default();
        for (i, batch) in batches.iter().enumerate() {
            let last = i + 1 == batches.len();
            let id = self.program(Key::Train {
                batch: batch.rows,
                seq_len: batch.seq_len,
                probe: probe && last,
            })?;
            let mut inputs = loss_inputs(batch, scale, batches.len());
            inputs.push((
                "grad_keep",
                HostTensor::F32(vec![if i == 0 { 0.0 } else { 1.0 }]),
            ));
            if self.alpha_from.is_some() {
                inputs.push((ACTIVATION_ALPHA, HostTensor::F32(vec![alpha])));
            }
            let outputs = self.engine.run(id, &inputs)?;
            let loss = scalar(&outputs, "loss");
            if !loss.is_finite() {
                let found = self.engine.run_checked(id, &inputs)?;
                return Err(TrainError::NonFinite {
                    what: "loss",
                    step,
                    explanation: explain(found),
                });
            }
            out.loss += loss;
            out.tokens += batch.tokens.len();
            out.cross_entropy += sum(&outputs, "nll") * f64::from(scale);
            out.accuracy += hits(&outputs, batch) * f64::from(scale);
            collect(&mut out, outputs, batches.len());
        }
        let inputs = [
            ("lr", HostTensor::F32(vec![lr as f32])),
            ("step", HostTensor::F32(vec![step as f32])),
        ];
        let outputs = self.engine.run(self.optimizer, &inputs)?;
        out.grad_norm = scalar(&outputs, "grad_norm");
        if !out.grad_norm.is_finite() {
            let explanation = match batches.last() {
                Some(batch) => {
                    let id = self.program(Key::Train {
                        batch: batch.rows,
                        seq_len: batch.seq_len,
                        probe: false,
                    })?;
                    let mut inputs = loss_inputs(batch, scale, batches.len());
                    inputs.push(("grad_keep", HostTensor::F32(vec![0.0])));
                    if self.alpha_from.is_some() {
                        inputs.push((ACTIVATION_ALPHA, HostTensor::F32(vec![alpha])));
                    }
                    explain(self.engine.run_checked(id, &inputs)?)
                }
                None => explain(None),
            };
            return Err(TrainError::NonFinite {
                what: "gradient norm",
                step,
                explanation,
            });
        }
        Ok(out)
    }

    /// Forward only: per token `(nll, hit)` of a batch, `f32[B T]` each.
    ///
    /// # Errors
    /// [`TrainError`] when the program does not fit.
    pub fn forward(&mut self, batch: &Batch) -> Result<(Vec<f32>, Vec<f32>), TrainError> {
        let id = self.program(Key::Eval {
            batch: batch.rows,
            seq_len: batch.seq_len,
        })?;
        let mut outputs = self.engine.run(id, &loss_inputs(batch, 1.0, 1))?;
        let mut take = |name: &str| match outputs.remove(name) {
            Some(HostTensor::F32(v)) => v,
            Some(HostTensor::I32(_)) | None => Vec::new(),
        };
        Ok((take("nll"), take("hit")))
    }
}

fn write_param(
    engine: &mut dyn Engine,
    masters: &BTreeSet<String>,
    p: &Param,
    data: &HostTensor,
) -> Result<(), BackendError> {
    if masters.contains(&p.name) {
        engine.write(&format!("master:{}", p.name), &p.ty, data)?;
    }
    engine.write(
        &format!("param:{}", p.name),
        &p.ty.with_dtype(p.compute),
        data,
    )
}

/// What a training or evaluation program reads of a batch.
pub(crate) fn loss_inputs(
    batch: &Batch,
    scale: f32,
    micro_batches: usize,
) -> Vec<(&'static str, HostTensor)> {
    vec![
        ("tokens", HostTensor::I32(batch.tokens.clone())),
        ("pos", HostTensor::I32(batch.positions.clone())),
        ("targets", HostTensor::I32(batch.targets.clone())),
        ("loss_scale", HostTensor::F32(vec![scale])),
        (
            "aux_scale",
            HostTensor::F32(vec![1.0 / micro_batches.max(1) as f32]),
        ),
    ]
}

fn scalar(outputs: &Outputs, name: &str) -> f64 {
    outputs
        .get(name)
        .and_then(|t| t.f32().first())
        .map_or(f64::NAN, |&v| f64::from(v))
}

fn sum(outputs: &Outputs, name: &str) -> f64 {
    outputs
        .get(name)
        .map_or(0.0, |t| t.f32().iter().map(|&v| f64::from(v)).sum())
}

fn hits(outputs: &Outputs, batch: &Batch) -> f64 {
    let Some(hit) = outputs.get("hit") else {
        return 0.0;
    };
    hit.f32()
        .iter()
        .zip(&batch.targets)
        .filter(|(_, t)| **t != IGNORED)
        .map(|(h, _)| f64::from(*h))
        .sum()
}

fn collect(out: &mut StepOutcome, outputs: Outputs, micro_batches: usize) {
    let mut names: Vec<&String> = outputs.keys().collect();
    names.sort();
    for name in names {
        if let Some(aux) = name.strip_prefix("aux:") {
            let v = scalar(&outputs, name) / micro_batches as f64;
            match out.aux.iter_mut().find(|(n, _)| n == aux) {
                Some((_, old)) => *old += v,
                None => out.aux.push((aux.to_string(), v)),
            }
        } else if let Some(path) = name.strip_prefix("stat:") {
            out.stats
                .push((path.to_string(), outputs[name].f32().to_vec()));
        }
    }
}
