//! Activation loss: `loss + alpha * mean over taps of mean(x^2)`, added before autodiff. It keeps activations within reach of f16 and
//! fp8; Jamba-1.5 trains with it (arXiv 2408.12570, section 5).

use crate::op::{Bin, MeanSquare, Pointwise, Un};
use crate::{External, Graph, Node, Phase, Type, TypeError, ValueId};
use std::collections::HashMap;

/// Adds the activation loss of `taps` to `loss`. The factor is the input `alpha`, a scalar, so that it may change from step to step
/// and be switched on late. Returns the graph and the loss to differentiate; the mean without its factor is the output
/// `activation_mean_square`.
///
/// Each mean stands right after its tap and belongs to the tap's block, so that in backward the gradient of a tap arises where it is
/// needed.
///
/// # Errors
/// [`TypeError`] when the loss is no scalar: a bug.
pub fn add_activation_loss(
    g: &Graph,
    loss: ValueId,
    taps: &[ValueId],
    alpha: &str,
) -> Result<(Graph, ValueId), TypeError> {
    if taps.is_empty() {
        return Ok((g.clone(), loss));
    }
    let mut g = g.clone();
    let alpha = g.add_external(External::Input, alpha, Type::scalar());
    let at = super::definers(&g, &g.nodes);
    let mut first: Vec<Node> = Vec::new();
    let mut after: Vec<Vec<Node>> = vec![Vec::new(); g.nodes.len()];
    let mut means: Vec<ValueId> = Vec::new();
    for &tap in taps {
        let mean = g.add_result(Type::scalar(), 0);
        means.push(mean);
        let place = at[tap.index()].map(|n| n as usize);
        let node = |path: String, block| Node {
            op: MeanSquare.into(),
            args: vec![Some(tap)],
            results: vec![mean],
            path,
            block,
            phase: Phase::Forward,
        };
        match place {
            Some(n) => {
                let of = &g.nodes[n];
                let node = node(of.path.clone(), of.block);
                after[n].push(node);
            }
            None => first.push(node(g.value(tap).name.clone(), None)),
        }
    }
    let mut nodes = first;
    for (node, means) in g.nodes.iter().zip(after) {
        nodes.push(node.clone());
        nodes.extend(means);
    }
    let mut olds = means;
    olds.push(loss);
    olds.push(alpha);
    let (mut g, map) = g.rebuild_map(&nodes, &HashMap::new());
    let new = |v: ValueId| map[v.index()].unwrap_or(v);
    let at = crate::Place {
        path: "activation_loss".into(),
        block: None,
        phase: Phase::Forward,
    };
    let n = taps.len();
    let mut sum = new(olds[0]);
    for &mean in &olds[1..n] {
        sum = g.push(Pointwise::add(), vec![Some(sum), Some(new(mean))], &at)?[0];
    }
    let mean = g.push(
        Pointwise::map(Un::Scale(1.0 / n as f32)),
        vec![Some(sum)],
        &at,
    )?[0];
    let mut total = Pointwise::new(3);
    let weighted = total.bin(Bin::Mul, 1, 2);
    let added = total.bin(Bin::Add, 0, weighted);
    let args = [new(olds[n]), mean, new(olds[n + 1])];
    let total = g.push(total.out(added), args.map(Some).to_vec(), &at)?[0];
    g.outputs.push(("activation_mean_square".into(), mean));
    Ok((g, total))
}
