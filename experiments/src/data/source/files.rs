//! Files with random access to documents (text, JSON Lines, Arrow, Megatron), tokenised on the fly where they hold text.
//!
//! Opening a text or JSON Lines file reads it once to find where documents end: 8 bytes of memory per document. Compressed JSON Lines
//! and Parquet have no random access; `open` prepares token shards from them first.

use super::format::{ArrowDocs, Columns, Format, Raw, json_document};
use super::{Documents, Tokens, Width};
use crate::data::DataError;
use crate::data::mmap::Mapped;
use crate::data::tokenizer::Tokenize;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Documents of one file, by number, as stored.
pub trait RawDocuments: Send + Sync {
    /// Number of documents.
    fn n_docs(&self) -> u64;

    /// Document `doc < n_docs`.
    ///
    /// # Errors
    /// [`DataError::Damaged`], [`DataError::NotUtf8`].
    fn raw(&self, doc: u64) -> Result<Raw, DataError>;
}

/// Opens a file of a format with random access.
///
/// # Errors
/// [`DataError`]: unreadable or damaged files, and [`DataError::Parameter`] for formats without random access.
pub fn open_file(
    path: &Path,
    format: Format,
    columns: &Columns,
) -> Result<Box<dyn RawDocuments>, DataError> {
    Ok(match format {
        Format::Text => Box::new(TextDocs::open(path)?),
        Format::Jsonl => Box::new(JsonlDocs::open(path, columns.clone())?),
        Format::ArrowFile | Format::ArrowStream => {
            Box::new(ArrowDocs::open(path, format, columns)?)
        }
        Format::Megatron => Box::new(MegatronDocs::open(path)?),
        Format::JsonlGzip | Format::JsonlZstd | Format::Parquet | Format::Shards => {
            let text = format!(
                "{} ({format:?}) gives no access to single documents; prepare token shards from it",
                path.display()
            );
            return Err(DataError::Parameter(text));
        }
    })
}

/// Bytes that a document of plain text has at least.
const TEXT_DOC_BYTES: usize = 16 << 10;

/// Length of the document at the start of `bytes`; `None` when there is none, or when bytes that follow would decide it.
pub(super) fn text_end(bytes: &[u8], is_all: bool) -> Option<usize> {
    if bytes.is_empty() || (!is_all && bytes.len() < 2 * TEXT_DOC_BYTES) {
        return None;
    }
    let least = TEXT_DOC_BYTES.min(bytes.len());
    let window = &bytes[least..(2 * TEXT_DOC_BYTES).min(bytes.len())];
    let blank = window.windows(2).position(|w| w == b"\n\n");
    let line = || bytes[least..].iter().position(|&b| b == b'\n');
    match blank.map(|i| i + 2).or_else(|| line().map(|i| i + 1)) {
        Some(more) => Some(least + more),
        None => is_all.then_some(bytes.len()),
    }
}

/// Plain text: runs of lines of 16 KiB or more, ending at an empty line where one comes within as much again, else at a line's end.
struct TextDocs {
    map: Arc<Mapped>,
    ends: Vec<u64>,
}

impl TextDocs {
    fn open(path: &Path) -> Result<Self, DataError> {
        let map = Arc::new(Mapped::open(path)?);
        if map.is_empty() {
            return Err(DataError::Empty { path: path.into() });
        }
        let (mut ends, mut start) = (Vec::new(), 0);
        while let Some(len) = text_end(&map[start..], true) {
            start += len;
            ends.push(start as u64);
        }
        Ok(Self { map, ends })
    }
}

impl RawDocuments for TextDocs {
    fn n_docs(&self) -> u64 {
        self.ends.len() as u64
    }

    fn raw(&self, doc: u64) -> Result<Raw, DataError> {
        let start = if doc == 0 {
            0
        } else {
            self.ends[doc as usize - 1] as usize
        };
        let bytes = &self.map[start..self.ends[doc as usize] as usize];
        let text = std::str::from_utf8(bytes).map_err(|e| DataError::NotUtf8 {
            path: self.map.path().into(),
            offset: (start + e.valid_up_to()) as u64,
        })?;
        Ok(Raw::Text(text.to_owned()))
    }
}

