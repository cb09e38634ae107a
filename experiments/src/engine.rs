//! Which backend runs: the choice is a fact found at run time.

use marimba_backend::dfdx::DfdxEngine;
use marimba_backend::{BackendError, CpuEngine, Engine};
use marimba_dsl::run::Backend;

/// The engine for a backend; `auto` takes the best that this machine has.
///
/// # Errors
/// [`BackendError::NoDevice`] when it is not there.
pub fn open(backend: Backend, threads: usize) -> Result<Box<dyn Engine>, BackendError> {
    match backend {
        Backend::Auto | Backend::Cpu => Ok(Box::new(CpuEngine::new(threads)?)),
        Backend::Dfdx => Ok(Box::new(<DfdxEngine>::default())),
        Backend::Cuda => Err(BackendError::NoDevice {
            name: "cuda".into(),
            why: "this build has no CUDA engine yet; use --backend cpu".into(),
        }),
    }
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
