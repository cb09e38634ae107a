//! TensorBoard event files, read: of any writer, complete, cut short, damaged or still growing.
//!
//! Memory is bounded: one record at a time, series thinned beyond a number of points. Whatever is wrong with a file is a
//! value in the result, with the offset; nothing in a file can make the reader panic or fail.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use prost::Message;

use super::error::RecordError;
use super::histogram::Histogram;
use super::series::{Point, Series, SeriesMap};

mod proto;
mod tensor;

/// Bounds of the reader.
#[derive(Debug, Clone, Copy)]
pub struct ReadLimits {
    /// Larger records (graphs, audio) are skipped without being held.
    pub max_record_bytes: u64,
    /// Points kept per tag; beyond that the series is thinned.
    pub max_points: usize,
    /// Tags kept; further ones are dropped with a warning.
    pub max_tags: usize,
}

impl Default for ReadLimits {
    fn default() -> ReadLimits {
        ReadLimits {
            max_record_bytes: 64 << 20,
            max_points: 20_000,
            max_tags: 50_000,
        }
    }
}

/// Something that is wrong with an event file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: at byte {offset}: {problem}", path.display())]
pub struct ReadWarning {
    /// The file.
    pub path: PathBuf,
    /// Start of the record concerned.
    pub offset: u64,
    /// What is wrong with it.
    pub problem: Problem,
}

/// Kinds of damage.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The file ends inside a record: cut short, or still being written.
    #[error("the file ends inside a record (cut short, or still being written)")]
    Truncated,
    /// The length of a record fails its checksum: nothing behind it can be found.
    #[error("the length of a record fails its checksum; the rest of the file was not read")]
    BadLength,
    /// The content of a record fails its checksum: it was skipped.
    #[error("a record fails its checksum and was skipped")]
    BadChecksum,
    /// The content is not an event: it was skipped.
    #[error("a record is not an event and was skipped")]
    NotAnEvent,
    /// A record above the size limit: it was skipped.
    #[error("a record of {0} bytes is above the size limit and was skipped")]
    TooLarge(u64),
    /// Too many different tags.
    #[error("more tags than the limit; further ones were dropped")]
    TooManyTags,
    /// The system could not read on.
    #[error("the rest could not be read: {0}")]
    Io(String),
}

/// Everything read from the event files of one run.
#[derive(Debug, Default)]
pub struct EventLog {
    /// Scalars by tag, whether written as `simple_value` or as a tensor of one element.
    pub scalars: SeriesMap,
    /// The last histogram of each tag, with its step.
    pub histograms: BTreeMap<String, (i64, Histogram)>,
    /// The last text of each tag.
    pub texts: BTreeMap<String, String>,
    /// Hyper-parameters of the session, as text, whoever wrote them.
    pub hparams: BTreeMap<String, String>,
    /// Content of plugin data by tag (hparams and the like), undecoded.
    pub plugins: BTreeMap<String, Vec<u8>>,
    /// Events read.
    pub n_events: u64,
    /// What was wrong; at most 50 per file.
    pub warnings: Vec<ReadWarning>,
}

impl EventLog {
    fn n_tags(&self) -> usize {
        self.scalars.len() + self.histograms.len() + self.texts.len() + self.plugins.len()
    }

    fn knows(&self, tag: &str) -> bool {
        self.scalars.contains_key(tag)
            || self.histograms.contains_key(tag)
            || self.texts.contains_key(tag)
            || self.plugins.contains_key(tag)
    }
}

/// Whether a file name is that of an event file, whoever wrote it.
pub fn is_event_file(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|n| n.to_string_lossy().contains("tfevents"))
}

/// The event files directly in `dir`, oldest first (their names begin with the time).
///
/// # Errors
/// The folder cannot be read.
pub fn event_files(dir: &Path) -> Result<Vec<PathBuf>, RecordError> {
    let io = |e| RecordError::from_io("read", dir, e);
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if is_event_file(&path) && path.is_file() {
            files.push(path);
        }
    }
    // By time, then by the trailing serial number of one process; plain text order would put 10 before 9.
    files.sort_by_key(|p| {
        let name = p
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let after = name
            .rsplit("tfevents.")
            .next()
            .unwrap_or_default()
            .to_owned();
        let secs: u64 = after
            .split('.')
            .next()
            .and_then(|s| s.parse().ok())
            .unwrap_or(0);
        let serial: u64 = after
            .rsplit('.')
            .next()
            .and_then(|s| s.parse().ok())
            .unwrap_or(0);
        (secs, serial, name)
    });
    Ok(files)
}

