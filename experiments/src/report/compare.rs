//! Many runs as one table: grouped over seeds, joined where they match, and what does not match said.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::load::RunData;
use super::pareto::front;
use super::scaling::{ScalingLaw, fit_laws};
use super::stats::{Estimate, Goal, Method, Test, holm, test};
use super::verdict::{list, words};
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
    /// Tokens seen in training, mean over the members that count.
    pub tokens: Option<f64>,
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

    /// Name of its column in tables for programs.
    pub fn column(self) -> &'static str {
        match self {
            Cost::ParamsTotal => "params_total",
            Cost::ParamsActive => "params_active",
            Cost::DecodeBytes => "decode_bytes",
            Cost::FlopsPerToken => "flops_per_token",
            Cost::TokensPerSec => "tokens_per_sec",
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
    let (laws, refused) = fit_laws(&groups, metric.as_deref(), goal, &options.families);
    notes.extend(refused);
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
        let names = [wanted.clone(), tags::eval(wanted)];
        if let Some(name) = names
            .into_iter()
            .find(|n| coverage.contains_key(n.as_str()))
        {
            return Some(name);
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
            tokens: Estimate::of(
                counted
                    .iter()
                    .filter_map(|i| finals[*i].get(tags::TOKENS).copied()),
            )
            .mean,
            test: None,
            pareto: Vec::new(),
            residual: facts
                .zip(hold)
                .map(|(f, h)| held(f, h.quantity) / h.target - 1.0),
            axes: members
                .first()
                .map(|i| runs[*i].axes.clone())
                .unwrap_or_default(),
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
    use crate::report::stats::Verdict;
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
            axes: BTreeMap::new(),
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
}
