//! The surface syntax of a model file.
//!
//! ```ron
//! (
//!     name: "jamba-like",
//!     vocab_size: 65536, d_model: 1024, n_layers: 16, context_len: 4096,
//!     mixers: {
//!         "attn": Attention(n_heads: 16, n_kv_heads: 4, rope: None),
//!         "mamba": Mamba1(d_state: 16),
//!     },
//!     ffns: {
//!         "mlp": Glu(d_ff: 3584),
//!         "moe": Moe(n_experts: 16, top_k: 2, d_ff: 3584),
//!     },
//!     layout: (
//!         mixer: Every(name: "attn", period: 8, offset: 4, rest: "mamba"),
//!         ffn: Every(name: "moe", period: 2, offset: 1, rest: "mlp"),
//!     ),
//! )
//! ```
//! Fields that Hugging Face's configurations spell otherwise with the same meaning (`hidden_size`, `num_attention_heads`, ...) are
//! accepted under both names.

use super::{Indexed, LayerSet, Named, Names, Raw};
use crate::model::{Act, Decoder, RouterScore};
use serde::{Deserialize, Serialize};

/// A model file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// Name for run folders and reports. Default `"model"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// V, number of tokens. Required, 1 or more. The head costs 2 V D FLOPs per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocab_size: Option<usize>,
    /// D, width of the residual stream. Required, 1 or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub d_model: Option<usize>,
    /// Number of layers. Required unless the layout has a pattern or groups, whose length it then must equal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_layers: Option<usize>,
    /// Longest sequence meant, in tokens. Default 2048. Sizes default KV caches; no cost in training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_len: Option<usize>,
    /// eps of every norm that does not say its own. Default 1e-5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm_eps: Option<f64>,
    /// Norm weights are stored as offset from 1 (Qwen3-Next). Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm_zero_centered: Option<bool>,
    /// What reads the layers' result before the head. Default none. `LastState`: a row is read back from the hidden state of its last token
    /// alone, by two layers of width D; for the data `Compression` only, and needed there. 2 D^2 + 4 D parameters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decoder: Option<Decoder>,
    /// The norm before the head, where it differs from the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub final_norm: Option<Norm>,
    /// The head reads the embedding table instead of a matrix of its own. Default false. Saves V D parameters, no FLOPs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tied: Option<bool>,
    /// Factor on embedded tokens (Granite, Falcon-H1). Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding_multiplier: Option<f64>,
    /// Factor on logits: 1/logits_scaling in Granite, lm_head_multiplier in Falcon-H1. Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logits_multiplier: Option<f64>,
    /// Factor on every mixer's and ffn's result before it joins the residual stream (Granite). Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residual_multiplier: Option<f64>,
    /// How parameters start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<Init>,
    /// What may act over time, by name. Names are letters, digits, `_` and `-`; `"none"` is reserved.
    pub mixers: Named<Mixer>,
    /// What may act over channels, by name; names differ from those of mixers.
    pub ffns: Named<Ffn>,
    /// Which of them stands in which layer. Default: the only mixer and the only ffn (or none) in every layer.
    pub layout: Layout,
}

/// Which mixer and ffn stand in which layer: either rhythms (`mixer`, `ffn`), or `groups`, or a `pattern` string.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Layout {
    /// Names of mixers. Default: the only mixer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixer: Option<Names>,
    /// Names of ffns, independent of the mixers' rhythm. Default: the only ffn, or `"none"` when there are no ffns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ffn: Option<Names>,
    /// Groups of layers, each repeated: `[(times: 3, mixer: ["mamba", "mamba", "attn"], ffn: "mlp")]`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Group>,
    /// One character per layer, each layer with a mixer or an ffn only (Nemotron-H, Megatron): `"M-M*-M"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// What the characters of `pattern` mean. Default: `M` the only mixer that is not attention, `*` the only attention,
    /// `-` the only ffn without experts, `E` the only one with experts.
    #[serde(skip_serializing_if = "Named::is_empty")]
    pub symbols: Named<String>,
    /// Differences of single layers, by index: `{3: (mixer: (window: 128))}`.
    #[serde(skip_serializing_if = "Indexed::is_empty")]
    pub patch: Indexed<Patch>,
    /// Groups of layers whose sublayers share one set of weights.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub share: Vec<Share>,
    /// Shared attention blocks that feed the mixers of some layers (Zamba).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub inject: Vec<Inject>,
}

