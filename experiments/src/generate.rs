//! Continuing prompts: prefill, one-token steps with carried states, sampling, stop tokens.
//!
//! Prompts of different lengths share a batch by left padding: a row's padding is a document of its own, because positions start
//! again at 0 with the prompt, so that neither attention nor convolution nor scan looks back into it. What a row says does not depend
//! on its neighbours.
//!
//! LongRoPE changes all frequencies when a sequence grows beyond the original context. Where a model wants it, the whole sequence is
//! then run again through fresh caches; rows of different lengths are run one after another, because they cross at different steps.

use crate::data::rng::Rng;
use marimba_backend::{BackendError, Engine, HostTensor, ProgramId};
use marimba_dsl::model::Model;
use marimba_ir::lower::rope;
use marimba_ir::pass::{self, PassError};
use marimba_ir::{DType, External, Graph, Options, TypeError, lower, plan};
use std::collections::HashMap;

/// What can stop a generation.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The backend refused.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A lowering is wrong.
    #[error(transparent)]
    Type(#[from] TypeError),
    /// A pass is wrong.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// Prompts that cannot be continued.
    #[error("{0}")]
    Prompt(String),
    /// The model does not predict the next token.
    #[error(
        "the model has a decoder, which reads a whole row back from its last state and predicts no next token; score it with `marimba eval`"
    )]
    Decoder,
}

/// How to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Most tokens to add to each prompt.
    pub max_new_tokens: usize,
    /// Divides logits before sampling; 0 takes the most likely token.
    pub temperature: f64,
    /// Sample from this many most likely tokens only; 0 is all.
    pub top_k: usize,
    /// Sample from the fewest tokens whose probabilities reach this sum; 1 is all.
    pub top_p: f64,
    /// Seed of the sampling.
    pub seed: u64,
    /// Tokens that end a continuation; they are not part of it.
    pub stop: Vec<i32>,
    /// Element type of activations, matrices and caches.
    pub compute: DType,
}

impl Default for Settings {
    /// 64 tokens, greedy.
    fn default() -> Self {
        Settings {
            max_new_tokens: 64,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
            stop: Vec::new(),
            compute: DType::F32,
        }
    }
}

struct Loaded {
    id: ProgramId,
    inputs: Vec<String>,
}

/// Sequences in progress on an engine that holds the parameters. One session at a time may use an engine's states.
pub struct Session<'e> {
    engine: &'e mut dyn Engine,
    model: &'e Model,
    batch: usize,
    cache_len: usize,
    compute: DType,
    programs: HashMap<usize, Loaded>,
    /// Everything said so far, each row padded on the left.
    rows: Vec<Vec<i32>>,
    /// Padding of each row.
    pads: Vec<usize>,
}

impl<'e> Session<'e> {
    /// A session of `batch` rows of at most `cache_len` tokens each, padding included. States of the engine must be of no other shape.
    pub fn new(
        engine: &'e mut dyn Engine,
        model: &'e Model,
        batch: usize,
        cache_len: usize,
    ) -> Self {
        Session {
            engine,
            model,
            batch,
            cache_len,
            compute: DType::F32,
            programs: HashMap::new(),
            rows: Vec::new(),
            pads: Vec::new(),
        }
    }

    /// The same with activations, matrices and caches of another type; before the first prefill.
    #[must_use]
    pub fn computing_in(mut self, compute: DType) -> Self {
        self.compute = compute;
        self
    }

    /// Tokens in each row, padding included.
    pub fn len(&self) -> usize {
        self.rows.first().map_or(0, Vec::len)
    }

    /// Whether nothing was said yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Starts anew with these prompts; gives the logits `[B V]` of the tokens to come.
    ///
    /// # Errors
    /// [`GenerateError::Prompt`] for a wrong number of prompts, an empty one, a token outside the vocabulary, or no room; otherwise
    /// what the backend says.
    pub fn prefill(&mut self, prompts: &[Vec<i32>]) -> Result<Vec<f32>, GenerateError> {
        if self.model.decoder.is_some() {
            return Err(GenerateError::Decoder);
        }
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        if prompts.len() != self.batch {
            return Err(GenerateError::Prompt(format!(
                "{} prompts for {} rows",
                prompts.len(),
                self.batch
            )));
        }
        if let Some(i) = prompts.iter().position(Vec::is_empty) {
            return Err(GenerateError::Prompt(format!(
                "prompt {i} is empty; expected at least one token"
            )));
        }
        if longest > self.cache_len {
            return Err(GenerateError::Prompt(format!(
                "{longest} tokens do not fit caches of {} slots",
                self.cache_len
            )));
        }
        self.check(prompts.iter().flatten())?;
        self.pads = prompts.iter().map(|p| longest - p.len()).collect();
        let padded = |p: &Vec<i32>| {
            let mut row = vec![0; longest - p.len()];
            row.extend(p);
            row
        };
        self.rows = prompts.iter().map(padded).collect();
        if is_dynamic(self.model) && self.pads.iter().any(|p| *p > 0) {
            return Err(GenerateError::Prompt(
                "prompts of different lengths cannot share a batch where RoPE depends on the length; run them one by one".into(),
            ));
        }
        self.replay()
    }

