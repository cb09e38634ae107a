//! Hugging Face checkpoints: import, export, and the families known by their `model_type`.
//!
//! A family is three functions and a table: configuration to model, model to configuration, and the names, splits and row orders of
//! its tensors ([`table`]). Nothing else in this program knows a family's name. A configuration that a family writes is read back and
//! compared before it is trusted, so that a model which the family cannot express is refused, never approximated.

mod bamba;
pub mod config;
mod falcon_h1;
mod falcon_mamba;
mod granitemoehybrid;
mod jamba;
mod llama;
mod mamba;
mod mamba2;
mod mixtral;
mod nemotron_h;
mod parts;
mod phi3;
mod quirks;
mod qwen3_next;
pub mod table;
mod zamba;

pub use quirks::Quirk;

use super::safetensors::{self, SHARD_BYTES, Source, Spec};
use super::{Checkpoint, CheckpointError, Staged, initial_state, write_state};
use ::safetensors::Dtype;
use config::Config;
use marimba_dsl::model::Model;
use marimba_dsl::{Valid, parse_model};
use marimba_ir::Param;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use table::{Rules, Table, rows};

/// A configuration that a family wrote, or why it has no words for the model.
pub type Written = Result<Map<String, Value>, String>;

/// A model family of transformers.
#[derive(Clone, Copy)]
pub struct Family {
    /// `model_type` in its configuration.
    pub model_type: &'static str,
    /// The class in `architectures`.
    pub architecture: &'static str,
    /// Configuration to model.
    pub read: fn(&Config) -> Model,
    /// Model to configuration.
    pub write: fn(&Model) -> Written,
    /// Where each tensor stands.
    pub rules: fn(&Model) -> Rules,
}

/// All families. This list exists once.
pub const FAMILIES: &[Family] = &[
    bamba::FAMILY,
    jamba::FAMILY,
    mamba::FAMILY,
    mamba2::FAMILY,
    falcon_mamba::FAMILY,
    zamba::FAMILY,
    llama::FAMILY,
    phi3::FAMILY,
    mixtral::FAMILY,
    granitemoehybrid::FAMILY,
    nemotron_h::FAMILY,
    falcon_h1::FAMILY,
    qwen3_next::FAMILY,
];

/// The family of this `model_type`.
pub fn family(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|f| f.model_type == model_type)
}

fn known() -> String {
    FAMILIES
        .iter()
        .map(|f| f.model_type)
        .collect::<Vec<_>>()
        .join(", ")
}

/// What works with a family, as a row of the README's table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Support {
    /// `model_type`.
    pub family: &'static str,
    /// Reads its checkpoints.
    pub import: bool,
    /// Writes its checkpoints.
    pub export: bool,
    /// Backends on which logits, loss and gradients are transformers' own within the limits.
    pub train: &'static [&'static str],
    /// Backends on which cached decoding is.
    pub decode: &'static [&'static str],
}

/// Backends that run every family; the tests hold each of them to the fixtures of each family.
pub const BACKENDS: &[&str] = &["cpu", "dfdx", "cuda"];

/// One row per family.
pub fn support() -> Vec<Support> {
    let row = |f: &Family| Support {
        family: f.model_type,
        import: true,
        export: true,
        train: BACKENDS,
        decode: BACKENDS,
    };
    FAMILIES.iter().map(row).collect()
}

/// [`support`] as Markdown.
pub fn support_table() -> String {
    let mut out = String::from(
        "| family | train | decode | import | export | cuda |\n|---|---|---|---|---|---|\n",
    );
    let word = |b: bool| if b { "yes" } else { "no" };
    for s in support() {
        let cuda = word(s.train.contains(&"cuda") && s.decode.contains(&"cuda"));
        out.push_str(&format!(
            "| {} | {} | {} | {} | {} | {cuda} |\n",
            s.family,
            s.train.join(", "),
            s.decode.join(", "),
            word(s.import),
            word(s.export)
        ));
    }
    out
}

