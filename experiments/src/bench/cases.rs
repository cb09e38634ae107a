//! What `marimba bench ops` runs: every op of the graph at representative shapes, as small graphs of their own.
//!
//! A case is a forward graph, the results that carry a gradient, and what to fill its memory with. Its backward pass is the one that
//! differentiation appends, so that backward ops need no cases; blocks (a mixer, a layer of experts) are lowered from models of one layer.
//! What the cases leave out shows in a test that counts ops.

use super::BenchError;
use crate::init;
use crate::program;
use marimba_backend::HostTensor;
use marimba_dsl::run::AdamW;
use marimba_dsl::{Source, parse_model};
use marimba_ir::lower::{Half, lower_half};
use marimba_ir::op::*;
use marimba_ir::{
    DType, Dim, External, Graph, Letter, Options, Param, ParamInit, Phase, Place, Type, ValueId,
    dims,
};
use std::collections::BTreeMap;

/// How large cases are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// A few numbers: for tests.
    Tiny,
    /// A model of width 256: for CPUs and for the reference.
    Small,
    /// Models of width 4096 and 16,384 tokens: for GPUs.
    Full,
}

impl Size {
    fn of(self, each: [usize; 3]) -> usize {
        each[self as usize]
    }
}

/// What memory holds.
#[derive(Clone, Debug)]
pub(super) enum Fill {
    /// Normal deviates times a factor, plus a shift.
    Normal(f32, f32),
    /// As a model starts.
    Init(Box<Param>),
}

/// What is done to a graph before it is planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passes {
    /// All passes, as for training.
    All,
    /// The passes without fusion.
    Plain,
    /// None: the graph is as programs run it.
    None,
}

/// One graph to run.
#[derive(Clone, Debug)]
pub struct Case {
    /// The op, or the block, that it is about.
    pub subject: &'static str,
    /// Its shape in words.
    pub shape: String,
    pub(super) graph: Graph,
    /// Results, and their gradients.
    pub(super) seeds: Vec<(ValueId, ValueId)>,
    /// Externals whose gradient is wanted and that are no parameters.
    pub(super) of: Vec<ValueId>,
    pub(super) fills: BTreeMap<ValueId, Fill>,
    pub(super) inputs: Vec<(String, HostTensor)>,
    pub(super) passes: Passes,
}

fn place() -> Place {
    Place {
        path: "bench".into(),
        block: None,
        phase: Phase::Forward,
    }
}

const UNIT: Fill = Fill::Normal(1.0, 0.0);

/// Builds a case.
struct Builder {
    graph: Graph,
    dtype: DType,
    fills: BTreeMap<ValueId, Fill>,
    of: Vec<ValueId>,
    inputs: Vec<(String, HostTensor)>,
}

type Arg = Option<ValueId>;

impl Builder {
    fn new(dtype: DType) -> Self {
        Builder {
            graph: Graph::new(),
            dtype,
            fills: BTreeMap::new(),
            of: Vec::new(),
            inputs: Vec::new(),
        }
    }

    fn stored(&mut self, kind: External, name: &str, ty: Type, fill: Fill) -> ValueId {
        let v = self.graph.add_external(kind, name, ty);
        self.fills.insert(v, fill);
        v
    }

    /// An activation, in the type of activations; its gradient is wanted.
    fn x(&mut self, name: &str, dims: Vec<Dim>) -> Arg {
        self.x_by(name, dims, 1.0)
    }

    fn x_by(&mut self, name: &str, dims: Vec<Dim>, scale: f32) -> Arg {
        let ty = Type::new(self.dtype, dims);
        let v = self.stored(External::Param, name, ty, Fill::Normal(scale, 0.0));
        self.of.push(v);
        Some(v)
    }

    /// Numbers in f32; their gradient is wanted.
    fn float(&mut self, name: &str, dims: Vec<Dim>, scale: f32, shift: f32) -> Arg {
        let fill = Fill::Normal(scale, shift);
        let v = self.stored(External::Param, name, Type::f32(dims), fill);
        self.of.push(v);
        Some(v)
    }

