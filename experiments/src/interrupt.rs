//! Ctrl-C: asks loops to stop at the next step, so that nothing is lost. A second one ends the process at once.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);
static INSTALL: Once = Once::new();

/// Catches Ctrl-C from here on (once per process).
pub fn install() {
    INSTALL.call_once(|| {
        // Without a handler Ctrl-C still ends the process, only less gently.
        let _ = ctrlc::set_handler(|| {
            if REQUESTED.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
            eprintln!("\nstopping after this step; press Ctrl-C again to stop at once");
        });
    });
}

/// Asks to stop, as Ctrl-C does where the terminal does not turn it into a signal; returns whether that had been asked before.
pub fn request() -> bool {
    REQUESTED.swap(true, Ordering::SeqCst)
}

/// Whether the user asked to stop.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}
