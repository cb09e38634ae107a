//! The CUDA backend: executes plans in one arena on one GPU, on one stream. Builds everywhere; the device and its libraries are found at
//! run time.
//!
//! Loading a program records every launch with its addresses, so a run is nothing but launches. Where memory has moved since (a larger
//! arena), the program is recorded again.

#![allow(unsafe_code)] // device addresses; `check_bounds` is what makes them sound

mod exec;

use crate::{
    BackendError, DeviceMemory, Engine, HostTensor, NodeTime, NonFinite, Outputs, ProgramId,
};
use half::{bf16, f16};
use marimba_ir::op::{Alias, Op};
use marimba_ir::{DType, External, Graph, Memory, Node, Plan, Type, ValueId};
use marimba_kernels::{
    self as k, Captured, Device, KernelError, Pinned, Prepared, Recorder, Target,
};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

/// Smallest allocation: every tensor has an address, also an empty one.
const LEAST: usize = 256;

/// The engine of one GPU.
pub struct CudaEngine {
    device: Device,
    arena: Area,
    scratch: Area,
    stored: BTreeMap<String, Stored>,
    programs: Vec<Program>,
    poison: bool,
    graphs: bool,
    deterministic: bool,
    progress: fn(&str),
}

/// Bytes that programs take on a GPU, known without one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CudaBytes {
    /// Parameters, gradients, moments, states, inputs and constants.
    pub stored: usize,
    /// Activations: the largest arena.
    pub arena: usize,
    /// What kernels need besides: the largest scratch area, and that of matrix products.
    pub scratch: usize,
}

impl CudaBytes {
    /// All of it.
    pub fn total(&self) -> usize {
        self.stored + self.arena + self.scratch
    }
}

/// What an engine allocates for programs that share their memory by name.
pub fn cuda_bytes<'a>(programs: impl IntoIterator<Item = (&'a Graph, &'a Plan)>) -> CudaBytes {
    // A kernel chosen for its device may need other scratch memory: this is what a Hopper card takes.
    let target = Target {
        hopper: true,
        early: true,
        fp8: true,
        multiprocessors: 132,
        shared: 227 << 10,
        deterministic: false,
    };
    let mut bytes = CudaBytes {
        scratch: k::PRODUCT_SCRATCH,
        ..CudaBytes::default()
    };
    let mut seen = BTreeSet::new();
    for (graph, plan) in programs {
        bytes.arena = bytes.arena.max(plan.arena_bytes);
        bytes.scratch = bytes
            .scratch
            .max(k::PRODUCT_SCRATCH + scratch_bytes(graph, plan, target));
        for v in graph.value_ids() {
            let Some(e) = graph.external(v) else { continue };
            if !is_shared(e) || seen.insert(format!("{}:{}", e.word(), graph.value(v).name)) {
                bytes.stored += room(graph.ty(v));
            }
        }
    }
    bytes
}

/// What memory for a tensor takes on the device.
fn room(ty: &Type) -> usize {
    ty.bytes().max(LEAST).next_multiple_of(LEAST)
}

/// Scratch area of a program.
fn scratch_bytes(graph: &Graph, plan: &Plan, target: Target) -> usize {
    // Recorded with addresses that mean nothing.
    let none = HashMap::new();
    let of = |v| address(plan, LEAST as u64, &none, v);
    record(graph, of, LEAST as u64, target).0.scratch_bytes()
}

#[derive(Default)]
struct Area {
    ptr: u64,
    bytes: usize,
}

/// Memory that outlives runs.
struct Stored {
    ty: Type,
    ptr: u64,
}

/// Memory that one program brought with it.
#[derive(Default)]
struct Made {
    /// What only it uses.
    memory: Vec<u64>,
    /// What others may use from now on, by its key.
    keys: Vec<String>,
}

struct Program {
    graph: Graph,
    plan: Plan,
    /// Address of each external.
    externals: HashMap<ValueId, u64>,
    /// Inputs lie together on the device, so that one copy brings them: first byte, then name and place of each.
    input_block: u64,
    inputs: Vec<(String, ValueId, Range<usize>)>,
    staged: Pinned,
    /// Outputs that the host reads, and their places in `results`.
    outputs: Vec<(String, ValueId, Range<usize>)>,
    results: Pinned,
    prepared: Prepared,
    /// All commands as one, made when the program runs a second time.
    captured: Option<Captured>,
    runs: usize,
    /// Commands of each node.
    spans: Vec<Range<usize>>,
    /// Arena and scratch it was recorded with.
    at: (u64, u64),
    /// Scratch that it needs.
    scratch_bytes: usize,
}

impl From<KernelError> for BackendError {
    fn from(e: KernelError) -> BackendError {
        match e {
            KernelError::Missing { .. } => BackendError::NoDevice {
                name: "cuda".into(),
                why: e.to_string(),
            },
            KernelError::Compile { .. }
            | KernelError::Driver { .. }
            | KernelError::Memory { .. } => BackendError::Device { why: e.to_string() },
        }
    }
}

