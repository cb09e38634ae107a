//! The data side: everything between files (or a generator) and the micro-batches that training reads.
//!
//! Contract. A loader is a deterministic sequence of *global rows*, numbered from 0, that depends only on the data
//! and its parameters, never on how many workers read it. Worker `w` of `W` serves the rows `g` with `g % W == w`.
//! So equal `workers x batch` products see the same steps, and a run may stop, resume and change its number of
//! workers at any row. The state of a loader is small and says where the sequence stands, not what was read.
//!
//! Two kinds of sequence exist. *Closed-form rows* ([`rows::Rows`]: synthetic tasks, plain byte text) compute row `g`
//! from `g` alone. The document [`pipeline`] packs documents of several datasets; its state is one cursor per
//! logical shard.
//!
//! Not here: training, batching policy, devices. Targets are already shifted: `targets[t]` is what `tokens[..=t]`
//! should predict.

pub mod bench;
pub mod error;
pub mod fms;
pub mod mmap;
pub mod open;
pub mod order;
pub mod pipeline;
pub mod place;
pub mod plots;
pub mod prepare;
#[cfg(feature = "remote")]
mod remote;
pub mod rng;
pub mod rows;
pub mod source;
pub mod tasks;
pub mod text;
pub mod tokenizer;
pub mod verbs;

pub use error::DataError;
pub use open::{open, open_pipeline};
pub use pipeline::loader::SkipCounts;

use serde::{Deserialize, Serialize};

/// Target value of a position that no loss and no metric looks at.
pub const IGNORED: i32 = -100;

/// One micro-batch. Arrays are row-major `[B T]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// B.
    pub rows: usize,
    /// T.
    pub seq_len: usize,
    /// Input token ids, `i32[B T]`.
    pub tokens: Vec<i32>,
    /// Token to predict at each position, `i32[B T]`; [`IGNORED`] where nothing is.
    pub targets: Vec<i32>,
    /// Number of the document inside its row, `i32[B T]`, from 0, never decreasing. Equal values may attend each other.
    pub segments: Vec<i32>,
    /// Position inside the document part that this row holds, `i32[B T]`, from 0 at every new segment.
    pub positions: Vec<i32>,
    /// Where each row came from, one item per row.
    pub provenance: Vec<RowProvenance>,
}

impl Batch {
    /// A batch of `rows` rows of token 0, all targets ignored, one segment.
    pub fn blank(rows: usize, seq_len: usize) -> Self {
        let n = rows * seq_len;
        let mut positions = vec![0; n];
        for row in positions.chunks_exact_mut(seq_len.max(1)) {
            for (t, p) in row.iter_mut().enumerate() {
                *p = t as i32;
            }
        }
        Self {
            rows,
            seq_len,
            tokens: vec![0; n],
            targets: vec![IGNORED; n],
            segments: vec![0; n],
            positions,
            provenance: Vec::with_capacity(rows),
        }
    }

    /// A batch without rows yet, with room for `rows`: what is appended to it is all that is ever written.
    pub fn with_room(rows: usize, seq_len: usize) -> Self {
        let n = rows * seq_len;
        Self {
            rows: 0,
            seq_len,
            tokens: Vec::with_capacity(n),
            targets: Vec::with_capacity(n),
            segments: Vec::with_capacity(n),
            positions: Vec::with_capacity(n),
            provenance: Vec::with_capacity(rows),
        }
    }

    /// The four arrays of row `row`.
    pub fn row_mut(&mut self, row: usize) -> RowMut<'_> {
        let span = row * self.seq_len..(row + 1) * self.seq_len;
        RowMut {
            tokens: &mut self.tokens[span.clone()],
            targets: &mut self.targets[span.clone()],
            segments: &mut self.segments[span.clone()],
            positions: &mut self.positions[span],
        }
    }

    /// Number of positions with a target.
    pub fn n_targets(&self) -> usize {
        self.targets.iter().filter(|&&t| t != IGNORED).count()
    }

    /// Accuracy of `predictions` (`i32[B T]`) per row, over the positions with a target; `None` for a row without any.
    pub fn row_accuracies(&self, predictions: &[i32]) -> Vec<Option<f64>> {
        let rows = self
            .targets
            .chunks(self.seq_len.max(1))
            .zip(predictions.chunks(self.seq_len.max(1)));
        rows.map(|(targets, predicted)| {
            let asked = targets.iter().filter(|&&t| t != IGNORED).count();
            let right = targets
                .iter()
                .zip(predicted)
                .filter(|(t, p)| **t != IGNORED && t == p)
                .count();
            (asked > 0).then(|| right as f64 / asked as f64)
        })
        .collect()
    }
}

