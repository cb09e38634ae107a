//! Graphs of model files, as the suites look at them.

use marimba_dsl::model::Model;
use marimba_ir::lower::{Options, lower};
use marimba_ir::{Graph, TypeError, differentiate};

/// The graph of one micro-batch of training: forward and backward.
///
/// # Errors
/// [`TypeError`]: a bug.
pub fn training(model: &Model, options: &Options) -> Result<Graph, TypeError> {
    let mut g = lower(model, options)?;
    if let Some(loss) = g.output("loss") {
        differentiate(&mut g, loss)?;
    }
    Ok(g)
}
