//! `marimba compare` as a user runs it, on what is wrong, cut short, still written, or not comparable; and a sweep that cannot be handed to
//! Slurm.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use marimba_experiments::record::{
    Recorder, RunDir, RunFiles, RunState, RunSummary, run_dir::environment,
};
use std::fs;
use std::path::Path;
use std::process::Command;

/// A run with this last value of each metric.
fn write_run(dir: &Path, seed: u64, metrics: &[(&str, f64)], state: RunState) {
    let files = RunFiles {
        run_ron: "",
        resolved_ron: &format!("Run(seed: {seed})"),
        env: environment([]),
        graph: None,
        group: "g",
        seed,
    };
    let mut run = RunDir::create(dir, &files).unwrap();
    let mut recorder = Recorder::create(&run).unwrap();
    for step in 1..=20u64 {
        for (tag, value) in metrics {
            let value = value * (1.0 + 1.0 / step as f64);
            recorder.scalar(step, tag, value).unwrap();
        }
    }
    recorder.finish(state).unwrap();
    if state == RunState::Finished {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        run.set_summary(&RunSummary {
            group: name.trim_end_matches(char::is_numeric).to_owned(),
            name,
            seed,
            status: state,
            params_total: 10,
            params_active: 10,
            state_bytes_per_seq: 0,
            kv_bytes_per_token: 0,
            seq_len: 8,
            flops_per_token: 20.0,
            tokens_per_sec: 1.0,
            final_metrics: metrics.iter().map(|(t, v)| ((*t).to_owned(), *v)).collect(),
            best_metrics: Default::default(),
            config_hash: String::new(),
            graph_hash: String::new(),
            data_hash: String::new(),
            axes: Default::default(),
        })
        .unwrap();
    }
    run.set_status(state, 20, None).unwrap();
}

/// Exit status, stdout, stderr.
fn compare(args: &[&str]) -> (Option<i32>, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_marimba"))
        .arg("compare")
        .args(args)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (out.status.code(), text(&out.stdout), text(&out.stderr))
}

/// Refused in one line that says all of `parts`.
fn refused(args: &[&str], parts: &[&str]) {
    let (code, out, err) = compare(args);
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(
        err.starts_with("error: ") && err.trim().lines().count() == 1,
        "{err}"
    );
    assert!(!err.contains("panicked"), "{err}");
    for part in parts {
        assert!(err.contains(part), "{part} is not in\n{err}");
    }
}

/// Compared, with all of `parts` said on stdout.
fn told(args: &[&str], parts: &[&str]) {
    let (code, out, err) = compare(args);
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(!err.contains("panicked"), "{err}");
    // The table is broken at the width of the terminal.
    let flat = out.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in parts {
        assert!(flat.contains(part), "{part} is not in\n{out}");
    }
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn folders_without_runs_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    refused(
        &[&name(&dir.path().join("none"))],
        &["no such folder", "none"],
    );
    refused(&[&name(dir.path())], &["no run found", "expected"]);
}

#[test]
fn a_database_of_another_version_or_kind_is_refused_and_can_be_deleted() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..2 {
        let run = dir.path().join(format!("a{seed}"));
        write_run(&run, seed, &[("eval/loss", 1.0)], RunState::Finished);
    }
    let (db, root) = (dir.path().join("results.db"), name(dir.path()));
    // A folder is a sweep, and has a database, where a sweep wrote its file.
    fs::write(
        dir.path().join("sweep.json"),
        r#"{"name":"s","metric":"eval/loss","goal":"lower"}"#,
    )
    .unwrap();
    let (code, _, err) = compare(&[&root]);
    if code != Some(0) {
        panic!("{err}");
    }
    if !db.exists() {
        panic!("no database was made in {root}");
    }
    let mut bytes = fs::read(&db).unwrap();
    // The layout's number: bytes 60 to 63 of SQLite's header.
    bytes[60..64].copy_from_slice(&99u32.to_be_bytes());
    fs::write(&db, &bytes).unwrap();
    refused(
        &[&root],
        &["another version", "layout 99", "delete it", "results.db"],
    );
    fs::write(
        &db,
        "not a database at all, but long enough to be looked at",
    )
    .unwrap();
    refused(&[&root], &["no results database", "move it away"]);
    fs::remove_file(&db).unwrap();
    told(&[&root], &["eval/loss"]);
}

