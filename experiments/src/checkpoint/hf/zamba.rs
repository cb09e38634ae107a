//! Zamba: Mamba-1 with several heads; at hybrid layers a shared transformer block over the concatenated residual stream and
//! embeddings is added, through a projection of the layer's own, to the mixer's input only.

use super::config::Config;
use super::parts::*;
use super::table::{Rules, Shape};
use super::{Family, Written};
use marimba_dsl::model::*;
use serde_json::json;

/// See the module.
pub(super) const FAMILY: Family = Family {
    model_type: "zamba",
    architecture: "ZambaForCausalLM",
    read,
    write,
    rules,
};

/// Parameter prefix of the shared block, as the DSL names it.
const SHARED: &str = "shared.block";

fn read(c: &Config) -> Model {
    let (n, d) = (c.count("num_hidden_layers"), c.count("hidden_size"));
    let norm = norm(c.float("rms_norm_eps"));
    c.only_silu("hidden_mamba_act");
    let kinds = c
        .layer_types(
            "layers_block_type",
            Some(n),
            &["linear_attention", "hybrid"],
        )
        .unwrap_or_else(|| {
            // The first three layers are fixed; the period counts from the fourth.
            let rest = |i: usize| {
                if periodic(c, i - 3, "attn") {
                    "hybrid"
                } else {
                    "linear_attention"
                }
            };
            let kind = |i| {
                if i < 2 {
                    "linear_attention"
                } else if i == 2 {
                    "hybrid"
                } else {
                    rest(i)
                }
            };
            (0..n).map(|i| kind(i).to_string()).collect()
        });
    let n_heads = c.count("num_attention_heads");
    let head_dim = c
        .opt_count("attention_head_dim")
        .unwrap_or_else(|| c.divide("2 x hidden_size", 2 * d, "num_attention_heads", n_heads));
    if let Some(h) = c.opt_count("attention_hidden_size").filter(|h| *h != 2 * d) {
        c.problem(format!(
            "attention_hidden_size is {h}, but 2 x hidden_size is {}",
            2 * d
        ));
    }
    let mut shared = attention(c, head_dim, None, false);
    shared.scale = (head_dim as f64 / 2.0).powf(-0.5);
    let ffn = Ffn::Glu(Glu {
        act: c.act("hidden_act"),
        ..glu(c, c.count("intermediate_size"), false)
    });
    let bias = c.flag("mamba_proj_bias");
    let inner = (c.float("mamba_expand") * d as f64) as usize;
    let heads = c.count("n_mamba_heads");
    c.divide("the inner width of Mamba", inner, "n_mamba_heads", heads);
    let mamba = Mamba1 {
        d_inner: inner,
        d_state: c.count("mamba_d_state"),
        d_conv: c.count("mamba_d_conv"),
        dt_rank: c.opt_count("mamba_dt_rank").unwrap_or(d.div_ceil(16)),
        n_heads: heads,
        conv_bias: c.flag("mamba_conv_bias"),
        in_proj_bias: bias,
        out_proj_bias: bias,
        dt_bc_norm: None,
        dt_init: c.dt_init(),
    };
    let layers = kinds
        .iter()
        .enumerate()
        .map(|(i, kind)| Layer {
            inject: (kind == "hybrid").then(|| Inject {
                weights: SHARED.into(),
                own_weights: format!("layers.{i}.inject"),
                norm,
                mixer: shared.clone(),
                ffn_norm: norm,
                ffn: ffn.clone(),
            }),
            mixer: Some(sub(i, "mixer", "mamba", norm, Mixer::Mamba1(mamba.clone()))),
            ffn: None,
        })
        .collect();
    model(c, layers, norm)
}

fn write(m: &Model) -> Written {
    let f = firsts(m);
    let mut out = write_base(m, FAMILY.model_type, FAMILY.architecture);
    let s = f.mamba1.ok_or("it has no Mamba-1 layer")?;
    let shared = f.inject.ok_or("it has no shared block")?;
    let Ffn::Glu(ffn) = &shared.ffn else {
        return Err("the ffn of its shared block is not gated".into());
    };
    let kind = |l: &Layer| {
        if l.inject.is_some() {
            "hybrid"
        } else {
            "mamba"
        }
    };
    let kinds: Vec<&str> = m.layers.iter().map(kind).collect();
    put(
        &mut out,
        json!({ "layers_block_type": kinds, "num_attention_heads": shared.mixer.n_heads,
            "num_key_value_heads": shared.mixer.n_kv_heads, "attention_head_dim": shared.mixer.head_dim,
            "attention_hidden_size": 2 * m.d_model, "intermediate_size": ffn.d_ff, "hidden_act": act_name(ffn.act),
            "hidden_mamba_act": "silu", "rms_norm_eps": m.final_norm.eps, "n_mamba_heads": s.n_heads,
            "mamba_d_state": s.d_state, "mamba_d_conv": s.d_conv, "mamba_dt_rank": s.dt_rank,
            "mamba_expand": expand(s.d_inner, m.d_model)?, "mamba_conv_bias": s.conv_bias,
            "mamba_proj_bias": s.in_proj_bias, "use_mamba_kernels": true }),
    );
    write_dt(&mut out, s.dt_init, (0.0, f64::INFINITY));
    Ok(out)
}

fn rules(m: &Model) -> Rules {
    let mut r = Rules::new();
    outer_rules(&mut r, "model.embed_tokens", "model.final_layernorm");
    let mut stored = false;
    for (i, layer) in m.layers.iter().enumerate() {
        let (ours, mut theirs) = (format!("layers.{i}"), format!("model.layers.{i}"));
        if layer.inject.is_some() {
            if !stored {
                let block = format!("{theirs}.shared_transf");
                r.at(SHARED, &block)
                    .same("norm", "input_layernorm.weight")
                    .same("ffn_norm", "pre_ff_layernorm.weight");
                attention_rules(r.at(&format!("{SHARED}.mixer"), &format!("{block}.self_attn")));
                glu_rules(r.at(&format!("{SHARED}.ffn"), &format!("{block}.feed_forward")));
                stored = true;
            }
            r.at(&format!("{ours}.inject"), &theirs)
                .same("linear", "linear.weight");
            theirs.push_str(".mamba_decoder");
        }
        let mixer = format!("{ours}.mixer");
        r.at(&mixer, &theirs).same("norm", "input_layernorm.weight");
        r.at(&mixer, &format!("{theirs}.mamba"));
        if let Some(Mixer::Mamba1(s)) = layer.mixer.as_ref().map(|s| &s.body) {
            let heads = Shape::Split(s.n_heads);
            // Channels of x and of the gate alternate.
            r.sections("in_proj", &[s.d_inner, s.d_inner], "in_proj", s.d_inner)
                .rule(&["conv"], "conv1d.weight", 1, Shape::Conv)
                .same("conv.bias", "conv1d.bias")
                .rule(&["x_proj"], "x_proj_weight", 1, heads)
                .rule(&["dt_proj"], "dt_proj_weight", 1, heads)
                .rule(&["dt_bias"], "dt_proj_bias", 1, heads)
                .rule(&["a_log"], "A_log", 1, heads)
                .rule(&["d"], "D", 1, heads)
                .linear("out_proj", "out_proj");
        }
    }
    r
}