    /// A parameter that is trained: its gradient is added up in a buffer.
    fn param(&mut self, name: &str, ty: Type, scale: f32) -> Arg {
        self.graph.params.push(Param {
            name: name.into(),
            ty: ty.with_dtype(DType::F32),
            compute: ty.dtype,
            init: ParamInit::Zeros,
            decay: true,
            trainable: true,
            active: (1, 1),
            path: "bench".into(),
        });
        Some(self.stored(External::Param, name, ty, Fill::Normal(scale, 0.0)))
    }

    /// A matrix `[n, k]` that is trained.
    fn matrix(&mut self, name: &str, dims: Vec<Dim>) -> Arg {
        let k = dims.last().map_or(1, |d| d.size);
        let ty = Type::new(self.dtype, dims);
        self.param(name, ty, (k as f32).powf(-0.5))
    }

    /// What a step carries to the next.
    fn state(&mut self, name: &str, ty: Type) -> Arg {
        Some(self.stored(External::State, name, ty, UNIT))
    }

    fn ints(&mut self, name: &str, dims: Vec<Dim>, data: Vec<i32>) -> Arg {
        self.inputs.push((name.into(), HostTensor::I32(data)));
        let ty = Type::i32(dims);
        Some(self.graph.add_external(External::Input, name, ty))
    }

    fn floats(&mut self, name: &str, dims: Vec<Dim>, data: Vec<f32>) -> Arg {
        self.inputs.push((name.into(), HostTensor::F32(data)));
        let ty = Type::f32(dims);
        Some(self.graph.add_external(External::Input, name, ty))
    }

    /// Positions of whole rows, from `from` on.
    fn pos(&mut self, b: usize, t: usize, from: usize) -> Arg {
        self.ints("pos", dims![B b, T t], positions(b, t, from))
    }

    fn case(
        mut self,
        subject: &'static str,
        shape: String,
        op: impl Into<Op>,
        args: Vec<Arg>,
        seeds: &[usize],
    ) -> Result<Case, BenchError> {
        let results = self.graph.push(op, args, &place())?;
        let seeds = seeds.iter().map(|&i| self.seed(results[i], i)).collect();
        for (i, &v) in results.iter().enumerate() {
            self.graph.outputs.push((format!("state:result{i}"), v));
        }
        Ok(Case {
            subject,
            shape,
            graph: self.graph,
            seeds,
            of: self.of,
            fills: self.fills,
            inputs: self.inputs,
            passes: Passes::All,
        })
    }

    /// A result with its gradient: 1 of a loss, else deviates.
    fn seed(&mut self, v: ValueId, i: usize) -> (ValueId, ValueId) {
        let ty = self.graph.ty(v).clone();
        if ty == Type::scalar() {
            let one = External::Const(vec![1.0]);
            return (v, self.graph.add_external(one, "one", ty));
        }
        let name = format!("d_result{i}");
        (v, self.stored(External::Param, &name, ty, UNIT))
    }
}

fn positions(b: usize, t: usize, from: usize) -> Vec<i32> {
    (0..b * t).map(|i| (from + i % t) as i32).collect()
}

/// Integers below `n` without order (a multiplicative sequence).
fn ids(count: usize, n: usize) -> Vec<i32> {
    (0..count as u64)
        .map(|i| (crate::data::rng::mix(i) % n as u64) as i32)
        .collect()
}

/// All cases of a size, with activations and matrices of this type.
///
/// # Errors
/// [`BenchError`]: a bug.
pub fn cases(size: Size, dtype: DType) -> Result<Vec<Case>, BenchError> {
    let (b, t) = (size.of([1, 2, 4]), size.of([9, 256, 4096]));
    let mut all = vec![
        selective_scan(size, dtype, b, t)?,
        selective_scan_step(size, dtype)?,
        ssd(size, dtype, b, t)?,
        ssd_step(size, dtype)?,
        causal_conv1d(size, dtype, b, t)?,
        causal_conv1d_step(size, dtype)?,
        attention(size, dtype, b, t)?,
    ];
    if size == Size::Full {
        all.push(attention(size, dtype, 1, 32768)?);
    }
    all.extend([
        attention_step(size, dtype)?,
        gated_delta(size, dtype, b, t)?,
        gated_delta_step(size, dtype)?,
        head(size, dtype, b, t)?,
        head_in_two(size, dtype)?,
        experts(size, dtype, b, t)?,
        mixer("mamba2", size, dtype, b, t)?,
        mixer("mamba1", size, dtype, b, t)?,
    ]);
    all.extend(small_ops(size, dtype, b, t)?);
    Ok(all)
}

