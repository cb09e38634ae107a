//! The rules of a model file, and its unrolled layers.

use super::{At, Cx};
use crate::de::decode;
use crate::diag::suggest;
use crate::model as m;
use crate::syntax::model as s;
use crate::syntax::{LayerSet, NONE, Names};
use crate::tree::{Kind, Node};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// What `check` accepts but lowering does not build yet, in words. Empty when all of it can run.
pub fn unsupported(_model: &m::Model) -> Vec<String> {
    Vec::new()
}

/// Resolves a model that stands at `at` in the document. `None` when so much is wrong that nothing can be resolved.
pub(crate) fn model(cx: &Cx<'_>, at: &At, file: &s::Model) -> Option<m::Model> {
    let before = cx.out.borrow().len();
    let vocab_size = cx.count(at, "vocab_size", file.vocab_size);
    let d_model = cx.count(at, "d_model", file.d_model);
    let context_len = cx.positive(at, "context_len", file.context_len.unwrap_or(2048));
    let norm = m::Norm {
        eps: cx.above_zero(at, "norm_eps", file.norm_eps.unwrap_or(1e-5)),
        zero_centered: file.norm_zero_centered.unwrap_or(false),
    };
    let embedding = m::Embedding {
        multiplier: cx.finite(
            at,
            "embedding_multiplier",
            file.embedding_multiplier.unwrap_or(1.0),
        ),
    };
    let head = m::Head {
        tied: file.tied.unwrap_or(false),
        multiplier: cx.finite(
            at,
            "logits_multiplier",
            file.logits_multiplier.unwrap_or(1.0),
        ),
    };
    let residual = cx.finite(
        at,
        "residual_multiplier",
        file.residual_multiplier.unwrap_or(1.0),
    );
    let init = file.init.unwrap_or_default();
    cx.above_zero(&at.at("init"), "std", init.std);
    let model = Build {
        cx,
        at,
        file,
        // A stand-in keeps the other rules at work when the width is missing or wrong.
        d_model: d_model.unwrap_or(DIVISIBLE),
        d_model_known: d_model.is_some(),
        context_len,
        norm,
        residual,
        used: RefCell::default(),
    };
    let final_norm = model.norm(&at.at("final_norm"), file.final_norm, norm);
    model.declared();
    let layers = model.layers();
    model.unused();
    if cx.out.borrow().len() > before {
        return None;
    }
    let model = m::Model {
        name: file.name.clone().unwrap_or_else(|| "model".to_owned()),
        vocab_size: vocab_size?,
        d_model: d_model?,
        context_len,
        embedding,
        layers: layers?,
        final_norm,
        head,
        init: m::Init {
            std: init.std,
            scale_output: init.scale_output,
        },
    };
    for what in unsupported(&model) {
        cx.error(at, "model::unsupported", what, "cannot be built yet", "");
    }
    Some(model).filter(|_| cx.out.borrow().len() == before)
}

/// Divides by all usual head counts.
const DIVISIBLE: usize = 1 << 20;

/// Longest stack.
const MAX_LAYERS: usize = 100_000;

struct Build<'a> {
    cx: &'a Cx<'a>,
    at: &'a At,
    file: &'a s::Model,
    d_model: usize,
    d_model_known: bool,
    context_len: usize,
    norm: m::Norm,
    residual: f64,
    used: RefCell<BTreeSet<String>>,
}

/// Names of one layer's halves; `None` is an empty place.
type Slot = (Option<String>, Option<String>);

