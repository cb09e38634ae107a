//! `results.db` in the folder of a sweep: all runs below it in SQLite, for reports and for questions in SQL.
//!
//! The runs' own files stay the truth. Whoever opens the database first brings it up to date with them: a run whose files have changed
//! is read anew, one that has vanished is forgotten, and a database that was deleted is made again. Members that other machines wrote
//! into a shared folder come in the same way; those machines never touch the database.
//!
//! | table | columns |
//! |---|---|
//! | runs | id, path (below the folder), name, grp, seed, state, message, config_hash, stamp, summary (JSON), warnings (JSON) |
//! | facts | run, name, value: params_total, params_active, flops_per_token, state_bytes_per_seq, kv_bytes_per_token, decode_bytes, tokens_per_sec |
//! | axes | run, name, value: the point of the sweep |
//! | finals | run, tag, last, best |
//! | metrics | run, tag, step, time, value: curves, thinned to a few thousand points each; NaN is NULL |

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use rusqlite::{Connection, ErrorCode, OptionalExtension, Transaction, params};

use super::load::{RunData, load_run};
use crate::record::run_dir::{
    GRAPH_TXT, METRICS_JSONL, RESOLVED_RON, STATUS_JSON, SUMMARY_JSON, TB_DIR,
};
use crate::record::series::SeriesMap;
use crate::record::summary::RunState;
use crate::record::{Point, RunSummary};

/// Name of the file.
pub const RESULTS_DB: &str = "results.db";
/// Layout of the tables. Another one is refused: the file can be deleted and is made again.
const VERSION: i32 = 1;
/// Marks the file as ours ("MRMB").
const APPLICATION: i32 = 0x4D52_4D42;
/// Time to wait for another process that is bringing it up to date.
const PATIENCE: Duration = Duration::from_secs(20);

const TABLES: &str = "
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, name TEXT NOT NULL, grp TEXT NOT NULL, seed INTEGER, state TEXT, message TEXT,
    config_hash TEXT, stamp TEXT NOT NULL, summary TEXT, warnings TEXT NOT NULL);
CREATE TABLE facts (run INTEGER NOT NULL, name TEXT NOT NULL, value REAL, PRIMARY KEY (run, name)) WITHOUT ROWID;
CREATE TABLE axes (run INTEGER NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (run, name)) WITHOUT ROWID;
CREATE TABLE finals (run INTEGER NOT NULL, tag TEXT NOT NULL, last REAL, best REAL, PRIMARY KEY (run, tag)) WITHOUT ROWID;
CREATE TABLE tags (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE curves (run INTEGER NOT NULL, tag INTEGER NOT NULL, step INTEGER NOT NULL, time REAL, value REAL,
    PRIMARY KEY (run, tag, step)) WITHOUT ROWID;
CREATE VIEW metrics AS SELECT run, tags.name AS tag, step, time, value FROM curves JOIN tags ON tags.id = curves.tag;
";

/// Why the database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// Another layout.
    #[error(
        "{path} was made by another version of marimba (layout {found}, this one reads layout {VERSION}); delete it, it is made again from the runs"
    )]
    OtherVersion {
        /// The file.
        path: PathBuf,
        /// Its layout.
        found: i32,
    },
    /// Not ours, or damaged.
    #[error(
        "{path} is no results database of marimba ({what}); move it away, and it is made again from the runs"
    )]
    NotOurs {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Anything else that SQLite says.
    #[error("{path}: {source}")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// Its words.
        source: rusqlite::Error,
    },
}

/// The database of a folder.
pub struct Database {
    path: PathBuf,
    connection: Connection,
}

