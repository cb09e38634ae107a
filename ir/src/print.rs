//! Text form of a graph: what golden files hold and `marimba show --graph` prints. Deterministic; written for reading, never parsed.
//!
//! Externals come first, then one line per node under the name of its phase, then outputs. [`compact`] folds repeated layers.

use crate::op::Op;
use crate::{Def, External, Graph, Node, Phase, ValueId};
use std::collections::BTreeMap;
use std::fmt::{self, Write};

/// Elements of a constant that are printed.
const CONST_SHOWN: usize = 4;

/// Longest run of segments that [`compact`] looks for: the longest layer pattern.
const MAX_PERIOD: usize = 64;

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for v in self.value_ids() {
            if self.external(v).is_some() {
                writeln!(f, "{}", external(self, v))?;
            }
        }
        let mut phase = None;
        for node in &self.nodes {
            if phase != Some(node.phase) {
                phase = Some(node.phase);
                writeln!(f, "{}:", phase_word(node.phase))?;
            }
            writeln!(f, "  {}", self::node(self, node))?;
        }
        outputs(self, f)
    }
}

/// Word of a phase in the text form.
pub fn phase_word(phase: Phase) -> &'static str {
    match phase {
        Phase::Forward => "forward",
        Phase::Recompute => "recompute",
        Phase::Backward => "backward",
        Phase::Update => "update",
    }
}

fn outputs(g: &Graph, f: &mut impl Write) -> fmt::Result {
    f.write_str("outputs:\n")?;
    for (name, v) in &g.outputs {
        writeln!(f, "  {name} = {v}")?;
    }
    Ok(())
}

/// `%0 param layers.0.mixer.in_proj f32[I64 D32]`; constants with their first elements.
fn external(g: &Graph, v: ValueId) -> String {
    let value = g.value(v);
    let Some(kind) = g.external(v) else {
        return String::new();
    };
    let mut s = format!("{v} {} {} {}", kind.word(), value.name, value.ty);
    if let External::Const(data) = kind {
        let shown: Vec<String> = data
            .iter()
            .take(CONST_SHOWN)
            .map(ToString::to_string)
            .collect();
        let more = if data.len() > CONST_SHOWN { " .." } else { "" };
        let _ = write!(s, " = {}{more}", shown.join(" "));
    }
    s
}

/// Whether the last slot of the op's table may stand for any number of arguments.
fn variadic(op: &Op) -> bool {
    matches!(
        op,
        Op::Pointwise(_) | Op::Concat(_) | Op::GlobalNorm(_) | Op::AdamW(_)
    )
}

/// Name of argument `slot`: the table's; variadic arguments are numbered (`x0`, `x1`; `p0`, `g0`, `m0`, `v0`, `p1`).
fn arg_name(op: &Op, slot: usize) -> String {
    let names = op.arg_names();
    let Some(last) = names.len().checked_sub(1) else {
        return format!("x{slot}");
    };
    if slot < last || (slot == last && !variadic(op)) {
        return names[slot].to_string();
    }
    let group: Vec<&str> = names[last].split(',').collect();
    let k = slot - last;
    if let Op::AdamW(op) = op
        && k >= group.len() * op.tensors.len()
    {
        return format!("copy{}", k - group.len() * op.tensors.len());
    }
    format!("{}{}", group[k % group.len()], k / group.len())
}

/// One node on one line. Safe on broken graphs: types of unknown values print as `?`.
pub(crate) fn node(g: &Graph, node: &Node) -> String {
    let join = |parts: Vec<String>| parts.join(", ");
    let results = join(node.results.iter().map(ToString::to_string).collect());
    let args = node
        .args
        .iter()
        .enumerate()
        .filter_map(|(i, a)| a.map(|v| format!("{}={v}", arg_name(&node.op, i))))
        .collect();
    let types = node
        .results
        .iter()
        .map(|v| match g.values.get(v.index()) {
            Some(value) => value.ty.to_string(),
            None => "?".into(),
        })
        .collect();
    let attrs = attrs(g, node);
    let attrs = if attrs.is_empty() {
        String::new()
    } else {
        format!(" {{{attrs}}}")
    };
    let mut s = format!(
        "{results} = {}({}){attrs} : {}",
        node.op.name(),
        join(args),
        join(types)
    );
    if !node.path.is_empty() {
        let _ = write!(s, "  // {}", node.path);
    }
    s
}

/// Attributes of the op, and the graph's of the node.
fn attrs(g: &Graph, node: &Node) -> String {
    let own = node.op.attrs();
    match (g.in_fp8(node), own.is_empty()) {
        (false, _) => own,
        (true, true) => "fp8".into(),
        (true, false) => format!("{own} fp8"),
    }
}