/// A run of layers, repeated. Its length is that of its longest list; single names fill it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Repetitions, 1 or more; default 1.
    #[serde(default = "one")]
    pub times: usize,
    /// Layers in one repetition; default: length of the longest list below, or 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub len: Option<usize>,
    /// Names of mixers; default `"none"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixer: Option<Names>,
    /// Names of ffns; default `"none"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ffn: Option<Names>,
}

fn one() -> usize {
    1
}

/// What is different in one layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Patch {
    /// Fields that replace those of the layer's mixer, such as `(window: 128)`; `Attention(..)` replaces a mixer of another kind,
    /// `Replace(Attention(..))` also one of the same kind, inheriting nothing.
    #[serde(skip_serializing_if = "no_raw")]
    pub mixer: Raw<Mixer>,
    /// Fields that replace those of the layer's ffn.
    #[serde(skip_serializing_if = "no_raw")]
    pub ffn: Raw<Ffn>,
    /// The norm before the mixer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixer_norm: Option<Norm>,
    /// The norm before the ffn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ffn_norm: Option<Norm>,
    /// Factor on the mixer's result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixer_residual: Option<f64>,
    /// Factor on the ffn's result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ffn_residual: Option<f64>,
}

fn no_raw<T>(r: &Raw<T>) -> bool {
    r.0.is_none()
}

/// Layers whose weights are those of the first one listed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// Two or more layers, the owner first.
    pub layers: Vec<usize>,
    /// Which half is shared; default both.
    #[serde(default)]
    pub part: SharePart,
}

/// Which half of a layer is shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SharePart {
    /// Mixer and ffn, each with its norm.
    #[default]
    Both,
    /// The mixer and its norm.
    Mixer,
    /// The ffn and its norm.
    Ffn,
}

/// A transformer block over the concatenation of the residual stream and the embedded tokens, added to the mixer input of the
/// listed layers through a linear map that each layer has of its own (Zamba).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inject {
    /// Name of the shared weights; default `"block"`. Entries of one name share.
    #[serde(default = "block")]
    pub name: String,
    /// The layers it feeds.
    pub layers: LayerSet,
    /// An attention mixer; `head_dim` defaults to 2 D / n_heads, as it reads width 2 D.
    pub mixer: String,
    /// An ffn.
    pub ffn: String,
    /// Norm over the concatenation; default as everywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub norm: Option<Norm>,
    /// Norm before the ffn; default as everywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ffn_norm: Option<Norm>,
}

fn block() -> String {
    "block".to_owned()
}

/// RMS norm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Norm {
    /// Added to the mean square. Above 0. Default: the model's `norm_eps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eps: Option<f64>,
    /// Weight stored as offset from 1. Default: the model's `norm_zero_centered` (false for norms inside a mixer).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_centered: Option<bool>,
}

/// Initialisation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Init {
    /// Standard deviation of embeddings and projections. Above 0. Default 0.02 (GPT-2; Megatron).
    pub std: f64,
    /// Divide output projections by sqrt(2 n_layers). Default true (GPT-2; Megatron; mamba_ssm).
    pub scale_output: bool,
}

impl Default for Init {
    fn default() -> Self {
        Init {
            std: 0.02,
            scale_output: true,
        }
    }
}

