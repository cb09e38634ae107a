//! A checked run: model, phases of data and schedule, optimiser, logging. What [`crate::check`] makes of a run file.

use crate::data::Data;
use crate::model::Model;
use serde::{Deserialize, Serialize};

/// One training run.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// Name of the run folder.
    pub name: String,
    /// What is trained.
    pub model: Model,
    /// Number formats.
    pub precision: Precision,
    /// Seed of initialisation, and of data that does not state its own.
    pub seed: u64,
    /// One after the other; at least one.
    pub phases: Vec<Phase>,
    /// The optimiser.
    pub optimizer: AdamW,
    /// Gradients are scaled down to this global L2 norm.
    pub grad_clip: Option<f64>,
    /// Coefficient of mean(logsumexp(logits)^2); 0 is off.
    pub z_loss: f64,
    /// Penalty on mean-square activations (Jamba-1.5).
    pub activation_loss: Option<ActivationLoss>,
    /// Learning-rate transfer from a narrower model.
    pub transfer: Option<Transfer>,
    /// What is kept for the backward pass.
    pub recompute: Recompute,
    /// Steps between log lines.
    pub log_every: usize,
    /// When and how many checkpoints are kept.
    pub checkpoint: Checkpoint,
    /// Steps between activation statistics; `None` is never.
    pub probe_every: Option<usize>,
    /// Stop when good enough.
    pub early_stop: Option<EarlyStop>,
    /// Where it runs.
    pub backend: Backend,
    /// Forbid anything that is not bitwise reproducible.
    pub deterministic: bool,
}

/// Initial values, learning rates and multipliers follow the width, so that a learning rate found on the base serves this model too
/// (muP, arXiv 2203.03466).
#[derive(Clone, Debug, PartialEq)]
pub struct Transfer {
    /// The same model with other widths, on which the learning rate was found.
    pub base: Model,
}

/// A stretch of steps with one data source and one schedule.
#[derive(Clone, Debug, PartialEq)]
pub struct Phase {
    /// For logs, such as `anneal`.
    pub name: String,
    /// Optimiser steps, 1 or more.
    pub steps: usize,
    /// Training rows.
    pub data: Data,
    /// Rows per micro-batch.
    pub batch: usize,
    /// T, tokens per row.
    pub seq_len: usize,
    /// Micro-batches per optimiser step.
    pub accumulate: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Its course over the phase.
    pub schedule: Schedule,
    /// Evaluation during and at the end of the phase.
    pub eval: Eval,
}

/// The learning rate's course as a factor on the peak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// Rise from 0 to the peak. Default none.
    pub warmup: Warmup,
    /// What follows. Default constant.
    pub decay: Decay,
}

/// Rise over the first n steps: step i (from 0) has the factor `((i + 1) / n)^p`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Warmup {
    /// Starts at the peak.
    #[default]
    None,
    /// p = 1.
    Linear(usize),
    /// p = 2.
    Quadratic(usize),
}

/// Course after the warm-up, over the steps left; the last step has the final factor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Decay {
    /// Stays at the peak.
    #[default]
    Constant,
    /// Half a cosine down to `final_fraction` of the peak.
    Cosine(Fall),
    /// A straight line down to `final_fraction` of the peak.
    Linear(Fall),
}

/// Where a decay ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fall {
    /// Final learning rate over the peak, 0 to 1. Default 0.
    pub final_fraction: f64,
    /// Hold the peak after the warm-up for this many steps before falling. Default 0.
    pub hold: usize,
}

/// Evaluation.
#[derive(Clone, Debug, PartialEq)]
pub struct Eval {
    /// Steps between evaluations; `None`: only at the end of the phase.
    pub every: Option<usize>,
    /// At most this many rows of each set.
    pub rows: usize,
    /// Sets by name; empty: the evaluation sets of the training data itself.
    pub sets: Vec<(String, Data)>,
}

/// Number formats of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Precision {
    /// Everything in f32.
    #[default]
    F32,
    /// Activations and matrix products in bf16, master weights and statistics in f32.
    Bf16,
    /// As `Bf16`, products with the projections of layers in 8 bits where all sizes are at least 256: values and weights in e4m3,
    /// gradients in e5m2, one factor a tensor from its largest magnitude at that moment. On a GPU of compute capability 8.9 or later.
    /// Evaluation stays in bf16.
    Bf16Fp8,
}

/// AdamW. No decay on norms, biases, `A_log`, `dt_bias` and `D`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW {
    /// Peak learning rate of phases that do not state one. Above 0. Default 1e-3.
    pub lr: f64,
    /// Decay rates of the moments, each in [0, 1). Default (0.9, 0.95).
    pub betas: (f64, f64),
    /// Added to the root of the second moment. Above 0. Default 1e-8.
    pub eps: f64,
    /// 0 or more. Default 0.1.
    pub weight_decay: f64,
    /// `w -= lr * weight_decay * w` beside the Adam step (AdamW, arXiv 1711.05101), not through the moments. Default true.
    pub decoupled: bool,
}

