//! State space duality: the Mamba-2 scan (Dao and Gu 2024, arXiv 2405.21060, section 6, chunked algorithm).
//!
//! With `dt' = clamp(softplus(dt + dt_bias), dt_limit)`, head h of group `g = h / (H/G)`:
//! `S[t] = exp(dt'[t,h] a[h]) S[t-1] + dt'[t,h] x[t,h,:] (outer) b[t,g,:]`, `y[t,h,:] = S[t] c[t,g,:] + d[h] x[t,h,:]`.
//! The state is zero before the first token of a document (`pos = 0`). States, sums of decays and products accumulate in f32;
//! decays are exponentials of differences of cumulative sums, never ratios.
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | ssd | x | f[B T H P] | |
//! | | dt | f[B T H] | raw, before bias and softplus |
//! | | a | f32[H] | negative |
//! | | b, c | f[B T G N] | |
//! | | d? | f32[H] | skip |
//! | | dt_bias? | f32[H] | |
//! | | pos? | i32[B T] | position within the document |
//! | | state? | f32[B H P N] | carried state |
//! | | -> y | f[B T H P] | |
//! | | -> state | f32[B H P N] | only when state is given; the same memory |
//! | | -> saved | f32[B C H P N] | only without state: the state before each chunk, C = ceil(T/chunk) |
//! | ssd_bwd | x, dt, a, b, c, d?, dt_bias?, pos?, saved, dy | | |
//! | | -> dx, ddt, da, db, dc | | da f32; then |
//! | | -> dd, ddt_bias | | each only when its argument is present |
//!
//! Cost of the chunked form with C tokens a chunk, per token and head: `2 C (N/(H/G) + P)/2` within the chunk (causal half),
//! `4 N P` for states.

use super::{Alias, ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{Type, TypeError, dims};

/// The scan.
#[derive(Clone, Debug, PartialEq)]
pub struct Ssd {
    /// Tokens per chunk: cost, never results.
    pub chunk: usize,
    /// Range of dt after softplus; `(0, inf)` when there is none.
    pub dt_limit: (f64, f64),
}

/// Its derivative.
#[derive(Clone, Debug, PartialEq)]
pub struct SsdBwd {
    /// The forward op.
    pub of: Ssd,
}

impl Ssd {
    fn text(&self) -> String {
        if self.dt_limit == (0.0, f64::INFINITY) {
            format!("chunk={}", self.chunk)
        } else {
            format!(
                "chunk={} dt_limit={}..{}",
                self.chunk, self.dt_limit.0, self.dt_limit.1
            )
        }
    }
    fn fwd_flops(&self, x: &Type, b: &Type) -> f64 {
        let (bt, t, h, p) = (
            (x.size(0) * x.size(1)) as f64,
            x.size(1),
            x.size(2) as f64,
            x.size(3) as f64,
        );
        let (g, n) = (b.size(2) as f64, b.size(3) as f64);
        let c = self.chunk.min(t) as f64;
        bt * (c * (g * n + h * p) + 4.0 * h * n * p)
    }
}

fn check<'a>(a: &ArgTypes<'a>) -> Result<(&'a Type, &'a Type), TypeError> {
    let (x, dt, av) = (a.req(0, "x")?, a.req(1, "dt")?, a.req(2, "a")?);
    let (b, c) = (a.req(3, "b")?, a.req(4, "c")?);
    a.check(
        x.rank() == 4 && dt.sizes() == x.sizes()[..3],
        format!("x {x}, dt {dt}"),
        "x [B T H P], dt [B T H]",
    )?;
    let h = x.size(2);
    a.check(av.sizes() == [h], av, format!("a [H{h}]"))?;
    a.check(
        b.rank() == 4
            && b.same_shape(c)
            && b.sizes()[..2] == x.sizes()[..2]
            && b.size(2) > 0
            && h % b.size(2) == 0,
        format!("b {b}, c {c}"),
        "b and c [B T G N], G divides H",
    )?;
    a.sizes(5, "d", &[h])?;
    a.sizes(6, "dt_bias", &[h])?;
    a.sizes(7, "pos", &x.sizes()[..2])?;
    Ok((x, b))
}

impl OpDef for Ssd {
    const NAME: &'static str = "ssd";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (x, b) = check(a)?;
        let (bs, t, h, p, n) = (x.size(0), x.size(1), x.size(2), x.size(3), b.size(3));
        a.check(self.chunk > 0, self.chunk, "chunk > 0")?;
        a.sizes(8, "state", &[bs, h, p, n])?;
        Ok(vec![
            x.clone(),
            match a.opt(8) {
                Some(state) => state.clone(),
                None => Type::f32(dims![B bs, C t.div_ceil(self.chunk), H h, P p, N n]),
            },
        ])
    }
    fn alias(&self, result: usize) -> Option<Alias> {
        (result == 1).then_some(Alias::InPlace { arg: 8 })
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        match (args[0], args[3]) {
            (Some(x), Some(b)) => self.fwd_flops(x, b),
            _ => 0.0,
        }
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x", "dt", "a", "b", "c", "d", "dt_bias", "pos", "state"]
    }
    fn attrs(&self) -> String {
        self.text()
    }
}

impl Differentiable for Ssd {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        let Some(dy) = cx.d_result(0) else {
            return Ok(());
        };
        let mut args: Vec<_> = (0..8).map(|i| cx.arg(i)).collect();
        args.push(Some(cx.result(1)));
        args.push(Some(dy));
        let r = cx.push(SsdBwd { of: self.clone() }, args)?;
        let slots = (0..5)
            .chain((5..7).filter(|&i| cx.arg(i).is_some()))
            .collect::<Vec<_>>();
        for (slot, d) in slots.into_iter().zip(r) {
            cx.set(slot, d);
        }
        Ok(())
    }
}

impl OpDef for SsdBwd {
    const NAME: &'static str = "ssd_bwd";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (x, b) = check(a)?;
        a.req(8, "saved")?;
        let chunks = x.size(1).div_ceil(self.of.chunk);
        a.sizes(
            8,
            "saved",
            &[x.size(0), chunks, x.size(2), x.size(3), b.size(3)],
        )?;
        a.req(9, "dy")?;
        a.sizes(9, "dy", &x.sizes())?;
        let av = a.req(2, "a")?;
        let mut out = vec![
            x.clone(),
            a.req(1, "dt")?.clone(),
            Type::f32(av.dims.clone()),
            b.clone(),
            a.req(4, "c")?.clone(),
        ];
        out.extend(
            [5, 6]
                .into_iter()
                .filter_map(|i| a.opt(i))
                .map(|t| Type::f32(t.dims.clone())),
        );
        Ok(out)
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        match (args[0], args[3]) {
            (Some(x), Some(b)) => 2.0 * self.of.fwd_flops(x, b),
            _ => 0.0,
        }
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &[
            "x", "dt", "a", "b", "c", "d", "dt_bias", "pos", "saved", "dy",
        ]
    }
    fn attrs(&self) -> String {
        self.of.text()
    }
}
