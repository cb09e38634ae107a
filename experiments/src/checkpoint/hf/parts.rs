//! Pieces that several families share: building a model from a configuration, names of common mixers and ffns, and the way back.

use super::config::Config;
use super::table::{Rules, Shape};
use marimba_dsl::model::*;
use serde_json::{Map, Value, json};

/// A sublayer of layer `i` with its own weights.
pub(super) fn sub<T>(i: usize, half: &str, name: &str, norm: Norm, body: T) -> Sublayer<T> {
    Sublayer {
        weights: format!("layers.{i}.{half}"),
        name: name.into(),
        norm,
        body,
        residual_multiplier: 1.0,
    }
}

/// An ordinary norm.
pub(super) fn norm(eps: f64) -> Norm {
    Norm {
        eps,
        zero_centered: false,
    }
}

/// The model around `layers`, with the keys that all families spell alike.
pub(super) fn model(c: &Config, layers: Vec<Layer>, final_norm: Norm) -> Model {
    let name: String = c
        .path()
        .parent()
        .and_then(|p| p.file_name())
        .map(|n| n.to_string_lossy().into_owned())
        .filter(|n| !n.is_empty())
        .or(c.opt_word("model_type").map(str::to_string))
        .unwrap_or_default();
    Model {
        name,
        vocab_size: c.count("vocab_size"),
        d_model: c.count("hidden_size"),
        context_len: c.count_or("max_position_embeddings", 2048).max(1),
        embedding: Embedding { multiplier: 1.0 },
        layers,
        decoder: None,
        final_norm,
        head: Head {
            tied: c.flag("tie_word_embeddings"),
            multiplier: 1.0,
        },
        init: Init {
            std: c
                .opt_float("initializer_range")
                .filter(|s| *s > 0.0)
                .unwrap_or(0.02),
            scale_output: c.flag_or("rescale_prenorm_residual", false),
        },
    }
}

/// Plain grouped-query attention from the usual keys; `bias` covers all four projections.
pub(super) fn attention(c: &Config, head_dim: usize, rope: Option<Rope>, bias: bool) -> Attention {
    let n_heads = c.count("num_attention_heads");
    let n_kv_heads = c.opt_count("num_key_value_heads").unwrap_or(n_heads);
    c.divide(
        "num_attention_heads",
        n_heads,
        "num_key_value_heads",
        n_kv_heads,
    );
    Attention {
        n_heads,
        n_kv_heads,
        head_dim,
        rope,
        window: None,
        qkv_bias: bias,
        out_bias: bias,
        scale: (head_dim as f64).powf(-0.5),
        qk_norm: None,
        key_multiplier: 1.0,
        output_gate: false,
    }
}

/// `head_dim`, or hidden/heads.
pub(super) fn head_dim(c: &Config) -> usize {
    c.opt_count("head_dim").unwrap_or_else(|| {
        c.divide(
            "hidden_size",
            c.count("hidden_size"),
            "num_attention_heads",
            c.count("num_attention_heads"),
        )
    })
}

/// Mamba-2 from the keys `mamba_*` of Bamba, Granite and Falcon-H1.
pub(super) fn mamba2(c: &Config, d_inner: usize, gate: GatedNorm) -> Mamba2 {
    c.only_silu("hidden_act");
    let n_heads = c.count("mamba_n_heads");
    let fitting = c.divide(
        "the inner width of Mamba-2",
        d_inner,
        "mamba_n_heads",
        n_heads,
    );
    let head_dim = c.opt_count("mamba_d_head").unwrap_or(fitting);
    if head_dim != fitting {
        c.problem(format!(
            "mamba_n_heads {n_heads} x mamba_d_head {head_dim} is not the inner width {d_inner}"
        ));
    }
    let bias = c.flag("mamba_proj_bias");
    let n_groups = c.count("mamba_n_groups");
    c.divide("mamba_n_heads", n_heads, "mamba_n_groups", n_groups);
    Mamba2 {
        n_heads,
        head_dim,
        d_state: c.count("mamba_d_state"),
        n_groups,
        d_conv: c.count("mamba_d_conv"),
        chunk_size: c.count("mamba_chunk_size"),
        conv_bias: c.flag("mamba_conv_bias"),
        in_proj_bias: bias,
        out_proj_bias: bias,
        dt_limit: c.dt_limit(),
        dt_limit_in_decode: true,
        gate,
        multipliers: [1.0; 5],
        dt_init: c.dt_init(),
        a_init: (1.0, 16.0),
    }
}

