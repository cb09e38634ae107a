//! The surface syntax of a sweep file.
//!
//! ```ron
//! (
//!     name: "mixers",
//!     base: "run.ron",                                    // or File(path: .., set: {..}), or the run itself
//!     points: [
//!         (name: "attention", set: {"model": "models/attention.ron"}),
//!         (name: "hybrid", set: {"model": "models/hybrid.ron", "steps": 200}),
//!     ],
//!     axes: [
//!         (path: "optimizer.lr", values: [1e-3, 3e-3]),
//!         (path: "model.mixers.mamba.d_state", values: [8, 16], only_if: {"point": ["hybrid"]}),
//!     ],
//!     seeds: [0, 1],
//!     metric: "accuracy", goal: Max,
//! )
//! ```
//! Members are all points crossed with all axes and seeds. Paths are those of `--set`.

use super::{Named, Raw};
use crate::run::Goal;
use crate::sweep::{Halving, Hold};
use serde::Deserialize;

/// A sweep file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sweep {
    /// Folder of the sweep. Default `"sweep"`.
    pub name: Option<String>,
    /// The run from which members differ. Required.
    pub base: Option<Raw<()>>,
    /// Named settings; each is a member, or a family of members where there are axes. Default: the base alone.
    pub points: Vec<Point>,
    /// What varies in every point.
    pub axes: Vec<Axis>,
    /// Values of `seed`, innermost. Default: the base's only.
    pub seeds: Vec<u64>,
    /// Metric that is compared. Default `"loss"`.
    pub metric: Option<String>,
    /// What the sweep is to answer; stands over its report. Default none.
    pub question: Option<String>,
    /// Group that the others are tested against. Default: the best.
    pub baseline: Option<String>,
    /// Max or Min; default Min for `"loss"` and names that end in `/loss`, else Max.
    pub goal: Option<Goal>,
    /// Hold a count equal over members by turning knobs. Default none.
    pub hold: Option<Hold>,
    /// Successive halving. Default none: every member runs to its end.
    pub halving: Option<Halving>,
}

/// A named setting.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// Unique.
    pub name: String,
    /// Paths and values: `{"model": "other.ron", "optimizer.lr": 1e-4}`.
    #[serde(default)]
    pub set: Named<Raw<()>>,
}

/// One axis: exactly one of `values`, `range`, `log_range`, `random`, or `zip` of several paths that move together.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Axis {
    /// Name in members' names. Default: the last part of the path.
    pub name: Option<String>,
    /// What is set.
    pub path: Option<String>,
    /// These values.
    pub values: Option<Vec<Raw<()>>>,
    /// Evenly spaced values.
    pub range: Option<Range>,
    /// Geometrically spaced values.
    pub log_range: Option<LogRange>,
    /// Random values.
    pub random: Option<Random>,
    /// Several paths that move together: `{"model.d_model": [64, 128], "optimizer.lr": [1e-3, 5e-4]}`.
    pub zip: Named<Vec<Raw<()>>>,
    /// Names of the values in members' names. Default: the values themselves, or their numbers where they are long.
    pub labels: Vec<String>,
    /// Only where these axes (or `"point"`, by name) have one of these values (by label); elsewhere the base's value stays.
    pub only_if: Named<Vec<Label>>,
}

/// A label, written as a text or as the value itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Label(pub String);

impl<'de> Deserialize<'de> for Label {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl serde::de::Visitor<'_> for V {
            type Value = Label;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a text, a number or `true`/`false`")
            }

            fn visit_str<E>(self, s: &str) -> Result<Label, E> {
                Ok(Label(s.to_owned()))
            }

            fn visit_u64<E>(self, x: u64) -> Result<Label, E> {
                Ok(Label(x.to_string()))
            }

            fn visit_i64<E>(self, x: i64) -> Result<Label, E> {
                Ok(Label(x.to_string()))
            }

            fn visit_f64<E>(self, x: f64) -> Result<Label, E> {
                Ok(Label(x.to_string()))
            }

            fn visit_bool<E>(self, x: bool) -> Result<Label, E> {
                Ok(Label(x.to_string()))
            }
        }
        d.deserialize_any(V)
    }
}

/// `from`, `from + step`, ... up to and with `to`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// First value.
    pub from: f64,
    /// Bound, included when met.
    pub to: f64,
    /// Above 0.
    pub step: f64,
}

/// `n` values from `from` to `to` at equal ratios.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogRange {
    /// First value, above 0.
    pub from: f64,
    /// Last value, above 0.
    pub to: f64,
    /// 2 or more.
    pub n: usize,
    /// Round to whole numbers. Default false.
    #[serde(default)]
    pub whole: bool,
}

/// `n` random values in [from, to].
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Random {
    /// Lower bound.
    pub from: f64,
    /// Upper bound.
    pub to: f64,
    /// 1 or more.
    pub n: usize,
    /// Uniform in the logarithm. Default false.
    #[serde(default)]
    pub log: bool,
    /// Round to whole numbers. Default false.
    #[serde(default)]
    pub whole: bool,
    /// Decides the values. Default 0.
    #[serde(default)]
    pub seed: u64,
}
