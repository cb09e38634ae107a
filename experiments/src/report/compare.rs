//! Many runs as one table: grouped over seeds, joined where they match, and what does not match said.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::fit::{B_RANGE, Fit, power_law};
use super::load::RunData;
use super::pareto::front;
use super::stats::{Estimate, Goal, Method, Test, Verdict, holm, test};
use super::units::{bytes, count, mean_sd, number};
use crate::record::summary::{RunState, RunSummary};
use crate::record::sweep_file::Held;
use crate::record::{SweepFile, tags};
use marimba_dsl::sweep::Quantity;

/// What the caller wants compared.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The metric that decides; chosen from what the runs share where `None`.
    pub metric: Option<String>,
    /// Which direction of it is good; guessed from its name where `None`.
    pub goal: Option<Goal>,
    /// The group that others are tested against; the best one where `None`.
    pub baseline: Option<String>,
    /// Heading of the report.
    pub title: Option<String>,
    /// The question that the runs were made to answer.
    pub question: Option<String>,
    /// What was held equal over groups.
    pub hold: Option<Held>,
    /// The family of each group: scaling laws are fitted within families. Groups not named form one of their own.
    pub families: BTreeMap<String, String>,
}

impl Options {
    /// As a sweep's folder says.
    pub fn of_sweep(file: &SweepFile) -> Options {
        Options {
            metric: Some(file.metric.clone()),
            goal: Some(file.goal),
            baseline: file.baseline.clone(),
            title: Some(file.name.clone()),
            question: file.question.clone(),
            hold: file.hold,
            families: file.points.clone(),
        }
    }
}

/// A comparison, computed. Serialises to the JSON output.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// Heading.
    pub title: String,
    /// The question, where one was given.
    pub question: Option<String>,
    /// The metric that decides; `None` where no run has any.
    pub metric: Option<String>,
    /// Which direction of it is good.
    pub goal: Goal,
    /// The group that the others are tested against.
    pub reference: Option<String>,
    /// What was held equal, and to what.
    pub hold: Option<Held>,
    /// The answer in sentences.
    pub verdict: Vec<String>,
    /// What to know before believing it: members left out, metrics that do not match, damage.
    pub notes: Vec<String>,
    /// Metrics of the table, the deciding one first.
    pub metrics: Vec<String>,
    /// How the metric falls with size, where it is a loss and there are sizes enough.
    pub laws: Vec<ScalingLaw>,
    /// The points, best first.
    pub groups: Vec<Group>,
    /// Every run.
    pub members: Vec<Member>,
}

/// Runs that differ only by seed.
#[derive(Debug, Clone, Serialize)]
pub struct Group {
    /// Name.
    pub name: String,
    /// Number of members.
    pub n_members: usize,
    /// Members that finished.
    pub n_finished: usize,
    /// Their seeds, where known.
    pub seeds: Vec<u64>,
    /// Final value of each metric over the members that count.
    pub metrics: BTreeMap<String, Estimate>,
    /// Parameters.
    pub params_total: Option<u64>,
    /// Parameters used by one token.
    pub params_active: Option<u64>,
    /// Recurrent state per sequence, bytes.
    pub state_bytes_per_seq: Option<u64>,
    /// KV cache per token of context, bytes.
    pub kv_bytes_per_token: Option<u64>,
    /// Both together at the training length, bytes.
    pub decode_bytes: Option<u64>,
    /// Forward operations per token.
    pub flops_per_token: Option<f64>,
    /// Training speed.
    pub tokens_per_sec: Estimate,
    /// Test against the reference; `None` for the reference itself.
    pub test: Option<Test>,
    /// Costs against which no other group is both better and cheaper.
    pub pareto: Vec<Cost>,
    /// Relative distance from what was held equal.
    pub residual: Option<f64>,
    /// The point of the sweep.
    pub axes: BTreeMap<String, String>,
}

/// What quality is weighed against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cost {
    /// Parameters, all.
    ParamsTotal,
    /// Parameters used by one token.
    ParamsActive,
    /// State and cache of one sequence in decoding.
    DecodeBytes,
    /// Forward operations per token.
    FlopsPerToken,
    /// Training speed (more is better).
    TokensPerSec,
}

impl Cost {
    /// All of them.
    pub const ALL: [Cost; 5] = [
        Cost::ParamsTotal,
        Cost::ParamsActive,
        Cost::DecodeBytes,
        Cost::FlopsPerToken,
        Cost::TokensPerSec,
    ];

