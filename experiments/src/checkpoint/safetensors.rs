//! Safetensors files: one file, or shards with an index, read and written tensor by tensor.
//!
//! Reading checks every header against its file before any tensor is looked at, then maps one tensor at a time, so that memory holds
//! what is being used and not what has been seen. Writing asks for one tensor at a time and puts shards and index down under names
//! that `transformers` reads. Bytes are little endian, as the format wants and as all supported machines are.

use super::CheckpointError;
use crate::data::mmap::Mapped;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Largest shard, in bytes; what `save_pretrained` used for years and every loader takes.
pub const SHARD_BYTES: u64 = 5_000_000_000;

const KIND: &str = "safetensors file";

/// Type and shape of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl Spec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.bitsize() / 8
    }
}

#[derive(Clone, Debug)]
struct Entry {
    spec: Spec,
    file: usize,
    offset: u64,
}

/// Tensors of one file or of several shards, by name. Holds names and places, no data.
#[derive(Clone, Debug)]
pub struct Source {
    path: PathBuf,
    files: Vec<PathBuf>,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

/// The bytes of one tensor, mapped while this lives.
#[derive(Debug)]
pub struct Tensor {
    /// Type and shape.
    pub spec: Spec,
    bytes: Mapped,
}

impl Tensor {
    /// Little-endian bytes, row-major.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The numbers widened to f32. Only types that [`Source::open`] admits occur.
    pub fn to_f32(&self) -> Vec<f32> {
        widen(self.spec.dtype, &self.bytes)
    }

    /// The integers; empty when the tensor holds floats.
    pub fn to_i64(&self) -> Vec<i64> {
        let bytes: &[u8] = &self.bytes;
        match self.spec.dtype {
            Dtype::I64 => bytes
                .chunks_exact(8)
                .map(|c| i64::from_le_bytes(array(c)))
                .collect(),
            Dtype::I32 => bytes
                .chunks_exact(4)
                .map(|c| i64::from(i32::from_le_bytes(array(c))))
                .collect(),
            _ => Vec::new(),
        }
    }
}

fn array<const N: usize>(c: &[u8]) -> [u8; N] {
    let mut a = [0; N];
    a.copy_from_slice(c);
    a
}

/// Bytes of a supported float type as f32; integers convert by value.
pub fn widen(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes
            .chunks_exact(4)
            .map(|c| f32::from_le_bytes(array(c)))
            .collect(),
        Dtype::BF16 => bytes
            .chunks_exact(2)
            .map(|c| f32::from_bits(u32::from(u16::from_le_bytes(array(c))) << 16))
            .collect(),
        Dtype::F16 => bytes
            .chunks_exact(2)
            .map(|c| half::f16::from_le_bytes(array(c)).to_f32())
            .collect(),
        Dtype::F64 => bytes
            .chunks_exact(8)
            .map(|c| f64::from_le_bytes(array(c)) as f32)
            .collect(),
        Dtype::I64 => bytes
            .chunks_exact(8)
            .map(|c| i64::from_le_bytes(array(c)) as f32)
            .collect(),
        Dtype::I32 => bytes
            .chunks_exact(4)
            .map(|c| i32::from_le_bytes(array(c)) as f32)
            .collect(),
        _ => Vec::new(),
    }
}

/// f32 numbers as bytes of a float type; rounds to nearest even.
pub fn narrow(dtype: Dtype, data: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => data
            .iter()
            .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
            .collect(),
        Dtype::F16 => data
            .iter()
            .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
            .collect(),
        Dtype::F64 => data
            .iter()
            .flat_map(|v| f64::from(*v).to_le_bytes())
            .collect(),
        _ => data.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// Whether all numbers are finite.
pub fn all_finite(dtype: Dtype, bytes: &[u8]) -> bool {
    let half = |mask: u16| move |c: &[u8]| u16::from_le_bytes(array(c)) & mask != mask;
    match dtype {
        Dtype::F32 => bytes
            .chunks_exact(4)
            .all(|c| f32::from_le_bytes(array(c)).is_finite()),
        Dtype::BF16 => bytes.chunks_exact(2).all(half(0x7f80)),
        Dtype::F16 => bytes.chunks_exact(2).all(half(0x7c00)),
        Dtype::F64 => bytes
            .chunks_exact(8)
            .all(|c| f64::from_le_bytes(array(c)).is_finite()),
        _ => true,
    }
}

/// Whether weights may be stored in this type.
pub fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64)
}

