//! Qwen3-Next: gated DeltaNet and gated attention with normed heads, zero-centred norms, experts with a gated shared expert.

use super::config::{Config, RopeDefaults};
use super::parts::*;
use super::table::{Rules, Shape};
use super::{Family, Written, llama};
use marimba_dsl::model::*;
use serde_json::json;

/// See the module.
pub(super) const FAMILY: Family = Family {
    model_type: "qwen3_next",
    architecture: "Qwen3NextForCausalLM",
    read,
    write,
    rules,
};

fn read(c: &Config) -> Model {
    let n = c.count("num_hidden_layers");
    let norm = Norm {
        eps: c.float("rms_norm_eps"),
        zero_centered: true,
    };
    c.only_silu("hidden_act");
    let interval = c.count_or("full_attention_interval", 4).max(1);
    let default = |i: usize| {
        if (i + 1).is_multiple_of(interval) {
            "full_attention"
        } else {
            "linear_attention"
        }
    };
    let kinds = c
        .layer_types(
            "layer_types",
            Some(n),
            &["linear_attention", "full_attention"],
        )
        .unwrap_or_else(|| (0..n).map(|i| default(i).to_string()).collect());
    let head = c.count("head_dim");
    let rope = c.rope(
        head,
        &RopeDefaults {
            fraction: Some(0.25),
            ..RopeDefaults::default()
        },
    );
    let mut attention = attention(c, head, Some(rope), c.flag("attention_bias"));
    attention.qk_norm = Some(norm);
    attention.output_gate = true;
    let delta = GatedDeltaNet {
        n_k_heads: c.count("linear_num_key_heads"),
        n_v_heads: c.count("linear_num_value_heads"),
        k_head_dim: c.count("linear_key_head_dim"),
        v_head_dim: c.count("linear_value_head_dim"),
        d_conv: c.count("linear_conv_kernel_dim"),
        chunk_size: CHUNK,
        norm_eps: norm.eps,
        dt_init: c.dt_init(),
        a_init: (1.0, 16.0),
    };
    c.divide(
        "linear_num_value_heads",
        delta.n_v_heads,
        "linear_num_key_heads",
        delta.n_k_heads,
    );
    let n_experts = c.size("num_experts");
    let dense = c.counts("mlp_only_layers");
    let step = c.count("decoder_sparse_step").max(1);
    let moe = (n_experts > 0).then(|| {
        let mut moe = softmax_moe(
            c,
            n_experts,
            c.count("moe_intermediate_size"),
            RouterScore::SoftmaxAll,
            c.flag("norm_topk_prob"),
        );
        let shared = glu(c, c.count("shared_expert_intermediate_size"), false);
        moe.shared = Some(SharedExpert {
            ffn: Ffn::Glu(shared),
            gated: true,
        });
        moe
    });
    let layers = kinds
        .iter()
        .enumerate()
        .map(|(i, kind)| {
            let mixer = if kind == "full_attention" {
                sub(
                    i,
                    "mixer",
                    "attn",
                    norm,
                    Mixer::Attention(attention.clone()),
                )
            } else {
                sub(
                    i,
                    "mixer",
                    "delta",
                    norm,
                    Mixer::GatedDeltaNet(delta.clone()),
                )
            };
            let sparse = !dense.contains(&i) && (i + 1).is_multiple_of(step);
            let ffn = match moe.as_ref().filter(|_| sparse) {
                Some(moe) => sub(i, "ffn", "moe", norm, Ffn::Moe(Box::new(moe.clone()))),
                None => {
                    let mlp = glu(c, c.count("intermediate_size"), false);
                    sub(i, "ffn", "mlp", norm, Ffn::Glu(mlp))
                }
            };
            Layer {
                inject: None,
                mixer: Some(mixer),
                ffn: Some(ffn),
            }
        })
        .collect();
    model(c, layers, norm)
}

/// Tokens per chunk of the chunked form; transformers has 64 built in.
const CHUNK: usize = 64;

