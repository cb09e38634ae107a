//! Files in `errors/` are all wrong, each in several ways; what is said of them is golden.
//!
//! `errors/model-x.ron` is read as a model (`run-`, `sweep-` likewise) and its report compared with `errors/model-x.txt`.
//! After a wanted change: `BLESS=1 cargo test -p marimba-tests --test spec_errors`, and read the difference.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use marimba_dsl::{Report, Set, Source, parse_model, parse_run, parse_sweep};
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("errors")
}

fn report(kind: &str, source: &Source) -> Option<Report> {
    match kind {
        "model" => parse_model(source, &[]).err(),
        "run" => parse_run(source, &[]).err(),
        "sweep" => parse_sweep(source, &[]).err(),
        other => panic!("files in errors/ begin with model-, run- or sweep-, not {other}-"),
    }
}

fn files() -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder())
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "ron"))
        .collect();
    files.sort();
    files
}

#[test]
fn reports_are_as_blessed() {
    let bless = std::env::var_os("BLESS").is_some();
    let mut wrong = Vec::new();
    for file in files() {
        let stem = file.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&file).unwrap();
        let source = Source::new(format!("errors/{stem}.ron"), text);
        let kind = stem.split('-').next().unwrap();
        let said = report(kind, &source)
            .unwrap_or_else(|| panic!("{stem}.ron is accepted"))
            .plain();
        let golden = file.with_extension("txt");
        if bless {
            std::fs::write(&golden, &said).unwrap();
        } else if std::fs::read_to_string(&golden).unwrap_or_default() != said {
            wrong.push(format!("{stem}:\n{said}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn every_violation_has_a_place_in_its_file() {
    for file in files() {
        let stem = file.file_stem().unwrap().to_str().unwrap().to_owned();
        let source = Source::new("f", std::fs::read_to_string(&file).unwrap());
        let report = report(stem.split('-').next().unwrap(), &source).unwrap();
        for f in report.facts() {
            assert!(
                f.line >= 1 && f.column >= 1 && (f.end_line, f.end_column) >= (f.line, f.column),
                "{stem}: {f:?}"
            );
            let plain = !f.message.ends_with('.') && !f.message.starts_with(char::is_uppercase);
            assert!(
                plain,
                "{stem}: messages are lower case without a full stop: {}",
                f.message
            );
        }
        // The terminal rendering says the same words.
        let fancy = report.fancy(false, 400);
        for d in &report.diagnostics {
            assert!(fancy.contains(&d.message), "{stem}: {}\n{fancy}", d.message);
        }
    }
}

#[test]
fn overrides_are_checked_as_files_are() {
    let text =
        r#"(vocab_size: 10, d_model: 8, n_layers: 1, mixers: {"attn": Attention(n_heads: 2)})"#;
    let source = Source::new("m.ron", text);
    for (set, code, place) in [
        ("d_model=9", "model::heads_divide", "m.ron:1:79"),
        ("d_modle=9", "ron::unknown_field", "--set:1:1"),
        ("d_model=wide", "ron::wrong_type", "--set:1:9"),
        ("mixers.atn.n_heads=2", "set::path", "--set:1:1"),
        ("mixers.attn.window=0", "model::window_zero", "--set:1:20"),
    ] {
        let set: Set = set.parse().unwrap();
        let report = parse_model(&source, &[set]).unwrap_err();
        let d = &report.diagnostics[0];
        assert_eq!((d.code, d.place().as_str()), (code, place), "{report}");
    }
    assert!("d_model".parse::<Set>().is_err());
}
