//! Weights to run, from wherever they are: a Marimba checkpoint (or the latest of a folder), or a Hugging Face folder as it is.

use super::hf::{self, Opened};
use super::{Checkpoint, CheckpointError};
use marimba_dsl::data::{Data, Text, Tokenizer};
use marimba_dsl::model::Model;
use marimba_dsl::{Source, Valid, parse_model, parse_run};
use marimba_ir::Param;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

enum Kept {
    Native(Box<Checkpoint>),
    Foreign(Box<Opened>),
}

/// A model with its parameters, still on disk.
pub struct Weights {
    /// The model.
    pub model: Valid<Model>,
    /// Its parameters, in the order of the graph.
    pub params: Vec<Param>,
    kept: Kept,
}

impl Weights {
    /// Opens and checks a folder.
    ///
    /// # Errors
    /// [`CheckpointError`], with everything that does not fit at once.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        if path.join("config.json").is_file() {
            let opened = hf::open(path)?;
            let (model, params) = (opened.model.clone(), opened.params.clone());
            return Ok(Weights {
                model,
                params,
                kept: Kept::Foreign(Box::new(opened)),
            });
        }
        let ckpt = Checkpoint::open(path)?;
        let file = ckpt.dir.join("model.ron");
        let source = Source::new(file.display().to_string(), ckpt.model_ron.clone());
        let model = parse_model(&source, &[]).map_err(|r| CheckpointError::Config {
            path: file,
            problems: r.diagnostics.into_iter().map(|d| d.message).collect(),
        })?;
        let params = hf::params_of(&model)?;
        ckpt.check(&params)?;
        Ok(Weights {
            model,
            params,
            kept: Kept::Native(Box::new(ckpt)),
        })
    }

    /// Parameter `i` as f32.
    ///
    /// # Errors
    /// [`CheckpointError`] when it cannot be read.
    pub fn param(&self, i: usize) -> Result<Vec<f32>, CheckpointError> {
        match &self.kept {
            Kept::Native(c) => Ok(c.model.tensor(&self.params[i].name)?.to_f32()),
            Kept::Foreign(o) => o.param(i),
        }
    }

    /// The resolved run that trained them, where there was one.
    pub fn run_ron(&self) -> Option<&str> {
        match &self.kept {
            Kept::Native(c) => c.run_ron.as_deref(),
            Kept::Foreign(_) => None,
        }
    }

    /// Optimiser steps that they were trained for, where that is known.
    pub fn step(&self) -> Option<u64> {
        match &self.kept {
            Kept::Native(c) => Some(c.state.step),
            Kept::Foreign(_) => None,
        }
    }

    /// The `tokenizer.json` that made the model's tokens: the one beside the weights, or the one that its run names. `None` is bytes.
    pub fn tokenizer(&self) -> Option<PathBuf> {
        let beside = self.text_dir().join("tokenizer.json");
        if beside.is_file() {
            return Some(beside);
        }
        let Kept::Native(c) = &self.kept else {
            return None;
        };
        let source = Source::new("run.ron", c.run_ron.clone()?);
        let run = parse_run(&source, &[]).ok()?;
        run.phases.iter().find_map(|p| match &p.data {
            Data::Text(Text {
                tokenizer: Tokenizer::File(path),
                ..
            }) => Some(path.clone()),
            _ => None,
        })
    }

    /// Tokens that end a continuation, as the checkpoint itself says: `eos_token_id` of `generation_config.json`, else of `config.json`.
    /// A number or a list in both. Empty where neither names one, as in a checkpoint that was not imported.
    ///
    /// # Errors
    /// [`CheckpointError`] when a file is there and cannot be read, is not JSON, or names something that is no token of the model.
    pub fn stop_tokens(&self) -> Result<Vec<i32>, CheckpointError> {
        for name in ["generation_config.json", "config.json"] {
            let path = self.text_dir().join(name);
            if !path.is_file() {
                continue;
            }
            let text = fs::read_to_string(&path).map_err(CheckpointError::io("read", &path))?;
            let damaged = |what: String| CheckpointError::damaged(&path, "eos_token_id", what);
            let config: Value = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
            let ids = match &config["eos_token_id"] {
                Value::Null => continue,
                Value::Array(ids) => ids.as_slice(),
                one => std::slice::from_ref(one),
            };
            return ids
                .iter()
                .map(|id| {
                    id.as_u64()
                        .filter(|id| *id < self.model.vocab_size as u64)
                        .map(|id| id as i32)
                        .ok_or_else(|| {
                            damaged(format!(
                                "{id} is no token of a vocabulary of {}",
                                self.model.vocab_size
                            ))
                        })
                })
                .collect();
        }
        Ok(Vec::new())
    }

    /// Where tokenizer and chat template would be.
    pub fn text_dir(&self) -> PathBuf {
        match &self.kept {
            Kept::Native(c) => c.dir.join("hf"),
            Kept::Foreign(o) => o.dir.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with what `stop_tokens` reads: the model is that of a fixture, the two files are as given.
    fn stops(generation: Option<&str>, config: &str) -> Result<Vec<i32>, CheckpointError> {
        let fixture =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/hf/public/llama-a");
        let dir = tempfile::tempdir().expect("a folder");
        for entry in fs::read_dir(fixture).expect("the fixture") {
            let entry = entry.expect("an entry");
            fs::copy(entry.path(), dir.path().join(entry.file_name())).expect("a copy");
        }
        let weights = Weights::open(dir.path()).expect("a checkpoint");
        let path = dir.path().join("config.json");
        let mut json: Value =
            serde_json::from_str(&fs::read_to_string(&path).expect("config")).expect("json");
        json["eos_token_id"] = serde_json::from_str(config).expect("a value");
        fs::write(&path, json.to_string()).expect("written");
        if let Some(text) = generation {
            fs::write(dir.path().join("generation_config.json"), text).expect("written");
        }
        weights.stop_tokens()
    }

    #[test]
    fn a_checkpoint_says_which_tokens_end_a_text() {
        assert_eq!(
            stops(Some("{\"eos_token_id\": [3, 5]}"), "2").expect("ids"),
            [3, 5]
        );
        assert_eq!(stops(Some("{}"), "2").expect("ids"), [2]);
        assert_eq!(stops(None, "[7]").expect("ids"), [7]);
        assert!(stops(None, "null").expect("ids").is_empty());
        for bad in ["-1", "1000000", "\"</s>\"", "[1, null]"] {
            let error = stops(None, bad).expect_err("refused").to_string();
            assert!(error.contains("no token"), "{error}");
        }
        assert!(stops(Some("{"), "2").is_err());
    }
}
