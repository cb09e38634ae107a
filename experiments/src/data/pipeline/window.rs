//! Stage 4: the shuffle window. A lane's rows are taken in blocks of `window` rows, and each block is served in a random order of its own.
//!
//! A document longer than a row makes consecutive rows of one lane; L lanes in turn already part them by L rows, and the window parts them
//! further. The state is that of the packing at the start of the block and the number of rows served: no row is stored.

use super::Stage;
use super::pack::{Pack, PackState, RowPlan};
use crate::data::DataError;
use crate::data::order::Permutation;
use serde::{Deserialize, Serialize};

/// Where the stage stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowState {
    /// Of the packing, at the start of the block of the next row.
    pub pack: PackState,
    /// Rows served.
    pub rows: u64,
}

/// The stage.
pub struct Window {
    pack: Pack,
    window: u64,
    lane: u32,
    lanes: u32,
    seed: u64,
    rows: u64,
    start: PackState,
    block: Vec<Option<RowPlan>>,
}

impl Window {
    /// Blocks of `window >= 1` rows of lane `lane` of `lanes`.
    pub fn new(pack: Pack, window: u64, lane: u32, lanes: u32, seed: u64) -> Self {
        let start = pack.state();
        Self {
            pack,
            window,
            lane,
            lanes,
            seed,
            rows: 0,
            start,
            block: Vec::new(),
        }
    }

    /// Rows served.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// The stage before.
    pub fn pack(&self) -> &Pack {
        &self.pack
    }

    /// The place of the block at which its `i`-th served row was packed.
    fn packed_at(&self, block: u64, i: u64) -> u64 {
        Permutation::new(self.window, &[self.seed, 2, u64::from(self.lane), block]).at(i)
    }
}

impl Stage for Window {
    type Item = RowPlan;
    type State = WindowState;

    /// Global rows are counted by the stage itself; the argument must be the lane's next.
    fn next(&mut self, row: u64) -> Result<RowPlan, DataError> {
        let global = |r: u64| r * u64::from(self.lanes) + u64::from(self.lane);
        debug_assert_eq!(row, global(self.rows));
        if self.window == 1 {
            let plan = self.pack.next(row)?;
            self.rows += 1;
            return Ok(plan);
        }
        let (block, i) = (self.rows / self.window, self.rows % self.window);
        if self.block.is_empty() {
            self.start = self.pack.state();
            let mut rows = Vec::with_capacity(self.window as usize);
            for j in 0..self.window {
                rows.push(Some(self.pack.next(global(block * self.window + j))?));
            }
            self.block = rows;
        }
        let at = self.packed_at(block, i) as usize;
        let gone = || DataError::State(format!("row {i} of a shuffle window was served twice"));
        let plan = self.block[at].take().ok_or_else(gone)?;
        self.rows += 1;
        if i + 1 == self.window {
            self.block.clear();
        }
        Ok(plan)
    }

    fn state(&self) -> WindowState {
        let pack = if self.block.is_empty() {
            self.pack.state()
        } else {
            self.start.clone()
        };
        WindowState {
            pack,
            rows: self.rows,
        }
    }

    fn restore(&mut self, state: &WindowState) -> Result<(), DataError> {
        self.pack.restore(&state.pack)?;
        self.block.clear();
        self.rows = state.rows - state.rows % self.window;
        while self.rows < state.rows {
            self.next(self.rows * u64::from(self.lanes) + u64::from(self.lane))?;
        }
        Ok(())
    }
}