impl Database {
    /// Opens the database of a folder, making it where missing. `None` where the folder cannot be written.
    ///
    /// # Errors
    /// [`DatabaseError`]: it is of another version, not ours, or damaged.
    pub fn open(dir: &Path) -> Result<Option<Database>, DatabaseError> {
        let path = dir.join(RESULTS_DB);
        match Self::connect(&path) {
            Ok(found) => Ok(Some(found)),
            Err(DatabaseError::Sqlite { source, .. })
                if matches!(
                    source.sqlite_error_code(),
                    Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied)
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    fn connect(path: &Path) -> Result<Database, DatabaseError> {
        let at = |source: rusqlite::Error| match source.sqlite_error_code() {
            Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => DatabaseError::NotOurs {
                path: path.to_path_buf(),
                what: source.to_string(),
            },
            _ => DatabaseError::Sqlite {
                path: path.to_path_buf(),
                source,
            },
        };
        let mut connection = Connection::open(path).map_err(at)?;
        connection.busy_timeout(PATIENCE).map_err(at)?;
        let tx = connection
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
            .map_err(at)?;
        let pragma = |name: &str| tx.pragma_query_value(None, name, |r| r.get::<_, i32>(0));
        let (application, version) = (
            pragma("application_id").map_err(at)?,
            pragma("user_version").map_err(at)?,
        );
        let tables: i64 = tx
            .query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get(0))
            .map_err(at)?;
        match (application, version, tables) {
            (0, 0, 0) => {
                tx.execute_batch(TABLES).map_err(at)?;
                tx.pragma_update(None, "application_id", APPLICATION)
                    .map_err(at)?;
                tx.pragma_update(None, "user_version", VERSION)
                    .map_err(at)?;
            }
            (APPLICATION, VERSION, _) => {}
            (APPLICATION, found, _) => {
                return Err(DatabaseError::OtherVersion {
                    path: path.to_path_buf(),
                    found,
                });
            }
            _ => {
                return Err(DatabaseError::NotOurs {
                    path: path.to_path_buf(),
                    what: "it belongs to another program".to_owned(),
                });
            }
        }
        tx.commit().map_err(at)?;
        Ok(Database {
            path: path.to_path_buf(),
            connection,
        })
    }

    /// Brings the database up to date with the runs in these folders (all below `root`), and gives the runs.
    ///
    /// # Errors
    /// What SQLite says; the database is then as before.
    pub fn sync(
        &mut self,
        root: &Path,
        found: &[(PathBuf, String)],
    ) -> Result<Vec<RunData>, DatabaseError> {
        let path = self.path.clone();
        let runs = self.update(root, found);
        runs.map_err(|source| DatabaseError::Sqlite { path, source })
    }

    fn update(
        &mut self,
        root: &Path,
        found: &[(PathBuf, String)],
    ) -> rusqlite::Result<Vec<RunData>> {
        let tx = self
            .connection
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let mut kept = Vec::new();
        let mut runs = Vec::new();
        for (dir, name) in found {
            let below = dir.strip_prefix(root).unwrap_or(dir);
            let key = below.to_string_lossy().into_owned();
            let now = stamp(dir);
            let stored: Option<(i64, String)> = tx
                .query_row("SELECT id, stamp FROM runs WHERE path = ?1", [&key], |r| {
                    Ok((r.get(0)?, r.get(1)?))
                })
                .optional()?;
            let (id, run) = match stored {
                Some((id, stamp)) if stamp == now => (id, read(&tx, id, dir)?),
                old => {
                    if let Some((id, _)) = old {
                        forget(&tx, id)?;
                    }
                    let run = load_run(dir, name.clone());
                    (write(&tx, &key, &now, &run)?, run)
                }
            };
            kept.push(id);
            runs.push(run);
        }
        let all: Vec<i64> = tx
            .prepare("SELECT id FROM runs")?
            .query_map([], |r| r.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        for id in all.into_iter().filter(|id| !kept.contains(id)) {
            forget(&tx, id)?;
        }
        tx.commit()?;
        Ok(runs)
    }
}

/// Sizes and times of the files that a run is read from.
fn stamp(dir: &Path) -> String {
    let mut files: Vec<PathBuf> = [
        METRICS_JSONL,
        SUMMARY_JSON,
        STATUS_JSON,
        RESOLVED_RON,
        GRAPH_TXT,
    ]
    .iter()
    .map(|f| dir.join(f))
    .collect();
    if !dir.join(METRICS_JSONL).is_file() {
        for below in [dir.to_path_buf(), dir.join(TB_DIR)] {
            let entries = fs::read_dir(below).into_iter().flatten().flatten();
            let mut events: Vec<PathBuf> = entries
                .map(|e| e.path())
                .filter(|p| crate::record::read::is_event_file(p))
                .collect();
            events.sort();
            files.extend(events);
        }
    }
    let one = |path: &PathBuf| match fs::metadata(path) {
        Ok(m) => {
            let time = m.modified().ok();
            let time = time.and_then(|t| t.duration_since(UNIX_EPOCH).ok());
            format!("{}@{}", m.len(), time.map_or(0, |t| t.as_nanos()))
        }
        Err(_) => "-".to_owned(),
    };
    files.iter().map(one).collect::<Vec<_>>().join(" ")
}

fn forget(tx: &Transaction, id: i64) -> rusqlite::Result<()> {
    for table in ["facts", "axes", "finals", "curves"] {
        tx.execute(&format!("DELETE FROM {table} WHERE run = ?1"), [id])?;
    }
    tx.execute("DELETE FROM runs WHERE id = ?1", [id])?;
    Ok(())
}

fn write(tx: &Transaction, key: &str, stamp: &str, run: &RunData) -> rusqlite::Result<i64> {
    tx.prepare(
        "INSERT INTO runs (path, name, grp, seed, state, message, config_hash, stamp, summary, warnings)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
    )?
    .execute(params![
        key,
        run.name,
        run.group,
        // SQLite's integers are signed; the bits come back as they were.
        run.seed.map(|s| s as i64),
        run.state.map(|s| s.to_string()),
        run.message,
        run.summary.as_ref().map(|s| s.config_hash.as_str()),
        stamp,
        run.summary.as_ref().map(json),
        json(&run.warnings),
    ])?;
    let id = tx.last_insert_rowid();
    if let Some(s) = &run.summary {
        let mut fact = tx.prepare("INSERT INTO facts VALUES (?1, ?2, ?3)")?;
        for (name, value) in [
            ("params_total", s.params_total as f64),
            ("params_active", s.params_active as f64),
            ("flops_per_token", s.flops_per_token),
            ("state_bytes_per_seq", s.state_bytes_per_seq as f64),
            ("kv_bytes_per_token", s.kv_bytes_per_token as f64),
            ("decode_bytes", s.decode_bytes() as f64),
            ("tokens_per_sec", s.tokens_per_sec),
        ] {
            fact.execute(params![id, name, value])?;
        }
        let mut axis = tx.prepare("INSERT INTO axes VALUES (?1, ?2, ?3)")?;
        for (name, value) in &s.axes {
            axis.execute(params![id, name, value])?;
        }
    }
    let mut row = tx.prepare("INSERT INTO finals VALUES (?1, ?2, ?3, ?4)")?;
    for (tag, last) in run.finals() {
        let best = run.summary.as_ref();
        let best = best.and_then(|s| s.best_metrics.get(&tag).copied());
        row.execute(params![id, tag, number(last), best.and_then(number)])?;
    }
    let mut named = tx.prepare("INSERT OR IGNORE INTO tags (name) VALUES (?1)")?;
    let mut number_of = tx.prepare("SELECT id FROM tags WHERE name = ?1")?;
    let mut point = tx.prepare("INSERT INTO curves VALUES (?1, ?2, ?3, ?4, ?5)")?;
    for (tag, series) in &run.series {
        named.execute([tag])?;
        let tag: i64 = number_of.query_row([tag], |r| r.get(0))?;
        for p in series.points() {
            point.execute(params![id, tag, p.step, p.time, number(p.value)])?;
        }
    }
    Ok(id)
}

/// SQLite has no NaN.
fn number(v: f64) -> Option<f64> {
    (!v.is_nan()).then_some(v)
}

fn read(tx: &Transaction, id: i64, dir: &Path) -> rusqlite::Result<RunData> {
    let mut curves: BTreeMap<String, Vec<Point>> = BTreeMap::new();
    let mut points = tx.prepare(
        "SELECT tags.name, step, time, value FROM curves JOIN tags ON tags.id = curves.tag WHERE run = ?1 ORDER BY curves.tag, step",
    )?;
    let mut rows = points.query([id])?;
    while let Some(r) = rows.next()? {
        let point = Point {
            step: r.get(1)?,
            time: r.get(2)?,
            value: r.get::<_, Option<f64>>(3)?.unwrap_or(f64::NAN),
        };
        let tag: String = r.get(0)?;
        curves.entry(tag).or_default().push(point);
    }
    let series: SeriesMap = curves
        .into_iter()
        .map(|(tag, points)| (tag, points.into_iter().collect()))
        .collect();
    tx.prepare("SELECT name, grp, seed, state, message, summary, warnings FROM runs WHERE id = ?1")?
        .query_row([id], |r| {
            let state: Option<String> = r.get(3)?;
            let summary: Option<String> = r.get(5)?;
            let warnings: String = r.get(6)?;
            let summary = summary.and_then(|s| serde_json::from_str::<RunSummary>(&s).ok());
            Ok(RunData {
                name: r.get(0)?,
                path: dir.to_path_buf(),
                group: r.get(1)?,
                seed: r.get::<_, Option<i64>>(2)?.map(|s| s as u64),
                state: state.and_then(|s| {
                    serde_json::from_value::<RunState>(serde_json::Value::String(s)).ok()
                }),
                message: r.get(4)?,
                axes: summary.as_ref().map(RunSummary::point).unwrap_or_default(),
                summary,
                series,
                resolved: fs::read_to_string(dir.join(RESOLVED_RON)).ok(),
                graph: fs::read_to_string(dir.join(GRAPH_TXT)).ok(),
                warnings: serde_json::from_str(&warnings).unwrap_or_default(),
            })
        })
}

/// A value as JSON text; maps with text keys, numbers and texts can all be written.
fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::summary::write_json;
    use crate::report::load::load;
    use crate::report::{Options, compare};

    /// Two runs in run folders, and the mark of a sweep.
    fn sweep(root: &Path) {
        fs::create_dir_all(root).unwrap();
        fs::write(
            root.join("sweep.json"),
            r#"{"name": "s", "metric": "eval/accuracy", "goal": "higher"}"#,
        )
        .unwrap();
        for seed in 0..2u64 {
            let dir = root.join(format!("a-seed={seed}"));
            fs::create_dir_all(&dir).unwrap();
            let rows: String = (1..=5)
                .map(|s| format!("{{\"step\":{s},\"time\":0.5,\"eval/accuracy\":0.{s}{seed},\"x\":\"nan\"}}\n"))
                .collect();
            fs::write(dir.join(METRICS_JSONL), rows).unwrap();
            fs::write(dir.join(RESOLVED_RON), "(seed: 0)").unwrap();
            write_json(&dir.join(SUMMARY_JSON), &summary(seed)).unwrap();
        }
    }

    fn summary(seed: u64) -> RunSummary {
        RunSummary {
            name: format!("a-seed={seed}"),
            group: "a".into(),
            seed: u64::MAX - seed,
            status: RunState::Finished,
            params_total: 10,
            params_active: 5,
            state_bytes_per_seq: 3,
            kv_bytes_per_token: 2,
            seq_len: 4,
            flops_per_token: 1e12,
            tokens_per_sec: 5.5,
            final_metrics: [("eval/accuracy".to_owned(), 0.5)].into(),
            best_metrics: BTreeMap::new(),
            config_hash: "ff".into(),
            graph_hash: String::new(),
            data_hash: String::new(),
            axes: [("optimizer.lr".to_owned(), "1e-3".to_owned())].into(),
        }
    }

    fn compared(runs: &[RunData]) -> String {
        serde_json::to_string(&compare(runs, &Options::default())).unwrap()
    }

    #[test]
    fn says_the_same_as_the_files_and_follows_them() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path().join("s");
        sweep(&root);
        let paths = [root.clone()];
        let first = load(&paths).unwrap();
        assert!(root.join(RESULTS_DB).is_file());
        let again = load(&paths).unwrap();
        assert_eq!(compared(&first), compared(&again));
        for (a, b) in first.iter().zip(&again) {
            assert_eq!((a.seed, &a.resolved), (b.seed, &b.resolved));
            let points = |r: &RunData, tag: &str| -> Vec<(i64, u64)> {
                let s = r.series[tag].points();
                s.map(|p| (p.step, p.value.to_bits())).collect()
            };
            assert_eq!(points(a, "eval/accuracy"), points(b, "eval/accuracy"));
            assert!(b.series["x"].points().all(|p| p.value.is_nan()));
        }
        // A member arrives, one changes, one goes.
        fs::rename(root.join("a-seed=1"), root.join("b-seed=7")).unwrap();
        let dir = root.join("a-seed=0");
        let changed = RunSummary {
            group: "changed".into(),
            ..summary(0)
        };
        write_json(&dir.join(SUMMARY_JSON), &changed).unwrap();
        let runs = load(&paths).unwrap();
        assert_eq!(
            runs.iter().map(|r| r.group.as_str()).collect::<Vec<_>>(),
            ["changed", "a"]
        );
        let db = Connection::open(root.join(RESULTS_DB)).unwrap();
        let count = |sql: &str| db.query_row(sql, [], |r| r.get::<_, i64>(0)).unwrap();
        assert_eq!(count("SELECT count(*) FROM runs"), 2);
        assert_eq!(
            count("SELECT count(*) FROM metrics WHERE tag = 'eval/accuracy'"),
            10
        );
        assert_eq!(
            count("SELECT count(*) FROM facts WHERE name = 'decode_bytes' AND value = 11"),
            2
        );
        drop(db);
        // Deleted, it is made again.
        fs::remove_file(root.join(RESULTS_DB)).unwrap();
        assert_eq!(compared(&load(&paths).unwrap()), compared(&runs));
    }

