//! What the training loop writes to: `metrics.jsonl`, and event files beside it.

use super::error::RecordError;
use super::events::{EventFile, HParam, LayoutChart};
use super::files::unix_now;
use super::histogram::Histogram;
use super::metrics::MetricsWriter;
use super::run_dir::RunDir;
use super::summary::RunState;

/// Records one run. Errors of `metrics.jsonl` are returned; a failing event file is given up with a warning, since it
/// only repeats what `metrics.jsonl` holds and must not end a training run.
pub struct Recorder {
    metrics: MetricsWriter,
    events: Option<EventFile>,
    warning: Option<RecordError>,
    row: Option<Row>,
    last_step: Option<u64>,
}

struct Row {
    step: u64,
    time: f64,
    values: Vec<(String, f64)>,
}

impl Recorder {
    /// Records a run from its beginning; what the folder already holds of its curves is dropped.
    ///
    /// # Errors
    /// `metrics.jsonl` or the event file cannot be created.
    pub fn create(run: &RunDir) -> Result<Recorder, RecordError> {
        Self::open(run, None)
    }

    /// Goes on after `step`: what was recorded beyond it is dropped from `metrics.jsonl` and declared void in a new
    /// event file, so no step appears twice.
    ///
    /// # Errors
    /// `metrics.jsonl` or the event file cannot be written.
    pub fn resume(run: &RunDir, step: u64) -> Result<Recorder, RecordError> {
        Self::open(run, Some(step))
    }

    fn open(run: &RunDir, after: Option<u64>) -> Result<Recorder, RecordError> {
        let metrics = MetricsWriter::open(&run.metrics_path(), after)?;
        let mut events = EventFile::create_new(&run.tb_dir())?;
        // Also for a run begun anew in its folder: what an earlier event file holds is void.
        events.restart(after.map_or(0, |step| step.saturating_add(1)), unix_now())?;
        events.layout(unix_now(), &default_layout())?;
        events.flush()?;
        Ok(Recorder {
            metrics,
            events: Some(events),
            warning: None,
            row: None,
            last_step: after,
        })
    }

    /// Records a value of `step`. All values of a step become one line of `metrics.jsonl`, written by
    /// [`Recorder::flush`]; a second value of the same tag replaces the first.
    ///
    /// # Errors
    /// The tag is reserved, or the step lies before the last one.
    pub fn scalar(&mut self, step: u64, tag: &str, value: f64) -> Result<(), RecordError> {
        if tag.is_empty() || tag == "step" || tag == "time" {
            return Err(RecordError::ReservedTag {
                tag: tag.to_owned(),
            });
        }
        if let Some(last) = self.last_step.filter(|&last| step < last) {
            return Err(RecordError::StepBack { step, last });
        }
        if self.row.as_ref().is_some_and(|row| row.step != step) {
            self.end_row();
        }
        self.last_step = Some(step);
        let row = self.row.get_or_insert_with(|| Row {
            step,
            time: unix_now(),
            values: Vec::new(),
        });
        match row.values.iter_mut().find(|(t, _)| t == tag) {
            Some((_, v)) => *v = value,
            None => row.values.push((tag.to_owned(), value)),
        }
        Ok(())
    }

    /// Records a distribution; only event files hold it.
    pub fn histogram(&mut self, step: u64, tag: &str, h: &Histogram) {
        self.event(|e| e.histogram(step, unix_now(), tag, h));
    }

    /// Records Markdown text; only event files hold it.
    pub fn text(&mut self, step: u64, tag: &str, markdown: &str) {
        self.event(|e| e.text(step, unix_now(), tag, markdown));
    }

    /// Records source code (the resolved RON) as text that TensorBoard shows verbatim.
    pub fn code(&mut self, step: u64, tag: &str, source: &str) {
        // Four spaces make a Markdown code block whatever the source contains; a fence could be closed by it.
        let block: String = source.lines().map(|line| format!("    {line}\n")).collect();
        self.text(step, tag, &block);
    }

    /// Records the hyper-parameters of the run and which scalar tags TensorBoard's table compares.
    pub fn hparams(&mut self, group: &str, hparams: &[(String, HParam)], metric_tags: &[String]) {
        self.event(|e| e.session_start(unix_now(), group, hparams, metric_tags));
    }

    /// Writes everything recorded so far; to be called once per log interval.
    ///
    /// # Errors
    /// `metrics.jsonl` cannot be written. The rows are kept, so a later flush may still save them.
    pub fn flush(&mut self) -> Result<(), RecordError> {
        self.end_row();
        self.event(EventFile::flush);
        self.metrics.flush()
    }

    /// Like [`Recorder::flush`], and `metrics.jsonl` survives a crash of the machine; for use beside a checkpoint.
    ///
    /// # Errors
    /// `metrics.jsonl` cannot be written.
    pub fn sync(&mut self) -> Result<(), RecordError> {
        self.flush()?;
        self.metrics.sync()
    }

    /// Ends the recording: how the run ended goes to TensorBoard's table, and everything is on disk.
    ///
    /// # Errors
    /// `metrics.jsonl` cannot be written.
    pub fn finish(mut self, state: RunState) -> Result<(), RecordError> {
        self.end_row();
        self.event(|e| e.session_end(unix_now(), state));
        self.sync()
    }

    /// The error for which event files were given up, once.
    pub fn take_warning(&mut self) -> Option<RecordError> {
        self.warning.take()
    }

