//! For tests: random training graphs, what a graph means, and whether a plan keeps every value until it has been read.
//!
//! [`meaning`] computes no numbers. It gives each output a hash of the expression that it stands for, operation by operation inside
//! elementwise programs, so two graphs of equal meaning do the same arithmetic in the same order: equality is bitwise equality on any
//! deterministic backend that computes elementwise programs in one precision.

use crate::op::{
    Accumulate, Attention, Balance, Bin, Broadcast, CausalConv1d, Combine, Dispatch, Embed,
    EmbedBwd, Gate, GatherRows, GroupedLinear, GroupedLinearDw, Instr, Linear, LinearCrossEntropy,
    LinearCrossEntropyBwd, LinearDw, Normalize, Op, Pointwise, Reshape, RmsNorm, Rope, Route, Rows,
    Score, Ssd, Un,
};
use crate::{
    DType, Def, External, Graph, Memory, Param, ParamInit, Phase, Place, Plan, Type, TypeError,
    ValueId, differentiate, dims,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

/// What a layer of a random graph does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Gated ffn from rows of one matrix.
    Ffn,
    /// Grouped-query attention with rotary positions.
    Attention,
    /// Convolution and state space duality.
    Ssd,
    /// Top-2 of 4 experts with a balance loss.
    Moe,
    /// A chain of elementwise programs.
    Chain,
}

/// A random graph before it is built.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Layers, first one first.
    pub layers: Vec<Kind>,
    /// B.
    pub batch: usize,
    /// T.
    pub time: usize,
    /// D; a multiple of 8.
    pub d_model: usize,
    /// The head reads the embedding table.
    pub tied: bool,
    /// Element type of parameters and activations.
    pub dtype: DType,
}

/// Random small graphs.
pub fn sample() -> impl Strategy<Value = Sample> {
    let kind = prop_oneof![
        Just(Kind::Ffn),
        Just(Kind::Attention),
        Just(Kind::Ssd),
        Just(Kind::Moe),
        Just(Kind::Chain),
    ];
    (
        prop::collection::vec(kind, 1..7),
        1..3usize,
        1..20usize,
        1..4usize,
        any::<bool>(),
    )
        .prop_map(|(layers, batch, time, d, tied)| Sample {
            layers,
            batch,
            time,
            d_model: 8 * d,
            tied,
            dtype: DType::F32,
        })
}

/// Builds graphs node by node.
struct Builder {
    g: Graph,
    at: Place,
    dtype: DType,
    aux: Vec<ValueId>,
}

impl Builder {
    fn param(&mut self, name: &str, dims: Vec<crate::Dim>, matrix: bool) -> ValueId {
        let ty = Type::new(if matrix { self.dtype } else { DType::F32 }, dims);
        if self.g.find_external("param", name).is_none() {
            self.g.params.push(Param {
                name: name.into(),
                ty: ty.clone(),
                compute: DType::F32,
                init: ParamInit::Normal(0.02),
                decay: matrix,
                trainable: true,
                active: (1, 1),
                path: self.at.path.clone(),
            });
        }
        self.g.add_external(External::Param, name, ty)
    }

    fn push(
        &mut self,
        op: impl Into<Op>,
        args: Vec<Option<ValueId>>,
    ) -> Result<Vec<ValueId>, TypeError> {
        self.g.push(op, args, &self.at)
    }

    fn one(&mut self, op: impl Into<Op>, args: Vec<Option<ValueId>>) -> Result<ValueId, TypeError> {
        Ok(self.push(op, args)?[0])
    }

    fn linear(&mut self, name: &str, x: ValueId, n: usize) -> Result<ValueId, TypeError> {
        let k = self.g.ty(x).last();
        let w = self.param(name, dims![F n, D k], true);
        self.one(Linear, vec![Some(x), Some(w), None])
    }

    fn norm(&mut self, name: &str, x: ValueId) -> Result<ValueId, TypeError> {
        let d = self.g.ty(x).last();
        let w = self.param(name, dims![D d], false);
        let op = RmsNorm {
            eps: 1e-5,
            group: d,
            zero_centered: false,
            gate: Gate::None,
        };
        self.one(op, vec![Some(x), Some(w), None])
    }

    fn shape(&mut self, x: ValueId, dims: Vec<crate::Dim>) -> Result<ValueId, TypeError> {
        self.one(Reshape { dims }, vec![Some(x)])
    }
}

