//! Phi-3: Llama with q, k and v in one stored matrix, gate and up in another, and LongRoPE that recomputes the cache when decoding
//! crosses the original context.

use super::config::{Config, RopeDefaults};
use super::parts::*;
use super::table::Rules;
use super::{Family, Written, llama};
use marimba_dsl::model::*;
use serde_json::json;

/// See the module.
pub(super) const FAMILY: Family = Family {
    model_type: "phi3",
    architecture: "Phi3ForCausalLM",
    read,
    write,
    rules,
};

fn read(c: &Config) -> Model {
    let norm = norm(c.float("rms_norm_eps"));
    let head = head_dim(c);
    let defaults = RopeDefaults {
        fraction: Some(1.0),
        recompute_on_crossing: true,
        yarn_is_longrope: true,
        ..RopeDefaults::default()
    };
    let mut attention = attention(c, head, Some(c.rope(head, &defaults)), false);
    attention.window = c.opt_count("sliding_window");
    let mlp = glu(c, c.count("intermediate_size"), false);
    let layers = llama::stack(c.count("num_hidden_layers"), norm, &attention, |i| {
        sub(i, "ffn", "mlp", norm, Ffn::Glu(mlp.clone()))
    });
    model(c, layers, norm)
}

fn write(m: &Model) -> Written {
    let f = firsts(m);
    let mut out = write_base(m, FAMILY.model_type, FAMILY.architecture);
    let attention = f.attention.ok_or("it has no attention layer")?;
    write_attention(&mut out, attention, m.context_len);
    if let Some(RopeScaling::LongRope {
        original_context_len,
        ..
    }) = attention.rope.as_ref().map(|r| &r.scaling)
    {
        put(
            &mut out,
            json!({ "original_max_position_embeddings": original_context_len }),
        );
    }
    let mlp = f.glu.ok_or("it has no gated ffn")?;
    put(
        &mut out,
        json!({ "intermediate_size": mlp.d_ff, "hidden_act": act_name(mlp.act), "rms_norm_eps": m.final_norm.eps,
            "sliding_window": attention.window }),
    );
    Ok(out)
}

fn rules(m: &Model) -> Rules {
    let mut r = Rules::new();
    outer_rules(&mut r, "model.embed_tokens", "model.norm");
    for i in 0..m.layers.len() {
        let (ours, theirs) = (format!("layers.{i}"), format!("model.layers.{i}"));
        llama::norm_rules(r.at(&ours, &theirs));
        r.at(&format!("{ours}.mixer"), &format!("{theirs}.self_attn"))
            .fused(&["q_proj", "k_proj", "v_proj"], "qkv_proj", 1)
            .linear("out_proj", "o_proj");
        r.at(&format!("{ours}.ffn"), &format!("{theirs}.mlp"))
            .fused(&["gate_proj", "up_proj"], "gate_up_proj", 1)
            .linear("down_proj", "down_proj");
    }
    r
}
