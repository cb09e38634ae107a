//! The engine as a whole: a small model built by hand, differentiated, planned and run.

use super::testing::randn;
use super::*;
use marimba_ir::op::{
    AdamW, AdamWTensor, Combine, Dispatch, Embed, Gate, GatherRows, GlobalNorm, GroupedLinear,
    Linear, LinearCrossEntropy, Normalize, Pointwise, RmsNorm, Rope, Route, Score, Un,
};
use marimba_ir::{
    DType, External, Param, ParamInit, Phase, Place, ValueId, differentiate, dims, plan,
};

const T: usize = 12;
const D: usize = 16;
const F: usize = 24;
const V: usize = 11;
const E: usize = 3;

fn at(path: &str, phase: Phase) -> Place {
    Place {
        path: path.into(),
        block: None,
        phase,
    }
}

/// Names and types of the parameters.
fn params() -> Vec<(&'static str, Type)> {
    vec![
        ("embed", Type::f32(dims![V V, D D])),
        ("norm", Type::f32(dims![D D])),
        ("up", Type::f32(dims![F F, D D])),
        ("gate", Type::f32(dims![F F, D D])),
        ("down", Type::f32(dims![D D, F F])),
        ("router", Type::f32(dims![E E, D D])),
        ("experts", Type::f32(dims![E E, D D, D D])),
    ]
}

/// Embedding, norm, gated ffn, mixture of experts, tied head and loss; with an optimiser step when asked.
fn model(optimiser: bool) -> Graph {
    let mut g = Graph::new();
    let mut p = BTreeMap::new();
    for (name, ty) in params() {
        p.insert(name, g.add_external(External::Param, name, ty.clone()));
        g.params.push(Param {
            name: name.into(),
            ty,
            compute: DType::F32,
            init: ParamInit::Normal(0.3),
            decay: true,
            trainable: true,
            active: (1, 1),
            path: name.into(),
        });
    }
    let tokens = g.add_external(External::Input, "tokens", Type::i32(dims![B 1, T T]));
    let targets = g.add_external(External::Input, "targets", Type::i32(dims![B 1, T T]));
    let scale = g.add_external(External::Input, "scale", Type::scalar());
    fn push(g: &mut Graph, op: impl Into<marimba_ir::op::Op>, args: &[ValueId]) -> Vec<ValueId> {
        let args = args.iter().map(|&a| Some(a)).collect();
        g.push(op, args, &at("layer", Phase::Forward))
            .expect("a well-typed node")
    }
    let x = push(&mut g, Embed, &[tokens, p["embed"]])[0];
    let norm = RmsNorm {
        eps: 1e-5,
        group: D,
        zero_centered: false,
        gate: Gate::None,
    };
    let n = push(&mut g, norm, &[x, p["norm"]])[0];
    let gate = push(&mut g, Linear, &[n, p["gate"]])[0];
    let up = push(&mut g, Linear, &[n, p["up"]])[0];
    let h = push(&mut g, Pointwise::gate(Un::Silu), &[gate, up])[0];
    let down = push(&mut g, Linear, &[h, p["down"]])[0];
    let x = push(&mut g, Pointwise::add(), &[x, down])[0];
    let logits = push(&mut g, Linear, &[x, p["router"]])[0];
    let route = Route {
        top_k: 2,
        score: Score::SoftmaxAll,
        normalize: Normalize::Sum,
        n_groups: 1,
        top_groups: 1,
        scale: 1.0,
    };
    let r = push(&mut g, route, &[logits]);
    let s = push(&mut g, Dispatch { n_experts: E }, &[r[1]]);
    let rows = push(&mut g, GatherRows, &[x, s[0], s[1]])[0];
    let y = push(&mut g, GroupedLinear, &[rows, p["experts"], s[2]])[0];
    let tokens = dims![B 1, T T];
    let y = push(&mut g, Combine { tokens }, &[y, s[0], s[1], r[0]])[0];
    let x = push(&mut g, Pointwise::add(), &[x, y])[0];
    let ce = LinearCrossEntropy {
        multiplier: 1.0,
        z_loss: 0.0,
        z_all: false,
    };
    let loss = push(&mut g, ce, &[x, p["embed"], targets, scale]);
    g.outputs.push(("loss".into(), loss[0]));
    g.outputs.push(("nll".into(), loss[1]));
    if optimiser {
        let names = differentiate(&mut g, loss[0]).expect("derivatives");
        assert_eq!(names.len(), params().len());
        let grads: Vec<ValueId> = names
            .iter()
            .map(|n| g.output(&format!("grad:{n}")).expect("a gradient"))
            .collect();
        let place = at("optimiser", Phase::Update);
        let norm = g
            .push(GlobalNorm, grads.iter().map(|&v| Some(v)).collect(), &place)
            .expect("norm")[0];
        g.outputs.push(("grad_norm".into(), norm));
        let lr = g.add_external(External::Input, "lr", Type::scalar());
        let step = g.add_external(External::Input, "step", Type::scalar());
        let mut args = vec![Some(lr), Some(step), Some(norm)];
        for (name, grad) in names.iter().zip(grads) {
            let param = g.find_external("param", name).expect("a parameter");
            let ty = g.ty(param).clone();
            let m = g.add_external(External::Moment1, name, ty.clone());
            let v = g.add_external(External::Moment2, name, ty);
            args.extend([param, grad, m, v].map(Some));
        }
        let op = AdamW {
            copies: Vec::new(),
            betas: (0.9, 0.95),
            eps: 1e-8,
            clip: Some(1.0),
            tensors: names
                .iter()
                .map(|_| AdamWTensor {
                    decay: 0.01,
                    lr_scale: 1.0,
                })
                .collect(),
        };
        g.push(op, args, &place).expect("optimiser");
    }
    g
}

