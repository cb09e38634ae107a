//! What is known of a sweep's members: a fold over events. Holds no terminal and no clock, so that pictures of it can be tested.
//!
//! Times are seconds since the view was opened.

use super::words;
use crate::facts::Facts;
use crate::record::{Point, Series};
use crate::sweep::{Ended, Event, Found};
use crate::train::LogLine;
use marimba_dsl::run::Goal;
use std::collections::{BTreeMap, VecDeque};

/// Points of a curve that are kept.
const MAX_POINTS: usize = 2000;
/// Messages that are kept.
const MAX_MESSAGES: usize = 100;
/// Weight of the past in the loss that is shown.
const SMOOTHING: f64 = 0.95;

/// Where a member stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum State {
    Running,
    /// At a rung of successive halving.
    Paused,
    Waiting,
    Interrupted,
    Failed,
    Done,
    /// Ended by successive halving.
    Halved,
}

impl State {
    pub(super) fn word(self) -> &'static str {
        match self {
            State::Running => "running",
            State::Paused => "paused",
            State::Waiting => "waiting",
            State::Interrupted => "stopped",
            State::Failed => "failed",
            State::Done => "done",
            State::Halved => "halved",
        }
    }
}

/// A member.
pub(super) struct Row {
    pub(super) name: String,
    pub(super) state: State,
    pub(super) step: usize,
    pub(super) steps: usize,
    /// Smoothed cross entropy.
    pub(super) loss: Option<f64>,
    /// Values behind it.
    heard: usize,
    /// The metric of the sweep at the last evaluation.
    pub(super) score: Option<f64>,
    pub(super) scores: BTreeMap<String, f64>,
    pub(super) losses: Series,
    pub(super) evals: Series,
    pub(super) log: Option<LogLine>,
    pub(super) facts: Option<Facts>,
    /// Why it failed.
    pub(super) why: Option<String>,
    /// When it last began, and at which step.
    begun: Option<(f64, usize)>,
}

impl Row {
    fn new(name: &str, steps: usize) -> Row {
        Row {
            name: name.to_owned(),
            state: State::Waiting,
            step: 0,
            steps,
            loss: None,
            heard: 0,
            score: None,
            scores: BTreeMap::new(),
            losses: Series::with_capacity_limit(MAX_POINTS),
            evals: Series::with_capacity_limit(MAX_POINTS),
            log: None,
            facts: None,
            why: None,
            begun: None,
        }
    }

    /// Seconds to its end at the pace since it began; `None` where it does not run or has no pace yet.
    pub(super) fn left(&self, now: f64) -> Option<f64> {
        let (at, from) = self.begun.filter(|_| self.state == State::Running)?;
        let did = self.step.checked_sub(from).filter(|n| *n > 0)?;
        Some((now - at) / did as f64 * self.steps.saturating_sub(self.step) as f64)
    }

    /// Share done, from 0 to 1.
    pub(super) fn share(&self) -> f64 {
        match (self.state, self.steps) {
            (State::Done, _) => 1.0,
            (_, 0) => 0.0,
            (_, n) => (self.step as f64 / n as f64).min(1.0),
        }
    }
}

/// In which order members are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// As in the file.
    File,
    /// Running ones first.
    State,
    /// Best metric first.
    Score,
}

impl Order {
    pub(super) fn word(self) -> &'static str {
        match self {
            Order::File => "as in the file",
            Order::State => "running first",
            Order::Score => "best first",
        }
    }
}

/// All members, and what of them is looked at.
pub(super) struct Board {
    pub(super) title: String,
    /// Name of the metric that decides.
    pub(super) metric: String,
    goal: Goal,
    pub(super) rows: Vec<Row>,
    pub(super) messages: VecDeque<String>,
    pub(super) order: Order,
    /// The chart shows evaluations instead of the loss.
    pub(super) show_evals: bool,
    pub(super) log_axis: bool,
    /// Index of the member looked at.
    pub(super) selected: usize,
    /// First line of the list on screen.
    pub(super) top: usize,
    /// Lines of the list on screen at the last picture.
    pub(super) page: usize,
    /// The user chose a member; until then the view follows those that run.
    chosen: bool,
    /// Steps done since the view was opened.
    did: usize,
}