    fn end_row(&mut self) {
        if let Some(row) = self.row.take() {
            self.metrics.row(row.step, row.time, &row.values);
            self.event(|e| {
                e.scalars(
                    row.step,
                    row.time,
                    row.values.iter().map(|(t, v)| (t.as_str(), *v)),
                )
            });
        }
    }

    fn event(&mut self, write: impl FnOnce(&mut EventFile) -> Result<(), RecordError>) {
        if let Some(events) = &mut self.events
            && let Err(e) = write(events)
        {
            self.events = None;
            self.warning = Some(e);
        }
    }
}

/// TensorBoard's custom scalars page of every run.
fn default_layout() -> Vec<LayoutChart> {
    let chart = |category: &str, title: &str, tag: &str| LayoutChart {
        category: category.to_owned(),
        title: title.to_owned(),
        tags: vec![tag.to_owned()],
    };
    vec![
        chart("training", "loss", "train/loss.*"),
        chart("training", "learning rate", "train/lr"),
        chart("training", "gradient norm", "train/grad_norm"),
        chart("evaluation", "all metrics", "eval/.*"),
        chart("activations", "largest |x|", "act/.*/max"),
        chart("activations", "rms", "act/.*/rms"),
        chart("activations", "values beyond f16", "act/.*/over_f16"),
        chart("speed", "tokens per second", "perf/tokens_per_sec"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::metrics::read_metrics;
    use crate::record::read::{ReadLimits, read_dir};
    use crate::record::run_dir::{RunFiles, environment};

    fn run(path: &std::path::Path) -> RunDir {
        let files = RunFiles {
            run_ron: "a",
            resolved_ron: "b",
            env: environment([]),
            graph: None,
            group: "g",
            seed: 0,
        };
        RunDir::create(path, &files).unwrap()
    }

    #[test]
    fn a_resumed_run_has_every_step_once_in_both_records() {
        let tmp = tempfile::tempdir().unwrap();
        let run = run(&tmp.path().join("r"));
        let mut rec = Recorder::create(&run).unwrap();
        for step in 1..=10 {
            rec.scalar(step, "train/loss", 1.0 / step as f64).unwrap();
            rec.scalar(step, "../ä", f64::NAN).unwrap();
            rec.flush().unwrap();
        }
        drop(rec);
        let mut rec = Recorder::resume(&run, 6).unwrap();
        for step in 7..=8 {
            rec.scalar(step, "train/loss", 100.0).unwrap();
            rec.scalar(step, "train/loss", 200.0).unwrap();
        }
        rec.finish(RunState::Finished).unwrap();
        let metrics = read_metrics(&run.metrics_path(), 100).unwrap();
        let events = read_dir(&run.tb_dir(), &ReadLimits::default()).unwrap();
        for series in [&metrics.series["train/loss"], &events.scalars["train/loss"]] {
            assert_eq!(
                series.points().map(|p| p.step).collect::<Vec<_>>(),
                (1..=8).collect::<Vec<_>>()
            );
            assert_eq!(series.last().unwrap().value, 200.0);
        }
        assert!(events.warnings.is_empty() && metrics.warnings.is_empty());
        let text = std::fs::read_to_string(run.metrics_path()).unwrap();
        assert_eq!(text.lines().count(), 8);
        assert_eq!(
            std::fs::read_dir(tmp.path()).unwrap().count(),
            1,
            "a tag became a path"
        );
    }

    #[test]
    fn a_run_begun_anew_has_nothing_of_the_old_one() {
        let tmp = tempfile::tempdir().unwrap();
        let run = run(&tmp.path().join("r"));
        for (tag, last) in [("old", 9), ("new", 3)] {
            let mut rec = Recorder::create(&run).unwrap();
            (0..=last).for_each(|step| rec.scalar(step, tag, 1.0).unwrap());
            rec.finish(RunState::Finished).unwrap();
        }
        let metrics = read_metrics(&run.metrics_path(), 100).unwrap();
        let events = read_dir(&run.tb_dir(), &ReadLimits::default()).unwrap();
        assert_eq!(metrics.series.keys().collect::<Vec<_>>(), ["new"]);
        assert_eq!(events.scalars.keys().collect::<Vec<_>>(), ["new"]);
    }

    #[test]
    fn reserved_tags_and_steps_back_are_refused() {
        let tmp = tempfile::tempdir().unwrap();
        let run = run(&tmp.path().join("r"));
        let mut rec = Recorder::create(&run).unwrap();
        for tag in ["", "step", "time"] {
            assert!(matches!(
                rec.scalar(1, tag, 0.0),
                Err(RecordError::ReservedTag { .. })
            ));
        }
        rec.scalar(5, "a", 0.0).unwrap();
        assert!(matches!(
            rec.scalar(4, "a", 0.0),
            Err(RecordError::StepBack { step: 4, last: 5 })
        ));
    }

    #[test]
    fn a_broken_event_file_does_not_stop_the_record() {
        let tmp = tempfile::tempdir().unwrap();
        let run = run(&tmp.path().join("r"));
        let mut rec = Recorder::create(&run).unwrap();
        rec.event(|_| {
            Err(RecordError::ReservedTag {
                tag: "any error".into(),
            })
        });
        rec.scalar(1, "a", 2.0).unwrap();
        rec.flush().unwrap();
        assert!(rec.take_warning().is_some() && rec.take_warning().is_none());
        assert_eq!(
            read_metrics(&run.metrics_path(), 100).unwrap().series["a"]
                .last()
                .unwrap()
                .value,
            2.0
        );
    }
}