/// What an export needs to know of the checkpoint that was imported; `hf/import.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Record {
    family: String,
    /// Element types of foreign tensors that differ from that of ours.
    dtypes: BTreeMap<String, String>,
    /// Tensors that were stored a second time under this name.
    duplicates: BTreeMap<String, String>,
    /// Tensors that this program has no use for.
    dropped: Vec<String>,
}

/// A Hugging Face checkpoint, matched against its model, nothing read but headers.
pub struct Opened {
    /// The folder.
    pub dir: PathBuf,
    /// Its family.
    pub family: &'static Family,
    /// The model it holds.
    pub model: Valid<Model>,
    /// The model's RON.
    pub model_ron: String,
    /// Parameters of the model.
    pub params: Vec<Param>,
    /// The correspondence.
    pub table: Table,
    /// The tensors.
    pub source: Source,
    /// Coefficient of the squared log-sum-exp that transformers adds to the loss, over all positions (Bamba).
    pub z_loss: f64,
    record: Record,
}

/// Reads the configuration of a Hugging Face folder and makes a checked model of it.
///
/// # Errors
/// [`CheckpointError`]: no such folder, no configuration, an unknown family, an unsupported option, a contradiction.
pub fn read_model(
    dir: &Path,
) -> Result<(&'static Family, Valid<Model>, String, f64), CheckpointError> {
    read_model_of(dir, |_| {})
}

fn read_model_of(
    dir: &Path,
    change: impl FnOnce(&mut Model),
) -> Result<(&'static Family, Valid<Model>, String, f64), CheckpointError> {
    if !dir.is_dir() {
        let text = dir.display().to_string();
        let hub = text.split('/').count() == 2 && !text.starts_with(['.', '/']);
        let help = if hub {
            format!("to get it from the hub, run `hf download {text} --local-dir DIR` and give DIR")
        } else {
            "expected a folder with config.json and safetensors files".into()
        };
        return Err(CheckpointError::NotFound {
            kind: "checkpoint folder",
            path: dir.to_path_buf(),
            help,
        });
    }
    let config = Config::read(&dir.join("config.json"))?;
    let (family, mut model) = model_of(&config)?;
    change(&mut model);
    let z_loss = config.float_or("z_loss_coefficient", 0.0);
    let (model, text) = checked(&config, model)?;
    config.finish((family, model, text, z_loss))
}

fn model_of(config: &Config) -> Result<(&'static Family, Model), CheckpointError> {
    let Some(name) = config.opt_word("model_type") else {
        config.problem(format!(
            "model_type is missing; expected one of {}",
            known()
        ));
        return Err(unfinished(config));
    };
    let Some(family) = family(name) else {
        config.problem(format!(
            "model_type {name} is not supported; expected one of {}",
            known()
        ));
        return Err(unfinished(config));
    };
    let model = (family.read)(config);
    Ok((family, config.finish(model)?))
}

fn unfinished(config: &Config) -> CheckpointError {
    match config.finish(()) {
        Err(e) => e,
        Ok(()) => CheckpointError::Config {
            path: config.path().to_path_buf(),
            problems: Vec::new(),
        },
    }
}

/// Puts a model through the checks that every model file passes.
fn checked(config: &Config, model: Model) -> Result<(Valid<Model>, String), CheckpointError> {
    let text = model.to_ron();
    let source = marimba_dsl::Source::new(config.path().display().to_string(), text.clone());
    match parse_model(&source, &[]) {
        Ok(valid) if *valid == model => Ok((valid, text)),
        Ok(_) => Err(CheckpointError::Inexpressible {
            model: model.name,
            format: "a model file".into(),
            why: "its text says something else; this is a bug in marimba".into(),
        }),
        Err(report) => Err(CheckpointError::Config {
            path: config.path().to_path_buf(),
            problems: report.diagnostics.into_iter().map(|d| d.message).collect(),
        }),
    }
}

