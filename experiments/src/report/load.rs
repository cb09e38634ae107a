//! Runs from folders: Marimba's run folders, or folders with event files of any TensorBoard writer.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::database::{Database, DatabaseError, RESULTS_DB};
use crate::record::RecordError;
use crate::record::metrics::read_metrics;
use crate::record::read::{ReadLimits, is_event_file, read_dir};
use crate::record::run_dir::{
    GRAPH_TXT, METRICS_JSONL, RESOLVED_RON, STATUS_JSON, SUMMARY_JSON, TB_DIR,
};
use crate::record::series::SeriesMap;
use crate::record::summary::{RunState, RunStatus, RunSummary, read_json};
use crate::record::sweep_file::SWEEP_JSON;

/// Folders below a given one that are searched for runs.
const MAX_DEPTH: usize = 8;
/// Points kept per curve.
const MAX_POINTS: usize = 4000;
/// Folders beside one another in which Keras' callback writes the halves of one run.
const HALVES: [&str; 6] = ["train", "validation", "valid", "val", "test", "eval"];
/// Hyper-parameters that hold the seed.
const SEEDS: [&str; 3] = ["seed", "random_seed", "rng_seed"];

/// One run, read.
#[derive(Debug)]
pub struct RunData {
    /// Name: of the summary, else the folder's path below the one given.
    pub name: String,
    /// The folder.
    pub path: PathBuf,
    /// Group that it is a member of.
    pub group: String,
    /// Seed, where known.
    pub seed: Option<u64>,
    /// Where it stands; `None` for another writer's run.
    pub state: Option<RunState>,
    /// The error of a failed run.
    pub message: Option<String>,
    /// Its facts, where it has a summary.
    pub summary: Option<RunSummary>,
    /// The point of the sweep, else the hyper-parameters of another writer; without the seed.
    pub axes: BTreeMap<String, String>,
    /// Its curves.
    pub series: SeriesMap,
    /// Text of `resolved.ron`; of another writer's run its hyper-parameters.
    pub resolved: Option<String>,
    /// Text of `graph.txt`.
    pub graph: Option<String>,
    /// What could not be read.
    pub warnings: Vec<String>,
}

impl RunData {
    /// Last value of each metric: of the summary, else of the curves.
    pub fn finals(&self) -> BTreeMap<String, f64> {
        let mut finals: BTreeMap<String, f64> = self
            .series
            .iter()
            .filter_map(|(tag, s)| s.last().map(|p| (tag.clone(), p.value)))
            .collect();
        if let Some(summary) = &self.summary {
            finals.extend(summary.final_metrics.iter().map(|(k, v)| (k.clone(), *v)));
        }
        finals
    }

    /// Whether its last values are final: it finished, or nothing is known to the contrary.
    pub fn is_final(&self) -> bool {
        matches!(self.state, None | Some(RunState::Finished))
    }
}

/// Why nothing could be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A path that does not exist.
    #[error("no such folder: {path}")]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// A folder without a run in it or below it.
    #[error(
        "no run found in {path}: expected a run folder ({METRICS_JSONL} or {SUMMARY_JSON}) or TensorBoard event files"
    )]
    NoRuns {
        /// The folder.
        path: PathBuf,
    },
    /// The file system.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The database of a sweep.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