fn selective_scan(size: Size, dtype: DType, b: usize, t: usize) -> Result<Case, BenchError> {
    let (i, n) = (size.of([6, 512, 8192]), size.of([3, 16, 16]));
    let mut g = Builder::new(dtype);
    let args = vec![
        g.x("x", dims![B b, T t, I i]),
        g.x("dt", dims![B b, T t, I i]),
        g.float("a", dims![I i, N n], 0.5, -4.0),
        g.x_by("b", dims![B b, T t, G 1, N n], 0.5),
        g.x_by("c", dims![B b, T t, G 1, N n], 0.5),
        g.float("d", dims![I i], 1.0, 0.0),
        // Steps of about 0.02, as models start with.
        g.float("dt_bias", dims![I i], 0.0, -4.0),
        g.x("z", dims![B b, T t, I i]),
        g.pos(b, t, 0),
        None,
    ];
    // As Mamba-1 is lowered.
    let chunk = size.of([4, 32, 32]);
    let shape = format!("B{b} T{t} I{i} N{n}, gated");
    g.case("selective_scan", shape, SelectiveScan { chunk }, args, &[0])
}

fn selective_scan_step(size: Size, dtype: DType) -> Result<Case, BenchError> {
    let (b, i, n) = (
        size.of([2, 4, 64]),
        size.of([6, 512, 8192]),
        size.of([3, 16, 16]),
    );
    let mut g = Builder::new(dtype);
    let args = vec![
        g.x("x", dims![B b, T 1, I i]),
        g.x("dt", dims![B b, T 1, I i]),
        g.float("a", dims![I i, N n], 0.5, -4.0),
        g.x_by("b", dims![B b, T 1, G 1, N n], 0.5),
        g.x_by("c", dims![B b, T 1, G 1, N n], 0.5),
        g.float("d", dims![I i], 1.0, 0.0),
        g.float("dt_bias", dims![I i], 0.0, -4.0),
        g.x("z", dims![B b, T 1, I i]),
        g.pos(b, 1, 7),
        g.state("h", Type::f32(dims![B b, I i, N n])),
    ];
    let op = SelectiveScan { chunk: 64 };
    let shape = format!("step, B{b} I{i} N{n}, gated");
    g.case("selective_scan", shape, op, args, &[])
}

fn ssd_sizes(size: Size) -> (usize, usize, usize) {
    (
        size.of([2, 4, 128]),
        size.of([4, 64, 64]),
        size.of([3, 64, 128]),
    )
}

fn ssd(size: Size, dtype: DType, b: usize, t: usize) -> Result<Case, BenchError> {
    let (h, p, n) = ssd_sizes(size);
    let mut g = Builder::new(dtype);
    let args = vec![
        g.x("x", dims![B b, T t, H h, P p]),
        g.x("dt", dims![B b, T t, H h]),
        g.float("a", dims![H h], 0.1, -1.0),
        g.x_by("b", dims![B b, T t, G 1, N n], 0.3),
        g.x_by("c", dims![B b, T t, G 1, N n], 0.3),
        g.float("d", dims![H h], 1.0, 0.0),
        g.float("dt_bias", dims![H h], 0.0, -4.0),
        g.pos(b, t, 0),
        None,
    ];
    let op = Ssd {
        chunk: size.of([4, 64, 256]),
        dt_limit: (0.0, f64::INFINITY),
    };
    g.case(
        "ssd",
        format!("B{b} T{t} H{h} P{p} N{n} G1"),
        op,
        args,
        &[0],
    )
}

