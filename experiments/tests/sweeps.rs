//! Sweeps as a user runs them: constraints held, halving, killed at random and resumed, nothing run twice.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A sweep of tiny models; `rest` follows `base`.
fn write(dir: &Path, steps: usize, rest: &str) -> PathBuf {
    let file = dir.join("sweep.ron");
    let text = format!(
        r#"(
    name: "s",
    base: (
        model: (name: "m", vocab_size: 32, d_model: 16, n_layers: 1, mixers: {{"attn": Attention(n_heads: 2)}}, ffns: {{"mlp": Glu(d_ff: 32)}}),
        data: Mqar(vocab_size: 32, n_pairs: 2, random_non_queries: false), seq_len: 8, batch: 4, steps: {steps},
        optimizer: (lr: 3e-3), eval: (every: 20, rows: 16), log_every: 4, checkpoint: (every: 10),
    ),
    {rest}
)"#
    );
    fs::write(&file, text).unwrap();
    file
}

fn marimba(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marimba"));
    command.args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    marimba(args).output().unwrap()
}

/// Runs a sweep that must succeed.
fn sweep(file: &Path, out: &Path, more: &[&str]) -> Output {
    let (file, out) = (file.to_str().unwrap(), out.to_str().unwrap());
    let output = run(&[&["sweep", file, "--out", out], more].concat());
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Every file below a folder and its bytes; locks and reports apart.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path));
        } else if path.file_name().unwrap() != ".lock" {
            all.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    all
}

/// Rows of `metrics.jsonl` without what depends on the clock.
fn curves(member: &Path) -> Vec<Value> {
    let text = fs::read_to_string(member.join("metrics.jsonl")).unwrap();
    let row = |line: &str| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        let map = row.as_object_mut().unwrap();
        map.remove("time");
        map.retain(|tag, _| !tag.starts_with("perf/"));
        row
    };
    text.lines().map(row).collect()
}

/// Bytes of the weights of the last checkpoint.
fn weights(member: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let root = member.join("checkpoints");
    let mut steps: Vec<_> = fs::read_dir(&root)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    steps.sort();
    assert!(
        steps.iter().all(|s| s
            .file_name()
            .unwrap()
            .to_string_lossy()
            .starts_with("step-")),
        "leftovers in {steps:?}"
    );
    let last = steps.last().unwrap();
    let all = files(last).into_iter();
    all.filter(|(p, _)| p.extension().is_some_and(|e| e == "safetensors"))
        .map(|(p, b)| (p.strip_prefix(last).unwrap().to_path_buf(), b))
        .collect()
}

fn states(out: &Path) -> BTreeMap<String, (String, u64)> {
    let members = fs::read_dir(out).unwrap().map(|e| e.unwrap().path());
    members
        .filter(|p| p.join("status.json").is_file())
        .map(|p| {
            let status = json(&p.join("status.json"));
            let name = p.file_name().unwrap().to_string_lossy().into_owned();
            let state = status["state"].as_str().unwrap().to_owned();
            (name, (state, status["step"].as_u64().unwrap()))
        })
        .collect()
}

