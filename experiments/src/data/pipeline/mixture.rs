//! Stage 2: documents and computed rows of several datasets in given shares of tokens.
//!
//! At each document boundary the dataset furthest behind its share is next: the largest `w_i T - t_i`, where T tokens were drawn in
//! this phase and t_i of them from dataset i; ties go to the first. Deterministic, and without a random walk:
//!
//! **Bound.** With documents of at most m tokens, in every lane and phase and at every document boundary no dataset is more than m tokens
//! ahead of its share, and none more than (D - 1) m behind, D the number of datasets. (The chosen one was not ahead, since the
//! differences sum to 0, and gains at most m; the others only fall behind, by no more than the rest is ahead together.)
//!
//! A dataset of computed rows (a synthetic task) can only be next where a row begins, and a row that is packed is finished with documents:
//! with such datasets m is the longest document plus a row. Tokens of a cut document that are still to come do not count there, so that
//! tasks stand between the rows of a long document and not after it.
//!
//! A phase sets weights from a global row on; counting starts anew with it. A dataset whose shard has nothing usable in this lane is left out.

use super::Stage;
use super::docs::{DocStream, Document};
use super::generated::{Generated, RowStream};
use crate::data::DataError;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Weights from a global row on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// First global row (step x rows per step).
    pub start_row: u64,
    /// One per dataset, relative; 0 leaves the dataset out.
    pub weights: Vec<f64>,
}

/// Checks a schedule and normalises its weights to sum 1.
///
/// # Errors
/// [`DataError::Parameter`]: no phase, a first phase not at row 0, rows not increasing, a wrong number of weights, a negative or non-finite
/// one, or none above 0.
pub fn check_phases(phases: &[Phase], names: &[&str]) -> Result<Vec<Phase>, DataError> {
    let bad = |text: String| Err(DataError::Parameter(text));
    let Some(first) = phases.first() else {
        return bad("the mixture has no phase; expected weights from row 0 on".into());
    };
    if first.start_row != 0 {
        return bad(format!(
            "the first phase of the mixture starts at row {}; expected 0",
            first.start_row
        ));
    }
    let mut before = None;
    let mut checked = Vec::new();
    for (i, phase) in phases.iter().enumerate() {
        if before.is_some_and(|b| phase.start_row <= b) {
            return bad(format!(
                "phase {i} of the mixture starts at row {}, not after the one before it",
                phase.start_row
            ));
        }
        before = Some(phase.start_row);
        if phase.weights.len() != names.len() {
            return bad(format!(
                "phase {i} of the mixture has {} weights for {} datasets",
                phase.weights.len(),
                names.len()
            ));
        }
        for (weight, name) in phase.weights.iter().zip(names) {
            if !weight.is_finite() || *weight < 0.0 {
                return bad(format!(
                    "weight of dataset {name} is {weight} in phase {i}; expected a number from 0 up"
                ));
            }
        }
        let sum: f64 = phase.weights.iter().sum();
        if !(sum > 0.0 && sum.is_finite()) {
            return bad(format!(
                "weights of phase {i} sum to {sum}; expected at least one above 0"
            ));
        }
        checked.push(Phase {
            start_row: phase.start_row,
            weights: phase.weights.iter().map(|w| w / sum).collect(),
        });
    }
    Ok(checked)
}

/// Where the stage stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MixtureState {
    /// Per dataset: documents (or rows) drawn, tokens drawn, tokens drawn before the current phase. `u64::MAX` documents: the
    /// dataset's shard was searched and has nothing usable.
    pub drawn: Vec<[u64; 3]>,
    /// Phase of the last document.
    pub phase: u32,
}

/// Stands for a number of documents in [`MixtureState::drawn`]. Who resumes must know what was found out: shares are those of the rest.
const NONE_USABLE: u64 = u64::MAX;

/// One dataset of the mixture, as a lane sees it.
pub enum Stream {
    /// Documents, to be packed.
    Documents(Box<DocStream>),
    /// Whole rows.
    Rows(RowStream),
}

impl Stream {
    fn name(&self) -> &str {
        match self {
            Stream::Documents(s) => s.name(),
            Stream::Rows(s) => s.name(),
        }
    }

    fn drawn(&self) -> u64 {
        match self {
            Stream::Documents(s) => s.state(),
            Stream::Rows(s) => s.state(),
        }
    }

    fn restore(&mut self, drawn: u64) -> Result<(), DataError> {
        match self {
            Stream::Documents(s) => s.restore(&drawn),
            Stream::Rows(s) => s.restore(&drawn),
        }
    }
}

/// The stage.
pub struct Mixture {
    streams: Vec<Stream>,
    phases: Arc<[Phase]>,
    /// Tokens drawn, tokens drawn before the phase.
    tokens: Vec<[u64; 2]>,
    phase: usize,
    /// Streams that gave `None`.
    dead: Vec<bool>,
}

impl Mixture {
    /// Over one stream per dataset, with phases that [`check_phases`] returned.
    pub fn new(streams: Vec<Stream>, phases: Arc<[Phase]>) -> Self {
        let n = streams.len();
        Self {
            streams,
            phases,
            tokens: vec![[0; 2]; n],
            phase: 0,
            dead: vec![false; n],
        }
    }

