//! Executes plans. Three backends, one meaning: `cpu` (native), `cuda` (one GPU), `dfdx` (the reference).
//!
//! An [`Engine`] owns the memory that outlives a run (parameters, gradients, moments, states), shared by all programs loaded into it
//! under the names of the graph's externals; a program is a graph and its plan, bound to that memory.

mod cpu;
mod cuda;
pub mod dfdx;

pub use cpu::{CpuEngine, available_bytes};
pub use marimba_kernels::PRODUCT_SCRATCH as CUDA_PRODUCT_SCRATCH;

pub use cuda::{CudaBytes, CudaEngine, cuda_bytes};

use marimba_ir::{External, Graph, Plan, Type};
use std::collections::HashMap;
use std::time::Instant;

/// Numbers on the host.
#[derive(Clone, Debug, PartialEq)]
pub enum HostTensor {
    /// Floats of any element type, widened.
    F32(Vec<f32>),
    /// Integers.
    I32(Vec<i32>),
}

impl HostTensor {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            HostTensor::F32(v) => v.len(),
            HostTensor::I32(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The floats; empty for integers.
    pub fn f32(&self) -> &[f32] {
        match self {
            HostTensor::F32(v) => v,
            HostTensor::I32(_) => &[],
        }
    }
}

/// Whether an output of this name is the new content of an external, which stays in the engine; [`Engine::read`] copies it out.
fn stays(name: &str) -> bool {
    let word = name.split_once(':').map(|(word, _)| word);
    let kinds = [
        External::Param,
        External::Master,
        External::Grad,
        External::Moment1,
        External::Moment2,
        External::State,
    ];
    kinds.iter().any(|kind| word == Some(kind.word()))
}

/// A program loaded into an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProgramId(pub usize);

/// What can go wrong outside the user's files.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BackendError {
    /// No such backend here.
    #[error("backend {name} is not available: {why}")]
    NoDevice {
        /// Backend asked for.
        name: String,
        /// What is missing.
        why: String,
    },
    /// The plan does not fit; known before anything ran.
    #[error(
        "out of memory: {need} bytes needed, {have} available; largest: {largest}; make batch or seq_len smaller, or set recompute: Block"
    )]
    OutOfMemory {
        /// Bytes.
        need: usize,
        /// Bytes.
        have: usize,
        /// The largest values at the peak.
        largest: String,
    },
    /// A tensor handed in does not fit the program.
    #[error("{name} has {found} elements, {expected} expected")]
    WrongSize {
        /// Name of the external.
        name: String,
        /// Elements given.
        found: usize,
        /// Type wanted.
        expected: String,
    },
    /// The engine has no memory of that name.
    #[error("nothing is stored under {name}")]
    Unknown {
        /// Name asked for.
        name: String,
    },
    /// The device refused or failed.
    #[error("the device failed: {why}")]
    Device {
        /// Which call, and the driver's words.
        why: String,
    },
    /// A plan that does not hold what it promises: a bug in the planner or in who made the plan.
    #[error("the plan is wrong: {why}; this is a bug in marimba")]
    BadPlan {
        /// What is wrong.
        why: String,
    },
    /// An op cannot run here.
    #[error("{op} at {path} cannot run on {backend}: {why}")]
    Unsupported {
        /// Op name.
        op: &'static str,
        /// DSL path.
        path: String,
        /// Backend.
        backend: &'static str,
        /// Why.
        why: String,
    },
}

/// Outputs of a run by name.
pub type Outputs = HashMap<String, HostTensor>;

/// The first result that was not finite, for explaining a NaN loss.
#[derive(Clone, Debug, PartialEq)]
pub struct NonFinite {
    /// Position of the node in the program.
    pub node: usize,
    /// Op name.
    pub op: &'static str,
    /// DSL path.
    pub path: String,
    /// Which result.
    pub result: usize,
    /// How many elements are not finite.
    pub count: usize,
    /// Largest finite magnitude among its arguments.
    pub largest_arg: f32,
}

/// Time of one node in a profiled run.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeTime {
    /// Op name.
    pub op: &'static str,
    /// DSL path.
    pub path: String,
    /// Seconds.
    pub secs: f64,
    /// Floating point operations of the node.
    pub flops: f64,
}

