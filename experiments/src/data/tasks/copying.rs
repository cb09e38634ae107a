//! Copying, plain and selective.
//!
//! Plain (Jelassi et al. 2024): a string of random length, a separator, the string again. Token 0 fills the rest, token 1 separates:
//!
//! ```text
//! tokens   C A B | C A . .
//! targets  - - - C A B - -
//! ```
//!
//! Selective (MAD): tokens between blanks at random places, a copy token, then blanks under which the tokens follow in order:
//!
//! ```text
//! tokens   _ C _ _ A B _ ! _ _ _        `_` blank V - 2, `!` copy token V - 1
//! targets  - - - - - - - - C A B
//! ```
//!
//! Differences from the reference: places of blanks come from the example's own random numbers, and blanks may follow the last token.

use super::{Draw, refuse};
use crate::data::rng::Rng;
use crate::data::rows::Split;
use crate::data::{DataError, RowMut};
use marimba_dsl::data as spec;

/// Plain copying.
pub struct Copying {
    vocab_size: u64,
    min_len: u64,
    max_len: u64,
}

impl Copying {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`DataError::Parameter`].
    pub fn new(d: &spec::Copying, seq_len: usize) -> Result<Self, DataError> {
        let max_len = d.max_len.unwrap_or(seq_len.saturating_sub(1) / 2);
        if d.vocab_size < 4 {
            return refuse(format!(
                "copying has vocab_size {}; expected 4 or more: filler, separator, two tokens",
                d.vocab_size
            ));
        }
        if d.min_len == 0 || max_len < d.min_len || 2 * max_len + 1 > seq_len {
            return refuse(format!(
                "copying has lengths {} to {max_len} in seq_len {seq_len}; expected 1 or more, and 2 max_len + 1 <= seq_len",
                d.min_len
            ));
        }
        Ok(Self {
            vocab_size: d.vocab_size as u64,
            min_len: d.min_len as u64,
            max_len: max_len as u64,
        })
    }
}

impl Draw for Copying {
    fn vocab_size(&self) -> usize {
        self.vocab_size as usize
    }

    fn draw(&self, rng: &mut Rng, _split: Split, out: &mut RowMut<'_>) {
        let n = (self.min_len + rng.below(self.max_len - self.min_len + 1)) as usize;
        for t in 0..n {
            let token = 2 + rng.below(self.vocab_size - 2) as i32;
            out.tokens[t] = token;
            out.tokens[n + 1 + t] = token;
            out.targets[n + t] = token;
        }
        out.tokens[n] = 1;
    }
}

/// Selective copying.
pub struct Selective {
    vocab_size: u64,
    n_copy: usize,
}

impl Selective {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`DataError::Parameter`].
    pub fn new(d: &spec::SelectiveCopying, seq_len: usize) -> Result<Self, DataError> {
        if d.vocab_size < 4 {
            return refuse(format!(
                "selective copying has vocab_size {}; expected 4 or more: two tokens, blank, copy token",
                d.vocab_size
            ));
        }
        if d.n_copy == 0 || 2 * d.n_copy + 1 > seq_len {
            return refuse(format!(
                "selective copying has n_copy {} in seq_len {seq_len}; expected 1 or more, and 2 n_copy + 1 <= seq_len",
                d.n_copy
            ));
        }
        Ok(Self {
            vocab_size: d.vocab_size as u64,
            n_copy: d.n_copy,
        })
    }
}

impl Draw for Selective {
    fn vocab_size(&self) -> usize {
        self.vocab_size as usize
    }

    fn draw(&self, rng: &mut Rng, _split: Split, out: &mut RowMut<'_>) {
        let (seq_len, n) = (out.tokens.len(), self.n_copy);
        let head = seq_len - n - 1;
        let (blank, copy) = (self.vocab_size as i32 - 2, self.vocab_size as i32 - 1);
        out.tokens.fill(blank);
        out.tokens[head] = copy;
        let mut places = Vec::with_capacity(n);
        rng.distinct(n, 0, head as u64, &mut places);
        places.sort_unstable();
        for (i, &place) in places.iter().enumerate() {
            let token = rng.below(self.vocab_size - 2) as i32;
            out.tokens[place as usize] = token;
            out.targets[head + 1 + i] = token;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{golden, guess, refused, score, task};
    use super::*;
    use marimba_dsl::data::Data;

    fn plain() -> Data {
        Data::Copying(spec::Copying::default())
    }

    fn selective() -> Data {
        Data::SelectiveCopying(spec::SelectiveCopying::default())
    }

    #[test]
    fn perfect_copies_score_1_and_guesses_chance() {
        let separator = |tokens: &[i32]| tokens.iter().position(|&t| t == 1).expect("a separator");
        assert_eq!(
            score(&task(plain(), 65), |tokens, at| tokens
                [at - separator(tokens)]),
            1.0
        );
        let kept = |tokens: &[i32], at: usize| {
            let head = tokens
                .iter()
                .position(|&t| t == 15)
                .expect("the copy token");
            tokens[..head]
                .iter()
                .copied()
                .filter(|&t| t != 14)
                .nth(at - head - 1)
                .expect("a token")
        };
        assert_eq!(score(&task(selective(), 256), kept), 1.0);
        assert!((guess(&task(plain(), 65), 2, 32) - 1.0 / 30.0).abs() < 0.02);
        assert!((guess(&task(selective(), 256), 0, 14) - 1.0 / 14.0).abs() < 0.02);
    }

    #[test]
    fn the_sequences_are_golden() {
        let got = [plain(), selective()].map(|d| golden(task(d, 65)));
        assert_eq!(got, ["463e4cdbd293a9e9", "b39abd5cb050cab2"]);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(
            refused(
                Data::Copying(spec::Copying {
                    max_len: Some(40),
                    ..Default::default()
                }),
                65
            )
            .contains("lengths 1 to 40")
        );
        assert!(refused(selective(), 32).contains("n_copy 16"));
    }
}
