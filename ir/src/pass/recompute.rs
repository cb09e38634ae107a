//! Activation checkpointing by block: forward values of chosen blocks are not kept for backward but computed a second time from the
//! block's inputs, right before the block's backward begins (Chen et al. 2016, arXiv 1604.06174).
//!
//! What other blocks read stays (it is the checkpoint), and so do routing decisions, which are small and must not differ. Values are
//! computed by the same ops from the same arguments, so results are equal bit for bit on deterministic backends.

use super::{Config, PassError, Uses, definers};
use crate::cost::{node_bytes, node_flops};
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
    /// As little as brings the arena down to this many bytes: first what is cheap, block by block, then values one by one, those first that
    /// give most bytes for the time that making them again takes.
    Budget(usize),
}

/// Applies `config.recompute`.
///
/// # Errors
/// [`PassError::Budget`] when no choice of blocks fits.
pub fn recompute(g: &Graph, config: &Config) -> Result<Graph, PassError> {
    let budget_bytes = match config.recompute {
        RecomputePolicy::None => return Ok(g.clone()),
        RecomputePolicy::Cheap => {
            let facts = Facts::of(g);
            return Ok(repeat(g, &facts.repeatable(&facts.cheap_nodes())));
        }
        RecomputePolicy::Block => {
            return Ok(repeat(
                g,
                &Facts::of(g).repeatable(&vec![true; g.nodes.len()]),
            ));
        }
        RecomputePolicy::Budget(bytes) => bytes,
    };
    let steps = Steps::of(g);
    let attempt = |k: usize| -> Result<(Graph, usize), PassError> {
        let graph = steps.take(g, k);
        let bytes = plan(&super::as_finished(&graph, "recompute", config)?).arena_bytes;
        Ok((graph, bytes))
    };
    let (mut low, mut high) = (0, steps.len());
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
            // More recomputation is not always less memory: look around before giving up.
            let mut smallest_bytes = usize::MAX;
            let stride = steps.len().div_ceil(LOOKS).max(1);
            for k in (0..=steps.len()).step_by(stride).chain([steps.len()]) {
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

/// Numbers of steps that are tried before a budget is given up.
const LOOKS: usize = 32;

/// Operations of a product in the time in which a byte is moved: of an H200 790 TFLOP/s over 4.2 TB/s. Only the order of what is
/// repeated depends on it.
const FLOPS_PER_BYTE: f64 = 190.0;

/// Scans take as long as moving their bytes so many times (0.5 ms for 0.28 GB on an H200).
const SCAN: f64 = 8.0;

/// What running a node again costs, in bytes that could be moved in the time.
fn price(g: &Graph, node: &Node) -> f64 {
    let moved = node_bytes(g, node);
    match node.op {
        Op::Ssd(_) | Op::SelectiveScan(_) | Op::GatedDelta(_) => SCAN * moved,
        _ => moved.max(node_flops(g, node) / FLOPS_PER_BYTE),
    }
}

/// What a budget chooses from, in the order in which it is taken: of one block after the other what is cheap; then single values with what
/// else it takes to make them again, most bytes for their price first; at last everything.
struct Steps {
    /// Blocks and their cheap part.
    cheap: Vec<Block>,
    /// Nodes that make a value again whose arguments wait for backward or are repeated themselves.
    single: Vec<Vec<usize>>,
}

impl Steps {
    fn of(g: &Graph) -> Steps {
        let facts = Facts::of(g);
        let cheap = by_worth(facts.repeatable(&facts.cheap_nodes()));
        Steps {
            single: facts.single(&cheap),
            cheap,
        }
    }

    fn len(&self) -> usize {
        self.cheap.len() + self.single.len() + 1
    }

    /// The graph after the first `k` steps.
    fn take(&self, g: &Graph, k: usize) -> Graph {
        let facts = Facts::of(g);
        let mut may = vec![false; g.nodes.len()];
        for block in self.cheap.iter().take(k) {
            block.nodes.iter().for_each(|&n| may[n] = true);
        }
        for nodes in self.single.iter().take(k.saturating_sub(self.cheap.len())) {
            nodes.iter().for_each(|&n| may[n] = true);
        }
        may.iter_mut().for_each(|m| *m |= k == self.len());
        repeat(g, &facts.repeatable(&may))
    }
}

/// Most bytes for their price first; earlier blocks first among equals, since their values wait longest.
fn by_worth(mut blocks: Vec<Block>) -> Vec<Block> {
    blocks.sort_by(|a, b| {
        let (x, y) = (a.saved_bytes * b.price, b.saved_bytes * a.price);
        y.total_cmp(&x).then(a.block.cmp(&b.block))
    });
    blocks
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
    /// Of running the nodes again.
    price: f64,
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

/// What the choice looks at.
struct Facts<'g> {
    g: &'g Graph,
    /// The node that makes each value.
    at: Vec<Option<u32>>,
    uses: Uses,
    /// Whether backward reads the memory of each value, under whatever name.
    waits: Vec<bool>,
    /// Whether another block reads the memory of each value in forward, or the host: it is kept in any case.
    kept: Vec<bool>,
    /// Whose memory each value is.
    roots: Vec<ValueId>,
}

impl<'g> Facts<'g> {
    fn of(g: &'g Graph) -> Self {
        let at = definers(g, &g.nodes);
        let uses = Uses::of(g, &g.nodes);
        let roots: Vec<ValueId> = g.roots().into_iter().map(|(root, _)| root).collect();
        let mut waits = vec![false; g.values.len()];
        let mut kept = vec![false; g.values.len()];
        for v in g.value_ids() {
            let block = at[v.index()].and_then(|n: u32| g.nodes[n as usize].block);
            let root = roots[v.index()].index();
            kept[root] |= uses.is_output(v);
            for &r in uses.readers(v) {
                let reader = &g.nodes[r as usize];
                waits[root] |= reader.phase == Phase::Backward;
                kept[root] |= reader.phase == Phase::Forward && reader.block != block;
            }
        }
        for v in g.value_ids() {
            waits[v.index()] = waits[roots[v.index()].index()];
            kept[v.index()] = kept[roots[v.index()].index()];
        }
        Facts {
            g,
            at,
            uses,
            waits,
            kept,
            roots,
        }
    }

    /// Whether `v` can be read in backward without keeping anything that would not be kept.
    fn is_there(&self, v: ValueId) -> bool {
        self.g.external(self.roots[v.index()]).is_some() || self.waits[v.index()]
    }

    /// Nodes that cost next to nothing and can run again from externals and from what backward reads in any case.
    fn cheap_nodes(&self) -> Vec<bool> {
        let mut cheap = vec![false; self.g.values.len()];
        let mut nodes = vec![false; self.g.nodes.len()];
        for (i, node) in self.g.nodes.iter().enumerate() {
            // A view of what is there is there too.
            let view = node.alias(0).is_some();
            let from = |a: ValueId| cheap[a.index()] || self.is_there(a) && !view;
            nodes[i] = may_repeat(node) && is_cheap(&node.op) && node.present_args().all(from);
            for r in &node.results {
                cheap[r.index()] = nodes[i];
            }
        }
        nodes
    }

    /// The nodes to run again for each memory that waits for backward and is not made by `cheap` blocks, most bytes for their price first.
    fn single(&self, cheap: &[Block]) -> Vec<Vec<usize>> {
        let g = self.g;
        let mut taken = vec![false; g.nodes.len()];
        for block in cheap {
            block.nodes.iter().for_each(|&n| taken[n] = true);
        }
        // What backward reads, by the node that has the memory.
        let mut wanted: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for v in g.value_ids() {
            let root = self.roots[v.index()];
            let (Some(n), Some(home)) = (self.at[v.index()], self.at[root.index()]) else {
                continue;
            };
            let (n, home) = (n as usize, home as usize);
            let backward = |&r: &u32| g.nodes[r as usize].phase == Phase::Backward;
            let read = self.uses.readers(v).iter().any(backward);
            if read && may_repeat(&g.nodes[n]) && !taken[home] && !self.kept[v.index()] {
                wanted.entry(home).or_default().insert(n);
            }
        }
        let mut list: Vec<(f64, f64, Vec<usize>)> = Vec::new();
        for (home, first) in wanted {
            let block = g.nodes[home].block;
            let mut nodes = BTreeSet::new();
            let mut stack: Vec<usize> = first.into_iter().collect();
            while let Some(n) = stack.pop() {
                if !nodes.insert(n) {
                    continue;
                }
                for a in g.nodes[n].present_args() {
                    let Some(m) = self.at[a.index()].map(|m| m as usize) else {
                        continue;
                    };
                    let mine = self.at[self.roots[a.index()].index()] == Some(home as u32);
                    let here = may_repeat(&g.nodes[m]) && g.nodes[m].block == block;
                    if here && !self.kept[a.index()] && (mine || !self.waits[a.index()]) {
                        stack.push(m);
                    }
                }
            }
            let bytes =
                |v: &ValueId| match g.nodes[home].results.contains(v) && self.waits[v.index()] {
                    true => g.ty(*v).bytes() as f64,
                    false => 0.0,
                };
            let saved = g.nodes[home].results.iter().map(bytes).sum();
            let price = nodes.iter().map(|&n| price(g, &g.nodes[n])).sum();
            list.push((saved, price, nodes.into_iter().collect()));
        }
        list.sort_by(|a, b| (b.0 * a.1).total_cmp(&(a.0 * b.1)).then(a.2.cmp(&b.2)));
        list.into_iter().map(|(_, _, nodes)| nodes).collect()
    }

    /// All blocks in which something is computed again when these nodes may be.
    fn repeatable(&self, may: &[bool]) -> Vec<Block> {
        let g = self.g;
        // The node to run again for `v`, if that is how it is to be had.
        let again = |v: ValueId, block: Option<u32>| -> Option<usize> {
            let n = self.at[v.index()]? as usize;
            let node = &g.nodes[n];
            let here = may_repeat(node) && may[n] && node.block == block;
            (here && !self.kept[v.index()]).then_some(n)
        };
        let mut wanted: BTreeMap<u32, (BTreeSet<usize>, BTreeSet<usize>)> = BTreeMap::new();
        for (i, reader) in g.nodes.iter().enumerate() {
            if reader.phase != Phase::Backward {
                continue;
            }
            for v in reader.present_args() {
                let Some(n) = self.at[v.index()] else {
                    continue;
                };
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
                let saved = first.iter().flat_map(|&n| {
                    let results = g.nodes[n].results.iter().enumerate();
                    results.filter(move |&(i, _)| g.nodes[n].alias(i).is_none())
                });
                let saved_bytes = saved
                    .filter(|(_, v)| self.waits[v.index()])
                    .map(|(_, v)| g.ty(*v).bytes() as f64)
                    .sum();
                let price = nodes.iter().map(|&n| price(g, &g.nodes[n])).sum();
                Block {
                    block,
                    nodes: nodes.into_iter().collect(),
                    readers: readers.into_iter().collect(),
                    saved_bytes,
                    price,
                }
            })
            .collect()
    }
}

/// The graph in which these blocks run again right before the first of their readers.
fn repeat(g: &Graph, blocks: &[Block]) -> Graph {
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
