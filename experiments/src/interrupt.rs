//! Ctrl-C, and the signals that ask a process to end: loops stop at the next step, so that nothing is lost. A second one ends the process
//! at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, OnceLock};

static REQUESTED: AtomicBool = AtomicBool::new(false);
static INSTALL: Once = Once::new();
static BEFORE_EXIT: OnceLock<fn()> = OnceLock::new();

/// Catches Ctrl-C, and on Unix SIGTERM and SIGHUP, from here on (once per process).
pub fn install() {
    INSTALL.call_once(|| {
        // Without a handler they still end the process, only less gently.
        let _ = ctrlc::set_handler(|| {
            request();
            if BEFORE_EXIT.get().is_none() {
                eprintln!("\nstopping after this step; press Ctrl-C again to stop at once");
            }
        });
    });
}

/// Asks to stop, as Ctrl-C does where the terminal does not turn it into a signal; asked again, ends the process.
pub fn request() {
    if REQUESTED.swap(true, Ordering::SeqCst) {
        if let Some(leave) = BEFORE_EXIT.get() {
            leave();
        }
        std::process::exit(130);
    }
}

/// What gives the terminal back before the process is ended at once (the first one given stays). It is also who tells the user that a
/// request was heard.
pub fn before_exit(leave: fn()) {
    BEFORE_EXIT.get_or_init(|| leave);
}

/// Whether the user asked to stop.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}
