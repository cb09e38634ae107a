//! Jamba: Mamba-1 with weighted norms on dt, B and C; attention without positions every `attn_layer_period` layers; experts every
//! `expert_layer_period` layers, weights not renormalised.

use super::config::Config;
use super::parts::*;
use super::table::Rules;
use super::{Family, Written};
use marimba_dsl::model::*;
use serde_json::json;

/// See the module.
pub(super) const FAMILY: Family = Family {
    model_type: "jamba",
    architecture: "JambaForCausalLM",
    read,
    write,
    rules,
};

fn read(c: &Config) -> Model {
    let (n, d) = (c.count("num_hidden_layers"), c.count("hidden_size"));
    let norm = norm(c.float("rms_norm_eps"));
    c.only_silu("hidden_act");
    let head = head_dim(c);
    let attention = attention(c, head, None, false);
    let bias = c.flag("mamba_proj_bias");
    let mamba = Mamba1 {
        d_inner: (c.float("mamba_expand") * d as f64) as usize,
        d_state: c.count("mamba_d_state"),
        d_conv: c.count("mamba_d_conv"),
        dt_rank: c.opt_count("mamba_dt_rank").unwrap_or(d.div_ceil(16)),
        n_heads: 1,
        conv_bias: c.flag("mamba_conv_bias"),
        in_proj_bias: bias,
        out_proj_bias: bias,
        dt_bc_norm: Some(DtBcNorm {
            eps: norm.eps,
            weighted: true,
        }),
        dt_init: c.dt_init(),
    };
    let d_ff = c.count("intermediate_size");
    let n_experts = c.count("num_experts");
    let layers = (0..n)
        .map(|i| {
            // One expert is no choice: those layers are dense.
            let ffn = if n_experts > 1 && periodic(c, i, "expert") {
                let moe = softmax_moe(c, n_experts, d_ff, RouterScore::SoftmaxAll, false);
                sub(i, "ffn", "moe", norm, Ffn::Moe(Box::new(moe)))
            } else {
                sub(i, "ffn", "mlp", norm, Ffn::Glu(glu(c, d_ff, false)))
            };
            let mixer = if periodic(c, i, "attn") {
                sub(
                    i,
                    "mixer",
                    "attn",
                    norm,
                    Mixer::Attention(attention.clone()),
                )
            } else {
                sub(i, "mixer", "mamba", norm, Mixer::Mamba1(mamba.clone()))
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

fn write(m: &Model) -> Written {
    let f = firsts(m);
    let n = m.layers.len();
    let mut out = write_base(m, FAMILY.model_type, FAMILY.architecture);
    match f.attention {
        Some(attention) => write_attention(&mut out, attention, m.context_len),
        None => write_no_attention(&mut out),
    }
    if let Some(mamba) = f.mamba1 {
        put(
            &mut out,
            json!({ "mamba_d_state": mamba.d_state, "mamba_d_conv": mamba.d_conv, "mamba_dt_rank": mamba.dt_rank,
                "mamba_expand": expand(mamba.d_inner, m.d_model)?, "mamba_conv_bias": mamba.conv_bias,
                "mamba_proj_bias": mamba.in_proj_bias }),
        );
        write_dt(&mut out, mamba.dt_init, (0.0, f64::INFINITY));
    }
    let (period, offset) =
        period_offset(&attention_layers(m), n).ok_or("attention does not stand at a period")?;
    let experts = period_offset(&moe_layers(m), n).ok_or("experts do not stand at a period")?;
    let d_ff = f
        .glu
        .map(|g| g.d_ff)
        .or(f.moe.map(|x| x.expert.d_ff))
        .ok_or("it has no ffn")?;
    put(
        &mut out,
        json!({ "attn_layer_period": period, "attn_layer_offset": offset,
            "expert_layer_period": experts.0, "expert_layer_offset": experts.1,
            "num_experts": f.moe.map_or(1, |x| x.n_experts), "num_experts_per_tok": f.moe.map_or(1, |x| x.top_k),
            "router_aux_loss_coef": f.moe.map_or(0.0, |x| x.load_balance), "output_router_logits": false,
            "intermediate_size": d_ff, "hidden_act": "silu", "rms_norm_eps": m.final_norm.eps, "use_mamba_kernels": true }),
    );
    Ok(out)
}

fn rules(m: &Model) -> Rules {
    let mut r = Rules::new();
    outer_rules(&mut r, "model.embed_tokens", "model.final_layernorm");
    for (i, layer) in m.layers.iter().enumerate() {
        let (ours, theirs) = (format!("layers.{i}"), format!("model.layers.{i}"));
        r.at(&ours, &theirs)
            .same("mixer.norm", "input_layernorm.weight")
            .same("ffn.norm", "pre_ff_layernorm.weight");
        let mixer = format!("{ours}.mixer");
        if let Some(Mixer::Attention(_)) = layer.mixer.as_ref().map(|s| &s.body) {
            attention_rules(r.at(&mixer, &format!("{theirs}.self_attn")));
        } else {
            mamba1_rules(r.at(&mixer, &format!("{theirs}.mamba")));
            r.same("dt_norm", "dt_layernorm.weight")
                .same("b_norm", "b_layernorm.weight")
                .same("c_norm", "c_layernorm.weight");
        }
        r.at(&format!("{ours}.ffn"), &format!("{theirs}.feed_forward"))
            .same("router", "router.weight");
        glu_rules(&mut r);
        expert_rules(&mut r, "gate_proj", "up_proj", "down_proj");
    }
    r
}
