//! Multi-query associative recall (MQAR; Arora et al. 2023, "Zoology"): K key-value pairs, later asked for in another order.
//!
//! With T = 16, K = 3 (keys A B C, values 1 2 3; `.` is filler, `-` an ignored target):
//!
//! ```text
//! tokens   A 1 B 2 C 3 B . A . . . C . . .
//! targets  - - - - - - 2 - 1 - - - 3 - - -
//!          |-- pairs -|  queries, at even offsets g from the end of the pairs; gap g/2 + 1 has weight x^(a - 1)
//! ```
//!
//! Keys are distinct tokens of `[1, V/2)`, values of `[V/2, V)`. The target stands on the key token: predict its value.
//! Queries are drawn in the order of the pairs, without replacement. Source: `zoology/data/multiquery_ar.py`.
//!
//! Variants, ours: `n_reassigned` keys come a second time among the pairs with another value, and the last value counts (forgetting);
//! `composite_keys` makes every key two tokens of two alphabets and asks on the second (neither token alone decides).
//!
//! Differences from the reference: filler tokens never equal a key of the example unless `compat` is set (there, a filler key is a
//! question without a target); several passes over the pairs are not offered (they fail there).

use super::{Draw, refuse};
use crate::data::rng::{Rng, Urn};
use crate::data::rows::Split;
use crate::data::{DataError, EvalSet, Metric, RowMut};

/// One size of the task.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MqarCell {
    /// T of the example; shorter than the row, the rest of the row is token 0 without targets.
    pub seq_len: usize,
    /// K.
    pub n_pairs: usize,
    /// Share among the training cells, relative. Nothing in evaluation.
    pub weight: f64,
}

/// Parameters of MQAR.
#[derive(Clone, Debug, PartialEq)]
pub struct MqarSpec {
    /// V, even halves of which are keys and values.
    pub vocab_size: usize,
    /// T of training rows; every training cell fits in it.
    pub seq_len: usize,
    /// Training mix: each row draws its cell by weight.
    pub train: Vec<MqarCell>,
    /// Evaluation sets.
    pub eval: Vec<MqarCell>,
    /// a of the gap weights `x^(a - 1)`, x = 1, 2, ...; small values ask soon after the pairs. The reference's value is 0.01.
    pub power_a: f64,
    /// Fill the space between queries with random tokens instead of token 0.
    pub random_non_queries: bool,
    /// Keys that get a second value among the pairs.
    pub n_reassigned: usize,
    /// Keys of two tokens.
    pub composite_keys: bool,
    /// Reproduce the reference where it differs.
    pub compat: bool,
}

impl MqarSpec {
    /// The parameters of a checked run; `seq_len` stands in where the data leaves it open.
    pub fn from_data(d: &marimba_dsl::data::Mqar, seq_len: usize) -> Self {
        let seq_len = d.seq_len.unwrap_or(seq_len);
        let cell = |c: &marimba_dsl::data::MqarCell| MqarCell {
            seq_len: c.seq_len.unwrap_or(seq_len),
            n_pairs: c.n_pairs,
            weight: c.weight,
        };
        let only = || MqarCell {
            seq_len,
            n_pairs: d.n_pairs.unwrap_or(4),
            weight: 1.0,
        };
        let train: Vec<MqarCell> = if d.train.is_empty() {
            vec![only()]
        } else {
            d.train.iter().map(cell).collect()
        };
        let eval = if d.eval.is_empty() {
            train.clone()
        } else {
            d.eval.iter().map(cell).collect()
        };
        Self {
            vocab_size: d.vocab_size,
            seq_len,
            train,
            eval,
            power_a: d.power,
            random_non_queries: d.random_non_queries,
            n_reassigned: d.n_reassigned,
            composite_keys: d.composite_keys,
            compat: d.compat,
        }
    }
}

/// The task.
pub struct Mqar {
    spec: MqarSpec,
    train: Vec<Ready>,
    train_ends: Vec<f64>,
    eval: Vec<Ready>,
}

/// A checked cell with the gap weights at hand.
struct Ready {
    cell: MqarCell,
    gaps: Urn,
}

