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
use super::series::{Point, Series, SeriesMap};

/// The messages of TensorFlow's `event.proto`, `summary.proto` and `tensor.proto`, as far as they are read here.
mod proto {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Event {
        #[prost(double, tag = "1")]
        pub(super) wall_time: f64,
        #[prost(int64, tag = "2")]
        pub(super) step: i64,
        #[prost(string, optional, tag = "3")]
        pub(super) file_version: Option<String>,
        #[prost(message, optional, tag = "5")]
        pub(super) summary: Option<Summary>,
        #[prost(message, optional, tag = "7")]
        pub(super) session_log: Option<SessionLog>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct SessionLog {
        /// 1 is START.
        #[prost(int32, tag = "1")]
        pub(super) status: i32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Summary {
        #[prost(message, repeated, tag = "1")]
        pub(super) value: Vec<Value>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Value {
        #[prost(string, tag = "1")]
        pub(super) tag: String,
        #[prost(float, optional, tag = "2")]
        pub(super) simple_value: Option<f32>,
        #[prost(message, optional, tag = "5")]
        pub(super) histo: Option<Histo>,
        #[prost(message, optional, tag = "8")]
        pub(super) tensor: Option<Tensor>,
        #[prost(message, optional, tag = "9")]
        pub(super) metadata: Option<Metadata>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Metadata {
        #[prost(message, optional, tag = "1")]
        pub(super) plugin_data: Option<PluginData>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct PluginData {
        #[prost(string, tag = "1")]
        pub(super) plugin_name: String,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) content: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Histo {
        #[prost(double, tag = "1")]
        pub(super) min: f64,
        #[prost(double, tag = "2")]
        pub(super) max: f64,
        #[prost(double, tag = "3")]
        pub(super) num: f64,
        #[prost(double, tag = "4")]
        pub(super) sum: f64,
        #[prost(double, tag = "5")]
        pub(super) sum_squares: f64,
        #[prost(double, repeated, tag = "6")]
        pub(super) bucket_limit: Vec<f64>,
        #[prost(double, repeated, tag = "7")]
        pub(super) bucket: Vec<f64>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Tensor {
        #[prost(int32, tag = "1")]
        pub(super) dtype: i32,
        #[prost(message, optional, tag = "2")]
        pub(super) tensor_shape: Option<Shape>,
        #[prost(bytes = "vec", tag = "4")]
        pub(super) tensor_content: Vec<u8>,
        #[prost(float, repeated, tag = "5")]
        pub(super) float_val: Vec<f32>,
        #[prost(double, repeated, tag = "6")]
        pub(super) double_val: Vec<f64>,
        #[prost(int32, repeated, tag = "7")]
        pub(super) int_val: Vec<i32>,
        #[prost(bytes = "vec", repeated, tag = "8")]
        pub(super) string_val: Vec<Vec<u8>>,
        #[prost(int64, repeated, tag = "10")]
        pub(super) int64_val: Vec<i64>,
        #[prost(int32, repeated, tag = "13")]
        pub(super) half_val: Vec<i32>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Shape {
        #[prost(message, repeated, tag = "2")]
        pub(super) dim: Vec<Dim>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Dim {
        #[prost(int64, tag = "1")]
        pub(super) size: i64,
    }
}

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

/// A histogram as read: `limits[i]` is the upper border of `counts[i]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ReadHistogram {
    /// Training step.
    pub step: i64,
    /// Smallest value.
    pub min: f64,
    /// Largest value.
    pub max: f64,
    /// Number of values.
    pub num: f64,
    /// Sum of the values.
    pub sum: f64,
    /// Sum of their squares.
    pub sum_squares: f64,
    /// Upper borders of the buckets.
    pub limits: Vec<f64>,
    /// Values in each bucket.
    pub counts: Vec<f64>,
}

/// Everything read from the event files of one run.
#[derive(Debug, Default)]
pub struct EventLog {
    /// Scalars by tag, whether written as `simple_value` or as a tensor of one element.
    pub scalars: SeriesMap,
    /// The last histogram of each tag.
    pub histograms: BTreeMap<String, ReadHistogram>,
    /// The last text of each tag.
    pub texts: BTreeMap<String, String>,
    /// Content of plugin data by tag (hparams and the like), undecoded.
    pub plugins: BTreeMap<String, Vec<u8>>,
    /// Events read.
    pub n_events: u64,
    /// What was wrong; at most 50 per file.
    pub warnings: Vec<ReadWarning>,
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
        log.histograms.retain(|_, h| h.step < step);
    }
    let mut fits = true;
    for value in event.summary.into_iter().flat_map(|s| s.value) {
        let tag = value.tag;
        let n_tags = log.scalars.len() + log.histograms.len() + log.texts.len() + log.plugins.len();
        let known = log.scalars.contains_key(&tag)
            || log.histograms.contains_key(&tag)
            || log.texts.contains_key(&tag)
            || log.plugins.contains_key(&tag);
        if n_tags >= limits.max_tags && !known {
            fits = false;
            continue;
        }
        let plugin = value.metadata.and_then(|m| m.plugin_data);
        let is = |name: &str| plugin.as_ref().is_some_and(|p| p.plugin_name == name);
        if let Some(h) = value.histo {
            let h = ReadHistogram {
                step,
                min: h.min,
                max: h.max,
                num: h.num,
                sum: h.sum,
                sum_squares: h.sum_squares,
                limits: h.bucket_limit,
                counts: h.bucket,
            };
            log.histograms.insert(tag, h);
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
            || (plugin.is_none() && value.tensor.as_ref().is_some_and(|t| t.dtype == DT_STRING))
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
            log.plugins.insert(tag, p.content.clone());
        } else if let Some(v) = value.tensor.as_ref().and_then(scalar_of) {
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

fn push(log: &mut EventLog, tag: String, limits: &ReadLimits, point: Point) {
    log.scalars
        .entry(tag)
        .or_insert_with(|| Series::with_capacity_limit(limits.max_points))
        .push(point);
}

/// Numbers of TensorFlow's `types.proto`.
const DT_FLOAT: i32 = 1;
const DT_DOUBLE: i32 = 2;
const DT_INT32: i32 = 3;
const DT_STRING: i32 = 7;
const DT_INT64: i32 = 9;
const DT_BFLOAT16: i32 = 14;
const DT_HALF: i32 = 19;

/// The number in a tensor of one element, however it is stored.
fn scalar_of(t: &proto::Tensor) -> Option<f64> {
    let n = t
        .tensor_shape
        .iter()
        .flat_map(|s| &s.dim)
        .try_fold(1i64, |n, d| n.checked_mul(d.size))?;
    if n != 1 {
        return None;
    }
    let raw = t.tensor_content.as_slice();
    match t.dtype {
        DT_FLOAT => t
            .float_val
            .first()
            .copied()
            .or_else(|| raw.try_into().ok().map(f32::from_le_bytes))
            .map(f64::from),
        DT_DOUBLE => t
            .double_val
            .first()
            .copied()
            .or_else(|| raw.try_into().ok().map(f64::from_le_bytes)),
        DT_INT32 => t
            .int_val
            .first()
            .copied()
            .or_else(|| raw.try_into().ok().map(i32::from_le_bytes))
            .map(f64::from),
        DT_INT64 => t
            .int64_val
            .first()
            .copied()
            .or_else(|| raw.try_into().ok().map(i64::from_le_bytes))
            .map(|v| v as f64),
        DT_HALF | DT_BFLOAT16 => {
            let bits = t
                .half_val
                .first()
                .map(|&v| v as u16)
                .or_else(|| raw.try_into().ok().map(u16::from_le_bytes))?;
            Some(if t.dtype == DT_BFLOAT16 {
                f64::from(f32::from_bits(u32::from(bits) << 16))
            } else {
                half(bits)
            })
        }
        _ => None,
    }
}

/// IEEE 754 binary16.
fn half(bits: u16) -> f64 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let exponent = i32::from(bits >> 10 & 0x1f);
    let fraction = f64::from(bits & 0x3ff);
    sign * match exponent {
        0 => fraction * 2f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1.0 + fraction / 1024.0) * 2f64.powi(exponent - 15),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::events::{EventFile, HParam, LayoutChart};
    use crate::record::histogram::Histogram;
    use crate::record::summary::RunState;
    use proptest::prelude::*;

    const N: u64 = 50;

    /// A file with one of everything, as bytes.
    fn sample() -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let mut f = EventFile::create_new(dir.path()).unwrap();
        let metric = ["eval/accuracy".to_owned()];
        f.session_start(
            1.0,
            "g",
            &[
                ("lr".into(), HParam::Number(1e-3)),
                ("on".into(), HParam::Flag(true)),
            ],
            &metric,
        )
        .unwrap();
        let chart = LayoutChart {
            category: "c".into(),
            title: "t".into(),
            tags: vec!["train/.*".into()],
        };
        f.layout(1.0, &[chart]).unwrap();
        f.text(0, 1.0, "run/ron", "Model(d_model: 8) // Größe")
            .unwrap();
        for step in 0..N {
            let x = step as f64;
            f.scalars(
                step,
                x,
                [
                    ("train/loss", x / 2.0),
                    ("größe/../x", f64::NAN),
                    ("inf", f64::INFINITY),
                ],
            )
            .unwrap();
        }
        f.histogram(3, 4.0, "act/h", &Histogram::of(&[1.0, 2.0, -3.0]))
            .unwrap();
        f.session_end(9.0, RunState::Finished).unwrap();
        f.flush().unwrap();
        std::fs::read(f.path()).unwrap()
    }

    fn read(bytes: &[u8]) -> EventLog {
        let mut log = EventLog::default();
        read_stream(bytes, Path::new("f"), &ReadLimits::default(), &mut log);
        log
    }

    #[test]
    fn reads_back_all_that_is_written() {
        let log = read(&sample());
        assert!(log.warnings.is_empty(), "{:?}", log.warnings);
        let loss: Vec<Point> = log.scalars["train/loss"].points().collect();
        assert_eq!(loss.len() as u64, N);
        assert_eq!((loss[7].step, loss[7].time, loss[7].value), (7, 7.0, 3.5));
        assert!(log.scalars["größe/../x"].points().all(|p| p.value.is_nan()));
        assert_eq!(log.scalars["inf"].last().unwrap().value, f64::INFINITY);
        let h = &log.histograms["act/h"];
        assert_eq!(
            (h.num, h.sum, h.min, h.max, h.step),
            (3.0, 0.0, -3.0, 2.0, 3)
        );
        assert_eq!(h.counts.iter().sum::<f64>(), 3.0);
        assert_eq!(log.texts["run/ron"], "Model(d_model: 8) // Größe");
        for tag in [
            "_hparams_/experiment",
            "_hparams_/session_start_info",
            "_hparams_/session_end_info",
        ] {
            assert!(!log.plugins[tag].is_empty(), "{tag}");
        }
        assert!(log.plugins.contains_key("custom_scalars__config__"));
    }

    #[test]
    fn two_writers_of_one_second_do_not_meet() {
        let dir = tempfile::tempdir().unwrap();
        for tag in ["a", "b"] {
            let mut f = EventFile::create_new(dir.path()).unwrap();
            f.scalars(1, 0.0, [(tag, 1.0)]).unwrap();
            f.flush().unwrap();
        }
        let log = read_dir(dir.path(), &ReadLimits::default()).unwrap();
        assert_eq!(log.scalars.keys().collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn a_restart_voids_later_steps_of_earlier_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut f = EventFile::create_new(dir.path()).unwrap();
        (1..=10).for_each(|s| f.scalars(s, 0.0, [("a", 1.0)]).unwrap());
        f.scalars(9, 0.0, [("only late", 1.0)]).unwrap();
        f.flush().unwrap();
        let mut f = EventFile::create_new(dir.path()).unwrap();
        f.restart(6, 0.0).unwrap();
        f.scalars(6, 0.0, [("a", 2.0)]).unwrap();
        f.flush().unwrap();
        let log = read_dir(dir.path(), &ReadLimits::default()).unwrap();
        assert_eq!(
            log.scalars["a"]
                .points()
                .map(|p| p.step)
                .collect::<Vec<_>>(),
            [1, 2, 3, 4, 5, 6]
        );
        assert_eq!(log.scalars["a"].last().unwrap().value, 2.0);
        assert!(!log.scalars.contains_key("only late"));
    }

    fn framed(event: &proto::Event) -> Vec<u8> {
        let mut out = Vec::new();
        tensorboard_rs::record_writer::RecordWriter::new(&mut out)
            .write(&event.encode_to_vec())
            .unwrap();
        out
    }

    fn tensor_event(tensor: proto::Tensor) -> proto::Event {
        let value = proto::Value {
            tag: "t".into(),
            tensor: Some(tensor),
            ..Default::default()
        };
        proto::Event {
            step: 1,
            summary: Some(proto::Summary { value: vec![value] }),
            ..Default::default()
        }
    }

    #[test]
    fn scalars_of_other_writers_come_as_tensors() {
        let t = |dtype| proto::Tensor {
            dtype,
            ..Default::default()
        };
        let cases = [
            proto::Tensor {
                float_val: vec![1.5],
                ..t(DT_FLOAT)
            },
            proto::Tensor {
                tensor_content: 1.5f32.to_le_bytes().to_vec(),
                ..t(DT_FLOAT)
            },
            proto::Tensor {
                double_val: vec![1.5],
                ..t(DT_DOUBLE)
            },
            proto::Tensor {
                tensor_content: 1.5f64.to_le_bytes().to_vec(),
                ..t(DT_DOUBLE)
            },
            proto::Tensor {
                half_val: vec![0x3e00],
                ..t(DT_HALF)
            },
            proto::Tensor {
                half_val: vec![0x3fc0],
                ..t(DT_BFLOAT16)
            },
        ];
        for tensor in cases {
            let log = read(&framed(&tensor_event(tensor.clone())));
            assert_eq!(
                log.scalars["t"].last().map(|p| p.value),
                Some(1.5),
                "{tensor:?}"
            );
        }
        let shape = proto::Shape {
            dim: vec![proto::Dim { size: i64::MAX }, proto::Dim { size: 3 }],
        };
        let wide = proto::Tensor {
            tensor_shape: Some(shape),
            float_val: vec![1.0],
            ..t(DT_FLOAT)
        };
        assert!(read(&framed(&tensor_event(wide))).scalars.is_empty());
    }

    #[test]
    fn a_large_record_is_skipped_and_what_follows_is_read() {
        let text = proto::Tensor {
            dtype: DT_STRING,
            string_val: vec![vec![b'x'; 5000]],
            ..Default::default()
        };
        let mut bytes = framed(&tensor_event(text));
        let small = proto::Tensor {
            dtype: DT_FLOAT,
            float_val: vec![2.0],
            ..Default::default()
        };
        bytes.extend(framed(&tensor_event(small)));
        let mut log = EventLog::default();
        let limits = ReadLimits {
            max_record_bytes: 1000,
            ..ReadLimits::default()
        };
        read_stream(bytes.as_slice(), Path::new("f"), &limits, &mut log);
        assert!(matches!(
            log.warnings[..],
            [ReadWarning {
                offset: 0,
                problem: Problem::TooLarge(_),
                ..
            }]
        ));
        assert_eq!(log.scalars["t"].last().unwrap().value, 2.0);
    }

    #[test]
    fn tags_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let mut f = EventFile::create_new(dir.path()).unwrap();
        let tags: Vec<String> = (0..20).map(|i| i.to_string()).collect();
        f.scalars(1, 0.0, tags.iter().map(|t| (t.as_str(), 1.0)))
            .unwrap();
        f.flush().unwrap();
        let mut log = EventLog::default();
        read_file(
            f.path(),
            &ReadLimits {
                max_tags: 5,
                ..ReadLimits::default()
            },
            &mut log,
        );
        assert_eq!(log.scalars.len(), 5);
        assert_eq!(log.warnings[0].problem, Problem::TooManyTags);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn a_cut_file_gives_its_whole_records(cut in 0usize..10_000) {
            let bytes = sample();
            let cut = cut % bytes.len();
            let (log, whole) = (read(&bytes[..cut]), read(&bytes));
            prop_assert!(log.n_events <= whole.n_events);
            prop_assert!(log.warnings.len() <= 1);
            for (tag, series) in &log.scalars {
                let all: Vec<i64> = whole.scalars[tag].points().map(|p| p.step).collect();
                let some: Vec<i64> = series.points().map(|p| p.step).collect();
                prop_assert_eq!(&all[..some.len()], &some[..]);
            }
        }

        #[test]
        fn a_flipped_bit_is_noticed(at in 0usize..100_000, bit in 0u8..8) {
            let mut bytes = sample();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let log = read(&bytes);
            prop_assert_eq!(log.warnings.len(), 1);
            prop_assert!(log.warnings[0].offset <= at as u64);
        }

        #[test]
        fn garbage_is_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            read(&bytes);
            let mut framed = Vec::new();
            tensorboard_rs::record_writer::RecordWriter::new(&mut framed).write(&bytes).unwrap();
            read(&framed);
        }
    }
}
