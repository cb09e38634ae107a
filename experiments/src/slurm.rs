//! Sweeps on a Slurm cluster: one array job, a task a member, all writing into one shared folder.
//!
//! A task runs the same command for its one member. Its folder is locked while it runs, and a member that is done is not run again, so
//! a job may be submitted again, requeued, or run beside a local sweep of the same folder.

use crate::record::RecordError;
use crate::record::files::write_atomic;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Folder of scripts and logs below that of the sweep.
pub const SLURM_DIR: &str = "slurm";

/// An array job.
#[derive(Clone, Debug, PartialEq)]
pub struct ArrayJob<'a> {
    /// Name of the sweep.
    pub name: &'a str,
    /// Members to run, by index.
    pub members: &'a [usize],
    /// Tasks that run at the same time; `None` leaves it to Slurm.
    pub at_once: Option<usize>,
    /// CPUs of a task.
    pub threads: usize,
    /// The command and its arguments; the member's index is added.
    pub command: &'a [String],
    /// Further options of sbatch, such as `--partition=cpu`.
    pub options: &'a [String],
    /// Folder of the sweep, absolute, and seen by all nodes.
    pub out: &'a Path,
    /// Folder that the tasks run in.
    pub cwd: &'a Path,
}

/// Why nothing was submitted.
#[derive(Debug, thiserror::Error)]
pub enum SlurmError {
    /// The script cannot be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// There is no Slurm.
    #[error(
        "sbatch cannot be run ({source}); the job is written: submit {script} where Slurm is, or leave --launcher out to run here"
    )]
    NoSbatch {
        /// The script.
        script: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Slurm did not take it, or, when waited for, a task failed.
    #[error("sbatch failed on {script}: {message}")]
    Refused {
        /// The script.
        script: PathBuf,
        /// Its words.
        message: String,
    },
}

impl ArrayJob<'_> {
    /// The batch script.
    pub fn script(&self) -> String {
        let limit = self.at_once.map(|n| format!("%{n}")).unwrap_or_default();
        let last = self.members.len().saturating_sub(1);
        let log = self.out.join(SLURM_DIR).join("%A_%a.log");
        let mut text = String::from("#!/bin/bash\n");
        let mut option = |o: &str| {
            let _ = writeln!(text, "#SBATCH {o}");
        };
        option(&format!(
            "--job-name={}",
            quote(&format!("marimba-{}", self.name))
        ));
        option(&format!("--array=0-{last}{limit}"));
        option(&format!("--cpus-per-task={}", self.threads));
        option(&format!("--output={}", quote(&log.display().to_string())));
        option(&format!(
            "--chdir={}",
            quote(&self.cwd.display().to_string())
        ));
        option("--open-mode=append");
        self.options.iter().for_each(|o| option(o));
        let members: Vec<String> = self.members.iter().map(usize::to_string).collect();
        let command: Vec<String> = self.command.iter().map(|w| quote(w)).collect();
        let _ = write!(
            text,
            "\nmembers=({})\nexec {} --member \"${{members[$SLURM_ARRAY_TASK_ID]}}\"\n",
            members.join(" "),
            command.join(" ")
        );
        text
    }

    /// Writes the script and gives its path.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self) -> Result<PathBuf, RecordError> {
        let dir = self.out.join(SLURM_DIR);
        std::fs::create_dir_all(&dir).map_err(|e| RecordError::from_io("create", &dir, e))?;
        let path = dir.join("array.sh");
        write_atomic(&path, self.script().as_bytes())?;
        Ok(path)
    }

    /// Writes and submits the job, and gives its number. With `wait`, returns when all tasks have ended.
    ///
    /// # Errors
    /// [`SlurmError`]; with `wait` also when a task failed.
    pub fn submit(&self, wait: bool) -> Result<String, SlurmError> {
        let script = self.write()?;
        let mut sbatch = Command::new("sbatch");
        sbatch.arg("--parsable");
        if wait {
            sbatch.arg("--wait");
        }
        let out = sbatch
            .arg(&script)
            .stdin(Stdio::null())
            .output()
            .map_err(|source| SlurmError::NoSbatch {
                script: script.clone(),
                source,
            })?;
        let id = String::from_utf8_lossy(&out.stdout).trim().to_owned();
        if out.status.success() {
            return Ok(id);
        }
        let said = String::from_utf8_lossy(&out.stderr).trim().to_owned();
        let message = match (id.is_empty(), said.is_empty()) {
            (true, true) => out.status.to_string(),
            (true, false) => said,
            (false, _) => format!(
                "tasks of job {id} failed; their logs are in {}",
                self.out.join(SLURM_DIR).display()
            ),
        };
        Err(SlurmError::Refused { script, message })
    }
}

/// A word as bash and sbatch read it.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=,:+%@".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_runs_each_member_once() {
        let command = ["/bin/marimba", "sweep", "a b.ron", "--out", "/s"].map(str::to_owned);
        let job = ArrayJob {
            name: "q",
            members: &[0, 3, 7],
            at_once: Some(2),
            threads: 4,
            command: &command,
            options: &["--partition=cpu".to_owned()],
            out: Path::new("/s"),
            cwd: Path::new("/home/it's"),
        };
        let text = job.script();
        for line in [
            "#!/bin/bash",
            "#SBATCH --job-name=marimba-q",
            "#SBATCH --array=0-2%2",
            "#SBATCH --cpus-per-task=4",
            "#SBATCH --output=/s/slurm/%A_%a.log",
            "#SBATCH --chdir='/home/it'\\''s'",
            "#SBATCH --partition=cpu",
            "members=(0 3 7)",
            "exec /bin/marimba sweep 'a b.ron' --out /s --member \"${members[$SLURM_ARRAY_TASK_ID]}\"",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
