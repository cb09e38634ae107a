//! Induction heads: a special token stands once in the row and once at its end; what followed it first must follow again.
//!
//! ```text
//! tokens   C A ! B A C B !        `!` V - 1, at a uniformly random place
//! targets  - - - - - - - B
//! ```
//!
//! Source: Gu and Dao 2023 (Mamba), section 4.1.2, after Olsson et al. 2022.

use super::{Draw, refuse};
use crate::data::rng::Rng;
use crate::data::rows::Split;
use crate::data::{DataError, RowMut};
use marimba_dsl::data as spec;

/// The task.
pub struct Induction {
    vocab_size: u64,
}

impl Induction {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`DataError::Parameter`].
    pub fn new(d: &spec::Induction, seq_len: usize) -> Result<Self, DataError> {
        if d.vocab_size < 3 || seq_len < 3 {
            return refuse(format!(
                "induction has vocab_size {} and seq_len {seq_len}; expected 3 or more of both",
                d.vocab_size
            ));
        }
        Ok(Self {
            vocab_size: d.vocab_size as u64,
        })
    }
}

impl Draw for Induction {
    fn vocab_size(&self) -> usize {
        self.vocab_size as usize
    }

    fn draw(&self, rng: &mut Rng, _split: Split, out: &mut RowMut<'_>) {
        let (seq_len, special) = (out.tokens.len(), self.vocab_size as i32 - 1);
        for token in out.tokens.iter_mut() {
            *token = rng.below(self.vocab_size - 1) as i32;
        }
        let place = rng.index(seq_len - 2);
        out.tokens[place] = special;
        out.tokens[seq_len - 1] = special;
        out.targets[seq_len - 1] = out.tokens[place + 1];
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{golden, guess, refused, score, task};
    use super::*;
    use marimba_dsl::data::Data;

    fn data() -> Data {
        Data::Induction(spec::Induction::default())
    }

    #[test]
    fn a_perfect_head_scores_1_and_a_guess_chance() {
        let head = |tokens: &[i32], _: usize| {
            let first = tokens
                .iter()
                .position(|&t| t == 15)
                .expect("the special token");
            tokens[first + 1]
        };
        assert_eq!(score(&task(data(), 256), head), 1.0);
        assert!((guess(&task(data(), 256), 0, 15) - 1.0 / 15.0).abs() < 0.06);
    }

    #[test]
    fn the_sequence_is_golden() {
        assert_eq!(golden(task(data(), 64)), "976c9c1bb61f2547");
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(refused(data(), 2).contains("seq_len 2"));
    }
}
