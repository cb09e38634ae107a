//! Drops nodes whose results nobody reads, results of elementwise programs that nobody reads, and constants that nobody reads.
//! What writes into externals stays.

use super::{Config, PassError};
use crate::op::{Alias, Op};
use crate::{Graph, Node, Type, ValueId};
use std::collections::HashMap;

/// Drops what has no effect.
///
/// # Errors
/// None of its own.
pub fn dce(g: &Graph, _: &Config) -> Result<Graph, PassError> {
    let roots = g.roots();
    let mut live = vec![false; g.values.len()];
    for (_, v) in &g.outputs {
        live[v.index()] = true;
    }
    let mut kept: Vec<Node> = Vec::with_capacity(g.nodes.len());
    for node in g.nodes.iter().rev() {
        let writes_external = node.results.iter().enumerate().any(|(i, r)| {
            matches!(node.alias(i), Some(Alias::InPlace { .. }))
                && g.external(roots[r.index()].0).is_some()
        });
        if !writes_external && !node.results.iter().any(|r| live[r.index()]) {
            continue;
        }
        let node = match &node.op {
            Op::Pointwise(_) => narrow(g, node, &live),
            _ => node.clone(),
        };
        for a in node.present_args() {
            live[a.index()] = true;
        }
        kept.push(node);
    }
    kept.reverse();
    Ok(g.rebuild(&kept, &HashMap::new()))
}

/// An elementwise node without the results that nobody reads.
fn narrow(g: &Graph, node: &Node, live: &[bool]) -> Node {
    let Op::Pointwise(p) = &node.op else {
        return node.clone();
    };
    let keep: Vec<usize> = (0..node.results.len())
        .filter(|&i| live[node.results[i].index()])
        .collect();
    let mut p = p.clone();
    p.outs = keep.iter().map(|&i| p.outs[i]).collect();
    let results: Vec<ValueId> = keep.iter().map(|&i| node.results[i]).collect();
    let args: Vec<ValueId> = node.present_args().collect();
    let types: Vec<&Type> = args.iter().map(|&v| g.ty(v)).collect();
    let (p, kept) = p.prune_typed(&types, g.ty(results[0]));
    Node {
        op: p.into(),
        args: kept.iter().map(|&i| Some(args[i])).collect(),
        results,
        ..node.clone()
    }
}
