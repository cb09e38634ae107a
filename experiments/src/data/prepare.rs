//! `data prepare`: any readable files to token shards (see [`super::source::shards`] for the layout).
//!
//! One input file makes one part. A part is written under a temporary name and named at its end, so a run that was killed starts again
//! with the first unfinished part. `shard: (i, n)` makes every n-th part only: n machines over a shared folder share the work, and whoever
//! finishes last writes the manifest. Files are streamed; documents are tokenised by all threads, a few MiB at a time.

use super::pipeline::OnBad;
use super::source::format::{Columns, Format, Raw, stream};
use super::source::shards::{MANIFEST, Manifest, Part, digest_ends};
use super::source::{Width, shards};
use super::text::files_of;
use super::tokenizer::Tokenize;
use super::{DataError, hex, place};
use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of text (or 4 per token) that are tokenised at a time.
const CHUNK_BYTES: usize = 4 << 20;

/// What to prepare.
pub struct PrepareSpec {
    /// Files, or folders of them.
    pub inputs: Vec<PathBuf>,
    /// The folder to write.
    pub out: PathBuf,
    /// For text.
    pub tokenizer: Arc<dyn Tokenize>,
    /// V of inputs that are tokens already; by default the largest id plus 1.
    pub vocab_size: Option<usize>,
    /// Where documents are in their files.
    pub columns: Columns,
    /// Do parts `p` with `p % n == i`.
    pub shard: (usize, usize),
    /// What an unreadable document does.
    pub on_bad: OnBad,
}

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Progress {
    /// Parts in all.
    pub parts: usize,
    /// Parts done now or before.
    pub done: usize,
    /// Parts that were there already.
    pub kept: usize,
    /// Documents written now.
    pub docs: u64,
    /// Tokens written now.
    pub tokens: u64,
    /// Documents left out now.
    pub bad: u64,
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prepared {
    /// This run's work.
    pub progress: Progress,
    /// The manifest, once all parts are there.
    pub manifest: Option<PathBuf>,
    /// Parts that other shards have yet to make.
    pub missing: usize,
}

/// The input files of `paths`. Of a Megatron pair found in a folder only the `.idx` is listed: it stands for both.
///
/// # Errors
/// As [`files_of`].
pub fn inputs_of(paths: &[PathBuf]) -> Result<Vec<PathBuf>, DataError> {
    let files = files_of(paths)?;
    let all: BTreeSet<&PathBuf> = files.iter().collect();
    let paired = |f: &PathBuf| {
        f.extension().is_some_and(|e| e == "bin")
            && all.contains(&f.with_extension("idx"))
            && !paths.contains(f)
    };
    Ok(files.iter().filter(|f| !paired(f)).cloned().collect())
}

/// Makes the shards.
///
/// # Errors
/// [`DataError`]: unreadable inputs, an unwritable folder, a token beyond `vocab_size`, a folder with other contents.
pub fn prepare(
    spec: &PrepareSpec,
    report: &mut dyn FnMut(&Progress),
) -> Result<Prepared, DataError> {
    let (shard, of) = spec.shard;
    if shard >= of {
        return Err(DataError::Parameter(format!(
            "shard {shard}/{of}; expected i/n with i from 0 to n - 1"
        )));
    }
    if place::is_url(&spec.out) {
        return Err(DataError::Parameter(format!(
            "shards cannot be written to {}; expected a folder of this machine",
            spec.out.display()
        )));
    }
    let inputs = inputs_of(&spec.inputs)?;
    std::fs::create_dir_all(&spec.out).map_err(DataError::io("create", &spec.out))?;
    let mut progress = Progress {
        parts: inputs.len(),
        ..Progress::default()
    };
    for (i, input) in inputs.iter().enumerate().filter(|(i, _)| i % of == shard) {
        let made_from = made_from(spec, input)?;
        if read_part(&spec.out, i)?.is_some_and(|p| p.made_from == made_from) {
            progress.kept += 1;
        } else {
            make_part(spec, i, input, made_from, &mut progress, report)?;
        }
        progress.done += 1;
        report(&progress);
    }
    let mut parts = Vec::new();
    for (i, input) in inputs.iter().enumerate() {
        parts.extend(read_part(&spec.out, i)?.filter(|p| p.source == input.display().to_string()));
    }
    let missing = inputs.len() - parts.len();
    let manifest = if missing == 0 {
        Some(write_manifest(spec, parts)?)
    } else {
        None
    };
    Ok(Prepared {
        progress,
        manifest,
        missing,
    })
}

fn made_from(spec: &PrepareSpec, input: &Path) -> Result<String, DataError> {
    let mut digest = Sha256::new();
    digest_ends(input, &mut digest)?;
    if Format::of(input)? == Format::Megatron {
        digest_ends(&input.with_extension("bin"), &mut digest)?;
    }
    digest.update(format!(
        "{} {:?} {:?} {:?}",
        spec.tokenizer.fingerprint(),
        spec.columns,
        spec.vocab_size,
        spec.on_bad
    ));
    Ok(hex(&digest.finalize()[..16]))
}

fn part_name(i: usize) -> String {
    format!("part-{i:06}")
}

/// The entry of a finished part, if there is one and its files are whole.
fn read_part(out: &Path, i: usize) -> Result<Option<Part>, DataError> {
    let path = out.join(format!("{}.json", part_name(i)));
    let Ok(text) = std::fs::read(&path) else {
        return Ok(None);
    };
    let Ok(part) = serde_json::from_slice::<Part>(&text) else {
        return Ok(None);
    };
    let size = |ending: &str| {
        std::fs::metadata(out.join(format!("{}.{ending}", part.name))).map_or(0, |m| m.len())
    };
    let whole =
        size("tok") == part.tokens * part.width.bytes() as u64 && size("idx") == part.docs * 8;
    Ok(whole.then_some(part))
}

/// A file under a temporary name, with its checksum.
struct Output {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
    crc: u32,
}

impl Output {
    fn create(path: PathBuf) -> Result<Self, DataError> {
        let temporary = path.with_extension(format!(
            "{}.tmp",
            path.extension().unwrap_or_default().to_string_lossy()
        ));
        let file = File::create(&temporary).map_err(DataError::io("create", &temporary))?;
        Ok(Self {
            path,
            temporary,
            file: BufWriter::with_capacity(1 << 20, file),
            crc: 0,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        self.file
            .write_all(bytes)
            .map_err(DataError::io("write", &self.temporary))
    }

    fn finish(self) -> Result<u32, DataError> {
        let failed = || DataError::io("write", self.temporary.clone());
        let file = self
            .file
            .into_inner()
            .map_err(|e| failed()(e.into_error()))?;
        file.sync_all().map_err(failed())?;
        std::fs::rename(&self.temporary, &self.path).map_err(failed())?;
        Ok(self.crc)
    }
}

fn make_part(
    spec: &PrepareSpec,
    i: usize,
    input: &Path,
    made_from: String,
    progress: &mut Progress,
    report: &mut dyn FnMut(&Progress),
) -> Result<(), DataError> {
    let name = part_name(i);
    let path = |ending: &str| spec.out.join(format!("{name}.{ending}"));
    let _ = std::fs::remove_file(path("json")); // it would speak for files that are about to change
    let (mut tok, mut idx) = (Output::create(path("tok"))?, Output::create(path("idx"))?);
    let format = Format::of(input)?;
    // Tokens of unknown range get the widest form; tokenised text the narrowest that fits.
    let is_text = !matches!(format, Format::Megatron | Format::ArrowFile);
    let limit = spec.vocab_size.unwrap_or(if is_text {
        spec.tokenizer.vocab_size()
    } else {
        u32::MAX as usize
    });
    let mut part = Part {
        name: name.clone(),
        docs: 0,
        tokens: 0,
        max_token: 0,
        width: Width::for_vocab(limit),
        tok_crc32c: 0,
        idx_crc32c: 0,
        source: input.display().to_string(),
        source_bytes: place::size(input)?,
        made_from,
        bad: 0,
    };
    let (mut chunk, mut bytes) = (Vec::new(), 0);
    let mut bad = 0;
    let mut flush = |chunk: &mut Vec<Raw>, part: &mut Part| -> Result<(), DataError> {
        let encoded: Vec<Result<Vec<u32>, DataError>> = std::mem::take(chunk)
            .into_par_iter()
            .map(|raw| match raw {
                Raw::Text(text) => spec.tokenizer.encode(&text),
                Raw::Tokens(tokens) => Ok(tokens),
                Raw::Stored(tokens) => Ok(tokens.to_vec()),
            })
            .collect();
        let mut packed = Vec::new();
        for tokens in encoded {
            let tokens = tokens?;
            let max = tokens.iter().copied().max().unwrap_or(0);
            if max as usize >= limit {
                return Err(DataError::TokenRange {
                    path: input.into(),
                    doc: part.docs,
                    token: max.into(),
                    vocab_size: limit,
                });
            }
            packed.clear();
            match part.width {
                Width::U8 => packed.extend(tokens.iter().map(|&t| t as u8)),
                Width::U16 => tokens
                    .iter()
                    .for_each(|&t| packed.extend((t as u16).to_le_bytes())),
                Width::U32 => tokens.iter().for_each(|&t| packed.extend(t.to_le_bytes())),
            }
            tok.write(&packed)?;
            part.tokens += tokens.len() as u64;
            part.docs += 1;
            part.max_token = part.max_token.max(max);
            idx.write(&part.tokens.to_le_bytes())?;
        }
        Ok(())
    };
    let before = progress.clone();
    stream(input, format, &spec.columns, &mut |raw| {
        match raw {
            Ok(raw) => {
                bytes += match &raw {
                    Raw::Text(text) => text.len(),
                    Raw::Tokens(tokens) => 4 * tokens.len(),
                    Raw::Stored(tokens) => 4 * tokens.len() as usize,
                } + 64;
                chunk.push(raw);
                if bytes >= CHUNK_BYTES {
                    flush(&mut chunk, &mut part)?;
                    bytes = 0;
                    (progress.docs, progress.tokens) =
                        (before.docs + part.docs, before.tokens + part.tokens);
                    report(progress);
                }
            }
            Err(error) if spec.on_bad == OnBad::Skip && error.is_of_document() => {
                tracing::warn!(%error, "document skipped");
                bad += 1;
            }
            Err(error) => return Err(error),
        }
        Ok(true)
    })?;
    flush(&mut chunk, &mut part)?;
    part.bad = bad;
    (progress.docs, progress.tokens, progress.bad) = (
        before.docs + part.docs,
        before.tokens + part.tokens,
        before.bad + bad,
    );
    (part.tok_crc32c, part.idx_crc32c) = (tok.finish()?, idx.finish()?);
    write_json(&path("json"), &part)
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), DataError> {
    let mut out = Output::create(path.into())?;
    let failed = |e: serde_json::Error| DataError::Io {
        what: "write",
        path: path.into(),
        source: e.into(),
    };
    out.write(&serde_json::to_vec_pretty(value).map_err(failed)?)?;
    out.finish().map(|_| ())
}

fn write_manifest(spec: &PrepareSpec, parts: Vec<Part>) -> Result<PathBuf, DataError> {
    let largest = parts
        .iter()
        .map(|p| p.max_token as usize + 1)
        .max()
        .unwrap_or(0);
    let manifest = Manifest {
        version: Manifest::VERSION,
        vocab_size: spec
            .vocab_size
            .unwrap_or(largest.max(spec.tokenizer.vocab_size())),
        tokenizer: spec.tokenizer.name(),
        tokenizer_digest: spec.tokenizer.fingerprint(),
        eos: spec.tokenizer.eos(),
        docs: parts.iter().map(|p| p.docs).sum(),
        tokens: parts.iter().map(|p| p.tokens).sum(),
        parts,
    };
    let path = spec.out.join(MANIFEST);
    write_json(&path, &manifest)?;
    Ok(path)
}

/// Shards made from `inputs` in a folder of their own below `cache`, made now unless they are there: random access to formats that give none.
///
/// # Errors
/// As [`prepare`].
pub fn cached(spec: PrepareSpec, cache: &Path) -> Result<shards::ShardDocs, DataError> {
    let mut digest = Sha256::new();
    for input in inputs_of(&spec.inputs)? {
        digest.update(input.display().to_string());
        digest.update(made_from(&spec, &input)?);
    }
    let out = cache.join(hex(&digest.finalize()[..16]));
    let spec = PrepareSpec { out, ..spec };
    prepare(&spec, &mut |_| ())?;
    shards::ShardDocs::open(&spec.out)
}

#[cfg(test)]
mod tests {
    use super::super::source::Documents;
    use super::super::source::shards::ShardDocs;
    use super::super::tokenizer::Bytes;
    use super::*;

    fn spec(dir: &Path, shard: (usize, usize)) -> PrepareSpec {
        PrepareSpec {
            inputs: vec![dir.join("in")],
            out: dir.join("out"),
            tokenizer: Arc::new(Bytes),
            vocab_size: None,
            columns: Columns::default(),
            shard,
            on_bad: OnBad::Stop,
        }
    }

    fn inputs(dir: &Path, n: usize) {
        std::fs::create_dir_all(dir.join("in")).expect("made");
        for f in 0..n {
            let lines: String = (0..200 + f)
                .map(|i| format!("{{\"text\":\"file {f} document {i}\"}}\n"))
                .collect();
            std::fs::write(dir.join(format!("in/{f:03}.jsonl")), lines).expect("written");
        }
    }

    #[test]
    fn shards_hold_what_was_read_and_notice_changes() {
        let dir = tempfile::tempdir().expect("dir");
        inputs(dir.path(), 3);
        let made = prepare(&spec(dir.path(), (0, 1)), &mut |_| ()).expect("prepared");
        assert_eq!((made.progress.docs, made.missing), (603, 0));
        let docs = ShardDocs::open(&dir.path().join("out")).expect("opens");
        docs.verify().expect("whole");
        assert_eq!(docs.n_docs(), 603);
        let text = |d| {
            Bytes
                .decode(&docs.tokens(d).expect("reads").to_vec())
                .expect("bytes")
        };
        assert_eq!(
            (text(0), text(199), text(200), text(602)),
            (
                "file 0 document 0".into(),
                "file 0 document 199".into(),
                "file 1 document 0".into(),
                "file 2 document 201".into()
            )
        );
        // A flipped byte is seen by the checksum, a cut file when it is opened.
        let tok = dir.path().join("out/part-000001.tok");
        let mut bytes = std::fs::read(&tok).expect("read");
        bytes[7] ^= 1;
        std::fs::write(&tok, &bytes).expect("written");
        assert!(matches!(
            ShardDocs::open(&dir.path().join("out"))
                .expect("opens")
                .verify(),
            Err(DataError::Changed { .. })
        ));
        std::fs::write(&tok, &bytes[..50]).expect("written");
        let cut = ShardDocs::open(&dir.path().join("out")).expect("opens");
        assert!(cut.tokens(0).is_ok());
        assert!(matches!(cut.tokens(300), Err(DataError::Changed { .. })));
    }

    #[test]
    fn it_starts_again_where_it_was_killed_and_makes_changed_inputs_again() {
        let dir = tempfile::tempdir().expect("dir");
        inputs(dir.path(), 3);
        prepare(&spec(dir.path(), (0, 1)), &mut |_| ()).expect("prepared");
        let read = |f: &str| std::fs::read(dir.path().join("out").join(f)).expect("read");
        let (tok, manifest) = (read("part-000001.tok"), read("manifest.json"));
        // As if killed in the second part.
        std::fs::remove_file(dir.path().join("out/part-000001.json")).expect("removed");
        std::fs::write(dir.path().join("out/part-000001.tok"), b"half").expect("written");
        std::fs::remove_file(dir.path().join("out/manifest.json")).expect("removed");
        let again = prepare(&spec(dir.path(), (0, 1)), &mut |_| ()).expect("prepared");
        assert_eq!((again.progress.kept, again.progress.docs), (2, 201));
        assert_eq!(
            (read("part-000001.tok"), read("manifest.json")),
            (tok, manifest)
        );
        std::fs::write(dir.path().join("in/000.jsonl"), "{\"text\":\"new\"}").expect("written");
        let changed = prepare(&spec(dir.path(), (0, 1)), &mut |_| ()).expect("prepared");
        assert_eq!((changed.progress.kept, changed.progress.docs), (2, 1));
    }

    #[test]
    fn machines_share_the_work_and_the_last_writes_the_manifest() {
        let dir = tempfile::tempdir().expect("dir");
        inputs(dir.path(), 5);
        let first = prepare(&spec(dir.path(), (1, 2)), &mut |_| ()).expect("prepared");
        assert_eq!((first.manifest, first.missing), (None, 3));
        let last = prepare(&spec(dir.path(), (0, 2)), &mut |_| ()).expect("prepared");
        assert!(last.manifest.is_some());
        let shared = ShardDocs::open(&dir.path().join("out"))
            .expect("opens")
            .fingerprint();
        std::fs::remove_dir_all(dir.path().join("out")).expect("removed");
        prepare(&spec(dir.path(), (0, 1)), &mut |_| ()).expect("prepared");
        assert_eq!(
            ShardDocs::open(&dir.path().join("out"))
                .expect("opens")
                .fingerprint(),
            shared
        );
        assert!(prepare(&spec(dir.path(), (2, 2)), &mut |_| ()).is_err());
    }

    #[test]
    fn bad_documents_stop_or_are_counted() {
        let dir = tempfile::tempdir().expect("dir");
        inputs(dir.path(), 1);
        std::fs::write(
            dir.path().join("in/000.jsonl"),
            "{\"text\":\"a\"}\n{\n{\"text\":\"b\"}\n",
        )
        .expect("written");
        assert!(matches!(
            prepare(&spec(dir.path(), (0, 1)), &mut |_| ()),
            Err(DataError::Damaged { offset: 13, .. })
        ));
        let lenient = PrepareSpec {
            on_bad: OnBad::Skip,
            ..spec(dir.path(), (0, 1))
        };
        let made = prepare(&lenient, &mut |_| ()).expect("prepared");
        assert_eq!((made.progress.docs, made.progress.bad), (2, 1));
        let narrow = PrepareSpec {
            vocab_size: Some(50),
            ..lenient
        };
        assert!(matches!(
            prepare(&narrow, &mut |_| ()),
            Err(DataError::TokenRange { .. })
        ));
    }
}
