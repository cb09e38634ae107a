//! The marimba command as a library.

pub mod bench;
pub mod chat;
pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod engine;
pub mod facts;
pub mod formats;
pub mod generate;
pub mod init;
pub mod interrupt;
pub mod program;
pub mod record;
pub mod report;
pub mod slurm;
pub mod sweep;
pub mod train;
pub mod transfer;
pub mod verify;
