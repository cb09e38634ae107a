//! Sources: where documents come from. A source gives random access to documents by number; one file per format.

pub mod files;
pub mod format;
pub mod shards;

use super::DataError;
use super::mmap::Mapped;
use std::sync::Arc;

/// A collection of documents, numbered from 0 in the order of its files.
pub trait Documents: Send + Sync {
    /// Number of documents, empty and short ones included.
    fn n_docs(&self) -> u64;

    /// The tokens of document `doc`. Cheap (no read) where tokens are stored, the whole tokenisation where they are not.
    ///
    /// # Errors
    /// Whatever reading or decoding can fail with; the pipeline's `on_bad` policy decides what follows.
    fn tokens(&self, doc: u64) -> Result<Tokens, DataError>;

    /// Which file document `doc` lies in, and its number there.
    fn locate(&self, doc: u64) -> (String, u64);

    /// Whether [`Documents::tokens`] costs real work, so that it pays to call it from many threads.
    fn is_costly(&self) -> bool {
        false
    }

    /// Digest of what decides the documents: names, sizes, tokenizer.
    fn fingerprint(&self) -> String;
}

/// Bytes of one stored token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Width {
    /// `u8`.
    U8,
    /// Little-endian `u16`.
    U16,
    /// Little-endian `u32` (or `i32` without negative values).
    U32,
}

impl Width {
    /// Bytes.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }

    /// The tokens that `bytes` store.
    pub fn decode(self, bytes: &[u8]) -> Vec<u32> {
        match self {
            Self::U8 => bytes.iter().map(|&b| u32::from(b)).collect(),
            Self::U16 => {
                let (ids, _) = bytes.as_chunks();
                ids.iter()
                    .map(|&b| u32::from(u16::from_le_bytes(b)))
                    .collect()
            }
            Self::U32 => {
                let (ids, _) = bytes.as_chunks();
                ids.iter().map(|&b| u32::from_le_bytes(b)).collect()
            }
        }
    }

    /// The narrowest width for ids below `vocab_size`.
    pub fn for_vocab(vocab_size: usize) -> Self {
        match vocab_size {
            ..=0x100 => Self::U8,
            0x101..=0x1_0000 => Self::U16,
            _ => Self::U32,
        }
    }
}

/// The tokens of one document, shared and read-only.
#[derive(Clone, Debug)]
pub enum Tokens {
    /// A range of a memory map.
    Mapped {
        /// The file.
        map: Arc<Mapped>,
        /// First byte.
        at: usize,
        /// Tokens.
        len: usize,
        /// Bytes per token.
        width: Width,
    },
    /// Tokens of their own.
    Owned(Arc<[u32]>),
}

impl Tokens {
    /// Number of tokens.
    pub fn len(&self) -> u64 {
        match self {
            Self::Mapped { len, .. } => *len as u64,
            Self::Owned(tokens) => tokens.len() as u64,
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Token `i < len`.
    pub fn get(&self, i: u64) -> u32 {
        let i = i as usize;
        match self {
            Self::Mapped { map, at, width, .. } => {
                let bytes = &map[at + i * width.bytes()..][..width.bytes()];
                let digit = |n, &b: &u8| n << 8 | u32::from(b);
                bytes.iter().rev().fold(0, digit)
            }
            Self::Owned(tokens) => tokens[i],
        }
    }

    /// Appends tokens `start..start + len`, which must lie inside.
    pub fn append(&self, start: u64, len: usize, out: &mut Vec<i32>) {
        let start = start as usize;
        match self {
            Self::Mapped { map, at, width, .. } => {
                let bytes = &map[at + start * width.bytes()..][..len * width.bytes()];
                match width {
                    Width::U8 => out.extend(bytes.iter().map(|&b| i32::from(b))),
                    Width::U16 => {
                        let (ids, _) = bytes.as_chunks();
                        out.extend(ids.iter().map(|&b| i32::from(u16::from_le_bytes(b))));
                    }
                    Width::U32 => {
                        let (ids, _) = bytes.as_chunks();
                        out.extend(ids.iter().map(|&b| i32::from_le_bytes(b)));
                    }
                }
            }
            Self::Owned(tokens) => {
                out.extend(tokens[start..start + len].iter().map(|&t| t as i32));
            }
        }
    }

    /// All tokens.
    pub fn to_vec(&self) -> Vec<u32> {
        let mut out = Vec::with_capacity(self.len() as usize);
        self.append(0, self.len() as usize, &mut out);
        out.into_iter().map(|t| t as u32).collect()
    }
}

/// Documents held in memory: tests, small data made by a program.
pub struct InMemory {
    docs: Vec<Result<Arc<[u32]>, String>>,
}

impl InMemory {
    /// One item per document; `Err` stands for a damaged one.
    pub fn new(docs: impl IntoIterator<Item = Result<Vec<u32>, String>>) -> Self {
        Self {
            docs: docs.into_iter().map(|d| d.map(Into::into)).collect(),
        }
    }
}

impl Documents for InMemory {
    fn n_docs(&self) -> u64 {
        self.docs.len() as u64
    }

    fn tokens(&self, doc: u64) -> Result<Tokens, DataError> {
        match &self.docs[doc as usize] {
            Ok(tokens) => Ok(Tokens::Owned(tokens.clone())),
            Err(what) => Err(DataError::Damaged {
                path: "memory".into(),
                offset: doc,
                what: what.clone(),
            }),
        }
    }

    fn locate(&self, doc: u64) -> (String, u64) {
        ("memory".into(), doc)
    }

    fn fingerprint(&self) -> String {
        use sha2::{Digest, Sha256};
        let mut hash = Sha256::new();
        for doc in &self.docs {
            match doc {
                Ok(tokens) => {
                    hash.update((tokens.len() as u64).to_le_bytes());
                    tokens.iter().for_each(|t| hash.update(t.to_le_bytes()));
                }
                Err(what) => hash.update(what),
            }
        }
        super::hex(&hash.finalize()[..16])
    }
}