/// What acts over time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Mixer {
    /// Softmax attention.
    Attention(Attention),
    /// Selective scan.
    Mamba1(Mamba1),
    /// State space duality.
    Mamba2(Mamba2),
    /// Gated delta rule.
    GatedDeltaNet(GatedDeltaNet),
    /// Several mixers side by side: `Parallel([(name: "attn"), (name: "mamba", out_multiplier: 0.5)])`.
    Parallel(Vec<Branch>),
}

/// One mixer of a parallel group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Branch {
    /// A mixer of the file; with `mixer`, a name of its own.
    pub name: String,
    /// The mixer itself, when it is not declared elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixer: Option<Box<Mixer>>,
    /// Factor on its input. Default 1.
    #[serde(default = "unit", skip_serializing_if = "is_unit")]
    pub in_multiplier: f64,
    /// Factor on its result. Default 1.
    #[serde(default = "unit", skip_serializing_if = "is_unit")]
    pub out_multiplier: f64,
}

fn unit() -> f64 {
    1.0
}

fn is_unit(x: &f64) -> bool {
    *x == 1.0
}

/// Grouped-query softmax attention. Costs 4 S H P FLOPs per token beside its projections (S keys seen) and 2 G P values of cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Attention {
    /// H, query heads. Required, 1 or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_heads: Option<usize>,
    /// G, key/value heads; divides `n_heads`. Default `n_heads`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_kv_heads: Option<usize>,
    /// P. Default d_model / n_heads, which must then divide.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Rotary position embedding. Default `(theta: 10000)` over the whole head; `None` for no positions.
    pub rope: Option<Rope>,
    /// Sliding window in tokens, the query's own included, 1 or more. Default: all earlier tokens. Bounds FLOPs and cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// Biases on q, k, v. Default false.
    #[serde(skip_serializing_if = "is_false")]
    pub qkv_bias: bool,
    /// Bias on the output projection. Default false.
    #[serde(skip_serializing_if = "is_false")]
    pub out_bias: bool,
    /// Factor on q.k. Default head_dim^-0.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// RMS norm of each q and k head. Default none; `()` takes the model's eps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qk_norm: Option<Norm>,
    /// Factor on keys before RoPE (Falcon-H1). Default 1.
    #[serde(skip_serializing_if = "is_unit")]
    pub key_multiplier: f64,
    /// Gate the result by a sigmoid projected beside q (Qwen3-Next). Default false. Doubles the q projection.
    #[serde(skip_serializing_if = "is_false")]
    pub output_gate: bool,
}

fn is_false(b: &bool) -> bool {
    !*b
}

impl Default for Attention {
    fn default() -> Self {
        Attention {
            n_heads: None,
            n_kv_heads: None,
            head_dim: None,
            rope: Some(Rope::default()),
            window: None,
            qkv_bias: false,
            out_bias: false,
            scale: None,
            qk_norm: None,
            key_multiplier: 1.0,
            output_gate: false,
        }
    }
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rope {
    /// Base of the frequencies. Above 0. Default 10000.
    pub theta: f64,
    /// Rotated channels of each head: even, at most head_dim. Default from `fraction`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dims: Option<usize>,
    /// Rotated share of the head, in (0, 1]. Default 1; not together with `dims`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fraction: Option<f64>,
    /// Context extension. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaling: Option<RopeScaling>,
}

impl Default for Rope {
    fn default() -> Self {
        Rope {
            theta: 10_000.0,
            dims: None,
            fraction: None,
            scaling: None,
        }
    }
}

/// Context extension of RoPE. No cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// Position interpolation.
    Linear(Linear),
    /// Llama 3.1.
    Llama3(Llama3),
    /// YaRN.
    Yarn(Yarn),
    /// LongRoPE.
    LongRope(LongRope),
}

/// All frequencies divided by `factor`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {
    /// 1 or more.
    pub factor: f64,
}

/// Three bands of wavelengths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Llama3 {
    /// Divisor of low frequencies, 1 or more.
    pub factor: f64,
    /// Default 1.
    #[serde(default = "unit")]
    pub low_freq_factor: f64,
    /// Above `low_freq_factor`. Default 4.
    #[serde(default = "four")]
    pub high_freq_factor: f64,
    /// Context of the first training, in tokens.
    pub original_context_len: usize,
}