/// Plain numbers as bytes.
fn bytes_of<T: Copy>(x: &[T]) -> &[u8] {
    // SAFETY: called with f32 and i32 only, which have no padding; bytes need no alignment.
    unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), std::mem::size_of_val(x)) }
}

/// Numbers narrowed to two bytes each.
fn pairs(x: &[f32], narrow: impl Fn(f32) -> [u8; 2]) -> Cow<'static, [u8]> {
    let mut bytes = vec![0u8; 2 * x.len()];
    for (to, &v) in bytes.chunks_exact_mut(2).zip(x) {
        to.copy_from_slice(&narrow(v));
    }
    Cow::Owned(bytes)
}

/// Bytes of host numbers in an element type; `None` for integers where floats belong, or the reverse.
fn encode(data: &HostTensor, dtype: DType) -> Option<Cow<'_, [u8]>> {
    Some(match (data, dtype) {
        (HostTensor::F32(x), DType::F32) => Cow::Borrowed(bytes_of(x)),
        (HostTensor::I32(x), DType::I32) => Cow::Borrowed(bytes_of(x)),
        (HostTensor::F32(x), DType::Bf16) => pairs(x, |v| bf16::from_f32(v).to_ne_bytes()),
        (HostTensor::F32(x), DType::F16) => pairs(x, |v| f16::from_f32(v).to_ne_bytes()),
        (HostTensor::F32(_), DType::I32)
        | (HostTensor::I32(_), DType::F32 | DType::Bf16 | DType::F16)
        | (_, DType::E4m3 | DType::E5m2) => return None,
    })
}

fn decode(bytes: &[u8], dtype: DType) -> HostTensor {
    let four = |b: &[u8]| [b[0], b[1], b[2], b[3]];
    match dtype {
        DType::F32 => HostTensor::F32(
            bytes
                .chunks_exact(4)
                .map(|b| f32::from_ne_bytes(four(b)))
                .collect(),
        ),
        DType::I32 => HostTensor::I32(
            bytes
                .chunks_exact(4)
                .map(|b| i32::from_ne_bytes(four(b)))
                .collect(),
        ),
        DType::Bf16 => HostTensor::F32(
            bytes
                .chunks_exact(2)
                .map(|b| bf16::from_ne_bytes([b[0], b[1]]).to_f32())
                .collect(),
        ),
        DType::E4m3 => HostTensor::F32(bytes.iter().map(|&b| eight(b, 3)).collect()),
        DType::E5m2 => HostTensor::F32(bytes.iter().map(|&b| eight(b, 2)).collect()),
        DType::F16 => HostTensor::F32(
            bytes
                .chunks_exact(2)
                .map(|b| f16::from_ne_bytes([b[0], b[1]]).to_f32())
                .collect(),
        ),
    }
}

/// What 8 bits hold: 1 of sign, the rest of exponent, `mantissa` of mantissa.
fn eight(bits: u8, mantissa: i32) -> f32 {
    let (exponents, steps) = (7 - mantissa, 1 << mantissa);
    let bias = (1 << (exponents - 1)) - 1;
    let (exponent, m) = (i32::from(bits & 0x7f) >> mantissa, i32::from(bits) % steps);
    let last = (1 << exponents) - 1;
    let size = match (mantissa, exponent == last, m) {
        (2, true, 0) => f32::INFINITY,
        (2, true, _) | (3, true, 7) => f32::NAN,
        _ if exponent == 0 => m as f32 * 2f32.powi(1 - bias - mantissa),
        _ => (steps + m) as f32 * 2f32.powi(exponent - bias - mantissa),
    };
    if bits & 0x80 == 0 { size } else { -size }
}

fn dtype(t: DType) -> k::DType {
    match t {
        DType::F32 => k::DType::F32,
        DType::Bf16 => k::DType::Bf16,
        DType::F16 => k::DType::F16,
        DType::E4m3 => k::DType::Eight(k::Eight::E4m3),
        DType::E5m2 => k::DType::Eight(k::Eight::E5m2),
        DType::I32 => k::DType::I32,
    }
}

fn tensor(ty: &Type, ptr: u64) -> k::Tensor {
    k::Tensor {
        ptr,
        dtype: dtype(ty.dtype),
        dims: ty.sizes(),
    }
}

/// Places of values one after the other, aligned.
fn places(
    g: &Graph,
    values: impl Iterator<Item = (String, ValueId)>,
) -> Vec<(String, ValueId, Range<usize>)> {
    let mut end = 0usize;
    values
        .map(|(name, v)| {
            let start = end.next_multiple_of(LEAST);
            end = start + g.ty(v).bytes();
            (name, v, start..end)
        })
        .collect()
}

