//! Mixtral: Llama with experts, weights renormalised over the chosen.

use super::config::{Config, RopeDefaults};
use super::parts::*;
use super::table::Rules;
use super::{Family, Written, llama};
use marimba_dsl::model::*;
use serde_json::json;

/// See the module.
pub(super) const FAMILY: Family = Family {
    model_type: "mixtral",
    architecture: "MixtralForCausalLM",
    read,
    write,
    rules,
};

fn read(c: &Config) -> Model {
    let norm = norm(c.float("rms_norm_eps"));
    let head = head_dim(c);
    let rope = c.rope(head, &RopeDefaults::default());
    let mut attention = attention(c, head, Some(rope), false);
    attention.window = c.opt_count("sliding_window");
    let moe = softmax_moe(
        c,
        c.count("num_local_experts"),
        c.count("intermediate_size"),
        RouterScore::SoftmaxAll,
        true,
    );
    let layers = llama::stack(c.count("num_hidden_layers"), norm, &attention, |i| {
        sub(i, "ffn", "moe", norm, Ffn::Moe(Box::new(moe.clone())))
    });
    model(c, layers, norm)
}

fn write(m: &Model) -> Written {
    let f = firsts(m);
    let mut out = write_base(m, FAMILY.model_type, FAMILY.architecture);
    let attention = f.attention.ok_or("it has no attention layer")?;
    write_attention(&mut out, attention, m.context_len);
    let moe = f.moe.ok_or("it has no experts")?;
    put(
        &mut out,
        json!({ "num_local_experts": moe.n_experts, "num_experts_per_tok": moe.top_k,
            "intermediate_size": moe.expert.d_ff, "hidden_act": act_name(moe.expert.act),
            "router_aux_loss_coef": moe.load_balance, "router_jitter_noise": 0.0, "output_router_logits": false,
            "rms_norm_eps": m.final_norm.eps, "sliding_window": attention.window }),
    );
    Ok(out)
}

fn rules(m: &Model) -> Rules {
    let mut r = Rules::new();
    outer_rules(&mut r, "model.embed_tokens", "model.norm");
    for i in 0..m.layers.len() {
        let (ours, theirs) = (format!("layers.{i}"), format!("model.layers.{i}"));
        llama::norm_rules(r.at(&ours, &theirs));
        attention_rules(r.at(&format!("{ours}.mixer"), &format!("{theirs}.self_attn")));
        r.at(
            &format!("{ours}.ffn"),
            &format!("{theirs}.block_sparse_moe"),
        )
        .same("router", "gate.weight");
        expert_rules(&mut r, "w1", "w3", "w2");
    }
    r
}
