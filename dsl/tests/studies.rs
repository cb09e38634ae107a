//! The stored studies: their files check, and what is stored beside them is theirs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use marimba_dsl::{Source, load_sweep, parse_model};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn studies() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../experiments/studies");
    let mut dirs: Vec<PathBuf> = fs::read_dir(root)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.join("README.md").is_file() && !p.ends_with("data"))
        .collect();
    dirs.sort();
    dirs
}

fn files(dir: &Path, end: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|e| e.unwrap().path())
        .filter(|p| p.to_string_lossy().ends_with(end))
        .collect();
    found.sort();
    found
}

#[test]
fn every_file_of_every_study_checks() {
    let studies = studies();
    assert!(studies.len() >= 6, "studies a to f: {studies:?}");
    for dir in &studies {
        let sweeps = files(dir, ".ron");
        assert!(!sweeps.is_empty(), "{} has no sweep", dir.display());
        for file in sweeps {
            load_sweep(&file, &[]).unwrap_or_else(|r| panic!("{}\n{r}", file.display()));
        }
        for file in files(&dir.join("models"), ".ron") {
            let source = Source::read(&file).unwrap();
            parse_model(&source, &[]).unwrap_or_else(|r| panic!("{}\n{r}", file.display()));
        }
    }
}

/// Whether a sweep is the grid for a bigger machine.
fn is_full(file: &Path) -> bool {
    file.file_name()
        .is_some_and(|n| n.to_string_lossy().starts_with("full"))
}

/// The sweep file whose results these are: `results.csv` of `study.ron`, `x.results.csv` of `x.ron`.
fn sweep_of(csv: &Path) -> PathBuf {
    let name = csv.file_name().unwrap().to_string_lossy().into_owned();
    let stem = name.strip_suffix("results.csv").unwrap();
    let stem = stem.strip_suffix('.').unwrap_or("study");
    csv.with_file_name(format!("{stem}.ron"))
}

#[test]
fn stored_results_are_those_of_their_files() {
    for dir in studies() {
        let readme = fs::read_to_string(dir.join("README.md")).unwrap();
        let stored = files(&dir, "results.csv");
        let sweeps = files(&dir, ".ron").iter().filter(|f| !is_full(f)).count();
        let says_not_run = readme.matches("Not run yet.").count();
        assert_eq!(
            stored.len() + says_not_run,
            sweeps,
            "{} must have results of every sweep, or say that there are none",
            dir.display()
        );
        for csv in stored {
            let report = csv.to_string_lossy().replace("results.csv", "report.html");
            assert!(Path::new(&report).is_file(), "{report} is missing");
            let sweep = load_sweep(sweep_of(&csv), &[]).unwrap();
            let mut wanted: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
            for m in &sweep.members {
                wanted
                    .entry(m.group.clone())
                    .or_default()
                    .insert(m.run.seed);
            }
            let text = fs::read_to_string(&csv).unwrap();
            let mut lines = text.lines();
            let head = lines.next().unwrap();
            assert!(head.starts_with("group,members,finished,seeds,"), "{head}");
            let mut stored: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
            for line in lines {
                let cells: Vec<&str> = line.split(',').take(4).collect();
                assert_eq!(cells[1], cells[2], "unfinished members: {line}");
                let seeds = cells[3].split(' ').map(|s| s.parse().unwrap()).collect();
                stored.insert(cells[0].to_owned(), seeds);
            }
            assert_eq!(stored, wanted, "{}", csv.display());
        }
    }
}
