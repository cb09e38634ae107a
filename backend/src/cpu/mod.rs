//! The native CPU backend: executes plans in one arena, in f32, multi-threaded. One file per op, as on every floor.
//!
//! Runs are deterministic: tasks follow from shapes alone and partial sums are added in task order, so results have the same bits from
//! run to run and for every number of threads.

mod adamw;
mod attention;
mod bind;
mod cache_write;
mod cast;
mod causal_conv1d;
#[cfg(test)]
mod check;
mod concat;
mod draw;
mod embed;
mod exec;
mod gated_delta;
mod halves;
mod linear;
mod linear_cross_entropy;
mod math;
mod matmul;
mod memory;
mod moe;
mod panel;
mod pointwise;
mod reduce;
mod rms_norm;
mod rope;
mod route;
mod selective_scan;
mod simd;
#[cfg(test)]
mod speed;
mod ssd;
mod stat;
mod tensor;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod view;

use crate::{BackendError, Engine, HostTensor, NodeTime, NonFinite, Outputs, ProgramId};
use bind::{Memories, Program};
use halves::Halves;
use marimba_ir::{DType, Graph, Plan, Type};
use memory::Buffer;
pub use memory::available_bytes;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::time::Instant;
use tensor::Cx;

/// The native engine.
pub struct CpuEngine {
    cx: Cx,
    /// Absent with one thread: the caller's thread then does the work, so that engines can run side by side.
    pool: Option<rayon::ThreadPool>,
    arena: Buffer,
    /// Index in `stored` of each key `word:name`.
    keys: BTreeMap<String, usize>,
    stored: Vec<Stored>,
    programs: Vec<Program>,
    poison: bool,
    half_storage: bool,
}

/// Memory that outlives runs.
struct Stored {
    ty: Type,
    buffer: Buffer,
}

impl CpuEngine {
    /// An engine that computes with `threads` threads (at least one).
    ///
    /// # Errors
    /// [`BackendError::NoDevice`] when the threads cannot be started.
    pub fn new(threads: usize) -> Result<Self, BackendError> {
        let threads = threads.max(1);
        let pool = if threads > 1 {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(|i| format!("cpu-{i}"))
                .build()
                .map_err(|e| BackendError::NoDevice {
                    name: "cpu".into(),
                    why: e.to_string(),
                })?;
            Some(pool)
        } else {
            None
        };
        Ok(CpuEngine {
            cx: Cx::new(threads),
            pool,
            arena: Buffer::default(),
            keys: BTreeMap::new(),
            stored: Vec::new(),
            programs: Vec::new(),
            poison: false,
            half_storage: false,
        })
    }

    /// Fills the arena with NaN before each run, and each value again when nothing reads it any more: whatever reads memory that the plan
    /// does not promise then computes NaN. For tests; costs a sweep over the arena.
    pub fn set_poison(&mut self, poison: bool) {
        self.poison = poison;
    }

    /// Accepts graphs with bf16 and f16 values from now on: each is stored rounded to its format (in f32 memory, so that a plan for 16 bits
    /// is made anew), and computed with in f32. Without this such graphs are refused. For looking at what a format does to a model's
    /// numbers; nothing gets faster.
    pub fn set_half_storage(&mut self, on: bool) {
        self.half_storage = on;
    }

    /// Requires an element type that this engine stores.
    fn check_dtype(&self, ty: &Type, op: &'static str, path: &str) -> Result<(), BackendError> {
        if self.half_storage && halves::is_half(ty.dtype) {
            return Ok(());
        }
        bind::check_dtype(ty, op, path)
    }

    /// Runs a program as [`Engine::run`], with the time of every node in order.
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub fn run_profiled(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
    ) -> Result<(Outputs, Vec<NodeTime>), BackendError> {
        let mut times = Vec::new();
        let mut last = Instant::now();
        self.execute(program, inputs, |p, i, _| {
            let now = Instant::now();
            times.push(p.node_time(i, (now - last).as_secs_f64()));
            last = now;
            true
        })?;
        Ok((self.outputs(program), times))
    }

