//! RMS norm, plain, grouped or gated (Zhang and Sennrich 2019, arXiv 1910.07467; gated form: Mamba-2, arXiv 2405.21060).
//!
//! Over each group of `group` consecutive elements of the last dimension: `n(v) = v * rsqrt(mean(v^2) + eps)`; statistics in f32.
//!
//! | gate | y |
//! |---|---|
//! | none | `n(x) * w'` |
//! | before | `n(x * silu(z)) * w'` |
//! | after | `n(x) * w' * silu(z)` |
//!
//! with `w' = w`, `1 + w` (zero-centred) or 1 (no weight).
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | rms_norm | x | f[.. L] | L a multiple of `group` |
//! | | w? | f32[L] or f32[group] | repeated over groups when shorter than L |
//! | | z? | f[.. L] | present iff gated |
//! | | -> y | f[.. L] | |
//! | | -> rstd | f32[.. L/group] | `rsqrt(mean + eps)` of what was normed |
//! | rms_norm_bwd | x, w?, z?, rstd, dy | | |
//! | | add? | f[.. L] | as dx, added to it; put there by `fold_sums` |
//! | | -> dx | f[.. L] | |
//! | | -> dw | f32 as w | only when w is present |
//! | | -> dz | f[.. L] | only when z is present |

use super::{ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{Dim, Letter, Type, TypeError};

/// Where silu(z) multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// No gate.
    None,
    /// Before the norm.
    Before,
    /// After norm and weight.
    After,
}

/// The norm.
#[derive(Clone, Debug, PartialEq)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: f64,
    /// Elements normed together.
    pub group: usize,
    /// Weight is stored as offset from 1.
    pub zero_centered: bool,
    /// Gate.
    pub gate: Gate,
}

/// Its derivative.
#[derive(Clone, Debug, PartialEq)]
pub struct RmsNormBwd {
    /// The forward op.
    pub of: RmsNorm,
}

impl RmsNorm {
    fn rstd(&self, x: &Type) -> Type {
        Type::f32(
            x.with_last(Dim {
                letter: Letter::G,
                size: x.last() / self.group,
            })
            .dims,
        )
    }
    fn text(&self) -> String {
        let mut s = format!("eps={:e} group={}", self.eps, self.group);
        if self.zero_centered {
            s.push_str(" zero_centered");
        }
        match self.gate {
            Gate::None => {}
            Gate::Before => s.push_str(" gate=before"),
            Gate::After => s.push_str(" gate=after"),
        }
        s
    }
}

impl OpDef for RmsNorm {
    const NAME: &'static str = "rms_norm";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let x = a.req(0, "x")?;
        a.check(
            self.group > 0 && x.last() % self.group == 0,
            x,
            format!("groups of {}", self.group),
        )?;
        if let Some(w) = a.opt(1) {
            a.check(
                w.len() == x.last() || w.len() == self.group,
                w,
                "one weight per element of a row or of a group",
            )?;
        }
        a.check(
            a.opt(2).is_some() == (self.gate != Gate::None),
            "gate z",
            "z present iff the norm is gated",
        )?;
        if let Some(z) = a.opt(2) {
            a.check(z.len() == x.len(), z, x)?;
        }
        Ok(vec![x.clone(), self.rstd(x)])
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        4.0 * args[0].map_or(0, Type::len) as f64
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "w", "z"]
    }
    fn attrs(&self) -> String {
        self.text()
    }
}

impl Differentiable for RmsNorm {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        let Some(dy) = cx.d_result(0) else {
            return Ok(());
        };
        let args = vec![
            cx.arg(0),
            cx.arg(1),
            cx.arg(2),
            Some(cx.result(1)),
            Some(dy),
        ];
        let r = cx.push(RmsNormBwd { of: self.clone() }, args)?;
        cx.set(0, r[0]);
        let mut next = 1;
        for slot in [1, 2] {
            if cx.arg(slot).is_some() {
                cx.set(slot, r[next]);
                next += 1;
            }
        }
        Ok(())
    }
}

impl OpDef for RmsNormBwd {
    const NAME: &'static str = "rms_norm_bwd";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let x = a.req(0, "x")?;
        a.req(3, "rstd")?;
        let dy = a.req(4, "dy")?;
        a.check(dy.len() == x.len(), dy, x)?;
        if let Some(add) = a.opt(5) {
            a.check(add.same_shape(x) && add.dtype == x.dtype, add, x)?;
        }
        let mut out = vec![x.clone()];
        out.extend(a.opt(1).map(|w| Type::f32(w.dims.clone())));
        out.extend(a.opt(2).cloned());
        Ok(out)
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        10.0 * args[0].map_or(0, Type::len) as f64
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "w", "z", "rstd", "dy", "add"]
    }
    fn attrs(&self) -> String {
        self.of.text()
    }
}
