//! The same weights in f32, bf16 and f16: f32 is what training evaluated, the others differ as their mantissas do, and what leaves the
//! range of f16 is counted and spoils the loss there only.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use marimba_dsl::run::Run;
use marimba_dsl::{Source, Valid, parse_run};
use marimba_experiments::checkpoint::{self, Checkpoint, Contents, Weights};
use marimba_experiments::facts::Facts;
use marimba_experiments::formats::{Format, FormatScore, score_formats};
use marimba_experiments::train::{LogLine, Observer, StepOutcome, TrainRequest, train};
use std::collections::BTreeMap;
use std::path::Path;

const MODEL: &str = r#"(
    name: "tiny", vocab_size: 48, d_model: 16, n_layers: 3, context_len: 24,
    mixers: { "attn": Attention(n_heads: 2), "m1": Mamba1(d_state: 4), "m2": Mamba2(head_dim: 8, d_state: 4, chunk_size: 8) },
    ffns: { "mlp": Glu(d_ff: 24), "moe": Moe(n_experts: 4, top_k: 2, d_ff: 16) },
    layout: ( mixer: ["m2", "attn", "m1"], ffn: ["mlp", "moe", "mlp"] ),
)"#;

struct Quiet;

impl Observer for Quiet {
    fn begin(&mut self, _: usize, _: usize, _: &Facts) {}
    fn step(&mut self, _: usize, _: &StepOutcome) {}
    fn log(&mut self, _: &LogLine) {}
    fn eval(&mut self, _: usize, _: &BTreeMap<String, f64>) {}
    fn note(&mut self, _: &str) {}
}

/// A short training in `out`, and its final evaluation loss.
fn trained(out: &Path) -> (Valid<Run>, f64) {
    let text = format!(
        "( name: \"t\", model: {MODEL}, data: Mqar(vocab_size: 48, n_pairs: 4), steps: 20, batch: 4, seq_len: 24, \
         optimizer: (lr: 1e-2), eval: (rows: 8) )"
    );
    let run = parse_run(&Source::new("t.ron", text), &[]).unwrap_or_else(|r| panic!("{r}"));
    let request = TrainRequest {
        run: &run,
        source: "",
        resolved: &run.to_ron(),
        out,
        resume: false,
        until: None,
        threads: 1,
        graphs: true,
        group: "t",
        axes: BTreeMap::new(),
    };
    let outcome = train(&request, &mut Quiet).unwrap();
    (run.clone(), outcome.summary.final_metrics["eval/loss"])
}

fn of(scores: &[FormatScore], format: Format) -> &FormatScore {
    scores.iter().find(|s| s.format == format).unwrap()
}

#[test]
fn formats_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let (run, loss) = trained(&out);
    let weights = Weights::open(&out).unwrap();
    let scores = score_formats(&weights, &run, &Format::ALL, 8, 1).unwrap();
    let losses = Format::ALL.map(|f| of(&scores, f).sets[0].loss);
    assert_eq!(losses[0], loss, "f32 is what training evaluated");
    let off = losses.map(|l| (l - losses[0]).abs() / losses[0]);
    assert!(
        0.0 < off[2] && off[2] < off[1] && off[1] < 0.02,
        "{losses:?}"
    );
    for s in &scores {
        assert_eq!((s.sets[0].lost, s.share_beyond_f16()), (0, 0.0));
        assert!(s.taps.iter().any(|t| t.tap == "layers[1].ffn.expert_out"));
    }

    // The same function but for one ffn, whose projections are 300 and 100,000 times as large: still numbers of f16, but not what they give.
    let ckpt = Checkpoint::open(&out).unwrap();
    let grown = dir.path().join("grown");
    let contents = Contents {
        step: 20,
        tokens: 0,
        state: &serde_json::json!({}),
        model_ron: &ckpt.model_ron,
        run_ron: ckpt.run_ron.as_deref(),
        params: &weights.params,
        moments: false,
    };
    checkpoint::save(&grown, &contents, &mut |key, _| {
        let name = key.strip_prefix("param:").unwrap();
        let mut data = ckpt.model.tensor(name).unwrap().to_f32();
        let factor = match name {
            "layers.0.ffn.up_proj" => 300.0,
            "layers.0.ffn.down_proj" => 1e5,
            _ => 1.0,
        };
        data.iter_mut().for_each(|x| *x *= factor);
        assert!(data.iter().all(|x| x.abs() < 65_504.0));
        Ok(data)
    })
    .unwrap();
    let weights = Weights::open(&grown).unwrap();
    let scores = score_formats(&weights, &run, &Format::ALL, 8, 1).unwrap();
    for format in [Format::F32, Format::Bf16] {
        let s = of(&scores, format);
        assert!(s.sets[0].loss.is_finite() && s.sets[0].lost == 0);
        assert!(s.largest().unwrap().max > 65_504.0 && s.share_beyond_f16() > 0.0);
    }
    let f16 = of(&scores, Format::F16);
    assert!(!f16.sets[0].loss.is_finite() && f16.sets[0].lost > 0);
    assert!(f16.share_beyond_f16() > 0.0 && f16.largest().unwrap().max <= 65_504.0);
}
