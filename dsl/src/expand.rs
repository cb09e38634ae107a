//! Sweep files to members: points, axes, conditions and seeds crossed; iso constraints solved by turning knobs.

use crate::check::{At, Cx, Valid, check_run};
use crate::de::{Path, decode};
use crate::diag::{Diagnostic, Report, Source, Span, suggest};
use crate::load::{Document, Set, Shape};
use crate::run::{Goal, Run};
use crate::sweep::{Counts, Hold, Member, Sweep};
use crate::syntax::sweep as s;
use crate::tree::{Kind, Node};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Most members of one sweep.
const MAX_MEMBERS: usize = 100_000;

/// Parses a sweep file, the runs and models it names, and expands it.
///
/// # Errors
/// All violations of the file and of its members, each once.
pub fn parse_sweep(source: &Source, sets: &[Set]) -> Result<Valid<Sweep>, Report> {
    let mut doc = Document::open(source, Shape::Sweep)?.sets(sets)?;
    let root = doc.root.clone();
    let (mut errors, mut struck): (Vec<Diagnostic>, Vec<Path>) = (Vec::new(), Vec::new());
    let file: Option<s::Sweep> = decode(&mut doc.root, &mut errors, &mut struck);
    let out = RefCell::new(errors);
    let cx = Cx {
        root: &root,
        struck: &struck,
        out: &out,
    };
    let sweep = file.and_then(|f| sweep(&cx, &f));
    let diagnostics = out.into_inner();
    match sweep {
        Some(v) if diagnostics.is_empty() => Ok(Valid::of_sweep(v)),
        _ => Err(Report { diagnostics }.sorted()),
    }
}

/// [`parse_sweep`] of a file.
///
/// # Errors
/// When it cannot be read, and all violations.
pub fn load_sweep(path: impl AsRef<std::path::Path>, sets: &[Set]) -> Result<Valid<Sweep>, Report> {
    parse_sweep(&Source::read(path)?, sets)
}

/// One value of an axis: what it sets, and its label.
#[derive(Clone)]
struct Value {
    label: String,
    sets: Vec<(String, Span, Node)>,
}

struct Axis {
    name: String,
    values: Vec<Value>,
    only_if: Vec<(String, Vec<String>)>,
}

