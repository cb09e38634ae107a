//! `config.json` in the spellings of transformers 4 and 5, with every complaint collected before any is reported.
//!
//! Two dialects of JSON occur: version 4 writes the bare tokens `Infinity` and `NaN`, version 5 writes `{"__float__": "Infinity"}`.
//! Keys that do not change the mathematics are ignored; options that do and are not supported are refused by name.

use crate::checkpoint::CheckpointError;
use marimba_dsl::model::{Act, DtInit, Rope, RopeScaling};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::path::{Path, PathBuf};

/// A configuration being read. Getters return something usable even when they complain, so that one reading finds all problems.
pub struct Config {
    path: PathBuf,
    map: Map<String, Value>,
    problems: RefCell<Vec<String>>,
}

/// Options of other models in the field which change the mathematics and which no supported family has.
const REFUSED: &[&str] = &[
    "quantization_config",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "clip_qkv",
    "use_sliding_window",
    "attention_chunk_size",
    "no_rope_layers",
    "adapter_rank",
    "num_mem_blocks",
];

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// [`CheckpointError::NotFound`], [`CheckpointError::Damaged`] when it is not a JSON object.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        if !path.is_file() {
            return Err(CheckpointError::NotFound {
                kind: "configuration",
                path: path.to_path_buf(),
                help:
                    "a Hugging Face checkpoint is a folder with config.json and safetensors files"
                        .into(),
            });
        }
        let text = std::fs::read_to_string(path).map_err(CheckpointError::io("read", path))?;
        Self::parse(path, &text)
    }

    /// Parses a text; `path` is for messages.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] when it is not a JSON object.
    pub fn parse(path: &Path, text: &str) -> Result<Self, CheckpointError> {
        let bad = |why: String| CheckpointError::damaged(path, "configuration", why);
        let value: Value =
            serde_json::from_str(&plain_json(text)).map_err(|e| bad(e.to_string()))?;
        let Value::Object(map) = value else {
            return Err(bad("its top level is not an object".into()));
        };
        let config = Config {
            path: path.to_path_buf(),
            map,
            problems: RefCell::default(),
        };
        for key in REFUSED {
            if !matches!(
                config.map.get(*key),
                None | Some(Value::Null | Value::Bool(false))
            ) {
                config.problem(format!("option {key} is not supported"));
            }
        }
        Ok(config)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A complaint.
    pub fn problem(&self, text: impl Into<String>) {
        let text = text.into();
        let mut list = self.problems.borrow_mut();
        if !list.contains(&text) {
            list.push(text);
        }
    }

    /// The complaints as an error, if there are any.
    ///
    /// # Errors
    /// [`CheckpointError::Config`].
    pub fn finish<T>(&self, value: T) -> Result<T, CheckpointError> {
        let problems = self.problems.take();
        if problems.is_empty() {
            Ok(value)
        } else {
            Err(CheckpointError::Config {
                path: self.path.clone(),
                problems,
            })
        }
    }

    /// A value that is there and not null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) {
        self.problem(format!("{key} is {value}, expected {expected}"));
    }

    /// A count that may be absent, null or the word `auto`.
    pub fn opt_count(&self, key: &str) -> Option<usize> {
        let v = self.get(key).filter(|v| v.as_str() != Some("auto"))?;
        let n = v.as_u64().or_else(|| {
            v.as_f64()
                .filter(|f| f.fract() == 0.0 && *f >= 0.0)
                .map(|f| f as u64)
        });
        match n {
            Some(n) if n < 1 << 40 => Some(n as usize),
            _ => {
                self.wrong(key, v, "a whole number");
                None
            }
        }
    }

    /// A count that must be there and above zero.
    pub fn count(&self, key: &str) -> usize {
        match self.opt_count(key) {
            Some(0) => {
                self.problem(format!("{key} is 0, expected at least 1"));
                1
            }
            Some(n) => n,
            None => {
                if self.get(key).is_none() {
                    self.problem(format!("{key} is missing"));
                }
                1
            }
        }
    }

    /// A count with a default.
    pub fn count_or(&self, key: &str, default: usize) -> usize {
        self.opt_count(key).unwrap_or(default)
    }

    /// A number that may be absent.
    pub fn opt_float(&self, key: &str) -> Option<f64> {
        let v = self.get(key)?;
        let f = float(v);
        if f.is_none() {
            self.wrong(key, v, "a number");
        }
        f
    }

    /// A number with a default.
    pub fn float_or(&self, key: &str, default: f64) -> f64 {
        self.opt_float(key).unwrap_or(default)
    }

    /// A switch with a default.
    pub fn flag_or(&self, key: &str, default: bool) -> bool {
        match self.get(key) {
            None => default,
            Some(Value::Bool(b)) => *b,
            Some(v) => {
                self.wrong(key, v, "true or false");
                default
            }
        }
    }

    /// A word that may be absent.
    pub fn opt_word(&self, key: &str) -> Option<&str> {
        let v = self.get(key)?;
        if v.as_str().is_none() {
            self.wrong(key, v, "a text");
        }
        v.as_str()
    }

    /// A list that may be absent.
    pub fn opt_list(&self, key: &str) -> Option<&[Value]> {
        let v = self.get(key)?;
        if v.as_array().is_none() {
            self.wrong(key, v, "a list");
        }
        v.as_array().map(Vec::as_slice)
    }

    /// A list of counts, empty when absent.
    pub fn counts(&self, key: &str) -> Vec<usize> {
        let mut out = Vec::new();
        for v in self.opt_list(key).unwrap_or_default() {
            match v.as_u64() {
                Some(n) => out.push(n as usize),
                None => self.wrong(key, v, "whole numbers"),
            }
        }
        out
    }

    /// A list of exactly `N` numbers with a default.
    pub fn floats_or<const N: usize>(&self, key: &str, default: [f64; N]) -> [f64; N] {
        let Some(list) = self.opt_list(key) else {
            return default;
        };
        let numbers: Vec<f64> = list.iter().filter_map(float).collect();
        match numbers.try_into() {
            Ok(array) if list.len() == N => array,
            _ => {
                self.problem(format!(
                    "{key} is {}, expected {N} numbers",
                    Value::Array(list.to_vec())
                ));
                default
            }
        }
    }

    /// Layer kinds, with the words of version 4 put into those of version 5.
    pub fn layer_types(
        &self,
        keys: &[&str],
        n_layers: Option<usize>,
        allowed: &[&str],
    ) -> Option<Vec<String>> {
        let key = keys.iter().find(|k| self.get(k).is_some())?;
        let mut out = Vec::new();
        for v in self.opt_list(key)? {
            let word = match v.as_str() {
                Some("mamba" | "mamba2") => "linear_attention",
                Some("attention") => "full_attention",
                Some(other) => other,
                None => "",
            };
            if !allowed.contains(&word) {
                self.problem(format!("{key} holds {v}, expected {}", allowed.join(", ")));
            }
            out.push(word.to_string());
        }
        if let Some(n) = n_layers.filter(|n| *n != out.len()) {
            self.problem(format!(
                "{key} has {} entries, but num_hidden_layers is {n}",
                out.len()
            ));
        }
        Some(out)
    }

    /// An activation by its transformers name.
    pub fn act(&self, key: &str, default: &str) -> Act {
        match self.opt_word(key).unwrap_or(default) {
            "silu" | "swish" => Act::Silu,
            "gelu" => Act::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Act::GeluTanh,
            "relu" => Act::Relu,
            "relu2" => Act::Relu2,
            other => {
                self.problem(format!("{key} {other} is not supported; expected silu, gelu, gelu_pytorch_tanh, relu or relu2"));
                Act::Silu
            }
        }
    }

    /// Complains unless the activation `key` is silu, the only one the mixers know.
    pub fn only_silu(&self, key: &str) {
        if self.act(key, "silu") != Act::Silu {
            self.problem(format!(
                "{key} other than silu is not supported inside a mixer"
            ));
        }
    }

    /// Complains when a switch stands otherwise than the family can have it.
    pub fn must_be(&self, key: &str, value: bool, default: bool) {
        if self.flag_or(key, default) != value {
            self.problem(format!("option {key}: {} is not supported", !value));
        }
    }

    /// `whole / part`, or a complaint.
    pub fn divide(&self, what: &str, whole: usize, by: &str, part: usize) -> usize {
        if part == 0 || !whole.is_multiple_of(part) {
            self.problem(format!("{what} {whole} is not divisible by {by} {part}"));
            return 1;
        }
        whole / part
    }

    /// Range of dt at initialisation.
    pub fn dt_init(&self) -> DtInit {
        DtInit {
            min: self.float_or("time_step_min", 1e-3),
            max: self.float_or("time_step_max", 0.1),
            floor: self.float_or("time_step_floor", 1e-4),
        }
    }

    /// `time_step_limit`, by default no limit.
    pub fn dt_limit(&self) -> (f64, f64) {
        let [low, high] = self.floats_or("time_step_limit", [0.0, f64::INFINITY]);
        if !(low >= 0.0 && low < high) {
            self.problem(format!(
                "time_step_limit is [{low}, {high}], expected 0 <= low < high"
            ));
        }
        (low, high)
    }

    /// RoPE of heads of `head_dim` channels.
    pub fn rope(&self, head_dim: usize, d: &RopeDefaults) -> Rope {
        let rope = Section {
            config: self,
            map: self.object("rope_parameters"),
        };
        let scaling = Section {
            config: self,
            map: self.object("rope_scaling"),
        };
        // Version 5 keeps everything in rope_parameters; version 4 has rope_theta beside rope_scaling.
        let section = if rope.map.is_some() { rope } else { scaling };
        let (inside, beside) = (section.float("rope_theta"), self.opt_float("rope_theta"));
        if let (Some(a), Some(b)) = (inside, beside)
            && a != b
        {
            self.problem(format!("rope_theta is {b}, but {a} in the RoPE parameters"));
        }
        let theta = inside.or(beside).unwrap_or(d.theta);
        let top = if d.top_level_fraction {
            self.opt_float("partial_rotary_factor")
        } else {
            None
        };
        let fraction = section
            .float("partial_rotary_factor")
            .or(top)
            .unwrap_or(d.fraction);
        if !(fraction > 0.0 && fraction <= 1.0) {
            self.problem(format!(
                "partial_rotary_factor is {fraction}, expected above 0 and at most 1"
            ));
        }
        let dims = (head_dim as f64 * fraction) as usize;
        if dims == 0 || !dims.is_multiple_of(2) {
            self.problem(format!(
                "RoPE would rotate {dims} channels of a head, expected an even number"
            ));
        }
        Rope {
            theta,
            dims,
            scaling: self.scaling(&section, dims, d),
        }
    }

    fn object(&self, key: &str) -> Option<&Map<String, Value>> {
        let v = self.get(key)?;
        match v.as_object() {
            Some(m) if m.values().any(Value::is_object) => {
                self.problem(format!("{key} per layer type is not supported"));
                None
            }
            Some(m) => Some(m),
            None => {
                self.wrong(key, v, "an object");
                None
            }
        }
    }

    fn scaling(&self, s: &Section, dims: usize, d: &RopeDefaults) -> RopeScaling {
        let mut kind = s.word("rope_type").or(s.word("type")).unwrap_or("default");
        if kind == "su" || (kind == "yarn" && d.yarn_is_longrope) {
            kind = "longrope";
        }
        let context = || self.count("max_position_embeddings");
        let original = || {
            let (inside, top) = (
                s.count("original_max_position_embeddings"),
                self.opt_count("original_max_position_embeddings"),
            );
            top.or(inside)
        };
        let needed = |key: &str| {
            s.float(key).unwrap_or_else(|| {
                self.problem(format!("rope type {kind} needs {key}"));
                1.0
            })
        };
        match kind {
            "default" | "mrope" => RopeScaling::None,
            "linear" => RopeScaling::Linear {
                factor: needed("factor"),
            },
            "llama3" => RopeScaling::Llama3 {
                factor: needed("factor"),
                low_freq_factor: needed("low_freq_factor"),
                high_freq_factor: needed("high_freq_factor"),
                original_context_len: original().unwrap_or_else(context),
            },
            "yarn" => {
                let original_context_len = original().unwrap_or_else(context);
                let factor = s
                    .float("factor")
                    .unwrap_or_else(|| context() as f64 / original_context_len as f64);
                // Temperature of the paper's equation 22, and DeepSeek's ratio of two of them.
                let temperature = |m: f64| {
                    if factor <= 1.0 {
                        1.0
                    } else {
                        0.1 * m * factor.ln() + 1.0
                    }
                };
                let default = match (s.float("mscale"), s.float("mscale_all_dim")) {
                    (Some(a), Some(b)) if a != 0.0 && b != 0.0 => temperature(a) / temperature(b),
                    _ => temperature(1.0),
                };
                RopeScaling::Yarn {
                    factor,
                    original_context_len,
                    beta_fast: s.float("beta_fast").filter(|b| *b != 0.0).unwrap_or(32.0),
                    beta_slow: s.float("beta_slow").filter(|b| *b != 0.0).unwrap_or(1.0),
                    attention_factor: s
                        .float("attention_factor")
                        .filter(|a| *a != 0.0)
                        .unwrap_or(default),
                    truncate: s.flag("truncate").unwrap_or(true),
                }
            }
            "longrope" => {
                for key in ["short_mscale", "long_mscale"] {
                    if s.float(key).is_some() {
                        self.problem(format!("RoPE option {key} is not supported"));
                    }
                }
                let original_context_len = original().unwrap_or_else(context);
                let factor = s
                    .float("factor")
                    .unwrap_or_else(|| context() as f64 / original_context_len as f64);
                let default = if factor <= 1.0 {
                    1.0
                } else {
                    (1.0 + factor.ln() / (original_context_len as f64).ln()).sqrt()
                };
                let list = |key: &str| {
                    let list = s.floats(key).unwrap_or_else(|| {
                        self.problem(format!("rope type longrope needs a list {key}"));
                        vec![1.0; dims / 2]
                    });
                    if list.len() != dims / 2 {
                        self.problem(format!(
                            "{key} has {} factors, expected {}",
                            list.len(),
                            dims / 2
                        ));
                    }
                    list
                };
                RopeScaling::LongRope {
                    short_factor: list("short_factor"),
                    long_factor: list("long_factor"),
                    original_context_len,
                    attention_factor: s.float("attention_factor").unwrap_or(default),
                    recompute_on_crossing: d.recompute_on_crossing,
                }
            }
            other => {
                self.problem(format!("rope type {other} is not supported; expected default, linear, llama3, yarn or longrope"));
                RopeScaling::None
            }
        }
    }
}