    /// The group's value.
    pub fn of(self, group: &Group) -> Option<f64> {
        match self {
            Cost::ParamsTotal => group.params_total.map(|v| v as f64),
            Cost::ParamsActive => group.params_active.map(|v| v as f64),
            Cost::DecodeBytes => group.decode_bytes.map(|v| v as f64),
            Cost::FlopsPerToken => group.flops_per_token,
            Cost::TokensPerSec => group.tokens_per_sec.mean,
        }
    }

    /// In words, with the unit.
    pub fn words(self) -> &'static str {
        match self {
            Cost::ParamsTotal => "parameters",
            Cost::ParamsActive => "active parameters",
            Cost::DecodeBytes => "decode state per sequence",
            Cost::FlopsPerToken => "forward FLOPs per token",
            Cost::TokensPerSec => "training tokens per second",
        }
    }

    /// Which direction is good.
    pub fn goal(self) -> Goal {
        match self {
            Cost::TokensPerSec => Goal::Higher,
            _ => Goal::Lower,
        }
    }
}

/// A law fitted to the groups of one family.
#[derive(Debug, Clone, Serialize)]
pub struct ScalingLaw {
    /// The family; empty where the runs have none.
    pub family: String,
    /// What the metric is a function of.
    pub cost: Cost,
    /// Smallest and largest size fitted.
    pub range: (f64, f64),
    /// The law.
    pub fit: Fit,
}

impl ScalingLaw {
    /// In words, with the 95% intervals.
    pub fn words(&self, metric: &str) -> String {
        let law = &self.fit.law;
        let [e, _, b] = self.fit.ci95;
        let e = format!("{} to {}", number(e.0), number(e.1));
        // At the end of what was searched the interval has no end.
        let b = if b.1 >= 0.99 * B_RANGE.1 {
            format!("{} and more", number(b.0))
        } else {
            format!("{} to {}", number(b.0), number(b.1))
        };
        let of = if self.family.is_empty() {
            String::new()
        } else {
            format!("{}: ", self.family)
        };
        format!(
            "{of}{metric} = {} + {} x^-{}, x = {}; 95%: floor {e}, exponent {b}; {} points, residual {}",
            number(law.e),
            number(law.a),
            number(law.b),
            self.cost.words(),
            self.fit.n,
            number(self.fit.rmse)
        )
    }
}

/// One run of the comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Member {
    /// Name.
    pub name: String,
    /// Group.
    pub group: String,
    /// Seed, where known.
    pub seed: Option<u64>,
    /// Where it stands; `None` for another writer's run.
    pub state: Option<RunState>,
    /// Its error, where it failed.
    pub message: Option<String>,
    /// Last step of any curve.
    pub last_step: Option<i64>,
    /// Last value of each metric of the table; those that are not finite are left out.
    pub finals: BTreeMap<String, f64>,
}

