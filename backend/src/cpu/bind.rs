//! Binding a planned graph to memory, and running its nodes there.
//!
//! What binding proves, once, so that running needs no checks: every value lies inside its memory and is f32 or i32, and within a node no
//! result overlaps another result or an argument that the op may read.

#![allow(unsafe_code)] // planned memory as slices; `check` is what makes it sound

use super::NodeTime;
use super::exec;
use super::halves::{self, Halves};
use super::memory::Buffer;
use super::tensor::{Args, Cx, Results, Slot, SlotMut};
use crate::{BackendError, HostTensor, NonFinite, Outputs};
use marimba_ir::op::Alias;
use marimba_ir::{DType, Def, External, Graph, Memory, Node, Plan, Type, ValueId};
use std::collections::HashMap;

/// Where a value lies.
#[derive(Clone, Copy)]
struct Loc {
    base: Base,
    /// In bytes.
    offset: usize,
    /// In elements.
    len: usize,
    dtype: DType,
}

/// Whose memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Base {
    Arena,
    /// Shared by the programs of an engine.
    Stored(usize),
    /// Inputs and constants of this program.
    Own(usize),
}

/// A node with its memory.
struct Bound {
    /// Absent where an argument is not given or is overwritten in place.
    args: Vec<Option<Loc>>,
    arg_types: Vec<Option<Type>>,
    results: Vec<Loc>,
    result_types: Vec<Type>,
    /// Runs nothing: the results are views.
    view: bool,
    /// Values in the arena that nothing reads after this node.
    dead: Vec<Loc>,
    /// Results stored in half precision.
    round: Vec<(Loc, DType)>,
}

/// A graph bound to memory.
pub(super) struct Program {
    graph: Graph,
    nodes: Vec<Bound>,
    /// Inputs: name, type, index in `own`, and the format they are stored in.
    inputs: Vec<(String, Type, usize, DType)>,
    own: Vec<Buffer>,
    outputs: Vec<(String, Loc)>,
}

/// First bytes of all memories during a run.
pub(super) struct Memories {
    arena: *mut u8,
    stored: Vec<*mut u8>,
    own: Vec<*mut u8>,
}

// SAFETY: only pointers; what may be read and written through them, and by whom, is decided where slices are made.
unsafe impl Send for Memories {}
// SAFETY: as above.
unsafe impl Sync for Memories {}

impl Memories {
    /// Of the engine that holds `program`, which the caller keeps to itself while it uses this.
    pub(super) fn new(arena: &Buffer, stored: &[*mut u8], program: &Program) -> Self {
        Memories {
            arena: arena.as_ptr(),
            stored: stored.to_vec(),
            own: program.own.iter().map(Buffer::as_ptr).collect(),
        }
    }

    fn at(&self, l: Loc) -> *mut u8 {
        let base = match l.base {
            Base::Arena => self.arena,
            Base::Stored(i) => self.stored[i],
            Base::Own(i) => self.own[i],
        };
        base.wrapping_add(l.offset)
    }

    fn slot<'a>(&'a self, l: Option<Loc>) -> Slot<'a> {
        let Some(l) = l else { return Slot::Absent };
        // SAFETY: `check` found the value inside its memory, which is initialised and aligned to 4 and lives through the run; nothing
        // writes it while this node runs.
        unsafe {
            match l.dtype {
                DType::I32 => Slot::I32(slice(self.at(l).cast(), l.len)),
                DType::F32 | DType::Bf16 | DType::F16 | DType::E4m3 | DType::E5m2 => {
                    Slot::F32(slice(self.at(l).cast(), l.len))
                }
            }
        }
    }

    /// # Safety
    /// No other slice of this value may be alive.
    unsafe fn slot_mut<'a>(&'a self, l: Loc) -> SlotMut<'a> {
        // SAFETY: as in `slot`, and the caller holds the only slice.
        unsafe {
            match l.dtype {
                DType::I32 => SlotMut::I32(slice_mut(self.at(l).cast(), l.len)),
                DType::F32 | DType::Bf16 | DType::F16 | DType::E4m3 | DType::E5m2 => {
                    SlotMut::F32(slice_mut(self.at(l).cast(), l.len))
                }
            }
        }
    }

    fn host(&self, l: Loc) -> HostTensor {
        match self.slot(Some(l)) {
            Slot::Absent => HostTensor::F32(Vec::new()),
            Slot::F32(x) => HostTensor::F32(x.to_vec()),
            Slot::I32(x) => HostTensor::I32(x.to_vec()),
        }
    }
}

