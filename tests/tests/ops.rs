//! Every op, on every backend, against the reference: results, and gradients that the graph's own backward nodes compute against dfdx's
//! tape. Arenas are poisoned with NaN where the engine can.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use marimba_backend::dfdx::reference::{self, Arg};
use marimba_backend::dfdx::{Device, DfdxEngine};
use marimba_backend::{BackendError, CpuEngine, CudaEngine, Engine, HostTensor, Outputs};
use marimba_ir::op::*;
use marimba_ir::{
    DType, External, Graph, Param, ParamInit, Phase, Place, Type, ValueId, differentiate, dims,
    plan,
};
use marimba_tests::samples::{Gen, Sample, draw};
use marimba_tests::tolerance::{self, error_ratio};
use std::collections::BTreeSet;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Draws of each op.
const DRAWS: u64 = 64;

fn place(phase: Phase) -> Place {
    Place {
        path: "sample".into(),
        block: None,
        phase,
    }
}

/// A graph of one op: differentiated arguments are parameters, arguments written in place have memory of their own, others are
/// inputs.
struct Built {
    graph: Graph,
    results: Vec<ValueId>,
    inputs: Vec<(String, HostTensor)>,
    stored: Vec<(String, Type, HostTensor)>,
}

fn build(op: &Op, args: &[Option<Arg>], params: &[usize]) -> Built {
    let mut graph = Graph::new();
    let in_place: BTreeSet<usize> = (0..8)
        .filter_map(|r| match op.alias(r) {
            Some(Alias::InPlace { arg }) => Some(arg),
            Some(Alias::View { .. }) | None => None,
        })
        .collect();
    let (mut inputs, mut stored, mut slots) = (Vec::new(), Vec::new(), Vec::new());
    for (i, arg) in args.iter().enumerate() {
        let Some(arg) = arg else {
            slots.push(None);
            continue;
        };
        let name = format!("a{i}");
        let kind = if params.contains(&i) {
            External::Param
        } else if in_place.contains(&i) {
            External::State
        } else {
            External::Input
        };
        if kind == External::Input {
            inputs.push((name.clone(), arg.data.clone()));
        } else {
            let key = format!("{}:{name}", kind.word());
            stored.push((key, arg.ty.clone(), arg.data.clone()));
        }
        if kind == External::Param {
            graph.params.push(Param {
                name: name.clone(),
                ty: arg.ty.clone(),
                compute: DType::F32,
                init: ParamInit::Zeros,
                decay: false,
                trainable: true,
                active: (1, 1),
                path: name.clone(),
            });
        }
        slots.push(Some(graph.add_external(kind, &name, arg.ty.clone())));
    }
    let results = graph
        .push(op.clone(), slots, &place(Phase::Forward))
        .unwrap_or_else(|e| panic!("{e}"));
    Built {
        graph,
        results,
        inputs,
        stored,
    }
}

impl Built {
    /// Appends `loss = sum of results times cotangents`, each sum a product with a one-row weight, and differentiates it.
    fn differentiate(&mut self, cotangents: &[(usize, Vec<f32>)]) {
        let g = &mut self.graph;
        let at = place(Phase::Forward);
        let mut loss = None;
        for (k, c) in cotangents {
            let n = c.len();
            let row = Type::f32(dims![X 1, X n]);
            let name = format!("c{k}");
            let weight = g.add_external(External::Input, &name, row.clone());
            self.inputs.push((name, HostTensor::F32(c.clone())));
            let flat = g
                .push(
                    Reshape { dims: row.dims },
                    vec![Some(self.results[*k])],
                    &at,
                )
                .unwrap()[0];
            let sum = g
                .push(Linear, vec![Some(flat), Some(weight), None], &at)
                .unwrap()[0];
            let sum = g
                .push(Reshape { dims: dims![X 1] }, vec![Some(sum)], &at)
                .unwrap()[0];
            loss = Some(match loss {
                Some(l) => g
                    .push(Pointwise::add(), vec![Some(l), Some(sum)], &at)
                    .unwrap()[0],
                None => sum,
            });
        }
        let loss = loss.unwrap();
        g.outputs.push(("loss".into(), loss));
        differentiate(g, loss).unwrap();
        self.inputs
            .push(("grad_keep".into(), HostTensor::F32(vec![0.0])));
    }