impl Mqar {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`DataError::Parameter`], one for the first parameter out of range.
    pub fn new(spec: MqarSpec) -> Result<Self, DataError> {
        let bad = refuse;
        if spec.train.is_empty() {
            return bad(
                "mqar has no training cell; expected at least one (seq_len, n_pairs)".into(),
            );
        }
        if !(spec.power_a > 0.0 && spec.power_a <= 10.0) {
            return bad(format!(
                "mqar power_a is {}; expected above 0, at most 10",
                spec.power_a
            ));
        }
        for cell in spec.train.iter().chain(&spec.eval) {
            let MqarCell {
                seq_len,
                n_pairs,
                weight,
            } = *cell;
            let head = spec.head_len(n_pairs);
            let space = seq_len.saturating_sub(head) / spec.stride();
            if n_pairs == 0 || spec.n_reassigned > n_pairs {
                return bad(format!(
                    "mqar cell has n_pairs {n_pairs} and n_reassigned {}; expected 1 or more pairs, and no more reassigned",
                    spec.n_reassigned
                ));
            }
            if space < n_pairs {
                let need = head + n_pairs * spec.stride();
                return bad(format!(
                    "mqar cell with n_pairs {n_pairs} does not fit in seq_len {seq_len}; expected seq_len {need} or more"
                ));
            }
            let (have, values) = (spec.n_keys(), spec.vocab_size.div_ceil(2));
            if n_pairs > have || n_pairs + spec.n_reassigned > spec.vocab_size - spec.vocab_size / 2
            {
                return bad(format!(
                    "mqar vocab_size {} has {have} keys and {values} values, too few for {n_pairs} pairs; expected vocab_size {} or more",
                    spec.vocab_size,
                    2 * (n_pairs + spec.n_reassigned + 1)
                ));
            }
            if !(weight > 0.0 && weight.is_finite()) {
                return bad(format!(
                    "mqar cell (seq_len {seq_len}, n_pairs {n_pairs}) has weight {weight}; expected a positive number"
                ));
            }
        }
        if let Some(cell) = spec.train.iter().find(|c| c.seq_len > spec.seq_len) {
            return bad(format!(
                "mqar training cell of seq_len {} is longer than the row of {}",
                cell.seq_len, spec.seq_len
            ));
        }
        let ready = |cell: &MqarCell| {
            let space = (cell.seq_len - spec.head_len(cell.n_pairs)) / spec.stride();
            // Rounded to integers so that no platform's powf decides a draw.
            let weights: Vec<u64> = (1..=space)
                .map(|x| {
                    ((x as f64).powf(spec.power_a - 1.0) * (1u64 << 32) as f64)
                        .round()
                        .max(1.0) as u64
                })
                .collect();
            Ready {
                cell: *cell,
                gaps: Urn::new(&weights),
            }
        };
        let (train, eval): (Vec<_>, Vec<_>) = (
            spec.train.iter().map(ready).collect(),
            spec.eval.iter().map(ready).collect(),
        );
        let total: f64 = spec.train.iter().map(|c| c.weight).sum();
        let mut sum = 0.0;
        let train_ends = spec
            .train
            .iter()
            .map(|c| {
                sum += c.weight / total;
                sum
            })
            .collect();
        Ok(Self {
            spec,
            train,
            train_ends,
            eval,
        })
    }

    /// The checked parameters.
    pub fn spec(&self) -> &MqarSpec {
        &self.spec
    }

    /// Draws one example into `out`, whose first `cell.seq_len` positions are used.
    fn example(&self, ready: &Ready, rng: &mut Rng, out: &mut RowMut<'_>) {
        let spec = &self.spec;
        let (k, half, vocab) = (
            ready.cell.n_pairs,
            (spec.vocab_size / 2) as u64,
            spec.vocab_size as u64,
        );
        let mut keys = Vec::with_capacity(2 * k);
        if spec.composite_keys {
            // Cells of the grid [1, q) x [q, V/2): first tokens from the lower quarter of V, second ones from the upper.
            let (q, mut cells) = (half / 2 + 1, Vec::with_capacity(k));
            let columns = half - q;
            rng.distinct(k, 0, (q - 1) * columns, &mut cells);
            keys.extend(
                cells
                    .iter()
                    .flat_map(|c| [1 + c / columns, q + c % columns]),
            );
        } else {
            rng.distinct(k, 1, half, &mut keys);
        }
        let width = keys.len() / k;
        let mut values = Vec::with_capacity(k + spec.n_reassigned);
        rng.distinct(k + spec.n_reassigned, half, vocab, &mut values);

        let mut at = 0;
        let mut put = |token: u64, at: &mut usize| {
            out.tokens[*at] = token as i32;
            *at += 1;
        };
        for pair in (0..k).chain(0..spec.n_reassigned).zip(&values) {
            for &token in &keys[pair.0 * width..][..width] {
                put(token, &mut at);
            }
            put(*pair.1, &mut at);
        }
        let head = at;
        let mut gaps = ready.gaps.clone();
        let mut filled = vec![false; ready.cell.seq_len];
        for pair in 0..k {
            let Some(gap) = gaps.draw(rng) else { break };
            let value = if pair < spec.n_reassigned {
                values[k + pair]
            } else {
                values[pair]
            };
            let mut at = head + gap * spec.stride();
            for &token in &keys[pair * width..][..width] {
                filled[at] = true;
                put(token, &mut at);
            }
            out.targets[at - 1] = value as i32;
        }
        if spec.random_non_queries {
            let mut is_key = vec![false; half as usize];
            for &key in &keys {
                is_key[key as usize] = !spec.compat;
            }
            for at in (head..ready.cell.seq_len).filter(|&at| !filled[at]) {
                out.tokens[at] = loop {
                    let token = rng.below(vocab);
                    if token >= half || !is_key[token as usize] {
                        break token as i32;
                    }
                };
            }
        }
    }
}

