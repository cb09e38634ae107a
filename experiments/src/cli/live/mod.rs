//! What a sweep shows while it goes.

mod bars;
mod lines;

use super::{human, interactive};
use crate::sweep::{Ended, SweepObserver};
use marimba_dsl::sweep::Sweep;
use std::collections::BTreeMap;

/// Shows a sweep: bars on a terminal, plain lines elsewhere.
pub(super) fn observer(sweep: &Sweep) -> Box<dyn SweepObserver> {
    let names: Vec<String> = sweep.members.iter().map(|m| m.name.clone()).collect();
    if interactive() {
        Box::new(bars::Bars::new(names))
    } else {
        Box::new(lines::Lines::new(names))
    }
}

/// Metrics of an evaluation without those of single sets.
fn scores(metrics: &BTreeMap<String, f64>) -> String {
    let shown = metrics.iter().filter(|(n, _)| !n.contains('/'));
    shown
        .map(|(n, v)| format!("{n} {v:.3}"))
        .collect::<Vec<_>>()
        .join("  ")
}

/// How a member ended.
fn words(ended: &Ended) -> String {
    match ended {
        Ended::AlreadyDone => "was done before".into(),
        Ended::Finished(s) => {
            let metrics: BTreeMap<String, f64> = s
                .final_metrics
                .iter()
                .filter_map(|(n, v)| n.strip_prefix("eval/").map(|n| (n.to_string(), *v)))
                .collect();
            format!(
                "done  {}  {} tokens/s",
                scores(&metrics),
                human(s.tokens_per_sec)
            )
        }
        Ended::Halved(why) => why.clone(),
        Ended::Paused(step) => format!("waits after step {step}"),
        Ended::Interrupted => "stopped, checkpoint written".into(),
        Ended::Failed(why) => format!("failed: {why}"),
        Ended::NotBegun => "not begun".into(),
    }
}
