//! The checked, fully resolved description of an architecture: what [`crate::check`] makes of a model file and what `ir` lowers.
//!
//! Everything optional in RON has its value here: defaults are filled in, names are looked up, the layout is unrolled into one
//! [`Layer`] per layer. Only `check` makes a `Valid<Model>`; the floors above accept nothing else. Nothing here knows RON syntax.
//!
//! Letters in comments: D d_model, I d_inner, H heads, G groups, P head_dim, N d_state, K conv taps, E experts, F d_ff, V vocabulary.

/// A decoder-only sequence model: embedding, layers, final norm, head.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// Name for run folders and reports.
    pub name: String,
    /// V.
    pub vocab_size: usize,
    /// D, width of the residual stream.
    pub d_model: usize,
    /// Longest sequence the model is meant for, in tokens. Sizes default KV caches; RoPE scaling has its own original length.
    pub context_len: usize,
    /// The token embedding.
    pub embedding: Embedding,
    /// The unrolled stack, first layer first.
    pub layers: Vec<Layer>,
    /// What stands between the layers and the norm before the head.
    pub decoder: Option<Decoder>,
    /// Norm before the head.
    pub final_norm: Norm,
    /// Projection to the vocabulary.
    pub head: Head,
    /// How parameters start when trained from scratch.
    pub init: Init,
}

/// What reads the layers' result, where it is not the head alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Decoder {
    /// Every place is read from the last one's hidden state h: `m(m(h + s_t))` with `m(x) = gelu(W norm(x) + b)`, W [D, D], and sines and
    /// cosines s_t of the place (the auto-encoder of MAD's compression task, arXiv 2403.17844). Not causal: for tasks that ask for the
    /// row itself, never for the next token. 2 D^2 + 4 D parameters.
    LastState,
}

/// `x = multiplier * table[token]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    /// Factor on looked-up rows (Granite, Falcon-H1). 1 changes nothing.
    pub multiplier: f64,
}

/// `logits = multiplier * (x @ w^T)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    /// The head reads the embedding table instead of a matrix of its own.
    pub tied: bool,
    /// Factor on logits: 1/logits_scaling in Granite, lm_head_multiplier in Falcon-H1.
    pub multiplier: f64,
}

/// RMS norm: `x * rsqrt(mean(x^2) + eps) * w`, or `* (1 + w)` when zero-centred. Statistics in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Added to the mean square.
    pub eps: f64,
    /// Weight is stored as offset from 1 (Qwen3-Next).
    pub zero_centered: bool,
}

/// One layer. `x += r * mixer(norm(x [+ inject]))`, then `x += r * ffn(norm(x))`; either half may be absent (Nemotron-H).
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Added to the mixer's input only, never to the residual stream (Zamba).
    pub inject: Option<Inject>,
    /// What acts over time.
    pub mixer: Option<Sublayer<Mixer>>,
    /// What acts over channels.
    pub ffn: Option<Sublayer<Ffn>>,
}

/// A norm, a body, and the weight of its result in the residual sum.
#[derive(Clone, Debug, PartialEq)]
pub struct Sublayer<T> {
    /// Parameter prefix, such as `layers.3.mixer`. Two sublayers with one prefix share all their weights (including the norm).
    pub weights: String,
    /// The name under which the body is declared in the file, such as `attn`.
    pub name: String,
    /// Norm of the body's input.
    pub norm: Norm,
    /// The mixer or ffn.
    pub body: T,
    /// Factor on the body's result before the residual sum (Granite).
    pub residual_multiplier: f64,
}

/// Zamba's shared transformer block: `t = linear(ffn(norm(mixer(norm(concat[x, embeddings])))))`, without residuals inside.
/// `linear` `[D D]` belongs to the layer (`layers.3.inject.linear`); the rest is shared by all injections with one `weights` prefix.
#[derive(Clone, Debug, PartialEq)]
pub struct Inject {
    /// Parameter prefix of the shared part, such as `shared.block`.
    pub weights: String,
    /// Prefix of the layer's own part, such as `layers.3.inject`.
    pub own_weights: String,
    /// Norm over the concatenation, width 2 D.
    pub norm: Norm,
    /// Reads 2 D, writes D.
    pub mixer: Attention,
    /// Norm of the ffn's input, width D.
    pub ffn_norm: Norm,
    /// The shared ffn.
    pub ffn: Ffn,
}