/// JSON Lines: every line that is not blank is a document.
struct JsonlDocs {
    map: Arc<Mapped>,
    starts: Vec<u64>,
    columns: Columns,
}

impl JsonlDocs {
    fn open(path: &Path, columns: Columns) -> Result<Self, DataError> {
        let map = Arc::new(Mapped::open(path)?);
        if map.is_empty() {
            return Err(DataError::Empty { path: path.into() });
        }
        let (mut starts, mut at) = (Vec::new(), 0);
        for line in map.split_inclusive(|&b| b == b'\n') {
            if !line.trim_ascii().is_empty() {
                starts.push(at);
            }
            at += line.len() as u64;
        }
        Ok(Self {
            map,
            starts,
            columns,
        })
    }
}

impl RawDocuments for JsonlDocs {
    fn n_docs(&self) -> u64 {
        self.starts.len() as u64
    }

    fn raw(&self, doc: u64) -> Result<Raw, DataError> {
        let start = self.starts[doc as usize];
        let end = self
            .starts
            .get(doc as usize + 1)
            .map_or(self.map.len(), |&e| e as usize);
        json_document(&self.map[start as usize..end], &self.columns).map_err(|what| {
            DataError::Damaged {
                path: self.map.path().into(),
                offset: start,
                what,
            }
        })
    }
}

/// Megatron's `IndexedDataset`: `.idx` with lengths and pointers, `.bin` with tokens.
///
/// Header of `.idx`: `MMIDIDX\0\0`, u64 version 1, u8 type code, u64 sequences, u64 document entries; then i32 lengths, i64 byte offsets, i64
/// document starts (one more than documents). A document is a run of sequences, which follow each other in `.bin`.
struct MegatronDocs {
    bin: Arc<Mapped>,
    index: MegatronIndex,
}

const MEGATRON_HEADER: usize = 34;

impl MegatronDocs {
    fn open(path: &Path) -> Result<Self, DataError> {
        let (idx, bin) = (
            Mapped::open(&path.with_extension("idx"))?,
            Mapped::open(&path.with_extension("bin"))?,
        );
        let index = MegatronIndex::read(path, &idx, bin.len() as u64)?;
        let bin = Arc::new(bin);
        Ok(Self { bin, index })
    }
}

/// What an `.idx` says.
pub(super) struct MegatronIndex {
    /// Bytes per token.
    pub(super) width: Width,
    /// First byte and tokens of each document.
    pub(super) spans: Vec<(u64, u64)>,
}