    /// Loads and runs; gradient buffers start as NaN, which a factor of 0 must not read. (Rows of a parameter that no node reads are never
    /// written: they keep the zero of a new buffer.)
    fn run(&self, engine: &mut dyn Engine) -> Result<Outputs, BackendError> {
        let plan = plan(&self.graph);
        let program = engine.load(self.graph.clone(), plan)?;
        for (key, ty, data) in &self.stored {
            engine.write(key, ty, data)?;
        }
        for v in self.graph.value_ids() {
            let whole = !self.graph.nodes.iter().any(|n| matches!(n.op, Op::Rows(_)));
            if whole && self.graph.external(v) == Some(&External::Grad) {
                let ty = self.graph.ty(v);
                let nan = HostTensor::F32(vec![f32::NAN; ty.len()]);
                engine.write(&format!("grad:{}", self.graph.value(v).name), ty, &nan)?;
            }
        }
        let inputs: Vec<(&str, HostTensor)> = self
            .inputs
            .iter()
            .map(|(n, x)| (n.as_str(), x.clone()))
            .collect();
        engine.run(program, &inputs)
    }
}

fn engines() -> Vec<Box<dyn Engine>> {
    let mut cpu = CpuEngine::new(2).unwrap();
    cpu.set_poison(true);
    vec![Box::new(cpu), Box::new(DfdxEngine::<Device>::default())]
}

/// Does something with the engine of the GPU, emptied and poisoned; nothing (and says so once) where there is no GPU.
fn on_gpu(f: impl FnOnce(&mut dyn Engine)) {
    static GPU: OnceLock<Option<Mutex<CudaEngine>>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| match CudaEngine::new() {
        Ok(mut engine) => {
            engine.set_poison(true);
            Some(Mutex::new(engine))
        }
        Err(e) => {
            eprintln!("skipped on cuda: {e}");
            None
        }
    });
    if let Some(gpu) = gpu {
        let mut engine = gpu.lock().unwrap_or_else(PoisonError::into_inner);
        engine.clear();
        f(&mut *engine);
    }
}

fn compare(what: &str, got: &HostTensor, want: &HostTensor, tolerance: f64) {
    match (got, want) {
        (HostTensor::F32(got), HostTensor::F32(want)) => {
            let ratio = error_ratio(got, want);
            assert!(
                ratio <= tolerance,
                "{what}: error ratio {ratio:e}, at most {tolerance:e} is allowed\n got {:?}\nwant {:?}",
                &got[..got.len().min(12)],
                &want[..want.len().min(12)]
            );
        }
        _ => assert_eq!(got, want, "{what}"),
    }
}

