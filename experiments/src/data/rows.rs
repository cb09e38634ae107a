//! Closed-form rows: row `g` computed from `g` alone, and the loader over them, whose whole state is a row number.

use super::{
    Batch, DataError, EvalSet, Loader, LoaderState, Located, Piece, RowMut, RowProvenance, Worker,
};

/// A row of which set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// The endless training sequence.
    Train,
    /// Evaluation set by index.
    Eval(usize),
}

/// A sequence whose rows can be computed in any order.
pub trait Rows: Send + Sync {
    /// V.
    fn vocab_size(&self) -> usize;

    /// T of training rows.
    fn seq_len(&self) -> usize;

    /// Digest of everything that decides the rows.
    fn fingerprint(&self) -> String;

    /// Writes row `row` of `split` into `out`, which arrives blank: token 0, targets ignored, one segment, positions counting
    /// from 0.
    ///
    /// # Errors
    /// Whatever reading can fail with.
    fn fill(&self, split: Split, row: u64, out: RowMut<'_>) -> Result<(), DataError>;

    /// Where row `row` of `split` comes from. By default one generated example.
    fn pieces(&self, split: Split, row: u64) -> Vec<Piece> {
        let len = match split {
            Split::Train => self.seq_len(),
            Split::Eval(set) => self.eval_sets().get(set).map_or(0, |s| s.seq_len),
        };
        vec![Piece {
            dataset: 0,
            epoch: 0,
            doc: row,
            start: 0,
            len: len as u64,
        }]
    }

    /// The training row that holds example (or window) `doc` in `epoch`; the inverse of [`Rows::pieces`]. By default there is one epoch.
    fn row_of(&self, doc: u64, epoch: u64) -> Option<u64> {
        (epoch == 0).then_some(doc)
    }

    /// What stands for a file.
    fn file(&self) -> String {
        "generated".into()
    }

    /// The evaluation sets.
    fn eval_sets(&self) -> Vec<EvalSet>;

    /// Name of the only dataset.
    fn name(&self) -> String;
}

/// A [`Loader`] over closed-form rows.
pub struct RowLoader<R> {
    rows: R,
    worker: Worker,
    next_row: u64,
}

impl<R: Rows> RowLoader<R> {
    /// Starts at row 0 as `worker`.
    pub fn new(rows: R, worker: Worker) -> Self {
        Self {
            rows,
            worker,
            next_row: 0,
        }
    }

    /// The sequence behind the loader.
    pub fn rows(&self) -> &R {
        &self.rows
    }
}

fn batch(
    rows: &(impl Rows + ?Sized),
    split: Split,
    seq_len: usize,
    numbers: impl ExactSizeIterator<Item = u64>,
) -> Result<Batch, DataError> {
    let mut batch = Batch::blank(numbers.len(), seq_len);
    for (i, row) in numbers.enumerate() {
        rows.fill(split, row, batch.row_mut(i))?;
        batch.provenance.push(RowProvenance {
            row,
            pieces: rows.pieces(split, row),
        });
    }
    Ok(batch)
}

/// Rows `start..start + n` of evaluation set `set`, which is `split`, cut at its end.
///
/// # Errors
/// Whatever filling rows can fail with.
pub fn batch_of(
    rows: &(impl Rows + ?Sized),
    split: Split,
    set: &EvalSet,
    start: u64,
    n: usize,
) -> Result<Batch, DataError> {
    let n = set.rows.saturating_sub(start).min(n as u64) as usize;
    batch(rows, split, set.seq_len, (0..n).map(|i| start + i as u64))
}

impl<R: Rows> Loader for RowLoader<R> {
    fn next(&mut self, rows: usize) -> Result<Batch, DataError> {
        let (first, step) = (self.next_row + self.worker.rank(), self.worker.world());
        let batch = batch(
            &self.rows,
            Split::Train,
            self.rows.seq_len(),
            (0..rows).map(|i| first + i as u64 * step),
        )?;
        self.next_row += rows as u64 * step;
        Ok(batch)
    }

    fn state(&self) -> LoaderState {
        LoaderState {
            version: LoaderState::VERSION,
            fingerprint: self.rows.fingerprint(),
            next_row: self.next_row,
            lanes: Vec::new(),
        }
    }

    fn restore(&mut self, state: &LoaderState) -> Result<(), DataError> {
        state.check(&self.rows.fingerprint())?;
        self.next_row = state.next_row;
        Ok(())
    }

    fn vocab_size(&self) -> usize {
        self.rows.vocab_size()
    }

    fn seq_len(&self) -> usize {
        self.rows.seq_len()
    }

    fn eval_sets(&self) -> Vec<EvalSet> {
        self.rows.eval_sets()
    }

    fn eval_batch(&self, set: usize, start: u64, rows: usize) -> Result<Batch, DataError> {
        let sets = self.rows.eval_sets();
        let found = sets.get(set).ok_or(DataError::NoSuchEvalSet {
            set,
            have: sets.len(),
        })?;
        batch_of(&self.rows, Split::Eval(set), found, start, rows)
    }

    fn locate(&self, piece: &Piece) -> Located {
        Located {
            dataset: self.rows.name(),
            file: self.rows.file(),
            index: piece.doc,
        }
    }

    fn rows_of(&self, dataset: &str, doc: u64, epoch: u64) -> Result<Vec<u64>, DataError> {
        let found = (dataset == self.rows.name())
            .then(|| self.rows.row_of(doc, epoch))
            .flatten();
        Ok(found.into_iter().collect())
    }

    fn tokens_by_dataset(&self) -> Vec<(String, u64)> {
        vec![(self.rows.name(), self.next_row * self.rows.seq_len() as u64)]
    }
}
