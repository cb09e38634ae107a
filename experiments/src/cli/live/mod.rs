//! What a sweep shows while it goes: all members on a terminal, plain lines elsewhere.

mod board;
mod draw;
mod lines;
mod screen;
mod usage;

use super::human;
use crate::sweep::{Ended, Found, SweepObserver};
use board::Board;
use marimba_dsl::sweep::Sweep;
use std::collections::BTreeMap;
use std::io::IsTerminal;

/// Shows a sweep, of whose members this was found before. `plain` asks for lines even on a terminal.
pub(super) fn observer(sweep: &Sweep, found: &[Found], plain: bool) -> Box<dyn SweepObserver> {
    if !plain && drawable() {
        let members: Vec<(String, usize)> = sweep
            .members
            .iter()
            .map(|m| (m.name.clone(), m.run.total_steps()))
            .collect();
        let mut board = Board::new(&sweep.name, &sweep.metric, sweep.goal, &members);
        board.found(found);
        match screen::Screen::open(board) {
            Ok(screen) => return Box::new(screen),
            Err(e) => eprintln!("no live view, as the terminal cannot be used: {e}"),
        }
    }
    let names = sweep.members.iter().map(|m| m.name.clone()).collect();
    Box::new(lines::Lines::new(names))
}

/// Whether a person watches who can be drawn for and whose keys can be read.
fn drawable() -> bool {
    let dumb = std::env::var("TERM").is_ok_and(|t| t == "dumb");
    std::io::stderr().is_terminal()
        && std::io::stdin().is_terminal()
        && !dumb
        && screen::foreground()
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