impl Source {
    /// Opens a `.safetensors` file, an index `.safetensors.index.json`, or the folder holding `<stem>.safetensors` or
    /// `<stem>.safetensors.index.json`.
    ///
    /// # Errors
    /// [`CheckpointError::NotFound`] when there is none, [`CheckpointError::Damaged`] when a header lies, a file is cut short, a
    /// shard is absent, or index and shards disagree.
    pub fn open(path: &Path, stem: &str) -> Result<Self, CheckpointError> {
        let mut at = path.to_path_buf();
        if path.is_dir() {
            let (one, index) = (
                path.join(format!("{stem}.safetensors")),
                path.join(format!("{stem}.safetensors.index.json")),
            );
            at = if one.is_file() { one } else { index };
        }
        if !at.is_file() {
            return Err(CheckpointError::NotFound {
                kind: "weights",
                path: path.to_path_buf(),
                help: format!(
                    "expected {stem}.safetensors, or {stem}.safetensors.index.json with its shards"
                ),
            });
        }
        let mut source = Source {
            path: at.clone(),
            files: Vec::new(),
            entries: BTreeMap::new(),
            metadata: BTreeMap::new(),
        };
        if at.extension().is_some_and(|e| e == "json") {
            source.open_index(&at)?;
        } else {
            source.open_file(&at)?;
        }
        Ok(source)
    }

    fn open_file(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let map =
            Mapped::open(path).map_err(|e| CheckpointError::damaged(path, KIND, e.to_string()))?;
        let (header, meta) = SafeTensors::read_metadata(&map)
            .map_err(|e| CheckpointError::damaged(path, KIND, explain(&e, &map)))?;
        let file = self.files.len();
        self.files.push(path.to_path_buf());
        for (name, info) in meta.tensors() {
            let entry = Entry {
                spec: Spec {
                    name: name.clone(),
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                },
                file,
                offset: 8 + header as u64 + info.data_offsets.0 as u64,
            };
            if let Some(other) = self.entries.insert(name.clone(), entry) {
                let first = self.files[other.file].display().to_string();
                return Err(CheckpointError::damaged(
                    path,
                    KIND,
                    format!("tensor {name} is also in {first}"),
                ));
            }
        }
        if let Some(m) = meta.metadata() {
            self.metadata
                .extend(m.iter().map(|(k, v)| (k.clone(), v.clone())));
        }
        Ok(())
    }

