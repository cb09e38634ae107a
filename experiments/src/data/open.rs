//! From the data of a checked run to a loader.

use super::pipeline::docs::Framing;
use super::pipeline::prefetch::Prefetch;
use super::pipeline::{Dataset, OnBad, Phase, Pipeline, PipelineSpec, Source};
use super::prepare::{PrepareSpec, cached, inputs_of};
use super::rows::{RowLoader, Rows};
use super::source::Documents;
use super::source::files::Files;
use super::source::format::{Columns, Format};
use super::source::shards::{MANIFEST, ShardDocs};
use super::tasks::Task;
use super::text::{TextRows, TextSpec};
use super::tokenizer::{self, Tokenize};
use super::{DataError, Loader, Worker, place};
use marimba_dsl::data::{Data, Reading, Text, Tokenizer, Tokens};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Rows per shuffle block of a lane, unless the data says another number.
const WINDOW: u64 = 8;

/// Opens `data` for rows of `seq_len` inputs, as `worker` of a fleet. `seed` is the run's, for data that does not state its own.
///
/// Documents are read ahead in a thread of their own; closed-form rows cost too little for that.
///
/// # Errors
/// [`DataError`]: files missing, empty, too short or damaged; parameters out of range.
pub fn open(
    data: &Data,
    seq_len: usize,
    seed: u64,
    worker: Worker,
) -> Result<Box<dyn Loader>, DataError> {
    Ok(match open_rows(data, seq_len, seed, worker)? {
        Some(rows) => rows,
        None => Box::new(Prefetch::new(Box::new(open_pipeline(
            data, seq_len, seed, worker,
        )?))),
    })
}

/// Data whose rows have a closed form, or `None`.
fn open_rows(
    data: &Data,
    seq_len: usize,
    seed: u64,
    worker: Worker,
) -> Result<Option<Box<dyn Loader>>, DataError> {
    match data {
        Data::Text(d) if is_cut_anywhere(d)? => {
            let spec = TextSpec {
                paths: vec![d.path.clone()],
                seq_len,
                valid_fraction: d.valid_fraction,
                valid_rows: d.valid_rows,
                raw_bytes: d.raw_bytes,
                seed: d.seed.unwrap_or(seed),
            };
            Ok(Some(Box::new(RowLoader::new(
                TextRows::open(spec)?,
                worker,
            ))))
        }
        Data::Text(_) | Data::Tokens(_) | Data::Mixture(_) => Ok(None),
        task => Ok(Some(Box::new(RowLoader::new(
            Task::from_data(task, seq_len, seed)?,
            worker,
        )))),
    }
}

