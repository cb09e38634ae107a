//! Speed of ops, steps and blocks through an engine, beside ceilings that are measured on the same engine.
//!
//! Every case is a graph: lowered or built, differentiated, run through the passes, planned and loaded like a model. Two kinds of rows come
//! out: the whole program, timed as it runs in training (on a GPU replayed as a CUDA graph, by device events), and each op of it, timed node by
//! node. Operations and bytes are those of the graph's own cost fold, which counts what is added to as read and written; gradient buffers are
//! written as in the first micro-batch of a step, which does not read them, so that adding up may exceed the rate of a copy. Runs rotate among sets of memory too large for a cache to keep.

pub mod cases;

use crate::data::rng::Rng;
use crate::program::CompileError;
pub use cases::{Case, Size, cases};
use cases::{Fill, Passes, numbers};
use marimba_backend::{BackendError, Engine, HostTensor, ProgramId};
use marimba_ir::op::{Alias, Linear, Op};
use marimba_ir::pass::{self, PassError};
use marimba_ir::{
    DType, External, Graph, Phase, Place, Type, TypeError, cost, differentiate_from, dims, plan,
};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Memory of all sets together that no cache holds.
const ROTATED_BYTES: usize = 256 << 20;

/// Most sets of memory.
const MOST_SETS: usize = 8;

/// Normal deviates that all memory is filled from: a prime number of them, so that no row repeats another.
const DEVIATES: usize = 1_048_583;

/// Fewest timed runs of a program.
const FEWEST_RUNS: usize = 3;

/// Most of them.
const MOST_RUNS: usize = 200;

/// What can stop a measurement.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A case is ill-typed.
    #[error(transparent)]
    Type(#[from] TypeError),
    /// A program does not compile.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// A pass is wrong.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// The backend refused.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A model of a case is not valid.
    #[error("the model of a case is not valid: {0}")]
    Model(String),
}

/// What the device can do at most.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ceilings {
    /// Rate of a large square matrix product, FLOP/s.
    pub matmul_flops_per_sec: f64,
    /// Rate of a large copy, bytes read and written a second.
    pub copy_bytes_per_sec: f64,
}

impl Ceilings {
    /// The better of two measurements.
    pub fn max(self, other: Ceilings) -> Ceilings {
        Ceilings {
            matmul_flops_per_sec: self.matmul_flops_per_sec.max(other.matmul_flops_per_sec),
            copy_bytes_per_sec: self.copy_bytes_per_sec.max(other.copy_bytes_per_sec),
        }
    }

    /// The time that no program of these operations and bytes goes below, and whether products or bytes bound it.
    pub fn floor(&self, flops: f64, bytes: f64) -> (f64, Bound) {
        let products = flops / self.matmul_flops_per_sec;
        let moves = bytes / self.copy_bytes_per_sec;
        if products > moves {
            (products, Bound::Flops)
        } else {
            (moves, Bound::Bytes)
        }
    }
}

/// Which ceiling is the lower one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// The rate of matrix products.
    Flops,
    /// The rate of copies.
    Bytes,
}

/// One measured thing.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What the case is about.
    pub subject: String,
    /// Its shape.
    pub shape: String,
    /// `forward`, `forward + backward`, `update`, or the name of an op within.
    pub what: String,
    /// Whether this is one op of the program, timed node by node, rather than the program.
    pub is_op: bool,
    /// How many nodes were run.
    pub nodes: usize,
    /// Median.
    pub secs: f64,
    /// Fastest run.
    pub secs_min: f64,
    /// Timed runs.
    pub runs: usize,
    /// Operations by the graph.
    pub flops: f64,
    /// Bytes by the graph: arguments read and results written once.
    pub bytes: f64,
    /// The same program on the reference backend, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference_secs: Option<f64>,
}

