//! The terminal while the view owns it: entered on a thread of its own, given back whatever happens.
//!
//! The view leaves at the end of the sweep, on a panic of any thread, before a second Ctrl-C ends the process, and while the process is
//! suspended. Only `kill -9` leaves the terminal as it is (`reset` helps). What is said while it is there is told again afterwards.

use super::board::Board;
use super::draw::{Scene, draw};
use super::usage::Usage;
use crate::sweep::{Event, SweepObserver};
use crate::{engine, interrupt};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::event::{self, Event as Input, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use ratatui::crossterm::{cursor, execute};
use std::io::{self, Stderr, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between two pictures; a key is answered at once.
const FRAME: Duration = Duration::from_millis(200);
/// The thread that draws.
const THREAD: &str = "live view";

/// Whether the terminal is ours at the moment.
static ENTERED: AtomicBool = AtomicBool::new(false);

/// The view of a sweep on a terminal.
pub(super) struct Screen {
    board: Arc<Mutex<Board>>,
    opened: Instant,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Screen {
    /// Takes the terminal.
    ///
    /// # Errors
    /// The terminal cannot be taken, and is as it was.
    pub(super) fn open(board: Board) -> io::Result<Screen> {
        enter()?;
        let opened = Instant::now();
        let board = Arc::new(Mutex::new(board));
        let over = Arc::new(AtomicBool::new(false));
        watch_panics(Arc::clone(&board));
        interrupt::before_exit(leave);
        let (shared, done) = (Arc::clone(&board), Arc::clone(&over));
        let thread = std::thread::Builder::new()
            .name(THREAD.to_owned())
            .spawn(move || {
                // A terminal that has gone away ends the view, not the runs.
                let _ = show(&shared, &done, opened);
                leave();
            });
        let thread = thread.inspect_err(|_| leave())?;
        Ok(Screen {
            board,
            opened,
            over,
            thread: Some(thread),
        })
    }
}

impl SweepObserver for Screen {
    fn event(&mut self, member: usize, event: Event<'_>) {
        let now = self.opened.elapsed().as_secs_f64();
        locked(&self.board).take(member, event, now);
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It panicked: the hook has said so.
            let _ = thread.join();
        }
        let mut err = io::stderr().lock();
        for message in locked(&self.board).messages() {
            // The terminal may be gone; the members are not.
            let _ = writeln!(err, "{message}");
        }
    }
}

fn locked(board: &Mutex<Board>) -> MutexGuard<'_, Board> {
    board.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Draws and answers keys until the sweep is over.
fn show(board: &Mutex<Board>, over: &AtomicBool, opened: Instant) -> io::Result<()> {
    let mut terminal = Terminal::new(CrosstermBackend::new(io::stderr()))?;
    let mut usage = Usage::new(engine::cores());
    // https://no-color.org
    let colour = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    while !over.load(Ordering::Relaxed) {
        if !ENTERED.load(Ordering::SeqCst) {
            // Suspended and continued in the background: the terminal is someone else's until `fg`.
            if !foreground() {
                std::thread::park_timeout(FRAME);
                continue;
            }
            enter()?;
            // One that knows of nothing on the screen.
            terminal = Terminal::new(CrosstermBackend::new(io::stderr()))?;
        }
        usage.look();
        let scene = Scene {
            now: opened.elapsed().as_secs_f64(),
            stopping: interrupt::requested(),
            usage: &usage,
            colour,
        };
        terminal.draw(|frame| draw(frame, &mut locked(board), &scene))?;
        if event::poll(FRAME)? {
            answer(event::read()?, board);
        }
    }
    Ok(())
}

fn answer(input: Input, board: &Mutex<Board>) {
    let Input::Key(key) = input else {
        // Another size: the next picture fits it.
        return;
    };
    if key.kind == KeyEventKind::Release {
        return;
    }
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    let mut board = locked(board);
    let page = board.page as isize;
    match key.code {
        KeyCode::Char('c') if control => interrupt::request(),
        KeyCode::Char('z') if control => {
            drop(board);
            suspend();
        }
        KeyCode::Char(_) if control => {}
        KeyCode::Char('q') => interrupt::request(),
        KeyCode::Up | KeyCode::Char('k') => board.select(-1),
        KeyCode::Down | KeyCode::Char('j') => board.select(1),
        KeyCode::PageUp => board.select(-page),
        KeyCode::PageDown => board.select(page),
        KeyCode::Home => board.select(isize::MIN),
        KeyCode::End => board.select(isize::MAX),
        KeyCode::Char('e') => board.show_evals ^= true,
        KeyCode::Char('l') => board.log_axis ^= true,
        KeyCode::Char('s') => board.reorder(),
        _ => {}
    }
}

fn enter() -> io::Result<()> {
    enable_raw_mode()?;
    ENTERED.store(true, Ordering::SeqCst);
    execute!(io::stderr(), EnterAlternateScreen, cursor::Hide).inspect_err(|_| leave())
}

/// Gives the terminal back, once.
fn leave() {
    if ENTERED.swap(false, Ordering::SeqCst) {
        // There is nobody to tell should it fail.
        let mut err: Stderr = io::stderr();
        let _ = execute!(err, LeaveAlternateScreen, cursor::Show);
        let _ = disable_raw_mode();
    }
}

/// A panic of a member is caught and told as its end, so its message waits until the view has gone; any other one ends the view.
fn watch_panics(board: Arc<Mutex<Board>>) {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let thread = std::thread::current();
        let fatal = matches!(thread.name(), Some("main" | THREAD));
        if fatal || !ENTERED.load(Ordering::SeqCst) {
            leave();
            before(info);
        } else if let Ok(mut board) = board.try_lock() {
            board.say(&info.to_string());
        }
    }));
}

/// Whether this process may use the terminal: a background process that reads or switches it is stopped by the system.
#[cfg(unix)]
pub(super) fn foreground() -> bool {
    let mine = rustix::process::getpgrp();
    rustix::termios::tcgetpgrp(io::stderr()).is_ok_and(|group| group == mine)
}

#[cfg(not(unix))]
pub(super) fn foreground() -> bool {
    true
}

/// What Ctrl-Z does where the terminal turns it into a signal.
#[cfg(unix)]
fn suspend() {
    leave();
    let me = rustix::process::getpid();
    // Where it cannot be sent the view goes on.
    let _ = rustix::process::kill_process(me, rustix::process::Signal::TSTP);
    // The system may take the signal to another thread, and stops this one a little later: not while it takes the terminal back.
    std::thread::sleep(FRAME);
}

#[cfg(not(unix))]
fn suspend() {}