fn is_shared(e: &External) -> bool {
    match e {
        External::Param
        | External::Master
        | External::Grad
        | External::Moment1
        | External::Moment2
        | External::State => true,
        External::Input | External::Const(_) => false,
    }
}

/// Every value lies inside its memory.
fn check_bounds(g: &Graph, plan: &Plan) -> Result<(), BackendError> {
    let bad = |why: String| BackendError::BadPlan { why };
    if plan.memory.len() != g.values.len() {
        return Err(bad(format!(
            "{} values, {} planned",
            g.values.len(),
            plan.memory.len()
        )));
    }
    for v in g.value_ids() {
        let ty = g.ty(v);
        let (space, offset) = match plan.of(v) {
            Memory::Arena { offset } => (plan.arena_bytes, offset),
            Memory::External { root, offset } => (g.ty(root).bytes(), offset),
        };
        let outside = offset.checked_add(ty.bytes()).is_none_or(|end| end > space);
        if (outside || offset % ty.dtype.bytes() != 0) && !ty.is_empty() {
            return Err(bad(format!("{v} {ty} at byte {offset} of {space}")));
        }
    }
    Ok(())
}

/// Whether the launchers can run this node.
fn check_node(g: &Graph, node: &Node, target: Target) -> Result<(), BackendError> {
    let Node { op, path, .. } = node;
    let types: Vec<Option<&Type>> = node.args.iter().map(|a| a.map(|v| g.ty(v))).collect();
    let refuse = |why: String| {
        Err(BackendError::Unsupported {
            op: op.name(),
            path: path.to_string(),
            backend: "cuda",
            why,
        })
    };
    match op {
        Op::Narrow(_) | Op::LinearFp8(_) if !target.fp8 => {
            return refuse(
                "products in 8 bits need a GPU of compute capability 8.9 or later; set precision: Bf16"
                    .into(),
            );
        }
        Op::Attention(_) | Op::AttentionBwd(_) => {
            let p = types.first().copied().flatten().map_or(0, Type::last);
            if p > 256 {
                return refuse(format!("heads of {p} channels; at most 256 are possible"));
            }
        }
        Op::Route(r) if r.n_groups > 256 => {
            return refuse(format!(
                "{} groups of experts; at most 256 are possible",
                r.n_groups
            ));
        }
        _ => {}
    }
    Ok(())
}

/// Values whose memory some node writes over.
fn written(g: &Graph) -> BTreeSet<ValueId> {
    let mut all = BTreeSet::new();
    for node in &g.nodes {
        for (result, &v) in node.results.iter().enumerate() {
            match node.alias(result) {
                Some(Alias::InPlace { .. }) => {
                    all.insert(g.root(v));
                }
                Some(Alias::View { .. }) | None => {}
            }
        }
    }
    all
}

/// Records all nodes; `base` gives the address of a value.
fn record(
    g: &Graph,
    address: impl Fn(ValueId) -> u64,
    scratch: u64,
    target: Target,
) -> (Recorder, Vec<Range<usize>>) {
    let mut r = Recorder::new(scratch).on(target);
    let mut spans = Vec::with_capacity(g.nodes.len());
    let written = written(g);
    let mut at = 0;
    while let Some(node) = g.nodes.get(at) {
        let from = r.commands.len();
        r.next_op();
        let sums = sums_from(g, &address, at);
        if sums.len() > 1 {
            // The last of them runs for all: nothing stands between them.
            at += sums.len();
            spans.resize(at - 1, from..from);
            let beta = node.args[1].map(|v| tensor(g.ty(v), address(v)));
            k::accumulate_all(&mut r, &beta.unwrap_or(k::Tensor::ABSENT), &sums);
        } else {
            at += 1;
            record_one(g, node, &written, &address, &mut r);
        }
        spans.push(from..r.commands.len());
    }
    (r, spans)
}

/// Additions to gradients by the nodes from `at` on that can be made at the same time: where each goes, and what is added.
fn sums_from(g: &Graph, address: impl Fn(ValueId) -> u64, at: usize) -> Vec<(u64, k::Tensor)> {
    let mut sums: Vec<(u64, k::Tensor)> = Vec::new();
    let beta = g.nodes[at].args.get(1);
    for node in &g.nodes[at..] {
        let (Op::Accumulate(op), [Some(into), b, Some(x)]) = (&node.op, &node.args[..]) else {
            break;
        };
        let (ty, x) = (g.ty(*into), tensor(g.ty(*x), address(*x)));
        let row = ty.bytes() / ty.size(0).max(1);
        let to = address(*into) + (op.start * row) as u64;
        let apart = |a: u64, n: usize, b: u64, m: usize| a + n as u64 <= b || b + m as u64 <= a;
        let free = sums.iter().all(|(t, y)| {
            apart(to, x.bytes(), *t, y.bytes()) && apart(x.ptr, x.bytes(), *t, y.bytes())
        });
        if Some(b) != beta || x.dtype != k::DType::F32 || !free {
            break;
        }
        sums.push((to, x));
    }
    sums
}