impl Build<'_> {
    fn norm(&self, at: &At, n: Option<s::Norm>, default: m::Norm) -> m::Norm {
        let n = n.unwrap_or_default();
        m::Norm {
            // An inherited eps was checked where it stands.
            eps: n
                .eps
                .map_or(default.eps, |e| self.cx.above_zero(at, "eps", e)),
            zero_centered: n.zero_centered.unwrap_or(default.zero_centered),
        }
    }

    fn eps(&self, at: &At, name: &str, eps: Option<f64>) -> f64 {
        eps.map_or(self.norm.eps, |e| self.cx.above_zero(at, name, e))
    }

    /// Checks every declared mixer and ffn once, used or not, and the names.
    fn declared(&self) {
        let cx = self.cx;
        let names = |list: &str, all: Vec<&String>| {
            for n in all {
                let at = self.at.at(list).at(n);
                let fine = !n.is_empty()
                    && n.chars()
                        .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
                if !fine || n == NONE {
                    cx.error(
                        &at,
                        "model::bad_name",
                        format!("`{n}` cannot name a part of {list}"),
                        "not a usable name",
                        "names are letters, digits, `_` and `-`; `none` means an empty place",
                    );
                }
            }
        };
        names(
            "mixers",
            self.file.mixers.0.iter().map(|(n, _)| n).collect(),
        );
        names("ffns", self.file.ffns.0.iter().map(|(n, _)| n).collect());
        for (n, _) in &self.file.ffns.0 {
            if self.file.mixers.get(n).is_some() {
                let at = self.at.at("ffns").at(n);
                cx.error(
                    &at,
                    "model::name_clash",
                    format!("`{n}` names a mixer and an ffn"),
                    "also a mixer",
                    "give them different names",
                );
            }
        }
        let injected: Vec<&str> = self
            .file
            .layout
            .inject
            .iter()
            .map(|i| i.mixer.as_str())
            .collect();
        for (n, body) in &self.file.mixers.0 {
            // An injected mixer reads another width; it is checked where it is injected.
            if !injected.contains(&n.as_str()) {
                self.mixer(&self.at.at("mixers").at(n), body, self.d_model, true);
            }
        }
        for (n, body) in &self.file.ffns.0 {
            self.ffn(&self.at.at("ffns").at(n), body);
        }
        if self.file.mixers.is_empty()
            && self.file.ffns.is_empty()
            && !cx.struck(&self.at.at("mixers"))
            && !cx.struck(&self.at.at("ffns"))
        {
            cx.error(
                self.at,
                "model::empty",
                "the model declares no mixers and no ffns",
                "needs `mixers`",
                "add `mixers: {\"attn\": Attention(n_heads: 8)}` and `ffns: {\"mlp\": Glu(d_ff: 1024)}`",
            );
        }
    }

    fn unused(&self) {
        let used = self.used.borrow();
        let mixers = self
            .file
            .mixers
            .0
            .iter()
            .map(|(n, _)| ("mixers", "mixer", n));
        let ffns = self.file.ffns.0.iter().map(|(n, _)| ("ffns", "ffn", n));
        if !self.cx.out.borrow().is_empty() || !self.cx.struck.is_empty() {
            // Misspelt names and broken layouts leave others unused; that would be noise.
            let names_wrong = self
                .cx
                .out
                .borrow()
                .iter()
                .any(|d| d.code.starts_with("ron::") || d.code.starts_with("layout::"));
            if names_wrong {
                return;
            }
        }
        for (list, kind, n) in mixers.chain(ffns) {
            if !used.contains(n) {
                self.cx.error(
                    &self.at.at(list).at(n),
                    "layout::unused",
                    format!("{kind} `{n}` stands in no layer"),
                    "unused",
                    format!("name it in `layout`, or remove it from `{list}`"),
                );
            }
        }
    }

    /// Divides, or complains.
    fn divides(
        &self,
        at: &At,
        key: &str,
        code: &'static str,
        (what, whole): (&str, usize),
        (by, part): (&str, usize),
        help: &str,
    ) -> Option<usize> {
        if part == 0 || whole % part != 0 {
            self.cx.error(
                &at.at(key),
                code,
                format!("{what} {whole} is not divisible by {by} {part}"),
                format!(
                    "{whole} = {} x {part} + {}",
                    whole / part.max(1),
                    whole % part.max(1)
                ),
                help,
            );
            return None;
        }
        Some(whole / part)
    }

    fn mixer(&self, at: &At, body: &s::Mixer, width: usize, top: bool) -> Option<m::Mixer> {
        Some(match body {
            s::Mixer::Attention(a) => m::Mixer::Attention(self.attention(at, a, width)?),
            s::Mixer::Mamba1(a) => m::Mixer::Mamba1(self.mamba1(at, a)),
            s::Mixer::Mamba2(a) => m::Mixer::Mamba2(self.mamba2(at, a)),
            s::Mixer::GatedDeltaNet(a) => m::Mixer::GatedDeltaNet(self.gated_delta_net(at, a)?),
            s::Mixer::Parallel(branches) => {
                if !top {
                    self.cx.error(
                        at,
                        "model::nested_parallel",
                        "a parallel group inside a parallel group",
                        "not allowed here",
                        "list all mixers in one `Parallel([..])`",
                    );
                    return None;
                }
                m::Mixer::Parallel(self.parallel(at, branches)?)
            }
        })
    }

    fn parallel(&self, at: &At, branches: &[s::Branch]) -> Option<Vec<m::Branch>> {
        let cx = self.cx;
        if branches.is_empty() {
            cx.error(
                at,
                "model::empty_parallel",
                "a parallel group without mixers",
                "needs mixers",
                "write `Parallel([(name: \"attn\"), (name: \"mamba\")])`",
            );
        }
        let mut all = Vec::new();
        let mut seen = BTreeSet::new();
        for (i, b) in branches.iter().enumerate() {
            let at = at.at(i);
            if !seen.insert(&b.name) {
                cx.error(
                    &at.at("name"),
                    "model::branch_twice",
                    format!("`{}` stands twice in one parallel group", b.name),
                    "second time",
                    "declare a second mixer under another name",
                );
            }
            cx.finite(&at, "in_multiplier", b.in_multiplier);
            cx.finite(&at, "out_multiplier", b.out_multiplier);
            let mixer = match &b.mixer {
                Some(body) => self.mixer(&at.at("mixer"), body, self.d_model, false),
                None => self
                    .named_mixer(&b.name, &at.at("name"))
                    .and_then(|(body, declared)| {
                        if matches!(body, s::Mixer::Parallel(_)) {
                            cx.error(
                                &at.at("name"),
                                "model::nested_parallel",
                                format!("`{}` is itself a parallel group", b.name),
                                "a parallel group",
                                "list its mixers here",
                            );
                            return None;
                        }
                        // Complaints about it are made at its declaration.
                        self.quietly(|q| q.mixer(&declared, body, self.d_model, false))
                    }),
            };
            all.extend(mixer.map(|mixer| m::Branch {
                name: b.name.clone(),
                mixer,
                in_multiplier: b.in_multiplier,
                out_multiplier: b.out_multiplier,
            }));
        }
        (all.len() == branches.len()).then_some(all)
    }

    /// Runs rules whose complaints were already made elsewhere.
    fn quietly<T>(&self, f: impl FnOnce(&Build<'_>) -> T) -> T {
        let out = RefCell::default();
        let cx = Cx {
            root: self.cx.root,
            struck: self.cx.struck,
            out: &out,
        };
        f(&Build {
            cx: &cx,
            used: self.used.clone(),
            ..*self
        })
    }

    fn named_mixer(&self, name: &str, at: &At) -> Option<(&s::Mixer, At)> {
        self.used.borrow_mut().insert(name.to_owned());
        let declared = self.at.at("mixers").at(name);
        let found = self.file.mixers.get(name);
        if found.is_none() && !self.cx.struck(&declared) {
            let known: Vec<&str> = self.file.mixers.0.iter().map(|(n, _)| n.as_str()).collect();
            self.cx.error(
                at,
                "layout::undefined",
                format!("no mixer is named `{name}`"),
                "not declared in `mixers`",
                suggest(name, &known),
            );
        }
        found.map(|f| (f, declared))
    }

    fn named_ffn(&self, name: &str, at: &At) -> Option<(&s::Ffn, At)> {
        self.used.borrow_mut().insert(name.to_owned());
        let declared = self.at.at("ffns").at(name);
        let found = self.file.ffns.get(name);
        if found.is_none() && !self.cx.struck(&declared) {
            let known: Vec<&str> = self.file.ffns.0.iter().map(|(n, _)| n.as_str()).collect();
            self.cx.error(
                at,
                "layout::undefined",
                format!("no ffn is named `{name}`"),
                "not declared in `ffns`",
                suggest(name, &known),
            );
        }
        found.map(|f| (f, declared))
    }

    fn attention(&self, at: &At, a: &s::Attention, width: usize) -> Option<m::Attention> {
        let cx = self.cx;
        let n_heads = cx.count(at, "n_heads", a.n_heads);
        let n_kv_heads = a.n_kv_heads.map(|n| cx.positive(at, "n_kv_heads", n));
        if let (Some(h), Some(g)) = (n_heads, n_kv_heads) {
            self.divides(
                at,
                "n_kv_heads",
                "model::heads_divide",
                ("n_heads", h),
                ("n_kv_heads", g),
                "every key/value head serves the same number of query heads",
            );
        }
        let head_dim = match (a.head_dim, n_heads) {
            (Some(p), _) => Some(cx.positive(at, "head_dim", p)),
            (None, Some(h)) if self.d_model_known => self.divides(
                at,
                "n_heads",
                "model::heads_divide",
                (
                    if width == self.d_model {
                        "d_model"
                    } else {
                        "2 x d_model"
                    },
                    width,
                ),
                ("n_heads", h),
                "change n_heads, or give head_dim: it need not be d_model / n_heads",
            ),
            (None, _) => None,
        };
        if a.window == Some(0) {
            cx.error(
                &at.at("window"),
                "model::window_zero",
                "a window of 0 tokens sees nothing",
                "must be 1 or more",
                "the window counts the query's own token; leave it out to see all",
            );
        }
        if let Some(w) = a.window.filter(|w| *w > 0) {
            cx.positive(at, "window", w);
        }
        let rope = a
            .rope
            .as_ref()
            .map(|r| self.rope(&at.at("rope"), r, head_dim));
        if let Some(x) = a.scale {
            cx.above_zero(at, "scale", x);
        }
        cx.finite(at, "key_multiplier", a.key_multiplier);
        let plain = m::Norm {
            eps: self.norm.eps,
            zero_centered: false,
        };
        let qk_norm = a
            .qk_norm
            .map(|n| self.norm(&at.at("qk_norm"), Some(n), plain));
        let (n_heads, head_dim) = (n_heads?, head_dim?);
        Some(m::Attention {
            n_heads,
            n_kv_heads: n_kv_heads.unwrap_or(n_heads),
            head_dim,
            rope: match rope {
                Some(r) => Some(r?),
                None => None,
            },
            window: a.window,
            qkv_bias: a.qkv_bias,
            out_bias: a.out_bias,
            scale: a.scale.unwrap_or((head_dim as f64).powf(-0.5)),
            qk_norm,
            key_multiplier: a.key_multiplier,
            output_gate: a.output_gate,
        })
    }

    fn rope(&self, at: &At, r: &s::Rope, head_dim: Option<usize>) -> Option<m::Rope> {
        let cx = self.cx;
        cx.above_zero(at, "theta", r.theta);
        if r.dims.is_some() && r.fraction.is_some() {
            cx.error(
                &at.at("fraction"),
                "model::rope_dims_twice",
                "`dims` and `fraction` both say how much is rotated",
                "remove one of the two",
                "",
            );
        }
        if let Some(f) = r.fraction {
            cx.number(
                at,
                "fraction",
                f,
                |f| f > 0.0 && f <= 1.0,
                "above 0 and at most 1",
            );
        }
        let from_fraction = |p: usize| (p as f64 * r.fraction.unwrap_or(1.0)) as usize;
        let dims = match (r.dims, head_dim) {
            (Some(d), _) => Some(cx.positive(at, "dims", d)),
            (None, Some(p)) => Some(from_fraction(p)),
            (None, None) => None,
        };
        if let Some(d) = dims {
            let key = if r.dims.is_some() { "dims" } else { "fraction" };
            if d % 2 != 0 || d == 0 {
                cx.error(
                    &at.at(key),
                    "model::rope_odd",
                    format!("rope would rotate {d} channels of a head"),
                    "must be even and at least 2",
                    "channels are rotated in pairs: choose an even `dims`, or an even head_dim",
                );
                return None;
            }
            if let Some(p) = head_dim.filter(|p| d > *p) {
                cx.error(
                    &at.at(key),
                    "model::rope_too_wide",
                    format!("rope would rotate {d} channels of heads that have {p}"),
                    format!("must be at most {p}"),
                    "",
                );
                return None;
            }
        }
        let scaling = match &r.scaling {
            None => m::RopeScaling::None,
            Some(x) => self.scaling(&at.at("scaling"), x, dims),
        };
        Some(m::Rope {
            theta: r.theta,
            dims: dims?,
            scaling,
        })
    }

    fn scaling(&self, at: &At, x: &s::RopeScaling, dims: Option<usize>) -> m::RopeScaling {
        let cx = self.cx;
        let factor = |f: f64| {
            cx.number(
                at,
                "factor",
                f,
                |f| f >= 1.0 && f.is_finite(),
                "a finite number, 1 or more",
            )
        };
        match x {
            s::RopeScaling::Linear(l) => m::RopeScaling::Linear {
                factor: factor(l.factor),
            },
            s::RopeScaling::Llama3(l) => {
                cx.above_zero(at, "low_freq_factor", l.low_freq_factor);
                let low = l.low_freq_factor;
                cx.number(
                    at,
                    "high_freq_factor",
                    l.high_freq_factor,
                    |h| h > low && h.is_finite(),
                    "above `low_freq_factor`",
                );
                m::RopeScaling::Llama3 {
                    factor: factor(l.factor),
                    low_freq_factor: low,
                    high_freq_factor: l.high_freq_factor,
                    original_context_len: cx.positive(
                        at,
                        "original_context_len",
                        l.original_context_len,
                    ),
                }
            }
            s::RopeScaling::Yarn(y) => {
                cx.above_zero(at, "beta_slow", y.beta_slow);
                cx.number(
                    at,
                    "beta_fast",
                    y.beta_fast,
                    |b| b > y.beta_slow && b.is_finite(),
                    "above `beta_slow`",
                );
                if let Some(f) = y.attention_factor {
                    cx.above_zero(at, "attention_factor", f);
                }
                m::RopeScaling::Yarn {
                    factor: factor(y.factor),
                    original_context_len: cx.positive(
                        at,
                        "original_context_len",
                        y.original_context_len,
                    ),
                    beta_fast: y.beta_fast,
                    beta_slow: y.beta_slow,
                    // YaRN, equation 22: the temperature of softmax, folded into cos and sin.
                    attention_factor: y.attention_factor.unwrap_or(if y.factor <= 1.0 {
                        1.0
                    } else {
                        0.1 * y.factor.ln() + 1.0
                    }),
                    truncate: y.truncate,
                }
            }
            s::RopeScaling::LongRope(l) => {
                for (key, list) in [
                    ("short_factor", &l.short_factor),
                    ("long_factor", &l.long_factor),
                ] {
                    if let Some(d) = dims.filter(|d| list.len() != d / 2) {
                        cx.error(
                            &at.at(key),
                            "model::longrope_count",
                            format!(
                                "`{key}` has {} factors for {d} rotated channels",
                                list.len()
                            ),
                            format!("must have {}", d / 2),
                            "one factor per pair of rotated channels",
                        );
                    }
                    if let Some(i) = list.iter().position(|f| !f.is_finite() || *f <= 0.0) {
                        cx.error(
                            &at.at(key).at(i),
                            "value::out_of_range",
                            format!("factor {i} of `{key}` is {}", list[i]),
                            "must be a finite number above 0",
                            "",
                        );
                    }
                }
                let original = cx.positive(at, "original_context_len", l.original_context_len);
                if let Some(f) = l.attention_factor {
                    cx.above_zero(at, "attention_factor", f);
                }
                let s = self.context_len as f64 / original as f64;
                let default = if s <= 1.0 || original < 2 {
                    1.0
                } else {
                    (1.0 + s.ln() / (original as f64).ln()).sqrt()
                };
                m::RopeScaling::LongRope {
                    short_factor: l.short_factor.clone(),
                    long_factor: l.long_factor.clone(),
                    original_context_len: original,
                    attention_factor: l.attention_factor.unwrap_or(default),
                    recompute_on_crossing: l.recompute_on_crossing,
                }
            }
        }
    }

    fn dt_init(&self, at: &At, d: s::DtInit) -> m::DtInit {
        let at = at.at("dt_init");
        self.cx.above_zero(&at, "min", d.min);
        self.cx.number(
            &at,
            "max",
            d.max,
            |x| x >= d.min && x.is_finite(),
            "at least `min`",
        );
        self.cx.above_zero(&at, "floor", d.floor);
        m::DtInit {
            min: d.min,
            max: d.max,
            floor: d.floor,
        }
    }

    /// expand * D as a whole number.
    fn expanded(&self, at: &At, expand: f64) -> usize {
        self.cx.above_zero(at, "expand", expand);
        let inner = expand * self.d_model as f64;
        if inner.is_finite()
            && inner > 0.0
            && (inner.fract() != 0.0 || inner > super::MAX_SIZE as f64)
        {
            self.cx.error(
                &at.at("expand"),
                "model::expand",
                format!("expand {expand} x d_model {} is {inner}", self.d_model),
                "must give a whole number",
                "",
            );
            return 1;
        }
        (inner as usize).max(1)
    }

    fn mamba1(&self, at: &At, a: &s::Mamba1) -> m::Mamba1 {
        let cx = self.cx;
        if a.d_inner.is_some() && a.expand.is_some() {
            cx.error(
                &at.at("expand"),
                "model::inner_twice",
                "`d_inner` and `expand` both give the inner width",
                "remove one of the two",
                "",
            );
        }
        let d_inner = match a.d_inner {
            Some(i) => cx.positive(at, "d_inner", i),
            None => self.expanded(at, a.expand.unwrap_or(2.0)),
        };
        let n_heads = cx.positive(at, "n_heads", a.n_heads);
        self.divides(
            at,
            "n_heads",
            "model::heads_divide",
            ("d_inner", d_inner),
            ("n_heads", n_heads),
            "heads are equal blocks of inner channels",
        );
        m::Mamba1 {
            d_inner,
            d_state: cx.positive(at, "d_state", a.d_state),
            d_conv: cx.positive(at, "d_conv", a.d_conv),
            dt_rank: a
                .dt_rank
                .map_or(self.d_model.div_ceil(16), |r| cx.positive(at, "dt_rank", r)),
            n_heads,
            conv_bias: a.conv_bias,
            in_proj_bias: a.in_proj_bias,
            out_proj_bias: a.out_proj_bias,
            dt_bc_norm: a.dt_bc_norm.map(|n| m::DtBcNorm {
                eps: self.eps(&at.at("dt_bc_norm"), "eps", n.eps),
                weighted: n.weighted,
            }),
            dt_init: self.dt_init(at, a.dt_init),
        }
    }

    fn mamba2(&self, at: &At, a: &s::Mamba2) -> m::Mamba2 {
        let cx = self.cx;
        let head_dim = cx.positive(at, "head_dim", a.head_dim);
        let known = match a.n_heads {
            Some(h) => {
                let h = cx.positive(at, "n_heads", h);
                if let Some(e) = a.expand.filter(|_| self.d_model_known) {
                    let inner = self.expanded(at, e);
                    if inner != h.saturating_mul(head_dim) {
                        cx.error(
                            &at.at("n_heads"),
                            "model::heads_divide",
                            format!(
                                "n_heads {h} x head_dim {head_dim} is not expand {e} x d_model {}",
                                self.d_model
                            ),
                            format!("expected {} heads", inner / head_dim),
                            "leave out `expand` or `n_heads`: one follows from the other",
                        );
                    }
                }
                Some(h)
            }
            None => {
                let inner = self.expanded(at, a.expand.unwrap_or(2.0));
                self.divides(
                    at,
                    "head_dim",
                    "model::inner_divides",
                    ("d_inner", inner),
                    ("head_dim", head_dim),
                    "choose a head_dim that divides expand x d_model",
                )
            }
        };
        let n_groups = cx.positive(at, "n_groups", a.n_groups);
        let n_heads = known.unwrap_or(1);
        if known.is_some() {
            self.divides(
                at,
                "n_groups",
                "model::groups_divide",
                ("n_heads", n_heads),
                ("n_groups", n_groups),
                "every group serves the same number of heads",
            );
        }
        let (lo, hi) = a.dt_limit;
        if lo.is_nan() || hi.is_nan() || lo < 0.0 || hi <= lo {
            cx.error(
                &at.at("dt_limit"),
                "value::out_of_range",
                format!("`dt_limit` is ({lo}, {hi})"),
                "must be (low, high) with 0 <= low < high",
                "",
            );
        }
        let (lo, hi) = a.a_init;
        if !(lo > 0.0 && hi >= lo && hi.is_finite()) {
            cx.error(
                &at.at("a_init"),
                "value::out_of_range",
                format!("`a_init` is ({lo}, {hi})"),
                "must be (low, high) with 0 < low <= high",
                "",
            );
        }
        for (i, x) in a.multipliers.iter().enumerate() {
            cx.finite(&at.at("multipliers"), &i.to_string(), *x);
        }
        let gate = at.at("gate");
        m::Mamba2 {
            n_heads,
            head_dim,
            d_state: cx.positive(at, "d_state", a.d_state),
            n_groups,
            d_conv: cx.positive(at, "d_conv", a.d_conv),
            chunk_size: cx.positive(at, "chunk_size", a.chunk_size),
            conv_bias: a.conv_bias,
            in_proj_bias: a.in_proj_bias,
            out_proj_bias: a.out_proj_bias,
            dt_limit: a.dt_limit,
            dt_limit_in_decode: a.dt_limit_in_decode,
            gate: match a.gate {
                s::Gate::GateOnly => m::GatedNorm::GateOnly,
                s::Gate::GateThenNorm { eps } => m::GatedNorm::GateThenNorm {
                    eps: self.eps(&gate, "eps", eps),
                },
                s::Gate::NormThenGate { eps } => m::GatedNorm::NormThenGate {
                    eps: self.eps(&gate, "eps", eps),
                },
            },
            multipliers: a.multipliers,
            dt_init: self.dt_init(at, a.dt_init),
            a_init: a.a_init,
        }
    }

    fn gated_delta_net(&self, at: &At, a: &s::GatedDeltaNet) -> Option<m::GatedDeltaNet> {
        let cx = self.cx;
        let k = cx.count(at, "n_k_heads", a.n_k_heads);
        let v = a.n_v_heads.map(|v| cx.positive(at, "n_v_heads", v));
        if let (Some(k), Some(v)) = (k, v) {
            self.divides(
                at,
                "n_v_heads",
                "model::heads_divide",
                ("n_v_heads", v),
                ("n_k_heads", k),
                "every key head serves the same number of value heads",
            );
        }
        let k_head_dim = cx.positive(at, "k_head_dim", a.k_head_dim);
        let v_head_dim = cx.positive(at, "v_head_dim", a.v_head_dim);
        let d_conv = cx.positive(at, "d_conv", a.d_conv);
        let chunk_size = cx.positive(at, "chunk_size", a.chunk_size);
        let norm_eps = self.eps(at, "norm_eps", a.norm_eps);
        let k = k?;
        Some(m::GatedDeltaNet {
            n_k_heads: k,
            n_v_heads: v.unwrap_or(k),
            k_head_dim,
            v_head_dim,
            d_conv,
            chunk_size,
            norm_eps,
        })
    }

    fn ffn(&self, at: &At, body: &s::Ffn) -> Option<m::Ffn> {
        let cx = self.cx;
        Some(match body {
            s::Ffn::Glu(g) => {
                cx.finite(at, "gate_multiplier", g.gate_multiplier);
                cx.finite(at, "out_multiplier", g.out_multiplier);
                m::Ffn::Glu(m::Glu {
                    d_ff: cx.count(at, "d_ff", g.d_ff)?,
                    act: g.act,
                    bias: g.bias,
                    gate_multiplier: g.gate_multiplier,
                    out_multiplier: g.out_multiplier,
                })
            }
            s::Ffn::Mlp(g) => m::Ffn::Mlp(m::Mlp {
                d_ff: cx.count(at, "d_ff", g.d_ff)?,
                act: g.act,
                bias: g.bias,
            }),
            s::Ffn::Moe(g) => m::Ffn::Moe(Box::new(self.moe(at, g)?)),
        })
    }

    fn moe(&self, at: &At, g: &s::Moe) -> Option<m::Moe> {
        let cx = self.cx;
        let n_experts = cx.count(at, "n_experts", g.n_experts);
        let d_ff = cx.count(at, "d_ff", g.d_ff);
        let top_k = cx.positive(at, "top_k", g.top_k);
        if let Some(e) = n_experts.filter(|e| top_k > *e) {
            let key = if cx.root.find(&at.at("top_k").0).is_some() {
                "top_k"
            } else {
                "n_experts"
            };
            cx.error(
                &at.at(key),
                "model::top_k",
                format!("top_k {top_k} is more than n_experts {e}"),
                format!("must be at most {e}"),
                "a token cannot choose more experts than there are",
            );
        }
        let r = at.at("router");
        let n_groups = cx.positive(&r, "n_groups", g.router.n_groups);
        let top_groups = cx.positive(&r, "top_groups", g.router.top_groups);
        if top_groups > n_groups {
            cx.error(
                &r.at("top_groups"),
                "model::router_groups",
                format!("top_groups {top_groups} is more than n_groups {n_groups}"),
                format!("must be at most {n_groups}"),
                "",
            );
        }
        if let Some(e) = n_experts.filter(|_| n_groups > 1) {
            let per = self.divides(
                &r,
                "n_groups",
                "model::router_groups",
                ("n_experts", e),
                ("n_groups", n_groups),
                "groups hold equally many experts",
            );
            if let Some(per) = per.filter(|_| top_groups <= n_groups) {
                if top_k > per * top_groups {
                    cx.error(
                        &r.at("top_groups"),
                        "model::router_groups",
                        format!(
                            "top_k {top_k} experts cannot come from {top_groups} groups of {per}"
                        ),
                        format!("{} experts to choose from", per * top_groups),
                        "keep more groups, or choose fewer experts",
                    );
                }
                if per < 2 {
                    cx.error(
                        &r.at("n_groups"),
                        "model::router_groups",
                        "groups of one expert",
                        "must leave 2 or more in a group",
                        "a group's score is the sum of its two best experts",
                    );
                }
            }
        }
        cx.above_zero(&r, "scale", g.router.scale);
        cx.not_negative(at, "load_balance", g.load_balance);
        let latent = g.latent.map(|l| cx.positive(at, "latent", l));
        let shared = match &g.shared {
            None => None,
            Some(x) => {
                let at = at.at("shared").at("ffn");
                if matches!(*x.ffn, s::Ffn::Moe(_)) {
                    cx.error(
                        &at,
                        "model::shared_expert",
                        "the shared expert is itself a mixture",
                        "must be `Glu(..)` or `Mlp(..)`",
                        "",
                    );
                    return None;
                }
                Some(m::SharedExpert {
                    ffn: self.ffn(&at, &x.ffn)?,
                    gated: x.gated,
                })
            }
        };
        Some(m::Moe {
            n_experts: n_experts?,
            top_k,
            expert: m::Expert {
                d_ff: d_ff?,
                act: g.act,
                gated: g.gated,
            },
            router: m::Router {
                score: g.router.score,
                normalize: g.router.normalize,
                correction_bias: g.router.correction_bias,
                n_groups,
                top_groups,
                scale: g.router.scale,
            },
            shared,
            latent,
            latent_bias: g.latent_bias,
            load_balance: g.load_balance,
        })
    }

    /// The unrolled stack.
    fn layers(&self) -> Option<Vec<m::Layer>> {
        let slots = self.slots()?;
        let layout = self.at.at("layout");
        let n = slots.len();
        let mut layers = Vec::with_capacity(n);
        // Bodies of declared names, resolved once; patches make others.
        let mut whole = true;
        for (i, (mixer, ffn)) in slots.iter().enumerate() {
            let patch = self
                .file
                .layout
                .patch
                .0
                .iter()
                .find(|(k, _)| *k == i)
                .map(|(_, p)| p.clone())
                .unwrap_or_default();
            let at = layout.at("patch").at(i);
            let mut layer = m::Layer {
                inject: None,
                mixer: None,
                ffn: None,
            };
            if let Some(name) = mixer {
                let body = self.patched_mixer(name, &at.at("mixer"));
                whole &= body.is_some();
                layer.mixer = body.map(|body| m::Sublayer {
                    weights: format!("layers.{i}.mixer"),
                    name: name.clone(),
                    norm: self.norm(&at.at("mixer_norm"), patch.mixer_norm, self.norm),
                    body,
                    residual_multiplier: self.cx.finite(
                        &at,
                        "mixer_residual",
                        patch.mixer_residual.unwrap_or(self.residual),
                    ),
                });
            } else {
                let given = patch.mixer_norm.is_some()
                    || patch.mixer_residual.is_some()
                    || self.cx.root.find(&at.at("mixer").0).is_some();
                self.patch_of_nothing(given, &at, "mixer", i);
            }
            if let Some(name) = ffn {
                let body = self.patched_ffn(name, &at.at("ffn"));
                whole &= body.is_some();
                layer.ffn = body.map(|body| m::Sublayer {
                    weights: format!("layers.{i}.ffn"),
                    name: name.clone(),
                    norm: self.norm(&at.at("ffn_norm"), patch.ffn_norm, self.norm),
                    body,
                    residual_multiplier: self.cx.finite(
                        &at,
                        "ffn_residual",
                        patch.ffn_residual.unwrap_or(self.residual),
                    ),
                });
            } else {
                let given = patch.ffn_norm.is_some()
                    || patch.ffn_residual.is_some()
                    || self.cx.root.find(&at.at("ffn").0).is_some();
                self.patch_of_nothing(given, &at, "ffn", i);
            }
            layers.push(layer);
        }
        for (i, _) in &self.file.layout.patch.0 {
            self.in_range(&layout.at("patch").at(i), *i, n);
        }
        self.share(&mut layers, &slots);
        self.inject(&mut layers, &slots);
        whole.then_some(layers)
    }

    fn patch_of_nothing(&self, given: bool, at: &At, half: &str, i: usize) {
        if given {
            self.cx.error(
                at,
                "layout::patch_empty",
                format!("layer {i} has no {half} to patch"),
                format!("no {half} here"),
                "",
            );
        }
    }

    fn in_range(&self, at: &At, i: usize, n: usize) -> bool {
        if i >= n {
            self.cx.error(
                at,
                "layout::index",
                format!("there is no layer {i}"),
                format!("layers are 0 to {}", n.saturating_sub(1)),
                "",
            );
        }
        i < n
    }

    /// The document's node of a body with the patch's fields put over it.
    fn patched(&self, list: &str, name: &str, at: &At) -> Option<Node> {
        let patch = self.cx.root.find(&at.0)?;
        let base = self.cx.root.find(&self.at.at(list).at(name).0)?;
        Some(merge(base, patch))
    }

    fn patched_mixer(&self, name: &str, at: &At) -> Option<m::Mixer> {
        // A name that is not declared was complained about where it stands.
        let body = self.file.mixers.get(name)?;
        let declared = self.at.at("mixers").at(name);
        let Some(node) = self.patched("mixers", name, at) else {
            return self.quietly(|q| q.mixer(&declared, body, self.d_model, true));
        };
        self.decoded(node, at, |q, at, body: &s::Mixer| {
            q.mixer(at, body, self.d_model, true)
        })
    }

    fn patched_ffn(&self, name: &str, at: &At) -> Option<m::Ffn> {
        let body = self.file.ffns.get(name)?;
        let declared = self.at.at("ffns").at(name);
        let Some(node) = self.patched("ffns", name, at) else {
            return self.quietly(|q| q.ffn(&declared, body));
        };
        self.decoded(node, at, |q, at, body: &s::Ffn| q.ffn(at, body))
    }

    /// Reads a merged node and applies the rules to it, complaining at the patch.
    fn decoded<T: serde::de::DeserializeOwned, R>(
        &self,
        mut node: Node,
        at: &At,
        rule: impl FnOnce(&Build<'_>, &At, &T) -> Option<R>,
    ) -> Option<R> {
        let mut errors = Vec::new();
        let mut struck = Vec::new();
        let body: Option<T> = decode(&mut node, &mut errors, &mut struck);
        self.cx.out.borrow_mut().append(&mut errors);
        let body = body?;
        let out = RefCell::default();
        let cx = Cx {
            root: &node,
            struck: &struck,
            out: &out,
        };
        let found = rule(
            &Build {
                cx: &cx,
                used: self.used.clone(),
                ..*self
            },
            &At::default(),
            &body,
        );
        let here = self.cx.root.place(&at.0);
        for mut d in out.into_inner() {
            // A fault of the unpatched part is shown at the patch that brought it about.
            let in_patch = self.cx.root.find(&at.0).is_some_and(|p| {
                d.at.as_ref().is_some_and(|s| {
                    s.source == p.span.source && s.start >= p.span.start && s.end <= p.span.end
                })
            });
            if !in_patch {
                d.at = Some(here.clone());
            }
            self.cx.out.borrow_mut().push(d);
        }
        found
    }

    fn share(&self, layers: &mut [m::Layer], slots: &[Slot]) {
        let n = layers.len();
        for (k, share) in self.file.layout.share.iter().enumerate() {
            let at = self.at.at("layout").at("share").at(k).at("layers");
            if share.layers.len() < 2 {
                self.cx.error(
                    &at,
                    "layout::share",
                    "fewer than two layers share nothing",
                    "needs two or more layers",
                    "",
                );
            }
            let mut ok = true;
            for (j, i) in share.layers.iter().enumerate() {
                ok &= self.in_range(&at.at(j), *i, n);
                if share.layers[..j].contains(i) {
                    self.cx.error(
                        &at.at(j),
                        "layout::share",
                        format!("layer {i} stands twice in one sharing group"),
                        "second time",
                        "",
                    );
                }
            }
            let Some(&owner) = share.layers.first().filter(|_| ok) else {
                continue;
            };
            for (j, &i) in share.layers.iter().enumerate().skip(1) {
                let differ = |what: &str| {
                    self.cx.error(
                        &at.at(j),
                        "layout::share_shapes",
                        format!("layers {owner} and {i} cannot share their {what}: the weights differ in shape"),
                        format!("{} here, {} there", name_of(&slots[i], what), name_of(&slots[owner], what)),
                        "shared layers need the same kind and sizes",
                    );
                };
                if share.part != s::SharePart::Ffn {
                    let first = layers[owner]
                        .mixer
                        .as_ref()
                        .map(|m| (m.weights.clone(), shape_of_mixer(&m.body)));
                    match (first, &mut layers[i].mixer) {
                        (None, _) if slots[owner].0.is_some() => {}
                        (_, None) if slots[i].0.is_some() => {}
                        (None, None) => {}
                        (Some((w, shape)), Some(m)) if shape == shape_of_mixer(&m.body) => {
                            m.weights = w
                        }
                        _ => differ("mixer"),
                    }
                }
                if share.part != s::SharePart::Mixer {
                    let first = layers[owner]
                        .ffn
                        .as_ref()
                        .map(|m| (m.weights.clone(), shape_of_ffn(&m.body)));
                    match (first, &mut layers[i].ffn) {
                        (None, _) if slots[owner].1.is_some() => {}
                        (_, None) if slots[i].1.is_some() => {}
                        (None, None) => {}
                        (Some((w, shape)), Some(m)) if shape == shape_of_ffn(&m.body) => {
                            m.weights = w
                        }
                        _ => differ("ffn"),
                    }
                }
            }
        }
    }

    fn inject(&self, layers: &mut [m::Layer], slots: &[Slot]) {
        let n = layers.len();
        let mut shapes: Vec<(String, m::Mixer, m::Ffn)> = Vec::new();
        for (k, inj) in self.file.layout.inject.iter().enumerate() {
            let at = self.at.at("layout").at("inject").at(k);
            let fine = !inj.name.is_empty()
                && inj
                    .name
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
            if !fine {
                self.cx.error(
                    &at.at("name"),
                    "model::bad_name",
                    format!("`{}` cannot name shared weights", inj.name),
                    "not a usable name",
                    "names are letters, digits, `_` and `-`",
                );
            }
            let width = 2 * self.d_model;
            let mixer = self.named_mixer(&inj.mixer, &at.at("mixer")).and_then(
                |(body, declared)| match body {
                    s::Mixer::Attention(a) => self.attention(&declared, a, width),
                    _ => {
                        self.cx.error(
                            &at.at("mixer"),
                            "layout::inject",
                            format!("`{}` is not attention", inj.mixer),
                            "must name an `Attention(..)`",
                            "an injected block is a transformer block",
                        );
                        None
                    }
                },
            );
            let ffn = self
                .named_ffn(&inj.ffn, &at.at("ffn"))
                .and_then(|(body, declared)| self.quietly(|q| q.ffn(&declared, body)));
            let norm = self.norm(&at.at("norm"), inj.norm, self.norm);
            let ffn_norm = self.norm(&at.at("ffn_norm"), inj.ffn_norm, self.norm);
            let chosen = match &inj.layers {
                LayerSet::List(l) => l.clone(),
                LayerSet::Every { period, offset } => {
                    self.rhythm(&at.at("layers"), *period, *offset);
                    (*offset..n).step_by((*period).max(1)).collect()
                }
            };
            if let (Some(m1), Some(f1)) = (&mixer, &ffn) {
                let shape = (
                    shape_of_mixer(&m::Mixer::Attention(m1.clone())),
                    shape_of_ffn(f1),
                );
                match shapes.iter().find(|(n, ..)| *n == inj.name) {
                    Some((_, m2, f2)) if (m2, f2) != (&shape.0, &shape.1) => self.cx.error(
                        &at.at("name"),
                        "layout::share_shapes",
                        format!(
                            "two blocks named `{}` differ in the shape of their weights",
                            inj.name
                        ),
                        "shared with an earlier one",
                        "give them different names",
                    ),
                    Some(_) => {}
                    None => shapes.push((inj.name.clone(), shape.0, shape.1)),
                }
            }
            for (j, i) in chosen.into_iter().enumerate() {
                let place = at.at("layers").at(j);
                if !self.in_range(&place, i, n) {
                    continue;
                }
                let layer = &mut layers[i];
                if layer.inject.is_some() {
                    self.cx.error(
                        &place,
                        "layout::inject",
                        format!("layer {i} is fed by two blocks"),
                        "second time",
                        "one injected block per layer",
                    );
                }
                if slots[i].0.is_none() {
                    self.cx.error(
                        &place,
                        "layout::inject",
                        format!("layer {i} has no mixer to feed"),
                        "no mixer here",
                        "",
                    );
                }
                if let (Some(mixer), Some(ffn)) = (&mixer, &ffn) {
                    layer.inject = Some(m::Inject {
                        weights: format!("shared.{}", inj.name),
                        own_weights: format!("layers.{i}.inject"),
                        norm,
                        mixer: mixer.clone(),
                        ffn_norm,
                        ffn: ffn.clone(),
                    });
                }
            }
        }
    }

    fn rhythm(&self, at: &At, period: usize, offset: usize) -> bool {
        if period == 0 {
            self.cx.error(
                &at.at("period"),
                "value::zero",
                "`period` is 0",
                "must be 1 or more",
                "",
            );
        } else if offset >= period {
            self.cx.error(
                &at.at("offset"),
                "layout::offset",
                format!("offset {offset} is not below period {period}"),
                format!("must be at most {}", period - 1),
                "the offset is the first chosen layer",
            );
        }
        period > 0 && offset < period
    }

    /// Names per layer. `None` when the number of layers cannot be known.
    fn slots(&self) -> Option<Vec<Slot>> {
        let cx = self.cx;
        let l = &self.file.layout;
        let at = self.at.at("layout");
        let rhythms = l.mixer.is_some() || l.ffn.is_some();
        let forms = [
            (rhythms, if l.mixer.is_some() { "mixer" } else { "ffn" }),
            (!l.groups.is_empty(), "groups"),
            (l.pattern.is_some(), "pattern"),
        ];
        let mut given = forms.iter().filter(|(g, _)| *g).map(|(_, k)| *k);
        let first = given.next();
        if let (Some(a), Some(b)) = (first, given.next()) {
            cx.error(
                &at.at(b),
                "layout::two_forms",
                format!("the layout is given by `{a}` and by `{b}`"),
                "second form",
                "use `mixer`/`ffn`, or `groups`, or `pattern`",
            );
            return None;
        }
        if l.pattern.is_none() && !l.symbols.is_empty() {
            cx.error(
                &at.at("symbols"),
                "layout::symbols",
                "`symbols` without a `pattern`",
                "has no effect",
                "",
            );
        }
        let n_layers = self
            .file
            .n_layers
            .map(|n| cx.positive(self.at, "n_layers", n));
        if let Some(n) = n_layers.filter(|n| *n > MAX_LAYERS) {
            cx.error(
                &self.at.at("n_layers"),
                "value::too_large",
                format!("{n} layers"),
                format!("must be at most {MAX_LAYERS}"),
                "",
            );
            return None;
        }
        let slots = if let Some(p) = &l.pattern {
            self.pattern_slots(p)
        } else if !l.groups.is_empty() {
            self.group_slots()?
        } else {
            let n = cx.require(self.at, "n_layers", n_layers)?;
            let mixer = match &l.mixer {
                Some(names) => self.row(&at.at("mixer"), names, n, true),
                None => self.only(n, true),
            };
            let ffn = match &l.ffn {
                Some(names) => self.row(&at.at("ffn"), names, n, false),
                None => self.only(n, false),
            };
            return Some(mixer?.into_iter().zip(ffn?).collect());
        };
        if let Some(n) = n_layers.filter(|n| *n != slots.len()) {
            let form = if l.pattern.is_some() {
                "pattern"
            } else {
                "groups"
            };
            cx.error(
                &self.at.at("n_layers"),
                "layout::length",
                format!(
                    "n_layers is {n}, but the {form} of the layout has {} layers",
                    slots.len()
                ),
                format!("expected {}", slots.len()),
                "leave out n_layers: the layout says it",
            );
        }
        if slots.is_empty() && l.pattern.is_some() {
            cx.error(
                &at.at("pattern"),
                "layout::length",
                "the pattern is empty",
                "needs one character per layer",
                "",
            );
        }
        Some(slots)
    }

    /// The default row: the only name there is.
    fn only(&self, n: usize, mixers: bool) -> Option<Vec<Option<String>>> {
        let (list, what, names): (&str, &str, Vec<&String>) = if mixers {
            let injected: Vec<&String> = self.file.layout.inject.iter().map(|i| &i.mixer).collect();
            let in_groups: Vec<&String> = self
                .file
                .mixers
                .0
                .iter()
                .filter_map(|(_, b)| {
                    if let s::Mixer::Parallel(b) = b {
                        Some(b)
                    } else {
                        None
                    }
                })
                .flatten()
                .map(|b| &b.name)
                .collect();
            let free = self
                .file
                .mixers
                .0
                .iter()
                .map(|(n, _)| n)
                .filter(|n| !injected.contains(n) && !in_groups.contains(n))
                .collect();
            ("mixers", "mixer", free)
        } else {
            let injected: Vec<&String> = self.file.layout.inject.iter().map(|i| &i.ffn).collect();
            (
                "ffns",
                "ffn",
                self.file
                    .ffns
                    .0
                    .iter()
                    .map(|(n, _)| n)
                    .filter(|n| !injected.contains(n))
                    .collect(),
            )
        };
        match names.as_slice() {
            [] => Some(vec![None; n]),
            [one] => {
                self.used.borrow_mut().insert((*one).clone());
                Some(vec![Some((*one).clone()); n])
            }
            several => {
                if !self.cx.struck(&self.at.at("layout")) {
                    self.cx.error(
                        &self.at.at(list),
                        "layout::ambiguous",
                        format!("{} {list} are declared, and the layout does not say which stands where", several.len()),
                        "which one stands in which layer?",
                        format!("add `layout: ({what}: Every(name: \"{}\", period: 8, offset: 4, rest: \"{}\"))` or another rhythm", several[0], several[1]),
                    );
                }
                None
            }
        }
    }

    /// `n` places named by a rhythm. Complaints about unknown names are made here, at the word.
    fn row(&self, at: &At, names: &Names, n: usize, mixers: bool) -> Option<Vec<Option<String>>> {
        let cx = self.cx;
        let known = |name: &str, at: &At| -> Option<String> {
            if name == NONE {
                return None;
            }
            if mixers {
                self.named_mixer(name, at).map(|_| ())
            } else {
                self.named_ffn(name, at).map(|_| ())
            };
            Some(name.to_owned())
        };
        Some(match names {
            Names::All(name) => vec![known(name, at); n],
            Names::Pattern(list) => {
                if list.is_empty() {
                    cx.error(
                        at,
                        "layout::length",
                        "an empty list of names",
                        "needs at least one name",
                        "",
                    );
                    return None;
                }
                if list.len() > n {
                    cx.error(
                        at,
                        "layout::length",
                        format!("{} names for {n} layers", list.len()),
                        format!("must have at most {n}"),
                        "a list is repeated until the layers are filled",
                    );
                }
                let row: Vec<_> = list
                    .iter()
                    .enumerate()
                    .map(|(i, name)| known(name, &at.at(i)))
                    .collect();
                row.into_iter().cycle().take(n).collect()
            }
            Names::Every(e) => {
                let ok = self.rhythm(at, e.period, e.offset);
                let (one, rest) = (
                    known(&e.name, &at.at("name")),
                    known(&e.rest, &at.at("rest")),
                );
                if ok && e.offset >= n {
                    cx.error(
                        &at.at("offset"),
                        "layout::offset",
                        format!("offset {} lies beyond the {n} layers", e.offset),
                        format!("`{}` would stand nowhere", e.name),
                        "",
                    );
                }
                (0..n)
                    .map(|i| {
                        if i % e.period.max(1) == e.offset {
                            one.clone()
                        } else {
                            rest.clone()
                        }
                    })
                    .collect()
            }
            Names::At(e) => {
                let (one, rest) = (
                    known(&e.name, &at.at("name")),
                    known(&e.rest, &at.at("rest")),
                );
                let mut row = vec![rest; n];
                for (j, &i) in e.layers.iter().enumerate() {
                    let place = at.at("layers").at(j);
                    if self.in_range(&place, i, n) {
                        row[i] = one.clone();
                    }
                    if e.layers[..j].contains(&i) {
                        cx.error(
                            &place,
                            "layout::index",
                            format!("layer {i} is listed twice"),
                            "second time",
                            "",
                        );
                    }
                }
                row
            }
        })
    }

    fn group_slots(&self) -> Option<Vec<Slot>> {
        let mut slots = Vec::new();
        for (k, g) in self.file.layout.groups.iter().enumerate() {
            let at = self.at.at("layout").at("groups").at(k);
            let times = self.cx.positive(&at, "times", g.times);
            let listed = |n: &Option<Names>| match n {
                Some(Names::Pattern(l)) => l.len(),
                _ => 1,
            };
            let len = match g.len {
                Some(l) => self.cx.positive(&at, "len", l),
                None => listed(&g.mixer).max(listed(&g.ffn)).max(1),
            };
            if times.saturating_mul(len).saturating_add(slots.len()) > MAX_LAYERS {
                self.cx.error(
                    &at.at("times"),
                    "value::too_large",
                    format!("more than {MAX_LAYERS} layers"),
                    "too many",
                    "",
                );
                return None;
            }
            let half = |key: &str, names: &Option<Names>, mixers| match names {
                Some(n) => self.row(&at.at(key), n, len, mixers),
                None => Some(vec![None; len]),
            };
            let (mixer, ffn) = (half("mixer", &g.mixer, true)?, half("ffn", &g.ffn, false)?);
            let group: Vec<Slot> = mixer.into_iter().zip(ffn).collect();
            for _ in 0..times {
                slots.extend(group.iter().cloned());
            }
        }
        Some(slots)
    }

    fn pattern_slots(&self, pattern: &str) -> Vec<Slot> {
        let at = self.at.at("layout");
        let sole = |of: &dyn Fn(&s::Mixer) -> bool| {
            let mut found = self
                .file
                .mixers
                .0
                .iter()
                .filter(|(_, b)| of(b))
                .map(|(n, _)| n);
            found.next().filter(|_| found.next().is_none()).cloned()
        };
        let sole_ffn = |moe: bool| {
            let mut found = self
                .file
                .ffns
                .0
                .iter()
                .filter(|(_, b)| matches!(b, s::Ffn::Moe(_)) == moe)
                .map(|(n, _)| n);
            found.next().filter(|_| found.next().is_none()).cloned()
        };
        for (sym, name) in &self.file.layout.symbols.0 {
            let place = at.at("symbols").at(sym);
            if sym.chars().count() != 1 {
                self.cx.error(
                    &place,
                    "layout::symbols",
                    format!("the symbol `{sym}` is not one character"),
                    "must be one character",
                    "",
                );
            }
            if !sym.is_empty() && !pattern.contains(sym.as_str()) {
                self.cx.error(
                    &place,
                    "layout::symbols",
                    format!("the symbol `{sym}` does not stand in the pattern"),
                    format!("`{name}` would be unused"),
                    "",
                );
            }
            if name != NONE
                && self.file.mixers.get(name).is_none()
                && self.file.ffns.get(name).is_none()
            {
                let known: Vec<&str> = self
                    .file
                    .mixers
                    .0
                    .iter()
                    .map(|(n, _)| n)
                    .chain(self.file.ffns.0.iter().map(|(n, _)| n))
                    .map(String::as_str)
                    .collect();
                let declared = self.cx.struck(&self.at.at("mixers").at(name))
                    || self.cx.struck(&self.at.at("ffns").at(name));
                if !declared {
                    self.cx.error(
                        &place,
                        "layout::undefined",
                        format!("no mixer or ffn is named `{name}`"),
                        "not declared",
                        suggest(name, &known),
                    );
                }
            }
        }
        let mut unknown = BTreeSet::new();
        let mut slots = Vec::new();
        for c in pattern.chars() {
            let name = self
                .file
                .layout
                .symbols
                .get(&c.to_string())
                .cloned()
                .or_else(|| match c {
                    'M' => sole(&|b| !matches!(b, s::Mixer::Attention(_))),
                    '*' => sole(&|b| matches!(b, s::Mixer::Attention(_))),
                    '-' => sole_ffn(false),
                    'E' => sole_ffn(true),
                    _ => None,
                });
            let Some(name) = name else {
                if unknown.insert(c)
                    && !self.cx.struck(&self.at.at("mixers"))
                    && !self.cx.struck(&self.at.at("ffns"))
                {
                    let i = pattern.chars().position(|d| d == c).unwrap_or(0);
                    let mut span = self.cx.root.place(&at.at("pattern").0);
                    // The character itself, when the text is written plainly.
                    let inner = span
                        .text()
                        .strip_prefix('"')
                        .and_then(|t| t.strip_suffix('"'));
                    if inner == Some(pattern) {
                        let skip: usize = pattern.chars().take(i).map(char::len_utf8).sum();
                        span.start += 1 + skip;
                        span.end = span.start + c.len_utf8();
                    }
                    self.cx.error_at(
                        span,
                        "layout::symbols",
                        format!("the character `{c}` of the pattern means nothing"),
                        "not in `symbols`",
                        format!("add `symbols: {{\"{c}\": \"name\"}}`"),
                    );
                }
                slots.push((None, None));
                continue;
            };
            self.used.borrow_mut().insert(name.clone());
            slots.push(if self.file.mixers.get(&name).is_some() {
                (Some(name), None)
            } else if self.file.ffns.get(&name).is_some() {
                (None, Some(name))
            } else {
                (None, None)
            });
        }
        slots
    }
}

fn name_of(slot: &Slot, half: &str) -> String {
    let name = if half == "mixer" { &slot.0 } else { &slot.1 };
    name.as_ref()
        .map_or_else(|| "nothing".to_owned(), |n| format!("`{n}`"))
}

/// Fields of `patch` over those of `base`; a patch of another variant replaces it.
fn merge(base: &Node, patch: &Node) -> Node {
    let name = |n: &Node| match &n.kind {
        Kind::Struct(Some(i), _) | Kind::Tuple(Some(i), _) => Some(i.text.clone()),
        Kind::Name(n) => Some(n.clone()),
        _ => None,
    };
    match &patch.kind {
        Kind::Tuple(Some(i), items) if i.text == "Replace" && items.len() == 1 => {
            return items[0].clone();
        }
        _ => {}
    }
    if name(patch).is_some() && name(patch) != name(base) {
        return patch.clone();
    }
    match (&base.kind, &patch.kind) {
        (Kind::Struct(n, old), Kind::Struct(_, new)) => {
            let mut fields = old.clone();
            for f in new {
                match fields.iter_mut().find(|g| g.name.text == f.name.text) {
                    Some(g) => {
                        *g = crate::tree::Field {
                            name: f.name.clone(),
                            value: merge(&g.value, &f.value),
                        }
                    }
                    None => fields.push(f.clone()),
                }
            }
            base.with(Kind::Struct(n.clone(), fields))
        }
        (Kind::Tuple(Some(n), items), Kind::Struct(_, new)) if items.is_empty() => {
            base.with(Kind::Struct(Some(n.clone()), new.clone()))
        }
        (Kind::Name(n), Kind::Struct(_, new)) if n != "None" => {
            let ident = crate::tree::Ident {
                text: n.clone(),
                span: base.span.clone(),
            };
            base.with(Kind::Struct(Some(ident), new.clone()))
        }
        (_, Kind::Unit) => base.clone(),
        _ => patch.clone(),
    }
}

/// The body with everything reset that does not decide the shape or the names of its weights.
pub(crate) fn shape_of_mixer(body: &m::Mixer) -> m::Mixer {
    let mut body = body.clone();
    match &mut body {
        m::Mixer::Attention(a) => {
            a.rope = None;
            a.window = None;
            a.scale = 1.0;
            a.key_multiplier = 1.0;
            if let Some(n) = &mut a.qk_norm {
                *n = m::Norm {
                    eps: 1.0,
                    zero_centered: n.zero_centered,
                };
            }
        }
        m::Mixer::Mamba1(a) => {
            if let Some(n) = &mut a.dt_bc_norm {
                n.eps = 1.0;
                if !n.weighted {
                    a.dt_bc_norm = None;
                }
            }
            a.dt_init = m::DtInit {
                min: 1.0,
                max: 1.0,
                floor: 1.0,
            };
        }
        m::Mixer::Mamba2(a) => {
            a.chunk_size = 1;
            a.dt_limit = (0.0, 1.0);
            a.dt_limit_in_decode = true;
            a.multipliers = [1.0; 5];
            a.dt_init = m::DtInit {
                min: 1.0,
                max: 1.0,
                floor: 1.0,
            };
            a.a_init = (1.0, 1.0);
            if a.gate != m::GatedNorm::GateOnly {
                a.gate = m::GatedNorm::GateThenNorm { eps: 1.0 };
            }
        }
        m::Mixer::GatedDeltaNet(a) => {
            a.chunk_size = 1;
            a.norm_eps = 1.0;
        }
        m::Mixer::Parallel(branches) => {
            for b in branches {
                b.mixer = shape_of_mixer(&b.mixer);
                b.in_multiplier = 1.0;
                b.out_multiplier = 1.0;
            }
        }
    }
    body
}

/// As [`shape_of_mixer`].
pub(crate) fn shape_of_ffn(body: &m::Ffn) -> m::Ffn {
    let mut body = body.clone();
    match &mut body {
        m::Ffn::Glu(g) => {
            g.act = m::Act::Silu;
            g.gate_multiplier = 1.0;
            g.out_multiplier = 1.0;
        }
        m::Ffn::Mlp(g) => g.act = m::Act::Silu,
        m::Ffn::Moe(g) => {
            g.top_k = 1;
            g.expert.act = m::Act::Silu;
            g.load_balance = 0.0;
            let correction_bias = g.router.correction_bias;
            g.router = m::Router {
                score: m::RouterScore::SoftmaxAll,
                normalize: false,
                correction_bias,
                n_groups: 1,
                top_groups: 1,
                scale: 1.0,
            };
            if let Some(x) = &mut g.shared {
                x.ffn = shape_of_ffn(&x.ffn);
            }
        }
    }
    body
}
