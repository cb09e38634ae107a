//! State tracking: every target is the state after the inputs so far.
//!
//! Parity of bits, and products of permutations (S5 is not solvable by circuits of constant depth; Merrill et al. 2024):
//!
//! ```text
//! tokens   0 1 1 0 1              tokens   p q r         numbers of permutations in lexicographic order, V = n!
//! targets  0 1 0 0 1              targets  p qp rqp      q after p
//! ```
//!
//! With `swaps_only` inputs are swaps of neighbours, n - 1 of the n! tokens; targets are any permutation.

use super::{Draw, refuse};
use crate::data::rng::Rng;
use crate::data::rows::Split;
use crate::data::{DataError, RowMut};
use marimba_dsl::data as spec;

/// Parity.
pub struct Parity {
    p_one: f64,
}

impl Parity {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`DataError::Parameter`].
    pub fn new(d: &spec::Parity, _seq_len: usize) -> Result<Self, DataError> {
        if !(d.p_one > 0.0 && d.p_one < 1.0) {
            return refuse(format!(
                "parity has p_one {}; expected between 0 and 1",
                d.p_one
            ));
        }
        Ok(Self { p_one: d.p_one })
    }
}

impl Draw for Parity {
    fn vocab_size(&self) -> usize {
        2
    }

    fn draw(&self, rng: &mut Rng, _split: Split, out: &mut RowMut<'_>) {
        let mut parity = 0;
        for (token, target) in out.tokens.iter_mut().zip(out.targets.iter_mut()) {
            *token = i32::from(rng.unit() < self.p_one);
            parity ^= *token;
            *target = parity;
        }
    }
}

/// Products of permutations.
pub struct Permutations {
    /// n!.
    count: usize,
    /// `product[q * count + p]` is q after p.
    product: Vec<u8>,
    inputs: Vec<u8>,
}

impl Permutations {
    /// Checks the parameters and multiplies the table out.
    ///
    /// # Errors
    /// [`DataError::Parameter`].
    pub fn new(d: &spec::StateTracking, _seq_len: usize) -> Result<Self, DataError> {
        if !(2..=5).contains(&d.n) {
            return refuse(format!(
                "state tracking has n {}; expected 2 to 5 things",
                d.n
            ));
        }
        let all = permutations(d.n);
        let after = |q: &[u8], p: &[u8]| -> Vec<u8> { p.iter().map(|&i| q[i as usize]).collect() };
        // The list is complete and sorted, so the search always finds.
        let number = |p: &Vec<u8>| all.binary_search(p).unwrap_or(0) as u8;
        let product = all
            .iter()
            .flat_map(|q| all.iter().map(|p| number(&after(q, p))).collect::<Vec<_>>())
            .collect();
        let swap = |i: usize| {
            let mut p: Vec<u8> = (0..d.n as u8).collect();
            p.swap(i, i + 1);
            number(&p)
        };
        let inputs = if d.swaps_only {
            (0..d.n - 1).map(swap).collect()
        } else {
            (0..all.len() as u8).collect()
        };
        Ok(Self {
            count: all.len(),
            product,
            inputs,
        })
    }
}

/// All orders of `0..n`, sorted.
fn permutations(n: usize) -> Vec<Vec<u8>> {
    if n == 0 {
        return vec![Vec::new()];
    }
    let mut all: Vec<Vec<u8>> = permutations(n - 1)
        .iter()
        .flat_map(|p| {
            (0..n).map(move |at| {
                let mut longer = p.clone();
                longer.insert(at, n as u8 - 1);
                longer
            })
        })
        .collect();
    all.sort();
    all
}

impl Draw for Permutations {
    fn vocab_size(&self) -> usize {
        self.count
    }

    fn draw(&self, rng: &mut Rng, _split: Split, out: &mut RowMut<'_>) {
        let mut state = 0; // the identity comes first
        for (token, target) in out.tokens.iter_mut().zip(out.targets.iter_mut()) {
            let input = self.inputs[rng.index(self.inputs.len())] as usize;
            state = self.product[input * self.count + state] as usize;
            *token = input as i32;
            *target = state as i32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{golden, guess, refused, score, task};
    use super::*;
    use marimba_dsl::data::Data;

    fn parity() -> Data {
        Data::Parity(spec::Parity::default())
    }

    fn s5(swaps_only: bool) -> Data {
        Data::StateTracking(spec::StateTracking {
            swaps_only,
            ..Default::default()
        })
    }

    /// Applies permutations to five things by hand, without the table.
    fn by_hand(tokens: &[i32], at: usize) -> i32 {
        let all = permutations(5);
        let mut places: Vec<u8> = (0..5).collect();
        for &t in &tokens[..=at] {
            places = places
                .iter()
                .map(|&p| all[t as usize][p as usize])
                .collect();
        }
        all.iter()
            .position(|p| *p == places)
            .expect("a permutation") as i32
    }

    #[test]
    fn perfect_trackers_score_1_and_guesses_chance() {
        assert_eq!(
            score(&task(parity(), 100), |tokens, at| tokens[..=at]
                .iter()
                .sum::<i32>()
                % 2),
            1.0
        );
        assert_eq!(score(&task(s5(false), 40), by_hand), 1.0);
        assert_eq!(score(&task(s5(true), 40), by_hand), 1.0);
        assert!((guess(&task(parity(), 100), 0, 2) - 0.5).abs() < 0.02);
        assert!((guess(&task(s5(false), 40), 0, 120) - 1.0 / 120.0).abs() < 0.01);
    }

    #[test]
    fn the_sequences_are_golden() {
        let got = [parity(), s5(false), s5(true)].map(|d| golden(task(d, 64)));
        assert_eq!(
            got,
            ["740441914cd93278", "7b4148bbdf25d2bd", "967f6e29216bf235"]
        );
    }

    #[test]
    fn impossible_parameters_are_refused() {
        assert!(
            refused(
                Data::Parity(spec::Parity {
                    p_one: 0.0,
                    ..Default::default()
                }),
                64
            )
            .contains("p_one 0")
        );
        assert!(
            refused(
                Data::StateTracking(spec::StateTracking {
                    n: 6,
                    ..Default::default()
                }),
                64
            )
            .contains("n 6")
        );
    }
}
