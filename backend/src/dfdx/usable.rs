//! Whether dfdx's device works here. With the cargo feature `dfdx-cuda` that is a question: it needs a GPU, and dfdx compiles some of its
//! kernels when they first run, with headers that it looks for where its build script left them, or in the working directory.
//!
//! dfdx says no in a panic, so the question is asked once in a place that catches it. Its CPU device always works.

use super::{Device, device};
use dfdx::prelude::{AsArray, PermuteTo, Rank1, Rank2, ReshapeTo, TensorFrom};
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

/// The header that dfdx's run-time kernels include.
const HEADER: &str = "cuda_utils.cuh";

/// What is missing for dfdx's device of this build, in words; asked once a process.
///
/// # Errors
/// Those words.
pub fn usable() -> Result<(), String> {
    static ANSWER: OnceLock<Result<(), String>> = OnceLock::new();
    ANSWER.get_or_init(|| quietly(try_it)).clone()
}

/// Makes the device and runs one kernel of those that dfdx compiles when they first run: a copy of a tensor whose strides are not plain.
fn try_it() -> bool {
    let dev: Device = device();
    let x = dev.tensor([[1.0f32, 2.0, 3.0], [4.0, 5.0, 6.0]]);
    let y = x.permute::<Rank2<3, 2>, _>().reshape::<Rank1<6>>();
    y.array() == [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]
}

/// `f` with its panic caught, and not printed; panics of other threads are printed as before.
fn quietly(f: impl FnOnce() -> bool) -> Result<(), String> {
    // The hook is the process's: one at a time.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let me = thread::current().id();
    let before = Arc::new(take_hook());
    let others = before.clone();
    set_hook(Box::new(move |info| {
        if thread::current().id() != me {
            others(info);
        }
    }));
    let answer = catch_unwind(AssertUnwindSafe(f));
    drop(take_hook());
    if let Some(before) = Arc::into_inner(before) {
        set_hook(before);
    }
    match answer {
        Ok(true) => Ok(()),
        Ok(false) => Err("dfdx's device gives wrong numbers".into()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|t| t.to_string()));
            Err(explain(&text.unwrap_or_default()))
        }
    }
}

/// What dfdx's panic means.
fn explain(panic: &str) -> String {
    if panic.contains("NVRTC_ERROR_COMPILATION") && panic.contains(HEADER) {
        // The options of the compiler are in the text; the last folder is that of dfdx's build script.
        let folders = panic.split("--include-path=").skip(1);
        let folder = folders.filter_map(|f| f.split('"').next()).last();
        return format!(
            "dfdx compiles kernels at run time and found {HEADER} neither in {} nor in the working directory; run it in a folder that \
             holds dfdx's headers, as scripts/gpu-bundle packs them",
            folder.unwrap_or("the folder of its build script")
        );
    }
    let first = panic.lines().next().unwrap_or_default();
    let (_, first) = first
        .split_once(" on an `Err` value: ")
        .unwrap_or(("", first));
    format!("dfdx could not start its device: {first}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_of_this_build_is_asked() {
        match usable() {
            Ok(()) => assert!(try_it()),
            Err(why) if cfg!(feature = "dfdx-cuda") => eprintln!("skipped: {why}"),
            Err(why) => panic!("{why}"),
        }
    }

    #[test]
    fn a_panic_becomes_words() {
        assert_eq!(quietly(|| true), Ok(()));
        assert!(quietly(|| false).is_err());
        let why = quietly(|| panic!("no such device")).unwrap_err();
        assert_eq!(why, "dfdx could not start its device: no such device");
        let text = "called `Result::unwrap()` on an `Err` value: CompileError { nvrtc: NvrtcError(NVRTC_ERROR_COMPILATION), options: \
                    [\"--include-path=/usr/local/cuda/include\", \"--include-path=/build/dfdx-1/out\", \"--gpu-architecture=sm_90\"], \
                    log: \"default_program(8): catastrophic error: cannot open source file \\\"cuda_utils.cuh\\\"\" }";
        let why = quietly(|| panic!("{text}")).unwrap_err();
        assert!(
            why.contains("neither in /build/dfdx-1/out nor in the working directory"),
            "{why}"
        );
    }
}
