//! What can go wrong while a run is recorded.

use std::io;
use std::path::{Path, PathBuf};

/// An error of the recording side. Each names the file concerned.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The folder or file may not be written by this user, or lies on a read-only file system.
    #[error("cannot write {path}: {source}; choose a writable folder with --out")]
    Unwritable {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No space is left (disk or quota). What was being written has been taken back.
    #[error(
        "disk full while writing {path}: {source}; free some space, then continue with --resume"
    )]
    DiskFull {
        /// The file that was being written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Any other failure of the file system.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was being done, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another live process records into this folder.
    #[error(
        "run folder {path} is in use by process {holder}; wait for it to end, or choose another folder with --out"
    )]
    Locked {
        /// The run folder.
        path: PathBuf,
        /// Process id and host of the holder, as it wrote them.
        holder: String,
    },
    /// The folder already holds a run, and the caller asked for a new one.
    #[error(
        "run folder {path} already holds a run ({state}); continue it with --resume, or choose another folder with --out"
    )]
    Occupied {
        /// The run folder.
        path: PathBuf,
        /// State of that run, as in its status.json.
        state: String,
    },
    /// `--resume` of a folder without a run.
    #[error("{path} holds no run to resume: {missing} is missing")]
    NoRun {
        /// The folder.
        path: PathBuf,
        /// The file that was looked for.
        missing: &'static str,
    },
    /// A file of the run folder is not what it should be.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tag that `metrics.jsonl` uses for itself, or the empty one.
    #[error("tag {tag:?} cannot be recorded: \"step\", \"time\" and the empty tag are reserved")]
    ReservedTag {
        /// The tag.
        tag: String,
    },
    /// Steps of one run must not go back, except by `resume`.
    #[error(
        "step {step} was recorded after step {last}: steps of a run must not go back; resume truncates first"
    )]
    StepBack {
        /// The step that was given.
        step: u64,
        /// The step recorded before.
        last: u64,
    },
}

impl RecordError {
    /// Sorts an `io::Error` met while doing `action` at `path` into its kind.
    pub fn from_io(action: &'static str, path: &Path, source: io::Error) -> RecordError {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => RecordError::DiskFull { path, source },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                if action != "read" =>
            {
                RecordError::Unwritable { path, source }
            }
            _ => RecordError::Io {
                action,
                path,
                source,
            },
        }
    }
}