/// # Safety
/// As [`std::slice::from_raw_parts`], but `start` may be anything when `len` is 0.
unsafe fn slice<'a, T>(start: *const T, len: usize) -> &'a [T] {
    if len == 0 {
        &[]
    } else {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(start, len) }
    }
}

/// # Safety
/// As [`std::slice::from_raw_parts_mut`], but `start` may be anything when `len` is 0.
unsafe fn slice_mut<'a, T>(start: *mut T, len: usize) -> &'a mut [T] {
    if len == 0 {
        &mut []
    } else {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }
}

/// Whether an external is shared by all programs of the engine; inputs and constants belong to one program.
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

/// Externals in the order of the graph's values.
fn externals(g: &Graph) -> impl Iterator<Item = (ValueId, &External)> {
    g.value_ids().filter_map(|v| g.external(v).map(|e| (v, e)))
}

/// Key and type of the externals that programs share, in the order of the graph's values.
pub(super) fn shared_externals(g: &Graph) -> Vec<(String, Type)> {
    externals(g)
        .filter(|(_, e)| is_shared(e))
        .map(|(v, e)| (format!("{}:{}", e.word(), g.value(v).name), g.ty(v).clone()))
        .collect()
}

/// Bytes that a value takes here: every element has 32 bits.
pub(super) fn memory_bytes(ty: &Type) -> usize {
    4 * ty.len()
}

/// Bytes of inputs and constants.
pub(super) fn own_bytes(g: &Graph) -> usize {
    externals(g)
        .filter(|(_, e)| !is_shared(e))
        .map(|(v, _)| g.ty(v).bytes())
        .sum()
}

