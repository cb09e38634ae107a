//! Properties of the whole pipeline over simulated fleets. `PROPTEST_CASES=10000` is the long mode.

use super::docs::Framing;
use super::*;
use crate::data::order::OrderMode;
use crate::data::source::InMemory;
use crate::data::{Batch, IGNORED, Loader, LoaderState, Worker};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The environment's number of cases, else `default`.
fn cases(default: u32) -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|v| v.parse().ok());
    ProptestConfig {
        cases: asked.unwrap_or(default),
        ..ProptestConfig::default()
    }
}

/// A document: its length, or `None` for a damaged one. Tokens follow from dataset, number and place.
type Doc = Option<usize>;

fn token(dataset: usize, doc: usize, i: usize) -> u32 {
    10 + ((dataset * 7919 + doc * 131 + i * 17) % 900) as u32
}

#[derive(Clone, Debug)]
struct Case {
    docs: Vec<Vec<Doc>>,
    weights: Vec<f64>,
    second: Option<(u64, Vec<f64>)>,
    spec: PipelineSpec,
}

fn case() -> impl Strategy<Value = Case> {
    let doc = prop_oneof![1 => Just(None), 1 => Just(Some(0)), 8 => (1usize..60).prop_map(Some)];
    // The first document is good, so that no dataset is without any.
    let dataset = (prop::collection::vec(doc, 0..150), 1usize..60).prop_map(|(mut docs, n)| {
        docs.push(Some(n + 4));
        docs
    });
    (
        prop::collection::vec(dataset, 1..4),
        1usize..40,
        1u32..48,
        1u64..5,
        any::<u64>(),
        0usize..2,
        any::<[bool; 2]>(),
        0u64..6,
    )
        .prop_flat_map(
            |(docs, seq_len, lanes, window, seed, mode, [bos, eos], min_length)| {
                let n = docs.len();
                let weights = prop::collection::vec(0.05f64..1.0, n);
                let second = prop::option::of((1u64..400, prop::collection::vec(0.0f64..1.0, n)));
                (weights, second).prop_map(move |(weights, second)| Case {
                    docs: docs.clone(),
                    weights,
                    second: second.filter(|(_, w)| w.iter().sum::<f64>() > 0.0),
                    spec: PipelineSpec {
                        seq_len,
                        lanes,
                        window,
                        order: [OrderMode::Default, OrderMode::FmsV1][mode],
                        seed,
                        framing: Framing {
                            bos: bos.then_some(1),
                            eos: eos.then_some(2),
                            strip: vec![],
                            min_length,
                            vocab_size: 1000,
                        },
                        on_bad: OnBad::Skip,
                        phases: Vec::new(),
                        valid_rows: 0,
                    },
                })
            },
        )
}

fn build(case: &Case) -> Pipeline {
    let datasets = case.docs.iter().enumerate().map(|(d, docs)| Dataset {
        name: format!("d{d}"),
        docs: Arc::new(InMemory::new(docs.iter().enumerate().map(
            |(j, len)| match len {
                Some(len) => Ok((0..*len).map(|i| token(d, j, i)).collect()),
                None => Err("made bad".to_owned()),
            },
        ))),
        valid_docs: 0,
    });
    let mut phases = vec![Phase {
        start_row: 0,
        weights: case.weights.clone(),
    }];
    phases.extend(
        case.second
            .clone()
            .map(|(start_row, weights)| Phase { start_row, weights }),
    );
    Pipeline::new(
        datasets.collect(),
        PipelineSpec {
            phases,
            ..case.spec.clone()
        },
        Worker::ALL,
    )
    .expect("valid")
}

/// Rows `rows` of `batch`, as one comparable value each.
fn rows_of(batch: &Batch) -> impl Iterator<Item = (u64, Vec<i32>, Vec<crate::data::Piece>)> {
    let t = batch.seq_len;
    (0..batch.rows).map(move |i| {
        let cut = |v: &[i32]| v[i * t..(i + 1) * t].to_vec();
        let all = [
            &batch.tokens,
            &batch.targets,
            &batch.segments,
            &batch.positions,
        ]
        .map(|v| cut(v))
        .concat();
        (
            batch.provenance[i].row,
            all,
            batch.provenance[i].pieces.clone(),
        )
    })
}

