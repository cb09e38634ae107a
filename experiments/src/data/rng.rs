//! Random numbers as a function of a key: example `i` of seed `s` needs no example before it.
//!
//! [`key`] hashes a seed, a domain and indices into 64 bits; [`Rng`] is xoshiro256++ (Blackman and Vigna 2019) started
//! from SplitMix64 of that key. The sequences are part of the file format of results: changing them changes every golden hash.

/// One round of SplitMix64's output function (Steele, Lea, Flood 2014): a bijection of 64 bits with full avalanche.
#[inline]
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Hashes `parts` in order. Different lists of the same length collide with probability 2^-64.
#[inline]
pub fn key(parts: &[u64]) -> u64 {
    let mut h = parts.len() as u64;
    for &p in parts {
        h = mix(h.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ mix(p.wrapping_add(0x632b_e59b_d9b4_e019)));
    }
    h
}

/// FNV-1a of a name, as a part of a key.
pub fn name(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Number `i` of the numbers that belong to `key`, each found alone (SplitMix64).
#[inline]
pub fn at(key: u64, i: u64) -> u64 {
    mix(key.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Rng([u64; 4]);

impl Rng {
    /// The stream of `key(parts)`.
    #[inline]
    pub fn new(parts: &[u64]) -> Self {
        let k = key(parts);
        Self([0, 1, 2, 3].map(|i| at(k, i)))
    }

    /// 64 uniform bits.
    #[inline]
    pub fn bits(&mut self) -> u64 {
        let s = &mut self.0;
        let out = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        out
    }

    /// Uniform in `0..n` by multiply and shift (bias below n / 2^64); 0 for `n == 0`.
    #[inline]
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }

    /// Uniform in `0..n` as an index.
    #[inline]
    pub fn index(&mut self, n: usize) -> usize {
        self.below(n as u64) as usize
    }

    /// Uniform in `[0, 1)` with 53 bits.
    #[inline]
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Shuffles in place (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.index(i + 1);
            items.swap(i, j);
        }
    }

    /// Pushes `k` distinct numbers of `low..high` to `out`, in random order. Asks for `k <= high - low`.
    pub fn distinct(&mut self, k: usize, low: u64, high: u64, out: &mut Vec<u64>) {
        let n = high - low;
        debug_assert!(k as u64 <= n);
        if k as u64 * 2 > n {
            let mut pool: Vec<u64> = (low..high).collect();
            for i in 0..k {
                let j = i + self.index(pool.len() - i);
                pool.swap(i, j);
                out.push(pool[i]);
            }
            return;
        }
        let mut seen = vec![0u64; (n as usize).div_ceil(64)];
        for _ in 0..k {
            loop {
                let x = self.below(n);
                let (word, bit) = ((x / 64) as usize, 1u64 << (x % 64));
                if seen[word] & bit == 0 {
                    seen[word] |= bit;
                    out.push(low + x);
                    break;
                }
            }
        }
    }
}

/// Draws without replacement with given integer weights: a binary tree of sums, `O(log n)` a draw.
#[derive(Clone, Debug)]
pub struct Urn {
    /// Heap layout, `sums[1]` is the total; leaves start at `leaves`.
    sums: Vec<u64>,
    leaves: usize,
}

impl Urn {
    /// An urn with item `i` of weight `weights[i]`.
    pub fn new(weights: &[u64]) -> Self {
        let leaves = weights.len().next_power_of_two();
        let mut sums = vec![0; 2 * leaves];
        sums[leaves..leaves + weights.len()].copy_from_slice(weights);
        for i in (1..leaves).rev() {
            sums[i] = sums[2 * i] + sums[2 * i + 1];
        }
        Self { sums, leaves }
    }

    /// Takes the contents of `full`, keeping the allocation.
    pub fn refill(&mut self, full: &Self) {
        self.sums.clone_from(&full.sums);
        self.leaves = full.leaves;
    }

    /// Draws one item and removes it; `None` when nothing with weight is left.
    #[inline]
    pub fn draw(&mut self, rng: &mut Rng) -> Option<usize> {
        if self.sums[1] == 0 {
            return None;
        }
        let mut at = rng.below(self.sums[1]);
        let mut i = 1;
        while i < self.leaves {
            let left = self.sums[2 * i];
            i = if at < left {
                2 * i
            } else {
                at -= left;
                2 * i + 1
            };
        }
        let weight = self.sums[i];
        let item = i - self.leaves;
        while i >= 1 {
            self.sums[i] -= weight;
            i /= 2;
        }
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_do_not_depend_on_each_other() {
        let first = |parts: &[u64]| Rng::new(parts).bits();
        assert_eq!(first(&[1, 2, 3]), first(&[1, 2, 3]));
        assert_ne!(first(&[1, 2, 3]), first(&[1, 3, 2]));
        assert_ne!(first(&[1, 2]), first(&[1, 2, 0]));
    }

    #[test]
    fn below_is_uniform() {
        let mut rng = Rng::new(&[7]);
        let mut seen = [0u32; 10];
        for _ in 0..100_000 {
            seen[rng.index(10)] += 1;
        }
        let chi2: f64 = seen
            .iter()
            .map(|&n| (f64::from(n) - 1e4).powi(2) / 1e4)
            .sum();
        assert!(chi2 < 27.9, "chi2 {chi2} with 9 degrees of freedom"); // 0.999 quantile
    }

    #[test]
    fn distinct_gives_distinct_numbers_of_the_range() {
        for (k, low, high) in [(0, 3, 3), (5, 10, 15), (4, 1, 4096), (4000, 1, 4096)] {
            let mut out = Vec::new();
            Rng::new(&[k as u64]).distinct(k, low, high, &mut out);
            let set: std::collections::BTreeSet<_> = out.iter().copied().collect();
            assert_eq!(set.len(), k);
            assert!(out.iter().all(|x| (low..high).contains(x)));
        }
    }

    #[test]
    fn the_urn_draws_by_weight_and_never_twice() {
        let full = Urn::new(&[1, 0, 3]);
        let (mut urn, mut rng, mut first) = (full.clone(), Rng::new(&[1]), [0u32; 3]);
        for _ in 0..40_000 {
            urn.refill(&full);
            let a = urn.draw(&mut rng).expect("two items");
            let b = urn.draw(&mut rng).expect("two items");
            assert_ne!(a, b);
            assert_eq!(urn.draw(&mut rng), None);
            first[a] += 1;
        }
        assert_eq!(first[1], 0);
        assert!((f64::from(first[2]) / 40_000.0 - 0.75).abs() < 0.01);
    }
}
