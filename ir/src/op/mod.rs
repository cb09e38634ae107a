//! The ops: coarse, what one good kernel does. One file per op with its equation, its table of arguments and results, its types,
//! its cost and its derivative; the same file stem holds the op on every floor (`kernels/src`, `backend/src/cpu`, `backend/src/dfdx`).
//!
//! Two traits: [`OpDef`] for all ops, [`Differentiable`] for those a lowering may write. The list below exists once; a forward op
//! without a VJP does not compile.

mod adamw;
mod attention;
mod cache_write;
mod cast;
mod causal_conv1d;
mod concat;
mod draw;
mod embed;
mod gated_delta;
mod linear;
mod linear_cross_entropy;
mod moe;
mod pointwise;
mod reduce;
mod rms_norm;
mod rope;
mod route;
mod selective_scan;
mod ssd;
mod stat;
mod view;

pub use adamw::{AdamW, AdamWTensor, GlobalNorm};
pub use attention::{Attention, AttentionBwd};
pub use cache_write::CacheWrite;
pub use cast::Cast;
pub use causal_conv1d::{CausalConv1d, CausalConv1dBwd};
pub use concat::{Concat, Split};
pub use draw::{Draw, WEIGHT_BITS};
pub use embed::{Embed, EmbedBwd};
pub use gated_delta::{GatedDelta, GatedDeltaBwd};
pub use linear::{Linear, LinearDw, LinearDx, LinearFp8, Narrow};
pub use linear_cross_entropy::{LinearCrossEntropy, LinearCrossEntropyBwd, LinearCrossEntropyGrad};
pub use moe::{
    Combine, CombineBwd, Dispatch, GatherRows, GroupedLinear, GroupedLinearDw, GroupedLinearDx,
};
pub use pointwise::{Bin, Broadcast, Instr, Pointwise, Un};
pub use reduce::{Accumulate, MeanSquare, SumTo};
pub use rms_norm::{Gate, RmsNorm, RmsNormBwd};
pub use rope::Rope;
pub use route::{Balance, BalanceBwd, Normalize, Route, RouteBwd, Score};
pub use selective_scan::{SelectiveScan, SelectiveScanBwd};
pub use ssd::{Ssd, SsdBwd};
pub use stat::{STAT_BUCKETS, STAT_LEN, Stat, stat_bucket};
pub use view::{Last, LastBwd, Reshape, Rows};

use crate::vjp::Vjp;
use crate::{Type, TypeError};

/// Result that uses the memory of an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alias {
    /// The same bytes, read only: argument and result may both be read later.
    View {
        /// Which argument.
        arg: usize,
        /// First row (along dimension 0 of the argument) of the result.
        first_row: usize,
    },
    /// The op writes over the argument, which must not be read by any later node.
    InPlace {
        /// Which argument.
        arg: usize,
    },
}

impl Alias {
    /// The aliased argument.
    pub fn arg(self) -> usize {
        match self {
            Alias::View { arg, .. } | Alias::InPlace { arg } => arg,
        }
    }
}

/// What a node costs. Folded over the graph, never written beside the model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Multiply-adds counted as two, of the mathematics (not of recomputation inside a kernel).
    pub flops: f64,
    /// Bytes that must move through memory at least once; `infer`'s arguments and results unless the op knows better.
    pub bytes: f64,
}

/// Argument types as an op sees them in [`OpDef::infer`].
pub struct ArgTypes<'a> {
    /// Name of the op, for errors.
    pub op: &'static str,
    /// One entry per argument slot.
    pub types: &'a [Option<Type>],
}

impl<'a> ArgTypes<'a> {
    /// The required argument `i`, called `name` in the op's table.
    ///
    /// # Errors
    /// When it is absent.
    pub fn req(&self, i: usize, name: &str) -> Result<&'a Type, TypeError> {
        self.opt(i)
            .ok_or_else(|| self.error("nothing", format!("argument {i} ({name})")))
    }

    /// The optional argument `i`.
    pub fn opt(&self, i: usize) -> Option<&'a Type> {
        self.types.get(i).and_then(Option::as_ref)
    }

    /// An error about what was found.
    pub fn error(&self, found: impl ToString, expected: impl ToString) -> TypeError {
        TypeError {
            op: self.op,
            found: found.to_string(),
            expected: expected.to_string(),
            path: String::new(),
        }
    }

    /// Requires argument `i`, when present, to have these sizes.
    ///
    /// # Errors
    /// When it has others.
    pub fn sizes(&self, i: usize, name: &str, sizes: &[usize]) -> Result<(), TypeError> {
        match self.opt(i) {
            Some(t) if t.sizes() != sizes => {
                Err(self.error(format!("{name} {t}"), format!("sizes {sizes:?}")))
            }
            _ => Ok(()),
        }
    }

    /// Requires `cond`.
    ///
    /// # Errors
    /// When it is false.
    pub fn check(
        &self,
        cond: bool,
        found: impl ToString,
        expected: impl ToString,
    ) -> Result<(), TypeError> {
        if cond {
            Ok(())
        } else {
            Err(self.error(found, expected))
        }
    }
}

