//! Evaluation on fixed sets of rows.

use super::{TrainError, Trainer};
use crate::data::{Batch, IGNORED, Loader, Metric};
use serde::Serialize;
use std::collections::BTreeMap;

/// Scores of one set.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvalResult {
    /// Name of the set.
    pub set: String,
    /// Mean cross entropy over all targets, nats.
    pub loss: f64,
    /// Mean over rows of the share of targets met; `None` for sets that report only the loss.
    pub accuracy: Option<f64>,
    /// Rows seen.
    pub rows: u64,
    /// Targets seen.
    pub targets: u64,
    /// Of these, how many have a loss that is not finite.
    pub lost: u64,
}

/// Gives `(nll, hit)` per token of a batch, `f32[B T]` each.
pub type Forward<'a> = dyn FnMut(&Batch) -> Result<(Vec<f32>, Vec<f32>), TrainError> + 'a;

/// Scores all sets of a loader, at most `max_rows` rows each, `batch` rows at a time.
///
/// # Errors
/// [`TrainError`] when rows cannot be read or run.
pub fn evaluate(
    trainer: &mut Trainer,
    loader: &dyn Loader,
    prefix: &str,
    max_rows: usize,
    batch: usize,
) -> Result<Vec<EvalResult>, TrainError> {
    let mut forward = |batch: &Batch| trainer.forward(batch);
    score(&mut forward, loader, prefix, max_rows, batch)
}

/// [`evaluate`] with any way of running the model. A loss that is not finite makes its set's loss not finite.
///
/// # Errors
/// [`TrainError`] when rows cannot be read or run.
pub fn score(
    forward: &mut Forward,
    loader: &dyn Loader,
    prefix: &str,
    max_rows: usize,
    batch: usize,
) -> Result<Vec<EvalResult>, TrainError> {
    let mut results = Vec::new();
    for (i, set) in loader.eval_sets().into_iter().enumerate() {
        let rows = set.rows.min(max_rows as u64);
        let (mut nll, mut targets, mut accuracy, mut scored) = (0.0f64, 0usize, 0.0f64, 0u64);
        let mut lost = 0u64;
        let mut start = 0;
        while start < rows {
            let wanted = batch.min((rows - start) as usize);
            let part = loader.eval_batch(i, start, wanted)?;
            start += part.rows.max(1) as u64;
            let full = pad(&part, batch);
            let (losses, hits) = forward(&full)?;
            for r in 0..part.rows {
                let span = r * part.seq_len..(r + 1) * part.seq_len;
                let (mut n, mut met) = (0usize, 0.0f64);
                for k in span {
                    if part.targets[k] != IGNORED {
                        nll += f64::from(losses[k]);
                        lost += u64::from(!losses[k].is_finite());
                        met += f64::from(hits[k]);
                        n += 1;
                    }
                }
                targets += n;
                if n > 0 {
                    accuracy += met / n as f64;
                    scored += 1;
                }
            }
        }
        results.push(EvalResult {
            set: format!("{prefix}{}", set.name),
            loss: nll / targets.max(1) as f64,
            accuracy: (set.metric == Metric::Accuracy).then(|| accuracy / scored.max(1) as f64),
            rows,
            targets: targets as u64,
            lost,
        });
    }
    Ok(results)
}

/// A batch of `rows` rows: those given, then rows without targets, so that one program serves every batch.
fn pad(part: &Batch, rows: usize) -> Batch {
    if part.rows == rows {
        return part.clone();
    }
    let mut full = Batch::blank(rows, part.seq_len);
    let n = part.tokens.len();
    full.tokens[..n].copy_from_slice(&part.tokens);
    full.targets[..n].copy_from_slice(&part.targets);
    full.segments[..n].copy_from_slice(&part.segments);
    full.positions[..n].copy_from_slice(&part.positions);
    full
}

/// Metrics by tag suffix: `loss` and `accuracy` as means over sets, and per set when there are several.
pub(super) fn metrics(results: &[EvalResult]) -> BTreeMap<String, f64> {
    let mut out = BTreeMap::new();
    let mean = |v: Vec<f64>| (!v.is_empty()).then(|| v.iter().sum::<f64>() / v.len() as f64);
    out.extend(mean(results.iter().map(|r| r.loss).collect()).map(|v| ("loss".to_string(), v)));
    out.extend(
        mean(results.iter().filter_map(|r| r.accuracy).collect())
            .map(|v| ("accuracy".to_string(), v)),
    );
    if results.len() > 1 {
        for r in results {
            out.insert(format!("{}/loss", r.set), r.loss);
            out.extend(r.accuracy.map(|a| (format!("{}/accuracy", r.set), a)));
        }
    }
    out
}