/// What a family does where its configuration is silent.
#[derive(Clone, Copy, Debug)]
pub struct RopeDefaults {
    /// Base.
    pub theta: f64,
    /// Rotated part of a head.
    pub fraction: f64,
    /// Whether `partial_rotary_factor` beside the RoPE parameters counts.
    pub top_level_fraction: bool,
    /// LongRoPE: recompute the cache when decoding crosses the original context.
    pub recompute_on_crossing: bool,
    /// Early Phi-3 called its LongRoPE `yarn`.
    pub yarn_is_longrope: bool,
}

impl Default for RopeDefaults {
    fn default() -> Self {
        RopeDefaults {
            theta: 1e4,
            fraction: 1.0,
            top_level_fraction: true,
            recompute_on_crossing: false,
            yarn_is_longrope: false,
        }
    }
}

/// A nested object.
struct Section<'a> {
    config: &'a Config,
    map: Option<&'a Map<String, Value>>,
}

impl<'a> Section<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map?.get(key).filter(|v| !v.is_null())
    }
    fn float(&self, key: &str) -> Option<f64> {
        let v = self.get(key)?;
        let f = float(v);
        if f.is_none() {
            self.config.wrong(key, v, "a number");
        }
        f
    }
    fn count(&self, key: &str) -> Option<usize> {
        self.float(key).map(|f| f as usize)
    }
    fn word(&self, key: &str) -> Option<&'a str> {
        self.get(key)?.as_str()
    }
    fn flag(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }
    fn floats(&self, key: &str) -> Option<Vec<f64>> {
        self.get(key)?.as_array()?.iter().map(float).collect()
    }
}