fn sweep(cx: &Cx<'_>, file: &s::Sweep) -> Option<Sweep> {
    let top = At::default();
    let base = cx.root.get("base").cloned();
    cx.require(&top, "base", base.as_ref());
    let name = file.name.clone().unwrap_or_else(|| "sweep".to_owned());
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
        cx.error(
            &top.at("name"),
            "run::bad_name",
            format!("`{name}` cannot name a folder"),
            "not a usable name",
            "names have no slashes and do not begin with a dot",
        );
    }
    let points = points(cx, file);
    let axes: Vec<Axis> = file
        .axes
        .iter()
        .enumerate()
        .filter_map(|(i, a)| axis(cx, &top.at("axes").at(i), a))
        .collect();
    names_and_conditions(cx, file, &axes);
    for (i, s) in file.seeds.iter().enumerate() {
        if file.seeds[..i].contains(s) {
            cx.error(
                &top.at("seeds").at(i),
                "sweep::duplicate",
                format!("the seed {s} is listed twice"),
                "second time",
                "",
            );
        }
    }
    if let Some(h) = &file.hold {
        hold(cx, &top.at("hold"), h);
    }
    if let Some(h) = &file.halving {
        cx.positive(&top.at("halving"), "first_steps", h.first_steps);
        cx.number(
            &top.at("halving"),
            "factor",
            h.factor as f64,
            |f| f >= 2.0,
            "2 or more",
        );
    }
    if !cx.out.borrow().is_empty() {
        return None;
    }
    let chosen = choices(cx, &points, &axes, file.seeds.len().max(1))?;
    let base = Document::of(base?, Shape::Run);
    let mut members: Vec<Member> = Vec::new();
    let mut names = BTreeSet::new();
    for values in &chosen {
        let group: Vec<&str> = values
            .iter()
            .map(|v| v.label.as_str())
            .filter(|l| !l.is_empty())
            .collect();
        let group = if group.is_empty() {
            "base".to_owned()
        } else {
            group.join("-")
        };
        let mut doc = base.clone();
        let mut set = Vec::new();
        let mut fine = true;
        for (path, key, node) in values.iter().flat_map(|v| &v.sets) {
            set.push((path.clone(), node.text()));
            if let Err(mut r) = doc.set_node(path, key, node.clone()) {
                cx.out.borrow_mut().append(&mut r.diagnostics);
                fine = false;
            }
        }
        if !fine {
            continue;
        }
        let seeds: Vec<Option<u64>> = if file.seeds.is_empty() {
            vec![None]
        } else {
            file.seeds.iter().copied().map(Some).collect()
        };
        for seed in seeds {
            let (mut doc, mut set, mut name) = (doc.clone(), set.clone(), group.clone());
            if let Some(seed) = seed {
                name = format!("{group}-seed={seed}");
                let at = cx.root.place(&["seeds"]);
                let node = Node {
                    kind: Kind::Number(seed.to_string()),
                    span: at.clone(),
                    loose: false,
                };
                set.push(("seed".to_owned(), seed.to_string()));
                // `seed` is a field of every run.
                if let Err(mut r) = doc.set_node("seed", &at, node) {
                    cx.out.borrow_mut().append(&mut r.diagnostics);
                }
            }
            if !names.insert(name.clone()) {
                cx.error(
                    &top.at("axes"),
                    "sweep::duplicate",
                    format!("two members are named `{name}`"),
                    "give axes names or labels that differ",
                    "",
                );
            }
            match doc.clone().check(check_run) {
                Ok(run) => members.push(Member {
                    name,
                    group: group.clone(),
                    point: values[0].label.clone(),
                    set,
                    run,
                    doc,
                }),
                Err(r) => {
                    let mut out = cx.out.borrow_mut();
                    for d in r.diagnostics {
                        if !out.contains(&d) && out.len() < 200 {
                            out.push(d);
                        }
                    }
                    // The other seeds would say the same.
                    break;
                }
            }
        }
    }
    knobs_exist(cx, file, &members);
    let metric = file.metric.clone().unwrap_or_else(|| "loss".to_owned());
    if let Some(baseline) = &file.baseline {
        let mut groups: Vec<&str> = members.iter().map(|m| m.group.as_str()).collect();
        groups.dedup();
        if !members.is_empty() && !groups.contains(&baseline.as_str()) {
            cx.error(
                &top.at("baseline"),
                "sweep::baseline",
                format!("no group is named `{baseline}`"),
                "names no group",
                suggest(baseline, &groups),
            );
        }
    }
    Some(Sweep {
        name,
        goal: file.goal.unwrap_or(Goal::of_metric(&metric)),
        metric,
        question: file.question.clone(),
        baseline: file.baseline.clone(),
        members,
        hold: file.hold.clone(),
        halving: file.halving,
    })
}

/// A knob that no member has is a misspelt path.
fn knobs_exist(cx: &Cx<'_>, file: &s::Sweep, members: &[Member]) {
    let Some(h) = &file.hold else { return };
    for (i, k) in h.knobs.iter().enumerate() {
        let has = |m: &Member| {
            let mut doc = m.doc.clone();
            if doc.set(&Set::new(&k.path, k.min.to_string())).is_err() {
                return false;
            }
            doc.check(check_run)
                .err()
                .is_none_or(|r| !r.has("ron::unknown_field"))
        };
        if !members.is_empty() && !members.iter().any(has) {
            cx.error(
                &At::default().at("hold").at("knobs").at(i).at("path"),
                "sweep::hold",
                format!("no member has `{}`", k.path),
                "leads nowhere",
                "knobs are paths as for `--set`, such as `model.ffns.mlp.d_ff`",
            );
        }
    }
}