/// What acts over time. Closed: adding one makes the compiler print the to-do list.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    /// Softmax attention.
    Attention(Attention),
    /// Selective scan, Gu and Dao 2023 (arXiv 2312.00752).
    Mamba1(Mamba1),
    /// State space duality, Dao and Gu 2024 (arXiv 2405.21060).
    Mamba2(Mamba2),
    /// Gated delta rule, Yang et al. 2024 (arXiv 2412.06464).
    GatedDeltaNet(GatedDeltaNet),
    /// Several mixers reading one normed input, results summed (Falcon-H1).
    Parallel(Vec<Branch>),
}

/// One mixer of a parallel group: `out_multiplier * mixer(in_multiplier * x)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Branch {
    /// Declared name; also its parameter prefix below the sublayer's, such as `layers.3.mixer.attn`.
    pub name: String,
    /// Never `Parallel`.
    pub mixer: Mixer,
    /// Factor on the branch's input.
    pub in_multiplier: f64,
    /// Factor on the branch's result.
    pub out_multiplier: f64,
}

/// Grouped-query softmax attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Query heads H.
    pub n_heads: usize,
    /// Key/value heads G; divides H. Head h reads group h / (H/G).
    pub n_kv_heads: usize,
    /// P.
    pub head_dim: usize,
    /// Rotary position embedding, or none at all.
    pub rope: Option<Rope>,
    /// Sliding window in tokens, the query's own included: query i sees keys j with i - window < j <= i.
    pub window: Option<usize>,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub out_bias: bool,
    /// Factor on q.k; P^-0.5 unless the file says otherwise.
    pub scale: f64,
    /// RMS norm over P of each q and k head, weights `[P]` (Qwen3-Next).
    pub qk_norm: Option<Norm>,
    /// Factor on keys before RoPE (Falcon-H1).
    pub key_multiplier: f64,
    /// Result times sigmoid of a gate projected beside q (Qwen3-Next).
    pub output_gate: bool,
}

/// Rotary position embedding, halves convention: channel i pairs with i + dims/2 within the first `dims` channels of a head.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric frequencies.
    pub theta: f64,
    /// Rotated channels of each head; even, at most P. Frequencies are `theta^(-2i/dims)`.
    pub dims: usize,
    /// Context extension.
    pub scaling: RopeScaling,
}

/// How frequencies change to reach longer contexts. Formulas as in the named papers and in transformers' `modeling_rope_utils`.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Position interpolation: `f / factor` (arXiv 2306.15595).
    Linear {
        /// Above or equal 1.
        factor: f64,
    },
    /// Llama 3.1's three wavelength bands.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above original/low_freq_factor are divided by `factor`.
        low_freq_factor: f64,
        /// Wavelengths below original/high_freq_factor stay.
        high_freq_factor: f64,
        /// Context of the first training.
        original_context_len: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Extension factor.
        factor: f64,
        /// Context of the first training.
        original_context_len: usize,
        /// Rotations above which a dimension is extrapolated.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// Multiplies cos and sin.
        attention_factor: f64,
        /// Ramp bounds are rounded outwards to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (arXiv 2402.13753): `f_i / factor_i`, long factors iff the sequence is longer than the original context.
    LongRope {
        /// dims/2 factors for sequences up to the original context.
        short_factor: Vec<f64>,
        /// dims/2 factors beyond it.
        long_factor: Vec<f64>,
        /// Context of the first training.
        original_context_len: usize,
        /// Multiplies cos and sin in both regimes.
        attention_factor: f64,
        /// When decoding crosses the boundary: recompute the cache with long factors (Phi-3; equals an uncached run),
        /// or keep the old keys (transformers' Llama class).
        recompute_on_crossing: bool,
    },
}