/// A number in either dialect.
fn float(v: &Value) -> Option<f64> {
    match v {
        Value::Number(n) => n.as_f64(),
        Value::Object(m) => match m.get("__float__")?.as_str()? {
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            "NaN" => Some(f64::NAN),
            _ => None,
        },
        _ => None,
    }
}

/// Replaces the bare tokens of Python's dialect, outside of strings, by version 5's objects.
fn plain_json(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut in_string) = (text, false);
    while let Some(c) = rest.chars().next() {
        if in_string {
            let n = if c == '\\' {
                1 + rest[1..].chars().next().map_or(0, char::len_utf8)
            } else {
                c.len_utf8()
            };
            in_string = c != '"';
            out.push_str(&rest[..n]);
            rest = &rest[n..];
            continue;
        }
        let word = ["-Infinity", "Infinity", "NaN"]
            .into_iter()
            .find(|w| rest.starts_with(w));
        if let Some(w) = word {
            out.push_str(&format!("{{\"__float__\": \"{w}\"}}"));
            rest = &rest[w.len()..];
            continue;
        }
        in_string = c == '"';
        out.push(c);
        rest = &rest[c.len_utf8()..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(Path::new("config.json"), text).unwrap()
    }

    #[test]
    fn both_spellings_of_infinity_are_read_and_strings_are_left_alone() {
        let c = config(
            r#"{"a": [0.0, Infinity], "b": [0, {"__float__": "Infinity"}], "s": "NaN \" Infinity"}"#,
        );
        assert_eq!(c.floats_or("a", [1.0, 1.0]), [0.0, f64::INFINITY]);
        assert_eq!(c.floats_or("b", [1.0, 1.0]), [0.0, f64::INFINITY]);
        assert_eq!(c.opt_word("s"), Some("NaN \" Infinity"));
        c.finish(()).unwrap();
    }

    #[test]
    fn all_problems_come_at_once() {
        let c = config(
            r#"{"n": "many", "quantization_config": {}, "rope_scaling": {"rope_type": "dynamic"}}"#,
        );
        c.count("n");
        c.count("m");
        c.rope(8, &RopeDefaults::default());
        let e = c.finish(()).unwrap_err().to_string();
        for part in [
            "quantization_config",
            "n is \"many\"",
            "m is missing",
            "rope type dynamic",
        ] {
            assert!(e.contains(part), "{e}");
        }
    }

    #[test]
    fn contradictory_bases_are_refused() {
        let c = config(r#"{"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}"#);
        c.rope(8, &RopeDefaults::default());
        assert!(
            c.finish(())
                .unwrap_err()
                .to_string()
                .contains("rope_theta is 5, but 7")
        );
    }
}