/// What one fleet of `workers` serves in `calls` calls of `per_call` rows from `state` on, and the state it saves.
fn fleet(
    whole: &Pipeline,
    state: Option<&LoaderState>,
    workers: usize,
    calls: &[usize],
) -> (Vec<Batch>, LoaderState) {
    let (mut batches, mut states) = (Vec::new(), Vec::new());
    for rank in 0..workers {
        let mut worker = whole.for_worker(Worker::new(rank, workers).expect("rank"));
        if let Some(state) = state {
            let json = serde_json::to_string(state).expect("serialises");
            worker
                .restore(&serde_json::from_str(&json).expect("parses"))
                .expect("same data");
        }
        for &rows in calls {
            batches.push(worker.next(rows).expect("reads"));
        }
        states.push(worker.state());
    }
    (batches, LoaderState::merge(&states).expect("one fleet"))
}

proptest! {
    #![proptest_config(cases(48))]

    /// Any sequence of fleets serves, row for row and bit for bit, what one worker serves.
    #[test]
    fn fleets_serve_the_one_sequence(
        case in case(),
        plan in prop::collection::vec((prop_oneof![4 => 1usize..9, 2 => 9usize..65, 1 => 65usize..513], prop::collection::vec(1usize..4, 1..3)), 1..6),
    ) {
        let whole = build(&case);
        let total: usize = plan.iter().map(|(w, calls)| w * calls.iter().sum::<usize>()).sum();
        let mut one = whole.for_worker(Worker::ALL);
        let reference = one.next(total).expect("reads");
        let want: BTreeMap<_, _> = rows_of(&reference).map(|(row, a, b)| (row, (a, b))).collect();

        let (mut got, mut state) = (BTreeMap::new(), None);
        for (workers, calls) in &plan {
            let (batches, after) = fleet(&whole, state.as_ref(), *workers, calls);
            for (row, a, b) in batches.iter().flat_map(rows_of) {
                prop_assert!(got.insert(row, (a, b)).is_none(), "row {} twice", row);
            }
            state = Some(after);
        }
        prop_assert_eq!(got.len(), total);
        prop_assert!(got == want, "another sequence");
        prop_assert_eq!(one.tokens_by_dataset().iter().map(|t| t.1).sum::<u64>() > 0, true);
    }

    /// Every usable document comes whole, exactly once per epoch, in the order of the closed form; nothing else comes.
    #[test]
    fn each_document_once_per_epoch(case in case(), blocks in 1u64..6) {
        let whole = build(&case);
        let spec = whole.spec();
        let rows = blocks * spec.window * u64::from(spec.lanes);
        let batch = whole.for_worker(Worker::ALL).next(rows as usize).expect("reads");
        let (frame, min) = (u64::from(spec.framing.bos.is_some()) + u64::from(spec.framing.eos.is_some()), spec.framing.min_length);
        let usable = |d: usize, j: usize| case.docs[d][j].map(|n| n as u64).filter(|&n| n > 0 && n + frame >= min).map(|n| n + frame);

        let mut parts: BTreeMap<(u32, u64, u64), Vec<(u64, u64)>> = BTreeMap::new();
        for piece in batch.provenance.iter().flat_map(|p| &p.pieces) {
            parts.entry((piece.dataset, piece.epoch, piece.doc)).or_default().push((piece.start, piece.len));
        }
        let mut drawn: BTreeMap<(u32, u32), Vec<(u64, bool)>> = BTreeMap::new();
        for ((dataset, epoch, doc), mut spans) in parts {
            spans.sort_unstable();
            let len = usable(dataset as usize, doc as usize);
            prop_assert!(len.is_some(), "an unusable document came");
            let mut at = 0;
            for (start, n) in spans {
                prop_assert_eq!(start, at, "a part of a document came twice or never");
                at += n;
            }
            let (lane, k) = whole.shards()[dataset as usize].find(doc, epoch).expect("exists");
            drawn.entry((dataset, lane)).or_default().push((k, Some(at) == len));
        }
        for ((dataset, lane), mut ks) in drawn {
            ks.sort_unstable();
            let shards = whole.shards()[dataset as usize];
            let usable_before = (0..=ks[ks.len() - 1].0).filter(|&k| usable(dataset as usize, shards.place(lane, k).doc as usize).is_some());
            prop_assert_eq!(ks.iter().map(|k| k.0).collect::<Vec<_>>(), usable_before.collect::<Vec<_>>());
            // Only the last one may still be open.
            prop_assert!(ks[..ks.len() - 1].iter().all(|k| k.1), "a document was cut short");
        }
    }

    /// When a document comes is known without reading what comes before in other lanes.
    #[test]
    fn rows_of_a_document_are_known(case in case(), blocks in 1u64..4, pick: prop::sample::Index) {
        let whole = build(&case);
        let rows = blocks * case.spec.window * u64::from(case.spec.lanes);
        let batch = whole.for_worker(Worker::ALL).next(rows as usize).expect("reads");
        let pieces: Vec<_> = batch.provenance.iter().flat_map(|p| &p.pieces).collect();
        let one = pieces[pick.index(pieces.len())];
        let same = |p: &&crate::data::RowProvenance| p.pieces.iter().any(|q| (q.dataset, q.doc, q.epoch) == (one.dataset, one.doc, one.epoch));
        let want: Vec<u64> = batch.provenance.iter().filter(same).map(|p| p.row).collect();
        let got = whole.rows_of(&format!("d{}", one.dataset), one.doc, one.epoch).expect("reads");
        prop_assert_eq!(got.into_iter().filter(|&r| r < rows).collect::<Vec<_>>(), want);
        prop_assert!(whole.rows_of("none", 0, 0).expect("reads").is_empty());
    }

    /// Rows are what their provenance says.
    #[test]
    fn rows_hold_their_documents(case in case()) {
        let whole = build(&case);
        let t = case.spec.seq_len;
        let batch = whole.for_worker(Worker::ALL).next(20).expect("reads");
        for (i, provenance) in batch.provenance.iter().enumerate() {
            let mut at = 0;
            let row = |v: &[i32]| v[i * t..(i + 1) * t].to_vec();
            let (tokens, targets, segments, positions) = (row(&batch.tokens), row(&batch.targets), row(&batch.segments), row(&batch.positions));
            for (segment, piece) in provenance.pieces.iter().enumerate() {
                let f = &case.spec.framing;
                let len = case.docs[piece.dataset as usize][piece.doc as usize].expect("good");
                let mut framed: Vec<i32> = f.bos.iter().map(|&b| b as i32).collect();
                framed.extend((0..len).map(|k| token(piece.dataset as usize, piece.doc as usize, k) as i32));
                framed.extend(f.eos.iter().map(|&b| b as i32));
                let part = &framed[piece.start as usize..(piece.start + piece.len) as usize];
                for (j, &want) in part.iter().enumerate() {
                    if at < t {
                        prop_assert_eq!((tokens[at], segments[at], positions[at]), (want, segment as i32, j as i32));
                        prop_assert_eq!(targets[at], part.get(j + 1).copied().unwrap_or(IGNORED));
                    }
                    at += 1;
                }
            }
            prop_assert_eq!(at, t + 1);
        }
    }
}