    /// The document of dataset `dataset` drawn last.
    ///
    /// # Errors
    /// [`DataError::State`] when there is none.
    pub fn last(&mut self, dataset: u32) -> Result<Document, DataError> {
        match self.streams.get_mut(dataset as usize) {
            Some(Stream::Documents(stream)) => stream.last(),
            _ => Err(DataError::State(format!(
                "the state names a document of dataset {dataset}, which does not exist or has none"
            ))),
        }
    }

    /// Documents drawn from dataset `i`, left out ones included, or rows.
    pub fn drawn(&self, i: usize) -> u64 {
        self.streams[i].drawn()
    }

    /// Whether dataset `i` gives no more documents from global row `row` on: its weight is 0 for good, or its shard has nothing usable.
    pub fn never_again(&self, i: usize, row: u64) -> bool {
        let now = self
            .phases
            .partition_point(|p| p.start_row <= row)
            .saturating_sub(1);
        self.dead[i] || self.phases[now..].iter().all(|p| p.weights[i] == 0.0)
    }

    /// Tokens drawn from each dataset.
    pub fn tokens(&self) -> impl Iterator<Item = u64> {
        self.tokens.iter().map(|t| t[0])
    }

    /// The row that is next, if the dataset furthest behind has whole rows. To be asked where a row begins. `open` is the document that the
    /// row before cut, its dataset and its tokens still to come: they do not count yet, or a long document would be followed by as long a
    /// stretch of other rows.
    ///
    /// # Errors
    /// What the stage before fails with.
    pub fn whole_row(
        &mut self,
        row: u64,
        open: Option<(u32, u64)>,
    ) -> Result<Option<Generated>, DataError> {
        self.enter(row);
        let Some(i) = self.furthest_behind(open, |_| true) else {
            return Ok(None);
        };
        match &mut self.streams[i] {
            Stream::Documents(_) => Ok(None),
            Stream::Rows(stream) => {
                self.tokens[i][0] += stream.row_tokens();
                stream.next(row).map(Some)
            }
        }
    }

    /// Says that no dataset has anything usable.
    pub fn nothing_usable(&self) -> DataError {
        let names: Vec<&str> = self.streams.iter().map(Stream::name).collect();
        DataError::NoDocuments {
            dataset: names.join(", "),
            why: "all documents of a logical shard are empty, shorter than min_length, or unreadable; check the data, or use fewer lanes".into(),
        }
    }

    /// Begins the phase of global row `row`, if it is another one.
    fn enter(&mut self, row: u64) {
        let phase = self
            .phases
            .partition_point(|p| p.start_row <= row)
            .saturating_sub(1);
        if phase != self.phase {
            self.phase = phase;
            self.tokens.iter_mut().for_each(|t| t[1] = t[0]);
        }
    }

    fn furthest_behind(
        &self,
        open: Option<(u32, u64)>,
        among: impl Fn(&Stream) -> bool,
    ) -> Option<usize> {
        let weights = &self.phases[self.phase].weights;
        let usable = || (0..weights.len()).filter(|&i| weights[i] > 0.0 && !self.dead[i]);
        // Where a phase begins amid a document, what is left of it was drawn before.
        let drawn = |i: usize| {
            let left = open.map_or(
                0,
                |(dataset, left)| {
                    if dataset as usize == i { left } else { 0 }
                },
            );
            (self.tokens[i][0] - self.tokens[i][1]) as f64 - left as f64
        };
        let (total, weight) = usable().fold((0.0, 0.0), |(t, w), i| (t + drawn(i), w + weights[i]));
        let behind = |i: usize| weights[i] / weight * total - drawn(i);
        usable()
            .filter(|&i| among(&self.streams[i]))
            .reduce(|best, i| if behind(i) > behind(best) { i } else { best })
    }
}

impl Stage for Mixture {
    /// `None`: no dataset with a weight has a usable document.
    type Item = Option<Document>;
    type State = MixtureState;

    fn next(&mut self, row: u64) -> Result<Option<Document>, DataError> {
        self.enter(row);
        while let Some(i) = self.furthest_behind(None, |s| matches!(s, Stream::Documents(_))) {
            let Stream::Documents(stream) = &mut self.streams[i] else {
                break;
            };
            match stream.next(row)? {
                Some(document) => {
                    self.tokens[i][0] += document.len();
                    return Ok(Some(document));
                }
                None => self.dead[i] = true,
            }
        }
        Ok(None)
    }

    fn state(&self) -> MixtureState {
        let drawn = self
            .streams
            .iter()
            .zip(&self.tokens)
            .zip(&self.dead)
            .map(|((s, t), &dead)| [if dead { NONE_USABLE } else { s.drawn() }, t[0], t[1]])
            .collect();
        MixtureState {
            drawn,
            phase: self.phase as u32,
        }
    }

