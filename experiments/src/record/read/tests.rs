//! The reader against whole, cut, damaged and foreign files.

use super::tensor::{DT_BFLOAT16, DT_DOUBLE, DT_FLOAT, DT_HALF, DT_STRING};
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
    let (step, h) = &log.histograms["act/h"];
    assert_eq!(
        (h.num, h.sum, h.min, h.max, *step),
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
    let hparams = [("lr", "0.001"), ("on", "true")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    assert_eq!(log.hparams, hparams.into());
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
