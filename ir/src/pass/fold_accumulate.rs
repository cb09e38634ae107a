//! Products that write straight into gradient buffers: `accumulate(into, beta, linear_dw(x, dy))` becomes
//! `linear_dw(x, dy, into, beta)`, so that gradients of parameters never exist twice.
//!
//! Contributions to disjoint rows of one buffer may be written in any order; they are put in the order in which they arise, so that
//! each can be written at once. Where ranges overlap, the order of additions stays.

use super::{Config, PassError, Uses, definers};
use crate::op::{Accumulate, Op};
use crate::{Graph, Node, ValueId};
use std::collections::HashMap;

/// One accumulation of a chain over the same buffer.
struct Link {
    /// Index of the accumulate node.
    node: usize,
    op: Accumulate,
    beta: Option<ValueId>,
    x: Option<ValueId>,
    /// Index of the node after which it can run; `None` for a plain scaling.
    after: Option<usize>,
}

/// Folds accumulations into the products that feed them.
///
/// # Errors
/// None of its own.
pub fn fold_accumulate(g: &Graph, config: &Config) -> Result<Graph, PassError> {
    if !config.fuse {
        return Ok(g.clone());
    }
    let at = definers(g, &g.nodes);
    let uses = Uses::of(g, &g.nodes);
    let mut nodes: Vec<Vec<Node>> = g.nodes.iter().map(|n| vec![n.clone()]).collect();
    for head in 0..g.nodes.len() {
        let Some(chain) = chain_from(g, &at, &uses, head) else {
            continue;
        };
        let (into, results) = chain.ends;
        let mut links = chain.links;
        if !arrange(&mut links) {
            continue;
        }
        for link in &links {
            nodes[link.node].clear();
        }
        let mut current = into;
        for (k, link) in links.iter().enumerate() {
            let after = link.after.unwrap_or(link.node);
            let folded = link
                .x
                .filter(|&x| uses.only(x, link.node))
                .and_then(|x| fold(g, &nodes[after], x, current, link, results[k]));
            match (folded, link.after) {
                (Some((i, node)), _) => nodes[after][i] = node,
                (None, after) => {
                    let node = Node {
                        args: vec![Some(current), link.beta, link.x],
                        results: vec![results[k]],
                        ..g.nodes[link.node].clone()
                    };
                    match after {
                        Some(after) => nodes[after].push(node),
                        // Before the first contribution.
                        None => match links.get(k + 1).and_then(|l| l.after) {
                            Some(next) => nodes[next].insert(0, node),
                            None => nodes[link.node].push(node),
                        },
                    }
                }
            }
            current = results[k];
        }
    }
    let nodes: Vec<Node> = nodes.into_iter().flatten().collect();
    Ok(g.rebuild(&nodes, &HashMap::new()))
}

struct Chain {
    links: Vec<Link>,
    /// The buffer before the first link, and the results of the links in their old order.
    ends: (ValueId, Vec<ValueId>),
}

/// The accumulations one after the other on one external buffer that begin with node `head`; `None` when none begins there.
fn chain_from(g: &Graph, at: &[Option<u32>], uses: &Uses, head: usize) -> Option<Chain> {
    let Op::Accumulate(_) = &g.nodes[head].op else {
        return None;
    };
    let into = g.nodes[head].args[0]?;
    g.external(into)?;
    let mut links = Vec::new();
    let mut results = Vec::new();
    let mut n = head;
    loop {
        let node = &g.nodes[n];
        let Op::Accumulate(op) = &node.op else { break };
        let (beta, x) = (node.args[1], node.args.get(2).copied().flatten());
        // Moving a link must not move it before its factor is known, nor may a value from outside decide its place.
        if beta.is_some_and(|b| g.external(b).is_none()) {
            return None;
        }
        let after = match x {
            Some(x) => Some(at[x.index()]? as usize),
            None => None,
        };
        links.push(Link {
            node: n,
            op: op.clone(),
            beta,
            x,
            after,
        });
        let result = node.results[0];
        results.push(result);
        match uses.readers(result) {
            [next]
                if !uses.is_output(result)
                    && matches!(g.nodes[*next as usize].op, Op::Accumulate(_))
                    && g.nodes[*next as usize].args[0] == Some(result) =>
            {
                n = *next as usize;
            }
            _ => break,
        }
    }
    Some(Chain {
        links,
        ends: (into, results),
    })
}

/// Puts links in the order in which their contributions arise; false when that would change the order of overlapping ones.
fn arrange(links: &mut [Link]) -> bool {
    let mut order: Vec<usize> = (0..links.len()).collect();
    order.sort_by_key(|&i| (links[i].after, i));
    let range = |l: &Link| l.op.start..l.op.start + l.op.len;
    for a in 0..order.len() {
        for b in a + 1..order.len() {
            let (x, y) = (range(&links[order[a]]), range(&links[order[b]]));
            if order[a] > order[b] && x.start < y.end && y.start < x.end {
                return false;
            }
        }
    }
    links.sort_by_key(|l| l.after);
    true
}

/// The accumulating form of the node among `nodes` that makes `x`, with its position there.
fn fold(
    g: &Graph,
    nodes: &[Node],
    x: ValueId,
    into: ValueId,
    link: &Link,
    result: ValueId,
) -> Option<(usize, Node)> {
    let i = nodes.iter().position(|n| n.results.contains(&x))?;
    let mut node = nodes[i].clone();
    let whole = link.op.start == 0 && link.op.len == g.ty(into).size(0);
    let slot = match &mut node.op {
        Op::LinearDw(op) if !op.accumulate && g.ty(into).rank() == 2 => {
            op.accumulate = true;
            op.start = link.op.start;
            2
        }
        Op::GroupedLinearDw(op) if !op.accumulate && whole => {
            op.accumulate = true;
            3
        }
        Op::EmbedBwd(op) if !op.accumulate && whole => {
            op.accumulate = true;
            2
        }
        Op::LinearCrossEntropyGrad(op) if !op.accumulate && whole && node.results[5] == x => {
            op.accumulate = true;
            5
        }
        _ => return None,
    };
    node.args.resize(slot + 2, None);
    node.args[slot] = Some(into);
    node.args[slot + 1] = link.beta;
    for r in &mut node.results {
        if *r == x {
            *r = result;
        }
    }
    // A contribution whose rows do not match the buffer's stays an accumulation.
    let types: Vec<_> = node
        .args
        .iter()
        .map(|a| a.map(|v| g.ty(v).clone()))
        .collect();
    node.op
        .infer(&crate::op::ArgTypes {
            op: node.op.name(),
            types: &types,
        })
        .ok()?;
    Some((i, node))
}
