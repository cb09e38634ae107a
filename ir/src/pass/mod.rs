//! Passes: `Graph -> Graph`, each followed by the verifier. Lowerings know nothing of any of them.
//!
//! The pipeline is listed once, in [`PIPELINE`], in the order in which it runs. All passes keep the numbers of all outputs bit for bit
//! on a backend that computes elementwise programs in one precision, but for four: `fuse_loss` lets a backend walk the head once
//! instead of twice, `fold_accumulate` and `fold_sums` let it add where it multiplies, and `narrow` does what `Graph::fp8` asks for.

mod activation_loss;
mod dce;
mod fold_accumulate;
mod fold_sums;
mod fuse_loss;
mod fuse_pointwise;
mod gather;
mod narrow;
mod probe;
mod recompute;
mod schedule;

pub use activation_loss::add_activation_loss;
pub use dce::dce;
pub use fold_accumulate::fold_accumulate;
pub use fold_sums::fold_sums;
pub use fuse_loss::fuse_loss;
pub use fuse_pointwise::fuse_pointwise;
pub use gather::gather;
pub use narrow::narrow;
pub use probe::{Taps, probe};
pub use recompute::{RecomputePolicy, recompute};
pub use schedule::schedule;

use crate::{Graph, Node, TypeError, ValueId, VerifyError, verify};

/// What the passes are to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Merge elementwise programs, the loss with its derivative, and products with what they are added to. Off shows
    /// the graph as it was lowered.
    pub fuse: bool,
    /// What to recompute in backward instead of keeping.
    pub recompute: RecomputePolicy,
    /// Which activations get statistics.
    pub probe: Taps,
    /// Whether parameter gradients get statistics.
    pub probe_grads: bool,
    /// Reorder nodes where that lowers the peak.
    pub schedule: bool,
}

impl Default for Config {
    /// Fused and scheduled, nothing recomputed, nothing probed.
    fn default() -> Self {
        Config {
            fuse: true,
            recompute: RecomputePolicy::None,
            probe: Taps::None,
            probe_grads: false,
            schedule: true,
        }
    }
}

/// What a pass can complain of.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PassError {
    /// A pass made a broken graph.
    #[error("pass {pass} broke the graph: {error}")]
    Broke {
        /// Name of the pass; `lowering` when the graph came broken.
        pass: &'static str,
        /// What is wrong with it.
        #[source]
        error: Box<VerifyError>,
    },
    /// A pass made an ill-typed node.
    #[error("pass {pass}: {error}")]
    Type {
        /// Name of the pass.
        pass: &'static str,
        /// What does not fit.
        #[source]
        error: TypeError,
    },
    /// No choice of recomputed blocks fits.
    #[error(
        "activations need {smallest_bytes} bytes even when everything is recomputed, {budget_bytes} are allowed; give at least \
         {smallest_bytes} bytes or make micro-batches or sequences smaller"
    )]
    Budget {
        /// Bytes allowed.
        budget_bytes: usize,
        /// Bytes of the smallest arena that recomputation reaches.
        smallest_bytes: usize,
    },
}

/// A pass by name.
pub struct Pass {
    /// Name, for errors and `marimba show`.
    pub name: &'static str,
    /// What it does.
    pub run: fn(&Graph, &Config) -> Result<Graph, PassError>,
}

/// All passes in the order in which they run. Probes come before fusion, so that what they look at still exists; recomputation comes
/// after it, so that what is computed twice is already fused. Operands are narrowed after both, when it is known who reads them.
pub const PIPELINE: &[Pass] = &[
    Pass {
        name: "fuse_loss",
        run: fuse_loss,
    },
    Pass {
        name: "fold_accumulate",
        run: fold_accumulate,
    },
    Pass {
        name: "probe",
        run: probe,
    },
    Pass {
        name: "fold_sums",
        run: fold_sums,
    },
    Pass {
        name: "fuse_pointwise",
        run: fuse_pointwise,
    },
    Pass {
        name: "dce",
        run: dce,
    },
    Pass {
        name: "recompute",
        run: recompute,
    },
    Pass {
        name: "narrow",
        run: narrow,
    },
    Pass {
        name: "schedule",
        run: schedule,
    },
    Pass {
        name: "gather",
        run: gather,
    },
];

/// The graph as the passes after this one make it.
fn as_finished(g: &Graph, after: &str, config: &Config) -> Result<Graph, PassError> {
    let rest = PIPELINE.iter().skip_while(|p| p.name != after).skip(1);
    rest.into_iter()
        .try_fold(g.clone(), |g, pass| (pass.run)(&g, config))
}

/// Runs the pipeline; verifies the graph before and after every pass.
///
/// # Errors
/// [`PassError::Budget`] when the memory allowed cannot be kept; the others are bugs.
pub fn run_passes(g: &Graph, config: &Config) -> Result<Graph, PassError> {
    let check = |pass, g: &Graph| {
        verify(g).map_err(|error| PassError::Broke {
            pass,
            error: Box::new(error),
        })
    };
    check("lowering", g)?;
    let mut g = g.clone();
    for pass in PIPELINE {
        g = (pass.run)(&g, config)?;
        check(pass.name, &g)?;
    }
    Ok(g)
}

/// Who reads what, over a list of nodes that may be in the middle of an edit.
struct Uses {
    /// For each value, indices of the nodes that read it, ascending.
    readers: Vec<Vec<u32>>,
    /// For each value, whether the host reads it.
    output: Vec<bool>,
}

impl Uses {
    fn of(g: &Graph, nodes: &[Node]) -> Uses {
        let mut readers: Vec<Vec<u32>> = vec![Vec::new(); g.values.len()];
        for (i, node) in nodes.iter().enumerate() {
            for a in node.present_args() {
                let list = &mut readers[a.index()];
                if list.last() != Some(&(i as u32)) {
                    list.push(i as u32);
                }
            }
        }
        let mut output = vec![false; g.values.len()];
        for (_, v) in &g.outputs {
            output[v.index()] = true;
        }
        Uses { readers, output }
    }

    fn readers(&self, v: ValueId) -> &[u32] {
        &self.readers[v.index()]
    }

    fn is_output(&self, v: ValueId) -> bool {
        self.output[v.index()]
    }

    /// Whether node `reader` alone reads `v`.
    fn only(&self, v: ValueId, reader: usize) -> bool {
        !self.is_output(v) && self.readers(v) == [reader as u32]
    }
}

/// Index of the node that defines each value, over a list of nodes that may be in the middle of an edit; `None` for externals.
fn definers(g: &Graph, nodes: &[Node]) -> Vec<Option<u32>> {
    let mut at = vec![None; g.values.len()];
    for (i, node) in nodes.iter().enumerate() {
        for r in &node.results {
            at[r.index()] = Some(i as u32);
        }
    }
    at
}

#[cfg(test)]
mod tests;
