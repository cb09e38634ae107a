//! Laws that hold for every model: decoding equals prefill equals the training forward, rows of a batch do not hear each other, packed
//! documents equal separate ones, the chunk size is a cost and nothing else. Models are random (`marimba_dsl::arbitrary`).

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use marimba_backend::{Engine, HostTensor};
use marimba_dsl::arbitrary::{Limits, arb_model};
use marimba_dsl::model::{Mixer, Model, RopeScaling};
use marimba_experiments::generate::{Session, Settings, generate};
use marimba_ir::lower::Logits;
use marimba_ir::pass::{Config, run_passes};
use marimba_ir::{Options, Param, ParamInit, lower, plan};
use proptest::prelude::*;

fn engine() -> Box<dyn Engine> {
    let mut cpu = marimba_backend::CpuEngine::new(2).unwrap();
    cpu.set_poison(true);
    Box::new(cpu)
}

/// Deterministic numbers in [-1, 1).
fn noise(seed: u64, i: usize) -> f32 {
    let mut z = seed
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(i as u64 + 1)
        .wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 32)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// Weights large enough that a mistake shows, small enough that nothing overflows.
fn weights(p: &Param, seed: u64) -> Vec<f32> {
    let last = p.ty.sizes().last().copied().unwrap_or(1) as f32;
    (0..p.ty.len())
        .map(|i| {
            let r = noise(seed, i);
            match p.init {
                ParamInit::Normal(_) | ParamInit::Uniform(_) => 1.7 * r / last.sqrt(),
                ParamInit::Zeros => 0.2 * r,
                ParamInit::Ones => 1.0 + 0.2 * r,
                ParamInit::LogUniformA(..) | ParamInit::LogArange => 0.7 + 0.7 * r,
                ParamInit::DtBias { .. } => -2.0 + r,
            }
        })
        .collect()
}

fn fresh(model: &Model) -> Box<dyn Engine> {
    let mut e = engine();
    for (k, p) in marimba_ir::lower::params(model).unwrap().iter().enumerate() {
        e.write(
            &format!("param:{}", p.name),
            &p.ty,
            &HostTensor::F32(weights(p, k as u64)),
        )
        .unwrap();
    }
    e
}

/// Logits `[B T V]` of the training forward.
fn forward(model: &Model, rows: &[Vec<i32>], pos: &[Vec<i32>]) -> Vec<f32> {
    let (b, t) = (rows.len(), rows[0].len());
    let options = Options {
        logits: Logits::All,
        router_loss: false,
        ..Options::train(b, t)
    };
    let graph = run_passes(&lower(model, &options).unwrap(), &Config::default()).unwrap();
    let plan = plan(&graph);
    let mut e = fresh(model);
    let id = e.load(graph, plan).unwrap();
    let flat = |x: &[Vec<i32>]| HostTensor::I32(x.concat());
    let inputs = [
        ("tokens", flat(rows)),
        ("pos", flat(pos)),
        ("targets", HostTensor::I32(vec![0; b * t])),
        ("loss_scale", HostTensor::F32(vec![1.0])),
    ];
    e.run(id, &inputs)
        .unwrap()
        .remove("logits")
        .unwrap()
        .f32()
        .to_vec()
}

fn counted(t: usize) -> Vec<i32> {
    (0..t as i32).collect()
}

fn tokens(model: &Model, t: usize, seed: u64) -> Vec<i32> {
    (0..t)
        .map(|i| ((noise(seed, i) + 1.0) * 0.499 * model.vocab_size as f32) as i32)
        .collect()
}

#[track_caller]
fn assert_close(what: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{what}");
    let scale = b.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
    let worst = a.iter().zip(b).fold(0f32, |m, (x, y)| {
        m.max(if (x - y).is_nan() {
            f32::INFINITY
        } else {
            (x - y).abs()
        })
    });
    assert!(worst <= 1e-4 * scale, "{what}: {worst} of {scale}");
}