fn inputs(step: f32, lr: f32) -> Vec<(&'static str, HostTensor)> {
    vec![
        (
            "tokens",
            HostTensor::I32((0..T as i32).map(|i| (i * 5) % V as i32).collect()),
        ),
        (
            "targets",
            HostTensor::I32((0..T as i32).map(|i| (i * 3 + 1) % V as i32).collect()),
        ),
        ("scale", HostTensor::F32(vec![1.0 / T as f32])),
        ("grad_keep", HostTensor::F32(vec![0.0])),
        ("lr", HostTensor::F32(vec![lr])),
        ("step", HostTensor::F32(vec![step])),
    ]
}

fn engine(threads: usize, optimiser: bool) -> (CpuEngine, ProgramId) {
    let mut e = CpuEngine::new(threads).expect("an engine");
    e.set_poison(true);
    let g = model(optimiser);
    let plan = plan(&g);
    let program = e.load(g, plan).expect("it fits");
    for (i, (name, ty)) in params().into_iter().enumerate() {
        let data = randn(i as u64 + 1, ty.len())
            .iter()
            .map(|x| x * 0.4)
            .collect();
        e.write(&format!("param:{name}"), &ty, &HostTensor::F32(data))
            .expect("written");
    }
    (e, program)
}

fn loss(out: &Outputs) -> f32 {
    out["loss"].f32()[0]
}

