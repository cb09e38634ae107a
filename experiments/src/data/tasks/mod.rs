//! Synthetic tasks as closed-form rows: example `i` of a task is a function of (seed, split, i) alone.
//!
//! One file per task. Each shows an example as a picture in its document, has a golden hash in its tests (the sequence is part of
//! every stored result), and an oracle: a perfect solver that sees only the tokens scores 1, a random one scores chance.

pub mod mqar;

use super::rng::Rng;
use super::rows::Split;

/// The stream of example `index`: training and every evaluation set have their own.
pub(crate) fn example(task: u64, seed: u64, split: Split, index: u64) -> Rng {
    let set = match split {
        Split::Train => 0,
        Split::Eval(set) => set as u64 + 1,
    };
    Rng::new(&[task, seed, set, index])
}

/// Digest of a task's parameters, from their debug form.
pub(crate) fn fingerprint(spec: &impl std::fmt::Debug) -> String {
    use sha2::{Digest, Sha256};
    super::hex(&Sha256::digest(format!("{spec:?}"))[..16])
}

#[cfg(test)]
pub(crate) mod testing {
    //! What every task's tests do.

    use crate::data::rows::{RowLoader, Rows, Split};
    use crate::data::{Batch, IGNORED, Loader, Worker};
    use sha2::{Digest, Sha256};

    /// First 16 digits of the SHA-256 over tokens and targets of the first 64 training rows and 8 rows of each evaluation set.
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
    pub(crate) fn score(rows: &impl Rows, mut solver: impl FnMut(&[i32], usize) -> i32) -> f64 {
        let (n, seq_len) = (200, rows.seq_len());
        let mut batch = Batch::blank(n, seq_len);
        for i in 0..n {
            rows.fill(Split::Train, i as u64, batch.row_mut(i))
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
            .flatten()
            .collect();
        scores.iter().sum::<f64>() / scores.len() as f64
    }
}
