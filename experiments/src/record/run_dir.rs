//! The folder of one run and who may write to it.
//!
//! `runs/<name>/{run.ron, resolved.ron, env.json, graph.txt, metrics.jsonl, summary.json, status.json, tb/, checkpoints/}`.
//! A `RunDir` is the right to write there: it holds an advisory lock on `.lock` that the system drops with the process,
//! so the lock of a dead process never stands in the way.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::error::RecordError;
use super::files::{host_name, parent, sync_dir, unix_now, write_atomic};
use super::summary::{RunState, RunStatus, RunSummary, read_json, write_json};

/// The run as the user wrote it.
pub const RUN_RON: &str = "run.ron";
/// The run with every default filled in and every override applied.
pub const RESOLVED_RON: &str = "resolved.ron";
/// Where and with what the run was made.
pub const ENV_JSON: &str = "env.json";
/// The training graph as text.
pub const GRAPH_TXT: &str = "graph.txt";
/// The curves.
pub const METRICS_JSONL: &str = "metrics.jsonl";
/// Where the run stands.
pub const STATUS_JSON: &str = "status.json";
/// The facts of the run.
pub const SUMMARY_JSON: &str = "summary.json";
/// TensorBoard event files.
pub const TB_DIR: &str = "tb";
/// Checkpoints.
pub const CHECKPOINTS_DIR: &str = "checkpoints";
const LOCK: &str = ".lock";

/// What a new run folder starts with.
#[derive(Debug, Clone)]
pub struct RunFiles<'a> {
    /// Text of `run.ron`.
    pub run_ron: &'a str,
    /// Text of `resolved.ron`.
    pub resolved_ron: &'a str,
    /// Content of `env.json`; [`environment`] gives the usual one.
    pub env: Value,
    /// Text of `graph.txt`; none is written where `None`.
    pub graph: Option<&'a str>,
    /// Runs that differ only by seed share a group.
    pub group: &'a str,
    /// The run's seed.
    pub seed: u64,
}

/// A run folder that this process alone may write to, until dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    status: RunStatus,
    // Locked; unlocked by closing.
    _lock: File,
}

impl RunDir {
    /// Makes a new run folder with its first files and `status.json` saying `running`.
    ///
    /// # Errors
    /// [`RecordError::Locked`] or [`RecordError::Occupied`] where a run is there already, else what the file system
    /// said; then everything made here is removed again.
    pub fn create(path: &Path, files: &RunFiles<'_>) -> Result<RunDir, RecordError> {
        let made = create_dirs(path)?;
        let claimed = lock(path).and_then(|lock| {
            refuse_occupied(path)?;
            Ok(lock)
        });
        let lock = claimed.inspect_err(|_| remove_empty(&made))?;
        // From here on the folder is this run's alone, and what is in it may be taken back. The first error is the one
        // to tell.
        Self::fill(path, files, lock).inspect_err(|_| {
            for name in [
                RUN_RON,
                RESOLVED_RON,
                ENV_JSON,
                GRAPH_TXT,
                STATUS_JSON,
                LOCK,
            ] {
                let _ = fs::remove_file(path.join(name));
            }
            for name in [TB_DIR, CHECKPOINTS_DIR] {
                let _ = fs::remove_dir(path.join(name));
            }
            remove_empty(&made);
        })
    }

    fn fill(path: &Path, files: &RunFiles<'_>, lock: File) -> Result<RunDir, RecordError> {
        for name in [TB_DIR, CHECKPOINTS_DIR] {
            let dir = path.join(name);
            fs::create_dir_all(&dir).map_err(|e| RecordError::from_io("create", &dir, e))?;
        }
        write_atomic(&path.join(RUN_RON), files.run_ron.as_bytes())?;
        write_atomic(&path.join(RESOLVED_RON), files.resolved_ron.as_bytes())?;
        write_json(&path.join(ENV_JSON), &files.env)?;
        if let Some(graph) = files.graph {
            write_atomic(&path.join(GRAPH_TXT), graph.as_bytes())?;
        }
        let now = unix_now();
        let status = RunStatus {
            state: RunState::Running,
            step: 0,
            group: files.group.to_owned(),
            seed: files.seed,
            started_secs: now,
            updated_secs: now,
            message: None,
        };
        // Last, so that a folder with a status is complete.
        write_json(&path.join(STATUS_JSON), &status)?;
        sync_dir(&parent(path))?;
        Ok(RunDir {
            path: path.to_path_buf(),
            status,
            _lock: lock,
        })
    }