/// Runs one sample on one engine; false where the engine says that it cannot.
fn check(engine: &mut dyn Engine, seed: u64, s: &Sample) -> bool {
    let name = s.op.name();
    let tolerance = tolerance::f32(name).unwrap();
    let what = |part: &str| {
        let types: Vec<String> = s
            .args
            .iter()
            .map(|a| a.as_ref().map_or("-".into(), |a| a.ty.to_string()))
            .collect();
        format!(
            "{name}({}) {} of seed {seed} on {}: {part}",
            s.op.attrs(),
            types.join(", "),
            engine.name()
        )
    };
    let what_of: Vec<String> = (0..8)
        .map(|k| what(&format!("result {k}")))
        .chain((0..12).map(|k| what(&format!("gradient of argument {k}"))))
        .collect();
    let mut g = Gen::new(seed ^ 0xc07a);
    let want = reference::op(&s.op, &s.args, None).unwrap();
    let mut forward = build(&s.op, &s.args, &[]);
    for (k, &r) in forward.results.iter().enumerate() {
        forward.graph.outputs.push((format!("r{k}"), r));
    }
    let got = match forward.run(engine) {
        Err(BackendError::Unsupported { .. }) => return false,
        other => other.unwrap_or_else(|e| panic!("{}: {e}", what_of[0])),
    };
    for (k, want) in want.results.iter().enumerate() {
        if !s.private.contains(&k) {
            compare(&what_of[k], &got[&format!("r{k}")], want, tolerance.forward);
        }
    }
    if s.cotangents.is_empty() {
        return true;
    }
    let cotangents: Vec<(usize, Vec<f32>)> = s
        .cotangents
        .iter()
        .map(|&k| (k, g.floats(want.results[k].len())))
        .collect();
    let mut by_result = vec![None; want.results.len()];
    for (k, c) in &cotangents {
        by_result[*k] = Some(HostTensor::F32(c.clone()));
    }
    let want = reference::op(&s.op, &s.args, Some(&by_result)).unwrap();
    let mut backward = build(&s.op, &s.args, &s.grads);
    backward.differentiate(&cotangents);
    backward
        .run(engine)
        .unwrap_or_else(|e| panic!("{}: {e}", what_of[8]));
    for &k in &s.grads {
        let got = engine
            .read(&format!("grad:a{k}"))
            .unwrap_or_else(|e| panic!("{}: {e}", what_of[8 + k]));
        let want = want.gradients[k].as_ref().unwrap();
        compare(&what_of[8 + k], &got, want, tolerance.backward);
    }
    true
}

fn suite(names: &[&str]) {
    for &name in names {
        for seed in 0..DRAWS {
            let s = draw(name, seed).unwrap();
            for engine in &mut engines() {
                let ran = check(engine.as_mut(), seed, &s);
                assert!(ran, "{name} does not run on {}", engine.name());
            }
            on_gpu(|engine| assert!(check(engine, seed, &s), "{name} does not run on cuda"));
        }
    }
}

#[test]
fn tokens_and_products() {
    suite(&["embed", "linear", "linear_cross_entropy", "cast"]);
}

#[test]
fn norms_and_positions() {
    suite(&["rms_norm", "rope", "mean_square", "stat"]);
}

#[test]
fn attention_and_its_cache() {
    suite(&["attention", "cache_write"]);
}

#[test]
fn tokens_drawn() {
    suite(&["draw"]);
}

#[test]
fn convolution() {
    suite(&["causal_conv1d"]);
}

#[test]
fn mamba1() {
    suite(&["selective_scan"]);
}

#[test]
fn mamba2() {
    suite(&["ssd"]);
}

#[test]
fn gated_delta() {
    suite(&["gated_delta"]);
}

#[test]
fn elementwise() {
    suite(&["pointwise"]);
}

#[test]
fn experts() {
    suite(&[
        "route",
        "balance",
        "dispatch",
        "gather_rows",
        "grouped_linear",
        "combine",
    ]);
}

#[test]
fn moves() {
    suite(&["concat", "split", "last", "reshape", "rows"]);
}

#[test]
fn updates() {
    suite(&["global_norm", "adamw"]);
}