fn record_one(
    g: &Graph,
    node: &Node,
    written: &BTreeSet<ValueId>,
    address: impl Fn(ValueId) -> u64,
    r: &mut Recorder,
) {
    let types: Vec<Option<Type>> = node
        .args
        .iter()
        .map(|a| a.map(|v| g.ty(v).clone()))
        .collect();
    let results: Vec<Type> = node.results.iter().map(|&v| g.ty(v).clone()).collect();
    let args: Vec<Option<k::Tensor>> = node
        .args
        .iter()
        .map(|a| a.map(|v| tensor(g.ty(v), address(v))))
        .collect();
    let outs: Vec<k::Tensor> = node
        .results
        .iter()
        .map(|&v| tensor(g.ty(v), address(v)))
        .collect();
    let is_fixed = |v: ValueId| {
        let root = g.root(v);
        let held = match g.external(root) {
            Some(External::Param | External::Master | External::Const(_)) => true,
            Some(_) | None => false,
        };
        held && !written.contains(&root)
    };
    let fixed: Vec<bool> = node.args.iter().map(|a| a.is_some_and(is_fixed)).collect();
    exec::record(
        &node.op,
        r,
        &k::Args {
            args: &args,
            results: &outs,
            fixed: &fixed,
        },
        &types,
        &results,
    );
}

fn address(plan: &Plan, arena: u64, externals: &HashMap<ValueId, u64>, v: ValueId) -> u64 {
    match plan.of(v) {
        Memory::Arena { offset } => arena + offset as u64,
        Memory::External { root, offset } => {
            externals.get(&root).copied().unwrap_or(LEAST as u64) + offset as u64
        }
    }
}

impl CudaEngine {
    /// The engine of the first GPU.
    ///
    /// # Errors
    /// [`BackendError::NoDevice`] names the library that is missing and where it was looked for.
    pub fn new() -> Result<Self, BackendError> {
        let device = Device::open(0).map_err(|e| BackendError::NoDevice {
            name: "cuda".into(),
            why: e.to_string(),
        })?;
        Ok(CudaEngine {
            device,
            arena: Area::default(),
            scratch: Area::default(),
            stored: BTreeMap::new(),
            programs: Vec::new(),
            poison: false,
            graphs: true,
            deterministic: false,
            progress: |_| {},
        })
    }

    /// Name of the GPU.
    pub fn device_name(&self) -> &str {
        self.device.name()
    }

    /// Fills arena and scratch with NaN before each run: whatever reads memory that nothing wrote computes NaN. For tests.
    pub fn set_poison(&mut self, poison: bool) {
        self.poison = poison;
    }

    fn target(&self) -> Target {
        Target {
            deterministic: self.deterministic,
            ..self.device.target()
        }
    }

    /// Whether programs that run again are captured and replayed as one launch (the default), or launched command by command.
    pub fn set_graphs(&mut self, graphs: bool) {
        self.graphs = graphs;
    }

    /// Who hears what takes long: kernels that are compiled for the first time on this machine, products that are timed.
    pub fn set_progress(&mut self, progress: fn(&str)) {
        self.progress = progress;
    }

    /// Drops all programs and everything stored; compiled kernels stay loaded.
    pub fn clear(&mut self) {
        let shared = std::mem::take(&mut self.stored);
        let programs = std::mem::take(&mut self.programs);
        let mut all: Vec<u64> = shared.into_values().map(|s| s.ptr).collect();
        for p in &programs {
            let own = |v: &ValueId| matches!(p.graph.external(*v), Some(External::Const(_)));
            let mine = p.externals.iter().filter(|(v, _)| own(v));
            all.extend(mine.map(|(_, &ptr)| ptr));
            all.push(p.input_block);
        }
        all.push(std::mem::take(&mut self.arena).ptr);
        all.push(std::mem::take(&mut self.scratch).ptr);
        for ptr in all {
            // SAFETY: allocated by this engine, and nothing refers to it any more.
            unsafe { self.device.free(ptr) };
        }
    }

    fn grow(device: &Device, area: &mut Area, bytes: usize) -> Result<(), BackendError> {
        if bytes > area.bytes || area.ptr == 0 {
            let old = std::mem::take(area);
            // SAFETY: programs that were recorded with the old area are recorded again before they run.
            unsafe { device.free(old.ptr) };
            let bytes = bytes.max(LEAST);
            area.ptr = device.allocate(bytes)?;
            area.bytes = bytes;
        }
        Ok(())
    }

