//! Training from outside: resuming is bitwise, micro-batches add up, both CPU backends walk the same way, failures say where.

use marimba_dsl::run::Run;
use marimba_dsl::{Source, Valid, parse_run, parse_sweep};
use marimba_experiments::engine;
use marimba_experiments::facts::Facts;
use marimba_experiments::sweep::{self, Ended, Event, SweepObserver, SweepRequest};
use marimba_experiments::train::{
    LogLine, Observer, Outcome, StepOutcome, TrainError, TrainRequest, Trainer, train,
};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const MODEL: &str = r#"(
    name: "tiny", vocab_size: 48, d_model: 16, n_layers: 3, context_len: 24,
    mixers: { "attn": Attention(n_heads: 2), "m1": Mamba1(d_state: 4), "m2": Mamba2(head_dim: 8, d_state: 4, chunk_size: 8) },
    ffns: { "mlp": Glu(d_ff: 24), "moe": Moe(n_experts: 4, top_k: 2, d_ff: 16) },
    layout: ( mixer: ["m2", "attn", "m1"], ffn: ["mlp", "moe", "mlp"] ),
)"#;

fn run(steps: usize, extra: &str) -> Valid<Run> {
    let text = format!(
        "( name: \"t\", model: {MODEL}, data: Mqar(vocab_size: 48, n_pairs: 4), steps: {steps}, seq_len: 24, optimizer: (lr: 1e-2), \
         schedule: (warmup: Linear(2)), eval: (rows: 8), log_every: 5, {extra} )"
    );
    parse_run(&Source::new("t.ron", text), &[]).unwrap_or_else(|r| panic!("{r}"))
}

#[derive(Default)]
struct Quiet {
    losses: Vec<f64>,
}

impl Observer for Quiet {
    fn begin(&mut self, _: usize, _: usize, _: &Facts) {}
    fn step(&mut self, _: usize, outcome: &StepOutcome) {
        self.losses.push(outcome.loss);
    }
    fn log(&mut self, _: &LogLine) {}
    fn eval(&mut self, _: usize, _: &BTreeMap<String, f64>) {}
    fn note(&mut self, _: &str) {}
}

fn go(
    run: &Valid<Run>,
    out: &Path,
    resume: bool,
    threads: usize,
) -> Result<(Outcome, Vec<f64>), TrainError> {
    let mut quiet = Quiet::default();
    let request = TrainRequest {
        run,
        source: "",
        resolved: &run.to_ron(),
        out,
        resume,
        until: None,
        threads,
        graphs: true,
        group: "t",
        axes: BTreeMap::new(),
    };
    train(&request, &mut quiet).map(|o| (o, quiet.losses))
}

#[test]
fn a_resumed_run_continues_bitwise() {
    let dir = tempfile::tempdir().expect("a folder");
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    let (end, losses) = go(
        &run(20, "batch: 4, accumulate: 2, checkpoint: (every: 10)"),
        &whole,
        false,
        2,
    )
    .expect("trains");
    go(
        &run(20, "batch: 4, accumulate: 2, checkpoint: (every: 10)"),
        &cut,
        false,
        2,
    )
    .expect("trains");
    // As if it had stopped after step 10.
    fs::remove_dir_all(cut.join("checkpoints/step-000020")).expect("the last checkpoint");
    let (again, rest) = go(
        &run(20, "batch: 4, accumulate: 2, checkpoint: (every: 10)"),
        &cut,
        true,
        1,
    )
    .expect("resumes");
    assert_eq!(losses[10..], rest[..], "losses differ after the resume");
    let bytes = |o: &Outcome| {
        fs::read(
            o.checkpoint
                .as_ref()
                .expect("a checkpoint")
                .join("model.safetensors"),
        )
        .expect("weights")
    };
    assert_eq!(
        bytes(&end),
        bytes(&again),
        "weights differ after the resume"
    );
}

#[test]
fn micro_batches_add_up_to_the_whole_batch() {
    let dir = tempfile::tempdir().expect("a folder");
    let (_, whole) = go(&run(6, "batch: 8"), &dir.path().join("a"), false, 2).expect("trains");
    let (_, parts) = go(
        &run(6, "batch: 2, accumulate: 4"),
        &dir.path().join("b"),
        false,
        2,
    )
    .expect("trains");
    for (i, (a, b)) in whole.iter().zip(&parts).enumerate() {
        // The router's balance loss is a mean of means over micro-batches: not linear in the batch, and a small share of the loss.
        assert!(
            (a - b).abs() < 5e-3 * a.abs(),
            "step {}: {a} against {b}",
            i + 1
        );
    }
}

#[test]
fn both_cpu_backends_walk_the_same_way() {
    let dir = tempfile::tempdir().expect("a folder");
    let (_, native) = go(
        &run(8, "batch: 2, backend: cpu"),
        &dir.path().join("cpu"),
        false,
        2,
    )
    .expect("trains");
    let (_, reference) = go(
        &run(8, "batch: 2, backend: dfdx"),
        &dir.path().join("dfdx"),
        false,
        1,
    )
    .expect("trains");
    for (i, (a, b)) in native.iter().zip(&reference).enumerate() {
        assert!(
            (a - b).abs() < 1e-3 * a.abs(),
            "step {}: {a} on cpu, {b} on dfdx",
            i + 1
        );
    }
}