/// Gated ffn of width `d_ff` with the activation `hidden_act`.
pub(super) fn glu(c: &Config, d_ff: usize, bias: bool) -> Glu {
    Glu {
        d_ff,
        act: c.act("hidden_act"),
        bias,
        gate_multiplier: 1.0,
        out_multiplier: 1.0,
    }
}

/// Experts that are gated ffns, chosen by softmax.
pub(super) fn softmax_moe(
    c: &Config,
    n_experts: usize,
    d_ff: usize,
    score: RouterScore,
    normalize: bool,
) -> Moe {
    let top_k = c.count("num_experts_per_tok");
    if top_k > n_experts {
        c.problem(format!(
            "num_experts_per_tok {top_k} exceeds the {n_experts} experts"
        ));
    }
    Moe {
        n_experts,
        top_k,
        expert: Expert {
            d_ff,
            act: c.act("hidden_act"),
            gated: true,
        },
        router: Router {
            score,
            normalize,
            correction_bias: false,
            n_groups: 1,
            top_groups: 1,
            scale: 1.0,
        },
        shared: None,
        latent: None,
        latent_bias: false,
        load_balance: c.float_or("router_aux_loss_coef", 0.0),
    }
}

/// Where the first kind of block stands for `num_hidden_layers` layers: `i % period == offset`.
pub(super) fn periodic(c: &Config, i: usize, what: &str) -> bool {
    let period = c.count(&format!("{what}_layer_period"));
    let offset = c.size(&format!("{what}_layer_offset"));
    if offset >= period {
        c.problem(format!(
            "{what}_layer_offset {offset} is not below {what}_layer_period {period}"
        ));
        return false;
    }
    i % period == offset
}

/// Names of embedding, final norm and head below `root`.
pub(super) fn outer_rules(r: &mut Rules, embedding: &str, final_norm: &str) {
    r.at("", "")
        .same("embedding", &format!("{embedding}.weight"))
        .same("final_norm", &format!("{final_norm}.weight"))
        .same("head", "lm_head.weight");
}

/// `q_proj k_proj v_proj o_proj`.
pub(super) fn attention_rules(r: &mut Rules) {
    r.linear("q_proj", "q_proj")
        .linear("k_proj", "k_proj")
        .linear("v_proj", "v_proj")
        .linear("out_proj", "o_proj");
}

/// Mamba-1 as `MambaMixer` and its relatives store it.
pub(super) fn mamba1_rules(r: &mut Rules) {
    r.linear("in_proj", "in_proj")
        .rule(&["conv"], "conv1d.weight", 1, Shape::Conv)
        .same("conv.bias", "conv1d.bias")
        .same("x_proj", "x_proj.weight")
        .same("dt_proj", "dt_proj.weight")
        .same("dt_bias", "dt_proj.bias")
        .same("a_log", "A_log")
        .same("d", "D")
        .linear("out_proj", "out_proj");
}

/// Mamba-2 as `Mamba2Mixer` stores it.
pub(super) fn mamba2_rules(r: &mut Rules) {
    r.linear("in_proj", "in_proj")
        .rule(&["conv"], "conv1d.weight", 1, Shape::Conv)
        .same("conv.bias", "conv1d.bias")
        .same("dt_bias", "dt_bias")
        .same("a_log", "A_log")
        .same("d", "D")
        .same("gate_norm", "norm.weight")
        .linear("out_proj", "out_proj");
}

/// `gate_proj up_proj down_proj`.
pub(super) fn glu_rules(r: &mut Rules) {
    r.linear("gate_proj", "gate_proj")
        .linear("up_proj", "up_proj")
        .linear("down_proj", "down_proj");
}

/// Experts stored one by one under these names.
pub(super) fn expert_rules(r: &mut Rules, gate: &str, up: &str, down: &str) {
    r.same("experts.gate_proj", &format!("experts.{{e}}.{gate}.weight"))
        .same("experts.up_proj", &format!("experts.{{e}}.{up}.weight"))
        .same("experts.down_proj", &format!("experts.{{e}}.{down}.weight"));
}

