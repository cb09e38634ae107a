//! Lowerings against published parameter counts, and gradients reaching every parameter.

use super::*;
use crate::{DType, External, Graph, differentiate};
use marimba_dsl::model::*;

fn norm() -> Norm {
    Norm {
        eps: 1e-5,
        zero_centered: false,
    }
}

fn attention(n_heads: usize, n_kv_heads: usize, head_dim: usize) -> Attention {
    Attention {
        n_heads,
        n_kv_heads,
        head_dim,
        rope: Some(Rope {
            theta: 1e4,
            dims: head_dim / 2,
            scaling: RopeScaling::None,
        }),
        window: None,
        qkv_bias: false,
        out_bias: false,
        scale: (head_dim as f64).powf(-0.5),
        qk_norm: None,
        key_multiplier: 1.0,
        output_gate: false,
    }
}

fn mamba2(n_heads: usize, head_dim: usize, d_state: usize) -> Mamba2 {
    Mamba2 {
        n_heads,
        head_dim,
        d_state,
        n_groups: 1,
        d_conv: 4,
        chunk_size: 64,
        conv_bias: true,
        in_proj_bias: false,
        out_proj_bias: false,
        dt_limit: (0.0, f64::INFINITY),
        dt_limit_in_decode: true,
        gate: GatedNorm::GateThenNorm { eps: 1e-5 },
        multipliers: [1.0; 5],
        dt_init: DtInit {
            min: 1e-3,
            max: 0.1,
            floor: 1e-4,
        },
        a_init: (1.0, 16.0),
    }
}

fn mamba1(d_inner: usize, d_state: usize, dt_rank: usize, n_heads: usize) -> Mamba1 {
    Mamba1 {
        d_inner,
        d_state,
        d_conv: 4,
        dt_rank,
        n_heads,
        conv_bias: true,
        in_proj_bias: false,
        out_proj_bias: false,
        dt_bc_norm: Some(DtBcNorm {
            eps: 1e-6,
            weighted: true,
        }),
        dt_init: DtInit {
            min: 1e-3,
            max: 0.1,
            floor: 1e-4,
        },
    }
}

fn glu(d_ff: usize) -> Ffn {
    Ffn::Glu(Glu {
        d_ff,
        act: Act::Silu,
        bias: false,
        gate_multiplier: 1.0,
        out_multiplier: 1.0,
    })
}

fn moe(n_experts: usize, top_k: usize, d_ff: usize) -> Ffn {
    Ffn::Moe(Box::new(Moe {
        n_experts,
        top_k,
        expert: Expert {
            d_ff,
            act: Act::Silu,
            gated: true,
        },
        router: Router {
            score: RouterScore::SoftmaxAll,
            normalize: false,
            correction_bias: false,
            n_groups: 1,
            top_groups: 1,
            scale: 1.0,
        },
        shared: None,
        latent: None,
        latent_bias: false,
        load_balance: 0.01,
    }))
}

fn model(vocab_size: usize, d_model: usize, parts: Vec<(&str, Mixer, Ffn)>) -> Model {
    let layers = parts
        .into_iter()
        .enumerate()
        .map(|(i, (name, mixer, ffn))| Layer {
            inject: None,
            mixer: Some(Sublayer {
                weights: format!("layers.{i}.mixer"),
                name: name.into(),
                norm: norm(),
                body: mixer,
                residual_multiplier: 1.0,
            }),
            ffn: Some(Sublayer {
                weights: format!("layers.{i}.ffn"),
                name: "ffn".into(),
                norm: norm(),
                body: ffn,
                residual_multiplier: 1.0,
            }),
        })
        .collect();
    Model {
        name: "test".into(),
        vocab_size,
        d_model,
        context_len: 4096,
        embedding: Embedding { multiplier: 1.0 },
        layers,
        decoder: None,
        final_norm: norm(),
        head: Head {
            tied: false,
            multiplier: 1.0,
        },
        init: Init {
            std: 0.02,
            scale_output: true,
        },
    }
}

fn total(m: &Model) -> usize {
    params(m).expect("lowers").iter().map(|p| p.ty.len()).sum()
}

/// Bamba-9B's config.json and the sum of its published shapes: 9,780,235,392.
#[test]
fn bamba_9b_has_its_published_parameter_count() {
    let layers = (0..32)
        .map(|i| {
            if [9, 18, 27].contains(&i) {
                ("attn", Mixer::Attention(attention(32, 8, 128)), glu(14336))
            } else {
                ("mamba", Mixer::Mamba2(mamba2(128, 64, 128)), glu(14336))
            }
        })
        .collect();
    assert_eq!(total(&model(128_256, 4096, layers)), 9_780_235_392);
}

/// Jamba-v0.1: 51,570,323,328 parameters, of which 12,110,311,296 work on one token.
#[test]
fn jamba_has_its_published_parameter_counts() {
    let layers = (0..32)
        .map(|i| {
            let ffn = if i % 2 == 1 {
                moe(16, 2, 14336)
            } else {
                glu(14336)
            };
            if i % 8 == 4 {
                ("attn", Mixer::Attention(attention(32, 8, 128)), ffn)
            } else {
                ("mamba", Mixer::Mamba1(mamba1(8192, 16, 256, 1)), ffn)
            }
        })
        .collect();
    let m = model(65_536, 4096, layers);
    assert_eq!(total(&m), 51_570_323_328);
    let active: usize = params(&m)
        .expect("lowers")
        .iter()
        .map(|p| p.ty.len() * p.active.0 / p.active.1)
        .sum();
    assert_eq!(active, 12_110_311_296);
}

