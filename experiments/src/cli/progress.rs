//! What a run shows while it goes: a bar on a terminal, a plain line per log interval elsewhere.

use crate::facts::Facts;
use crate::train::{LogLine, Observer, StepOutcome};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::BTreeMap;

/// Shows one run.
pub(super) struct RunProgress {
    bar: Option<ProgressBar>,
    loss: f64,
    rate: f64,
}

impl RunProgress {
    pub(super) fn new(interactive: bool) -> Self {
        let bar = interactive.then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            let style = "{bar:30} {pos}/{len} steps  {msg}  {elapsed} < {eta}";
            // The template is a constant; the default style is as good should it not parse.
            bar.set_style(
                ProgressStyle::with_template(style)
                    .unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
            bar
        });
        RunProgress {
            bar,
            loss: f64::NAN,
            rate: 0.0,
        }
    }

    fn say(&self, text: String) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }
}

impl Observer for RunProgress {
    fn begin(&mut self, step: usize, steps: usize, facts: &Facts) {
        self.say(format!(
            "{} parameters ({} active), {} FLOPs per token forward, {} of state and {} of KV cache per token of context while decoding",
            super::human(facts.params_total as f64),
            super::human(facts.params_active as f64),
            super::human(facts.flops_per_token),
            super::human_bytes(facts.state_bytes_per_seq),
            super::human_bytes(facts.kv_bytes_per_token),
        ));
        if let Some(bar) = &self.bar {
            bar.set_length(steps as u64);
            bar.set_position(step as u64);
            bar.reset_eta();
        }
    }

    fn step(&mut self, step: usize, outcome: &StepOutcome) {
        self.loss = if self.loss.is_finite() {
            0.9 * self.loss + 0.1 * outcome.cross_entropy
        } else {
            outcome.cross_entropy
        };
        if let Some(bar) = &self.bar {
            bar.set_position(step as u64);
            bar.set_message(format!(
                "loss {:.4}  {} tokens/s",
                self.loss,
                super::human(self.rate)
            ));
        }
    }

    fn log(&mut self, line: &LogLine) {
        self.rate = line.tokens_per_sec;
        if self.bar.is_none() {
            eprintln!(
                "step: {:>6}/{}  loss: {:.4}  grad_norm: {:.4}  lr: {:.4e}  tps: {:.0}  eta: {}",
                line.step,
                line.steps,
                line.loss,
                line.grad_norm,
                line.lr,
                line.tokens_per_sec,
                clock(line.eta_secs)
            );
        }
    }

    fn eval(&mut self, step: usize, metrics: &BTreeMap<String, f64>) {
        let text: Vec<String> = metrics
            .iter()
            .map(|(n, v)| format!("{n}: {v:.4}"))
            .collect();
        self.say(format!("step: {step:>6}  eval  {}", text.join("  ")));
    }

    fn note(&mut self, text: &str) {
        self.say(text.to_string());
    }
}

/// Seconds as `1:02:03`.
pub(super) fn clock(secs: f64) -> String {
    let s = secs.max(0.0).round() as u64;
    match s / 3600 {
        0 => format!("{}:{:02}", s / 60, s % 60),
        h => format!("{h}:{:02}:{:02}", s % 3600 / 60, s % 60),
    }
}