    fn open_index(&mut self, index: &Path) -> Result<(), CheckpointError> {
        const INDEX: &str = "shard index";
        let text = std::fs::read_to_string(index).map_err(CheckpointError::io("read", index))?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| CheckpointError::damaged(index, INDEX, e.to_string()))?;
        let Some(map) = value.get("weight_map").and_then(Value::as_object) else {
            return Err(CheckpointError::damaged(
                index,
                INDEX,
                "it has no object weight_map from tensor to file",
            ));
        };
        let dir = index.parent().unwrap_or(Path::new("."));
        let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let mut bad = Vec::new();
        for (tensor, file) in map {
            match file.as_str() {
                Some(f) if !f.contains(['/', '\\']) && f != ".." => {
                    shards.entry(f).or_default().push(tensor)
                }
                _ => bad.push(format!(
                    "{tensor} is said to be in {file}, which is not a file name"
                )),
            }
        }
        let absent: Vec<&str> = shards
            .keys()
            .copied()
            .filter(|f| !dir.join(f).is_file())
            .collect();
        if !absent.is_empty() {
            bad.push(format!("it names absent shards: {}", absent.join(", ")));
        }
        if !bad.is_empty() {
            return Err(CheckpointError::damaged(index, INDEX, bad.join("; ")));
        }
        for shard in shards.keys() {
            self.open_file(&dir.join(shard))?;
        }
        for (shard, tensors) in &shards {
            for t in tensors {
                match self.entries.get(*t) {
                    Some(e) if self.files[e.file].ends_with(shard) => {}
                    Some(e) => bad.push(format!(
                        "{t} is in {}, not in {shard}",
                        self.files[e.file].display()
                    )),
                    None => bad.push(format!("{t} is not in {shard}")),
                }
            }
        }
        let unlisted = self.entries.keys().filter(|k| !map.contains_key(*k));
        bad.extend(unlisted.map(|k| format!("{k} is in a shard but not in the index")));
        if bad.is_empty() {
            Ok(())
        } else {
            Err(CheckpointError::damaged(index, INDEX, bad.join("; ")))
        }
    }

    /// The file or index that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that hold the tensors.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Free text in the headers.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// All tensors, by name.
    pub fn specs(&self) -> impl Iterator<Item = &Spec> {
        self.entries.values().map(|e| &e.spec)
    }

    /// Type and shape of a tensor, if it is there.
    pub fn spec(&self, name: &str) -> Option<&Spec> {
        self.entries.get(name).map(|e| &e.spec)
    }

    /// Maps one tensor.
    ///
    /// # Errors
    /// [`CheckpointError::Tensors`] when there is none of that name; [`CheckpointError::Io`] when mapping fails.
    pub fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let entry = self
            .entries
            .get(name)
            .ok_or_else(|| CheckpointError::Tensors {
                path: self.path.clone(),
                problems: vec![format!("{name}: missing")],
            })?;
        let file = &self.files[entry.file];
        let bytes = Mapped::range(file, entry.offset, entry.spec.bytes())
            .map_err(|e| CheckpointError::damaged(file, KIND, e.to_string()))?;
        Ok(Tensor {
            spec: entry.spec.clone(),
            bytes,
        })
    }
}

/// What a header error means for the person who has the file.
fn explain(e: &safetensors::SafeTensorError, map: &[u8]) -> String {
    use safetensors::SafeTensorError as E;
    let announced = map.get(..8).map(|b| u64::from_le_bytes(array(b)));
    match e {
        E::HeaderTooSmall => format!(
            "it has {} bytes, too few for a header; download it again",
            map.len()
        ),
        E::HeaderTooLarge | E::InvalidHeaderLength => format!(
            "its header is said to have {} bytes, the file has {}; it was cut short or is of another format",
            announced.unwrap_or(0),
            map.len()
        ),
        E::InvalidHeader(_) | E::InvalidHeaderDeserialization(_) => {
            format!("its header is not JSON of the format ({e})")
        }
        E::TensorInvalidInfo => "a tensor's offsets do not fit its type and shape".into(),
        E::InvalidOffset(name) => {
            format!("the offsets of tensor {name} overlap another or leave a gap")
        }
        E::MetadataIncompleteBuffer => format!(
            "the tensors its header names do not fill the file of {} bytes; it was cut short or has bytes to spare",
            map.len()
        ),
        other => other.to_string(),
    }
}

/// Where the bytes of one tensor go, in as many pieces as its producer likes.
pub struct Sink<'a> {
    out: &'a mut dyn Write,
    path: &'a Path,
    written: usize,
}

impl Sink<'_> {
    /// Appends bytes.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.written += bytes.len();
        self.out
            .write_all(bytes)
            .map_err(CheckpointError::io("write", self.path))
    }
}

/// Gives the tensor with this position to a sink.
pub type Produce<'a> = dyn FnMut(usize, &mut Sink) -> Result<(), CheckpointError> + 'a;

