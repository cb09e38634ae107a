//! In-context recall, plain, noisy and fuzzy (MAD; Poli et al. 2024): pairs drawn with replacement; the value of a key seen before is asked.
//!
//! Plain, T = 12 (keys A B C, values 1 2 3):
//!
//! ```text
//! tokens   A 1 C 3 A 1 B 2 C 3 A 1
//! targets  - - - - 1 - - - 3 - 1 -      in evaluation; in training every next token is a target
//!                              last pair: always a key seen before
//! ```
//!
//! Noisy: each pair is replaced by two noise tokens with probability `noise_fraction` (`x y A 1 z y A 1`); noise is never asked.
//!
//! Fuzzy: keys and values are motifs of several tokens without repetition. A row has one key length (1 up to `max_motif` in training,
//! `max_motif` in evaluation), so that a motif's end is known, and value lengths of 1 up to `max_motif`:
//!
//! ```text
//! tokens   . A B 1 B A 2 3 A B 1 B A 2 3        `.` pads on the left, V - 1
//! targets  - - - - - - - - - 1 - - 2 3 -
//! ```
//!
//! Differences from the reference: none in the distributions above that are documented; motifs of a row come from a pool of
//! T / (4 max_motif) pairs, so that keys do come again.

use super::{Draw, refuse};
use crate::data::rng::Rng;
use crate::data::rows::Split;
use crate::data::{DataError, RowMut};
use marimba_dsl::data as spec;

/// Training rows: every next token is a target.
fn all_targets(out: &mut RowMut<'_>, first: usize, end: usize) {
    for t in first..end.saturating_sub(1) {
        out.targets[t] = out.tokens[t + 1];
    }
}

/// Plain and noisy.
pub struct Recall {
    /// Keys and values together.
    n: u64,
    n_noise: u64,
    noise_fraction: f64,
}

impl Recall {
    /// Plain.
    ///
    /// # Errors
    /// [`DataError::Parameter`].
    pub fn in_context(d: &spec::Recall, seq_len: usize) -> Result<Self, DataError> {
        Self::checked(d.vocab_size, 0, 0.0, seq_len)
    }

    /// Noisy.
    ///
    /// # Errors
    /// [`DataError::Parameter`].
    pub fn noisy(d: &spec::NoisyRecall, seq_len: usize) -> Result<Self, DataError> {
        Self::checked(d.vocab_size, d.n_noise, d.noise_fraction, seq_len)
    }

    fn checked(
        vocab_size: usize,
        n_noise: usize,
        noise_fraction: f64,
        seq_len: usize,
    ) -> Result<Self, DataError> {
        if vocab_size.saturating_sub(n_noise) < 4 {
            return refuse(format!(
                "recall has vocab_size {vocab_size} with {n_noise} noise tokens; expected at least 4 more than noise"
            ));
        }
        if !(0.0..1.0).contains(&noise_fraction) || (noise_fraction > 0.0 && n_noise == 0) {
            return refuse(format!(
                "recall has noise_fraction {noise_fraction} and {n_noise} noise tokens; expected 0 up to 1, and noise tokens if above 0"
            ));
        }
        if seq_len < 4 {
            return refuse(format!(
                "recall has seq_len {seq_len}; expected 4 or more, for two pairs"
            ));
        }
        Ok(Self {
            n: (vocab_size - n_noise) as u64,
            n_noise: n_noise as u64,
            noise_fraction,
        })
    }
}

impl Draw for Recall {
    fn vocab_size(&self) -> usize {
        (self.n + self.n_noise) as usize
    }