/// The forward graph of a sample and its loss.
///
/// # Errors
/// [`TypeError`] when this file has a bug.
pub fn forward(s: &Sample) -> Result<(Graph, ValueId), TypeError> {
    let (b, t, d, v) = (s.batch, s.time, s.d_model, 32);
    let mut cx = Builder {
        g: Graph::new(),
        at: Place {
            path: "embedding".into(),
            block: None,
            phase: Phase::Forward,
        },
        dtype: s.dtype,
        aux: Vec::new(),
    };
    let tokens =
        cx.g.add_external(External::Input, "tokens", Type::i32(dims![B b, T t]));
    let targets =
        cx.g.add_external(External::Input, "targets", Type::i32(dims![B b, T t]));
    let scale =
        cx.g.add_external(External::Input, "loss_scale", Type::scalar());
    let table = cx.param("embedding", dims![V v, D d], true);
    let mut x = cx.one(Embed, vec![Some(tokens), Some(table)])?;
    for (i, kind) in s.layers.iter().enumerate() {
        cx.at = Place {
            path: format!("layers[{i}].mixer"),
            block: Some(i as u32),
            phase: Phase::Forward,
        };
        let p = |n: &str| format!("layers.{i}.mixer.{n}");
        let h = cx.norm(&p("norm"), x)?;
        let y = match kind {
            Kind::Ffn => ffn(&mut cx, &p("in_proj"), h)?,
            Kind::Attention => attention(&mut cx, &p("qkv"), h)?,
            Kind::Ssd => ssd(&mut cx, &p("ssm"), h)?,
            Kind::Moe => moe(&mut cx, &p("experts"), h)?,
            Kind::Chain => chain(&mut cx, h)?,
        };
        let y = cx.linear(&p("out_proj"), y, d)?;
        cx.g.taps.push((format!("layers[{i}].mixer.out"), y));
        x = cx.one(Pointwise::add_scaled(0.5), vec![Some(x), Some(y)])?;
        cx.g.taps.push((format!("layers[{i}].out"), x));
    }
    cx.at = Place {
        path: "head".into(),
        block: None,
        phase: Phase::Forward,
    };
    let x = cx.norm("final_norm", x)?;
    let head = if s.tied {
        table
    } else {
        cx.param("head", dims![V v, D d], true)
    };
    let op = LinearCrossEntropy {
        multiplier: 1.0,
        z_loss: 0.0,
        z_all: false,
    };
    let args = vec![Some(x), Some(head), Some(targets), Some(scale)];
    let mut loss = cx.one(op, args)?;
    cx.g.outputs.push(("loss".into(), loss));
    for a in std::mem::take(&mut cx.aux) {
        loss = cx.one(Pointwise::add_scaled(0.01), vec![Some(loss), Some(a)])?;
    }
    Ok((cx.g, loss))
}

/// The training graph of a sample.
///
/// # Errors
/// [`TypeError`] when this file or a derivative has a bug.
pub fn training(s: &Sample) -> Result<Graph, TypeError> {
    let (mut g, loss) = forward(s)?;
    differentiate(&mut g, loss)?;
    Ok(g)
}

fn ffn(cx: &mut Builder, name: &str, h: ValueId) -> Result<ValueId, TypeError> {
    let d = cx.g.ty(h).last();
    let w = cx.param(name, dims![F 4 * d, D d], true);
    let mut half = |start| -> Result<ValueId, TypeError> {
        let rows = cx.one(Rows { start, len: 2 * d }, vec![Some(w)])?;
        cx.one(Linear, vec![Some(h), Some(rows), None])
    };
    let (gate, up) = (half(0)?, half(2 * d)?);
    let gate = cx.one(Pointwise::map(Un::Silu), vec![Some(gate)])?;
    cx.one(Pointwise::mul(), vec![Some(gate), Some(up)])
}

fn attention(cx: &mut Builder, name: &str, h: ValueId) -> Result<ValueId, TypeError> {
    let (b, t, d) = (cx.g.ty(h).size(0), cx.g.ty(h).size(1), cx.g.ty(h).last());
    let q = cx.linear(&format!("{name}.q"), h, d)?;
    let k = cx.linear(&format!("{name}.k"), h, d / 2)?;
    let v = cx.linear(&format!("{name}.v"), h, d / 2)?;
    let q = cx.shape(q, dims![B b, T t, H 2, P d / 2])?;
    let k = cx.shape(k, dims![B b, T t, G 1, P d / 2])?;
    let v = cx.shape(v, dims![B b, T t, G 1, P d / 2])?;
    let inv_freq = cx.g.add_external(
        External::Const(vec![0.5; d / 4]),
        "inv_freq",
        Type::f32(dims![X d / 4]),
    );
    let rope = Rope {
        dims: d / 2,
        factor: 1.0,
        inverse: false,
    };
    let q = cx.one(rope.clone(), vec![Some(q), None, Some(inv_freq)])?;
    let k = cx.one(rope, vec![Some(k), None, Some(inv_freq)])?;
    let op = Attention {
        scale: 0.3,
        window: None,
    };
    let o = cx.one(op, vec![Some(q), Some(k), Some(v), None, None])?;
    cx.shape(o, dims![B b, T t, D d])
}

