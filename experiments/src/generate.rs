//! Continuing prompts: prefill, one-token steps with carried states, sampling, stop tokens. Tokens are drawn where the logits are (op `draw`);
//! the host gives each row its random bits.
//!
//! Prompts of different lengths share a batch by left padding: a row's padding is a document of its own, because positions start
//! again at 0 with the prompt, so that neither attention nor convolution nor scan looks back into it. What a row says does not depend
//! on its neighbours.
//!
//! LongRoPE changes all frequencies when a sequence grows beyond the original context. Where a model wants it, the whole sequence is
//! then run again through fresh caches; rows of different lengths are run one after another, because they cross at different steps.

use crate::data::rng::Rng;
use marimba_backend::{BackendError, Engine, HostTensor, Outputs, ProgramId};
use marimba_dsl::model::Model;
use marimba_ir::lower::Logits;
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

impl Settings {
    /// As the op `draw` takes them.
    fn sampling(&self) -> Vec<f32> {
        vec![
            self.temperature as f32,
            self.top_k as f32,
            self.top_p as f32,
        ]
    }
}

struct Loaded {
    id: ProgramId,
    inputs: Vec<String>,
}

/// Random bits of one draw for every row.
struct Draw<'s> {
    settings: &'s Settings,
    bits: Vec<u64>,
}

/// Sequences in progress on an engine that holds the parameters. One session at a time may use an engine's states.
pub struct Session<'e> {
    engine: &'e mut dyn Engine,
    model: &'e Model,
    batch: usize,
    cache_len: usize,
    compute: DType,
    /// By their number of tokens, and whether they draw.
    programs: HashMap<(usize, bool), Loaded>,
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
        self.begin(prompts)?;
        logits(self.replay(None)?)
    }

    /// Takes prompts; nothing runs.
    fn begin(&mut self, prompts: &[Vec<i32>]) -> Result<(), GenerateError> {
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
        Ok(())
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
    fn replay(&mut self, draw: Option<&Draw>) -> Result<Outputs, GenerateError> {
        self.engine.zero("state");
        self.run(0, draw)
    }

    /// Appends one token to each row; gives the logits `[B V]` of the tokens to come.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn step(&mut self, tokens: &[i32]) -> Result<Vec<f32>, GenerateError> {
        logits(self.append(tokens, None)?)
    }

    fn append(&mut self, tokens: &[i32], draw: Option<&Draw>) -> Result<Outputs, GenerateError> {
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
            Some((original, true)) if before == original => self.replay(draw),
            _ => self.run(before, draw),
        }
    }

    /// Runs the tokens from slot `from` on.
    fn run(&mut self, from: usize, draw: Option<&Draw>) -> Result<Outputs, GenerateError> {
        let (t, total) = (self.len() - from, self.len());
        let key = (t, draw.is_some());
        if !self.programs.contains_key(&key) {
            let loaded = self.load(key)?;
            self.programs.insert(key, loaded);
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
        if let Some(draw) = draw {
            let words = draw.bits.iter().flat_map(|b| [*b as i32, (b >> 32) as i32]);
            inputs.push(("bits".into(), HostTensor::I32(words.collect())));
            let sampling = HostTensor::F32(draw.settings.sampling());
            inputs.push(("sampling".into(), sampling));
        }
        let frequencies = rope::dynamic_inputs(self.model, total);
        inputs.extend(
            frequencies
                .into_iter()
                .map(|(n, f)| (n, HostTensor::F32(f))),
        );
        let program = &self.programs[&key];
        let inputs: Vec<(&str, HostTensor)> = inputs
            .iter()
            .filter(|(n, _)| program.inputs.contains(n))
            .map(|(n, h)| (n.as_str(), h.clone()))
            .collect();
        Ok(self.engine.run(program.id, &inputs)?)
    }

    fn load(&mut self, (t, draws): (usize, bool)) -> Result<Loaded, GenerateError> {
        let options = if t == 1 {
            Options::decode(self.batch, self.cache_len)
        } else {
            Options::prefill(self.batch, t, self.cache_len)
        };
        let options = Options {
            compute: self.compute,
            logits: if draws { Logits::Drawn } else { Logits::Last },
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

fn logits(mut out: Outputs) -> Result<Vec<f32>, GenerateError> {
    match out.remove("logits") {
        Some(HostTensor::F32(logits)) => Ok(logits),
        Some(HostTensor::I32(_)) | None => Err(BackendError::Unknown {
            name: "logits".into(),
        }
        .into()),
    }
}

fn drawn(mut out: Outputs) -> Result<Vec<i32>, GenerateError> {
    match out.remove("token") {
        Some(HostTensor::I32(tokens)) => Ok(tokens),
        Some(HostTensor::F32(_)) | None => Err(BackendError::Unknown {
            name: "token".into(),
        }
        .into()),
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
        session.begin(&mine)?;
        // A stream of its own for each row: what it draws does not depend on its neighbours.
        let mut rngs: Vec<Rng> = rows
            .iter()
            .map(|&i| Rng::new(&[settings.seed, i as u64]))
            .collect();
        let mut done = vec![false; rows.len()];
        let mut next = Vec::new();
        for n in 0..settings.max_new_tokens {
            let draw = Draw {
                settings,
                bits: rngs.iter_mut().map(Rng::bits).collect(),
            };
            next = drawn(match n {
                0 => session.replay(Some(&draw))?,
                _ => session.append(&next, Some(&draw))?,
            })?;
            for (k, &row) in rows.iter().enumerate() {
                done[k] |= settings.stop.contains(&next[k]);
                if done[k] {
                    next[k] = 0;
                } else {
                    said[row].push(next[k]);
                    heard(row, next[k]);
                }
            }
            if done.iter().all(|d| *d) {
                break;
            }
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