    fn draw(&self, rng: &mut Rng, split: Split, out: &mut RowMut<'_>) {
        let half = self.n / 2;
        let pairs = out.tokens.len() / 2;
        let mut value: Vec<i32> = vec![-1; half as usize];
        let mut seen: Vec<u64> = Vec::new();
        let sure = rng.index(pairs - 1);
        for i in 0..pairs {
            let last = i + 1 == pairs;
            if !last && i != sure && rng.unit() < self.noise_fraction {
                out.tokens[2 * i] = (self.n + rng.below(self.n_noise)) as i32;
                out.tokens[2 * i + 1] = (self.n + rng.below(self.n_noise)) as i32;
                continue;
            }
            let key = if last {
                seen[rng.index(seen.len())]
            } else {
                rng.below(half)
            };
            let known = value[key as usize] >= 0;
            if !known {
                value[key as usize] = (half + rng.below(self.n - half)) as i32;
                seen.push(key);
            }
            out.tokens[2 * i] = key as i32;
            out.tokens[2 * i + 1] = value[key as usize];
            if known && split != Split::Train {
                out.targets[2 * i] = value[key as usize];
            }
        }
        if split == Split::Train {
            all_targets(out, 0, 2 * pairs);
        }
    }
}

/// Motifs for keys and values.
pub struct Fuzzy {
    vocab_size: u64,
    max_motif: u64,
}

impl Fuzzy {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`DataError::Parameter`].
    pub fn new(d: &spec::FuzzyRecall, seq_len: usize) -> Result<Self, DataError> {
        let half = d.vocab_size.saturating_sub(1) / 2;
        if d.max_motif == 0 || half < d.max_motif {
            return refuse(format!(
                "fuzzy recall has max_motif {} and vocab_size {}; expected 1 or more, and vocab_size of {} or more",
                d.max_motif,
                d.vocab_size,
                2 * d.max_motif + 1
            ));
        }
        if seq_len < 4 * d.max_motif {
            return refuse(format!(
                "fuzzy recall has seq_len {seq_len}; expected {} or more, for two pairs",
                4 * d.max_motif
            ));
        }
        Ok(Self {
            vocab_size: d.vocab_size as u64,
            max_motif: d.max_motif as u64,
        })
    }
}

impl Draw for Fuzzy {
    fn vocab_size(&self) -> usize {
        self.vocab_size as usize
    }

