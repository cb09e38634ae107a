//! The order in which a logical shard's documents are seen: a bijection of `0..n` in closed form, new in every epoch.
//!
//! Default: a keyed Feistel network on the smallest power of two that holds `n`, walked along its cycles until it lands in
//! `0..n` (Black and Rogaway 2002). O(1) state (the position), O(1) inverse (the rounds backwards).
//! [`FmsV1`] is the order of IBM's fms-fsdp loader, kept for reading runs that were made with it.
//!
//! Nothing here knows what is permuted.

use super::DataError;
use super::rng::{key, mix};
use serde::{Deserialize, Serialize};

/// Half-rounds of the network. 6 leave a visible serial correlation at small n; 12 pass every test of this file at 16, 100 and 10^4.
const HALF_ROUNDS: usize = 12;

/// A bijection of `0..n`.
#[derive(Clone, Debug)]
pub struct Permutation {
    n: u64,
    low_bits: u32,
    high_mask: u64,
    low_mask: u64,
    keys: [u64; HALF_ROUNDS],
}

impl Permutation {
    /// The permutation of `0..n` that belongs to `parts` (seed, dataset, shard, epoch, ...).
    pub fn new(n: u64, parts: &[u64]) -> Self {
        let bits = 64 - n.saturating_sub(1).leading_zeros();
        let low_bits = bits / 2;
        let k = key(parts);
        let mut keys = [0; HALF_ROUNDS];
        for (i, slot) in keys.iter_mut().enumerate() {
            *slot = key(&[k, i as u64]);
        }
        let mask = |bits: u32| {
            if bits == 0 {
                0
            } else {
                u64::MAX >> (64 - bits)
            }
        };
        Self {
            n,
            low_bits,
            high_mask: mask(bits - low_bits),
            low_mask: mask(low_bits),
            keys,
        }
    }

    /// n.
    pub fn len(&self) -> u64 {
        self.n
    }

    /// Whether n is 0.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// What stands at position `i < n`.
    #[inline]
    pub fn at(&self, i: u64) -> u64 {
        debug_assert!(i < self.n);
        let mut x = i;
        loop {
            x = self.forward(x);
            if x < self.n {
                return x;
            }
        }
    }

    /// The position at which `x < n` stands.
    #[inline]
    pub fn position(&self, x: u64) -> u64 {
        debug_assert!(x < self.n);
        let mut i = x;
        loop {
            i = self.backward(i);
            if i < self.n {
                return i;
            }
        }
    }

    #[inline]
    fn forward(&self, x: u64) -> u64 {
        let (mut high, mut low) = (x >> self.low_bits, x & self.low_mask);
        for pair in self.keys.chunks_exact(2) {
            high ^= round(low, pair[0]) & self.high_mask;
            low ^= round(high, pair[1]) & self.low_mask;
        }
        high << self.low_bits | low
    }

    #[inline]
    fn backward(&self, x: u64) -> u64 {
        let (mut high, mut low) = (x >> self.low_bits, x & self.low_mask);
        for pair in self.keys.chunks_exact(2).rev() {
            low ^= round(high, pair[1]) & self.low_mask;
            high ^= round(low, pair[0]) & self.high_mask;
        }
        high << self.low_bits | low
    }
}

#[inline]
fn round(half: u64, key: u64) -> u64 {
    mix(half.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ key)
}

/// The linear congruential order of fms-fsdp (`_random_map_docid`): `s <- (5 s + 2 (rank + seed) + 1) mod 2^k`, skipping `s >= n`,
/// from `s = rank + seed`.
///
/// Kept bit-exact with its defects: every epoch has the same order (the state is reset), `(rank, seed)` and `(rank + 1, seed - 1)`
/// give the same order, and low bits have short periods, so neighbours alternate in parity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FmsV1 {
    n: u64,
    mask: u64,
    increment: u64,
    state: u64,
}

impl FmsV1 {
    /// The order of `0..n` for a logical shard at the start of a file visit.
    pub fn new(n: u64, rank: u64, seed: u64) -> Self {
        Self::resumed(n, rank, seed, rank.wrapping_add(seed))
    }

    /// Continues from `lcg_state` of a `loader_state_*` file. The reference does not reset its state between files, so the
    /// last document of one file is the start state of the next: pass it here with the next file's `n`.
    pub fn resumed(n: u64, rank: u64, seed: u64, lcg_state: u64) -> Self {
        let mask = n.max(1).next_power_of_two().wrapping_sub(1);
        let increment = rank.wrapping_add(seed).wrapping_mul(2).wrapping_add(1);
        Self {
            n,
            mask,
            increment,
            state: lcg_state,
        }
    }

