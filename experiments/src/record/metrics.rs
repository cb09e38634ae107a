//! `metrics.jsonl`: one JSON object per logged step, the truth about a run's curves.
//!
//! `{"step":10,"time":1763750000.5,"train/loss":2.31}`; values that are not finite are the strings `nan`, `inf`, `-inf`.
//! Two lines of one step are one step. A last line without its end (the process died in it) is no line.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::error::RecordError;
use super::goal::Goal;
use super::series::{Point, Series, SeriesMap};
use super::summary::loose::Loose;
use super::tags;

/// Longest line that is read; a log step of a model with thousands of layers stays far below.
const MAX_LINE_BYTES: u64 = 16 << 20;

/// Appends rows to a `metrics.jsonl`; the file only ever ends on a whole line, also after a failed write.
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
    good_len: u64,
    pending: Vec<u8>,
}

impl MetricsWriter {
    /// Opens the file for appending, creating it where missing, after dropping rows beyond `keep_to` (all rows where
    /// `None`) and a last line without end.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn open(path: &Path, keep_to: Option<u64>) -> Result<MetricsWriter, RecordError> {
        let io = |e| RecordError::from_io("open", path, e);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io)?;
        let good_len = match keep_to {
            None => 0,
            Some(step) => prefix_len(&file, path, step)?,
        };
        file.set_len(good_len).map_err(io)?;
        file.seek(SeekFrom::Start(good_len)).map_err(io)?;
        Ok(MetricsWriter {
            path: path.to_path_buf(),
            file,
            good_len,
            pending: Vec::new(),
        })
    }

    /// Adds a row; it is on disk after the next [`MetricsWriter::flush`].
    pub fn row(&mut self, step: u64, time: f64, values: &[(String, f64)]) {
        let mut object = serde_json::Map::new();
        object.insert("step".to_owned(), step.into());
        object.insert("time".to_owned(), (((time * 1e3).round()) / 1e3).into());
        for (tag, value) in values {
            // A `Loose` always has a JSON form.
            object.insert(
                tag.clone(),
                serde_json::to_value(Loose(*value)).unwrap_or(Value::Null),
            );
        }
        self.pending
            .extend_from_slice(Value::Object(object).to_string().as_bytes());
        self.pending.push(b'\n');
    }

    /// Writes the pending rows. After a failure the file ends where it ended before and the rows stay pending, so a
    /// later flush may still save them.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn flush(&mut self) -> Result<(), RecordError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        if let Err(e) = self.file.write_all(&self.pending) {
            // Should taking back fail as well, readers skip the half line and `open` cuts it.
            let _ = self.file.set_len(self.good_len);
            let _ = self.file.seek(SeekFrom::Start(self.good_len));
            return Err(RecordError::from_io("write", &self.path, e));
        }
        self.good_len += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    /// Makes what was flushed survive a crash of the machine; for use beside a checkpoint.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn sync(&mut self) -> Result<(), RecordError> {
        self.flush()?;
        self.file
            .sync_data()
            .map_err(|e| RecordError::from_io("write", &self.path, e))
    }
}

/// Length of the longest prefix of whole lines none of which lies beyond `step`.
fn prefix_len(file: &File, path: &Path, step: u64) -> Result<u64, RecordError> {
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    let mut len = 0;
    while next_line(&mut reader, &mut line).map_err(|e| RecordError::from_io("read", path, e))? {
        if line.last() != Some(&b'\n') {
            break;
        }
        // A damaged line in the middle stays: dropping what follows it would lose good rows.
        if parse_row(&line).is_ok_and(|(s, _, _)| s > step) {
            break;
        }
        len += line.len() as u64;
    }
    Ok(len)
}

fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<bool> {
    use std::io::Read;
    line.clear();
    reader
        .by_ref()
        .take(MAX_LINE_BYTES)
        .read_until(b'\n', line)?;
    Ok(!line.is_empty())
}

type Row = (u64, f64, Vec<(String, f64)>);

fn parse_row(line: &[u8]) -> Result<Row, String> {
    let object: serde_json::Map<String, Value> =
        serde_json::from_slice(line).map_err(|e| e.to_string())?;
    let step = object
        .get("step")
        .and_then(Value::as_u64)
        .ok_or("no \"step\"")?;
    let time = object.get("time").and_then(Value::as_f64).unwrap_or(0.0);
    let mut values = Vec::with_capacity(object.len());
    for (tag, value) in object {
        if tag == "step" || tag == "time" {
            continue;
        }
        // Anything but a number is another tool's addition and no metric.
        if let Ok(Loose(v)) = serde_json::from_value(value) {
            values.push((tag, v));
        }
    }
    Ok((step, time, values))
}

/// What [`read_metrics`] found.
#[derive(Debug, Default)]
pub struct MetricsLog {
    /// All series by tag.
    pub series: SeriesMap,
    /// Lines that could not be read, in words.
    pub warnings: Vec<String>,
}

