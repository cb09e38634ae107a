//! Passes keep types, meaning and verifiability of random training graphs, and do what they are for.

use super::*;
use crate::arbitrary::{Kind, Sample, check_plan, forward, meaning, sample, training};
use crate::op::{Op, Pointwise, Un};
use crate::{DType, Phase, Place, Type, differentiate, plan, verify};
use proptest::prelude::*;

fn toy(layers: Vec<Kind>) -> Sample {
    Sample {
        layers,
        batch: 2,
        time: 16,
        d_model: 16,
        tied: true,
        dtype: DType::F32,
    }
}

fn all_kinds() -> Sample {
    toy(vec![
        Kind::Ffn,
        Kind::Attention,
        Kind::Ssd,
        Kind::Moe,
        Kind::Chain,
    ])
}

fn count(g: &Graph, name: &str) -> usize {
    g.nodes.iter().filter(|n| n.op.name() == name).count()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_pass_keeps_meaning(s in sample(), block in any::<bool>()) {
        let g = training(&s).unwrap();
        verify(&g).unwrap();
        let before = meaning(&g);
        let config = Config {
            recompute: if block { RecomputePolicy::Block } else { RecomputePolicy::None },
            ..Config::default()
        };
        let mut g = g;
        for pass in PIPELINE {
            g = (pass.run)(&g, &config).unwrap();
            if let Err(e) = verify(&g) {
                panic!("{}: {e}\n{g}", pass.name);
            }
            prop_assert_eq!(&meaning(&g), &before, "{}\n{}", pass.name, g);
            check_plan(&g, &plan(&g)).unwrap();
        }
    }

    #[test]
    fn probes_add_statistics_and_nothing_else(s in sample()) {
        let g = training(&s).unwrap();
        let before = meaning(&run_passes(&g, &Config::default()).unwrap());
        let config = Config { probe: Taps::All, probe_grads: true, ..Config::default() };
        let probed = run_passes(&g, &config).unwrap();
        let mut after = meaning(&probed);
        let stats = after.len();
        after.retain(|name, _| !name.starts_with("stat:"));
        prop_assert_eq!(stats - after.len(), g.taps.len() + before.len() - 1);
        prop_assert_eq!(after, before);
    }
}

#[test]
fn bf16_graphs_pass() {
    let g = training(&Sample {
        dtype: DType::Bf16,
        ..all_kinds()
    })
    .unwrap();
    let out = run_passes(&g, &Config::default()).unwrap();
    assert_eq!(meaning(&out), meaning(&g));
}

#[test]
fn loss_is_fused_and_gradients_are_folded() {
    let g = training(&all_kinds()).unwrap();
    let out = run_passes(&g, &Config::default()).unwrap();
    assert_eq!(count(&out, "linear_cross_entropy"), 0);
    assert_eq!(count(&out, "linear_cross_entropy_bwd"), 0);
    assert_eq!(count(&out, "linear_cross_entropy_grad"), 1);
    // No gradient of a matrix exists outside its buffer.
    for node in &out.nodes {
        let loose = match &node.op {
            Op::LinearDw(op) => !op.accumulate,
            Op::GroupedLinearDw(op) => !op.accumulate,
            Op::EmbedBwd(op) => !op.accumulate,
            Op::LinearCrossEntropyGrad(op) => !op.accumulate,
            _ => false,
        };
        assert!(!loose, "{}", crate::print::node(&out, node));
    }
    assert!(plan(&out).live_bytes < plan(&g).live_bytes);
}

#[test]
fn chains_fuse() {
    let at = Place {
        path: "x".into(),
        block: None,
        phase: Phase::Forward,
    };
    let mut g = Graph::new();
    let x = g.add_external(
        crate::External::Input,
        "x",
        Type::f32(crate::dims![B 4, D 8]),
    );
    let w = g.add_external(crate::External::Input, "w", Type::f32(crate::dims![D 8]));
    let mut v = g
        .push(Pointwise::mul(), vec![Some(x), Some(w)], &at)
        .unwrap()[0];
    for f in [Un::Exp, Un::Neg, Un::Silu] {
        v = g.push(Pointwise::map(f), vec![Some(v)], &at).unwrap()[0];
    }
    g.outputs.push(("y".into(), v));
    let out = run_passes(&g, &Config::default()).unwrap();
    assert_eq!(out.nodes.len(), 1, "{out}");
    assert_eq!(out.nodes[0].op.attrs(), "silu(-exp(x0*x1))");
    let off = run_passes(
        &g,
        &Config {
            fuse: false,
            ..Config::default()
        },
    )
    .unwrap();
    assert_eq!(off.nodes.len(), 4);
}

