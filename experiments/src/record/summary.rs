//! The facts of a run that tables and reports are made from: `summary.json` and `status.json` of a run folder.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::RecordError;
use super::files::write_atomic;

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Being trained, or its process died without a word.
    Running,
    /// Reached its last step.
    Finished,
    /// Stopped on an error.
    Failed,
    /// Stopped by the user; can be resumed.
    Interrupted,
    /// Waits at a rung of successive halving; can be resumed.
    Paused,
    /// Ended by successive halving, for others were better; can be resumed.
    Stopped,
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RunState::Running => "running",
            RunState::Finished => "finished",
            RunState::Failed => "failed",
            RunState::Interrupted => "interrupted",
            RunState::Paused => "paused",
            RunState::Stopped => "stopped",
        })
    }
}

/// `status.json`: where a run stands, rewritten as it goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunStatus {
    /// Where the run stands.
    pub state: RunState,
    /// Last step recorded.
    pub step: u64,
    /// Runs that differ only by seed share a group.
    #[serde(default)]
    pub group: String,
    /// The run's seed.
    #[serde(default)]
    pub seed: u64,
    /// Start of the run, seconds since 1970.
    #[serde(default)]
    pub started_secs: f64,
    /// Time of this status, seconds since 1970.
    #[serde(default)]
    pub updated_secs: f64,
    /// The error of a failed run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// `summary.json`: the facts of a run, complete once it has finished.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunSummary {
    /// Name of the run, as of its folder.
    pub name: String,
    /// Runs that differ only by seed share a group.
    pub group: String,
    /// The run's seed.
    pub seed: u64,
    /// Where the run stands.
    pub status: RunState,
    /// Parameters, all.
    pub params_total: u64,
    /// Parameters that one token uses (of a mixture of experts only the chosen ones).
    pub params_active: u64,
    /// Recurrent state of one sequence in decoding, bytes, without the KV cache.
    pub state_bytes_per_seq: u64,
    /// KV cache added by each token of context, bytes.
    pub kv_bytes_per_token: u64,
    /// Tokens of context at which decode bytes are compared: `state_bytes_per_seq + seq_len * kv_bytes_per_token`.
    #[serde(default)]
    pub seq_len: u64,
    /// Floating-point operations per token of the training step's forward pass.
    pub flops_per_token: f64,
    /// Training throughput, median over log intervals.
    pub tokens_per_sec: f64,
    /// Last value of each metric.
    #[serde(with = "loose_map", rename = "final")]
    pub final_metrics: BTreeMap<String, f64>,
    /// Best value of each metric over the run.
    #[serde(with = "loose_map", rename = "best")]
    pub best_metrics: BTreeMap<String, f64>,
    /// Hash of the resolved configuration.
    pub config_hash: String,
    /// Hash of the training graph's text; empty where not known.
    #[serde(default)]
    pub graph_hash: String,
    /// Hash of the training data's digests; empty where not known.
    #[serde(default)]
    pub data_hash: String,
    /// The point of the sweep: axis name to value, as text.
    #[serde(default)]
    pub axes: BTreeMap<String, String>,
}

impl RunSummary {
    /// The point of the sweep without the seed, which the members of a group do not share.
    pub fn point(&self) -> BTreeMap<String, String> {
        let axes = self.axes.iter().filter(|(name, _)| name.as_str() != "seed");
        axes.map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    /// Bytes that decoding keeps per sequence at `seq_len` tokens of context.
    pub fn decode_bytes(&self) -> u64 {
        self.state_bytes_per_seq
            .saturating_add(self.seq_len.saturating_mul(self.kv_bytes_per_token))
    }
}

/// Reads a JSON file of a run folder; `None` where it does not exist.
///
/// # Errors
/// The file cannot be read or is not what it should be.
pub fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, RecordError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(RecordError::from_io("read", path, e)),
    };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|e| RecordError::Damaged {
            path: path.to_path_buf(),
            reason: e.to_string(),
        })
}