/// Switches that break the laws on purpose are off: they reproduce what other programs do.
fn lawful(mut model: Model) -> Model {
    fn mixer(m: &mut Mixer) {
        match m {
            Mixer::Mamba2(s) => s.dt_limit_in_decode = true,
            Mixer::Attention(a) => {
                if let Some(r) = a
                    .rope
                    .as_mut()
                    .filter(|r| matches!(r.scaling, RopeScaling::LongRope { .. }))
                {
                    r.scaling = RopeScaling::None;
                }
            }
            Mixer::Parallel(all) => all.iter_mut().for_each(|b| mixer(&mut b.mixer)),
            Mixer::Mamba1(_) | Mixer::GatedDeltaNet(_) => {}
        }
    }
    for l in &mut model.layers {
        if let Some(s) = &mut l.mixer {
            mixer(&mut s.body);
        }
        if let Some(inject) = &mut l.inject
            && let Some(r) = inject.mixer.rope.as_mut()
        {
            r.scaling = RopeScaling::None;
        }
    }
    model
}

fn rechunked(model: &Model, chunk: usize) -> Model {
    fn mixer(m: &mut Mixer, chunk: usize) {
        match m {
            Mixer::Mamba2(s) => s.chunk_size = chunk,
            Mixer::GatedDeltaNet(s) => s.chunk_size = chunk,
            Mixer::Parallel(all) => all.iter_mut().for_each(|b| mixer(&mut b.mixer, chunk)),
            Mixer::Attention(_) | Mixer::Mamba1(_) => {}
        }
    }
    let mut model = model.clone();
    model
        .layers
        .iter_mut()
        .filter_map(|l| l.mixer.as_mut())
        .for_each(|s| mixer(&mut s.body, chunk));
    model
}

fn model() -> impl Strategy<Value = Model> {
    arb_model(Limits {
        max_layers: 3,
        max_width_units: 2,
        ..Limits::default()
    })
    .prop_map(lawful)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn decoding_is_prefill_is_the_training_forward(m in model(), t in 2usize..14, split in 0.0f64..1.0) {
        let row = tokens(&m, t, 5);
        let v = m.vocab_size;
        let all = forward(&m, std::slice::from_ref(&row), &[counted(t)]);
        let first = 1 + ((t - 1) as f64 * split) as usize;
        let mut e = fresh(&m);
        let mut s = Session::new(e.as_mut(), &m, 1, t);
        let mut logits = s.prefill(&[row[..first].to_vec()]).unwrap();
        for k in first..=t {
            assert_close(&format!("token {k} after a prefill of {first}"), &logits, &all[(k - 1) * v..k * v]);
            if k < t {
                logits = s.step(&[row[k]]).unwrap();
            }
        }
    }

    #[test]
    fn rows_of_a_batch_do_not_hear_each_other(m in model(), lens in proptest::collection::vec(1usize..9, 2..4)) {
        let prompts: Vec<Vec<i32>> = lens.iter().enumerate().map(|(i, n)| tokens(&m, *n, i as u64)).collect();
        let next: Vec<Vec<i32>> = (0..3).map(|k| tokens(&m, prompts.len(), 50 + k)).collect();
        let longest = lens.iter().max().unwrap();
        let mut together: Vec<Vec<f32>> = Vec::new();
        {
            let mut e = fresh(&m);
            let mut s = Session::new(e.as_mut(), &m, prompts.len(), longest + 3);
            together.push(s.prefill(&prompts).unwrap());
            for n in &next {
                together.push(s.step(n).unwrap());
            }
        }
        let v = m.vocab_size;
        for (i, p) in prompts.iter().enumerate() {
            let mut e = fresh(&m);
            let mut s = Session::new(e.as_mut(), &m, 1, longest + 3);
            let mut alone = s.prefill(std::slice::from_ref(p)).unwrap();
            for (k, both) in together.iter().enumerate() {
                assert_close(&format!("row {i}, step {k}"), &both[i * v..(i + 1) * v], &alone);
                if k < next.len() {
                    alone = s.step(&[next[k][i]]).unwrap();
                }
            }
        }
    }

    #[test]
    fn packed_documents_are_separate_documents(m in model(), lens in proptest::collection::vec(1usize..8, 1..4)) {
        let docs: Vec<Vec<i32>> = lens.iter().enumerate().map(|(i, n)| tokens(&m, *n, 9 + i as u64)).collect();
        let packed = forward(&m, &[docs.concat()], &[lens.iter().flat_map(|n| counted(*n)).collect()]);
        let mut at = 0;
        for d in &docs {
            let alone = forward(&m, std::slice::from_ref(d), &[counted(d.len())]);
            assert_close("document", &packed[at..at + alone.len()], &alone);
            at += alone.len();
        }
    }

    #[test]
    fn the_chunk_size_is_no_part_of_the_result(m in model(), t in 2usize..40, chunk in 1usize..33) {
        let row = vec![tokens(&m, t, 3)];
        let pos = vec![counted(t)];
        assert_close("logits", &forward(&rechunked(&m, chunk), &row, &pos), &forward(&rechunked(&m, 16), &row, &pos));
    }
}