impl MegatronIndex {
    /// Reads the bytes of the `.idx` of a pair, `path` either of its names, whose `.bin` has `bin_bytes`.
    pub(super) fn read(path: &Path, idx: &[u8], bin_bytes: u64) -> Result<Self, DataError> {
        let damaged = |offset: usize, what: String| DataError::Damaged {
            path: path.with_extension("idx"),
            offset: offset as u64,
            what,
        };
        if idx.len() < MEGATRON_HEADER || !idx.starts_with(b"MMIDIDX\0\0") {
            return Err(damaged(0, "no Megatron index header".into()));
        }
        let u64_at = |at: usize| {
            idx.get(at..at + 8)
                .and_then(|b| b.try_into().ok())
                .map_or(0, u64::from_le_bytes)
        };
        let (version, code, sequences, entries) =
            (u64_at(9), idx[17], u64_at(18) as usize, u64_at(26) as usize);
        if version != 1 {
            return Err(damaged(9, format!("index version {version}; expected 1")));
        }
        let width = match code {
            1 => Width::U8,
            4 => Width::U32,
            8 => Width::U16,
            _ => {
                return Err(damaged(
                    17,
                    format!("token type code {code}; expected 1 (u8), 4 (i32) or 8 (u16)"),
                ));
            }
        };
        let sizes = (sequences.checked_mul(12), entries.checked_mul(8));
        let want = sizes
            .0
            .zip(sizes.1)
            .and_then(|(a, b)| a.checked_add(b))
            .and_then(|n| n.checked_add(MEGATRON_HEADER));
        if want != Some(idx.len()) {
            return Err(damaged(
                18,
                format!(
                    "{} bytes for {sequences} sequences and {entries} document entries; the file is cut short or longer",
                    idx.len()
                ),
            ));
        }
        let (pointers, starts) = (
            MEGATRON_HEADER + 4 * sequences,
            MEGATRON_HEADER + 12 * sequences,
        );
        let length = |i: usize| {
            idx.get(MEGATRON_HEADER + 4 * i..)
                .and_then(|b| b.get(..4))
                .and_then(|b| b.try_into().ok())
                .map_or(0, i32::from_le_bytes)
        };
        let mut spans = Vec::with_capacity(entries.saturating_sub(1));
        for doc in 0..entries.saturating_sub(1) {
            let (first, end) = (
                u64_at(starts + 8 * doc) as usize,
                u64_at(starts + 8 * doc + 8) as usize,
            );
            if first > end || end > sequences {
                return Err(damaged(
                    starts + 8 * doc,
                    format!("document {doc} spans sequences {first} to {end} of {sequences}"),
                ));
            }
            let at = if first < end {
                u64_at(pointers + 8 * first)
            } else {
                0
            };
            let mut tokens = 0u64;
            for i in first..end {
                let (len, here) = (length(i), u64_at(pointers + 8 * i));
                if len < 0 || here != at + tokens * width.bytes() as u64 {
                    return Err(damaged(
                        pointers + 8 * i,
                        format!("sequence {i} does not follow the one before it"),
                    ));
                }
                tokens += len as u64;
            }
            if at
                .checked_add(tokens * width.bytes() as u64)
                .is_none_or(|end| end > bin_bytes)
            {
                return Err(DataError::Damaged {
                    path: path.with_extension("bin"),
                    offset: bin_bytes,
                    what: format!("document {doc} lies beyond the end of the file"),
                });
            }
            spans.push((at, tokens));
        }
        Ok(Self { width, spans })
    }
}

impl RawDocuments for MegatronDocs {
    fn n_docs(&self) -> u64 {
        self.index.spans.len() as u64
    }

    fn raw(&self, doc: u64) -> Result<Raw, DataError> {
        let (at, len) = self.index.spans[doc as usize];
        Ok(Raw::Stored(Tokens::Mapped {
            map: self.bin.clone(),
            at: at as usize,
            len: len as usize,
            width: self.index.width,
        }))
    }
}

/// Several files as one collection, with a tokenizer for what is text.
pub struct Files {
    files: Vec<(PathBuf, Box<dyn RawDocuments>)>,
    ends: Vec<u64>,
    tokenizer: Arc<dyn Tokenize>,
    costly: bool,
    fingerprint: String,
}

impl Files {
    /// Opens all `paths`.
    ///
    /// # Errors
    /// As [`open_file`].
    pub fn open(
        paths: &[PathBuf],
        columns: &Columns,
        tokenizer: Arc<dyn Tokenize>,
    ) -> Result<Self, DataError> {
        let (mut files, mut ends, mut end, mut costly) = (Vec::new(), Vec::new(), 0, false);
        let mut digest = Sha256::new();
        digest.update(tokenizer.fingerprint());
        for path in paths {
            let format = Format::of(path)?;
            let docs = open_file(path, format, columns)?;
            costly |= matches!(format, Format::Text | Format::Jsonl | Format::ArrowStream);
            digest.update(format!("{format:?}"));
            super::shards::digest_ends(path, &mut digest)?;
            end += docs.n_docs();
            ends.push(end);
            files.push((path.clone(), docs));
        }
        Ok(Self {
            files,
            ends,
            tokenizer,
            costly,
            fingerprint: crate::data::hex(&digest.finalize()[..16]),
        })
    }