/// Consecutive nodes of one phase and block.
struct Segment<'g> {
    phase: Phase,
    block: Option<u32>,
    nodes: &'g [Node],
    /// The nodes without ids, paths and names: equal for layers that are built alike.
    shape: String,
}

fn segments(g: &Graph) -> Vec<Segment<'_>> {
    let mut list = Vec::new();
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
        let nodes = &g.nodes[start..end];
        let mut local: BTreeMap<ValueId, usize> = BTreeMap::new();
        let mut shape = String::new();
        for n in nodes {
            let _ = write!(shape, "{} {}", n.op.name(), attrs(g, n));
            for a in &n.args {
                let _ = match a {
                    Some(v) => match local.get(v) {
                        Some(k) => write!(shape, " ${k}"),
                        None => write!(shape, " {}", g.ty(*v)),
                    },
                    None => write!(shape, " -"),
                };
            }
            for r in &n.results {
                local.insert(*r, local.len());
                let _ = write!(shape, " >{}", g.ty(*r));
            }
            shape.push('\n');
        }
        list.push(Segment {
            phase: first.phase,
            block: first.block,
            nodes,
            shape,
        });
        start = end;
    }
    list
}

/// The text form with externals counted and runs of equal layers printed once: of each run the first period is shown in full, and
/// one line says how often and for which layers it repeats.
pub fn compact(g: &Graph) -> String {
    let mut out = String::new();
    let mut kinds: BTreeMap<&'static str, (usize, usize)> = BTreeMap::new();
    for v in g.value_ids() {
        if let Some(kind) = g.external(v) {
            let entry = kinds.entry(kind.word()).or_default();
            entry.0 += 1;
            entry.1 += g.ty(v).bytes();
        }
    }
    for (word, (count, bytes)) in &kinds {
        let _ = writeln!(out, "{count} {word} of {bytes} bytes");
    }
    let list = segments(g);
    let mut phase = None;
    let mut i = 0;
    while i < list.len() {
        let (period, times) = repetition(&list[i..]);
        for s in &list[i..i + period] {
            if phase != Some(s.phase) {
                phase = Some(s.phase);
                let _ = writeln!(out, "{}:", phase_word(s.phase));
            }
            for n in s.nodes {
                let _ = writeln!(out, "  {}", node(g, n));
            }
        }
        if times > 1 {
            let rest = &list[i + period..i + period * times];
            let layers: Vec<u32> = rest.iter().filter_map(|s| s.block).collect();
            let which = match (layers.first(), layers.last()) {
                (Some(a), Some(b)) if a == b => format!("layers[{a}]"),
                (Some(a), Some(b)) => format!("layers[{a}] to layers[{b}]"),
                _ => "what follows".into(),
            };
            let _ = writeln!(
                out,
                "  ... and the same {} more: {which}, {} nodes",
                if times == 2 {
                    "once".into()
                } else {
                    format!("{} times", times - 1)
                },
                rest.iter().map(|s| s.nodes.len()).sum::<usize>()
            );
        }
        i += period * times;
    }
    let _ = outputs_compact(g, &mut out);
    out
}

/// Gradients are counted, other outputs listed.
fn outputs_compact(g: &Graph, f: &mut impl Write) -> fmt::Result {
    f.write_str("outputs:\n")?;
    let is_grad = |name: &str| name.starts_with("grad:");
    for (name, v) in g.outputs.iter().filter(|(n, _)| !is_grad(n)) {
        writeln!(f, "  {name} = {v}")?;
    }
    match g.outputs.iter().filter(|(n, _)| is_grad(n)).count() {
        0 => Ok(()),
        n => writeln!(f, "  {n} gradients"),
    }
}

/// Length of the pattern at the start of `list` and how often it stands there in a row: what folds most; `(1, 1)` when nothing does.
fn repetition(list: &[Segment]) -> (usize, usize) {
    let same = |a: &Segment, b: &Segment| a.phase == b.phase && a.shape == b.shape;
    let mut best = (1, 1);
    for period in 1..=MAX_PERIOD.min(list.len() / 2) {
        if list[..period].iter().all(|s| s.block.is_none()) {
            continue;
        }
        let mut times = 1;
        while (times + 1) * period <= list.len()
            && (0..period).all(|k| same(&list[k], &list[times * period + k]))
        {
            times += 1;
        }
        if (times - 1) * period > (best.1 - 1) * best.0 {
            best = (period, times);
        }
    }
    best
}

/// How many nodes of each op a graph has, by phase. Prints as a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpCounts {
    /// Op name to counts in the phases forward, recompute, backward, update.
    pub counts: BTreeMap<&'static str, [usize; 4]>,
}

