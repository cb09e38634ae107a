//! Brings accumulations of small gradients together at the end of the backward pass, so that a GPU adds them up in a few launches instead
//! of one for each.
//!
//! Only additions of at most [`SMALL`] bytes move, and only past nodes that touch neither their buffer nor write over what they add: what
//! each reads and writes stays the same, bit for bit.

use super::{Config, PassError};
use crate::op::{Alias, Op};
use crate::{Graph, Node, Phase};
use std::collections::{HashMap, HashSet};

/// Most bytes of a gradient that is kept for later: a few megabytes in all, at a time when little else is alive.
const SMALL: usize = 256 << 10;

/// Moves accumulations.
///
/// # Errors
/// None of its own.
pub fn gather(g: &Graph, config: &Config) -> Result<Graph, PassError> {
    if !config.fuse {
        return Ok(g.clone());
    }
    let Some(end) = g.nodes.iter().rposition(|n| n.phase == Phase::Backward) else {
        return Ok(g.clone());
    };
    let roots = g.roots();
    let root = |v: crate::ValueId| roots[v.index()].0;
    // From behind: what the nodes after this one, up to the end, touch and write over, but for those that moved.
    let (mut touched, mut written) = (HashSet::new(), HashSet::new());
    let (mut kept, mut moved): (Vec<&Node>, Vec<&Node>) = (Vec::new(), Vec::new());
    for node in g.nodes[..=end].iter().rev() {
        let x = node.args.get(2).copied().flatten();
        let small = matches!(node.op, Op::Accumulate(_))
            && node.phase == Phase::Backward
            && x.is_some_and(|x| g.ty(x).bytes() <= SMALL && !written.contains(&root(x)))
            && !touched.contains(&root(node.results[0]))
            && node.args[1].is_some_and(|b| !written.contains(&root(b)));
        if small {
            moved.push(node);
            continue;
        }
        for v in node.present_args().chain(node.results.iter().copied()) {
            touched.insert(root(v));
        }
        for (i, &r) in node.results.iter().enumerate() {
            if matches!(node.alias(i), Some(Alias::InPlace { .. })) {
                written.insert(root(r));
            }
        }
        kept.push(node);
    }
    let nodes: Vec<Node> = kept
        .into_iter()
        .rev()
        .chain(moved.into_iter().rev())
        .chain(&g.nodes[end + 1..])
        .cloned()
        .collect();
    Ok(g.rebuild(&nodes, &HashMap::new()))
}