    fn check<'t>(&self, tokens: impl Iterator<Item = &'t i32>) -> Result<(), GenerateError> {
        let v = self.model.vocab_size;
        for &t in tokens {
            if usize::try_from(t).map_or(true, |t| t >= v) {
                return Err(GenerateError::Prompt(format!(
                    "token {t} is not in the vocabulary of {v}"
                )));
            }
        }
        Ok(())
    }

    /// Runs all rows through fresh states.
    fn replay(&mut self) -> Result<Vec<f32>, GenerateError> {
        self.engine.zero("state");
        self.run(0)
    }

    /// Appends one token to each row; gives the logits `[B V]` of the tokens to come.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn step(&mut self, tokens: &[i32]) -> Result<Vec<f32>, GenerateError> {
        if tokens.len() != self.batch || self.is_empty() {
            return Err(GenerateError::Prompt(format!(
                "{} tokens for {} rows with prompts",
                tokens.len(),
                self.batch
            )));
        }
        let before = self.len();
        if before == self.cache_len {
            return Err(GenerateError::Prompt(format!(
                "caches of {before} slots are full"
            )));
        }
        self.check(tokens.iter())?;
        for (row, t) in self.rows.iter_mut().zip(tokens) {
            row.push(*t);
        }
        match rope::crossing(self.model) {
            Some((original, true)) if before == original => self.replay(),
            _ => self.run(before),
        }
    }

    /// Runs the tokens from slot `from` on.
    fn run(&mut self, from: usize) -> Result<Vec<f32>, GenerateError> {
        let (t, total) = (self.len() - from, self.len());
        if !self.programs.contains_key(&t) {
            let loaded = self.load(t)?;
            self.programs.insert(t, loaded);
        }
        let mut tokens = Vec::new();
        let mut pos = Vec::new();
        for (row, &pad) in self.rows.iter().zip(&self.pads) {
            tokens.extend_from_slice(&row[from..]);
            pos.extend((from..total).map(|s| if s < pad { s } else { s - pad } as i32));
        }
        let mut inputs = vec![
            ("tokens".to_string(), HostTensor::I32(tokens)),
            ("pos".to_string(), HostTensor::I32(pos)),
            ("slot".to_string(), HostTensor::I32(vec![from as i32])),
        ];
        let frequencies = rope::dynamic_inputs(self.model, total);
        inputs.extend(
            frequencies
                .into_iter()
                .map(|(n, f)| (n, HostTensor::F32(f))),
        );
        let program = &self.programs[&t];
        let inputs: Vec<(&str, HostTensor)> = inputs
            .iter()
            .filter(|(n, _)| program.inputs.contains(n))
            .map(|(n, h)| (n.as_str(), h.clone()))
            .collect();
        let mut out = self.engine.run(program.id, &inputs)?;
        match out.remove("logits") {
            Some(HostTensor::F32(logits)) => Ok(logits),
            Some(HostTensor::I32(_)) | None => Err(BackendError::Unknown {
                name: "logits".into(),
            }
            .into()),
        }
    }

    fn load(&mut self, t: usize) -> Result<Loaded, GenerateError> {
        let options = if t == 1 {
            Options::decode(self.batch, self.cache_len)
        } else {
            Options::prefill(self.batch, t, self.cache_len)
        };
        let options = Options {
            compute: self.compute,
            ..options
        };
        let graph = pass::run_passes(&lower(self.model, &options)?, &pass::Config::default())?;
        let inputs = input_names(&graph);
        let plan = plan(&graph);
        Ok(Loaded {
            id: self.engine.load(graph, plan)?,
            inputs,
        })
    }
}

/// Names of a graph's inputs.
pub(crate) fn input_names(g: &Graph) -> Vec<String> {
    let inputs = g
        .value_ids()
        .filter(|&v| matches!(g.external(v), Some(External::Input)));
    inputs.map(|v| g.value(v).name.clone()).collect()
}

/// Whether frequencies depend on the length of the sequence.
fn is_dynamic(model: &Model) -> bool {
    !rope::dynamic_inputs(model, 1).is_empty()
}