impl Default for AdamW {
    fn default() -> Self {
        AdamW {
            lr: 1e-3,
            betas: (0.9, 0.95),
            eps: 1e-8,
            weight_decay: 0.1,
            decoupled: true,
        }
    }
}

/// `alpha * reduce over taps(mean(x^2))`, added to the loss (Jamba-1.5, section 3.2; the taps are this project's reading).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ActivationLoss {
    /// Coefficient, above 0. Default 1e-5.
    pub alpha: f64,
    /// Where activations are measured. Default [ExpertOut, MambaOut]: the two places where growth was seen.
    pub taps: Vec<Tap>,
    /// Over taps. Default mean, so that alpha does not depend on depth.
    pub reduction: Reduction,
    /// First step with the penalty, counted over all phases. Default 0.
    pub from_step: usize,
}

impl Default for ActivationLoss {
    fn default() -> Self {
        ActivationLoss {
            alpha: 1e-5,
            taps: vec![Tap::ExpertOut, Tap::MambaOut],
            reduction: Reduction::Mean,
            from_step: 0,
        }
    }
}

/// A kind of place where activations are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tap {
    /// Each expert's result before the routing weight, over routed tokens.
    ExpertOut,
    /// Result of every ffn or mixture.
    FfnOut,
    /// Result of the output projection of Mamba mixers.
    MambaOut,
    /// Residual stream after each layer.
    Residual,
}

/// How taps are combined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reduction {
    /// Mean over taps.
    #[default]
    Mean,
    /// Sum over taps.
    Sum,
}

/// What the forward pass keeps for the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Recompute {
    /// All that is read: fastest, most memory.
    #[default]
    None,
    /// The inputs of blocks; the rest is computed again (about a third more FLOPs).
    Block,
    /// As little recomputation as keeps activations within this many bytes.
    Budget(u64),
}

/// Checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Steps between checkpoints. Default `None`: only at the end and on interruption.
    pub every: Option<usize>,
    /// The last so many are kept, 1 or more. Default 2.
    pub keep: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint {
            every: None,
            keep: 2,
        }
    }
}

/// Stop as soon as an evaluation metric is good enough, or has stopped getting better. One of `threshold` and `patience` is required.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EarlyStop {
    /// Metric of an evaluation, such as `"accuracy"` or `"loss"`; with several sets, the mean over them, or `"set/accuracy"`.
    pub metric: String,
    /// Stop once the metric is as good as this. Default: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    /// Stop after so many evaluations in a row without a new best value, 1 or more. Default: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience: Option<usize>,
    /// Which way is better. Default Min for `"loss"` and names that end in `/loss`, else Max.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goal: Option<Goal>,
}

impl EarlyStop {
    /// Whether to stop after evaluations that gave these values, in their order.
    pub fn stops(&self, values: &[f64]) -> bool {
        let goal = self.goal.unwrap_or_else(|| Goal::of_metric(&self.metric));
        let Some(&last) = values.last() else {
            return false;
        };
        let reached = self
            .threshold
            .is_some_and(|t| last == t || goal.better(last, t));
        let stale = || {
            let mut best: Option<(usize, f64)> = None;
            for (i, &v) in values.iter().enumerate() {
                if !v.is_nan() && best.is_none_or(|(_, b)| goal.better(v, b)) {
                    best = Some((i, v));
                }
            }
            values.len() - best.map_or(0, |(i, _)| i + 1)
        };
        reached || self.patience.is_some_and(|n| stale() >= n)
    }
}

/// Which way is better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Goal {
    /// More is better.
    #[default]
    Max,
    /// Less is better.
    Min,
}

impl Goal {
    /// Of an evaluation metric by its name: less for losses, more for everything else.
    pub fn of_metric(name: &str) -> Goal {
        if name == "loss" || name.ends_with("/loss") {
            Goal::Min
        } else {
            Goal::Max
        }
    }

    /// Whether `a` is strictly better than `b`; false where either is NaN.
    pub fn better(self, a: f64, b: f64) -> bool {
        match self {
            Goal::Max => a > b,
            Goal::Min => a < b,
        }
    }
}

/// Where a run executes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backend {
    /// The best this machine has.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// Native CPU.
    #[serde(rename = "cpu")]
    Cpu,
    /// The reference.
    #[serde(rename = "dfdx")]
    Dfdx,
    /// NVIDIA GPUs.
    #[serde(rename = "cuda")]
    Cuda,
}

