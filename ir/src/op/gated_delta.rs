//! Gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, equation 10).
//!
//! Value head h reads key head `h / (Hv/Hk)`; per head with state `S [Dk Dv]`:
//! `S' = exp(g[t,h]) S[t-1]`, `S[t] = S' + k[t] (outer) beta[t,h] (v[t,h] - S'^T k[t])`, `o[t,h] = S[t]^T q[t]`.
//! q and k come normalised and scaled. The state is zero before the first token of a document (`pos = 0`). All in f32.
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | gated_delta | q, k | f[B T G N] | Hk key heads of width Dk |
//! | | v | f[B T H P] | Hv value heads of width Dv |
//! | | g | f32[B T H] | log decay, at most 0 |
//! | | beta | f32[B T H] | in (0, 1) |
//! | | pos? | i32[B T] | |
//! | | state? | f32[B H N P] | carried state |
//! | | -> o | f[B T H P] | |
//! | | -> state | f32[B H N P] | only when state is given; the same memory |
//! | | -> saved | f32[B C H N P] | only without state: the state before each chunk |
//! | gated_delta_bwd | q, k, v, g, beta, pos?, saved, do | | |
//! | | -> dq, dk, dv, dg, dbeta | | |

use super::{Alias, ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{Type, TypeError, dims};

/// The scan.
#[derive(Clone, Debug, PartialEq)]
pub struct GatedDelta {
    /// Tokens per chunk: cost, never results.
    pub chunk: usize,
}

/// Its derivative.
#[derive(Clone, Debug, PartialEq)]
pub struct GatedDeltaBwd {
    /// The forward op.
    pub of: GatedDelta,
}

fn check<'a>(a: &ArgTypes<'a>) -> Result<(&'a Type, &'a Type), TypeError> {
    let (q, k, v) = (a.req(0, "q")?, a.req(1, "k")?, a.req(2, "v")?);
    a.check(
        q.rank() == 4
            && q.same_shape(k)
            && v.rank() == 4
            && v.sizes()[..2] == q.sizes()[..2]
            && q.size(2) > 0
            && v.size(2) % q.size(2) == 0,
        format!("q {q}, k {k}, v {v}"),
        "q and k [B T G N], v [B T H P], G divides H",
    )?;
    a.req(3, "g")?;
    a.req(4, "beta")?;
    a.sizes(3, "g", &v.sizes()[..3])?;
    a.sizes(4, "beta", &v.sizes()[..3])?;
    a.sizes(5, "pos", &v.sizes()[..2])?;
    Ok((q, v))
}

fn flops(args: &[Option<&Type>]) -> f64 {
    match (args[0], args[2]) {
        (Some(q), Some(v)) => 7.0 * v.len() as f64 * q.size(3) as f64,
        _ => 0.0,
    }
}

impl OpDef for GatedDelta {
    const NAME: &'static str = "gated_delta";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (q, v) = check(a)?;
        let (b, t, h, p, n) = (v.size(0), v.size(1), v.size(2), v.size(3), q.size(3));
        a.check(self.chunk > 0, self.chunk, "chunk > 0")?;
        a.sizes(6, "state", &[b, h, n, p])?;
        Ok(vec![
            v.clone(),
            match a.opt(6) {
                Some(state) => state.clone(),
                None => Type::f32(dims![B b, C t.div_ceil(self.chunk), H h, N n, P p]),
            },
        ])
    }
    fn alias(&self, result: usize) -> Option<Alias> {
        (result == 1).then_some(Alias::InPlace { arg: 6 })
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        flops(args)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["q", "k", "v", "g", "beta", "pos", "state"]
    }
    fn attrs(&self) -> String {
        format!("chunk={}", self.chunk)
    }
}

impl Differentiable for GatedDelta {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        let Some(dout) = cx.d_result(0) else {
            return Ok(());
        };
        let mut args: Vec<_> = (0..6).map(|i| cx.arg(i)).collect();
        args.push(Some(cx.result(1)));
        args.push(Some(dout));
        let r = cx.push(GatedDeltaBwd { of: self.clone() }, args)?;
        for (i, d) in r.into_iter().enumerate() {
            cx.set(i, d);
        }
        Ok(())
    }
}

impl OpDef for GatedDeltaBwd {
    const NAME: &'static str = "gated_delta_bwd";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (q, v) = check(a)?;
        a.req(6, "saved")?;
        a.sizes(
            6,
            "saved",
            &[
                v.size(0),
                v.size(1).div_ceil(self.of.chunk),
                v.size(2),
                q.size(3),
                v.size(3),
            ],
        )?;
        a.req(7, "do")?;
        a.sizes(7, "do", &v.sizes())?;
        Ok((0..5).filter_map(|i| a.opt(i)).cloned().collect())
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        2.0 * flops(args)
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["q", "k", "v", "g", "beta", "pos", "saved", "do"]
    }
    fn attrs(&self) -> String {
        format!("chunk={}", self.of.chunk)
    }
}
