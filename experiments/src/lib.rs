//! The marimba command as a library.

pub mod chat;
pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod generate;
pub mod record;
pub mod report;
pub mod verify;
