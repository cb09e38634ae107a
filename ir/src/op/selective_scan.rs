//! Selective scan of Mamba-1 (Gu and Dao 2023, arXiv 2312.00752, algorithm 2, Euler for B as in the reference code).
//!
//! With `dt'[t,i] = softplus(dt[t,i] + dt_bias[i])`, for every channel i of group `g = i / (I/G)` and state n:
//! `h[t,i,n] = exp(dt'[t,i] A[i,n]) h[t-1,i,n] + dt'[t,i] B[t,g,n] x[t,i]`,
//! `y[t,i] = (sum_n C[t,g,n] h[t,i,n] + D[i] x[t,i]) * silu(z[t,i])`.
//! The state is zero before the first token of a document (`pos = 0`). All in f32.
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | selective_scan | x | f[B T I] | |
//! | | dt | f[B T I] | raw, before bias and softplus |
//! | | a | f32[I N] | negative |
//! | | b, c | f[B T G N] | G is 1 but for Zamba's heads |
//! | | d? | f32[I] | skip |
//! | | dt_bias? | f32[I] | |
//! | | z? | f[B T I] | gate; absent: no factor |
//! | | pos? | i32[B T] | position within the document |
//! | | state? | f32[B I N] | carried state |
//! | | -> y | f[B T I] | |
//! | | -> state | f32[B I N] | only when state is given; the same memory |
//! | | -> saved | f32[B C I N] | only without state: the state before each chunk of `chunk` tokens, C = ceil(T/chunk) |
//! | selective_scan_bwd | x, dt, a, b, c, d?, dt_bias?, z?, pos?, saved, dy | | |
//! | | -> dx, ddt, da, db, dc | | da f32; then |
//! | | -> dd, ddt_bias, dz | | each only when its argument is present |

use super::{Alias, ArgTypes, Differentiable, OpDef};
use crate::vjp::Vjp;
use crate::{Type, TypeError, dims};

/// The scan.
#[derive(Clone, Debug, PartialEq)]
pub struct SelectiveScan {
    /// Tokens between saved states: memory against recomputation, never results.
    pub chunk: usize,
}

/// Its derivative.
#[derive(Clone, Debug, PartialEq)]
pub struct SelectiveScanBwd {
    /// The forward op.
    pub of: SelectiveScan,
}

fn check<'a>(a: &ArgTypes<'a>) -> Result<(&'a Type, &'a Type), TypeError> {
    let (x, dt, am) = (a.req(0, "x")?, a.req(1, "dt")?, a.req(2, "a")?);
    let (b, c) = (a.req(3, "b")?, a.req(4, "c")?);
    a.check(
        x.rank() == 3 && x.same_shape(dt),
        format!("x {x}, dt {dt}"),
        "x and dt [B T I]",
    )?;
    let i = x.size(2);
    a.check(am.rank() == 2 && am.size(0) == i, am, format!("a [I{i} N]"))?;
    a.check(
        b.rank() == 4
            && b.same_shape(c)
            && b.sizes()[..2] == x.sizes()[..2]
            && b.size(3) == am.size(1)
            && b.size(2) > 0
            && i % b.size(2) == 0,
        format!("b {b}, c {c}"),
        "b and c [B T G N], G divides I",
    )?;
    a.sizes(5, "d", &[i])?;
    a.sizes(6, "dt_bias", &[i])?;
    a.sizes(7, "z", &x.sizes())?;
    a.sizes(8, "pos", &x.sizes()[..2])?;
    Ok((x, am))
}

impl OpDef for SelectiveScan {
    const NAME: &'static str = "selective_scan";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (x, am) = check(a)?;
        let (b, t, i, n) = (x.size(0), x.size(1), x.size(2), am.size(1));
        a.check(self.chunk > 0, self.chunk, "chunk > 0")?;
        a.sizes(9, "state", &[b, i, n])?;
        Ok(vec![
            x.clone(),
            match a.opt(9) {
                Some(state) => state.clone(),
                None => Type::f32(dims![B b, C t.div_ceil(self.chunk), I i, N n]),
            },
        ])
    }
    fn alias(&self, result: usize) -> Option<Alias> {
        (result == 1).then_some(Alias::InPlace { arg: 9 })
    }
    fn flops(&self, args: &[Option<&Type>], results: &[&Type]) -> f64 {
        9.0 * results[0].len() as f64 * args[2].map_or(0, Type::last) as f64
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &[
            "x", "dt", "a", "b", "c", "d", "dt_bias", "z", "pos", "state",
        ]
    }
    fn attrs(&self) -> String {
        format!("chunk={}", self.chunk)
    }
}

impl Differentiable for SelectiveScan {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        let Some(dy) = cx.d_result(0) else {
            return Ok(());
        };
        let mut args: Vec<_> = (0..9).map(|i| cx.arg(i)).collect();
        args.push(Some(cx.result(1)));
        args.push(Some(dy));
        let r = cx.push(SelectiveScanBwd { of: self.clone() }, args)?;
        let slots = (0..5)
            .chain((5..8).filter(|&i| cx.arg(i).is_some()))
            .collect::<Vec<_>>();
        for (slot, d) in slots.into_iter().zip(r) {
            cx.set(slot, d);
        }
        Ok(())
    }
}

impl OpDef for SelectiveScanBwd {
    const NAME: &'static str = "selective_scan_bwd";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        let (x, am) = check(a)?;
        a.req(9, "saved")?;
        a.sizes(
            9,
            "saved",
            &[
                x.size(0),
                x.size(1).div_ceil(self.of.chunk),
                x.size(2),
                am.size(1),
            ],
        )?;
        a.req(10, "dy")?;
        a.sizes(10, "dy", &x.sizes())?;
        let mut out = vec![
            x.clone(),
            a.req(1, "dt")?.clone(),
            Type::f32(am.dims.clone()),
            a.req(3, "b")?.clone(),
            a.req(4, "c")?.clone(),
        ];
        out.extend(
            [5, 6]
                .into_iter()
                .filter_map(|i| a.opt(i))
                .map(|t| Type::f32(t.dims.clone())),
        );
        out.extend(a.opt(7).cloned());
        Ok(out)
    }
    fn flops(&self, args: &[Option<&Type>], results: &[&Type]) -> f64 {
        18.0 * results[0].len() as f64 * args[2].map_or(0, Type::last) as f64
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &[
            "x", "dt", "a", "b", "c", "d", "dt_bias", "z", "pos", "saved", "dy",
        ]
    }
    fn attrs(&self) -> String {
        format!("chunk={}", self.of.chunk)
    }
}
