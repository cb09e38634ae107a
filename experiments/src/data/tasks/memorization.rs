//! Memorization (MAD): a key-value map that never changes and that no row shows.
//!
//! ```text
//! tokens   A ! C ! B ! A !        `!` insert token, V - 1
//! targets  - 1 - 3 - 2 - 1        the map A->1 B->2 C->3 is part of the task, learned in the weights
//! ```
//!
//! Keys are [0, n/2), values [n/2, n), n = V - 1. The map is that of seed 12345, whatever the seed of the rows.

use super::{Draw, refuse};
use crate::data::rng::{Rng, key};
use crate::data::rows::Split;
use crate::data::{DataError, RowMut};
use marimba_dsl::data as spec;

/// Seed of the map; the value that MAD uses for everything.
const MAP_SEED: u64 = 12_345;

/// The task.
pub struct Memorization {
    values: Vec<i32>,
    vocab_size: usize,
}

impl Memorization {
    /// Checks the parameters and draws the map.
    ///
    /// # Errors
    /// [`DataError::Parameter`].
    pub fn new(d: &spec::Memorization, seq_len: usize) -> Result<Self, DataError> {
        if d.vocab_size < 5 {
            return refuse(format!(
                "memorization has vocab_size {}; expected 5 or more: two keys, two values, the insert token",
                d.vocab_size
            ));
        }
        if seq_len < 2 {
            return refuse(format!(
                "memorization has seq_len {seq_len}; expected 2 or more"
            ));
        }
        let n = d.vocab_size as u64 - 1;
        let half = n / 2;
        let values = (0..half)
            .map(|k| (half + key(&[MAP_SEED, k]) % (n - half)) as i32)
            .collect();
        Ok(Self {
            values,
            vocab_size: d.vocab_size,
        })
    }
}

impl Draw for Memorization {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn draw(&self, rng: &mut Rng, _split: Split, out: &mut RowMut<'_>) {
        for i in 0..out.tokens.len() / 2 {
            let key = rng.index(self.values.len());
            out.tokens[2 * i] = key as i32;
            out.tokens[2 * i + 1] = self.vocab_size as i32 - 1;
            out.targets[2 * i + 1] = self.values[key];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{golden, guess, refused, score, score_on, task};
    use super::*;
    use marimba_dsl::data::Data;

    fn data() -> Data {
        Data::Memorization(spec::Memorization::default())
    }

    #[test]
    fn who_learned_the_map_in_training_scores_1() {
        let t = task(data(), 32);
        let mut map = std::collections::BTreeMap::new();
        // Training rows with their targets are all that a learner sees.
        let mut batch = crate::data::Batch::blank(1, 32);
        for i in 0..500 {
            crate::data::rows::Rows::fill(&t, Split::Train, i, batch.row_mut(0))
                .expect("generates");
            for p in 0..16 {
                let (key, value) = (batch.tokens[2 * p], batch.targets[2 * p + 1]);
                assert_eq!(*map.entry(key).or_insert(value), value, "the map changed");
            }
        }
        assert_eq!(map.len(), 127);
        assert_eq!(score(&t, |tokens, at| map[&tokens[at - 1]]), 1.0);
        assert_eq!(
            score_on(&t, Split::Train, |tokens, at| map[&tokens[at - 1]]),
            1.0
        );
        assert!((guess(&t, 127, 255) - 1.0 / 128.0).abs() < 0.01);
    }

    #[test]
    fn the_sequence_is_golden() {
        assert_eq!(golden(task(data(), 32)), "484914a5d9d38800");
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(
            refused(
                Data::Memorization(spec::Memorization {
                    vocab_size: 4,
                    ..Default::default()
                }),
                32
            )
            .contains("vocab_size 4")
        );
        assert!(refused(data(), 1).contains("seq_len 1"));
    }
}