pub(crate) fn params_of(model: &Model) -> Result<Vec<Param>, CheckpointError> {
    marimba_ir::lower::params(model).map_err(|e| CheckpointError::Inexpressible {
        model: model.name.clone(),
        format: "a graph".into(),
        why: e.to_string(),
    })
}

fn table_of(family: &Family, model: &Model, params: &[Param]) -> Result<Table, CheckpointError> {
    Table::new(&(family.rules)(model).finish(), params).map_err(|why| {
        CheckpointError::Inexpressible {
            model: model.name.clone(),
            format: family.model_type.into(),
            why,
        }
    })
}

/// Opens a Hugging Face folder: configuration, headers of all tensor files, and their fit.
///
/// # Errors
/// [`CheckpointError`], with all missing, extra and misshaped tensors at once.
pub fn open(dir: &Path) -> Result<Opened, CheckpointError> {
    let (mut family, mut model, mut model_ron, mut z_loss) = read_model(dir)?;
    let mut params = params_of(&model)?;
    let mut table = table_of(family, &model, &params)?;
    let source = Source::open(dir, "model")?;
    if model.head.tied && has_own_head(&source, &table)? {
        // As transformers: a head that is stored and is not the embedding counts, whatever the configuration says.
        (family, model, model_ron, z_loss) = read_model_of(dir, |m| m.head.tied = false)?;
        params = params_of(&model)?;
        table = table_of(family, &model, &params)?;
    }
    let mut record = Record {
        family: family.model_type.into(),
        ..Record::default()
    };
    check(&source, &table, &model, &mut record)?;
    check_tokenizer(dir, model.vocab_size)?;
    Ok(Opened {
        dir: dir.to_path_buf(),
        family,
        model,
        model_ron,
        params,
        table,
        source,
        z_loss,
        record,
    })
}

/// Compares stored tensors with the table, and sorts out what may be there besides.
fn check(
    source: &Source,
    table: &Table,
    model: &Model,
    record: &mut Record,
) -> Result<(), CheckpointError> {
    let mut problems = Vec::new();
    for f in &table.foreign {
        match source.spec(&f.name) {
            None => problems.push(format!("{}: missing, expected {:?}", f.name, f.shape)),
            Some(s) if s.shape != f.shape => {
                problems.push(format!(
                    "{}: shape {:?}, expected {:?}",
                    f.name, s.shape, f.shape
                ));
            }
            Some(s) if !safetensors::is_float(s.dtype) => {
                problems.push(format!(
                    "{}: element type {:?}, expected F32, BF16, F16 or F64",
                    f.name, s.dtype
                ));
            }
            Some(_) => {}
        }
    }
    let known: HashSet<&str> = table.foreign.iter().map(|f| f.name.as_str()).collect();
    for s in source.specs().filter(|s| !known.contains(s.name.as_str())) {
        if s.name.ends_with("rotary_emb.inv_freq") || s.name.starts_with("mtp.") {
            // Recomputed, and heads for several tokens at once, which transformers does not load either.
            record.dropped.push(s.name.clone());
        } else if let Some(first) = twin(&s.name, table, model) {
            if equal(source, &s.name, &first)? {
                record.duplicates.insert(s.name.clone(), first);
            } else {
                problems.push(format!(
                    "{}: differs from {first}, expected the same, since the family shares it",
                    s.name
                ));
            }
        } else {
            problems.push(format!("{}: extra, shape {:?}", s.name, s.shape));
        }
    }
    for origins in &table.origins {
        let ours = dtype_of(source, table, origins);
        for o in origins {
            let name = &table.foreign[o.foreign].name;
            if let (Some(ours), Some(s)) = (ours, source.spec(name))
                && s.dtype != ours
            {
                record.dtypes.insert(name.clone(), format!("{:?}", s.dtype));
            }
        }
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(CheckpointError::Tensors {
            path: source.path().to_path_buf(),
            problems,
        })
    }
}

