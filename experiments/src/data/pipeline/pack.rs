//! Stage 3: documents cut and joined into rows of T + 1 tokens. A document that does not fit goes on in the lane's next row.
//!
//! The state is the mixture's and how far the cut document was used; no tokens.

use super::Stage;
use super::docs::Document;
use super::mixture::{Mixture, MixtureState};
use crate::data::{DataError, Piece, RowMut};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A row before its tokens are copied: document parts that together have T + 1 tokens.
#[derive(Clone, Debug)]
pub struct RowPlan {
    /// Document, first token, tokens.
    parts: Vec<(Arc<Document>, u64, u64)>,
}

impl RowPlan {
    /// Where the row comes from.
    pub fn pieces(&self) -> Vec<Piece> {
        let piece = |(d, start, len): &(Arc<Document>, u64, u64)| Piece {
            dataset: d.dataset,
            epoch: d.place.epoch,
            doc: d.place.doc,
            start: *start,
            len: *len,
        };
        self.parts.iter().map(piece).collect()
    }

    /// Copies the tokens. Targets do not cross documents. Fails with the offending part for a token id outside the vocabulary.
    ///
    /// # Errors
    /// The document and the id.
    pub fn write(&self, out: RowMut<'_>, vocab_size: usize) -> Result<(), (u64, u64)> {
        let seq_len = out.tokens.len();
        let mut t = 0;
        for (segment, (document, start, len)) in self.parts.iter().enumerate() {
            let len = *len as usize;
            let inputs = len.min(seq_len - t);
            let tokens = &mut out.tokens[t..t + inputs];
            document.copy(*start, tokens);
            let mut last = 0;
            if inputs < len {
                let mut one = [0];
                document.copy(start + inputs as u64, &mut one);
                last = one[0];
            }
            // One pass that the compiler vectorises; ids are compared unsigned, so negative ones are outside as well.
            let worst = tokens.iter().fold(last as u32, |m, &x| m.max(x as u32));
            if worst as usize >= vocab_size {
                return Err((document.place.doc, u64::from(worst)));
            }
            if inputs > 0 {
                out.targets[t..t + inputs - 1].copy_from_slice(&tokens[1..]);
                if inputs < len {
                    out.targets[t + inputs - 1] = last;
                }
            }
            out.segments[t..t + inputs].fill(segment as i32);
            for (i, p) in out.positions[t..t + inputs].iter_mut().enumerate() {
                *p = i as i32;
            }
            t += inputs;
        }
        Ok(())
    }
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
        let mut left = self.seq_len as u64 + 1;
        let mut parts = Vec::new();
        while left > 0 {
            let (document, start) = match self.open.take() {
                Some(open) => open,
                None => (Arc::new(self.mixture.next(row)?), 0),
            };
            let len = left.min(document.len() - start);
            left -= len;
            if start + len < document.len() {
                self.open = Some((document.clone(), start + len));
            }
            parts.push((document, start, len));
        }
        Ok(RowPlan { parts })
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
