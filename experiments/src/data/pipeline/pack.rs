//! Stage 3: documents cut and joined into rows of T + 1 tokens. A document that does not fit goes on in the lane's next row.
//!
//! The state is the mixture's and how far the cut document was used; no tokens.

use super::Stage;
use super::docs::Document;
use super::generated::Generated;
use super::mixture::{Mixture, MixtureState};
use crate::data::rows::Split;
use crate::data::{Batch, DataError, IGNORED, Piece, RowMut};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A row before its tokens are written.
#[derive(Clone, Debug)]
pub enum RowPlan {
    /// Document parts (document, first token, tokens) that together have T + 1 tokens.
    Packed(Vec<(Arc<Document>, u64, u64)>),
    /// A computed row.
    Generated(Generated),
}

/// Why a row could not be written.
#[derive(Debug)]
pub enum RowFault {
    /// Document and id of a token outside the vocabulary.
    Outside {
        /// The document's number in its dataset.
        doc: u64,
        /// The id.
        token: u64,
    },
    /// The row could not be computed.
    Failed(DataError),
}

impl RowPlan {
    /// Where the row comes from.
    pub fn pieces(&self) -> Vec<Piece> {
        let parts = match self {
            RowPlan::Packed(parts) => parts,
            RowPlan::Generated(row) => return row.pieces(),
        };
        let piece = |(d, start, len): &(Arc<Document>, u64, u64)| Piece {
            dataset: d.dataset,
            epoch: d.place.epoch,
            doc: d.place.doc,
            start: *start,
            len: *len,
        };
        parts.iter().map(piece).collect()
    }

    /// Appends the row to `out`. Targets do not cross documents. Each array is written once, front to back: no blank row is laid out first.
    ///
    /// # Errors
    /// [`RowFault`]; `out` then holds a part of the row.
    pub fn append(&self, out: &mut Batch, vocab_size: usize) -> Result<(), RowFault> {
        let mut t = 0;
        let parts = match self {
            RowPlan::Packed(parts) => parts,
            RowPlan::Generated(row) => return append_generated(row, out).map_err(RowFault::Failed),
        };
        for (segment, (document, start, len)) in parts.iter().enumerate() {
            let len = *len as usize;
            let inputs = len.min(out.seq_len - t);
            let from = out.tokens.len();
            document.append(*start, inputs, &mut out.tokens);
            let tokens = &out.tokens[from..];
            // The last token of a row is only a target.
            let last = (inputs < len).then(|| document.get(start + inputs as u64));
            let highest = vocab_size as i64 - 1;
            let outside = |x: i32| i64::from(x as u32) > highest;
            if any_outside(tokens, vocab_size) || last.is_some_and(outside) {
                let ids = tokens.iter().copied().chain(last);
                let worst = ids.map(|x| x as u32).max().unwrap_or(0);
                return Err(RowFault::Outside {
                    doc: document.place.doc,
                    token: u64::from(worst),
                });
            }
            if inputs > 0 {
                out.targets.extend_from_slice(&tokens[1..]);
                out.targets.push(last.unwrap_or(IGNORED));
            }
            out.segments.resize(from + inputs, segment as i32);
            out.positions.extend(0..inputs as i32);
            t += inputs;
        }
        Ok(())
    }
}

/// Appends a computed row: laid out blank, then filled.
fn append_generated(made: &Generated, out: &mut Batch) -> Result<(), DataError> {
    let (from, to) = (out.tokens.len(), out.tokens.len() + out.seq_len);
    out.tokens.resize(to, 0);
    out.targets.resize(to, IGNORED);
    out.segments.resize(to, 0);
    out.positions.extend(0..out.seq_len as i32);
    let row = RowMut {
        tokens: &mut out.tokens[from..],
        targets: &mut out.targets[from..],
        segments: &mut out.segments[from..],
        positions: &mut out.positions[from..],
    };
    made.rows.fill(Split::Train, made.row, row)
}

/// Whether an id is negative or not below `vocab_size`. The sign bit of `x | (highest - x)` says so of one; ORed together they need no
/// comparison, which baseline x86-64 lacks for most vector types.
fn any_outside(tokens: &[i32], vocab_size: usize) -> bool {
    // A vocabulary beyond 2^31 holds every id that is not negative.
    let highest = i32::try_from(vocab_size).map_or(i32::MAX, |v| v.wrapping_sub(1));
    let signs = |acc: i32, &x: &i32| acc | x | highest.wrapping_sub(x);
    tokens.iter().fold(0, signs) < 0
}

/// Where the stage stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackState {
    /// Of the mixture.
    pub mixture: MixtureState,
    /// The cut document: its dataset (of which it was drawn last), and tokens of it already used.
    pub open: Option<(u32, u64)>,
}

/// The stage.
pub struct Pack {
    mixture: Mixture,
    seq_len: usize,
    open: Option<(Arc<Document>, u64)>,
}

impl Pack {
    /// Rows for T inputs.
    pub fn new(mixture: Mixture, seq_len: usize) -> Self {
        Self {
            mixture,
            seq_len,
            open: None,
        }
    }

    /// Whether the `k`-th document of dataset `i` was the last one drawn from it and is used up.
    pub fn is_between(&self, i: usize, k: u64) -> bool {
        let open = self
            .open
            .as_ref()
            .is_some_and(|(d, _)| d.dataset as usize == i);
        self.mixture.drawn(i) == k && !open
    }

    /// The stage before.
    pub fn mixture(&self) -> &Mixture {
        &self.mixture
    }
}

impl Stage for Pack {
    type Item = RowPlan;
    type State = PackState;

    fn next(&mut self, row: u64) -> Result<RowPlan, DataError> {
        let open = self.open.clone();
        let cut = open.as_ref().map(|(d, used)| (d.dataset, d.len() - used));
        if let Some(made) = self.mixture.whole_row(row, cut)? {
            return Ok(RowPlan::Generated(made));
        }
        let mut left = self.seq_len as u64 + 1;
        let mut parts = Vec::new();
        while left > 0 {
            let (document, start) = match self.open.take() {
                Some(open) => open,
                None => match self.mixture.next(row)? {
                    Some(document) => (Arc::new(document), 0),
                    // Only now is it known that no document is to be had, so the row is one of those that are computed. What the
                    // row would have begun with stays for later.
                    None => {
                        self.open = open;
                        let made = self.mixture.whole_row(row, cut)?;
                        return made
                            .map(RowPlan::Generated)
                            .ok_or_else(|| self.mixture.nothing_usable());
                    }
                },
            };
            let len = left.min(document.len() - start);
            left -= len;
            if start + len < document.len() {
                self.open = Some((document.clone(), start + len));
            }
            parts.push((document, start, len));
        }
        Ok(RowPlan::Packed(parts))
    }

    fn state(&self) -> PackState {
        PackState {
            mixture: self.mixture.state(),
            open: self.open.as_ref().map(|(d, used)| (d.dataset, *used)),
        }
    }

    fn restore(&mut self, state: &PackState) -> Result<(), DataError> {
        self.mixture.restore(&state.mixture)?;
        self.open = match state.open {
            None => None,
            Some((dataset, used)) => {
                let document = self.mixture.last(dataset)?;
                if used >= document.len() {
                    let len = document.len();
                    return Err(DataError::State(format!(
                        "the state used {used} tokens of a document of {len}; the data changed"
                    )));
                }
                Some((Arc::new(document), used))
            }
        };
        Ok(())
    }
}
