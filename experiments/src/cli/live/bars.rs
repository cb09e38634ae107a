//! A bar for the sweep and one for each member that runs.

use super::{scores, words};
use crate::sweep::{Event, SweepObserver};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::collections::HashMap;

/// The bars.
pub(super) struct Bars {
    names: Vec<String>,
    all: MultiProgress,
    total: ProgressBar,
    bars: HashMap<usize, (ProgressBar, f64)>,
    scores: HashMap<usize, String>,
}

impl Bars {
    pub(super) fn new(names: Vec<String>) -> Self {
        let all = MultiProgress::new();
        let total = all.add(ProgressBar::new(names.len() as u64));
        total.set_style(style("{bar:30} {pos}/{len} members  {elapsed}"));
        total.enable_steady_tick(std::time::Duration::from_millis(500));
        Bars {
            names,
            all,
            total,
            bars: HashMap::new(),
            scores: HashMap::new(),
        }
    }

    fn say(&self, member: usize, text: &str) {
        // A terminal that cannot be written to is no reason to stop.
        let _ = self
            .all
            .println(format!("  {:32} {text}", self.names[member]));
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl SweepObserver for Bars {
    fn event(&mut self, member: usize, event: Event<'_>) {
        match event {
            Event::Begin { steps, .. } => {
                let bar = self.all.add(ProgressBar::new(steps as u64));
                bar.set_style(style("  {prefix:32} {bar:20} {pos}/{len}  {msg}"));
                bar.set_prefix(self.names[member].clone());
                self.bars.insert(member, (bar, f64::NAN));
            }
            Event::Step { step, loss } => {
                if let Some((bar, mean)) = self.bars.get_mut(&member) {
                    *mean = if mean.is_finite() {
                        0.95 * *mean + 0.05 * loss
                    } else {
                        loss
                    };
                    bar.set_position(step as u64);
                    bar.set_message(format!(
                        "loss {mean:.3}  {}",
                        self.scores.get(&member).map_or("", String::as_str)
                    ));
                }
            }
            Event::Log(_) => {}
            Event::Eval { metrics, .. } => {
                self.scores.insert(member, scores(metrics));
            }
            Event::Note(text) => self.say(member, text),
            Event::End(ended) => {
                if let Some((bar, _)) = self.bars.remove(&member) {
                    bar.finish_and_clear();
                }
                self.say(member, &words(ended));
                self.total.inc(1);
            }
        }
    }
}
