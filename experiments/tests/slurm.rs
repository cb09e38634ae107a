//! A sweep on a real Slurm: the test starts one on this machine (Debian: `apt install slurm-wlm munge`), as root, in a temporary
//! folder. Where that is not possible it says so and passes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// munged, slurmctld and slurmd of one machine; they end with it.
struct Cluster {
    dir: PathBuf,
    daemons: Vec<Child>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for daemon in self.daemons.iter_mut().rev() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(more)
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
}

fn text_of(command: &mut Command) -> Option<String> {
    let out = command.stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    out.status.success().then_some(text)
}

impl Cluster {
    /// Starts a cluster, or says why not.
    fn start(dir: &Path) -> Result<Cluster, String> {
        let need = |name: &str| program(name).ok_or(format!("{name} is not installed"));
        let (munged, slurmctld, slurmd) = (need("munged")?, need("slurmctld")?, need("slurmd")?);
        need("sbatch")?;
        if text_of(Command::new("id").arg("-u")).as_deref() != Some("0") {
            return Err("slurmd needs root".into());
        }
        let host = text_of(&mut Command::new("hostname")).ok_or("no host name")?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // Ports that the system has just given are free.
        let port = || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0");
            listener.and_then(|l| l.local_addr()).map(|a| a.port())
        };
        let (a, b) = (
            port().map_err(|e| e.to_string())?,
            port().map_err(|e| e.to_string())?,
        );
        for sub in ["state", "spool"] {
            fs::create_dir(dir.join(sub)).unwrap();
        }
        let mut key = vec![0u8; 1024];
        std::io::Read::read_exact(&mut fs::File::open("/dev/urandom").unwrap(), &mut key).unwrap();
        fs::write(dir.join("munge.key"), key).unwrap();
        Command::new("chmod")
            .arg("600")
            .arg(dir.join("munge.key"))
            .status()
            .unwrap();
        Command::new("chmod").arg("755").arg(dir).status().unwrap();
        let at = dir.display();
        fs::write(
            dir.join("slurm.conf"),
            format!(
                "ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={a}\nSlurmdPort={b}\n\
                 AuthType=auth/munge\nAuthInfo=socket={at}/munge.socket\nSlurmUser=root\nSlurmdUser=root\n\
                 StateSaveLocation={at}/state\nSlurmdSpoolDir={at}/spool\n\
                 SlurmctldPidFile={at}/slurmctld.pid\nSlurmdPidFile={at}/slurmd.pid\n\
                 SlurmctldLogFile={at}/slurmctld.log\nSlurmdLogFile={at}/slurmd.log\n\
                 ProctrackType=proctrack/pgid\nTaskPlugin=task/none\nSelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\n\
                 SchedulerParameters=sched_interval=1,bf_interval=1\nMpiDefault=none\nReturnToService=2\n\
                 NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN\n\
                 PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
            ),
        )
        .unwrap();
        let mut cluster = Cluster {
            dir: dir.to_path_buf(),
            daemons: Vec::new(),
        };
        cluster.daemon(
            Command::new(munged)
                .args(["--force", "--foreground"])
                .arg(format!("--socket={at}/munge.socket"))
                .arg(format!("--key-file={at}/munge.key"))
                .arg(format!("--pid-file={at}/munged.pid"))
                .arg(format!("--log-file={at}/munged.log"))
                .arg(format!("--seed-file={at}/munged.seed")),
        );
        cluster.daemon(Command::new(slurmctld).args(["-D", "-i"]));
        cluster.daemon(Command::new(slurmd).arg("-D"));
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            let state = text_of(cluster.command("sinfo").args(["-h", "-o", "%t"]));
            if state.as_deref() == Some("idle") {
                return Ok(cluster);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        let log = fs::read_to_string(dir.join("slurmctld.log")).unwrap_or_default();
        let last = log.lines().last().unwrap_or("no log").to_owned();
        Err(format!("the cluster did not come up: {last}"))
    }

