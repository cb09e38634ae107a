//! Reorders nodes within each run of one phase and block where that lowers the most bytes alive there.
//!
//! What is alive before and after such a run does not depend on the order within it, so each run is decided alone: of the nodes that
//! may come next, the one after which least is alive goes first, and the new order is taken only where its peak is lower. Nodes that
//! write over memory keep their place among all nodes that touch it.

use super::{Config, PassError};
use crate::op::Alias;
use crate::{ALIGN, Graph, Node};
use std::collections::{HashMap, HashSet};

/// Lowers the peak by order alone.
///
/// # Errors
/// None of its own.
pub fn schedule(g: &Graph, config: &Config) -> Result<Graph, PassError> {
    if !config.schedule {
        return Ok(g.clone());
    }
    let memory = Memory::of(g);
    let mut order: Vec<usize> = Vec::with_capacity(g.nodes.len());
    let mut start = 0;
    for end in 1..=g.nodes.len() {
        let first = &g.nodes[start];
        let same = g
            .nodes
            .get(end)
            .is_some_and(|n| n.phase == first.phase && n.block == first.block);
        if same {
            continue;
        }
        let old: Vec<usize> = (start..end).collect();
        let new = memory.greedy(g, start, end);
        let better = memory.peak(start, end, &new) < memory.peak(start, end, &old);
        order.extend(if better { new } else { old });
        start = end;
    }
    let nodes: Vec<Node> = order.into_iter().map(|i| g.nodes[i].clone()).collect();
    Ok(g.rebuild(&nodes, &HashMap::new()))
}

/// Memory that nodes touch, by root.
struct Memory {
    /// For each node, the roots that it reads or writes, each once, external ones too.
    touched: Vec<Vec<usize>>,
    /// For each node, the roots that it writes over.
    written: Vec<Vec<usize>>,
    /// For each root, its bytes in the arena; 0 for externals.
    bytes: Vec<isize>,
    /// For each root, the first and last node that touch it.
    life: Vec<(usize, usize)>,
}

impl Memory {
    fn of(g: &Graph) -> Memory {
        let roots = g.roots();
        let root = |v: crate::ValueId| roots[v.index()].0.index();
        let mut life = vec![(usize::MAX, 0); g.values.len()];
        let mut touched = Vec::with_capacity(g.nodes.len());
        let mut written = Vec::with_capacity(g.nodes.len());
        for (i, node) in g.nodes.iter().enumerate() {
            let mut t: Vec<usize> = node
                .present_args()
                .chain(node.results.iter().copied())
                .map(root)
                .collect();
            t.sort_unstable();
            t.dedup();
            for &r in &t {
                life[r] = (life[r].0.min(i), i);
            }
            touched.push(t);
            let over = |&(k, _): &(usize, &crate::ValueId)| {
                matches!(node.alias(k), Some(Alias::InPlace { .. }))
            };
            written.push(
                node.results
                    .iter()
                    .enumerate()
                    .filter(over)
                    .map(|(_, &r)| root(r))
                    .collect(),
            );
        }
        for (_, v) in &g.outputs {
            life[root(*v)].1 = g.nodes.len();
        }
        let bytes = g
            .value_ids()
            .map(|v| match g.external(v) {
                Some(_) => 0,
                None => g.ty(v).bytes().next_multiple_of(ALIGN) as isize,
            })
            .collect();
        Memory {
            touched,
            written,
            bytes,
            life,
        }
    }

    /// How often nodes `start..end` touch each of their roots.
    fn touches(&self, start: usize, end: usize) -> HashMap<usize, usize> {
        let mut left = HashMap::new();
        for t in &self.touched[start..end] {
            for &r in t {
                *left.entry(r).or_default() += 1;
            }
        }
        left
    }

    /// Bytes that come alive with node `i` of the run `start..end`, and bytes that die after it; `born` have been touched in the run,
    /// `left` says how often each root is still to be touched.
    fn change(
        &self,
        i: usize,
        (start, end): (usize, usize),
        born: &HashSet<usize>,
        left: &HashMap<usize, usize>,
    ) -> (isize, isize) {
        let (mut more, mut less) = (0, 0);
        for &r in &self.touched[i] {
            let (first, last) = self.life[r];
            if first >= start && !born.contains(&r) {
                more += self.bytes[r];
            }
            if last < end && left.get(&r) == Some(&1) {
                less += self.bytes[r];
            }
        }
        (more, less)
    }

    /// Most bytes alive during the nodes `start..end` run in this order, over what is alive before them.
    fn peak(&self, start: usize, end: usize, order: &[usize]) -> isize {
        let mut left = self.touches(start, end);
        let mut born = HashSet::new();
        let (mut live, mut peak) = (0, 0);
        for &i in order {
            let (more, less) = self.change(i, (start, end), &born, &left);
            live += more;
            peak = peak.max(live);
            live -= less;
            self.step(i, &mut born, &mut left);
        }
        peak
    }

    fn step(&self, i: usize, born: &mut HashSet<usize>, left: &mut HashMap<usize, usize>) {
        for &r in &self.touched[i] {
            born.insert(r);
            if let Some(n) = left.get_mut(&r) {
                *n -= 1;
            }
        }
    }

    /// The order that always goes on with the node after which least is alive.
    fn greedy(&self, g: &Graph, start: usize, end: usize) -> Vec<usize> {
        let mut waits: Vec<Vec<usize>> = vec![Vec::new(); end - start];
        let mut pending = vec![0usize; end - start];
        let mut edge = |from: usize, to: usize| {
            waits[from - start].push(to);
            pending[to - start] += 1;
        };
        let mut definer: HashMap<crate::ValueId, usize> = HashMap::new();
        let mut touchers: HashMap<usize, Vec<usize>> = HashMap::new();
        let mut writer: HashMap<usize, usize> = HashMap::new();
        for i in start..end {
            for a in g.nodes[i].present_args() {
                if let Some(&d) = definer.get(&a) {
                    edge(d, i);
                }
            }
            for r in &self.written[i] {
                for &before in touchers.get(r).into_iter().flatten() {
                    edge(before, i);
                }
            }
            for r in &self.touched[i] {
                // What follows a write stays behind it.
                if let Some(&w) = writer.get(r) {
                    edge(w, i);
                }
                touchers.entry(*r).or_default().push(i);
            }
            for &r in &self.written[i] {
                writer.insert(r, i);
            }
            definer.extend(g.nodes[i].results.iter().map(|&r| (r, i)));
        }
        let mut left = self.touches(start, end);
        let mut born = HashSet::new();
        let mut ready: Vec<usize> = (start..end).filter(|i| pending[i - start] == 0).collect();
        let mut order = Vec::with_capacity(end - start);
        while let Some((k, _)) = ready.iter().enumerate().min_by_key(|&(_, &i)| {
            let (more, less) = self.change(i, (start, end), &born, &left);
            (more - less, more, i)
        }) {
            let i = ready.swap_remove(k);
            self.step(i, &mut born, &mut left);
            order.push(i);
            for &next in &waits[i - start] {
                pending[next - start] -= 1;
                if pending[next - start] == 0 {
                    ready.push(next);
                }
            }
        }
        order
    }
}