    /// The `lcg_state` after the documents drawn so far.
    pub fn state(&self) -> u64 {
        self.state
    }
}

impl Iterator for FmsV1 {
    type Item = u64;

    /// The next document, endlessly: after `n` draws the same `n` documents come again.
    fn next(&mut self) -> Option<u64> {
        if self.n == 0 {
            return None;
        }
        loop {
            self.state = self.state.wrapping_mul(5).wrapping_add(self.increment) & self.mask;
            if self.state < self.n {
                return Some(self.state);
            }
        }
    }
}

/// Which order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OrderMode {
    /// The keyed Feistel network.
    #[default]
    Default,
    /// [`FmsV1`].
    FmsV1,
    /// 0, 1, 2, ...: for data that is already shuffled, and for evaluation.
    Sequential,
}

impl From<marimba_dsl::data::Order> for OrderMode {
    fn from(order: marimba_dsl::data::Order) -> Self {
        match order {
            marimba_dsl::data::Order::Default => Self::Default,
            marimba_dsl::data::Order::FmsV1 => Self::FmsV1,
            marimba_dsl::data::Order::Sequential => Self::Sequential,
        }
    }
}

/// The whole order of `0..n` of logical shard `rank` of dataset `dataset` in `epoch`.
///
/// # Errors
/// [`DataError::Parameter`] when `n` is above 2^40, more than a list can hold.
pub fn order(
    mode: OrderMode,
    n: u64,
    seed: u64,
    dataset: u64,
    rank: u64,
    epoch: u64,
) -> Result<Vec<u64>, DataError> {
    if n > 1 << 40 {
        return Err(DataError::Parameter(format!(
            "an order of {n} documents is too long to list; the longest is 2^40"
        )));
    }
    Ok(match mode {
        OrderMode::Default => {
            let p = Permutation::new(n, &[seed, dataset, rank, epoch]);
            (0..n).map(|i| p.at(i)).collect()
        }
        OrderMode::FmsV1 => FmsV1::new(n, rank, seed).take(n as usize).collect(),
        OrderMode::Sequential => (0..n).collect(),
    })
}

/// Lag-1 serial correlation of an order: 0 for an ideal shuffle, up to about `3 / sqrt(n)` by chance.
pub fn serial_correlation(order: &[u64]) -> f64 {
    let n = order.len() as f64;
    let mean = (n - 1.0) / 2.0;
    let variance: f64 = order.iter().map(|&x| (x as f64 - mean).powi(2)).sum();
    let covariance: f64 = order
        .windows(2)
        .map(|w| (w[0] as f64 - mean) * (w[1] as f64 - mean))
        .sum();
    covariance / variance
}

