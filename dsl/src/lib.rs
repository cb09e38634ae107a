//! RON text to checked models, runs and sweeps.
//!
//! [`parse_model`], [`parse_run`] and their `load_` forms take a text and overrides ([`Set`]) and give a [`Valid`] value or a
//! [`Report`] of all violations, each with file, line and column. [`syntax`] documents what may be written, [`model`], [`run`],
//! [`data`] and [`sweep`] what comes out. Nothing here knows tensors, devices or the contents of data files.

#[cfg(any(test, feature = "arbitrary"))]
pub mod arbitrary;
pub mod check;
pub mod data;
mod de;
pub mod diag;
pub mod dialect;
mod expand;
mod load;
pub mod model;
pub mod run;
pub mod sweep;
pub mod syntax;
mod tree;
pub mod write;

pub use check::{Valid, unsupported};
pub use diag::{Diagnostic, Fact, Report, Source};
pub use expand::{Residual, load_sweep, parse_sweep};
pub use load::{Set, load_model, load_run, parse_model, parse_run};
