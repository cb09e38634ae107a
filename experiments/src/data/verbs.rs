//! What `marimba data ...` does, as functions with printable and serialisable results.

use super::open::{open, open_documents, open_pipeline};
use super::order::{OrderMode, order};
use super::pipeline::loader::gcd;
use super::pipeline::{OnBad, Source};
use super::prepare::inputs_of;
use super::source::format::{Columns, Format, Raw, stream};
use super::source::shards::{MANIFEST, ShardDocs};
use super::tokenizer::Tokenize;
use super::{DataError, Loader, LoaderState, Located, Piece, Worker, place};
use marimba_dsl::run::Run;
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Answer of `data order`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OrderList {
    /// Documents in the order they are seen.
    pub order: Vec<u64>,
}

impl fmt::Display for OrderList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> = self.order.iter().map(u64::to_string).collect();
        f.write_str(&words.join(" "))
    }
}

/// The order of `size` documents of logical shard `rank` of the first dataset.
///
/// # Errors
/// [`DataError::Parameter`] for a size too large to list.
pub fn order_of(
    mode: OrderMode,
    size: u64,
    rank: u64,
    seed: u64,
    epoch: u64,
) -> Result<OrderList, DataError> {
    Ok(OrderList {
        order: order(mode, size, seed, 0, rank, epoch)?,
    })
}

/// The phase of a run that a step lies in, and the global rows of that step.
fn rows_of_step(
    run: &Run,
    workers: usize,
    step: u64,
) -> Result<(usize, std::ops::Range<u64>), DataError> {
    let mut before = 0;
    for (i, phase) in run.phases.iter().enumerate() {
        if step < before + phase.steps as u64 {
            let rows = rows_per_step(run, i, workers);
            return Ok((i, (step - before) * rows..(step - before + 1) * rows));
        }
        before += phase.steps as u64;
    }
    Err(DataError::Parameter(format!(
        "step {step} is beyond the run's {before} steps, numbered from 0"
    )))
}

fn rows_per_step(run: &Run, phase: usize, workers: usize) -> u64 {
    (run.phases[phase].batch * run.phases[phase].accumulate * workers) as u64
}

/// Answer of `data which`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Which {
    /// The step.
    pub step: u64,
    /// Name of its phase.
    pub phase: String,
    /// Its rows, in order.
    pub rows: Vec<WhichRow>,
}

/// One row of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WhichRow {
    /// Number in the global sequence of the phase.
    pub row: u64,
    /// Number in the step.
    pub row_in_step: u64,
    /// Its document parts.
    pub pieces: Vec<WhichPiece>,
}

/// One document part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WhichPiece {
    /// Numbers.
    pub piece: Piece,
    /// Where that lies.
    pub at: Located,
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "step {} (phase {})", self.step, self.phase)?;
        for row in &self.rows {
            writeln!(f, "row {} (global {})", row.row_in_step, row.row)?;
            for WhichPiece { piece, at } in &row.pieces {
                let (start, end) = (piece.start, piece.start + piece.len);
                writeln!(
                    f,
                    "  {}: document {}, epoch {}, tokens {start}..{end}, {} [{}]",
                    at.dataset, piece.doc, piece.epoch, at.file, at.index
                )?;
            }
        }
        Ok(())
    }
}

/// Which documents were in step `step` of a run on `workers` workers: all rows, or row `row` of the step.
///
/// # Errors
/// [`DataError::Parameter`] for a step or row that the run does not have, and whatever opening the data can fail with.
pub fn which(run: &Run, workers: usize, step: u64, row: Option<u64>) -> Result<Which, DataError> {
    let (phase, rows) = rows_of_step(run, workers, step)?;
    let phase_spec = &run.phases[phase];
    let mut loader = open(&phase_spec.data, phase_spec.seq_len, run.seed, Worker::ALL)?;
    let (first, n) = match row {
        Some(row) if rows.start + row >= rows.end => {
            let text = format!(
                "row {row} is beyond the step's {} rows, numbered from 0",
                rows.end - rows.start
            );
            return Err(DataError::Parameter(text));
        }
        Some(row) => (rows.start + row, 1),
        None => (rows.start, (rows.end - rows.start) as usize),
    };
    // No lane was ever served: each that is needed is walked from its start, by document lengths.
    let fresh = LoaderState {
        next_row: first,
        lanes: Vec::new(),
        ..loader.state()
    };
    loader.restore(&fresh)?;
    let batch = loader.next(n)?;
    let rows = batch.provenance.iter().map(|p| WhichRow {
        row: p.row,
        row_in_step: p.row - rows.start,
        pieces: p
            .pieces
            .iter()
            .map(|piece| WhichPiece {
                piece: *piece,
                at: loader.locate(piece),
            })
            .collect(),
    });
    Ok(Which {
        step,
        phase: phase_spec.name.clone(),
        rows: rows.collect(),
    })
}