impl Schedule {
    /// Factor on the peak at `step` of a phase of `steps`, from 0. Steps past the end have the last step's factor.
    pub fn factor(&self, step: usize, steps: usize) -> f64 {
        let n = match self.warmup {
            Warmup::None => 0,
            Warmup::Linear(n) | Warmup::Quadratic(n) => n,
        };
        if step < n {
            let x = (step + 1) as f64 / n as f64;
            return match self.warmup {
                Warmup::Quadratic(_) => x * x,
                Warmup::None | Warmup::Linear(_) => x,
            };
        }
        let fall = match self.decay {
            Decay::Constant => return 1.0,
            Decay::Cosine(f) | Decay::Linear(f) => f,
        };
        // From 0 at the last step on the peak to 1 at the last step of the phase.
        let start = n + fall.hold;
        let last = steps.saturating_sub(1);
        let x = if step < start {
            0.0
        } else if last <= start {
            1.0
        } else {
            ((step - start) as f64 / (last - start) as f64).min(1.0)
        };
        let shape = match self.decay {
            Decay::Cosine(_) => 0.5 * (1.0 + (std::f64::consts::PI * x).cos()),
            Decay::Linear(_) | Decay::Constant => 1.0 - x,
        };
        fall.final_fraction + (1.0 - fall.final_fraction) * shape
    }
}

impl Phase {
    /// Learning rate at `step` of this phase, from 0.
    pub fn lr_at(&self, step: usize) -> f64 {
        self.lr * self.schedule.factor(step, self.steps)
    }

    /// Tokens per optimiser step.
    pub fn tokens_per_step(&self) -> usize {
        self.batch * self.seq_len * self.accumulate
    }
}

impl Run {
    /// Optimiser steps of all phases.
    pub fn total_steps(&self) -> usize {
        self.phases.iter().map(|p| p.steps).sum()
    }

    /// The phase that holds a step counted over all phases, and the step within it; steps past the end belong to the last phase.
    pub fn phase_at(&self, step: usize) -> (usize, usize) {
        let mut start = 0;
        for (i, p) in self.phases.iter().enumerate() {
            if step < start + p.steps || i + 1 == self.phases.len() {
                return (i, step - start);
            }
            start += p.steps;
        }
        (0, step)
    }

    /// Learning rate at a step counted over all phases.
    pub fn lr_at(&self, step: usize) -> f64 {
        let (i, s) = self.phase_at(step);
        self.phases.get(i).map_or(0.0, |p| p.lr_at(s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factor(warmup: Warmup, decay: Decay, step: usize) -> f64 {
        Schedule { warmup, decay }.factor(step, 11)
    }

    #[test]
    fn warm_up_reaches_the_peak_at_its_last_step() {
        assert_eq!(factor(Warmup::Linear(4), Decay::Constant, 0), 0.25);
        assert_eq!(factor(Warmup::Quadratic(4), Decay::Constant, 1), 0.25);
        assert_eq!(factor(Warmup::Quadratic(4), Decay::Constant, 3), 1.0);
        assert_eq!(factor(Warmup::None, Decay::Constant, 0), 1.0);
    }

    #[test]
    fn decay_ends_at_its_final_fraction() {
        let fall = Fall {
            final_fraction: 0.1,
            hold: 0,
        };
        for decay in [Decay::Cosine(fall), Decay::Linear(fall)] {
            assert_eq!(factor(Warmup::None, decay, 0), 1.0);
            assert!((factor(Warmup::None, decay, 5) - 0.55).abs() < 1e-12);
            assert!((factor(Warmup::None, decay, 10) - 0.1).abs() < 1e-12);
            assert!((factor(Warmup::None, decay, 99) - 0.1).abs() < 1e-12);
        }
        assert!(
            (factor(Warmup::None, Decay::Cosine(fall), 1)
                - (0.1 + 0.45 * (1.0 + (0.1 * std::f64::consts::PI).cos())))
            .abs()
                < 1e-12
        );
    }

    #[test]
    fn early_stops() {
        let stop = |metric: &str, threshold, patience| EarlyStop {
            metric: metric.to_owned(),
            threshold,
            patience,
            goal: None,
        };
        let good = stop("accuracy", Some(0.9), None);
        assert!(!good.stops(&[0.95, 0.8]) && good.stops(&[0.9]) && !good.stops(&[]));
        let low = stop("text/loss", Some(2.0), None);
        assert!(low.stops(&[1.9]) && !low.stops(&[2.1]));
        let stale = stop("loss", None, Some(2));
        assert!(!stale.stops(&[3.0, 2.0, 2.5]));
        assert!(stale.stops(&[3.0, 2.0, 2.5, 2.0]));
        assert!(stale.stops(&[f64::NAN, f64::NAN]) && !stale.stops(&[3.0, f64::NAN, 2.0]));
    }

    #[test]
    fn hold_keeps_the_peak() {
        let decay = Decay::Linear(Fall {
            final_fraction: 0.0,
            hold: 5,
        });
        assert_eq!(factor(Warmup::None, decay, 5), 1.0);
        assert!((factor(Warmup::None, decay, 6) - 0.8).abs() < 1e-12);
        assert_eq!(factor(Warmup::None, decay, 10), 0.0);
    }
}
