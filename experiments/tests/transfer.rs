//! Learning-rate transfer over widths: the coordinate check of the muP paper (arXiv 2203.03466, appendix D.1), on every kind of mixer.
//!
//! Models of four widths train a few steps at one learning rate. With transfer the size of every activation stays what it is in the
//! narrowest one, before and after the steps; without, it grows with the width.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use marimba_dsl::run::{Backend, Run};
use marimba_dsl::{Source, Valid, parse_run};
use marimba_experiments::data::{Worker, open};
use marimba_experiments::engine;
use marimba_experiments::train::Trainer;
use std::collections::BTreeMap;

const WIDTHS: [usize; 4] = [32, 64, 128, 256];
const LR: f64 = 3e-3;
const SEEDS: u64 = 4;

/// Four layers with a mixer each, every width in proportion to `d`.
fn model(d: usize) -> String {
    format!(
        r#"(name: "m", vocab_size: 48, d_model: {d}, n_layers: 4, context_len: 24, init: (std: 0.1),
            mixers: {{"attn": Attention(n_heads: 2), "m1": Mamba1(d_state: 8), "m2": Mamba2(head_dim: 16, d_state: 16, chunk_size: 8),
                      "gdn": GatedDeltaNet(n_k_heads: {h}, n_v_heads: {h}, k_head_dim: 16, v_head_dim: 16)}},
            ffns: {{"mlp": Glu(d_ff: {f}), "moe": Moe(n_experts: 4, top_k: 2, d_ff: {d})}},
            layout: (mixer: ["attn", "m1", "m2", "gdn"], ffn: Every(name: "moe", period: 2, offset: 1, rest: "mlp")))"#,
        h = d / 16,
        f = 2 * d
    )
}

fn run(d: usize, transfer: bool, seed: u64) -> Valid<Run> {
    let base = if transfer {
        format!("transfer: (base: {}),", model(WIDTHS[0]))
    } else {
        String::new()
    };
    let text = format!(
        "(name: \"r\", model: {}, {base} data: Mqar(vocab_size: 48, n_pairs: 6, random_non_queries: false), seq_len: 24, batch: 16, steps: 8,
          optimizer: (lr: {LR}), seed: {seed})",
        model(d)
    );
    parse_run(&Source::new("r.ron", text), &[]).unwrap_or_else(|r| panic!("{r}"))
}

/// Root mean square of every activation at the first and at the last step, by path.
fn activations(run: &Valid<Run>) -> [BTreeMap<String, f64>; 2] {
    let mut trainer = Trainer::new(run, engine::open(Backend::Cpu, 1).unwrap()).unwrap();
    let phase = &run.phases[0];
    let mut rows = open(&phase.data, phase.seq_len, run.seed, Worker::ALL).unwrap();
    let mut seen = [BTreeMap::new(), BTreeMap::new()];
    for step in 1..=phase.steps {
        let batch = rows.next(phase.batch).unwrap();
        let probe = step == 1 || step == phase.steps;
        let outcome = trainer.step(step, LR, &[batch], probe).unwrap();
        for (path, stats) in outcome.stats {
            if !path.starts_with("grad:") {
                seen[usize::from(step > 1)].insert(path, f64::from(stats[0]));
            }
        }
    }
    seen
}

/// Slope of each activation's size over the width, both in logarithms, as a mean over seeds: 0 is constant, 1 is in proportion.
fn slopes(transfer: bool) -> [BTreeMap<String, f64>; 2] {
    let mut out = [BTreeMap::new(), BTreeMap::new()];
    let xs: Vec<f64> = WIDTHS.iter().map(|&d| (d as f64).ln()).collect();
    let mean = xs.iter().sum::<f64>() / xs.len() as f64;
    let square: f64 = xs.iter().map(|x| (x - mean).powi(2)).sum();
    for seed in 0..SEEDS {
        for (&d, x) in WIDTHS.iter().zip(&xs) {
            let seen = activations(&run(d, transfer, seed));
            for (slopes, seen) in out.iter_mut().zip(seen) {
                for (path, size) in seen {
                    *slopes.entry(path).or_insert(0.0) +=
                        (x - mean) / square * size.ln() / SEEDS as f64;
                }
            }
        }
    }
    out
}

#[test]
fn activations_keep_their_size_over_widths() {
    let with = slopes(true);
    for (when, slopes) in ["first", "last"].into_iter().zip(&with) {
        for (path, slope) in slopes {
            println!("with transfer, {when} step: {path:26} {slope:+.2}");
        }
    }
    let without = slopes(false);
    for (path, slope) in &without[1] {
        println!("without, last step: {path:26} {slope:+.2}");
    }
    for slopes in &with {
        assert_eq!(slopes.len(), 15, "{slopes:?}");
        for (path, slope) in slopes {
            assert!(
                slope.abs() < 0.25,
                "{path} changes with the width to the power {slope}"
            );
        }
    }
    let most = without[1].values().copied().fold(0.0, f64::max);
    assert!(
        most > 0.5,
        "without transfer nothing grows: {:?}",
        without[1]
    );
}

#[test]
fn the_base_itself_is_untouched_and_others_follow_the_table() {
    use marimba_experiments::transfer::apply;
    use marimba_ir::ParamInit::Normal;
    let same = apply(&run(32, true, 0)).unwrap();
    assert!(same.lr.is_empty() && same.model == run(32, false, 0).model);
    let wide = apply(&run(128, true, 0)).unwrap();
    let find = |name: &str| wide.params.iter().find(|p| p.name.ends_with(name)).unwrap();
    let std = |name: &str| match find(name).init {
        Normal(std) => std,
        ref other => panic!("{name}: {other:?}"),
    };
    let lr = |name: &str| wide.lr.get(&find(name).name).copied();
    assert!((std("mixer.in_proj") - 0.1 / 2.0).abs() < 1e-12);
    assert_eq!(lr("mixer.in_proj"), Some(0.25));
    // Four experts at every width: an output of the paper.
    assert!((std("router") - 0.1 / 4.0).abs() < 1e-12);
    assert_eq!(lr("router"), Some(0.25));
    assert_eq!((std("embedding"), lr("embedding")), (0.1, None));
    assert_eq!(lr("conv"), None);
    assert_eq!(wide.model.head.multiplier, 0.25);
}

#[test]
fn a_base_of_another_shape_is_refused() {
    let mut other = run(64, true, 0).clone().into_inner();
    other.transfer.as_mut().unwrap().base.layers.pop();
    let words = marimba_experiments::transfer::apply(&other)
        .unwrap_err()
        .to_string();
    assert!(words.contains("4 layers and 3 in the base"), "{words}");
}
