//! Falcon-H1: Mamba-2 and attention in parallel on one normed input in every layer, multipliers everywhere.

use super::config::{Config, RopeDefaults};
use super::parts::*;
use super::table::Rules;
use super::{Family, Written};
use marimba_dsl::model::*;
use serde_json::json;

/// See the module.
pub(super) const FAMILY: Family = Family {
    model_type: "falcon_h1",
    architecture: "FalconH1ForCausalLM",
    read,
    write,
    rules,
};

fn read(c: &Config) -> Model {
    let d = c.count("hidden_size");
    let norm = norm(c.float("rms_norm_eps"));
    let head = head_dim(c);
    let rope = c.rope(head, &RopeDefaults::default());
    let mut attention = attention(c, head, Some(rope), c.flag("attention_bias"));
    attention.key_multiplier = c.float("key_multiplier");
    let gate = match (c.flag("mamba_rms_norm"), c.flag("mamba_norm_before_gate")) {
        (false, _) => GatedNorm::GateOnly,
        (true, true) => GatedNorm::NormThenGate { eps: norm.eps },
        (true, false) => GatedNorm::GateThenNorm { eps: norm.eps },
    };
    let expanded = || (c.float("mamba_expand") * d as f64) as usize;
    let mut mamba = mamba2(c, c.opt_count("mamba_d_ssm").unwrap_or_else(expanded), gate);
    mamba.out_proj_bias = c.flag("projectors_bias");
    mamba.multipliers = c.floats_or("ssm_multipliers", [1.0; 5]);
    let branch = |name: &str, mixer, what: &str| Branch {
        name: name.into(),
        mixer,
        in_multiplier: c.float_or(&format!("{what}_in_multiplier"), 1.0),
        out_multiplier: c.float_or(&format!("{what}_out_multiplier"), 1.0),
    };
    let parallel = Mixer::Parallel(vec![
        branch("mamba", Mixer::Mamba2(mamba), "ssm"),
        branch("attn", Mixer::Attention(attention), "attention"),
    ]);
    let mut mlp = glu(c, c.count("intermediate_size"), c.flag("mlp_bias"));
    [mlp.gate_multiplier, mlp.out_multiplier] = c.floats_or("mlp_multipliers", [1.0; 2]);
    let layers = (0..c.count("num_hidden_layers"))
        .map(|i| Layer {
            inject: None,
            mixer: Some(sub(i, "mixer", "hybrid", norm, parallel.clone())),
            ffn: Some(sub(i, "ffn", "mlp", norm, Ffn::Glu(mlp.clone()))),
        })
        .collect();
    let mut m = model(c, layers, norm);
    m.embedding.multiplier = c.float("embedding_multiplier");
    m.head.multiplier = c.float("lm_head_multiplier");
    m
}

fn write(m: &Model) -> Written {
    let f = firsts(m);
    let mut out = write_base(m, FAMILY.model_type, FAMILY.architecture);
    let branches = f.parallel.ok_or("it has no parallel group")?;
    let (attention, mamba) = (
        f.attention.ok_or("its parallel group has no attention")?,
        f.mamba2.ok_or("its parallel group has no Mamba-2")?,
    );
    write_attention(&mut out, attention, m.context_len);
    write_mamba2(&mut out, mamba);
    for b in branches {
        let what = if matches!(b.mixer, Mixer::Attention(_)) {
            "attention"
        } else {
            "ssm"
        };
        out.insert(format!("{what}_in_multiplier"), json!(b.in_multiplier));
        out.insert(format!("{what}_out_multiplier"), json!(b.out_multiplier));
    }
    let mlp = f.glu.ok_or("it has no gated ffn")?;
    let (rms, first) = match mamba.gate {
        GatedNorm::GateOnly => (false, true),
        GatedNorm::NormThenGate { .. } => (true, true),
        GatedNorm::GateThenNorm { .. } => (true, false),
    };
    put(
        &mut out,
        json!({ "mamba_d_ssm": mamba.n_heads * mamba.head_dim, "mamba_rms_norm": rms, "mamba_norm_before_gate": first,
            "projectors_bias": mamba.out_proj_bias, "ssm_multipliers": mamba.multipliers,
            "key_multiplier": attention.key_multiplier, "intermediate_size": mlp.d_ff, "mlp_bias": mlp.bias,
            "mlp_multipliers": [mlp.gate_multiplier, mlp.out_multiplier], "hidden_act": act_name(mlp.act),
            "embedding_multiplier": m.embedding.multiplier, "lm_head_multiplier": m.head.multiplier,
            "rms_norm_eps": m.final_norm.eps }),
    );
    Ok(out)
}

fn rules(m: &Model) -> Rules {
    let mut r = Rules::new();
    outer_rules(&mut r, "model.embed_tokens", "model.final_layernorm");
    for i in 0..m.layers.len() {
        let (ours, theirs) = (format!("layers.{i}"), format!("model.layers.{i}"));
        r.at(&ours, &theirs)
            .same("mixer.norm", "input_layernorm.weight")
            .same("ffn.norm", "pre_ff_layernorm.weight");
        mamba2_rules(r.at(&format!("{ours}.mixer.mamba"), &format!("{theirs}.mamba")));
        attention_rules(r.at(
            &format!("{ours}.mixer.attn"),
            &format!("{theirs}.self_attn"),
        ));
        glu_rules(r.at(&format!("{ours}.ffn"), &format!("{theirs}.feed_forward")));
    }
    r
}
