//! Bamba: Mamba-2 and, at `attn_layer_indices`, attention with half-rotary RoPE; a gated ffn after every mixer.

use super::config::{Config, RopeDefaults};
use super::parts::*;
use super::table::Rules;
use super::{Family, Written};
use marimba_dsl::model::*;
use serde_json::json;

/// See the module.
pub(super) const FAMILY: Family = Family {
    model_type: "bamba",
    architecture: "BambaForCausalLM",
    read,
    write,
    rules,
};

fn read(c: &Config) -> Model {
    let (n, d) = (c.count("num_hidden_layers"), c.count("hidden_size"));
    let norm = norm(c.float("rms_norm_eps"));
    let at = c.counts("attn_layer_indices");
    // Half of each head is rotated whatever stands beside the RoPE parameters.
    let defaults = RopeDefaults {
        fraction: Some(0.5),
        top_level_fraction: false,
        ..RopeDefaults::default()
    };
    let head = head_dim(c);
    let attention = attention(
        c,
        head,
        Some(c.rope(head, &defaults)),
        c.flag("attention_bias"),
    );
    let inner = (c.float("mamba_expand") * d as f64) as usize;
    let mamba = mamba2(c, inner, GatedNorm::GateThenNorm { eps: norm.eps });
    let mlp = glu(c, c.count("intermediate_size"), c.flag("mlp_bias"));
    let layers = (0..n)
        .map(|i| Layer {
            inject: None,
            mixer: Some(if at.contains(&i) {
                sub(
                    i,
                    "mixer",
                    "attn",
                    norm,
                    Mixer::Attention(attention.clone()),
                )
            } else {
                sub(i, "mixer", "mamba", norm, Mixer::Mamba2(mamba.clone()))
            }),
            ffn: Some(sub(i, "ffn", "mlp", norm, Ffn::Glu(mlp.clone()))),
        })
        .collect();
    model(c, layers, norm)
}

fn write(m: &Model) -> Written {
    let f = firsts(m);
    let mut out = write_base(m, FAMILY.model_type, FAMILY.architecture);
    let mamba = f.mamba2.ok_or("it has no Mamba-2 layer")?;
    write_mamba2(&mut out, mamba);
    let inner = expand(mamba.n_heads * mamba.head_dim, m.d_model)?;
    match f.attention {
        Some(attention) => write_attention(&mut out, attention, m.context_len),
        None => write_no_attention(&mut out),
    }
    let mlp = f.glu.ok_or("it has no gated ffn")?;
    put(
        &mut out,
        json!({ "attn_layer_indices": attention_layers(m), "mamba_expand": inner, "intermediate_size": mlp.d_ff, "mlp_bias": mlp.bias,
            "hidden_act": act_name(mlp.act), "rms_norm_eps": m.final_norm.eps }),
    );
    // Half of each head is rotated, unless another part stands among the parameters of RoPE.
    let whole = |r: &&Rope| matches!(r.scaling, RopeScaling::None);
    if let Some(a) = f.attention
        && let Some(r) = a.rope.as_ref().filter(whole)
        && 2 * r.dims != a.head_dim
    {
        let fraction = fraction(r.dims, a.head_dim);
        put(
            &mut out,
            json!({ "rope_scaling": { "rope_type": "default", "partial_rotary_factor": fraction } }),
        );
    }
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
            mamba2_rules(r.at(&mixer, &format!("{theirs}.mamba")));
        }
        glu_rules(r.at(&format!("{ours}.ffn"), &format!("{theirs}.feed_forward")));
    }
    r
}
