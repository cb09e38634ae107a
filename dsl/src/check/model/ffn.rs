//! The rules of ffns and of mixtures of experts.

use super::{At, Build, m, s};

impl Build<'_> {
    pub(super) fn ffn(&self, at: &At, body: &s::Ffn) -> Option<m::Ffn> {
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
}
