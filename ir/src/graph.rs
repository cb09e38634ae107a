//! The graph: flat, typed, single assignment, unrolled. Insertion order is execution order.
//!
//! A value is either *external* (an input, parameter, gradient buffer, optimiser moment, recurrent state or constant: memory that
//! outlives a run) or the result of exactly one node (memory in the arena, unless it aliases an argument).

use crate::op::{Alias, ArgTypes, Op};
use crate::{DType, Dim, Type};
use std::collections::HashMap;
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $sigil:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub u32);
        impl $name {
            /// Position in the graph's list.
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($sigil, "{}"), self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($sigil, "{}"), self.0)
            }
        }
    };
}

id!(
    /// A value; prints as `%12`.
    ValueId,
    "%"
);
id!(
    /// A node; prints as `@7`.
    NodeId,
    "@"
);

/// Memory that outlives a run of the graph.
#[derive(Clone, Debug, PartialEq)]
pub enum External {
    /// Small, written by the host before each run: tokens, targets, lr, step.
    Input,
    /// A parameter in compute precision.
    Param,
    /// The f32 number behind a parameter of a narrower type, which the optimiser moves.
    Master,
    /// The gradient of the parameter of the same name, summed over micro-batches.
    Grad,
    /// First moment of AdamW.
    Moment1,
    /// Second moment of AdamW.
    Moment2,
    /// Recurrent state or KV cache: zero at the start of a sequence, carried from run to run.
    State,
    /// Known when the graph is made.
    Const(Vec<f32>),
}

impl External {
    /// Word in the text form.
    pub fn word(&self) -> &'static str {
        match self {
            External::Input => "input",
            External::Param => "param",
            External::Master => "master",
            External::Grad => "grad",
            External::Moment1 => "moment1",
            External::Moment2 => "moment2",
            External::State => "state",
            External::Const(_) => "const",
        }
    }
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Def {
    /// Memory from outside.
    External(External),
    /// Result number `result` of `node`.
    Node {
        /// The producer.
        node: NodeId,
        /// Which of its results.
        result: usize,
    },
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// Its type.
    pub ty: Type,
    /// Its origin.
    pub def: Def,
    /// Externals: the unique name within their kind (`layers.3.mixer.in_proj`, `tokens`). Results: empty.
    pub name: String,
}

/// Which part of a step a node belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Written by a lowering.
    Forward,
    /// Forward nodes computed a second time, shortly before backward reads them, so that they need not be kept.
    Recompute,
    /// Written by autodiff.
    Backward,
    /// Optimiser.
    Update,
}

/// One operation.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// Arguments in the order of the op's table; `None` where an optional one is absent.
    pub args: Vec<Option<ValueId>>,
    /// Results in the order of the op's table.
    pub results: Vec<ValueId>,
    /// The DSL item it comes from, such as `layers[7].mixer`.
    pub path: String,
    /// Index of the layer it belongs to, for recomputation.
    pub block: Option<u32>,
    /// Forward, backward or update.
    pub phase: Phase,
}

impl Node {
    /// Present arguments.
    pub fn present_args(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.args.iter().flatten().copied()
    }

    /// How result `result` uses the memory of an argument, when that argument is present.
    pub fn alias(&self, result: usize) -> Option<Alias> {
        let alias = self.op.alias(result)?;
        self.args.get(alias.arg())?.map(|_| alias)
    }
}

/// How a parameter starts.
#[derive(Clone, Debug, PartialEq)]
pub enum ParamInit {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Normal with this standard deviation.
    Normal(f64),
    /// Uniform in [-bound, bound].
    Uniform(f64),
    /// `ln(u)`, u uniform in the range (Mamba-2's A_log; mamba_ssm `A_init_range`).
    LogUniformA(f64, f64),
    /// `ln(1..=N)` along the last dimension (S4D-real; Mamba-1's A_log).
    LogArange,
    /// Inverse softplus of a log-uniform dt in [min, max], floored (Mamba's dt bias).
    DtBias {
        /// Smallest.
        min: f64,
        /// Largest.
        max: f64,
        /// Floor.
        floor: f64,
    },
}