fn four() -> f64 {
    4.0
}

/// YaRN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Yarn {
    /// Extension factor, 1 or more.
    pub factor: f64,
    /// Context of the first training, in tokens.
    pub original_context_len: usize,
    /// Rotations above which a dimension is extrapolated. Default 32.
    #[serde(default = "beta_fast")]
    pub beta_fast: f64,
    /// Rotations below which a dimension is interpolated. Default 1.
    #[serde(default = "unit")]
    pub beta_slow: f64,
    /// Multiplies cos and sin. Default 0.1 ln(factor) + 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_factor: Option<f64>,
    /// Round the ramp's bounds outwards to whole dimensions. Default true.
    #[serde(default = "yes")]
    pub truncate: bool,
}

fn beta_fast() -> f64 {
    32.0
}

fn yes() -> bool {
    true
}

/// LongRoPE.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LongRope {
    /// rotated dims / 2 divisors for sequences up to the original context.
    pub short_factor: Vec<f64>,
    /// As many beyond it.
    pub long_factor: Vec<f64>,
    /// Context of the first training, in tokens.
    pub original_context_len: usize,
    /// Multiplies cos and sin. Default sqrt(1 + ln(s) / ln(original_context_len)) with s = context_len / original_context_len.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_factor: Option<f64>,
    /// When decoding crosses the boundary: recompute the cache with long factors. Default true (equals an uncached run).
    #[serde(default = "yes")]
    pub recompute_on_crossing: bool,
}

/// Mamba-1 mixer. State I N + I (K-1) values per sequence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mamba1 {
    /// I / D. Default 2; not together with `d_inner`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expand: Option<f64>,
    /// I. Default expand d_model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub d_inner: Option<usize>,
    /// N. Default 16.
    pub d_state: usize,
    /// K, taps of the convolution. Default 4.
    pub d_conv: usize,
    /// Rank of the dt projection. Default ceil(d_model / 16).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dt_rank: Option<usize>,
    /// Heads with their own x_proj and dt_proj (Zamba); divides I. Default 1.
    pub n_heads: usize,
    /// Bias of the convolution. Default true.
    pub conv_bias: bool,
    /// Bias of the input projection. Default false.
    pub in_proj_bias: bool,
    /// Bias of the output projection. Default false.
    pub out_proj_bias: bool,
    /// RMS norms on dt, B and C (Jamba weighted, Falcon-Mamba not). Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dt_bc_norm: Option<DtBcNorm>,
    /// Range of dt at initialisation.
    pub dt_init: DtInit,
}

impl Default for Mamba1 {
    fn default() -> Self {
        Mamba1 {
            expand: None,
            d_inner: None,
            d_state: 16,
            d_conv: 4,
            dt_rank: None,
            n_heads: 1,
            conv_bias: true,
            in_proj_bias: false,
            out_proj_bias: false,
            dt_bc_norm: None,
            dt_init: DtInit::default(),
        }
    }
}

/// RMS norms inside Mamba-1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DtBcNorm {
    /// Default: the model's `norm_eps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eps: Option<f64>,
    /// With learned weights. Default true.
    pub weighted: bool,
}

impl Default for DtBcNorm {
    fn default() -> Self {
        DtBcNorm {
            eps: None,
            weighted: true,
        }
    }
}

/// dt at initialisation: log-uniform in [min, max], not below floor (mamba_ssm).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DtInit {
    /// Above 0. Default 1e-3.
    pub min: f64,
    /// At least `min`. Default 0.1.
    pub max: f64,
    /// Default 1e-4.
    pub floor: f64,
}

impl Default for DtInit {
    fn default() -> Self {
        DtInit {
            min: 1e-3,
            max: 0.1,
            floor: 1e-4,
        }
    }
}

