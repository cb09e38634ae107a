//! Which format a file has, and its documents one after the other: what `prepare` and `inspect` read, and what formats without random access
//! (compressed JSON Lines, Parquet) are read by at all. A file is streamed, never held whole.

use crate::data::mmap::Mapped;
use crate::data::{DataError, place};
use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::{DataType, Schema};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Formats that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// UTF-8 text.
    Text,
    /// JSON Lines.
    Jsonl,
    /// JSON Lines, gzip.
    JsonlGzip,
    /// JSON Lines, Zstandard.
    JsonlZstd,
    /// Parquet.
    Parquet,
    /// Arrow IPC file.
    ArrowFile,
    /// Arrow IPC stream (Hugging Face `datasets`).
    ArrowStream,
    /// Megatron `.bin` with `.idx`.
    Megatron,
    /// A folder made by `data prepare`.
    Shards,
}

impl Format {
    /// Tells by content where a format has a signature, else by the name's ending.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn of(path: &Path) -> Result<Self, DataError> {
        if !place::is_url(path) && path.is_dir() {
            return Ok(Self::Shards);
        }
        let head = place::range(path, 0..place::size(path)?.min(9))?;
        let name = path
            .file_name()
            .map(|n| n.to_string_lossy().to_lowercase())
            .unwrap_or_default();
        Ok(match &*head {
            h if h.starts_with(b"PAR1") => Self::Parquet,
            h if h.starts_with(b"ARROW1") => Self::ArrowFile,
            h if h.starts_with(b"\xff\xff\xff\xff") && name.ends_with(".arrow") => {
                Self::ArrowStream
            }
            h if h.starts_with(b"MMIDIDX\0\0") => Self::Megatron,
            h if h.starts_with(b"\x1f\x8b") => Self::JsonlGzip,
            h if h.starts_with(b"\x28\xb5\x2f\xfd") => Self::JsonlZstd,
            _ if name.ends_with(".bin") && place::exists(&path.with_extension("idx"))? => {
                Self::Megatron
            }
            // The ending tells also where the content is cut short, so that the right reader complains.
            _ if name.ends_with(".gz") => Self::JsonlGzip,
            _ if name.ends_with(".zst") => Self::JsonlZstd,
            _ if name.ends_with(".parquet") => Self::Parquet,
            _ if name.ends_with(".arrow") => Self::ArrowFile,
            _ if [".jsonl", ".ndjson", ".json"]
                .iter()
                .any(|e| name.ends_with(e)) =>
            {
                Self::Jsonl
            }
            _ => Self::Text,
        })
    }
}

/// One document as stored.
#[derive(Clone, Debug)]
pub enum Raw {
    /// Text, to be tokenised.
    Text(String),
    /// Tokens.
    Tokens(Vec<u32>),
    /// Tokens in a map.
    Stored(super::Tokens),
}

/// Which columns or fields hold documents, in order of preference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Columns {
    /// Names of text columns.
    pub text: Vec<String>,
    /// Names of token columns.
    pub tokens: Vec<String>,
}

impl Default for Columns {
    fn default() -> Self {
        let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        Self {
            text: names(&["text", "contents", "content"]),
            tokens: names(&["tokens", "input_ids"]),
        }
    }
}

impl Columns {
    /// Only this column.
    pub fn only(name: &str) -> Self {
        Self {
            text: vec![name.into()],
            tokens: vec![name.into()],
        }
    }
}

