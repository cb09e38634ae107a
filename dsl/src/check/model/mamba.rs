//! The rules of the recurrent mixers: Mamba-1, Mamba-2 and Gated DeltaNet.

use super::{At, Build, m, s};

impl Build<'_> {
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
            && (inner.fract() != 0.0 || inner > crate::check::MAX_SIZE as f64)
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

    pub(super) fn mamba1(&self, at: &At, a: &s::Mamba1) -> m::Mamba1 {
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

    pub(super) fn mamba2(&self, at: &At, a: &s::Mamba2) -> m::Mamba2 {
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
        self.a_init(at, a.a_init);
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

    pub(super) fn gated_delta_net(
        &self,
        at: &At,
        a: &s::GatedDeltaNet,
    ) -> Option<m::GatedDeltaNet> {
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
        let dt_init = self.dt_init(at, a.dt_init);
        self.a_init(at, a.a_init);
        let k = k?;
        Some(m::GatedDeltaNet {
            n_k_heads: k,
            n_v_heads: v.unwrap_or(k),
            k_head_dim,
            v_head_dim,
            d_conv,
            chunk_size,
            norm_eps,
            dt_init,
            a_init: a.a_init,
        })
    }

    fn a_init(&self, at: &At, (lo, hi): (f64, f64)) {
        if !(lo > 0.0 && hi >= lo && hi.is_finite()) {
            self.cx.error(
                &at.at("a_init"),
                "value::out_of_range",
                format!("`a_init` is ({lo}, {hi})"),
                "must be (low, high) with 0 < low <= high",
                "",
            );
        }
    }
}
