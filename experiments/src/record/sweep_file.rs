//! `sweep.json` in the folder of a sweep: what its members are compared by, for whoever reads the folder later.

use std::collections::BTreeMap;
use std::path::Path;

use marimba_dsl::sweep::{Quantity, Sweep};
use serde::{Deserialize, Serialize};

use super::error::RecordError;
use super::goal::Goal;
use super::summary::{read_json, write_json};

/// Name of the file.
pub const SWEEP_JSON: &str = "sweep.json";

/// Families of tags; a metric outside them is one of evaluations.
const FAMILIES: [&str; 6] = ["eval/", "train/", "perf/", "act/", "grad/", "data/"];

/// How a sweep is to be read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SweepFile {
    /// Heading.
    pub name: String,
    /// The question that it answers.
    #[serde(default)]
    pub question: Option<String>,
    /// Tag of the metric that decides.
    pub metric: String,
    /// Which direction of it is good.
    pub goal: Goal,
    /// The group that others are tested against; `None`: the best.
    #[serde(default)]
    pub baseline: Option<String>,
    /// What was held equal.
    #[serde(default)]
    pub hold: Option<Held>,
    /// The point that each group is of, where the sweep has points.
    #[serde(default)]
    pub points: BTreeMap<String, String>,
    /// Names of all members, in the order of the sweep.
    #[serde(default)]
    pub members: Vec<String>,
}

/// A quantity to which all members were brought.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Held {
    /// Which.
    pub quantity: Quantity,
    /// Its value.
    pub target: f64,
    /// Relative distance that was accepted.
    pub tolerance: f64,
}

impl SweepFile {
    /// Of a sweep whose members were brought to `target`.
    pub fn of(sweep: &Sweep, target: Option<f64>) -> SweepFile {
        SweepFile {
            name: sweep.name.clone(),
            question: sweep.question.clone(),
            metric: tag(&sweep.metric),
            goal: match sweep.goal {
                marimba_dsl::run::Goal::Max => Goal::Higher,
                marimba_dsl::run::Goal::Min => Goal::Lower,
            },
            baseline: sweep.baseline.clone(),
            hold: sweep.hold.as_ref().zip(target).map(|(h, target)| Held {
                quantity: h.quantity,
                target,
                tolerance: h.tolerance,
            }),
            points: sweep
                .members
                .iter()
                .filter(|m| !m.point.is_empty())
                .map(|m| (m.group.clone(), m.point.clone()))
                .collect(),
            members: sweep.members.iter().map(|m| m.name.clone()).collect(),
        }
    }

    /// Reads it from a folder; `None` where there is none.
    ///
    /// # Errors
    /// It cannot be read or is damaged.
    pub fn read(dir: &Path) -> Result<Option<SweepFile>, RecordError> {
        read_json(&dir.join(SWEEP_JSON))
    }

    /// Writes it into a folder, which is made where missing.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, dir: &Path) -> Result<(), RecordError> {
        std::fs::create_dir_all(dir).map_err(|e| RecordError::from_io("create", dir, e))?;
        write_json(&dir.join(SWEEP_JSON), self)
    }
}

/// The tag of a metric as sweeps name it: `accuracy` is `eval/accuracy`.
pub fn tag(metric: &str) -> String {
    if FAMILIES.iter().any(|f| metric.starts_with(f)) {
        metric.to_owned()
    } else {
        format!("eval/{metric}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_of_evaluations_unless_they_say_otherwise() {
        assert_eq!(tag("accuracy"), "eval/accuracy");
        assert_eq!(tag("long/accuracy"), "eval/long/accuracy");
        assert_eq!(tag("train/loss"), "train/loss");
    }

    #[test]
    fn survives_the_disk() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("s");
        assert_eq!(SweepFile::read(&dir).unwrap(), None);
        let file = SweepFile {
            name: "s".into(),
            question: Some("why?".into()),
            metric: "eval/loss".into(),
            goal: Goal::Lower,
            baseline: None,
            hold: Some(Held {
                quantity: Quantity::DecodeBytes,
                target: 4096.0,
                tolerance: 0.02,
            }),
            points: [("a-x=1".to_owned(), "a".to_owned())].into(),
            members: vec!["a".into()],
        };
        file.write(&dir).unwrap();
        assert_eq!(SweepFile::read(&dir).unwrap(), Some(file));
    }
}
