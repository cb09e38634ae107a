//! The report as one HTML file that needs neither network nor server.
//!
//! Without a script the page already shows the answer, the table and the learning curves; `html/report.js` makes the table
//! sortable and the pictures interactive from the data embedded as JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use serde_json::{Value, json};

use super::compare::{Comparison, Cost, Group};
use super::explain::{DiffLine, diff};
use super::load::RunData;
use super::stats::{Goal, Verdict};
use super::svg::{N_COLOURS, curves, dots, escape};
use super::table::percent;
use super::units::{bytes, count, interval, mean_sd, number};
use super::verdict::p_words;
use crate::record::files::write_atomic;
use crate::record::{Point, RecordError, Series};

const PAGE: &str = include_str!("html/report.html");
const STYLE: &str = include_str!("html/report.css");
const SCRIPT: &str = include_str!("html/report.js");

/// Points embedded over all curves; at about 14 bytes each this bounds the file to a few megabytes.
const POINT_BUDGET: usize = 200_000;
/// Graph texts are embedded as long as all of them together stay below this.
const GRAPH_BUDGET_BYTES: usize = 1 << 20;
/// Metrics of the table beside the deciding one.
const N_OTHER_METRICS: usize = 2;

/// Writes the report atomically.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: &Path, c: &Comparison, runs: &[RunData]) -> Result<(), RecordError> {
    write_atomic(path, render(c, runs).as_bytes())
}

/// The report's text.
pub fn render(c: &Comparison, runs: &[RunData]) -> String {
    let chart = c
        .metric
        .as_deref()
        .map(|m| curves(c, runs, m))
        .unwrap_or_default();
    let parts: BTreeMap<&str, String> = [
        ("title", escape(&c.title)),
        (
            "question",
            c.question
                .as_ref()
                .map(|q| format!("<p class=\"question\">{}</p>", escape(q)))
                .unwrap_or_default(),
        ),
        ("css", STYLE.to_owned()),
        ("js", SCRIPT.to_owned()),
        ("verdict", verdict(c)),
        ("facts", facts(c)),
        ("table", table(c)),
        ("metric", escape(c.metric.as_deref().unwrap_or("no metric"))),
        ("chart", chart),
        ("configs", configs(c, runs)),
        ("members", members(c)),
        ("laws", laws(c)),
        ("notes", notes(c)),
        ("method", method(c)),
        ("data", embedded(&data(c, runs))),
        ("version", escape(env!("CARGO_PKG_VERSION"))),
    ]
    .into();
    fill(PAGE, &parts)
}

/// Replaces `{{name}}` in one pass, so that nothing inside a part is taken for a placeholder.
fn fill(page: &str, parts: &BTreeMap<&str, String>) -> String {
    let mut out =
        String::with_capacity(page.len() + parts.values().map(String::len).sum::<usize>());
    let mut rest = page;
    while let Some((head, tail)) = rest.split_once("{{") {
        out.push_str(head);
        match tail
            .split_once("}}")
            .and_then(|(name, after)| parts.get(name).map(|p| (p, after)))
        {
            Some((part, after)) => {
                out.push_str(part);
                rest = after;
            }
            None => {
                out.push_str("{{");
                rest = tail;
            }
        }
    }
    out.push_str(rest);
    out
}

