//! Nemotron-H: one mixer or ffn a layer (Mamba-2, attention without positions, squared-ReLU ffn, experts with a sigmoid router).

use super::config::Config;
use super::parts::*;
use super::table::Rules;
use super::{Family, Written};
use marimba_dsl::model::*;
use serde_json::{Value, json};

/// See the module.
pub(super) const FAMILY: Family = Family {
    model_type: "nemotron_h",
    architecture: "NemotronHForCausalLM",
    read,
    write,
    rules,
};

const KINDS: [&str; 4] = ["linear_attention", "full_attention", "mlp", "moe"];

fn read(c: &Config) -> Model {
    let norm = norm(c.float("layer_norm_epsilon"));
    // The list counts before the pattern, and both before `num_hidden_layers`.
    let kinds = c
        .layer_types("layers_block_type", None, &KINDS)
        .or_else(|| Some(from_pattern(c, c.opt_word("hybrid_override_pattern")?)))
        .unwrap_or_else(|| {
            c.problem("layers_block_type is missing, and hybrid_override_pattern too");
            Vec::new()
        });
    c.only_silu("mamba_hidden_act");
    let act = c.act("mlp_hidden_act");
    let bias = c.flag("mlp_bias");
    let mlp = |d_ff| Mlp { d_ff, act, bias };
    let layer = |i: usize, kind: &str| match kind {
        "linear_attention" => (Some(("mamba", Mixer::Mamba2(mamba(c, norm.eps)))), None),
        "full_attention" => {
            let head = head_dim(c);
            (
                Some(("attn", Mixer::Attention(attention(c, head, None, false)))),
                None,
            )
        }
        "moe" => (None, Some(("moe", Ffn::Moe(Box::new(moe(c, act, bias)))))),
        _ => (None, Some(("mlp", Ffn::Mlp(mlp(feed_forward(c, i)))))),
    };
    let layers = kinds
        .iter()
        .enumerate()
        .map(|(i, kind)| {
            let (mixer, ffn) = layer(i, kind);
            Layer {
                inject: None,
                mixer: mixer.map(|(name, body)| sub(i, "mixer", name, norm, body)),
                ffn: ffn.map(|(name, body)| sub(i, "ffn", name, norm, body)),
            }
        })
        .collect();
    let mut m = model(c, layers, norm);
    // transformers never ties this family, whatever the key says.
    m.head.tied = false;
    m
}

/// Width of the plain ffn; published configurations may give one per layer.
fn feed_forward(c: &Config, i: usize) -> usize {
    match c.get("intermediate_size") {
        Some(Value::Array(list)) => match list
            .get(i.min(list.len().saturating_sub(1)))
            .and_then(Value::as_u64)
        {
            Some(n) if list.len() == 1 => n as usize,
            _ => {
                c.problem("intermediate_size per layer is not supported");
                1
            }
        },
        _ => c.count("intermediate_size"),
    }
}

fn mamba(c: &Config, eps: f64) -> Mamba2 {
    let n_heads = c.count("mamba_num_heads");
    let n_groups = c.count("n_groups");
    c.divide("mamba_num_heads", n_heads, "n_groups", n_groups);
    let bias = c.flag("use_bias");
    Mamba2 {
        n_heads,
        head_dim: c.count("mamba_head_dim"),
        d_state: c.count("ssm_state_size"),
        n_groups,
        d_conv: c.count("conv_kernel"),
        chunk_size: c.count("chunk_size"),
        conv_bias: c.flag("use_conv_bias"),
        in_proj_bias: bias,
        out_proj_bias: bias,
        // `time_step_limit` is ignored by transformers, which clamps at `time_step_min` instead.
        dt_limit: (c.float("time_step_min"), f64::INFINITY),
        dt_limit_in_decode: true,
        gate: GatedNorm::GateThenNorm { eps },
        multipliers: [1.0; 5],
        dt_init: c.dt_init(),
        a_init: (1.0, 16.0),
    }
}

fn moe(c: &Config, act: Act, bias: bool) -> Moe {
    let (n_experts, n_groups, top_groups) = (
        c.count("n_routed_experts"),
        c.count("n_group"),
        c.count("topk_group"),
    );
    c.divide("n_routed_experts", n_experts, "n_group", n_groups);
    if top_groups > n_groups {
        c.problem(format!(
            "topk_group {top_groups} exceeds n_group {n_groups}"
        ));
    }
    let shared = Mlp {
        d_ff: c.count("moe_shared_expert_intermediate_size"),
        act,
        bias,
    };
    Moe {
        n_experts,
        top_k: c.count("num_experts_per_tok"),
        expert: Expert {
            d_ff: c.count("moe_intermediate_size"),
            act,
            gated: false,
        },
        router: Router {
            score: RouterScore::Sigmoid,
            normalize: c.flag("norm_topk_prob"),
            correction_bias: true,
            n_groups,
            top_groups,
            scale: c.float("routed_scaling_factor"),
        },
        shared: Some(SharedExpert {
            ffn: Ffn::Mlp(shared),
            gated: false,
        }),
        latent: c.opt_count("moe_latent_size"),
        latent_bias: c.opt_count("moe_latent_size").is_some() && bias,
        load_balance: 0.0,
    }
}