#[test]
fn runs_cut_short_or_still_written_are_compared_and_said() {
    let dir = tempfile::tempdir().unwrap();
    let runs: Vec<_> = ["whole", "cut", "going"].map(|n| dir.path().join(n)).into();
    let (whole, cut, going) = (&runs[0], &runs[1], &runs[2]);
    write_run(whole, 0, &[("eval/loss", 1.0)], RunState::Finished);
    write_run(cut, 1, &[("eval/loss", 2.0)], RunState::Finished);
    write_run(going, 2, &[("eval/loss", 3.0)], RunState::Running);
    // Half a line at the end of the curves, as a process that is writing or was killed leaves it; no summary.
    let curves = cut.join("metrics.jsonl");
    let text = fs::read(&curves).unwrap();
    fs::write(&curves, &text[..text.len() - 7]).unwrap();
    for entry in fs::read_dir(cut.join("tb")).unwrap() {
        let file = entry.unwrap().path();
        let bytes = fs::read(&file).unwrap();
        fs::write(&file, &bytes[..bytes.len() - 5]).unwrap();
    }
    told(
        &[&name(dir.path()), "--metric", "eval/loss"],
        &["whole", "cut", "going is running; it does not count"],
    );
    // Event files alone, cut: as another writer's run.
    let bare = dir.path().join("bare");
    fs::create_dir(&bare).unwrap();
    for entry in fs::read_dir(cut.join("tb")).unwrap() {
        let file = entry.unwrap().path();
        fs::copy(&file, bare.join(file.file_name().unwrap())).unwrap();
    }
    told(&[&name(&bare)], &["eval/loss", "bare"]);
    // Nothing finished at all.
    told(&[&name(going)], &["No member has finished"]);
}

#[test]
fn runs_with_different_metrics_are_joined_where_they_match() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let shared = ("eval/loss", 1.0);
    write_run(&a, 0, &[shared, ("eval/accuracy", 0.5)], RunState::Finished);
    write_run(&b, 0, &[shared, ("eval/bleu", 0.5)], RunState::Finished);
    told(
        &[&name(dir.path())],
        &[
            "eval/loss",
            "eval/accuracy is missing in b",
            "eval/bleu is missing in a",
        ],
    );
    refused(
        &[&name(dir.path()), "--metric", "eval/rouge"],
        &["no run has the metric eval/rouge", "eval/loss"],
    );
    refused(
        &[&name(dir.path()), "--baseline", "nobody"],
        &["there is no group nobody"],
    );
    // Two runs that share nothing.
    fs::remove_dir_all(&b).unwrap();
    write_run(&b, 0, &[("other", 2.0)], RunState::Finished);
    let (code, out, err) = compare(&[&name(&a), &name(&b)]);
    assert!(code == Some(0) || code == Some(1), "{out}{err}");
    assert!(!err.contains("panicked"), "{err}");
}

#[test]
fn halving_is_not_handed_to_slurm() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("s.ron");
    let sweep = r#"(
        name: "s", seeds: [0], metric: "loss", halving: (first_steps: 1),
        base: (
            model: (vocab_size: 32, d_model: 16, n_layers: 1, context_len: 16, mixers: { "m": Mamba1(d_state: 4) }),
            data: Mqar(vocab_size: 32, n_pairs: 4), seq_len: 16, steps: 4,
        ),
        axes: [(path: "optimizer.lr", values: [1e-3, 1e-2])],
    )"#;
    fs::write(&file, sweep).unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_marimba"))
        .args(["sweep", &name(&file), "--launcher", "slurm", "--out"])
        .arg(dir.path().join("out"))
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{err}");
    for part in [
        "halving compares members while they run",
        "--launcher local",
    ] {
        assert!(err.contains(part), "{part} is not in\n{err}");
    }
    assert!(!dir.path().join("out").exists());
}
