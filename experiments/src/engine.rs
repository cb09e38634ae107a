//! Which backend runs: the choice is a fact found at run time.

use marimba_backend::dfdx::{self, DfdxEngine};
use marimba_backend::{BackendError, CpuEngine, CudaEngine, Engine};
use marimba_dsl::run::Backend;

/// The engine for a backend; `auto` takes the best that this machine has.
///
/// # Errors
/// [`BackendError::NoDevice`] when it is not there.
pub fn open(backend: Backend, threads: usize) -> Result<Box<dyn Engine>, BackendError> {
    open_with(backend, threads, true)
}

/// The same; with `graphs`, a GPU replays programs as CUDA graphs, without, it launches kernel by kernel.
///
/// # Errors
/// As [`open`].
pub fn open_with(
    backend: Backend,
    threads: usize,
    graphs: bool,
) -> Result<Box<dyn Engine>, BackendError> {
    let cuda = || {
        CudaEngine::new().map(|mut engine| {
            engine.set_graphs(graphs);
            engine.set_progress(|text| eprintln!("{text}"));
            Box::new(engine) as Box<dyn Engine>
        })
    };
    let cpu = || CpuEngine::new(threads).map(|engine| Box::new(engine) as Box<dyn Engine>);
    match backend {
        Backend::Auto => cuda().or_else(|_| cpu()),
        Backend::Cpu => cpu(),
        Backend::Dfdx => match dfdx::usable() {
            Ok(()) => Ok(Box::new(<DfdxEngine>::default())),
            Err(why) => Err(BackendError::NoDevice {
                name: "dfdx".into(),
                why,
            }),
        },
        Backend::Cuda => cuda(),
    }
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