/// Reads all event files directly in `dir` as one run.
///
/// # Errors
/// The folder cannot be listed. Files that cannot be opened are warnings.
pub fn read_dir(dir: &Path, limits: &ReadLimits) -> Result<EventLog, RecordError> {
    let mut log = EventLog::default();
    for path in event_files(dir)? {
        read_file(&path, limits, &mut log);
    }
    Ok(log)
}

/// Reads one event file into `log`.
pub fn read_file(path: &Path, limits: &ReadLimits, log: &mut EventLog) {
    match File::open(path) {
        Ok(file) => read_stream(BufReader::with_capacity(1 << 16, file), path, limits, log),
        Err(e) => log.warnings.push(ReadWarning {
            path: path.to_path_buf(),
            offset: 0,
            problem: Problem::Io(e.to_string()),
        }),
    }
}

/// Reads events from any stream; `path` only names it in warnings.
pub fn read_stream(mut reader: impl Read, path: &Path, limits: &ReadLimits, log: &mut EventLog) {
    let mut offset = 0u64;
    let mut record = Vec::new();
    let mut n_warnings = 0;
    let mut warn = |log: &mut EventLog, offset, problem| {
        n_warnings += 1;
        if n_warnings <= 50 {
            log.warnings.push(ReadWarning {
                path: path.to_path_buf(),
                offset,
                problem,
            });
        }
    };
    loop {
        match next_record(&mut reader, limits, &mut record) {
            Ok(Next::End) => return,
            Ok(Next::Record { bytes }) => {
                match proto::Event::decode(record.as_slice()) {
                    Ok(event) => {
                        if !take_event(event, limits, log) {
                            warn(log, offset, Problem::TooManyTags);
                        }
                    }
                    Err(_) => warn(log, offset, Problem::NotAnEvent),
                }
                offset += bytes;
            }
            Ok(Next::Skipped { bytes, problem }) => {
                warn(log, offset, problem);
                offset += bytes;
            }
            Err(problem) => return warn(log, offset, problem),
        }
    }
}

enum Next {
    End,
    Record { bytes: u64 },
    Skipped { bytes: u64, problem: Problem },
}

/// Bytes of a record beside its content: length, checksum of the length, checksum of the content.
const FRAME_BYTES: u64 = 16;

fn next_record(
    reader: &mut impl Read,
    limits: &ReadLimits,
    record: &mut Vec<u8>,
) -> Result<Next, Problem> {
    let mut head = [0u8; 12];
    match read_up_to(reader, &mut head)? {
        0 => return Ok(Next::End),
        12 => {}
        _ => return Err(Problem::Truncated),
    }
    let (len_bytes, crc) = head.split_at(8);
    if masked_crc(len_bytes).to_le_bytes() != crc {
        return Err(Problem::BadLength);
    }
    let len = u64::from_le_bytes([
        head[0], head[1], head[2], head[3], head[4], head[5], head[6], head[7],
    ]);
    let bytes = len.saturating_add(FRAME_BYTES);
    if len > limits.max_record_bytes {
        let skipped = io::copy(&mut reader.take(len.saturating_add(4)), &mut io::sink());
        return match skipped {
            Ok(n) if n == len.saturating_add(4) => Ok(Next::Skipped {
                bytes,
                problem: Problem::TooLarge(len),
            }),
            Ok(_) => Err(Problem::Truncated),
            Err(e) => Err(Problem::Io(e.to_string())),
        };
    }
    // `take` grows the buffer by what is there, so a long length in a short file costs nothing.
    record.clear();
    reader
        .take(len)
        .read_to_end(record)
        .map_err(|e| Problem::Io(e.to_string()))?;
    let mut crc = [0u8; 4];
    if record.len() as u64 != len || read_up_to(reader, &mut crc)? != 4 {
        return Err(Problem::Truncated);
    }
    if masked_crc(record).to_le_bytes() != crc {
        return Ok(Next::Skipped {
            bytes,
            problem: Problem::BadChecksum,
        });
    }
    Ok(Next::Record { bytes })
}

