//! Compression (MAD): a row of random tokens must be decoded from the hidden state at its last place alone.
//!
//! ```text
//! tokens   A C B B A !        `!` compression token, V - 1
//! targets  A C B B A -        target t: what a decoder fed with (state at `!`, position t) must answer
//! ```
//!
//! Targets are the tokens themselves, aligned, not shifted: a model that reads them with its own head at place t solves an
//! identity. The score means something only with a decoder over the last hidden state (an MLP of it and the position's encoding).

use super::{Draw, refuse};
use crate::data::rng::Rng;
use crate::data::rows::Split;
use crate::data::{DataError, RowMut};
use marimba_dsl::data as spec;

/// The task.
pub struct Compression {
    vocab_size: u64,
}

impl Compression {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`DataError::Parameter`].
    pub fn new(d: &spec::Compression, seq_len: usize) -> Result<Self, DataError> {
        if d.vocab_size < 3 || seq_len < 2 {
            return refuse(format!(
                "compression has vocab_size {} and seq_len {seq_len}; expected 3 or more and 2 or more",
                d.vocab_size
            ));
        }
        Ok(Self {
            vocab_size: d.vocab_size as u64,
        })
    }
}

impl Draw for Compression {
    fn vocab_size(&self) -> usize {
        self.vocab_size as usize
    }

    fn draw(&self, rng: &mut Rng, _split: Split, out: &mut RowMut<'_>) {
        let last = out.tokens.len() - 1;
        for t in 0..last {
            out.tokens[t] = rng.below(self.vocab_size - 1) as i32;
            out.targets[t] = out.tokens[t];
        }
        out.tokens[last] = self.vocab_size as i32 - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{golden, guess, refused, score, task};
    use super::*;
    use marimba_dsl::data::Data;

    fn data() -> Data {
        Data::Compression(spec::Compression::default())
    }

    #[test]
    fn perfect_memory_scores_1_and_a_guess_chance() {
        assert_eq!(score(&task(data(), 32), |tokens, at| tokens[at]), 1.0);
        assert!((guess(&task(data(), 32), 0, 15) - 1.0 / 15.0).abs() < 0.015);
    }

    #[test]
    fn the_sequence_is_golden() {
        assert_eq!(golden(task(data(), 32)), "d7b03a5d2689ba0b");
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(refused(data(), 1).contains("seq_len 1"));
    }
}