    /// Runs the nodes; `after(program, node, memories)` says whether to go on.
    fn execute(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
        mut after: impl FnMut(&Program, usize, &Memories) -> bool + Send,
    ) -> Result<(), BackendError> {
        let unknown = || BackendError::Unknown {
            name: format!("program {}", program.0),
        };
        let p = self.programs.get_mut(program.0).ok_or_else(unknown)?;
        p.write_inputs(inputs)?;
        if self.poison {
            self.arena.f32_mut().fill(f32::NAN);
        }
        let stored: Vec<*mut u8> = self.stored.iter().map(|s| s.buffer.as_ptr()).collect();
        let memories = Memories::new(&self.arena, &stored, p);
        let (cx, poison, p) = (&self.cx, self.poison, &*p);
        let mut run = || {
            for i in 0..p.len() {
                p.run_node(i, &memories, cx);
                if !after(p, i, &memories) {
                    break;
                }
                if poison {
                    p.poison_dead(i, &memories);
                }
            }
        };
        match &self.pool {
            Some(pool) => pool.install(&mut run),
            None => run(),
        }
        Ok(())
    }

    /// Copies of the named outputs.
    fn outputs(&self, program: ProgramId) -> Outputs {
        let stored: Vec<*mut u8> = self.stored.iter().map(|s| s.buffer.as_ptr()).collect();
        let p = &self.programs[program.0];
        p.outputs(&Memories::new(&self.arena, &stored, p))
    }

    /// Index of the memory under `key`, made when absent.
    fn store(&mut self, key: &str, ty: &Type) -> Result<usize, BackendError> {
        match self.keys.get(key) {
            Some(&i)
                if self.stored[i].ty.len() == ty.len() && self.stored[i].ty.dtype == ty.dtype =>
            {
                Ok(i)
            }
            // Numbers that were written before any program said how they are stored.
            Some(&i)
                if self.half_storage
                    && self.programs.is_empty()
                    && self.stored[i].ty.len() == ty.len()
                    && self.stored[i].ty.dtype == DType::F32
                    && halves::is_half(ty.dtype) =>
            {
                let Stored { ty: old, buffer } = &mut self.stored[i];
                *old = ty.clone();
                halves::round(ty.dtype, &mut buffer.f32_mut()[..ty.len()]);
                Ok(i)
            }
            Some(&i) => Err(BackendError::WrongSize {
                name: key.to_string(),
                found: ty.len(),
                expected: self.stored[i].ty.to_string(),
            }),
            None => {
                self.keys.insert(key.to_string(), self.stored.len());
                self.stored.push(Stored {
                    ty: ty.clone(),
                    buffer: Buffer::zeroed(bind::memory_bytes(ty)),
                });
                Ok(self.stored.len() - 1)
            }
        }
    }
}

impl Engine for CpuEngine {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn profile(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
    ) -> Result<Vec<NodeTime>, BackendError> {
        Ok(self.run_profiled(program, inputs)?.1)
    }

    fn load(&mut self, graph: Graph, plan: Plan) -> Result<ProgramId, BackendError> {
        let (mut graph, mut plan) = (graph, plan);
        let externals = bind::shared_externals(&graph);
        let halves = if self.half_storage {
            Halves::take(&mut graph)
        } else {
            Halves::default()
        };
        if !halves.is_empty() {
            plan = marimba_ir::plan(&graph);
        }
        bind::check(&graph, &plan)?;
        let grows = plan.arena_bytes > self.arena.bytes();
        let arena = if grows { plan.arena_bytes } else { 0 };
        let new_bytes: usize = externals
            .iter()
            .filter(|(key, _)| !self.keys.contains_key(key))
            .map(|(_, ty)| bind::memory_bytes(ty))
            .sum();
        let need = arena + new_bytes + bind::own_bytes(&graph);
        let freed = if grows { self.arena.bytes() } else { 0 };
        if let Some(have) = available_bytes()
            .map(|b| b + freed)
            .filter(|&have| need > have)
        {
            return Err(BackendError::OutOfMemory {
                need,
                have,
                largest: bind::largest(&graph, &plan),
            });
        }
        let stored = externals
            .iter()
            .map(|(key, ty)| self.store(key, ty))
            .collect::<Result<Vec<usize>, _>>()?;
        self.arena.grow(plan.arena_bytes);
        self.programs
            .push(Program::new(graph, &plan, &stored, &halves));
        Ok(ProgramId(self.programs.len() - 1))
    }