impl MqarSpec {
    /// Tokens of the pairs.
    fn head_len(&self, n_pairs: usize) -> usize {
        (n_pairs + self.n_reassigned) * if self.composite_keys { 3 } else { 2 }
    }

    /// Distance between possible query places.
    fn stride(&self) -> usize {
        if self.composite_keys { 3 } else { 2 }
    }

    fn n_keys(&self) -> usize {
        let half = self.vocab_size / 2;
        if self.composite_keys {
            let q = half / 2 + 1;
            (q - 1) * half.saturating_sub(q)
        } else {
            half.saturating_sub(1)
        }
    }
}

impl Draw for Mqar {
    fn vocab_size(&self) -> usize {
        self.spec.vocab_size
    }

    fn draw(&self, rng: &mut Rng, split: Split, out: &mut RowMut<'_>) {
        let ready = match split {
            Split::Train => {
                let u = rng.unit();
                &self.train[self
                    .train_ends
                    .partition_point(|&end| end <= u)
                    .min(self.train.len() - 1)]
            }
            Split::Eval(set) => &self.eval[set.min(self.eval.len() - 1)],
        };
        self.example(ready, rng, out);
    }

    fn eval_sets(&self, name: &str, _seq_len: usize, n_eval: u64) -> Vec<EvalSet> {
        let set = |r: &Ready| EvalSet {
            name: format!("{name}/T{}/K{}", r.cell.seq_len, r.cell.n_pairs),
            rows: n_eval,
            seq_len: r.cell.seq_len,
            metric: Metric::Accuracy,
        };
        self.eval.iter().map(set).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Task;
    use super::super::testing::{golden, score_on};
    use super::*;
    use crate::data::rows::Rows;
    use crate::data::{Batch, IGNORED};

    fn spec() -> MqarSpec {
        let cells = [4, 8, 16].map(|n_pairs| MqarCell {
            seq_len: 96,
            n_pairs,
            weight: 1.0,
        });
        MqarSpec {
            vocab_size: 64,
            seq_len: 96,
            ..MqarSpec::from_data(
                &marimba_dsl::data::Mqar {
                    ..Default::default()
                },
                96,
            )
        }
        .with_cells(cells.to_vec())
    }

    impl MqarSpec {
        fn with_cells(self, cells: Vec<MqarCell>) -> Self {
            Self {
                train: cells.clone(),
                eval: cells,
                ..self
            }
        }
    }

    fn task(change: impl FnOnce(&mut MqarSpec)) -> Task {
        let mut spec = spec();
        change(&mut spec);
        let (parameters, seq_len) = (format!("{spec:?}"), spec.seq_len);
        Task::new(
            Box::new(Mqar::new(spec).expect("valid")),
            "mqar",
            seq_len,
            None,
            10,
            0,
            &parameters,
        )
        .expect("valid")
    }

    /// The value after the last earlier occurrence of the key, from tokens alone.
    fn retrieve(tokens: &[i32], at: usize, width: usize) -> i32 {
        let key = &tokens[at + 1 - width..=at];
        let seen = (0..at + 1 - width)
            .rev()
            .find(|&i| &tokens[i..i + width] == key && tokens[i + width] >= 32);
        seen.map_or(-1, |i| tokens[i + width])
    }

    #[test]
    fn a_perfect_retriever_scores_1_and_a_random_one_chance() {
        for random_non_queries in [false, true] {
            let t = task(|s| s.random_non_queries = random_non_queries);
            assert_eq!(
                score_on(&t, Split::Train, |tokens, at| retrieve(tokens, at, 1)),
                1.0
            );
            let mut rng = Rng::new(&[3]);
            let chance = score_on(&t, Split::Train, |_, _| 32 + rng.below(32) as i32);
            assert!((chance - 1.0 / 32.0).abs() < 0.03, "{chance}");
        }
        let forgetting = task(|s| s.n_reassigned = 3);
        assert_eq!(
            score_on(&forgetting, Split::Train, |tokens, at| retrieve(
                tokens, at, 1
            )),
            1.0
        );
        let first = |tokens: &[i32], at: usize| {
            let i = tokens
                .iter()
                .position(|&t| t == tokens[at])
                .expect("the key itself");
            tokens[i + 1]
        };
        assert!(
            score_on(&forgetting, Split::Train, first) < 0.9,
            "the first value must not do"
        );
        let composite = task(|s| s.composite_keys = true);
        assert_eq!(
            score_on(&composite, Split::Train, |tokens, at| retrieve(
                tokens, at, 2
            )),
            1.0
        );
        assert!(
            score_on(&composite, Split::Train, |tokens, at| retrieve(
                tokens, at, 1
            )) < 0.9,
            "half a key must not do"
        );
    }

    #[test]
    fn the_layout_is_the_reference_s() {
        let t = task(|s| s.random_non_queries = false);
        let mut batch = Batch::blank(50, 96);
        for i in 0..50 {
            t.fill(Split::Train, i as u64, batch.row_mut(i))
                .expect("generates");
            let (tokens, targets) = (
                &batch.tokens[i * 96..][..96],
                &batch.targets[i * 96..][..96],
            );
            let k = targets.iter().filter(|&&t| t != IGNORED).count();
            assert!([4, 8, 16].contains(&k));
            let keys: std::collections::BTreeSet<_> = (0..k).map(|j| tokens[2 * j]).collect();
            assert_eq!(keys.len(), k);
            for (at, &target) in targets.iter().enumerate() {
                if target != IGNORED {
                    assert!(
                        at >= 2 * k
                            && (at - 2 * k) % 2 == 0
                            && keys.contains(&tokens[at])
                            && target >= 32
                    );
                } else if at >= 2 * k {
                    assert_eq!(tokens[at], 0);
                }
            }
        }
    }

    #[test]
    fn gaps_follow_the_power_law() {
        let t = task(|s| {
            s.train = vec![MqarCell {
                seq_len: 96,
                n_pairs: 1,
                weight: 1.0,
            }]
        });
        let (space, n) = (47, 40_000);
        let mut counts = vec![0f64; space];
        let mut batch = Batch::blank(1, 96);
        for i in 0..n {
            batch.targets.fill(IGNORED);
            t.fill(Split::Train, i, batch.row_mut(0))
                .expect("generates");
            let at = batch
                .targets
                .iter()
                .position(|&t| t != IGNORED)
                .expect("one query");
            counts[(at - 2) / 2] += 1.0;
        }
        let weight = |x: usize| ((x + 1) as f64).powf(-0.99);
        let total: f64 = (0..space).map(weight).sum();
        let chi2: f64 = (0..space)
            .map(|x| (n as f64 * weight(x) / total, counts[x]))
            .map(|(want, got)| (got - want).powi(2) / want)
            .sum();
        assert!(chi2 < 81.4, "chi2 {chi2} with 46 degrees of freedom"); // 0.999 quantile
    }

    #[test]
    fn the_sequence_is_golden() {
        let got = [
            golden(task(|_| ())),
            golden(task(|s| s.n_reassigned = 2)),
            golden(task(|s| s.composite_keys = true)),
        ];
        assert_eq!(
            got,
            ["19349017e28fb62e", "057a5ed472d54b90", "3fcf1dc6ef8e0989"]
        );
    }

    #[test]
    fn impossible_sizes_are_refused() {
        let refused = |change: fn(&mut MqarSpec)| {
            let mut spec = spec();
            change(&mut spec);
            Mqar::new(spec)
                .map(|_| ())
                .expect_err("refused")
                .to_string()
        };
        assert!(refused(|s| s.train[0].n_pairs = 25).contains("expected seq_len 100"));
        assert!(refused(|s| s.vocab_size = 4).contains("too few"));
        assert!(refused(|s| s.train.clear()).contains("no training cell"));
        assert!(refused(|s| s.train[0].weight = f64::NAN).contains("NaN"));
        assert!(refused(|s| s.power_a = 0.0).contains("power_a"));
        assert!(refused(|s| s.seq_len = 32).contains("longer than the row"));
    }
}