impl Board {
    /// A sweep's members, by name and number of steps, before anything happened.
    pub(super) fn new(title: &str, metric: &str, goal: Goal, members: &[(String, usize)]) -> Board {
        Board {
            title: title.to_owned(),
            metric: metric.strip_prefix("eval/").unwrap_or(metric).to_owned(),
            goal,
            rows: members.iter().map(|(n, s)| Row::new(n, *s)).collect(),
            messages: VecDeque::new(),
            order: Order::File,
            show_evals: false,
            log_axis: false,
            selected: 0,
            top: 0,
            page: 1,
            chosen: false,
            did: 0,
        }
    }

    /// What stood in the members' folders before.
    pub(super) fn found(&mut self, found: &[Found]) {
        for (row, found) in self.rows.iter_mut().zip(found) {
            match found {
                Found::Nothing | Found::Begun | Found::Other(_) => {}
                Found::Stopped(step) => {
                    row.state = State::Halved;
                    row.step = usize::try_from(*step).unwrap_or(row.steps);
                }
                Found::Done(s) => {
                    row.state = State::Done;
                    row.step = row.steps;
                    row.loss = s
                        .final_metrics
                        .get(crate::record::tags::TRAIN_LOSS)
                        .copied();
                    let evals = s.final_metrics.iter();
                    row.scores = evals
                        .filter_map(|(n, v)| Some((n.strip_prefix("eval/")?.to_owned(), *v)))
                        .collect();
                    row.score = row.scores.get(&self.metric).copied();
                }
            }
        }
    }

    /// Takes in what happened to a member.
    pub(super) fn take(&mut self, member: usize, event: Event<'_>, now: f64) {
        let point = |step: usize, value| Point {
            step: step as i64,
            time: now,
            value,
        };
        let Some(row) = self.rows.get_mut(member) else {
            return;
        };
        match event {
            Event::Begin { step, steps, facts } => {
                row.state = State::Running;
                (row.step, row.steps) = (step, steps);
                row.begun = Some((now, step));
                row.facts = Some(facts.clone());
                if !self.chosen && self.rows[self.selected].state != State::Running {
                    self.selected = member;
                }
            }
            Event::Step { step, loss } => {
                self.did += step.saturating_sub(row.step);
                row.step = step;
                let past = row.loss.filter(|l| l.is_finite());
                // A plain mean until there are enough values to smooth.
                row.heard = past.map_or(1, |_| row.heard + 1);
                let past_weight = SMOOTHING.min(1.0 - 1.0 / row.heard as f64);
                row.loss = Some(past.map_or(loss, |l| l + (1.0 - past_weight) * (loss - l)));
                row.losses.push(point(step, loss));
            }
            Event::Log(line) => row.log = Some(line.clone()),
            Event::Eval { step, metrics } => {
                row.scores = metrics.clone();
                row.score = metrics.get(&self.metric).copied();
                if let Some(v) = row.score {
                    row.evals.push(point(step, v));
                }
            }
            Event::Note(text) => {
                let text = format!("{}: {text}", row.name);
                self.say(&text);
            }
            Event::End(ended) => {
                row.state = match ended {
                    Ended::AlreadyDone | Ended::Finished(_) => State::Done,
                    Ended::Halved(_) => State::Halved,
                    Ended::Paused(_) => State::Paused,
                    Ended::Interrupted => State::Interrupted,
                    Ended::Failed(why) => {
                        row.why = Some(why.clone());
                        State::Failed
                    }
                    Ended::NotBegun => State::Waiting,
                };
                row.begun = None;
                let quiet = matches!(
                    ended,
                    Ended::AlreadyDone | Ended::NotBegun | Ended::Paused(_)
                );
                let text = format!("{}: {}", row.name, words(ended));
                if !quiet {
                    self.say(&text);
                }
                if !self.chosen && member == self.selected {
                    let next = self.rows.iter().position(|r| r.state == State::Running);
                    self.selected = next.unwrap_or(member);
                }
            }
        }
    }

