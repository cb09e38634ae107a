//! The same weights in several number formats side by side: what f16 and bf16 do to a model's loss, and which activations leave the
//! range of f16.
//!
//! The graph is lowered with activations and matrices in the format, as a GPU runs it, and run on the native backend, which rounds every
//! such value to its format ([`CpuEngine::set_half_storage`]). Ranges come from a second graph that keeps every tap, where fewer
//! elementwise programs are merged and some values are therefore rounded once more.

use crate::checkpoint::Weights;
use crate::data::{Batch, IGNORED, Worker, open};
use crate::program;
use crate::train::{EvalResult, TrainError, loss_inputs, score};
use marimba_backend::{CpuEngine, Engine, HostTensor, ProgramId};
use marimba_dsl::run::Run;
use marimba_ir::DType;
use marimba_ir::op::{STAT_BUCKETS, STAT_LEN};
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};

/// A number format of activations and matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// 8 exponent bits, 23 of mantissa.
    F32,
    /// 8 exponent bits, 7 of mantissa.
    Bf16,
    /// 5 exponent bits, 10 of mantissa; nothing above 65504.
    F16,
}

impl Format {
    /// All, widest first.
    pub const ALL: [Format; 3] = [Format::F32, Format::Bf16, Format::F16];

    /// As written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::Bf16 => "bf16",
            Format::F16 => "f16",
        }
    }

    /// The format of this name.
    pub fn named(name: &str) -> Option<Format> {
        Format::ALL.into_iter().find(|f| f.name() == name)
    }

    fn dtype(self) -> DType {
        match self {
            Format::F32 => DType::F32,
            Format::Bf16 => DType::Bf16,
            Format::F16 => DType::F16,
        }
    }
}

/// Scores and ranges in one format.
#[derive(Clone, Debug, Serialize)]
pub struct FormatScore {
    /// The format.
    pub format: Format,
    /// Scores of each set.
    pub sets: Vec<EvalResult>,
    /// Activations, over all sets, by name.
    pub taps: Vec<TapRange>,
}

/// How far an activation reaches. Batches that are not full are left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TapRange {
    /// Such as `layers[3].ffn.expert_out`.
    pub tap: String,
    /// Largest finite magnitude.
    pub max: f64,
    /// Root of the mean over batches of the finite values' mean square.
    pub rms: f64,
    /// Values seen.
    pub n: f64,
    /// Of these, above 65504 or not finite.
    pub beyond_f16: f64,
}

impl FormatScore {
    /// Share of all tapped values above 65504 or not finite.
    pub fn share_beyond_f16(&self) -> f64 {
        let sum = |f: fn(&TapRange) -> f64| self.taps.iter().map(f).sum::<f64>();
        sum(|t| t.beyond_f16) / sum(|t| t.n).max(1.0)
    }

    /// The tap with the largest finite magnitude.
    pub fn largest(&self) -> Option<&TapRange> {
        self.taps.iter().max_by(|a, b| a.max.total_cmp(&b.max))
    }
}

/// Scores `weights` on the evaluation sets of the run's last phase, at most `max_rows` rows of each, in each format.
///
/// # Errors
/// [`TrainError`] when data or weights cannot be read, do not fit each other, or do not fit the memory.
pub fn score_formats(
    weights: &Weights,
    run: &Run,
    formats: &[Format],
    max_rows: usize,
    threads: usize,
) -> Result<Vec<FormatScore>, TrainError> {
    let Some(phase) = run.phases.last() else {
        return Ok(Vec::new());
    };
    let mut sets = Vec::new();
    if phase.eval.sets.is_empty() {
        sets.push((String::new(), &phase.data));
    }
    for (name, data) in &phase.eval.sets {
        sets.push((format!("{name}/"), data));
    }
    let batch = phase.batch.min(max_rows).max(1);
    let mut scores = Vec::new();
    for &format in formats {
        let mut model = Runner::new(weights, format, threads)?;
        let mut sets_of_format = Vec::new();
        for (prefix, data) in &sets {
            let loader = open::open(data, phase.seq_len, run.seed, Worker::ALL)?;
            if loader.vocab_size() > weights.model.vocab_size {
                return Err(TrainError::Vocabulary {
                    needs: loader.vocab_size(),
                    has: weights.model.vocab_size,
                });
            }
            sets_of_format.extend(score(
                &mut |batch| model.forward(batch),
                loader.as_ref(),
                prefix,
                max_rows,
                batch,
            )?);
        }
        scores.push(FormatScore {
            format,
            sets: sets_of_format,
            taps: model.taps(),
        });
    }
    Ok(scores)
}

