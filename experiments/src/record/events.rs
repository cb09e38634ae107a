//! TensorBoard event files, written.
//!
//! The bytes on disk (record framing, masked CRC32C, protobuf messages) are those of `tensorboard-rs`; its
//! `SummaryWriter` is not used, because it truncates a file of the same second, loses what was not flushed when the
//! process ends, and aborts on a full disk. Here a file is always new, every error is a value, and `flush` has written
//! everything once it returns.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use protobuf::{Message, RepeatedField};
use tensorboard_proto::{api, event, layout, plugin_hparams, summary, tensor, tensor_shape, types};
use tensorboard_rs::record_writer::RecordWriter;

use super::error::RecordError;
use super::files::{host_name, next_serial, unix_now};
use super::histogram::Histogram;
use super::summary::RunState;

/// Version of the hparams plugin's data, from TensorBoard's `plugins/hparams/metadata.py`.
const HPARAMS_VERSION: i32 = 0;
const HPARAMS_EXPERIMENT: &str = "_hparams_/experiment";
const HPARAMS_START: &str = "_hparams_/session_start_info";
const HPARAMS_END: &str = "_hparams_/session_end_info";
const LAYOUT_TAG: &str = "custom_scalars__config__";

/// The value of a hyper-parameter.
#[derive(Debug, Clone, PartialEq)]
pub enum HParam {
    /// A number.
    Number(f64),
    /// A word.
    Text(String),
    /// A switch.
    Flag(bool),
}

/// A chart of TensorBoard's custom scalars page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutChart {
    /// The section the chart stands in.
    pub category: String,
    /// Title of the chart.
    pub title: String,
    /// Regular expressions; every matching tag is drawn.
    pub tags: Vec<String>,
}

/// One open event file.
pub struct EventFile {
    path: PathBuf,
    writer: RecordWriter<BufWriter<File>>,
}

impl EventFile {
    /// Creates a new file `events.out.tfevents.<unix secs>.<host>.<pid>.<n>` in `dir`, which is created where missing.
    ///
    /// # Errors
    /// The folder cannot be created or written.
    pub fn create_new(dir: &Path) -> Result<EventFile, RecordError> {
        fs::create_dir_all(dir).map_err(|e| RecordError::from_io("create", dir, e))?;
        loop {
            let name = format!(
                "events.out.tfevents.{:010}.{}.{}.{}",
                unix_now() as u64,
                host_name(),
                std::process::id(),
                next_serial()
            );
            let path = dir.join(name);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    let mut events = EventFile {
                        path,
                        writer: RecordWriter::new(BufWriter::new(file)),
                    };
                    let mut e = event::Event::new();
                    e.set_file_version("brain.Event:2".to_owned());
                    e.set_wall_time(unix_now());
                    events.write(&e)?;
                    return Ok(events);
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(RecordError::from_io("create", &path, e)),
            }
        }
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the scalars of one step as one event. The format holds them as f32.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn scalars<'a>(
        &mut self,
        step: u64,
        time: f64,
        values: impl IntoIterator<Item = (&'a str, f64)>,
    ) -> Result<(), RecordError> {
        let mut all = summary::Summary::new();
        for (tag, value) in values {
            all.value
                .extend(tensorboard_rs::summary::scalar(tag, value as f32).take_value());
        }
        self.summary(step, time, all)
    }

