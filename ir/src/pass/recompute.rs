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
    /// Of all blocks what costs next to no operations: elementwise programs, norms, rotations and copies, where their arguments wait
    /// for backward anyway.
    Cheap,
    /// All blocks, whole.
    Block,
    /// As little as brings the arena down to this many bytes: first what is cheap, block by block, then whole blocks.
    Budget(usize),
}

/// Applies `config.recompute`.
///
/// # Errors
/// [`PassError::Budget`] when no choice of blocks fits.
pub fn recompute(g: &Graph, config: &Config) -> Result<Graph, PassError> {
    let budget_bytes = match config.recompute {
        RecomputePolicy::None => return Ok(g.clone()),
        RecomputePolicy::Cheap => return Ok(repeat(g, &by_worth(&repeatable(g, Level::Cheap)))),
        RecomputePolicy::Block => return Ok(repeat(g, &by_worth(&repeatable(g, Level::Whole)))),
        RecomputePolicy::Budget(bytes) => bytes,
    };
    let (cheap, whole) = (repeatable(g, Level::Cheap), repeatable(g, Level::Whole));
    let (cheap, whole) = (by_worth(&cheap), by_worth(&whole));
    // The first k steps: the cheap part of one block more, then one block more as a whole.
    let steps = cheap.len() + whole.len();
    let attempt = |k: usize| -> Result<(Graph, usize), PassError> {
        let whole = &whole[..k.saturating_sub(cheap.len())];
        let mut chosen: Vec<&Block> = cheap[..k.min(cheap.len())].to_vec();
        chosen.retain(|c| whole.iter().all(|w| w.block != c.block));
        chosen.extend(whole);
        let graph = repeat(g, &chosen);
        let bytes = plan(&super::schedule(&graph, config)?).arena_bytes;
        Ok((graph, bytes))
    };
    let (mut low, mut high) = (0, steps);
    let mut best = None;
    while low <= high {
        let k = low + (high - low) / 2;
        let (graph, bytes) = attempt(k)?;
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
            // More recomputation is not always less memory: look at every step before giving up.
            let mut smallest_bytes = usize::MAX;
            for k in 0..=steps {
                let (graph, bytes) = attempt(k)?;
                if bytes <= budget_bytes {
                    return Ok(graph);
                }
                smallest_bytes = smallest_bytes.min(bytes);
            }
            Err(PassError::Budget {
                budget_bytes,
                smallest_bytes,
            })
        }
    }
}

/// How much of a block may run again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    /// What costs next to no operations and needs nothing that would not be there.
    Cheap,
    /// Everything.
    Whole,
}

/// Most bytes for an operation first; earlier blocks first among equals, since their values wait longest.
fn by_worth(blocks: &[Block]) -> Vec<&Block> {
    let mut order: Vec<&Block> = blocks.iter().collect();
    order.sort_by(|a, b| {
        let (x, y) = (a.saved_bytes * b.flops, b.saved_bytes * a.flops);
        y.total_cmp(&x).then(a.block.cmp(&b.block))
    });
    order
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

/// Whether a node may run twice: it writes nothing, it takes no decision, and it is more than a name for rows of a parameter.
fn may_repeat(node: &Node) -> bool {
    let writes =
        (0..node.results.len()).any(|i| matches!(node.alias(i), Some(Alias::InPlace { .. })));
    let stays = matches!(
        node.op,
        Op::Route(_) | Op::Dispatch(_) | Op::Stat(_) | Op::Rows(_)
    );
    node.phase == Phase::Forward && node.block.is_some() && !writes && !stays
}

/// Whether a node costs next to no operations.
fn is_cheap(op: &Op) -> bool {
    matches!(
        op,
        Op::Pointwise(_)
            | Op::RmsNorm(_)
            | Op::Rope(_)
            | Op::Cast(_)
            | Op::Concat(_)
            | Op::Split(_)
            | Op::Reshape(_)
            | Op::GatherRows(_)
    )
}

/// Values that cheap nodes can make again from externals and from what backward reads in any case.
fn cheap_values(g: &Graph, uses: &Uses) -> Vec<bool> {
    let waits = |v: ValueId| {
        let mut readers = uses.readers(v).iter();
        g.external(v).is_some() || readers.any(|&r| g.nodes[r as usize].phase == Phase::Backward)
    };
    let mut cheap = vec![false; g.values.len()];
    for node in &g.nodes {
        let here = may_repeat(node)
            && is_cheap(&node.op)
            && node.present_args().all(|a| waits(a) || cheap[a.index()]);
        for r in &node.results {
            cheap[r.index()] = here;
        }
    }
    cheap
}

/// All blocks in which something can be computed again.
fn repeatable(g: &Graph, level: Level) -> Vec<Block> {
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
    let cheap = cheap_values(g, &uses);
    // The node to run again for `v`, if that is how it is to be had.
    let again = |v: ValueId, block: Option<u32>| -> Option<usize> {
        let n = at[v.index()]? as usize;
        let node = &g.nodes[n];
        let here = may_repeat(node) && (level == Level::Whole || cheap[v.index()]);
        (here && node.block == block && !kept(v, block)).then_some(n)
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
