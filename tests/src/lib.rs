//! Suites that look at every crate from outside.

pub mod graphs;
pub mod samples;
pub mod tolerance;