/// Memory of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes that the engine asked for and holds.
    pub allocated: usize,
    /// Bytes in use as the device reports them: also the driver's own and other processes'.
    pub in_use: usize,
    /// Bytes that the device has.
    pub total: usize,
}

/// Bytes that a host copies to find out how fast it copies.
const COPIED: usize = 128 << 20;

/// How often, the best counting.
const COPIES: usize = 8;

/// A backend. Externals are addressed by `word:name` (`param:layers.0.mixer.in_proj`, `state:layers.0.mixer.conv`).
pub trait Engine: Send {
    /// `cpu`, `dfdx` or `cuda`.
    fn name(&self) -> &'static str;

    /// Binds a planned graph: allocates its arena (shared by all programs of the engine) and the externals it names that do not exist
    /// yet (zeroed; constants filled). Refuses before allocating when memory does not suffice.
    ///
    /// # Errors
    /// [`BackendError`] when it does not fit or an op cannot run.
    fn load(&mut self, graph: Graph, plan: Plan) -> Result<ProgramId, BackendError>;

    /// Runs a program on inputs by name; returns its named outputs. Those that are memory of the engine (`grad:*`, `param:*`, `state:*` and
    /// the like) stay there.
    ///
    /// # Errors
    /// [`BackendError`] when an input is missing or has another size.
    fn run(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
    ) -> Result<Outputs, BackendError>;

    /// Runs a program and looks at every result: the first that is not finite.
    ///
    /// # Errors
    /// As [`Engine::run`].
    fn run_checked(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
    ) -> Result<Option<NonFinite>, BackendError>;

    /// Runs a program and times its nodes; empty where the backend cannot tell.
    ///
    /// # Errors
    /// As [`Engine::run`].
    fn profile(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
    ) -> Result<Vec<NodeTime>, BackendError> {
        self.run(program, inputs)?;
        Ok(Vec::new())
    }

    /// Runs programs with their inputs in turn, `runs` times in all after each has run once, and gives the seconds of each: by the clock of
    /// the device where there is one, with all launches queued ahead, so that the host's part is not in it.
    ///
    /// # Errors
    /// As [`Engine::run`].
    fn time(
        &mut self,
        programs: &[(ProgramId, &[(&str, HostTensor)])],
        runs: usize,
    ) -> Result<Vec<f64>, BackendError> {
        for (program, inputs) in programs {
            self.run(*program, inputs)?;
        }
        let turns = programs.iter().cycle().take(runs);
        turns
            .map(|(program, inputs)| {
                let begun = Instant::now();
                self.run(*program, inputs)?;
                Ok(begun.elapsed().as_secs_f64())
            })
            .collect()
    }

    /// Bytes read and written in a second by a copy of the memory that tensors lie in, larger than caches; the best of a few.
    ///
    /// # Errors
    /// [`BackendError`] where there is no room for it.
    fn copy_rate(&mut self) -> Result<f64, BackendError> {
        let from = vec![1u8; COPIED];
        let mut to = vec![0u8; COPIED];
        let mut best = f64::INFINITY;
        for _ in 0..COPIES {
            let begun = Instant::now();
            std::hint::black_box(&mut to).copy_from_slice(std::hint::black_box(&from));
            best = best.min(begun.elapsed().as_secs_f64());
        }
        Ok(2.0 * COPIED as f64 / best)
    }

    /// What the hardware is called, where the backend knows it; else the backend's name.
    fn device(&self) -> String {
        self.name().to_string()
    }

    /// Drops all programs and everything stored.
    fn clear(&mut self);

    /// Whether programs loaded from now on must give equal bits in equal runs. Backends that always do need do nothing; one that cannot
    /// refuses the op when it is loaded.
    fn set_deterministic(&mut self, _: bool) {}

    /// Memory now, where the backend has a device with memory of its own.
    fn memory(&self) -> Option<DeviceMemory> {
        None
    }

    /// Overwrites an external, making it when it does not exist.
    ///
    /// # Errors
    /// [`BackendError::WrongSize`] when the number of elements differs from an existing one.
    fn write(&mut self, key: &str, ty: &Type, data: &HostTensor) -> Result<(), BackendError>;

    /// Reads an external.
    ///
    /// # Errors
    /// [`BackendError::Unknown`].
    fn read(&self, key: &str) -> Result<HostTensor, BackendError>;

    /// Zeroes all externals of a kind, such as `state` before a new sequence.
    fn zero(&mut self, word: &str);
}