    fn restore(&mut self, state: &MixtureState) -> Result<(), DataError> {
        if state.drawn.len() != self.streams.len() {
            let (have, want) = (state.drawn.len(), self.streams.len());
            return Err(DataError::State(format!(
                "the state has {have} datasets; the mixture has {want}"
            )));
        }
        for (i, &[drawn, tokens, before]) in state.drawn.iter().enumerate() {
            self.dead[i] = drawn == NONE_USABLE;
            // What has nothing usable never drew anything.
            self.streams[i].restore(if self.dead[i] { 0 } else { drawn })?;
            self.tokens[i] = [tokens, before];
        }
        self.phase = (state.phase as usize).min(self.phases.len() - 1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::OnBad;
    use super::super::docs::{Framing, Shards};
    use super::*;
    use crate::data::order::OrderMode;
    use crate::data::source::InMemory;
    use proptest::prelude::*;

    /// A mixture of datasets whose documents have the given lengths.
    fn mixture(lengths: &[Vec<usize>], phases: Vec<Phase>) -> Mixture {
        let names: Vec<String> = (0..lengths.len()).map(|i| format!("d{i}")).collect();
        let phases = check_phases(
            &phases,
            &names.iter().map(String::as_str).collect::<Vec<_>>(),
        )
        .expect("valid");
        let stream = |(i, l): (usize, &Vec<usize>)| {
            let docs = InMemory::new(l.iter().map(|&n| Ok(vec![1; n])));
            let shards = Shards::new(i as u32, l.len() as u64, 1, OrderMode::Default, 7);
            let framing = Arc::new(Framing {
                vocab_size: 2,
                ..Framing::default()
            });
            Stream::Documents(Box::new(DocStream::new(
                names[i].as_str().into(),
                Arc::new(docs),
                shards,
                0,
                framing,
                OnBad::Stop,
                Arc::default(),
            )))
        };
        Mixture::new(
            lengths.iter().enumerate().map(stream).collect(),
            phases.into(),
        )
    }

    proptest! {
        #[test]
        fn drift_stays_within_its_bound(
            lengths in prop::collection::vec(prop::collection::vec(1usize..500, 1..20), 2..8),
            weights in prop::collection::vec(prop::collection::vec(0.0f64..1.0, 8), 1..4),
        ) {
            let n = lengths.len();
            let phases: Vec<Phase> = weights
                .iter()
                .enumerate()
                .map(|(i, w)| Phase { start_row: 300 * i as u64, weights: w[..n].iter().map(|x| x + 1e-3).collect() })
                .collect();
            let mut mix = mixture(&lengths, phases.clone());
            let longest = *lengths.iter().flatten().max().expect("some") as f64;
            let mut at_phase = vec![0; n];
            for row in 0..300 * phases.len() as u64 {
                if row % 300 == 0 {
                    at_phase = mix.tokens().collect();
                }
                mix.next(row).expect("reads");
                let w = &phases[(row / 300) as usize].weights;
                let drawn: Vec<f64> = mix.tokens().zip(&at_phase).map(|(t, b)| (t - b) as f64).collect();
                let (total, sum) = (drawn.iter().sum::<f64>(), w.iter().sum::<f64>());
                for i in 0..n {
                    let ahead = drawn[i] - w[i] / sum * total;
                    prop_assert!(ahead <= longest + 1e-6, "dataset {} ahead by {}", i, ahead);
                    prop_assert!(ahead >= -((n - 1) as f64) * longest - 1e-6, "dataset {} behind by {}", i, -ahead);
                }
            }
        }
    }

    #[test]
    fn bamba_s_mixture_comes_out() {
        let weights = [
            1456, 1835, 1558, 1851, 450, 1500, 300, 236, 114, 200, 100, 62, 27, 11, 51, 49, 100,
            55, 45,
        ]
        .map(f64::from);
        let lengths: Vec<Vec<usize>> = (0..19)
            .map(|d| (0..50).map(|i| 20 + (d * 31 + i * 17) % 400).collect())
            .collect();
        let anneal: Vec<f64> = (0..19)
            .map(|d| [0.6, 0.4].get(d).copied().unwrap_or(0.0))
            .collect();
        let phases = vec![
            Phase {
                start_row: 0,
                weights: weights.to_vec(),
            },
            Phase {
                start_row: 20_000,
                weights: anneal,
            },
        ];
        let mut mix = mixture(&lengths, phases);
        (0..20_000).for_each(|row| drop(mix.next(row).expect("reads")));
        let tokens: Vec<f64> = mix.tokens().map(|t| t as f64).collect();
        let (total, sum) = (tokens.iter().sum::<f64>(), weights.iter().sum::<f64>());
        for (t, w) in tokens.iter().zip(weights) {
            assert!(
                (t / total - w / sum).abs() < 2e-4,
                "{} of {}",
                t / total,
                w / sum
            );
        }
        (20_000..30_000).for_each(|row| drop(mix.next(row).expect("reads")));
        let annealed: Vec<f64> = mix
            .tokens()
            .zip(&tokens)
            .map(|(t, b)| t as f64 - b)
            .collect();
        assert!((annealed[0] / annealed.iter().sum::<f64>() - 0.6).abs() < 1e-3);
        assert_eq!(annealed[2..].iter().sum::<f64>(), 0.0);
    }
}