fn write(m: &Model) -> Written {
    let f = firsts(m);
    let mut out = write_base(m, FAMILY.model_type, FAMILY.architecture);
    if let Some(attention) = f.attention {
        write_attention(&mut out, attention, m.context_len);
    }
    if let Some(delta) = f.delta {
        put(
            &mut out,
            json!({ "linear_num_key_heads": delta.n_k_heads, "linear_num_value_heads": delta.n_v_heads,
                "linear_key_head_dim": delta.k_head_dim, "linear_value_head_dim": delta.v_head_dim,
                "linear_conv_kernel_dim": delta.d_conv }),
        );
    }
    let at = attention_layers(m);
    let kind = |i: usize| {
        if at.contains(&i) {
            "full_attention"
        } else {
            "linear_attention"
        }
    };
    let kinds: Vec<&str> = (0..m.layers.len()).map(kind).collect();
    let sparse = moe_layers(m);
    let dense: Vec<usize> = (0..m.layers.len())
        .filter(|i| !sparse.contains(i))
        .collect();
    put(
        &mut out,
        json!({ "layer_types": kinds, "hidden_act": "silu", "rms_norm_eps": m.final_norm.eps,
            "num_experts": f.moe.map_or(0, |x| x.n_experts), "mlp_only_layers": dense, "decoder_sparse_step": 1,
            "intermediate_size": f.glu.map_or(1, |g| g.d_ff) }),
    );
    if let Some(x) = f.moe {
        let Some(SharedExpert {
            ffn: Ffn::Glu(shared),
            ..
        }) = &x.shared
        else {
            return Err("its experts have no gated ffn as shared expert".into());
        };
        put(
            &mut out,
            json!({ "num_experts_per_tok": x.top_k, "moe_intermediate_size": x.expert.d_ff,
                "shared_expert_intermediate_size": shared.d_ff, "norm_topk_prob": x.router.normalize,
                "router_aux_loss_coef": x.load_balance, "output_router_logits": false }),
        );
    }
    Ok(out)
}

fn rules(m: &Model) -> Rules {
    let mut r = Rules::new();
    outer_rules(&mut r, "model.embed_tokens", "model.norm");
    for (i, layer) in m.layers.iter().enumerate() {
        let (ours, theirs) = (format!("layers.{i}"), format!("model.layers.{i}"));
        llama::norm_rules(r.at(&ours, &theirs));
        let mixer = format!("{ours}.mixer");
        match layer.mixer.as_ref().map(|s| &s.body) {
            Some(Mixer::Attention(a)) => {
                // Per head: the query's rows, then the gate's.
                r.at(&mixer, &format!("{theirs}.self_attn"))
                    .fused(&["q_proj", "gate_proj"], "q_proj", a.n_heads)
                    .linear("k_proj", "k_proj")
                    .linear("v_proj", "v_proj")
                    .linear("out_proj", "o_proj")
                    .same("q_norm", "q_norm.weight")
                    .same("k_norm", "k_norm.weight");
            }
            Some(Mixer::GatedDeltaNet(s)) => {
                let (qk, v) = (s.n_k_heads * s.k_head_dim, s.n_v_heads * s.v_head_dim);
                // Per key head: q, k, and its share of v and z; b and a likewise.
                r.at(&mixer, &format!("{theirs}.linear_attn"))
                    .sections("in_proj", &[qk, qk, v, v], "in_proj_qkvz", s.n_k_heads)
                    .sections(
                        "ba_proj",
                        &[s.n_v_heads, s.n_v_heads],
                        "in_proj_ba",
                        s.n_k_heads,
                    )
                    .rule(&["conv"], "conv1d.weight", 1, Shape::Conv)
                    .same("dt_bias", "dt_bias")
                    .same("a_log", "A_log")
                    .same("gate_norm", "norm.weight")
                    .linear("out_proj", "out_proj");
            }
            _ => {}
        }
        let (ffn, mlp) = (format!("{ours}.ffn"), format!("{theirs}.mlp"));
        r.at(&ffn, &mlp)
            .same("router", "gate.weight")
            .same("shared_gate", "shared_expert_gate.weight");
        glu_rules(&mut r);
        expert_rules(&mut r, "gate_proj", "up_proj", "down_proj");
        glu_rules(r.at(&format!("{ffn}.shared"), &format!("{mlp}.shared_expert")));
    }
    r
}
