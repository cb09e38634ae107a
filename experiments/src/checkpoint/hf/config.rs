//! `config.json` in the spellings of transformers 4 and 5, with every complaint collected before any is reported.
//!
//! Two dialects of JSON occur: version 4 writes the bare tokens `Infinity` and `NaN`, version 5 writes `{"__float__": "Infinity"}`.
//! What a configuration leaves out is what transformers' class of the family takes there (`defaults.json`, written by
//! `make_fixtures.py --defaults`); keys that transformers ignores are ignored; options that change the mathematics and are not
//! supported are refused by name.

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

/// By family: values of keys that are left out, and other names of keys.
const DEFAULTS: &str = include_str!("defaults.json");

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
        Self::of(path, map)
    }

    /// Takes what a file holds, or would hold; `path` is for messages.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] when this program's table of defaults is.
    pub fn of(path: &Path, mut map: Map<String, Value>) -> Result<Self, CheckpointError> {
        let bad = |why: String| CheckpointError::damaged(path, "configuration", why);
        let family = map.get("model_type").and_then(Value::as_str);
        if let Some(family) = family.map(str::to_string) {
            let known: Map<String, Value> = serde_json::from_str(DEFAULTS)
                .map_err(|e| bad(format!("this program's table of defaults: {e}")))?;
            complete(&mut map, known.get(&family).unwrap_or(&Value::Null));
        }
        let config = Config {
            path: path.to_path_buf(),
            map,
            problems: RefCell::default(),
        };
        if config.get("quantization_config").is_some() {
            config.problem(
                "option quantization_config is not supported; expected weights in f32, bf16, f16 or f64",
            );
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

    /// A count that must be there and may be zero.
    pub fn size(&self, key: &str) -> usize {
        if self.get(key).is_none() {
            self.problem(format!("{key} is missing"));
        }
        self.opt_count(key).unwrap_or(0)
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

    /// A number that must be there.
    pub fn float(&self, key: &str) -> f64 {
        if self.get(key).is_none() {
            self.problem(format!("{key} is missing"));
        }
        self.float_or(key, 1.0)
    }

    /// A number with a default.
    pub fn float_or(&self, key: &str, default: f64) -> f64 {
        self.opt_float(key).unwrap_or(default)
    }

    /// A switch; null is off.
    pub fn flag(&self, key: &str) -> bool {
        self.flag_or(key, false)
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
        key: &str,
        n_layers: Option<usize>,
        allowed: &[&str],
    ) -> Option<Vec<String>> {
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
    pub fn act(&self, key: &str) -> Act {
        let Some(name) = self.opt_word(key) else {
            if self.get(key).is_none() {
                self.problem(format!("{key} is missing"));
            }
            return Act::Silu;
        };
        match name {
            "silu" | "swish" => Act::Silu,
            "gelu" | "gelu_python" => Act::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_fast"
            | "gelu_accurate" => Act::GeluTanh,
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
        let act = self.act(key);
        if act != Act::Silu {
            let name = self.opt_word(key).unwrap_or_default();
            self.problem(format!(
                "{key} {name} is not supported inside a mixer; expected silu"
            ));
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

    /// Range of dt at initialisation. Weights that are there do not need it, so one that is none gives way to the usual.
    pub fn dt_init(&self) -> DtInit {
        let (min, max) = (
            self.float_or("time_step_min", 1e-3),
            self.float_or("time_step_max", 0.1),
        );
        let floor = self.float_or("time_step_floor", 1e-4);
        if 0.0 < floor && 0.0 < min && min < max && max.is_finite() {
            DtInit { min, max, floor }
        } else {
            DtInit {
                min: 1e-3,
                max: 0.1,
                floor: 1e-4,
            }
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
        let of = |key| Section {
            config: self,
            key,
            map: self.object(key).filter(|m| !m.is_empty()),
        };
        // Version 4 has rope_theta beside rope_scaling, version 5 all in rope_parameters; what stands inside wins.
        let section = Some(of("rope_scaling"))
            .filter(|s| s.map.is_some())
            .unwrap_or_else(|| of("rope_parameters"));
        let kind = section.kind(d);
        let theta = section
            .float("rope_theta")
            .or(self.opt_float("rope_theta"))
            .unwrap_or_else(|| {
                self.problem("rope_theta is missing");
                1e4
            });
        let said = section.float("partial_rotary_factor").or_else(|| {
            d.top_level_fraction
                .then(|| self.opt_float("partial_rotary_factor"))?
        });
        let fraction = match d.fraction {
            Some(fraction) => said.unwrap_or(fraction),
            None => {
                // The plain type has no eye for it; the others fail in transformers.
                if kind != "default" && said.is_some_and(|f| f != 1.0) {
                    self.problem(format!("partial_rotary_factor with rope_type {kind} is not supported in this family, expected 1"));
                }
                1.0
            }
        };
        let part = (head_dim as f64 * fraction) as usize;
        // transformers rounds up, and keeps the odd number in the exponents of the frequencies.
        let odd = !part.is_multiple_of(2);
        let dims = part.saturating_add(usize::from(odd));
        if part == 0 || dims > head_dim || (odd && kind == "yarn") {
            self.problem(format!(
                "partial_rotary_factor {fraction} of heads of {head_dim} channels would rotate {part}, expected an even number from 2 to {head_dim}"
            ));
            return Rope {
                theta,
                dims: 2,
                scaling: RopeScaling::None,
            };
        }
        let theta = if odd {
            theta.powf(dims as f64 / part as f64)
        } else {
            theta
        };
        Rope {
            theta,
            dims,
            scaling: self.scaling(&section, kind, dims, d),
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

    fn scaling(&self, s: &Section, kind: &str, dims: usize, d: &RopeDefaults) -> RopeScaling {
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
                self.problem(format!("rope_type {kind} needs {key} in {}", s.key));
                1.0
            })
        };
        match kind {
            "default" => RopeScaling::None,
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
                    attention_factor: s.float("attention_factor").unwrap_or(default),
                    truncate: s.switch("truncate", true),
                }
            }
            "longrope" => {
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
                        self.problem(format!(
                            "rope_type longrope needs a list {key} in {}",
                            s.key
                        ));
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
                self.problem(format!("rope_type {other} of {} is not supported; expected default, linear, llama3, yarn or longrope", s.key));
                RopeScaling::None
            }
        }
    }
}

/// What a family does where its configuration is silent.
#[derive(Clone, Copy, Debug)]
pub struct RopeDefaults {
    /// Rotated part of a head; `None` where all of it is, whatever `partial_rotary_factor` says.
    pub fraction: Option<f64>,
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
            fraction: None,
            top_level_fraction: true,
            recompute_on_crossing: false,
            yarn_is_longrope: false,
        }
    }
}

/// A nested object.
struct Section<'a> {
    config: &'a Config,
    key: &'static str,
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
    /// As Python takes it: null is off.
    fn switch(&self, key: &str, default: bool) -> bool {
        match self.map.and_then(|m| m.get(key)) {
            None => default,
            Some(v) => v.as_bool().unwrap_or(false),
        }
    }
    /// `rope_type`, in the words of today.
    fn kind(&self, d: &RopeDefaults) -> &'a str {
        match self.word("rope_type").or(self.word("type")) {
            None => "default",
            Some("su" | "yarn") if d.yarn_is_longrope => "longrope",
            Some(kind) => kind,
        }
    }
    fn floats(&self, key: &str) -> Option<Vec<f64>> {
        self.get(key)?.as_array()?.iter().map(float).collect()
    }
}

