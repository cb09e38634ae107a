//! Bytes of text files as tokens, cut into rows: the simplest corpus, for one's own text and for quickstarts.
//!
//! The training parts of all files, in order, form a ring of N bytes. Epoch `e` cuts it, from a random offset, into
//! `floor(N / T)` windows and serves them in a new random order; every epoch so predicts every byte but fewer than T, other ones each
//! time. A window that crosses from one file to the next (or the end of the ring) has a new segment there, and no target crosses.
//! The state is a row number. Validation windows lie in file order, without overlap.
//!
//! Files are memory-mapped and never held whole. Subword tokens need the document pipeline instead.

use super::mmap::Mapped;
use super::order::Permutation;
use super::rng::key;
use super::rows::{Rows, Split};
use super::{DataError, EvalSet, Metric, Piece, RowMut, place};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Parameters of a byte-text corpus.
#[derive(Clone, Debug, PartialEq)]
pub struct TextSpec {
    /// Files, or folders of which all files are read, in sorted order.
    pub paths: Vec<PathBuf>,
    /// T, inputs per row.
    pub seq_len: usize,
    /// Fraction of each file, from its end, kept for validation; the cut is moved to the next line start. 0 to below 1.
    pub valid_fraction: f64,
    /// Upper limit of validation rows.
    pub valid_rows: u64,
    /// Read any bytes; otherwise files must be UTF-8.
    pub raw_bytes: bool,
    /// Decides the order.
    pub seed: u64,
}

/// A byte-text corpus.
pub struct TextRows {
    spec: TextSpec,
    train: Ring,
    valid: Ring,
    fingerprint: String,
}

/// Parts of files, end to end.
struct Ring {
    /// Map, range in it.
    parts: Vec<(std::sync::Arc<Mapped>, std::ops::Range<usize>)>,
    /// Ring offset at which each part ends.
    ends: Vec<u64>,
}

impl Ring {
    fn new(parts: Vec<(std::sync::Arc<Mapped>, std::ops::Range<usize>)>) -> Self {
        let parts: Vec<_> = parts
            .into_iter()
            .filter(|(_, range)| !range.is_empty())
            .collect();
        let ends = parts
            .iter()
            .scan(0, |end, (_, range)| {
                *end += range.len() as u64;
                Some(*end)
            })
            .collect();
        Self { parts, ends }
    }

