//! Hugging Face checkpoints: tiny seeded models of every family with transformers' own numbers (`tests/fixtures/hf`).

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use marimba_backend::dfdx::{Device, DfdxEngine};
use marimba_backend::{BackendError, CpuEngine, CudaEngine, Engine};
use marimba_experiments::checkpoint::hf::{self, ExportOptions};
use marimba_experiments::checkpoint::{Checkpoint, Source};
use marimba_experiments::verify::{MakeEngine, Report, verify, verify_in};
use marimba_ir::DType;
use std::path::{Path, PathBuf};

fn cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/hf/public");
    let mut all: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    all.sort();
    assert_eq!(all.len(), 27);
    all
}

fn name(case: &Path) -> String {
    case.file_name().unwrap().to_string_lossy().into_owned()
}

/// Every tensor of one folder is in the other with the same type, shape and bytes.
fn assert_same_tensors(a: &Path, b: &Path) {
    let (x, y) = (
        Source::open(a, "model").unwrap(),
        Source::open(b, "model").unwrap(),
    );
    let names = |s: &Source| s.specs().cloned().collect::<Vec<_>>();
    assert_eq!(names(&x), names(&y), "{}", name(a));
    for s in names(&x) {
        assert!(
            x.tensor(&s.name).unwrap().bytes() == y.tensor(&s.name).unwrap().bytes(),
            "{}: {}",
            name(a),
            s.name
        );
    }
}

#[test]
fn import_then_export_is_the_identity() {
    for case in cases() {
        let tmp = tempfile::tempdir().unwrap();
        let (ckpt, out) = (tmp.path().join("ckpt"), tmp.path().join("hf"));
        hf::import(&case, &ckpt).unwrap_or_else(|e| panic!("{}: {e}", name(&case)));
        let family = hf::export(&ckpt, &out, &ExportOptions::default())
            .unwrap_or_else(|e| panic!("{}: {e}", name(&case)));
        assert!(
            name(&case).starts_with(family.model_type),
            "{} became {}",
            name(&case),
            family.model_type
        );
        assert_same_tensors(&case, &out);
        assert_eq!(
            std::fs::read(case.join("config.json")).unwrap(),
            std::fs::read(out.join("config.json")).unwrap()
        );
    }
}

/// Without the original's configuration, the family's own words say the same model, and its tensors come out the same.
#[test]
fn a_written_configuration_says_the_same_model() {
    for case in cases() {
        let opened = hf::open(&case).unwrap();
        let text = hf::written(opened.family, &opened.model)
            .unwrap_or_else(|e| panic!("{}: {e}", name(&case)));
        let tmp = tempfile::tempdir().unwrap();
        let (ckpt, out) = (tmp.path().join("ckpt"), tmp.path().join("hf"));
        hf::import(&case, &ckpt).unwrap();
        std::fs::write(ckpt.join("hf/config.json"), &text).unwrap();
        // The record of sizes is of the original configuration.
        let state = ckpt.join("train_state.json");
        let mut json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&state).unwrap()).unwrap();
        json["files"]["hf/config.json"] = text.len().into();
        std::fs::write(&state, json.to_string()).unwrap();
        hf::export(&ckpt, &out, &ExportOptions::default()).unwrap();
        assert_same_tensors(&case, &out);
        assert_eq!(
            std::fs::read_to_string(out.join("config.json")).unwrap(),
            text
        );
    }
}

#[test]
fn both_spellings_of_a_configuration_give_one_model() {
    for case in cases() {
        let v4 = case.join("config_v4.json");
        if !v4.is_file() {
            continue;
        }
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join(name(&case));
        std::fs::create_dir(&dir).unwrap();
        std::fs::copy(&v4, dir.join("config.json")).unwrap();
        let (_, old, _, z_old) =
            hf::read_model(&dir).unwrap_or_else(|e| panic!("{}: {e}", name(&case)));
        let (_, new, _, z_new) = hf::read_model(&case).unwrap();
        assert_eq!(*old, *new, "{}", name(&case));
        assert_eq!(z_old, z_new);
    }
}