/// Whether two stored tensors are one.
fn equal(source: &Source, a: &str, b: &str) -> Result<bool, CheckpointError> {
    Ok(match (source.spec(a), source.spec(b)) {
        (Some(s), Some(t)) => {
            s.shape == t.shape
                && s.dtype == t.dtype
                && source.tensor(a)?.bytes() == source.tensor(b)?.bytes()
        }
        _ => false,
    })
}

/// Whether a head is stored that differs from the embedding.
fn has_own_head(source: &Source, table: &Table) -> Result<bool, CheckpointError> {
    Ok(match (source.spec(HEAD), embedding(table)) {
        (Some(_), Some(e)) if source.spec(e).is_some() => !equal(source, HEAD, e)?,
        _ => false,
    })
}

/// The head, in every family.
const HEAD: &str = "lm_head.weight";

/// The embedding's foreign name.
fn embedding(table: &Table) -> Option<&str> {
    let is = |f: &&table::Foreign| f.pieces.iter().any(|p| p.ours == 0);
    table.foreign.iter().find(is).map(|f| f.name.as_str())
}

/// The tensor that `name` repeats: a tied head, or the shared block under another of its layers.
fn twin(name: &str, table: &Table, model: &Model) -> Option<String> {
    let first = |suffix: &str| {
        table
            .foreign
            .iter()
            .map(|f| &f.name)
            .find(|n| n.ends_with(suffix))
            .cloned()
    };
    if name == HEAD && model.head.tied {
        return embedding(table).map(str::to_string);
    }
    let at = name.find(".shared_transf.")?;
    first(&name[at..])
}

/// Element type of a parameter: that of its sources, f32 where they differ.
fn dtype_of(source: &Source, table: &Table, origins: &[table::Origin]) -> Option<Dtype> {
    let mut found: Option<Dtype> = None;
    for o in origins {
        let d = source.spec(&table.foreign[o.foreign].name)?.dtype;
        match found {
            Some(f) if f != d => return Some(Dtype::F32),
            _ => found = Some(d),
        }
    }
    found
}

/// A tokenizer must not name tokens that the embedding lacks.
fn check_tokenizer(dir: &Path, vocab_size: usize) -> Result<(), CheckpointError> {
    let path = dir.join("tokenizer.json");
    if !path.is_file() {
        return Ok(());
    }
    let text = fs::read_to_string(&path).map_err(CheckpointError::io("read", &path))?;
    let value: Value = serde_json::from_str(&text)
        .map_err(|e| CheckpointError::damaged(&path, "tokenizer", e.to_string()))?;
    let vocab = match &value["model"]["vocab"] {
        Value::Object(m) => m.values().filter_map(Value::as_u64).max(),
        Value::Array(a) => (a.len() as u64).checked_sub(1),
        _ => None,
    };
    let added = value["added_tokens"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|t| t["id"].as_u64())
        .max();
    match vocab.max(added) {
        Some(id) if id >= vocab_size as u64 => Err(CheckpointError::Config {
            path,
            problems: vec![format!(
                "token id {id} does not fit vocab_size {vocab_size}"
            )],
        }),
        _ => Ok(()),
    }
}

/// Takes a piece of a stored tensor: its bytes, of which tensor, and how many elements of it come before.
type Take<'a> = dyn FnMut(Dtype, &[u8], &str, usize) -> Result<(), CheckpointError> + 'a;

impl Opened {
    /// Parameter `i` as f32.
    ///
    /// # Errors
    /// [`CheckpointError`] when a tensor cannot be mapped.
    pub fn param(&self, i: usize) -> Result<Vec<f32>, CheckpointError> {
        self.changed_param(i, &mut |_, _, _| ())
    }

    /// The same after `change` of every piece of a stored tensor: the tensor's name, how many of its elements come before the piece, the piece.
    pub(crate) fn changed_param(
        &self,
        i: usize,
        change: &mut dyn FnMut(&str, usize, &mut [f32]),
    ) -> Result<Vec<f32>, CheckpointError> {
        let mut out = Vec::with_capacity(self.params[i].ty.len());
        self.pieces(i, &mut |dtype, bytes, name, before| {
            let start = out.len();
            out.extend(safetensors::widen(dtype, bytes));
            change(name, before, &mut out[start..]);
            Ok(())
        })?;
        Ok(out)
    }

