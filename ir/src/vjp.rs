//! Reverse-mode differentiation: backward is more nodes of the same kind, appended to the graph.
//!
//! Parameters may be read whole or by rows ([`crate::op::Rows`]); their gradients are accumulated into `grad` externals, so a
//! parameter that is used several times (tied head, shared block) sums its uses, and micro-batches sum too. The first write of a
//! step to each gradient is scaled by the input `grad_keep` (0 in the first micro-batch, 1 after), so that nothing needs clearing.

use crate::op::{Accumulate, Op, Pointwise};
use crate::{Def, External, Graph, Phase, Place, Type, TypeError, ValueId};
use std::collections::{BTreeMap, HashMap, HashSet};

/// What an op's derivative sees: its arguments and results, the gradients of its results, and a place to put those of its arguments.
pub struct Vjp<'g> {
    g: &'g mut Graph,
    at: Place,
    args: Vec<Option<ValueId>>,
    results: Vec<ValueId>,
    d_results: Vec<Option<ValueId>>,
    needs: Vec<bool>,
    d_args: Vec<Option<ValueId>>,
}

impl Vjp<'_> {
    /// Argument `i`, when present.
    pub fn arg(&self, i: usize) -> Option<ValueId> {
        self.args.get(i).copied().flatten()
    }

    /// All arguments.
    pub fn args(&self) -> &[Option<ValueId>] {
        &self.args
    }

    /// Result `i`.
    pub fn result(&self, i: usize) -> ValueId {
        self.results[i]
    }

    /// Gradient of result `i`, when anything depends on it.
    pub fn d_result(&self, i: usize) -> Option<ValueId> {
        self.d_results[i]
    }

    /// Whether the gradient of argument `i` is wanted.
    pub fn needs(&self, i: usize) -> bool {
        self.needs.get(i).copied().unwrap_or(false)
    }

    /// Type of a value.
    pub fn ty(&self, v: ValueId) -> &Type {
        self.g.ty(v)
    }

    /// Appends a node to the backward phase.
    ///
    /// # Errors
    /// [`TypeError`] when the arguments do not fit.
    pub fn push(
        &mut self,
        op: impl Into<Op>,
        args: Vec<Option<ValueId>>,
    ) -> Result<Vec<ValueId>, TypeError> {
        self.g.push(op, args, &self.at)
    }

    /// As [`Vjp::push`] for ops with one result.
    ///
    /// # Errors
    /// [`TypeError`] when the arguments do not fit.
    pub fn push1(
        &mut self,
        op: impl Into<Op>,
        args: Vec<Option<ValueId>>,
    ) -> Result<ValueId, TypeError> {
        Ok(self.push(op, args)?[0])
    }

    /// Sets the gradient of argument `i`; ignored when it is not wanted.
    pub fn set(&mut self, i: usize, grad: ValueId) {
        if self.needs(i) {
            self.d_args[i] = Some(grad);
        }
    }
}

/// A gradient contribution to a parameter: rows `start..start+len`.
type RowGrads = BTreeMap<(usize, usize), Vec<ValueId>>;

/// Appends the backward phase for output `loss` (`f32[X1]`): after it, every trainable parameter that `loss` depends on has its
/// gradient accumulated into the external `grad` of its name. Returns the names of those parameters.
///
/// # Errors
/// [`TypeError`] when an op's derivative is ill-typed: a bug.
pub fn differentiate(g: &mut Graph, loss: ValueId) -> Result<Vec<String>, TypeError> {
    let one = g.add_external(External::Const(vec![1.0]), "one", Type::scalar());
    differentiate_from(g, &[(loss, one)], &[])
}

/// The same from values whose gradients are given: `seeds` pairs each value with its gradient. Gradients of the externals `of`, which are
/// no trainable parameters, become outputs `grad:<name>`.
///
/// # Errors
/// As [`differentiate`].
pub fn differentiate_from(
    g: &mut Graph,
    seeds: &[(ValueId, ValueId)],
    of: &[ValueId],
) -> Result<Vec<String>, TypeError> {
    let n_forward = g.nodes.len();
    let trainable: HashSet<String> = g
        .params
        .iter()
        .filter(|p| p.trainable)
        .map(|p| p.name.clone())
        .collect();
    let wanted = depends_on(g, &trainable, of);
    let reaches = reaches(g, seeds.iter().map(|(v, _)| *v).collect());

    let mut grads: HashMap<ValueId, Vec<ValueId>> = HashMap::new();
    let mut params: BTreeMap<ValueId, RowGrads> = BTreeMap::new();
    let head = Place {
        path: "loss".into(),
        block: None,
        phase: Phase::Backward,
    };
    let one = g.add_external(External::Const(vec![1.0]), "one", Type::scalar());
    for &(v, d) in seeds {
        grads.entry(v).or_default().push(d);
    }

    for i in (0..n_forward).rev() {
        let node = g.nodes[i].clone();
        if !node.results.iter().any(|r| grads.contains_key(r))
            || !node.results.iter().any(|r| reaches.contains(r))
        {
            continue;
        }
        let needs: Vec<bool> = node
            .args
            .iter()
            .map(|a| a.is_some_and(|v| wanted.contains(&v)))
            .collect();
        if !needs.iter().any(|&n| n) {
            continue;
        }
        let at = Place {
            path: node.path.clone(),
            block: node.block,
            phase: Phase::Backward,
        };
        let mut d_results = Vec::new();
        for r in &node.results {
            let parts = grads.remove(r).unwrap_or_default();
            d_results.push(sum(g, parts, &at)?);
        }
        // Rows of a parameter: no node, the gradient goes to those rows.
        if let Op::Rows(rows) = &node.op {
            if let (Some(Some(arg)), Some(d)) = (node.args.first(), d_results[0]) {
                params
                    .entry(*arg)
                    .or_default()
                    .entry((rows.start, rows.len))
                    .or_default()
                    .push(d);
            }
            continue;
        }
        let mut cx = Vjp {
            d_args: vec![None; node.args.len()],
            at,
            args: node.args.clone(),
            results: node.results.clone(),
            d_results,
            needs,
            g,
        };
        if let Some(result) = node.op.vjp(&mut cx) {
            result?;
        }
        let d_args = std::mem::take(&mut cx.d_args);
        for (arg, d) in node.args.iter().zip(d_args) {
            let (Some(arg), Some(d)) = (*arg, d) else {
                continue;
            };
            if g.external(arg).is_some() && !of.contains(&arg) {
                let n = g.ty(arg).size(0);
                params
                    .entry(arg)
                    .or_default()
                    .entry((0, n))
                    .or_default()
                    .push(d);
            } else {
                grads.entry(arg).or_default().push(d);
            }
        }
    }
    for &v in of {
        let parts = grads.remove(&v).unwrap_or_default();
        if let Some(d) = sum(g, parts, &head)? {
            g.outputs.push((format!("grad:{}", g.value(v).name), d));
        }
    }
    let mut names = Vec::new();
    let keep = g.add_external(External::Input, "grad_keep", Type::scalar());
    for (param, rows) in params {
        let name = g.value(param).name.clone();
        let ty = g.ty(param).clone();
        let buffer = g.add_external(External::Grad, &name, ty.with_dtype(crate::DType::F32));
        let at = Place {
            path: name.clone(),
            ..head.clone()
        };
        accumulate(g, buffer, keep, one, rows, &at)?;
        names.push(name);
    }
    sink_accumulates(g, n_forward);
    Ok(names)
}