    #[test]
    fn what_the_database_knows_is_not_read_again() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path().join("s");
        sweep(&root);
        load(std::slice::from_ref(&root)).unwrap();
        let db = Connection::open(root.join(RESULTS_DB)).unwrap();
        db.execute(
            "UPDATE runs SET grp = 'of the database' WHERE path = 'a-seed=0'",
            [],
        )
        .unwrap();
        drop(db);
        let runs = load(&[root]).unwrap();
        assert_eq!(runs[0].group, "of the database");
    }

    #[test]
    fn other_versions_and_other_files_are_refused_with_words() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path().join("s");
        sweep(&root);
        let paths = [root.clone()];
        load(&paths).unwrap();
        let file = root.join(RESULTS_DB);
        let db = Connection::open(&file).unwrap();
        db.pragma_update(None, "user_version", VERSION + 1).unwrap();
        drop(db);
        let words = load(&paths).unwrap_err().to_string();
        assert!(
            words.contains("layout 2") && words.contains("delete it"),
            "{words}"
        );
        fs::write(
            &file,
            "no database, but text that is long enough to have a header of its own".repeat(40),
        )
        .unwrap();
        let words = load(&paths).unwrap_err().to_string();
        assert!(words.contains("no results database"), "{words}");
        fs::remove_file(&file).unwrap();
        let db = Connection::open(&file).unwrap();
        db.execute_batch("CREATE TABLE mine (x)").unwrap();
        drop(db);
        let words = load(&paths).unwrap_err().to_string();
        assert!(words.contains("another program"), "{words}");
    }
}
