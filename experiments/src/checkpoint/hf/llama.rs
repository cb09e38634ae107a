//! Llama: attention with RoPE in all its scalings, gated ffn.

use super::config::{Config, RopeDefaults};
use super::parts::*;
use super::table::Rules;
use super::{Family, Written};
use marimba_dsl::model::*;
use serde_json::json;

/// See the module.
pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    read,
    write,
    rules,
};

fn read(c: &Config) -> Model {
    let norm = norm(c.float("rms_norm_eps"));
    let head = head_dim(c);
    let rope = c.rope(head, &RopeDefaults::default());
    let attention = attention(c, head, Some(rope), c.flag("attention_bias"));
    let mlp = glu(c, c.count("intermediate_size"), c.flag("mlp_bias"));
    let layers = stack(c.count("num_hidden_layers"), norm, &attention, |i| {
        sub(i, "ffn", "mlp", norm, Ffn::Glu(mlp.clone()))
    });
    model(c, layers, norm)
}

/// Layers of attention and whatever ffn: Llama, Phi-3, Mixtral.
pub(super) fn stack(
    n: usize,
    norm: Norm,
    attention: &Attention,
    ffn: impl Fn(usize) -> Sublayer<Ffn>,
) -> Vec<Layer> {
    (0..n)
        .map(|i| Layer {
            inject: None,
            mixer: Some(sub(
                i,
                "mixer",
                "attn",
                norm,
                Mixer::Attention(attention.clone()),
            )),
            ffn: Some(ffn(i)),
        })
        .collect()
}

fn write(m: &Model) -> Written {
    let f = firsts(m);
    let mut out = write_base(m, FAMILY.model_type, FAMILY.architecture);
    write_attention(
        &mut out,
        f.attention.ok_or("it has no attention layer")?,
        m.context_len,
    );
    let mlp = f.glu.ok_or("it has no gated ffn")?;
    put(
        &mut out,
        json!({ "intermediate_size": mlp.d_ff, "mlp_bias": mlp.bias, "hidden_act": act_name(mlp.act),
            "rms_norm_eps": m.final_norm.eps, "pretraining_tp": 1 }),
    );
    Ok(out)
}

fn rules(m: &Model) -> Rules {
    let mut r = Rules::new();
    outer_rules(&mut r, "model.embed_tokens", "model.norm");
    for i in 0..m.layers.len() {
        let (ours, theirs) = (format!("layers.{i}"), format!("model.layers.{i}"));
        norm_rules(r.at(&ours, &theirs));
        attention_rules(r.at(&format!("{ours}.mixer"), &format!("{theirs}.self_attn")));
        glu_rules(r.at(&format!("{ours}.ffn"), &format!("{theirs}.mlp")));
    }
    r
}

/// Names of a layer's two norms in Llama and its relatives.
pub(super) fn norm_rules(r: &mut Rules) {
    r.same("mixer.norm", "input_layernorm.weight")
        .same("ffn.norm", "post_attention_layernorm.weight");
}
