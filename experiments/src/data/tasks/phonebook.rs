//! Phone book at training size: entries of a name and a number, then a name whose number is asked (after Jelassi et al. 2024).
//!
//! With names of two tokens (a b c ...) and numbers of three digits:
//!
//! ```text
//! tokens   a c : 3 1 4 / b a : 2 7 1 / ? a c : 3 1 . .
//! targets  - - - - - - - - - - - - - - - - - 3 1 4 - -
//! reversed ? a c / a c : 3 1 4 / ...           the question also stands before the book
//! ```
//!
//! Tokens: 0 filler, 1 `:`, 2 `/` (end of entry), 3 `?`, 4 to 13 digits, 14 to V - 1 name tokens. Names are distinct, so the answer is one.
//! The text forms of the published evaluations belong to evaluation, not to training data.

use super::{Draw, refuse};
use crate::data::rng::Rng;
use crate::data::rows::Split;
use crate::data::{DataError, RowMut};
use marimba_dsl::data as spec;

const COLON: i32 = 1;
const END: i32 = 2;
const ASK: i32 = 3;
const DIGIT: i32 = 4;
const NAME: i32 = 14;

/// The task.
pub struct Phonebook {
    vocab_size: usize,
    n_entries: usize,
    name_len: usize,
    n_digits: usize,
    reversed: bool,
    names: u64,
}

impl Phonebook {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`DataError::Parameter`].
    pub fn new(d: &spec::Phonebook, seq_len: usize) -> Result<Self, DataError> {
        if d.name_len == 0 || d.n_digits == 0 || d.vocab_size <= NAME as usize {
            return refuse(format!(
                "phonebook has name_len {}, n_digits {}, vocab_size {}; expected 1 or more, 1 or more, and above {NAME}",
                d.name_len, d.n_digits, d.vocab_size
            ));
        }
        let entry = d.name_len + d.n_digits + 2;
        // The last digit is only a target.
        let question = 1 + d.name_len + d.n_digits + if d.reversed { d.name_len + 2 } else { 0 };
        let names = (d.vocab_size as u64 - NAME as u64).saturating_pow(d.name_len.min(64) as u32);
        let fit = (seq_len.saturating_sub(question) / entry).min(names.min(1 << 40) as usize);
        let n_entries = d.n_entries.unwrap_or(fit);
        if n_entries == 0 || n_entries > fit {
            return refuse(format!(
                "phonebook has {n_entries} entries of {entry} tokens; {fit} fit in seq_len {seq_len} with {names} names; expected 1 or more, and no more than fit"
            ));
        }
        Ok(Self {
            vocab_size: d.vocab_size,
            n_entries,
            name_len: d.name_len,
            n_digits: d.n_digits,
            reversed: d.reversed,
            names,
        })
    }
}

impl Draw for Phonebook {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn draw(&self, rng: &mut Rng, _split: Split, out: &mut RowMut<'_>) {
        let base = self.vocab_size as u64 - NAME as u64;
        let mut seen = std::collections::HashSet::with_capacity(self.n_entries);
        let mut names = Vec::with_capacity(self.n_entries);
        if self.names <= 4 * self.n_entries as u64 {
            rng.distinct(self.n_entries, 0, self.names, &mut names);
        }
        while names.len() < self.n_entries {
            let name = rng.below(self.names);
            if seen.insert(name) {
                names.push(name);
            }
        }
        let mut at = 0;
        let mut put = |token: i32| {
            out.tokens[at] = token;
            at += 1;
            at - 1
        };
        let name_tokens = |mut name: u64| {
            (0..self.name_len).map(move |_| {
                let token = NAME + (name % base) as i32;
                name /= base;
                token
            })
        };
        let asked = rng.index(self.n_entries);
        if self.reversed {
            put(ASK);
            for token in name_tokens(names[asked]) {
                put(token);
            }
            put(END);
        }
        let mut answer = Vec::with_capacity(self.n_digits);
        for (i, &name) in names.iter().enumerate() {
            for token in name_tokens(name) {
                put(token);
            }
            put(COLON);
            for _ in 0..self.n_digits {
                let digit = DIGIT + rng.below(10) as i32;
                put(digit);
                if i == asked {
                    answer.push(digit);
                }
            }
            put(END);
        }
        put(ASK);
        for token in name_tokens(names[asked]) {
            put(token);
        }
        let mut from = put(COLON);
        for (i, &digit) in answer.iter().enumerate() {
            out.targets[from] = digit;
            if i + 1 < self.n_digits {
                from = put(digit);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{golden, guess, refused, score, task};
    use super::*;
    use marimba_dsl::data::Data;

    fn data(reversed: bool) -> Data {
        Data::Phonebook(spec::Phonebook {
            reversed,
            ..Default::default()
        })
    }

    /// Finds the asked name in the book and reads its number off.
    fn look_up(tokens: &[i32], at: usize) -> i32 {
        let ask = tokens.iter().rposition(|&t| t == ASK).expect("a question");
        let asked = &tokens[ask + 1..=ask + 3]; // two name tokens and the colon
        let entry = tokens
            .windows(3)
            .position(|w| w == asked)
            .expect("an entry");
        tokens[entry + 3 + (at - ask - 3)]
    }

    #[test]
    fn a_perfect_reader_scores_1_and_a_guess_chance() {
        for reversed in [false, true] {
            assert_eq!(score(&task(data(reversed), 256), look_up), 1.0);
            assert!((guess(&task(data(reversed), 256), 4, 14) - 0.1).abs() < 0.03);
        }
    }

    #[test]
    fn the_sequences_are_golden() {
        let got = [data(false), data(true)].map(|d| golden(task(d, 128)));
        assert_eq!(got, ["88abaf3313ccb66b", "d23de9d107365407"]);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(refused(data(false), 15).contains("0 entries"));
        let one_name = spec::Phonebook {
            vocab_size: 15,
            name_len: 1,
            n_entries: Some(2),
            ..Default::default()
        };
        assert!(refused(Data::Phonebook(one_name), 256).contains("1 names"));
    }
}