/// The gradients that the poisoned engine leaves in its buffers are those of the loss that it computes.
#[test]
fn gradients_agree_with_central_differences() {
    let (mut e, program) = engine(2, true);
    let out = e.run(program, &inputs(1.0, 0.0)).expect("a run");
    let norm = out["grad_norm"].f32()[0];
    assert!(norm > 0.1 && !out.contains_key("grad:embed"));
    let (mut probe, forward) = engine(1, false);
    let mut squares = 0.0;
    for (name, ty) in params() {
        let key = format!("param:{name}");
        let grad = e
            .read(&format!("grad:{name}"))
            .expect("a gradient")
            .f32()
            .to_vec();
        squares += grad
            .iter()
            .map(|&g| f64::from(g) * f64::from(g))
            .sum::<f64>();
        let start = probe.read(&key).expect("a parameter").f32().to_vec();
        for k in 0..6 {
            let i = (k * 7919 + 13) % start.len();
            let mut at = |h: f32| {
                let mut p = start.clone();
                p[i] += h;
                probe
                    .write(&key, &ty, &HostTensor::F32(p))
                    .expect("written");
                // The rows' losses in f64: the scalar loss in f32 is too coarse for differences.
                let out = probe.run(forward, &inputs(1.0, 0.0)).expect("a run");
                out["nll"].f32().iter().map(|&n| f64::from(n)).sum::<f64>() / T as f64
            };
            let h = 4e-3;
            let numeric = (at(h) - at(-h)) / (2.0 * f64::from(h));
            let got = f64::from(grad[i]);
            assert!(
                (got - numeric).abs() < 2e-3 * (1.0 + numeric.abs()),
                "{name}[{i}]: {got}, not {numeric}"
            );
        }
        probe
            .write(&key, &ty, &HostTensor::F32(start))
            .expect("written");
    }
    assert!((f64::from(norm) - squares.sqrt()).abs() < 1e-5 * squares.sqrt());
}

/// Training lowers the loss, and gives the same bits for every number of threads and after a reload.
#[test]
fn training_is_reproducible() {
    let train = |threads: usize, steps: usize| {
        let (mut e, program) = engine(threads, true);
        let losses: Vec<f32> = (0..steps)
            .map(|i| {
                loss(
                    &e.run(program, &inputs(i as f32 + 1.0, 0.02))
                        .expect("a run"),
                )
            })
            .collect();
        (e, program, losses)
    };
    let (_, _, all) = train(1, 20);
    assert!(all[19] < 0.5 * all[0], "{all:?}");
    assert_eq!(all, train(2, 20).2);
    assert_eq!(all, train(3, 20).2);
    let (half, _, _) = train(2, 10);
    let (mut e, program) = engine(1, true);
    for (name, ty) in params() {
        for word in ["param", "moment1", "moment2"] {
            let key = format!("{word}:{name}");
            e.write(&key, &ty, &half.read(&key).expect("stored"))
                .expect("written");
        }
    }
    let rest: Vec<f32> = (10..20)
        .map(|i| {
            loss(
                &e.run(program, &inputs(i as f32 + 1.0, 0.02))
                    .expect("a run"),
            )
        })
        .collect();
    assert_eq!(rest, all[10..]);
}

#[test]
fn programs_share_parameters_but_not_inputs() {
    let (mut e, train) = engine(1, true);
    let g = model(false);
    let plan = plan(&g);
    let eval = e.load(g, plan).expect("it fits");
    let before = loss(&e.run(eval, &inputs(1.0, 0.0)).expect("a run"));
    assert_eq!(
        before,
        loss(&e.run(train, &inputs(1.0, 0.05)).expect("a run"))
    );
    assert!(loss(&e.run(eval, &inputs(1.0, 0.0)).expect("a run")) < before);
}

#[test]
fn the_first_non_finite_result_is_named() {
    let (mut e, program) = engine(1, false);
    assert_eq!(
        e.run_checked(program, &inputs(1.0, 0.0)).expect("a run"),
        None
    );
    let ty = Type::f32(dims![F F, D D]);
    let mut w = vec![0.1; F * D];
    w[5] = f32::INFINITY;
    e.write("param:up", &ty, &HostTensor::F32(w))
        .expect("written");
    let found = e
        .run_checked(program, &inputs(1.0, 0.0))
        .expect("a run")
        .expect("an infinity");
    assert_eq!(
        (found.op, found.path.as_str(), found.result),
        ("linear", "layer", 0)
    );
    assert!(found.count >= 1 && found.largest_arg > 0.0);
}

