//! Stage 1 for rows that are computed and not read: of a closed-form sequence, lane l of L takes the rows l, l + L, l + 2 L, ...
//!
//! State: rows drawn. Every row of the sequence is in exactly one lane, so a task's examples come exactly once an epoch for any number of
//! workers, as documents do.

use super::Stage;
use crate::data::rows::Rows;
use crate::data::{DataError, Piece};
use std::fmt;
use std::sync::Arc;

/// A row of a closed-form sequence.
#[derive(Clone)]
pub struct Generated {
    /// Number in the mixture.
    pub dataset: u32,
    /// The sequence.
    pub rows: Arc<dyn Rows>,
    /// Number of the row in it.
    pub row: u64,
}

impl Generated {
    /// Where the row comes from.
    pub fn pieces(&self) -> Vec<Piece> {
        let mut pieces = self.rows.pieces(crate::data::rows::Split::Train, self.row);
        pieces.iter_mut().for_each(|p| p.dataset = self.dataset);
        pieces
    }
}

impl fmt::Debug for Generated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (dataset, row) = (self.dataset, self.row);
        write!(f, "row {row} of dataset {dataset}")
    }
}

/// Lane and number in it at which row `row` comes; the inverse of what [`RowStream`] gives.
pub fn find(row: u64, lanes: u32) -> (u32, u64) {
    let lanes = u64::from(lanes);
    ((row % lanes) as u32, row / lanes)
}

/// The stage.
pub struct RowStream {
    dataset: u32,
    name: Arc<str>,
    rows: Arc<dyn Rows>,
    lane: u32,
    lanes: u32,
    drawn: u64,
}

impl RowStream {
    /// Starts at the first row of lane `lane` of `lanes`.
    pub fn new(dataset: u32, name: Arc<str>, rows: Arc<dyn Rows>, lane: u32, lanes: u32) -> Self {
        Self {
            dataset,
            name,
            rows,
            lane,
            lanes,
            drawn: 0,
        }
    }

    /// Its dataset's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tokens of a row, counted as those of packed rows are: T inputs and the last target.
    pub fn row_tokens(&self) -> u64 {
        self.rows.seq_len() as u64 + 1
    }
}

impl Stage for RowStream {
    type Item = Generated;
    type State = u64;

    fn next(&mut self, _row: u64) -> Result<Generated, DataError> {
        let row = self.drawn * u64::from(self.lanes) + u64::from(self.lane);
        self.drawn += 1;
        Ok(Generated {
            dataset: self.dataset,
            rows: self.rows.clone(),
            row,
        })
    }

    fn state(&self) -> u64 {
        self.drawn
    }

    fn restore(&mut self, state: &u64) -> Result<(), DataError> {
        self.drawn = *state;
        Ok(())
    }
}