/// Continues every prompt on an engine that holds the parameters. `heard` is told each new token with its row as it comes. Returns
/// the new tokens of each row.
///
/// # Errors
/// [`GenerateError`].
pub fn generate(
    engine: &mut dyn Engine,
    model: &Model,
    prompts: &[Vec<i32>],
    settings: &Settings,
    heard: &mut dyn FnMut(usize, i32),
) -> Result<Vec<Vec<i32>>, GenerateError> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let cache_len = (longest + settings.max_new_tokens).max(1);
    let ragged = prompts.iter().any(|p| p.len() != longest);
    let groups: Vec<Vec<usize>> = if ragged && is_dynamic(model) {
        (0..prompts.len()).map(|i| vec![i]).collect()
    } else {
        vec![(0..prompts.len()).collect()]
    };
    let mut said = vec![Vec::new(); prompts.len()];
    for rows in groups.iter().filter(|g| !g.is_empty()) {
        let mine: Vec<Vec<i32>> = rows.iter().map(|&i| prompts[i].clone()).collect();
        let mut session =
            Session::new(engine, model, rows.len(), cache_len).computing_in(settings.compute);
        let mut logits = session.prefill(&mine)?;
        // A stream of its own for each row: what it draws does not depend on its neighbours.
        let mut rngs: Vec<Rng> = rows
            .iter()
            .map(|&i| Rng::new(&[settings.seed, i as u64]))
            .collect();
        let mut done = vec![false; rows.len()];
        for n in 0..settings.max_new_tokens {
            let mut next = Vec::new();
            for (k, &row) in rows.iter().enumerate() {
                let v = model.vocab_size;
                let token = if done[k] {
                    0
                } else {
                    sample(&logits[k * v..(k + 1) * v], settings, &mut rngs[k])
                };
                done[k] |= settings.stop.contains(&token);
                if !done[k] {
                    said[row].push(token);
                    heard(row, token);
                }
                next.push(token);
            }
            if done.iter().all(|d| *d) || n + 1 == settings.max_new_tokens {
                break;
            }
            logits = session.step(&next)?;
        }
    }
    Ok(said)
}

/// The first of the largest.
pub fn argmax(logits: &[f32]) -> i32 {
    let mut best = 0;
    for (i, l) in logits.iter().enumerate() {
        if *l > logits[best] {
            best = i;
        }
    }
    best as i32
}

/// One token by these settings.
pub fn sample(logits: &[f32], settings: &Settings, rng: &mut Rng) -> i32 {
    if settings.temperature <= 0.0 {
        return argmax(logits);
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if settings.top_k > 0 {
        order.truncate(settings.top_k);
    }
    let top = f64::from(logits[order[0]]);
    let weight = |i: usize| ((f64::from(logits[i]) - top) / settings.temperature).exp();
    let mut weights: Vec<f64> = order.iter().map(|&i| weight(i)).collect();
    let total: f64 = weights.iter().sum();
    let mut reached = 0.0;
    let keep = weights.iter().position(|w| {
        reached += w / total;
        reached >= settings.top_p
    });
    weights.truncate(keep.map_or(weights.len(), |k| k + 1));
    let mut left = rng.unit() * weights.iter().sum::<f64>();
    for (i, w) in order.iter().zip(&weights) {
        left -= w;
        if left < 0.0 {
            return *i as i32;
        }
    }
    order[weights.len() - 1] as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_keeps_to_its_bounds_and_its_seed() {
        let logits: Vec<f32> = vec![0.0, 3.0, 1.0, 2.0, -1.0];
        let draw = |s: &Settings| {
            let mut rng = Rng::new(&[s.seed]);
            (0..2000)
                .map(|_| sample(&logits, s, &mut rng))
                .collect::<Vec<_>>()
        };
        let warm = Settings {
            temperature: 1.0,
            ..Settings::default()
        };
        let all = draw(&warm);
        assert_eq!(all, draw(&warm));
        assert_ne!(
            all,
            draw(&Settings {
                seed: 1,
                ..warm.clone()
            })
        );
        // Frequencies are softmax probabilities.
        let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        for (i, l) in logits.iter().enumerate() {
            let seen = all.iter().filter(|t| **t == i as i32).count() as f64 / 2000.0;
            assert!(
                (seen - f64::from(*l).exp() / sum).abs() < 0.04,
                "{i}: {seen}"
            );
        }
        assert!(
            draw(&Settings {
                top_k: 2,
                ..warm.clone()
            })
            .iter()
            .all(|t| [1, 3].contains(t))
        );
        // 3.0 alone has probability 0.63.
        assert!(
            draw(&Settings {
                top_p: 0.6,
                ..warm.clone()
            })
            .iter()
            .all(|t| *t == 1)
        );
        assert!(draw(&Settings::default()).iter().all(|t| *t == 1));
    }
}
