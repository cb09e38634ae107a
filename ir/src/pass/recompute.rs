//! Activation checkpointing by block: forward values of chosen blocks are not kept for backward but computed a second time from the
//! block's inputs, right before the block's backward begins (Chen et al. 2016, arXiv 1604.06174).
//!
//! What other blocks read stays (it is the checkpoint), and so do routing decisions, which are small and must not differ. Values are
//! computed by the same ops from the same arguments, so results are equal bit for bit on deterministic backends.

use super::{Config, PassError, Uses, definers};
use crate::cost::node_flops;
use crate::op::{Alias, Op};
use crate::{Graph, Node, Phase, ValueId, plan};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// Which blocks are computed twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RecomputePolicy {
    /// None.
    #[default]
    None,
    /// All.
    Block,
    /// As few floating point operations' worth of blocks as bring the arena down to this many bytes.
    Budget(usize),
}

/// Applies `config.recompute`.
///
/// # Errors
/// [`PassError::Budget`] when no choice of blocks fits.
pub fn recompute(g: &Graph, config: &Config) -> Result<Graph, PassError> {
    let budget_bytes = match config.recompute {
        RecomputePolicy::None => return Ok(g.clone()),
        RecomputePolicy::Block => None,
        RecomputePolicy::Budget(bytes) => Some(bytes),
    };
    let blocks = repeatable(g);
    let Some(budget_bytes) = budget_bytes else {
        return Ok(repeat(g, &blocks.iter().collect::<Vec<_>>()));
    };
    // Most bytes for an operation first; earlier blocks first among equals, since their values wait longest.
    let mut order: Vec<&Block> = blocks.iter().collect();
    order.sort_by(|a, b| {
        let (x, y) = (a.saved_bytes * b.flops, b.saved_bytes * a.flops);
        y.total_cmp(&x).then(a.block.cmp(&b.block))
    });
    let attempt = |k: usize| {
        let graph = repeat(g, &order[..k]);
        let bytes = plan(&graph).arena_bytes;
        (graph, bytes)
    };
    let (mut low, mut high) = (0, order.len());
    let mut best = None;
    while low <= high {
        let k = low + (high - low) / 2;
        let (graph, bytes) = attempt(k);
        if bytes <= budget_bytes {
            best = Some(graph);
            match k.checked_sub(1) {
                Some(less) => high = less,
                None => break,
            }
        } else {
            low = k + 1;
        }
    }
    match best {
        Some(graph) => Ok(graph),
        None => {
            let all = (0..=order.len()).map(|k| attempt(k).1);
            Err(PassError::Budget {
                budget_bytes,
                smallest_bytes: all.min().unwrap_or(0),
            })
        }
    }
}

/// A block and what repeating it means.
struct Block {
    block: u32,
    /// Forward nodes that run again, in order.
    nodes: Vec<usize>,
    /// Backward nodes that read their results.
    readers: Vec<usize>,
    /// Bytes that need not wait for backward.
    saved_bytes: f64,
    /// Cost of running the nodes again.
    flops: f64,
}

/// Whether a node may run twice: it writes nothing, and it takes no decision.
fn may_repeat(node: &Node) -> bool {
    let writes =
        (0..node.results.len()).any(|i| matches!(node.alias(i), Some(Alias::InPlace { .. })));
    let decides = matches!(node.op, Op::Route(_) | Op::Dispatch(_) | Op::Stat(_));
    node.phase == Phase::Forward && node.block.is_some() && !writes && !decides
}