/// The first body of each kind in a model: what a configuration speaks of once.
#[derive(Clone, Copy, Default)]
pub(super) struct Firsts<'a> {
    /// Softmax attention.
    pub attention: Option<&'a Attention>,
    /// Mamba-1.
    pub mamba1: Option<&'a Mamba1>,
    /// Mamba-2.
    pub mamba2: Option<&'a Mamba2>,
    /// Gated DeltaNet.
    pub delta: Option<&'a GatedDeltaNet>,
    /// Branches of a parallel group.
    pub parallel: Option<&'a [Branch]>,
    /// Gated ffn.
    pub glu: Option<&'a Glu>,
    /// Plain ffn.
    pub mlp: Option<&'a Mlp>,
    /// Experts.
    pub moe: Option<&'a Moe>,
    /// Shared block.
    pub inject: Option<&'a Inject>,
}

/// Looks through the layers.
pub(super) fn firsts(m: &Model) -> Firsts<'_> {
    fn mixer<'a>(f: &mut Firsts<'a>, body: &'a Mixer) {
        match body {
            Mixer::Attention(x) => f.attention = f.attention.or(Some(x)),
            Mixer::Mamba1(x) => f.mamba1 = f.mamba1.or(Some(x)),
            Mixer::Mamba2(x) => f.mamba2 = f.mamba2.or(Some(x)),
            Mixer::GatedDeltaNet(x) => f.delta = f.delta.or(Some(x)),
            Mixer::Parallel(branches) => {
                f.parallel = f.parallel.or(Some(branches));
                branches.iter().for_each(|b| mixer(f, &b.mixer));
            }
        }
    }
    let mut f = Firsts::default();
    for layer in &m.layers {
        if let Some(s) = &layer.mixer {
            mixer(&mut f, &s.body);
        }
        if let Some(inject) = &layer.inject {
            f.inject = f.inject.or(Some(inject));
        }
        match layer.ffn.as_ref().map(|s| &s.body) {
            Some(Ffn::Glu(x)) => f.glu = f.glu.or(Some(x)),
            Some(Ffn::Mlp(x)) => f.mlp = f.mlp.or(Some(x)),
            Some(Ffn::Moe(x)) => f.moe = f.moe.or(Some(x)),
            None => {}
        }
    }
    f
}

/// Indices of layers whose mixer is softmax attention.
pub(super) fn attention_layers(m: &Model) -> Vec<usize> {
    let is = |l: &Layer| matches!(l.mixer.as_ref().map(|s| &s.body), Some(Mixer::Attention(_)));
    (0..m.layers.len()).filter(|&i| is(&m.layers[i])).collect()
}

/// Indices of layers with experts.
pub(super) fn moe_layers(m: &Model) -> Vec<usize> {
    let is = |l: &Layer| matches!(l.ffn.as_ref().map(|s| &s.body), Some(Ffn::Moe(_)));
    (0..m.layers.len()).filter(|&i| is(&m.layers[i])).collect()
}

/// Smallest (period, offset) that names exactly these of `n` layers; `None` when none does.
pub(super) fn period_offset(at: &[usize], n: usize) -> Option<(usize, usize)> {
    let fits = |p: usize, o: usize| (0..n).filter(|i| i % p == o).eq(at.iter().copied());
    (1..=n + 1).find_map(|p| (0..p).find(|&o| fits(p, o)).map(|o| (p, o)))
}

/// Keys that all families spell alike, in version 4's spelling, which version 5 reads too.
pub(super) fn write_base(m: &Model, model_type: &str, architecture: &str) -> Map<String, Value> {
    let mut out = Map::new();
    let mut put = |k: &str, v: Value| out.insert(k.into(), v);
    put("architectures", json!([architecture]));
    put("model_type", json!(model_type));
    put("vocab_size", json!(m.vocab_size));
    put("hidden_size", json!(m.d_model));
    put("num_hidden_layers", json!(m.layers.len()));
    put("max_position_embeddings", json!(m.context_len));
    put("tie_word_embeddings", json!(m.head.tied));
    put("initializer_range", json!(m.init.std));
    put("rescale_prenorm_residual", json!(m.init.scale_output));
    // The classes' own need not be in the vocabulary, or would end every continuation.
    for key in TOKEN_IDS {
        put(key, Value::Null);
    }
    put("torch_dtype", json!("float32"));
    put("use_cache", json!(true));
    out
}

/// Tokens of a meaning, of which a model knows nothing.
pub(super) const TOKEN_IDS: [&str; 3] = ["pad_token_id", "bos_token_id", "eos_token_id"];