/// The points as values of an axis of their own.
fn points(cx: &Cx<'_>, file: &s::Sweep) -> Vec<Value> {
    let mut all = Vec::new();
    for (i, p) in file.points.iter().enumerate() {
        let at = At::default().at("points").at(i);
        if file.points[..i].iter().any(|q| q.name == p.name) {
            cx.error(
                &at.at("name"),
                "sweep::duplicate",
                format!("two points are named `{}`", p.name),
                "second time",
                "names tell members apart",
            );
        }
        if p.name != folder(&p.name) || p.name.is_empty() {
            cx.error(
                &at.at("name"),
                "run::bad_name",
                format!("`{}` cannot name a folder", p.name),
                "not a usable name",
                "names are letters, digits, `.`, `_`, `=` and `-`",
            );
        }
        let set = cx.root.find(&at.at("set").0);
        let sets = match set.map(|n| &n.kind) {
            Some(Kind::Map(entries)) => entries
                .iter()
                .map(|(k, v)| (k.key_text().to_owned(), k.span.clone(), v.clone()))
                .collect(),
            _ => Vec::new(),
        };
        all.push(Value {
            label: p.name.clone(),
            sets,
        });
    }
    if all.is_empty() {
        all.push(Value {
            label: String::new(),
            sets: Vec::new(),
        });
    }
    all
}

fn axis(cx: &Cx<'_>, at: &At, a: &s::Axis) -> Option<Axis> {
    let forms = [
        ("values", a.values.is_some()),
        ("range", a.range.is_some()),
        ("log_range", a.log_range.is_some()),
        ("random", a.random.is_some()),
        ("zip", !a.zip.is_empty()),
    ];
    let given: Vec<&str> = forms.iter().filter(|(_, g)| *g).map(|(n, _)| *n).collect();
    let [form] = given.as_slice() else {
        if !cx.struck(at) {
            let (place, message) = match given.get(1) {
                Some(second) => (
                    at.at(second),
                    format!("an axis has both `{}` and `{second}`", given[0]),
                ),
                None => (at.clone(), "an axis without values".to_owned()),
            };
            cx.error(
                &place,
                "sweep::axis",
                message,
                "needs exactly one of `values`, `range`, `log_range`, `random`, `zip`",
                "",
            );
        }
        return None;
    };
    if *form == "zip" {
        return zip(cx, at, a);
    }
    let path = cx.require(at, "path", a.path.clone())?;
    let key = cx.root.place(&at.at("path").0);
    let place = cx.root.place(&at.at(form).0);
    let number = |x: f64, whole: bool| {
        let x = if whole { x.round() } else { x };
        let text = if x.fract() == 0.0 && x.abs() < 1e15 {
            format!("{x:.0}")
        } else {
            short(x)
        };
        Node {
            kind: Kind::Number(text),
            span: place.clone(),
            loose: false,
        }
    };
    let inside = at.at(form);
    let nodes: Vec<Node> = match *form {
        "values" => match cx.root.find(&inside.0).map(|n| &n.kind) {
            Some(Kind::List(items) | Kind::Tuple(None, items)) => items.clone(),
            _ => Vec::new(),
        },
        "range" => {
            let r = a.range?;
            let n = ((r.to - r.from) / r.step + 1e-9).floor();
            if r.step.is_nan() || r.step <= 0.0 || !n.is_finite() || !(0.0..1e5).contains(&n) {
                cx.error(
                    &inside.at("step"),
                    "sweep::axis",
                    "a range without an end",
                    "needs from <= to and a step above 0",
                    "",
                );
                return None;
            }
            (0..=n as usize)
                .map(|i| number(r.from + i as f64 * r.step, false))
                .collect()
        }
        "log_range" => {
            let r = a.log_range?;
            if !(r.from > 0.0
                && r.to > 0.0
                && r.from.is_finite()
                && r.to.is_finite()
                && (2..10_000).contains(&r.n))
            {
                cx.error(
                    &inside,
                    "sweep::axis",
                    "a geometric range that does not work",
                    "needs `from` and `to` above 0 and `n` of 2 or more",
                    "",
                );
                return None;
            }
            let ratio = (r.to / r.from).ln() / (r.n - 1) as f64;
            (0..r.n)
                .map(|i| number(r.from * (ratio * i as f64).exp(), r.whole))
                .collect()
        }
        _ => {
            let r = a.random?;
            let fine = r.from.is_finite()
                && r.to.is_finite()
                && r.from <= r.to
                && (!r.log || r.from > 0.0)
                && (1..10_000).contains(&r.n);
            if !fine {
                cx.error(
                    &inside,
                    "sweep::axis",
                    "random values that do not work",
                    "needs from <= to (above 0 with `log`) and `n` of 1 or more",
                    "",
                );
                return None;
            }
            let draw = |i: usize| {
                let u = unit(r.seed, i as u64);
                if r.log {
                    (r.from.ln() + u * (r.to.ln() - r.from.ln())).exp()
                } else {
                    r.from + u * (r.to - r.from)
                }
            };
            (0..r.n).map(|i| number(draw(i), r.whole)).collect()
        }
    };
    let name = a
        .name
        .clone()
        .unwrap_or_else(|| path.rsplit('.').next().unwrap_or(&path).to_owned());
    let values = nodes.into_iter().enumerate().map(|(i, n)| {
        let label = a.labels.get(i).cloned().unwrap_or_else(|| label(&n, i));
        Value {
            label: label_of(&name, &label),
            sets: vec![(path.clone(), key.clone(), n)],
        }
    });
    finish(cx, at, a, name.clone(), values.collect())
}

