//! Random small models for property tests: every mixer, ffn, norm, option and layout feature that a [`Model`] can hold.
//!
//! Models are built resolved, not parsed; that they are valid is itself tested (their text checks to an equal model).

use crate::model::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

/// Bounds on what is generated.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most layers.
    pub max_layers: usize,
    /// Widths are multiples of 8 up to 8 times this.
    pub max_width_units: usize,
    /// Most tokens of vocabulary.
    pub max_vocab: usize,
    /// With sharing, injection and parallel groups.
    pub sharing: bool,
    /// With mixtures of experts.
    pub moe: bool,
    /// With mixers other than attention, Mamba-1 and Mamba-2.
    pub delta_net: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            max_layers: 4,
            max_width_units: 4,
            max_vocab: 40,
            sharing: true,
            moe: true,
            delta_net: true,
        }
    }
}

/// Numbers that are not round, in a range where nothing overflows.
fn factor() -> BoxedStrategy<f64> {
    prop_oneof![3 => Just(1.0), 1 => 0.25f64..2.0].boxed()
}

fn eps() -> BoxedStrategy<f64> {
    prop_oneof![Just(1e-5), Just(1e-6), 1e-6f64..1e-4].boxed()
}

fn norm() -> BoxedStrategy<Norm> {
    (eps(), prop::bool::weighted(0.2))
        .prop_map(|(eps, zero_centered)| Norm { eps, zero_centered })
        .boxed()
}

fn act() -> BoxedStrategy<Act> {
    prop_oneof![
        Just(Act::Silu),
        Just(Act::Gelu),
        Just(Act::GeluTanh),
        Just(Act::Relu),
        Just(Act::Relu2)
    ]
    .boxed()
}

fn scaling(dims: usize) -> BoxedStrategy<RopeScaling> {
    let factors = || vec(1.0f64..4.0, dims / 2);
    prop_oneof![
        4 => Just(RopeScaling::None),
        1 => (1.0f64..8.0).prop_map(|factor| RopeScaling::Linear { factor }),
        1 => (1.0f64..8.0, 4usize..64).prop_map(|(factor, original_context_len)| RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context_len,
        }),
        1 => (1.0f64..8.0, 4usize..64, any::<bool>(), 0.5f64..1.5).prop_map(|(factor, original_context_len, truncate, attention_factor)| {
            RopeScaling::Yarn { factor, original_context_len, beta_fast: 32.0, beta_slow: 1.0, attention_factor, truncate }
        }),
        1 => (factors(), factors(), 4usize..64, 0.5f64..1.5, any::<bool>()).prop_map(
            |(short_factor, long_factor, original_context_len, attention_factor, recompute_on_crossing)| RopeScaling::LongRope {
                short_factor,
                long_factor,
                original_context_len,
                attention_factor,
                recompute_on_crossing,
            }
        ),
    ]
    .boxed()
}

fn attention() -> BoxedStrategy<Attention> {
    let heads = prop_oneof![
        Just((1, 1)),
        Just((2, 1)),
        Just((2, 2)),
        Just((4, 2)),
        Just((6, 3))
    ];
    (
        heads,
        prop_oneof![Just(4usize), Just(8)],
        option::weighted(0.6, prop_oneof![Just(2usize), Just(4)]),
    )
        .prop_flat_map(|((n_heads, n_kv_heads), head_dim, dims)| {
            let rope = match dims {
                None => Just(None).boxed(),
                Some(dims) => (prop_oneof![Just(10_000.0), 100.0f64..1e6], scaling(dims))
                    .prop_map(move |(theta, scaling)| {
                        Some(Rope {
                            theta,
                            dims,
                            scaling,
                        })
                    })
                    .boxed(),
            };
            let default_scale = (head_dim as f64).powf(-0.5);
            (
                rope,
                option::weighted(0.4, 1usize..12),
                (any::<bool>(), any::<bool>()),
                prop_oneof![3 => Just(default_scale), 1 => 0.1f64..1.0],
                option::weighted(0.2, norm()),
                factor(),
                prop::bool::weighted(0.2),
            )
                .prop_map(
                    move |(
                        rope,
                        window,
                        (qkv_bias, out_bias),
                        scale,
                        qk_norm,
                        key_multiplier,
                        output_gate,
                    )| Attention {
                        n_heads,
                        n_kv_heads,
                        head_dim,
                        rope,
                        window,
                        qkv_bias,
                        out_bias,
                        scale,
                        qk_norm,
                        key_multiplier,
                        output_gate,
                    },
                )
        })
        .boxed()
}

