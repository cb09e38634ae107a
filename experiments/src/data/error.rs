//! What can go wrong with data, as one type. Messages say what, where, and what would be right.

use std::path::PathBuf;

/// Failure of a source, a stage or a state.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The operating system refused.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried: `open`, `read`, `map`.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// An object store gave an error, or no answer for too long.
    #[error("cannot read {url}: {what}")]
    Remote {
        /// The object.
        url: String,
        /// The store's reason, and how often it was asked.
        what: String,
    },
    /// No file matches.
    #[error("no data files at {}; expected {expected}", path.display())]
    NoFiles {
        /// Where was looked.
        path: PathBuf,
        /// What would have been read.
        expected: &'static str,
    },
    /// A file without content.
    #[error("data file {} is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Text that is not UTF-8.
    #[error("data file {} is not UTF-8: bad byte at offset {offset}; convert the file, or set raw_bytes: true to read any bytes", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first bad byte.
        offset: u64,
    },
    /// Too little data for one row.
    #[error(
        "{what} has {have} tokens, too few for one row; a row of seq_len {seq_len} needs {need}"
    )]
    TooShort {
        /// Which data.
        what: String,
        /// Tokens there.
        have: u64,
        /// T.
        seq_len: usize,
        /// Tokens needed.
        need: u64,
    },
    /// A parameter outside its range, or parameters that contradict each other.
    #[error("{0}")]
    Parameter(String),
    /// Bytes that do not follow their format.
    #[error("{} is damaged at offset {offset}: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in the file, bytes; of the decompressed text where it is compressed.
        offset: u64,
        /// What was found and what was expected.
        what: String,
    },
    /// A file that is not what the manifest or the state says.
    #[error("{} changed since {since}: {what}; restore the file, or prepare the data again and start a new run", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// When it was last seen whole.
        since: &'static str,
        /// Size or digest, then and now.
        what: String,
    },
    /// A token id that the vocabulary does not have.
    #[error("token {token} in {} (document {doc}) is outside the vocabulary of {vocab_size}; expected the tokenizer that made it, or a larger vocab_size", path.display())]
    TokenRange {
        /// The file.
        path: PathBuf,
        /// Document index in the file.
        doc: u64,
        /// The id.
        token: u64,
        /// V.
        vocab_size: usize,
    },
    /// No usable document.
    #[error("dataset {dataset} has no usable document: {why}")]
    NoDocuments {
        /// Its name.
        dataset: String,
        /// Counts by reason.
        why: String,
    },
    /// A saved state that cannot be continued.
    #[error("{0}")]
    State(String),
    /// An evaluation set that does not exist.
    #[error("no evaluation set {set}; there are {have}")]
    NoSuchEvalSet {
        /// Asked for.
        set: usize,
        /// Number of sets.
        have: usize,
    },
    /// The tokenizer could not be loaded or failed on a text.
    #[error("tokenizer {}: {what}", path.display())]
    Tokenizer {
        /// Its file.
        path: PathBuf,
        /// Its reason.
        what: String,
    },
}

impl DataError {
    /// Whether one document is at fault, so that `on_bad` decides. Everything else (a lost disk or connection, a changed file) stops: leaving
    /// documents out because of it would lose good data.
    pub fn is_of_document(&self) -> bool {
        match self {
            Self::Damaged { .. } | Self::NotUtf8 { .. } | Self::Tokenizer { .. } => true,
            Self::Io { .. }
            | Self::Remote { .. }
            | Self::NoFiles { .. }
            | Self::Empty { .. }
            | Self::TooShort { .. }
            | Self::Parameter(_)
            | Self::Changed { .. }
            | Self::TokenRange { .. }
            | Self::NoDocuments { .. }
            | Self::State(_)
            | Self::NoSuchEvalSet { .. } => false,
        }
    }

    /// Wraps a system error with what was tried on which path.
    pub fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