/// Mamba-1 mixer.
#[derive(Clone, Debug, PartialEq)]
pub struct Mamba1 {
    /// I.
    pub d_inner: usize,
    /// N.
    pub d_state: usize,
    /// K.
    pub d_conv: usize,
    /// Rank of the dt projection.
    pub dt_rank: usize,
    /// Independent heads with their own x_proj and dt_proj over consecutive channel blocks of I (Zamba); usually 1.
    pub n_heads: usize,
    /// Bias of the convolution.
    pub conv_bias: bool,
    /// Bias of the input projection.
    pub in_proj_bias: bool,
    /// Bias of the output projection.
    pub out_proj_bias: bool,
    /// RMS norms on dt (rank-sized, before dt_proj), B and C: Jamba (weighted), Falcon-Mamba (weightless).
    pub dt_bc_norm: Option<DtBcNorm>,
    /// Range of dt at initialisation.
    pub dt_init: DtInit,
}

/// RMS norms inside the Mamba-1 mixer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DtBcNorm {
    /// Added to the mean square.
    pub eps: f64,
    /// With learned weights.
    pub weighted: bool,
}

/// dt at initialisation: log-uniform in [min, max], not below floor; the bias is its inverse softplus.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DtInit {
    /// Smallest dt, default 1e-3.
    pub min: f64,
    /// Largest dt, default 0.1.
    pub max: f64,
    /// Floor, default 1e-4.
    pub floor: f64,
}

/// Mamba-2 mixer. I = n_heads * head_dim.
#[derive(Clone, Debug, PartialEq)]
pub struct Mamba2 {
    /// H.
    pub n_heads: usize,
    /// P.
    pub head_dim: usize,
    /// N.
    pub d_state: usize,
    /// G; divides H. Consecutive heads share a group's B and C.
    pub n_groups: usize,
    /// K.
    pub d_conv: usize,
    /// Tokens per chunk of the chunked scan; cost only, never results.
    pub chunk_size: usize,
    /// Bias of the convolution.
    pub conv_bias: bool,
    /// Bias of the input projection.
    pub in_proj_bias: bool,
    /// Bias of the output projection.
    pub out_proj_bias: bool,
    /// dt is clamped to this range after softplus.
    pub dt_limit: (f64, f64),
    /// Clamp dt in one-token decoding too. Mathematically consistent; transformers does not (a named quirk for verification).
    pub dt_limit_in_decode: bool,
    /// How `z` gates the scan's result.
    pub gate: GatedNorm,
    /// Factors on the sections z, x, B, C, dt of the input projection's result (Falcon-H1).
    pub multipliers: [f64; 5],
    /// Range of dt at initialisation.
    pub dt_init: DtInit,
    /// Range of A at initialisation: uniform, `A_log = ln A`.
    pub a_init: (f64, f64),
}

/// Gate and norm of the Mamba-2 result; the norm runs over each of the G groups of I/G channels separately.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GatedNorm {
    /// `y * silu(z)`, no norm.
    GateOnly,
    /// `rms(y * silu(z)) * w`.
    GateThenNorm {
        /// Added to the mean square.
        eps: f64,
    },
    /// `rms(y) * w * silu(z)`.
    NormThenGate {
        /// Added to the mean square.
        eps: f64,
    },
}

/// Gated DeltaNet mixer (Qwen3-Next).
#[derive(Clone, Debug, PartialEq)]
pub struct GatedDeltaNet {
    /// Key (and query) heads; divides `n_v_heads`.
    pub n_k_heads: usize,
    /// Value heads.
    pub n_v_heads: usize,
    /// Width of a key head.
    pub k_head_dim: usize,
    /// Width of a value head.
    pub v_head_dim: usize,
    /// K.
    pub d_conv: usize,
    /// Tokens per chunk of the chunked form; cost only.
    pub chunk_size: usize,
    /// eps of the gated output norm (norm before gate, weight over `v_head_dim`).
    pub norm_eps: f64,
    /// Range of dt at initialisation.
    pub dt_init: DtInit,
    /// Range of A at initialisation: uniform, `A_log = ln A`.
    pub a_init: (f64, f64),
}

