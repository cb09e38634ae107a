//! Granite 4: Mamba-2 and attention by `layer_types`, experts (or none) beside a shared gated ffn, and multipliers on embeddings,
//! residuals, attention scores and logits.

use super::config::{Config, RopeDefaults};
use super::parts::*;
use super::table::{Rules, Shape};
use super::{Family, Written, llama};
use marimba_dsl::model::*;
use serde_json::json;

/// See the module.
pub(super) const FAMILY: Family = Family {
    model_type: "granitemoehybrid",
    architecture: "GraniteMoeHybridForCausalLM",
    read,
    write,
    rules,
};

fn read(c: &Config) -> Model {
    let (n, d) = (c.count("num_hidden_layers"), c.count("hidden_size"));
    let norm = norm(c.float("rms_norm_eps"));
    let kinds = c
        .layer_types(
            "layer_types",
            Some(n),
            &["linear_attention", "full_attention"],
        )
        .unwrap_or_else(|| vec!["linear_attention".into(); n]);
    let head = head_dim(c);
    // Any other word is no positions.
    let rope = (c.opt_word("position_embedding_type") == Some("rope"))
        .then(|| c.rope(head, &RopeDefaults::default()));
    let mut attention = attention(c, head, rope, c.flag("attention_bias"));
    attention.scale = c.float("attention_multiplier");
    let needs_mamba = kinds.iter().any(|k| k == "linear_attention");
    let inner = (c.float("mamba_expand") * d as f64) as usize;
    let mamba = needs_mamba.then(|| mamba2(c, inner, GatedNorm::GateThenNorm { eps: norm.eps }));
    let shared_ff = c.size("shared_intermediate_size");
    let shared = (shared_ff > 0).then(|| glu(c, shared_ff, false));
    let n_experts = c.size("num_local_experts");
    let ffn = if n_experts > 0 {
        let mut moe = softmax_moe(
            c,
            n_experts,
            c.count("intermediate_size"),
            RouterScore::SoftmaxChosen,
            false,
        );
        moe.shared = shared.map(|g| SharedExpert {
            ffn: Ffn::Glu(g),
            gated: false,
        });
        Ffn::Moe(Box::new(moe))
    } else {
        Ffn::Glu(shared.unwrap_or_else(|| {
            c.problem("num_local_experts and shared_intermediate_size are both 0");
            glu(c, 1, false)
        }))
    };
    let ffn_name = if n_experts > 0 { "moe" } else { "mlp" };
    let residual = c.float("residual_multiplier");
    let layers = kinds
        .iter()
        .enumerate()
        .map(|(i, kind)| {
            let mut mixer = match &mamba {
                Some(mamba) if kind == "linear_attention" => {
                    sub(i, "mixer", "mamba", norm, Mixer::Mamba2(mamba.clone()))
                }
                _ => sub(
                    i,
                    "mixer",
                    "attn",
                    norm,
                    Mixer::Attention(attention.clone()),
                ),
            };
            let mut ffn = sub(i, "ffn", ffn_name, norm, ffn.clone());
            mixer.residual_multiplier = residual;
            ffn.residual_multiplier = residual;
            Layer {
                inject: None,
                mixer: Some(mixer),
                ffn: Some(ffn),
            }
        })
        .collect();
    let mut m = model(c, layers, norm);
    m.embedding.multiplier = c.float("embedding_multiplier");
    m.head.multiplier = 1.0 / c.float("logits_scaling");
    m
}