/// JSON inside a `<script>`: `<` must not appear, or `</script>` in a name would end it.
fn embedded(value: &Value) -> String {
    value
        .to_string()
        .replace('<', "\\u003c")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

/// Sentences with the groups' names set in their colours.
fn verdict(c: &Comparison) -> String {
    let mut out = String::new();
    for (i, sentence) in c.verdict.iter().enumerate() {
        let class = if i == 0 { "lead" } else { "more" };
        let _ = write!(
            out,
            "<p class=\"{class}\">{}</p>",
            with_names(sentence, &c.groups)
        );
    }
    out
}

fn with_names(sentence: &str, groups: &[Group]) -> String {
    let mut names: Vec<(usize, &str)> =
        groups.iter().map(|g| g.name.as_str()).enumerate().collect();
    names.sort_by_key(|(_, n)| std::cmp::Reverse(n.len()));
    let mut out = String::new();
    let mut rest = sentence;
    let mut previous = ' ';
    while let Some(next) = rest.chars().next() {
        let at_word = !previous.is_alphanumeric();
        let hit = names.iter().find(|(_, n)| {
            at_word
                && !n.is_empty()
                && rest.strip_prefix(n).is_some_and(|after| {
                    !after.starts_with(|c: char| c.is_alphanumeric() || c == '+')
                })
        });
        if let Some((colour, name)) = hit {
            let _ = write!(
                out,
                "<b class=\"name\" style=\"--c:var(--c{})\">{}</b>",
                colour % N_COLOURS,
                escape(name)
            );
            rest = &rest[name.len()..];
            previous = name.chars().last().unwrap_or(' ');
        } else {
            out.push_str(&escape(&next.to_string()));
            rest = &rest[next.len_utf8()..];
            previous = next;
        }
    }
    out
}

/// One line of facts under the title.
fn facts(c: &Comparison) -> String {
    let finished = c.groups.iter().map(|g| g.n_finished).sum::<usize>();
    let mut facts = vec![
        format!(
            "{} configuration{}",
            c.groups.len(),
            if c.groups.len() == 1 { "" } else { "s" }
        ),
        format!("{finished} of {} runs finished", c.members.len()),
    ];
    if let Some(step) = c.members.iter().filter_map(|m| m.last_step).max() {
        facts.push(format!("{step} steps"));
    }
    if let Some(metric) = &c.metric {
        let good = if c.goal == Goal::Higher {
            "higher"
        } else {
            "lower"
        };
        facts.push(format!("judged by {} ({good} is better)", escape(metric)));
    }
    facts.iter().map(|f| format!("<span>{f}</span>")).collect()
}

fn table(c: &Comparison) -> String {
    if c.groups.is_empty() {
        return "<p>No runs.</p>".to_owned();
    }
    let shown: Vec<&String> = c.metrics.iter().take(1 + N_OTHER_METRICS).collect();
    let has = |f: &dyn Fn(&Group) -> bool| c.groups.iter().any(f);
    let params = has(&|g| g.params_total.is_some());
    let speed = has(&|g| g.tokens_per_sec.mean.is_some());
    let tested = has(&|g| g.test.is_some());
    let mut out = String::from(
        "<div class=\"scroll\"><table class=\"sortable\"><thead><tr><th>configuration</th>",
    );
    let head = |out: &mut String, text: &str, tip: &str| {
        let _ = write!(
            out,
            "<th class=\"num\" title=\"{tip}\">{}</th>",
            escape(text)
        );
    };
    for (k, metric) in shown.iter().enumerate() {
        head(
            &mut out,
            metric,
            "mean ± sample standard deviation over seeds",
        );
        if k > 0 {
            continue;
        }
        if tested {
            let _ = write!(
                out,
                "<th>against {}</th>",
                escape(c.reference.as_deref().unwrap_or_default())
            );
        }
        if params {
            head(
                &mut out,
                "decode state",
                "recurrent state plus key-value cache of one sequence at the training length",
            );
            head(&mut out, "params", "parameters, all");
            head(&mut out, "active", "parameters used by one token");
            head(
                &mut out,
                "FLOPs/token",
                "floating-point operations of the forward pass, per token",
            );
        }
        if speed {
            head(&mut out, "tokens/s", "training throughput");
        }
        if let Some(hold) = &c.hold {
            let target = format!("distance from the target {}", count(hold.target));
            head(&mut out, &format!("off {}", hold.quantity.name()), &target);
        }
    }
    head(&mut out, "seeds", "finished members");
    out.push_str("</tr></thead><tbody>");
    let finals: Vec<f64> = c
        .members
        .iter()
        .filter_map(|m| shown.first().and_then(|t| m.finals.get(*t)))
        .copied()
        .collect();
    let low = finals.iter().copied().fold(f64::INFINITY, f64::min);
    let high = finals.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    for (i, g) in c.groups.iter().enumerate() {
        let _ = write!(
            out,
            "<tr><th data-v=\"{i}\"><i class=\"dot\" style=\"--c:var(--c{})\"></i>{}</th>",
            i % N_COLOURS,
            escape(&g.name)
        );
        for (k, metric) in shown.iter().enumerate() {
            let e = g.metrics.get(*metric);
            let text = e
                .and_then(|e| Some(mean_sd(e.mean?, e.sd)))
                .unwrap_or_else(|| "–".to_owned());
            let picture = if k == 0 {
                dots(g, i, &c.members, metric, low, high)
            } else {
                String::new()
            };
            let ci = e
                .and_then(|e| e.ci95)
                .filter(|_| k == 0)
                .map(|ci| {
                    let tip = "95% confidence interval of the mean over seeds, by Student's t";
                    format!("<small title=\"{tip}\">95%: {}</small>", interval(ci))
                })
                .unwrap_or_default();
            cell(
                &mut out,
                e.and_then(|e| e.mean),
                &format!("{picture}<span>{text}{ci}</span>"),
                k == 0,
            );
            if k == 0 && tested {
                verdict_cell(&mut out, g);
            }
            if k == 0 {
                // Alone on the front is no distinction.
                let shown = [params, speed, c.hold.is_some()];
                cost_cells(&mut out, g, shown, c.groups.len() > 1);
            }
        }
        let n = if g.n_finished == g.n_members {
            g.n_members.to_string()
        } else {
            format!("{} of {}", g.n_finished, g.n_members)
        };
        cell(&mut out, Some(g.n_finished as f64), &n, false);
        out.push_str("</tr>");
    }
    out.push_str("</tbody></table></div>");
    if c.groups.len() > 1 && c.groups.iter().any(|g| !g.pareto.is_empty()) {
        out.push_str("<p class=\"key\">◆ on the Pareto front of that column: no other configuration is both better and cheaper</p>");
    }
    out
}

fn verdict_cell(out: &mut String, g: &Group) {
    let (class, text, sort) = match &g.test {
        None => ("ref", "reference".to_owned(), 0.0),
        Some(t) => {
            let class = match t.verdict {
                Verdict::Better => "better",
                Verdict::Worse => "worse",
                Verdict::NoDifferenceShown | Verdict::NotTested => "same",
            };
            let gap = t.difference.map(|d| {
                let sign = if d > 0.0 { "+" } else { "" };
                format!(" title=\"difference {sign}{}\"", number(d))
            });
            let p = t
                .p_adjusted
                .map(|p| format!(" <small>{}</small>", escape(&p_words(p))));
            let text = format!(
                "<span{}>{}{}</span>",
                gap.unwrap_or_default(),
                t.verdict.words(),
                p.unwrap_or_default()
            );
            (class, text, t.difference.unwrap_or(0.0))
        }
    };
    let _ = write!(
        out,
        "<td class=\"verdict {class}\" data-v=\"{sort}\">{text}</td>"
    );
}

fn cost_cells(out: &mut String, g: &Group, [params, speed, held]: [bool; 3], starred: bool) {
    let mut costs: Vec<(Cost, Option<String>)> = Vec::new();
    if params {
        costs.push((Cost::DecodeBytes, Cost::DecodeBytes.of(g).map(bytes)));
        costs.push((Cost::ParamsTotal, Cost::ParamsTotal.of(g).map(count)));
        costs.push((Cost::ParamsActive, Cost::ParamsActive.of(g).map(count)));
        costs.push((Cost::FlopsPerToken, Cost::FlopsPerToken.of(g).map(count)));
    }
    if speed {
        costs.push((Cost::TokensPerSec, Cost::TokensPerSec.of(g).map(count)));
    }
    for (cost, text) in costs {
        let mut html = text.unwrap_or_else(|| "–".to_owned());
        html.push_str(if starred && g.pareto.contains(&cost) {
            "<sup title=\"on the Pareto front: no other configuration is both better and cheaper by this measure\">◆</sup>"
        } else {
            "<sup></sup>"
        });
        cell(out, cost.of(g), &html, false);
    }
    if held {
        let text = g.residual.map(percent).unwrap_or_else(|| "–".to_owned());
        cell(out, g.residual, &text, false);
    }
}

fn cell(out: &mut String, value: Option<f64>, html: &str, main: bool) {
    let class = if main { "num main" } else { "num" };
    let v = value.map(|v| v.to_string()).unwrap_or_default();
    let _ = write!(out, "<td class=\"{class}\" data-v=\"{v}\">{html}</td>");
}

/// How each configuration differs from the reference's; the script replaces this by a choice of any two. Empty where
/// there is nothing to compare.
fn configs(c: &Comparison, runs: &[RunData]) -> String {
    let has_two = |text: fn(&RunData) -> &Option<String>| {
        runs.iter().filter(|r| text(r).is_some()).count() > 1
    };
    if !has_two(|r| &r.resolved) && !has_two(|r| &r.graph) {
        return String::new();
    }
    let first = |group: &str| {
        runs.iter()
            .find(|r| r.group == group && r.resolved.is_some())
    };
    let reference = c
        .reference
        .as_deref()
        .or(c.groups.first().map(|g| g.name.as_str()));
    let mut out = String::from(
        "<section id=\"configs\"><h2>What differs between two runs</h2>\
         <div id=\"config-controls\" class=\"controls\" hidden></div><div id=\"config-diff\">",
    );
    if let Some(base) = reference.and_then(first) {
        let others = c
            .groups
            .iter()
            .filter(|g| g.name != base.group)
            .filter_map(|g| first(&g.name));
        for run in others {
            let lines = diff(
                base.resolved.as_deref().unwrap_or_default(),
                run.resolved.as_deref().unwrap_or_default(),
            );
            let _ = write!(
                out,
                "<details><summary>{} against {}</summary>{}</details>",
                escape(&run.name),
                escape(&base.name),
                diff_html(&lines)
            );
        }
    }
    out.push_str("</div></section>");
    out
}

fn diff_html(lines: &[DiffLine]) -> String {
    let mut out = String::from("<pre class=\"diff\">");
    for line in lines {
        let class = match line.sign {
            '-' => "del",
            '+' => "add",
            _ => "ctx",
        };
        let _ = writeln!(
            out,
            "<span class=\"{class}\">{} {}</span>",
            line.sign,
            escape(&line.text)
        );
    }
    out.push_str("</pre>");
    out
}

fn members(c: &Comparison) -> String {
    let mut out = String::from(
        "<div class=\"scroll\"><table class=\"sortable\"><thead><tr><th>run</th><th>configuration</th><th class=\"num\">seed</th><th>state</th><th class=\"num\">last step</th>",
    );
    let shown: Vec<&String> = c.metrics.iter().take(1 + N_OTHER_METRICS).collect();
    shown.iter().for_each(|m| {
        let _ = write!(out, "<th class=\"num\">{}</th>", escape(m));
    });
    out.push_str("</tr></thead><tbody>");
    for m in &c.members {
        let _ = write!(
            out,
            "<tr><th>{}</th><td>{}</td>",
            escape(&m.name),
            escape(&m.group)
        );
        cell(
            &mut out,
            m.seed.map(|s| s as f64),
            &m.seed.map(|s| s.to_string()).unwrap_or_else(|| "–".into()),
            false,
        );
        let state = m
            .state
            .map(|s| s.to_string())
            .unwrap_or_else(|| "unknown".to_owned());
        let why = m
            .message
            .as_ref()
            .map(|w| format!(" title=\"{}\"", escape(w)))
            .unwrap_or_default();
        let _ = write!(out, "<td{why}>{state}</td>");
        cell(
            &mut out,
            m.last_step.map(|s| s as f64),
            &m.last_step
                .map(|s| s.to_string())
                .unwrap_or_else(|| "–".into()),
            false,
        );
        for metric in &shown {
            let v = m.finals.get(*metric).copied();
            cell(
                &mut out,
                v,
                &v.map(number).unwrap_or_else(|| "–".into()),
                false,
            );
        }
        out.push_str("</tr>");
    }
    out.push_str("</tbody></table></div>");
    out
}

fn laws(c: &Comparison) -> String {
    let Some(metric) = c.metric.as_deref().filter(|_| !c.laws.is_empty()) else {
        return String::new();
    };
    let items: String = c
        .laws
        .iter()
        .map(|l| format!("<li>{}</li>", escape(&l.words(metric))))
        .collect();
    format!("<section id=\"laws\"><h2>Scaling laws</h2><ul>{items}</ul></section>")
}

fn notes(c: &Comparison) -> String {
    if c.notes.is_empty() {
        return String::new();
    }
    let items: String = c
        .notes
        .iter()
        .map(|n| format!("<li>{}</li>", escape(n)))
        .collect();
    format!("<section id=\"notes\"><h2>Before you believe it</h2><ul>{items}</ul></section>")
}

fn method(c: &Comparison) -> String {
    let tested = c.groups.iter().any(|g| g.test.is_some());
    let mut out = String::from(
        "Values are those of the last step of finished runs: mean ± sample standard deviation over seeds. \
         95% intervals of means are by Student's t, those of scaling laws by resampling points. ",
    );
    if tested {
        let paired = c
            .groups
            .iter()
            .any(|g| g.method() == Some(super::stats::Method::Paired));
        out.push_str(if paired {
            "Each configuration is tested against the reference by a paired t test over common seeds"
        } else {
            "Each configuration is tested against the reference by Welch's t test"
        });
        out.push_str(
            ", p-values corrected for several comparisons by Holm's method; below 0.05 counts as shown. \
             “No difference shown” does not mean equal.",
        );
    }
    out
}

/// A float for JSON with five significant digits; `null` where not finite.
fn short(v: f64) -> Value {
    if !v.is_finite() {
        return Value::Null;
    }
    format!("{v:.4e}")
        .parse::<f64>()
        .map(|v| {
            if v.fract() == 0.0 && v.abs() < 1e9 {
                json!(v as i64)
            } else {
                json!(v)
            }
        })
        .unwrap_or(Value::Null)
}

/// Every n-th of them, counted from the end, so that the last one is always there.
fn thinned(series: &Series, at_most: usize) -> Vec<Point> {
    let points: Vec<Point> = series.points().collect();
    let stride = points.len().div_ceil(at_most.max(1)).max(1);
    let mut kept: Vec<Point> = points.into_iter().rev().step_by(stride).collect();
    kept.reverse();
    kept
}

/// Steps and the seconds since the first of them, of the run's longest curve.
fn seconds(run: &RunData, at_most: usize) -> Value {
    let longest = run.series.values().max_by_key(|s| s.points().count());
    let points = longest.map(|s| thinned(s, at_most)).unwrap_or_default();
    let Some(first) = points.first().map(|p| p.time) else {
        return Value::Null;
    };
    let steps: Vec<i64> = points.iter().map(|p| p.step).collect();
    let secs: Vec<Value> = points.iter().map(|p| short(p.time - first)).collect();
    json!([steps, secs])
}

fn data(c: &Comparison, runs: &[RunData]) -> Value {
    let n_series: usize = runs.iter().map(|r| r.series.len()).sum();
    let per_series = (POINT_BUDGET / n_series.max(1)).clamp(40, 600);
    let index: BTreeMap<&str, usize> = c
        .groups
        .iter()
        .enumerate()
        .map(|(i, g)| (g.name.as_str(), i))
        .collect();
    let mut tags: BTreeSet<&str> = BTreeSet::new();
    let mut texts: Vec<&str> = Vec::new();
    let mut graph_bytes = 0;
    let members: Vec<Value> = runs
        .iter()
        .map(|run| {
            let mut series = serde_json::Map::new();
            for (tag, s) in &run.series {
                let kept = thinned(s, per_series);
                tags.insert(tag);
                let steps: Vec<i64> = kept.iter().map(|p| p.step).collect();
                let values: Vec<Value> = kept.iter().map(|p| short(p.value)).collect();
                series.insert(tag.clone(), json!([steps, values]));
            }
            let graph = run.graph.as_deref().and_then(|g| {
                if let Some(i) = texts.iter().position(|t| *t == g) {
                    return Some(i);
                }
                graph_bytes += g.len();
                (graph_bytes <= GRAPH_BUDGET_BYTES).then(|| {
                    texts.push(g);
                    texts.len() - 1
                })
            });
            json!({
                "name": run.name,
                "group": index.get(run.group.as_str()),
                "config": run.resolved,
                "graph": graph,
                "seconds": seconds(run, per_series),
                "series": series,
            })
        })
        .collect();
    let shown: Vec<Cost> = Cost::ALL
        .into_iter()
        .filter(|cost| c.groups.iter().any(|g| cost.of(g).is_some()))
        .collect();
    let costs: Vec<Value> = shown
        .iter()
        .map(|&cost| {
            let laws: Vec<Value> = c
                .laws
                .iter()
                .filter(|l| l.cost == cost)
                .map(|l| {
                    let law = &l.fit.law;
                    // Full precision: a rounded exponent is another curve.
                    json!({ "name": l.family, "from": l.range.0, "to": l.range.1, "e": law.e, "a": law.a, "b": law.b })
                })
                .collect();
            json!({
                "name": cost.words(),
                "lower": cost.goal() == Goal::Lower,
                "bytes": cost == Cost::DecodeBytes,
                "laws": laws,
                "x": c.groups.iter().map(|g| cost.of(g).map(short)).collect::<Vec<_>>(),
                "front": c.groups.iter().map(|g| g.pareto.contains(&cost)).collect::<Vec<_>>(),
            })
        })
        .collect();
    let quality = |g: &Group| c.metric.as_ref().and_then(|m| g.metrics.get(m)).cloned();
    json!({
        "metric": c.metric,
        "higher": c.goal == Goal::Higher,
        "tags": tags,
        "groups": c.groups.iter().map(|g| json!({
            "name": g.name,
            "mean": quality(g).and_then(|e| e.mean).map(short),
            "sd": quality(g).and_then(|e| e.sd).map(short),
            "n": quality(g).map_or(0, |e| e.n),
        })).collect::<Vec<_>>(),
        "costs": costs,
        "runs": members,
        "graphs": texts,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::compare::tests::{five_by_two, run};
    use crate::report::compare::{Options, compare};

    fn page(runs: &[RunData]) -> String {
        let options = Options {
            title: Some("A <title> & {{data}}".into()),
            ..Options::default()
        };
        render(&compare(runs, &options), runs)
    }

    fn json_of(page: &str) -> Value {
        let start = page.find("id=\"data\">").unwrap() + "id=\"data\">".len();
        let end = start + page[start..].find("</script>").unwrap();
        serde_json::from_str(&page[start..end]).unwrap()
    }

    #[test]
    fn names_cannot_break_the_page() {
        let mut runs = five_by_two();
        let evil = "</script><script>alert(1)</script>&\"' {{js}}";
        runs.push(run(
            evil,
            0,
            &[("eval/accuracy", f64::NAN), ("</svg>/../x", f64::INFINITY)],
        ));
        let page = page(&runs);
        assert!(!page.contains("<script>alert"), "a name became markup");
        assert_eq!(page.matches("<script").count(), 2);
        assert_eq!(page.matches("</script>").count(), 2);
        assert!(page.contains("<h1>A &lt;title&gt; &amp; {{data}}</h1>"));
        let data = json_of(&page);
        assert!(
            data["groups"]
                .as_array()
                .unwrap()
                .iter()
                .any(|g| g["name"] == evil)
        );
        assert!(
            data["runs"][6]["series"]["eval/accuracy"][1]
                .as_array()
                .unwrap()
                .iter()
                .all(Value::is_null)
        );
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere_and_says_the_answer_without_script() {
        let page = page(&five_by_two());
        for outside in [
            "src=",
            "@import",
            "<link rel=\"stylesheet",
            "fetch(",
            "https://",
        ] {
            assert!(!page.contains(outside), "{outside}");
        }
        // The one address is the name of SVG, which is not fetched.
        assert_eq!(
            page.matches("http://").count(),
            page.matches("http://www.w3.org/2000/svg").count()
        );
        let before_script = page.split("<script").next().unwrap();
        assert!(before_script.contains("has the highest eval/accuracy"));
        assert_eq!(before_script.matches("<polyline").count(), 3);
        assert_eq!(before_script.matches("<tr>").count(), 1 + 3 + 1 + 6);
        for part in ["{{", "NaN", "inf<"] {
            assert!(
                !page
                    .replace(SCRIPT, "")
                    .replace("{{data}}", "")
                    .contains(part),
                "{part}"
            );
        }
    }

    #[test]
    fn an_empty_comparison_has_a_page() {
        let page = page(&[]);
        assert!(page.contains("No run has a metric"));
        json_of(&page);
    }

    #[test]
    fn long_curves_are_thinned_and_keep_their_end() {
        let mut runs = vec![run("a", 0, &[("x", 1.0)])];
        let curve = (0..5000).map(|i| crate::record::Point {
            step: i,
            time: 0.0,
            value: i as f64,
        });
        runs[0].series.insert("x".into(), curve.collect());
        let data = json_of(&page(&runs));
        let steps = data["runs"][0]["series"]["x"][0].as_array().unwrap();
        assert!(steps.len() <= 600 && steps.last().unwrap() == 4999);
    }

    #[test]
    fn names_in_sentences_take_the_longest_match() {
        let mut runs = five_by_two();
        runs.iter_mut()
            .filter(|r| r.group == "a")
            .for_each(|r| r.group = "c+x".into());
        let c = compare(&runs, &Options::default());
        let html = with_names("c+x beats c, not cat or ac", &c.groups);
        assert_eq!(html.matches("<b class=\"name\"").count(), 2, "{html}");
        assert!(html.contains(">c+x</b> beats <b") && html.ends_with("not cat or ac"));
    }
}