/// Answer of `data when`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct When {
    /// The dataset.
    pub dataset: String,
    /// Number of the document in it.
    pub doc: u64,
    /// When it is seen, in order.
    pub seen: Vec<Seen>,
}

/// One sight of a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// The step.
    pub step: u64,
    /// Name of its phase.
    pub phase: String,
    /// Row in the step.
    pub row_in_step: u64,
    /// Epoch of the document's logical shard.
    pub epoch: u64,
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.seen.is_empty() {
            writeln!(
                f,
                "{} document {}: in no step of the run",
                self.dataset, self.doc
            )?;
        }
        for s in &self.seen {
            writeln!(
                f,
                "{} document {}: step {}, row {}, epoch {} (phase {})",
                self.dataset, self.doc, s.step, s.row_in_step, s.epoch, s.phase
            )?;
        }
        Ok(())
    }
}

/// In which steps of a run on `workers` workers document `doc` of `dataset` is seen.
///
/// # Errors
/// Whatever opening the data can fail with.
pub fn when(run: &Run, workers: usize, dataset: &str, doc: u64) -> Result<When, DataError> {
    let (mut seen, mut before) = (Vec::new(), 0);
    for (i, phase) in run.phases.iter().enumerate() {
        let loader = open(&phase.data, phase.seq_len, run.seed, Worker::ALL)?;
        let per_step = rows_per_step(run, i, workers);
        let end = phase.steps as u64 * per_step;
        for epoch in 0.. {
            let rows = loader.rows_of(dataset, doc, epoch)?;
            let inside: Vec<u64> = rows.iter().copied().filter(|&r| r < end).collect();
            seen.extend(inside.iter().map(|row| Seen {
                step: before + row / per_step,
                phase: phase.name.clone(),
                row_in_step: row % per_step,
                epoch,
            }));
            if inside.len() < rows.len() || rows.is_empty() {
                break;
            }
        }
        before += phase.steps as u64;
    }
    Ok(When {
        dataset: dataset.into(),
        doc,
        seen,
    })
}

/// Answer of `data inspect`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspected {
    /// Format by file, in order, at most 20.
    pub files: Vec<(String, Format)>,
    /// Number of files.
    pub n_files: usize,
    /// Documents looked at; all where `complete`.
    pub docs: u64,
    /// Tokens of them.
    pub tokens: u64,
    /// Whether all documents were looked at.
    pub complete: bool,
    /// Documents that could not be read, and the first reason.
    pub bad: u64,
    /// The first reason.
    pub first_bad: Option<String>,
    /// Largest token id.
    pub max_token: u32,
    /// Number of documents by length: item `i` counts lengths of `2^(i-1)` up to `2^i - 1` tokens; item 0 counts empty ones.
    pub lengths: Vec<u64>,
    /// Longest document, tokens.
    pub longest: u64,
    /// Starts of some documents, decoded.
    pub samples: Vec<String>,
}

impl fmt::Display for Inspected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (file, format) in &self.files {
            writeln!(f, "{file}: {format:?}")?;
        }
        if self.n_files > self.files.len() {
            writeln!(f, "... {} files in all", self.n_files)?;
        }
        let so_far = if self.complete {
            ""
        } else {
            " (looked at; there are more)"
        };
        writeln!(
            f,
            "documents {}{so_far}, tokens {}, largest id {}, longest document {} tokens",
            self.docs, self.tokens, self.max_token, self.longest
        )?;
        if let Some(reason) = &self.first_bad {
            writeln!(f, "unreadable documents {}, the first: {reason}", self.bad)?;
        }
        let most = self.lengths.iter().copied().max().unwrap_or(0).max(1);
        for (i, &n) in self.lengths.iter().enumerate().filter(|(_, n)| **n > 0) {
            let (low, high) = if i == 0 {
                (0, 0)
            } else {
                (1u64 << (i - 1), (1u64 << i) - 1)
            };
            writeln!(
                f,
                "{low:>9} to {high:>9} tokens {n:>10} {}",
                "#".repeat((n * 40).div_ceil(most) as usize)
            )?;
        }
        for (i, sample) in self.samples.iter().enumerate() {
            writeln!(f, "sample {i}: {sample:?}")?;
        }
        Ok(())
    }
}

