//! The live view gives the terminal back: after Ctrl-C, SIGTERM, a second Ctrl-C, and while it is suspended.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const SWEEP: &str = r#"(
    name: "terminal",
    base: (
        model: (vocab_size: 32, d_model: 16, n_layers: 1, context_len: 16, mixers: { "m": Mamba1(d_state: 4) }),
        data: Mqar(vocab_size: 32, n_pairs: 4), seq_len: 16, steps: 1000000, batch: 2, backend: cpu,
    ),
    seeds: [0],
    metric: "loss",
)"#;
/// The view's own screen, and the one before it.
const ENTER: &str = "\u{1b}[?1049h";
const LEAVE: &str = "\u{1b}[?1049l";
const SHOW_CURSOR: &str = "\u{1b}[?25h";

/// A sweep on a terminal of its own, which `script` makes.
struct Session {
    child: Child,
    keys: ChildStdin,
    said: Arc<Mutex<String>>,
    _dir: tempfile::TempDir,
}

/// Whether util-linux's `script` and `stty` are there.
fn has_tools() -> bool {
    let says = |tool: &str, word: &str| {
        let found = Command::new(tool).arg("--help").output();
        found.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains(word))
    };
    says("script", "--return") && says("stty", "--file")
}

fn children(pid: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let list = list.unwrap_or_default();
    list.split_whitespace()
        .map(|p| p.parse().unwrap())
        .collect()
}

impl Session {
    fn start() -> Session {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("s.ron");
        fs::write(&file, SWEEP).unwrap();
        let command = format!(
            "stty rows 30 cols 100; {} sweep {} --out {} --threads 1; code=$?; stty -a; exit $code",
            env!("CARGO_BIN_EXE_marimba"),
            file.display(),
            dir.path().join("out").display()
        );
        let mut child = Command::new("script")
            .args(["--quiet", "--return", "--flush", "--command", &command])
            .arg("/dev/null")
            .env("TERM", "xterm-256color")
            .env("SHELL", "/bin/sh")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let (heard, mut reader) = (Arc::clone(&said), child.stdout.take().unwrap());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..n]).into_owned();
                heard.lock().unwrap().push_str(&text);
            }
        });
        Session {
            keys: child.stdin.take().unwrap(),
            child,
            said,
            _dir: dir,
        }
    }

    fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// The end of what was said, for a message.
    fn last(&self) -> String {
        let said: Vec<char> = self.said().chars().collect();
        let tail: String = said[said.len().saturating_sub(600)..].iter().collect();
        tail.escape_debug().to_string()
    }

    fn wait_until(&self, what: &str, done: impl Fn() -> bool) {
        let begun = Instant::now();
        while !done() {
            let patience = Duration::from_secs(60);
            assert!(begun.elapsed() < patience, "{what}: {}", self.last());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn key(&mut self, bytes: &[u8]) {
        self.keys.write_all(bytes).unwrap();
        self.keys.flush().unwrap();
    }

    /// The view's process: the only child of the shell that `script` runs.
    fn view(&self) -> u32 {
        let shell = children(self.child.id());
        let all = children(*shell.first().expect("script runs a shell"));
        *all.first().expect("the shell runs the view")
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([format!("-{name}"), self.view().to_string()])
            .status();
        assert!(status.unwrap().success());
    }

    /// The view's terminal.
    fn terminal(&self) -> PathBuf {
        fs::read_link(format!("/proc/{}/fd/2", self.view())).unwrap()
    }

    fn ended(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{}", self.last());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// At the end the shell finds a screen with a cursor, and lines that are edited and echoed.
    fn is_given_back(&self) {
        self.wait_until("what stty says", || self.said().contains("icanon"));
        assert!(self.has_left(), "{}", self.last());
        assert!(edits_lines(&self.said()), "{}", self.last());
    }

    /// Screen and cursor were given back last.
    fn has_left(&self) -> bool {
        let said = self.said();
        let last = |what| said.rfind(what);
        last(LEAVE) > last(ENTER) && last(SHOW_CURSOR) > last(ENTER)
    }

    /// Whether keys go to the program at once and without an echo.
    fn is_raw(&self) -> bool {
        let out = Command::new("stty")
            .arg("-a")
            .arg("--file")
            .arg(self.terminal())
            .output()
            .unwrap();
        !edits_lines(&String::from_utf8_lossy(&out.stdout))
    }
}

/// Whether `stty -a` says that lines are edited and echoed (`-icanon` says that they are not).
fn edits_lines(said: &str) -> bool {
    let on = |word: &str| said.split([' ', ';', '\r', '\n']).any(|w| w == word);
    assert!(on("icanon") == on("echo"), "{said}");
    on("icanon")
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|s| s.is_none()) {
            let shells = children(self.child.id());
            let views: Vec<u32> = shells.iter().flat_map(|&s| children(s)).collect();
            for pid in views.iter().chain(&shells) {
                let _ = Command::new("kill")
                    .args(["-KILL", &pid.to_string()])
                    .status();
            }
            let _ = self.child.wait();
        }
    }
}

/// `None`, said, where there is no such program.
fn running() -> Option<Session> {
    if !has_tools() {
        eprintln!(
            "skipped: no `script` (util-linux) and `stty` (coreutils) to make a terminal with"
        );
        return None;
    }
    let session = Session::start();
    session.wait_until("the view is drawn", || {
        session.said().contains("base-seed=0") && session.said().contains(ENTER)
    });
    assert!(session.is_raw());
    Some(session)
}

#[test]
fn the_terminal_is_given_back_at_the_end() {
    let Some(mut session) = running() else { return };
    session.key(b"q");
    assert_eq!(session.ended().code(), Some(130), "{}", session.last());
    session.is_given_back();
    assert!(session.said().contains("--resume"), "{}", session.last());
}

#[test]
fn sigterm_gives_it_back() {
    let Some(mut session) = running() else { return };
    session.signal("TERM");
    assert_eq!(session.ended().code(), Some(130), "{}", session.last());
    session.is_given_back();
}

#[test]
fn a_suspended_view_gives_it_back_and_takes_it_again() {
    let Some(mut session) = running() else { return };
    session.key(b"\x1a");
    session.wait_until("the view leaves", || session.has_left());
    session.wait_until("lines are edited again", || !session.is_raw());
    let entered = |s: &Session| s.said().matches(ENTER).count();
    let before = entered(&session);
    session.signal("CONT");
    session.wait_until("the view is drawn again", || entered(&session) > before);
    session.wait_until("keys are its own again", || session.is_raw());
    session.key(b"q");
    assert_eq!(session.ended().code(), Some(130), "{}", session.last());
    session.is_given_back();
}