/// A parameter of the model: what loading, initialising and optimising need to know.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// Unique name, such as `layers.3.mixer.in_proj`.
    pub name: String,
    /// Type of the stored (master) parameter.
    pub ty: Type,
    /// Element type in which graphs read it.
    pub compute: DType,
    /// Initialisation.
    pub init: ParamInit,
    /// Subject to weight decay: matrices are; norms, biases, `A_log`, `dt_bias`, `D` are not.
    pub decay: bool,
    /// False for buffers (`e_score_correction_bias`).
    pub trainable: bool,
    /// Of each `total` elements, how many work on one token: top_k / n_experts for expert weights, 1 otherwise.
    pub active: (usize, usize),
    /// The path of the DSL item that declares it.
    pub path: String,
}

/// A graph.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    /// All values by id.
    pub values: Vec<Value>,
    /// All nodes in execution order.
    pub nodes: Vec<Node>,
    /// Named results that the host reads: they live to the end of the run.
    pub outputs: Vec<(String, ValueId)>,
    /// Parameters in the order of first use.
    pub params: Vec<Param>,
    /// Values worth watching, by name (`layers[3].mixer.out`). They are no outputs: a tap does not keep its value alive, and passes
    /// drop the taps of values they dissolve. [`crate::pass::probe`] and [`crate::pass::add_activation_loss`] read them.
    pub taps: Vec<(String, ValueId)>,
    /// Whether products with the projections of layers run in 8 bits where that pays: see [`Graph::in_fp8`].
    pub fp8: bool,
}

/// Smallest size of a product that runs in 8 bits: below it, narrowing the operands takes longer than the product saves.
const FP8_LEAST: usize = 256;

impl Graph {
    /// An empty graph.
    pub fn new() -> Self {
        Graph::default()
    }

    /// The value.
    pub fn value(&self, v: ValueId) -> &Value {
        &self.values[v.index()]
    }

    /// Its type.
    pub fn ty(&self, v: ValueId) -> &Type {
        &self.values[v.index()].ty
    }

    /// The node.
    pub fn node(&self, n: NodeId) -> &Node {
        &self.nodes[n.index()]
    }

    /// All value ids.
    pub fn value_ids(&self) -> impl Iterator<Item = ValueId> + use<> {
        (0..self.values.len() as u32).map(ValueId)
    }

    /// Node that makes `v`, if one does.
    pub fn producer(&self, v: ValueId) -> Option<&Node> {
        match self.value(v).def {
            Def::External(_) => None,
            Def::Node { node, .. } => Some(self.node(node)),
        }
    }

    /// The external kind of `v`, if it is external.
    pub fn external(&self, v: ValueId) -> Option<&External> {
        match &self.value(v).def {
            Def::External(e) => Some(e),
            Def::Node { .. } => None,
        }
    }

    /// Finds an external by kind word and name.
    pub fn find_external(&self, word: &str, name: &str) -> Option<ValueId> {
        self.value_ids().find(|&v| {
            let value = self.value(v);
            value.name == name && matches!(&value.def, Def::External(e) if e.word() == word)
        })
    }

    /// The external of this kind and name, made when absent.
    pub fn add_external(&mut self, kind: External, name: &str, ty: Type) -> ValueId {
        if let Some(v) = self.find_external(kind.word(), name) {
            return v;
        }
        let id = ValueId(self.values.len() as u32);
        self.values.push(Value {
            ty,
            def: Def::External(kind),
            name: name.to_string(),
        });
        id
    }

