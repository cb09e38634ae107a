//! What the README shows as a file is one that checks.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use marimba_dsl::{Source, load_sweep, parse_model};
use std::fs;
use std::path::Path;

#[test]
fn the_files_that_the_readme_shows_check() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let shown: Vec<&str> = readme
        .split("```ron\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap())
        .collect();
    let [model, sweep] = shown[..] else {
        panic!(
            "a model and a sweep are expected, not {} files",
            shown.len()
        );
    };
    parse_model(&Source::new("README.md", model), &[]).unwrap_or_else(|r| panic!("{r}"));
    let file = root.join("experiments/width.ron");
    let text = fs::read_to_string(&file).unwrap();
    assert!(
        text.ends_with(sweep),
        "the sweep of the README is not {}",
        file.display()
    );
    load_sweep(&file, &[]).unwrap_or_else(|r| panic!("{r}"));
}