    /// Names of tensors that are stored and not used.
    pub fn dropped(&self) -> &[String] {
        &self.record.dropped
    }

    /// Hands out the bytes of parameter `i`, piece by piece, one foreign tensor mapped at a time.
    fn pieces(&self, i: usize, f: &mut Take) -> Result<(), CheckpointError> {
        let width = rows(&self.params[i]).1;
        let mut mapped: Option<(usize, safetensors::Tensor)> = None;
        for o in &self.table.origins[i] {
            let tensor = match mapped.take() {
                Some((k, t)) if k == o.foreign => t,
                _ => self.source.tensor(&self.table.foreign[o.foreign].name)?,
            };
            let row = width * tensor.spec.dtype.bitsize() / 8;
            f(
                tensor.spec.dtype,
                &tensor.bytes()[o.at * row..(o.at + o.n) * row],
                &self.table.foreign[o.foreign].name,
                o.at * width,
            )?;
            mapped = Some((o.foreign, tensor));
        }
        Ok(())
    }
}

/// What an import did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Family.
    pub family: String,
    /// Where it was written.
    pub path: PathBuf,
    /// Elements of all parameters.
    pub n_params: usize,
    /// Tensors that hold NaN or infinity.
    pub not_finite: Vec<String>,
    /// Tensors that were not used.
    pub dropped: Vec<String>,
}

/// Files of a checkpoint that pass through unread.
fn passes_through(name: &str) -> bool {
    const STARTS: [&str; 9] = [
        "config.json",
        "generation_config",
        "tokenizer",
        "special_tokens_map",
        "vocab",
        "merges",
        "added_tokens",
        "chat_template",
        "LICENSE",
    ];
    STARTS.iter().any(|s| name.starts_with(s))
}

fn copy_through(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    for entry in fs::read_dir(from).map_err(CheckpointError::io("list", from))? {
        let entry = entry.map_err(CheckpointError::io("list", from))?;
        let name = entry.file_name();
        if entry.path().is_file() && passes_through(&name.to_string_lossy()) {
            // Content only: a read-only original must not make an undeletable copy.
            let bytes =
                fs::read(entry.path()).map_err(CheckpointError::io("read", &entry.path()))?;
            fs::write(to.join(&name), bytes).map_err(CheckpointError::io("write", to))?;
        }
    }
    Ok(())
}

/// Converts a Hugging Face folder to a Marimba checkpoint at `out`, tensor by tensor, element types kept.
///
/// # Errors
/// [`CheckpointError`]; nothing is written before everything was checked, and nothing stays when writing fails.
pub fn import(dir: &Path, out: &Path) -> Result<Report, CheckpointError> {
    let opened = open(dir)?;
    if out.exists() && fs::read_dir(out).map_or(true, |mut d| d.next().is_some()) {
        return Err(CheckpointError::Exists {
            path: out.to_path_buf(),
        });
    }
    let (params, table) = (&opened.params, &opened.table);
    let specs: Vec<Spec> = params
        .iter()
        .enumerate()
        .map(|(i, p)| Spec {
            name: p.name.clone(),
            dtype: dtype_of(&opened.source, table, &table.origins[i]).unwrap_or(Dtype::F32),
            shape: p.ty.sizes(),
        })
        .collect();
    let staged = Staged::new(out)?;
    let to = staged.path();
    let mut not_finite = Vec::new();
    safetensors::write(
        to,
        "model",
        &specs,
        &[("format", "pt")],
        SHARD_BYTES,
        &mut |i, sink| {
            let mut strange = false;
            opened.pieces(i, &mut |dtype, bytes, _, _| {
                strange |= !safetensors::all_finite(dtype, bytes);
                if dtype == specs[i].dtype {
                    sink.put(bytes)
                } else {
                    sink.put(&safetensors::narrow(
                        specs[i].dtype,
                        &safetensors::widen(dtype, bytes),
                    ))
                }
            })?;
            if strange {
                not_finite.push(specs[i].name.clone());
            }
            Ok(())
        },
    )?;
    let hf = to.join("hf");
    fs::create_dir(&hf).map_err(CheckpointError::io("create", &hf))?;
    copy_through(dir, &hf)?;
    let record =
        serde_json::to_string_pretty(&opened.record).map_err(|e| CheckpointError::Produce {
            name: "hf/import.json".into(),
            why: e.to_string(),
        })?;
    safetensors::write_text(&hf.join("import.json"), &record)?;
    safetensors::write_text(&to.join("model.ron"), &opened.model_ron)?;
    write_state(to, initial_state(params))?;
    staged.commit(false)?;
    for name in &not_finite {
        tracing::warn!(tensor = %name, "weights hold NaN or infinity");
    }
    Ok(Report {
        family: opened.family.model_type.into(),
        path: out.to_path_buf(),
        n_params: params.iter().map(|p| p.ty.len()).sum(),
        not_finite,
        dropped: opened.record.dropped,
    })
}