#[test]
fn a_held_quantity_is_reached_and_its_residual_shown() {
    let tmp = tempfile::tempdir().unwrap();
    let out = tmp.path().join("out");
    let rest = r#"axes: [(path: "model.d_model", values: [24, 16])],
        hold: (quantity: params_total, knobs: [(path: "model.ffns.mlp.d_ff", min: 4, max: 256, multiple: 4)], tolerance: TOL)"#;
    let file = write(tmp.path(), 4, &rest.replace("TOL", "0.05"));
    let listed = sweep(&file, &out, &["--dry-run", "--json"]);
    let rows: Vec<Value> = serde_json::from_slice(&listed.stdout).unwrap();
    let held = |i: usize, key: &str| rows[i]["held"][key].as_f64().unwrap();
    assert_eq!(held(0, "residual"), 0.0);
    assert!(held(1, "residual").abs() <= 0.05 && held(1, "residual") != 0.0);
    assert!(
        rows[1]["held"]["knobs"]["model.ffns.mlp.d_ff"]
            .as_u64()
            .unwrap()
            > 32
    );

    sweep(&file, &out, &[]);
    for i in 0..2 {
        let summary = json(
            &out.join(rows[i]["member"].as_str().unwrap())
                .join("summary.json"),
        );
        assert_eq!(
            summary["params_total"].as_f64().unwrap(),
            held(i, "reached")
        );
    }
    let (out_text, csv) = (out.to_str().unwrap(), tmp.path().join("t.csv"));
    let compared = run(&["compare", out_text, "--csv", csv.to_str().unwrap()]);
    let table = String::from_utf8_lossy(&compared.stdout).into_owned();
    assert!(table.contains("off params_total"), "{table}");
    assert!(fs::read_to_string(&csv).unwrap().contains("held_residual"));

    let file = write(tmp.path(), 4, &rest.replace("TOL", "0.0001"));
    let refused = run(&["sweep", file.to_str().unwrap(), "--dry-run"]);
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success());
    assert!(
        words.contains("d_model=16") && words.contains("the nearest is") && words.contains('%'),
        "{words}"
    );
}

#[test]
fn halving_ends_the_worse_and_a_finished_sweep_does_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let axes =
        r#"axes: [(path: "optimizer.lr", values: [1e-5, 1e-2, 1e-4, 3e-3])], seeds: [0, 1],"#;
    let halved = write(
        tmp.path(),
        40,
        &format!("{axes} halving: (first_steps: 10)"),
    );
    let out = tmp.path().join("halved");
    sweep(&halved, &out, &["--jobs", "2"]);
    let after = states(&out);
    let count = |state: &str, step: u64| {
        let same = |s: &&(String, u64)| s.0 == state && s.1 == step;
        after.values().filter(same).count()
    };
    assert_eq!(
        [
            count("stopped", 10),
            count("stopped", 20),
            count("finished", 40)
        ],
        [4, 2, 2],
        "{after:?}"
    );
    for slow in ["lr=1e-5-seed=0", "lr=1e-4-seed=1"] {
        assert_eq!(after[slow], ("stopped".to_owned(), 10), "{after:?}");
    }

    let before = files(&out);
    let again = sweep(&halved, &out, &["--jobs", "2"]);
    let words = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(!words.contains("begins"), "{words}");
    let reports = |p: &&PathBuf| p.parent() != Some(out.as_path());
    let now = files(&out);
    for path in before.keys().chain(now.keys()).filter(reports) {
        assert_eq!(
            before.get(path),
            now.get(path),
            "{} changed",
            path.display()
        );
    }

    // Pauses leave no trace in what was trained: the winners are as they would be without halving.
    let plain = write(tmp.path(), 40, axes);
    let whole = tmp.path().join("whole");
    sweep(&plain, &whole, &["--jobs", "2"]);
    let losses = |dir: &Path| -> Vec<Value> {
        let rows = curves(dir).into_iter();
        rows.filter(|r| r.get("train/loss").is_some())
            .map(|r| r["train/loss"].clone())
            .collect()
    };
    for (name, _) in after.iter().filter(|(_, s)| s.0 == "finished") {
        assert_eq!(losses(&out.join(name)), losses(&whole.join(name)), "{name}");
        assert_eq!(
            weights(&out.join(name)),
            weights(&whole.join(name)),
            "{name}"
        );
    }
}