/// Ops that only passes make, and what they must equal.
fn fused(seed: u64) -> Vec<(Op, Vec<Option<Arg>>, Vec<HostTensor>)> {
    let mut g = Gen::new(seed);
    let mut out = Vec::new();
    let float = |ty: Type, x: Vec<f32>| {
        Some(Arg {
            ty,
            data: HostTensor::F32(x),
        })
    };
    // beta * into + gradient, over all rows of `into` from `start`.
    let mixed = |into: &[f32], beta: f32, grad: &HostTensor, start: usize| {
        let mut y = into.to_vec();
        for (k, d) in grad.f32().iter().enumerate() {
            y[start + k] = beta * y[start + k] + d;
        }
        HostTensor::F32(y)
    };
    for beta in [0.0, 1.0] {
        let beta_arg = float(Type::scalar(), vec![beta]);
        // What a factor of 0 must not read is NaN.
        let mut buffer = |n: usize| match beta {
            0.0 => vec![f32::NAN; n],
            _ => g.floats(n),
        };
        let clean = |x: &[f32]| -> Vec<f32> {
            x.iter()
                .map(|&x| if x.is_nan() { 0.0 } else { x })
                .collect()
        };
        for name in ["embed", "linear", "grouped_linear", "linear_cross_entropy"] {
            let s = draw(name, seed).unwrap();
            let mut args = s.args.clone();
            if name == "linear" {
                args[2] = None;
            }
            let results = reference::op(&s.op, &args, None).unwrap().results;
            let cot: Vec<f32> = match name {
                "linear_cross_entropy" => vec![1.5],
                _ => Gen::new(seed + 1).floats(results[0].len()),
            };
            let mut by_result = vec![None; results.len()];
            by_result[0] = Some(HostTensor::F32(cot.clone()));
            let grads = reference::op(&s.op, &args, Some(&by_result))
                .unwrap()
                .gradients;
            let dw = grads[1].clone().unwrap();
            let w = args[1].as_ref().unwrap().ty.clone();
            let types: Vec<_> = args
                .iter()
                .map(|a| a.as_ref().map(|a| a.ty.clone()))
                .collect();
            let y =
                s.op.infer(&ArgTypes {
                    op: name,
                    types: &types,
                })
                .unwrap();
            let dy = float(y[0].clone(), cot);
            match &s.op {
                Op::Embed(_) => {
                    let into = buffer(w.len());
                    let want = mixed(&clean(&into), beta, &dw, 0);
                    let op = EmbedBwd {
                        vocab: w.dims[0],
                        accumulate: true,
                    };
                    let a = vec![args[0].clone(), dy, float(w, into), beta_arg.clone()];
                    out.push((op.into(), a, vec![want]));
                }
                Op::Linear(_) => {
                    // Rows outside are kept as they are, so they may not be NaN.
                    let (start, k) = (2, w.size(1));
                    let tall = Type::f32(dims![I w.size(0) + 5, D k]);
                    let mut into = Gen::new(seed + 2).floats(tall.len());
                    if beta == 0.0 {
                        into[start * k..start * k + w.len()].fill(f32::NAN);
                    }
                    let want = mixed(&clean(&into), beta, &dw, start * k);
                    let op = LinearDw {
                        start,
                        accumulate: true,
                    };
                    let a = vec![args[0].clone(), dy, float(tall, into), beta_arg.clone()];
                    out.push((op.into(), a, vec![want]));
                }
                Op::GroupedLinear(_) => {
                    let into = buffer(w.len());
                    let want = mixed(&clean(&into), beta, &dw, 0);
                    let op = GroupedLinearDw {
                        n_experts: w.size(0),
                        accumulate: true,
                    };
                    let a = vec![
                        args[0].clone(),
                        dy,
                        args[2].clone(),
                        float(w, into),
                        beta_arg.clone(),
                    ];
                    out.push((op.into(), a, vec![want]));
                }
                Op::LinearCrossEntropy(of) => {
                    for accumulate in [false, true] {
                        let into = buffer(w.len());
                        let want = match accumulate {
                            true => mixed(&clean(&into), beta, &dw, 0),
                            false => dw.clone(),
                        };
                        let mut all = results.clone();
                        all.extend([grads[0].clone().unwrap(), want]);
                        let mut a = args.clone();
                        a.push(dy.clone());
                        if accumulate {
                            a.extend([float(w.clone(), into), beta_arg.clone()]);
                        } else {
                            a.extend([None, None]);
                        }
                        let of = of.clone();
                        out.push((LinearCrossEntropyGrad { of, accumulate }.into(), a, all));
                    }
                }
                other => panic!("{} has no fused form", other.name()),
            }
        }
    }
    out
}

