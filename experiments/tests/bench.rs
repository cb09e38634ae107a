//! Benchmarks as a user runs them, at sizes that take no time: what must hold of their figures on any machine.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use marimba_ir::op::Op;
use serde_json::Value;
use std::collections::BTreeSet;
use std::process::{Command, Output, Stdio};

fn marimba(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_marimba"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// What a benchmark that must succeed prints.
fn json(args: &[&str]) -> Value {
    let output = marimba(&[args, &["--json"]].concat());
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn positive(of: &Value, names: &[&str]) {
    for name in names {
        let x = of[*name].as_f64().unwrap_or(f64::NAN);
        assert!(x > 0.0 && x.is_finite(), "{name} in {of}");
    }
}

/// Ops that only move numbers, or choose among them: they have bytes and no operations.
const WITHOUT_OPERATIONS: [&str; 10] = [
    "embed",
    "dispatch",
    "gather_rows",
    "cache_write",
    "draw",
    "cast",
    "concat",
    "split",
    "last",
    "last_bwd",
];

#[test]
fn every_op_is_measured() {
    let tiny = [
        "--backend",
        "cpu",
        "--size",
        "tiny",
        "--seconds",
        "0",
        "--threads",
        "1",
    ];
    let out = json(&[&["bench", "ops"], &tiny[..]].concat());
    positive(&out, &["matmul_flops_per_sec", "copy_bytes_per_sec"]);
    assert_eq!(out["refused"].as_array().unwrap(), &[] as &[Value]);
    let mut seen = BTreeSet::new();
    for row in out["rows"].as_array().unwrap() {
        positive(
            row,
            &[
                "secs",
                "secs_min",
                "bytes",
                "bytes_per_sec",
                "floor_secs",
                "fraction",
            ],
        );
        let what = row["what"].as_str().unwrap();
        if row["is_op"] == true {
            seen.insert(what.to_string());
            if !WITHOUT_OPERATIONS.contains(&what) {
                positive(row, &["flops", "flops_per_sec"]);
            }
        }
        assert!(row["runs"].as_u64().unwrap() >= 3, "{row}");
    }
    for view in out["views"].as_array().unwrap() {
        seen.insert(view.as_str().unwrap().to_string());
    }
    // Products in 8 bits are a GPU's: `--precision bf16-fp8` shows them.
    let here = |n: &&&str| !["narrow", "linear_fp8"].contains(n);
    let all = Op::NAMES.iter().filter(here).map(|n| n.to_string());
    let all: BTreeSet<String> = all.collect();
    assert_eq!(seen, all);
}

#[test]
fn one_op_is_found_by_its_name_also_within_others() {
    let of = |name: &str| {
        let args = [
            "bench",
            "ops",
            "--op",
            name,
            "--backend",
            "cpu",
            "--size",
            "tiny",
        ];
        let out = json(&[&args, &["--seconds", "0", "--threads", "1"][..]].concat());
        let rows = out["rows"].as_array().unwrap().clone();
        let subjects = rows
            .iter()
            .map(|r| r["subject"].as_str().unwrap().to_string());
        subjects.collect::<BTreeSet<String>>()
    };
    assert_eq!(of("ssd"), BTreeSet::from(["ssd".to_string()]));
    let within = of("grouped_linear_dw");
    assert_eq!(within, BTreeSet::from(["experts".to_string()]));
    let output = marimba(&["bench", "ops", "--op", "softmax", "--backend", "cpu"]);
    assert!(!output.status.success());
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(
        words.contains("no op softmax") && words.contains("selective_scan_bwd"),
        "{words}"
    );
}

#[test]
fn the_reference_stands_beside() {
    let args = [
        "bench",
        "ops",
        "--op",
        "linear",
        "--op",
        "ssd",
        "--reference",
        "--backend",
        "cpu",
    ];
    let out = json(
        &[
            &args,
            &["--size", "tiny", "--seconds", "0", "--threads", "1"][..],
        ]
        .concat(),
    );
    assert!(
        out["reference"].as_str().unwrap().starts_with("dfdx C"),
        "{out}"
    );
    let rows = out["rows"].as_array().unwrap();
    let forward: Vec<&Value> = rows.iter().filter(|r| r["what"] == "forward").collect();
    assert_eq!(forward.len(), 3, "{out}");
    forward
        .iter()
        .for_each(|r| positive(r, &["reference_secs"]));
}

#[test]
fn a_decoding_step_says_what_it_moves() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/bench/jamba-like.ron");
    let args = [
        "bench",
        "step",
        model,
        "--backend",
        "cpu",
        "--batch",
        "2",
        "--cache",
        "16",
    ];
    let out = json(&[&args, &["--seconds", "0", "--threads", "1"][..]].concat());
    positive(
        &out,
        &[
            "step_ms",
            "device_ms",
            "tokens_per_sec",
            "bytes_per_sec",
            "fraction_of_copy",
            "model_flops_per_sec",
            "mfu",
        ],
    );
    // Every weight but the rows of the embedding that no token names is read once: f32.
    let (params, bytes) = (&out["params"], &out["bytes_per_step"]);
    assert!(
        bytes.as_f64().unwrap() > 3.9 * params.as_f64().unwrap(),
        "{out}"
    );
    let rate = out["bytes_per_step"].as_f64().unwrap() / out["step_ms"].as_f64().unwrap() * 1e3;
    assert!((rate / out["bytes_per_sec"].as_f64().unwrap() - 1.0).abs() < 1e-9);
}
