//! Causal grouped-query softmax attention (Vaswani et al. 2017; GQA: Ainslie et al. 2023, arXiv 2305.13245), blockwise and without a
//! stored score matrix (FlashAttention, arXiv 2205.14135).
//!
//! Query t of batch row b stands in slot `q = slot + t`. It sees key slot s iff `0 <= q - s <= pos[b,t]` and, with a window w,
//! `q - s < w`. `out = softmax(scale * q.k) v`; head h reads group `h / (H/G)`. Softmax in f32.
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | attention | q | f[B T H P] | |
//! | | k, v | f[B S G P] | in training S = T |
//! | | pos? | i32[B T] | position within the document: earlier documents of a packed row are not seen; absent: no documents |
//! | | slot? | i32[X1] | slot of query 0; absent: 0 |
//! | | -> out | f[B T H P] | |
//! | | -> lse | f32[B H T] | log-sum-exp of the scaled scores |
//! | attention_bwd | q, k, v, pos?, out, lse, dout | | training only: slot 0 |
//! | | -> dq, dk, dv | as q, k, v | |
//!
//! Cost counts half of the square for causality: `2 * 2 * B H T S P / 2` forward.

use super::{ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{DType, Type, TypeError, dims};

/// Attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Factor on q.k.
    pub scale: f64,
    /// Tokens seen, the query's own included.
    pub window: Option<usize>,
}

/// Its derivative.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionBwd {
    /// The forward op.
    pub of: Attention,
}

impl Attention {
    fn text(&self) -> String {
        match self.window {
            Some(w) => format!("scale={} window={w}", self.scale),
            None => format!("scale={}", self.scale),
        }
    }

    /// Visible (query, key) pairs per batch row and head, without documents.
    fn pairs(&self, t: usize, s: usize) -> f64 {
        let (t, s) = (t as f64, s as f64);
        let full = if t == s { t * (t + 1.0) / 2.0 } else { t * s };
        self.window.map_or(full, |w| full.min(t * w as f64))
    }

    fn fwd_flops(&self, q: &Type, k: &Type) -> f64 {
        4.0 * (q.size(0) * q.size(2) * q.size(3)) as f64 * self.pairs(q.size(1), k.size(1))
    }
}

fn check(a: &ArgTypes) -> Result<(), TypeError> {
    let (q, k, v) = (a.req(0, "q")?, a.req(1, "k")?, a.req(2, "v")?);
    a.check(
        q.rank() == 4
            && k.rank() == 4
            && k.same_shape(v)
            && q.size(0) == k.size(0)
            && q.size(3) == k.size(3)
            && k.size(2) > 0
            && q.size(2) % k.size(2) == 0,
        format!("q {q}, k {k}, v {v}"),
        "q [B T H P], k and v [B S G P], G divides H",
    )?;
    a.sizes(3, "pos", &q.sizes()[..2])
}

impl OpDef for Attention {
    const NAME: &'static str = "attention";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        check(a)?;
        let q = a.req(0, "q")?;
        a.sizes(4, "slot", &[1])?;
        Ok(vec![
            q.clone(),
            Type::new(DType::F32, dims![B q.size(0), H q.size(2), T q.size(1)]),
        ])
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        match (args[0], args[1]) {
            (Some(q), Some(k)) => self.fwd_flops(q, k),
            _ => 0.0,
        }
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["q", "k", "v", "pos", "slot"]
    }
    fn attrs(&self) -> String {
        self.text()
    }
}

impl Differentiable for Attention {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        let Some(dout) = cx.d_result(0) else {
            return Ok(());
        };
        let args = vec![
            cx.arg(0),
            cx.arg(1),
            cx.arg(2),
            cx.arg(3),
            Some(cx.result(0)),
            Some(cx.result(1)),
            Some(dout),
        ];
        let r = cx.push(AttentionBwd { of: self.clone() }, args)?;
        for (i, d) in r.into_iter().enumerate() {
            cx.set(i, d);
        }
        Ok(())
    }
}

impl OpDef for AttentionBwd {
    const NAME: &'static str = "attention_bwd";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        check(a)?;
        let (q, k, v) = (a.req(0, "q")?, a.req(1, "k")?, a.req(2, "v")?);
        a.check(
            q.size(1) == k.size(1),
            format!("q {q}, k {k}"),
            "T = S in training",
        )?;
        a.sizes(4, "out", &q.sizes())?;
        a.req(5, "lse")?;
        a.req(6, "dout")?;
        a.sizes(6, "dout", &q.sizes())?;
        Ok(vec![q.clone(), k.clone(), v.clone()])
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        match (args[0], args[1]) {
            (Some(q), Some(k)) => 2.0 * self.of.fwd_flops(q, k),
            _ => 0.0,
        }
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["q", "k", "v", "pos", "out", "lse", "dout"]
    }
    fn attrs(&self) -> String {
        self.of.text()
    }
}