    /// The memory under `key`, made when absent.
    fn store(&mut self, key: &str, ty: &Type) -> Result<u64, BackendError> {
        if let Some(s) = self.stored.get(key) {
            if s.ty.len() != ty.len() || s.ty.dtype.is_float() != ty.dtype.is_float() {
                return Err(BackendError::WrongSize {
                    name: key.to_string(),
                    found: ty.len(),
                    expected: s.ty.to_string(),
                });
            }
            if s.ty.dtype == ty.dtype {
                return Ok(s.ptr);
            }
            if !self.programs.is_empty() {
                return Err(BackendError::BadPlan {
                    why: format!("{key} is {} in one program and {ty} in another", s.ty),
                });
            }
            // Written before it was loaded, in another precision.
            let data = self.read(key)?;
            let ptr = self.device.allocate(ty.bytes().max(LEAST))?;
            let bytes = encode(&data, ty.dtype).unwrap_or_default();
            // SAFETY: allocated above with room for as many elements; no program uses the old memory.
            unsafe {
                self.device.write(ptr, &bytes)?;
                if let Some(old) = self.stored.insert(
                    key.to_string(),
                    Stored {
                        ty: ty.clone(),
                        ptr,
                    },
                ) {
                    self.device.free(old.ptr);
                }
            }
            return Ok(ptr);
        }
        let ptr = self.device.allocate(ty.bytes().max(LEAST))?;
        self.stored.insert(
            key.to_string(),
            Stored {
                ty: ty.clone(),
                ptr,
            },
        );
        Ok(ptr)
    }

    fn copy_in(
        &self,
        name: &str,
        ty: &Type,
        ptr: u64,
        data: &HostTensor,
    ) -> Result<(), BackendError> {
        let bytes = match encode(data, ty.dtype) {
            Some(bytes) if data.len() == ty.len() => bytes,
            _ => {
                return Err(BackendError::WrongSize {
                    name: name.to_string(),
                    found: data.len(),
                    expected: ty.to_string(),
                });
            }
        };
        // SAFETY: the memory was allocated for this type.
        Ok(unsafe { self.device.write(ptr, &bytes) }?)
    }

    fn copy_out(&self, ty: &Type, ptr: u64) -> Result<HostTensor, BackendError> {
        let mut bytes = vec![0u8; ty.bytes()];
        // SAFETY: the memory holds this type.
        unsafe { self.device.read(ptr, &mut bytes)? };
        Ok(decode(&bytes, ty.dtype))
    }

    /// Chooses algorithms of products on noise in the areas, which hold nothing between runs.
    fn tune(&mut self, prepared: &mut Prepared) -> Result<(), BackendError> {
        if !prepared.untimed() {
            return Ok(());
        }
        let mut r = Recorder::default();
        for area in [&self.arena, &self.scratch] {
            k::noise(&mut r, area.ptr, area.bytes);
        }
        let noise = self.device.prepare(&r.commands, self.progress)?;
        // SAFETY: the areas have these sizes; the program was recorded with them.
        unsafe {
            self.device.run(&noise, 0..r.commands.len())?;
            self.device.tune(prepared, self.progress)?;
        }
        Ok(())
    }