    /// Writes a histogram; an empty one is left out.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn histogram(
        &mut self,
        step: u64,
        time: f64,
        tag: &str,
        h: &Histogram,
    ) -> Result<(), RecordError> {
        if h.num == 0.0 {
            return Ok(());
        }
        let all = tensorboard_rs::summary::histogram_raw(
            tag,
            h.min,
            h.max,
            h.num,
            h.sum,
            h.sum_squares,
            &h.limits,
            &h.counts,
        );
        self.summary(step, time, all)
    }

    /// Writes text that TensorBoard's text page renders as Markdown.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn text(
        &mut self,
        step: u64,
        time: f64,
        tag: &str,
        markdown: &str,
    ) -> Result<(), RecordError> {
        let mut value = plugin_value(tag, "text", Vec::new());
        value.set_tensor(string_tensor(markdown.as_bytes().to_vec(), true));
        self.summary(step, time, one(value))
    }

    /// Writes what TensorBoard's hyper-parameter page needs at the start of a run: the columns (`hparams` and
    /// `metric_tags`, which must be tags of scalars) and this run's values.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn session_start(
        &mut self,
        time: f64,
        group: &str,
        hparams: &[(String, HParam)],
        metric_tags: &[String],
    ) -> Result<(), RecordError> {
        let mut experiment = api::Experiment::new();
        for (name, value) in hparams {
            let mut info = api::HParamInfo::new();
            info.set_name(name.clone());
            info.set_field_type(match value {
                HParam::Number(_) => api::DataType::DATA_TYPE_FLOAT64,
                HParam::Text(_) => api::DataType::DATA_TYPE_STRING,
                HParam::Flag(_) => api::DataType::DATA_TYPE_BOOL,
            });
            experiment.hparam_infos.push(info);
        }
        for tag in metric_tags {
            let mut name = api::MetricName::new();
            name.set_tag(tag.clone());
            let mut info = api::MetricInfo::new();
            info.set_name(name);
            experiment.metric_infos.push(info);
        }
        let mut data = plugin_hparams::HParamsPluginData::new();
        data.set_version(HPARAMS_VERSION);
        data.set_experiment(experiment);
        self.hparams_data(time, HPARAMS_EXPERIMENT, &data)?;

        let mut start = plugin_hparams::SessionStartInfo::new();
        for (name, value) in hparams {
            let mut v = protobuf::well_known_types::Value::new();
            match value {
                HParam::Number(x) => v.set_number_value(*x),
                HParam::Text(x) => v.set_string_value(x.clone()),
                HParam::Flag(x) => v.set_bool_value(*x),
            }
            start.hparams.insert(name.clone(), v);
        }
        start.set_group_name(group.to_owned());
        start.set_start_time_secs(time);
        let mut data = plugin_hparams::HParamsPluginData::new();
        data.set_version(HPARAMS_VERSION);
        data.set_session_start_info(start);
        self.hparams_data(time, HPARAMS_START, &data)
    }

    /// Writes how the run ended; the counterpart of [`EventFile::session_start`].
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn session_end(&mut self, time: f64, state: RunState) -> Result<(), RecordError> {
        let mut end = plugin_hparams::SessionEndInfo::new();
        end.set_status(match state {
            RunState::Finished => api::Status::STATUS_SUCCESS,
            RunState::Failed | RunState::Interrupted | RunState::Stopped => {
                api::Status::STATUS_FAILURE
            }
            RunState::Running | RunState::Paused => api::Status::STATUS_RUNNING,
        });
        end.set_end_time_secs(time);
        let mut data = plugin_hparams::HParamsPluginData::new();
        data.set_version(HPARAMS_VERSION);
        data.set_session_end_info(end);
        self.hparams_data(time, HPARAMS_END, &data)
    }

    /// Writes the layout of TensorBoard's custom scalars page. Categories appear in the order first named.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn layout(&mut self, time: f64, charts: &[LayoutChart]) -> Result<(), RecordError> {
        let mut all = layout::Layout::new();
        for chart in charts {
            let mut lines = layout::MultilineChartContent::new();
            lines.set_tag(RepeatedField::from_vec(chart.tags.clone()));
            let mut c = layout::Chart::new();
            c.set_title(chart.title.clone());
            c.set_multiline(lines);
            match all.category.iter_mut().find(|x| x.title == chart.category) {
                Some(category) => category.chart.push(c),
                None => {
                    let mut category = layout::Category::new();
                    category.set_title(chart.category.clone());
                    category.chart.push(c);
                    all.category.push(category);
                }
            }
        }
        let mut value = plugin_value(LAYOUT_TAG, "custom_scalars", Vec::new());
        value.set_tensor(string_tensor(self.bytes(&all)?, false));
        self.summary(0, time, one(value))
    }

    /// Marks that the run (re)starts at `step`: readers drop what earlier files hold from that step on.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn restart(&mut self, step: u64, time: f64) -> Result<(), RecordError> {
        let mut log = event::SessionLog::new();
        log.set_status(event::SessionLog_SessionStatus::START);
        let mut e = event::Event::new();
        e.set_wall_time(time);
        e.set_step(signed(step));
        e.set_session_log(log);
        self.write(&e)
    }

    /// Hands everything written so far to the operating system.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn flush(&mut self) -> Result<(), RecordError> {
        self.writer
            .flush()
            .map_err(|e| RecordError::from_io("write", &self.path, e))
    }

    fn hparams_data(
        &mut self,
        time: f64,
        tag: &str,
        data: &plugin_hparams::HParamsPluginData,
    ) -> Result<(), RecordError> {
        let mut value = plugin_value(tag, "hparams", self.bytes(data)?);
        // TensorBoard's data server drops values without a tensor; its content is never looked at.
        value.set_tensor(null_tensor());
        self.summary(0, time, one(value))
    }

    fn summary(&mut self, step: u64, time: f64, all: summary::Summary) -> Result<(), RecordError> {
        let mut e = event::Event::new();
        e.set_wall_time(time);
        e.set_step(signed(step));
        e.set_summary(all);
        self.write(&e)
    }

    fn write(&mut self, e: &event::Event) -> Result<(), RecordError> {
        let bytes = self.bytes(e)?;
        self.writer
            .write(&bytes)
            .map_err(|e| RecordError::from_io("write", &self.path, e))
    }

    fn bytes(&self, message: &impl Message) -> Result<Vec<u8>, RecordError> {
        message.write_to_bytes().map_err(|e| RecordError::Io {
            action: "encode an event for",
            path: self.path.clone(),
            source: io::Error::new(io::ErrorKind::InvalidData, e),
        })
    }
}