#[test]
fn gradients_written_over_buffers() {
    for seed in 0..DRAWS {
        for (op, args, want) in fused(seed) {
            let mut built = build(&op, &args, &[]);
            for (k, &r) in built.results.iter().enumerate() {
                built.graph.outputs.push((format!("r{k}"), r));
            }
            let run = |engine: &mut dyn Engine| {
                let got = built.run(engine).unwrap();
                for (k, want) in want.iter().enumerate() {
                    let what = format!("{} result {k} of seed {seed}", op.name());
                    let what = format!("{what} on {}", engine.name());
                    compare(&what, &got[&format!("r{k}")], want, 2e-5);
                }
            };
            let mut cpu = CpuEngine::new(2).unwrap();
            cpu.set_poison(true);
            run(&mut cpu);
            on_gpu(run);
        }
    }
}

/// A product in 8 bits of `a [M K]` and `b [N K]`, both as they are and transposed; with a bias, or added to rows from 2 of a buffer.
struct InEights {
    built: Built,
    sizes: (usize, usize, usize),
    buffer: Option<(Vec<f32>, f32)>,
}

const TALLER: usize = 5;

fn in_eights(seed: u64) -> InEights {
    let mut g = Gen::new(seed);
    let sizes = (1 + g.below(70), 1 + g.below(70), 1 + g.below(70));
    let (m, n, k) = sizes;
    let at = place(Phase::Forward);
    let (mut graph, mut inputs, mut stored) = (Graph::new(), Vec::new(), Vec::new());
    let mut args = Vec::new();
    for (name, rows, by, to) in [("a", m, 16.0, DType::E5m2), ("b", n, 1e-3, DType::E4m3)] {
        let ty = Type::f32(dims![B rows, K k]);
        let x = g.floats(ty.len()).iter().map(|x| x * by).collect();
        inputs.push((name.to_string(), HostTensor::F32(x)));
        let x = graph.add_external(External::Input, name, ty);
        let op = Narrow {
            to,
            plain: true,
            turned: true,
        };
        let r = graph.push(op, vec![Some(x)], &at).unwrap();
        for (what, &v) in ["scale", "q", "t"].iter().zip(&r) {
            graph.outputs.push((format!("{name}.{what}"), v));
        }
        args.extend([Some(r[1]), Some(r[0])]);
    }
    let buffer = g.flip().then(|| {
        let beta = g.pick(&[0.0, 0.5]);
        let mut into = g.floats((m + TALLER) * n);
        if beta == 0.0 {
            into[2 * n..(2 + m) * n].fill(f32::NAN);
        }
        (into, beta)
    });
    match &buffer {
        Some((into, beta)) => {
            let ty = Type::f32(dims![I m + TALLER, D n]);
            let v = graph.add_external(External::State, "into", ty.clone());
            stored.push(("state:into".to_string(), ty, HostTensor::F32(into.clone())));
            inputs.push(("beta".into(), HostTensor::F32(vec![*beta])));
            let beta = graph.add_external(External::Input, "beta", Type::scalar());
            args.extend([None, None, Some(v), Some(beta)]);
        }
        None => {
            let bias = HostTensor::F32(g.floats(n));
            inputs.push(("bias".into(), bias));
            let bias = graph.add_external(External::Input, "bias", Type::f32(dims![D n]));
            args.push(Some(bias));
        }
    }
    let op = LinearFp8 {
        y: Type::f32(dims![I m, D n]),
        k,
        exact: true,
        start: if buffer.is_some() { 2 } else { 0 },
        accumulate: buffer.is_some(),
    };
    let results = graph.push(op, args, &at).unwrap();
    graph.outputs.push(("y".into(), results[0]));
    InEights {
        built: Built {
            graph,
            results,
            inputs,
            stored,
        },
        sizes,
        buffer,
    }
}

