//! Marimba's own token shards: a folder that `data prepare` makes, read through memory maps.
//!
//! ```text
//! manifest.json       vocabulary, tokenizer, and per part: documents, tokens, width, sizes, CRC-32C, source
//! part-000000.tok     tokens, little-endian u8, u16 or u32, document after document
//! part-000000.idx     u64 per document: tokens up to and with it
//! part-000000.json    the part's entry of the manifest, written last: a part without it is not finished
//! ```
//!
//! Opening reads the manifest only; a part is mapped when a document of it is first read, and its sizes are checked then. Under a URL the same
//! files are read by ranges: places of documents in blocks that are kept, tokens document by document.

use super::{Documents, Tokens, Width};
use crate::data::mmap::Mapped;
use crate::data::{DataError, place};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

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
        if !place::exists(&path)? {
            return Err(DataError::NoFiles {
                path: folder.into(),
                expected: "a folder with manifest.json, made by `data prepare`",
            });
        }
        let text = place::range(&path, 0..place::size(&path)?)?;
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

/// An opened part.
enum Open {
    /// Files of this machine.
    Mapped { tok: Arc<Mapped>, idx: Mapped },
    /// Objects of a store.
    Remote { tok: PathBuf, idx: PathBuf },
}

/// Bytes of a block of a remote `.idx`: the places of 8,192 documents.
const BLOCK: u64 = 64 << 10;

/// Blocks kept: 256 MiB.
const BLOCKS: usize = 4096;

/// Blocks of remote `.idx` files by part and number, with the time of their last use; the least recently used one goes first.
#[derive(Default)]
struct Blocks {
    held: BTreeMap<(usize, u64), (bytes::Bytes, u64)>,
    clock: u64,
}

/// The documents of a folder.
pub struct ShardDocs {
    folder: PathBuf,
    manifest: Manifest,
    ends: Vec<u64>,
    open: Vec<OnceLock<Open>>,
    blocks: Mutex<Blocks>,
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
            blocks: Mutex::default(),
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
            self.part(i)?;
            for (ending, want) in [("tok", part.tok_crc32c), ("idx", part.idx_crc32c)] {
                let path = self.path(part, ending);
                let have = crc_of(&path)?;
                if have != want {
                    let what = format!("its CRC-32C is {have:08x}, it was {want:08x}");
                    return Err(DataError::Changed {
                        path,
                        since: "it was prepared",
                        what,
                    });
                }
            }
        }
        Ok(())
    }

    fn path(&self, part: &Part, ending: &str) -> PathBuf {
        self.folder.join(format!("{}.{ending}", part.name))
    }

    fn part(&self, i: usize) -> Result<&Open, DataError> {
        if let Some(open) = self.open[i].get() {
            return Ok(open);
        }
        let part = &self.manifest.parts[i];
        let whole = |path: &Path, have: u64, want: u64| {
            if have == want {
                return Ok(());
            }
            let what = format!("it has {have} bytes, it had {want}");
            Err(DataError::Changed {
                path: path.into(),
                since: "it was prepared",
                what,
            })
        };
        let (tok, idx) = (self.path(part, "tok"), self.path(part, "idx"));
        let (tok_bytes, idx_bytes) = (part.tokens * part.width.bytes() as u64, part.docs * 8);
        let open = if place::is_url(&self.folder) {
            whole(&tok, place::size(&tok)?, tok_bytes)?;
            whole(&idx, place::size(&idx)?, idx_bytes)?;
            Open::Remote { tok, idx }
        } else {
            let (t, i) = (Mapped::open(&tok)?, Mapped::open(&idx)?);
            whole(&tok, t.len() as u64, tok_bytes)?;
            whole(&idx, i.len() as u64, idx_bytes)?;
            Open::Mapped {
                tok: Arc::new(t),
                idx: i,
            }
        };
        Ok(self.open[i].get_or_init(|| open))
    }

    /// Tokens of part `i` up to and with its document `doc`.
    fn end_of(&self, i: usize, doc: u64) -> Result<u64, DataError> {
        let number = |bytes: &[u8], at: usize| {
            let one = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
            one.map_or(0, u64::from_le_bytes)
        };
        match self.part(i)? {
            Open::Mapped { idx, .. } => Ok(number(idx, doc as usize * 8)),
            Open::Remote { idx, .. } => {
                let block = doc * 8 / BLOCK;
                let bytes = self.block(i, idx, block)?;
                Ok(number(&bytes, (doc * 8 - block * BLOCK) as usize))
            }
        }
    }

    /// A block of a remote `.idx`, fetched unless it is held.
    fn block(&self, part: usize, idx: &Path, number: u64) -> Result<bytes::Bytes, DataError> {
        let lock = || self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut blocks = lock();
            blocks.clock += 1;
            let now = blocks.clock;
            if let Some((bytes, used)) = blocks.held.get_mut(&(part, number)) {
                *used = now;
                return Ok(bytes.clone());
            }
        }
        let start = number * BLOCK;
        let end = (start + BLOCK).min(self.manifest.parts[part].docs * 8);
        let bytes = place::range(idx, start..end)?;
        let mut blocks = lock();
        if blocks.held.len() >= BLOCKS {
            let oldest = blocks.held.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(key) = oldest.map(|(key, _)| *key) {
                blocks.held.remove(&key);
            }
        }
        let now = blocks.clock;
        blocks.held.insert((part, number), (bytes.clone(), now));
        Ok(bytes)
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
        let part = &self.manifest.parts[i];
        let start = match local.checked_sub(1) {
            None => 0,
            Some(before) => self.end_of(i, before)?,
        };
        let end = self.end_of(i, local)?;
        if start > end || end > part.tokens {
            let what = format!(
                "document {local} spans tokens {start} to {end} of {}",
                part.tokens
            );
            return Err(DataError::Damaged {
                path: self.path(part, "idx"),
                offset: local * 8,
                what,
            });
        }
        let width = part.width.bytes() as u64;
        Ok(match self.part(i)? {
            Open::Mapped { tok, .. } => Tokens::Mapped {
                map: tok.clone(),
                at: (start * width) as usize,
                len: (end - start) as usize,
                width: part.width,
            },
            Open::Remote { tok, .. } => {
                let bytes = place::range(tok, start * width..end * width)?;
                Tokens::Owned(part.width.decode(&bytes).into())
            }
        })
    }

    fn is_costly(&self) -> bool {
        place::is_url(&self.folder)
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

/// CRC-32C of a file or object, read from front to back.
fn crc_of(path: &Path) -> Result<u32, DataError> {
    let (mut file, mut piece, mut crc) = (place::open(path)?, vec![0; 1 << 20], 0);
    loop {
        let read = file.read(&mut piece);
        let read =
            read.map_err(|e| place::lost(&e).unwrap_or_else(|| DataError::io("read", path)(e)))?;
        if read == 0 {
            return Ok(crc);
        }
        crc = crc32c::crc32c_append(crc, &piece[..read]);
    }
}

/// Feeds a file's size and its first and last 4 KiB: enough to notice another file without reading all of a large one.
///
/// # Errors
/// [`DataError::Io`].
pub(crate) fn digest_ends(path: &Path, digest: &mut Sha256) -> Result<u64, DataError> {
    let size = place::size(path)?;
    let ends = size.min(4096);
    digest.update(size.to_le_bytes());
    digest.update(place::range(path, 0..ends)?);
    digest.update(place::range(path, size - ends..size)?);
    Ok(size)
}
