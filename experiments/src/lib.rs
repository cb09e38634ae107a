//! The marimba command as a library.

pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod record;
pub mod report;
