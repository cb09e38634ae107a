//! Arguments of the command: one file per group of verbs. The only place that names clap.

pub mod data;