    /// Loads a program but for its place among the others; `made` hears of memory as it is allocated.
    fn bind(&mut self, graph: Graph, plan: Plan, made: &mut Made) -> Result<Program, BackendError> {
        check_bounds(&graph, &plan)?;
        let target = self.target();
        for node in &graph.nodes {
            check_node(&graph, node, target)?;
        }
        let scratch = scratch_bytes(&graph, &plan, target);
        let grown = |area: &Area, bytes: usize| if bytes > area.bytes { bytes } else { 0 };
        let freed = |area: &Area, bytes: usize| if bytes > area.bytes { area.bytes } else { 0 };
        let key = |v: ValueId, e: &External| format!("{}:{}", e.word(), graph.value(v).name);
        let externals: Vec<(ValueId, &External)> = graph
            .value_ids()
            .filter_map(|v| graph.external(v).map(|e| (v, e)))
            .collect();
        let new_bytes: usize = externals
            .iter()
            .filter(|(v, e)| !is_shared(e) || !self.stored.contains_key(&key(*v, e)))
            .map(|(v, _)| room(graph.ty(*v)))
            .sum();
        let need = grown(&self.arena, plan.arena_bytes) + grown(&self.scratch, scratch) + new_bytes;
        let have = self.device.memory()?.0
            + freed(&self.arena, plan.arena_bytes)
            + freed(&self.scratch, scratch);
        if need > have {
            let largest = plan
                .largest_at_peak(&graph, 3)
                .iter()
                .map(|(path, ty, bytes)| format!("{path} {ty} {bytes} bytes"))
                .collect::<Vec<_>>()
                .join(", ");
            return Err(BackendError::OutOfMemory {
                need,
                have,
                largest: format!("{largest}, scratch {scratch} bytes"),
            });
        }
        let mut addresses = HashMap::new();
        let inputs = places(
            &graph,
            externals
                .iter()
                .filter(|(_, e)| **e == External::Input)
                .map(|(v, _)| (graph.value(*v).name.clone(), *v)),
        );
        let outputs = places(
            &graph,
            graph
                .outputs
                .iter()
                .filter(|(name, _)| !crate::stays(name))
                .cloned(),
        );
        let size = |list: &[(String, ValueId, Range<usize>)]| list.last().map_or(0, |l| l.2.end);
        let input_block = self.device.allocate(size(&inputs).max(LEAST))?;
        made.memory.push(input_block);
        for (_, v, place) in &inputs {
            addresses.insert(*v, input_block + place.start as u64);
        }
        for (v, e) in externals {
            let ty = graph.ty(v);
            let ptr = match e {
                External::Input => continue,
                External::Const(_) => {
                    let ptr = self.device.allocate(ty.bytes().max(LEAST))?;
                    made.memory.push(ptr);
                    ptr
                }
                External::Param
                | External::Master
                | External::Grad
                | External::Moment1
                | External::Moment2
                | External::State => {
                    let key = key(v, e);
                    let new = !self.stored.contains_key(&key);
                    let ptr = self.store(&key, ty)?;
                    if new {
                        made.keys.push(key);
                    }
                    ptr
                }
            };
            addresses.insert(v, ptr);
            match e {
                External::Const(data) => {
                    let host = match ty.dtype {
                        DType::I32 => HostTensor::I32(data.iter().map(|&x| x as i32).collect()),
                        DType::F32 | DType::Bf16 | DType::F16 | DType::E4m3 | DType::E5m2 => {
                            HostTensor::F32(data.clone())
                        }
                    };
                    self.copy_in(&graph.value(v).name, ty, ptr, &host)?;
                }
                External::Input
                | External::Param
                | External::Master
                | External::Grad
                | External::Moment1
                | External::Moment2
                | External::State => {}
            }
        }
        let staged = self.device.pinned(size(&inputs))?;
        let results = self.device.pinned(size(&outputs))?;
        Self::grow(&self.device, &mut self.arena, plan.arena_bytes)?;
        Self::grow(&self.device, &mut self.scratch, scratch)?;
        let at = (self.arena.ptr, self.scratch.ptr);
        let of = |v| address(&plan, at.0, &addresses, v);
        let (r, spans) = record(&graph, of, at.1, target);
        let mut prepared = self.device.prepare(&r.commands, self.progress)?;
        self.tune(&mut prepared)?;
        self.device.sync()?;
        Ok(Program {
            graph,
            plan,
            externals: addresses,
            input_block,
            inputs,
            staged,
            outputs,
            results,
            prepared,
            captured: None,
            runs: 0,
            spans,
            at,
            scratch_bytes: scratch,
        })
    }

    /// Gives back what a program that could not be loaded had allocated.
    fn undo(&mut self, made: Made) {
        let stored = made.keys.iter().filter_map(|key| self.stored.remove(key));
        let all: Vec<u64> = stored.map(|s| s.ptr).chain(made.memory).collect();
        for ptr in all {
            // SAFETY: allocated for the program alone, which never ran.
            unsafe { self.device.free(ptr) };
        }
    }

    /// Records a program again where memory has moved, and copies inputs in.
    fn begin(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
    ) -> Result<(), BackendError> {
        let target = self.target();
        let unknown = || BackendError::Unknown {
            name: format!("program {}", program.0),
        };
        let p = self.programs.get_mut(program.0).ok_or_else(unknown)?;
        // Areas are there unless a larger program failed to be loaded.
        Self::grow(&self.device, &mut self.arena, p.plan.arena_bytes)?;
        Self::grow(&self.device, &mut self.scratch, p.scratch_bytes)?;
        let at = (self.arena.ptr, self.scratch.ptr);
        if p.at != at {
            let of = |v| address(&p.plan, at.0, &p.externals, v);
            let (r, spans) = record(&p.graph, of, at.1, target);
            p.captured = None;
            p.prepared = self.device.prepare(&r.commands, self.progress)?;
            p.spans = spans;
            p.at = at;
        }
        for (name, v, place) in &p.inputs {
            let ty = p.graph.ty(*v);
            let wrong = |found| BackendError::WrongSize {
                name: format!("input:{name}"),
                found,
                expected: ty.to_string(),
            };
            let (_, data) = inputs
                .iter()
                .find(|(n, _)| n == name)
                .ok_or_else(|| wrong(0))?;
            match encode(data, ty.dtype) {
                Some(bytes) if data.len() == ty.len() => {
                    p.staged.bytes_mut()[place.clone()].copy_from_slice(&bytes);
                }
                _ => return Err(wrong(data.len())),
            }
        }
        // SAFETY: the block has the size of what is staged, which stays untouched until the run has ended.
        unsafe { self.device.write(p.input_block, p.staged.bytes())? };
        if self.poison {
            // SAFETY: the areas have these sizes.
            unsafe {
                self.device.fill(self.arena.ptr, 0xff, self.arena.bytes)?;
                self.device
                    .fill(self.scratch.ptr, 0xff, self.scratch.bytes)?;
            }
        }
        Ok(())
    }

