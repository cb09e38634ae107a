//! Read-only memory maps of data files: the only `unsafe` of the data side.

use super::DataError;
use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};

/// A file's bytes. Derefs to `[u8]`; an empty file is an empty slice.
#[derive(Debug)]
pub struct Mapped {
    path: PathBuf,
    map: Option<memmap2::Mmap>,
}

impl Mapped {
    /// Maps `path`.
    ///
    /// # Errors
    /// [`DataError::Io`] when the file cannot be opened or mapped.
    #[allow(unsafe_code)]
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let file = File::open(path).map_err(DataError::io("open", path))?;
        let meta = file.metadata().map_err(DataError::io("read", path))?;
        if meta.is_dir() {
            let is_dir = std::io::Error::from(std::io::ErrorKind::IsADirectory);
            return Err(DataError::Io {
                what: "map",
                path: path.into(),
                source: is_dir,
            });
        }
        if meta.len() == 0 {
            return Ok(Self {
                path: path.into(),
                map: None,
            });
        }
        // SAFETY: the map is private to this type and only read. Rust's rule that the bytes do not change is kept by
        // contract: data files are not written while a run reads them (sizes and digests are checked when a run starts).
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(DataError::io("map", path))?;
        Ok(Self {
            path: path.into(),
            map: Some(map),
        })
    }

    /// Maps `len` bytes of `path` from `offset`, which need not be aligned. Only these pages count as used while the map lives.
    ///
    /// # Errors
    /// [`DataError::Io`] when the file cannot be opened or mapped, or has fewer bytes.
    #[allow(unsafe_code)]
    pub fn range(path: &Path, offset: u64, len: usize) -> Result<Self, DataError> {
        let file = File::open(path).map_err(DataError::io("open", path))?;
        let size = file.metadata().map_err(DataError::io("read", path))?.len();
        if offset.checked_add(len as u64).is_none_or(|end| end > size) {
            let short = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
            return Err(DataError::io("map", path)(short));
        }
        if len == 0 {
            return Ok(Self {
                path: path.into(),
                map: None,
            });
        }
        // SAFETY: as in `open`.
        let map = unsafe {
            memmap2::MmapOptions::new()
                .offset(offset)
                .len(len)
                .map(&file)
        }
        .map_err(DataError::io("map", path))?;
        Ok(Self {
            path: path.into(),
            map: Some(map),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }
}