/// Calls `each` with every document of a file in order; a damaged document is an `Err` item, after which reading goes on where
/// the format allows. `each` returns whether to go on.
///
/// # Errors
/// What keeps the file from being read at all.
pub fn stream(
    path: &Path,
    format: Format,
    columns: &Columns,
    each: Each<'_>,
) -> Result<(), DataError> {
    let buffered = |reader: Box<dyn Read + Send>| BufReader::with_capacity(1 << 20, reader);
    match format {
        Format::Jsonl => json_lines(path, buffered(place::open(path)?), columns, each),
        Format::JsonlGzip => {
            let packed = BufReader::with_capacity(1 << 16, place::open(path)?);
            let reader = Box::new(flate2::bufread::MultiGzDecoder::new(packed));
            json_lines(path, buffered(reader), columns, each)
        }
        Format::JsonlZstd => {
            let reader = zstd::Decoder::new(place::open(path)?)
                .map_err(DataError::io("decompress", path))?;
            json_lines(path, buffered(Box::new(reader)), columns, each)
        }
        Format::Parquet if place::is_url(path) => {
            let chunks = Chunks::new(path)?;
            let lost = chunks.lost.clone();
            let read = parquet_rows(path, || Ok(chunks.clone()), columns, &mut |raw| {
                // What a lost connection kept from being read is not damaged.
                match take(&lost) {
                    Some(error) => Err(error),
                    None => each(raw),
                }
            });
            take(&lost).map_or(read, Err)
        }
        Format::Parquet => {
            let open = || File::open(path).map_err(DataError::io("open", path));
            parquet_rows(path, open, columns, each)
        }
        Format::Text if place::is_url(path) => text_runs(path, place::open(path)?, each),
        Format::ArrowFile if place::is_url(path) => {
            let bad = |e: arrow_schema::ArrowError| not_arrow(path, &e);
            let reader = BufReader::with_capacity(1 << 20, place::open(path)?);
            let reader = arrow_ipc::reader::FileReader::try_new(reader, None).map_err(bad)?;
            let schema = reader.schema();
            arrow_rows(path, &schema, reader.map(|b| b.map_err(bad)), columns, each)
        }
        Format::ArrowStream if place::is_url(path) => {
            let bad = |e: arrow_schema::ArrowError| not_arrow(path, &e);
            let reader = BufReader::with_capacity(1 << 20, place::open(path)?);
            let reader = arrow_ipc::reader::StreamReader::try_new(reader, None).map_err(bad)?;
            let schema = reader.schema();
            arrow_rows(path, &schema, reader.map(|b| b.map_err(bad)), columns, each)
        }
        Format::Megatron if place::is_url(path) => megatron_docs(path, each),
        Format::Text
        | Format::ArrowFile
        | Format::ArrowStream
        | Format::Megatron
        | Format::Shards => {
            let docs = super::files::open_file(path, format, columns)?;
            for doc in 0..docs.n_docs() {
                if !each(docs.raw(doc))? {
                    break;
                }
            }
            Ok(())
        }
    }
}

/// What takes documents, one after the other; see [`stream`].
type Each<'a> = &'a mut dyn FnMut(Result<Raw, DataError>) -> Result<bool, DataError>;

/// A parquet file in an object store. What a lost connection did is kept in `lost`: the `parquet` crate makes a text of it.
#[derive(Clone)]
struct Chunks {
    path: PathBuf,
    size: u64,
    lost: Arc<Mutex<Option<DataError>>>,
}

impl Chunks {
    fn new(path: &Path) -> Result<Self, DataError> {
        Ok(Self {
            path: path.into(),
            size: place::size(path)?,
            lost: Arc::default(),
        })
    }

    fn noting<T>(&self, result: Result<T, DataError>) -> parquet::errors::Result<T> {
        result.map_err(|error| {
            let text = error.to_string();
            *self.lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            parquet::errors::ParquetError::General(text)
        })
    }
}

fn take(lost: &Mutex<Option<DataError>>) -> Option<DataError> {
    lost.lock().unwrap_or_else(PoisonError::into_inner).take()
}

impl parquet::file::reader::Length for Chunks {
    fn len(&self) -> u64 {
        self.size
    }
}

impl parquet::file::reader::ChunkReader for Chunks {
    type T = Box<dyn Read + Send>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        let mut file = self.noting(place::open(&self.path))?;
        file.seek(SeekFrom::Start(start))?;
        Ok(Box::new(file))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<bytes::Bytes> {
        self.noting(place::range(&self.path, start..start + length as u64))
    }
}

