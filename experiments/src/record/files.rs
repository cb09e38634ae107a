//! Atomic files: a reader sees the old content or the new one, never a part; after a crash likewise.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::RecordError;

/// Numbers the temporary and event files of this process, so that two threads never choose one name.
static SERIAL: AtomicU64 = AtomicU64::new(0);

/// The next number of this process, starting at 0.
pub(super) fn next_serial() -> u64 {
    SERIAL.fetch_add(1, Ordering::Relaxed)
}

/// Replaces the file at `path` by `bytes`: temporary file beside it, fsync, rename, fsync of the folder.
///
/// # Errors
/// On any failure the temporary file is removed and what was at `path` before is untouched.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), RecordError> {
    let dir = parent(path);
    let name = path
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    let tmp = dir.join(format!(
        ".{name}.tmp-{}-{}",
        std::process::id(),
        next_serial()
    ));
    let written = write_new(&tmp, bytes)
        .and_then(|()| fs::rename(&tmp, path).map_err(|e| RecordError::from_io("write", path, e)));
    if let Err(e) = written {
        // The first error is the one to tell; a temporary file that cannot be removed harms nobody.
        let _ = fs::remove_file(&tmp);
        return Err(e);
    }
    sync_dir(&dir)
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), RecordError> {
    let io = |e| RecordError::from_io("write", path, e);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(io)?;
    file.write_all(bytes).map_err(io)?;
    file.sync_all().map_err(io)
}

/// Makes renames and new names in `dir` durable. File systems that cannot sync a folder are let pass.
///
/// # Errors
/// [`RecordError::Io`] where the folder cannot be opened.
pub fn sync_dir(dir: &Path) -> Result<(), RecordError> {
    let file = File::open(dir).map_err(|e| RecordError::from_io("open", dir, e))?;
    // EINVAL on some network file systems: the rename itself was still atomic.
    let _ = file.sync_all();
    Ok(())
}

/// The folder a path lies in; `.` for a bare name.
pub(super) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// This machine's name with everything but letters, digits, `.`, `_` and `-` replaced; `localhost` where unknown.
pub fn host_name() -> String {
    let raw = fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("HOSTNAME").ok())
        .unwrap_or_default();
    let clean: String = raw
        .trim()
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "._-".contains(c) {
                c
            } else {
                '-'
            }
        })
        .collect();
    if clean.is_empty() {
        "localhost".to_owned()
    } else {
        clean
    }
}

/// Seconds since 1970, with fraction; 0 where the clock stands before that.
pub fn unix_now() -> f64 {
    std::time::SystemTime::now()
        .duration_since(std::time::SystemTime::UNIX_EPOCH)
        .map(|d| d.as_secs_f64())
        .unwrap_or(0.0)
}

/// SHA-256 of a text, in hexadecimal: equal iff two resolved configurations are the same.
pub fn content_hash(text: &str) -> String {
    use sha2::{Digest, Sha256};
    crate::data::hex(&Sha256::digest(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_and_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("status.json");
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_leaves_the_folder_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        // The target is a folder that is not empty: the rename fails after the temporary file was written.
        let target = dir.path().join("taken");
        fs::create_dir_all(target.join("x")).unwrap();
        assert!(write_atomic(&target, b"data").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_full_disk_is_said_as_such() {
        if !Path::new("/dev/full").exists() {
            return;
        }
        let e = File::options()
            .write(true)
            .open("/dev/full")
            .and_then(|mut f| f.write_all(b"x"))
            .unwrap_err();
        assert!(matches!(
            RecordError::from_io("write", Path::new("/dev/full"), e),
            RecordError::DiskFull { .. }
        ));
    }
}