/// Mamba-2 mixer. State H P N + (I + 2 G N)(K-1) values per sequence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mamba2 {
    /// I / D, where I = n_heads head_dim. Default 2; a check when `n_heads` is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expand: Option<f64>,
    /// H. Default expand d_model / head_dim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_heads: Option<usize>,
    /// P. Default 64.
    pub head_dim: usize,
    /// N. Default 128.
    pub d_state: usize,
    /// G, groups of heads with one B and C; divides H. Default 1.
    pub n_groups: usize,
    /// K, taps of the convolution. Default 4.
    pub d_conv: usize,
    /// Tokens per chunk of the scan. Default 64. Cost only, never results.
    pub chunk_size: usize,
    /// Bias of the convolution. Default true.
    pub conv_bias: bool,
    /// Bias of the input projection. Default false.
    pub in_proj_bias: bool,
    /// Bias of the output projection. Default false.
    pub out_proj_bias: bool,
    /// dt is clamped to this range after softplus. Default (0, inf).
    pub dt_limit: (f64, f64),
    /// Clamp in one-token decoding too. Default true; false is a quirk of transformers.
    pub dt_limit_in_decode: bool,
    /// Gate and norm of the result. Default `GateThenNorm` with the model's eps.
    pub gate: Gate,
    /// Factors on z, x, B, C, dt of the input projection's result (Falcon-H1). Default all 1.
    pub multipliers: [f64; 5],
    /// Range of dt at initialisation.
    pub dt_init: DtInit,
    /// Range of A at initialisation, uniform. Default (1, 16).
    pub a_init: (f64, f64),
}

impl Default for Mamba2 {
    fn default() -> Self {
        Mamba2 {
            expand: None,
            n_heads: None,
            head_dim: 64,
            d_state: 128,
            n_groups: 1,
            d_conv: 4,
            chunk_size: 64,
            conv_bias: true,
            in_proj_bias: false,
            out_proj_bias: false,
            dt_limit: (0.0, f64::INFINITY),
            dt_limit_in_decode: true,
            gate: Gate::GateThenNorm { eps: None },
            multipliers: [1.0; 5],
            dt_init: DtInit::default(),
            a_init: (1.0, 16.0),
        }
    }
}

/// How z gates the Mamba-2 result y.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Gate {
    /// `y * silu(z)`.
    GateOnly,
    /// `rms(y * silu(z)) * w`.
    GateThenNorm {
        /// Default: the model's `norm_eps`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        eps: Option<f64>,
    },
    /// `rms(y) * w * silu(z)`.
    NormThenGate {
        /// Default: the model's `norm_eps`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        eps: Option<f64>,
    },
}

/// Gated DeltaNet mixer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GatedDeltaNet {
    /// Key heads. Required, 1 or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_k_heads: Option<usize>,
    /// Value heads, a multiple of `n_k_heads`. Default `n_k_heads`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_v_heads: Option<usize>,
    /// Width of a key head. Default 128.
    pub k_head_dim: usize,
    /// Width of a value head. Default 128.
    pub v_head_dim: usize,
    /// K. Default 4.
    pub d_conv: usize,
    /// Tokens per chunk. Default 64. Cost only.
    pub chunk_size: usize,
    /// eps of the output norm. Default: the model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm_eps: Option<f64>,
    /// Range of dt at initialisation.
    pub dt_init: DtInit,
    /// Range of A at initialisation, uniform. Default (1, 16). A head forgets a share of 1 - exp(-A dt) a token.
    pub a_init: (f64, f64),
}

impl Default for GatedDeltaNet {
    fn default() -> Self {
        GatedDeltaNet {
            n_k_heads: None,
            n_v_heads: None,
            k_head_dim: 128,
            v_head_dim: 128,
            d_conv: 4,
            chunk_size: 64,
            norm_eps: None,
            dt_init: DtInit::default(),
            a_init: (1.0, 16.0),
        }
    }
}

