//! Plain lines, for logs.

use super::{scores, words};
use crate::sweep::{Event, SweepObserver};

/// A line for every beginning, evaluation, note and end.
pub(super) struct Lines {
    names: Vec<String>,
}

impl Lines {
    pub(super) fn new(names: Vec<String>) -> Lines {
        Lines { names }
    }
}

impl SweepObserver for Lines {
    fn event(&mut self, member: usize, event: Event<'_>) {
        let name = &self.names[member];
        match event {
            Event::Begin { step: 0, steps, .. } => eprintln!("{name}: begins, {steps} steps"),
            Event::Begin { step, steps, .. } => eprintln!("{name}: goes on, {step}/{steps} steps"),
            Event::Step { .. } | Event::Log(_) => {}
            Event::Eval { step, metrics } => eprintln!("{name}: step {step}  {}", scores(metrics)),
            Event::Note(text) => eprintln!("{name}: {text}"),
            Event::End(ended) => eprintln!("{name}: {}", words(ended)),
        }
    }
}
