//! Marimba's own token shards: a folder that `data prepare` makes, read through memory maps.
//!
//! ```text
//! manifest.json       vocabulary, tokenizer, and per part: documents, tokens, width, sizes, CRC-32C, source
//! part-000000.tok     tokens, little-endian u8, u16 or u32, document after document
//! part-000000.idx     u64 per document: tokens up to and with it
//! part-000000.json    the part's entry of the manifest, written last: a part without it is not finished
//! ```
//!
//! Opening reads the manifest only; a part is mapped when a document of it is first read, and its sizes are checked then.

use super::{Documents, Tokens, Width};
use crate::data::DataError;
use crate::data::mmap::Mapped;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// Name of the manifest in its folder.
pub const MANIFEST: &str = "manifest.json";

/// What a folder of shards holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Layout; [`Manifest::VERSION`].
    pub version: u32,
    /// V.
    pub vocab_size: usize,
    /// The tokenizer's name, for people.
    pub tokenizer: String,
    /// The tokenizer's digest.
    pub tokenizer_digest: String,
    /// The token that ends a document, to be added by the reader.
    pub eos: Option<u32>,
    /// Documents of all parts.
    pub docs: u64,
    /// Tokens of all parts.
    pub tokens: u64,
    /// In order.
    pub parts: Vec<Part>,
}

impl Manifest {
    /// The layout this build reads and writes.
    pub const VERSION: u32 = 1;

    /// Reads the manifest of `folder`.
    ///
    /// # Errors
    /// [`DataError::NoFiles`] without one, [`DataError::Damaged`] for one that cannot be read or does not add up.
    pub fn read(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join(MANIFEST);
        if !path.exists() {
            return Err(DataError::NoFiles {
                path: folder.into(),
                expected: "a folder with manifest.json, made by `data prepare`",
            });
        }
        let text = std::fs::read(&path).map_err(DataError::io("read", &path))?;
        let damaged = |what: String| DataError::Damaged {
            path: path.clone(),
            offset: 0,
            what,
        };
        let manifest: Self = serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
        if manifest.version != Self::VERSION {
            return Err(damaged(format!(
                "layout {}; this build reads layout {}",
                manifest.version,
                Self::VERSION
            )));
        }
        let sum = manifest.parts.iter().map(|p| p.docs).sum::<u64>();
        if sum != manifest.docs {
            return Err(damaged(format!(
                "{} documents, but its parts have {sum}",
                manifest.docs
            )));
        }
        Ok(manifest)
    }
}

/// One part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// File name without ending, such as `part-000000`.
    pub name: String,
    /// Documents.
    pub docs: u64,
    /// Tokens.
    pub tokens: u64,
    /// Largest token id.
    pub max_token: u32,
    /// Bytes per token.
    pub width: Width,
    /// CRC-32C of the `.tok` file.
    pub tok_crc32c: u32,
    /// CRC-32C of the `.idx` file.
    pub idx_crc32c: u32,
    /// File it was made from.
    pub source: String,
    /// That file's size.
    pub source_bytes: u64,
    /// Digest of that file's size and both ends, the tokenizer and the columns: another one and the part is made again.
    pub made_from: String,
    /// Documents left out because they could not be read.
    pub bad: u64,
}

/// A mapped part.
struct Open {
    tok: Arc<Mapped>,
    idx: Mapped,
}

/// The documents of a folder.
pub struct ShardDocs {
    folder: PathBuf,
    manifest: Manifest,
    ends: Vec<u64>,
    open: Vec<OnceLock<Open>>,
    fingerprint: String,
}

impl ShardDocs {
    /// Reads the manifest of `folder`.
    ///
    /// # Errors
    /// As [`Manifest::read`].
    pub fn open(folder: &Path) -> Result<Self, DataError> {
        let manifest = Manifest::read(folder)?;
        let ends = manifest.parts.iter().scan(0, |end, p| {
            *end += p.docs;
            Some(*end)
        });
        let mut digest = Sha256::new();
        for p in &manifest.parts {
            digest.update(format!(
                "{} {} {} {:08x} {:08x};",
                p.name, p.docs, p.tokens, p.tok_crc32c, p.idx_crc32c
            ));
        }
        Ok(Self {
            folder: folder.into(),
            ends: ends.collect(),
            open: manifest.parts.iter().map(|_| OnceLock::new()).collect(),
            fingerprint: crate::data::hex(&digest.finalize()[..16]),
            manifest,
        })
    }