/// Writes a JSON file of a run folder atomically.
///
/// # Errors
/// The file cannot be written; what was there before is untouched.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), RecordError> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| RecordError::Damaged {
        path: path.to_path_buf(),
        reason: e.to_string(),
    })?;
    text.push('\n');
    write_atomic(path, text.as_bytes())
}

/// Numbers in JSON that may be NaN or infinite: those are the strings `nan`, `inf`, `-inf`.
pub mod loose {
    use serde::de::{Error, Visitor};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::fmt;

    /// A number that JSON can hold even where it is not finite.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct Loose(pub f64);

    impl Serialize for Loose {
        fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
            match self.0 {
                x if x.is_finite() => s.serialize_f64(x),
                x if x.is_nan() => s.serialize_str("nan"),
                x if x > 0.0 => s.serialize_str("inf"),
                _ => s.serialize_str("-inf"),
            }
        }
    }

    impl<'de> Deserialize<'de> for Loose {
        fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Loose, D::Error> {
            struct V;
            impl Visitor<'_> for V {
                type Value = Loose;
                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("a number, \"nan\", \"inf\" or \"-inf\"")
                }
                fn visit_f64<E: Error>(self, v: f64) -> Result<Loose, E> {
                    Ok(Loose(v))
                }
                fn visit_u64<E: Error>(self, v: u64) -> Result<Loose, E> {
                    Ok(Loose(v as f64))
                }
                fn visit_i64<E: Error>(self, v: i64) -> Result<Loose, E> {
                    Ok(Loose(v as f64))
                }
                fn visit_str<E: Error>(self, v: &str) -> Result<Loose, E> {
                    match v {
                        "nan" => Ok(Loose(f64::NAN)),
                        "inf" => Ok(Loose(f64::INFINITY)),
                        "-inf" => Ok(Loose(f64::NEG_INFINITY)),
                        _ => Err(E::invalid_value(serde::de::Unexpected::Str(v), &self)),
                    }
                }
            }
            d.deserialize_any(V)
        }
    }
}

mod loose_map {
    use super::loose::Loose;
    use serde::{Deserialize, Deserializer, Serializer};
    use std::collections::BTreeMap;

    pub(super) fn serialize<S: Serializer>(
        map: &BTreeMap<String, f64>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        s.collect_map(map.iter().map(|(k, v)| (k, Loose(*v))))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<BTreeMap<String, f64>, D::Error> {
        let map = BTreeMap::<String, Loose>::deserialize(d)?;
        Ok(map.into_iter().map(|(k, v)| (k, v.0)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_survives_the_disk_with_nan_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("summary.json");
        let summary = RunSummary {
            name: "α".into(),
            group: "g".into(),
            seed: u64::MAX,
            status: RunState::Finished,
            params_total: 10,
            params_active: 5,
            state_bytes_per_seq: 3,
            kv_bytes_per_token: 2,
            seq_len: 4,
            flops_per_token: 1e12,
            tokens_per_sec: 5.5,
            final_metrics: [
                ("train/loss".to_owned(), f64::INFINITY),
                ("x".to_owned(), 3.0),
            ]
            .into(),
            best_metrics: BTreeMap::new(),
            config_hash: "ff".into(),
            graph_hash: "ee".into(),
            data_hash: "dd".into(),
            axes: BTreeMap::new(),
        };
        write_json(&path, &summary).unwrap();
        assert_eq!(
            read_json::<RunSummary>(&path).unwrap(),
            Some(summary.clone())
        );
        assert_eq!(summary.decode_bytes(), 11);
        assert_eq!(
            read_json::<RunSummary>(&dir.path().join("none")).unwrap(),
            None
        );
        std::fs::write(&path, "{\"name\":").unwrap();
        assert!(matches!(
            read_json::<RunSummary>(&path),
            Err(RecordError::Damaged { .. })
        ));
    }
}