fn ssd_step(size: Size, dtype: DType) -> Result<Case, BenchError> {
    let (h, p, n) = ssd_sizes(size);
    let b = size.of([2, 4, 64]);
    let mut g = Builder::new(dtype);
    let args = vec![
        g.x("x", dims![B b, T 1, H h, P p]),
        g.x("dt", dims![B b, T 1, H h]),
        g.float("a", dims![H h], 0.1, -1.0),
        g.x_by("b", dims![B b, T 1, G 1, N n], 0.3),
        g.x_by("c", dims![B b, T 1, G 1, N n], 0.3),
        g.float("d", dims![H h], 1.0, 0.0),
        g.float("dt_bias", dims![H h], 0.0, -4.0),
        g.pos(b, 1, 7),
        g.state("s", Type::f32(dims![B b, H h, P p, N n])),
    ];
    let op = Ssd {
        chunk: 256,
        dt_limit: (0.0, f64::INFINITY),
    };
    let shape = format!("step, B{b} H{h} P{p} N{n} G1");
    g.case("ssd", shape, op, args, &[])
}

fn causal_conv1d(size: Size, dtype: DType, b: usize, t: usize) -> Result<Case, BenchError> {
    let i = size.of([6, 640, 8448]);
    let mut g = Builder::new(dtype);
    let args = vec![
        g.x("x", dims![B b, T t, I i]),
        g.float("w", dims![I i, K 4], 0.5, 0.0),
        g.float("b", dims![I i], 0.5, 0.0),
        g.pos(b, t, 0),
        None,
    ];
    let op = CausalConv1d { silu: true };
    g.case(
        "causal_conv1d",
        format!("B{b} T{t} I{i} K4, SiLU"),
        op,
        args,
        &[0],
    )
}

fn causal_conv1d_step(size: Size, dtype: DType) -> Result<Case, BenchError> {
    let (b, i) = (size.of([2, 4, 64]), size.of([6, 640, 8448]));
    let mut g = Builder::new(dtype);
    let args = vec![
        g.x("x", dims![B b, T 1, I i]),
        g.float("w", dims![I i, K 4], 0.5, 0.0),
        g.float("b", dims![I i], 0.5, 0.0),
        g.pos(b, 1, 7),
        g.state("taps", Type::new(dtype, dims![B b, K 3, I i])),
    ];
    let op = CausalConv1d { silu: true };
    let shape = format!("step, B{b} I{i} K4, SiLU");
    g.case("causal_conv1d", shape, op, args, &[])
}

fn heads(size: Size) -> (usize, usize, usize) {
    (
        size.of([2, 4, 32]),
        size.of([1, 2, 8]),
        size.of([4, 64, 128]),
    )
}

fn attention(size: Size, dtype: DType, b: usize, t: usize) -> Result<Case, BenchError> {
    let (h, kv, p) = heads(size);
    let mut g = Builder::new(dtype);
    let args = vec![
        g.x("q", dims![B b, T t, H h, P p]),
        g.x("k", dims![B b, S t, G kv, P p]),
        g.x("v", dims![B b, S t, G kv, P p]),
        g.pos(b, t, 0),
        None,
    ];
    let op = Attention {
        scale: (p as f64).powf(-0.5),
        window: None,
    };
    g.case(
        "attention",
        format!("B{b} T{t}, {h}/{kv} heads of {p}"),
        op,
        args,
        &[0],
    )
}

fn attention_step(size: Size, dtype: DType) -> Result<Case, BenchError> {
    let (h, kv, p) = heads(size);
    let (b, s) = (size.of([2, 4, 64]), size.of([12, 512, 4096]));
    let mut g = Builder::new(dtype);
    let cache = Type::new(dtype, dims![B b, S s, G kv, P p]);
    let args = vec![
        g.x("q", dims![B b, T 1, H h, P p]),
        g.state("k", cache.clone()),
        g.state("v", cache),
        g.pos(b, 1, s - 1),
        g.ints("slot", dims![X 1], vec![s as i32 - 1]),
    ];
    let op = Attention {
        scale: (p as f64).powf(-0.5),
        window: None,
    };
    let shape = format!("step, B{b} over {s} slots, {h}/{kv} heads of {p}");
    g.case("attention", shape, op, args, &[])
}

