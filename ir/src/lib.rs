//! The typed graph of coarse ops: lowering of checked models, differentiation, passes, memory plan, and folds over the graph.
//!
//! `Valid<Model> --lower--> Graph --passes--> Graph --plan--> Plan`. Nothing here runs anything; `backend` does.
//! Types of this crate are not serialisable: they print.

#[cfg(any(test, feature = "arbitrary"))]
pub mod arbitrary;
pub mod cost;
mod graph;
pub mod lower;
pub mod op;
pub mod pass;
mod plan;
pub mod print;
mod ty;
mod verify;
mod vjp;

pub use graph::{
    Def, External, Graph, Node, NodeId, Param, ParamInit, Phase, Place, TypeError, Value, ValueId,
    replace_last,
};
pub use lower::{Mode, Options, lower, update};
pub use plan::{ALIGN, Memory, Plan, plan};
pub use ty::{DType, Dim, Letter, Type};
pub use verify::{Fault, VerifyError, verify};
pub use vjp::{Vjp, differentiate, differentiate_from};