fn zip(cx: &Cx<'_>, at: &At, a: &s::Axis) -> Option<Axis> {
    let Some(Kind::Map(entries)) = cx.root.find(&at.at("zip").0).map(|n| &n.kind) else {
        return None;
    };
    let mut values: Vec<Value> = Vec::new();
    let mut labels: Vec<Vec<String>> = Vec::new();
    for (j, (k, v)) in entries.iter().enumerate() {
        let Kind::List(items) = &v.kind else { continue };
        if j == 0 {
            values = vec![
                Value {
                    label: String::new(),
                    sets: Vec::new()
                };
                items.len()
            ];
            labels = vec![Vec::new(); items.len()];
        }
        if items.len() != values.len() {
            cx.error_at(
                k.span.clone(),
                "sweep::zip",
                format!("{} values beside {}", items.len(), values.len()),
                "zipped paths need equally many values",
                "",
            );
            return None;
        }
        let path = k.key_text();
        for (i, item) in items.iter().enumerate() {
            values[i]
                .sets
                .push((path.to_owned(), k.span.clone(), item.clone()));
            labels[i].push(label_of(
                path.rsplit('.').next().unwrap_or(path),
                &label(item, i),
            ));
        }
    }
    for (i, v) in values.iter_mut().enumerate() {
        v.label = match (a.labels.get(i), &a.name) {
            (Some(l), Some(n)) => label_of(n, l),
            (Some(l), None) => folder(l),
            (None, Some(n)) => label_of(n, &i.to_string()),
            (None, None) => labels[i].join("-"),
        };
    }
    let name = a.name.clone().unwrap_or_else(|| "zip".to_owned());
    finish(cx, at, a, name, values)
}

fn finish(cx: &Cx<'_>, at: &At, a: &s::Axis, name: String, values: Vec<Value>) -> Option<Axis> {
    if values.is_empty() {
        cx.error(
            at,
            "sweep::axis",
            "an axis without values",
            "needs at least one value",
            "",
        );
        return None;
    }
    if !a.labels.is_empty() && a.labels.len() != values.len() {
        cx.error(
            &at.at("labels"),
            "sweep::axis",
            format!("{} labels for {} values", a.labels.len(), values.len()),
            "one label per value",
            "",
        );
    }
    for (i, v) in values.iter().enumerate() {
        if values[..i].iter().any(|w| w.label == v.label) {
            cx.error(
                at,
                "sweep::duplicate",
                format!("two values of an axis are labelled `{}`", v.label),
                "members could not be told apart",
                "remove one, or give `labels`",
            );
        }
    }
    let only_if = a
        .only_if
        .0
        .iter()
        .map(|(k, l)| (k.clone(), l.iter().map(|x| x.0.clone()).collect()))
        .collect();
    Some(Axis {
        name,
        values,
        only_if,
    })
}