/// What every op says about itself.
pub trait OpDef {
    /// Name in the text form and in kernels.
    const NAME: &'static str;

    /// Result types from argument types.
    ///
    /// # Errors
    /// [`TypeError`] when the arguments do not fit.
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError>;

    /// Whether result `result` uses the memory of an argument.
    fn alias(&self, result: usize) -> Option<Alias> {
        let _ = result;
        None
    }

    /// Floating point operations.
    fn flops(&self, args: &[Option<&Type>], results: &[&Type]) -> f64;

    /// Attributes in the text form, without parentheses; empty when there are none.
    fn attrs(&self) -> String {
        String::new()
    }

    /// Argument names by slot, for the text form and errors; variadic ops name the last slot once.
    fn arg_names(&self) -> &'static [&'static str];
}

/// An op that a lowering may write: it knows its derivative.
pub trait Differentiable: OpDef {
    /// Appends nodes that turn gradients of results into gradients of arguments. Reads exactly what it names; the planner keeps
    /// exactly that alive.
    ///
    /// # Errors
    /// [`TypeError`] when it builds an ill-typed node: a bug.
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError>;
}

macro_rules! ops {
    (forward { $($fwd:ident),* $(,)? } other { $($oth:ident),* $(,)? }) => {
        /// All ops. Matched exhaustively: adding one makes the compiler print the to-do list.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs)]
        pub enum Op { $($fwd($fwd),)* $($oth($oth),)* }

        $(impl From<$fwd> for Op { fn from(op: $fwd) -> Op { Op::$fwd(op) } })*
        $(impl From<$oth> for Op { fn from(op: $oth) -> Op { Op::$oth(op) } })*

        impl Op {
            /// Names of all ops, in the order of the list.
            pub const NAMES: &'static [&'static str] = &[$(<$fwd as OpDef>::NAME,)* $(<$oth as OpDef>::NAME,)*];

            /// Name in the text form.
            pub fn name(&self) -> &'static str {
                match self { $(Op::$fwd(_) => <$fwd as OpDef>::NAME,)* $(Op::$oth(_) => <$oth as OpDef>::NAME,)* }
            }

            /// See [`OpDef::infer`].
            ///
            /// # Errors
            /// [`TypeError`] when the arguments do not fit.
            pub fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
                match self { $(Op::$fwd(op) => op.infer(a),)* $(Op::$oth(op) => op.infer(a),)* }
            }

            /// See [`OpDef::alias`].
            pub fn alias(&self, result: usize) -> Option<Alias> {
                match self { $(Op::$fwd(op) => op.alias(result),)* $(Op::$oth(op) => op.alias(result),)* }
            }

            /// See [`OpDef::flops`].
            pub fn flops(&self, args: &[Option<&Type>], results: &[&Type]) -> f64 {
                match self { $(Op::$fwd(op) => op.flops(args, results),)* $(Op::$oth(op) => op.flops(args, results),)* }
            }

            /// See [`OpDef::attrs`].
            pub fn attrs(&self) -> String {
                match self { $(Op::$fwd(op) => op.attrs(),)* $(Op::$oth(op) => op.attrs(),)* }
            }

            /// See [`OpDef::arg_names`].
            pub fn arg_names(&self) -> &'static [&'static str] {
                match self { $(Op::$fwd(op) => op.arg_names(),)* $(Op::$oth(op) => op.arg_names(),)* }
            }

            /// Appends the derivative of a forward op; `None` for ops that only backward and update phases use.
            pub(crate) fn vjp(&self, cx: &mut Vjp) -> Option<Result<(), TypeError>> {
                fn call<D: Differentiable>(op: &D, cx: &mut Vjp) -> Option<Result<(), TypeError>> {
                    Some(op.vjp(cx))
                }
                match self { $(Op::$fwd(op) => call(op, cx),)* $(Op::$oth(_) => None,)* }
            }
        }
    };
}

ops! {
    forward {
        Embed, Linear, RmsNorm, Rope, Attention, CausalConv1d, SelectiveScan, Ssd, GatedDelta, Pointwise,
        Route, Balance, Dispatch, GatherRows, GroupedLinear, Combine, LinearCrossEntropy,
        CacheWrite, Draw, Cast, Concat, Split, Last, Reshape, Rows, MeanSquare, Stat,
    }
    other {
        EmbedBwd, LinearDx, LinearDw, RmsNormBwd, AttentionBwd, CausalConv1dBwd, SelectiveScanBwd, SsdBwd, GatedDeltaBwd,
        RouteBwd, BalanceBwd, GroupedLinearDx, GroupedLinearDw, CombineBwd, LinearCrossEntropyBwd, LinearCrossEntropyGrad,
        LastBwd, SumTo, Accumulate, Narrow, LinearFp8, GlobalNorm, AdamW,
    }
}