    /// What was read.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Reads every file and compares it with the manifest.
    ///
    /// # Errors
    /// [`DataError::Changed`] for the first that differs.
    pub fn verify(&self) -> Result<(), DataError> {
        for (i, part) in self.manifest.parts.iter().enumerate() {
            let open = self.part(i)?;
            for (map, want) in [(&*open.tok, part.tok_crc32c), (&open.idx, part.idx_crc32c)] {
                let have = crc32c::crc32c(map);
                if have != want {
                    let what = format!("its CRC-32C is {have:08x}, it was {want:08x}");
                    return Err(DataError::Changed {
                        path: map.path().into(),
                        since: "it was prepared",
                        what,
                    });
                }
            }
        }
        Ok(())
    }

    fn part(&self, i: usize) -> Result<&Open, DataError> {
        if let Some(open) = self.open[i].get() {
            return Ok(open);
        }
        let part = &self.manifest.parts[i];
        let map = |ending: &str, want: u64| {
            let path = self.folder.join(format!("{}.{ending}", part.name));
            let map = Mapped::open(&path)?;
            if map.len() as u64 != want {
                let what = format!("it has {} bytes, it had {want}", map.len());
                return Err(DataError::Changed {
                    path,
                    since: "it was prepared",
                    what,
                });
            }
            Ok(map)
        };
        let open = Open {
            tok: Arc::new(map("tok", part.tokens * part.width.bytes() as u64)?),
            idx: map("idx", part.docs * 8)?,
        };
        Ok(self.open[i].get_or_init(|| open))
    }

    fn part_of(&self, doc: u64) -> (usize, u64) {
        let part = self.ends.partition_point(|&end| end <= doc);
        (part, doc - if part == 0 { 0 } else { self.ends[part - 1] })
    }
}

impl Documents for ShardDocs {
    fn n_docs(&self) -> u64 {
        self.manifest.docs
    }

    fn tokens(&self, doc: u64) -> Result<Tokens, DataError> {
        let (i, local) = self.part_of(doc);
        let (part, open) = (&self.manifest.parts[i], self.part(i)?);
        let end_of = |d: u64| {
            let at = d as usize * 8;
            open.idx
                .get(at..at + 8)
                .and_then(|b| b.try_into().ok())
                .map_or(0, u64::from_le_bytes)
        };
        let (start, end) = (
            if local == 0 { 0 } else { end_of(local - 1) },
            end_of(local),
        );
        if start > end || end > part.tokens {
            let what = format!(
                "document {local} spans tokens {start} to {end} of {}",
                part.tokens
            );
            return Err(DataError::Damaged {
                path: open.idx.path().into(),
                offset: local * 8,
                what,
            });
        }
        Ok(Tokens::Mapped {
            map: open.tok.clone(),
            at: start as usize * part.width.bytes(),
            len: (end - start) as usize,
            width: part.width,
        })
    }

    fn locate(&self, doc: u64) -> (String, u64) {
        let (part, local) = self.part_of(doc);
        (
            self.folder
                .join(format!("{}.tok", self.manifest.parts[part].name))
                .display()
                .to_string(),
            local,
        )
    }

    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }
}

/// Feeds a file's size and its first and last 4 KiB: enough to notice another file without reading all of a large one.
///
/// # Errors
/// [`DataError::Io`].
pub(crate) fn digest_ends(path: &Path, digest: &mut Sha256) -> Result<u64, DataError> {
    let map = Mapped::open(path)?;
    digest.update((map.len() as u64).to_le_bytes());
    digest.update(&map[..map.len().min(4096)]);
    digest.update(&map[map.len() - map.len().min(4096)..]);
    Ok(map.len() as u64)
}