    /// Something to read below the list.
    pub(super) fn say(&mut self, text: &str) {
        let lines = text.lines().filter(|l| !l.trim().is_empty());
        self.messages.extend(lines.map(str::to_owned));
        let n = self.messages.len().saturating_sub(MAX_MESSAGES);
        self.messages.drain(..n);
    }

    /// Members with this state.
    pub(super) fn count(&self, state: State) -> usize {
        self.rows.iter().filter(|r| r.state == state).count()
    }

    /// Share of all steps done, from 0 to 1. Members that failed have nothing left to do.
    pub(super) fn share(&self) -> f64 {
        let total: usize = self.rows.iter().map(|r| r.steps).sum();
        match total {
            0 => 0.0,
            n => 1.0 - self.left_steps() as f64 / n as f64,
        }
    }

    /// Seconds to the end at the pace of all members so far; `None` without one.
    pub(super) fn left(&self, now: f64) -> Option<f64> {
        let left = self.left_steps();
        (self.did > 0 && left > 0).then(|| now / self.did as f64 * left as f64)
    }

    fn left_steps(&self) -> usize {
        let open = |r: &&Row| !matches!(r.state, State::Done | State::Failed | State::Halved);
        let left = |r: &Row| r.steps.saturating_sub(r.step);
        self.rows.iter().filter(open).map(left).sum()
    }

    /// Indices of the members in the order of the list.
    pub(super) fn listed(&self) -> Vec<usize> {
        let mut listed: Vec<usize> = (0..self.rows.len()).collect();
        match self.order {
            Order::File => {}
            Order::State => listed.sort_by_key(|i| self.rows[*i].state),
            Order::Score => listed.sort_by(|a, b| {
                let score = |i: &usize| self.rows[*i].score.filter(|v| v.is_finite());
                match (score(a), score(b)) {
                    (Some(x), Some(y)) if self.goal == Goal::Max => y.total_cmp(&x),
                    (Some(x), Some(y)) => x.total_cmp(&y),
                    (x, y) => y.is_some().cmp(&x.is_some()),
                }
            }),
        }
        listed
    }

    /// Looks at the member `by` lines further down.
    pub(super) fn select(&mut self, by: isize) {
        let listed = self.listed();
        let at = listed.iter().position(|i| *i == self.selected).unwrap_or(0);
        let to = at
            .saturating_add_signed(by)
            .min(listed.len().saturating_sub(1));
        if let Some(i) = listed.get(to) {
            (self.selected, self.chosen) = (*i, true);
        }
    }

    /// The next order.
    pub(super) fn reorder(&mut self) {
        self.order = match self.order {
            Order::File => Order::State,
            Order::State => Order::Score,
            Order::Score => Order::File,
        };
    }

    /// Lines that tell, after the view has gone, how every member ended.
    pub(super) fn messages(&self) -> impl Iterator<Item = &str> {
        self.messages.iter().map(String::as_str)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::cli::live) fn facts() -> Facts {
        Facts {
            params_total: 412_672,
            params_active: 201_000,
            params_embedding: 1000,
            flops_per_token: 1.5e6,
            kv_bytes_per_token: 512,
            state_bytes_per_seq: 36_864,
        }
    }

