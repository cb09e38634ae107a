//! Suites that look at every crate from outside.