    fn run(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
    ) -> Result<Outputs, BackendError> {
        self.execute(program, inputs, |_, _, _| true)?;
        Ok(self.outputs(program))
    }

    fn run_checked(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
    ) -> Result<Option<NonFinite>, BackendError> {
        let mut found = None;
        self.execute(program, inputs, |p, i, memories| {
            found = p.non_finite(i, memories);
            found.is_none()
        })?;
        Ok(found)
    }

    fn write(&mut self, key: &str, ty: &Type, data: &HostTensor) -> Result<(), BackendError> {
        self.check_dtype(ty, "write", key)?;
        if data.len() != ty.len() {
            return Err(BackendError::WrongSize {
                name: key.to_string(),
                found: data.len(),
                expected: ty.to_string(),
            });
        }
        // What a program stores in half precision is rounded to it.
        let ty = match self.keys.get(key).map(|&i| &self.stored[i].ty) {
            Some(s) if halves::is_half(s.dtype) && ty.dtype == DType::F32 => s.clone(),
            Some(_) | None => ty.clone(),
        };
        let ty = &ty;
        let i = self.store(key, ty)?;
        let buffer = &mut self.stored[i].buffer;
        if halves::is_half(ty.dtype) {
            bind::copy_in(buffer, &ty.with_dtype(DType::F32), data, key)?;
            halves::round(ty.dtype, &mut buffer.f32_mut()[..ty.len()]);
            return Ok(());
        }
        bind::copy_in(buffer, ty, data, key)
    }

    fn read(&self, key: &str) -> Result<HostTensor, BackendError> {
        let i = self.keys.get(key).ok_or_else(|| BackendError::Unknown {
            name: key.to_string(),
        })?;
        let Stored { ty, buffer } = &self.stored[*i];
        Ok(match ty.dtype {
            DType::I32 => HostTensor::I32(buffer.i32()[..ty.len()].to_vec()),
            DType::F32 | DType::Bf16 | DType::F16 | DType::E4m3 | DType::E5m2 => {
                HostTensor::F32(buffer.f32()[..ty.len()].to_vec())
            }
        })
    }

    fn copy_rate(&mut self) -> Result<f64, BackendError> {
        let from = vec![1u8; crate::COPIED];
        let mut to = vec![0u8; crate::COPIED];
        let part = crate::COPIED.div_ceil(self.cx.threads().max(1));
        let mut best = f64::INFINITY;
        for _ in 0..crate::COPIES {
            let copy = || {
                let parts = to.par_chunks_mut(part).zip(from.par_chunks(part));
                parts.for_each(|(to, from)| to.copy_from_slice(from));
            };
            let begun = Instant::now();
            match &self.pool {
                Some(pool) => pool.install(copy),
                None => to.copy_from_slice(&from),
            }
            best = best.min(begun.elapsed().as_secs_f64());
            std::hint::black_box(&to);
        }
        Ok(2.0 * crate::COPIED as f64 / best)
    }

    fn clear(&mut self) {
        self.programs.clear();
        self.keys.clear();
        self.stored.clear();
        self.arena = Buffer::default();
    }

    fn zero(&mut self, word: &str) {
        for (key, &i) in &self.keys {
            if key.split_once(':').is_some_and(|(w, _)| w == word) {
                self.stored[i].buffer.f32_mut().fill(0.0);
            }
        }
    }
}