/// Order of tensors in a file: wide types first (the format aligns by order), then by name.
fn file_order(a: &Spec, b: &Spec) -> std::cmp::Ordering {
    b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name))
}

/// Writes tensors as `<dir>/<stem>.safetensors`, or as shards of at most `shard_bytes` with an index where they do not fit one.
/// `produce` puts out the bytes of the tensor with the given position in `specs`, in one piece or many. Files are synced.
/// Returns the files written.
///
/// # Errors
/// [`CheckpointError::Io`]; whatever `produce` says; [`CheckpointError::Produce`] when it gives another number of bytes.
pub fn write(
    dir: &Path,
    stem: &str,
    specs: &[Spec],
    metadata: &[(&str, &str)],
    shard_bytes: u64,
    produce: &mut Produce,
) -> Result<Vec<PathBuf>, CheckpointError> {
    let mut order: Vec<usize> = (0..specs.len()).collect();
    order.sort_by(|&a, &b| specs[a].name.cmp(&specs[b].name));
    let mut shards: Vec<Vec<usize>> = vec![Vec::new()];
    let mut size = 0u64;
    for i in order {
        let bytes = specs[i].bytes() as u64;
        if size > 0 && size + bytes > shard_bytes {
            shards.push(Vec::new());
            size = 0;
        }
        size += bytes;
        if let Some(last) = shards.last_mut() {
            last.push(i);
        }
    }
    let n = shards.len();
    let mut files = Vec::new();
    let mut weight_map = Map::new();
    for (k, mut shard) in shards.into_iter().enumerate() {
        let name = if n == 1 {
            format!("{stem}.safetensors")
        } else {
            format!("{stem}-{:05}-of-{n:05}.safetensors", k + 1)
        };
        shard.sort_by(|&a, &b| file_order(&specs[a], &specs[b]));
        for &i in &shard {
            weight_map.insert(specs[i].name.clone(), json!(name));
        }
        let path = dir.join(name);
        write_file(&path, specs, &shard, metadata, produce)?;
        files.push(path);
    }
    if n > 1 {
        let total: u64 = specs.iter().map(|s| s.bytes() as u64).sum();
        let mut sorted: Vec<_> = weight_map.into_iter().collect();
        sorted.sort_by(|a, b| a.0.cmp(&b.0));
        let index =
            json!({ "metadata": { "total_size": total }, "weight_map": Map::from_iter(sorted) });
        let path = dir.join(format!("{stem}.safetensors.index.json"));
        write_text(&path, &format!("{index:#}\n"))?;
        files.push(path);
    }
    Ok(files)
}

fn write_file(
    path: &Path,
    specs: &[Spec],
    shard: &[usize],
    metadata: &[(&str, &str)],
    produce: &mut Produce,
) -> Result<(), CheckpointError> {
    let io = |e| CheckpointError::io("write", path)(e);
    let mut header = Map::new();
    if !metadata.is_empty() {
        let m = metadata.iter().map(|(k, v)| ((*k).to_string(), json!(v)));
        header.insert("__metadata__".into(), Value::Object(Map::from_iter(m)));
    }
    let mut offset = 0;
    for &i in shard {
        let s = &specs[i];
        let end = offset + s.bytes();
        header.insert(
            s.name.clone(),
            json!({ "dtype": s.dtype, "shape": s.shape, "data_offsets": [offset, end] }),
        );
        offset = end;
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');

    let mut out = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io)?);
    out.write_all(&(text.len() as u64).to_le_bytes())
        .map_err(io)?;
    out.write_all(&text).map_err(io)?;
    for &i in shard {
        let mut sink = Sink {
            out: &mut out,
            path,
            written: 0,
        };
        produce(i, &mut sink)?;
        let written = sink.written;
        if written != specs[i].bytes() {
            return Err(CheckpointError::Produce {
                name: specs[i].name.clone(),
                why: format!(
                    "{written} bytes came, {} are right for its shape",
                    specs[i].bytes()
                ),
            });
        }
    }
    let file = out.into_inner().map_err(|e| io(e.into_error()))?;
    file.sync_all().map_err(io)
}