    fn len(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Writes the `T + 1` bytes from ring offset `start` as a row.
    fn fill(&self, start: u64, out: RowMut<'_>) {
        let seq_len = out.tokens.len();
        let (mut at, mut t, mut segment) = (start % self.len(), 0usize, 0i32);
        while t <= seq_len {
            let part = self.ends.partition_point(|&end| end <= at);
            let (map, range) = &self.parts[part];
            let left = self.ends[part] - at;
            let begin = range.end - left as usize;
            let bytes = &map[begin..begin + left.min((seq_len + 1 - t) as u64) as usize];
            let inputs = bytes.len().min(seq_len - t);
            for (i, &b) in bytes[..inputs].iter().enumerate() {
                out.tokens[t + i] = i32::from(b);
                out.segments[t + i] = segment;
                out.positions[t + i] = i as i32;
            }
            for (target, &b) in out.targets[t..].iter_mut().zip(&bytes[1..]) {
                *target = i32::from(b);
            }
            t += bytes.len();
            at = self.ends[part] % self.len();
            segment += 1;
        }
    }
}

impl TextRows {
    /// Maps and checks the files.
    ///
    /// # Errors
    /// [`DataError`]: no file, an empty or unreadable one, bytes that are not UTF-8 (unless `raw_bytes`), or a training or
    /// validation part below one row.
    pub fn open(spec: TextSpec) -> Result<Self, DataError> {
        if spec.seq_len == 0 {
            return Err(DataError::Parameter(
                "seq_len is 0; a row has at least one token".into(),
            ));
        }
        if !(0.0..1.0).contains(&spec.valid_fraction) {
            let f = spec.valid_fraction;
            return Err(DataError::Parameter(format!(
                "valid_fraction is {f}; expected 0 up to, not including, 1"
            )));
        }
        let (mut train, mut valid, mut digest) = (Vec::new(), Vec::new(), Sha256::new());
        for path in files_of(&spec.paths)? {
            let map = std::sync::Arc::new(Mapped::open(&path)?);
            if map.is_empty() {
                return Err(DataError::Empty { path });
            }
            if !spec.raw_bytes {
                check_utf8(&map)?;
            }
            let cut = line_cut(&map, spec.valid_fraction);
            // Size and both ends: reading all of a large corpus at every start would cost more than it protects.
            digest.update((map.len() as u64).to_le_bytes());
            digest.update(&map[..map.len().min(4096)]);
            digest.update(&map[map.len() - map.len().min(4096)..]);
            train.push((map.clone(), 0..cut));
            valid.push((map.clone(), cut..map.len()));
        }
        digest.update(format!(
            "text {} {} {} {}",
            spec.seq_len, spec.valid_fraction, spec.raw_bytes, spec.seed
        ));
        let (train, valid) = (Ring::new(train), Ring::new(valid));
        let need = spec.seq_len as u64 + 1;
        let check = |what: &str, ring: &Ring| match ring.len() {
            have if have < need => Err(DataError::TooShort {
                what: what.into(),
                have,
                seq_len: spec.seq_len,
                need,
            }),
            _ => Ok(()),
        };
        check("the training text", &train)?;
        if spec.valid_fraction > 0.0 && spec.valid_rows > 0 {
            check("the validation text", &valid)?;
        }
        let fingerprint = super::hex(&digest.finalize()[..16]);
        Ok(Self {
            spec,
            train,
            valid,
            fingerprint,
        })
    }

    /// Rows of one epoch.
    pub fn rows_per_epoch(&self) -> u64 {
        self.train.len() / self.spec.seq_len as u64
    }

    /// Epoch, window and ring offset of training row `row`.
    fn window(&self, row: u64) -> (u64, u64, u64) {
        let n = self.rows_per_epoch();
        let epoch = row / n;
        let window = Permutation::new(n, &[self.spec.seed, 0, 0, epoch]).at(row % n);
        let offset = key(&[self.spec.seed, 1, epoch]) % self.train.len();
        (epoch, window, offset + window * self.spec.seq_len as u64)
    }

    fn valid_rows(&self) -> u64 {
        (self.valid.len().saturating_sub(1) / self.spec.seq_len as u64).min(self.spec.valid_rows)
    }
}

impl Rows for TextRows {
    fn vocab_size(&self) -> usize {
        256
    }

    fn seq_len(&self) -> usize {
        self.spec.seq_len
    }

    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }

    fn fill(&self, split: Split, row: u64, out: RowMut<'_>) -> Result<(), DataError> {
        match split {
            Split::Train => self.train.fill(self.window(row).2, out),
            Split::Eval(_) => self.valid.fill(row * self.spec.seq_len as u64, out),
        }
        Ok(())
    }

    fn pieces(&self, split: Split, row: u64) -> Vec<Piece> {
        let (epoch, doc, start) = match split {
            Split::Train => self.window(row),
            Split::Eval(_) => (0, row, row * self.spec.seq_len as u64),
        };
        vec![Piece {
            dataset: 0,
            epoch,
            doc,
            start: start % self.train.len().max(1),
            len: self.spec.seq_len as u64 + 1,
        }]
    }

    fn row_of(&self, doc: u64, epoch: u64) -> Option<u64> {
        let n = self.rows_per_epoch();
        (doc < n)
            .then(|| epoch * n + Permutation::new(n, &[self.spec.seed, 0, 0, epoch]).position(doc))
    }

    fn file(&self) -> String {
        let names: Vec<String> = self
            .spec
            .paths
            .iter()
            .map(|p| p.display().to_string())
            .collect();
        names.join(", ")
    }