#[test]
fn fusion_lowers_traffic_and_never_the_memory_much() {
    let g = training(&all_kinds()).unwrap();
    let off = run_passes(
        &g,
        &Config {
            fuse: false,
            ..Config::default()
        },
    )
    .unwrap();
    let on = run_passes(&g, &Config::default()).unwrap();
    assert!(crate::cost::costs(&on).moved_bytes < crate::cost::costs(&off).moved_bytes);
    assert!(plan(&on).live_bytes <= plan(&off).live_bytes);
}

#[test]
fn dce_drops_what_nobody_reads() {
    let at = Place {
        path: "x".into(),
        block: None,
        phase: Phase::Forward,
    };
    let mut g = Graph::new();
    let x = g.add_external(crate::External::Input, "x", Type::f32(crate::dims![B 4]));
    let mut p = Pointwise::new(2);
    let (a, b) = (p.un(Un::Exp, 0), p.un(Un::Neg, 1));
    let y = g.add_external(crate::External::Input, "y", Type::f32(crate::dims![B 4]));
    let r = g
        .push(p.out(a).out(b), vec![Some(x), Some(y)], &at)
        .unwrap();
    g.push(Pointwise::map(Un::Exp), vec![Some(r[0])], &at)
        .unwrap();
    g.outputs.push(("y".into(), r[1]));
    let out = dce(&g, &Config::default()).unwrap();
    verify(&out).unwrap();
    assert_eq!(out.nodes.len(), 1);
    assert_eq!(out.nodes[0].op.attrs(), "-x0");
    assert_eq!(out.nodes[0].args.len(), 1);
}