/// Counts ops.
pub fn op_counts(g: &Graph) -> OpCounts {
    let mut counts: BTreeMap<&'static str, [usize; 4]> = BTreeMap::new();
    for node in &g.nodes {
        let phase = match node.phase {
            Phase::Forward => 0,
            Phase::Recompute => 1,
            Phase::Backward => 2,
            Phase::Update => 3,
        };
        counts.entry(node.op.name()).or_default()[phase] += 1;
    }
    OpCounts { counts }
}

impl fmt::Display for OpCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<26} {:>8} {:>9} {:>8} {:>8}",
            "op", "forward", "recompute", "backward", "update"
        )?;
        for (name, [fwd, rec, bwd, upd]) in &self.counts {
            writeln!(f, "{name:<26} {fwd:>8} {rec:>9} {bwd:>8} {upd:>8}")?;
        }
        Ok(())
    }
}

/// Where `v` comes from, in words: a DSL path and op, or the name of an external.
pub fn origin(g: &Graph, v: ValueId) -> String {
    match g.value(v).def {
        Def::Node { node, .. } => {
            let node = g.node(node);
            format!("{} ({})", node.path, node.op.name())
        }
        Def::External(_) => g.value(v).name.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbitrary::{Kind, Sample, training};
    use crate::op::{AdamW, AdamWTensor, Bin, Concat, Pointwise, Un};
    use crate::{DType, External, Letter, Place, Type, dims};

    fn toy(layers: Vec<Kind>) -> Graph {
        training(&Sample {
            layers,
            batch: 2,
            time: 8,
            d_model: 16,
            tied: false,
            dtype: DType::F32,
        })
        .unwrap()
    }

    #[test]
    fn one_line_a_node() {
        let at = Place {
            path: "layers[0].ffn".into(),
            block: Some(0),
            phase: Phase::Forward,
        };
        let mut g = Graph::new();
        let x = g.add_external(External::Input, "x", Type::f32(dims![B 2, D 4]));
        let mut p = Pointwise::new(1);
        let s = p.un(Un::Sigmoid, 0);
        let (a, b) = (p.bin(Bin::Mul, 0, s), p.bin(Bin::Add, s, s));
        let r = g.push(p.out(a).out(b), vec![Some(x)], &at).unwrap();
        let op = Concat { letter: Letter::D };
        let y = g.push(op, r.into_iter().map(Some).collect(), &at).unwrap()[0];
        g.outputs.push(("y".into(), y));
        assert_eq!(
            g.to_string(),
            "%0 input x f32[B2 D4]\n\
             forward:\n\
             \x20 %1, %2 = pointwise(x0=%0) {t1 = sigmoid(x0); x0*t1; (t1 + t1)} : f32[B2 D4], f32[B2 D4]  // layers[0].ffn\n\
             \x20 %3 = concat(x0=%1, x1=%2) : f32[B2 D8]  // layers[0].ffn\n\
             outputs:\n\
             \x20 y = %3\n"
        );
    }

    #[test]
    fn variadic_arguments_are_numbered() {
        let tensor = AdamWTensor {
            decay: 0.0,
            lr_scale: 1.0,
        };
        let op: Op = AdamW {
            copies: Vec::new(),
            betas: (0.9, 0.95),
            eps: 1e-8,
            clip: None,
            tensors: vec![tensor.clone(), tensor],
        }
        .into();
        let names: Vec<String> = (0..12).map(|i| arg_name(&op, i)).collect();
        assert_eq!(
            names.join(" "),
            "lr step norm p0 g0 m0 v0 p1 g1 m1 v1 copy0"
        );
    }

    #[test]
    fn equal_layers_fold() {
        let lines = |layers| compact(&toy(layers)).lines().count();
        let pattern = [Kind::Ffn, Kind::Ssd, Kind::Attention];
        let (short, long) = (lines(pattern.repeat(4)), lines(pattern.repeat(12)));
        // The first and last layer of a run may differ by what ends there.
        assert_eq!(short, long);
        let text = compact(&toy(pattern.repeat(12)));
        assert!(text.contains("... and the same"), "{text}");
        // Nothing is lost: printed nodes and folded ones are all.
        let g = toy(pattern.repeat(12));
        let printed = text.lines().filter(|l| l.starts_with("  %")).count();
        let folded: usize = text
            .lines()
            .filter(|l| l.starts_with("  ..."))
            .filter_map(|l| l.split(' ').rev().nth(1)?.parse::<usize>().ok())
            .sum();
        assert_eq!(printed + folded, g.nodes.len(), "{text}");
    }

    #[test]
    fn counts_add_up() {
        let g = toy(vec![Kind::Ffn, Kind::Moe]);
        let counts = op_counts(&g);
        let sum: usize = counts.counts.values().flatten().sum();
        assert_eq!(sum, g.nodes.len());
        assert!(counts.to_string().contains("rms_norm_bwd"));
    }
}