/// Whether text is read as bytes without documents: plain files of this machine, and nothing said about documents.
fn is_cut_anywhere(d: &Text) -> Result<bool, DataError> {
    let about_documents = d.tokenizer != Tokenizer::Bytes
        || d.column.is_some()
        || !d.reading().said().is_empty()
        || place::is_url(&d.path);
    if about_documents {
        return Ok(false);
    }
    for file in inputs_of(std::slice::from_ref(&d.path))? {
        if Format::of(&file)? != Format::Text {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What a data item of documents comes to.
struct Opened {
    dataset: Dataset,
    vocab_size: usize,
    eos: Option<u32>,
    valid_rows: u64,
}

/// Opens data of documents: text with a tokenizer, token shards, mixtures of these and of tasks.
///
/// # Errors
/// As [`open`], and [`DataError::Parameter`] for data that is not made of documents.
pub fn open_pipeline(
    data: &Data,
    seq_len: usize,
    seed: u64,
    worker: Worker,
) -> Result<Pipeline, DataError> {
    let (parts, reading, own_seed, schedule) = match data {
        Data::Mixture(d) => {
            let parts = d.parts.iter().map(|p| (p.weight, &p.data)).collect();
            (parts, d.reading(), d.seed, d.schedule.as_slice())
        }
        Data::Text(d) => (vec![(1.0, data)], d.reading(), d.seed, [].as_slice()),
        Data::Tokens(d) => (vec![(1.0, data)], d.reading(), d.seed, [].as_slice()),
        task => (vec![(1.0, task)], Reading::default(), None, [].as_slice()),
    };
    let on_bad = reading.on_bad.unwrap_or_default();
    let (mut opened, mut weights) = (Vec::new(), Vec::new());
    for (i, (weight, part)) in parts.into_iter().enumerate() {
        opened.push(match part {
            Data::Text(d) => open_text(d, on_bad)?,
            Data::Tokens(d) => open_tokens(d)?,
            Data::Mixture(_) => {
                let text = format!("a mixture inside a mixture (part {i}); list all sources once");
                return Err(DataError::Parameter(text));
            }
            task => open_task(task, seq_len, own_seed.unwrap_or(seed))?,
        });
        weights.push(weight);
    }
    // Datasets in folders of one name are told apart by their number.
    let names: Vec<String> = opened.iter().map(|o| o.dataset.name.clone()).collect();
    for (i, one) in opened.iter_mut().enumerate() {
        if names.iter().filter(|n| **n == names[i]).count() > 1 {
            one.dataset.name = format!("{}.{i}", names[i]);
        }
    }
    let n_docs = |o: &Opened| match &o.dataset.source {
        Source::Documents { docs, .. } => docs.n_docs(),
        Source::Rows(_) => 0,
    };
    let largest = opened.iter().map(n_docs).max();
    let mut phases = vec![Phase {
        start_row: 0,
        weights,
    }];
    phases.extend(schedule.iter().map(|shift| Phase {
        start_row: shift.after_tokens.div_ceil(seq_len.max(1) as u64),
        weights: shift.weights.clone(),
    }));
    let spec = PipelineSpec {
        seq_len,
        // A function of the data alone: about 64 documents a lane, 1,024 lanes at most.
        lanes: reading
            .lanes
            .unwrap_or_else(|| 1 << (largest.unwrap_or(0) / 64).max(1).ilog2().min(10)),
        window: reading.window.unwrap_or(WINDOW),
        order: reading.order.unwrap_or_default().into(),
        seed: own_seed.unwrap_or(seed),
        framing: Framing {
            bos: reading.bos,
            eos: reading.eos.or_else(|| opened.iter().find_map(|o| o.eos)),
            strip: reading.strip,
            min_length: reading.min_length.unwrap_or(0),
            vocab_size: opened.iter().map(|o| o.vocab_size).max().unwrap_or(0),
        },
        on_bad,
        phases,
        valid_rows: opened.iter().map(|o| o.valid_rows).max().unwrap_or(0),
    };
    Pipeline::new(
        opened.into_iter().map(|o| o.dataset).collect(),
        spec,
        worker,
    )
}

fn valid_docs(n_docs: u64, fraction: f64) -> Result<u64, DataError> {
    if !(0.0..1.0).contains(&fraction) {
        return Err(DataError::Parameter(format!(
            "valid_fraction is {fraction}; expected 0 up to, not including, 1"
        )));
    }
    let wanted = (n_docs as f64 * fraction).round() as u64;
    // A part asked for is not empty where there is something to give.
    Ok(if fraction > 0.0 {
        wanted.max(1).min(n_docs.saturating_sub(1))
    } else {
        0
    })
}

fn name_of(path: &Path) -> String {
    path.file_stem().map_or_else(
        || path.display().to_string(),
        |n| n.to_string_lossy().into_owned(),
    )
}

fn open_text(d: &Text, on_bad: OnBad) -> Result<Opened, DataError> {
    let file = match &d.tokenizer {
        Tokenizer::Bytes => None,
        Tokenizer::File(path) => Some(path.as_path()),
    };
    let tokenizer = tokenizer::load(file)?;
    let docs = open_documents(
        std::slice::from_ref(&d.path),
        tokenizer.clone(),
        &d.column
            .as_deref()
            .map_or_else(Columns::default, Columns::only),
        on_bad,
    )?;
    let valid_docs = valid_docs(docs.n_docs(), d.valid_fraction)?;
    Ok(Opened {
        dataset: Dataset {
            name: name_of(&d.path),
            source: Source::Documents { docs, valid_docs },
        },
        vocab_size: tokenizer.vocab_size(),
        eos: tokenizer.eos(),
        valid_rows: d.valid_rows,
    })
}

fn open_tokens(d: &Tokens) -> Result<Opened, DataError> {
    let docs = ShardDocs::open(&d.path)?;
    let (vocab_size, eos) = (docs.manifest().vocab_size, docs.manifest().eos);
    let valid_docs = valid_docs(docs.n_docs(), d.valid_fraction)?;
    let dataset = Dataset {
        name: name_of(&d.path),
        source: Source::Documents {
            docs: Arc::new(docs),
            valid_docs,
        },
    };
    Ok(Opened {
        dataset,
        vocab_size,
        eos,
        valid_rows: d.valid_rows,
    })
}

fn open_task(data: &Data, seq_len: usize, seed: u64) -> Result<Opened, DataError> {
    let task = Task::from_data(data, seq_len, seed)?;
    Ok(Opened {
        vocab_size: task.vocab_size(),
        dataset: Dataset {
            name: task.name(),
            source: Source::Rows(Arc::new(task)),
        },
        eos: None,
        valid_rows: 0,
    })
}

/// The documents at `paths`: a folder of token shards, files with random access as they are, or, if any file has none (compressed JSON Lines,
/// Parquet, objects of a store), shards prepared once in the system's temporary folder.
///
/// # Errors
/// As [`open`].
pub fn open_documents(
    paths: &[PathBuf],
    tokenizer: Arc<dyn Tokenize>,
    columns: &Columns,
    on_bad: OnBad,
) -> Result<Arc<dyn Documents>, DataError> {
    if let [folder] = paths
        && place::exists(&folder.join(MANIFEST))?
    {
        return Ok(Arc::new(ShardDocs::open(folder)?));
    }
    let files = inputs_of(paths)?;
    let mut streamed = false;
    for file in &files {
        let format = Format::of(file)?;
        streamed |= place::is_url(file)
            || matches!(
                format,
                Format::JsonlGzip | Format::JsonlZstd | Format::Parquet
            );
    }
    if !streamed {
        return Ok(Arc::new(Files::open(&files, columns, tokenizer)?));
    }
    let spec = PrepareSpec {
        inputs: files,
        out: PathBuf::new(),
        tokenizer,
        vocab_size: None,
        columns: columns.clone(),
        shard: (0, 1),
        on_bad,
    };
    Ok(Arc::new(cached(
        spec,
        &std::env::temp_dir().join("marimba-data"),
    )?))
}

#[cfg(test)]
mod tests {
    use super::super::order::OrderMode;
    use super::super::tokenizer::tests::tiny_file;
    use super::*;
    use marimba_dsl::data::{Mixture, Order, Part, Shift};
    use std::io::Write;

    #[test]
    fn text_with_a_tokenizer_shards_and_mixtures_open() {
        let dir = tempfile::tempdir().expect("dir");
        let tokenizer = Tokenizer::File(tiny_file(dir.path()));
        let text = dir.path().join("a.jsonl");
        std::fs::write(&text, "{\"text\":\"the cat sat the mat\"}\n".repeat(500)).expect("written");
        let data = |path: &Path| {
            Data::Text(Text {
                path: path.into(),
                tokenizer: tokenizer.clone(),
                ..Text::default()
            })
        };
        let mut plain = open(&data(&text), 7, 1, Worker::ALL).expect("opens");
        assert_eq!((plain.vocab_size(), plain.eval_sets().len()), (6, 1));
        let batch = plain.next(6).expect("reads");
        assert!(
            batch.tokens.contains(&5),
            "documents end with the tokenizer's own token"
        );

        let gz = dir.path().join("b.jsonl.gz");
        let mut w = flate2::write::GzEncoder::new(
            std::fs::File::create(&gz).expect("created"),
            flate2::Compression::fast(),
        );
        w.write_all(&std::fs::read(&text).expect("read"))
            .expect("written");
        w.finish().expect("finished");
        let mut packed = open(&data(&gz), 7, 1, Worker::ALL).expect("opens");
        assert_eq!(
            packed.next(6).expect("reads").tokens,
            batch.tokens,
            "compression changes nothing"
        );

        let parts = || {
            let part = |weight, path| Part {
                weight,
                data: data(path),
            };
            vec![part(0.7, &text), part(0.3, &gz)]
        };
        let mixture = |m: Mixture| {
            Data::Mixture(Mixture {
                parts: parts(),
                ..m
            })
        };
        let mut mixed = open(&mixture(Mixture::default()), 7, 1, Worker::ALL).expect("opens");
        mixed.next(400).expect("reads");
        let tokens = mixed.tokens_by_dataset();
        let share = tokens[0].1 as f64 / (tokens[0].1 + tokens[1].1) as f64;
        assert!((share - 0.7).abs() < 0.01, "{tokens:?}");
        let said = Mixture {
            lanes: Some(5),
            window: Some(3),
            order: Some(Order::Sequential),
            bos: Some(1),
            eos: Some(2),
            strip: vec![3],
            min_length: Some(4),
            on_bad: Some(OnBad::Skip),
            schedule: vec![Shift {
                after_tokens: 701,
                weights: vec![0.0, 1.0],
            }],
            ..Mixture::default()
        };
        let pipeline = open_pipeline(&mixture(said), 7, 1, Worker::ALL).expect("opens");
        let spec = pipeline.spec();
        assert_eq!((spec.lanes, spec.window, spec.seed), (5, 3, 1));
        assert_eq!(
            (spec.order, spec.on_bad),
            (OrderMode::Sequential, OnBad::Skip)
        );
        let framing = Framing {
            bos: Some(1),
            eos: Some(2),
            strip: vec![3],
            min_length: 4,
            vocab_size: 6,
        };
        assert_eq!(spec.framing, framing);
        assert_eq!((spec.phases.len(), spec.phases[1].start_row), (2, 101));
        // Tasks among documents, twice the same one.
        let mut with_tasks = parts();
        for weight in [0.5, 0.5] {
            let data = Data::Parity(Default::default());
            with_tasks.push(Part { weight, data });
        }
        let with_tasks = Data::Mixture(Mixture {
            parts: with_tasks,
            ..Mixture::default()
        });
        let mut mixed = open(&with_tasks, 7, 1, Worker::ALL).expect("opens");
        let batch = mixed.next(400).expect("reads");
        let names: Vec<String> = mixed.eval_sets().into_iter().map(|s| s.name).collect();
        assert!(names.contains(&"parity.2/T7".to_owned()), "{names:?}");
        let of = |d| {
            batch
                .provenance
                .iter()
                .filter(|p| p.pieces[0].dataset == d)
                .count()
        };
        // Four lanes, each at most a row off its share.
        for d in [2, 3] {
            assert!(of(d).abs_diff(100) <= 4, "{} rows of {d}", of(d));
        }
    }

    #[test]
    fn plain_text_is_read_by_documents_once_that_is_asked_for() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("a.txt");
        std::fs::write(&path, "a line of text\n".repeat(9000)).expect("written");
        let text = |window| {
            Data::Text(Text {
                path: path.clone(),
                window,
                ..Text::default()
            })
        };
        let name = |d| {
            open(&d, 15, 1, Worker::ALL).expect("opens").eval_sets()[0]
                .name
                .clone()
        };
        assert_eq!(
            (name(text(None)), name(text(Some(2)))),
            ("valid".into(), "valid/a".into())
        );
    }
}