fn ssd(cx: &mut Builder, name: &str, h: ValueId) -> Result<ValueId, TypeError> {
    let (bs, t, d) = (cx.g.ty(h).size(0), cx.g.ty(h).size(1), cx.g.ty(h).last());
    let z = cx.linear(&format!("{name}.z"), h, d)?;
    let x = cx.linear(&format!("{name}.x"), h, d)?;
    let bc = cx.linear(&format!("{name}.bc"), h, 8)?;
    let dt = cx.linear(&format!("{name}.dt"), h, 2)?;
    let w = cx.param(&format!("{name}.conv"), dims![I d, K 3], false);
    let x = cx.one(
        CausalConv1d { silu: true },
        vec![Some(x), Some(w), None, None, None],
    )?;
    let split = crate::op::Split {
        sizes: dims![N 4, N 4],
    };
    let parts = cx.push(split, vec![Some(bc)])?;
    let b = cx.shape(parts[0], dims![B bs, T t, G 1, N 4])?;
    let c = cx.shape(parts[1], dims![B bs, T t, G 1, N 4])?;
    let x = cx.shape(x, dims![B bs, T t, H 2, P d / 2])?;
    let a_log = cx.param(&format!("{name}.a_log"), dims![H 2], false);
    let a = cx.one(Pointwise::map(Un::Exp), vec![Some(a_log)])?;
    let a = cx.one(Pointwise::map(Un::Neg), vec![Some(a)])?;
    let op = Ssd {
        chunk: 4,
        dt_limit: (0.0, f64::INFINITY),
    };
    let args = vec![
        Some(x),
        Some(dt),
        Some(a),
        Some(b),
        Some(c),
        None,
        None,
        None,
        None,
    ];
    let y = cx.one(op, args)?;
    let y = cx.shape(y, dims![B bs, T t, I d])?;
    cx.one(Pointwise::gate(Un::Silu), vec![Some(z), Some(y)])
}

fn moe(cx: &mut Builder, name: &str, h: ValueId) -> Result<ValueId, TypeError> {
    let (tokens, d) = (cx.g.ty(h).dims[..2].to_vec(), cx.g.ty(h).last());
    let dtype = cx.dtype;
    cx.dtype = DType::F32;
    let logits = cx.linear(&format!("{name}.router"), h, 4)?;
    cx.dtype = dtype;
    let route = Route {
        top_k: 2,
        score: Score::SoftmaxAll,
        normalize: Normalize::Sum,
        n_groups: 1,
        top_groups: 1,
        scale: 1.0,
    };
    let logits = match dtype {
        DType::F32 => logits,
        DType::Bf16 | DType::F16 | DType::E4m3 | DType::E5m2 | DType::I32 => {
            cx.one(crate::op::Cast { to: DType::F32 }, vec![Some(logits)])?
        }
    };
    let chosen = cx.push(route, vec![Some(logits), None])?;
    let balance = cx.one(Balance, vec![Some(logits), Some(chosen[1])])?;
    cx.aux.push(balance);
    let to = cx.push(Dispatch { n_experts: 4 }, vec![Some(chosen[1])])?;
    let rows = cx.one(GatherRows, vec![Some(h), Some(to[0]), Some(to[1])])?;
    let up = cx.param(&format!("{name}.up"), dims![E 4, F 2 * d, D d], true);
    let down = cx.param(&format!("{name}.down"), dims![E 4, D d, F 2 * d], true);
    let u = cx.one(GroupedLinear, vec![Some(rows), Some(up), Some(to[2])])?;
    let u = cx.one(Pointwise::map(Un::Silu), vec![Some(u)])?;
    let y = cx.one(GroupedLinear, vec![Some(u), Some(down), Some(to[2])])?;
    let args = vec![Some(y), Some(to[0]), Some(to[1]), Some(chosen[0])];
    cx.one(Combine { tokens }, args)
}