/// Histogram of how far items moved: `bins` equal classes of `(order[i] - i) / n` over [-1, 1).
///
/// An ideal shuffle has the triangular density `1 - |d|`.
pub fn displacement_histogram(order: &[u64], bins: usize) -> Vec<u64> {
    let mut counts = vec![0; bins];
    let n = order.len() as f64;
    for (i, &x) in order.iter().enumerate() {
        let d = (x as f64 - i as f64 + n) / (2.0 * n);
        counts[((d * bins as f64) as usize).min(bins.saturating_sub(1))] += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sorted(mut v: Vec<u64>) -> Vec<u64> {
        v.sort_unstable();
        v
    }

    #[test]
    fn fms_v1_matches_the_golden_vectors() {
        let take = |n, rank, seed, k| FmsV1::new(n, rank, seed).take(k).collect::<Vec<_>>();
        assert_eq!(take(10, 0, 42, 10), [7, 8, 6, 3, 4, 9, 2, 0, 5, 1]);
        assert_eq!(
            take(16, 0, 2023, 16),
            [2, 9, 12, 11, 6, 13, 0, 15, 10, 1, 4, 3, 14, 5, 8, 7]
        );
        assert_eq!(
            take(16, 1, 2023, 16),
            [9, 14, 7, 4, 5, 10, 3, 0, 1, 6, 15, 12, 13, 2, 11, 8]
        );
        let long = [
            88, 13, 22, 67, 36, 9, 2, 95, 48, 69, 46, 59, 65, 26, 87, 8, 70, 51, 84, 50,
        ];
        assert_eq!(take(100, 3, 2023, 20), long);
    }

    #[test]
    fn fms_v1_visits_all_from_any_state() {
        for n in 1..260 {
            for start in [0, 1, 77] {
                let got: Vec<_> = FmsV1::resumed(n, 3, 9, start).take(n as usize).collect();
                assert_eq!(sorted(got), (0..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn fms_v1_continues_from_a_saved_state() {
        let mut whole = FmsV1::new(100, 3, 2023);
        let head: Vec<_> = whole.by_ref().take(37).collect();
        let resumed = FmsV1::resumed(100, 3, 2023, whole.state());
        assert_eq!(whole.state(), *head.last().expect("37 items"));
        assert_eq!(
            resumed.take(63).collect::<Vec<_>>(),
            whole.take(63).collect::<Vec<_>>()
        );
    }

    #[test]
    fn small_permutations_are_near_uniform() {
        // All 24 orders of 4 items over 24,000 keys: chi-square with 23 degrees of freedom, 0.999 quantile 49.7.
        let mut seen = std::collections::BTreeMap::new();
        for k in 0..24_000 {
            *seen
                .entry(order(OrderMode::Default, 4, k, 0, 0, 0).expect("small"))
                .or_insert(0u32) += 1;
        }
        assert_eq!(seen.len(), 24);
        let chi2: f64 = seen
            .values()
            .map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0)
            .sum();
        assert!(chi2 < 49.7, "chi2 {chi2}");
    }

    #[test]
    fn quality_is_that_of_an_ideal_shuffle() {
        for n in [16u64, 100, 10_000] {
            let trials = 200_000 / n;
            let (mut mean_r, mut var_r, mut hist) = (0.0, 0.0, vec![0u64; 20]);
            for epoch in 0..trials {
                let o = order(OrderMode::Default, n, 5, 0, 3, epoch).expect("small");
                let r = serial_correlation(&o);
                mean_r += r / trials as f64;
                var_r += r * r / trials as f64;
                for (h, c) in hist.iter_mut().zip(displacement_histogram(&o, 20)) {
                    *h += c;
                }
            }
            // An ideal shuffle: mean -1/n, variance 1/n, so the mean of `trials` has a standard error of 1/sqrt(n trials).
            let error = (mean_r + 1.0 / n as f64) * ((n * trials) as f64).sqrt();
            assert!(
                error.abs() < 4.0,
                "n {n}: serial correlation {mean_r}, {error} standard errors off"
            );
            assert!(
                var_r * n as f64 > 0.5 && var_r * (n as f64) < 1.5,
                "n {n}: variance {var_r}"
            );
            if n == 10_000 {
                let total = (n * trials) as f64;
                let chi2: f64 = (0..20)
                    .map(|b| {
                        let (lo, hi) = (b as f64 / 10.0 - 1.0, (b + 1) as f64 / 10.0 - 1.0);
                        let area = |x: f64| x - x * x.abs() / 2.0; // integral of 1 - |d|
                        let want = total * (area(hi) - area(lo));
                        (hist[b] as f64 - want).powi(2) / want
                    })
                    .sum();
                assert!(
                    chi2 < 43.8,
                    "displacements: chi2 {chi2} with 19 degrees of freedom"
                ); // 0.999 quantile
            }
        }
    }

    #[test]
    fn the_quality_test_can_fail() {
        let lcg: Vec<u64> = FmsV1::new(1 << 14, 0, 2023).take(1 << 14).collect();
        let alternating = lcg.windows(2).filter(|w| (w[0] + w[1]) % 2 == 1).count();
        assert_eq!(
            alternating,
            lcg.len() - 1,
            "the reference's neighbours always alternate in parity"
        );
        let ours = order(OrderMode::Default, 1 << 14, 2023, 0, 0, 0).expect("small");
        let alternating = ours.windows(2).filter(|w| (w[0] + w[1]) % 2 == 1).count() as f64;
        assert!((alternating - 8192.0).abs() < 4.0 * 64.0, "{alternating}");
        assert!(serial_correlation(&(0..100).collect::<Vec<_>>()) > 0.9);
    }

    proptest! {
        #[test]
        fn is_a_bijection_with_its_inverse(n in 1u64..3000, seed: u64, epoch in 0u64..4) {
            let p = Permutation::new(n, &[seed, epoch]);
            let all: Vec<u64> = (0..n).map(|i| p.at(i)).collect();
            prop_assert!(all.iter().enumerate().all(|(i, &x)| p.position(x) == i as u64));
            prop_assert_eq!(sorted(all.clone()), (0..n).collect::<Vec<_>>());
            if n > 20 {
                let next = Permutation::new(n, &[seed, epoch + 1]);
                prop_assert!((0..n).any(|i| next.at(i) != all[i as usize]), "two epochs with one order");
            }
        }

        #[test]
        fn large_sizes_invert(n in 1u64..=u64::MAX, seed: u64, i: u64) {
            let p = Permutation::new(n, &[seed]);
            prop_assert_eq!(p.position(p.at(i % n)), i % n);
        }
    }
}