/// Loads every run in or below `paths`, in the order given, folders by name. A run named twice is loaded once. The folder of a sweep is
/// read through its database, see [`super::database`].
///
/// # Errors
/// A path does not exist, or holds no run at all; the database of a sweep is not one that can be read. Damage inside a run is a
/// warning of that run.
pub fn load(paths: &[PathBuf]) -> Result<Vec<RunData>, LoadError> {
    let mut runs: Vec<RunData> = Vec::new();
    for path in paths {
        if !path.is_dir() {
            return Err(LoadError::Missing { path: path.clone() });
        }
        let mut found: Vec<Found> = Vec::new();
        find(path, path, 0, &mut found)?;
        if found.is_empty() {
            return Err(LoadError::NoRuns { path: path.clone() });
        }
        let kept = [SWEEP_JSON, RESULTS_DB]
            .iter()
            .any(|f| path.join(f).is_file());
        let database = if kept { Database::open(path)? } else { None };
        match database {
            Some(mut database) => {
                let found: Vec<(PathBuf, String)> =
                    found.into_iter().map(|f| (f.path, f.name)).collect();
                runs.extend(database.sync(path, &found)?);
            }
            None => runs.extend(found.into_iter().map(load_found)),
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    runs.retain(|r| seen.insert(fs::canonicalize(&r.path).unwrap_or_else(|_| r.path.clone())));
    group_by_hparams(&mut runs);
    Ok(runs)
}

/// A run's folder.
struct Found {
    path: PathBuf,
    name: String,
    /// Further folders with event files of the run, and what stands before their tags.
    parts: Vec<(PathBuf, String)>,
}

fn find(root: &Path, dir: &Path, depth: usize, found: &mut Vec<Found>) -> Result<(), LoadError> {
    let ours = [METRICS_JSONL, SUMMARY_JSON, STATUS_JSON]
        .iter()
        .any(|f| dir.join(f).is_file());
    let mut entries: Vec<PathBuf> = fs::read_dir(dir)
        .map_err(|e| RecordError::from_io("read", dir, e))?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .collect();
    entries.sort();
    // Links are not followed, or a link upwards would be walked in circles.
    let folders = entries.iter().filter(|p| p.is_dir() && !p.is_symlink());
    let has_events = entries.iter().any(|p| is_event_file(p));
    let parts = match (ours, has_events) {
        (true, _) => Vec::new(),
        (false, true) => torch_hparams(folders.clone()),
        (false, false) => keras_halves(folders.clone()),
    };
    let within: Vec<PathBuf> = parts.iter().map(|(p, _)| p.clone()).collect();
    if ours || has_events || !parts.is_empty() {
        let below = dir.strip_prefix(root).unwrap_or(dir);
        let name = if below.as_os_str().is_empty() {
            fs::canonicalize(dir)
                .ok()
                .and_then(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()))
        } else {
            Some(below.to_string_lossy().into_owned())
        };
        found.push(Found {
            path: dir.to_path_buf(),
            name: name.unwrap_or_else(|| dir.display().to_string()),
            parts,
        });
    }
    if ours || depth == MAX_DEPTH {
        return Ok(());
    }
    for entry in folders.filter(|p| !within.contains(p)) {
        find(root, entry, depth + 1, found)?;
    }
    Ok(())
}

fn holds_events(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|entries| entries.flatten().any(|e| is_event_file(&e.path())))
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// PyTorch's `add_hparams` writes a session into a folder of the run that is named by the time.
fn torch_hparams<'a>(folders: impl Iterator<Item = &'a PathBuf>) -> Vec<(PathBuf, String)> {
    let is_time = |name: &str| name.contains('.') && name.parse::<f64>().is_ok();
    folders
        .filter(|p| is_time(&file_name(p)) && holds_events(p))
        .map(|p| (p.clone(), String::new()))
        .collect()
}

/// Keras' callback writes what it saw in training and in validation into two folders, under the same tags.
fn keras_halves<'a>(folders: impl Iterator<Item = &'a PathBuf>) -> Vec<(PathBuf, String)> {
    let halves: Vec<&PathBuf> = folders.filter(|p| holds_events(p)).collect();
    let names: Vec<String> = halves.iter().map(|p| file_name(p)).collect();
    let is_run = names.len() > 1
        && names.iter().any(|n| n == "train")
        && names.iter().all(|n| HALVES.contains(&n.as_str()));
    let parts = halves.into_iter().zip(names);
    parts
        .filter(|_| is_run)
        .map(|(p, n)| (p.clone(), format!("{n}/")))
        .collect()
}

/// Runs of another writer that differ by a seed among their hyper-parameters become groups, named by the others that differ.
fn group_by_hparams(runs: &mut [RunData]) {
    let foreign = |r: &RunData| r.state.is_none() && r.seed.is_some() && r.group == r.name;
    let those: Vec<&RunData> = runs.iter().filter(|r| foreign(r)).collect();
    let names: std::collections::BTreeSet<&String> =
        those.iter().flat_map(|r| r.axes.keys()).collect();
    let differing: Vec<String> = names
        .into_iter()
        .filter(|n| {
            those
                .iter()
                .any(|r| r.axes.get(*n) != those[0].axes.get(*n))
        })
        .cloned()
        .collect();
    if those.len() < 2 {
        return;
    }
    for run in runs.iter_mut().filter(|r| foreign(r)) {
        let values = differing.iter().filter_map(|n| Some((n, run.axes.get(n)?)));
        let label: Vec<String> = values.map(|(n, v)| format!("{n}={v}")).collect();
        run.group = if label.is_empty() {
            "all".to_owned()
        } else {
            label.join(" ")
        };
    }
}

