//! Synthetic tasks as closed-form rows: example `i` of a task is a function of (seed, split, i) alone.
//!
//! One file per task. Each shows an example as a picture in its document, has a golden hash in its tests (the sequence is part of
//! every stored result), and an oracle: a perfect solver that sees only the tokens scores 1, a random one scores chance.
//!
//! In the pictures `-` is an ignored target. Rows have one segment. Scores are accuracies per row, then their mean; MAD's published figures
//! are macro averages over classes, which for these balanced answers differ by noise only.

pub mod compression;
pub mod copying;
pub mod gaps;
pub mod induction;
pub mod memorization;
pub mod mqar;
pub mod phonebook;
pub mod recall;
pub mod tracking;

use super::order::Permutation;
use super::rng::{Rng, key};
use super::rows::{Rows, Split};
use super::{DataError, EvalSet, Metric, RowMut};
use marimba_dsl::data::Data;

/// What a task's file provides: how one example is drawn.
pub trait Draw: Send + Sync {
    /// V.
    fn vocab_size(&self) -> usize;

    /// Draws one example into a blank row whose length is T. `is_eval` where training and evaluation rows differ.
    fn draw(&self, rng: &mut Rng, split: Split, out: &mut RowMut<'_>);

    /// The evaluation sets, given T and rows of the ordinary one.
    fn eval_sets(&self, name: &str, seq_len: usize, n_eval: u64) -> Vec<EvalSet> {
        vec![EvalSet {
            name: format!("{name}/T{seq_len}"),
            rows: n_eval,
            seq_len,
            metric: Metric::Accuracy,
        }]
    }
}

/// A task with its seed and number of examples: the rows that a run reads.
pub struct Task {
    draw: Box<dyn Draw>,
    name: &'static str,
    seq_len: usize,
    n_train: Option<u64>,
    n_eval: u64,
    seed: u64,
    fingerprint: String,
}

impl Task {
    /// A task around any [`Draw`]. `parameters` is everything that decides its examples, for the fingerprint.
    ///
    /// # Errors
    /// [`DataError::Parameter`] for `n_train` of 0 or `seq_len` of 0.
    pub fn new(
        draw: Box<dyn Draw>,
        name: &'static str,
        seq_len: usize,
        n_train: Option<u64>,
        n_eval: u64,
        seed: u64,
        parameters: &str,
    ) -> Result<Self, DataError> {
        if n_train == Some(0) {
            return Err(DataError::Parameter(format!(
                "{name} has n_train 0; expected at least one training example, or none given"
            )));
        }
        if seq_len == 0 {
            return Err(DataError::Parameter(format!(
                "{name} has seq_len 0; expected at least 1"
            )));
        }
        let fingerprint = fingerprint(&(name, seq_len, n_train, n_eval, seed, parameters));
        Ok(Self {
            draw,
            name,
            seq_len,
            n_train,
            n_eval,
            seed,
            fingerprint,
        })
    }