/// MAD's compression: with the decoder the row is read back from one state, so that a model too small to hold it cannot have it all.
#[test]
fn a_decoder_reads_rows_back_from_one_state() {
    let run = |decoder: &str, backend: &str, steps: usize| {
        let text = format!(
            "( name: \"c\", model: ( vocab_size: 8, d_model: 16, n_layers: 2, context_len: 8, {decoder} init: (std: 0.2), \
             mixers: {{ \"m\": Mamba2(head_dim: 8, d_state: 8, chunk_size: 8) }}, ffns: {{ \"mlp\": Glu(d_ff: 24) }} ), \
             data: Compression(vocab_size: 8), steps: {steps}, batch: 8, seq_len: 8, optimizer: (lr: 1e-2), eval: (rows: 64), \
             log_every: 5, backend: {backend} )"
        );
        parse_run(&Source::new("c.ron", text), &[])
    };
    let dir = tempfile::tempdir().expect("a folder");
    let train = |backend: &str, steps: usize| {
        let run = run("decoder: LastState,", backend, steps).unwrap_or_else(|r| panic!("{r}"));
        let out = dir.path().join(format!("{backend}-{steps}"));
        go(&run, &out, false, 1).expect("trains")
    };
    let ((_, native), (_, reference)) = (train("cpu", 8), train("dfdx", 8));
    for (i, (a, b)) in native.iter().zip(&reference).enumerate() {
        assert!(
            (a - b).abs() < 1e-3 * a.abs(),
            "step {}: {a} on cpu, {b} on dfdx",
            i + 1
        );
    }
    // Seven tokens of seven values: a guess scores 1/7, and a model that saw the row itself would soon score 1.
    let (outcome, _) = train("cpu", 200);
    let accuracy = outcome.summary.final_metrics["eval/accuracy"];
    assert!((0.25..0.95).contains(&accuracy), "{accuracy}");
    let refused = run("", "cpu", 8).expect_err("no decoder").to_string();
    assert!(refused.contains("decoder: LastState"), "{refused}");
}

#[test]
fn a_loss_that_is_no_number_names_its_node_and_step() {
    let run = run(5, "batch: 2");
    let mut trainer =
        Trainer::new(&run, engine::open(run.backend, 1).expect("an engine")).expect("a trainer");
    let name = "layers.1.ffn.router";
    let ty = trainer
        .params()
        .iter()
        .find(|p| p.name == name)
        .expect("a router")
        .ty
        .clone();
    let poison = marimba_backend::HostTensor::F32(vec![f32::NAN; ty.len()]);
    trainer
        .engine_mut()
        .write(&format!("param:{name}"), &ty, &poison)
        .expect("writes");
    let phase = &run.phases[0];
    let mut loader = marimba_experiments::data::open::open(
        &phase.data,
        phase.seq_len,
        0,
        marimba_experiments::data::Worker::ALL,
    )
    .expect("data");
    let batch = loader.next(2).expect("rows");
    let error = trainer
        .step(3, 1e-3, &[batch], false)
        .expect_err("no number");
    let text = error.to_string();
    assert!(
        text.contains("step 3") && text.contains("layers[1].ffn"),
        "{text}"
    );
}

#[test]
fn a_folder_holds_one_run() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("r");
    go(&run(2, "batch: 2"), &out, false, 1).expect("trains");
    assert!(matches!(
        go(&run(2, "batch: 2"), &out, false, 1),
        Err(TrainError::Record(_))
    ));
}

#[test]
fn a_checkpoint_of_another_model_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("r");
    go(&run(2, "batch: 2"), &out, false, 1).expect("trains");
    let text = run(4, "batch: 2").to_ron().replace("d_ff: 24", "d_ff: 32");
    let other = parse_run(&Source::new("o.ron", text), &[]).unwrap_or_else(|r| panic!("{r}"));
    let error = go(&other, &out, true, 1)
        .expect_err("another model")
        .to_string();
    assert!(error.contains("layers.0.ffn.gate_proj"), "{error}");
}

struct Silent;
impl SweepObserver for Silent {
    fn event(&mut self, _: usize, _: Event<'_>) {}
}

/// One member cannot find its data; the others finish, and are not run a second time.
#[test]
fn members_fail_alone_and_never_run_twice() {
    let dir = tempfile::tempdir().expect("a folder");
    let text = format!(
        "( name: \"s\", base: ( model: {MODEL}, data: Mqar(vocab_size: 48, n_pairs: 4), steps: 3, batch: 2, seq_len: 24 ), \
         points: [ (name: \"good\"), (name: \"bad\", set: {{ \"data\": Text(path: \"absent.txt\"), \"model.vocab_size\": 256 }}) ], \
         seeds: [0, 1] )"
    );
    let sweep = parse_sweep(&Source::new("s.ron", text), &[]).unwrap_or_else(|r| panic!("{r}"));
    let request = SweepRequest {
        sweep: &sweep,
        source: "",
        out: dir.path(),
        jobs: 2,
        threads: None,
        only: None,
    };
    let first = sweep::run(&request, Box::new(Silent));
    let kinds = |ended: &[Ended]| -> Vec<&'static str> {
        ended
            .iter()
            .map(|e| match e {
                Ended::AlreadyDone => "done before",
                Ended::Finished(_) => "finished",
                Ended::Failed(why) if why.contains("absent.txt") => "failed",
                Ended::Failed(_)
                | Ended::Halved(_)
                | Ended::Paused(_)
                | Ended::Interrupted
                | Ended::NotBegun => "other",
            })
            .collect()
    };
    assert_eq!(kinds(&first), ["finished", "finished", "failed", "failed"]);
    let second = sweep::run(&request, Box::new(Silent));
    assert_eq!(
        kinds(&second),
        ["done before", "done before", "failed", "failed"]
    );
}
