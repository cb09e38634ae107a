//! Checkpoints: Marimba's own folders, and the formats of others.
//!
//! A checkpoint is a folder that either stands whole or not at all:
//!
//! | file | content |
//! |---|---|
//! | `model.safetensors` (or shards with an index) | parameters under the names of `ir/src/lower`, element type as trained or imported |
//! | `optim.safetensors` | moments of trainable parameters, `moment1:<name>`, `moment2:<name>`, f32; absent in imported checkpoints |
//! | `train_state.json` | [`TrainState`]: step, tokens, hash of the parameter list, sizes of all files, state of loader and random numbers |
//! | `model.ron`, `run.ron` | the resolved model, and the run when there was one |
//! | `hf/` | only after an import: the configuration, tokenizer and what else an export copies through |
//!
//! [`save`] writes into a temporary neighbour, syncs every file, and renames: a process killed at any moment leaves the old
//! checkpoints as they were. [`Checkpoint::open`] compares file sizes with `train_state.json` before anything is used. Tensors go
//! through memory one at a time.
//!
//! ```no_run
//! # use marimba_experiments::checkpoint::{self, Checkpoint, Contents};
//! # fn demo(params: &[marimba_ir::Param], model_ron: &str) -> Result<(), checkpoint::CheckpointError> {
//! let root = std::path::Path::new("runs/a/checkpoints");
//! let state = serde_json::json!({ "loader": [3, 17] });
//! let contents = Contents { step: 100, tokens: 51_200, state: &state, model_ron, run_ron: None, params, moments: true };
//! checkpoint::save(root, &contents, &mut |key, ty| Ok(vec![0.0; ty.len()]))?; // key: "param:layers.0.mixer.in_proj"
//! let latest = Checkpoint::open(root)?;
//! latest.restore(params, true, &mut |key, ty, data| Ok(()))?;
//! # Ok(()) }
//! ```

mod error;
pub mod hf;
pub mod safetensors;
mod weights;

pub use self::safetensors::{SHARD_BYTES, Sink, Source, Spec};
pub use error::CheckpointError;
pub use weights::Weights;

use ::safetensors::Dtype;
use marimba_ir::{Param, Type};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const STATE: &str = "train_state.json";
/// Version of the folder's layout.
const FORMAT: u32 = 1;

/// `train_state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Version of the folder's layout.
    pub format: u32,
    /// Optimiser steps done.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// [`graph_hash`] of the parameters.
    pub graph_hash: String,
    /// What the training loop wants back: loader, random numbers, schedule. Opaque here.
    pub state: Value,
    /// Size in bytes of every other file in the folder.
    pub files: BTreeMap<String, u64>,
}

/// What [`save`] writes besides numbers.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// Optimiser steps done; names the folder.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Opaque state of the training loop.
    pub state: &'a Value,
    /// The resolved model as RON.
    pub model_ron: &'a str,
    /// The resolved run as RON.
    pub run_ron: Option<&'a str>,
    /// Parameters, in the order of the graph.
    pub params: &'a [Param],
    /// Whether there are moments to save.
    pub moments: bool,
}

/// Gives the numbers of an engine's external by key (`param:<name>`, `moment1:<name>`, `moment2:<name>`).
pub type Read<'a> = dyn FnMut(&str, &Type) -> Result<Vec<f32>, String> + 'a;

/// Takes the numbers of an external by key.
pub type Write<'a> = dyn FnMut(&str, &Type, Vec<f32>) -> Result<(), String> + 'a;