fn from_pattern(c: &Config, pattern: &str) -> Vec<String> {
    pattern
        .chars()
        .filter_map(|s| match s {
            'M' => Some("linear_attention"),
            '*' => Some("full_attention"),
            '-' => Some("mlp"),
            'E' => Some("moe"),
            other => {
                c.problem(format!(
                    "hybrid_override_pattern holds {other:?}, expected M, *, - or E"
                ));
                None
            }
        })
        .map(str::to_string)
        .collect()
}

fn write(m: &Model) -> Written {
    let f = firsts(m);
    let mut out = write_base(m, FAMILY.model_type, FAMILY.architecture);
    let mut pattern = String::new();
    for layer in &m.layers {
        pattern.push(
            match (
                layer.mixer.as_ref().map(|s| &s.body),
                layer.ffn.as_ref().map(|s| &s.body),
            ) {
                (Some(Mixer::Mamba2(_)), None) => 'M',
                (Some(Mixer::Attention(_)), None) => '*',
                (None, Some(Ffn::Mlp(_))) => '-',
                (None, Some(Ffn::Moe(_))) => 'E',
                _ => {
                    return Err(
                        "a layer is not exactly one of Mamba-2, attention, plain ffn and experts"
                            .into(),
                    );
                }
            },
        );
    }
    put(
        &mut out,
        json!({ "hybrid_override_pattern": pattern, "layer_norm_epsilon": m.final_norm.eps }),
    );
    if let Some(s) = f.mamba2 {
        put(
            &mut out,
            json!({ "mamba_num_heads": s.n_heads, "mamba_head_dim": s.head_dim, "ssm_state_size": s.d_state,
                "n_groups": s.n_groups, "conv_kernel": s.d_conv, "chunk_size": s.chunk_size,
                "use_conv_bias": s.conv_bias, "use_bias": s.in_proj_bias, "mamba_hidden_act": "silu" }),
        );
        write_dt(&mut out, s.dt_init, (0.0, f64::INFINITY));
        // Where dt is clamped, too.
        put(&mut out, json!({ "time_step_min": s.dt_limit.0 }));
    }
    if let Some(a) = f.attention {
        write_attention(&mut out, a, m.context_len);
    }
    let mut bias = f.mlp.is_some_and(|x| x.bias);
    let mut act = f.mlp.map(|x| x.act);
    if let Some(x) = f.mlp {
        put(&mut out, json!({ "intermediate_size": x.d_ff }));
    }
    if let Some(x) = f.moe {
        let Some(SharedExpert {
            ffn: Ffn::Mlp(shared),
            ..
        }) = &x.shared
        else {
            return Err("its experts have no plain shared expert beside them".into());
        };
        bias |= shared.bias;
        act = act.or(Some(x.expert.act));
        put(
            &mut out,
            json!({ "n_routed_experts": x.n_experts, "num_experts_per_tok": x.top_k, "n_shared_experts": 1,
                "moe_intermediate_size": x.expert.d_ff, "moe_shared_expert_intermediate_size": shared.d_ff,
                "moe_latent_size": x.latent, "n_group": x.router.n_groups, "topk_group": x.router.top_groups,
                "norm_topk_prob": x.router.normalize, "routed_scaling_factor": x.router.scale }),
        );
    }
    put(
        &mut out,
        json!({ "mlp_bias": bias, "mlp_hidden_act": act_name(act.unwrap_or(Act::Relu2)) }),
    );
    Ok(out)
}

fn rules(m: &Model) -> Rules {
    let mut r = Rules::new();
    outer_rules(&mut r, "backbone.embeddings", "backbone.norm_f");
    for (i, layer) in m.layers.iter().enumerate() {
        let (mixer, ffn) = (format!("layers.{i}.mixer"), format!("layers.{i}.ffn"));
        let (norm, theirs) = (
            format!("backbone.layers.{i}"),
            format!("backbone.layers.{i}.mixer"),
        );
        let half = if layer.mixer.is_some() { &mixer } else { &ffn };
        r.at(half, &norm).same("norm", "norm.weight");
        match (
            layer.mixer.as_ref().map(|s| &s.body),
            layer.ffn.as_ref().map(|s| &s.body),
        ) {
            (Some(Mixer::Attention(_)), _) => attention_rules(r.at(&mixer, &theirs)),
            (Some(_), _) => mamba2_rules(r.at(&mixer, &theirs)),
            (None, Some(Ffn::Moe(_))) => {
                r.at(&ffn, &theirs)
                    .same("router", "gate.weight")
                    .same("router.bias", "gate.e_score_correction_bias")
                    .linear("latent_in", "fc1_latent_proj")
                    .linear("latent_out", "fc2_latent_proj");
                expert_rules(&mut r, "gate_proj", "up_proj", "down_proj");
                r.at(
                    &format!("{ffn}.shared"),
                    &format!("{theirs}.shared_experts"),
                )
                .linear("up_proj", "up_proj")
                .linear("down_proj", "down_proj");
            }
            (None, _) => {
                r.at(&ffn, &theirs)
                    .linear("up_proj", "up_proj")
                    .linear("down_proj", "down_proj");
            }
        }
    }
    r
}