fn read_up_to(reader: &mut impl Read, buf: &mut [u8]) -> Result<usize, Problem> {
    let mut n = 0;
    while n < buf.len() {
        match reader.read(&mut buf[n..]) {
            Ok(0) => break,
            Ok(k) => n += k,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Problem::Io(e.to_string())),
        }
    }
    Ok(n)
}

/// CRC32C, rotated and offset as TFRecord does (tensorflow/core/lib/hash/crc32c.h).
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// Files an event; false where a new tag was dropped for the limit.
fn take_event(event: proto::Event, limits: &ReadLimits, log: &mut EventLog) -> bool {
    log.n_events += 1;
    let (step, time) = (event.step, event.wall_time);
    if event.session_log.is_some_and(|s| s.status == 1) {
        log.scalars.values_mut().for_each(|s| s.purge_from(step));
        log.scalars.retain(|_, s| !s.is_empty());
        log.histograms.retain(|_, (at, _)| *at < step);
    }
    let mut fits = true;
    for value in event.summary.into_iter().flat_map(|s| s.value) {
        let tag = value.tag;
        if log.n_tags() >= limits.max_tags && !log.knows(&tag) {
            fits = false;
            continue;
        }
        let plugin = value.metadata.and_then(|m| m.plugin_data);
        let is = |name: &str| plugin.as_ref().is_some_and(|p| p.plugin_name == name);
        if let Some(h) = value.histo {
            let h = Histogram {
                min: h.min,
                max: h.max,
                num: h.num,
                sum: h.sum,
                sum_squares: h.sum_squares,
                limits: h.bucket_limit,
                counts: h.bucket,
                non_finite: 0,
            };
            log.histograms.insert(tag, (step, h));
        } else if let Some(v) = value.simple_value {
            push(
                log,
                tag,
                limits,
                Point {
                    step,
                    time,
                    value: f64::from(v),
                },
            );
        } else if is("text")
            || (plugin.is_none()
                && value
                    .tensor
                    .as_ref()
                    .is_some_and(|t| t.dtype == tensor::DT_STRING))
        {
            let text = value
                .tensor
                .into_iter()
                .flat_map(|t| t.string_val)
                .next()
                .unwrap_or_default();
            log.texts
                .insert(tag, String::from_utf8_lossy(&text).into_owned());
        } else if let Some(p) = plugin
            .as_ref()
            .filter(|p| p.plugin_name != "scalars" && !p.plugin_name.is_empty())
        {
            if p.plugin_name == "hparams" {
                log.hparams.extend(hparams(&p.content));
            }
            log.plugins.insert(tag, p.content.clone());
        } else if let Some(v) = value.tensor.as_ref().and_then(tensor::scalar) {
            // Only the first event of a tag carries the plugin's name, so a tensor of one number is taken as a scalar
            // whether or not it is named again, unless the tag is known to be something else.
            if !log.plugins.contains_key(&tag) && !log.texts.contains_key(&tag) {
                push(
                    log,
                    tag,
                    limits,
                    Point {
                        step,
                        time,
                        value: v,
                    },
                );
            }
        }
    }
    fits
}

/// The hyper-parameters in the plugin's data at the start of a session; none in its other data, or in what is not its data.
fn hparams(content: &[u8]) -> BTreeMap<String, String> {
    let start = proto::HParams::decode(content)
        .ok()
        .and_then(|d| d.session_start_info);
    let text = |v: proto::HParam| match (v.string_value, v.number_value, v.bool_value) {
        (Some(text), _, _) => text,
        (_, Some(number), _) => number.to_string(),
        (_, _, Some(flag)) => flag.to_string(),
        _ => String::new(),
    };
    let values = start.into_iter().flat_map(|s| s.hparams);
    values.map(|(name, v)| (name, text(v))).collect()
}

fn push(log: &mut EventLog, tag: String, limits: &ReadLimits, point: Point) {
    log.scalars
        .entry(tag)
        .or_insert_with(|| Series::with_capacity_limit(limits.max_points))
        .push(point);
}

#[cfg(test)]
mod tests;