/// Adds the fields of an object.
pub(super) fn put(out: &mut Map<String, Value>, fields: Value) {
    if let Value::Object(fields) = fields {
        out.extend(fields);
    }
}

/// Heads, width of heads and RoPE.
pub(super) fn write_attention(out: &mut Map<String, Value>, a: &Attention, context_len: usize) {
    put(
        out,
        json!({ "num_attention_heads": a.n_heads, "num_key_value_heads": a.n_kv_heads, "head_dim": a.head_dim,
            "attention_bias": a.qkv_bias, "attention_dropout": 0.0 }),
    );
    let Some(r) = &a.rope else { return };
    let fraction = fraction(r.dims, a.head_dim);
    put(
        out,
        json!({ "rope_theta": r.theta, "partial_rotary_factor": fraction }),
    );
    let mut scaling = match &r.scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context_len,
        } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor, "original_max_position_embeddings": original_context_len }),
        RopeScaling::Yarn {
            factor,
            original_context_len,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        } => json!({
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original_context_len,
            "beta_fast": beta_fast, "beta_slow": beta_slow, "attention_factor": attention_factor, "truncate": truncate }),
        RopeScaling::LongRope {
            short_factor,
            long_factor,
            original_context_len,
            attention_factor,
            ..
        } => json!({
            "rope_type": "longrope", "type": "longrope", "short_factor": short_factor, "long_factor": long_factor,
            "original_max_position_embeddings": original_context_len, "attention_factor": attention_factor,
            "factor": context_len as f64 / *original_context_len as f64 }),
    };
    // Bamba looks for it here only.
    if let Value::Object(inside) = &mut scaling {
        inside.insert("partial_rotary_factor".into(), json!(fraction));
    }
    put(out, json!({ "rope_scaling": scaling }));
}

/// The `partial_rotary_factor` that makes `dims` of `head_dim` channels, which transformers rounds down.
pub(super) fn fraction(dims: usize, head_dim: usize) -> f64 {
    let exact = dims as f64 / head_dim as f64;
    if (head_dim as f64 * exact) as usize == dims {
        exact
    } else {
        (dims as f64 + 0.5) / head_dim as f64
    }
}

/// Keys of an attention that no layer has.
pub(super) fn write_no_attention(out: &mut Map<String, Value>) {
    put(
        out,
        json!({ "num_attention_heads": 1, "num_key_value_heads": 1 }),
    );
}

/// Mamba-2 under the keys `mamba_*`; the inner width is said elsewhere.
pub(super) fn write_mamba2(out: &mut Map<String, Value>, s: &Mamba2) {
    put(
        out,
        json!({ "mamba_n_heads": s.n_heads, "mamba_d_head": s.head_dim, "mamba_n_groups": s.n_groups,
            "mamba_d_state": s.d_state, "mamba_d_conv": s.d_conv, "mamba_chunk_size": s.chunk_size,
            "mamba_conv_bias": s.conv_bias, "mamba_proj_bias": s.in_proj_bias }),
    );
    write_dt(out, s.dt_init, s.dt_limit);
}

/// `d_inner / d_model`, where a family has only this to say how wide its mixers are; transformers takes nothing but a whole number.
pub(super) fn expand(d_inner: usize, d_model: usize) -> Result<usize, String> {
    if d_inner.is_multiple_of(d_model.max(1)) {
        Ok(d_inner / d_model.max(1))
    } else {
        Err(format!(
            "the inner width {d_inner} of its mixers is no multiple of d_model {d_model}"
        ))
    }
}

/// dt at initialisation, and its limit where there is one (none needs no word, and has none in JSON).
pub(super) fn write_dt(out: &mut Map<String, Value>, dt: DtInit, limit: (f64, f64)) {
    put(
        out,
        json!({ "time_step_min": dt.min, "time_step_max": dt.max, "time_step_floor": dt.floor }),
    );
    if limit.1.is_finite() {
        put(out, json!({ "time_step_limit": [limit.0, limit.1] }));
    } else if limit.0 > 0.0 {
        put(
            out,
            json!({ "time_step_limit": [limit.0, { "__float__": "Infinity" }] }),
        );
    }
}

/// The transformers name of an activation.
pub(super) fn act_name(a: Act) -> &'static str {
    match a {
        Act::Silu => "silu",
        Act::Gelu => "gelu",
        Act::GeluTanh => "gelu_pytorch_tanh",
        Act::Relu => "relu",
        Act::Relu2 => "relu2",
    }
}