fn dt_init() -> BoxedStrategy<DtInit> {
    prop_oneof![
        Just(DtInit {
            min: 1e-3,
            max: 0.1,
            floor: 1e-4
        }),
        Just(DtInit {
            min: 0.01,
            max: 0.05,
            floor: 1e-3
        })
    ]
    .boxed()
}

fn mamba1() -> BoxedStrategy<Mamba1> {
    let shape = (
        prop_oneof![Just(1usize), Just(2)],
        1usize..4,
        1usize..5,
        1usize..5,
        1usize..5,
    );
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    let inner_norm = option::weighted(
        0.4,
        (eps(), any::<bool>()).prop_map(|(eps, weighted)| DtBcNorm { eps, weighted }),
    );
    (shape, flags, inner_norm, dt_init())
        .prop_map(
            |(
                (n_heads, width, d_state, d_conv, dt_rank),
                (conv_bias, in_proj_bias, out_proj_bias),
                dt_bc_norm,
                dt_init,
            )| Mamba1 {
                d_inner: n_heads * width * 4,
                d_state,
                d_conv,
                dt_rank,
                n_heads,
                conv_bias,
                in_proj_bias,
                out_proj_bias,
                dt_bc_norm,
                dt_init,
            },
        )
        .boxed()
}

fn mamba2() -> BoxedStrategy<Mamba2> {
    let heads = prop_oneof![
        Just((1usize, 1usize)),
        Just((2, 1)),
        Just((4, 2)),
        Just((3, 3))
    ];
    let shape = (
        heads,
        prop_oneof![Just(2usize), Just(4)],
        1usize..6,
        1usize..5,
        1usize..9,
    );
    let gate = prop_oneof![
        Just(GatedNorm::GateOnly),
        eps().prop_map(|eps| GatedNorm::GateThenNorm { eps }),
        eps().prop_map(|eps| GatedNorm::NormThenGate { eps }),
    ];
    let limit = prop_oneof![3 => Just((0.0, f64::INFINITY)), 1 => Just((0.001, 0.1))];
    let multipliers = prop_oneof![3 => Just([1.0; 5]), 1 => prop::array::uniform5(0.5f64..1.5)];
    (
        shape,
        (any::<bool>(), any::<bool>(), any::<bool>()),
        gate,
        limit,
        any::<bool>(),
        multipliers,
        dt_init(),
    )
        .prop_map(
            |(
                ((n_heads, n_groups), head_dim, d_state, d_conv, chunk_size),
                bias,
                gate,
                dt_limit,
                in_decode,
                multipliers,
                dt_init,
            )| {
                Mamba2 {
                    n_heads,
                    head_dim,
                    d_state,
                    n_groups,
                    d_conv,
                    chunk_size,
                    conv_bias: bias.0,
                    in_proj_bias: bias.1,
                    out_proj_bias: bias.2,
                    dt_limit,
                    dt_limit_in_decode: in_decode,
                    gate,
                    multipliers,
                    dt_init,
                    a_init: (1.0, 16.0),
                }
            },
        )
        .boxed()
}

fn gated_delta_net() -> BoxedStrategy<GatedDeltaNet> {
    (
        1usize..3,
        1usize..3,
        2usize..5,
        2usize..5,
        1usize..5,
        1usize..9,
        eps(),
        dt_init(),
    )
        .prop_map(
            |(k, per, k_head_dim, v_head_dim, d_conv, chunk_size, norm_eps, dt_init)| {
                GatedDeltaNet {
                    n_k_heads: k,
                    n_v_heads: k * per,
                    k_head_dim,
                    v_head_dim,
                    d_conv,
                    chunk_size,
                    norm_eps,
                    dt_init,
                    a_init: (1.0, 16.0),
                }
            },
        )
        .boxed()
}

fn plain_mixer(limits: Limits) -> BoxedStrategy<Mixer> {
    let base = prop_oneof![
        attention().prop_map(Mixer::Attention),
        mamba1().prop_map(Mixer::Mamba1),
        mamba2().prop_map(Mixer::Mamba2),
    ];
    if limits.delta_net {
        prop_oneof![3 => base, 1 => gated_delta_net().prop_map(Mixer::GatedDeltaNet)].boxed()
    } else {
        base.boxed()
    }
}