fn chain(cx: &mut Builder, h: ValueId) -> Result<ValueId, TypeError> {
    let d = cx.g.ty(h).last();
    let name = format!("{}.scale", cx.at.path);
    let w = cx.param(&name, dims![D d], false);
    let a = cx.one(Pointwise::map(Un::Sigmoid), vec![Some(h)])?;
    let b = cx.one(Pointwise::zip(Bin::Mul), vec![Some(a), Some(w)])?;
    let c = cx.one(Pointwise::zip(Bin::Sub), vec![Some(b), Some(h)])?;
    let e = cx.one(Pointwise::map(Un::GeluTanh), vec![Some(b)])?;
    cx.one(Pointwise::add(), vec![Some(c), Some(e)])
}

fn hash(parts: impl Hash) -> u64 {
    let mut h = DefaultHasher::new();
    parts.hash(&mut h);
    h.finish()
}

/// What is written into a buffer: rows, factor on what was there, what is added.
type Write = (usize, usize, u64, u64);

/// The hash of a sum: that of its terms in any order. `sums` holds those made so far.
fn sum(sums: &mut BTreeSet<u64>, x: u64, y: u64) -> u64 {
    let total = |h: u64| {
        if sums.contains(&h) {
            h
        } else {
            hash(("term", h))
        }
    };
    let s = total(x).wrapping_add(total(y));
    sums.insert(s);
    s
}

/// A hash of each output's expression. Writes to disjoint rows of one buffer commute, and so do the terms of sums; everything else keeps
/// its order. The forms of a folded product or norm mean what they were folded from.
pub fn meaning(g: &Graph) -> BTreeMap<String, u64> {
    let mut of: Vec<u64> = vec![0; g.values.len()];
    let mut writes: BTreeMap<ValueId, (u64, Vec<Write>)> = BTreeMap::new();
    let mut sums = BTreeSet::new();
    for v in g.value_ids() {
        if let Def::External(e) = &g.value(v).def {
            of[v.index()] = hash((e.word(), &g.value(v).name));
        }
    }
    for node in &g.nodes {
        let arg = |i: usize| node.args.get(i).copied().flatten();
        let h = |i: usize| arg(i).map(|v| of[v.index()]);
        let plain = |op: &Op, args: &[Option<u64>], k: usize| hash((format!("{op:?}"), args, k));
        // Result, buffer, row, rows, factor, what is added.
        let mut folded: Option<(usize, ValueId, usize, usize, u64, u64)> = None;
        let mut results: Vec<u64> = Vec::new();
        match &node.op {
            Op::Pointwise(p) => {
                let out = g.ty(node.results[0]);
                let mut regs: Vec<u64> = Vec::new();
                for instr in &p.code {
                    regs.push(match *instr {
                        Instr::Arg(i) => {
                            let v = node.args[i as usize].unwrap_or(ValueId(0));
                            match Broadcast::of(g.ty(v), out) {
                                Some(Broadcast::Full) => of[v.index()],
                                other => hash((format!("{other:?}"), of[v.index()])),
                            }
                        }
                        Instr::Const(c) => hash(("const", c.to_bits())),
                        Instr::Un(f, x) => hash((format!("{f:?}"), regs[x as usize])),
                        Instr::Bin(Bin::Add, x, y) => {
                            sum(&mut sums, regs[x as usize], regs[y as usize])
                        }
                        Instr::Bin(f, x, y) => {
                            hash((format!("{f:?}"), regs[x as usize], regs[y as usize]))
                        }
                    });
                }
                results.extend(p.outs.iter().map(|&o| regs[o as usize]));
            }
            Op::LinearDw(LinearDw {
                start,
                accumulate: true,
            }) => {
                let op = LinearDw {
                    start: 0,
                    accumulate: false,
                };
                let x = plain(&op.into(), &[h(0), h(1), None, None], 0);
                let n = arg(1).map_or(0, |dy| g.ty(dy).last());
                folded = arg(2).map(|into| (0, into, *start, n, h(3).unwrap_or(0), x));
            }
            Op::GroupedLinearDw(GroupedLinearDw {
                n_experts,
                accumulate: true,
            }) => {
                let op = GroupedLinearDw {
                    n_experts: *n_experts,
                    accumulate: false,
                };
                let x = plain(&op.into(), &[h(0), h(1), h(2), None, None], 0);
                folded = arg(3).map(|into| (0, into, 0, *n_experts, h(4).unwrap_or(0), x));
            }
            Op::EmbedBwd(EmbedBwd {
                vocab,
                accumulate: true,
            }) => {
                let op = EmbedBwd {
                    vocab: *vocab,
                    accumulate: false,
                };
                let x = plain(&op.into(), &[h(0), h(1), None, None], 0);
                folded = arg(2).map(|into| (0, into, 0, vocab.size, h(3).unwrap_or(0), x));
            }
            Op::LinearCrossEntropyGrad(op) => {
                let args = [h(0), h(1), h(2), h(3)];
                let fwd = op.of.clone().into();
                results.extend((0..4).map(|k| plain(&fwd, &args, k)));
                let bwd = LinearCrossEntropyBwd { of: op.of.clone() }.into();
                let args = [h(0), h(1), h(2), h(3), Some(results[2]), h(4)];
                results.extend((0..2).map(|k| plain(&bwd, &args, k)));
                if let Some(into) = arg(5) {
                    let n = g.ty(into).size(0);
                    folded = Some((5, into, 0, n, h(6).unwrap_or(0), results[5]));
                }
            }
            Op::Accumulate(Accumulate { start, len }) => {
                let x = h(2).unwrap_or(0);
                folded = arg(0).map(|into| (0, into, *start, *len, h(1).unwrap_or(0), x));
            }
            op => {
                let add = match op {
                    Op::Linear(_) => 3,
                    Op::LinearDx(_) => 2,
                    Op::RmsNormBwd(_) => 5,
                    _ => usize::MAX,
                };
                let args: Vec<Option<u64>> = (0..node.args.len().min(add)).map(h).collect();
                results.extend((0..node.results.len()).map(|k| plain(op, &args, k)));
                if let Some(add) = h(add) {
                    results[0] = sum(&mut sums, results[0], add);
                }
            }
        }
        if let Some((result, into, start, len, beta, x)) = folded {
            let (base, mut list) = writes
                .get(&into)
                .cloned()
                .unwrap_or((of[into.index()], Vec::new()));
            let mut i = list.len();
            list.push((start, len, beta, x));
            while i > 0 && start + len <= list[i - 1].0 {
                list.swap(i, i - 1);
                i -= 1;
            }
            results.resize(results.len().max(result + 1), 0);
            results[result] = hash((base, &list));
            writes.insert(node.results[result], (base, list));
        }
        for (&r, m) in node.results.iter().zip(results) {
            of[r.index()] = m;
        }
    }
    g.outputs
        .iter()
        .map(|(name, v)| (name.clone(), of[v.index()]))
        .collect()
}

