//! Merges elementwise programs where that lowers memory traffic and does not make values live longer than it makes others shorter.
//!
//! Three cases, repeated until nothing changes: a producer read by one program alone joins it; a short producer read by several is
//! computed in each of them, where reading its arguments costs less than writing and reading it; two programs that read the same
//! values become one with more results. Operations and their order stay, so results are equal bit for bit wherever intermediate
//! results have the precision of the arithmetic (f32); bf16 intermediates lose a rounding.

use super::{Config, PassError, Uses, definers};
use crate::op::{Alias, ArgTypes, Op, Pointwise};
use crate::{Graph, Node, Type, ValueId};
use std::collections::HashMap;

/// Most arguments of a fused program: a kernel keeps one pointer and one register for each.
const MAX_ARGS: usize = 12;

/// Most results of a fused program.
const MAX_RESULTS: usize = 8;

/// Most instructions of a fused program.
const MAX_CODE: usize = 64;

/// Most operations of a producer that is computed again in each of several consumers.
const MAX_REPEATED: usize = 4;

/// Merges elementwise nodes.
///
/// # Errors
/// None of its own.
pub fn fuse_pointwise(g: &Graph, config: &Config) -> Result<Graph, PassError> {
    if !config.fuse {
        return Ok(g.clone());
    }
    let mut nodes = g.nodes.clone();
    // Each sweep that changes something removes a node.
    while let Some(next) = sweep(g, nodes.clone()) {
        nodes = next;
    }
    Ok(g.rebuild(&nodes, &HashMap::new()))
}

/// What the decisions of one sweep look at.
struct Sweep<'g> {
    g: &'g Graph,
    uses: Uses,
    /// Whether memory is of the arena, by value.
    arena: Vec<bool>,
    /// Last node that reads or makes a value of the same memory, by root; the number of nodes for outputs.
    last: Vec<usize>,
    roots: Vec<ValueId>,
    /// By root, nodes that write over the memory.
    writers: HashMap<ValueId, Vec<usize>>,
}

impl<'g> Sweep<'g> {
    fn new(g: &'g Graph, nodes: &[Node]) -> Self {
        let mut roots: Vec<ValueId> = g.value_ids().collect();
        let mut writers: HashMap<ValueId, Vec<usize>> = HashMap::new();
        let mut last = vec![0; g.values.len()];
        for (i, node) in nodes.iter().enumerate() {
            for (k, r) in node.results.iter().enumerate() {
                if let Some(alias) = node.alias(k)
                    && let Some(arg) = node.args.get(alias.arg()).copied().flatten()
                {
                    let root = roots[arg.index()];
                    roots[r.index()] = root;
                    if let Alias::InPlace { .. } = alias {
                        writers.entry(root).or_default().push(i);
                    }
                }
                last[roots[r.index()].index()] = i;
            }
            for a in node.present_args() {
                last[roots[a.index()].index()] = i;
            }
        }
        for (_, v) in &g.outputs {
            last[roots[v.index()].index()] = nodes.len();
        }
        let arena = roots.iter().map(|&r| g.external(r).is_none()).collect();
        Sweep {
            g,
            uses: Uses::of(g, nodes),
            arena,
            last,
            roots,
            writers,
        }
    }

    /// Bytes that would live longer were the arguments of `node` read at `until`.
    fn extended(&self, node: &Node, until: usize) -> usize {
        let mut seen: Vec<ValueId> = Vec::new();
        for a in node.present_args() {
            let root = self.roots[a.index()];
            if self.arena[a.index()] && self.last[root.index()] < until && !seen.contains(&root) {
                seen.push(root);
            }
        }
        seen.iter().map(|&r| self.g.ty(r).bytes()).sum()
    }

    /// Whether memory of an argument of `node` is written over between nodes `from` and `to`.
    fn overwritten(&self, node: &Node, from: usize, to: usize) -> bool {
        node.present_args().any(|a| {
            self.writers
                .get(&self.roots[a.index()])
                .is_some_and(|w| w.iter().any(|&i| from <= i && i <= to))
        })
    }

    fn result_bytes(&self, node: &Node) -> usize {
        node.results.iter().map(|r| self.g.ty(*r).bytes()).sum()
    }
}

fn program(node: &Node) -> Option<&Pointwise> {
    match &node.op {
        Op::Pointwise(p) if !p.outs.is_empty() => Some(p),
        _ => None,
    }
}

fn sweep(g: &Graph, nodes: Vec<Node>) -> Option<Vec<Node>> {
    let s = Sweep::new(g, &nodes);
    let at = definers(g, &nodes);
    let mut nodes: Vec<Option<Node>> = nodes.into_iter().map(Some).collect();
    let mut touched = vec![false; nodes.len()];
    let mut changed = false;
    for p in 0..nodes.len() {
        let Some(producer) = nodes[p].clone() else {
            continue;
        };
        if touched[p] || program(&producer).is_none() {
            continue;
        }
        let into_readers = join_readers(&s, &nodes, &touched, p, &producer);
        if let Some(merged) = into_readers {
            nodes[p] = None;
            touched[p] = true;
            for (c, node) in merged {
                nodes[c] = Some(node);
                touched[c] = true;
            }
            changed = true;
        } else if let Some((c, node)) = join_sibling(&s, &nodes, &touched, &at, p, &producer) {
            nodes[p] = Some(node);
            nodes[c] = None;
            touched[p] = true;
            touched[c] = true;
            changed = true;
        }
    }
    changed.then(|| nodes.into_iter().flatten().collect())
}

