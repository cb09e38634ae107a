//! Folds over a graph: parameters, floating point operations, bytes moved, state. Never formulas beside the model.

use crate::op::Op;
use crate::{External, Graph, Node, Phase, Type, ValueId};
use std::collections::BTreeSet;

/// Floating point operations and bytes of one run of a graph.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Costs {
    /// Operations of the forward phase; multiply-adds count as two.
    pub forward_flops: f64,
    /// Of the backward phase, recomputation apart.
    pub backward_flops: f64,
    /// Of forward nodes that run again.
    pub recompute_flops: f64,
    /// Of the optimiser.
    pub update_flops: f64,
    /// Of all of these, those of matrix products with parameters (linear, grouped linear, head).
    pub matmul_flops: f64,
    /// Bytes read and written, each value once per node that reads or writes it.
    pub moved_bytes: f64,
}

impl Costs {
    /// All operations.
    pub fn total_flops(&self) -> f64 {
        self.forward_flops + self.backward_flops + self.recompute_flops + self.update_flops
    }

    /// Operations of the model as model FLOPs utilisation counts them: forward and backward, without recomputation and optimiser
    /// (PaLM, arXiv 2204.02311, appendix B).
    pub fn model_flops(&self) -> f64 {
        self.forward_flops + self.backward_flops
    }
}

/// Operations of one node.
pub fn node_flops(g: &Graph, node: &Node) -> f64 {
    let args: Vec<Option<&Type>> = node.args.iter().map(|a| a.map(|v| g.ty(v))).collect();
    let results: Vec<&Type> = node.results.iter().map(|&r| g.ty(r)).collect();
    node.op.flops(&args, &results)
}

/// Bytes that one node reads and writes. Views cost nothing; look-ups read the rows they name; a product that is added to rows of a
/// buffer reads and writes those rows.
pub fn node_bytes(g: &Graph, node: &Node) -> f64 {
    let bytes = |v: &ValueId| g.ty(*v).bytes() as f64;
    let arg = |i: usize| node.args.get(i).copied().flatten();
    let all = || {
        node.present_args().map(|v| bytes(&v)).sum::<f64>()
            + node.results.iter().map(bytes).sum::<f64>()
    };
    match &node.op {
        Op::Reshape(_) | Op::Rows(_) => 0.0,
        // Rows are read, then written.
        Op::Embed(_) => {
            arg(0).map_or(0.0, |v| bytes(&v)) + 2.0 * node.results.iter().map(bytes).sum::<f64>()
        }
        Op::EmbedBwd(_) => {
            let dy = arg(1).map_or(0.0, |v| bytes(&v));
            let whole = if arg(2).is_some() {
                2.0 * dy
            } else {
                node.results.iter().map(bytes).sum()
            };
            arg(0).map_or(0.0, |v| bytes(&v)) + dy + whole
        }
        // New rows are read and written; the cache is not touched elsewhere.
        Op::CacheWrite(_) => arg(1).map_or(0.0, |v| 2.0 * bytes(&v)),
        Op::LinearDw(_) => {
            let (Some(x), Some(dy)) = (arg(0), arg(1)) else {
                return 0.0;
            };
            let dw = (g.ty(x).last() * g.ty(dy).last() * 4) as f64;
            bytes(&x) + bytes(&dy) + if arg(2).is_some() { 2.0 * dw } else { dw }
        }
        // Its rows of the buffer.
        Op::LinearFp8(op) if op.accumulate => {
            let operands = [0, 2].into_iter().filter_map(arg);
            operands.map(|v| bytes(&v)).sum::<f64>() + 2.0 * op.y.bytes() as f64
        }
        // Once for the factor, once with it.
        Op::Narrow(_) => all() + arg(0).map_or(0.0, |v| bytes(&v)),
        Op::Accumulate(_) => match arg(2) {
            Some(x) => bytes(&x) + 2.0 * (g.ty(x).len() * 4) as f64,
            None => 2.0 * arg(0).map_or(0.0, |v| bytes(&v)),
        },
        // What it writes over is not read.
        Op::Cast(_) => {
            arg(0).map_or(0.0, |v| bytes(&v)) + node.results.iter().map(bytes).sum::<f64>()
        }
        Op::Last(_) => 2.0 * node.results.iter().map(bytes).sum::<f64>(),
        Op::Linear(_)
        | Op::LinearDx(_)
        | Op::LinearFp8(_)
        | Op::RmsNorm(_)
        | Op::RmsNormBwd(_)
        | Op::Rope(_)
        | Op::Attention(_)
        | Op::AttentionBwd(_)
        | Op::CausalConv1d(_)
        | Op::CausalConv1dBwd(_)
        | Op::SelectiveScan(_)
        | Op::SelectiveScanBwd(_)
        | Op::Ssd(_)
        | Op::SsdBwd(_)
        | Op::GatedDelta(_)
        | Op::GatedDeltaBwd(_)
        | Op::Pointwise(_)
        | Op::Route(_)
        | Op::RouteBwd(_)
        | Op::Balance(_)
        | Op::BalanceBwd(_)
        | Op::Draw(_)
        | Op::Dispatch(_)
        | Op::GatherRows(_)
        | Op::GroupedLinear(_)
        | Op::GroupedLinearDx(_)
        | Op::GroupedLinearDw(_)
        | Op::Combine(_)
        | Op::CombineBwd(_)
        | Op::LinearCrossEntropy(_)
        | Op::LinearCrossEntropyBwd(_)
        | Op::LinearCrossEntropyGrad(_)
        | Op::Concat(_)
        | Op::Split(_)
        | Op::LastBwd(_)
        | Op::SumTo(_)
        | Op::MeanSquare(_)
        | Op::Stat(_)
        | Op::GlobalNorm(_) => all(),
        // Copies are written, not read.
        Op::AdamW(op) => {
            let copies = (0..op.copies.len()).filter_map(|k| arg(3 + 4 * op.tensors.len() + k));
            all() - copies.map(|v| bytes(&v)).sum::<f64>()
        }
    }
}