/// A row and the ceilings.
#[derive(Clone, Debug, Serialize)]
pub struct Rated {
    /// What was measured.
    #[serde(flatten)]
    pub row: Row,
    /// Operations a second.
    pub flops_per_sec: f64,
    /// Bytes a second.
    pub bytes_per_sec: f64,
    /// The time that the ceilings allow.
    pub floor_secs: f64,
    /// Which ceiling that is.
    pub bound: Bound,
    /// `floor_secs` over the median: 1 is as fast as the ceilings allow.
    pub fraction: f64,
}

impl Row {
    /// Beside the ceilings.
    pub fn rated(self, ceilings: &Ceilings) -> Rated {
        let (floor_secs, bound) = ceilings.floor(self.flops, self.bytes);
        Rated {
            flops_per_sec: self.flops / self.secs,
            bytes_per_sec: self.bytes / self.secs,
            floor_secs,
            bound,
            fraction: floor_secs / self.secs,
            row: self,
        }
    }
}

/// Measures the ceilings: a square product of 8192 rows on a device with memory of its own, of 1024 elsewhere, and a copy; the best of many.
///
/// # Errors
/// [`BenchError`].
pub fn ceilings(engine: &mut dyn Engine, dtype: DType) -> Result<Ceilings, BenchError> {
    const RUNS: usize = 20;
    let n = if engine.memory().is_some() {
        8192
    } else {
        1024
    };
    let ty = |rows| Type::new(dtype, vec![rows, dims![D n][0]]);
    let mut g = Graph::new();
    let at = Place {
        path: "bench".into(),
        block: None,
        phase: Phase::Forward,
    };
    let x = g.add_external(External::Param, "bench.x", ty(dims![R n][0]));
    let w = g.add_external(External::Param, "bench.w", ty(dims![D n][0]));
    let y = g.push(Linear, vec![Some(x), Some(w), None], &at)?[0];
    g.outputs.push(("grad:bench".into(), y));
    let noise = deviates();
    for (i, name) in ["bench.x", "bench.w"].into_iter().enumerate() {
        let data = numbers(&Fill::Normal(1.0, 0.0), n * n, &noise, 1000 * i);
        let data = HostTensor::F32(data);
        engine.write(&format!("param:{name}"), &ty(dims![R n][0]), &data)?;
    }
    let memory = plan(&g);
    let program = engine.load(g, memory)?;
    let times = engine.time(&[(program, &[])], RUNS)?;
    let best = times.into_iter().fold(f64::INFINITY, f64::min);
    engine.clear();
    Ok(Ceilings {
        matmul_flops_per_sec: 2.0 * (n as f64).powi(3) / best,
        copy_bytes_per_sec: engine.copy_rate()?,
    })
}

/// Normal deviates (Box and Muller).
pub(crate) fn deviates() -> Vec<f32> {
    let mut rng = Rng::new(&[0]);
    let mut draw = || {
        let u = 1.0 - rng.unit();
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * rng.unit()).cos()) as f32
    };
    (0..DEVIATES).map(|_| draw()).collect()
}

/// How a case is measured.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// About how long each row is timed.
    pub seconds: f64,
    /// Whether backward passes are run too.
    pub backward: bool,
    /// Whether ops are timed one by one too.
    pub by_op: bool,
    /// Whether runs rotate among sets of memory.
    pub rotate: bool,
}

impl Case {
    /// The same with the products of projections in 8 bits where that pays.
    pub fn in_fp8(mut self, fp8: bool) -> Self {
        self.graph.fp8 = fp8;
        self
    }

    /// Names of the ops that run, with the backward pass; views of memory, which run nothing, apart.
    ///
    /// # Errors
    /// [`BenchError`]: a bug.
    pub fn ops(&self) -> Result<(BTreeSet<&'static str>, BTreeSet<&'static str>), BenchError> {
        let (mut ops, mut views) = (BTreeSet::new(), BTreeSet::new());
        for backward in [false, true] {
            for node in &self.program(backward)?.nodes {
                if is_view(&node.op) {
                    views.insert(node.op.name());
                } else {
                    ops.insert(node.op.name());
                }
            }
        }
        Ok((ops, views))
    }