    /// The task that a checked run names; `seq_len` and `seed` stand in where the data leaves them open.
    ///
    /// # Errors
    /// [`DataError::Parameter`] for parameters out of range, and for data that is not a synthetic task.
    pub fn from_data(data: &Data, seq_len: usize, seed: u64) -> Result<Self, DataError> {
        macro_rules! task {
            ($d:expr, $name:literal, $make:expr) => {{
                let (d, t) = ($d, $d.seq_len.unwrap_or(seq_len));
                let make: fn(_, usize) -> Result<_, DataError> = $make;
                let draw = Box::new(make(d, t)?);
                Self::new(
                    draw,
                    $name,
                    t,
                    d.n_train,
                    d.n_eval,
                    d.seed.unwrap_or(seed),
                    &format!("{d:?}"),
                )
            }};
        }
        match data {
            Data::Mqar(d) => {
                let draw = mqar::Mqar::new(mqar::MqarSpec::from_data(d, seq_len))?;
                let (t, seed) = (draw.spec().seq_len, d.seed.unwrap_or(seed));
                let parameters = format!("{:?}", draw.spec());
                Self::new(
                    Box::new(draw),
                    "mqar",
                    t,
                    d.n_train,
                    d.n_eval,
                    seed,
                    &parameters,
                )
            }
            Data::InContextRecall(d) => task!(d, "in-context-recall", recall::Recall::in_context),
            Data::NoisyRecall(d) => task!(d, "noisy-recall", recall::Recall::noisy),
            Data::FuzzyRecall(d) => task!(d, "fuzzy-recall", recall::Fuzzy::new),
            Data::RecallGaps(d) => task!(d, "recall-gaps", gaps::Gaps::from_data),
            Data::Memorization(d) => task!(d, "memorization", memorization::Memorization::new),
            Data::Compression(d) => task!(d, "compression", compression::Compression::new),
            Data::SelectiveCopying(d) => task!(d, "selective-copying", copying::Selective::new),
            Data::Copying(d) => task!(d, "copying", copying::Copying::new),
            Data::Induction(d) => task!(d, "induction", induction::Induction::new),
            Data::Parity(d) => task!(d, "parity", tracking::Parity::new),
            Data::StateTracking(d) => task!(d, "state-tracking", tracking::Permutations::new),
            Data::Phonebook(d) => task!(d, "phonebook", phonebook::Phonebook::new),
            Data::Text(_) | Data::Tokens(_) | Data::Mixture(_) => Err(DataError::Parameter(
                format!("{} is not a synthetic task", data.kind()),
            )),
        }
    }
}

impl Rows for Task {
    fn vocab_size(&self) -> usize {
        self.draw.vocab_size()
    }

    fn seq_len(&self) -> usize {
        self.seq_len
    }

    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }

    fn fill(&self, split: Split, row: u64, mut out: RowMut<'_>) -> Result<(), DataError> {
        let set = match split {
            Split::Train => 0,
            Split::Eval(set) => set as u64 + 1,
        };
        let (_, index) = self.example(split, row);
        let mut rng = Rng::new(&[
            key(&self.name.bytes().map(u64::from).collect::<Vec<_>>()),
            self.seed,
            set,
            index,
        ]);
        self.draw.draw(&mut rng, split, &mut out);
        Ok(())
    }

    fn pieces(&self, split: Split, row: u64) -> Vec<super::Piece> {
        let (epoch, doc) = self.example(split, row);
        vec![super::Piece {
            dataset: 0,
            epoch,
            doc,
            start: 0,
            len: self.seq_len as u64,
        }]
    }

    fn row_of(&self, doc: u64, epoch: u64) -> Option<u64> {
        match self.n_train {
            Some(n) if doc < n => {
                Some(epoch * n + Permutation::new(n, &[self.seed, 4, epoch]).position(doc))
            }
            Some(_) => None,
            None => (epoch == 0).then_some(doc),
        }
    }

    fn eval_sets(&self) -> Vec<EvalSet> {
        if self.n_eval == 0 {
            Vec::new()
        } else {
            self.draw.eval_sets(self.name, self.seq_len, self.n_eval)
        }
    }

    fn name(&self) -> String {
        self.name.into()
    }
}

impl Task {
    /// Epoch and number of the example in row `row`: a limited training set comes again in a new order.
    fn example(&self, split: Split, row: u64) -> (u64, u64) {
        match (split, self.n_train) {
            (Split::Train, Some(n)) => (
                row / n,
                Permutation::new(n, &[self.seed, 4, row / n]).at(row % n),
            ),
            _ => (0, row),
        }
    }
}

/// Digest of a task's parameters, from their debug form.
pub(crate) fn fingerprint(spec: &impl std::fmt::Debug) -> String {
    use sha2::{Digest, Sha256};
    super::hex(&Sha256::digest(format!("{spec:?}"))[..16])
}

/// Shorthand for the error of a parameter out of range.
pub(crate) fn refuse<T>(text: String) -> Result<T, DataError> {
    Err(DataError::Parameter(text))
}

#[cfg(test)]
pub(crate) mod testing {
    //! What every task's tests do.

    use super::Task;
    use crate::data::rows::{RowLoader, Rows, Split};
    use crate::data::{Batch, IGNORED, Loader, Worker};
    use marimba_dsl::data::Data;
    use sha2::{Digest, Sha256};