/// SHA-256 over names, shapes and kinds of all parameters, in order: equal iff checkpoints are interchangeable.
pub fn graph_hash(params: &[Param]) -> String {
    let mut h = Sha256::new();
    for p in params {
        h.update(format!("{} {:?} {}\n", p.name, p.ty.sizes(), p.trainable));
    }
    h.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Folder of the checkpoint at `step` below `root`.
pub fn step_dir(root: &Path, step: u64) -> PathBuf {
    root.join(format!("step-{step:06}"))
}

/// Whole checkpoints below `root` by step; temporary folders do not count.
///
/// # Errors
/// [`CheckpointError::Io`] when the folder exists but cannot be listed.
pub fn list(root: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let entries = match fs::read_dir(root) {
        Ok(e) => e,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(CheckpointError::io("list", root)(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(CheckpointError::io("list", root))?.path();
        let step = path
            .file_name()
            .and_then(|n| n.to_str())
            .and_then(|n| n.strip_prefix("step-"))
            .and_then(|n| n.parse().ok());
        if let Some(step) = step.filter(|_| path.join(STATE).is_file()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Removes what processes that died while writing left below `root`. Only for who alone may write there.
///
/// # Errors
/// [`CheckpointError::Io`] when a leftover cannot be removed.
pub fn sweep_unfinished(root: &Path) -> Result<(), CheckpointError> {
    let Ok(entries) = fs::read_dir(root) else {
        return Ok(());
    };
    for path in entries.flatten().map(|e| e.path()) {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
        if name.is_some_and(|n| n.starts_with(".tmp-")) {
            fs::remove_dir_all(&path).map_err(CheckpointError::io("remove", &path))?;
        }
    }
    Ok(())
}

/// The last checkpoint below `root`, if there is one.
///
/// # Errors
/// [`CheckpointError::Io`] when the folder exists but cannot be listed.
pub fn latest(root: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    Ok(list(root)?.pop().map(|(_, path)| path))
}

/// Writes `step-NNNNNN` below `root`, replacing one of the same step. Returns its path.
///
/// # Errors
/// [`CheckpointError`]; the folder then is as it was before.
pub fn save(root: &Path, c: &Contents, read: &mut Read) -> Result<PathBuf, CheckpointError> {
    let target = step_dir(root, c.step);
    let staged = Staged::new(&target)?;
    let dir = staged.path().to_path_buf();

    let spec = |name: String, p: &Param| Spec {
        name,
        dtype: Dtype::F32,
        shape: p.ty.sizes(),
    };
    let specs: Vec<Spec> = c.params.iter().map(|p| spec(p.name.clone(), p)).collect();
    let mut put = |key: &str, ty: &Type, out: &mut Sink| {
        let data = read(key, ty).map_err(|why| CheckpointError::Produce {
            name: key.into(),
            why,
        })?;
        out.put(&safetensors::narrow(Dtype::F32, &data))
    };
    let meta = [("format", "pt")];
    safetensors::write(&dir, "model", &specs, &meta, SHARD_BYTES, &mut |i, out| {
        put(&format!("param:{}", c.params[i].name), &c.params[i].ty, out)
    })?;
    if c.moments {
        let trainable = c.params.iter().filter(|p| p.trainable);
        let keys: Vec<(String, &Param)> = trainable
            .flat_map(|p| ["moment1", "moment2"].map(|m| (format!("{m}:{}", p.name), p)))
            .collect();
        let specs: Vec<Spec> = keys.iter().map(|(k, p)| spec(k.clone(), p)).collect();
        safetensors::write(&dir, "optim", &specs, &meta, SHARD_BYTES, &mut |i, out| {
            put(&keys[i].0, &keys[i].1.ty, out)
        })?;
    }
    safetensors::write_text(&dir.join("model.ron"), c.model_ron)?;
    if let Some(run) = c.run_ron {
        safetensors::write_text(&dir.join("run.ron"), run)?;
    }
    let state = TrainState {
        format: FORMAT,
        step: c.step,
        tokens: c.tokens,
        graph_hash: graph_hash(c.params),
        state: c.state.clone(),
        files: BTreeMap::new(),
    };
    write_state(&dir, state)?;
    staged.commit(true)?;
    Ok(target)
}

/// Writes `train_state.json` over the files now in `dir`.
pub(crate) fn write_state(dir: &Path, mut state: TrainState) -> Result<(), CheckpointError> {
    let mut todo = vec![dir.to_path_buf()];
    while let Some(at) = todo.pop() {
        for entry in fs::read_dir(&at).map_err(CheckpointError::io("list", &at))? {
            let path = entry.map_err(CheckpointError::io("list", &at))?.path();
            if path.is_dir() {
                todo.push(path);
                continue;
            }
            let size = fs::metadata(&path)
                .map_err(CheckpointError::io("read", &path))?
                .len();
            let name = path
                .strip_prefix(dir)
                .unwrap_or(&path)
                .to_string_lossy()
                .replace('\\', "/");
            state.files.insert(name, size);
        }
    }
    let text = serde_json::to_string_pretty(&state).map_err(|e| CheckpointError::Produce {
        name: STATE.into(),
        why: e.to_string(),
    })?;
    safetensors::write_text(&dir.join(STATE), &(text + "\n"))
}

/// State of a fresh checkpoint without training, such as an import.
pub(crate) fn initial_state(params: &[Param]) -> TrainState {
    TrainState {
        format: FORMAT,
        step: 0,
        tokens: 0,
        graph_hash: graph_hash(params),
        state: Value::Null,
        files: BTreeMap::new(),
    }
}

/// A folder in the making beside its target. Dropped without [`Staged::commit`], it vanishes.
#[derive(Debug)]
pub(crate) struct Staged {
    tmp: PathBuf,
    target: PathBuf,
}

impl Staged {
    pub(crate) fn new(target: &Path) -> Result<Self, CheckpointError> {
        let parent = parent(target);
        fs::create_dir_all(parent).map_err(CheckpointError::io("create", parent))?;
        let name = target
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        let tmp = parent.join(format!(".tmp-{name}-{}", std::process::id()));
        if tmp.exists() {
            fs::remove_dir_all(&tmp).map_err(CheckpointError::io("remove", &tmp))?;
        }
        fs::create_dir(&tmp).map_err(CheckpointError::io("create", &tmp))?;
        Ok(Staged {
            tmp,
            target: target.to_path_buf(),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.tmp
    }

    /// Puts the folder in its place. An existing target is replaced, or refused.
    pub(crate) fn commit(self, replace: bool) -> Result<(), CheckpointError> {
        sync_dir(&self.tmp)?;
        let parent = parent(&self.target);
        if self.target.exists() {
            let empty = fs::read_dir(&self.target).is_ok_and(|mut d| d.next().is_none());
            if !replace && !empty {
                return Err(CheckpointError::Exists {
                    path: self.target.clone(),
                });
            }
            let old = self.tmp.with_extension("old");
            fs::rename(&self.target, &old).map_err(CheckpointError::io("rename", &self.target))?;
            fs::rename(&self.tmp, &self.target)
                .map_err(CheckpointError::io("rename", &self.tmp))?;
            fs::remove_dir_all(&old).map_err(CheckpointError::io("remove", &old))?;
        } else {
            fs::rename(&self.tmp, &self.target)
                .map_err(CheckpointError::io("rename", &self.tmp))?;
        }
        sync_dir(parent)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // After a commit there is nothing left to remove.
        if self.tmp.exists() && fs::remove_dir_all(&self.tmp).is_err() {
            tracing::warn!(path = %self.tmp.display(), "could not remove an unfinished folder");
        }
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

fn sync_dir(path: &Path) -> Result<(), CheckpointError> {
    let dir = fs::File::open(path).map_err(CheckpointError::io("open", path))?;
    dir.sync_all().map_err(CheckpointError::io("sync", path))
}

/// An opened checkpoint folder, whole as far as names and sizes go.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder.
    pub dir: PathBuf,
    /// Its `train_state.json`.
    pub state: TrainState,
    /// Parameters.
    pub model: Source,
    /// Moments, where there are some.
    pub optim: Option<Source>,
    /// The resolved model.
    pub model_ron: String,
    /// The resolved run, where there was one.
    pub run_ron: Option<String>,
}

impl Checkpoint {
    /// Opens a checkpoint folder, or the latest one in a folder of checkpoints or in a run folder.
    ///
    /// # Errors
    /// [`CheckpointError::NotFound`] when there is none; [`CheckpointError::Damaged`] when files are absent or of another size than
    /// when they were written.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let dir = if path.join(STATE).is_file() {
            path.to_path_buf()
        } else {
            let inside = path.join(crate::record::run_dir::CHECKPOINTS_DIR);
            let root = if inside.is_dir() { &inside } else { path };
            latest(root)?.ok_or_else(|| CheckpointError::NotFound {
                kind: "checkpoint",
                path: path.to_path_buf(),
                help: "expected a folder step-NNNNNN with train_state.json, or a folder of such folders".into(),
            })?
        };
        let state = read_state(&dir)?;
        let wrong: Vec<String> = state
            .files
            .iter()
            .filter_map(|(name, size)| match fs::metadata(dir.join(name)) {
                Ok(m) if m.len() == *size => None,
                Ok(m) => Some(format!("{name} has {} bytes, {size} were written", m.len())),
                Err(_) => Some(format!("{name} is absent")),
            })
            .collect();
        if !wrong.is_empty() {
            return Err(CheckpointError::damaged(
                &dir,
                "checkpoint",
                wrong.join("; "),
            ));
        }
        let text = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).map_err(CheckpointError::io("read", &path))
        };
        let has_optim = state.files.keys().any(|f| f.starts_with("optim"));
        let optim = if has_optim {
            Some(Source::open(&dir, "optim")?)
        } else {
            None
        };
        let run_ron = if state.files.contains_key("run.ron") {
            Some(text("run.ron")?)
        } else {
            None
        };
        Ok(Checkpoint {
            model: Source::open(&dir, "model")?,
            optim,
            model_ron: text("model.ron")?,
            run_ron,
            state,
            dir,
        })
    }

    /// Checks that the stored parameters are exactly `params`.
    ///
    /// # Errors
    /// [`CheckpointError::Tensors`] with everything missing, extra or misshaped; [`CheckpointError::OtherModel`] when only the hash
    /// differs.
    pub fn check(&self, params: &[Param]) -> Result<(), CheckpointError> {
        let wanted: Vec<(String, Vec<usize>)> = params
            .iter()
            .map(|p| (p.name.clone(), p.ty.sizes()))
            .collect();
        check_tensors(&self.model, &wanted)?;
        let hash = graph_hash(params);
        if hash != self.state.graph_hash {
            return Err(CheckpointError::OtherModel {
                path: self.dir.clone(),
                why: format!(
                    "hash of its parameters {}, of the model {hash}",
                    self.state.graph_hash
                ),
            });
        }
        Ok(())
    }

    /// Hands every parameter, and with `moments` every moment, to `write`, after [`Checkpoint::check`]. Returns the names of tensors
    /// that hold NaN or infinity.
    ///
    /// # Errors
    /// As [`Checkpoint::check`]; whatever `write` says.
    pub fn restore(
        &self,
        params: &[Param],
        moments: bool,
        write: &mut Write,
    ) -> Result<Vec<String>, CheckpointError> {
        self.check(params)?;
        let mut strange = Vec::new();
        let mut hand = |source: &Source, stored: &str, key: &str, p: &Param| {
            let data = source.tensor(stored)?.to_f32();
            if data.iter().any(|v| !v.is_finite()) {
                strange.push(stored.to_string());
            }
            write(key, &p.ty, data).map_err(|why| CheckpointError::Produce {
                name: key.into(),
                why,
            })
        };
        for p in params {
            hand(&self.model, &p.name, &format!("param:{}", p.name), p)?;
        }
        if moments {
            let optim = self
                .optim
                .as_ref()
                .ok_or_else(|| CheckpointError::NotFound {
                    kind: "optimiser state",
                    path: self.dir.clone(),
                    help: "it was imported or saved without moments; start the optimiser anew"
                        .into(),
                })?;
            let trainable: Vec<&Param> = params.iter().filter(|p| p.trainable).collect();
            let wanted: Vec<(String, Vec<usize>)> = trainable
                .iter()
                .flat_map(|p| {
                    ["moment1", "moment2"].map(|m| (format!("{m}:{}", p.name), p.ty.sizes()))
                })
                .collect();
            check_tensors(optim, &wanted)?;
            for p in trainable {
                for m in ["moment1", "moment2"] {
                    let key = format!("{m}:{}", p.name);
                    hand(optim, &key, &key, p)?;
                }
            }
        }
        for name in &strange {
            tracing::warn!(tensor = %name, "weights hold NaN or infinity");
        }
        Ok(strange)
    }
}

fn read_state(dir: &Path) -> Result<TrainState, CheckpointError> {
    let path = dir.join(STATE);
    let text = fs::read_to_string(&path).map_err(CheckpointError::io("read", &path))?;
    let state: TrainState = serde_json::from_str(&text)
        .map_err(|e| CheckpointError::damaged(&path, "training state", e.to_string()))?;
    if state.format != FORMAT {
        return Err(CheckpointError::damaged(
            &path,
            "training state",
            format!(
                "its layout is version {}, this program reads version {FORMAT}",
                state.format
            ),
        ));
    }
    Ok(state)
}

/// Compares stored tensors with wanted names and shapes; element types must be floats.
///
/// # Errors
/// [`CheckpointError::Tensors`] with one line for everything missing, extra, misshaped or of another type.
pub fn check_tensors(
    source: &Source,
    wanted: &[(String, Vec<usize>)],
) -> Result<(), CheckpointError> {
    let mut problems = Vec::new();
    for (name, shape) in wanted {
        match source.spec(name) {
            None => problems.push(format!("{name}: missing, expected {shape:?}")),
            Some(s) if s.shape != *shape => {
                problems.push(format!("{name}: shape {:?}, expected {shape:?}", s.shape));
            }
            Some(s) if !safetensors::is_float(s.dtype) => {
                problems.push(format!(
                    "{name}: element type {:?}, expected F32, BF16, F16 or F64",
                    s.dtype
                ));
            }
            Some(_) => {}
        }
    }
    let known: std::collections::HashSet<&str> = wanted.iter().map(|(n, _)| n.as_str()).collect();
    let extra = source.specs().filter(|s| !known.contains(s.name.as_str()));
    problems.extend(extra.map(|s| format!("{}: extra, shape {:?}", s.name, s.shape)));
    if problems.is_empty() {
        Ok(())
    } else {
        Err(CheckpointError::Tensors {
            path: source.path().to_path_buf(),
            problems,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use marimba_ir::{DType, ParamInit, dims};
    use serde_json::json;

    fn param(name: &str, d: Vec<marimba_ir::Dim>, trainable: bool) -> Param {
        Param {
            name: name.into(),
            ty: Type::f32(d),
            compute: DType::F32,
            init: ParamInit::Zeros,
            decay: false,
            trainable,
            active: (1, 1),
            path: String::new(),
        }
    }

    fn params() -> Vec<Param> {
        vec![
            param("w", dims![D 3, F 2], true),
            param("buffer", dims![E 4], false),
        ]
    }

    fn number(key: &str, i: usize) -> f32 {
        key.len() as f32 + i as f32
    }

    fn save_at(root: &Path, step: u64) -> PathBuf {
        let params = params();
        let state = json!({ "loader": [1, 2] });
        let c = Contents {
            step,
            tokens: step * 10,
            state: &state,
            model_ron: "(model)",
            run_ron: Some("(run)"),
            params: &params,
            moments: true,
        };
        save(root, &c, &mut |key, ty| {
            Ok((0..ty.len()).map(|i| number(key, i)).collect())
        })
        .unwrap()
    }

    #[test]
    fn what_is_saved_is_restored() {
        let root = tempfile::tempdir().unwrap();
        save_at(root.path(), 5);
        save_at(root.path(), 5);
        save_at(root.path(), 20);
        let c = Checkpoint::open(root.path()).unwrap();
        assert_eq!((c.state.step, c.state.tokens), (20, 200));
        assert_eq!(c.state.state, json!({ "loader": [1, 2] }));
        assert_eq!(
            (c.model_ron.as_str(), c.run_ron.as_deref()),
            ("(model)", Some("(run)"))
        );
        let mut keys = Vec::new();
        c.restore(&params(), true, &mut |key, ty, data| {
            assert_eq!(
                data,
                (0..ty.len()).map(|i| number(key, i)).collect::<Vec<_>>()
            );
            keys.push(key.to_string());
            Ok(())
        })
        .unwrap();
        assert_eq!(keys, ["param:w", "param:buffer", "moment1:w", "moment2:w"]);
        let names: Vec<_> = fs::read_dir(root.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(names.len(), 2, "{names:?}");
    }

    #[test]
    fn a_failed_save_leaves_the_old_checkpoint() {
        let root = tempfile::tempdir().unwrap();
        save_at(root.path(), 5);
        let params = params();
        let c = Contents {
            step: 5,
            tokens: 0,
            state: &Value::Null,
            model_ron: "(other)",
            run_ron: None,
            params: &params,
            moments: false,
        };
        let e = save(root.path(), &c, &mut |_, _| Err("device lost".into())).unwrap_err();
        assert!(e.to_string().contains("device lost"), "{e}");
        assert_eq!(Checkpoint::open(root.path()).unwrap().model_ron, "(model)");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_checkpoint_cut_short_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let dir = save_at(root.path(), 5);
        let file = dir.join("optim.safetensors");
        let bytes = fs::read(&file).unwrap();
        fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
        let e = Checkpoint::open(root.path()).unwrap_err().to_string();
        assert!(e.contains("optim.safetensors has"), "{e}");
    }

    #[test]
    fn another_model_is_refused_with_every_difference() {
        let root = tempfile::tempdir().unwrap();
        save_at(root.path(), 5);
        let c = Checkpoint::open(root.path()).unwrap();
        let other = [
            param("w", dims![D 3, F 7], true),
            param("v", dims![E 4], true),
        ];
        let e = c.check(&other).unwrap_err().to_string();
        for part in [
            "w: shape [3, 2], expected [3, 7]",
            "v: missing",
            "buffer: extra",
        ] {
            assert!(e.contains(part), "{e}");
        }
    }

    #[test]
    fn no_checkpoint_is_an_error_that_says_what_was_expected() {
        let root = tempfile::tempdir().unwrap();
        let e = Checkpoint::open(root.path()).unwrap_err().to_string();
        assert!(e.contains("step-NNNNNN"), "{e}");
    }
}
