//! The rules of attention and of rotary positions.

use super::{At, Build, m, s};

impl Build<'_> {
    pub(super) fn attention(
        &self,
        at: &At,
        a: &s::Attention,
        width: usize,
    ) -> Option<m::Attention> {
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
}