/// Sharded and whole files are read alike, and a bf16 export holds rounded numbers.
#[test]
fn an_export_in_bf16_is_rounded_and_says_so() {
    let case = &cases()[0];
    let tmp = tempfile::tempdir().unwrap();
    let (ckpt, out) = (tmp.path().join("ckpt"), tmp.path().join("hf"));
    hf::import(case, &ckpt).unwrap();
    let options = ExportOptions {
        dtype: Some(safetensors::Dtype::BF16),
        ..ExportOptions::default()
    };
    hf::export(&ckpt, &out, &options).unwrap();
    assert!(
        std::fs::read_to_string(out.join("config.json"))
            .unwrap()
            .contains("\"dtype\": \"bfloat16\"")
    );
    let (whole, rounded) = (
        Source::open(case, "model").unwrap(),
        Source::open(&out, "model").unwrap(),
    );
    for s in rounded.specs() {
        assert_eq!(s.dtype, safetensors::Dtype::BF16);
        let (a, b) = (
            whole.tensor(&s.name).unwrap().to_f32(),
            rounded.tensor(&s.name).unwrap().to_f32(),
        );
        assert!(
            a.iter()
                .zip(&b)
                .all(|(a, b)| (a - b).abs() <= a.abs() / 128.0),
            "{}",
            s.name
        );
    }
    // bf16 in, bf16 kept.
    let again = tmp.path().join("again");
    hf::import(&out, &again).unwrap();
    assert!(
        Checkpoint::open(&again)
            .unwrap()
            .model
            .specs()
            .all(|s| s.dtype == safetensors::Dtype::BF16)
    );
}

fn broken(edit: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) -> String {
    let case = &cases()[0];
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("broken");
    std::fs::create_dir(&dir).unwrap();
    std::fs::copy(
        case.join("model.safetensors"),
        dir.join("model.safetensors"),
    )
    .unwrap();
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(case.join("config.json")).unwrap()).unwrap();
    edit(config.as_object_mut().unwrap());
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let out = tmp.path().join("out");
    let e = hf::import(&dir, &out).unwrap_err().to_string();
    assert!(!out.exists(), "something was written");
    e
}

#[test]
fn bad_configurations_are_refused_by_name() {
    let e = broken(|c| drop(c.insert("model_type".into(), "gpt_neox".into())));
    assert!(
        e.contains("gpt_neox is not supported; expected one of bamba, jamba"),
        "{e}"
    );
    let e = broken(|c| drop(c.insert("hidden_act".into(), "mish".into())));
    assert!(e.contains("hidden_act mish"), "{e}");
    let e = broken(|c| drop(c.insert("mamba_d_head".into(), 9.into())));
    assert!(
        e.contains("mamba_n_heads 8 x mamba_d_head 9 is not the inner width 64"),
        "{e}"
    );
    let e = broken(|c| {
        drop(c.insert(
            "quantization_config".into(),
            serde_json::json!({ "bits": 4 }),
        ))
    });
    assert!(e.contains("quantization_config"), "{e}");
    // A model of another shape: every tensor that does not fit is listed.
    let e = broken(|c| {
        c.insert("intermediate_size".into(), 40.into());
        c.insert("num_hidden_layers".into(), 7.into());
    });
    for part in [
        "model.layers.0.feed_forward.gate_proj.weight: shape [56, 32], expected [40, 32]",
        "model.layers.6.mamba.A_log: missing",
    ] {
        assert!(e.contains(part), "{e}");
    }
    // As in transformers, an index beyond the layers says nothing; the tensors of that layer do.
    let e = broken(|c| drop(c.insert("num_hidden_layers".into(), 5.into())));
    assert!(
        e.contains("model.layers.5.self_attn.q_proj.weight: extra"),
        "{e}"
    );
}