    /// Named output.
    pub fn output(&self, name: &str) -> Option<ValueId> {
        self.outputs
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, v)| *v)
    }

    /// Appends a node; types of the results are inferred.
    ///
    /// # Errors
    /// [`TypeError`] when the arguments do not fit the op. That is a bug in whoever builds the graph.
    pub fn push(
        &mut self,
        op: impl Into<Op>,
        args: Vec<Option<ValueId>>,
        at: &Place,
    ) -> Result<Vec<ValueId>, TypeError> {
        let op = op.into();
        let types: Vec<Option<Type>> = args.iter().map(|a| a.map(|v| self.ty(v).clone())).collect();
        let results = op
            .infer(&ArgTypes {
                op: op.name(),
                types: &types,
            })
            .map_err(|e| TypeError {
                path: at.path.clone(),
                ..e
            })?;
        let node = NodeId(self.nodes.len() as u32);
        let results: Vec<ValueId> = results
            .into_iter()
            .enumerate()
            .map(|(result, ty)| {
                let id = ValueId(self.values.len() as u32);
                self.values.push(Value {
                    ty,
                    def: Def::Node { node, result },
                    name: String::new(),
                });
                id
            })
            .collect();
        self.nodes.push(Node {
            op,
            args,
            results: results.clone(),
            path: at.path.clone(),
            block: at.block,
            phase: at.phase,
        });
        Ok(results)
    }

    /// Whether a node is a product that runs in 8 bits, where the graph asks for it: a linear layer's, or one of its derivative's, with bf16
    /// operands and all three sizes at least 256. Head, embedding, routers and experts stay as they are, and with them all that is no product.
    pub fn in_fp8(&self, node: &Node) -> bool {
        if !self.fp8 || node.block.is_none() {
            return false;
        }
        let ty = |i: usize| node.args.get(i).copied().flatten().map(|v| self.ty(v));
        let (Some(x), Some(y)) = (ty(0), ty(1)) else {
            return false;
        };
        let sizes = match node.op {
            Op::Linear(_) | Op::LinearDx(_) => [x.rows(), y.size(0), y.size(1)],
            Op::LinearDw(_) => [x.rows(), x.last(), y.last()],
            _ => return false,
        };
        let narrow = x.dtype == DType::Bf16 && y.dtype == DType::Bf16;
        narrow && sizes.iter().all(|&n| n >= FP8_LEAST)
    }

    /// The value whose memory `v` uses: follows aliases down to an external or a value with memory of its own.
    pub fn root(&self, v: ValueId) -> ValueId {
        let mut v = v;
        while let Def::Node { node, result } = self.value(v).def {
            let node = self.node(node);
            match node.op.alias(result) {
                Some(alias) => match node.args.get(alias.arg()).copied().flatten() {
                    Some(arg) => v = arg,
                    None => return v,
                },
                None => return v,
            }
        }
        v
    }

    /// Offset in bytes of `v` within the memory of its root.
    pub fn root_offset(&self, v: ValueId) -> usize {
        let mut v = v;
        let mut offset = 0;
        while let Def::Node { node, result } = self.value(v).def {
            let node = self.node(node);
            match node.op.alias(result) {
                Some(alias) => match node.args.get(alias.arg()).copied().flatten() {
                    Some(arg) => {
                        if let Alias::View { first_row, .. } = alias {
                            let row = self.ty(arg).bytes() / self.ty(arg).size(0).max(1);
                            offset += first_row * row;
                        }
                        v = arg;
                    }
                    None => return offset,
                },
                None => return offset,
            }
        }
        offset
    }

    /// For each value, the nodes that read it, in order.
    pub fn uses(&self) -> Vec<Vec<NodeId>> {
        let mut uses = vec![Vec::new(); self.values.len()];
        for (i, node) in self.nodes.iter().enumerate() {
            for a in node.present_args() {
                let list: &mut Vec<NodeId> = &mut uses[a.index()];
                if list.last() != Some(&NodeId(i as u32)) {
                    list.push(NodeId(i as u32));
                }
            }
        }
        uses
    }

    /// For each value, the value whose memory it uses and its offset in bytes there: [`Graph::root`] and [`Graph::root_offset`] of
    /// all values in one walk.
    pub fn roots(&self) -> Vec<(ValueId, usize)> {
        let mut roots: Vec<(ValueId, usize)> = self.value_ids().map(|v| (v, 0)).collect();
        for node in &self.nodes {
            for (result, &r) in node.results.iter().enumerate() {
                let Some(alias) = node.alias(result) else {
                    continue;
                };
                let Some(arg) = node.args[alias.arg()] else {
                    continue;
                };
                let (root, mut offset) = roots[arg.index()];
                if let Alias::View { first_row, .. } = alias {
                    offset += first_row * (self.ty(arg).bytes() / self.ty(arg).size(0).max(1));
                }
                roots[r.index()] = (root, offset);
            }
        }
        roots
    }

    /// Appends a value that node-to-be number `result` of some list given to [`Graph::rebuild`] will define.
    pub(crate) fn add_result(&mut self, ty: Type, result: usize) -> ValueId {
        let id = ValueId(self.values.len() as u32);
        self.values.push(Value {
            ty,
            def: Def::Node {
                node: NodeId(u32::MAX),
                result,
            },
            name: String::new(),
        });
        id
    }

    /// Rebuilds the graph from nodes in `order`, dropping values nobody defines any more. Used by passes that move or drop nodes.
    /// `replace` maps old values to the old values that take their place.
    pub fn rebuild(&self, nodes: &[Node], replace: &HashMap<ValueId, ValueId>) -> Graph {
        self.rebuild_map(nodes, replace).0
    }

    /// As [`Graph::rebuild`]; also returns the new value of each old one, where it has one.
    pub(crate) fn rebuild_map(
        &self,
        nodes: &[Node],
        replace: &HashMap<ValueId, ValueId>,
    ) -> (Graph, Vec<Option<ValueId>>) {
        let resolve = |mut v: ValueId| {
            while let Some(&r) = replace.get(&v) {
                v = r;
            }
            v
        };
        let mut g = Graph {
            params: self.params.clone(),
            fp8: self.fp8,
            ..Graph::default()
        };
        let mut map: Vec<Option<ValueId>> = vec![None; self.values.len()];
        for v in self.value_ids() {
            if let Def::External(_) = self.value(v).def {
                map[v.index()] = Some(ValueId(g.values.len() as u32));
                g.values.push(self.value(v).clone());
            }
        }
        for node in nodes {
            let id = NodeId(g.nodes.len() as u32);
            // An argument that nothing defines leaves the range of ids, so that `verify` names it.
            let args = node
                .args
                .iter()
                .map(|a| a.map(|v| map[resolve(v).index()].unwrap_or(ValueId(u32::MAX))))
                .collect();
            let results = node
                .results
                .iter()
                .enumerate()
                .map(|(result, &v)| {
                    let nv = ValueId(g.values.len() as u32);
                    g.values.push(Value {
                        ty: self.value(v).ty.clone(),
                        def: Def::Node { node: id, result },
                        name: String::new(),
                    });
                    map[v.index()] = Some(nv);
                    nv
                })
                .collect();
            g.nodes.push(Node {
                args,
                results,
                ..node.clone()
            });
        }
        g.outputs = self
            .outputs
            .iter()
            .map(|(n, v)| {
                let v = map[resolve(*v).index()].unwrap_or(ValueId(u32::MAX));
                (n.clone(), v)
            })
            .collect();
        g.taps = self
            .taps
            .iter()
            .filter_map(|(n, v)| Some((n.clone(), map[resolve(*v).index()]?)))
            .collect();
        (g, map)
    }
}

/// Where new nodes belong.
#[derive(Clone, Debug)]
pub struct Place {
    /// DSL path.
    pub path: String,
    /// Layer index.
    pub block: Option<u32>,
    /// Part of the step.
    pub phase: Phase,
}

/// Arguments that do not fit an op: a bug in a lowering or a pass, not in a user's file.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{op} cannot take {found}: {expected} (at {path}); this is a bug in marimba")]
pub struct TypeError {
    /// Op name.
    pub op: &'static str,
    /// What was given.
    pub found: String,
    /// What the op wants.
    pub expected: String,
    /// DSL path.
    pub path: String,
}

/// The dims of a type with the last one replaced by `dims`.
pub fn replace_last(ty: &Type, dims: &[Dim]) -> Vec<Dim> {
    let mut out = ty.dims[..ty.rank() - 1].to_vec();
    out.extend_from_slice(dims);
    out
}