/// One row of a [`Batch`], each `i32[T]`.
pub struct RowMut<'a> {
    /// Input token ids.
    pub tokens: &'a mut [i32],
    /// Tokens to predict, or [`IGNORED`].
    pub targets: &'a mut [i32],
    /// Document number inside the row.
    pub segments: &'a mut [i32],
    /// Position inside the document part.
    pub positions: &'a mut [i32],
}

/// Where a row came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowProvenance {
    /// Number of the row in the global sequence.
    pub row: u64,
    /// The document parts in the row, first to last.
    pub pieces: Vec<Piece>,
}

/// A contiguous part of one document inside a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Piece {
    /// Index of the dataset in the mixture; 0 where there is one.
    pub dataset: u32,
    /// How often the dataset was gone through before, in the logical shard that the document belongs to.
    pub epoch: u64,
    /// Index of the document in its dataset (of the example, for generated tasks; of the window, for byte text).
    pub doc: u64,
    /// First token of the part, counted inside the document.
    pub start: u64,
    /// Tokens in the part. The last token of a row is only a target: a row of T inputs holds T + 1 tokens.
    pub len: u64,
}

/// Where a loader stands. Small, and independent of the number of workers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderState {
    /// Layout of this structure; [`LoaderState::VERSION`].
    pub version: u32,
    /// Digest of everything that decides the sequence (data, parameters, seed). Another digest is refused on restore.
    pub fingerprint: String,
    /// First global row that has not been served.
    pub next_row: u64,
    /// Cursors of the logical shards this worker holds; empty for closed-form rows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lanes: Vec<LaneState>,
}

impl LoaderState {
    /// The layout this build writes and reads.
    pub const VERSION: u32 = 1;

    /// Joins what the workers of one fleet saved at the same step, in any order, into the state of the whole.
    ///
    /// # Errors
    /// [`DataError::State`] when the parts are of different sequences or steps, or there are none.
    pub fn merge(parts: &[Self]) -> Result<Self, DataError> {
        let Some(first) = parts.first() else {
            return Err(DataError::State(
                "no loader state to merge; expected one per worker".into(),
            ));
        };
        let mut lanes: std::collections::BTreeMap<u32, LaneState> = Default::default();
        for part in parts {
            if part.fingerprint != first.fingerprint || part.next_row != first.next_row {
                return Err(DataError::State(format!(
                    "loader states of different runs or steps (rows {} and {}); expected the states that one fleet saved at one step",
                    first.next_row, part.next_row
                )));
            }
            for lane in &part.lanes {
                let held = lanes.entry(lane.lane).or_insert_with(|| lane.clone());
                if lane.window.rows > held.window.rows {
                    *held = lane.clone();
                }
            }
        }
        Ok(Self {
            lanes: lanes.into_values().collect(),
            ..first.clone()
        })
    }

    /// Fails unless this state has the layout of this build and belongs to the sequence `fingerprint`.
    ///
    /// # Errors
    /// [`DataError::State`].
    pub fn check(&self, fingerprint: &str) -> Result<(), DataError> {
        if self.version != Self::VERSION {
            return Err(DataError::State(format!(
                "loader state has layout {}; this build reads layout {}",
                self.version,
                Self::VERSION
            )));
        }
        if self.fingerprint != fingerprint {
            return Err(DataError::State(format!(
                "the data or its parameters changed since the state was saved (digest {}, now {fingerprint}); resume with the \
                 same files and data parameters, or start a new run",
                self.fingerprint
            )));
        }
        Ok(())
    }
}

/// Cursor of one logical shard ("lane") of the document pipeline. Saved as a flat list of numbers, to stay small.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Vec<u64>", try_from = "Vec<u64>")]
pub struct LaneState {
    /// Which lane.
    pub lane: u32,
    /// Where its last stage stands.
    pub window: pipeline::window::WindowState,
}

impl From<LaneState> for Vec<u64> {
    /// Lane, rows, phase, open document (dataset + 1 or 0, tokens used), then three numbers per dataset.
    fn from(state: LaneState) -> Self {
        let pack = state.window.pack;
        let (dataset, used) = pack
            .open
            .map_or((0, 0), |(d, used)| (u64::from(d) + 1, used));
        let head = [
            u64::from(state.lane),
            state.window.rows,
            u64::from(pack.mixture.phase),
            dataset,
            used,
        ];
        head.into_iter()
            .chain(pack.mixture.drawn.into_iter().flatten())
            .collect()
    }
}

impl TryFrom<Vec<u64>> for LaneState {
    type Error = DataError;

