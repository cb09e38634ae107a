//! The rules of ARCHITECTURE.md, asserted: who imports whom, one file stem per op on every floor, every file says what it is.

use marimba_ir::op::Op;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const CRATES: [&str; 6] = ["dsl", "ir", "kernels", "backend", "experiments", "tests"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("a workspace")
        .to_path_buf()
}

fn files(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let mut out = Vec::new();
    let Ok(entries) = fs::read_dir(dir) else {
        return out;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if path
                .file_name()
                .is_some_and(|n| n != "target" && n != "fixtures")
            {
                out.extend(files(&path, ending));
            }
        } else if path.to_string_lossy().ends_with(ending) {
            out.push(path);
        }
    }
    out.sort();
    out
}

fn sources() -> Vec<(PathBuf, String)> {
    let mut out = Vec::new();
    for krate in CRATES {
        for path in files(&root().join(krate), ".rs") {
            let text = fs::read_to_string(&path).expect("readable");
            out.push((
                path.strip_prefix(root())
                    .expect("below the root")
                    .to_path_buf(),
                text,
            ));
        }
    }
    assert!(out.len() > 100, "found only {} sources", out.len());
    out
}

#[test]
fn every_file_says_what_it_is() {
    let silent: Vec<_> = sources()
        .into_iter()
        .filter(|(_, t)| !t.starts_with("//!"))
        .map(|(p, _)| p)
        .collect();
    assert!(
        silent.is_empty(),
        "files that do not open with //!: {silent:?}"
    );
}

/// Dependencies among our own crates, as manifests declare them (development dependencies aside).
fn declared(krate: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(root().join(krate).join("Cargo.toml")).expect("a manifest");
    let body = text.split("[dependencies]").nth(1).unwrap_or("");
    let body = body.split("\n[").next().unwrap_or("");
    body.lines()
        .filter_map(|l| l.split(['.', ' ', '=']).next())
        .filter(|n| n.starts_with("marimba-"))
        .map(str::to_string)
        .collect()
}

#[test]
fn lower_floors_never_import_higher_ones() {
    let floor = |name: &str| {
        CRATES
            .iter()
            .position(|c| format!("marimba-{c}") == name)
            .expect("one of ours")
    };
    for krate in CRATES {
        for dep in declared(krate) {
            assert!(
                floor(&dep) < floor(&format!("marimba-{krate}")),
                "{krate} depends on {dep}"
            );
        }
    }
    assert!(declared("dsl").is_empty() && declared("kernels").is_empty());
}

#[test]
fn the_crate_table_is_true() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    for krate in CRATES {
        let row = text
            .lines()
            .find(|l| l.starts_with(&format!("| marimba-{krate} |")))
            .unwrap_or_else(|| panic!("no row for marimba-{krate}"));
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        assert_eq!(cells[2], format!("`{krate}`"));
        let listed: BTreeSet<String> = cells[4]
            .split(", ")
            .filter(|c| c.starts_with("marimba-"))
            .map(str::to_string)
            .collect();
        assert_eq!(listed, declared(krate), "{krate}");
    }
}

#[test]
fn names_stay_where_they_belong() {
    let allowed: [(&str, &[&str]); 3] = [
        ("dfdx::", &["backend/src/dfdx"]),
        ("use clap", &["experiments/src/cli"]),
        ("cudarc::", &["kernels/src", "backend/src/cuda"]),
    ];
    for (path, text) in sources() {
        let shown = path.to_string_lossy().into_owned();
        if shown == "tests/tests/architecture.rs" {
            continue;
        }
        for (word, places) in allowed {
            let used = text.lines().any(|l| {
                let l = l.trim_start();
                !l.starts_with("//")
                    && (l.starts_with(&format!("use {word}"))
                        || (word.starts_with("use ") && l.starts_with(word)))
            });
            assert!(
                !used || places.iter().any(|p| shown.starts_with(p)),
                "{shown} uses {word}"
            );
        }
        let unsafe_used = text.lines().any(|l| {
            let l = l.trim_start();
            !l.starts_with("//")
                && (l.contains("unsafe {") || l.contains("unsafe fn") || l.contains("unsafe impl"))
        });
        // Memory maps of files that others may change are unsafe by nature; they stand in files of their own that say so.
        let places = [
            "kernels/",
            "backend/src/cpu",
            "backend/src/cuda",
            "experiments/src/data/mmap.rs",
            "experiments/src/checkpoint/safetensors.rs",
        ];
        assert!(
            !unsafe_used || places.iter().any(|p| shown.starts_with(p)),
            "{shown} has unsafe code"
        );
    }
}

#[test]
fn every_op_has_its_file_on_every_floor() {
    let stems = |dir: &str| -> BTreeSet<String> {
        files(&root().join(dir), ".rs")
            .iter()
            .filter_map(|p| p.file_stem().map(|s| s.to_string_lossy().into_owned()))
            .collect()
    };
    let ops: BTreeSet<String> = stems("ir/src/op")
        .into_iter()
        .filter(|s| s != "mod")
        .collect();
    assert!(ops.contains("ssd") && ops.len() > 15, "{ops:?}");
    for floor in ["backend/src/cpu", "backend/src/dfdx"] {
        let there = stems(floor);
        let missing: Vec<_> = ops.difference(&there).collect();
        assert!(missing.is_empty(), "{floor} has no file for {missing:?}");
    }
    // Every op is documented in the file of its name or of its family, by its name in the text form.
    for name in Op::NAMES {
        let found = files(&root().join("ir/src/op"), ".rs").iter().any(|p| {
            let text = fs::read_to_string(p).expect("readable");
            text.lines()
                .take_while(|l| l.starts_with("//!"))
                .any(|l| l.contains(name))
                || text.contains(&format!("NAME: &'static str = \"{name}\""))
        });
        assert!(found, "{name} is nowhere documented");
    }
}
