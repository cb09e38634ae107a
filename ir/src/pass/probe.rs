//! Activation statistics: a `stat` node right after each tapped value, and after each finished parameter gradient.
//!
//! Outputs are named `stat:<tap>` and `stat:grad:<parameter>`; their layout is [`crate::op::Stat`]'s.

use super::{Config, PassError, definers};
use crate::op::Stat;
use crate::{External, Graph, Node, Phase, Type, ValueId, dims};
use std::collections::HashMap;

/// A choice of taps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Taps {
    /// None of them.
    #[default]
    None,
    /// All of them.
    All,
    /// Those whose name one of these patterns matches; `*` stands for any text: `layers[*].mixer.out`.
    Matching(Vec<String>),
}

impl Taps {
    /// Whether a tap of this name is chosen.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Taps::None => false,
            Taps::All => true,
            Taps::Matching(patterns) => patterns.iter().any(|p| matches(p, name)),
        }
    }

    /// The chosen float taps of a graph, in order.
    pub fn select(&self, g: &Graph) -> Vec<(String, ValueId)> {
        let float = |v: ValueId| g.ty(v).dtype.is_float();
        g.taps
            .iter()
            .filter(|(name, v)| self.contains(name) && float(*v))
            .cloned()
            .collect()
    }
}

/// Whether `pattern`, in which `*` stands for any text, matches all of `name`.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
    let inner = name.strip_prefix(first).and_then(|n| n.strip_suffix(last));
    let Some(mut inner) = inner else {
        return false;
    };
    middle.split('*').all(|part| match inner.find(part) {
        Some(i) => {
            inner = &inner[i + part.len()..];
            true
        }
        None => false,
    })
}

/// Adds statistics of the taps in `config.probe`, and with `config.probe_grads` of all parameter gradients.
///
/// # Errors
/// None of its own.
pub fn probe(g: &Graph, config: &Config) -> Result<Graph, PassError> {
    let mut wanted = config.probe.select(g);
    if config.probe_grads {
        let roots = g.roots();
        wanted.extend(
            g.outputs
                .iter()
                .filter(|(_, v)| g.external(roots[v.index()].0) == Some(&External::Grad))
                .cloned(),
        );
    }
    if wanted.is_empty() {
        return Ok(g.clone());
    }
    let mut g = g.clone();
    let at = definers(&g, &g.nodes);
    let mut after: Vec<Vec<Node>> = vec![Vec::new(); g.nodes.len() + 1];
    for (name, v) in wanted {
        let result = g.add_result(Type::f32(dims![X crate::op::STAT_LEN]), 0);
        // Externals are looked at first.
        let slot = at[v.index()].map_or(0, |n| n as usize + 1);
        let (path, block, phase) = match at[v.index()].map(|n| &g.nodes[n as usize]) {
            Some(node) => (node.path.clone(), node.block, node.phase),
            None => (name.clone(), None, Phase::Forward),
        };
        after[slot].push(Node {
            op: Stat.into(),
            args: vec![Some(v)],
            results: vec![result],
            path,
            block,
            phase,
        });
        g.outputs.push((format!("stat:{name}"), result));
    }
    let mut nodes = Vec::with_capacity(g.nodes.len() + after.len());
    let mut after = after.into_iter();
    nodes.extend(after.next().unwrap_or_default());
    for (node, stats) in g.nodes.iter().zip(after) {
        nodes.push(node.clone());
        nodes.extend(stats);
    }
    Ok(g.rebuild(&nodes, &HashMap::new()))
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns() {
        assert!(matches("*", "anything"));
        assert!(matches("a", "a"));
        assert!(!matches("a", "ab"));
        assert!(!matches("a", "ba"));
        assert!(matches("layers[*].out", "layers[12].out"));
        assert!(!matches("layers[*].out", "layers[12].mixer"));
        assert!(!matches("layers[*].out", "layers[1].out.out"));
        assert!(matches("*.out", "layers[1].mixer.out"));
        assert!(!matches("a*a", "a"));
        assert!(matches("a*b*c", "axxbyyc"));
        assert!(!matches("a*b*c", "axxcyyb"));
    }
}
