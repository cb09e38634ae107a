//! Mamba: blocks of one Mamba-1 mixer each, no ffn.

use super::config::Config;
use super::parts::*;
use super::table::Rules;
use super::{Family, Written};
use marimba_dsl::model::*;
use serde_json::json;

/// See the module.
pub(super) const FAMILY: Family = Family {
    model_type: "mamba",
    architecture: "MambaForCausalLM",
    read,
    write,
    rules,
};

fn read(c: &Config) -> Model {
    read_with(c, None)
}

/// Falcon-Mamba differs by inner norms.
pub(super) fn read_with(c: &Config, dt_bc_norm: Option<DtBcNorm>) -> Model {
    let d = c.count("hidden_size");
    // The published Falcon-Mamba-7B carries `expand: 16` beside the true `intermediate_size: 8192`.
    let expanded = || (c.float("expand") * d as f64) as usize;
    let d_inner = c.opt_count("intermediate_size").unwrap_or_else(expanded);
    let norm = norm(c.float("layer_norm_epsilon"));
    c.only_silu("hidden_act");
    let bias = c.flag("use_bias");
    let mixer = Mamba1 {
        d_inner,
        d_state: c.count("state_size"),
        d_conv: c.count("conv_kernel"),
        dt_rank: c.opt_count("time_step_rank").unwrap_or(d.div_ceil(16)),
        n_heads: 1,
        conv_bias: c.flag("use_conv_bias"),
        in_proj_bias: bias,
        out_proj_bias: bias,
        dt_bc_norm,
        dt_init: c.dt_init(),
    };
    let layers = (0..c.count("num_hidden_layers"))
        .map(|i| Layer {
            inject: None,
            mixer: Some(sub(i, "mixer", "mamba", norm, Mixer::Mamba1(mixer.clone()))),
            ffn: None,
        })
        .collect();
    model(c, layers, norm)
}

fn write(m: &Model) -> Written {
    write_with(m, &FAMILY)
}

pub(super) fn write_with(m: &Model, family: &Family) -> Written {
    let mut out = write_base(m, family.model_type, family.architecture);
    let s = firsts(m).mamba1.ok_or("it has no Mamba-1 layer")?;
    // transformers 5.23 divides out_proj of this family once more when it loads a configuration that asks for that at initialisation.
    put(
        &mut out,
        json!({ "state_size": s.d_state, "conv_kernel": s.d_conv, "time_step_rank": s.dt_rank,
            "expand": s.d_inner.div_ceil(m.d_model.max(1)), "intermediate_size": s.d_inner, "use_bias": s.in_proj_bias,
            "use_conv_bias": s.conv_bias, "hidden_act": "silu", "layer_norm_epsilon": m.final_norm.eps,
            "residual_in_fp32": true, "rescale_prenorm_residual": false }),
    );
    if let Some(n) = s.dt_bc_norm {
        put(&mut out, json!({ "mixer_rms_eps": n.eps }));
    }
    write_dt(&mut out, s.dt_init, (0.0, f64::INFINITY));
    Ok(out)
}

pub(super) fn rules(m: &Model) -> Rules {
    let mut r = Rules::new();
    outer_rules(&mut r, "backbone.embeddings", "backbone.norm_f");
    for i in 0..m.layers.len() {
        let (ours, theirs) = (format!("layers.{i}.mixer"), format!("backbone.layers.{i}"));
        r.at(&ours, &theirs).same("norm", "norm.weight");
        mamba1_rules(r.at(&ours, &format!("{theirs}.mixer")));
    }
    r
}