/// Plain text of a stream, cut into the documents that it has as a file.
fn text_runs(path: &Path, mut reader: impl Read, each: Each<'_>) -> Result<(), DataError> {
    let (mut held, mut offset, mut is_all) = (Vec::new(), 0u64, false);
    loop {
        while let Some(len) = super::files::text_end(&held, is_all) {
            let text = std::str::from_utf8(&held[..len]).map_err(|e| DataError::NotUtf8 {
                path: path.into(),
                offset: offset + e.valid_up_to() as u64,
            });
            if !each(text.map(|t| Raw::Text(t.to_owned())))? {
                return Ok(());
            }
            held.drain(..len);
            offset += len as u64;
        }
        if is_all {
            return Ok(());
        }
        // Twice as much each time, so that a file without lines is not searched over and over.
        let more = (held.len() as u64).max(1 << 20);
        let read = reader.by_ref().take(more).read_to_end(&mut held);
        let read =
            read.map_err(|e| place::lost(&e).unwrap_or_else(|| DataError::io("read", path)(e)))?;
        is_all = read == 0;
    }
}

fn not_arrow(path: &Path, error: &arrow_schema::ArrowError) -> DataError {
    if let arrow_schema::ArrowError::IoError(_, io) = error
        && let Some(lost) = place::lost(io)
    {
        return lost;
    }
    DataError::Damaged {
        path: path.into(),
        offset: 0,
        what: error.to_string(),
    }
}

