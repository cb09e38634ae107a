//! Where bytes lie: files of this machine, or objects of a store under a URL (`s3://`, `gs://`, `az://`, `http://`, `https://`).
//!
//! Paths of both kinds are `Path`s. What needs random access to single documents maps local files itself; everything here also works
//! over a network. Stores are read by the feature `remote`; without it a URL is refused with words.

use super::DataError;
pub use marimba_dsl::data::is_url;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

#[cfg(feature = "remote")]
use super::remote;

/// Without the feature: every call says what is missing.
#[cfg(not(feature = "remote"))]
mod remote {
    use super::{DataError, Path, PathBuf, Range, ReadSeek};

    fn absent<T>(url: &Path) -> Result<T, DataError> {
        Err(DataError::Remote {
            url: url.display().to_string(),
            what: "this marimba was built without object stores; build it with `--features remote`, or copy the data here".into(),
        })
    }

    pub(super) fn size(url: &Path) -> Result<Option<u64>, DataError> {
        absent(url)
    }

    pub(super) fn list(url: &Path) -> Result<Vec<PathBuf>, DataError> {
        absent(url)
    }

    pub(super) fn range(url: &Path, _: Range<u64>) -> Result<bytes::Bytes, DataError> {
        absent(url)
    }

    pub(super) fn open(url: &Path) -> Result<Box<dyn ReadSeek>, DataError> {
        absent(url)
    }
}

/// What files and objects have in common.
pub trait ReadSeek: Read + Seek + Send {}

impl<T: Read + Seek + Send> ReadSeek for T {}

/// Whether there is a file or object.
///
/// # Errors
/// [`DataError::Remote`] when a store gives no answer.
pub fn exists(path: &Path) -> Result<bool, DataError> {
    if is_url(path) {
        Ok(remote::size(path)?.is_some())
    } else {
        Ok(path.exists())
    }
}

/// Bytes of a file or object.
///
/// # Errors
/// [`DataError::Io`], [`DataError::NoFiles`], [`DataError::Remote`].
pub fn size(path: &Path) -> Result<u64, DataError> {
    if is_url(path) {
        return remote::size(path)?.ok_or_else(|| DataError::NoFiles {
            path: path.into(),
            expected: "an object",
        });
    }
    Ok(std::fs::metadata(path)
        .map_err(DataError::io("read", path))?
        .len())
}

/// The object at a URL, or all objects below it, in sorted order, those with a hidden name left out. A web address is one object.
///
/// # Errors
/// [`DataError::Remote`].
pub fn list(url: &Path) -> Result<Vec<PathBuf>, DataError> {
    remote::list(url)
}

/// Some bytes of a file or object, which must have them.
///
/// # Errors
/// [`DataError::Io`], [`DataError::Remote`].
pub fn range(path: &Path, range: Range<u64>) -> Result<bytes::Bytes, DataError> {
    if range.is_empty() {
        return Ok(bytes::Bytes::new());
    }
    if is_url(path) {
        return remote::range(path, range);
    }
    let mut file = open(path)?;
    let mut out = vec![0; (range.end - range.start) as usize];
    file.seek(SeekFrom::Start(range.start))
        .and_then(|_| file.read_exact(&mut out))
        .map_err(DataError::io("read", path))?;
    Ok(out.into())
}

/// Opens a file or object for reading from front to back.
///
/// # Errors
/// [`DataError::Io`], [`DataError::Remote`].
pub fn open(path: &Path) -> Result<Box<dyn ReadSeek>, DataError> {
    if is_url(path) {
        return remote::open(path);
    }
    Ok(Box::new(
        std::fs::File::open(path).map_err(DataError::io("open", path))?,
    ))
}

/// The lost connection that an error of a reader stands for, if it does: such an error never means damaged data.
pub fn lost(error: &std::io::Error) -> Option<DataError> {
    let inner = error.get_ref()?.downcast_ref::<DataError>()?;
    match inner {
        DataError::Remote { url, what } => Some(DataError::Remote {
            url: url.clone(),
            what: what.clone(),
        }),
        _ => None,
    }
}