fn delta_sizes(size: Size) -> (usize, usize, usize, usize) {
    (
        size.of([2, 4, 32]),
        size.of([1, 2, 16]),
        size.of([4, 64, 128]),
        size.of([3, 32, 128]),
    )
}

fn gated_delta_args(g: &mut Builder, size: Size, b: usize, t: usize) -> Vec<Arg> {
    let (h, keys, p, n) = delta_sizes(size);
    let unit = (n as f32).powf(-0.5);
    vec![
        g.x_by("q", dims![B b, T t, G keys, N n], unit),
        g.x_by("k", dims![B b, T t, G keys, N n], unit),
        g.x("v", dims![B b, T t, H h, P p]),
        g.float("decay", dims![B b, T t, H h], 0.01, -0.05),
        g.float("beta", dims![B b, T t, H h], 0.05, 0.5),
    ]
}

fn gated_delta(size: Size, dtype: DType, b: usize, t: usize) -> Result<Case, BenchError> {
    let (h, keys, p, n) = delta_sizes(size);
    let mut g = Builder::new(dtype);
    let mut args = gated_delta_args(&mut g, size, b, t);
    args.extend([g.pos(b, t, 0), None]);
    let op = GatedDelta {
        chunk: size.of([4, 64, 64]),
    };
    g.case(
        "gated_delta",
        format!("B{b} T{t} H{h} G{keys} P{p} N{n}"),
        op,
        args,
        &[0],
    )
}

fn gated_delta_step(size: Size, dtype: DType) -> Result<Case, BenchError> {
    let (h, keys, p, n) = delta_sizes(size);
    let b = size.of([2, 4, 64]);
    let mut g = Builder::new(dtype);
    let mut args = gated_delta_args(&mut g, size, b, 1);
    let state = g.state("s", Type::f32(dims![B b, H h, N n, P p]));
    args.extend([g.pos(b, 1, 7), state]);
    let op = GatedDelta { chunk: 64 };
    let shape = format!("step, B{b} H{h} G{keys} P{p} N{n}");
    g.case("gated_delta", shape, op, args, &[])
}

fn head_of(
    dtype: DType,
    (b, t, d, v): (usize, usize, usize, usize),
    passes: Passes,
) -> Result<Case, BenchError> {
    let mut g = Builder::new(dtype);
    g.inputs
        .push(("scale".into(), HostTensor::F32(vec![1.0 / (b * t) as f32])));
    let args = vec![
        g.x("x", dims![B b, T t, D d]),
        g.matrix("w", dims![V v, D d]),
        g.ints("targets", dims![B b, T t], ids(b * t, v)),
        Some(
            g.graph
                .add_external(External::Input, "scale", Type::scalar()),
        ),
    ];
    let op = LinearCrossEntropy {
        multiplier: 1.0,
        z_loss: 0.0,
        z_all: false,
    };
    let two = if passes == Passes::Plain {
        ", loss and gradient apart"
    } else {
        ""
    };
    let shape = format!("{} tokens, D{d} V{v}{two}", b * t);
    let case = g.case("linear_cross_entropy", shape, op, args, &[0])?;
    Ok(Case { passes, ..case })
}

fn head(size: Size, dtype: DType, b: usize, t: usize) -> Result<Case, BenchError> {
    let (d, v) = (size.of([8, 256, 4096]), size.of([11, 1024, 128_256]));
    head_of(dtype, (b, t, d, v), Passes::All)
}

/// As graphs without fusion have it.
fn head_in_two(size: Size, dtype: DType) -> Result<Case, BenchError> {
    let (t, d) = (size.of([9, 128, 4096]), size.of([8, 256, 4096]));
    head_of(dtype, (1, t, d, size.of([11, 512, 16384])), Passes::Plain)
}

