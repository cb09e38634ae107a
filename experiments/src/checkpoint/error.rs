//! What can go wrong with checkpoints, as one type. Messages say what, where, and what would be right.

use std::path::{Path, PathBuf};

/// Failure of reading, writing or matching weights.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried: `open`, `write`, `rename`.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file that is not what its name says: truncated, lying about its contents, or not of the format.
    #[error("{} is not a whole {kind}: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What it should be.
        kind: &'static str,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// Nothing of the expected kind stands at this path.
    #[error("no {kind} at {}; {help}", path.display())]
    NotFound {
        /// What was looked for.
        kind: &'static str,
        /// Where.
        path: PathBuf,
        /// What would be right.
        help: String,
    },
    /// Tensors that do not fit the model, all of them at once.
    #[error("the tensors of {} do not fit the model:\n{}", path.display(), problems.join("\n"))]
    Tensors {
        /// The file or folder.
        path: PathBuf,
        /// One line per tensor: missing, extra, or of another shape.
        problems: Vec<String>,
    },
    /// A checkpoint of another model.
    #[error("checkpoint {} belongs to another model: {why}", path.display())]
    OtherModel {
        /// The checkpoint.
        path: PathBuf,
        /// What differs.
        why: String,
    },
    /// A configuration that says two things at once, lacks something, or asks for something that is not supported.
    #[error("{}: {}", path.display(), problems.join("; "))]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// What is wrong, one item per problem.
        problems: Vec<String>,
    },
    /// A model that a format cannot express.
    #[error("model {model} cannot be written as {format}: {why}")]
    Inexpressible {
        /// Name of the model.
        model: String,
        /// The format or family.
        format: String,
        /// What it has no word for.
        why: String,
    },
    /// The target exists and would be overwritten.
    #[error("{} already exists; choose another folder or remove it first", path.display())]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// Weights could not be read from the engine or produced.
    #[error("cannot produce tensor {name}: {why}")]
    Produce {
        /// The tensor.
        name: String,
        /// Why.
        why: String,
    },
}

impl CheckpointError {
    /// For `map_err`: an I/O failure while doing `what` to `path`.
    pub fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
        let path = path.to_path_buf();
        move |source| CheckpointError::Io { what, path, source }
    }

    /// A damaged file.
    pub fn damaged(path: &Path, kind: &'static str, why: impl Into<String>) -> CheckpointError {
        CheckpointError::Damaged {
            path: path.to_path_buf(),
            kind,
            why: why.into(),
        }
    }
}