fn mixer(limits: Limits) -> BoxedStrategy<Mixer> {
    if !limits.sharing {
        return plain_mixer(limits);
    }
    let branches = vec((plain_mixer(limits), factor(), factor()), 2..3).prop_map(|all| {
        let branch = |(i, (mixer, in_multiplier, out_multiplier))| Branch {
            name: format!("b{i}"),
            mixer,
            in_multiplier,
            out_multiplier,
        };
        Mixer::Parallel(all.into_iter().enumerate().map(branch).collect())
    });
    prop_oneof![5 => plain_mixer(limits), 1 => branches].boxed()
}

fn dense() -> BoxedStrategy<Ffn> {
    prop_oneof![
        (1usize..17, act(), any::<bool>(), factor(), factor()).prop_map(
            |(d_ff, act, bias, gate_multiplier, out_multiplier)| {
                Ffn::Glu(Glu {
                    d_ff,
                    act,
                    bias,
                    gate_multiplier,
                    out_multiplier,
                })
            }
        ),
        (1usize..17, act(), any::<bool>()).prop_map(|(d_ff, act, bias)| Ffn::Mlp(Mlp {
            d_ff,
            act,
            bias
        })),
    ]
    .boxed()
}

fn moe() -> BoxedStrategy<Moe> {
    // (E, top-k, groups, groups kept): groups of two or more, enough to choose from.
    let counts = prop_oneof![
        Just((1, 1, 1, 1)),
        Just((3, 2, 1, 1)),
        Just((4, 1, 1, 1)),
        Just((4, 2, 2, 1)),
        Just((6, 3, 3, 2))
    ];
    let score = prop_oneof![
        Just(RouterScore::SoftmaxAll),
        Just(RouterScore::SoftmaxChosen),
        Just(RouterScore::Sigmoid)
    ];
    let shared = option::weighted(
        0.4,
        (dense(), any::<bool>()).prop_map(|(ffn, gated)| SharedExpert { ffn, gated }),
    );
    let latent = option::weighted(0.2, 1usize..6);
    (
        (counts, score, any::<bool>(), any::<bool>(), factor()),
        1usize..9,
        act(),
        any::<bool>(),
        shared,
        (latent, any::<bool>()),
        0usize..2,
    )
        .prop_map(
            |(
                (
                    (n_experts, top_k, n_groups, top_groups),
                    score,
                    normalize,
                    correction_bias,
                    scale,
                ),
                d_ff,
                act,
                gated,
                shared,
                (latent, bias),
                lb,
            )| Moe {
                n_experts,
                top_k,
                expert: Expert { d_ff, act, gated },
                router: Router {
                    score,
                    normalize,
                    correction_bias,
                    n_groups,
                    top_groups,
                    scale,
                },
                shared,
                latent,
                latent_bias: bias,
                load_balance: lb as f64 * 0.01,
            },
        )
        .boxed()
}

fn ffn(limits: Limits) -> BoxedStrategy<Ffn> {
    if limits.moe {
        prop_oneof![2 => dense(), 1 => moe().prop_map(|m| Ffn::Moe(Box::new(m)))].boxed()
    } else {
        dense()
    }
}

/// What one layer is made of: which mixer and ffn by number, and what is its own.
type LayerPlan = (
    Option<usize>,
    Option<usize>,
    Norm,
    Norm,
    (f64, f64),
    bool,
    bool,
);

/// A small model that checks.
pub fn arb_model(limits: Limits) -> BoxedStrategy<Model> {
    let layer = (
        option::weighted(0.85, 0usize..3),
        option::weighted(0.75, 0usize..2),
        norm(),
        norm(),
        (factor(), factor()),
        prop::bool::weighted(0.3),
        prop::bool::weighted(0.2),
    );
    let sizes = (
        1..=limits.max_width_units,
        2..=limits.max_vocab.max(2),
        8usize..64,
    );
    let bodies = (vec(mixer(limits), 3), vec(ffn(limits), 2));
    let inject = (attention(), dense(), norm(), norm());
    let rest = (
        norm(),
        any::<bool>(),
        (factor(), factor()),
        (0.01f64..0.1, any::<bool>()),
    );
    (
        sizes,
        vec(layer, 1..=limits.max_layers.max(1)),
        bodies,
        inject,
        rest,
    )
        .prop_map(
            move |(
                (units, vocab_size, context_len),
                plans,
                (mixers, ffns),
                block,
                (final_norm, tied, factors, init),
            )| {
                let mut layers: Vec<Layer> = plans
                    .iter()
                    .enumerate()
                    .map(|(i, p)| layer_of(i, p, &mixers, &ffns))
                    .collect();
                if layers.iter().all(|l| l.mixer.is_none() && l.ffn.is_none()) {
                    layers[0].ffn =
                        Some(sublayer(0, "ffn", "f0", final_norm, ffns[0].clone(), 1.0));
                }
                if limits.sharing {
                    share(&mut layers, &plans);
                    inject_into(&mut layers, &plans, block);
                }
                Model {
                    name: "arbitrary".to_owned(),
                    vocab_size,
                    d_model: 8 * units,
                    context_len,
                    embedding: Embedding {
                        multiplier: factors.0,
                    },
                    layers,
                    decoder: None,
                    final_norm,
                    head: Head {
                        tied,
                        multiplier: factors.1,
                    },
                    init: Init {
                        std: init.0,
                        scale_output: init.1,
                    },
                }
            },
        )
        .boxed()
}