    fn file_of(&self, doc: u64) -> (usize, u64) {
        let file = self.ends.partition_point(|&end| end <= doc);
        (file, doc - if file == 0 { 0 } else { self.ends[file - 1] })
    }
}

impl Documents for Files {
    fn n_docs(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    fn tokens(&self, doc: u64) -> Result<Tokens, DataError> {
        let (file, local) = self.file_of(doc);
        Ok(match self.files[file].1.raw(local)? {
            Raw::Text(text) => Tokens::Owned(self.tokenizer.encode(&text)?.into()),
            Raw::Tokens(tokens) => Tokens::Owned(tokens.into()),
            Raw::Stored(tokens) => tokens,
        })
    }

    fn locate(&self, doc: u64) -> (String, u64) {
        let (file, local) = self.file_of(doc);
        (self.files[file].0.display().to_string(), local)
    }

    fn is_costly(&self) -> bool {
        self.costly
    }

    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenizer::Bytes;
    use arrow_array::{
        ArrayRef, ListArray, RecordBatch, StringArray, UInt32Array, types::UInt32Type,
    };
    use std::io::Write;

    fn all(path: &Path) -> Vec<Vec<u32>> {
        let docs =
            Files::open(&[path.into()], &Columns::default(), Arc::new(Bytes)).expect("opens");
        (0..docs.n_docs())
            .map(|d| docs.tokens(d).expect("reads").to_vec())
            .collect()
    }

    fn streamed(path: &Path) -> Vec<Result<Vec<u32>, String>> {
        let mut out = Vec::new();
        super::super::format::stream(
            path,
            Format::of(path).expect("known"),
            &Columns::default(),
            &mut |raw| {
                out.push(match raw {
                    Ok(Raw::Text(t)) => Ok(t.bytes().map(u32::from).collect()),
                    Ok(Raw::Tokens(t)) => Ok(t),
                    Ok(Raw::Stored(t)) => Ok(t.to_vec()),
                    Err(e) => Err(e.to_string()),
                });
                Ok(true)
            },
        )
        .expect("reads");
        out
    }

    fn batch(name: &str, column: ArrayRef) -> RecordBatch {
        RecordBatch::try_from_iter([(name, column)]).expect("one column")
    }

    fn write_arrow(path: &Path, batches: &[RecordBatch], as_stream: bool) {
        let file = std::fs::File::create(path).expect("created");
        let schema = batches[0].schema();
        if as_stream {
            let mut w = arrow_ipc::writer::StreamWriter::try_new(file, &schema).expect("writer");
            batches.iter().for_each(|b| w.write(b).expect("written"));
            w.finish().expect("finished");
        } else {
            let mut w = arrow_ipc::writer::FileWriter::try_new(file, &schema).expect("writer");
            batches.iter().for_each(|b| w.write(b).expect("written"));
            w.finish().expect("finished");
        }
    }

    #[test]
    fn bamba_s_arrow_files_hold_one_document_per_batch() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("a.arrow");
        let docs: Vec<Vec<u32>> = (0..5)
            .map(|i| (0..i * 3).map(|t| t * 1000).collect())
            .collect();
        let batches: Vec<_> = docs
            .iter()
            .map(|d| batch("tokens", Arc::new(UInt32Array::from(d.clone()))))
            .collect();
        write_arrow(&path, &batches, false);
        assert_eq!(Format::of(&path).expect("known"), Format::ArrowFile);
        assert_eq!(all(&path), docs);
        // Cut short: no footer.
        let bytes = std::fs::read(&path).expect("read");
        std::fs::write(&path, &bytes[..bytes.len() - 20]).expect("written");
        let error = Files::open(&[path], &Columns::default(), Arc::new(Bytes))
            .map(|_| ())
            .expect_err("cut short");
        assert!(error.to_string().contains("cut short"), "{error}");
    }