/// What acts over channels. Closed, as [`Mixer`].
#[derive(Clone, Debug, PartialEq)]
pub enum Ffn {
    /// Gated: `down(act(gate(x)) * up(x))`.
    Glu(Glu),
    /// Plain: `down(act(up(x)))`.
    Mlp(Mlp),
    /// Mixture of experts.
    Moe(Box<Moe>),
}

/// Activation functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Act {
    /// `x * sigmoid(x)`.
    Silu,
    /// Exact, by erf.
    Gelu,
    /// The tanh approximation.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2` (Nemotron-H).
    Relu2,
}

/// Gated ffn: `out_multiplier * down(act(gate_multiplier * gate(x)) * up(x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct Glu {
    /// F.
    pub d_ff: usize,
    /// Of the gate.
    pub act: Act,
    /// On all three projections.
    pub bias: bool,
    /// Factor inside the activation (Falcon-H1).
    pub gate_multiplier: f64,
    /// Factor on the result (Falcon-H1).
    pub out_multiplier: f64,
}

/// Plain ffn.
#[derive(Clone, Debug, PartialEq)]
pub struct Mlp {
    /// F.
    pub d_ff: usize,
    /// Between the projections.
    pub act: Act,
    /// On both projections.
    pub bias: bool,
}

/// Mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// E.
    pub n_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// All experts are alike.
    pub expert: Expert,
    /// How tokens choose.
    pub router: Router,
    /// An expert that sees every token, added to the routed sum.
    pub shared: Option<SharedExpert>,
    /// Experts work in this width between `latent_in [L D]` and `latent_out [D L]` (Nemotron-3).
    pub latent: Option<usize>,
    /// Bias on the latent projections.
    pub latent_bias: bool,
    /// Coefficient of the load-balance loss, `E * sum_e f_e * P_e` (Switch, arXiv 2101.03961 eq. 4, with f over all top-k choices); 0 is off.
    pub load_balance: f64,
}

/// One expert: gated or plain, never with biases.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Expert {
    /// F.
    pub d_ff: usize,
    /// Activation.
    pub act: Act,
    /// Gated (`Glu`) or plain (`Mlp`).
    pub gated: bool,
}

/// Scores, choice and weights of the router. `logits = x @ router^T [R E]`, in f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Router {
    /// Score function.
    pub score: RouterScore,
    /// Divide the chosen weights by their sum. With `SoftmaxAll` this equals a softmax over the chosen.
    pub normalize: bool,
    /// A per-expert bias added to scores for the choice only, never to weights (`e_score_correction_bias`); a buffer, not trained.
    pub correction_bias: bool,
    /// Experts stand in this many groups, of which only `top_groups` may be chosen from (group score: sum of its two best). 1 is off.
    pub n_groups: usize,
    /// Groups kept.
    pub top_groups: usize,
    /// Factor on the weights.
    pub scale: f64,
}

/// How router logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum RouterScore {
    /// Softmax over all experts, then top-k (Jamba, Mixtral).
    SoftmaxAll,
    /// Top-k, then softmax over the chosen (Granite).
    SoftmaxChosen,
    /// Independent sigmoids (Nemotron-H).
    Sigmoid,
}

/// The expert that sees every token.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedExpert {
    /// `Glu` or `Mlp`.
    pub ffn: Ffn,
    /// Weighted by `sigmoid(x @ gate^T)`, gate `[1 D]` (Qwen3-Next).
    pub gated: bool,
}

/// Initialisation of matrices; norms start at 1, biases at 0, Mamba's A, D, dt as their mixers say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Init {
    /// Standard deviation of normal initialisation of embeddings and projections, default 0.02 (GPT-2; Megatron).
    pub std: f64,
    /// Divide output projections by sqrt(2 * n_layers) (GPT-2; Megatron; mamba_ssm `rescale_prenorm_residual`).
    pub scale_output: bool,
}