/// Numbers of 8 bits are within half a step of what they stand for and the same in every way and on every backend; products are those of
/// these numbers.
#[test]
fn eights() {
    for seed in 0..DRAWS {
        let s = in_eights(seed);
        let (m, n, k) = s.sizes;
        let input = |name: &str| {
            let found = s.built.inputs.iter().find(|(n, _)| n == name);
            found.unwrap().1.f32().to_vec()
        };
        let check = |got: &Outputs, engine: &str, tolerance: f64| {
            let mut wide = Vec::new();
            for (name, rows, steps) in [("a", m, 8.0), ("b", n, 16.0)] {
                let x = input(name);
                let part = |what: &str| got[&format!("{name}.{what}")].f32().to_vec();
                let (scale, q, t) = (part("scale")[0], part("q"), part("t"));
                let (tall, across) = (rows.next_multiple_of(16), k.next_multiple_of(16));
                assert_eq!((q.len(), t.len()), (tall * across, tall * across));
                for e in 0..q.len() {
                    let (r, c) = (e / across, e % across);
                    assert_eq!(
                        q[e].to_bits(),
                        t[c * tall + r].to_bits(),
                        "{engine}: {r} {c}"
                    );
                    let want = if r < rows && c < k { x[r * k + c] } else { 0.0 };
                    let off = (q[e] * scale - want).abs();
                    // Half of a step, or of the least step there is.
                    let most = (want.abs() / steps).max(scale * 1e-3) * 1.00001;
                    assert!(off <= most, "{engine}: {} of {want}", q[e] * scale);
                }
                let row = |r: usize| q[r * across..r * across + k].iter().map(move |q| q * scale);
                wide.push((0..rows).flat_map(row).map(f64::from).collect::<Vec<f64>>());
            }
            let product = |i: usize, j: usize| -> f64 {
                (0..k)
                    .map(|p| wide[0][i * k + p] * wide[1][j * k + p])
                    .sum()
            };
            let want: Vec<f32> = match &s.buffer {
                Some((into, beta)) => (0..into.len())
                    .map(|e| match (e / n).checked_sub(2).filter(|&i| i < m) {
                        Some(i) if *beta == 0.0 => product(i, e % n) as f32,
                        Some(i) => (f64::from(beta * into[e]) + product(i, e % n)) as f32,
                        None => into[e],
                    })
                    .collect(),
                None => {
                    let bias = input("bias");
                    let all = (0..m * n).map(|e| product(e / n, e % n) as f32 + bias[e % n]);
                    all.collect()
                }
            };
            let what = format!("product {:?} of seed {seed} on {engine}", s.sizes);
            compare(&what, &got["y"], &HostTensor::F32(want), tolerance);
        };
        let mut cpu = CpuEngine::new(2).unwrap();
        cpu.set_poison(true);
        cpu.set_half_storage(true);
        let here = s.built.run(&mut cpu).unwrap();
        check(&here, "cpu", 1e-6);
        on_gpu(|engine| match s.built.run(engine) {
            Err(BackendError::Unsupported { why, .. }) => eprintln!("skipped on cuda: {why}"),
            there => {
                let there = there.unwrap_or_else(|e| panic!("{e}"));
                // Matrix units keep fewer bits of partial sums than f32 has.
                check(&there, "cuda", 1e-3);
                for (name, x) in here.iter().filter(|(name, _)| *name != "y") {
                    assert_eq!(x, &there[name], "{name} of seed {seed}");
                }
            }
        });
    }
}

