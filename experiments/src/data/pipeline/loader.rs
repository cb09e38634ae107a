//! The last stage: lanes to batches, for one worker of a fleet, and the [`Loader`] that training reads.

use super::docs::{DocStream, Framing, Shards, Skipped};
use super::generated::{self, RowStream};
use super::mixture::{Mixture, Phase, Stream, check_phases};
use super::pack::{Pack, RowFault, RowPlan};
use super::window::Window;
use super::{OnBad, Stage};
use crate::data::order::OrderMode;
use crate::data::rows::batch_of;
use crate::data::rows::{Rows, Split};
use crate::data::source::Documents;
use crate::data::{
    Batch, DataError, EvalSet, LaneState, Loader, LoaderState, Located, Metric, Piece,
    RowProvenance, Worker,
};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One dataset of the mixture.
#[derive(Clone)]
pub struct Dataset {
    /// Name for reports.
    pub name: String,
    /// What it has.
    pub source: Source,
}

/// What a dataset has.
#[derive(Clone)]
pub enum Source {
    /// Documents, packed into rows.
    Documents {
        /// The documents.
        docs: Arc<dyn Documents>,
        /// The last so many are kept for validation and never trained on.
        valid_docs: u64,
    },
    /// Rows of their own, computed: a synthetic task.
    Rows(Arc<dyn Rows>),
}

/// What decides the sequence, besides the datasets.
#[derive(Clone, Debug, PartialEq)]
pub struct PipelineSpec {
    /// T, inputs per row.
    pub seq_len: usize,
    /// L, logical shards. Worker counts that divide it cost nothing extra; 1,024 suits big runs, 16 small ones. 1 up to 2^20.
    pub lanes: u32,
    /// Rows per shuffle block of a lane; 1 switches the window off. 1 up to 2^20.
    pub window: u64,
    /// Order of documents within a shard.
    pub order: OrderMode,
    /// Decides orders and windows.
    pub seed: u64,
    /// Delimiters, length limit, vocabulary.
    pub framing: Framing,
    /// What an unreadable document does.
    pub on_bad: OnBad,
    /// Weights over rows.
    pub phases: Vec<Phase>,
    /// Upper limit of rows per validation set.
    pub valid_rows: u64,
}

/// Counts of documents left out of one dataset, over all lanes of this worker, repeats in later epochs included.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct SkipCounts {
    /// Name of the dataset.
    pub dataset: String,
    /// Documents without tokens.
    pub empty: u64,
    /// Documents below `min_length`.
    pub short: u64,
    /// Unreadable ones under `on_bad: skip`.
    pub bad: u64,
}

/// The loader.
pub struct Pipeline {
    datasets: Vec<Dataset>,
    names: Vec<Arc<str>>,
    shards: Vec<Option<Shards>>,
    spec: PipelineSpec,
    framing: Arc<Framing>,
    phases: Arc<[Phase]>,
    skipped: Vec<Arc<Skipped>>,
    fingerprint: String,
    parallel: bool,
    worker: Worker,
    next_row: u64,
    lanes: BTreeMap<u32, Window>,
    valid: Vec<ValidSet>,
}

/// An evaluation set and what is in it.
#[derive(Clone)]
struct ValidSet {
    set: EvalSet,
    rows: ValidRows,
}

#[derive(Clone)]
enum ValidRows {
    /// Rows of the dataset's kept documents.
    Packed(Vec<RowPlan>),
    /// An evaluation set of a dataset of computed rows, by index.
    Generated(Arc<dyn Rows>, usize),
}

