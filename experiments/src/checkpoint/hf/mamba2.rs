//! Mamba-2: blocks of one Mamba-2 mixer each, no ffn. Mamba-Codestral has eight groups.

use super::config::Config;
use super::parts::*;
use super::table::Rules;
use super::{Family, Written};
use marimba_dsl::model::*;
use serde_json::json;

/// See the module.
pub(super) const FAMILY: Family = Family {
    model_type: "mamba2",
    architecture: "Mamba2ForCausalLM",
    read,
    write,
    rules,
};

fn read(c: &Config) -> Model {
    let d = c.count("hidden_size");
    let norm = norm(c.float("layer_norm_epsilon"));
    c.only_silu("hidden_act");
    let (n_heads, head_dim) = (c.count("num_heads"), c.count("head_dim"));
    let inner = (c.float("expand") * d as f64) as usize;
    if n_heads * head_dim != inner {
        c.problem(format!(
            "num_heads {n_heads} x head_dim {head_dim} is not expand x hidden_size, {inner}"
        ));
    }
    let n_groups = c.count("n_groups");
    c.divide("num_heads", n_heads, "n_groups", n_groups);
    let bias = c.flag("use_bias");
    let mixer = Mamba2 {
        n_heads,
        head_dim,
        d_state: c.count("state_size"),
        n_groups,
        d_conv: c.count("conv_kernel"),
        chunk_size: c.count("chunk_size"),
        conv_bias: c.flag("use_conv_bias"),
        in_proj_bias: bias,
        out_proj_bias: bias,
        dt_limit: c.dt_limit(),
        dt_limit_in_decode: true,
        gate: GatedNorm::GateThenNorm { eps: norm.eps },
        multipliers: [1.0; 5],
        dt_init: c.dt_init(),
        a_init: (1.0, 16.0),
    };
    let layers = (0..c.count("num_hidden_layers"))
        .map(|i| Layer {
            inject: None,
            mixer: Some(sub(i, "mixer", "mamba", norm, Mixer::Mamba2(mixer.clone()))),
            ffn: None,
        })
        .collect();
    model(c, layers, norm)
}

fn write(m: &Model) -> Written {
    let mut out = write_base(m, FAMILY.model_type, FAMILY.architecture);
    let s = firsts(m).mamba2.ok_or("it has no Mamba-2 layer")?;
    // transformers 5.23 divides out_proj of this family once more when it loads a configuration that asks for that at initialisation.
    put(
        &mut out,
        json!({ "num_heads": s.n_heads, "head_dim": s.head_dim, "state_size": s.d_state, "n_groups": s.n_groups,
            "conv_kernel": s.d_conv, "expand": expand(s.n_heads * s.head_dim, m.d_model)?, "chunk_size": s.chunk_size,
            "use_bias": s.in_proj_bias, "use_conv_bias": s.conv_bias, "hidden_act": "silu", "rms_norm": true,
            "layer_norm_epsilon": m.final_norm.eps, "residual_in_fp32": true, "rescale_prenorm_residual": false }),
    );
    write_dt(&mut out, s.dt_init, s.dt_limit);
    Ok(out)
}

fn rules(m: &Model) -> Rules {
    let mut r = Rules::new();
    outer_rules(&mut r, "backbone.embeddings", "backbone.norm_f");
    for i in 0..m.layers.len() {
        let (ours, theirs) = (format!("layers.{i}.mixer"), format!("backbone.layers.{i}"));
        r.at(&ours, &theirs).same("norm", "norm.weight");
        mamba2_rules(r.at(&ours, &format!("{theirs}.mixer")));
    }
    r
}