/// The largest values at the peak, for an out-of-memory error.
pub(super) fn largest(g: &Graph, plan: &Plan) -> String {
    plan.largest_at_peak(g, 3)
        .iter()
        .map(|(path, ty, bytes)| format!("{path} {ty} {bytes} bytes"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// Requires an element type that this backend has.
pub(super) fn check_dtype(ty: &Type, op: &'static str, path: &str) -> Result<(), BackendError> {
    match ty.dtype {
        DType::F32 | DType::I32 => Ok(()),
        DType::Bf16 | DType::F16 | DType::E4m3 | DType::E5m2 => Err(BackendError::Unsupported {
            op,
            path: path.to_string(),
            backend: "cpu",
            why: format!("{ty} is not f32; set the precision to f32"),
        }),
    }
}

/// Copies numbers from the host.
pub(super) fn copy_in(
    to: &mut Buffer,
    ty: &Type,
    data: &HostTensor,
    name: &str,
) -> Result<(), BackendError> {
    let wrong = || BackendError::WrongSize {
        name: name.to_string(),
        found: data.len(),
        expected: ty.to_string(),
    };
    match (data, ty.dtype) {
        (HostTensor::F32(x), DType::F32) if x.len() == ty.len() => {
            to.f32_mut()[..x.len()].copy_from_slice(x)
        }
        (HostTensor::I32(x), DType::I32) if x.len() == ty.len() => {
            to.i32_mut()[..x.len()].copy_from_slice(x)
        }
        (HostTensor::F32(_) | HostTensor::I32(_), _) => return Err(wrong()),
    }
    Ok(())
}

/// Proves what running relies on. See the head of this file.
pub(super) fn check(g: &Graph, plan: &Plan) -> Result<(), BackendError> {
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
        let (op, path) = match g.producer(v) {
            Some(node) => (node.op.name(), node.path.as_str()),
            None => ("external", g.value(v).name.as_str()),
        };
        check_dtype(ty, op, path)?;
        let (space, offset) = match plan.of(v) {
            Memory::Arena { offset } => (plan.arena_bytes, offset),
            Memory::External { root, offset } => (g.ty(root).bytes(), offset),
        };
        let outside =
            offset.checked_add(ty.bytes()).is_none_or(|end| end > space) || offset % 4 != 0;
        if outside && !ty.is_empty() {
            return Err(bad(format!(
                "{v} {ty} at byte {offset} of {space} ({op} at {path})"
            )));
        }
    }
    for node in &g.nodes {
        if let Some((a, b)) = overlap(g, plan, node) {
            return Err(bad(format!(
                "{a} and {b} share bytes ({} at {})",
                node.op.name(),
                node.path
            )));
        }
    }
    Ok(())
}

/// Whether all results are views, so that nothing runs.
fn is_view(node: &Node) -> bool {
    !node.results.is_empty()
        && (0..node.results.len()).all(|k| matches!(node.alias(k), Some(Alias::View { .. })))
}

/// Whether argument `i` is overwritten by a result.
fn in_place(node: &Node, i: usize) -> bool {
    (0..node.results.len())
        .any(|k| matches!(node.alias(k), Some(Alias::InPlace { arg }) if arg == i))
}

/// Two values of a node of which one is written and which share bytes.
fn overlap(g: &Graph, plan: &Plan, node: &Node) -> Option<(ValueId, ValueId)> {
    if is_view(node) {
        return None;
    }
    // (memory, start, end, written, value) in order; externals come behind the arena.
    let mut ranges: Vec<(Option<ValueId>, usize, usize, bool, ValueId)> = Vec::new();
    let mut add = |v: ValueId, written: bool| {
        let (space, offset) = match plan.of(v) {
            Memory::Arena { offset } => (None, offset),
            Memory::External { root, offset } => (Some(root), offset),
        };
        if !g.ty(v).is_empty() {
            ranges.push((space, offset, offset + g.ty(v).bytes(), written, v));
        }
    };
    for (i, a) in node.args.iter().enumerate() {
        if let (Some(v), false) = (a, in_place(node, i)) {
            add(*v, false);
        }
    }
    for &v in &node.results {
        add(v, true);
    }
    ranges.sort_unstable();
    // The range of each kind that reaches furthest so far.
    let mut furthest: [Option<(usize, ValueId)>; 2] = [None, None];
    let mut space = None;
    for (s, start, end, written, v) in ranges {
        if s != space {
            (space, furthest) = (s, [None, None]);
        }
        let [read, write] = furthest;
        let hit = |f: Option<(usize, ValueId)>| {
            f.filter(|&(e, _)| e > start).map(|(_, other)| (other, v))
        };
        if let Some(pair) = hit(write).or_else(|| if written { hit(read) } else { None }) {
            return Some(pair);
        }
        let slot = &mut furthest[usize::from(written)];
        if slot.is_none_or(|(e, _)| end > e) {
            *slot = Some((end, v));
        }
    }
    None
}

impl Program {
    /// Binds a checked graph; `stored` are the engine's indices of [`shared_externals`], `halves` what was half precision before.
    pub(super) fn new(graph: Graph, plan: &Plan, stored: &[usize], half: &Halves) -> Self {
        let mut bases: HashMap<ValueId, Base> = HashMap::new();
        let (mut own, mut inputs) = (Vec::new(), Vec::new());
        let mut shared = stored.iter();
        for (v, e) in externals(&graph) {
            let base = if is_shared(e) {
                shared.next().map(|&i| Base::Stored(i))
            } else {
                let mut buffer = Buffer::zeroed(graph.ty(v).bytes());
                if let External::Const(data) = e {
                    match graph.ty(v).dtype {
                        DType::I32 => {
                            for (to, &x) in buffer.i32_mut().iter_mut().zip(data) {
                                *to = x as i32;
                            }
                        }
                        DType::F32 | DType::Bf16 | DType::F16 | DType::E4m3 | DType::E5m2 => {
                            for (to, &x) in buffer.f32_mut().iter_mut().zip(data) {
                                *to = x;
                            }
                            halves::round(half.of(v).unwrap_or(DType::F32), buffer.f32_mut());
                        }
                    }
                } else {
                    let ty = graph.ty(v).clone();
                    let stored = half.of(v).unwrap_or(ty.dtype);
                    inputs.push((graph.value(v).name.clone(), ty, own.len(), stored));
                }
                own.push(buffer);
                Some(Base::Own(own.len() - 1))
            };
            if let Some(base) = base {
                bases.insert(v, base);
            }
        }
        let loc = |v: ValueId| {
            let (base, offset) = match plan.of(v) {
                Memory::Arena { offset } => (Base::Arena, offset),
                Memory::External { root, offset } => (bases[&root], offset),
            };
            Loc {
                base,
                offset,
                len: graph.ty(v).len(),
                dtype: graph.ty(v).dtype,
            }
        };
        let mut dead = dying(&graph);
        let nodes = graph
            .nodes
            .iter()
            .enumerate()
            .map(|(n, node)| Bound {
                args: node
                    .args
                    .iter()
                    .enumerate()
                    .map(|(i, a)| a.filter(|_| !in_place(node, i)).map(loc))
                    .collect(),
                arg_types: node
                    .args
                    .iter()
                    .map(|a| a.map(|v| graph.ty(v).clone()))
                    .collect(),
                results: node.results.iter().map(|&v| loc(v)).collect(),
                result_types: node.results.iter().map(|&v| graph.ty(v).clone()).collect(),
                view: is_view(node),
                dead: std::mem::take(&mut dead[n]).into_iter().map(loc).collect(),
                round: node
                    .results
                    .iter()
                    .filter_map(|&v| Some((loc(v), half.of(v)?)))
                    .collect(),
            })
            .collect();
        let outputs = graph
            .outputs
            .iter()
            .filter(|(name, _)| !crate::stays(name))
            .map(|(name, v)| (name.clone(), loc(*v)))
            .collect();
        Program {
            nodes,
            inputs,
            own,
            outputs,
            graph,
        }
    }

    /// Number of nodes.
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Copies the inputs in; all must be given, more may be.
    pub(super) fn write_inputs(
        &mut self,
        given: &[(&str, HostTensor)],
    ) -> Result<(), BackendError> {
        for (name, ty, i, stored) in &self.inputs {
            let (_, data) =
                given
                    .iter()
                    .find(|(n, _)| n == name)
                    .ok_or_else(|| BackendError::WrongSize {
                        name: format!("input:{name}"),
                        found: 0,
                        expected: ty.to_string(),
                    })?;
            copy_in(&mut self.own[*i], ty, data, name)?;
            halves::round(*stored, self.own[*i].f32_mut());
        }
        Ok(())
    }

    /// Runs node `i`.
    pub(super) fn run_node(&self, i: usize, memories: &Memories, cx: &Cx) {
        let bound = &self.nodes[i];
        if bound.view {
            return;
        }
        let args: Vec<Slot> = bound.args.iter().map(|&l| memories.slot(l)).collect();
        // SAFETY: the engine that owns all memories is borrowed for the run and runs one node at a time, so the only other slices are
        // those of this node; `check` found that no result shares bytes with another result or a given argument.
        let results: Vec<SlotMut> = bound
            .results
            .iter()
            .map(|&l| unsafe { memories.slot_mut(l) })
            .collect();
        let node = &self.graph.nodes[i];
        exec::call(
            &node.op,
            &Args {
                slots: &args,
                types: &bound.arg_types,
            },
            &mut Results {
                slots: results,
                types: &bound.result_types,
            },
            cx,
        );
        for &(l, dtype) in &bound.round {
            // SAFETY: the slices of the call are gone, and this is the only one now.
            match unsafe { memories.slot_mut(l) } {
                SlotMut::F32(x) => halves::round(dtype, x),
                SlotMut::Taken | SlotMut::I32(_) => {}
            }
        }
    }

    /// Overwrites with NaN what nothing reads after node `i`.
    pub(super) fn poison_dead(&self, i: usize, memories: &Memories) {
        for &l in &self.nodes[i].dead {
            // SAFETY: no node runs, so no other slice of the engine's memory is alive.
            match unsafe { memories.slot_mut(l) } {
                SlotMut::Taken => {}
                SlotMut::F32(x) => x.fill(f32::NAN),
                SlotMut::I32(x) => x.fill(f32::NAN.to_bits() as i32),
            }
        }
    }

    /// The first result of node `i` that is not finite.
    pub(super) fn non_finite(&self, i: usize, memories: &Memories) -> Option<NonFinite> {
        let bound = &self.nodes[i];
        if bound.view {
            return None;
        }
        let count = |l: Loc| match memories.slot(Some(l)) {
            Slot::F32(x) => x.iter().filter(|v| !v.is_finite()).count(),
            Slot::I32(_) | Slot::Absent => 0,
        };
        let (result, count) = bound
            .results
            .iter()
            .map(|&l| count(l))
            .enumerate()
            .find(|(_, n)| *n > 0)?;
        let largest_arg = bound
            .args
            .iter()
            .map(|&l| match memories.slot(l) {
                Slot::F32(x) => x
                    .iter()
                    .filter(|v| v.is_finite())
                    .fold(0.0f32, |m, v| m.max(v.abs())),
                Slot::I32(_) | Slot::Absent => 0.0,
            })
            .fold(0.0, f32::max);
        let node = &self.graph.nodes[i];
        Some(NonFinite {
            node: i,
            op: node.op.name(),
            path: node.path.clone(),
            result,
            count,
            largest_arg,
        })
    }

    /// Time of node `i`.
    pub(super) fn node_time(&self, i: usize, secs: f64) -> NodeTime {
        let node = &self.graph.nodes[i];
        let args: Vec<Option<&Type>> = node
            .args
            .iter()
            .map(|a| a.map(|v| self.graph.ty(v)))
            .collect();
        let results: Vec<&Type> = node.results.iter().map(|&v| self.graph.ty(v)).collect();
        NodeTime {
            op: node.op.name(),
            path: node.path.clone(),
            secs,
            flops: node.op.flops(&args, &results),
        }
    }

    /// Copies of the outputs; gradient outputs stay.
    pub(super) fn outputs(&self, memories: &Memories) -> Outputs {
        self.outputs
            .iter()
            .map(|(name, l)| (name.clone(), memories.host(*l)))
            .collect()
    }
}

/// For each node, the values with memory of their own in the arena that nothing uses after it.
fn dying(g: &Graph) -> Vec<Vec<ValueId>> {
    let mut last: HashMap<ValueId, usize> = HashMap::new();
    for (i, node) in g.nodes.iter().enumerate() {
        for v in node.present_args().chain(node.results.iter().copied()) {
            last.insert(g.root(v), i);
        }
    }
    for (_, v) in &g.outputs {
        last.remove(&g.root(*v));
    }
    let mut dying = vec![Vec::new(); g.nodes.len()];
    for v in g.value_ids() {
        if let (Some(&i), Def::Node { .. }) = (last.get(&v), &g.value(v).def) {
            dying[i].push(v);
        }
    }
    dying
}
