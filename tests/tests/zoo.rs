//! The zoo of published models (`experiments/models`): every file checks, and counts as many parameters as its source says.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use marimba_dsl::{load_model, load_run};
use marimba_ir::{DType, Def, External, Options, lower};
use std::path::{Path, PathBuf};

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../experiments/models")
}

/// File stem, parameters in all, parameters that work on one token. Bamba, Jamba, Falcon-Mamba, Codestral, Nemotron-H, Llama and Mixtral
/// are the published integers; the others are this program's, and agree with the rounded sizes that their sources give.
const COUNTS: &[(&str, usize, usize)] = &[
    ("bamba-9b", 9_780_235_392, 9_780_235_392),
    ("falcon-h1-0.5b", 521_411_104, 521_411_104),
    ("falcon-h1-7b", 7_585_513_568, 7_585_513_568),
    ("falcon-mamba-7b", 7_272_665_088, 7_272_665_088),
    ("granite-4.0-h-micro", 3_191_396_096, 3_191_396_096),
    ("granite-4.0-h-tiny", 6_939_037_248, 1_465_470_528),
    ("jamba-1.5-large", 398_555_145_696, 94_149_338_592),
    ("jamba-1.5-mini", 51_570_323_328, 12_110_311_296),
    ("jamba-v0.1", 51_570_323_328, 12_110_311_296),
    ("llama-2-7b", 6_738_415_616, 6_738_415_616),
    ("llama-3.1-8b", 8_030_261_248, 8_030_261_248),
    ("mamba-codestral-7b", 7_285_403_648, 7_285_403_648),
    ("mixtral-8x7b", 46_702_792_704, 12_879_925_248),
    ("nemotron-3-nano-30b-a3b", 31_577_940_288, 3_580_076_352),
    ("nemotron-h-8b", 8_100_852_736, 8_100_852_736),
    ("nvidia-mamba2-hybrid-800m", 907_127_680, 907_127_680),
    ("nvidia-mamba2-hybrid-8b", 8_654_517_248, 8_654_517_248),
    ("olmo-1.5-7b", 6_888_361_984, 6_888_361_984),
    ("qwen3-next-80b-a3b", 79_674_391_296, 3_874_929_408),
    ("samba-1.3b", 1_403_935_488, 1_403_935_488),
    ("samba-421m", 470_945_280, 470_945_280),
    ("zamba-7b", 7_232_490_496, 7_232_490_496),
];

#[test]
fn every_model_has_its_published_counts() {
    let mut files: Vec<String> = std::fs::read_dir(models())
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "ron"))
        .map(|p| p.file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    files.sort();
    assert_eq!(files, COUNTS.iter().map(|c| c.0).collect::<Vec<_>>());
    let mut found = Vec::new();
    for (stem, ..) in COUNTS {
        let model =
            load_model(models().join(format!("{stem}.ron")), &[]).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(model.name, *stem);
        let params = marimba_ir::lower::params(&model).unwrap();
        let total: usize = params.iter().map(|p| p.ty.len()).sum();
        let active: usize = params
            .iter()
            .map(|p| p.ty.len() * p.active.0 / p.active.1)
            .sum();
        found.push((*stem, total, active));
    }
    assert_eq!(found, COUNTS, "{found:#?}");
}

/// Bytes of keys and values for one sequence of `len` tokens in 16 bits.
fn kv_bytes(stem: &str, len: usize) -> usize {
    let model = load_model(models().join(format!("{stem}.ron")), &[]).unwrap();
    let options = Options {
        compute: DType::Bf16,
        ..Options::decode(1, len)
    };
    let graph = lower(&model, &options).unwrap();
    let cache = graph.values.iter().filter(|v| {
        matches!(v.def, Def::External(External::State))
            && (v.name.ends_with(".k") || v.name.ends_with(".v"))
    });
    cache.map(|v| v.ty.bytes()).sum()
}

/// Jamba-1.5, table 1 (arXiv 2408.12570): KV cache at 256K tokens in 16 bits.
#[test]
fn jamba_needs_an_order_of_magnitude_less_cache() {
    let gib = |stem: &str| kv_bytes(stem, 256 * 1024) >> 30;
    assert_eq!(gib("jamba-1.5-large"), 9);
    assert_eq!(gib("jamba-1.5-mini"), 4);
    assert_eq!(gib("mixtral-8x7b"), 32);
    assert_eq!(gib("llama-3.1-8b"), 32);
    assert_eq!(gib("llama-2-7b"), 128);
    assert_eq!(kv_bytes("bamba-9b", 1), 12_288);
}

/// The example runs, whose data need not be there to be checked.
#[test]
fn example_runs_check() {
    for name in ["bamba.ron", "text.ron"] {
        let run = load_run(models().join("..").join(name), &[]).unwrap_or_else(|e| panic!("{e}"));
        if name == "bamba.ron" {
            let tokens =
                |workers: usize, phase: usize| workers * run.phases[phase].tokens_per_step();
            assert_eq!((tokens(192, 0), tokens(160, 1)), (1_572_864, 1_310_720));
        }
    }
}