/// Gives keys their names of today, and those that are missing their values.
fn complete(map: &mut Map<String, Value>, known: &Value) {
    for (old, key) in known["renamed"].as_object().into_iter().flatten() {
        let key = key.as_str().unwrap_or_default();
        if let Some(v) = map.remove(old).filter(|v| !v.is_null()) {
            map.insert(key.into(), v);
        }
    }
    for (key, v) in known["defaults"].as_object().into_iter().flatten() {
        map.entry(key.clone()).or_insert_with(|| v.clone());
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
            "rope_type dynamic of rope_scaling",
        ] {
            assert!(e.contains(part), "{e}");
        }
    }

    #[test]
    fn what_transformers_reads_first_wins() {
        let rope = |text: &str| {
            let c = config(text);
            let rope = c.rope(8, &RopeDefaults::default());
            c.finish(rope).unwrap()
        };
        // Inside before beside, rope_scaling before rope_parameters, an empty one not at all.
        let both =
            r#"{"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {}}"#;
        assert_eq!(rope(both).theta, 7.0);
        let old = r#"{"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {"type": "linear", "factor": 2}}"#;
        assert_eq!(rope(old).theta, 5.0);
        assert_eq!(rope(old).scaling, RopeScaling::Linear { factor: 2.0 });
    }

    #[test]
    fn part_of_a_head_is_rotated_where_the_family_can() {
        let text = r#"{"rope_theta": 100.0, "partial_rotary_factor": 0.375}"#;
        let some = RopeDefaults {
            fraction: Some(1.0),
            ..RopeDefaults::default()
        };
        let c = config(text);
        assert_eq!(c.rope(8, &RopeDefaults::default()).dims, 8);
        // Three of eight: transformers rotates four, with frequencies 100^(-0/3) and 100^(-2/3).
        let rope = c.rope(8, &some);
        assert_eq!(rope.dims, 4);
        assert!((rope.theta.powf(-2.0 / 4.0) - 100f64.powf(-2.0 / 3.0)).abs() < 1e-12);
        c.finish(()).unwrap();
        let c = config(
            r#"{"rope_theta": 100.0, "partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2}}"#,
        );
        c.rope(8, &RopeDefaults::default());
        let e = c.finish(()).unwrap_err().to_string();
        assert!(
            e.contains("partial_rotary_factor with rope_type linear"),
            "{e}"
        );
    }

    #[test]
    fn no_part_of_a_head_or_more_than_a_head_is_refused() {
        let some = RopeDefaults {
            fraction: Some(1.0),
            ..RopeDefaults::default()
        };
        for fraction in ["0", "0.1", "-1", "1.25", "1e300", "Infinity"] {
            let text = format!(r#"{{"rope_theta": 100.0, "partial_rotary_factor": {fraction}}}"#);
            let c = config(&text);
            c.rope(8, &some);
            let e = c.finish(()).unwrap_err().to_string();
            assert!(e.contains("an even number from 2 to 8"), "{e}");
        }
    }

    #[test]
    fn what_is_left_out_is_what_transformers_takes() {
        let c = config(r#"{"model_type": "falcon_h1", "num_key_value_heads": null}"#);
        assert_eq!(c.float("rope_theta"), 1e4);
        assert_eq!(c.count("mamba_d_ssm"), 1024);
        assert_eq!(c.opt_count("num_key_value_heads"), None);
        assert_eq!(c.dt_limit(), (0.0, f64::INFINITY));
        // Another name of a key wins.
        let c = config(
            r#"{"model_type": "nemotron_h", "time_step_min": 0.5, "mamba_dt_min": 0.25, "num_local_experts": 6}"#,
        );
        assert_eq!(c.float("time_step_min"), 0.25);
        assert_eq!(c.count("n_routed_experts"), 6);
        c.finish(()).unwrap();
    }
}
