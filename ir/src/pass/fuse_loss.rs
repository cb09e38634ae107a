//! Loss and its derivative in one node, where the loss's gradient is known before the loss: one walk over the logits instead of two,
//! three matrix products instead of four (the backward op recomputes the logits).

use super::{Config, PassError, definers};
use crate::op::{LinearCrossEntropyGrad, Op};
use crate::{External, Graph, Node, ValueId};
use std::collections::HashMap;

/// Largest value, in elements, that is computed earlier to know the gradient beforehand. It is a scalar in all lowerings.
const SMALL: usize = 16;

/// Fuses each `linear_cross_entropy` with its `linear_cross_entropy_bwd`.
///
/// # Errors
/// None of its own.
pub fn fuse_loss(g: &Graph, config: &Config) -> Result<Graph, PassError> {
    if !config.fuse {
        return Ok(g.clone());
    }
    let at = definers(g, &g.nodes);
    let mut nodes: Vec<Vec<Node>> = g.nodes.iter().map(|n| vec![n.clone()]).collect();
    for (b, bwd) in g.nodes.iter().enumerate() {
        let Op::LinearCrossEntropyBwd(op) = &bwd.op else {
            continue;
        };
        let (Some(lse), Some(dloss)) = (bwd.args[4], bwd.args[5]) else {
            continue;
        };
        let Some(f) = at[lse.index()].map(|f| f as usize) else {
            continue;
        };
        let fwd = &g.nodes[f];
        if fwd.op != Op::LinearCrossEntropy(op.of.clone()) || fwd.args[..4] != bwd.args[..4] {
            continue;
        }
        let Some(earlier) = known_before(g, &at, dloss, f) else {
            continue;
        };
        let mut args = fwd.args[..4].to_vec();
        args.extend([Some(dloss), None, None]);
        let fused = Node {
            op: LinearCrossEntropyGrad {
                of: op.of.clone(),
                accumulate: false,
            }
            .into(),
            args,
            results: fwd.results.iter().chain(&bwd.results).copied().collect(),
            ..fwd.clone()
        };
        let mut here: Vec<Node> = Vec::new();
        for i in earlier {
            here.append(&mut nodes[i]);
        }
        here.push(fused);
        nodes[f] = here;
        nodes[b].clear();
    }
    let nodes: Vec<Node> = nodes.into_iter().flatten().collect();
    Ok(g.rebuild(&nodes, &HashMap::new()))
}

/// The nodes from `f` on that `v` depends on, in order, when all of them are small and could run before `f`.
fn known_before(g: &Graph, at: &[Option<u32>], v: ValueId, f: usize) -> Option<Vec<usize>> {
    let mut found = Vec::new();
    let mut stack = vec![v];
    while let Some(v) = stack.pop() {
        let Some(n) = at[v.index()].map(|n| n as usize) else {
            match g.external(v) {
                Some(External::Input | External::Const(_)) => continue,
                _ => return None,
            }
        };
        if n < f || found.contains(&n) {
            continue;
        }
        let node = &g.nodes[n];
        let small = node.results.iter().all(|r| g.ty(*r).len() <= SMALL);
        if n == f || !small || (0..node.results.len()).any(|r| node.alias(r).is_some()) {
            return None;
        }
        found.push(n);
        stack.extend(node.present_args());
    }
    found.sort_unstable();
    Some(found)
}