fn write(m: &Model) -> Written {
    let f = firsts(m);
    let mut out = write_base(m, FAMILY.model_type, FAMILY.architecture);
    match f.attention {
        // transformers insists, with or without RoPE.
        Some(a) if a.head_dim > 4 && !a.head_dim.is_multiple_of(2) => {
            return Err(format!("its heads of {} channels are odd", a.head_dim));
        }
        Some(a) => write_attention(&mut out, a, m.context_len),
        // Nor may the heads of no attention be odd: they are of one channel then.
        None if !m.d_model.is_multiple_of(2) => put(
            &mut out,
            json!({ "num_attention_heads": m.d_model, "num_key_value_heads": m.d_model }),
        ),
        None => write_no_attention(&mut out),
    }
    match f.mamba2 {
        Some(mamba) => {
            write_mamba2(&mut out, mamba);
            let inner = expand(mamba.n_heads * mamba.head_dim, m.d_model)?;
            put(&mut out, json!({ "mamba_expand": inner }));
        }
        None => put(&mut out, json!({ "mamba_n_heads": 1 })),
    }
    let at = attention_layers(m);
    let kind = |i: usize| {
        if at.contains(&i) {
            "attention"
        } else {
            "mamba"
        }
    };
    let kinds: Vec<&str> = (0..m.layers.len()).map(kind).collect();
    let shared = match (f.glu, f.moe.map(|x| &x.shared)) {
        (Some(g), _)
        | (
            None,
            Some(Some(SharedExpert {
                ffn: Ffn::Glu(g), ..
            })),
        ) => Some(g),
        _ => None,
    };
    let residual = m
        .layers
        .iter()
        .find_map(|l| l.mixer.as_ref())
        .map_or(1.0, |s| s.residual_multiplier);
    let act = f
        .moe
        .map(|x| x.expert.act)
        .or(shared.map(|g| g.act))
        .unwrap_or(Act::Silu);
    put(
        &mut out,
        json!({ "layer_types": kinds, "position_embedding_type": if f.attention.is_some_and(|a| a.rope.is_some()) { "rope" } else { "nope" },
            "attention_multiplier": f.attention.map_or(1.0, |a| a.scale), "embedding_multiplier": m.embedding.multiplier,
            "logits_scaling": 1.0 / m.head.multiplier, "residual_multiplier": residual,
            "num_local_experts": f.moe.map_or(0, |x| x.n_experts), "num_experts_per_tok": f.moe.map_or(0, |x| x.top_k),
            "intermediate_size": f.moe.map_or(0, |x| x.expert.d_ff), "shared_intermediate_size": shared.map_or(0, |g| g.d_ff),
            "router_aux_loss_coef": f.moe.map_or(0.0, |x| x.load_balance), "output_router_logits": false,
            "hidden_act": act_name(act), "rms_norm_eps": m.final_norm.eps }),
    );
    Ok(out)
}

fn rules(m: &Model) -> Rules {
    let mut r = Rules::new();
    outer_rules(&mut r, "model.embed_tokens", "model.norm");
    for (i, layer) in m.layers.iter().enumerate() {
        let (ours, theirs) = (format!("layers.{i}"), format!("model.layers.{i}"));
        llama::norm_rules(r.at(&ours, &theirs));
        let mixer = format!("{ours}.mixer");
        if let Some(Mixer::Attention(_)) = layer.mixer.as_ref().map(|s| &s.body) {
            attention_rules(r.at(&mixer, &format!("{theirs}.self_attn")));
        } else {
            mamba2_rules(r.at(&mixer, &format!("{theirs}.mamba")));
        }
        let (ffn, shared) = (format!("{ours}.ffn"), format!("{theirs}.shared_mlp"));
        if let Some(Ffn::Moe(moe)) = layer.ffn.as_ref().map(|s| &s.body) {
            let experts = Shape::Split(moe.n_experts);
            r.at(&ffn, &format!("{theirs}.block_sparse_moe"))
                .same("router", "router.layer.weight")
                .rule(
                    &["experts.gate_proj", "experts.up_proj"],
                    "input_linear.weight",
                    moe.n_experts,
                    experts,
                )
                .rule(&["experts.down_proj"], "output_linear.weight", 1, experts);
            r.at(&format!("{ffn}.shared"), &shared);
        } else {
            r.at(&ffn, &shared);
        }
        r.fused(&["gate_proj", "up_proj"], "input_linear", 1)
            .linear("down_proj", "output_linear");
    }
    r
}