fn simple(docs: Vec<Vec<Doc>>) -> Case {
    let weights = vec![1.0; docs.len()];
    let framing = Framing {
        vocab_size: 1000,
        ..Framing::default()
    };
    let spec = PipelineSpec {
        seq_len: 16,
        lanes: 6,
        window: 2,
        order: OrderMode::Default,
        seed: 3,
        framing,
        on_bad: OnBad::Stop,
        phases: Vec::new(),
        valid_rows: 4,
    };
    Case {
        docs,
        weights,
        second: None,
        spec,
    }
}

#[test]
fn equal_products_of_workers_and_rows_see_equal_steps() {
    // The identity that Bamba's README claims: 64 x 3 workers with 6 rows = 96 x 2 workers with 4... scaled down by 16.
    let whole = build(&simple(vec![
        (0..200).map(|i| Some(i % 37 + 1)).collect();
        2
    ]));
    let steps = |workers: usize, rows: usize| {
        let (batches, _) = fleet(&whole, None, workers, &[rows; 3]);
        let all: BTreeMap<_, _> = batches
            .iter()
            .flat_map(rows_of)
            .map(|(row, a, b)| (row, (a, b)))
            .collect();
        all
    };
    assert_eq!(steps(12, 6), steps(18, 4));
    assert_eq!(steps(12, 6), steps(72, 1));
    assert_eq!(steps(12, 6), steps(1, 72));
}