    /// Opens the folder of a run that is to go on.
    ///
    /// # Errors
    /// [`RecordError::Locked`] where another process still records there, [`RecordError::NoRun`] where nothing is,
    /// [`RecordError::Damaged`] where its status cannot be read.
    pub fn resume(path: &Path) -> Result<RunDir, RecordError> {
        for missing in [RESOLVED_RON, STATUS_JSON] {
            if !path.join(missing).is_file() {
                return Err(RecordError::NoRun {
                    path: path.to_path_buf(),
                    missing,
                });
            }
        }
        let lock = lock(path)?;
        let status = read_json(&path.join(STATUS_JSON))?.ok_or_else(|| RecordError::NoRun {
            path: path.to_path_buf(),
            missing: STATUS_JSON,
        })?;
        Ok(RunDir {
            path: path.to_path_buf(),
            status,
            _lock: lock,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where event files go.
    pub fn tb_dir(&self) -> PathBuf {
        self.path.join(TB_DIR)
    }

    /// Where checkpoints go.
    pub fn checkpoints_dir(&self) -> PathBuf {
        self.path.join(CHECKPOINTS_DIR)
    }

    /// Where the curves go.
    pub fn metrics_path(&self) -> PathBuf {
        self.path.join(METRICS_JSONL)
    }

    /// The text of `resolved.ron`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn resolved_ron(&self) -> Result<String, RecordError> {
        let path = self.path.join(RESOLVED_RON);
        fs::read_to_string(&path).map_err(|e| RecordError::from_io("read", &path, e))
    }

    /// The status last written or found.
    pub fn status(&self) -> &RunStatus {
        &self.status
    }

    /// Rewrites `status.json`.
    ///
    /// # Errors
    /// The file cannot be written; the old status stays.
    pub fn set_status(
        &mut self,
        state: RunState,
        step: u64,
        message: Option<String>,
    ) -> Result<(), RecordError> {
        let status = RunStatus {
            state,
            step,
            message,
            updated_secs: unix_now(),
            ..self.status.clone()
        };
        write_json(&self.path.join(STATUS_JSON), &status)?;
        self.status = status;
        Ok(())
    }

    /// Rewrites `summary.json`.
    ///
    /// # Errors
    /// The file cannot be written; the old summary stays.
    pub fn set_summary(&self, summary: &RunSummary) -> Result<(), RecordError> {
        write_json(&self.path.join(SUMMARY_JSON), summary)
    }
}

/// What `env.json` usually says; `extra` entries are added to it.
pub fn environment(extra: impl IntoIterator<Item = (String, Value)>) -> Value {
    let mut env = json!({
        "marimba": env!("CARGO_PKG_VERSION"),
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "cores": std::thread::available_parallelism().map(usize::from).unwrap_or(1),
        "host": host_name(),
        "args": std::env::args().collect::<Vec<_>>(),
        "started_secs": unix_now(),
    });
    if let Value::Object(map) = &mut env {
        map.extend(extra);
    }
    env
}

/// Creates `path` and its missing ancestors; gives those made, outermost first. On failure none is left.
fn create_dirs(path: &Path) -> Result<Vec<PathBuf>, RecordError> {
    let missing: Vec<&Path> = path
        .ancestors()
        .take_while(|p| !p.as_os_str().is_empty() && !p.exists())
        .collect();
    let mut made: Vec<PathBuf> = Vec::new();
    for dir in missing.into_iter().rev() {
        match fs::create_dir(dir) {
            Ok(()) => made.push(dir.to_path_buf()),
            // Another run of the same sweep was faster with the common parent.
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && dir.is_dir() => {}
            Err(e) => {
                remove_empty(&made);
                return Err(RecordError::from_io("create", dir, e));
            }
        }
    }
    if !path.is_dir() {
        let e = std::io::Error::new(std::io::ErrorKind::NotADirectory, "it is a file");
        return Err(RecordError::from_io("create", path, e));
    }
    Ok(made)
}

/// Removes folders made here, innermost first, as far as nothing lies in them.
fn remove_empty(made: &[PathBuf]) {
    made.iter().rev().for_each(|dir| {
        let _ = fs::remove_dir(dir);
    });
}

/// Fails where `path` holds a run. The status of a run is written last among its first files: without it and without
/// curves this is a creation that died halfway, and no run.
fn refuse_occupied(path: &Path) -> Result<(), RecordError> {
    let old: Option<RunStatus> = read_json(&path.join(STATUS_JSON))?;
    let state = match old {
        Some(old) => old.state.to_string(),
        None if path.join(METRICS_JSONL).exists() || path.join(SUMMARY_JSON).exists() => {
            "without a status".to_owned()
        }
        None => return Ok(()),
    };
    Err(RecordError::Occupied {
        path: path.to_path_buf(),
        state,
    })
}

fn lock(dir: &Path) -> Result<File, RecordError> {
    let path = dir.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|e| RecordError::from_io("create", &path, e))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // What the holder wrote is a courtesy; that the lock is held is certain.
            let _ = file.take(200).read_to_string(&mut holder);
            let holder = if holder.trim().is_empty() {
                "unknown".to_owned()
            } else {
                holder.trim().to_owned()
            };
            return Err(RecordError::Locked {
                path: dir.to_path_buf(),
                holder,
            });
        }
        Err(TryLockError::Error(e)) => return Err(RecordError::from_io("lock", &path, e)),
    }
    let named = file
        .set_len(0)
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .and_then(|_| write!(file, "{} on {}", std::process::id(), host_name()))
        .and_then(|()| file.flush());
    if let Err(e) = named {
        // On a full disk not even the lock's file stays behind.
        let _ = fs::remove_file(&path);
        return Err(RecordError::from_io("write", &path, e));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> RunFiles<'static> {
        RunFiles {
            run_ron: "Run()",
            resolved_ron: "Run(seed: 1)",
            env: environment([("backend".to_owned(), json!("cpu"))]),
            graph: Some("graph"),
            group: "g",
            seed: 1,
        }
    }

    #[test]
    fn creates_the_whole_folder() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("runs/größe");
        let mut dir = RunDir::create(&path, &files()).unwrap();
        dir.set_status(RunState::Failed, 7, Some("loss is nan".into()))
            .unwrap();
        let mut names: Vec<_> = fs::read_dir(&path)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            [
                ".lock",
                "checkpoints",
                "env.json",
                "graph.txt",
                "resolved.ron",
                "run.ron",
                "status.json",
                "tb"
            ]
        );
        drop(dir);
        let again = RunDir::resume(&path).unwrap();
        assert_eq!(
            (again.status().state, again.status().step),
            (RunState::Failed, 7)
        );
        assert_eq!(
            (again.status().group.as_str(), again.status().seed),
            ("g", 1)
        );
        assert_eq!(again.resolved_ron().unwrap(), "Run(seed: 1)");
    }

    #[test]
    fn two_runs_in_one_folder_are_refused_and_a_dead_ones_lock_is_not() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("a");
        let dir = RunDir::create(&path, &files()).unwrap();
        for result in [RunDir::create(&path, &files()), RunDir::resume(&path)] {
            let message = result.unwrap_err().to_string();
            assert!(
                message.contains(&format!("process {}", std::process::id())),
                "{message}"
            );
        }
        assert!(
            path.join(STATUS_JSON).exists(),
            "the refused run removed the other's files"
        );
        drop(dir);
        assert!(path.join(LOCK).exists());
        assert!(matches!(
            RunDir::create(&path, &files()),
            Err(RecordError::Occupied { .. })
        ));
        assert!(RunDir::resume(&path).is_ok());
        assert!(matches!(
            RunDir::resume(&tmp.path().join("b")),
            Err(RecordError::NoRun { .. })
        ));
    }

    #[test]
    fn what_cannot_be_made_leaves_nothing() {
        let tmp = tempfile::tempdir().unwrap();
        // `env.json` is a folder: the third file cannot be written.
        let path = tmp.path().join("x");
        fs::create_dir_all(path.join("env.json/full")).unwrap();
        assert!(RunDir::create(&path, &files()).is_err());
        let left: Vec<_> = fs::read_dir(&path)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["env.json"]);
        // A file stands where a folder should be.
        fs::write(tmp.path().join("file"), "").unwrap();
        assert!(RunDir::create(&tmp.path().join("file"), &files()).is_err());
        assert!(RunDir::create(&tmp.path().join("file/y/z"), &files()).is_err());
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 2);
        let message = RunDir::create(Path::new("/proc/marimba/x"), &files())
            .unwrap_err()
            .to_string();
        assert!(message.starts_with("cannot "), "{message}");
    }

    #[test]
    fn a_creation_that_died_halfway_is_taken_over() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("a");
        drop(RunDir::create(&path, &files()).unwrap());
        fs::remove_file(path.join(STATUS_JSON)).unwrap();
        drop(RunDir::create(&path, &files()).unwrap());
        fs::remove_file(path.join(STATUS_JSON)).unwrap();
        fs::write(path.join(METRICS_JSONL), "").unwrap();
        assert!(matches!(
            RunDir::create(&path, &files()),
            Err(RecordError::Occupied { .. })
        ));
        fs::write(path.join(STATUS_JSON), "{").unwrap();
        assert!(matches!(
            RunDir::create(&path, &files()),
            Err(RecordError::Damaged { .. })
        ));
        assert!(path.join(METRICS_JSONL).exists() && path.join(RESOLVED_RON).exists());
    }
}
