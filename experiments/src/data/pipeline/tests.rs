//! Properties of the whole pipeline over simulated fleets. `PROPTEST_CASES=10000` is the long mode.

use super::docs::Framing;
use super::*;
use crate::data::order::OrderMode;
use crate::data::rows::{Rows, Split};
use crate::data::source::InMemory;
use crate::data::tasks::Task;
use crate::data::{Batch, IGNORED, Loader, LoaderState, Worker};
use marimba_dsl::data::{Data, Parity};
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
    /// Tasks come after the datasets of documents: their numbers of examples.
    tasks: Vec<Option<u64>>,
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
    // One dataset may have nothing usable at all, and tasks may be mixed in.
    let hollow = prop::option::of((any::<prop::sample::Index>(), 1usize..30));
    let tasks = prop::collection::vec(prop::option::of(1u64..40), 0..3);
    let datasets = (prop::collection::vec(dataset, 1..4), hollow, tasks).prop_map(
        |(mut docs, hollow, tasks)| {
            if let Some((at, n)) = hollow {
                docs.insert(at.index(docs.len() + 1), vec![Some(0); n]);
            }
            (docs, tasks)
        },
    );
    (
        datasets,
        1usize..40,
        1u32..48,
        1u64..5,
        any::<u64>(),
        0usize..2,
        any::<[bool; 2]>(),
        0u64..6,
    )
        .prop_flat_map(
            |((docs, tasks), seq_len, lanes, window, seed, mode, [bos, eos], min_length)| {
                let n = docs.len() + tasks.len();
                let weights = prop::collection::vec(0.05f64..1.0, n);
                let second = prop::option::of((1u64..400, prop::collection::vec(0.0f64..1.0, n)));
                (weights, second).prop_map(move |(weights, second)| Case {
                    docs: docs.clone(),
                    tasks: tasks.clone(),
                    weights,
                    // Something usable has a weight.
                    second: second.filter(|(_, w)| {
                        let hollow = |d: usize| {
                            docs.get(d)
                                .is_some_and(|d| d.iter().all(|n| matches!(n, Some(0))))
                        };
                        (0..n).any(|d| w[d] > 0.0 && !hollow(d))
                    }),
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

/// The task that is dataset `d`.
fn parity(case: &Case, d: usize) -> Task {
    let data = Data::Parity(Parity {
        n_train: case.tasks[d - case.docs.len()],
        ..Parity::default()
    });
    Task::from_data(&data, case.spec.seq_len, d as u64).expect("valid")
}

/// Documents without a kept part.
fn documents(docs: InMemory) -> Source {
    Source::Documents {
        docs: Arc::new(docs),
        valid_docs: 0,
    }
}

fn build(case: &Case) -> Pipeline {
    let datasets = case.docs.iter().enumerate().map(|(d, docs)| {
        let tokens = docs.iter().enumerate().map(|(j, len)| match len {
            Some(len) => Ok((0..*len).map(|i| token(d, j, i)).collect()),
            None => Err("made bad".to_owned()),
        });
        Dataset {
            name: format!("d{d}"),
            source: documents(InMemory::new(tokens)),
        }
    });
    let tasks = (case.docs.len()..case.docs.len() + case.tasks.len()).map(|d| Dataset {
        name: format!("d{d}"),
        source: Source::Rows(Arc::new(parity(case, d))),
    });
    let datasets = datasets.chain(tasks);
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
        let mut examples: BTreeMap<(u32, u32), Vec<u64>> = BTreeMap::new();
        for piece in batch.provenance.iter().flat_map(|p| &p.pieces) {
            if piece.dataset as usize >= case.docs.len() {
                let row = parity(&case, piece.dataset as usize).row_of(piece.doc, piece.epoch).expect("exists");
                let (lane, k) = generated::find(row, spec.lanes);
                examples.entry((piece.dataset, lane)).or_default().push(k);
                continue;
            }
            parts.entry((piece.dataset, piece.epoch, piece.doc)).or_default().push((piece.start, piece.len));
        }
        // A lane's examples come without a gap and once.
        for mut ks in examples.into_values() {
            ks.sort_unstable();
            prop_assert_eq!(&ks, &(0..ks.len() as u64).collect::<Vec<_>>());
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
            let (lane, k) = whole.shards()[dataset as usize].expect("documents").find(doc, epoch).expect("exists");
            drawn.entry((dataset, lane)).or_default().push((k, Some(at) == len));
        }
        for ((dataset, lane), mut ks) in drawn {
            ks.sort_unstable();
            let shards = whole.shards()[dataset as usize].expect("documents");
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
            if let [piece] = provenance.pieces.as_slice() && piece.dataset as usize >= case.docs.len() {
                let task = parity(&case, piece.dataset as usize);
                let mut want = Batch::blank(1, t);
                task.fill(Split::Train, task.row_of(piece.doc, piece.epoch).expect("exists"), want.row_mut(0)).expect("computed");
                prop_assert_eq!((tokens, targets, segments, positions), (want.tokens, want.targets, want.segments, want.positions));
                continue;
            }
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
        tasks: Vec::new(),
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
            source: documents(InMemory::new(
                docs.iter().map(|n| Ok(vec![1; n.unwrap_or(0)])),
            )),
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
fn tasks_take_their_share_of_rows() {
    let mut case = simple(vec![(0..300).map(|i| Some(i % 37 + 1)).collect(); 2]);
    case.tasks = vec![None, Some(7)];
    case.weights = vec![0.3, 0.25, 0.25, 0.2];
    // Later the documents are left out, and later still one task.
    case.second = Some((6 * 200, vec![0.0, 0.0, 0.5, 0.5]));
    let mut pipeline = build(&case);
    // The bound of `mixture`: m is the longest document plus a row.
    let m = (37 + 17) as f64;
    let mut at_phase = vec![0; 4];
    for block in 0..200u64 {
        pipeline.next(6 * 2).expect("reads");
        let drawn: Vec<u64> = pipeline.tokens_by_dataset().iter().map(|t| t.1).collect();
        if block == 99 {
            at_phase = drawn.clone();
        }
        let weights = if block < 100 {
            case.weights.clone()
        } else {
            case.second.clone().expect("given").1
        };
        let since: Vec<f64> = drawn
            .iter()
            .zip(&at_phase)
            .map(|(d, b)| (d - if block < 100 { 0 } else { *b }) as f64)
            .collect();
        let total: f64 = since.iter().sum();
        for (i, drawn) in since.iter().enumerate() {
            let ahead = drawn - weights[i] * total;
            // Six lanes, each within the bound.
            assert!(
                ahead <= 6.0 * m && ahead >= -6.0 * 3.0 * m,
                "dataset {i} ahead by {ahead} of {total}"
            );
        }
    }
    let sets = pipeline.eval_sets();
    assert_eq!(sets.len(), 2);
    assert_eq!(
        (sets[0].name.as_str(), sets[1].name.as_str()),
        ("d2/T16", "d3/T16")
    );
    let batch = pipeline.eval_batch(1, 3, 5).expect("computes");
    let alone = parity(&case, 3);
    let mut want = Batch::blank(1, 16);
    alone
        .fill(Split::Eval(0), 3, want.row_mut(0))
        .expect("computes");
    assert_eq!((batch.rows, &batch.tokens[..16]), (5, &want.tokens[..]));
}

#[test]
fn tasks_stand_between_the_rows_of_a_long_document() {
    let mut case = simple(vec![vec![Some(5000); 3]]);
    (case.tasks, case.weights) = (vec![None], vec![0.75, 0.25]);
    (case.spec.lanes, case.spec.window) = (1, 1);
    let batch = build(&case).next(400).expect("reads");
    let of_task: Vec<bool> = batch
        .provenance
        .iter()
        .map(|p| p.pieces[0].dataset == 1)
        .collect();
    for four in of_task.windows(4) {
        assert_eq!(four.iter().filter(|&&t| t).count(), 1, "{of_task:?}");
    }
}

#[test]
fn a_task_of_other_rows_is_refused() {
    let mut case = simple(vec![vec![Some(5); 20]]);
    case.tasks = vec![None];
    case.weights = vec![0.5, 0.5];
    let longer = Case {
        spec: PipelineSpec {
            seq_len: 20,
            ..case.spec.clone()
        },
        ..case.clone()
    };
    let mut datasets = build(&case).datasets().to_vec();
    datasets[1].source = Source::Rows(Arc::new(parity(&longer, 1)));
    let phases = vec![Phase {
        start_row: 0,
        weights: vec![0.5, 0.5],
    }];
    let refused = Pipeline::new(
        datasets,
        PipelineSpec {
            phases,
            ..case.spec
        },
        Worker::ALL,
    )
    .map(|_| ())
    .expect_err("refused");
    assert!(
        refused.to_string().contains("rows of d1 have 20 tokens"),
        "{refused}"
    );
}

#[test]
fn kept_documents_are_only_validated_on() {
    let case = simple(vec![(0..100).map(|i| Some(i % 30 + 1)).collect()]);
    let mut datasets = build(&case).datasets().to_vec();
    if let Source::Documents { valid_docs, .. } = &mut datasets[0].source {
        *valid_docs = 10;
    }
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