/// Choices of an export.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExportOptions {
    /// `model_type` to write; by default the imported one, else the first that can express the model.
    pub family: Option<String>,
    /// Element type of all tensors; by default as stored.
    pub dtype: Option<Dtype>,
}

/// Writes a Marimba checkpoint as a Hugging Face folder that transformers loads. Returns the family.
///
/// # Errors
/// [`CheckpointError::Inexpressible`] when no family, or not the asked one, has words for the model.
pub fn export(
    ckpt: &Path,
    out: &Path,
    options: &ExportOptions,
) -> Result<&'static Family, CheckpointError> {
    let ckpt = Checkpoint::open(ckpt)?;
    let path = ckpt.dir.join("model.ron");
    let source = marimba_dsl::Source::new(path.display().to_string(), ckpt.model_ron.clone());
    let model = parse_model(&source, &[]).map_err(|r| CheckpointError::Config {
        path,
        problems: r.diagnostics.into_iter().map(|d| d.message).collect(),
    })?;
    let params = params_of(&model)?;
    ckpt.check(&params)?;
    let hf = ckpt.dir.join("hf");
    let record = read_record(&hf)?;
    let (family, config) = configuration(&model, &hf, record.as_ref(), options)?;
    let record = record
        .filter(|r| r.family == family.model_type)
        .unwrap_or_default();
    let table = table_of(family, &model, &params)?;
    if out.exists() && fs::read_dir(out).map_or(true, |mut d| d.next().is_some()) {
        return Err(CheckpointError::Exists {
            path: out.to_path_buf(),
        });
    }

    let stored = |p: usize| {
        ckpt.model
            .spec(&params[p].name)
            .map_or(Dtype::F32, |s| s.dtype)
    };
    let mut specs = Vec::new();
    let mut from = Vec::new();
    for (k, f) in table.foreign.iter().enumerate() {
        let kept = record.dtypes.get(&f.name).and_then(|d| dtype_named(d));
        let dtype = options
            .dtype
            .or(kept)
            .unwrap_or_else(|| stored(f.pieces[0].ours));
        specs.push(Spec {
            name: f.name.clone(),
            dtype,
            shape: f.shape.clone(),
        });
        from.push(k);
    }
    let index: HashMap<&str, usize> = table
        .foreign
        .iter()
        .enumerate()
        .map(|(k, f)| (f.name.as_str(), k))
        .collect();
    for (name, of) in &record.duplicates {
        if let Some(&k) = index.get(of.as_str()) {
            specs.push(Spec {
                name: name.clone(),
                ..specs[k].clone()
            });
            from.push(k);
        }
    }

    let staged = Staged::new(out)?;
    safetensors::write(
        staged.path(),
        "model",
        &specs,
        &[("format", "pt")],
        SHARD_BYTES,
        &mut |i, sink| {
            let mut mapped: Option<(usize, safetensors::Tensor)> = None;
            for p in &table.foreign[from[i]].pieces {
                let tensor = match mapped.take() {
                    Some((k, t)) if k == p.ours => t,
                    _ => ckpt.model.tensor(&params[p.ours].name)?,
                };
                let dtype = tensor.spec.dtype;
                let row = rows(&params[p.ours]).1 * dtype.bitsize() / 8;
                let bytes = &tensor.bytes()[p.start * row..(p.start + p.n) * row];
                if dtype == specs[i].dtype {
                    sink.put(bytes)?;
                } else {
                    sink.put(&safetensors::narrow(
                        specs[i].dtype,
                        &safetensors::widen(dtype, bytes),
                    ))?;
                }
                mapped = Some((p.ours, tensor));
            }
            Ok(())
        },
    )?;
    if hf.is_dir() {
        copy_through(&hf, staged.path())?;
    }
    safetensors::write_text(&staged.path().join("config.json"), &config)?;
    let generation = staged.path().join("generation_config.json");
    if !generation.exists() {
        safetensors::write_text(&generation, "{\n  \"_from_model_config\": true\n}\n")?;
    }
    staged.commit(false)?;
    Ok(family)
}