/// The documents of record batches, in either layout of [`ArrowDocs`]. A batch that cannot be read ends the file.
fn arrow_rows(
    path: &Path,
    schema: &Schema,
    batches: impl Iterator<Item = Result<RecordBatch, DataError>>,
    columns: &Columns,
    each: Each<'_>,
) -> Result<(), DataError> {
    let column =
        find_column(schema, columns).ok_or_else(|| missing_column(path, schema, columns))?;
    let batchwise = schema.field(column).data_type().is_integer();
    for (i, batch) in batches.enumerate() {
        let batch = match batch {
            Ok(batch) => batch,
            Err(error) if error.is_of_document() => return each(Err(error)).map(|_| ()),
            Err(error) => return Err(error),
        };
        let damaged = |what: String| DataError::Damaged {
            path: path.into(),
            offset: 0,
            what: format!("record batch {i}: {what}"),
        };
        let column = batch.column(column);
        if batchwise {
            if !each(integers(column).map(Raw::Tokens).map_err(damaged))? {
                return Ok(());
            }
            continue;
        }
        for row in 0..batch.num_rows() {
            if !each(cell(column, row).map_err(damaged))? {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The documents of a Megatron pair in an object store.
fn megatron_docs(path: &Path, each: Each<'_>) -> Result<(), DataError> {
    let (idx, bin) = (path.with_extension("idx"), path.with_extension("bin"));
    let bytes = place::range(&idx, 0..place::size(&idx)?)?;
    let index = super::files::MegatronIndex::read(path, &bytes, place::size(&bin)?)?;
    let (mut file, mut held) = (
        BufReader::with_capacity(1 << 20, place::open(&bin)?),
        Vec::new(),
    );
    let mut at = 0;
    for (start, tokens) in index.spans {
        held.resize(tokens as usize * index.width.bytes(), 0);
        let step = if start == at {
            Ok(())
        } else {
            file.seek(SeekFrom::Start(start)).map(|_| ())
        };
        let read = step.and_then(|()| file.read_exact(&mut held));
        read.map_err(|e| place::lost(&e).unwrap_or_else(|| DataError::io("read", &bin)(e)))?;
        at = start + held.len() as u64;
        if !each(Ok(Raw::Tokens(index.width.decode(&held))))? {
            break;
        }
    }
    Ok(())
}

/// The document in one line of JSON.
pub(crate) fn json_document(line: &[u8], columns: &Columns) -> Result<Raw, String> {
    let value: serde_json::Value =
        serde_json::from_slice(line).map_err(|e| format!("not a JSON object: {e}"))?;
    if let Some(text) = columns
        .text
        .iter()
        .find_map(|c| value.get(c))
        .and_then(|v| v.as_str())
    {
        return Ok(Raw::Text(text.to_owned()));
    }
    if let Some(list) = columns
        .tokens
        .iter()
        .find_map(|c| value.get(c))
        .and_then(|v| v.as_array())
    {
        let id = |v: &serde_json::Value| v.as_u64().and_then(|t| u32::try_from(t).ok());
        return list
            .iter()
            .map(id)
            .collect::<Option<Vec<u32>>>()
            .map(Raw::Tokens)
            .ok_or_else(|| "a token is not a number from 0 to 2^32".into());
    }
    let (text, tokens) = (columns.text.join(", "), columns.tokens.join(", "));
    Err(format!(
        "no text field ({text}) and no token field ({tokens})"
    ))
}

fn json_lines(
    path: &Path,
    mut reader: impl BufRead,
    columns: &Columns,
    each: Each<'_>,
) -> Result<(), DataError> {
    let (mut line, mut offset) = (Vec::new(), 0u64);
    loop {
        line.clear();
        let damaged = |what: String| DataError::Damaged {
            path: path.into(),
            offset,
            what,
        };
        match reader.read_until(b'\n', &mut line) {
            Ok(0) => return Ok(()),
            Ok(read) => {
                if !line.trim_ascii().is_empty()
                    && !each(json_document(&line, columns).map_err(damaged))?
                {
                    return Ok(());
                }
                offset += read as u64;
            }
            Err(e) => {
                if let Some(lost) = place::lost(&e) {
                    return Err(lost);
                }
                // What follows a break in a compressed stream is lost; the part of a line before it is no document.
                let at = offset + line.len() as u64;
                each(Err(DataError::Damaged {
                    path: path.into(),
                    offset: at,
                    what: format!("the compressed stream breaks off: {e}"),
                }))?;
                return Ok(());
            }
        }
    }
}

fn parquet_rows<R: parquet::file::reader::ChunkReader + 'static>(
    path: &Path,
    reader: impl Fn() -> Result<R, DataError>,
    columns: &Columns,
    each: Each<'_>,
) -> Result<(), DataError> {
    use parquet::arrow::ProjectionMask;
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
    let damaged = |at: usize, e: String| DataError::Damaged {
        path: path.into(),
        offset: at as u64,
        what: e,
    };
    let open = || {
        ParquetRecordBatchReaderBuilder::try_new(reader()?).map_err(|e| damaged(0, e.to_string()))
    };
    let first = open()?;
    let column = find_column(first.schema(), columns)
        .ok_or_else(|| missing_column(path, first.schema(), columns))?;
    let offsets: Vec<i64> = first
        .metadata()
        .row_groups()
        .iter()
        .map(|g| g.columns().first().map_or(0, |c| c.byte_range().0 as i64))
        .collect();
    // One row group at a time: a damaged page costs its group, not the file.
    for (group, &offset) in offsets.iter().enumerate() {
        let again = open()?;
        let mask = ProjectionMask::roots(again.parquet_schema(), [column]);
        let reader = again
            .with_row_groups(vec![group])
            .with_projection(mask)
            .with_batch_size(256)
            .build();
        let reader = reader.map_err(|e| damaged(offset as usize, e.to_string()))?;
        for batch in reader {
            match batch {
                Ok(batch) => {
                    for row in 0..batch.num_rows() {
                        if !each(
                            cell(batch.column(0), row).map_err(|e| damaged(offset as usize, e)),
                        )? {
                            return Ok(());
                        }
                    }
                }
                Err(e) => {
                    if !each(Err(damaged(
                        offset as usize,
                        format!("row group {group}: {e}"),
                    )))? {
                        return Ok(());
                    }
                    break;
                }
            }
        }
    }
    Ok(())
}

/// Index of the column that holds documents.
fn find_column(schema: &Schema, columns: &Columns) -> Option<usize> {
    columns
        .text
        .iter()
        .chain(&columns.tokens)
        .find_map(|name| schema.index_of(name).ok())
}

fn missing_column(path: &Path, schema: &Schema, columns: &Columns) -> DataError {
    let have: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
    let want = [columns.text.as_slice(), columns.tokens.as_slice()]
        .concat()
        .join(", ");
    DataError::Damaged {
        path: path.into(),
        offset: 0,
        what: format!(
            "its columns are {}; expected one of {want}",
            have.join(", ")
        ),
    }
}

/// Integers of any width as tokens.
fn integers(array: &ArrayRef) -> Result<Vec<u32>, String> {
    macro_rules! collect {
        ($t:ty) => {
            array
                .as_primitive::<$t>()
                .values()
                .iter()
                .map(|&v| u32::try_from(v).ok())
                .collect::<Option<Vec<u32>>>()
        };
    }
    if array.null_count() > 0 {
        return Err("a token is null".into());
    }
    let tokens = match array.data_type() {
        DataType::UInt32 => Some(array.as_primitive::<UInt32Type>().values().to_vec()),
        DataType::Int32 => collect!(Int32Type),
        DataType::Int64 => collect!(Int64Type),
        DataType::UInt64 => collect!(UInt64Type),
        DataType::UInt16 => collect!(UInt16Type),
        DataType::UInt8 => collect!(UInt8Type),
        other => return Err(format!("tokens of type {other}; expected integers")),
    };
    tokens.ok_or_else(|| "a token is negative or above 2^32".into())
}

/// The document in one cell: a string, or a list of integers.
fn cell(column: &ArrayRef, row: usize) -> Result<Raw, String> {
    if column.is_null(row) {
        return Ok(Raw::Tokens(Vec::new()));
    }
    match column.data_type() {
        DataType::Utf8 => Ok(Raw::Text(column.as_string::<i32>().value(row).to_owned())),
        DataType::LargeUtf8 => Ok(Raw::Text(column.as_string::<i64>().value(row).to_owned())),
        DataType::Utf8View => Ok(Raw::Text(column.as_string_view().value(row).to_owned())),
        DataType::List(_) => integers(&column.as_list::<i32>().value(row)).map(Raw::Tokens),
        DataType::LargeList(_) => integers(&column.as_list::<i64>().value(row)).map(Raw::Tokens),
        other => Err(format!(
            "a column of type {other}; expected strings or lists of integers"
        )),
    }
}

/// Arrow IPC over a memory map, both layouts of the field: a plain integer column (Bamba: one record batch is one document), or
/// strings or lists (one row is one document).
pub struct ArrowDocs {
    path: std::path::PathBuf,
    column: usize,
    /// Whether a batch is one document.
    batchwise: bool,
    batches: Batches,
    /// Number of documents up to and with each batch.
    ends: Vec<u64>,
}

enum Batches {
    /// Decoded on demand.
    File {
        decoder: arrow_ipc::reader::FileDecoder,
        buffer: arrow_buffer::Buffer,
        blocks: Vec<arrow_ipc::Block>,
    },
    /// Decoded at the start, without copies: they point into the map.
    Stream(Vec<RecordBatch>),
}

/// Lets a map own Arrow buffers.
struct Owner(Arc<Mapped>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl ArrowDocs {
    /// Maps `path`.
    ///
    /// # Errors
    /// [`DataError::Damaged`] for what is not Arrow, is cut short, or lacks the columns.
    pub fn open(path: &Path, format: Format, columns: &Columns) -> Result<Self, DataError> {
        let map = Arc::new(Mapped::open(path)?);
        let damaged = |offset: usize, what: String| DataError::Damaged {
            path: path.into(),
            offset: offset as u64,
            what,
        };
        let buffer = arrow_buffer::Buffer::from(bytes::Bytes::from_owner(Owner(map.clone())));
        let (schema, batches) = if format == Format::ArrowFile {
            use arrow_ipc::reader::{FileDecoder, read_footer_length};
            let end = map.len();
            let short = || damaged(end, "the file is cut short: no Arrow footer".into());
            let trailer: [u8; 10] = map[end.checked_sub(10).ok_or_else(short)?..]
                .try_into()
                .map_err(|_| short())?;
            let footer_len = read_footer_length(trailer).map_err(|_| short())?;
            let at = (end - 10).checked_sub(footer_len).ok_or_else(short)?;
            let footer = arrow_ipc::root_as_footer(&map[at..end - 10])
                .map_err(|e| damaged(at, e.to_string()))?;
            let schema = footer
                .schema()
                .ok_or_else(|| damaged(at, "no schema".into()))?;
            let schema = Arc::new(
                arrow_ipc::convert::try_fb_to_schema(schema)
                    .map_err(|e| damaged(at, e.to_string()))?,
            );
            let mut decoder = FileDecoder::new(schema.clone(), footer.version());
            for block in footer.dictionaries().iter().flatten() {
                let data = slice(&buffer, block)
                    .ok_or_else(|| damaged(at, "a dictionary lies outside the file".into()))?;
                decoder
                    .read_dictionary(block, &data)
                    .map_err(|e| damaged(at, e.to_string()))?;
            }
            let blocks: Vec<arrow_ipc::Block> = footer
                .recordBatches()
                .map(|b| b.iter().copied().collect())
                .unwrap_or_default();
            (
                schema,
                Batches::File {
                    decoder,
                    buffer,
                    blocks,
                },
            )
        } else {
            let mut decoder = arrow_ipc::reader::StreamDecoder::new();
            let (mut rest, mut all) = (buffer.clone(), Vec::new());
            while let Some(batch) = decoder
                .decode(&mut rest)
                .map_err(|e| damaged(map.len() - rest.len(), e.to_string()))?
            {
                all.push(batch);
            }
            decoder
                .finish()
                .map_err(|e| damaged(map.len(), format!("the stream is cut short: {e}")))?;
            let schema = decoder
                .schema()
                .ok_or_else(|| damaged(0, "no schema".into()))?;
            (schema, Batches::Stream(all))
        };
        let column =
            find_column(&schema, columns).ok_or_else(|| missing_column(path, &schema, columns))?;
        let batchwise = schema.field(column).data_type().is_integer();
        let mut docs = Self {
            path: path.into(),
            column,
            batchwise,
            batches,
            ends: Vec::new(),
        };
        let (mut end, mut ends) = (0, Vec::new());
        for i in 0..docs.n_batches() {
            end += if batchwise { 1 } else { docs.rows_of(i)? };
            ends.push(end);
        }
        docs.ends = ends;
        Ok(docs)
    }

    fn n_batches(&self) -> usize {
        match &self.batches {
            Batches::File { blocks, .. } => blocks.len(),
            Batches::Stream(all) => all.len(),
        }
    }

    fn damaged(&self, batch: usize, what: String) -> DataError {
        let offset = match &self.batches {
            Batches::File { blocks, .. } => blocks[batch].offset() as u64,
            Batches::Stream(_) => 0,
        };
        DataError::Damaged {
            path: self.path.clone(),
            offset,
            what: format!("record batch {batch}: {what}"),
        }
    }

    /// Rows of batch `i`, from its header where it is not decoded.
    fn rows_of(&self, i: usize) -> Result<u64, DataError> {
        match &self.batches {
            Batches::Stream(all) => Ok(all[i].num_rows() as u64),
            Batches::File { .. } => Ok(self.batch(i)?.num_rows() as u64),
        }
    }

    fn batch(&self, i: usize) -> Result<RecordBatch, DataError> {
        match &self.batches {
            Batches::Stream(all) => Ok(all[i].clone()),
            Batches::File {
                decoder,
                buffer,
                blocks,
            } => {
                let outside = || self.damaged(i, "it lies outside the file".into());
                let data = slice(buffer, &blocks[i]).ok_or_else(outside)?;
                let batch = decoder
                    .read_record_batch(&blocks[i], &data)
                    .map_err(|e| self.damaged(i, e.to_string()))?;
                batch.ok_or_else(|| self.damaged(i, "it is empty".into()))
            }
        }
    }
}

fn slice(buffer: &arrow_buffer::Buffer, block: &arrow_ipc::Block) -> Option<arrow_buffer::Buffer> {
    let (offset, body, head) = (
        usize::try_from(block.offset()).ok()?,
        usize::try_from(block.bodyLength()).ok()?,
        usize::try_from(block.metaDataLength()).ok()?,
    );
    let len = body.checked_add(head)?;
    (offset.checked_add(len)? <= buffer.len()).then(|| buffer.slice_with_length(offset, len))
}

impl super::files::RawDocuments for ArrowDocs {
    fn n_docs(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    fn raw(&self, doc: u64) -> Result<Raw, DataError> {
        let i = self.ends.partition_point(|&end| end <= doc);
        let batch = self.batch(i)?;
        let column = batch.column(self.column);
        let made = if self.batchwise {
            integers(column).map(Raw::Tokens)
        } else {
            cell(column, (doc - (self.ends[i] - self.batch_rows(i))) as usize)
        };
        made.map_err(|e| self.damaged(i, e))
    }
}

impl ArrowDocs {
    fn batch_rows(&self, i: usize) -> u64 {
        self.ends[i] - if i == 0 { 0 } else { self.ends[i - 1] }
    }
}