fn sublayer<T>(
    i: usize,
    half: &str,
    name: &str,
    norm: Norm,
    body: T,
    residual_multiplier: f64,
) -> Sublayer<T> {
    Sublayer {
        weights: format!("layers.{i}.{half}"),
        name: name.to_owned(),
        norm,
        body,
        residual_multiplier,
    }
}

fn layer_of(i: usize, plan: &LayerPlan, mixers: &[Mixer], ffns: &[Ffn]) -> Layer {
    let (m, f, mixer_norm, ffn_norm, residual, ..) = plan;
    Layer {
        inject: None,
        mixer: m.map(|k| {
            sublayer(
                i,
                "mixer",
                &format!("m{k}"),
                *mixer_norm,
                mixers[k].clone(),
                residual.0,
            )
        }),
        ffn: f.map(|k| {
            sublayer(
                i,
                "ffn",
                &format!("f{k}"),
                *ffn_norm,
                ffns[k].clone(),
                residual.1,
            )
        }),
    }
}

/// Later layers share the weights of the first layer with the same body.
fn share(layers: &mut [Layer], plans: &[LayerPlan]) {
    for i in 1..layers.len() {
        if !plans[i].5 {
            continue;
        }
        let (before, after) = layers.split_at_mut(i);
        let Some(mine) = &mut after[0].mixer else {
            continue;
        };
        let owner = before
            .iter()
            .filter_map(|l| l.mixer.as_ref())
            .find(|o| o.name == mine.name && o.norm == mine.norm);
        if let Some(o) = owner {
            mine.weights.clone_from(&o.weights);
        }
    }
}

fn inject_into(
    layers: &mut [Layer],
    plans: &[LayerPlan],
    (mixer, ffn, norm, ffn_norm): (Attention, Ffn, Norm, Norm),
) {
    for (i, layer) in layers.iter_mut().enumerate() {
        if plans[i].6 && layer.mixer.is_some() {
            layer.inject = Some(Inject {
                weights: "shared.block".to_owned(),
                own_weights: format!("layers.{i}.inject"),
                norm,
                mixer: mixer.clone(),
                ffn_norm,
                ffn: ffn.clone(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Source, parse_model};

    proptest! {
        #[test]
        fn text_of_a_model_checks_to_the_same_model(model in arb_model(Limits { max_layers: 12, ..Limits::default() })) {
            let text = model.to_ron();
            let read = parse_model(&Source::new("model.ron", &text), &[]);
            match read {
                Ok(read) => prop_assert_eq!(&*read, &model, "{}", text),
                Err(r) => prop_assert!(false, "{}\n{}", r, text),
            }
        }

        #[test]
        fn any_text_gives_an_answer(text in "[(){}\\[\\]:,a-z0-9\"'. #/*_-]{0,60}") {
            let _ = parse_model(&Source::new("x", &text), &[]);
            let _ = crate::parse_run(&Source::new("x", &text), &[]);
            let _ = crate::parse_sweep(&Source::new("x", &text), &[]);
        }

        #[test]
        fn broken_files_are_reported_inside_the_text(model in arb_model(Limits::default()), at in 0.0f64..1.0, junk in "[(){}:,x0\"]{0,3}", cut in 0usize..8) {
            let mut text = model.to_ron();
            let i = (at * text.len() as f64) as usize;
            text.replace_range(i..(i + cut).min(text.len()), &junk);
            if let Err(r) = parse_model(&Source::new("x", &text), &[]) {
                prop_assert!(!r.diagnostics.is_empty());
                prop_assert!(r.facts().iter().all(|f| f.line <= text.lines().count() + 1));
                let _ = (r.plain(), r.fancy(true, 80));
            }
        }
    }
}