fn dtype_named(name: &str) -> Option<Dtype> {
    [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64]
        .into_iter()
        .find(|d| format!("{d:?}") == name)
}

fn read_record(hf: &Path) -> Result<Option<Record>, CheckpointError> {
    let path = hf.join("import.json");
    if !path.is_file() {
        return Ok(None);
    }
    let text = fs::read_to_string(&path).map_err(CheckpointError::io("read", &path))?;
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|e| CheckpointError::damaged(&path, "import record", e.to_string()))
}

/// The family and the text of `config.json`: the imported one where it still says what the model is, else one that reads back equal.
fn configuration(
    model: &Model,
    hf: &Path,
    record: Option<&Record>,
    options: &ExportOptions,
) -> Result<(&'static Family, String), CheckpointError> {
    if let Some(name) = options.family.as_deref().filter(|n| family(n).is_none()) {
        return Err(CheckpointError::Inexpressible {
            model: model.name.clone(),
            format: name.into(),
            why: format!("no such family; expected one of {}", known()),
        });
    }
    let imported = record.and_then(|r| family(&r.family));
    let wanted = options.family.as_deref().and_then(family);
    if let Some(f) = imported.filter(|f| wanted.is_none_or(|w| w.model_type == f.model_type)) {
        let path = hf.join("config.json");
        let config = Config::read(&path)?;
        if same(&config.finish((f.read)(&config))?, model) {
            let text = fs::read_to_string(&path).map_err(CheckpointError::io("read", &path))?;
            return Ok((f, retyped(&text, options.dtype)));
        }
    }
    let candidates: Vec<&Family> = match wanted.or(imported) {
        Some(f) => vec![f],
        None => FAMILIES.iter().collect(),
    };
    let known = token_ids(&hf.join("config.json"))?;
    let mut reasons = Vec::new();
    for f in candidates {
        match written_with(f, model, &known) {
            Ok(text) => return Ok((f, retyped(&text, options.dtype))),
            Err(why) => reasons.push(format!("{}: {why}", f.model_type)),
        }
    }
    Err(CheckpointError::Inexpressible {
        model: model.name.clone(),
        format: "a Hugging Face checkpoint".into(),
        why: reasons.join("; "),
    })
}

/// The tokens of a meaning that an imported configuration has, its own or its class's.
fn token_ids(path: &Path) -> Result<Map<String, Value>, CheckpointError> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    let config = Config::read(path)?;
    let known = |key: &&str| Some((key.to_string(), config.get(key)?.clone()));
    Ok(parts::TOKEN_IDS.iter().filter_map(known).collect())
}