#[test]
fn patience_ends_a_run_and_a_resumed_one_does_not_go_on() {
    let tmp = tempfile::tempdir().unwrap();
    let rest =
        r#"axes: [(path: "early_stop", values: [(metric: "loss", patience: 2)], labels: ["p"])], "#;
    let file = write(tmp.path(), 400, &format!("{rest} seeds: [0]"));
    let out = tmp.path().join("out");
    // A learning rate so small that the loss is the same at every evaluation but for noise below any gain.
    let still = [
        "--set",
        "base.optimizer.lr=1e-30",
        "--set",
        "base.optimizer.weight_decay=0",
    ];
    sweep(&file, &out, &still);
    let member = out.join("early_stop=p-seed=0");
    let status = json(&member.join("status.json"));
    assert_eq!(
        (status["state"].as_str(), status["step"].as_u64()),
        (Some("finished"), Some(60))
    );
    // As if it had been killed before its summary was written.
    fs::remove_file(member.join("summary.json")).unwrap();
    sweep(&file, &out, &[&still[..], &["--resume"]].concat());
    assert_eq!(curves(&member).last().unwrap()["step"], 60);
    assert_eq!(json(&member.join("summary.json"))["status"], "finished");
}

/// SplitMix64.
fn random(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

fn kill_ten_times(rest: &str) {
    let tmp = tempfile::tempdir().unwrap();
    let file = write(tmp.path(), 300, rest);
    let (whole, killed) = (tmp.path().join("whole"), tmp.path().join("killed"));
    let begun = Instant::now();
    sweep(&file, &whole, &["--jobs", "2"]);
    let secs = begun.elapsed().as_secs_f64();

    let mut seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64;
    println!("seed {seed}, {secs:.2} s without kills");
    let args = [
        "sweep",
        file.to_str().unwrap(),
        "--out",
        killed.to_str().unwrap(),
        "--jobs",
        "2",
        "--resume",
    ];
    let over = |state: &str| state == "finished" || state == "stopped";
    let mut done: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    let mut cut = 0;
    for _ in 0..10 {
        let mut child = marimba(&args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_secs_f64(secs * 0.3 * random(&mut seed)));
        cut += usize::from(child.try_wait().unwrap().is_none());
        // SIGKILL on Unix: nothing is flushed, no handler runs.
        child.kill().unwrap();
        child.wait().unwrap();
        for (path, bytes) in &done {
            assert_eq!(
                &fs::read(path).unwrap(),
                bytes,
                "{} was touched again",
                path.display()
            );
        }
        if killed.is_dir() {
            for (name, (state, _)) in states(&killed) {
                let member = killed.join(&name);
                if over(&state) && member.join("summary.json").is_file() {
                    done.extend(files(&member));
                }
            }
        }
    }
    assert!(cut >= 3, "only {cut} of 10 kills met a running sweep");
    sweep(&file, &killed, &["--jobs", "2", "--resume"]);
    let all = states(&whole);
    assert_eq!(all, states(&killed));
    for name in all.keys() {
        let (a, b) = (whole.join(name), killed.join(name));
        assert_eq!(curves(&a), curves(&b), "{name}: curves differ");
        assert_eq!(weights(&a), weights(&b), "{name}: weights differ");
        let (mut x, mut y) = (json(&a.join("summary.json")), json(&b.join("summary.json")));
        for s in [&mut x, &mut y] {
            s.as_object_mut().unwrap().remove("tokens_per_sec");
            for values in ["final", "best"] {
                s[values]
                    .as_object_mut()
                    .unwrap()
                    .retain(|tag, _| !tag.starts_with("perf/"));
            }
        }
        assert_eq!(x, y, "{name}: summaries differ");
    }
}

#[test]
fn killing_a_sweep_ten_times_loses_nothing_and_repeats_nothing() {
    kill_ten_times(r#"axes: [(path: "optimizer.lr", values: [1e-3, 3e-3])], seeds: [0, 1]"#);
}

#[test]
fn killing_a_halving_sweep_ten_times_changes_no_decision() {
    kill_ten_times(
        r#"axes: [(path: "optimizer.lr", values: [1e-5, 1e-3, 3e-3, 1e-2])], metric: "loss", halving: (first_steps: 60)"#,
    );
}