fn signed(step: u64) -> i64 {
    i64::try_from(step).unwrap_or(i64::MAX)
}

fn one(value: summary::Summary_Value) -> summary::Summary {
    let mut all = summary::Summary::new();
    all.value.push(value);
    all
}

fn plugin_value(tag: &str, plugin: &str, content: Vec<u8>) -> summary::Summary_Value {
    let mut data = summary::SummaryMetadata_PluginData::new();
    data.set_plugin_name(plugin.to_owned());
    data.set_content(content);
    let mut metadata = summary::SummaryMetadata::new();
    metadata.set_plugin_data(data);
    let mut value = summary::Summary_Value::new();
    value.set_tag(tag.to_owned());
    value.set_metadata(metadata);
    value
}

/// A string tensor: of shape `[1]` (what the text page wants) or a scalar.
fn string_tensor(bytes: Vec<u8>, vector: bool) -> tensor::TensorProto {
    let mut shape = tensor_shape::TensorShapeProto::new();
    if vector {
        let mut dim = tensor_shape::TensorShapeProto_Dim::new();
        dim.set_size(1);
        shape.dim.push(dim);
    }
    let mut t = tensor::TensorProto::new();
    t.set_dtype(types::DataType::DT_STRING);
    t.set_tensor_shape(shape);
    t.string_val.push(bytes);
    t
}

fn null_tensor() -> tensor::TensorProto {
    let mut shape = tensor_shape::TensorShapeProto::new();
    let mut dim = tensor_shape::TensorShapeProto_Dim::new();
    dim.set_size(0);
    shape.dim.push(dim);
    let mut t = tensor::TensorProto::new();
    t.set_dtype(types::DataType::DT_FLOAT);
    t.set_tensor_shape(shape);
    t
}