/// Walks through a planned graph and says which value was written over before it was read, if any: results must not overlap
/// anything that is still to be read, nor each other.
///
/// # Errors
/// A sentence about the first value that is lost.
pub fn check_plan(g: &Graph, plan: &Plan) -> Result<(), String> {
    // Roots in the arena: bytes from, bytes to, whether they still hold what was written.
    let roots = g.roots();
    let mut held: BTreeMap<ValueId, (usize, usize, bool)> = BTreeMap::new();
    let read = |held: &BTreeMap<ValueId, (usize, usize, bool)>, v: ValueId, who: &str| {
        let root = roots[v.index()].0;
        match (g.external(root), held.get(&root)) {
            (Some(_), _) | (None, Some((_, _, true))) => Ok(()),
            (None, Some(_)) => Err(format!("{v} was written over before {who} read it")),
            (None, None) => Err(format!("{v} was not written before {who} read it")),
        }
    };
    for (i, node) in g.nodes.iter().enumerate() {
        for a in node.present_args() {
            read(&held, a, &format!("node {i}"))?;
        }
        let mut fresh = Vec::new();
        for (k, &r) in node.results.iter().enumerate() {
            let (root, inner) = roots[r.index()];
            let Memory::Arena { offset } = plan.of(r) else {
                continue;
            };
            if let (Memory::Arena { offset: base }, true) = (plan.of(root), root != r) {
                if base + inner != offset {
                    return Err(format!("{r} is not where its memory {root} is"));
                }
                continue;
            }
            if node.alias(k).is_some() {
                continue;
            }
            let end = offset + g.ty(r).bytes();
            if offset % crate::ALIGN != 0 || end > plan.arena_bytes {
                return Err(format!("{r} at {offset}..{end} is misplaced"));
            }
            for (other, (from, to, whole)) in held.iter_mut() {
                if offset < *to && *from < end {
                    if fresh.contains(other)
                        || node.present_args().any(|a| roots[a.index()].0 == *other)
                    {
                        return Err(format!("{r} overlaps {other} of its own node {i}"));
                    }
                    *whole = false;
                }
            }
            held.insert(r, (offset, end, true));
            fresh.push(r);
        }
    }
    for (name, v) in &g.outputs {
        read(&held, *v, name)?;
    }
    Ok(())
}