/// What acts over channels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Ffn {
    /// Gated.
    Glu(Glu),
    /// Plain.
    Mlp(Mlp),
    /// Mixture of experts.
    Moe(Moe),
}

/// Gated ffn, 3 D F parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Glu {
    /// F. Required, 1 or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub d_ff: Option<usize>,
    /// Silu, Gelu, GeluTanh, Relu or Relu2. Default Silu.
    pub act: Act,
    /// Biases. Default false.
    #[serde(skip_serializing_if = "is_false")]
    pub bias: bool,
    /// Factor inside the activation. Default 1.
    #[serde(skip_serializing_if = "is_unit")]
    pub gate_multiplier: f64,
    /// Factor on the result. Default 1.
    #[serde(skip_serializing_if = "is_unit")]
    pub out_multiplier: f64,
}

impl Default for Glu {
    fn default() -> Self {
        Glu {
            d_ff: None,
            act: Act::Silu,
            bias: false,
            gate_multiplier: 1.0,
            out_multiplier: 1.0,
        }
    }
}

/// Plain ffn, 2 D F parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mlp {
    /// F. Required, 1 or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub d_ff: Option<usize>,
    /// Default Gelu.
    pub act: Act,
    /// Biases. Default false.
    #[serde(skip_serializing_if = "is_false")]
    pub bias: bool,
}

impl Default for Mlp {
    fn default() -> Self {
        Mlp {
            d_ff: None,
            act: Act::Gelu,
            bias: false,
        }
    }
}

/// Mixture of experts: parameters of `n_experts` ffns, FLOPs of `top_k`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Moe {
    /// E. Required, 1 or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_experts: Option<usize>,
    /// Experts per token, 1 to E. Default 2.
    pub top_k: usize,
    /// F of one expert. Required, 1 or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub d_ff: Option<usize>,
    /// Activation of experts. Default Silu.
    pub act: Act,
    /// Experts are `Glu` (true, default) or `Mlp`.
    pub gated: bool,
    /// How tokens choose.
    pub router: Router,
    /// An expert that sees every token. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared: Option<SharedExpert>,
    /// Experts work in this width between two projections (Nemotron-3). Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latent: Option<usize>,
    /// Biases on those projections. Default false.
    #[serde(skip_serializing_if = "is_false")]
    pub latent_bias: bool,
    /// Coefficient of the load-balance loss, 0 or more. Default 0.01 (Switch); 0 is off.
    pub load_balance: f64,
}

impl Default for Moe {
    fn default() -> Self {
        Moe {
            n_experts: None,
            top_k: 2,
            d_ff: None,
            act: Act::Silu,
            gated: true,
            router: Router::default(),
            shared: None,
            latent: None,
            latent_bias: false,
            load_balance: 0.01,
        }
    }
}

/// Router.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Router {
    /// SoftmaxAll (default), SoftmaxChosen or Sigmoid.
    pub score: RouterScore,
    /// Divide chosen weights by their sum. Default true.
    pub normalize: bool,
    /// A per-expert bias for the choice only. Default false.
    #[serde(skip_serializing_if = "is_false")]
    pub correction_bias: bool,
    /// Groups of experts; divides E. Default 1.
    pub n_groups: usize,
    /// Groups kept, 1 to `n_groups`. Default 1.
    pub top_groups: usize,
    /// Factor on the weights. Default 1.
    #[serde(skip_serializing_if = "is_unit")]
    pub scale: f64,
}

impl Default for Router {
    fn default() -> Self {
        Router {
            score: RouterScore::SoftmaxAll,
            normalize: true,
            correction_bias: false,
            n_groups: 1,
            top_groups: 1,
            scale: 1.0,
        }
    }
}

/// The expert that sees every token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedExpert {
    /// `Glu(..)` or `Mlp(..)`.
    pub ffn: Box<Ffn>,
    /// Weighted by a sigmoid gate (Qwen3-Next). Default false.
    #[serde(default, skip_serializing_if = "is_false")]
    pub gated: bool,
}