    fn try_from(numbers: Vec<u64>) -> Result<Self, DataError> {
        let bad = || {
            DataError::State(format!(
                "a lane's state has {} numbers that do not fit; expected 5 and 3 per dataset",
                numbers.len()
            ))
        };
        let (head, drawn) = numbers.split_at_checked(5).ok_or_else(bad)?;
        let small = |n: u64| u32::try_from(n).map_err(|_| bad());
        let (drawn, rest) = drawn.as_chunks::<3>();
        if !rest.is_empty() {
            return Err(bad());
        }
        let open = match head[3] {
            0 => None,
            d => Some((small(d - 1)?, head[4])),
        };
        let mixture = pipeline::mixture::MixtureState {
            drawn: drawn.to_vec(),
            phase: small(head[2])?,
        };
        let window = pipeline::window::WindowState {
            pack: pipeline::pack::PackState { mixture, open },
            rows: head[1],
        };
        Ok(Self {
            lane: small(head[0])?,
            window,
        })
    }
}

/// A piece's place for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Located {
    /// Name of the dataset.
    pub dataset: String,
    /// The file, or what stands for one.
    pub file: String,
    /// Number of the document in that file.
    pub index: u64,
}

/// What a score of an evaluation set means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Metric {
    /// Mean cross entropy over all targets.
    Loss,
    /// Accuracy per row over its targets, then the mean over rows.
    Accuracy,
}

/// A fixed set of rows to evaluate on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvalSet {
    /// Name for reports, such as `mqar/T64/K4`.
    pub name: String,
    /// Rows in the set.
    pub rows: u64,
    /// T of the rows of this set.
    pub seq_len: usize,
    /// What to report besides the loss.
    pub metric: Metric,
}

/// What training reads from.
pub trait Loader: Send {
    /// The next `rows` rows of this worker.
    ///
    /// # Errors
    /// Whatever reading the data can fail with; see [`DataError`].
    fn next(&mut self, rows: usize) -> Result<Batch, DataError>;

    /// Where the sequence stands after the last batch given.
    fn state(&self) -> LoaderState;

    /// Continues at `state`, bitwise: the batches that follow are those that would have followed there.
    ///
    /// # Errors
    /// [`DataError::State`] when the state belongs to other data or another layout.
    fn restore(&mut self, state: &LoaderState) -> Result<(), DataError>;

    /// V: all token ids are below it.
    fn vocab_size(&self) -> usize;

    /// T of training rows.
    fn seq_len(&self) -> usize;

    /// The evaluation sets, possibly none.
    fn eval_sets(&self) -> Vec<EvalSet>;

    /// Rows `start..start + rows` of evaluation set `set`, cut at the end of the set. Changes no state.
    ///
    /// # Errors
    /// [`DataError::NoSuchEvalSet`], and whatever reading can fail with.
    fn eval_batch(&self, set: usize, start: u64, rows: usize) -> Result<Batch, DataError>;

    /// Where a piece of a training row lies.
    fn locate(&self, piece: &Piece) -> Located;

    /// The global rows that hold a part of document `doc` of dataset `dataset` in its epoch `epoch`, in ascending order, computed and not
    /// looked up. Empty when there is no such document or epoch.
    ///
    /// # Errors
    /// Whatever reading document lengths can fail with.
    fn rows_of(&self, dataset: &str, doc: u64, epoch: u64) -> Result<Vec<u64>, DataError>;

    /// Training tokens given so far per dataset of the mixture, in its order, by name.
    fn tokens_by_dataset(&self) -> Vec<(String, u64)> {
        Vec::new()
    }

    /// Documents left out so far by this process, per dataset.
    fn skip_counts(&self) -> Vec<SkipCounts> {
        Vec::new()
    }
}

/// Which share of the global sequence a loader serves: rows `g` with `g % world == rank`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Worker {
    rank: u64,
    world: u64,
}

impl Worker {
    /// The one worker that serves everything.
    pub const ALL: Self = Self { rank: 0, world: 1 };

    /// Worker `rank` of `world`.
    ///
    /// # Errors
    /// [`DataError::Parameter`] unless `rank < world`.
    pub fn new(rank: usize, world: usize) -> Result<Self, DataError> {
        if rank >= world {
            return Err(DataError::Parameter(format!(
                "worker {rank} of {world}; ranks go from 0 to the number of workers less 1"
            )));
        }
        Ok(Self {
            rank: rank as u64,
            world: world as u64,
        })
    }

    /// This worker's number.
    pub fn rank(self) -> u64 {
        self.rank
    }

    /// Number of workers.
    pub fn world(self) -> u64 {
        self.world
    }
}

/// Lower-case hexadecimal digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
