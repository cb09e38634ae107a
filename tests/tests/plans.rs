//! Plans and passes over random small models: no two live values overlap, no arena is below the live bound, and passes keep what
//! graphs mean.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use marimba_dsl::arbitrary::{Limits, arb_model};
use marimba_dsl::model::Model;
use marimba_dsl::{Source, parse_model};
use marimba_ir::arbitrary::{check_plan, meaning};
use marimba_ir::lower::{OptimizerConfig, Options, update};
use marimba_ir::pass::{Config, PIPELINE, RecomputePolicy, run_passes};
use marimba_ir::{DType, Graph, plan, verify};
use marimba_tests::graphs::training;
use proptest::prelude::*;
use std::time::Instant;

fn check(g: &Graph) {
    verify(g).unwrap_or_else(|e| panic!("{e}"));
    let p = plan(g);
    check_plan(g, &p).unwrap();
    assert!(p.live_bytes <= p.arena_bytes && p.arena_bytes <= p.total_bytes);
}

fn graphs(model: &Model) -> Vec<Graph> {
    [
        Options::train(2, 9),
        Options::prefill(2, 9, 16),
        Options::decode(2, 16),
    ]
    .iter()
    .map(|o| training(model, o).unwrap())
    .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn passes_keep_meaning_and_plans_are_sound(model in arb_model(Limits::default()), how in 0..3usize) {
        let config = Config {
            recompute: [RecomputePolicy::None, RecomputePolicy::Cheap, RecomputePolicy::Block][how].clone(),
            ..Config::default()
        };
        for mut g in graphs(&model) {
            check(&g);
            let before = meaning(&g);
            for pass in PIPELINE {
                g = (pass.run)(&g, &config).unwrap();
                check(&g);
                prop_assert_eq!(&meaning(&g), &before, "{}", pass.name);
            }
        }
    }

    #[test]
    fn the_optimiser_s_graph_is_sound(model in arb_model(Limits::default())) {
        let params = graphs(&model)[0].params.clone();
        let config = OptimizerConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1, clip: Some(1.0) };
        let g = update(&params, &config).unwrap();
        check(&g);
        let after = run_passes(&g, &Config::default()).unwrap();
        check(&after);
        prop_assert_eq!(meaning(&after), meaning(&g));
    }
}

/// Models of published size: the arena is within a tenth of what lives at once, and planning takes milliseconds.
#[test]
fn large_training_graphs_plan_tightly_and_fast() {
    for name in ["full-bamba-9b", "full-jamba"] {
        let path = format!("{}/golden/{name}.ron", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(path).unwrap();
        let model = parse_model(&Source::new(name, text), &[])
            .unwrap()
            .into_inner();
        let options = Options {
            compute: DType::Bf16,
            ..Options::train(1, 4096)
        };
        let start = Instant::now();
        let lowered = training(&model, &options).unwrap();
        println!("{name}: lowered in {:?}", start.elapsed());
        for recompute in [
            RecomputePolicy::None,
            RecomputePolicy::Cheap,
            RecomputePolicy::Block,
        ] {
            let config = Config {
                recompute,
                ..Config::default()
            };
            let mut g = lowered.clone();
            for pass in PIPELINE {
                let start = Instant::now();
                g = (pass.run)(&g, &config).unwrap();
                let took = start.elapsed();
                let start = Instant::now();
                verify(&g).unwrap();
                let p = plan(&g);
                println!(
                    "  {} in {took:?}, verified and planned in {:?}: arena {:.3} GiB, {:.4} of the bound",
                    pass.name,
                    start.elapsed(),
                    p.arena_bytes as f64 / (1u64 << 30) as f64,
                    p.arena_bytes as f64 / p.live_bytes as f64
                );
            }
            let start = Instant::now();
            let p = plan(&g);
            let took = start.elapsed();
            println!("  planned {} values in {took:?}", g.values.len());
            assert!(p.arena_bytes as f64 <= 1.1 * p.live_bytes as f64);
            // An order of magnitude above what it takes, for busy machines.
            assert!(took.as_millis() < 200, "{took:?}");
        }
    }
}