/// All blocks in which something can be computed again.
fn repeatable(g: &Graph) -> Vec<Block> {
    let at = definers(g, &g.nodes);
    let uses = Uses::of(g, &g.nodes);
    // A value that another block reads in forward, or the host, is kept in any case.
    let kept = |v: ValueId, block: Option<u32>| {
        uses.is_output(v)
            || uses.readers(v).iter().any(|&r| {
                let reader = &g.nodes[r as usize];
                reader.phase == Phase::Forward && reader.block != block
            })
    };
    // The node to run again for `v`, if that is how it is to be had.
    let again = |v: ValueId, block: Option<u32>| -> Option<usize> {
        let n = at[v.index()]? as usize;
        let node = &g.nodes[n];
        (may_repeat(node) && node.block == block && !kept(v, block)).then_some(n)
    };
    let mut wanted: BTreeMap<u32, (BTreeSet<usize>, BTreeSet<usize>)> = BTreeMap::new();
    for (i, reader) in g.nodes.iter().enumerate() {
        if reader.phase != Phase::Backward {
            continue;
        }
        for v in reader.present_args() {
            let Some(n) = at[v.index()] else { continue };
            let block = g.nodes[n as usize].block;
            if let (Some(b), Some(n)) = (block, again(v, block)) {
                let entry = wanted.entry(b).or_default();
                entry.0.insert(n);
                entry.1.insert(i);
            }
        }
    }
    wanted
        .into_iter()
        .map(|(block, (first, readers))| {
            let mut nodes = BTreeSet::new();
            let mut stack: Vec<usize> = first.iter().copied().collect();
            while let Some(n) = stack.pop() {
                if nodes.insert(n) {
                    let args = g.nodes[n].present_args();
                    stack.extend(args.filter_map(|a| again(a, Some(block))));
                }
            }
            let is_view = |n: usize, i| g.nodes[n].alias(i).is_some();
            let saved = first.iter().flat_map(|&n| {
                let results = g.nodes[n].results.iter().enumerate();
                results
                    .filter(move |&(i, _)| !is_view(n, i))
                    .map(|(_, &r)| r)
            });
            let saved_bytes = saved
                .filter(|&v| {
                    uses.readers(v)
                        .iter()
                        .any(|&r| g.nodes[r as usize].phase == Phase::Backward)
                })
                .map(|v| g.ty(v).bytes() as f64)
                .sum();
            let flops = nodes.iter().map(|&n| node_flops(g, &g.nodes[n])).sum();
            Block {
                block,
                nodes: nodes.into_iter().collect(),
                readers: readers.into_iter().collect(),
                saved_bytes,
                flops,
            }
        })
        .collect()
}

/// The graph in which these blocks run again right before the first of their readers.
fn repeat(g: &Graph, blocks: &[&Block]) -> Graph {
    let mut g = g.clone();
    let mut before: HashMap<usize, Vec<Node>> = HashMap::new();
    let mut nodes = g.nodes.clone();
    for block in blocks {
        let Some(&first) = block.readers.first() else {
            continue;
        };
        let mut copy: HashMap<ValueId, ValueId> = HashMap::new();
        let mut copies = Vec::with_capacity(block.nodes.len());
        for &n in &block.nodes {
            let mut node = g.nodes[n].clone();
            for a in node.args.iter_mut().flatten() {
                *a = copy.get(a).copied().unwrap_or(*a);
            }
            for (i, r) in node.results.iter_mut().enumerate() {
                let ty = g.ty(*r).clone();
                let new = g.add_result(ty, i);
                copy.insert(*r, new);
                *r = new;
            }
            node.phase = Phase::Recompute;
            copies.push(node);
        }
        // A node of the block that is itself kept (a checkpoint) may share its node with one that is not: readers take copies.
        let readers: HashSet<usize> = block.readers.iter().copied().collect();
        for r in readers {
            for a in nodes[r].args.iter_mut().flatten() {
                *a = copy.get(a).copied().unwrap_or(*a);
            }
        }
        before.entry(first).or_default().extend(copies);
    }
    let mut list = Vec::with_capacity(nodes.len());
    for (i, node) in nodes.into_iter().enumerate() {
        list.extend(before.remove(&i).unwrap_or_default());
        list.push(node);
    }
    g.rebuild(&list, &HashMap::new())
}
