//! Golden files: for each `golden/*.ron`, the text of its graphs, the summary of its plans, and its counts must be what
//! `golden/*.txt` says. `BLESS=1 cargo test -p marimba-tests --test golden` writes the files anew; read the difference before
//! committing it.
//!
//! Files called `full-*` are models of published size: of those only counts and plans are kept.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use marimba_dsl::model::Model;
use marimba_dsl::{Source, parse_model};
use marimba_ir::lower::Options;
use marimba_ir::pass::{Config, RecomputePolicy, run_passes};
use marimba_ir::{DType, Graph, cost, plan, print};
use marimba_tests::graphs::training;
use std::fmt::Write;
use std::path::Path;

fn summary(title: &str, g: &Graph) -> String {
    let mut s = format!("== {title}\n");
    let p = plan(g);
    let c = cost::costs(g);
    let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
    let _ = writeln!(
        s,
        "plan: {} nodes, {} values; arena {:.3} MiB, alive at once {:.3} MiB, all values {:.3} MiB",
        g.nodes.len(),
        g.values.len(),
        mib(p.arena_bytes),
        mib(p.live_bytes),
        mib(p.total_bytes)
    );
    let _ = writeln!(
        s,
        "flops: forward {:.4e}, backward {:.4e}, recompute {:.4e}, in products with parameters {:.1} %; {:.3} MiB moved",
        c.forward_flops,
        c.backward_flops,
        c.recompute_flops,
        100.0 * c.matmul_flops / c.total_flops(),
        c.moved_bytes / (1 << 20) as f64
    );
    let state = cost::states(g);
    if state != cost::StateBytes::default() {
        let _ = writeln!(
            s,
            "state of a sequence: {} bytes of keys and values ({} a token), {} bytes recurrent",
            state.kv_cache, state.kv_per_token, state.recurrent
        );
    }
    let _ = writeln!(s, "largest at the peak:");
    for (path, ty, bytes) in p.largest_at_peak(g, 5) {
        let _ = writeln!(s, "  {:.3} MiB {ty} {path}", mib(bytes));
    }
    let _ = write!(s, "{}", print::op_counts(g));
    s
}

fn describe(model: &Model, full: bool) -> String {
    let (batch, time, compute) = if full {
        (1, 4096, DType::Bf16)
    } else {
        (2, 64, DType::F32)
    };
    let with = |o: Options| Options { compute, ..o };
    let lowered = training(model, &with(Options::train(batch, time))).unwrap();
    let config = Config::default();
    let train = run_passes(&lowered, &config).unwrap();
    let again = Config {
        recompute: RecomputePolicy::Block,
        ..config.clone()
    };
    let repeated = run_passes(&lowered, &again).unwrap();
    let cheap = Config {
        recompute: RecomputePolicy::Cheap,
        ..config.clone()
    };
    let cheap = run_passes(&lowered, &cheap).unwrap();
    let decode = training(model, &with(Options::decode(batch, 2 * time))).unwrap();
    let decode = run_passes(&decode, &config).unwrap();

    let p = cost::params(&train);
    let mut s = format!(
        "{}: {} parameters, {} of them on one token, {} in embeddings\n",
        model.name, p.total, p.active, p.embedding
    );
    s.push_str(&summary(
        &format!("training, {batch} x {time}, as lowered"),
        &lowered,
    ));
    s.push_str(&summary("training, after passes", &train));
    s.push_str(&summary("training, what is cheap recomputed", &cheap));
    s.push_str(&summary("training, every block recomputed", &repeated));
    s.push_str(&summary("decode, after passes", &decode));
    if !full {
        let _ = write!(s, "== training graph\n{}", print::compact(&train));
        let _ = write!(s, "== decode graph\n{}", print::compact(&decode));
    }
    s
}

#[test]
fn graphs_match_their_golden_files() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let mut files: Vec<_> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "ron"))
        .collect();
    files.sort();
    assert!(!files.is_empty());
    let bless = std::env::var_os("BLESS").is_some_and(|v| v == "1");
    let mut wrong = Vec::new();
    for file in files {
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&file).unwrap();
        let model = parse_model(&Source::new(&*name, text), &[])
            .unwrap_or_else(|report| panic!("{}", report.plain()));
        let found = describe(&model.into_inner(), name.starts_with("full-"));
        let path = file.with_extension("txt");
        if bless {
            std::fs::write(&path, &found).unwrap();
            continue;
        }
        let expected = std::fs::read_to_string(&path).unwrap_or_default();
        let line = expected
            .lines()
            .zip(found.lines())
            .position(|(a, b)| a != b)
            .unwrap_or(expected.lines().count().min(found.lines().count()));
        if expected != found {
            wrong.push(format!(
                "{name}.txt, line {}:\n  expected {}\n  found    {}",
                line + 1,
                expected.lines().nth(line).unwrap_or("the end"),
                found.lines().nth(line).unwrap_or("the end")
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{}\nrun with BLESS=1 to write these files anew",
        wrong.join("\n")
    );
}