/// Writes and syncs a text file.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn write_text(path: &Path, text: &str) -> Result<(), CheckpointError> {
    let io = |e| CheckpointError::io("write", path)(e);
    let mut f = File::create(path).map_err(io)?;
    f.write_all(text.as_bytes()).map_err(io)?;
    f.sync_all().map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs() -> Vec<Spec> {
        let spec = |name: &str, dtype, shape: &[usize]| Spec {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
        };
        vec![
            spec("b", Dtype::F32, &[2, 3]),
            spec("a", Dtype::BF16, &[4]),
            spec("c", Dtype::F16, &[2]),
        ]
    }

    fn fill(i: usize, out: &mut Sink) -> Result<(), CheckpointError> {
        let s = &specs()[i];
        let data: Vec<f32> = (0..s.len()).map(|k| k as f32 * 0.5 - i as f32).collect();
        out.put(&narrow(s.dtype, &data))
    }

    #[test]
    fn what_is_written_is_read_whole_or_in_shards() {
        for shard_bytes in [SHARD_BYTES, 10] {
            let dir = tempfile::tempdir().unwrap();
            let files = write(
                dir.path(),
                "model",
                &specs(),
                &[("format", "pt")],
                shard_bytes,
                &mut fill,
            )
            .unwrap();
            assert_eq!(files.len(), if shard_bytes == 10 { 4 } else { 1 });
            let source = Source::open(dir.path(), "model").unwrap();
            assert_eq!(source.metadata()["format"], "pt");
            for (i, s) in specs().iter().enumerate() {
                let t = source.tensor(&s.name).unwrap();
                assert_eq!(t.spec, *s);
                let right: Vec<f32> = (0..s.len()).map(|k| k as f32 * 0.5 - i as f32).collect();
                assert_eq!(t.to_f32(), right);
            }
        }
    }

    #[test]
    fn the_library_reads_what_we_write() {
        let dir = tempfile::tempdir().unwrap();
        let files = write(dir.path(), "model", &specs(), &[], SHARD_BYTES, &mut fill).unwrap();
        let bytes = std::fs::read(&files[0]).unwrap();
        let theirs = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.len(), 3);
        assert_eq!(theirs.tensor("b").unwrap().shape(), [2, 3]);
    }

    #[test]
    fn damaged_files_are_refused_with_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        let files = write(dir.path(), "model", &specs(), &[], SHARD_BYTES, &mut fill).unwrap();
        let whole = std::fs::read(&files[0]).unwrap();
        let mut lying = whole.clone();
        lying[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        let mut reshaped = whole.clone();
        let at = whole.windows(5).position(|w| w == b"[2,3]").unwrap();
        reshaped[at + 1] = b'9';
        let cases: [(&[u8], &str); 5] = [
            (&whole[..4], "too few"),
            (&whole[..whole.len() - 3], "cut short"),
            (&lying, "cut short or is of another format"),
            (&[whole.clone(), vec![0; 9]].concat(), "bytes to spare"),
            (&reshaped, "do not fit"),
        ];
        for (bytes, says) in cases {
            std::fs::write(&files[0], bytes).unwrap();
            let e = Source::open(dir.path(), "model").unwrap_err().to_string();
            assert!(e.contains(says), "{e}");
        }
    }

    #[test]
    fn an_index_that_names_absent_shards_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let files = write(dir.path(), "model", &specs(), &[], 10, &mut fill).unwrap();
        std::fs::remove_file(&files[1]).unwrap();
        let e = Source::open(dir.path(), "model").unwrap_err().to_string();
        assert!(
            e.contains("absent shards: model-00002-of-00003.safetensors"),
            "{e}"
        );
    }
}