    fn daemon(&mut self, command: &mut Command) {
        let child = command
            .env("SLURM_CONF", self.dir.join("slurm.conf"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.daemons.push(child);
    }

    fn command(&self, name: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(name);
        command
            .env("SLURM_CONF", self.dir.join("slurm.conf"))
            .stdin(Stdio::null());
        command
    }

    fn marimba(&self, args: &[&str]) -> Output {
        let binary = env!("CARGO_BIN_EXE_marimba");
        self.command(binary).args(args).output().unwrap()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn an_array_job_runs_every_member_and_the_folder_merges() {
    let tmp = tempfile::tempdir().unwrap();
    let cluster = match Cluster::start(tmp.path()) {
        Ok(cluster) => cluster,
        Err(why) => {
            println!("skipped: {why}");
            return;
        }
    };
    let file = tmp.path().join("a sweep.ron");
    fs::write(
        &file,
        r#"(
    name: "s",
    base: (
        model: (name: "m", vocab_size: 32, d_model: 16, n_layers: 1, mixers: {"attn": Attention(n_heads: 2)}, ffns: {"mlp": Glu(d_ff: 32)}),
        data: Mqar(vocab_size: 32, n_pairs: 2, random_non_queries: false), seq_len: 8, batch: 4, steps: 20, eval: (rows: 16),
    ),
    axes: [(path: "optimizer.lr", values: [1e-3, 3e-3])], seeds: [0, 1],
)"#,
    )
    .unwrap();
    let (file, out) = (file.to_str().unwrap(), tmp.path().join("out"));
    let sweep = ["sweep", file, "--out", out.to_str().unwrap()];
    // One member is there already, as if run elsewhere on the shared folder.
    let one = cluster.marimba(&[&sweep[..], &["--member", "2"]].concat());
    assert!(one.status.success(), "{}", said(&one));
    let before = fs::metadata(out.join("lr=3e-3-seed=0/summary.json")).unwrap();

    let slurm = [
        &sweep[..],
        &[
            "--launcher",
            "slurm",
            "--wait",
            "--json",
            "--slurm-option=--time=10",
        ],
    ]
    .concat();
    let done = cluster.marimba(&slurm);
    assert!(done.status.success(), "{}", said(&done));
    assert!(
        said(&done).contains("waiting for 3 tasks"),
        "{}",
        said(&done)
    );
    let comparison: Value = serde_json::from_slice(&done.stdout).unwrap();
    let members = comparison["members"].as_array().unwrap();
    assert_eq!(members.len(), 4);
    assert!(
        members.iter().all(|m| m["state"] == "finished"),
        "{members:?}"
    );
    let script = fs::read_to_string(out.join("slurm/array.sh")).unwrap();
    assert!(
        script.contains("members=(0 1 3)") && script.contains("#SBATCH --time=10"),
        "{script}"
    );
    let after = fs::metadata(out.join("lr=3e-3-seed=0/summary.json")).unwrap();
    assert_eq!(before.modified().unwrap(), after.modified().unwrap());

    // Nothing is left to submit.
    let again = cluster.marimba(&slurm);
    assert!(
        again.status.success() && said(&again).contains("all members are done"),
        "{}",
        said(&again)
    );

    // A task that fails is told, with where its log lies.
    let broken = tmp.path().join("broken");
    let text = fs::read_to_string(file)
        .unwrap()
        .replace("vocab_size: 32, d_model", "vocab_size: 8, d_model");
    let other = tmp.path().join("broken.ron");
    fs::write(
        &other,
        text.replace(
            "data: Mqar(vocab_size: 32,",
            "data: Text(path: \"absent.txt\"), //",
        ),
    )
    .unwrap();
    let failed = cluster.marimba(&[
        "sweep",
        other.to_str().unwrap(),
        "--out",
        broken.to_str().unwrap(),
        "--launcher",
        "slurm",
        "--wait",
    ]);
    assert!(!failed.status.success());
    assert!(
        said(&failed).contains("logs are in") || said(&failed).contains("absent.txt"),
        "{}",
        said(&failed)
    );
}

#[test]
fn without_slurm_the_job_is_written_and_the_error_says_what_to_do() {
    let tmp = tempfile::tempdir().unwrap();
    let file = tmp.path().join("s.ron");
    fs::write(
        &file,
        r#"(name: "s", base: (model: (name: "m", vocab_size: 32, d_model: 16, n_layers: 1, mixers: {"attn": Attention(n_heads: 2)}),
            data: Mqar(vocab_size: 32, n_pairs: 2), seq_len: 8, steps: 2))"#,
    )
    .unwrap();
    let out = tmp.path().join("out");
    let output = Command::new(env!("CARGO_BIN_EXE_marimba"))
        .args([
            "sweep",
            file.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
            "--launcher",
            "slurm",
        ])
        .env("PATH", tmp.path())
        .output()
        .unwrap();
    let words = said(&output);
    assert!(
        !output.status.success() && words.contains("sbatch cannot be run"),
        "{words}"
    );
    assert!(out.join("slurm/array.sh").is_file());
}