/// Writes the contributions of one parameter into its gradient buffer.
fn accumulate(
    g: &mut Graph,
    buffer: ValueId,
    keep: ValueId,
    one: ValueId,
    rows: RowGrads,
    at: &Place,
) -> Result<(), TypeError> {
    let n = g.ty(buffer).size(0);
    let disjoint = {
        let mut end = 0;
        rows.keys().all(|&(start, len)| {
            let ok = start >= end;
            end = start + len;
            ok
        })
    };
    let mut current = buffer;
    if !disjoint {
        // Overlapping ranges: scale once, then add everything.
        current = g.push(
            Accumulate { start: 0, len: n },
            vec![Some(current), Some(keep), None],
            at,
        )?[0];
    }
    for ((start, len), parts) in rows {
        for (i, part) in parts.into_iter().enumerate() {
            let beta = if i == 0 && disjoint { keep } else { one };
            current = g.push(
                Accumulate { start, len },
                vec![Some(current), Some(beta), Some(part)],
                at,
            )?[0];
        }
    }
    g.outputs
        .push((format!("grad:{}", g.value(buffer).name), current));
    Ok(())
}

/// Moves each accumulation to right after the node that makes its contribution, so that contributions die at once.
fn sink_accumulates(g: &mut Graph, n_forward: usize) {
    let n = g.nodes.len();
    let mut ready: Vec<Vec<usize>> = vec![Vec::new(); n];
    let mut moved = HashSet::new();
    // An accumulation may run once its contribution and the accumulation before it (same buffer) have run.
    let mut at: HashMap<ValueId, usize> = HashMap::new();
    for i in 0..n_forward.max(1) - 1 {
        for r in &g.nodes[i].results {
            at.insert(*r, i);
        }
    }
    for i in n_forward.saturating_sub(1)..n {
        let node = &g.nodes[i];
        let position = match &node.op {
            Op::Accumulate(_) => {
                let after = node
                    .present_args()
                    .filter_map(|a| at.get(&a).copied())
                    .max()
                    .unwrap_or(n_forward.saturating_sub(1));
                ready[after].push(i);
                moved.insert(i);
                after
            }
            _ => i,
        };
        for r in &node.results {
            at.insert(*r, position);
        }
    }
    let mut order = Vec::with_capacity(n);
    for i in 0..n {
        if !moved.contains(&i) {
            order.push(g.nodes[i].clone());
            order.extend(ready[i].iter().map(|&j| g.nodes[j].clone()));
        }
    }
    *g = g.rebuild(&order, &HashMap::new());
}

/// Sum of gradient contributions.
fn sum(g: &mut Graph, parts: Vec<ValueId>, at: &Place) -> Result<Option<ValueId>, TypeError> {
    let mut parts = parts.into_iter();
    let Some(mut acc) = parts.next() else {
        return Ok(None);
    };
    for p in parts {
        acc = g.push(Pointwise::add(), vec![Some(acc), Some(p)], at)?[0];
    }
    Ok(Some(acc))
}

/// Values whose gradient some trainable parameter, or some of these externals, needs.
fn depends_on(g: &Graph, trainable: &HashSet<String>, of: &[ValueId]) -> HashSet<ValueId> {
    let mut set = HashSet::new();
    for v in g.value_ids() {
        let value = g.value(v);
        if !value.ty.dtype.is_float() {
            continue;
        }
        let hit = match &value.def {
            Def::External(_) if of.contains(&v) => true,
            Def::External(External::Param) => trainable.contains(&value.name),
            Def::External(_) => false,
            Def::Node { node, .. } => g.node(*node).present_args().any(|a| set.contains(&a)),
        };
        if hit {
            set.insert(v);
        }
    }
    set
}

/// Values that these values depend on, and they themselves.
fn reaches(g: &Graph, of: HashSet<ValueId>) -> HashSet<ValueId> {
    let mut set = of;
    for node in g.nodes.iter().rev() {
        if node.results.iter().any(|r| set.contains(r)) {
            set.extend(node.present_args());
        }
    }
    set
}