/// Compares `runs`.
pub fn compare(runs: &[RunData], options: &Options) -> Comparison {
    let mut notes = Vec::new();
    let finals: Vec<BTreeMap<String, f64>> = runs.iter().map(RunData::finals).collect();
    let metric = pick_metric(&finals, options, &mut notes);
    let goal = options.goal.or_else(|| metric.as_deref().and_then(Goal::of_tag)).unwrap_or_else(|| {
        if let Some(metric) = &metric {
            notes.push(format!("Whether more or less of {metric} is better is not known; less was taken as better."));
        }
        Goal::Lower
    });
    let any_final = runs.iter().any(RunData::is_final);
    if !any_final && !runs.is_empty() {
        notes.push(
            "No member has finished: the values are the last ones so far, and no answer yet."
                .to_owned(),
        );
    }
    let counts = |i: usize| !any_final || runs[i].is_final();
    let metrics = table_metrics(metric.as_deref(), &finals);
    let mut groups = group(runs, &finals, &metrics, options.hold, &counts);
    note_mismatches(runs, &finals, &metrics, &mut notes);
    note_members(runs, &groups, any_final, &mut notes);

    let mean_of = |g: &Group| {
        metric
            .as_ref()
            .and_then(|m| g.metrics.get(m))
            .and_then(|e| e.mean)
    };
    groups.sort_by(|a, b| match (mean_of(a), mean_of(b)) {
        (Some(x), Some(y)) if goal == Goal::Higher => y.total_cmp(&x),
        (Some(x), Some(y)) => x.total_cmp(&y),
        (x, y) => y.is_some().cmp(&x.is_some()),
    });
    let reference = pick_reference(&groups, metric.as_deref(), options, &mut notes);
    if let (Some(metric), Some(reference)) = (&metric, &reference) {
        run_tests(runs, &finals, &mut groups, metric, reference, goal, &counts);
    }
    mark_pareto(&mut groups, metric.as_deref(), goal);
    let laws = fit_laws(&groups, metric.as_deref(), goal, &options.families);
    let verdict = words(&groups, metric.as_deref(), goal, reference.as_deref());
    let members = runs
        .iter()
        .zip(&finals)
        .map(|(run, finals)| Member {
            name: run.name.clone(),
            group: run.group.clone(),
            seed: run.seed,
            state: run.state,
            message: run.message.clone(),
            last_step: run
                .series
                .values()
                .filter_map(|s| s.last())
                .map(|p| p.step)
                .max(),
            finals: metrics
                .iter()
                .filter_map(|m| {
                    finals
                        .get(m)
                        .filter(|v| v.is_finite())
                        .map(|v| (m.clone(), *v))
                })
                .collect(),
        })
        .collect();
    Comparison {
        title: options.title.clone().unwrap_or_else(|| match groups.len() {
            1 => format!("Runs of {}", groups[0].name),
            n => format!("Comparison of {n} configurations"),
        }),
        question: options.question.clone(),
        metric,
        goal,
        reference,
        hold: options.hold,
        verdict,
        notes,
        metrics,
        laws,
        groups,
        members,
    }
}

/// Resamples of a fit's intervals.
const N_BOOT: usize = 500;
/// A law over less than this factor in size says nothing.
const LEAST_RANGE: f64 = 2.0;

/// Scaling laws of losses over parameters and operations, per family. What cannot be fitted is left out: most comparisons are about
/// something else.
fn fit_laws(
    groups: &[Group],
    metric: Option<&str>,
    goal: Goal,
    families: &BTreeMap<String, String>,
) -> Vec<ScalingLaw> {
    let (Some(metric), Goal::Lower) = (metric, goal) else {
        return Vec::new();
    };
    let family = |g: &Group| families.get(&g.name).cloned().unwrap_or_default();
    let names: BTreeSet<String> = groups.iter().map(family).collect();
    let mut laws = Vec::new();
    for name in names {
        for cost in [Cost::ParamsActive, Cost::FlopsPerToken] {
            let points: Vec<(f64, f64)> = groups
                .iter()
                .filter(|g| family(g) == name)
                .filter_map(|g| Some((cost.of(g)?, g.metrics.get(metric)?.mean?)))
                .collect();
            let low = points.iter().map(|p| p.0).fold(f64::INFINITY, f64::min);
            let high = points.iter().map(|p| p.0).fold(0.0, f64::max);
            if high < LEAST_RANGE * low {
                continue;
            }
            if let Ok(fit) = power_law(&points, N_BOOT, 0) {
                laws.push(ScalingLaw {
                    family: name.clone(),
                    cost,
                    range: (low, high),
                    fit,
                });
            }
        }
    }
    laws
}

fn is_held_out(tag: &str) -> bool {
    ["eval", "valid", "val/", "test"]
        .iter()
        .any(|p| tag.starts_with(p))
}

/// How well a tag serves as the deciding one; smaller is better.
fn rank(tag: &str) -> u32 {
    let held_out = is_held_out(tag);
    match () {
        () if held_out && tag.contains("acc") => 0,
        () if held_out && tag.contains("loss") => 1,
        () if held_out => 2,
        () if tag == tags::TRAIN_LOSS => 3,
        () if tag.contains("loss") => 4,
        () if ["act/", "grad/", "perf/"]
            .iter()
            .any(|p| tag.starts_with(p)) =>
        {
            6
        }
        () => 5,
    }
}

fn pick_metric(
    finals: &[BTreeMap<String, f64>],
    options: &Options,
    notes: &mut Vec<String>,
) -> Option<String> {
    let mut coverage: BTreeMap<&str, usize> = BTreeMap::new();
    finals
        .iter()
        .flat_map(|f| f.keys())
        .for_each(|tag| *coverage.entry(tag).or_default() += 1);
    if let Some(wanted) = &options.metric {
        if coverage.contains_key(wanted.as_str()) {
            return Some(wanted.clone());
        }
        let near: Vec<&str> = coverage
            .keys()
            .copied()
            .filter(|t| rank(t) < 5)
            .take(8)
            .collect();
        notes.push(format!(
            "No run has the metric {wanted}; there are {}.",
            list(&near)
        ));
    }
    let best = coverage
        .iter()
        .min_by_key(|(tag, n)| (std::cmp::Reverse(**n), rank(tag), **tag));
    best.map(|(tag, _)| (*tag).to_owned())
}

