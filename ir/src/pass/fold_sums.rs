//! Sums that products and norms make themselves: `a + linear_dx(dy, w)` becomes `linear_dx(dy, w, add=a)`, so that a residual stream and
//! the gradients of what several products read are never written only to be read, added and written again.
//!
//! Terms are added in the order in which they arise, each by the node that makes it; terms that other nodes make are added at the end.
//! Between two such nodes the sum has the precision of its type, as it has between two elementwise nodes.

use super::{Config, PassError, Uses, definers};
use crate::op::{Bin, Instr, Op, Pointwise};
use crate::{Graph, Node, ValueId};
use std::collections::HashMap;

/// Folds sums into the nodes that make their terms.
///
/// # Errors
/// None of its own.
pub fn fold_sums(g: &Graph, config: &Config) -> Result<Graph, PassError> {
    if !config.fuse {
        return Ok(g.clone());
    }
    let at = definers(g, &g.nodes);
    let uses = Uses::of(g, &g.nodes);
    let mut nodes: Vec<Option<Node>> = g.nodes.iter().cloned().map(Some).collect();
    for root in 0..g.nodes.len() {
        if is_sum(g, &g.nodes[root]) && !is_inner(g, &uses, root) {
            fold(g, &at, &uses, &mut nodes, root);
        }
    }
    let nodes: Vec<Node> = nodes.into_iter().flatten().collect();
    Ok(g.rebuild(&nodes, &HashMap::new()))
}

/// Whether a node adds two values of one type and does nothing else.
fn is_sum(g: &Graph, node: &Node) -> bool {
    let Op::Pointwise(p) = &node.op else {
        return false;
    };
    let y = g.ty(node.results[0]);
    *p == Pointwise::add()
        && node.present_args().all(|a| {
            let x = g.ty(a);
            x.same_shape(y) && x.dtype == y.dtype
        })
}

/// Whether a sum is a term of another sum and nothing else.
fn is_inner(g: &Graph, uses: &Uses, node: usize) -> bool {
    let sum = g.nodes[node].results[0];
    match uses.readers(sum) {
        [reader] => {
            let reader = &g.nodes[*reader as usize];
            !uses.is_output(sum)
                && is_sum(g, reader)
                && reader.present_args().filter(|&a| a == sum).count() == 1
        }
        _ => false,
    }
}

/// Terms of the sum that ends at node `root`, and the nodes that add them.
fn terms(
    g: &Graph,
    at: &[Option<u32>],
    uses: &Uses,
    root: usize,
    (found, sums): (&mut Vec<ValueId>, &mut Vec<usize>),
) {
    sums.push(root);
    for a in g.nodes[root].present_args() {
        match at[a.index()].map(|d| d as usize) {
            Some(d) if is_sum(g, &g.nodes[d]) && is_inner(g, uses, d) => {
                terms(g, at, uses, d, (found, sums));
            }
            _ => found.push(a),
        }
    }
}

/// Slot of `add` in a node whose first result can have something added to it.
fn slot(node: &Node) -> Option<usize> {
    let slot = match node.op {
        Op::Linear(_) => 3,
        Op::LinearDx(_) => 2,
        Op::RmsNormBwd(_) => 5,
        _ => return None,
    };
    node.args
        .get(slot)
        .is_none_or(Option::is_none)
        .then_some(slot)
}

fn fold(g: &Graph, at: &[Option<u32>], uses: &Uses, nodes: &mut [Option<Node>], root: usize) {
    let (mut found, mut sums) = (Vec::new(), Vec::new());
    terms(g, at, uses, root, (&mut found, &mut sums));
    found.sort_by_key(|v| at[v.index()]);
    let mut sum = found[0];
    let mut last = None;
    let mut rest = Vec::new();
    for &term in &found[1..] {
        // A term that something else reads too is to stay what it is.
        let alone = uses.readers(term).len() == 1
            && !uses.is_output(term)
            && found.iter().filter(|&&t| t == term).count() == 1;
        let maker = at[term.index()]
            .map(|d| d as usize)
            .filter(|&d| alone && nodes[d].as_ref().is_some_and(|n| n.results[0] == term));
        match maker.and_then(|d| Some((d, slot(nodes[d].as_ref()?)?))) {
            Some((d, slot)) => {
                if let Some(node) = &mut nodes[d] {
                    node.args.resize(slot + 1, None);
                    node.args[slot] = Some(sum);
                }
                sum = term;
                last = Some(d);
            }
            None => rest.push(term),
        }
    }
    let Some(last) = last else { return };
    for &s in &sums {
        nodes[s] = None;
    }
    let result = g.nodes[root].results[0];
    if rest.is_empty() {
        if let Some(node) = &mut nodes[last] {
            node.results[0] = result;
        }
        return;
    }
    let mut program = Pointwise::new(rest.len() + 1);
    let mut total = 0;
    for term in 1..=rest.len() as u16 {
        program.code.push(Instr::Bin(Bin::Add, total, term));
        total = (program.code.len() - 1) as u16;
    }
    program.outs = vec![total];
    nodes[root] = Some(Node {
        op: program.into(),
        args: std::iter::once(sum).chain(rest).map(Some).collect(),
        ..g.nodes[root].clone()
    });
}