    #[test]
    fn hugging_face_s_streams_hold_one_document_per_row() {
        let dir = tempfile::tempdir().expect("dir");
        let (text, lists) = (dir.path().join("t.arrow"), dir.path().join("l.arrow"));
        let strings = |v: &[&str]| batch("text", Arc::new(StringArray::from(v.to_vec())));
        write_arrow(&text, &[strings(&["ab", "", "c"]), strings(&["d"])], true);
        assert_eq!(all(&text), [vec![97, 98], vec![], vec![99], vec![100]]);
        let list = ListArray::from_iter_primitive::<UInt32Type, _, _>([
            Some(vec![Some(1), Some(70_000)]),
            Some(vec![Some(3)]),
        ]);
        write_arrow(&lists, &[batch("input_ids", Arc::new(list))], false);
        assert_eq!(all(&lists), [vec![1, 70_000], vec![3]]);
        let other = dir.path().join("o.arrow");
        write_arrow(
            &other,
            &[batch("body", Arc::new(StringArray::from(vec!["x"])))],
            true,
        );
        let error = Files::open(&[other], &Columns::default(), Arc::new(Bytes))
            .map(|_| ())
            .expect_err("no such column");
        assert!(
            error.to_string().contains("its columns are body"),
            "{error}"
        );
    }