fn zoo() -> Model {
    let delta = GatedDeltaNet {
        n_k_heads: 2,
        n_v_heads: 4,
        k_head_dim: 8,
        v_head_dim: 6,
        d_conv: 3,
        chunk_size: 16,
        norm_eps: 1e-6,
        dt_init: DtInit {
            min: 1e-3,
            max: 0.1,
            floor: 1e-4,
        },
        a_init: (1.0, 16.0),
    };
    let branch = |name: &str, mixer| Branch {
        name: name.into(),
        mixer,
        in_multiplier: 1.1,
        out_multiplier: 0.7,
    };
    let parallel = Mixer::Parallel(vec![
        branch("attn", Mixer::Attention(attention(4, 2, 8))),
        branch("mamba", Mixer::Mamba2(mamba2(4, 8, 16))),
    ]);
    let mut gated = attention(4, 2, 8);
    gated.output_gate = true;
    gated.qk_norm = Some(norm());
    model(
        64,
        32,
        vec![
            ("attn", Mixer::Attention(gated), glu(48)),
            ("mamba1", Mixer::Mamba1(mamba1(64, 8, 4, 2)), moe(4, 2, 24)),
            ("mamba2", Mixer::Mamba2(mamba2(4, 16, 8)), glu(48)),
            ("delta", Mixer::GatedDeltaNet(delta), moe(4, 1, 24)),
            ("parallel", parallel, glu(48)),
        ],
    )
}

/// Every trainable parameter of every mixer and of a decoder gets a gradient in its own buffer.
#[test]
fn gradients_reach_every_parameter() {
    let m = Model {
        decoder: Some(Decoder::LastState),
        ..zoo()
    };
    let mut g = lower(&m, &Options::train(2, 20)).expect("lowers");
    let loss = g.output("loss").expect("a loss");
    let names = differentiate(&mut g, loss).expect("differentiates");
    let missing: Vec<_> = g
        .params
        .iter()
        .filter(|p| p.trainable && !names.contains(&p.name))
        .map(|p| &p.name)
        .collect();
    assert!(missing.is_empty(), "no gradient for {missing:?}");
}

/// Prefill and decode carry the same states with the same types.
#[test]
fn prefill_and_decode_share_their_states() {
    let m = zoo();
    let states = |o: &Options| {
        let g = lower(&m, o).expect("lowers");
        let mut s: Vec<_> = g
            .values
            .iter()
            .filter(|v| matches!(v.def, crate::Def::External(External::State)))
            .map(|v| (v.name.clone(), v.ty.to_string()))
            .collect();
        s.sort();
        s
    };
    let prefill = states(&Options::prefill(2, 20, 40));
    assert_eq!(prefill, states(&Options::decode(2, 40)));
    assert!(
        prefill.iter().any(|(n, _)| n == "layers.4.mixer.attn.k"),
        "{prefill:?}"
    );
}

/// In bf16, matrices are read narrow and moved wide: the update writes each narrow parameter from its master, and everything that a
/// step reads or writes has the type that the other graph gives it.
#[test]
fn narrow_parameters_have_masters() {
    let m = zoo();
    let options = Options {
        compute: DType::Bf16,
        ..Options::train(2, 20)
    };
    let mut train = lower(&m, &options).expect("lowers");
    let loss = train.output("loss").expect("a loss");
    differentiate(&mut train, loss).expect("differentiates");
    crate::verify(&train).expect("a sound graph");
    let config = OptimizerConfig {
        betas: (0.9, 0.95),
        eps: 1e-8,
        weight_decay: 0.1,
        clip: Some(1.0),
    };
    let params = params_in(&m, DType::Bf16).expect("lowers");
    let step = update(&params, &config).expect("builds");
    crate::verify(&step).expect("a sound graph");
    let mut narrow = 0;
    for p in &params {
        let ty = |g: &Graph, word| g.find_external(word, &p.name).map(|v| g.ty(v).dtype);
        assert_eq!(p.ty.dtype, DType::F32, "{}", p.name);
        assert_eq!(ty(&train, "param"), Some(p.compute), "{}", p.name);
        if !p.trainable {
            continue;
        }
        assert_eq!(ty(&step, "param"), Some(p.compute), "{}", p.name);
        assert_eq!(ty(&train, "grad"), Some(DType::F32), "{}", p.name);
        let has_master = p.compute != DType::F32;
        assert_eq!(
            ty(&step, "master"),
            has_master.then_some(DType::F32),
            "{}",
            p.name
        );
        assert!(
            step.output(&format!("param:{}", p.name)).is_some(),
            "{}",
            p.name
        );
        narrow += usize::from(has_master);
    }
    // Matrices are narrow; norms, biases, routers, convolutions and decays are not.
    assert!(
        narrow > 10 && narrow < params.len(),
        "{narrow} of {}",
        params.len()
    );
}
