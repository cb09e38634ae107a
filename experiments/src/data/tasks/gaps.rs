//! Associative recall with gaps: K pairs, a stretch of noise of known length, then all K keys in another order.
//!
//! With K = 2 and gap 3 (noise is its own alphabet, so that distance is the only difficulty):
//!
//! ```text
//! tokens   z x A 1 B 2 y z x B A        noise in front fills the row
//! targets  - - - - - - - - - 2 1
//! ```
//!
//! Keys are [1, V/3), values [V/3, 2V/3), noise [2V/3, V). Training rows draw their gap from the list; every gap is an evaluation set of
//! its own, so the score can be drawn over the distance.

use super::{Draw, refuse};
use crate::data::rng::Rng;
use crate::data::rows::Split;
use crate::data::{DataError, EvalSet, Metric, RowMut};
use marimba_dsl::data as spec;

/// The task and its parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Gaps {
    vocab_size: u64,
    n_pairs: usize,
    gaps: Vec<usize>,
}

impl Gaps {
    /// The task of a checked run.
    ///
    /// # Errors
    /// As [`Gaps::new`].
    pub fn from_data(d: &spec::RecallGaps, seq_len: usize) -> Result<Self, DataError> {
        Self::new(d.vocab_size, d.n_pairs, d.gaps.clone(), seq_len)
    }

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`DataError::Parameter`].
    pub fn new(
        vocab_size: usize,
        n_pairs: usize,
        gaps: Vec<usize>,
        seq_len: usize,
    ) -> Result<Self, DataError> {
        if n_pairs == 0 || vocab_size / 3 < n_pairs + 1 {
            return refuse(format!(
                "recall with gaps has {n_pairs} pairs and vocab_size {vocab_size}; expected 1 or more, and vocab_size of {} or more",
                3 * (n_pairs + 1)
            ));
        }
        let Some(&longest) = gaps.iter().max() else {
            return refuse("recall with gaps has no gap; expected at least one length".into());
        };
        if 3 * n_pairs + longest > seq_len {
            return refuse(format!(
                "recall with gaps has a gap of {longest} after {n_pairs} pairs in seq_len {seq_len}; expected seq_len {} or more",
                3 * n_pairs + longest
            ));
        }
        Ok(Self {
            vocab_size: vocab_size as u64,
            n_pairs,
            gaps,
        })
    }
}

impl Draw for Gaps {
    fn vocab_size(&self) -> usize {
        self.vocab_size as usize
    }

    fn draw(&self, rng: &mut Rng, split: Split, out: &mut RowMut<'_>) {
        let (third, two_thirds) = (self.vocab_size / 3, self.vocab_size * 2 / 3);
        let gap = match split {
            Split::Train => self.gaps[rng.index(self.gaps.len())],
            Split::Eval(set) => self.gaps[set.min(self.gaps.len() - 1)],
        };
        for token in out.tokens.iter_mut() {
            *token = (two_thirds + rng.below(self.vocab_size - two_thirds)) as i32;
        }
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        rng.distinct(self.n_pairs, 1, third, &mut keys);
        rng.distinct(self.n_pairs, third, two_thirds, &mut values);
        let first = out.tokens.len() - 3 * self.n_pairs - gap;
        for (i, (&key, &value)) in keys.iter().zip(&values).enumerate() {
            out.tokens[first + 2 * i] = key as i32;
            out.tokens[first + 2 * i + 1] = value as i32;
        }
        let mut asked: Vec<usize> = (0..self.n_pairs).collect();
        rng.shuffle(&mut asked);
        let questions = out.tokens.len() - self.n_pairs;
        for (i, pair) in asked.into_iter().enumerate() {
            out.tokens[questions + i] = keys[pair] as i32;
            out.targets[questions + i] = values[pair] as i32;
        }
    }

    fn eval_sets(&self, name: &str, seq_len: usize, n_eval: u64) -> Vec<EvalSet> {
        let set = |gap: &usize| EvalSet {
            name: format!("{name}/G{gap}"),
            rows: n_eval,
            seq_len,
            metric: Metric::Accuracy,
        };
        self.gaps.iter().map(set).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Task;
    use super::super::testing::{golden, guess, score_on};
    use super::*;

    fn task() -> Task {
        let draw = Gaps::new(96, 4, vec![0, 10, 100], 128).expect("valid");
        let parameters = format!("{draw:?}");
        Task::new(Box::new(draw), "recall-gaps", 128, None, 50, 5, &parameters).expect("valid")
    }

    #[test]
    fn a_perfect_retriever_scores_1_at_every_gap() {
        let first = |tokens: &[i32], at: usize| {
            tokens[tokens
                .iter()
                .position(|t| *t == tokens[at])
                .expect("itself")
                + 1]
        };
        for set in 0..3 {
            assert_eq!(score_on(&task(), Split::Eval(set), first), 1.0);
        }
        assert_eq!(score_on(&task(), Split::Train, first), 1.0);
        assert!((guess(&task(), 32, 64) - 1.0 / 32.0).abs() < 0.025);
    }

    #[test]
    fn the_sequence_is_golden() {
        assert_eq!(golden(task()), "148e98b3cdfa6652");
    }

    #[test]
    fn a_run_can_name_it() {
        let data = marimba_dsl::data::Data::RecallGaps(spec::RecallGaps {
            n_pairs: 4,
            gaps: vec![0, 10, 100],
            ..Default::default()
        });
        let sets = |t: &Task| crate::data::rows::Rows::eval_sets(t).len();
        let named = super::super::testing::task(data, 128);
        assert_eq!(sets(&named), 3);
        assert_eq!(golden(named), "148e98b3cdfa6652");
    }

    #[test]
    fn impossible_sizes_are_refused() {
        let refused = |v, k, gaps: &[usize]| {
            Gaps::new(v, k, gaps.to_vec(), 64)
                .expect_err("refused")
                .to_string()
        };
        assert!(refused(96, 4, &[60]).contains("seq_len 72"));
        assert!(refused(9, 4, &[1]).contains("vocab_size"));
        assert!(refused(96, 4, &[]).contains("no gap"));
    }
}