impl Pipeline {
    /// Checks everything and stands at row 0. Opens no document but those of the validation sets.
    ///
    /// # Errors
    /// [`DataError::Parameter`] for values out of range, [`DataError::NoDocuments`] for a dataset without training documents,
    /// and what reading validation documents can fail with.
    pub fn new(
        datasets: Vec<Dataset>,
        spec: PipelineSpec,
        worker: Worker,
    ) -> Result<Self, DataError> {
        let bad = |text: String| Err(DataError::Parameter(text));
        if spec.seq_len == 0 {
            return bad("seq_len is 0; a row has at least one token".into());
        }
        if !(1..=1 << 20).contains(&spec.lanes) {
            return bad(format!("lanes is {}; expected 1 up to 2^20", spec.lanes));
        }
        if !(1..=1 << 20).contains(&spec.window) {
            return bad(format!(
                "window is {} rows; expected 1 (no window) up to 2^20",
                spec.window
            ));
        }
        for (what, token) in [("bos", spec.framing.bos), ("eos", spec.framing.eos)] {
            if let Some(token) = token.filter(|&t| t as usize >= spec.framing.vocab_size) {
                return bad(format!(
                    "{what} token {token} is outside the vocabulary of {}",
                    spec.framing.vocab_size
                ));
            }
        }
        let names: Vec<&str> = datasets.iter().map(|d| d.name.as_str()).collect();
        for (i, name) in names.iter().enumerate() {
            if names[..i].contains(name) {
                return bad(format!("two datasets are called {name}; names must differ"));
            }
        }
        let phases = check_phases(&spec.phases, &names)?;
        let mut digest = Sha256::new();
        let (seq_len, lanes, window, order, seed) =
            (spec.seq_len, spec.lanes, spec.window, spec.order, spec.seed);
        digest.update(format!(
            "{seq_len} {lanes} {window} {order:?} {seed} {:?} {:?}",
            spec.framing, spec.on_bad
        ));
        let mut shards = Vec::new();
        for (i, d) in datasets.iter().enumerate() {
            let (docs, valid) = match &d.source {
                Source::Documents { docs, valid_docs } => (docs, *valid_docs),
                Source::Rows(rows) => {
                    if rows.seq_len() != seq_len {
                        let (name, own) = (&d.name, rows.seq_len());
                        return bad(format!(
                            "rows of {name} have {own} tokens, the mixture's {seq_len}; expected one length"
                        ));
                    }
                    digest.update(format!("{} {}", d.name, rows.fingerprint()));
                    shards.push(None);
                    continue;
                }
            };
            let have = docs.n_docs();
            if have <= valid {
                let why = format!(
                    "it has {have}, and {valid} are kept for validation; expected at least one more"
                );
                return Err(DataError::NoDocuments {
                    dataset: d.name.clone(),
                    why,
                });
            }
            digest.update(format!("{} {have} {valid} {}", d.name, docs.fingerprint()));
            shards.push(Some(Shards::new(
                i as u32,
                have - valid,
                lanes,
                order,
                seed,
            )));
        }
        let mut pipeline = Self {
            names: datasets.iter().map(|d| d.name.as_str().into()).collect(),
            parallel: datasets
                .iter()
                .any(|d| matches!(&d.source, Source::Documents { docs, .. } if docs.is_costly())),
            skipped: datasets.iter().map(|_| Arc::default()).collect(),
            framing: Arc::new(spec.framing.clone()),
            fingerprint: super::super::hex(&digest.finalize()[..16]),
            phases: phases.into(),
            datasets,
            shards,
            spec,
            worker,
            next_row: 0,
            lanes: BTreeMap::new(),
            valid: Vec::new(),
        };
        pipeline.valid = pipeline.plan_validation()?;
        Ok(pipeline)
    }

    /// The same pipeline for another worker, at row 0.
    pub fn for_worker(&self, worker: Worker) -> Self {
        Self {
            datasets: self.datasets.clone(),
            names: self.names.clone(),
            shards: self.shards.clone(),
            spec: self.spec.clone(),
            framing: self.framing.clone(),
            phases: self.phases.clone(),
            skipped: self.datasets.iter().map(|_| Arc::default()).collect(),
            fingerprint: self.fingerprint.clone(),
            parallel: self.parallel,
            worker,
            next_row: 0,
            lanes: BTreeMap::new(),
            valid: self.valid.clone(),
        }
    }

    /// What was checked.
    pub fn spec(&self) -> &PipelineSpec {
        &self.spec
    }

    /// The datasets.
    pub fn datasets(&self) -> &[Dataset] {
        &self.datasets
    }

    /// How each dataset's documents are spread over lanes; `None` for one of computed rows, of which lane l of L has the rows l, l + L, ...
    pub fn shards(&self) -> &[Option<Shards>] {
        &self.shards
    }

    /// A lane at its first row.
    pub fn lane(&self, lane: u32) -> Window {
        let stream = |i: usize| {
            let name = self.names[i].clone();
            match (&self.datasets[i].source, self.shards[i]) {
                (Source::Documents { docs, .. }, Some(shards)) => {
                    let (framing, skipped) = (self.framing.clone(), self.skipped[i].clone());
                    Some(Stream::Documents(Box::new(DocStream::new(
                        name,
                        docs.clone(),
                        shards,
                        lane,
                        framing,
                        self.spec.on_bad,
                        skipped,
                    ))))
                }
                (Source::Rows(rows), _) => {
                    let rows = RowStream::new(i as u32, name, rows.clone(), lane, self.spec.lanes);
                    Some(Stream::Rows(rows))
                }
                (Source::Documents { .. }, None) => None,
            }
        };
        let streams = (0..self.datasets.len()).filter_map(stream).collect();
        let pack = Pack::new(
            Mixture::new(streams, self.phases.clone()),
            self.spec.seq_len,
        );
        Window::new(
            pack,
            self.spec.window,
            lane,
            self.spec.lanes,
            self.spec.seed,
        )
    }

