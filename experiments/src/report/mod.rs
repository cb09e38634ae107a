//! What many runs say together: loading, statistics, tables, the explanation of a difference, the HTML report.
//!
//! Everything is computed once into a [`Comparison`]; terminal, CSV, JSON and HTML only print it.

pub mod compare;
pub mod database;
pub mod explain;
pub mod fit;
pub mod html;
pub mod load;
pub mod pareto;
pub mod scaling;
pub mod stats;
mod svg;
pub mod table;
pub mod units;
mod verdict;

pub use compare::{Comparison, Options, compare};
pub use load::{LoadError, RunData, load};
