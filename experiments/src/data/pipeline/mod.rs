//! The document pipeline: several datasets of documents become one endless sequence of packed rows.
//!
//! ```text
//! per lane l:  DocStream (shard, order, documents, tokens) or RowStream (computed rows) x datasets -> Mixture -> Pack -> Window
//! batches:     global row g = row g / L of lane g % L; worker w of W serves the rows with g % W == w
//! ```
//!
//! A lane ("logical shard") is a sequence of rows of its own; L is fixed for a run, so nothing about the sequence depends on
//! the number of workers. Where W divides L a worker holds L / W lanes and no other worker touches them. Otherwise
//! lanes are shared: each worker walks past the rows of the others, which costs only document lengths where tokens are stored, and
//! repeated tokenisation where they are not (`data plan` says how often).
//!
//! Every stage is a [`Stage`]: items one after the other, and a small state. A new stage is one file that wraps the one before.

pub mod docs;
pub mod generated;
pub mod loader;
pub mod mixture;
pub mod pack;
pub mod prefetch;
pub mod window;

#[cfg(test)]
mod tests;

pub use marimba_dsl::data::OnBad;

pub use loader::{Dataset, Pipeline, PipelineSpec, Source};
pub use mixture::Phase;

use super::DataError;
use serde::{Deserialize, Serialize};

/// One stage of a lane.
pub trait Stage {
    /// What it makes.
    type Item;
    /// Where it stands: small, serialisable.
    type State: Clone + Serialize + for<'a> Deserialize<'a>;

    /// The next item, made for global row `row` (which decides the phase of the mixture).
    ///
    /// # Errors
    /// Whatever reading can fail with. After an error the stage stands where it stood before, or one item further.
    fn next(&mut self, row: u64) -> Result<Self::Item, DataError>;

    /// Where the stage stands.
    fn state(&self) -> Self::State;

    /// Continues at `state`.
    ///
    /// # Errors
    /// [`DataError::State`] when the state does not fit this stage.
    fn restore(&mut self, state: &Self::State) -> Result<(), DataError>;
}