#[test]
fn wrong_inputs_are_errors() {
    let (mut e, program) = engine(1, false);
    let missing = e.run(program, &inputs(1.0, 0.0)[1..]);
    assert!(
        matches!(missing, Err(BackendError::WrongSize { name, found: 0, .. }) if name == "input:tokens")
    );
    let mut short = inputs(1.0, 0.0);
    short[0].1 = HostTensor::I32(vec![1]);
    assert!(matches!(
        e.run(program, &short),
        Err(BackendError::WrongSize { found: 1, .. })
    ));
    let mut floats = inputs(1.0, 0.0);
    floats[0].1 = HostTensor::F32(vec![1.0; T]);
    assert!(e.run(program, &floats).is_err());
    assert!(matches!(
        e.read("param:nothing"),
        Err(BackendError::Unknown { .. })
    ));
    let wrong = e.write(
        "param:norm",
        &Type::f32(dims![D 3]),
        &HostTensor::F32(vec![0.0; 3]),
    );
    assert!(matches!(
        wrong,
        Err(BackendError::WrongSize { found: 3, .. })
    ));
    assert!(matches!(
        e.run(ProgramId(9), &[]),
        Err(BackendError::Unknown { .. })
    ));
}

#[test]
fn too_large_a_plan_is_refused_before_anything_is_allocated() {
    let mut g = Graph::new();
    let x = g.add_external(External::Input, "x", Type::f32(dims![X 1]));
    let big = marimba_ir::op::Last;
    let y = g.add_external(
        External::State,
        "y",
        Type::f32(dims![B 1 << 26, T 1, D 1 << 20]),
    );
    let z = g
        .push(big, vec![Some(y)], &at("big", Phase::Forward))
        .expect("typed")[0];
    g.outputs.push(("z".into(), z));
    let _ = x;
    let plan = plan(&g);
    let mut e = CpuEngine::new(1).expect("an engine");
    match e.load(g, plan) {
        Err(BackendError::OutOfMemory {
            need,
            have,
            largest,
        }) => {
            assert_eq!(need, (2usize << 48) + 4);
            assert!(have < need && largest.contains("big (last)"), "{largest}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn plans_that_overlap_are_refused() {
    let g = model(true);
    let mut bad = plan(&g);
    for m in &mut bad.memory {
        if let marimba_ir::Memory::Arena { offset } = m {
            *offset = 0;
        }
    }
    let mut e = CpuEngine::new(1).expect("an engine");
    assert!(matches!(
        e.load(g.clone(), bad),
        Err(BackendError::BadPlan { .. })
    ));
    let mut small = plan(&g);
    small.arena_bytes /= 2;
    assert!(matches!(
        e.load(g, small),
        Err(BackendError::BadPlan { .. })
    ));
}

#[test]
fn element_types_other_than_f32_are_refused() {
    let mut g = Graph::new();
    let x = g.add_external(
        External::Input,
        "x",
        Type::new(DType::Bf16, dims![B 1, T 2, H 1, P 4]),
    );
    let inv = g.add_external(
        External::Const(vec![1.0, 0.1]),
        "inv",
        Type::f32(dims![X 2]),
    );
    let rope = Rope {
        dims: 4,
        factor: 1.0,
        inverse: false,
    };
    g.push(
        rope,
        vec![Some(x), None, Some(inv)],
        &at("rope", Phase::Forward),
    )
    .expect("typed");
    let plan = plan(&g);
    let mut e = CpuEngine::new(1).expect("an engine");
    assert!(matches!(
        e.load(g, plan),
        Err(BackendError::Unsupported { .. })
    ));
}

#[test]
fn a_profile_names_every_node() {
    let (mut e, program) = engine(2, true);
    let (out, times) = e.run_profiled(program, &inputs(1.0, 0.0)).expect("a run");
    assert!(loss(&out).is_finite());
    assert!(
        times
            .iter()
            .any(|t| t.op == "linear" && t.flops == (2 * T * D * F) as f64 && t.secs >= 0.0)
    );
    assert_eq!(times.last().map(|t| t.op), Some("adamw"));
}