/// Reads a `metrics.jsonl`, keeping at most `max_points` per tag. Damaged lines become warnings.
///
/// # Errors
/// The file cannot be read at all.
pub fn read_metrics(path: &Path, max_points: usize) -> Result<MetricsLog, RecordError> {
    let io = |e| RecordError::from_io("read", path, e);
    let mut reader = BufReader::new(File::open(path).map_err(io)?);
    let mut log = MetricsLog::default();
    let mut line = Vec::new();
    let mut number = 0u64;
    while next_line(&mut reader, &mut line).map_err(io)? {
        number += 1;
        let whole = line.last() == Some(&b'\n');
        match parse_row(&line) {
            Ok((step, time, values)) => {
                for (tag, value) in values {
                    let step = i64::try_from(step).unwrap_or(i64::MAX);
                    log.series
                        .entry(tag)
                        .or_insert_with(|| Series::with_capacity_limit(max_points))
                        .push(Point { step, time, value });
                }
            }
            Err(_) if !whole => {
                log.warnings.push(format!(
                    "{}: line {number} is cut short (still being written?)",
                    path.display()
                ));
            }
            Err(e) if log.warnings.len() < 20 => {
                log.warnings.push(format!(
                    "{}: line {number} was skipped: {e}",
                    path.display()
                ));
            }
            Err(_) => {}
        }
    }
    Ok(log)
}

/// What a run's summary takes from its curves, see [`curve_facts`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CurveFacts {
    /// Last value of each tag.
    pub finals: BTreeMap<String, f64>,
    /// Best value of each tag whose direction is known, NaN left out.
    pub bests: BTreeMap<String, f64>,
    /// Median of `perf/tokens_per_sec` over the log intervals; 0 where there is none.
    pub tokens_per_sec: f64,
}

/// Reads final and best values and the median speed from a flushed `metrics.jsonl`, also what was written before a resume.
///
/// # Errors
/// The file cannot be read.
pub fn curve_facts(path: &Path) -> Result<CurveFacts, RecordError> {
    let log = read_metrics(path, usize::MAX)?;
    let mut facts = CurveFacts::default();
    for (tag, series) in &log.series {
        if let Some(last) = series.last() {
            facts.finals.insert(tag.clone(), last.value);
        }
        let Some(goal) = Goal::of_tag(tag) else {
            continue;
        };
        let values = series.points().map(|p| p.value).filter(|v| !v.is_nan());
        if let Some(best) = values.reduce(|a, b| if goal.better(b, a) { b } else { a }) {
            facts.bests.insert(tag.clone(), best);
        }
    }
    if let Some(series) = log.series.get(tags::TOKENS_PER_SEC) {
        let mut speeds: Vec<f64> = series
            .points()
            .map(|p| p.value)
            .filter(|v| v.is_finite())
            .collect();
        speeds.sort_by(f64::total_cmp);
        facts.tokens_per_sec = speeds.get(speeds.len() / 2).copied().unwrap_or(0.0);
    }
    Ok(facts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(path: &Path) -> Vec<i64> {
        read_metrics(path, 1000).unwrap().series["a"]
            .points()
            .map(|p| p.step)
            .collect()
    }

    fn write(path: &Path, keep_to: Option<u64>, range: std::ops::RangeInclusive<u64>) {
        let mut w = MetricsWriter::open(path, keep_to).unwrap();
        range.for_each(|s| {
            w.row(
                s,
                0.5,
                &[("a".into(), s as f64 / 3.0), ("nan".into(), f64::NAN)],
            )
        });
        w.flush().unwrap();
    }

    #[test]
    fn resume_drops_what_lies_beyond_and_a_cut_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        write(&path, None, 1..=10);
        OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"step\":11,\"a")
            .unwrap();
        assert_eq!(read_metrics(&path, 1000).unwrap().warnings.len(), 1);
        write(&path, Some(7), 8..=9);
        assert_eq!(steps(&path), (1..=9).collect::<Vec<_>>());
        // The reader would hide a step that is there twice; the file must not have it.
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 9);
        let log = read_metrics(&path, 1000).unwrap();
        assert!(log.warnings.is_empty());
        assert_eq!(log.series["a"].last().unwrap().value, 3.0);
        assert!(log.series["nan"].points().all(|p| p.value.is_nan()));
        write(&path, None, 1..=2);
        assert_eq!(steps(&path), [1, 2]);
    }

    #[test]
    fn a_damaged_line_costs_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        write(&path, None, 1..=2);
        OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"\xff\xfe}{\n")
            .unwrap();
        write(&path, Some(99), 3..=4);
        assert_eq!(steps(&path), [1, 2, 3, 4]);
        assert_eq!(read_metrics(&path, 1000).unwrap().warnings.len(), 1);
    }

    #[test]
    fn a_failed_flush_keeps_the_rows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut w = MetricsWriter::open(&path, None).unwrap();
        w.row(1, 0.0, &[("a".into(), 1.0)]);
        w.flush().unwrap();
        let good = std::mem::replace(
            &mut w.file,
            OpenOptions::new().write(true).open("/dev/full").unwrap(),
        );
        w.row(2, 0.0, &[("a".into(), 2.0)]);
        assert!(matches!(w.flush(), Err(RecordError::DiskFull { .. })));
        w.file = good;
        w.flush().unwrap();
        assert_eq!(steps(&path), [1, 2]);
    }

    #[test]
    fn facts_of_curves() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut w = MetricsWriter::open(&path, None).unwrap();
        for (step, loss) in [(1, 3.0), (2, 1.0), (3, f64::NAN)] {
            let speed = 100.0 * step as f64;
            let row = [
                ("train/loss", loss),
                ("train/lr", 0.1),
                (tags::TOKENS_PER_SEC, speed),
            ];
            w.row(step, 0.0, &row.map(|(t, v)| (t.to_owned(), v)));
        }
        w.flush().unwrap();
        let facts = curve_facts(&path).unwrap();
        assert!(facts.finals["train/loss"].is_nan());
        assert_eq!(
            (facts.bests["train/loss"], facts.tokens_per_sec),
            (1.0, 200.0)
        );
        assert!(!facts.bests.contains_key("train/lr") && facts.finals["train/lr"] == 0.1);
    }
}