    /// The graph as it is loaded.
    fn program(&self, backward: bool) -> Result<Graph, BenchError> {
        let mut g = self.graph.clone();
        if backward && !self.seeds.is_empty() {
            differentiate_from(&mut g, &self.seeds, &self.of)?;
        }
        let fuse = match self.passes {
            Passes::All => true,
            Passes::Plain => false,
            Passes::None => return Ok(g),
        };
        let config = pass::Config {
            fuse,
            ..pass::Config::default()
        };
        Ok(pass::run_passes(&g, &config)?)
    }

    fn inputs(&self) -> Vec<(&str, HostTensor)> {
        let own = self.inputs.iter().map(|(n, d)| (n.as_str(), d.clone()));
        own.chain([("grad_keep", HostTensor::F32(vec![0.0]))])
            .collect()
    }

    /// Measures it on an engine that holds nothing else, which is cleared afterwards.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn measure(
        &self,
        engine: &mut dyn Engine,
        noise: &[f32],
        settings: &Settings,
    ) -> Result<Vec<Row>, BenchError> {
        let measured = self.rows(engine, noise, settings);
        engine.clear();
        measured
    }

    fn rows(
        &self,
        engine: &mut dyn Engine,
        noise: &[f32],
        settings: &Settings,
    ) -> Result<Vec<Row>, BenchError> {
        let stored: usize = self.fills.keys().map(|&v| self.graph.ty(v).bytes()).sum();
        let sets = ROTATED_BYTES
            .div_ceil(stored.max(1))
            .clamp(1, if settings.rotate { MOST_SETS } else { 1 });
        for set in 0..sets {
            for (i, (&v, fill)) in self.fills.iter().enumerate() {
                let (ty, value) = (self.graph.ty(v), self.graph.value(v));
                let word = self.graph.external(v).map_or("", External::word);
                let data = numbers(fill, ty.len(), noise, 7919 * (set * 64 + i));
                let key = format!("{word}:{}", name_in(set, &value.name));
                engine.write(&key, ty, &HostTensor::F32(data))?;
            }
        }
        let inputs = self.inputs();
        let mut rows = Vec::new();
        let backward = settings.backward && !self.seeds.is_empty();
        for both in [false, true].into_iter().take(1 + usize::from(backward)) {
            let graph = self.program(both)?;
            let programs = (0..sets)
                .map(|set| {
                    let g = renamed(&graph, set);
                    let memory = plan(&g);
                    Ok((engine.load(g, memory)?, inputs.as_slice()))
                })
                .collect::<Result<Vec<(ProgramId, &[(&str, HostTensor)])>, BackendError>>()?;
            let first = engine.time(&programs, 1)?;
            let runs = runs_in(settings.seconds, first.first().copied().unwrap_or(0.0));
            let times = engine.time(&programs, runs.max(programs.len()))?;
            let costs = cost::costs(&graph);
            let shown = graph.nodes.iter().filter(|n| !is_view(&n.op)).count();
            let what = match (both, self.passes) {
                (true, _) => "forward + backward",
                (false, Passes::None) => "update",
                (false, Passes::All | Passes::Plain) => "forward",
            };
            rows.push(self.row(
                what,
                false,
                shown,
                times,
                costs.total_flops(),
                costs.moved_bytes,
            ));
            if settings.by_op {
                // An op of both programs is shown once.
                let later = match backward && !both {
                    true => self.program(true)?.nodes,
                    false => Vec::new(),
                };
                let shown = |op: &str| later.iter().all(|n| n.op.name() != op);
                let runs = runs.min(20).max(programs.len());
                rows.extend(self.op_rows(engine, &graph, &programs, runs, shown)?);
            }
        }
        Ok(rows)
    }

    fn op_rows(
        &self,
        engine: &mut dyn Engine,
        graph: &Graph,
        programs: &[(ProgramId, &[(&str, HostTensor)])],
        runs: usize,
        shown: impl Fn(&str) -> bool,
    ) -> Result<Vec<Row>, BenchError> {
        let mut seen = BTreeSet::new();
        let names = graph.nodes.iter().filter(|n| !is_view(&n.op));
        let names: Vec<&'static str> = names
            .map(|n| n.op.name())
            .filter(|name| shown(name) && seen.insert(*name))
            .collect();
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let mut times: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
        for (program, inputs) in programs.iter().cycle().take(runs) {
            let mut one: BTreeMap<&'static str, f64> = BTreeMap::new();
            for node in engine.profile(*program, inputs)? {
                *one.entry(node.op).or_default() += node.secs;
            }
            for (op, secs) in one {
                times.entry(op).or_default().push(secs);
            }
        }
        let mut rows = Vec::new();
        for name in names {
            let same: Vec<_> = graph.nodes.iter().filter(|n| n.op.name() == name).collect();
            let flops = same.iter().map(|n| cost::node_flops(graph, n)).sum();
            let bytes = same.iter().map(|n| cost::node_bytes(graph, n)).sum();
            if let Some(times) = times.remove(name) {
                rows.push(self.row(name, true, same.len(), times, flops, bytes));
            }
        }
        Ok(rows)
    }

    fn row(
        &self,
        what: &str,
        is_op: bool,
        nodes: usize,
        mut times: Vec<f64>,
        flops: f64,
        bytes: f64,
    ) -> Row {
        times.sort_by(f64::total_cmp);
        Row {
            subject: self.subject.into(),
            shape: self.shape.clone(),
            what: what.into(),
            is_op,
            nodes,
            secs: times.get(times.len() / 2).copied().unwrap_or(f64::NAN),
            secs_min: times.first().copied().unwrap_or(f64::NAN),
            runs: times.len(),
            flops,
            bytes,
            reference_secs: None,
        }
    }

    /// Seconds of the forward program on another engine, in f32.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn forward_secs(
        &self,
        engine: &mut dyn Engine,
        noise: &[f32],
        seconds: f64,
    ) -> Result<f64, BenchError> {
        let settings = Settings {
            seconds,
            backward: false,
            by_op: false,
            rotate: false,
        };
        let rows = self.measure(engine, noise, &settings)?;
        Ok(rows.first().map_or(f64::NAN, |r| r.secs))
    }
}