    /// The task of `data` with T = `seq_len`, seed 5.
    pub(crate) fn task(data: Data, seq_len: usize) -> Task {
        Task::from_data(&data, seq_len, 5).expect("valid parameters")
    }

    /// The message that refuses `data`.
    pub(crate) fn refused(data: Data, seq_len: usize) -> String {
        Task::from_data(&data, seq_len, 5)
            .map(|_| ())
            .expect_err("refused")
            .to_string()
    }

    /// First 16 digits of the SHA-256 over tokens, targets and segments of the first 64 training rows and 8 rows of each evaluation set.
    pub(crate) fn golden(rows: impl Rows) -> String {
        let mut loader = RowLoader::new(rows, Worker::ALL);
        let mut hash = Sha256::new();
        let mut feed = |b: &Batch| {
            for x in b.tokens.iter().chain(&b.targets).chain(&b.segments) {
                hash.update(x.to_le_bytes());
            }
        };
        feed(&loader.next(64).expect("generates"));
        for set in 0..loader.eval_sets().len() {
            feed(&loader.eval_batch(set, 0, 8).expect("generates"));
        }
        crate::data::hex(&hash.finalize()[..8])
    }

    /// Mean accuracy over 200 rows of a solver that gets one row's tokens and a position and answers a token.
    pub(crate) fn score_on(
        rows: &impl Rows,
        split: Split,
        mut solver: impl FnMut(&[i32], usize) -> i32,
    ) -> f64 {
        let seq_len = match split {
            Split::Train => rows.seq_len(),
            Split::Eval(set) => rows.eval_sets()[set].seq_len,
        };
        let n = 200;
        let mut batch = Batch::blank(n, seq_len);
        for i in 0..n {
            rows.fill(split, i as u64, batch.row_mut(i))
                .expect("generates");
        }
        assert!(
            batch
                .tokens
                .iter()
                .all(|&t| t >= 0 && (t as usize) < rows.vocab_size())
        );
        assert!(
            batch
                .targets
                .iter()
                .all(|&t| t == IGNORED || (t >= 0 && (t as usize) < rows.vocab_size()))
        );
        let answers: Vec<i32> = (0..n * seq_len)
            .map(|i| {
                if batch.targets[i] == IGNORED {
                    0
                } else {
                    solver(
                        &batch.tokens[i / seq_len * seq_len..][..seq_len],
                        i % seq_len,
                    )
                }
            })
            .collect();
        let scores: Vec<f64> = batch
            .row_accuracies(&answers)
            .into_iter()
            .map(|s| s.expect("every row asks"))
            .collect();
        scores.iter().sum::<f64>() / scores.len() as f64
    }

    /// [`score_on`] the first evaluation set.
    pub(crate) fn score(rows: &impl Rows, solver: impl FnMut(&[i32], usize) -> i32) -> f64 {
        score_on(rows, Split::Eval(0), solver)
    }

    /// Score of uniform guesses in `low..high`.
    pub(crate) fn guess(rows: &impl Rows, low: u64, high: u64) -> f64 {
        let mut rng = crate::data::rng::Rng::new(&[3]);
        score(rows, |_, _| (low + rng.below(high - low)) as i32)
    }

    #[test]
    fn a_limited_training_set_comes_again_in_a_new_order() {
        let t = task(
            Data::Parity(marimba_dsl::data::Parity {
                n_train: Some(10),
                ..Default::default()
            }),
            30,
        );
        let mut loader = RowLoader::new(t, Worker::ALL);
        let epoch = |loader: &mut RowLoader<Task>| -> Vec<Vec<i32>> {
            loader
                .next(10)
                .expect("generates")
                .tokens
                .chunks(30)
                .map(<[i32]>::to_vec)
                .collect()
        };
        let (a, b) = (epoch(&mut loader), epoch(&mut loader));
        let sorted = |mut v: Vec<Vec<i32>>| {
            v.sort();
            v
        };
        assert_ne!(a, b);
        assert_eq!(sorted(a), sorted(b));
    }
}