/// The deciding metric, then held-out ones, then the training loss.
fn table_metrics(metric: Option<&str>, finals: &[BTreeMap<String, f64>]) -> Vec<String> {
    let all: BTreeSet<&str> = finals
        .iter()
        .flat_map(|f| f.keys().map(String::as_str))
        .collect();
    let mut metrics: Vec<&str> = metric.into_iter().collect();
    let mut others: Vec<&str> = all
        .into_iter()
        .filter(|t| Some(*t) != metric && (is_held_out(t) || *t == tags::TRAIN_LOSS))
        .collect();
    others.sort_by_key(|t| (rank(t), *t));
    metrics.extend(others);
    metrics.into_iter().map(str::to_owned).collect()
}

fn group(
    runs: &[RunData],
    finals: &[BTreeMap<String, f64>],
    metrics: &[String],
    hold: Option<Held>,
    counts: &dyn Fn(usize) -> bool,
) -> Vec<Group> {
    let mut names: Vec<&str> = Vec::new();
    for run in runs {
        if !names.contains(&run.group.as_str()) {
            names.push(&run.group);
        }
    }
    let of_name = |name: &str| {
        let members: Vec<usize> = (0..runs.len()).filter(|i| runs[*i].group == name).collect();
        let counted: Vec<usize> = members.iter().copied().filter(|i| counts(*i)).collect();
        let facts = members.iter().find_map(|i| runs[*i].summary.as_ref());
        Group {
            name: name.to_owned(),
            n_members: members.len(),
            n_finished: members.iter().filter(|i| runs[**i].is_final()).count(),
            seeds: members.iter().filter_map(|i| runs[*i].seed).collect(),
            metrics: metrics
                .iter()
                .map(|m| {
                    (
                        m.clone(),
                        Estimate::of(counted.iter().filter_map(|i| finals[*i].get(m).copied())),
                    )
                })
                .collect(),
            params_total: facts.map(|f| f.params_total),
            params_active: facts.map(|f| f.params_active),
            state_bytes_per_seq: facts.map(|f| f.state_bytes_per_seq),
            kv_bytes_per_token: facts.map(|f| f.kv_bytes_per_token),
            decode_bytes: facts.map(|f| f.decode_bytes()),
            flops_per_token: facts.map(|f| f.flops_per_token),
            tokens_per_sec: Estimate::of(counted.iter().filter_map(|i| speed(&runs[*i]))),
            test: None,
            pareto: Vec::new(),
            residual: facts
                .zip(hold)
                .map(|(f, h)| held(f, h.quantity) / h.target - 1.0),
            axes: facts.map(|f| f.axes.clone()).unwrap_or_default(),
        }
    };
    names.into_iter().map(of_name).collect()
}

/// A held quantity by a run's summary.
fn held(f: &RunSummary, quantity: Quantity) -> f64 {
    match quantity {
        Quantity::ParamsTotal => f.params_total as f64,
        Quantity::ParamsActive => f.params_active as f64,
        Quantity::FlopsPerToken => f.flops_per_token,
        Quantity::StateBytes => f.state_bytes_per_seq as f64,
        Quantity::DecodeBytes => f.decode_bytes() as f64,
    }
}