    /// Rows of each dataset's kept documents, in file order, packed on their own, and the evaluation sets of tasks.
    fn plan_validation(&self) -> Result<Vec<ValidSet>, DataError> {
        let mut sets = Vec::new();
        for (i, d) in self.datasets.iter().enumerate() {
            let (docs, valid_docs) = match &d.source {
                Source::Documents { docs, valid_docs } => (docs, *valid_docs),
                Source::Rows(rows) => {
                    for (own, set) in rows.eval_sets().into_iter().enumerate() {
                        // Under the dataset's name, which differs where a task is there twice.
                        let rest = set.name.strip_prefix(&rows.name());
                        let name = rest.map(|rest| format!("{}{rest}", d.name));
                        sets.push(ValidSet {
                            set: EvalSet {
                                name: name.unwrap_or_else(|| format!("{}/{}", d.name, set.name)),
                                ..set
                            },
                            rows: ValidRows::Generated(rows.clone(), own),
                        });
                    }
                    continue;
                }
            };
            if valid_docs == 0 || self.spec.valid_rows == 0 {
                continue;
            }
            let first = docs.n_docs() - valid_docs;
            let tail: Arc<dyn Documents> = Arc::new(Tail {
                docs: docs.clone(),
                first,
            });
            let shards = Shards::new(i as u32, valid_docs, 1, OrderMode::Sequential, 0);
            let stream = DocStream::new(
                self.names[i].clone(),
                tail,
                shards,
                0,
                self.framing.clone(),
                self.spec.on_bad,
                Arc::default(),
            );
            let alone: Arc<[Phase]> = [Phase {
                start_row: 0,
                weights: vec![1.0],
            }]
            .into();
            let mixture = Mixture::new(vec![Stream::Documents(Box::new(stream))], alone);
            let mut pack = Pack::new(mixture, self.spec.seq_len);
            let mut rows = Vec::new();
            while (rows.len() as u64) < self.spec.valid_rows {
                let row = pack.next(0)?;
                if row.pieces().iter().any(|p| p.epoch > 0) {
                    break;
                }
                rows.push(row);
            }
            if rows.is_empty() {
                let what = format!("the validation part of dataset {}", d.name);
                let have = pack.mixture().tokens().sum();
                let need = self.spec.seq_len as u64 + 1;
                return Err(DataError::TooShort {
                    what,
                    have,
                    seq_len: self.spec.seq_len,
                    need,
                });
            }
            sets.push(ValidSet {
                set: EvalSet {
                    name: format!("valid/{}", d.name),
                    rows: rows.len() as u64,
                    seq_len: self.spec.seq_len,
                    metric: Metric::Loss,
                },
                rows: ValidRows::Packed(rows),
            });
        }
        Ok(sets)
    }

    /// The batch of the global rows `numbers`, from the lanes that hold them.
    fn assemble(&self, taken: &mut [Taken], numbers: &[u64]) -> Result<Batch, DataError> {
        let all = self.spec.lanes;
        let work = |(number, lane, wanted): &mut Taken| {
            let one = |&(i, r): &(usize, u64)| Ok((i, serve(lane, *number, all, r)?));
            wanted
                .iter()
                .map(one)
                .collect::<Result<Vec<_>, DataError>>()
        };
        let served: Vec<_> = if self.parallel {
            taken.par_iter_mut().map(work).collect()
        } else {
            taken.iter_mut().map(work).collect()
        };
        let mut plans: Vec<Option<RowPlan>> = vec![None; numbers.len()];
        for lane in served {
            for (i, plan) in lane? {
                plans[i] = Some(plan);
            }
        }
        let mut batch = Batch::with_room(numbers.len(), self.spec.seq_len);
        for (plan, &row) in plans.iter().zip(numbers) {
            if let Some(plan) = plan {
                self.append(plan, row, &mut batch)?;
            }
        }
        Ok(batch)
    }