/// Whether a node is a matrix product with a parameter.
fn is_matmul(op: &Op) -> bool {
    matches!(
        op,
        Op::Linear(_)
            | Op::LinearDx(_)
            | Op::LinearDw(_)
            | Op::LinearFp8(_)
            | Op::GroupedLinear(_)
            | Op::GroupedLinearDx(_)
            | Op::GroupedLinearDw(_)
            | Op::LinearCrossEntropy(_)
            | Op::LinearCrossEntropyBwd(_)
            | Op::LinearCrossEntropyGrad(_)
    )
}

/// Adds up a graph.
pub fn costs(g: &Graph) -> Costs {
    let mut c = Costs::default();
    for node in &g.nodes {
        let flops = node_flops(g, node);
        if is_matmul(&node.op) {
            c.matmul_flops += flops;
        }
        c.moved_bytes += node_bytes(g, node);
        match node.phase {
            // Loss and derivative in one node: one product of three is the forward one.
            Phase::Forward if matches!(node.op, Op::LinearCrossEntropyGrad(_)) => {
                c.forward_flops += flops / 3.0;
                c.backward_flops += flops - flops / 3.0;
            }
            Phase::Forward => c.forward_flops += flops,
            Phase::Recompute => c.recompute_flops += flops,
            Phase::Backward => c.backward_flops += flops,
            Phase::Update => c.update_flops += flops,
        }
    }
    c
}

/// Numbers of parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParamCounts {
    /// All, buffers that are not trained left out.
    pub total: usize,
    /// Those that work on one token: of expert weights, the share of the chosen experts.
    pub active: usize,
    /// Those of embedding tables, a tied head's included once.
    pub embedding: usize,
}

/// Counts parameters.
pub fn params(g: &Graph) -> ParamCounts {
    let tables: BTreeSet<&str> = g
        .nodes
        .iter()
        .filter(|n| matches!(n.op, Op::Embed(_)))
        .filter_map(|n| n.args.get(1).copied().flatten())
        .map(|v| g.value(v).name.as_str())
        .collect();
    let mut counts = ParamCounts::default();
    for p in g.params.iter().filter(|p| p.trainable) {
        let n = p.ty.len();
        counts.total += n;
        counts.active += n * p.active.0 / p.active.1.max(1);
        if tables.contains(p.name.as_str()) {
            counts.embedding += n;
        }
    }
    counts
}

/// Bytes that one sequence carries from run to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateBytes {
    /// Keys and values for every slot of the cache.
    pub kv_cache: usize,
    /// The same for one slot: what one more token of context costs.
    pub kv_per_token: usize,
    /// States of scans and convolutions: constant in the length.
    pub recurrent: usize,
}

/// Adds up states of a prefill or decode graph; zero for training graphs. The first dimension of a state is the batch, the second of
/// a cache its slots.
pub fn states(g: &Graph) -> StateBytes {
    let caches: BTreeSet<ValueId> = g
        .nodes
        .iter()
        .filter(|n| matches!(n.op, Op::CacheWrite(_)))
        .filter_map(|n| n.args.first().copied().flatten())
        .map(|v| g.root(v))
        .collect();
    let mut s = StateBytes::default();
    for v in g.value_ids() {
        if g.external(v) != Some(&External::State) {
            continue;
        }
        let ty = g.ty(v);
        let per_sequence = ty.bytes() / ty.dims.first().map_or(1, |d| d.size.max(1));
        if caches.contains(&v) {
            s.kv_cache += per_sequence;
            s.kv_per_token += per_sequence / ty.dims.get(1).map_or(1, |d| d.size.max(1));
        } else {
            s.recurrent += per_sequence;
        }
    }
    s
}