/// Speed of a run: of its summary, else the median of its curve.
fn speed(run: &RunData) -> Option<f64> {
    if let Some(summary) = &run.summary {
        return Some(summary.tokens_per_sec);
    }
    let mut values: Vec<f64> = run
        .series
        .get(tags::TOKENS_PER_SEC)?
        .points()
        .map(|p| p.value)
        .filter(|v| v.is_finite())
        .collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn pick_reference(
    groups: &[Group],
    metric: Option<&str>,
    options: &Options,
    notes: &mut Vec<String>,
) -> Option<String> {
    let metric = metric?;
    if let Some(wanted) = &options.baseline {
        if groups.iter().any(|g| &g.name == wanted) {
            return Some(wanted.clone());
        }
        let names: Vec<&str> = groups.iter().map(|g| g.name.as_str()).collect();
        notes.push(format!(
            "There is no group {wanted} to test against; there are {}.",
            list(&names)
        ));
    }
    groups
        .iter()
        .find(|g| g.metrics.get(metric).is_some_and(|e| e.mean.is_some()))
        .map(|g| g.name.clone())
}

fn run_tests(
    runs: &[RunData],
    finals: &[BTreeMap<String, f64>],
    groups: &mut [Group],
    metric: &str,
    reference: &str,
    goal: Goal,
    counts: &dyn Fn(usize) -> bool,
) {
    // Runs without a seed still count; their place stands in, high enough to meet no real seed.
    let values = |name: &str| -> BTreeMap<u64, f64> {
        (0..runs.len())
            .filter(|i| runs[*i].group == name && counts(*i))
            .filter_map(|i| {
                finals[i]
                    .get(metric)
                    .map(|v| (runs[i].seed.unwrap_or(u64::MAX - i as u64), *v))
            })
            .collect()
    };
    let base = values(reference);
    for group in groups.iter_mut().filter(|g| g.name != reference) {
        group.test = Some(test(&values(&group.name), &base, goal));
    }
    holm(groups.iter_mut().filter_map(|g| g.test.as_mut()), goal);
}

fn mark_pareto(groups: &mut [Group], metric: Option<&str>, goal: Goal) {
    let Some(metric) = metric else { return };
    for cost in Cost::ALL {
        let points: Vec<Vec<f64>> = groups
            .iter()
            .map(|g| {
                let quality = g.metrics.get(metric).and_then(|e| e.mean);
                vec![quality.unwrap_or(f64::NAN), cost.of(g).unwrap_or(f64::NAN)]
            })
            .collect();
        let on = front(&points, &[goal, cost.goal()]);
        groups
            .iter_mut()
            .zip(on)
            .filter(|(_, on)| *on)
            .for_each(|(g, _)| g.pareto.push(cost));
    }
}

fn note_mismatches(
    runs: &[RunData],
    finals: &[BTreeMap<String, f64>],
    metrics: &[String],
    notes: &mut Vec<String>,
) {
    for metric in metrics {
        let without: Vec<&str> = runs
            .iter()
            .zip(finals)
            .filter(|(_, f)| !f.contains_key(metric))
            .map(|(r, _)| r.name.as_str())
            .collect();
        if !without.is_empty() {
            notes.push(format!("{metric} is missing in {}.", list(&without)));
        }
        let diverged: Vec<&str> = runs
            .iter()
            .zip(finals)
            .filter(|(_, f)| f.get(metric).is_some_and(|v| !v.is_finite()))
            .map(|(r, _)| r.name.as_str())
            .collect();
        if !diverged.is_empty() {
            notes.push(format!(
                "{metric} ended as NaN or infinite and is left out of the mean in {}.",
                list(&diverged)
            ));
        }
    }
    let mut seen: BTreeMap<(&str, u64), &str> = BTreeMap::new();
    for run in runs {
        if let Some(seed) = run.seed
            && let Some(other) = seen.insert((&run.group, seed), &run.name)
        {
            notes.push(format!(
                "{other} and {} are both seed {seed} of {}.",
                run.name, run.group
            ));
        }
    }
}

fn note_members(runs: &[RunData], groups: &[Group], any_final: bool, notes: &mut Vec<String>) {
    for run in runs.iter().filter(|r| !r.is_final()) {
        let state = run.state.map(|s| s.to_string()).unwrap_or_default();
        let why = run
            .message
            .as_deref()
            .and_then(|m| m.lines().next())
            .map(|m| format!(": {m}"))
            .unwrap_or_default();
        let counted = if any_final { "; it does not count" } else { "" };
        notes.push(format!("{} is {state}{why}{counted}.", run.name));
    }
    for group in groups.iter().filter(|g| any_final && g.n_finished == 0) {
        notes.push(format!(
            "{}: none of {} members has finished.",
            group.name, group.n_members
        ));
    }
    notes.extend(
        runs.iter()
            .flat_map(|r| r.warnings.iter().map(move |w| format!("{}: {w}", r.name))),
    );
}

/// `a, b and c`; beyond six names the number of the rest.
fn list(names: &[&str]) -> String {
    const SHOWN: usize = 6;
    match names {
        [] => "none".to_owned(),
        [one] => (*one).to_owned(),
        names if names.len() > SHOWN => {
            format!(
                "{} and {} more",
                names[..SHOWN].join(", "),
                names.len() - SHOWN
            )
        }
        [head @ .., last] => format!("{} and {last}", head.join(", ")),
    }
}

/// The answer in sentences, every one derived from the numbers.
fn words(
    groups: &[Group],
    metric: Option<&str>,
    goal: Goal,
    reference: Option<&str>,
) -> Vec<String> {
    let Some((metric, reference)) = metric.zip(reference) else {
        return vec!["No run has a metric that could be compared.".to_owned()];
    };
    let Some(base) = groups.iter().find(|g| g.name == reference) else {
        return Vec::new();
    };
    let value = |g: &Group| {
        g.metrics
            .get(metric)
            .and_then(|e| Some(mean_sd(e.mean?, e.sd)))
            .unwrap_or_else(|| "no value".to_owned())
    };
    let n = base.metrics.get(metric).map_or(0, |e| e.n);
    let spread = if n >= 2 {
        format!("mean ± standard deviation over {n} seeds")
    } else {
        "one seed".to_owned()
    };
    let best = groups.first().is_some_and(|g| g.name == reference);
    let mut out = vec![if groups.len() == 1 {
        format!("{reference} reaches {metric} {} ({spread}).", value(base))
    } else if best {
        let most = if goal == Goal::Higher {
            "highest"
        } else {
            "lowest"
        };
        format!(
            "{reference} has the {most} {metric}: {} ({spread}).",
            value(base)
        )
    } else {
        format!(
            "Tested against {reference}, which reaches {metric} {} ({spread}).",
            value(base)
        )
    }];
    let with = |verdict: Verdict, apart: bool| -> Vec<String> {
        groups
            .iter()
            .filter_map(|g| g.test.as_ref().map(|t| (g, t)))
            .filter(|(g, t)| {
                t.verdict == verdict && t.difference.is_some() && is_far(g, base, metric) == apart
            })
            .map(|(g, t)| match t.p_adjusted {
                Some(p) => format!("{} ({}, {})", g.name, value(g), p_words(p)),
                None => format!("{} ({})", g.name, value(g)),
            })
            .collect()
    };
    let mut say = |lead: &str, names: Vec<String>, tail: &str| {
        if !names.is_empty() {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            out.push(format!("{lead}{}{tail}.", list(&names)));
        }
    };
    let both = |verdict| [with(verdict, true), with(verdict, false)].concat();
    say("Better: ", both(Verdict::Better), "");
    say("Worse: ", both(Verdict::Worse), "");
    let far = with(Verdict::NoDifferenceShown, true);
    say(
        "Far apart in these seeds, yet too few seeds to show it by a test: ",
        far,
        "",
    );
    say(
        "No difference shown: ",
        with(Verdict::NoDifferenceShown, false),
        "",
    );
    say(
        "Not tested, since a test needs two seeds on each side: ",
        both(Verdict::NotTested),
        "",
    );
    let undecided = groups
        .iter()
        .filter_map(|g| g.test.as_ref())
        .any(|t| t.verdict == Verdict::NoDifferenceShown);
    if undecided && n < 4 {
        out.push(format!("With {n} seeds a test shows only steady differences; more seeds would settle the open ones."));
    }
    out.extend(cost_words(groups, base, metric, goal));
    out
}

/// Whether a gap is over five times the larger spread: visible to the eye whatever a test with two seeds says.
fn is_far(group: &Group, base: &Group, metric: &str) -> bool {
    let estimates = group.metrics.get(metric).zip(base.metrics.get(metric));
    let Some((a, b)) = estimates else {
        return false;
    };
    match (a.mean, b.mean, a.sd, b.sd) {
        (Some(x), Some(y), Some(s), Some(r)) => (x - y).abs() > 5.0 * s.max(r) && x != y,
        _ => false,
    }
}

/// `p = 0.012`, `p < 0.001`.
pub(super) fn p_words(p: f64) -> String {
    if p < 0.001 {
        "p < 0.001".to_owned()
    } else {
        format!("p = {p:.3}")
    }
}

/// What the reference costs next to groups that are not shown to be worse and not far from it.
fn cost_words(groups: &[Group], base: &Group, metric: &str, goal: Goal) -> Vec<String> {
    let quality = |g: &Group| g.metrics.get(metric).and_then(|e| e.mean);
    let near = groups
        .iter()
        .filter(|g| g.name != base.name && !is_far(g, base, metric))
        .filter(|g| {
            let tied = g
                .test
                .as_ref()
                .is_some_and(|t| matches!(t.verdict, Verdict::NoDifferenceShown | Verdict::Better));
            let ahead = quality(g)
                .zip(quality(base))
                .is_some_and(|(x, y)| if goal == Goal::Higher { x >= y } else { x <= y });
            tied || ahead
        });
    let cheaper = near
        .filter_map(|g| {
            let (mine, theirs) = (g.decode_bytes? as f64, base.decode_bytes? as f64);
            (mine > 0.0 && theirs / mine >= 1.2).then(|| (g, theirs / mine, mine, theirs))
        })
        // Groups come best first: of equal costs the better one is named.
        .rev()
        .max_by(|a, b| a.1.total_cmp(&b.1));
    let mut out = Vec::new();
    if let Some((g, ratio, mine, theirs)) = cheaper {
        out.push(format!(
            "Among those not shown to be worse than {}, {} needs the least state in decoding: {ratio:.1} times less per sequence ({} against {}).",
            base.name,
            g.name,
            bytes(mine),
            bytes(theirs)
        ));
    }
    let totals: Vec<u64> = groups.iter().filter_map(|g| g.params_active).collect();
    if let (Some(low), Some(high)) = (totals.iter().min(), totals.iter().max())
        && *low > 0
        && (*high as f64 / *low as f64) > 1.1
    {
        out.push(format!(
            "Sizes differ: {} to {} active parameters; part of any difference may be size.",
            count(*low as f64),
            count(*high as f64)
        ));
    }
    out
}

impl Group {
    /// How the group's test was made, for a table's footnote.
    pub fn method(&self) -> Option<Method> {
        self.test.as_ref().map(|t| t.method)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::record::series::{Point, Series};
    use std::path::PathBuf;

    /// A finished run without a folder.
    pub(in crate::report) fn run(group: &str, seed: u64, values: &[(&str, f64)]) -> RunData {
        let point = |step, value| Point {
            step,
            time: 0.0,
            value,
        };
        RunData {
            name: format!("{group}-seed{seed}"),
            path: PathBuf::from("nowhere"),
            group: group.to_owned(),
            seed: Some(seed),
            state: Some(RunState::Finished),
            message: None,
            summary: None,
            series: values
                .iter()
                .map(|(t, v)| {
                    let series: Series = (0..20)
                        .map(|i| point(i, v * (1.0 + (19 - i) as f64 / 10.0)))
                        .collect();
                    ((*t).to_owned(), series)
                })
                .collect(),
            resolved: Some(format!("Run(\n  group: {group},\n  seed: {seed},\n)\n")),
            graph: None,
            warnings: Vec::new(),
        }
    }

    pub(in crate::report) fn five_by_two() -> Vec<RunData> {
        let mut runs = Vec::new();
        for (i, (group, acc)) in [("a", 0.9), ("b", 0.3), ("c", 0.91)]
            .into_iter()
            .enumerate()
        {
            for seed in 0..2 {
                let acc = acc + 0.01 * (seed as f64) + 0.001 * (i as f64);
                runs.push(run(
                    group,
                    seed,
                    &[("eval/accuracy", acc), ("train/loss", 1.0 - acc)],
                ));
            }
        }
        runs
    }

    #[test]
    fn groups_are_ranked_and_tested() {
        let c = compare(&five_by_two(), &Options::default());
        assert_eq!(c.metric.as_deref(), Some("eval/accuracy"));
        assert_eq!(c.goal, Goal::Higher);
        assert_eq!(
            c.groups.iter().map(|g| g.name.as_str()).collect::<Vec<_>>(),
            ["c", "a", "b"]
        );
        assert!(c.groups[0].test.is_none() && c.groups[1].test.is_some());
        assert_eq!(c.metrics, ["eval/accuracy", "train/loss"]);
        assert!(c.notes.is_empty(), "{:?}", c.notes);
        assert!(
            c.verdict[0].contains("c has the highest eval/accuracy: 0.9170 ± 0.0071"),
            "{:?}",
            c.verdict
        );
        let by_loss = compare(
            &five_by_two(),
            &Options {
                metric: Some("train/loss".into()),
                ..Options::default()
            },
        );
        assert_eq!(
            (by_loss.goal, by_loss.groups[0].name.as_str()),
            (Goal::Lower, "c")
        );
    }

    #[test]
    fn what_does_not_match_is_said() {
        let mut runs = five_by_two();
        runs[0].series.remove("train/loss");
        runs[1].state = Some(RunState::Failed);
        runs[1].message = Some("loss is nan at step 3\nmore".into());
        runs[2].series.insert(
            "eval/accuracy".into(),
            [Point {
                step: 1,
                time: 0.0,
                value: f64::NAN,
            }]
            .into_iter()
            .collect(),
        );
        runs[3].seed = Some(0);
        let options = Options {
            metric: Some("eval/acuracy".into()),
            baseline: Some("z".into()),
            ..Options::default()
        };
        let c = compare(&runs, &options);
        let notes = c.notes.join("\n");
        for part in [
            "train/loss is missing in a-seed0",
            "a-seed1 is failed: loss is nan at step 3; it does not count",
            "NaN or infinite and is left out of the mean in b-seed0",
            "No run has the metric eval/acuracy; there are eval/accuracy",
            "no group z",
            "both seed 0 of b",
        ] {
            assert!(notes.contains(part), "{part} is not in\n{notes}");
        }
        let a = c.groups.iter().find(|g| g.name == "a").unwrap();
        assert_eq!(
            (a.n_members, a.n_finished, a.metrics["eval/accuracy"].n),
            (2, 1, 1)
        );
        assert_eq!(a.test.as_ref().unwrap().verdict, Verdict::NotTested);
    }

    #[test]
    fn nothing_finished_and_nothing_at_all() {
        let mut runs = five_by_two();
        runs.iter_mut()
            .for_each(|r| r.state = Some(RunState::Running));
        let c = compare(&runs, &Options::default());
        assert!(c.notes[0].contains("No member has finished"));
        assert!(c.groups[0].metrics["eval/accuracy"].mean.is_some());
        let empty = compare(&[], &Options::default());
        assert!(empty.groups.is_empty() && empty.verdict[0].contains("No run"));
    }

    #[test]
    fn losses_over_sizes_get_a_law_per_family() {
        let mut runs = Vec::new();
        let mut families = BTreeMap::new();
        for (family, floor) in [("a", 1.0), ("b", 2.0)] {
            for (i, size) in [1e4, 3e4, 1e5, 3e5, 1e6].into_iter().enumerate() {
                let name = format!("{family}-{i}");
                let loss = floor + 40.0 * f64::powf(size, -0.5);
                let mut run = run(&name, 0, &[("eval/loss", loss)]);
                run.summary = Some(RunSummary {
                    name: name.clone(),
                    group: name.clone(),
                    seed: 0,
                    status: RunState::Finished,
                    params_total: size as u64,
                    params_active: size as u64,
                    state_bytes_per_seq: 0,
                    kv_bytes_per_token: 0,
                    seq_len: 1,
                    flops_per_token: 2.0 * size,
                    tokens_per_sec: 1.0,
                    final_metrics: [("eval/loss".to_owned(), loss)].into(),
                    best_metrics: BTreeMap::new(),
                    config_hash: String::new(),
                    graph_hash: String::new(),
                    data_hash: String::new(),
                    axes: BTreeMap::new(),
                });
                runs.push(run);
                families.insert(name, family.to_owned());
            }
        }
        let options = Options {
            families,
            ..Options::default()
        };
        let c = compare(&runs, &options);
        let laws: Vec<_> = c.laws.iter().map(|l| (l.family.as_str(), l.cost)).collect();
        assert_eq!(
            laws,
            [
                ("a", Cost::ParamsActive),
                ("a", Cost::FlopsPerToken),
                ("b", Cost::ParamsActive),
                ("b", Cost::FlopsPerToken)
            ]
        );
        for (law, floor) in c.laws.iter().zip([1.0, 1.0, 2.0, 2.0]) {
            assert!((law.fit.law.e - floor).abs() < 1e-3, "{law:?}");
            assert!((law.fit.law.b - 0.5).abs() < 1e-3, "{law:?}");
        }
        let words = crate::report::table::terminal(&c, 200);
        assert!(
            words.contains("Scaling laws") && words.contains("a: eval/loss = 1.000"),
            "{words}"
        );
        // Equal sizes have no law.
        assert!(compare(&five_by_two(), &Options::default()).laws.is_empty());
    }

    #[test]
    fn lists_read_well() {
        assert_eq!(list(&["a", "b", "c"]), "a, b and c");
        assert_eq!(list(&["a"; 8]), "a, a, a, a, a, a and 2 more");
    }
}
