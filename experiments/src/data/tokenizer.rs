//! Text to tokens and back, behind one trait: bytes, or a Hugging Face `tokenizer.json`.

use super::DataError;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A tokenizer.
pub trait Tokenize: Send + Sync {
    /// V.
    fn vocab_size(&self) -> usize;

    /// Tokens of `text`, no delimiters added.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    fn encode(&self, text: &str) -> Result<Vec<u32>, DataError>;

    /// Text of `tokens`, as far as they are text.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    fn decode(&self, tokens: &[u32]) -> Result<String, DataError>;

    /// The token that ends a document, where the vocabulary has one.
    fn eos(&self) -> Option<u32>;

    /// Digest of what decides the tokens.
    fn fingerprint(&self) -> String;

    /// Name for people.
    fn name(&self) -> String;
}

/// One token a byte.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bytes;

impl Tokenize for Bytes {
    fn vocab_size(&self) -> usize {
        256
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        let bytes: Vec<u8> = tokens.iter().map(|&t| t as u8).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn eos(&self) -> Option<u32> {
        None
    }

    fn fingerprint(&self) -> String {
        "bytes".into()
    }

    fn name(&self) -> String {
        "bytes".into()
    }
}

/// End-of-document tokens as published vocabularies call them, most specific first.
const EOS_NAMES: [&str; 6] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[SEP]",
];

/// A Hugging Face tokenizer.
pub struct HuggingFace {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    eos: Option<u32>,
    digest: String,
}

impl HuggingFace {
    /// Loads a `tokenizer.json`, or the one in a folder.
    ///
    /// # Errors
    /// [`DataError::Io`] and [`DataError::Tokenizer`].
    pub fn load(path: &Path) -> Result<Self, DataError> {
        use sha2::{Digest, Sha256};
        let path = if path.is_dir() {
            path.join("tokenizer.json")
        } else {
            path.to_path_buf()
        };
        let bytes = std::fs::read(&path).map_err(DataError::io("read", &path))?;
        let bad = |e: tokenizers::Error| DataError::Tokenizer {
            path: path.clone(),
            what: e.to_string(),
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(bad)?;
        // Padding and truncation belong to inference requests; here they would cut documents.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(bad)?;
        let eos = EOS_NAMES.iter().find_map(|name| inner.token_to_id(name));
        Ok(Self {
            digest: super::hex(&Sha256::digest(&bytes)[..16]),
            path,
            inner,
            eos,
        })
    }

    fn bad(&self, e: tokenizers::Error) -> DataError {
        DataError::Tokenizer {
            path: self.path.clone(),
            what: e.to_string(),
        }
    }
}

impl Tokenize for HuggingFace {
    fn vocab_size(&self) -> usize {
        // Ids may have holes, so the largest one counts, not their number.
        self.inner
            .get_vocab(true)
            .values()
            .max()
            .map_or(0, |&m| m as usize + 1)
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        Ok(self
            .inner
            .encode_fast(text, false)
            .map_err(|e| self.bad(e))?
            .get_ids()
            .to_vec())
    }

    fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        self.inner.decode(tokens, false).map_err(|e| self.bad(e))
    }

    fn eos(&self) -> Option<u32> {
        self.eos
    }

    fn fingerprint(&self) -> String {
        self.digest.clone()
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

/// The tokenizer at `path`, or bytes.
///
/// # Errors
/// As [`HuggingFace::load`].
pub fn load(path: Option<&Path>) -> Result<Arc<dyn Tokenize>, DataError> {
    Ok(match path {
        None => Arc::new(Bytes),
        Some(path) => Arc::new(HuggingFace::load(path)?),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A word-level tokenizer file in `dir`, ids 0 to 5.
    pub(crate) fn tiny_file(dir: &Path) -> PathBuf {
        let path = dir.join("tokenizer.json");
        let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":5,"content":"<|endoftext|>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],
            "normalizer":null,"pre_tokenizer":{"type":"Whitespace"},"post_processor":null,"decoder":null,
            "model":{"type":"WordLevel","vocab":{"[UNK]":0,"the":1,"cat":2,"sat":3,"mat":4},"unk_token":"[UNK]"}}"#;
        std::fs::write(&path, json).expect("written");
        path
    }

    #[test]
    fn bytes_come_back() {
        let text = "Zürich\n";
        assert_eq!(
            Bytes
                .decode(&Bytes.encode(text).expect("bytes"))
                .expect("bytes"),
            text
        );
    }

    #[test]
    fn a_hugging_face_file_works_and_a_broken_one_says_so() {
        let dir = tempfile::tempdir().expect("dir");
        let path = tiny_file(dir.path());
        let t = load(Some(dir.path())).expect("loads");
        assert_eq!(t.encode("the cat sat dog").expect("encodes"), [1, 2, 3, 0]);
        assert_eq!((t.vocab_size(), t.eos()), (6, Some(5)));
        assert_eq!(t.decode(&[1, 4]).expect("decodes"), "the mat");
        std::fs::write(&path, "{").expect("written");
        assert!(matches!(
            load(Some(&path)),
            Err(DataError::Tokenizer { .. })
        ));
        assert!(matches!(
            load(Some(Path::new("/none.json"))),
            Err(DataError::Io { .. })
        ));
    }
}
