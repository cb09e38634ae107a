//! Suites that look at every crate from outside.

pub mod graphs;