/// The model of a stored case whose configuration was edited.
fn edited(case: &str, edits: serde_json::Value) -> marimba_dsl::model::Model {
    let text = std::fs::read_to_string(fixture(case).join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (k, v) in edits.as_object().unwrap() {
        config[k] = v.clone();
    }
    let tmp = tempfile::tempdir().unwrap();
    std::fs::write(tmp.path().join("config.json"), config.to_string()).unwrap();
    hf::read_model(tmp.path()).unwrap().1.into_inner()
}

fn attention_of(model: &marimba_dsl::model::Model) -> marimba_dsl::model::Attention {
    use marimba_dsl::model::Mixer;
    let mut mixers = model.layers.iter().filter_map(|l| l.mixer.as_ref());
    let found = mixers.find_map(|s| match &s.body {
        Mixer::Attention(a) => Some(a.clone()),
        Mixer::Parallel(branches) => branches.iter().find_map(|b| match &b.mixer {
            Mixer::Attention(a) => Some(a.clone()),
            _ => None,
        }),
        _ => None,
    });
    found.unwrap()
}

#[test]
fn keys_that_a_class_does_not_declare_count_where_transformers_asks_for_them() {
    let wide = serde_json::json!({ "head_dim": 24 });
    for case in ["bamba-a", "jamba-a", "granitemoehybrid-a", "falcon_h1-a"] {
        let model = edited(case, wide.clone());
        assert_eq!(attention_of(&model).head_dim, 24, "{case}");
    }
    // These rotate whole heads whatever is said; that half of them is was once believed, without an error.
    let half = serde_json::json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5 } });
    for (case, dims) in [
        ("llama-a", 8),
        ("mixtral-a", 8),
        ("falcon_h1-a", 8),
        ("bamba-a", 4),
        ("phi3-a", 4),
    ] {
        let rope = attention_of(&edited(case, half.clone())).rope.unwrap();
        assert_eq!(rope.dims, dims, "{case}");
    }
}

#[test]
fn keys_that_transformers_ignores_are_ignored() {
    for (case, edits) in [
        (
            "llama-a",
            serde_json::json!({ "attn_logit_softcapping": 30.0, "use_sliding_window": true }),
        ),
        (
            "jamba-a",
            serde_json::json!({ "sliding_window": 8, "mamba_inner_layernorms": false }),
        ),
        (
            "mamba2-a",
            serde_json::json!({ "rms_norm": false, "time_step_min": 0.5 }),
        ),
        (
            "nemotron_h-a",
            serde_json::json!({ "num_hidden_layers": 3, "sliding_window": 8, "hybrid_override_pattern": "M" }),
        ),
    ] {
        let (changed, right) = (edited(case, edits), edited(case, serde_json::json!({})));
        assert!(hf::same(&changed, &right), "{case}");
    }
}

