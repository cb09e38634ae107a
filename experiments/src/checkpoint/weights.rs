//! Weights to run, from wherever they are: a Marimba checkpoint (or the latest of a folder), or a Hugging Face folder as it is.

use super::hf::{self, Opened};
use super::{Checkpoint, CheckpointError};
use marimba_dsl::data::{Data, Text, Tokenizer};
use marimba_dsl::model::Model;
use marimba_dsl::{Source, Valid, parse_model, parse_run};
use marimba_ir::Param;
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

    /// Where tokenizer and chat template would be.
    pub fn text_dir(&self) -> PathBuf {
        match &self.kept {
            Kept::Native(c) => c.dir.join("hf"),
            Kept::Foreign(o) => o.dir.clone(),
        }
    }
}
