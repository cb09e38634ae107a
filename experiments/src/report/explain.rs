//! Why two runs differ: configuration, graph, the step where their losses part, the layers whose statistics differ most.

use std::fmt::Write;

use serde::Serialize;
use similar::{ChangeTag, TextDiff};

use super::load::RunData;
use super::units::number;
use crate::record::Series;
use crate::record::tags;

/// Lines of a difference that are shown.
const MAX_DIFF_LINES: usize = 200;
/// Unchanged lines around a change.
const CONTEXT: usize = 2;
/// Statistics listed.
const N_STATS: usize = 12;
/// A relative difference that rounding does not explain.
const VISIBLE: f64 = 0.01;

/// A line of a difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiffLine {
    /// `-` only in the first, `+` only in the second, ` ` in both, `…` lines left out.
    pub sign: char,
    /// The line.
    pub text: String,
}

/// Two values of one thing.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pair {
    /// Tag.
    pub tag: String,
    /// Of the first run.
    pub a: f64,
    /// Of the second run.
    pub b: f64,
}

/// Where the curves of one metric part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Parting {
    /// The metric.
    pub tag: String,
    /// Steps that both runs logged.
    pub n_common: usize,
    /// First common step with different values, and the values.
    pub first: Option<(i64, f64, f64)>,
    /// First common step that differs by more than 1%.
    pub visible: Option<(i64, f64, f64)>,
}

/// The explanation.
#[derive(Debug, Clone, Serialize)]
pub struct Explanation {
    /// Names of the two runs.
    pub names: (String, String),
    /// Difference of `resolved.ron`; `None` where a run has none.
    pub config: Option<Vec<DiffLine>>,
    /// Difference of `graph.txt`; `None` where a run has none.
    pub graph: Option<Vec<DiffLine>>,
    /// Where the loss (else the first common metric) parts; `None` where they share none.
    pub parting: Option<Parting>,
    /// Final values of the metrics outside the layers.
    pub finals: Vec<Pair>,
    /// Layer statistics that differ by the largest factors, the largest first.
    pub layers: Vec<Pair>,
}

/// Explains how `b` differs from `a`.
pub fn explain(a: &RunData, b: &RunData) -> Explanation {
    let texts = |x: &Option<String>, y: &Option<String>| Some(diff(x.as_deref()?, y.as_deref()?));
    let mut finals = Vec::new();
    let mut layers = Vec::new();
    let (fa, fb) = (a.finals(), b.finals());
    for (tag, va) in &fa {
        let Some(vb) = fb.get(tag) else { continue };
        let pair = Pair {
            tag: tag.clone(),
            a: *va,
            b: *vb,
        };
        if is_layer(tag) {
            layers.push(pair)
        } else {
            finals.push(pair)
        }
    }
    layers.retain(|p| p.a.to_bits() != p.b.to_bits());
    layers.sort_by(|x, y| {
        factor(y)
            .total_cmp(&factor(x))
            .then_with(|| x.tag.cmp(&y.tag))
    });
    layers.truncate(N_STATS);
    let common = |tag: &&String| b.series.contains_key(*tag);
    let tag = a
        .series
        .keys()
        .filter(common)
        .find(|t| t.as_str() == tags::TRAIN_LOSS)
        .or_else(|| a.series.keys().filter(common).find(|t| t.contains("loss")))
        .or_else(|| a.series.keys().find(common));
    Explanation {
        names: (a.name.clone(), b.name.clone()),
        config: texts(&a.resolved, &b.resolved),
        graph: texts(&a.graph, &b.graph),
        parting: tag.map(|t| part(t, &a.series[t], &b.series[t])),
        finals,
        layers,
    }
}

fn is_layer(tag: &str) -> bool {
    ["act/", "grad/", "moe/", "ssm/"]
        .iter()
        .any(|p| tag.starts_with(p))
}

/// By what factor two values differ, whichever way; a sign change or a loss of finiteness counts as infinite.
fn factor(p: &Pair) -> f64 {
    if p.a == p.b || (p.a.is_nan() && p.b.is_nan()) {
        0.0
    } else if p.a * p.b > 0.0 && p.a.is_finite() && p.b.is_finite() {
        (p.a / p.b).ln().abs()
    } else if p.a.abs().max(p.b.abs()) < 1e-9 {
        0.0
    } else {
        f64::INFINITY
    }
}

fn part(tag: &str, a: &Series, b: &Series) -> Parting {
    let mut out = Parting {
        tag: tag.to_owned(),
        n_common: 0,
        first: None,
        visible: None,
    };
    let mut other = b.points().peekable();
    for p in a.points() {
        while other.peek().is_some_and(|q| q.step < p.step) {
            other.next();
        }
        let Some(q) = other.peek().filter(|q| q.step == p.step) else {
            continue;
        };
        out.n_common += 1;
        // Event files hold f32, so that is what both are compared as.
        let same = p.value as f32 == q.value as f32 || (p.value.is_nan() && q.value.is_nan());
        if same {
            continue;
        }
        let here = Some((p.step, p.value, q.value));
        out.first = out.first.or(here);
        let size = p.value.abs().max(q.value.abs());
        let gap = (p.value - q.value).abs();
        if gap.is_nan() || gap > VISIBLE * size {
            out.visible = out.visible.or(here);
        }
    }
    out
}