    /// Runs node by node; `after` says whether to go on.
    fn walk(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
        mut after: impl FnMut(&CudaEngine, &Program, usize) -> Result<bool, BackendError>,
    ) -> Result<(), BackendError> {
        self.begin(program, inputs)?;
        let p = &self.programs[program.0];
        for (i, span) in p.spans.iter().enumerate() {
            // SAFETY: recorded with the current areas and externals, whose bounds were checked when the program was loaded.
            unsafe { self.device.run(&p.prepared, span.clone())? };
            if !after(self, p, i)? {
                break;
            }
        }
        Ok(())
    }

    fn value(&self, p: &Program, v: ValueId) -> Result<HostTensor, BackendError> {
        let ptr = address(&p.plan, self.arena.ptr, &p.externals, v);
        self.copy_out(p.graph.ty(v), ptr)
    }
}

impl Engine for CudaEngine {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn load(&mut self, graph: Graph, plan: Plan) -> Result<ProgramId, BackendError> {
        let mut made = Made::default();
        let program = self.bind(graph, plan, &mut made);
        match program {
            Ok(program) => {
                self.programs.push(program);
                Ok(ProgramId(self.programs.len() - 1))
            }
            Err(e) => {
                self.undo(made);
                Err(e)
            }
        }
    }

    fn run(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
    ) -> Result<Outputs, BackendError> {
        self.begin(program, inputs)?;
        let p = &mut self.programs[program.0];
        let all = 0..p.spans.last().map_or(0, |s| s.end);
        // SAFETY: recorded with the current areas and externals, whose bounds were checked when the program was loaded; what is captured
        // is dropped where the program is recorded again.
        unsafe {
            if self.graphs && p.runs > 0 && p.captured.is_none() && !all.is_empty() {
                p.captured = Some(self.device.capture(&p.prepared, all.clone())?);
            }
            match &p.captured {
                Some(captured) if self.graphs => self.device.replay(captured)?,
                _ => self.device.run(&p.prepared, all)?,
            }
        }
        p.runs += 1;
        for (_, v, place) in &p.outputs {
            let ptr = address(&p.plan, self.arena.ptr, &p.externals, *v);
            // SAFETY: the value has this size, and nothing else touches the bytes before the wait below.
            unsafe {
                let to = &mut p.results.bytes_mut()[place.clone()];
                self.device.read_later(ptr, to)?;
            }
        }
        // Also a program without outputs has ended, and has told its faults, when this returns.
        self.device.sync()?;
        let p = &self.programs[program.0];
        let mut outputs = Outputs::new();
        for (name, v, place) in &p.outputs {
            let host = decode(&p.results.bytes()[place.clone()], p.graph.ty(*v).dtype);
            outputs.insert(name.clone(), host);
        }
        Ok(outputs)
    }

    fn run_checked(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
    ) -> Result<Option<NonFinite>, BackendError> {
        let mut found = None;
        let look = |engine: &CudaEngine, p: &Program, i: usize| {
            let node = &p.graph.nodes[i];
            if p.spans[i].is_empty() {
                return Ok(true);
            }
            for (result, &v) in node.results.iter().enumerate() {
                let host = engine.value(p, v)?;
                let count = host.f32().iter().filter(|x| !x.is_finite()).count();
                if count == 0 {
                    continue;
                }
                let mut largest_arg = 0.0f32;
                for v in node.present_args() {
                    let host = engine.value(p, v)?;
                    let finite = host.f32().iter().filter(|x| x.is_finite());
                    largest_arg = finite.fold(largest_arg, |m, x| m.max(x.abs()));
                }
                found = Some(NonFinite {
                    node: i,
                    op: node.op.name(),
                    path: node.path.clone(),
                    result,
                    count,
                    largest_arg,
                });
                return Ok(false);
            }
            Ok(true)
        };
        self.walk(program, inputs, look)?;
        Ok(found)
    }

    fn profile(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
    ) -> Result<Vec<NodeTime>, BackendError> {
        self.begin(program, inputs)?;
        let p = &self.programs[program.0];
        // SAFETY: as in `run`.
        let times = unsafe { self.device.time(&p.prepared, &p.spans)? };
        let g = &p.graph;
        let of = |(node, secs): (&Node, f64)| {
            let args: Vec<Option<&Type>> = node.args.iter().map(|a| a.map(|v| g.ty(v))).collect();
            let results: Vec<&Type> = node.results.iter().map(|&v| g.ty(v)).collect();
            NodeTime {
                op: node.op.name(),
                path: node.path.clone(),
                secs,
                flops: node.op.flops(&args, &results),
            }
        };
        Ok(g.nodes.iter().zip(times).map(of).collect())
    }