/// Greedy continuations of prompts of different lengths are those of each prompt alone, LongRoPE's switch included.
#[test]
fn a_ragged_batch_says_what_each_prompt_says_alone() {
    use marimba_dsl::{Source, parse_model};
    for scaling in [
        "None",
        "LongRope(short_factor: [1.0, 1.1], long_factor: [2.0, 3.0], original_context_len: 8)",
    ] {
        let text = format!(
            r#"(
                vocab_size: 40, d_model: 16, n_layers: 3, context_len: 32,
                mixers: {{
                    "attn": Attention(n_heads: 2, rope: (dims: 4, scaling: {scaling})),
                    "mamba": Mamba2(head_dim: 8, d_state: 8),
                }},
                ffns: {{ "mlp": Glu(d_ff: 24) }},
                layout: (mixer: ["attn", "mamba", "attn"], ffn: "mlp"),
            )"#
        );
        let m = parse_model(&Source::new("test", text), &[]).unwrap_or_else(|e| panic!("{e}"));
        let prompts: Vec<Vec<i32>> = [3, 6, 1]
            .iter()
            .map(|n| tokens(&m, *n, *n as u64))
            .collect();
        let settings = Settings {
            max_new_tokens: 6,
            ..Settings::default()
        };
        let mut heard = 0;
        let together = generate(fresh(&m).as_mut(), &m, &prompts, &settings, &mut |_, _| {
            heard += 1
        })
        .unwrap();
        assert_eq!(heard, 18);
        for (p, said) in prompts.iter().zip(&together) {
            let alone = generate(
                fresh(&m).as_mut(),
                &m,
                std::slice::from_ref(p),
                &settings,
                &mut |_, _| (),
            )
            .unwrap();
            assert_eq!(&alone[0], said);
            // And what a full forward over everything said so far would choose.
            let mut all = p.clone();
            for t in said {
                let logits = forward(&m, std::slice::from_ref(&all), &[counted(all.len())]);
                let last = &logits[(all.len() - 1) * m.vocab_size..];
                assert_eq!(marimba_experiments::generate::argmax(last), *t);
                all.push(*t);
            }
        }
    }
}

/// The law of packed rows for attention by itself, with a window and without, so that no draw of random models can miss it.
#[test]
fn attention_never_looks_into_the_document_before() {
    for window in ["None", "3"] {
        let text = format!(
            "( vocab_size: 32, d_model: 16, n_layers: 1, context_len: 32, init: (std: 0.5), \
             mixers: {{ \"attn\": Attention(n_heads: 2, window: {window}) }} )"
        );
        let source = marimba_dsl::Source::new("law.ron", text);
        let m = marimba_dsl::parse_model(&source, &[]).unwrap_or_else(|r| panic!("{r}"));
        let docs = [tokens(&m, 5, 1), tokens(&m, 9, 2)];
        let pos: Vec<i32> = docs.iter().flat_map(|d| counted(d.len())).collect();
        let packed = forward(&m, &[docs.concat()], &[pos]);
        let mut at = 0;
        for d in &docs {
            let alone = forward(&m, std::slice::from_ref(d), &[counted(d.len())]);
            assert_close("document", &packed[at..at + alone.len()], &alone);
            at += alone.len();
        }
    }
}