    #[test]
    fn parquet_rows_come_in_order_and_a_bad_page_costs_its_group() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("p.parquet");
        let texts: Vec<String> = (0..300)
            .map(|i| format!("document {i} {}", "x".repeat(i)))
            .collect();
        let rows = batch("text", Arc::new(StringArray::from(texts.clone())));
        let props = parquet::file::properties::WriterProperties::builder()
            .set_max_row_group_row_count(Some(100))
            .set_compression(parquet::basic::Compression::ZSTD(Default::default()))
            .set_dictionary_enabled(false)
            .build();
        let file = std::fs::File::create(&path).expect("created");
        let mut w =
            parquet::arrow::ArrowWriter::try_new(file, rows.schema(), Some(props)).expect("writer");
        w.write(&rows).expect("written");
        w.close().expect("closed");
        let want: Vec<Result<Vec<u32>, String>> = texts
            .iter()
            .map(|t| Ok(t.bytes().map(u32::from).collect()))
            .collect();
        assert_eq!(streamed(&path), want);
        let mut bytes = std::fs::read(&path).expect("read");
        bytes[4..200].fill(0x55);
        std::fs::write(&path, bytes).expect("written");
        let got = streamed(&path);
        assert!(
            got[0].as_ref().is_err_and(|e| e.contains("row group 0")),
            "{:?}",
            got[0]
        );
        assert_eq!(got[1..], want[100..]);
    }

    #[test]
    fn json_lines_plain_and_compressed_are_the_same() {
        let dir = tempfile::tempdir().expect("dir");
        let text =
            "{\"text\":\"ab\"}\n\n{\"tokens\":[1,2,3]}\nnot json\n{\"text\":\"\u{fc}\",\"id\":4}";
        let plain = dir.path().join("a.jsonl");
        std::fs::write(&plain, text).expect("written");
        let gz = dir.path().join("a.jsonl.gz");
        let mut w = flate2::write::GzEncoder::new(
            std::fs::File::create(&gz).expect("created"),
            flate2::Compression::fast(),
        );
        w.write_all(text.as_bytes()).expect("written");
        w.finish().expect("finished");
        let zst = dir.path().join("a.jsonl.zst");
        std::fs::write(
            &zst,
            zstd::encode_all(text.as_bytes(), 3).expect("compressed"),
        )
        .expect("written");
        let got = streamed(&plain);
        assert_eq!(
            (&got[0], &got[1], &got[3]),
            (&Ok(vec![97, 98]), &Ok(vec![1, 2, 3]), &Ok(vec![0xc3, 0xbc]))
        );
        assert!(
            got[2]
                .as_ref()
                .is_err_and(|e| e.contains("offset 34") && e.contains("not a JSON object")),
            "{:?}",
            got[2]
        );
        let short = |v: Vec<Result<Vec<u32>, String>>| {
            v.into_iter().map(|r| r.map_err(|_| ())).collect::<Vec<_>>()
        };
        assert_eq!(short(streamed(&gz)), short(got.clone()));
        assert_eq!(short(streamed(&zst)), short(got));
        assert!(open_file(&gz, Format::JsonlGzip, &Columns::default()).is_err());
    }

    #[test]
    fn a_gzip_that_breaks_off_gives_what_came_before() {
        let dir = tempfile::tempdir().expect("dir");
        let gz = dir.path().join("b.jsonl.gz");
        let mut w = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        for i in 0..20_000 {
            writeln!(w, "{{\"text\":\"document {i} {}\"}}", i * 7919 % 1000).expect("written");
        }
        let bytes = w.finish().expect("finished");
        std::fs::write(&gz, &bytes[..bytes.len() / 2]).expect("written");
        let got = streamed(&gz);
        let good = got.iter().take_while(|r| r.is_ok()).count();
        assert!(good > 5_000 && good < 15_000, "{good}");
        assert!(
            got.len() == good + 1 && got[good].as_ref().is_err_and(|e| e.contains("breaks off")),
            "{:?}",
            got.last()
        );
    }

    #[test]
    fn megatron_pairs_are_read_and_checked() {
        let dir = tempfile::tempdir().expect("dir");
        let (bin, idx) = (dir.path().join("m.bin"), dir.path().join("m.idx"));
        let sequences: [&[u16]; 3] = [&[1, 2, 3], &[4], &[500, 600]];
        std::fs::write(
            &bin,
            sequences
                .concat()
                .iter()
                .flat_map(|t| t.to_le_bytes())
                .collect::<Vec<_>>(),
        )
        .expect("written");
        let mut header = b"MMIDIDX\0\0".to_vec();
        header.extend(1u64.to_le_bytes());
        header.push(8);
        header.extend(3u64.to_le_bytes());
        header.extend(3u64.to_le_bytes());
        [3i32, 1, 2]
            .iter()
            .for_each(|n| header.extend(n.to_le_bytes()));
        [0i64, 6, 8]
            .iter()
            .for_each(|n| header.extend(n.to_le_bytes()));
        [0i64, 2, 3]
            .iter()
            .for_each(|n| header.extend(n.to_le_bytes()));
        std::fs::write(&idx, &header).expect("written");
        assert_eq!(all(&bin), [vec![1, 2, 3, 4], vec![500, 600]]);
        assert_eq!(all(&idx), all(&bin));
        std::fs::write(&idx, &header[..header.len() - 3]).expect("written");
        assert!(open_file(&bin, Format::Megatron, &Columns::default()).is_err());
        std::fs::write(&idx, &header).expect("written");
        std::fs::write(&bin, [0; 6]).expect("written");
        assert!(
            open_file(&bin, Format::Megatron, &Columns::default())
                .map(|_| ())
                .expect_err("short")
                .to_string()
                .contains("beyond the end")
        );
    }

    #[test]
    fn text_is_cut_at_empty_lines_and_nothing_is_lost() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("t.txt");
        let text: String = (0..5_000)
            .map(|i| {
                if i % 10 == 9 {
                    "\n".to_owned()
                } else {
                    format!("line {i} of the text\n")
                }
            })
            .collect();
        std::fs::write(&path, &text).expect("written");
        let docs = all(&path);
        assert!(docs.len() > 3);
        assert_eq!(
            docs.concat().iter().map(|&b| b as u8).collect::<Vec<_>>(),
            text.as_bytes()
        );
        assert!(
            docs[..docs.len() - 1]
                .iter()
                .all(|d| d.len() >= TEXT_DOC_BYTES && d.ends_with(&[10, 10]))
        );
        std::fs::write(&path, b"abc\xff").expect("written");
        let docs = Files::open(&[path], &Columns::default(), Arc::new(Bytes)).expect("opens");
        assert!(matches!(
            docs.tokens(0),
            Err(DataError::NotUtf8 { offset: 3, .. })
        ));
    }
}