fn names_and_conditions(cx: &Cx<'_>, file: &s::Sweep, axes: &[Axis]) {
    if axes.len() != file.axes.len() {
        return;
    }
    for (i, a) in axes.iter().enumerate() {
        let at = At::default().at("axes").at(i);
        if axes[..i].iter().any(|b| b.name == a.name) {
            cx.error(
                &at,
                "sweep::duplicate",
                format!("two axes are named `{}`", a.name),
                "second one",
                "give one of them a `name`",
            );
        }
        for (of, labels) in &a.only_if {
            let at = at.at("only_if").at(of);
            let known: Vec<String> = if of == "point" {
                file.points.iter().map(|p| p.name.clone()).collect()
            } else {
                match axes[..i].iter().find(|b| b.name == *of) {
                    Some(b) => b.values.iter().map(|v| bare(&b.name, &v.label)).collect(),
                    None => {
                        let mut names: Vec<&str> =
                            axes[..i].iter().map(|b| b.name.as_str()).collect();
                        names.push("point");
                        cx.error(
                            &at,
                            "sweep::condition",
                            format!("no axis before this one is named `{of}`"),
                            "not an earlier axis",
                            suggest(of, &names),
                        );
                        continue;
                    }
                }
            };
            for (j, l) in labels.iter().enumerate() {
                if !known.iter().any(|k| same_label(k, l)) {
                    let names: Vec<&str> = known.iter().map(String::as_str).collect();
                    cx.error(
                        &at.at(j),
                        "sweep::condition",
                        format!("`{of}` never has the value `{l}`"),
                        "never true",
                        suggest(l, &names),
                    );
                }
            }
        }
    }
}

/// Labels compare as numbers where both are numbers.
fn same_label(a: &str, b: &str) -> bool {
    a == b
        || folder(b) == a
        || matches!((a.parse::<f64>(), b.parse::<f64>()), (Ok(x), Ok(y)) if x == y)
}

/// All combinations, points outermost; a condition that fails leaves its axis out.
fn choices(cx: &Cx<'_>, points: &[Value], axes: &[Axis], seeds: usize) -> Option<Vec<Vec<Value>>> {
    let mut rows: Vec<(Vec<Value>, Vec<Option<String>>)> = points
        .iter()
        .map(|p| (vec![p.clone()], Vec::new()))
        .collect();
    for a in axes {
        let mut next = Vec::new();
        for (row, labels) in rows {
            let holds = a.only_if.iter().all(|(of, wanted)| {
                let have = if of == "point" {
                    Some(row[0].label.clone())
                } else {
                    axes.iter()
                        .position(|b| b.name == *of)
                        .and_then(|i| labels.get(i).cloned().flatten())
                };
                have.is_some_and(|h| wanted.iter().any(|w| same_label(&h, w)))
            });
            if !holds {
                let mut labels = labels;
                labels.push(None);
                next.push((row, labels));
                continue;
            }
            for v in &a.values {
                let (mut row, mut labels) = (row.clone(), labels.clone());
                labels.push(Some(bare(&a.name, &v.label)));
                row.push(v.clone());
                next.push((row, labels));
            }
        }
        rows = next;
        if rows.len().saturating_mul(seeds) > MAX_MEMBERS {
            cx.error(
                &At::default().at("axes"),
                "value::too_large",
                format!("more than {MAX_MEMBERS} members"),
                "too many combinations",
                "",
            );
            return None;
        }
    }
    Some(rows.into_iter().map(|(row, _)| row).collect())
}

fn hold(cx: &Cx<'_>, at: &At, h: &Hold) {
    if let Some(t) = h.target {
        cx.above_zero(at, "target", t);
    }
    cx.above_zero(at, "tolerance", h.tolerance);
    if h.knobs.is_empty() {
        cx.error(
            &at.at("knobs"),
            "sweep::hold",
            "nothing may be turned",
            "needs at least one knob",
            "such as `(path: \"model.ffns.mlp.d_ff\", min: 64, max: 4096, multiple: 16)`",
        );
    }
    for (i, k) in h.knobs.iter().enumerate() {
        let at = at.at("knobs").at(i);
        cx.positive(&at, "min", k.min);
        let multiple = cx.positive(&at, "multiple", k.multiple);
        if k.max < k.min || k.max / multiple < k.min.div_ceil(multiple) {
            cx.error(
                &at.at("max"),
                "sweep::hold",
                format!("no multiple of {multiple} from {} to {}", k.min, k.max),
                "leaves no value to try",
                "",
            );
        }
    }
}