/// Reads the run in a folder from its files.
pub(super) fn load_run(path: &Path, name: String) -> RunData {
    load_found(Found {
        path: path.to_path_buf(),
        name,
        parts: Vec::new(),
    })
}

fn load_found(found: Found) -> RunData {
    let Found { path, name, parts } = found;
    let path = path.as_path();
    let mut warnings = Vec::new();
    let mut note = |e: RecordError| warnings.push(e.to_string());
    let summary: Option<RunSummary> = read_json(&path.join(SUMMARY_JSON)).unwrap_or_else(|e| {
        note(e);
        None
    });
    let status: Option<RunStatus> = read_json(&path.join(STATUS_JSON)).unwrap_or_else(|e| {
        note(e);
        None
    });
    let metrics = path.join(METRICS_JSONL);
    let mut series = SeriesMap::new();
    let mut hparams = BTreeMap::new();
    if metrics.is_file() {
        match read_metrics(&metrics, MAX_POINTS) {
            Ok(log) => {
                series = log.series;
                warnings.extend(log.warnings);
            }
            Err(e) => warnings.push(e.to_string()),
        }
    }
    if series.is_empty() {
        let limits = ReadLimits {
            max_points: MAX_POINTS,
            ..ReadLimits::default()
        };
        let own = [path.to_path_buf(), path.join(TB_DIR)].map(|d| (d, String::new()));
        for (dir, before) in own.into_iter().chain(parts).filter(|(d, _)| d.is_dir()) {
            match read_dir(&dir, &limits) {
                Ok(log) => {
                    let tagged = log.scalars.into_iter();
                    series.extend(tagged.map(|(tag, s)| (format!("{before}{tag}"), s)));
                    hparams.extend(log.hparams);
                    warnings.extend(log.warnings.iter().map(ToString::to_string));
                }
                Err(e) => warnings.push(e.to_string()),
            }
        }
    }
    let (guessed_group, mut guessed_seed) = split_seed(&name);
    let mut axes = summary
        .as_ref()
        .map(|s| s.axes.clone())
        .unwrap_or_else(|| hparams.clone());
    for seed in SEEDS.into_iter().filter_map(|name| axes.remove(name)) {
        // Numbers come as floats.
        guessed_seed = guessed_seed.or_else(|| seed.parse().ok());
    }
    let group = summary
        .as_ref()
        .map(|s| s.group.clone())
        .or_else(|| status.as_ref().map(|s| s.group.clone()))
        .filter(|g| !g.is_empty())
        .unwrap_or(guessed_group);
    RunData {
        group,
        seed: summary
            .as_ref()
            .map(|s| s.seed)
            .or(status.as_ref().map(|s| s.seed))
            .or(guessed_seed),
        // A summary that says finished is the last word, whatever became of the status.
        state: summary
            .as_ref()
            .map(|s| s.status)
            .filter(|s| *s == RunState::Finished)
            .or(status.as_ref().map(|s| s.state))
            .or(summary.as_ref().map(|s| s.status)),
        message: status.and_then(|s| s.message),
        name: summary
            .as_ref()
            .map(|s| s.name.clone())
            .filter(|n| !n.is_empty())
            .unwrap_or(name),
        path: path.to_path_buf(),
        summary,
        series,
        axes,
        resolved: fs::read_to_string(path.join(RESOLVED_RON))
            .ok()
            .or_else(|| {
                let lines = hparams
                    .iter()
                    .map(|(name, value)| format!("{name}: {value}\n"));
                (!hparams.is_empty()).then(|| lines.collect())
            }),
        graph: fs::read_to_string(path.join(GRAPH_TXT)).ok(),
        warnings,
    }
}

