//! The memory plan: an offset in one arena for every value that needs memory of its own, from exact lifetimes.
//!
//! Memory is known before anything runs. A plan is a pure function of the graph.

use crate::{Def, Graph, ValueId};
use std::collections::HashMap;

/// Alignment of every offset, in bytes: a cache line, an AVX-512 register, a GPU memory segment.
pub const ALIGN: usize = 256;

/// Where the bytes of a value are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// In the arena.
    Arena {
        /// In bytes from its start.
        offset: usize,
    },
    /// In an external.
    External {
        /// The external value.
        root: ValueId,
        /// In bytes from its start.
        offset: usize,
    },
}

/// Offsets of all values, and what they add up to.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Memory of each value by id.
    pub memory: Vec<Memory>,
    /// Size of the arena in bytes.
    pub arena_bytes: usize,
    /// Largest sum of bytes alive at once: no arena can be smaller.
    pub live_bytes: usize,
    /// Sum of all values' bytes, what a run without a plan would allocate.
    pub total_bytes: usize,
}

/// A root value's bytes and the node indices (inclusive) between which they must stay.
struct Lifetime {
    root: ValueId,
    bytes: usize,
    first: usize,
    last: usize,
}

/// Plans the arena: exact lifetimes (aliases extend their root's), greedy placement, largest first, each at the lowest offset that is
/// free throughout its life.
pub fn plan(g: &Graph) -> Plan {
    let lifetimes = lifetimes(g);
    let total_bytes = lifetimes.iter().map(|l| l.bytes).sum();
    let live_bytes = live_bound(&lifetimes, g.nodes.len());

    let mut order: Vec<&Lifetime> = lifetimes.iter().collect();
    order.sort_by(|a, b| {
        b.bytes
            .cmp(&a.bytes)
            .then(a.first.cmp(&b.first))
            .then(a.root.cmp(&b.root))
    });
    let mut placed: Vec<(usize, &Lifetime)> = Vec::new();
    let mut offsets: HashMap<ValueId, usize> = HashMap::new();
    let mut arena_bytes = 0;
    for l in order {
        let mut busy: Vec<(usize, usize)> = placed
            .iter()
            .filter(|(_, p)| p.first <= l.last && l.first <= p.last)
            .map(|(o, p)| (*o, o + p.bytes))
            .collect();
        busy.sort_unstable();
        let mut offset = 0;
        for (start, end) in busy {
            if offset + l.bytes <= start {
                break;
            }
            offset = offset.max(end);
        }
        offsets.insert(l.root, offset);
        arena_bytes = arena_bytes.max(offset + l.bytes);
        placed.push((offset, l));
    }
    let memory = g
        .value_ids()
        .map(|v| {
            let (root, inner) = (g.root(v), g.root_offset(v));
            match g.external(root) {
                Some(_) => Memory::External {
                    root,
                    offset: inner,
                },
                None => Memory::Arena {
                    offset: offsets.get(&root).copied().unwrap_or(0) + inner,
                },
            }
        })
        .collect();
    Plan {
        memory,
        arena_bytes,
        live_bytes,
        total_bytes,
    }
}

fn lifetimes(g: &Graph) -> Vec<Lifetime> {
    let mut list: Vec<Lifetime> = Vec::new();
    let mut at: HashMap<ValueId, usize> = HashMap::new();
    for (i, node) in g.nodes.iter().enumerate() {
        for &r in &node.results {
            let root = g.root(r);
            if g.external(root).is_some() {
                continue;
            }
            at.entry(root).or_insert_with(|| {
                let bytes = g.ty(root).bytes().next_multiple_of(ALIGN);
                list.push(Lifetime {
                    root,
                    bytes,
                    first: i,
                    last: i,
                });
                list.len() - 1
            });
        }
        for v in node.present_args().chain(node.results.iter().copied()) {
            if let Some(&k) = at.get(&g.root(v)) {
                list[k].last = list[k].last.max(i);
            }
        }
    }
    for (_, v) in &g.outputs {
        if let Some(&k) = at.get(&g.root(*v)) {
            list[k].last = g.nodes.len();
        }
    }
    list
}

fn live_bound(lifetimes: &[Lifetime], n_nodes: usize) -> usize {
    let mut delta = vec![0isize; n_nodes + 2];
    for l in lifetimes {
        delta[l.first] += l.bytes as isize;
        delta[l.last + 1] -= l.bytes as isize;
    }
    let mut live = 0isize;
    delta
        .iter()
        .map(|d| {
            live += d;
            live as usize
        })
        .max()
        .unwrap_or(0)
}

impl Plan {
    /// Memory of `v`.
    pub fn of(&self, v: ValueId) -> Memory {
        self.memory[v.index()]
    }

    /// The largest values that are alive at the moment of highest demand, largest first: what an out-of-memory error names.
    pub fn largest_at_peak(&self, g: &Graph, n: usize) -> Vec<(String, String, usize)> {
        let lifetimes = lifetimes(g);
        let peak = (0..g.nodes.len())
            .max_by_key(|&i| {
                lifetimes
                    .iter()
                    .filter(|l| l.first <= i && i <= l.last)
                    .map(|l| l.bytes)
                    .sum::<usize>()
            })
            .unwrap_or(0);
        let mut live: Vec<&Lifetime> = lifetimes
            .iter()
            .filter(|l| l.first <= peak && peak <= l.last)
            .collect();
        live.sort_by(|a, b| b.bytes.cmp(&a.bytes).then(a.root.cmp(&b.root)));
        live.into_iter()
            .take(n)
            .map(|l| {
                let path = match g.value(l.root).def {
                    Def::Node { node, .. } => {
                        let node = g.node(node);
                        format!("{} ({})", node.path, node.op.name())
                    }
                    Def::External(_) => g.value(l.root).name.clone(),
                };
                (path, g.ty(l.root).to_string(), l.bytes)
            })
            .collect()
    }
}
