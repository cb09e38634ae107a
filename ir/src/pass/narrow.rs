//! Products in 8 bits, where the graph asks for them ([`Graph::fp8`]): operands are narrowed by nodes of their own, which all products that
//! read one share, forward and backward. A value that backward reads in 8 bits alone is then kept in 8 bits alone.
//!
//! An operand is narrowed once, before the first product that reads it, as it lies and transposed as its products read it. Only in a
//! block of which something is computed a second time are operands narrowed once for each pass: there memory is short.

use super::{Config, PassError};
use crate::op::{LinearDw, LinearFp8, Narrow, Op};
use crate::{DType, Graph, Node, Phase, Type, ValueId};
use std::collections::{HashMap, HashSet};

/// What one product reads: a value in a format, transposed or not.
#[derive(Clone, Copy)]
struct Operand {
    value: ValueId,
    format: DType,
    turned: bool,
}

/// An operand that several products share: value, format, and whether it is that of a second computation.
type Key = (ValueId, DType, bool);

/// What is read of an operand, and what was made of it.
#[derive(Default)]
struct Made {
    plain: bool,
    turned: bool,
    scale: Option<ValueId>,
    /// As it lies, transposed.
    ways: [Option<ValueId>; 2],
}

/// Replaces products that run in 8 bits.
///
/// # Errors
/// None of its own.
pub fn narrow(g: &Graph, _: &Config) -> Result<Graph, PassError> {
    if !g.fp8 {
        return Ok(g.clone());
    }
    let of_recompute = g.nodes.iter().filter(|n| n.phase == Phase::Recompute);
    let twice: HashSet<Option<u32>> = of_recompute.map(|n| n.block).collect();
    let key = |node: &Node, o: &Operand| -> Key {
        let again = node.phase != Phase::Forward && twice.contains(&node.block);
        (o.value, o.format, again)
    };
    let mut made: HashMap<Key, Made> = HashMap::new();
    for node in &g.nodes {
        for o in operands(g, node).into_iter().flatten() {
            let entry = made.entry(key(node, &o)).or_default();
            entry.plain |= !o.turned;
            entry.turned |= o.turned;
        }
    }
    let mut new = g.clone();
    let mut nodes = Vec::with_capacity(g.nodes.len());
    for node in &g.nodes {
        let Some(pair) = operands(g, node) else {
            nodes.push(node.clone());
            continue;
        };
        let mut args = Vec::with_capacity(8);
        for o in pair {
            let Some(entry) = made.get_mut(&key(node, &o)) else {
                continue;
            };
            if entry.scale.is_none() {
                nodes.push(make(&mut new, node, &o, entry));
            }
            args.extend([entry.ways[usize::from(o.turned)], entry.scale]);
        }
        nodes.push(product(g, node, args));
    }
    Ok(new.rebuild(&nodes, &HashMap::new()))
}

/// Both operands of a product that runs in 8 bits, each with the summed dimension last.
fn operands(g: &Graph, node: &Node) -> Option<[Operand; 2]> {
    if !g.in_fp8(node) {
        return None;
    }
    let of = |i: usize, format, turned| {
        let value = node.args.get(i).copied().flatten()?;
        Some(Operand {
            value,
            format,
            turned,
        })
    };
    let (e4m3, e5m2) = (DType::E4m3, DType::E5m2);
    let (a, b) = match node.op {
        Op::Linear(_) => (of(0, e4m3, false), of(1, e4m3, false)),
        Op::LinearDx(_) => (of(0, e5m2, false), of(1, e4m3, true)),
        Op::LinearDw(_) => (of(1, e5m2, true), of(0, e4m3, true)),
        _ => (None, None),
    };
    Some([a?, b?])
}

/// The node that narrows an operand of `reader`.
fn make(g: &mut Graph, reader: &Node, o: &Operand, entry: &mut Made) -> Node {
    let op = Narrow {
        to: o.format,
        plain: entry.plain,
        turned: entry.turned,
    };
    let x = g.ty(o.value);
    let types = op.types(x);
    let results: Vec<ValueId> = types
        .into_iter()
        .enumerate()
        .map(|(i, ty)| g.add_result(ty, i))
        .collect();
    let mut rest = results.iter().copied();
    entry.scale = rest.next();
    for (way, wanted) in entry.ways.iter_mut().zip([op.plain, op.turned]) {
        *way = if wanted { rest.next() } else { None };
    }
    Node {
        op: op.into(),
        args: vec![Some(o.value)],
        results,
        ..reader.clone()
    }
}

/// The product itself; `args` are both operands with their factors.
fn product(g: &Graph, node: &Node, mut args: Vec<Option<ValueId>>) -> Node {
    let arg = |i: usize| node.args.get(i).copied().flatten();
    let ty = |i: usize| arg(i).map_or_else(Type::scalar, |v| g.ty(v).clone());
    let y = node
        .results
        .first()
        .map_or_else(Type::scalar, |&v| g.ty(v).clone());
    let mut op = LinearFp8 {
        y,
        k: ty(0).last(),
        exact: true,
        start: 0,
        accumulate: false,
    };
    match &node.op {
        Op::LinearDw(LinearDw { start, accumulate }) => {
            let last = |i| ty(i).dims.last().copied();
            op.y = Type::f32([last(1), last(0)].into_iter().flatten().collect());
            op.k = ty(0).rows();
            (op.start, op.accumulate) = (*start, *accumulate);
            args.extend([None, None, arg(2), arg(3)]);
        }
        Op::LinearDx(_) => args.extend([None, arg(2), None, None]),
        _ => {
            op.exact = false;
            args.extend([arg(2), arg(3), None, None]);
        }
    }
    Node {
        op: op.into(),
        args,
        ..node.clone()
    }
}