/// Half of the only layer of a model.
fn block(
    subject: &'static str,
    shape: String,
    model: &str,
    half: Half,
    dtype: DType,
    (b, t): (usize, usize),
) -> Result<Case, BenchError> {
    let source = Source::new("bench.ron", model.to_string());
    let model = parse_model(&source, &[]).map_err(|r| BenchError::Model(r.to_string()))?;
    let options = Options {
        compute: dtype,
        ..Options::train(b, t)
    };
    let graph = lower_half(&model, &options, 0, half)?;
    let mut g = Builder {
        graph,
        ..Builder::new(dtype)
    };
    g.inputs = vec![("pos".into(), HostTensor::I32(positions(b, t, 0)))];
    for v in g.graph.value_ids() {
        if g.graph.external(v) != Some(&External::Param) {
            continue;
        }
        let name = &g.graph.value(v).name;
        let fill = match g.graph.params.iter().find(|p| p.name == *name) {
            Some(p) => Fill::Init(Box::new(p.clone())),
            None => {
                g.of.push(v);
                UNIT
            }
        };
        g.fills.insert(v, fill);
    }
    let outputs = std::mem::take(&mut g.graph.outputs);
    let mut seeds = Vec::new();
    for (name, v) in outputs.into_iter().filter(|(name, _)| name == "y") {
        seeds.push(g.seed(v, 0));
        g.graph.outputs.push((format!("state:{name}"), v));
    }
    Ok(Case {
        subject,
        shape,
        graph: g.graph,
        seeds,
        of: g.of,
        fills: g.fills,
        inputs: g.inputs,
        passes: Passes::All,
    })
}

fn mixer(
    subject: &'static str,
    size: Size,
    dtype: DType,
    b: usize,
    t: usize,
) -> Result<Case, BenchError> {
    let d = size.of([8, 256, 4096]);
    let spec = if subject == "mamba1" {
        "Mamba1(d_state: 16)".to_string()
    } else {
        let (_, p, n) = ssd_sizes(size);
        let chunk = size.of([4, 64, 256]);
        format!("Mamba2(head_dim: {p}, d_state: {n}, n_groups: 1, chunk_size: {chunk})")
    };
    let model = format!(
        "(name: \"m\", vocab_size: 16, d_model: {d}, n_layers: 1, context_len: {t}, mixers: {{\"m\": {spec}}}, layout: (mixer: \"m\"))"
    );
    let shape = format!("mixer, d_model {d} B{b} T{t}");
    block(subject, shape, &model, Half::Mixer, dtype, (b, t))
}

fn experts(size: Size, dtype: DType, b: usize, t: usize) -> Result<Case, BenchError> {
    let (d, f, e) = (
        size.of([8, 256, 4096]),
        size.of([12, 768, 14336]),
        size.of([3, 4, 16]),
    );
    let model = format!(
        "(name: \"m\", vocab_size: 16, d_model: {d}, n_layers: 1, context_len: {t}, mixers: {{\"m\": Mamba1()}}, \
         ffns: {{\"f\": Moe(n_experts: {e}, top_k: 2, d_ff: {f}, load_balance: 0)}}, layout: (mixer: \"m\", ffn: \"f\"))"
    );
    let shape = format!("{} rows, {e} experts of {d}/{f}, with routing", 2 * b * t);
    block("experts", shape, &model, Half::Ffn, dtype, (b, t))
}

