//! Which algorithm cuBLASLt is to take for a product, as timed on this machine before: a text file in the cache.
//!
//! Another GPU or another version of the library has a file of its own, since an algorithm means nothing to it.

#![allow(unsafe_code)] // asks the library for its version

use crate::compile::cache_folder;
use cudarc::cublaslt::sys;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// Algorithms by product.
#[derive(Debug, Default)]
pub(crate) struct Choices {
    file: Option<PathBuf>,
    known: BTreeMap<String, [u64; 8]>,
}

impl Choices {
    /// Those made for this GPU; none where the file cannot be read.
    pub(crate) fn open(gpu: &str) -> Self {
        // SAFETY: the library was found when the device was opened.
        let version = unsafe { sys::cublasLtGetVersion() };
        let gpu: String = gpu
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        let file = cache_folder().map(|f| f.join(format!("products-{gpu}-{version}.txt")));
        let text = file.as_ref().and_then(|f| std::fs::read_to_string(f).ok());
        let known = text.unwrap_or_default().lines().filter_map(parse).collect();
        Choices { file, known }
    }

    pub(crate) fn get(&self, key: &str) -> Option<sys::cublasLtMatmulAlgo_t> {
        let data = *self.known.get(key)?;
        Some(sys::cublasLtMatmulAlgo_t { data })
    }

    pub(crate) fn put(&mut self, key: String, algo: sys::cublasLtMatmulAlgo_t) {
        self.known.insert(key, algo.data);
    }

    /// Adds to the file what it lacks; a cache that cannot be written costs time, not the run. Several engines of a process may choose at the
    /// same time: the first choice for a product stays.
    pub(crate) fn save(&self) {
        static WRITING: Mutex<()> = Mutex::new(());
        let _alone = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = &self.file else { return };
        let Some(folder) = file.parent() else { return };
        let mut known = self.known.clone();
        let text = std::fs::read_to_string(file).unwrap_or_default();
        known.extend(text.lines().filter_map(parse));
        let text: String = known.iter().map(|(k, v)| line(k, v)).collect();
        let part = file.with_extension(format!("{}.part", std::process::id()));
        let written =
            std::fs::create_dir_all(folder).is_ok() && std::fs::write(&part, text).is_ok();
        if written && std::fs::rename(&part, file).is_err() {
            let _ = std::fs::remove_file(&part);
        }
    }
}

fn line(key: &str, algo: &[u64; 8]) -> String {
    let words: Vec<String> = algo.iter().map(|w| format!("{w:x}")).collect();
    format!("{key}: {}\n", words.join(" "))
}

fn parse(line: &str) -> Option<(String, [u64; 8])> {
    let (key, words) = line.rsplit_once(": ")?;
    let words: Vec<u64> = words
        .split(' ')
        .map(|w| u64::from_str_radix(w, 16).ok())
        .collect::<Option<_>>()?;
    Some((key.to_string(), words.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_were_written() {
        let algo = [0, 1, u64::MAX, 3, 4, 5, 6, 0xabc];
        let key = "(16384, 4096, 2048) (false, true) bf16->bf16 = [256, 256, 256]";
        let text = line(key, &algo);
        assert_eq!(parse(text.trim_end()), Some((key.to_string(), algo)));
        assert_eq!(parse("(1, 2, 3): 1 2 3"), None);
        assert_eq!(parse("nonsense"), None);
    }
}