#[test]
fn a_stored_head_counts_before_the_word_that_ties_it() {
    let tmp = tempfile::tempdir().unwrap();
    let case = fixture("llama-a");
    let text = std::fs::read_to_string(case.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["tie_word_embeddings"] = true.into();
    std::fs::copy(
        case.join("model.safetensors"),
        tmp.path().join("model.safetensors"),
    )
    .unwrap();
    std::fs::write(tmp.path().join("config.json"), config.to_string()).unwrap();
    let (_, said, _, _) = hf::read_model(tmp.path()).unwrap();
    assert!(said.head.tied);
    let opened = hf::open(tmp.path()).unwrap();
    assert!(!opened.model.head.tied);
    // The export says so.
    let (ckpt, out) = (tmp.path().join("ckpt"), tmp.path().join("out"));
    hf::import(tmp.path(), &ckpt).unwrap();
    hf::export(&ckpt, &out, &ExportOptions::default()).unwrap();
    assert!(!hf::open(&out).unwrap().model.head.tied);
    let text = std::fs::read_to_string(out.join("config.json")).unwrap();
    assert!(text.contains("\"tie_word_embeddings\": false"), "{text}");
}

#[test]
fn configurations_are_written_for_models_that_lack_a_kind_of_layer() {
    use marimba_dsl::model::{Layer, Mixer, Model};
    let attends = |l: &Layer| matches!(&l.mixer.as_ref().unwrap().body, Mixer::Attention(_));
    let only = |case: &str, attention: bool| -> Model {
        let mut model = edited(case, serde_json::json!({}));
        let of_kind: Vec<_> = model
            .layers
            .iter()
            .filter(|l| attends(l) == attention)
            .cloned()
            .collect();
        for (l, other) in model.layers.iter_mut().zip(of_kind.iter().cycle()) {
            let name = l.mixer.as_ref().unwrap().weights.clone();
            l.mixer.clone_from(&other.mixer);
            l.mixer.as_mut().unwrap().weights = name;
        }
        model
    };
    for (case, attention, words) in [
        (
            "bamba-a",
            false,
            &["\"attn_layer_indices\": []", "\"num_attention_heads\": 1"][..],
        ),
        ("jamba-a", false, &["\"num_attention_heads\": 1"]),
        ("jamba-a", true, &["\"attn_layer_period\": 1"]),
        (
            "granitemoehybrid-a",
            false,
            &["\"position_embedding_type\": \"nope\""],
        ),
        ("granitemoehybrid-a", true, &["\"mamba_n_heads\": 1"]),
        ("qwen3_next-a", false, &["\"linear_num_key_heads\": 2"]),
        ("qwen3_next-a", true, &["\"head_dim\": 16"]),
    ] {
        let family = case.split('-').next().unwrap();
        let text = hf::written(hf::family(family).unwrap(), &only(case, attention)).unwrap();
        for word in words {
            assert!(text.contains(word), "{case}: {word} not in {text}");
        }
    }
}

#[test]
fn a_written_configuration_has_the_types_and_tokens_that_transformers_takes() {
    use marimba_dsl::model::{Mixer, Model};
    // Its classes refuse an `expand` that is no whole number. Where another key says the inner width, that one does.
    let narrow = |case: &str| -> Model {
        let mut model = edited(case, serde_json::json!({}));
        for s in model.layers.iter_mut().filter_map(|l| l.mixer.as_mut()) {
            match &mut s.body {
                Mixer::Mamba1(x) => x.d_inner = 40,
                Mixer::Mamba2(x) => x.head_dim = 5,
                _ => {}
            }
        }
        model
    };
    let written = |case: &str, model: &Model| {
        let family = case.split('-').next().unwrap();
        hf::written(hf::family(family).unwrap(), model)
    };
    for case in [
        "bamba-a",
        "jamba-a",
        "mamba2-a",
        "zamba-a",
        "granitemoehybrid-a",
    ] {
        let e = written(case, &narrow(case)).unwrap_err();
        assert!(e.contains("is no multiple of d_model"), "{case}: {e}");
    }
    for (case, word) in [
        ("mamba-a", "\"expand\": 2"),
        ("nemotron_h-a", "\"mamba_head_dim\": 5"),
    ] {
        let text = written(case, &narrow(case)).unwrap();
        assert!(text.contains(word), "{case}: {text}");
    }
    // Phi-3's own padding, 32000, is beyond a small vocabulary; 2 ends continuations of other tokenizers in the middle.
    let text = written("phi3-a", &edited("phi3-a", serde_json::json!({}))).unwrap();
    for word in ["\"pad_token_id\": null", "\"eos_token_id\": null"] {
        assert!(text.contains(word), "{text}");
    }
    // A number that serde_json reads to the last bit but one.
    let yarn = serde_json::json!({ "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32 });
    let model = edited("llama-a", serde_json::json!({ "rope_parameters": yarn }));
    written("llama-a", &model).unwrap();
}

#[test]
fn an_export_is_what_transformers_makes_of_it() {
    // Half-rotated heads are no words of Llama's, though its configuration would carry them.
    let mut model = edited("llama-a", serde_json::json!({}));
    for s in model.layers.iter_mut().filter_map(|l| l.mixer.as_mut()) {
        if let marimba_dsl::model::Mixer::Attention(a) = &mut s.body {
            a.rope.as_mut().unwrap().dims = 4;
        }
    }
    let why = |family: &str| hf::written(hf::family(family).unwrap(), &model);
    assert!(why("llama").unwrap_err().contains("layer 0"));
    why("phi3").unwrap();
    // transformers would divide the weights again.
    for case in ["mamba-a", "mamba2-a", "falcon_mamba-a"] {
        let mut model = edited(case, serde_json::json!({}));
        model.init.scale_output = true;
        let opened = hf::open(&fixture(case)).unwrap();
        let text = hf::written(opened.family, &model).unwrap();
        assert!(
            text.contains("\"rescale_prenorm_residual\": false"),
            "{case}"
        );
    }
}

#[test]
fn a_hub_name_is_answered_with_how_to_download_it() {
    let e = hf::import(Path::new("ibm-fms/Bamba-9B"), Path::new("nowhere"))
        .unwrap_err()
        .to_string();
    assert!(e.contains("hf download ibm-fms/Bamba-9B"), "{e}");
}

#[test]
fn weights_that_are_not_numbers_are_named() {
    let case = &cases()[0];
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("nan");
    std::fs::create_dir(&dir).unwrap();
    std::fs::copy(case.join("config.json"), dir.join("config.json")).unwrap();
    let mut bytes = std::fs::read(case.join("model.safetensors")).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
    let report = hf::import(&dir, &tmp.path().join("out")).unwrap();
    assert_eq!(report.not_finite.len(), 1, "{:?}", report.not_finite);
}

fn fixture(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/hf/public")
        .join(case)
}

/// Runs `verify` on a case; all quantities must pass within the limits of the oracle's README.
fn verify_case(case: &str, make: &MakeEngine) {
    let dir = fixture(case);
    let quirks = [hf::Quirk::DecodeIgnoresDtLimit];
    let report = verify(&dir, &dir.join("expected.safetensors"), &quirks, make)
        .unwrap_or_else(|e| panic!("{case}: {e}"));
    println!("{case}\n{}", report.table());
    assert_eq!(report.quantities.len(), 7, "{case}\n{}", report.table());
    assert!(report.pass, "{case}\n{}", report.table());
}

/// The same in bf16, within twice of what bf16 costs transformers.
fn verify_bf16(dir: &Path, expected: &Path, make: &MakeEngine) -> Report {
    let quirks = [hf::Quirk::DecodeIgnoresDtLimit];
    verify_in(
        DType::Bf16,
        dir,
        &expected.join("expected.safetensors"),
        &quirks,
        make,
    )
    .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

fn verify_bf16_case(case: &str, make: &MakeEngine) {
    let dir = fixture(case);
    let report = verify_bf16(&dir, &dir, make);
    println!("{case}\n{}", report.table());
    assert_eq!(report.quantities.len(), 7, "{case}\n{}", report.table());
    assert!(report.pass, "{case}\n{}", report.table());
}

/// A cpu backend that rounds what a graph stores in bf16.
fn rounding() -> Result<Box<dyn Engine>, BackendError> {
    let mut engine = CpuEngine::new(1)?;
    engine.set_half_storage(true);
    Ok(Box::new(engine))
}

/// What the limits in bf16 are for: small mistakes are seen, also where experts make the numbers noisy.
#[test]
fn a_slightly_wrong_model_is_seen_in_bf16() {
    for (case, key, right, wrong) in [
        ("mixtral-b", "sliding_window", "16", "17"),
        ("granitemoehybrid-a", "residual_multiplier", "0.6", "0.618"),
        ("jamba-a", "num_experts_per_tok", "2", "3"),
        ("llama-a", "rope_theta", "10000.0", "11000.0"),
    ] {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join(case);
        std::fs::create_dir(&dir).unwrap();
        for file in ["model.safetensors", "config.json"] {
            std::fs::copy(fixture(case).join(file), dir.join(file)).unwrap();
        }
        let text = std::fs::read_to_string(dir.join("config.json")).unwrap();
        let (was, is) = (format!("\"{key}\": {right}"), format!("\"{key}\": {wrong}"));
        assert!(text.contains(&was), "{case}: no {was}");
        std::fs::write(dir.join("config.json"), text.replace(&was, &is)).unwrap();
        let report = verify_bf16(&dir, &fixture(case), &rounding);
        assert!(!report.pass, "{case} with {is}\n{}", report.table());
    }
}

#[test]
fn bf16_without_transformers_own_deviations_is_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = fixture("llama-a");
    let expected = tmp.path().join("expected.safetensors");
    std::fs::copy(dir.join("expected.safetensors"), &expected).unwrap();
    let e = verify_in(DType::Bf16, &dir, &expected, &[], &rounding).unwrap_err();
    assert!(e.to_string().contains("bf16.json beside it"), "{e}");
}

macro_rules! cases {
    ($($name:ident $case:literal),* $(,)?) => {
        mod dfdx {
            use super::*;
            $(#[test]
            fn $name() {
                verify_case($case, &|| Ok(Box::new(DfdxEngine::<Device>::default())));
            })*
        }

        mod cpu {
            use super::*;
            $(#[test]
            fn $name() {
                verify_case($case, &|| Ok(Box::new(CpuEngine::new(1)?)));
            })*
        }

        mod bf16 {
            use super::*;
            $(#[test]
            fn $name() {
                verify_bf16_case($case, &rounding);
            })*
        }

        /// On a GPU; where there is none the tests say so and pass.
        mod cuda {
            use super::*;
            $(#[test]
            fn $name() {
                match CudaEngine::new() {
                    Ok(_) => {
                        verify_case($case, &|| Ok(Box::new(CudaEngine::new()?)));
                        verify_bf16_case($case, &|| Ok(Box::new(CudaEngine::new()?)));
                    }
                    Err(e) => eprintln!("skipped: {e}"),
                }
            })*
        }

        #[test]
        fn no_case_is_forgotten() {
            let all: Vec<String> = cases().iter().map(|c| name(c)).collect();
            assert_eq!(all, [$($case),*]);
        }
    };
}

cases! {
    bamba_a "bamba-a", bamba_b "bamba-b", falcon_h1_a "falcon_h1-a", falcon_h1_b "falcon_h1-b",
    falcon_mamba_a "falcon_mamba-a", falcon_mamba_b "falcon_mamba-b", granitemoehybrid_a "granitemoehybrid-a",
    granitemoehybrid_b "granitemoehybrid-b", jamba_a "jamba-a", jamba_b "jamba-b", llama_a "llama-a", llama_b "llama-b",
    llama_c "llama-c", mamba_a "mamba-a", mamba_b "mamba-b", mamba2_a "mamba2-a", mamba2_b "mamba2-b", mixtral_a "mixtral-a",
    mixtral_b "mixtral-b", nemotron_h_a "nemotron_h-a", nemotron_h_b "nemotron_h-b", phi3_a "phi3-a", phi3_b "phi3-b",
    qwen3_next_a "qwen3_next-a", qwen3_next_b "qwen3_next-b", zamba_a "zamba-a", zamba_b "zamba-b",
}

/// What the table of families claims is what these tests hold the code to.
#[test]
fn every_family_has_a_case_and_a_row() {
    let all: Vec<String> = cases().iter().map(|c| name(c)).collect();
    for row in hf::support() {
        assert!(
            all.iter()
                .any(|c| c.rsplit_once('-').unwrap().0 == row.family),
            "{}",
            row.family
        );
        assert!(hf::support_table().contains(&format!("| {} |", row.family)));
    }
    assert_eq!(hf::support().len(), 13);
}

/// The README's table of families is what the code says. `BLESS=1` writes it.
#[test]
fn the_readme_lists_what_works_with_each_family() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (begin, end) = ("<!-- families -->\n", "<!-- /families -->");
    let (before, rest) = text.split_once(begin).unwrap();
    let (listed, after) = rest.split_once(end).unwrap();
    let right = hf::support_table();
    if std::env::var_os("BLESS").is_some_and(|v| v == "1") {
        std::fs::write(&path, format!("{before}{begin}{right}{end}{after}")).unwrap();
    } else {
        assert_eq!(listed, right, "run with BLESS=1");
    }
}