#[test]
fn a_bad_document_stops_or_is_counted() {
    let mut case = simple(vec![vec![Some(5), None, Some(9), Some(0)]]);
    let error = build(&case)
        .for_worker(Worker::ALL)
        .next(50)
        .expect_err("stops");
    assert!(matches!(error, DataError::Damaged { .. }), "{error}");
    let mut stopped = build(&case).for_worker(Worker::ALL);
    let state = stopped.state();
    assert!(stopped.next(50).is_err());
    assert_eq!(stopped.state().next_row, state.next_row);
    assert!(
        stopped.state().lanes.iter().all(|l| l.window.rows == 0),
        "an error must not move the state"
    );
    case.spec.on_bad = OnBad::Skip;
    let mut pipeline = build(&case);
    pipeline.next(50).expect("goes on");
    let counts = pipeline.skip_counts().remove(0);
    assert!(counts.bad > 0 && counts.empty > 0 && counts.short == 0);
}

#[test]
fn impossible_mixtures_are_refused() {
    let refused = |change: fn(&mut Case)| {
        let mut case = simple(vec![vec![Some(5)], vec![Some(6)]]);
        change(&mut case);
        let datasets = |(d, docs): (usize, &Vec<Doc>)| Dataset {
            name: format!("d{d}"),
            docs: Arc::new(InMemory::new(
                docs.iter().map(|n| Ok(vec![1; n.unwrap_or(0)])),
            )) as Arc<dyn crate::data::source::Documents>,
            valid_docs: 0,
        };
        let phases = vec![Phase {
            start_row: 0,
            weights: case.weights.clone(),
        }];
        let spec = PipelineSpec {
            phases,
            ..case.spec
        };
        let made = Pipeline::new(
            case.docs.iter().enumerate().map(datasets).collect(),
            spec,
            Worker::ALL,
        );
        made.and_then(|mut p| p.next(1))
            .expect_err("refused")
            .to_string()
    };
    assert!(refused(|c| c.weights[1] = f64::NAN).contains("weight of dataset d1 is NaN"));
    assert!(refused(|c| c.weights[1] = -1.0).contains("weight of dataset d1 is -1"));
    assert!(refused(|c| c.weights = vec![0.0, 0.0]).contains("sum to 0"));
    assert!(refused(|c| c.weights = vec![1.0]).contains("1 weights for 2 datasets"));
    assert!(refused(|c| c.docs[1].clear()).contains("d1 has no usable document"));
    assert!(refused(|c| c.spec.framing.min_length = 100).contains("no usable document"));
    assert!(refused(|c| c.spec.framing.vocab_size = 1).contains("outside the vocabulary"));
    assert!(refused(|c| c.spec.framing.eos = Some(1000)).contains("eos token"));
    assert!(refused(|c| c.spec.lanes = 0).contains("lanes"));
    assert!(refused(|c| c.spec.window = 0).contains("window"));
}

#[test]
fn a_weight_of_zero_leaves_a_dataset_out() {
    let mut case = simple(vec![vec![Some(5); 20], vec![Some(6); 20]]);
    case.weights = vec![1.0, 0.0];
    let mut pipeline = build(&case);
    pipeline.next(60).expect("reads");
    assert_eq!(pipeline.tokens_by_dataset()[1].1, 0);
}

#[test]
fn kept_documents_are_only_validated_on() {
    let case = simple(vec![(0..100).map(|i| Some(i % 30 + 1)).collect()]);
    let mut datasets = build(&case).datasets().to_vec();
    datasets[0].valid_docs = 10;
    let phases = vec![Phase {
        start_row: 0,
        weights: vec![1.0],
    }];
    let mut pipeline = Pipeline::new(
        datasets,
        PipelineSpec {
            phases,
            ..case.spec
        },
        Worker::ALL,
    )
    .expect("valid");
    let sets = pipeline.eval_sets();
    assert_eq!((sets.len(), sets[0].rows), (1, 3));
    let valid = pipeline.eval_batch(0, 1, 100).expect("reads");
    assert_eq!(valid.rows, 2);
    let train = pipeline.next(300).expect("reads");
    assert!(
        train
            .provenance
            .iter()
            .flat_map(|p| &p.pieces)
            .all(|p| p.doc < 90)
    );
}

#[test]
fn the_state_is_small() {
    let docs: Vec<Doc> = (0..2000).map(|i| Some(i % 30 + 1)).collect();
    let mut case = simple(vec![docs; 3]);
    case.spec.lanes = 64;
    let mut pipeline = build(&case);
    pipeline.next(64 * 50).expect("reads");
    let bytes = serde_json::to_string(&pipeline.state())
        .expect("serialises")
        .len();
    let shards = 64 * 3;
    assert!(
        bytes / shards <= 64,
        "{} bytes per logical shard",
        bytes / shards
    );
}