/// Long rows: errors must not grow with their length.
#[test]
fn a_thousand_tokens() {
    let (t, mut g) = (1000, Gen::new(5));
    let mut arg = |dims: Vec<marimba_ir::Dim>, f: fn(f32) -> f32| {
        let ty = Type::f32(dims);
        let data = g.floats(ty.len()).into_iter().map(f).collect();
        Some(Arg {
            ty,
            data: HostTensor::F32(data),
        })
    };
    let same = |x: f32| x;
    let scan = Sample {
        op: SelectiveScan { chunk: 64 }.into(),
        args: vec![
            arg(dims![B 1, T t, I 3], same),
            arg(dims![B 1, T t, I 3], same),
            arg(dims![I 3, N 4], |x| -0.01 - x.abs()),
            arg(dims![B 1, T t, G 1, N 4], same),
            arg(dims![B 1, T t, G 1, N 4], same),
            None,
            None,
            None,
            None,
            None,
        ],
        grads: vec![0, 1, 2, 3, 4],
        cotangents: vec![0],
        private: vec![1],
    };
    let ssd = Sample {
        op: Ssd {
            chunk: 64,
            dt_limit: (0.0, f64::INFINITY),
        }
        .into(),
        args: vec![
            arg(dims![B 1, T t, H 2, P 3], same),
            arg(dims![B 1, T t, H 2], same),
            arg(dims![H 2], |x| -0.01 - x.abs()),
            arg(dims![B 1, T t, G 1, N 4], same),
            arg(dims![B 1, T t, G 1, N 4], same),
            None,
            None,
            None,
            None,
        ],
        grads: vec![0, 1, 2, 3, 4],
        cotangents: vec![0],
        private: vec![1],
    };
    let attention = Sample {
        op: Attention {
            scale: 0.5,
            window: None,
        }
        .into(),
        args: vec![
            arg(dims![B 1, T t, H 1, P 4], same),
            arg(dims![B 1, S t, G 1, P 4], same),
            arg(dims![B 1, S t, G 1, P 4], same),
            None,
            None,
        ],
        grads: vec![0, 1, 2],
        cotangents: vec![0],
        private: vec![],
    };
    for s in [scan, ssd, attention] {
        let mut cpu = CpuEngine::new(2).unwrap();
        cpu.set_poison(true);
        let ran = check(&mut cpu, 0, &s);
        assert!(ran, "{}", s.op.name());
        on_gpu(|engine| assert!(check(engine, 0, &s), "{}", s.op.name()));
    }
}

/// No op is missing: every name has samples here, or is reached by differentiating them.
#[test]
fn every_op_has_a_sample() {
    let mut reached = BTreeSet::new();
    for name in Op::NAMES {
        for seed in 0..DRAWS {
            let Some(s) = draw(name, seed) else { break };
            assert_eq!(s.op.name(), *name);
            assert!(tolerance::f32(name).is_some(), "{name} has no tolerance");
            let mut built = build(&s.op, &s.args, &s.grads);
            if !s.cotangents.is_empty() {
                let cotangents: Vec<(usize, Vec<f32>)> = s
                    .cotangents
                    .iter()
                    .map(|&k| (k, vec![0.0; built.graph.ty(built.results[k]).len()]))
                    .collect();
                built.differentiate(&cotangents);
            }
            reached.extend(built.graph.nodes.iter().map(|n| n.op.name()));
        }
    }
    reached.extend(fused(0).iter().map(|(op, _, _)| op.name()));
    let eights = in_eights(0).built.graph;
    reached.extend(eights.nodes.iter().map(|n| n.op.name()));
    let missing: Vec<&&str> = Op::NAMES
        .iter()
        .filter(|n| !reached.contains(**n))
        .collect();
    assert!(missing.is_empty(), "no sample of {missing:?}");
}

/// What the suite is for: a wrong answer is seen.
#[test]
#[should_panic(expected = "error ratio")]
fn a_wrong_answer_is_seen() {
    let x = HostTensor::F32(vec![1.0, 2.0, 3.0]);
    let y = HostTensor::F32(vec![1.0, 2.0, 3.001]);
    compare("x", &y, &x, 1e-5);
}

/// Rounding to a narrower type is compared by the reference's own test; backends that store only f32 refuse it when loaded.
#[test]
fn narrow_types_run_or_are_refused() {
    let arg = Arg {
        ty: Type::f32(dims![X 4]),
        data: HostTensor::F32(vec![1.0, -2.5, 0.1, 3.0]),
    };
    let op: Op = Cast { to: DType::Bf16 }.into();
    let mut built = build(&op, std::slice::from_ref(&Some(arg)), &[]);
    built.graph.outputs.push(("y".into(), built.results[0]));
    for engine in &mut engines() {
        match built.run(engine.as_mut()) {
            Ok(y) => assert_eq!(y["y"].f32(), [1.0, -2.5, 0.100_097_656, 3.0]),
            Err(e) => assert!(matches!(e, BackendError::Unsupported { .. }), "{e}"),
        }
    }
}