/// Line difference with some context; empty where the texts are equal.
pub fn diff(a: &str, b: &str) -> Vec<DiffLine> {
    let diff = TextDiff::from_lines(a, b);
    let mut lines = Vec::new();
    for (i, hunk) in diff.grouped_ops(CONTEXT).iter().enumerate() {
        if i > 0 {
            lines.push(DiffLine {
                sign: '…',
                text: String::new(),
            });
        }
        for change in hunk.iter().flat_map(|op| diff.iter_changes(op)) {
            let sign = match change.tag() {
                ChangeTag::Delete => '-',
                ChangeTag::Insert => '+',
                ChangeTag::Equal => ' ',
            };
            lines.push(DiffLine {
                sign,
                text: change.value().trim_end_matches(['\n', '\r']).to_owned(),
            });
        }
    }
    if lines.len() > MAX_DIFF_LINES {
        let rest = lines.len() - MAX_DIFF_LINES;
        lines.truncate(MAX_DIFF_LINES);
        lines.push(DiffLine {
            sign: '…',
            text: format!("{rest} more lines"),
        });
    }
    lines
}

impl Explanation {
    /// As text for a terminal.
    pub fn text(&self) -> String {
        let (a, b) = &self.names;
        let mut out = format!("How {b} (+) differs from {a} (-)\n");
        for (title, lines, file) in [
            ("Configuration", &self.config, "resolved.ron"),
            ("Graph", &self.graph, "graph.txt"),
        ] {
            let _ = writeln!(out, "\n{title}");
            match lines.as_deref() {
                None => {
                    let _ = writeln!(out, "  not compared: {file} is missing in one of them");
                }
                Some([]) => out.push_str("  equal\n"),
                Some(lines) => lines.iter().for_each(|l| {
                    let _ = writeln!(out, "  {} {}", l.sign, l.text);
                }),
            }
        }
        out.push_str("\nCurves\n");
        out.push_str(&match &self.parting {
            None => "  no metric in common\n".to_owned(),
            Some(p) if p.n_common == 0 => format!("  {}: no step in common\n", p.tag),
            Some(p) => match (p.first, p.visible) {
                (None, _) => format!("  {} is equal on all {} common steps\n", p.tag, p.n_common),
                (Some((step, x, y)), visible) => {
                    let mut text = format!(
                        "  {} differs first at step {step}: {} and {}\n",
                        p.tag,
                        number(x),
                        number(y)
                    );
                    match visible {
                        Some((s, x, y)) if s != step => {
                            let _ = writeln!(
                                text,
                                "  by more than 1% first at step {s}: {} and {}",
                                number(x),
                                number(y)
                            );
                        }
                        Some(_) => {}
                        None => text.push_str("  never by more than 1%\n"),
                    }
                    text
                }
            },
        });
        for (title, pairs) in [
            ("Final values", &self.finals),
            ("Layer statistics that differ most", &self.layers),
        ] {
            if pairs.is_empty() {
                continue;
            }
            let _ = writeln!(out, "\n{title}");
            let width = pairs
                .iter()
                .map(|p| p.tag.chars().count())
                .max()
                .unwrap_or(0);
            for p in pairs {
                let _ = writeln!(
                    out,
                    "  {:width$}  {:>10}  {:>10}",
                    p.tag,
                    number(p.a),
                    number(p.b)
                );
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::compare::tests::run;

    #[test]
    fn tells_what_differs_and_where() {
        let mut a = run(
            "a",
            0,
            &[
                ("train/loss", 1.0),
                ("act/l0/max", 2.0),
                ("act/l1/max", 3.0),
                ("grad/x/norm", 1.0),
            ],
        );
        let mut b = run(
            "a",
            0,
            &[
                ("train/loss", 1.0),
                ("act/l0/max", 2.0),
                ("act/l1/max", 9.0),
                ("grad/x/norm", 1.1),
            ],
        );
        let mut curve: Vec<_> = b.series["train/loss"].points().collect();
        curve[7].value *= 1.001;
        curve[12].value = f64::NAN;
        b.series
            .insert("train/loss".into(), curve.into_iter().collect());
        b.resolved = Some(a.resolved.clone().unwrap().replace("seed: 0", "seed: 5"));
        a.graph = Some("x".into());
        let e = explain(&a, &b);
        let parting = e.parting.clone().unwrap();
        assert_eq!(
            (
                parting.n_common,
                parting.first.unwrap().0,
                parting.visible.unwrap().0
            ),
            (20, 7, 12)
        );
        assert_eq!(
            e.layers.iter().map(|p| p.tag.as_str()).collect::<Vec<_>>(),
            ["act/l1/max", "grad/x/norm"]
        );
        let text = e.text();
        for part in [
            "-   seed: 0,",
            "+   seed: 5,",
            "graph.txt is missing",
            "first at step 7",
            "more than 1% first at step 12",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        let same = explain(&a, &a);
        assert!(same.layers.is_empty() && same.text().contains("equal on all 20 common steps"));
    }

    #[test]
    fn long_differences_are_cut() {
        let (a, b) = ("x\n".repeat(500), "y\n".repeat(500));
        assert_eq!(diff(&a, &b).len(), MAX_DIFF_LINES + 1);
        assert!(diff(&a, &a).is_empty());
    }
}