    fn append(&self, plan: &RowPlan, row: u64, batch: &mut Batch) -> Result<(), DataError> {
        let vocab_size = self.framing.vocab_size;
        let pieces = plan.pieces();
        plan.append(batch, vocab_size)
            .map_err(|fault| match fault {
                RowFault::Failed(error) => error,
                RowFault::Outside { doc, token } => {
                    let dataset = pieces.iter().find(|p| p.doc == doc);
                    let (file, doc) = self.place_of(dataset.map_or(0, |p| p.dataset as usize), doc);
                    DataError::TokenRange {
                        path: file.into(),
                        doc,
                        token,
                        vocab_size,
                    }
                }
            })?;
        batch.rows += 1;
        batch.provenance.push(RowProvenance { row, pieces });
        Ok(())
    }
}

impl Pipeline {
    /// File, or what stands for one, and number in it.
    fn place_of(&self, dataset: usize, doc: u64) -> (String, u64) {
        match &self.datasets[dataset].source {
            Source::Documents { docs, .. } => docs.locate(doc),
            Source::Rows(rows) => (rows.file(), doc),
        }
    }
}

/// The documents of a source from `first` on.
struct Tail {
    docs: Arc<dyn Documents>,
    first: u64,
}

impl Documents for Tail {
    fn n_docs(&self) -> u64 {
        self.docs.n_docs() - self.first
    }

    fn tokens(&self, doc: u64) -> Result<crate::data::source::Tokens, DataError> {
        self.docs.tokens(self.first + doc)
    }

    fn locate(&self, doc: u64) -> (String, u64) {
        self.docs.locate(self.first + doc)
    }

    fn fingerprint(&self) -> String {
        self.docs.fingerprint()
    }
}

/// A lane that a batch reads: its number, the lane, and which rows of the batch are which rows of the lane.
type Taken = (u32, Window, Vec<(usize, u64)>);

/// The `r`-th row of a lane; walks past rows that other workers served.
fn serve(lane: &mut Window, number: u32, lanes: u32, r: u64) -> Result<RowPlan, DataError> {
    let global = |r: u64| r * u64::from(lanes) + u64::from(number);
    while lane.rows() < r {
        lane.next(global(lane.rows()))?;
    }
    lane.next(global(r))
}

impl Loader for Pipeline {
    fn next(&mut self, rows: usize) -> Result<Batch, DataError> {
        let (first, step, lanes) = (
            self.next_row + self.worker.rank(),
            self.worker.world(),
            u64::from(self.spec.lanes),
        );
        let mut by_lane: BTreeMap<u32, Vec<(usize, u64)>> = BTreeMap::new();
        for i in 0..rows {
            let row = first + i as u64 * step;
            by_lane
                .entry((row % lanes) as u32)
                .or_default()
                .push((i, row / lanes));
        }
        let mut taken = Vec::with_capacity(by_lane.len());
        for (number, wanted) in by_lane {
            let lane = match self.lanes.remove(&number) {
                Some(lane) => lane,
                None => self.lane(number),
            };
            taken.push((number, lane, wanted));
        }
        let before: Vec<_> = taken.iter().map(|(_, lane, _)| lane.state()).collect();
        let numbers: Vec<u64> = (0..rows as u64).map(|i| first + i * step).collect();
        let made = self.assemble(&mut taken, &numbers);
        // After an error every lane stands where it stood: the caller may save the state, or repair the data and go on.
        if made.is_err() {
            for ((number, lane, _), state) in taken.iter_mut().zip(&before) {
                *lane = self.lane(*number);
                lane.restore(state)?;
            }
        }
        self.lanes
            .extend(taken.into_iter().map(|(number, lane, _)| (number, lane)));
        let batch = made?;
        self.next_row += rows as u64 * step;
        Ok(batch)
    }

    fn state(&self) -> LoaderState {
        LoaderState {
            version: LoaderState::VERSION,
            fingerprint: self.fingerprint.clone(),
            next_row: self.next_row,
            lanes: self
                .lanes
                .iter()
                .map(|(&lane, w)| LaneState {
                    lane,
                    window: w.state(),
                })
                .collect(),
        }
    }