/// `name-seed3` is seed 3 of group `name`; also with `_`, `.`, `/` before and `-`, `_`, `=` behind `seed`.
fn split_seed(name: &str) -> (String, Option<u64>) {
    let digits = name.len() - name.chars().rev().take_while(char::is_ascii_digit).count();
    let (head, seed) = name.split_at(digits);
    let head = head.strip_suffix(['-', '_', '=']).unwrap_or(head);
    match (head.strip_suffix("seed"), seed.parse()) {
        (Some(group), Ok(seed)) => {
            let trimmed = group.trim_end_matches(['-', '_', '.', '/']);
            (
                if trimmed.is_empty() {
                    "all".to_owned()
                } else {
                    trimmed.to_owned()
                },
                Some(seed),
            )
        }
        _ => (name.to_owned(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::EventFile;

    #[test]
    fn seeds_in_names() {
        assert_eq!(split_seed("a-b-seed3"), ("a-b".into(), Some(3)));
        assert_eq!(split_seed("x/seed_12"), ("x".into(), Some(12)));
        assert_eq!(split_seed("seed=1"), ("all".into(), Some(1)));
        assert_eq!(split_seed("größe2"), ("größe2".into(), None));
        assert_eq!(split_seed("7"), ("7".into(), None));
    }

    #[test]
    fn other_writers_folders_are_runs_and_damage_is_a_warning() {
        let tmp = tempfile::tempdir().unwrap();
        for (dir, tag) in [("a/seed0", "x"), ("a/seed1", "x"), ("b", "y")] {
            let mut f = EventFile::create_new(&tmp.path().join(dir)).unwrap();
            f.scalars(1, 0.0, [(tag, 1.0)]).unwrap();
            f.flush().unwrap();
            let bytes = fs::read(f.path()).unwrap();
            fs::write(f.path(), &bytes[..bytes.len() - usize::from(dir == "b")]).unwrap();
        }
        fs::create_dir(tmp.path().join("c")).unwrap();
        fs::write(tmp.path().join("c/metrics.jsonl"), "{\"step\":1,\"z\":2}\n").unwrap();
        fs::write(tmp.path().join("c/summary.json"), "{").unwrap();
        let runs = load(&[tmp.path().to_path_buf(), tmp.path().join("b")]).unwrap();
        let names: Vec<_> = runs
            .iter()
            .map(|r| (r.name.as_str(), r.group.as_str(), r.seed))
            .collect();
        assert_eq!(
            names,
            [
                ("a/seed0", "a", Some(0)),
                ("a/seed1", "a", Some(1)),
                ("b", "b", None),
                ("c", "c", None)
            ]
        );
        assert_eq!(runs[0].finals()["x"], 1.0);
        assert_eq!(runs[2].warnings.len(), 1);
        assert!(runs[3].warnings[0].contains("summary.json") && runs[3].finals()["z"] == 2.0);
    }

    /// Files of other writers: see tests/fixtures/events/README.md for what wrote them.
    #[test]
    fn runs_of_pytorch_and_keras_are_read_as_they_are_meant() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/events");
        let runs = load(&[root.join("torch"), root.join("keras")]).unwrap();
        let names: Vec<_> = runs
            .iter()
            .map(|r| (r.name.as_str(), r.group.as_str(), r.seed))
            .collect();
        assert_eq!(
            names,
            [
                ("a", "lr=0.01", Some(0)),
                ("b", "lr=0.01", Some(1)),
                ("c", "lr=0.1", Some(0)),
                ("keras", "keras", None)
            ]
        );
        for run in &runs {
            assert!(run.warnings.is_empty(), "{:?}", run.warnings);
        }
        assert_eq!(runs[0].axes["optimizer"], "adam");
        assert!(runs[0].resolved.as_ref().unwrap().contains("seed: 0\n"));
        let finals = runs[2].finals();
        assert!((finals["loss/train"] - 0.1).abs() < 1e-6 && finals["hparam/accuracy"] == 0.5);
        let finals = runs[3].finals();
        assert!(
            (finals["train/epoch_loss"] - 0.25).abs() < 1e-6,
            "{finals:?}"
        );
        assert_eq!(finals["validation/epoch_loss"], 0.5);
        assert_eq!(runs[3].axes["units"], "32");
    }

    #[test]
    fn nothing_to_load_is_said() {
        let tmp = tempfile::tempdir().unwrap();
        assert!(matches!(
            load(&[tmp.path().into()]),
            Err(LoadError::NoRuns { .. })
        ));
        assert!(matches!(
            load(&[tmp.path().join("x")]),
            Err(LoadError::Missing { .. })
        ));
    }
}