    fn eval_sets(&self) -> Vec<EvalSet> {
        match self.valid_rows() {
            0 => Vec::new(),
            rows => vec![EvalSet {
                name: "valid".into(),
                rows,
                seq_len: self.spec.seq_len,
                metric: Metric::Loss,
            }],
        }
    }

    fn name(&self) -> String {
        "text".into()
    }
}

/// The files of `paths`, those of a folder in sorted order, hidden ones left out.
///
/// # Errors
/// [`DataError::NoFiles`] for a path that does not exist, a folder without files, or no path at all.
pub fn files_of(paths: &[PathBuf]) -> Result<Vec<PathBuf>, DataError> {
    let mut files = Vec::new();
    for path in paths {
        let before = files.len();
        if place::is_url(path) {
            files.extend(place::list(path)?);
        } else if path.is_dir() {
            walk(path, &mut files)?;
            files[before..].sort();
        } else if path.exists() {
            files.push(path.clone());
        }
        if files.len() == before {
            return Err(DataError::NoFiles {
                path: path.clone(),
                expected: "a file, or a folder with files",
            });
        }
    }
    if files.is_empty() {
        return Err(DataError::NoFiles {
            path: PathBuf::new(),
            expected: "at least one path",
        });
    }
    Ok(files)
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), DataError> {
    for entry in std::fs::read_dir(folder).map_err(DataError::io("read", folder))? {
        let path = entry.map_err(DataError::io("read", folder))?.path();
        if path
            .file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with('.'))
        {
            continue;
        }
        if path.is_dir() {
            walk(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// Checks UTF-8 in one pass over the map.
fn check_utf8(map: &Mapped) -> Result<(), DataError> {
    std::str::from_utf8(map)
        .map(|_| ())
        .map_err(|e| DataError::NotUtf8 {
            path: map.path().into(),
            offset: e.valid_up_to() as u64,
        })
}

/// Where the validation part starts: the first line start at or after `1 - fraction` of the file, else that byte itself.
fn line_cut(bytes: &[u8], fraction: f64) -> usize {
    if fraction == 0.0 {
        return bytes.len();
    }
    let want = ((bytes.len() as f64) * (1.0 - fraction)).round() as usize;
    match bytes[want.min(bytes.len())..]
        .iter()
        .position(|&b| b == b'\n')
    {
        Some(i) if want + i + 1 < bytes.len() => want + i + 1,
        _ => want,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::rows::RowLoader;
    use crate::data::{IGNORED, Loader, Worker};

    fn spec(dir: &Path, files: &[(&str, &[u8])], seq_len: usize) -> TextSpec {
        let write = |(name, bytes): &(&str, &[u8])| {
            std::fs::write(dir.join(name), bytes).expect("written");
            dir.join(name)
        };
        TextSpec {
            paths: files.iter().map(write).collect(),
            seq_len,
            valid_fraction: 0.0,
            valid_rows: 100,
            raw_bytes: false,
            seed: 1,
        }
    }

    #[test]
    fn an_epoch_predicts_every_byte_but_the_rest() {
        let dir = tempfile::tempdir().expect("dir");
        let text: Vec<u8> = (0..=126u8).collect();
        let rows = TextRows::open(spec(dir.path(), &[("a", &text)], 10)).expect("opens");
        let mut loader = RowLoader::new(rows, Worker::ALL);
        let mut orders = Vec::new();
        for _ in 0..3 {
            let batch = loader.next(12).expect("reads");
            let mut inputs = batch.tokens.clone();
            inputs.sort_unstable();
            inputs.dedup();
            assert_eq!(inputs.len(), 120, "no byte twice in an epoch");
            for (i, (&x, &y)) in batch.tokens.iter().zip(&batch.targets).enumerate() {
                assert_eq!(y, if x == 126 { IGNORED } else { x + 1 }, "at {i}");
            }
            orders.push(batch.tokens);
        }
        assert!(orders[0] != orders[1] && orders[1] != orders[2]);
    }

    #[test]
    fn files_are_segments_and_no_target_crosses() {
        let dir = tempfile::tempdir().expect("dir");
        let rows = TextRows::open(spec(
            dir.path(),
            &[("a", b"abc"), ("b", b"defgh"), ("c", b"ij")],
            9,
        ))
        .expect("opens");
        let mut batch = crate::data::Batch::blank(1, 9);
        rows.train.fill(1, batch.row_mut(0));
        assert_eq!(batch.tokens, b"bcdefghij".map(i32::from));
        assert_eq!(batch.segments, [0, 0, 1, 1, 1, 1, 1, 2, 2]);
        assert_eq!(batch.positions, [0, 1, 0, 1, 2, 3, 4, 0, 1]);
        let n = IGNORED;
        assert_eq!(batch.targets, [99, n, 101, 102, 103, 104, n, 106, n]);
    }

    #[test]
    fn the_split_falls_on_a_line() {
        let dir = tempfile::tempdir().expect("dir");
        let text = "one line here\n".repeat(20);
        let rows = TextRows::open(TextSpec {
            valid_fraction: 0.3,
            ..spec(dir.path(), &[("a", text.as_bytes())], 13)
        })
        .expect("opens");
        assert_eq!((rows.train.len() % 14, rows.valid.len() % 14), (0, 0));
        let loader = RowLoader::new(rows, Worker::ALL);
        let sets = loader.eval_sets();
        let batch = loader.eval_batch(0, 0, 100).expect("reads");
        assert_eq!(batch.rows as u64, sets[0].rows);
        assert_eq!(
            batch.tokens[..13],
            *b"one line here".map(i32::from).as_slice()
        );
    }

    #[test]
    fn bad_files_are_refused_with_words() {
        let dir = tempfile::tempdir().expect("dir");
        let open = |s| {
            TextRows::open(s)
                .map(|_| ())
                .expect_err("refused")
                .to_string()
        };
        let missing = TextSpec {
            paths: vec![dir.path().join("none")],
            ..spec(dir.path(), &[], 4)
        };
        assert!(open(missing).contains("no data files"));
        assert!(open(spec(dir.path(), &[("e", b"")], 4)).contains("is empty"));
        assert!(
            open(spec(dir.path(), &[("x", b"good\xff\xfe")], 4)).contains("bad byte at offset 4")
        );
        assert!(open(spec(dir.path(), &[("s", b"abcd")], 4)).contains("4 tokens, too few"));
        let raw = TextSpec {
            raw_bytes: true,
            ..spec(dir.path(), &[("x", b"good\xff\xfe")], 4)
        };
        assert!(TextRows::open(raw).is_ok());
        let short = TextSpec {
            valid_fraction: 0.1,
            ..spec(dir.path(), &[("v", "a line\n".repeat(4).as_bytes())], 9)
        };
        assert!(open(short).contains("the validation text"));
    }

    #[test]
    fn resume_and_rescale_are_bitwise() {
        let dir = tempfile::tempdir().expect("dir");
        let text = "to be or not to be, that is the question\n".repeat(40);
        let s = spec(dir.path(), &[("a", text.as_bytes())], 16);
        let open = |w| RowLoader::new(TextRows::open(s.clone()).expect("opens"), w);
        let mut one = open(Worker::ALL);
        one.next(30).expect("reads");
        let state = one.state();
        let rest = one.next(12).expect("reads");
        for world in [1, 2, 3, 4] {
            for rank in 0..world {
                let mut w = open(Worker::new(rank, world).expect("rank"));
                w.restore(&state).expect("same data");
                let got = w.next(12 / world).expect("reads");
                for i in 0..got.rows {
                    let j = i * world + rank;
                    assert_eq!(got.provenance[i], rest.provenance[j]);
                    assert_eq!(got.tokens[i * 16..][..16], rest.tokens[j * 16..][..16]);
                }
            }
        }
        let other = TextRows::open(TextSpec { seed: 2, ..s }).expect("opens");
        assert!(RowLoader::new(other, Worker::ALL).restore(&state).is_err());
    }
}