/// Fills the stored values of a graph: parameters as a model starts, but with deviates that repeat; states with zeros.
///
/// # Errors
/// [`BenchError`].
pub fn fill(engine: &mut dyn Engine, g: &Graph) -> Result<(), BenchError> {
    let noise = deviates();
    for (i, p) in g.params.iter().enumerate() {
        let fill = Fill::Init(Box::new(p.clone()));
        let data = HostTensor::F32(numbers(&fill, p.ty.len(), &noise, 7919 * i));
        let ty = p.ty.with_dtype(p.compute);
        engine.write(&format!("param:{}", p.name), &ty, &data)?;
    }
    Ok(())
}

/// How many runs fill so many seconds, within limits.
pub(crate) fn runs_in(seconds: f64, one: f64) -> usize {
    ((seconds / one.max(1e-9)) as usize).clamp(FEWEST_RUNS, MOST_RUNS)
}

/// Whether an op gives a view of its argument and runs nothing.
fn is_view(op: &Op) -> bool {
    matches!(op.alias(0), Some(Alias::View { .. }))
}

fn name_in(set: usize, name: &str) -> String {
    format!("{name}@{set}")
}

/// The graph over the memory of a set.
fn renamed(g: &Graph, set: usize) -> Graph {
    let mut g = g.clone();
    for v in g.value_ids() {
        let shared = match g.external(v) {
            Some(External::Input | External::Const(_)) | None => false,
            Some(
                External::Param
                | External::Master
                | External::Grad
                | External::Moment1
                | External::Moment2
                | External::State,
            ) => true,
        };
        if shared {
            let value = &mut g.values[v.index()];
            value.name = name_in(set, &value.name);
        }
    }
    for p in &mut g.params {
        p.name = name_in(set, &p.name);
    }
    for (name, _) in &mut g.outputs {
        *name = name_in(set, name);
    }
    g
}