/// Ops that are one case each and need no words.
fn small_ops(size: Size, dtype: DType, b: usize, t: usize) -> Result<Vec<Case>, BenchError> {
    let (d, f, v, e) = (
        size.of([8, 256, 4096]),
        size.of([12, 768, 14336]),
        size.of([11, 1024, 128_256]),
        size.of([3, 4, 16]),
    );
    let (h, kv, p) = heads(size);
    let row = |d: usize| dims![B b, T t, D d];
    let new = || Builder::new(dtype);
    let mut all = Vec::new();

    let mut g = new();
    let args = vec![g.x("x", row(d)), g.matrix("w", dims![I f, D d]), None];
    let shape = format!("{} rows, {d} to {f}", b * t);
    all.push(g.case("linear", shape, Linear, args, &[0])?);

    let mut g = new();
    let args = vec![
        g.ints("tokens", dims![B b, T t], ids(b * t, v)),
        g.matrix("table", dims![V v, D d]),
    ];
    let shape = format!("{} tokens, D{d} V{v}", b * t);
    all.push(g.case("embed", shape, Embed, args, &[0])?);

    let mut g = new();
    let op = RmsNorm {
        eps: 1e-5,
        group: d,
        zero_centered: false,
        gate: Gate::None,
    };
    let args = vec![
        g.x("x", row(d)),
        g.param("w", Type::f32(dims![D d]), 1.0),
        None,
    ];
    all.push(g.case("rms_norm", format!("B{b} T{t} D{d}"), op, args, &[0])?);

    let mut g = new();
    let op = RmsNorm {
        eps: 1e-5,
        group: 2 * d,
        zero_centered: false,
        gate: Gate::Before,
    };
    let args = vec![
        g.x("x", row(2 * d)),
        g.param("w", Type::f32(dims![D 2 * d]), 1.0),
        g.x("z", row(2 * d)),
    ];
    let shape = format!("B{b} T{t} D{}, gated", 2 * d);
    all.push(g.case("rms_norm", shape, op, args, &[0])?);

    let mut g = new();
    let op = Rope {
        dims: p,
        factor: 1.0,
        inverse: false,
    };
    let fill = Fill::Normal(0.01, 0.1);
    let freq = g.stored(External::Param, "inv_freq", Type::f32(dims![X p / 2]), fill);
    let args = vec![
        g.x("x", dims![B b, T t, H h, P p]),
        g.pos(b, t, 0),
        Some(freq),
    ];
    let shape = format!("B{b} T{t}, {h} heads of {p}");
    all.push(g.case("rope", shape, op, args, &[0])?);

    let mut g = new();
    let args = vec![g.x("gate", row(f)), g.x("up", row(f))];
    let shape = format!("SiLU gate, B{b} T{t} F{f}");
    all.push(g.case("pointwise", shape, Pointwise::gate(Un::Silu), args, &[0])?);

    let mut g = new();
    let args = vec![g.x("x", row(d)), g.float("bias", dims![D d], 1.0, 0.0)];
    let shape = format!("sum with a bias, B{b} T{t} D{d}");
    all.push(g.case("pointwise", shape, Pointwise::add(), args, &[0])?);

    let mut g = new();
    let op = Route {
        top_k: 2,
        score: Score::SoftmaxAll,
        normalize: Normalize::Sum,
        n_groups: 1,
        top_groups: 1,
        scale: 1.0,
    };
    let args = vec![g.float("logits", dims![B b, T t, E e], 1.0, 0.0), None];
    all.push(g.case("route", format!("B{b} T{t}, 2 of {e}"), op, args, &[0])?);

    let mut g = new();
    let args = vec![
        g.float("logits", dims![B b, T t, E e], 1.0, 0.0),
        g.ints("experts", dims![B b, T t, K 2], ids(2 * b * t, e)),
    ];
    all.push(g.case("balance", format!("B{b} T{t} E{e}"), Balance, args, &[0])?);

    let (rows, slots) = (size.of([2, 4, 64]), size.of([12, 512, 4096]));
    let mut g = new();
    let args = vec![
        g.state("cache", Type::new(dtype, dims![B rows, S slots, G kv, P p])),
        g.x("x", dims![B rows, T 1, G kv, P p]),
        g.ints("slot", dims![X 1], vec![slots as i32 - 1]),
    ];
    let shape = format!("step, B{rows}, {kv} heads of {p}");
    all.push(g.case("cache_write", shape, CacheWrite, args, &[])?);

    let v = size.of([300, 16384, 128_256]);
    for (what, settings) in [("greedy", [0.0, 0.0, 1.0]), ("top-p 0.9", [1.0, 0.0, 0.9])] {
        let mut g = new();
        let args = vec![
            g.float("logits", dims![B rows, V v], 3.0, 0.0),
            g.floats("settings", dims![X 3], settings.to_vec()),
            g.ints("bits", dims![B rows, X 2], ids(2 * rows, 1 << 20)),
        ];
        let shape = format!("{rows} rows of {v}, {what}");
        all.push(g.case("draw", shape, Draw, args, &[])?);
    }

    let mut g = new();
    let args = vec![g.float("x", row(d), 1.0, 0.0)];
    let shape = format!("f32 to {dtype}, B{b} T{t} D{d}");
    all.push(g.case("cast", shape, Cast { to: dtype }, args, &[0])?);

    let mut g = new();
    let args = vec![g.x("x", row(d)), g.x("y", row(d))];
    let op = Concat { letter: Letter::D };
    let shape = format!("two of B{b} T{t} D{d}");
    all.push(g.case("concat", shape, op, args, &[0])?);

    let mut g = new();
    let op = Split {
        sizes: dims![D d, D d],
    };
    let args = vec![g.x("x", row(2 * d))];
    let shape = format!("B{b} T{t} D{} in two", 2 * d);
    all.push(g.case("split", shape, op, args, &[0, 1])?);

    let mut g = new();
    let args = vec![g.x("x", row(d))];
    all.push(g.case("last", format!("B{b} T{t} D{d}"), Last, args, &[0])?);

    let mut g = new();
    let args = vec![g.x("x", row(d))];
    let shape = format!("B{b} T{t} D{d}");
    all.push(g.case("mean_square", shape, MeanSquare, args, &[0])?);

    let mut g = new();
    let args = vec![g.x("x", row(d))];
    all.push(g.case("stat", format!("B{b} T{t} D{d}"), Stat, args, &[])?);

    all.push(update(dtype, f, d)?);
    Ok(all)
}