/// A model in one format on an engine of its own.
struct Runner<'w> {
    weights: &'w Weights,
    format: Format,
    engine: CpuEngine,
    /// By shape: what scores, and what also puts out statistics.
    programs: HashMap<(usize, usize), [ProgramId; 2]>,
    taps: BTreeMap<String, Sums>,
}

/// Sums over batches.
#[derive(Default)]
struct Sums {
    max: f64,
    squares: f64,
    n: f64,
    beyond: f64,
}

impl<'w> Runner<'w> {
    fn new(weights: &'w Weights, format: Format, threads: usize) -> Result<Self, TrainError> {
        let mut engine = CpuEngine::new(threads)?;
        engine.set_half_storage(format != Format::F32);
        Ok(Runner {
            weights,
            format,
            engine,
            programs: HashMap::new(),
            taps: BTreeMap::new(),
        })
    }

    fn programs(&mut self, batch: usize, seq_len: usize) -> Result<[ProgramId; 2], TrainError> {
        if let Some(&ids) = self.programs.get(&(batch, seq_len)) {
            return Ok(ids);
        }
        let first = self.programs.is_empty();
        let mut ids = [ProgramId(0); 2];
        for (id, probe) in ids.iter_mut().zip([false, true]) {
            let dtype = self.format.dtype();
            let p = program::evaluation_in(&self.weights.model, dtype, probe, batch, seq_len)?;
            if first && !probe {
                for (i, param) in self.weights.params.iter().enumerate() {
                    // The graph says which parameters are in the format.
                    let Some(v) = p.graph.find_external("param", &param.name) else {
                        continue;
                    };
                    let key = format!("param:{}", param.name);
                    let data = HostTensor::F32(self.weights.param(i)?);
                    self.engine.write(&key, p.graph.ty(v), &data)?;
                }
            }
            *id = self.engine.load(p.graph, p.plan)?;
        }
        self.programs.insert((batch, seq_len), ids);
        Ok(ids)
    }

    /// `(nll, hit)` per token.
    fn forward(&mut self, batch: &Batch) -> Result<(Vec<f32>, Vec<f32>), TrainError> {
        let [scores, ranges] = self.programs(batch.rows, batch.seq_len)?;
        let inputs = loss_inputs(batch, 1.0, 1);
        let mut outputs = self.engine.run(scores, &inputs)?;
        let mut take = |name: &str| match outputs.remove(name) {
            Some(HostTensor::F32(v)) => v,
            Some(HostTensor::I32(_)) | None => Vec::new(),
        };
        let result = (take("nll"), take("hit"));
        // Rows that only fill a batch up would show activations of no text.
        let full = batch
            .targets
            .chunks(batch.seq_len.max(1))
            .all(|row| row.iter().any(|t| *t != IGNORED));
        if full {
            for (name, s) in &self.engine.run(ranges, &inputs)? {
                if let Some(tap) = name.strip_prefix("stat:") {
                    self.taps.entry(tap.to_string()).or_default().add(s.f32());
                }
            }
        }
        Ok(result)
    }

    fn taps(&self) -> Vec<TapRange> {
        let range = |(tap, s): (&String, &Sums)| TapRange {
            tap: tap.clone(),
            max: s.max,
            rms: (s.squares / s.n.max(1.0)).sqrt(),
            n: s.n,
            beyond_f16: s.beyond,
        };
        self.taps.iter().map(range).collect()
    }
}

impl Sums {
    /// Adds the result of one `stat`.
    fn add(&mut self, s: &[f32]) {
        let [rms, max, beyond, ..] = s[..] else {
            return;
        };
        let n: f64 = s[STAT_LEN - STAT_BUCKETS..]
            .iter()
            .map(|&c| f64::from(c))
            .sum();
        self.n += n;
        self.max = self.max.max(f64::from(max));
        self.beyond += f64::from(beyond);
        self.squares += f64::from(rms).powi(2) * n;
    }
}