    /// Six members: two run, one is done, one failed, one was done before, one waits.
    pub(in crate::cli::live) fn board() -> Board {
        let names = [
            "attention-seed=0",
            "attention-seed=1",
            "mamba2-seed=0",
            "mamba2-seed=1",
            "hybrid-seed=0",
            "hybrid-seed=1",
        ];
        let members = names.map(|n| (n.to_owned(), 800));
        let mut b = Board::new("which mixer recalls", "accuracy", Goal::Max, &members);
        let facts = facts();
        for member in [0, 1, 2, 3] {
            b.take(
                member,
                Event::Begin {
                    step: 0,
                    steps: 800,
                    facts: &facts,
                },
                0.0,
            );
        }
        for step in 1..=400 {
            for member in [0, 1] {
                let loss = 4.0 / (1.0 + step as f64 / 60.0) + 0.2 * member as f64;
                b.take(member, Event::Step { step, loss }, step as f64 / 10.0);
                if step % 100 == 0 {
                    let metrics = [
                        ("accuracy".to_owned(), step as f64 / 500.0),
                        ("loss".to_owned(), loss),
                    ]
                    .into();
                    b.take(
                        member,
                        Event::Eval {
                            step,
                            metrics: &metrics,
                        },
                        step as f64 / 10.0,
                    );
                }
            }
        }
        let line = LogLine {
            step: 400,
            steps: 800,
            loss: 0.5,
            lr: 3e-3,
            grad_norm: 1.25,
            tokens_per_sec: 21_345.0,
            eta_secs: 1.0,
        };
        b.take(0, Event::Log(&line), 40.0);
        b.take(
            2,
            Event::End(&Ended::Failed("loss is not finite at step 3".into())),
            40.0,
        );
        b.take(3, Event::End(&Ended::Interrupted), 40.0);
        b.take(4, Event::End(&Ended::AlreadyDone), 40.0);
        b
    }

    #[test]
    fn folds_what_happens_into_states_and_times() {
        let b = board();
        let states: Vec<State> = b.rows.iter().map(|r| r.state).collect();
        use State::{Done, Failed, Interrupted, Running, Waiting};
        assert_eq!(
            states,
            [Running, Running, Failed, Interrupted, Done, Waiting]
        );
        // 400 of 800 steps took 40 seconds.
        assert_eq!(b.rows[0].left(40.0), Some(40.0));
        assert_eq!(b.rows[5].left(40.0), None);
        // 800 steps in 40 s; two halves, a whole interrupted and a whole waiting member are left.
        assert_eq!(b.left(40.0), Some(120.0));
        assert_eq!(b.share(), 0.5);
        assert_eq!(b.rows[0].score, Some(0.8));
        assert_eq!(b.messages.len(), 2);
    }

    #[test]
    fn follows_running_members_until_one_is_chosen() {
        let mut b = board();
        assert_eq!(b.selected, 0);
        b.take(0, Event::End(&Ended::Interrupted), 41.0);
        assert_eq!(b.selected, 1);
        b.select(3);
        assert_eq!(b.selected, 4);
        b.take(
            5,
            Event::Begin {
                step: 7,
                steps: 800,
                facts: &facts(),
            },
            41.0,
        );
        assert_eq!(b.selected, 4);
        b.select(-100);
        assert_eq!(b.selected, 0);
        b.select(isize::MAX);
        assert_eq!(b.selected, 5);
        let mut empty = Board::new("", "", Goal::Min, &[]);
        empty.select(1);
        assert_eq!((empty.share(), empty.left(1.0)), (0.0, None));
    }

    #[test]
    fn orders() {
        let mut b = board();
        b.rows[5].score = Some(0.9);
        b.rows[1].score = Some(f64::NAN);
        b.reorder();
        assert_eq!(b.listed(), [0, 1, 5, 3, 2, 4]);
        b.reorder();
        assert_eq!(b.listed(), [5, 0, 1, 2, 3, 4]);
        // What went on after a checkpoint counts from there.
        b.take(
            3,
            Event::Begin {
                step: 700,
                steps: 800,
                facts: &facts(),
            },
            50.0,
        );
        b.take(
            3,
            Event::Step {
                step: 750,
                loss: 1.0,
            },
            55.0,
        );
        assert_eq!(b.rows[3].left(55.0), Some(5.0));
    }
}
