//! The verifier: what every graph must satisfy between passes. A graph that does not was made by a bug, and the error says so.
//!
//! Checked: ids are in range; every value is defined exactly once and before its uses; types are what the ops infer; memory that an
//! op writes over is read afterwards only through the new result; rows are taken of parameters only; names of externals are unique
//! within their kind; outputs and taps exist; a gradient buffer that is written is an output. Not checked: meaning.

use crate::op::{Alias, ArgTypes, Op};
use crate::{Def, External, Graph, NodeId, Type, TypeError, ValueId, print};
use std::collections::HashSet;

/// What is wrong with a graph.
#[derive(Clone, Debug, thiserror::Error)]
#[allow(missing_docs)] // The messages are the documentation.
pub enum Fault {
    #[error("{value} is not a value of the graph; there are {values}")]
    UnknownValue { value: ValueId, values: usize },
    #[error("{value} is read before it is defined")]
    UseBeforeDefinition { value: ValueId },
    #[error("{value} is defined a second time; each value has one definition")]
    DefinedTwice { value: ValueId },
    #[error("{value} says it is {found}, but {expected} lists it")]
    WrongDefinition {
        value: ValueId,
        found: String,
        expected: String,
    },
    #[error("{value} says it is {found}, which does not list it")]
    NeverDefined { value: ValueId, found: String },
    #[error("{found} results are listed, the op has {expected}")]
    ResultCount { found: usize, expected: usize },
    #[error("{value} is {found}, the op makes {expected}")]
    WrongType {
        value: ValueId,
        found: Type,
        expected: Type,
    },
    #[error("{0}")]
    IllTyped(#[source] TypeError),
    #[error("{value} is read after {by} wrote over its memory; read the result of {by} instead")]
    Overwritten { value: ValueId, by: NodeId },
    #[error(
        "{value} is written over and read by one node; pass memory that is written over only once"
    )]
    OverwrittenWhileRead { value: ValueId },
    #[error("{value} is a {word}, which nothing may write over")]
    OverwritesReadOnly { value: ValueId, word: &'static str },
    #[error("rows are taken of {value}, which is no parameter; read the parameter itself")]
    RowsOfNoParam { value: ValueId },
    #[error("{word} {name} exists twice; names are unique within a kind")]
    DuplicateExternal { word: &'static str, name: String },
    #[error("const {name} has {found} elements, its type {expected}")]
    ConstLength {
        name: String,
        found: usize,
        expected: Type,
    },
    #[error("output {name} is {value}, which is not a value of the graph; there are {values}")]
    UnknownOutput {
        name: String,
        value: ValueId,
        values: usize,
    },
    #[error("output {name} exists twice; names of outputs are unique")]
    DuplicateOutput { name: String },
    #[error("output {name} is {value}, whose memory {by} wrote over; output the result of {by}")]
    OutputOverwritten {
        name: String,
        value: ValueId,
        by: NodeId,
    },
    #[error("tap {name} is {value}, which is not a value of the graph; there are {values}")]
    UnknownTap {
        name: String,
        value: ValueId,
        values: usize,
    },
    #[error("gradient {name} is written but is no output; add grad:{name}")]
    GradNoOutput { name: String },
}

/// A fault, where it is, and the graph around it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{fault} (at {at}); this is a bug in marimba{around}")]
pub struct VerifyError {
    /// What is wrong.
    pub fault: Box<Fault>,
    /// The node, where one is to blame.
    pub node: Option<NodeId>,
    /// Node number, op name and DSL path; `the graph` where no node is to blame.
    pub at: String,
    /// Text of the nodes around it, on lines of their own.
    pub around: String,
}

/// Nodes printed before and after the one to blame.
const AROUND: usize = 4;

fn at_node(g: &Graph, n: usize, fault: Fault) -> VerifyError {
    let node = &g.nodes[n];
    let (first, last) = (
        n.saturating_sub(AROUND),
        (n + AROUND).min(g.nodes.len() - 1),
    );
    let mut around = String::new();
    for i in first..=last {
        let mark = if i == n { '>' } else { ' ' };
        around.push_str(&format!("\n{mark} {}", print::node(g, &g.nodes[i])));
    }
    VerifyError {
        fault: Box::new(fault),
        node: Some(NodeId(n as u32)),
        at: format!("{} {} of {}", NodeId(n as u32), node.op.name(), node.path),
        around,
    }
}

fn at_graph(fault: Fault) -> VerifyError {
    VerifyError {
        fault: Box::new(fault),
        node: None,
        at: "the graph".into(),
        around: String::new(),
    }
}

fn def_text(def: &Def) -> String {
    match def {
        Def::External(e) => format!("a {}", e.word()),
        Def::Node { node, result } => format!("result {result} of {node}"),
    }
}

/// Checks all of the above; O(values + arguments).
///
/// # Errors
/// [`VerifyError`] for the first fault in execution order.
pub fn verify(g: &Graph) -> Result<(), VerifyError> {
    let n_values = g.values.len();
    let mut defined: Vec<bool> = Vec::with_capacity(n_values);
    let mut names = HashSet::new();
    for value in &g.values {
        if let Def::External(kind) = &value.def {
            let word = kind.word();
            if !names.insert((word, value.name.as_str())) {
                let name = value.name.clone();
                return Err(at_graph(Fault::DuplicateExternal { word, name }));
            }
            if let External::Const(data) = kind
                && data.len() != value.ty.len()
            {
                return Err(at_graph(Fault::ConstLength {
                    name: value.name.clone(),
                    found: data.len(),
                    expected: value.ty.clone(),
                }));
            }
            defined.push(true);
        } else {
            defined.push(false);
        }
    }

    // Memory by root: how often it was written over, and by whom last. A value may be read while its version is the memory's.
    let mut root: Vec<usize> = (0..n_values).collect();
    let mut version: Vec<u32> = vec![0; n_values];
    let mut memory: Vec<(u32, NodeId)> = vec![(0, NodeId(0)); n_values];
    let mut types: Vec<Option<Type>> = Vec::new();
    for (n, node) in g.nodes.iter().enumerate() {
        let fail = |fault| Err(at_node(g, n, fault));
        types.clear();
        for arg in &node.args {
            let Some(value) = *arg else {
                types.push(None);
                continue;
            };
            let i = value.index();
            if i >= n_values {
                let values = n_values;
                return fail(Fault::UnknownValue { value, values });
            }
            if !defined[i] {
                return fail(Fault::UseBeforeDefinition { value });
            }
            let (newest, by) = memory[root[i]];
            if version[i] != newest {
                return fail(Fault::Overwritten { value, by });
            }
            types.push(Some(g.values[i].ty.clone()));
        }
        if let (Op::Rows(_), Some(Some(value))) = (&node.op, node.args.first())
            && g.external(*value) != Some(&External::Param)
        {
            return fail(Fault::RowsOfNoParam { value: *value });
        }
        let inferred = match node.op.infer(&ArgTypes {
            op: node.op.name(),
            types: &types,
        }) {
            Ok(types) => types,
            Err(e) => {
                let path = node.path.clone();
                return fail(Fault::IllTyped(TypeError { path, ..e }));
            }
        };
        if inferred.len() != node.results.len() {
            return fail(Fault::ResultCount {
                found: node.results.len(),
                expected: inferred.len(),
            });
        }
        for (result, (&value, expected)) in node.results.iter().zip(inferred).enumerate() {
            let i = value.index();
            if i >= n_values {
                let values = n_values;
                return fail(Fault::UnknownValue { value, values });
            }
            if defined[i] {
                return fail(Fault::DefinedTwice { value });
            }
            defined[i] = true;
            let here = Def::Node {
                node: NodeId(n as u32),
                result,
            };
            if g.values[i].def != here {
                return fail(Fault::WrongDefinition {
                    value,
                    found: def_text(&g.values[i].def),
                    expected: def_text(&here),
                });
            }
            let found = &g.values[i].ty;
            if found.dtype != expected.dtype || !found.same_shape(&expected) {
                return fail(Fault::WrongType {
                    value,
                    found: found.clone(),
                    expected,
                });
            }
            let Some(alias) = node.op.alias(result) else {
                continue;
            };
            let Some(arg) = node.args.get(alias.arg()).copied().flatten() else {
                continue;
            };
            let r = root[arg.index()];
            root[i] = r;
            if let Alias::InPlace { arg: slot } = alias {
                let twice = node
                    .args
                    .iter()
                    .enumerate()
                    .any(|(k, a)| k != slot && a.is_some_and(|a| root[a.index()] == r));
                if twice {
                    return fail(Fault::OverwrittenWhileRead { value: arg });
                }
                if let Some(e @ (External::Input | External::Const(_))) =
                    g.external(ValueId(r as u32))
                {
                    let word = e.word();
                    return fail(Fault::OverwritesReadOnly { value: arg, word });
                }
                memory[r] = (memory[r].0 + 1, NodeId(n as u32));
            }
            version[i] = memory[r].0;
        }
    }
    if let Some(i) = defined.iter().position(|d| !d) {
        return Err(at_graph(Fault::NeverDefined {
            value: ValueId(i as u32),
            found: def_text(&g.values[i].def),
        }));
    }

    let mut names = HashSet::new();
    for (name, value) in &g.outputs {
        let (name, value) = (name.clone(), *value);
        if value.index() >= n_values {
            let values = n_values;
            return Err(at_graph(Fault::UnknownOutput {
                name,
                value,
                values,
            }));
        }
        let (newest, by) = memory[root[value.index()]];
        if version[value.index()] != newest {
            return Err(at_graph(Fault::OutputOverwritten { name, value, by }));
        }
        if !names.insert(name.clone()) {
            return Err(at_graph(Fault::DuplicateOutput { name }));
        }
    }
    for (name, value) in &g.taps {
        if value.index() >= n_values {
            return Err(at_graph(Fault::UnknownTap {
                name: name.clone(),
                value: *value,
                values: n_values,
            }));
        }
    }
    for (i, value) in g.values.iter().enumerate() {
        if value.def == Def::External(External::Grad) && memory[i].0 > 0 {
            let name = format!("grad:{}", value.name);
            let is_output = g
                .outputs
                .iter()
                .any(|(n, v)| *n == name && root[v.index()] == i);
            if !is_output {
                let name = value.name.clone();
                return Err(at_graph(Fault::GradNoOutput { name }));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbitrary::{Kind, Sample, training};
    use crate::op::{Linear, Pointwise, Rows, Un};
    use crate::{DType, Phase, Place, Value, dims};

    fn graph() -> Graph {
        let layers = vec![Kind::Ffn, Kind::Ssd, Kind::Attention];
        let (batch, time, d_model) = (2, 8, 16);
        let (tied, dtype) = (false, DType::F32);
        let g = training(&Sample {
            layers,
            batch,
            time,
            d_model,
            tied,
            dtype,
        })
        .unwrap();
        verify(&g).unwrap();
        g
    }

    fn at() -> Place {
        Place {
            path: "test".into(),
            block: None,
            phase: Phase::Forward,
        }
    }

    fn first(g: &Graph, name: &str) -> usize {
        g.nodes.iter().position(|n| n.op.name() == name).unwrap()
    }

    /// Breaks one thing and returns what the verifier says.
    fn broken(edit: impl FnOnce(&mut Graph)) -> VerifyError {
        let mut g = graph();
        edit(&mut g);
        verify(&g).unwrap_err()
    }

    macro_rules! assert_fault {
        ($error:expr, $fault:pat) => {
            let e = $error;
            assert!(matches!(*e.fault, $fault), "{e}");
        };
    }

    #[test]
    fn ids_out_of_range() {
        let e = broken(|g| g.nodes[5].args[0] = Some(ValueId(1_000_000)));
        assert_eq!(e.node, Some(NodeId(5)));
        assert!(e.to_string().contains("this is a bug in marimba\n"), "{e}");
        assert!(e.to_string().contains("\n> "), "{e}");
        assert_fault!(e, Fault::UnknownValue { .. });
        assert_fault!(
            broken(|g| g.nodes[5].results[0] = ValueId(1_000_000)),
            Fault::UnknownValue { .. }
        );
        assert_fault!(
            broken(|g| g.outputs[0].1 = ValueId(1_000_000)),
            Fault::UnknownOutput { .. }
        );
        assert_fault!(
            broken(|g| g.taps[0].1 = ValueId(1_000_000)),
            Fault::UnknownTap { .. }
        );
    }

    #[test]
    fn definitions() {
        assert_fault!(
            broken(|g| {
                let (a, b) = (first(g, "embed"), first(g, "rms_norm"));
                g.nodes.swap(a, b);
            }),
            Fault::UseBeforeDefinition { .. }
        );
        assert_fault!(
            broken(|g| {
                let again = g.nodes[1].clone();
                g.nodes.push(again);
            }),
            Fault::DefinedTwice { .. }
        );
        assert_fault!(
            broken(|g| {
                let v = g.nodes[0].results[0];
                g.values[v.index()].def = Def::Node {
                    node: NodeId(3),
                    result: 0,
                };
            }),
            Fault::WrongDefinition { .. }
        );
        assert_fault!(
            broken(|g| {
                g.values.push(Value {
                    ty: Type::scalar(),
                    def: Def::Node {
                        node: NodeId(0),
                        result: 7,
                    },
                    name: String::new(),
                });
            }),
            Fault::NeverDefined { .. }
        );
    }

    #[test]
    fn types() {
        assert_fault!(
            broken(|g| {
                let v = g.nodes[first(g, "linear")].results[0];
                g.values[v.index()].ty.dims[0].size += 1;
            }),
            Fault::WrongType { .. }
        );
        assert_fault!(
            broken(|g| {
                let v = g.nodes[first(g, "linear")].results[0];
                g.values[v.index()].ty.dtype = DType::Bf16;
            }),
            Fault::WrongType { .. }
        );
        assert_fault!(
            broken(|g| {
                let n = first(g, "linear");
                g.nodes[n].args[1] = g.nodes[n].args[0];
            }),
            Fault::IllTyped(_)
        );
        assert_fault!(
            broken(|g| {
                let n = first(g, "rms_norm");
                g.nodes[n].results.pop();
            }),
            Fault::ResultCount {
                found: 1,
                expected: 2
            }
        );
    }

    #[test]
    fn memory_written_over() {
        // Reading a gradient buffer after it was accumulated into.
        let e = broken(|g| {
            let n = first(g, "accumulate");
            let into = g.nodes[n].args[0].unwrap();
            let v = g
                .push(Pointwise::map(Un::Exp), vec![Some(into)], &at())
                .unwrap()[0];
            g.outputs.push(("late".into(), v));
        });
        assert_fault!(e, Fault::Overwritten { .. });
        // The same through a view of the same memory.
        let e = broken(|g| {
            let n = first(g, "accumulate");
            let into = g.nodes[n].args[0].unwrap();
            let dims = g.ty(into).dims.clone();
            let view = g
                .push(crate::op::Reshape { dims }, vec![Some(into)], &at())
                .unwrap()[0];
            let mut nodes = g.nodes.clone();
            let node = nodes.pop().unwrap();
            nodes.insert(n, node);
            *g = g.rebuild(&nodes, &Default::default());
            // Values are numbered anew: the view is the result of node n.
            let view = g.nodes[n].results.first().copied().unwrap_or(view);
            g.push(Pointwise::map(Un::Exp), vec![Some(view)], &at())
                .unwrap();
        });
        assert_fault!(e, Fault::Overwritten { .. });
        // Accumulating a buffer into itself.
        let e = broken(|g| {
            let n = first(g, "accumulate");
            g.nodes[n].args[2] = g.nodes[n].args[0];
        });
        assert_fault!(e, Fault::OverwrittenWhileRead { .. });
        // Accumulating into a constant or an input.
        let e = broken(|g| {
            let n = first(g, "accumulate");
            let into = g.nodes[n].args[0].unwrap();
            g.values[into.index()].def = Def::External(External::Input);
        });
        assert_fault!(e, Fault::OverwritesReadOnly { word: "input", .. });
        // An output that another accumulation wrote over.
        let e = broken(|g| {
            let n = g.nodes.len() - 1;
            let stale = g
                .outputs
                .iter()
                .position(|(n, _)| n.starts_with("grad:"))
                .unwrap();
            let (buffer, keep) = (g.outputs[stale].1, g.nodes[n].args[1]);
            let op = crate::op::Accumulate {
                start: 0,
                len: g.ty(buffer).size(0),
            };
            g.push(op, vec![Some(buffer), keep, None], &at()).unwrap();
        });
        assert_fault!(e, Fault::OutputOverwritten { .. });
    }

    #[test]
    fn externals_and_outputs() {
        assert_fault!(
            broken(|g| {
                let w = first(g, "linear");
                let x = g.nodes[w].args[0];
                let n = g.ty(x.unwrap()).size(0);
                g.push(Rows { start: 0, len: n }, vec![x], &at()).unwrap();
            }),
            Fault::RowsOfNoParam { .. }
        );
        assert_fault!(
            broken(|g| {
                let v = g.values[0].clone();
                g.values.push(v);
            }),
            Fault::DuplicateExternal { word: "input", .. }
        );
        assert_fault!(
            broken(|g| {
                g.add_external(
                    External::Const(vec![1.0; 3]),
                    "short",
                    Type::f32(dims![X 4]),
                );
            }),
            Fault::ConstLength { .. }
        );
        assert_fault!(
            broken(|g| {
                let o = g.outputs[0].clone();
                g.outputs.push(o);
            }),
            Fault::DuplicateOutput { .. }
        );
        assert_fault!(
            broken(|g| g.outputs.retain(|(n, _)| n != "grad:embedding")),
            Fault::GradNoOutput { .. }
        );
    }

    #[test]
    fn errors_name_node_and_path() {
        let mut g = graph();
        let n = first(&g, "linear");
        let x = g.nodes[n].args[0];
        g.push(Linear, vec![x, g.nodes[n].args[1], None], &at())
            .unwrap();
        let last = g.nodes.len() - 1;
        g.nodes[last].args[0] = Some(ValueId(9_999_999));
        let e = verify(&g).unwrap_err();
        assert!(e.at.ends_with("linear of test"), "{e}");
    }
}