fn label_of(name: &str, label: &str) -> String {
    folder(&format!("{name}={label}"))
}

fn bare(name: &str, label: &str) -> String {
    label
        .strip_prefix(&folder(&format!("{name}=")))
        .unwrap_or(label)
        .to_owned()
}

fn label(n: &Node, i: usize) -> String {
    match &n.kind {
        Kind::Bool(b) => b.to_string(),
        Kind::Number(t) | Kind::Name(t) => t.clone(),
        // A file is known by its name.
        Kind::Str(t) => t
            .rsplit('/')
            .next()
            .unwrap_or(t)
            .trim_end_matches(".ron")
            .to_owned(),
        Kind::Char(c) => c.to_string(),
        _ if n.span.text().len() <= 24 && !n.span.text().contains('\n') => n.span.text().to_owned(),
        _ => i.to_string(),
    }
}

/// Usable as a folder name.
fn folder(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '=' | '-') {
                c
            } else {
                '_'
            }
        })
        .collect()
}

/// Six significant digits, as a RON number.
fn short(x: f64) -> String {
    let rounded: f64 = format!("{x:.5e}").parse().unwrap_or(x);
    format!("{rounded}")
}

/// The i-th uniform number in [0, 1) of a seed (SplitMix64's finaliser).
fn unit(seed: u64, i: u64) -> f64 {
    let mut z = seed
        .wrapping_mul(0xD1B5_4A32_D192_ED03)
        .wrapping_add((i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// How near one member came to the held quantity.
#[derive(Clone, Debug, PartialEq)]
pub struct Residual {
    /// Member.
    pub name: String,
    /// Knobs as set.
    pub knobs: Vec<(String, usize)>,
    /// Quantity reached.
    pub reached: f64,
    /// Quantity wanted.
    pub target: f64,
}

impl Residual {
    /// `reached / target - 1`.
    pub fn relative(&self) -> f64 {
        self.reached / self.target - 1.0
    }
}

impl Sweep {
    /// Brings every member to the held quantity by turning its knobs; without `hold`, gives the sweep back. `counts` knows sizes.
    ///
    /// Quantities are taken to grow with each knob. Knobs are turned in order until the tolerance is met; those that a member does
    /// not have are passed over. Values that do not check (heads that do not divide) are skipped.
    ///
    /// # Errors
    /// `sweep::hold` for every member that stays outside the tolerance, with how near it came.
    pub fn solve(&self, counts: &dyn Fn(&Run) -> Counts) -> Result<(Sweep, Vec<Residual>), Report> {
        let Some(hold) = &self.hold else {
            return Ok((self.clone(), Vec::new()));
        };
        let mut solved = self.clone();
        let (mut all, mut errors) = (Vec::new(), Vec::new());
        let first = self
            .members
            .first()
            .map(|m| counts(&m.run).get(hold.quantity));
        let target = hold.target.or(first).unwrap_or(0.0);
        for m in &mut solved.members {
            let knobs = turn(m, hold, target, counts);
            let reached = counts(&m.run).get(hold.quantity);
            let r = Residual {
                name: m.name.clone(),
                knobs,
                reached,
                target,
            };
            if r.relative().is_nan() || r.relative().abs() > hold.tolerance {
                errors.push(Diagnostic {
                    code: "sweep::hold",
                    message: format!("member `{}` cannot be brought to {} = {target}: the nearest is {reached} ({:+.2}%)", m.name, hold.quantity.name(), 100.0 * r.relative()),
                    at: None,
                    label: String::new(),
                    help: Some(match r.knobs.is_empty() {
                        true => "none of the knobs is a field of this member".to_owned(),
                        false => format!("widen the knobs or the tolerance ({})", hold.tolerance),
                    }),
                });
            }
            all.push(r);
        }
        if errors.is_empty() {
            Ok((solved, all))
        } else {
            Err(Report {
                diagnostics: errors,
            })
        }
    }
}

fn turn(
    m: &mut Member,
    hold: &Hold,
    target: f64,
    counts: &dyn Fn(&Run) -> Counts,
) -> Vec<(String, usize)> {
    let mut turned = Vec::new();
    let miss = |run: &Run| (counts(run).get(hold.quantity) - target).abs();
    for knob in &hold.knobs {
        if miss(&m.run) <= hold.tolerance * target {
            break;
        }
        let set = |k: usize| Set::new(&knob.path, (k * knob.multiple).to_string());
        let doc = m.doc.clone();
        let attempt = |k: usize| -> Option<(Document, Valid<Run>)> {
            let mut doc = doc.clone();
            doc.set(&set(k)).ok()?;
            let run = doc.clone().check(check_run).ok()?;
            Some((doc, run))
        };
        let (mut lo, mut hi) = (knob.min.div_ceil(knob.multiple), knob.max / knob.multiple);
        // The first value at or above k that checks, and the best of all tried.
        let mut best: Option<(f64, usize, (Document, Valid<Run>))> = None;
        let mut probe = |k: usize, hi: usize| -> Option<(usize, f64)> {
            let (k, found) =
                (k..=hi.min(k.saturating_add(512))).find_map(|k| attempt(k).map(|f| (k, f)))?;
            let count = counts(&found.1).get(hold.quantity);
            let distance = (count - target).abs();
            if best.as_ref().is_none_or(|(d, ..)| distance < *d) {
                best = Some((distance, k, found));
            }
            Some((k, count))
        };
        probe(lo, hi);
        probe(hi, hi);
        while lo <= hi {
            let mid = lo + (hi - lo) / 2;
            match probe(mid, hi) {
                Some((k, count)) if count < target => lo = k + 1,
                _ if mid == 0 => break,
                _ => hi = mid - 1,
            }
        }
        if let Some((distance, k, (doc, run))) = best
            && distance < miss(&m.run)
        {
            let value = k * knob.multiple;
            m.set.push((knob.path.clone(), value.to_string()));
            turned.push((knob.path.clone(), value));
            m.doc = doc;
            m.run = run;
        }
    }
    turned
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = r#"(name: "r", steps: 10, data: Mqar(vocab_size: 64), seq_len: 32,
        model: (name: "m", vocab_size: 64, d_model: 32, n_layers: 2, mixers: {"attn": Attention(n_heads: 2)}, ffns: {"mlp": Glu(d_ff: 64)}))"#;

    fn sweep(rest: &str) -> Result<Valid<Sweep>, Report> {
        parse_sweep(
            &Source::new("s.ron", format!("(base: {BASE}, {rest})")),
            &[],
        )
    }

    fn names(s: &Sweep) -> Vec<&str> {
        s.members.iter().map(|m| m.name.as_str()).collect()
    }

    #[test]
    fn points_axes_conditions_and_seeds_cross() {
        let s = sweep(
            r#"points: [(name: "a"), (name: "b", set: {"model.ffns.mlp.d_ff": 96})],
               axes: [(path: "optimizer.lr", values: [1e-3, 3e-3], only_if: {"point": ["b"]}),
                      (zip: {"model.d_model": [32, 64], "batch": [4, 2]}, only_if: {"lr": [0.003]})],
               seeds: [0, 7], metric: "accuracy""#,
        )
        .unwrap_or_else(|r| panic!("{r}"));
        assert_eq!(
            names(&s),
            [
                "a-seed=0",
                "a-seed=7",
                "b-lr=1e-3-seed=0",
                "b-lr=1e-3-seed=7",
                "b-lr=3e-3-d_model=32-batch=4-seed=0",
                "b-lr=3e-3-d_model=32-batch=4-seed=7",
                "b-lr=3e-3-d_model=64-batch=2-seed=0",
                "b-lr=3e-3-d_model=64-batch=2-seed=7"
            ]
        );
        let last = &s.members[7];
        assert_eq!(
            (
                last.run.seed,
                last.run.model.d_model,
                last.run.phases[0].batch,
                last.run.phases[0].lr
            ),
            (7, 64, 2, 3e-3)
        );
        assert_eq!(last.group, "b-lr=3e-3-d_model=64-batch=2");
        assert_eq!(s.goal, Goal::Max);
    }

    #[test]
    fn ranges() {
        let s = sweep(
            r#"axes: [(path: "model.d_model", range: (from: 32, to: 96, step: 32)), (path: "optimizer.lr", log_range: (from: 1e-4, to: 1e-2, n: 3)),
                      (name: "wd", path: "optimizer.weight_decay", random: (from: 0, to: 0.2, n: 2))]"#,
        )
        .unwrap_or_else(|r| panic!("{r}"));
        assert_eq!(s.members.len(), 18);
        assert!(
            names(&s)[0].starts_with("d_model=32-lr=0.0001-wd="),
            "{:?}",
            names(&s)[0]
        );
        assert_eq!(s.members[17].run.model.d_model, 96);
    }

    #[test]
    fn wrong_sweeps() {
        for (rest, code) in [
            (
                r#"axes: [(path: "optimizer.lrr", values: [1])]"#,
                "ron::unknown_field",
            ),
            (
                r#"axes: [(path: "model.mixers.mamba.d_state", values: [1])]"#,
                "set::path",
            ),
            (r#"points: [(name: "a"), (name: "a")]"#, "sweep::duplicate"),
            (
                r#"axes: [(path: "batch", values: [1, 1])]"#,
                "sweep::duplicate",
            ),
            (r#"axes: [(path: "batch")]"#, "sweep::axis"),
            (
                r#"axes: [(path: "batch", values: [1], only_if: {"pint": ["a"]})]"#,
                "sweep::condition",
            ),
            (
                r#"axes: [(zip: {"batch": [1, 2], "seed": [1]})]"#,
                "sweep::zip",
            ),
            (
                r#"axes: [(path: "model.d_model", values: [33])]"#,
                "model::heads_divide",
            ),
            (
                r#"hold: (quantity: params_total, knobs: [])"#,
                "sweep::hold",
            ),
        ] {
            let r = sweep(rest).expect_err(rest);
            assert!(r.has(code), "{rest}: {r}");
        }
    }

    #[test]
    fn hold_turns_knobs() {
        let s = sweep(
            r#"axes: [(path: "model.d_model", values: [32, 48, 64])],
               hold: (quantity: params_total, knobs: [(path: "model.ffns.moe.d_ff", min: 1, max: 5), (path: "model.ffns.mlp.d_ff", min: 8, max: 512, multiple: 8)], tolerance: 0.2)"#,
        );
        assert!(s.expect_err("a knob that no member has").has("sweep::hold"));
        let s = sweep(
            r#"axes: [(path: "model.d_model", values: [32, 48, 64])],
               hold: (quantity: params_total, knobs: [(path: "model.ffns.mlp.d_ff", min: 8, max: 512, multiple: 8)], tolerance: 0.1)"#,
        )
        .unwrap_or_else(|r| panic!("{r}"));
        let counts = |r: &Run| {
            let d_ff = match r.model.layers[0].ffn.as_ref().map(|f| &f.body) {
                Some(crate::model::Ffn::Glu(g)) => g.d_ff,
                _ => 0,
            };
            Counts {
                params_total: (r.model.d_model * d_ff) as f64,
                ..Counts::default()
            }
        };
        let (solved, residuals) = s.solve(&counts).unwrap_or_else(|r| panic!("{r}"));
        assert_eq!(
            residuals.iter().map(|r| r.reached).collect::<Vec<_>>(),
            [2048.0, 48.0 * 40.0, 2048.0]
        );
        assert_eq!(
            solved.members[2].set.last(),
            Some(&("model.ffns.mlp.d_ff".to_owned(), "32".to_owned()))
        );
        let narrow = Sweep {
            hold: s.hold.clone().map(|h| Hold {
                tolerance: 0.01,
                ..h
            }),
            ..(*s).clone()
        };
        let r = narrow.solve(&counts).expect_err("48 x 40 is 6% off");
        assert!(r.has("sweep::hold"));
    }
}