    fn time(
        &mut self,
        programs: &[(ProgramId, &[(&str, HostTensor)])],
        runs: usize,
    ) -> Result<Vec<f64>, BackendError> {
        let mut captured = Vec::with_capacity(programs.len());
        for (program, inputs) in programs {
            self.begin(*program, inputs)?;
            let p = &self.programs[program.0];
            let all = 0..p.spans.last().map_or(0, |s| s.end);
            // SAFETY: as in `run`; what is captured is dropped before anything can move.
            unsafe {
                self.device.run(&p.prepared, all.clone())?;
                self.device.sync()?;
                if !all.is_empty() {
                    captured.push(self.device.capture(&p.prepared, all)?);
                }
            }
        }
        // SAFETY: captured above from programs that are still loaded.
        Ok(unsafe { self.device.time_replays(&captured, runs) }?)
    }

    fn copy_rate(&mut self) -> Result<f64, BackendError> {
        const BYTES: usize = 1 << 30;
        Ok(self.device.copy_rate(BYTES)?)
    }

    fn device(&self) -> String {
        self.device_name().to_string()
    }

    fn clear(&mut self) {
        CudaEngine::clear(self);
    }

    fn set_deterministic(&mut self, deterministic: bool) {
        self.deterministic = deterministic;
    }

    fn memory(&self) -> Option<DeviceMemory> {
        let (free, total) = self.device.memory().ok()?;
        Some(DeviceMemory {
            allocated: self.device.allocated(),
            in_use: total - free,
            total,
        })
    }

    fn write(&mut self, key: &str, ty: &Type, data: &HostTensor) -> Result<(), BackendError> {
        if data.len() != ty.len() {
            return Err(BackendError::WrongSize {
                name: key.to_string(),
                found: data.len(),
                expected: ty.to_string(),
            });
        }
        // An existing external keeps its precision: numbers from the host are rounded to it.
        let ty = match self.stored.get(key) {
            Some(s) if s.ty.len() == ty.len() => s.ty.clone(),
            Some(_) | None => ty.clone(),
        };
        let ptr = self.store(key, &ty)?;
        self.copy_in(key, &ty, ptr, data)
    }

    fn read(&self, key: &str) -> Result<HostTensor, BackendError> {
        let s = self.stored.get(key).ok_or_else(|| BackendError::Unknown {
            name: key.to_string(),
        })?;
        self.copy_out(&s.ty, s.ptr)
    }

    fn zero(&mut self, word: &str) {
        for (key, s) in &self.stored {
            if key.split_once(':').is_some_and(|(w, _)| w == word) {
                // SAFETY: the memory has this size. A device that fails here fails in the next run, which says so.
                let _ = unsafe { self.device.fill(s.ptr, 0, s.ty.bytes()) };
            }
        }
    }
}

impl Drop for CudaEngine {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use marimba_ir::op::Accumulate;
    use marimba_ir::{Phase, Place, dims};

    /// One launch takes neighbouring additions with one factor to apart places; what overlaps begins another, and every node keeps a span.
    #[test]
    fn additions_are_recorded_together() {
        let mut g = Graph::new();
        let mut input = |name: &str, kind, ty| g.add_external(kind, name, ty);
        let [a, b] = ["a", "b"].map(|n| input(n, External::Grad, Type::f32(dims![B 8, K 4])));
        let [beta, other] = ["beta", "other"].map(|n| input(n, External::Input, Type::scalar()));
        let x = input("x", External::Input, Type::f32(dims![B 3, K 4]));
        let at = Place {
            path: String::new(),
            block: None,
            phase: Phase::Backward,
        };
        let mut now = HashMap::from([(a, a), (b, b)]);
        for (into, start, factor) in [
            (a, 0, beta),
            (b, 2, beta),
            (a, 3, beta),
            (a, 5, beta),
            (b, 5, beta),
            (b, 0, other),
        ] {
            let args = vec![Some(now[&into]), Some(factor), Some(x)];
            let result = g.push(Accumulate { start, len: 3 }, args, &at).unwrap();
            now.insert(into, result[0]);
        }
        let plan = marimba_ir::plan(&g);
        let externals = (1..)
            .zip([a, b, beta, other, x])
            .map(|(i, v)| (v, i << 20))
            .collect();
        let of = |v| address(&plan, 0, &externals, v);
        let lengths: Vec<usize> = (0..g.nodes.len())
            .map(|i| sums_from(&g, of, i).len())
            .collect();
        // The fourth overlaps the third, the last has another factor.
        assert_eq!(lengths, [3, 2, 1, 2, 1, 1]);
        let (r, spans) = record(&g, of, 0, Target::default());
        assert_eq!(spans, [0..0, 0..0, 0..1, 1..1, 1..2, 2..3]);
        assert_eq!(r.commands.len(), 3);
    }
}