#[test]
fn recomputation_lowers_memory_and_counts_its_operations() {
    let g = training(&toy(
        [Kind::Ffn, Kind::Attention, Kind::Ssd, Kind::Moe].repeat(4)
    ))
    .unwrap();
    let none = run_passes(&g, &Config::default()).unwrap();
    let block = Config {
        recompute: RecomputePolicy::Block,
        ..Config::default()
    };
    let block = run_passes(&g, &block).unwrap();
    let (a, b) = (crate::cost::costs(&none), crate::cost::costs(&block));
    assert_eq!(a.recompute_flops, 0.0);
    assert!(b.recompute_flops > 0.5 * a.forward_flops && b.recompute_flops < a.forward_flops);
    assert_eq!(a.model_flops(), b.model_flops());
    let cheap = Config {
        recompute: RecomputePolicy::Cheap,
        ..Config::default()
    };
    let cheap = run_passes(&g, &cheap).unwrap();
    let c = crate::cost::costs(&cheap).recompute_flops;
    assert!(c > 0.0 && c < 0.1 * a.forward_flops, "{c}");
    assert!(plan(&cheap).arena_bytes < plan(&none).arena_bytes);
    assert_eq!(meaning(&cheap), meaning(&g));
    let (most, least) = (plan(&none).arena_bytes, plan(&block).arena_bytes);
    assert!(least * 2 < most, "{least} of {most}");

    // Any budget in between is kept with less recomputation; one below says what would do.
    let budget = (most + least) / 2;
    let config = |b| Config {
        recompute: RecomputePolicy::Budget(b),
        ..Config::default()
    };
    let some = run_passes(&g, &config(budget)).unwrap();
    assert!(plan(&some).arena_bytes <= budget);
    let c = crate::cost::costs(&some).recompute_flops;
    assert!(c > 0.0 && c < b.recompute_flops);
    let free = run_passes(&g, &config(most)).unwrap();
    assert_eq!(crate::cost::costs(&free).recompute_flops, 0.0);
    match run_passes(&g, &config(1000)) {
        Err(PassError::Budget {
            budget_bytes: 1000,
            smallest_bytes,
        }) => {
            assert!(smallest_bytes <= least);
            run_passes(&g, &config(smallest_bytes)).unwrap();
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
}

#[test]
fn routing_is_never_repeated() {
    let g = training(&toy(vec![Kind::Moe; 3])).unwrap();
    let block = Config {
        recompute: RecomputePolicy::Block,
        ..Config::default()
    };
    let g = run_passes(&g, &block).unwrap();
    assert!(g.nodes.iter().any(|n| n.phase == Phase::Recompute));
    assert_eq!(count(&g, "route"), 3);
    assert_eq!(count(&g, "dispatch"), 3);
}

#[test]
fn activation_loss_reaches_the_taps() {
    let (g, loss) = forward(&all_kinds()).unwrap();
    let taps: Vec<ValueId> = Taps::Matching(vec!["layers[*].out".into()])
        .select(&g)
        .into_iter()
        .map(|(_, v)| v)
        .collect();
    assert_eq!(taps.len(), 5);
    let (mut g, loss) = add_activation_loss(&g, loss, &taps, "activation_loss_alpha").unwrap();
    g.outputs.push(("total_loss".into(), loss));
    differentiate(&mut g, loss).unwrap();
    verify(&g).unwrap();
    assert_eq!(count(&g, "mean_square"), 5);
    assert!(g.find_external("input", "activation_loss_alpha").is_some());
    let out = run_passes(&g, &Config::default()).unwrap();
    assert_eq!(meaning(&out), meaning(&g));
}

/// Small gradients are added at the end of the backward pass, one after the other; nothing else moved.
#[test]
fn small_gradients_are_gathered() {
    let g = training(&all_kinds()).unwrap();
    let out = run_passes(&g, &Config::default()).unwrap();
    let end = out.nodes.iter().rposition(|n| n.phase == Phase::Backward);
    let run = out.nodes[..=end.unwrap()]
        .iter()
        .rev()
        .take_while(|n| n.op.name() == "accumulate")
        .count();
    assert!(run > 5, "{run} in a row\n{out}");
    // Those that wait for a later sum into the same memory, or for nothing but a factor, stay.
    assert!(run + 2 >= count(&out, "accumulate"), "{run}\n{out}");
    let others = |g: &Graph| -> Vec<String> {
        let list = g.nodes.iter().filter(|n| n.op.name() != "accumulate");
        list.map(|n| format!("{} {}", n.op.name(), n.path))
            .collect()
    };
    let mut before = g.clone();
    for pass in &PIPELINE[..PIPELINE.len() - 1] {
        before = (pass.run)(&before, &Config::default()).unwrap();
    }
    assert_eq!(others(&out), others(&before));
}

/// Operands of products in 8 bits are narrowed once for all that read them, each way that one of these reads; where blocks are computed a
/// second time, once for each computation. Operations stay what they were.
#[test]
fn operands_are_narrowed_once() {
    let mut g = training(&Sample {
        dtype: DType::Bf16,
        d_model: 256,
        time: 128,
        ..all_kinds()
    })
    .unwrap();
    let plain = run_passes(&g, &Config::default()).unwrap();
    assert_eq!(count(&plain, "narrow"), 0);
    g.fp8 = true;
    for policy in [RecomputePolicy::None, RecomputePolicy::Block] {
        let config = Config {
            recompute: policy.clone(),
            ..Config::default()
        };
        let out = run_passes(&g, &config).unwrap();
        check_plan(&out, &plan(&out)).unwrap();
        assert!(!out.nodes.iter().any(|n| out.in_fp8(n)));
        let flops = crate::cost::costs(&out).model_flops();
        assert_eq!(flops, crate::cost::costs(&plain).model_flops());
        let products = count(&out, "linear_fp8");
        assert!(products > 10, "{products}");
        // By what is narrowed, to what, and whether in the second computation.
        let mut seen = std::collections::HashSet::new();
        let uses = out.uses();
        for node in &out.nodes {
            let Op::Narrow(op) = &node.op else { continue };
            let again = policy == RecomputePolicy::Block && node.phase != Phase::Forward;
            assert!(
                seen.insert((node.args[0], op.to, again)),
                "{}",
                crate::print::node(&out, node)
            );
            assert_eq!(
                node.results.len(),
                1 + usize::from(op.plain) + usize::from(op.turned)
            );
            assert!(node.results.iter().all(|r| !uses[r.index()].is_empty()));
            // What is made in forward is not kept for backward of a block that is computed again.
            for r in uses
                .iter()
                .zip(out.value_ids())
                .filter(|(_, v)| node.results.contains(v))
            {
                let phases = r.0.iter().map(|&n| out.node(n).phase);
                let kept = phases.filter(|p| *p != node.phase).count();
                let phase = node.phase == Phase::Forward && policy == RecomputePolicy::Block;
                assert!(!phase || kept == 0);
            }
        }
        // Less than one for each of the two operands of every product.
        assert!(
            seen.len() < 2 * products - products / 3,
            "{} of {products}",
            seen.len()
        );
    }
}