    fn restore(&mut self, state: &LoaderState) -> Result<(), DataError> {
        state.check(&self.fingerprint)?;
        let mut lanes = BTreeMap::new();
        let mine = |lane: u32| {
            let shared = gcd(self.worker.world(), u64::from(self.spec.lanes));
            u64::from(lane) % shared == (state.next_row + self.worker.rank()) % shared
        };
        for saved in state.lanes.iter().filter(|s| mine(s.lane)) {
            if saved.lane >= self.spec.lanes {
                let (lane, lanes) = (saved.lane, self.spec.lanes);
                return Err(DataError::State(format!(
                    "the state has lane {lane}; the pipeline has {lanes}"
                )));
            }
            let mut lane = self.lane(saved.lane);
            lane.restore(&saved.window)?;
            lanes.insert(saved.lane, lane);
        }
        self.lanes = lanes;
        self.next_row = state.next_row;
        Ok(())
    }

    fn vocab_size(&self) -> usize {
        self.framing.vocab_size
    }

    fn seq_len(&self) -> usize {
        self.spec.seq_len
    }

    fn eval_sets(&self) -> Vec<EvalSet> {
        self.valid.iter().map(|v| v.set.clone()).collect()
    }

    fn eval_batch(&self, set: usize, start: u64, rows: usize) -> Result<Batch, DataError> {
        let valid = self.valid.get(set).ok_or(DataError::NoSuchEvalSet {
            set,
            have: self.valid.len(),
        })?;
        let plans = match &valid.rows {
            ValidRows::Packed(plans) => plans,
            ValidRows::Generated(task, own) => {
                return batch_of(&**task, Split::Eval(*own), &valid.set, start, rows);
            }
        };
        let start = (start as usize).min(plans.len());
        let plans = &plans[start..(start + rows).min(plans.len())];
        let mut batch = Batch::with_room(plans.len(), self.spec.seq_len);
        for (i, plan) in plans.iter().enumerate() {
            self.append(plan, (start + i) as u64, &mut batch)?;
        }
        Ok(batch)
    }

    fn locate(&self, piece: &Piece) -> Located {
        let (file, index) = self.place_of(piece.dataset as usize, piece.doc);
        Located {
            dataset: self.datasets[piece.dataset as usize].name.clone(),
            file,
            index,
        }
    }

    /// The lane and the document's number in it are closed forms; which of the lane's rows that is follows from document lengths, so the
    /// lane is walked from its start.
    fn rows_of(&self, dataset: &str, doc: u64, epoch: u64) -> Result<Vec<u64>, DataError> {
        let Some(i) = self.datasets.iter().position(|d| d.name == dataset) else {
            return Ok(Vec::new());
        };
        let found = match (&self.datasets[i].source, self.shards[i]) {
            (Source::Rows(rows), _) => rows
                .row_of(doc, epoch)
                .map(|row| generated::find(row, self.spec.lanes)),
            (_, shards) => shards.and_then(|s| s.find(doc, epoch)),
        };
        let Some((number, k)) = found else {
            return Ok(Vec::new());
        };
        let (mut lane, mut rows) = (self.lane(number), Vec::new());
        let lanes = u64::from(self.spec.lanes);
        // Rows are packed past the document once more than k are drawn and the cut one is not it; a shuffle block may still hold parts.
        let mut past = 0;
        while past < self.spec.window.max(2) {
            let row = lane.rows() * lanes + u64::from(number);
            if lane.pack().mixture().never_again(i, row) && past == 0 && rows.is_empty() {
                break;
            }
            let plan = lane.next(row)?;
            let held = plan
                .pieces()
                .iter()
                .any(|p| p.dataset as usize == i && p.doc == doc && p.epoch == epoch);
            if held {
                rows.push(row);
            }
            let beyond = lane.pack().mixture().drawn(i) > k + 1 || lane.pack().is_between(i, k + 1);
            past = if held || !beyond { 0 } else { past + 1 };
        }
        rows.sort_unstable();
        Ok(rows)
    }

    fn skip_counts(&self) -> Vec<SkipCounts> {
        let counts = |(d, s): (&Dataset, &Arc<Skipped>)| SkipCounts {
            dataset: d.name.clone(),
            empty: s.empty.load(Ordering::Relaxed),
            short: s.short.load(Ordering::Relaxed),
            bad: s.bad.load(Ordering::Relaxed),
        };
        self.datasets
            .iter()
            .zip(&self.skipped)
            .map(counts)
            .collect()
    }

    fn tokens_by_dataset(&self) -> Vec<(String, u64)> {
        let mut counts = vec![0; self.datasets.len()];
        for lane in self.lanes.values() {
            for (count, tokens) in counts.iter_mut().zip(lane.pack().mixture().tokens()) {
                *count += tokens;
            }
        }
        self.datasets
            .iter()
            .map(|d| d.name.clone())
            .zip(counts)
            .collect()
    }
}

pub(crate) fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