/// Looks at up to `limit` documents of `path`.
///
/// # Errors
/// What keeps the files from being read at all; single bad documents are counted.
pub fn inspect(
    path: &Path,
    tokenizer: &Arc<dyn Tokenize>,
    columns: &Columns,
    limit: u64,
) -> Result<Inspected, DataError> {
    let mut out = Inspected {
        files: Vec::new(),
        n_files: 0,
        docs: 0,
        tokens: 0,
        complete: true,
        bad: 0,
        first_bad: None,
        max_token: 0,
        lengths: Vec::new(),
        longest: 0,
        samples: Vec::new(),
    };
    let look = |raw: Result<Raw, DataError>, out: &mut Inspected| -> Result<bool, DataError> {
        let tokens = match raw {
            Ok(Raw::Text(text)) => tokenizer.encode(&text)?,
            Ok(Raw::Tokens(tokens)) => tokens,
            Ok(Raw::Stored(tokens)) => tokens.to_vec(),
            Err(error) => {
                out.bad += 1;
                out.first_bad.get_or_insert_with(|| error.to_string());
                return Ok(true);
            }
        };
        if out.docs == limit {
            out.complete = false;
            return Ok(false);
        }
        let n = tokens.len() as u64;
        let class = (64 - n.leading_zeros()) as usize;
        if out.lengths.len() <= class {
            out.lengths.resize(class + 1, 0);
        }
        out.lengths[class] += 1;
        (out.docs, out.tokens, out.longest) = (out.docs + 1, out.tokens + n, out.longest.max(n));
        out.max_token = out.max_token.max(tokens.iter().copied().max().unwrap_or(0));
        if out.samples.len() < 3 && n > 0 {
            let head = &tokens[..tokens.len().min(40)];
            // Ids of another vocabulary than the tokenizer's are shown as numbers.
            let known = head.iter().all(|&t| (t as usize) < tokenizer.vocab_size());
            out.samples.push(if known {
                tokenizer.decode(head)?
            } else {
                format!("{head:?}")
            });
        }
        Ok(true)
    };
    if place::exists(&path.join(MANIFEST))? {
        use super::source::Documents;
        let docs = ShardDocs::open(path)?;
        out.files = vec![(path.display().to_string(), Format::Shards)];
        out.n_files = docs.manifest().parts.len();
        for doc in 0..docs.n_docs() {
            if !look(docs.tokens(doc).map(Raw::Stored), &mut out)? {
                break;
            }
        }
        return Ok(out);
    }
    let files = inputs_of(&[PathBuf::from(path)])?;
    out.n_files = files.len();
    for file in &files {
        let format = Format::of(file)?;
        if out.files.len() < 20 {
            out.files.push((file.display().to_string(), format));
        }
        let mut go_on = true;
        stream(file, format, columns, &mut |raw| {
            go_on = look(raw, &mut out)?;
            Ok(go_on)
        })?;
        if !go_on {
            break;
        }
    }
    Ok(out)
}

/// Answer of `data plan`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// W.
    pub workers: usize,
    /// L.
    pub lanes: u32,
    /// How many workers walk through each lane: 1 where W divides L.
    pub readers_per_lane: u64,
    /// The datasets.
    pub datasets: Vec<PlanDataset>,
    /// Per worker: lanes, and per dataset the documents in its shards. At most 64 workers are listed.
    pub reads: Vec<PlanWorker>,
    /// Rows over which the mixture below was drawn.
    pub rows: u64,
}

/// One dataset of a plan.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanDataset {
    /// Name.
    pub name: String,
    /// Training documents; `None` for a task, whose examples are computed.
    pub docs: Option<u64>,
    /// Documents kept for validation.
    pub valid_docs: u64,
    /// S, logical shards: 0 for a task.
    pub shards: u32,
    /// Share asked for in the first phase, of all tokens.
    pub weight: f64,
    /// Share of tokens drawn.
    pub drawn: f64,
    /// Documents left out over those rows: without tokens, below `min_length`, unreadable.
    pub skipped: [u64; 3],
}

