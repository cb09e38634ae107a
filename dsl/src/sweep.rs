//! A checked sweep: its members, each a whole run, and how they are cut short or held comparable.

use crate::check::Valid;
use crate::run::{Goal, Run};
use serde::{Deserialize, Serialize};

/// Several runs that differ in named ways.
#[derive(Clone, Debug, PartialEq)]
pub struct Sweep {
    /// Name of the sweep's folder.
    pub name: String,
    /// What is compared: a metric of evaluations, such as `"accuracy"`; default `"loss"`.
    pub metric: String,
    /// Which way is better.
    pub goal: Goal,
    /// What the sweep is to answer, for the report.
    pub question: Option<String>,
    /// The group that the others are tested against; `None`: the best.
    pub baseline: Option<String>,
    /// Every member, in the order of the file: points outermost, then axes as listed, seeds innermost. Names are unique.
    pub members: Vec<Member>,
    /// Constraints that members are adjusted to before they run.
    pub hold: Option<Hold>,
    /// Successive halving.
    pub halving: Option<Halving>,
}

/// One run of a sweep.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// Unique in the sweep, usable as a folder name, such as `mamba2-lr=0.001-seed=1`.
    pub name: String,
    /// As `name` without the seed: members of one group are repetitions of one another.
    pub group: String,
    /// Name of its point; empty where the sweep has none.
    pub point: String,
    /// What was changed in the base run, as (path, value in RON).
    pub set: Vec<(String, String)>,
    /// The whole run.
    pub run: Valid<Run>,
    /// The document behind `run`, for knobs.
    pub(crate) doc: crate::load::Document,
}

/// All members are brought to equal counts by turning knobs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hold {
    /// What is held equal.
    pub quantity: Quantity,
    /// The value; default: that of the first member.
    #[serde(default)]
    pub target: Option<f64>,
    /// What may be turned, in this order.
    pub knobs: Vec<Knob>,
    /// Accepted relative distance from the target. Default 0.02.
    #[serde(default = "tolerance")]
    pub tolerance: f64,
}

fn tolerance() -> f64 {
    0.02
}

/// A quantity that can be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Quantity {
    /// All parameters.
    #[serde(rename = "params_total")]
    ParamsTotal,
    /// Parameters that one token uses.
    #[serde(rename = "params_active")]
    ParamsActive,
    /// FLOPs of the forward pass per token at the run's `seq_len`.
    #[serde(rename = "flops_per_token")]
    FlopsPerToken,
    /// Recurrent state of one sequence, without the KV cache.
    #[serde(rename = "state_bytes")]
    StateBytes,
    /// What decoding carries for one sequence: recurrent state and KV cache at the run's `seq_len`.
    #[serde(rename = "decode_bytes")]
    DecodeBytes,
}

impl Quantity {
    /// As it stands in a file.
    pub fn name(self) -> &'static str {
        match self {
            Quantity::ParamsTotal => "params_total",
            Quantity::ParamsActive => "params_active",
            Quantity::FlopsPerToken => "flops_per_token",
            Quantity::StateBytes => "state_bytes",
            Quantity::DecodeBytes => "decode_bytes",
        }
    }
}

/// A whole-number field that a solver may change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Knob {
    /// Such as `model.ffns.mlp.d_ff`.
    pub path: String,
    /// Smallest value tried, 1 or more.
    pub min: usize,
    /// Largest value tried.
    pub max: usize,
    /// Values are multiples of this. Default 1.
    #[serde(default = "one")]
    pub multiple: usize,
}

fn one() -> usize {
    1
}

/// Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): all groups train to the first rung, and after each rung only
/// the best of them, by the sweep's metric there (mean over seeds), go on to the next. Schedules span the whole run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Halving {
    /// Steps of the first rung.
    pub first_steps: usize,
    /// One in so many survives, and rungs grow by it. 2 or more. Default 2.
    #[serde(default = "two")]
    pub factor: usize,
}

fn two() -> usize {
    2
}

impl Halving {
    /// Steps at which groups are compared: `first_steps`, then `factor` times as many, below `total`.
    pub fn rungs(&self, total: usize) -> Vec<usize> {
        let mut rungs = Vec::new();
        let mut at = self.first_steps.max(1);
        while at < total {
            rungs.push(at);
            at = at.saturating_mul(self.factor.max(2));
        }
        rungs
    }

    /// How many of `n` groups go on after a rung: one in `factor`, rounded up.
    pub fn survivors(&self, n: usize) -> usize {
        n.div_ceil(self.factor.max(2)).max(1)
    }
}

/// What [`Hold`] needs to know of a model; filled in by a floor that can count.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// All parameters.
    pub params_total: f64,
    /// Parameters that one token uses.
    pub params_active: f64,
    /// Forward FLOPs per token.
    pub flops_per_token: f64,
    /// Recurrent state of one sequence, bytes.
    pub state_bytes: f64,
    /// Recurrent state and KV cache of one sequence, bytes.
    pub decode_bytes: f64,
}

impl Counts {
    /// The one quantity.
    pub fn get(&self, q: Quantity) -> f64 {
        match q {
            Quantity::ParamsTotal => self.params_total,
            Quantity::ParamsActive => self.params_active,
            Quantity::FlopsPerToken => self.flops_per_token,
            Quantity::StateBytes => self.state_bytes,
            Quantity::DecodeBytes => self.decode_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rungs_grow_by_the_factor_and_end_before_the_end() {
        let h = Halving {
            first_steps: 10,
            factor: 3,
        };
        assert_eq!(h.rungs(90), [10, 30]);
        assert_eq!(h.rungs(91), [10, 30, 90]);
        assert!(h.rungs(10).is_empty());
        assert_eq!([9, 4, 3, 1].map(|n| h.survivors(n)), [3, 2, 1, 1]);
    }
}