    fn draw(&self, rng: &mut Rng, split: Split, out: &mut RowMut<'_>) {
        let (seq_len, half, longest) = (
            out.tokens.len(),
            (self.vocab_size - 1) / 2,
            self.max_motif as usize,
        );
        let key_len = if split == Split::Train {
            1 + rng.below(self.max_motif)
        } else {
            self.max_motif
        } as usize;
        // Motifs without repetition: half (half - 1) ... of them.
        let motifs = (0..key_len as u64).fold(1u64, |n, i| n.saturating_mul(half - i));
        let pool = ((seq_len / (4 * longest)) as u64).clamp(1, motifs) as usize;
        let mut keys: Vec<Vec<u64>> = Vec::with_capacity(pool);
        while keys.len() < pool {
            let mut motif = Vec::with_capacity(key_len);
            rng.distinct(key_len, 0, half, &mut motif);
            if !keys.contains(&motif) {
                keys.push(motif);
            }
        }
        let values: Vec<Vec<u64>> = keys
            .iter()
            .map(|_| {
                let mut motif = Vec::new();
                let len = 1 + rng.index(longest);
                rng.distinct(len, half, 2 * half, &mut motif);
                motif
            })
            .collect();
        let mut drawn: Vec<usize> = Vec::new();
        let mut used = 0;
        loop {
            let i = rng.index(pool);
            let len = key_len + values[i].len();
            // Room for the probe, the longest pair, is kept.
            if used + len + key_len + longest > seq_len {
                break;
            }
            used += len;
            drawn.push(i);
        }
        let probe = drawn[rng.index(drawn.len())];
        used += key_len + values[probe].len();
        drawn.push(probe);

        let mut at = seq_len - used;
        out.tokens[..at].fill(self.vocab_size as i32 - 1);
        let (first, mut known) = (at, vec![false; pool]);
        for i in drawn {
            for &token in &keys[i] {
                out.tokens[at] = token as i32;
                at += 1;
            }
            for &token in &values[i] {
                if known[i] && split != Split::Train {
                    out.targets[at - 1] = token as i32;
                }
                out.tokens[at] = token as i32;
                at += 1;
            }
            known[i] = true;
        }
        if split == Split::Train {
            all_targets(out, first, seq_len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{golden, guess, refused, score, task};
    use super::*;
    use marimba_dsl::data::Data;

    fn plain() -> Data {
        Data::InContextRecall(spec::Recall::default())
    }

    fn noisy() -> Data {
        Data::NoisyRecall(spec::NoisyRecall::default())
    }

    fn fuzzy() -> Data {
        Data::FuzzyRecall(spec::FuzzyRecall::default())
    }

    /// What followed the last earlier occurrence of the token.
    fn last_seen(tokens: &[i32], at: usize) -> i32 {
        (0..at)
            .rev()
            .find(|&i| tokens[i] == tokens[at])
            .map_or(-1, |i| tokens[i + 1])
    }

    /// The continuation of the last earlier occurrence of (key, value so far).
    fn last_motif(tokens: &[i32], at: usize) -> i32 {
        let is_key = |i: usize| tokens[i] < 7;
        let value = (0..=at).rev().take_while(|&i| !is_key(i)).count();
        let key = (0..=at - value).rev().take_while(|&i| is_key(i)).count();
        let seen = &tokens[at + 1 - key - value..=at];
        let found = (0..at + 1 - seen.len())
            .rev()
            .find(|&i| tokens[i..].starts_with(seen) && (i == 0 || !is_key(i - 1)));
        found.map_or(-1, |i| tokens[i + seen.len()])
    }

    #[test]
    fn a_perfect_retriever_scores_1_and_a_random_one_chance() {
        assert_eq!(score(&task(plain(), 128), last_seen), 1.0);
        assert_eq!(score(&task(noisy(), 128), last_seen), 1.0);
        assert_eq!(score(&task(fuzzy(), 128), last_motif), 1.0);
        assert!((guess(&task(plain(), 128), 8, 16) - 1.0 / 8.0).abs() < 0.02);
        assert!((guess(&task(noisy(), 128), 8, 16) - 1.0 / 8.0).abs() < 0.02);
        assert!((guess(&task(fuzzy(), 128), 7, 14) - 1.0 / 7.0).abs() < 0.02);
        assert!(
            score(&task(fuzzy(), 128), last_seen) < 0.9,
            "one token of a motif must not do"
        );
    }

    #[test]
    fn noise_has_its_share() {
        let t = task(noisy(), 128);
        let mut noise = 0.0;
        let mut batch = crate::data::Batch::blank(100, 128);
        for i in 0..100 {
            crate::data::rows::Rows::fill(&t, Split::Train, i, batch.row_mut(i as usize))
                .expect("generates");
        }
        for pair in batch.tokens.chunks(2) {
            noise += f64::from(u8::from(pair[0] >= 16));
        }
        assert!((noise / 6400.0 - 0.2 * 62.0 / 64.0).abs() < 0.02);
    }

    #[test]
    fn the_sequences_are_golden() {
        let got = [plain(), noisy(), fuzzy()].map(|d| golden(task(d, 64)));
        assert_eq!(
            got,
            ["2341aaabd75c87ed", "9287a81e2e0eac9d", "cc21655cd0bd69c4"]
        );
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(
            refused(
                Data::InContextRecall(spec::Recall {
                    vocab_size: 3,
                    ..Default::default()
                }),
                128
            )
            .contains("vocab_size 3")
        );
        assert!(refused(plain(), 3).contains("seq_len 3"));
        assert!(
            refused(
                Data::NoisyRecall(spec::NoisyRecall {
                    noise_fraction: 1.0,
                    ..Default::default()
                }),
                64
            )
            .contains("noise_fraction 1")
        );
        assert!(
            refused(
                Data::FuzzyRecall(spec::FuzzyRecall {
                    max_motif: 9,
                    ..Default::default()
                }),
                64
            )
            .contains("max_motif 9")
        );
        assert!(refused(fuzzy(), 11).contains("seq_len 11"));
    }
}