/// The readers of `producer` with its program in them, when all of them can take it.
fn join_readers(
    s: &Sweep,
    nodes: &[Option<Node>],
    touched: &[bool],
    p: usize,
    producer: &Node,
) -> Option<Vec<(usize, Node)>> {
    let g = s.g;
    if producer.results.iter().any(|&r| s.uses.is_output(r)) {
        return None;
    }
    let mut readers: Vec<usize> = producer
        .results
        .iter()
        .flat_map(|&r| s.uses.readers(r))
        .map(|&r| r as usize)
        .collect();
    readers.sort_unstable();
    readers.dedup();
    let last = *readers.last()?;
    let shape = g.ty(producer.results[0]);
    for &c in &readers {
        let consumer = nodes[c].as_ref()?;
        program(consumer)?;
        if touched[c] || !g.ty(consumer.results[0]).same_shape(shape) {
            return None;
        }
    }
    if s.overwritten(producer, p, last) {
        return None;
    }
    if last > p + 1 && s.extended(producer, last) > s.result_bytes(producer) {
        return None;
    }
    if readers.len() > 1 {
        let own = program(producer)?;
        if own.outs.len() > 1 || own.code.len() - own.n_args > MAX_REPEATED {
            return None;
        }
        let bytes = |v: ValueId| g.ty(v).bytes();
        let reads: usize = producer.present_args().map(bytes).sum();
        let again: usize = readers
            .iter()
            .filter_map(|&c| nodes[c].as_ref())
            .map(|consumer| {
                producer
                    .present_args()
                    .filter(|a| !consumer.args.contains(&Some(*a)))
                    .map(bytes)
                    .sum::<usize>()
            })
            .sum();
        if again >= reads + (1 + readers.len()) * s.result_bytes(producer) {
            return None;
        }
    }
    readers
        .into_iter()
        .map(|c| Some((c, merge(g, producer, nodes[c].as_ref()?, false)?)))
        .collect()
}

/// A later program over the same shape that shares an argument with `producer`, could run in its place, and what both become.
fn join_sibling(
    s: &Sweep,
    nodes: &[Option<Node>],
    touched: &[bool],
    at: &[Option<u32>],
    p: usize,
    producer: &Node,
) -> Option<(usize, Node)> {
    let g = s.g;
    let shape = g.ty(producer.results[0]);
    let mut candidates: Vec<usize> = producer
        .present_args()
        .filter(|a| g.ty(*a).same_shape(shape))
        .flat_map(|a| s.uses.readers(a))
        .map(|&r| r as usize)
        .filter(|&c| c > p && !touched[c])
        .collect();
    candidates.sort_unstable();
    candidates.dedup();
    for c in candidates {
        let Some(sibling) = nodes[c].as_ref() else {
            continue;
        };
        let ready = |a: ValueId| at[a.index()].is_none_or(|d| (d as usize) < p);
        if program(sibling).is_none()
            || !g.ty(sibling.results[0]).same_shape(shape)
            || !sibling.present_args().all(ready)
            || s.overwritten(sibling, p, c)
        {
            continue;
        }
        // Its results live from p on instead of from c on; arguments that it read last die at p.
        let mut freed: Vec<ValueId> = sibling
            .present_args()
            .map(|a| s.roots[a.index()])
            .filter(|r| s.arena[r.index()] && s.last[r.index()] == c)
            .collect();
        freed.sort_unstable();
        freed.dedup();
        let freed: usize = freed.iter().map(|&r| g.ty(r).bytes()).sum();
        if c > p + 1 && s.result_bytes(sibling) > freed {
            continue;
        }
        if let Some(node) = merge(g, producer, sibling, true) {
            return Some((c, node));
        }
    }
    None
}

/// One node that does what `first` and then `second` do; results of `first` only where `keep`. `None` when it would be too large or
/// would not have the same types.
fn merge(g: &Graph, first: &Node, second: &Node, keep: bool) -> Option<Node> {
    let (p, c) = (program(first)?, program(second)?);
    let mut args: Vec<ValueId> = Vec::new();
    for a in first.present_args().chain(second.present_args()) {
        if !first.results.contains(&a) && !args.contains(&a) {
            args.push(a);
        }
    }
    if args.len() > u16::MAX as usize {
        return None;
    }
    let register = |v: ValueId| args.iter().position(|&a| a == v).map(|i| i as u16);
    let mut merged = Pointwise::new(args.len());
    let inner: Option<Vec<u16>> = first.present_args().map(register).collect();
    let made = merged.append(p, &inner?);
    let inner: Option<Vec<u16>> = second
        .present_args()
        .map(|a| match first.results.iter().position(|&r| r == a) {
            Some(i) => Some(made[i]),
            None => register(a),
        })
        .collect();
    let outs = merged.append(c, &inner?);
    let mut results = Vec::new();
    if keep {
        merged.outs.extend(made);
        results.extend(first.results.iter().copied());
    }
    merged.outs.extend(outs);
    results.extend(second.results.iter().copied());

    let types: Vec<&Type> = args.iter().map(|&v| g.ty(v)).collect();
    let (merged, kept) = merged.prune_typed(&types, g.ty(results[0]));
    if merged.n_args > MAX_ARGS || merged.outs.len() > MAX_RESULTS || merged.code.len() > MAX_CODE {
        return None;
    }
    let types: Vec<Option<Type>> = kept.iter().map(|&i| Some(types[i].clone())).collect();
    let op = Op::from(merged);
    let inferred = op
        .infer(&ArgTypes {
            op: op.name(),
            types: &types,
        })
        .ok()?;
    let same = inferred.iter().zip(&results).all(|(t, &r)| {
        let old = g.ty(r);
        t.dtype == old.dtype && t.same_shape(old)
    });
    same.then(|| Node {
        op,
        args: kept.iter().map(|&i| Some(args[i])).collect(),
        results,
        ..if keep { first } else { second }.clone()
    })
}