/// The optimiser over two matrices and a vector.
fn update(dtype: DType, n: usize, k: usize) -> Result<Case, BenchError> {
    let param = |name: &str, dims: Vec<Dim>, compute: DType| Param {
        name: name.into(),
        ty: Type::f32(dims),
        compute,
        init: ParamInit::Zeros,
        decay: true,
        trainable: true,
        active: (1, 1),
        path: "bench".into(),
    };
    let params = [
        param("up", dims![I n, D k], dtype),
        param("down", dims![D k, I n], dtype),
        param("norm", dims![D k], DType::F32),
    ];
    let program = program::update_of(&params, &AdamW::default(), Some(1.0), &BTreeMap::new())?;
    let graph = program.graph;
    let fills = graph
        .value_ids()
        .filter_map(|v| {
            let fill = match graph.external(v)? {
                External::Input | External::Const(_) => return None,
                External::Moment2 => Fill::Normal(0.0, 1e-4),
                External::Param
                | External::Master
                | External::Grad
                | External::Moment1
                | External::State => Fill::Normal(0.02, 0.0),
            };
            Some((v, fill))
        })
        .collect();
    let outputs = graph.outputs.iter().map(|(name, v)| {
        // Numbers for the host stay on the device here.
        let name = match name.split_once(':') {
            Some(_) => name.clone(),
            None => format!("state:{name}"),
        };
        (name, *v)
    });
    let graph = Graph {
        outputs: outputs.collect(),
        ..graph.clone()
    };
    Ok(Case {
        subject: "adamw",
        shape: format!("{:.1} M parameters, clipped", (2 * n * k + k) as f64 / 1e6),
        graph,
        seeds: Vec::new(),
        of: Vec::new(),
        fills,
        inputs: vec![
            ("lr".into(), HostTensor::F32(vec![1e-3])),
            ("step".into(), HostTensor::F32(vec![10.0])),
        ],
        passes: Passes::None,
    })
}

/// Numbers for memory of `n` elements: deviates are copied from `noise`, starting at `at`.
pub(super) fn numbers(fill: &Fill, n: usize, noise: &[f32], at: usize) -> Vec<f32> {
    let (scale, shift) = match fill {
        Fill::Normal(scale, shift) => (*scale, *shift),
        Fill::Init(p) => match p.init {
            ParamInit::Normal(std) => (std as f32, 0.0),
            ParamInit::Zeros
            | ParamInit::Ones
            | ParamInit::Uniform(_)
            | ParamInit::LogUniformA(..)
            | ParamInit::LogArange
            | ParamInit::DtBias { .. } => return init::init(p, at as u64),
        },
    };
    let mut out = Vec::with_capacity(n);
    let mut at = at % noise.len();
    while out.len() < n {
        let take = (noise.len() - at).min(n - out.len());
        out.extend(noise[at..at + take].iter().map(|x| scale * x + shift));
        at = 0;
    }
    out
}