/// One worker of a plan.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanWorker {
    /// Rank.
    pub rank: usize,
    /// Lanes it reads.
    pub lanes: usize,
    /// Per dataset, documents in the shards of those lanes.
    pub docs: Vec<u64>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} workers, {} lanes, {} worker(s) walk through each lane",
            self.workers, self.lanes, self.readers_per_lane
        )?;
        if self.readers_per_lane > 1 {
            writeln!(
                f,
                "  a number of workers that divides {} would read every lane once",
                self.lanes
            )?;
        }
        writeln!(f, "mixture over the first {} rows:", self.rows)?;
        for d in &self.datasets {
            let has = match d.docs {
                Some(docs) => format!(
                    "{docs} documents in {} shards, {} kept for validation",
                    d.shards, d.valid_docs
                ),
                None => "computed rows".to_owned(),
            };
            let (name, weight, drawn) = (&d.name, d.weight, d.drawn);
            writeln!(f, "  {name}: {has}, weight {weight:.4}, drawn {drawn:.4}")?;
        }
        for d in self.datasets.iter().filter(|d| d.skipped != [0; 3]) {
            let [empty, short, bad] = d.skipped;
            writeln!(
                f,
                "  {}: left out {empty} empty, {short} short and {bad} unreadable documents",
                d.name
            )?;
        }
        for w in &self.reads {
            writeln!(
                f,
                "worker {}: {} lanes, documents by dataset {:?}",
                w.rank, w.lanes, w.docs
            )?;
        }
        Ok(())
    }
}

/// Who reads what in phase `phase` of a run with `workers` workers, and the mixture of the first `rows` rows.
///
/// # Errors
/// [`DataError::Parameter`] for 0 workers, a phase that does not exist or data without documents, and whatever opening can fail with.
pub fn plan(run: &Run, phase: usize, workers: usize, rows: u64) -> Result<Plan, DataError> {
    let Some(spec) = run.phases.get(phase) else {
        return Err(DataError::Parameter(format!(
            "phase {phase} does not exist; the run has {}, numbered from 0",
            run.phases.len()
        )));
    };
    if workers == 0 {
        return Err(DataError::Parameter(
            "a plan for 0 workers; expected 1 or more".into(),
        ));
    }
    let mut pipeline = open_pipeline(&spec.data, spec.seq_len, run.seed, Worker::ALL)?;
    pipeline.next(rows as usize)?;
    let (drawn, skipped) = (pipeline.tokens_by_dataset(), pipeline.skip_counts());
    let total = drawn.iter().map(|d| d.1).sum::<u64>().max(1) as f64;
    let lanes = pipeline.spec().lanes;
    let phases = &pipeline.spec().phases;
    let sum: f64 = phases[0].weights.iter().sum();
    let datasets = pipeline
        .datasets()
        .iter()
        .zip(pipeline.shards())
        .enumerate()
        .map(|(i, (d, s))| PlanDataset {
            name: d.name.clone(),
            docs: s.map(|s| s.n_docs),
            valid_docs: match d.source {
                Source::Documents { valid_docs, .. } => valid_docs,
                Source::Rows(_) => 0,
            },
            shards: s.map_or(0, |s| s.shards),
            weight: phases[0].weights[i] / sum,
            drawn: drawn[i].1 as f64 / total,
            skipped: [skipped[i].empty, skipped[i].short, skipped[i].bad],
        });
    let shared = gcd(workers as u64, u64::from(lanes)) as u32;
    let reads = (0..workers.min(64)).map(|rank| {
        let mine: Vec<u32> = (0..lanes)
            .filter(|l| l % shared == rank as u32 % shared)
            .collect();
        let docs = pipeline.shards().iter().map(|s| {
            let Some(s) = s else { return 0 };
            let shards: std::collections::BTreeSet<u32> =
                mine.iter().map(|l| l % s.shards).collect();
            shards
                .into_iter()
                .map(|shard| s.range(shard))
                .map(|r| r.end - r.start)
                .sum()
        });
        PlanWorker {
            rank,
            lanes: mine.len(),
            docs: docs.collect(),
        }
    });
    Ok(Plan {
        workers,
        lanes,
        readers_per_lane: workers as u64 / u64::from(shared),
        datasets: datasets.collect(),
        reads: reads.collect(),
        rows,
    })
}

/// Compares prepared shards with their manifest, or opens other files completely.
///
/// # Errors
/// The first difference or damage.
pub fn verify(
    path: &Path,
    tokenizer: Arc<dyn Tokenize>,
    columns: &Columns,
) -> Result<u64, DataError> {
    if place::exists(&path.join(MANIFEST))? {
        let docs = ShardDocs::open(path)?;
        docs.verify()?;
        return Ok(docs.manifest().docs);
    }
    let docs = open_documents(&[path.into()], tokenizer, columns, OnBad::Stop)?;
    for doc in 0..docs.n_docs() {
        docs.tokens(doc)?;
    }
    Ok(docs.n_docs())
}