/// The configuration a family writes for a model, if reading it gives the model back.
///
/// # Errors
/// Why the family has no words for it.
pub fn written(family: &Family, model: &Model) -> Result<String, String> {
    written_with(family, model, &Map::new())
}

fn written_with(
    family: &Family,
    model: &Model,
    known: &Map<String, Value>,
) -> Result<String, String> {
    let mut map = (family.write)(model)?;
    map.extend(known.clone());
    let text = format!("{:#}\n", Value::Object(map.clone()));
    // From the numbers, not the text: serde_json prints them exactly, as Python reads them, but reads them to the last bit but one.
    let config = Config::of(Path::new("config.json"), map).map_err(|e| e.to_string())?;
    let back = (family.read)(&config);
    let back = config.finish(back).map_err(|e| e.to_string())?;
    if !same(&back, model) {
        return Err(difference(&back, model));
    }
    let params = params_of(model).map_err(|e| e.to_string())?;
    table_of(family, model, &params).map_err(|e| e.to_string())?;
    Ok(text)
}

/// Puts another element type into a configuration.
fn retyped(text: &str, dtype: Option<Dtype>) -> String {
    let Some(dtype) = dtype else {
        return text.to_string();
    };
    let name = match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        Dtype::F64 => "float64",
        _ => "float32",
    };
    let mut out = text.to_string();
    for old in ["float32", "bfloat16", "float16"] {
        for key in ["torch_dtype", "dtype"] {
            out = out.replace(
                &format!("\"{key}\": \"{old}\""),
                &format!("\"{key}\": \"{name}\""),
            );
        }
    }
    out
}

/// Whether two models compute the same from the same parameters: names of bodies, initialisation, router losses and chunk sizes aside.
pub fn same(a: &Model, b: &Model) -> bool {
    normal(a) == normal(b)
}

fn difference(back: &Model, model: &Model) -> String {
    let (back, model) = (normal(back), normal(model));
    if back.layers.len() != model.layers.len() {
        return format!("it would have {} layers", back.layers.len());
    }
    match back
        .layers
        .iter()
        .zip(&model.layers)
        .position(|(a, b)| a != b)
    {
        Some(i) => format!("layer {i} would not be the same"),
        None => "its outer parts would not be the same".into(),
    }
}

fn normal(m: &Model) -> Model {
    use marimba_dsl::model::*;
    let mut m = m.clone();
    m.name.clear();
    m.init = Init {
        std: 0.0,
        scale_output: false,
    };
    // 1/(1/x) may differ from x in the last bit.
    m.head.multiplier = m.head.multiplier as f32 as f64;
    fn mixer(body: &mut Mixer) {
        match body {
            Mixer::Mamba1(s) => {
                s.dt_init = DtInit {
                    min: 0.0,
                    max: 0.0,
                    floor: 0.0,
                }
            }
            Mixer::Mamba2(s) => {
                s.dt_init = DtInit {
                    min: 0.0,
                    max: 0.0,
                    floor: 0.0,
                };
                s.a_init = (0.0, 0.0);
                s.chunk_size = 1;
                s.dt_limit_in_decode = true;
            }
            Mixer::GatedDeltaNet(s) => {
                s.dt_init = DtInit {
                    min: 0.0,
                    max: 0.0,
                    floor: 0.0,
                };
                s.a_init = (0.0, 0.0);
                s.chunk_size = 1;
            }
            Mixer::Attention(_) => {}
            Mixer::Parallel(branches) => branches.iter_mut().for_each(|b| mixer(&mut b.mixer)),
        }
    }
    for layer in &mut m.layers {
        if let Some(s) = &mut layer.mixer {
            s.name.clear();
            mixer(&mut s.body);
        }
        if let Some(s) = &mut layer.ffn {
            s.name.clear();
            if let Ffn::Moe(moe) = &mut s.body {
                moe.load_balance = 0.0;
            }
        }
    }
    m
}
