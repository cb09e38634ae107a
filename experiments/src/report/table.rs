//! A comparison for the terminal and as CSV.

use std::collections::BTreeSet;
use std::fmt::Write;

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::compare::{Comparison, Group};
use super::units::{bytes, count, interval, mean_sd};
use super::verdict::p_words;

/// Narrowest terminal that is laid out for.
const MIN_WIDTH: usize = 40;
/// The name column is shortened no further than this.
const MIN_NAME: usize = 12;

struct Column {
    head: String,
    cells: Vec<String>,
    right: bool,
    /// When the table is too wide the largest goes first; 0 stays.
    drop: u32,
}

impl Column {
    fn width(&self) -> usize {
        self.cells
            .iter()
            .map(|c| c.width())
            .chain([self.head.width()])
            .max()
            .unwrap_or(0)
    }
}

/// The comparison as text for a terminal of `width` columns: verdict, table, notes.
pub fn terminal(c: &Comparison, width: usize) -> String {
    let width = width.max(MIN_WIDTH);
    let mut out = String::new();
    let _ = writeln!(out, "{}", c.title);
    if let Some(question) = &c.question {
        out.push_str(&wrap(question, width, ""));
    }
    out.push('\n');
    let dropped = table(c, width, &mut out);
    out.push('\n');
    for sentence in &c.verdict {
        out.push_str(&wrap(sentence, width, ""));
    }
    if !dropped.is_empty() {
        out.push_str(&wrap(
            &format!("Not shown for want of width: {}.", dropped.join(", ")),
            width,
            "",
        ));
    }
    if let (Some(metric), false) = (&c.metric, c.laws.is_empty()) {
        out.push_str("\nScaling laws\n");
        c.laws
            .iter()
            .for_each(|law| out.push_str(&wrap(&law.words(metric), width, "  ")));
    }
    if !c.notes.is_empty() {
        out.push_str("\nNotes\n");
        c.notes
            .iter()
            .for_each(|note| out.push_str(&wrap(note, width, "  ")));
    }
    out
}

fn table(c: &Comparison, width: usize, out: &mut String) -> Vec<String> {
    let column = |head: &str, right, drop, cell: &dyn Fn(&Group) -> String| Column {
        head: head.to_owned(),
        cells: c.groups.iter().map(cell).collect(),
        right,
        drop,
    };
    let or_dash = |v: Option<String>| v.unwrap_or_else(|| "–".to_owned());
    let mut columns = vec![
        column("configuration", false, 0, &|g| g.name.clone()),
        column("seeds", true, 3, &|g| {
            if g.n_finished == g.n_members {
                g.n_members.to_string()
            } else {
                format!("{}/{}", g.n_finished, g.n_members)
            }
        }),
    ];
    for (i, metric) in c.metrics.iter().enumerate() {
        columns.push(column(
            metric,
            true,
            if i == 0 { 0 } else { 20 + i as u32 },
            &|g| {
                or_dash(
                    g.metrics
                        .get(metric)
                        .and_then(|e| Some(mean_sd(e.mean?, e.sd))),
                )
            },
        ));
        if i == 0 {
            columns.push(column("95% interval", true, 3, &|g| {
                or_dash(g.metrics.get(metric).and_then(|e| e.ci95).map(interval))
            }));
        }
    }
    columns.push(column("params", true, 5, &|g| {
        or_dash(g.params_total.map(|v| count(v as f64)))
    }));
    columns.push(column("active", true, 7, &|g| {
        or_dash(g.params_active.map(|v| count(v as f64)))
    }));
    columns.push(column("decode state", true, 4, &|g| {
        or_dash(g.decode_bytes.map(|v| bytes(v as f64)))
    }));
    if let Some(hold) = &c.hold {
        columns.push(column(
            &format!("off {}", hold.quantity.name()),
            true,
            8,
            &|g| or_dash(g.residual.map(percent)),
        ));
    }
    columns.push(column("tokens/s", true, 6, &|g| {
        or_dash(g.tokens_per_sec.mean.map(count))
    }));
    if let Some(reference) = c
        .reference
        .as_ref()
        .filter(|_| c.groups.iter().any(|g| g.test.is_some()))
    {
        columns.push(column("against the best", false, 2, &|g| match &g.test {
            None => "(reference)".to_owned(),
            Some(t) => match t.p_adjusted {
                Some(p) => format!("{}, {}", t.verdict.words(), p_words(p)),
                None => t.verdict.words().to_owned(),
            },
        }));
        if c.groups.first().is_some_and(|g| &g.name != reference)
            && let Some(last) = columns.last_mut()
        {
            last.head = format!("against {reference}");
        }
    }
    // A column of nothing but dashes says nothing.
    columns.retain(|c| c.drop == 0 || c.cells.iter().any(|cell| cell != "–"));
    let total = |columns: &[Column]| {
        columns
            .iter()
            .map(|c| c.width() + 2)
            .sum::<usize>()
            .saturating_sub(2)
    };
    let mut dropped = Vec::new();
    loop {
        let excess = total(&columns).saturating_sub(width);
        let name = columns[0].width();
        if excess == 0 {
            break;
        }
        let room = name.saturating_sub(excess);
        let short: Vec<String> = columns[0]
            .cells
            .iter()
            .map(|cell| shorten(cell, room))
            .collect();
        let distinct = |cells: &[String]| cells.iter().collect::<BTreeSet<_>>().len();
        // A name that could be another's says less than a column left out.
        if room >= MIN_NAME.max(name / 2) && distinct(&short) == distinct(&columns[0].cells) {
            columns[0].cells = short;
            columns[0].head = shorten(&columns[0].head, room);
            break;
        }
        let Some(at) = (0..columns.len())
            .filter(|i| columns[*i].drop > 0)
            .max_by_key(|i| columns[*i].drop)
        else {
            columns[0]
                .cells
                .iter_mut()
                .for_each(|cell| *cell = shorten(cell, MIN_NAME));
            columns[0].head = shorten(&columns[0].head, MIN_NAME);
            break;
        };
        dropped.push(columns.remove(at).head);
    }
    let widths: Vec<usize> = columns.iter().map(Column::width).collect();
    let mut line = |cells: Vec<&str>| {
        let mut text = String::new();
        for ((cell, column), width) in cells.iter().zip(&columns).zip(&widths) {
            let pad = " ".repeat(width.saturating_sub(cell.width()));
            if column.right {
                text.push_str(&pad);
            }
            text.push_str(cell);
            if !column.right {
                text.push_str(&pad);
            }
            text.push_str("  ");
        }
        let _ = writeln!(out, "{}", text.trim_end());
    };
    line(columns.iter().map(|c| c.head.as_str()).collect());
    let rules: Vec<String> = widths.iter().map(|w| "─".repeat(*w)).collect();
    line(rules.iter().map(String::as_str).collect());
    for row in 0..c.groups.len() {
        line(columns.iter().map(|c| c.cells[row].as_str()).collect());
    }
    dropped
}

/// `+1.25%`.
pub fn percent(x: f64) -> String {
    format!("{:+.2}%", 100.0 * x)
}

/// Cuts `text` to `width` columns by an ellipsis in the middle: names of a sweep often differ only at their end.
pub(crate) fn shorten(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let room = width.saturating_sub(1);
    let take = |chars: &mut dyn Iterator<Item = char>, room: usize| -> Vec<char> {
        let mut used = 0;
        chars
            .take_while(|c| {
                used += c.width().unwrap_or(0);
                used <= room
            })
            .collect()
    };
    let head = take(&mut text.chars(), room.div_ceil(2));
    let tail = take(&mut text.chars().rev(), room / 2);
    head.into_iter()
        .chain(['…'])
        .chain(tail.into_iter().rev())
        .collect()
}

/// Breaks `text` at spaces into lines of `width` columns, the further ones indented by two.
pub(crate) fn wrap(text: &str, width: usize, indent: &str) -> String {
    let mut out = String::new();
    let mut line = indent.to_owned();
    let mut empty = true;
    for word in text.split_whitespace() {
        if !empty && line.width() + 1 + word.width() > width {
            let _ = writeln!(out, "{line}");
            line = format!("{indent}  ");
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    let _ = writeln!(out, "{line}");
    out
}

/// What the CSV's columns mean, for the help text.
pub const CSV_COLUMNS: &str = "\
group, members, finished, seeds (separated by spaces);
for every metric M: M:mean, M:sd (sample standard deviation over seeds), M:ci95_low, M:ci95_high (interval of the mean by Student's t),
M:n (values behind them);
params_total, params_active (used by one token), state_bytes_per_seq (recurrent state), kv_bytes_per_token, decode_bytes (both at the
training length), flops_per_token (forward), tokens_per_sec (training), held, held_target, held_residual (what a sweep holds equal, and how far off), tokens (seen in training);
reference (the group that this one is tested against), difference (of the means), difference_ci95_low, difference_ci95_high, test
(paired, welch or untested), test_n (pairs, or values on the smaller side), p, p_adjusted (by Holm's method), verdict (by p_adjusted);
axis:A for every setting A of a sweep.";

/// The comparison as CSV (RFC 4180), one line per group, full precision, empty where unknown.
pub fn csv(c: &Comparison) -> String {
    let mut head: Vec<String> = ["group", "members", "finished", "seeds"]
        .map(str::to_owned)
        .into();
    for metric in &c.metrics {
        head.extend(["mean", "sd", "ci95_low", "ci95_high", "n"].map(|s| format!("{metric}:{s}")));
    }
    head.extend(
        [
            "params_total",
            "params_active",
            "state_bytes_per_seq",
            "kv_bytes_per_token",
            "decode_bytes",
            "flops_per_token",
            "tokens_per_sec",
            "held",
            "held_target",
            "held_residual",
            "tokens",
            "reference",
            "difference",
            "difference_ci95_low",
            "difference_ci95_high",
            "test",
            "test_n",
            "p",
            "p_adjusted",
            "verdict",
        ]
        .map(str::to_owned),
    );
    let axes: BTreeSet<&String> = c.groups.iter().flat_map(|g| g.axes.keys()).collect();
    head.extend(axes.iter().map(|a| format!("axis:{a}")));
    let float = |v: Option<f64>| v.map(|v| v.to_string()).unwrap_or_default();
    let int = |v: Option<u64>| v.map(|v| v.to_string()).unwrap_or_default();
    let mut out = String::new();
    let mut line = |cells: Vec<String>| {
        let quoted: Vec<String> = cells.into_iter().map(quote).collect();
        out.push_str(&quoted.join(","));
        out.push_str("\r\n");
    };
    line(head);
    for g in &c.groups {
        let seeds: Vec<String> = g.seeds.iter().map(u64::to_string).collect();
        let mut cells = vec![
            g.name.clone(),
            g.n_members.to_string(),
            g.n_finished.to_string(),
            seeds.join(" "),
        ];
        for metric in &c.metrics {
            let e = g.metrics.get(metric);
            cells.push(float(e.and_then(|e| e.mean)));
            cells.push(float(e.and_then(|e| e.sd)));
            cells.push(float(e.and_then(|e| e.ci95).map(|c| c.0)));
            cells.push(float(e.and_then(|e| e.ci95).map(|c| c.1)));
            cells.push(e.map_or(0, |e| e.n).to_string());
        }
        cells.extend([
            int(g.params_total),
            int(g.params_active),
            int(g.state_bytes_per_seq),
            int(g.kv_bytes_per_token),
            int(g.decode_bytes),
            float(g.flops_per_token),
            float(g.tokens_per_sec.mean),
            c.hold
                .map(|h| h.quantity.name().to_owned())
                .unwrap_or_default(),
            float(c.hold.map(|h| h.target)),
            float(g.residual),
            float(g.tokens),
            c.reference.clone().unwrap_or_default(),
            float(g.test.as_ref().and_then(|t| t.difference)),
            float(g.test.as_ref().and_then(|t| t.ci95).map(|c| c.0)),
            float(g.test.as_ref().and_then(|t| t.ci95).map(|c| c.1)),
            g.test
                .as_ref()
                .map(|t| t.method.word())
                .unwrap_or_default()
                .to_owned(),
            int(g.test.as_ref().map(|t| t.n as u64)),
            float(g.test.as_ref().and_then(|t| t.p)),
            float(g.test.as_ref().and_then(|t| t.p_adjusted)),
            g.test
                .as_ref()
                .map(|t| t.verdict.words())
                .unwrap_or_default()
                .to_owned(),
        ]);
        cells.extend(
            axes.iter()
                .map(|a| g.axes.get(*a).cloned().unwrap_or_default()),
        );
        line(cells);
    }
    out
}

/// What the columns of the scaling laws' CSV mean, for the help text.
pub const LAW_COLUMNS: &str = "\
family (empty where there is one), metric, x (params_active or flops_per_token), floor, factor, exponent (metric = floor + factor x^-exponent),
floor_ci95_low, floor_ci95_high, factor_ci95_low, factor_ci95_high, exponent_ci95_low, exponent_ci95_high (bootstrap), x_low, x_high (sizes
fitted), points, rmse, resamples.";

/// The scaling laws as CSV (RFC 4180), one line per law, full precision; only the head where there is none.
pub fn laws_csv(c: &Comparison) -> String {
    let mut out = String::from(
        "family,metric,x,floor,factor,exponent,floor_ci95_low,floor_ci95_high,factor_ci95_low,factor_ci95_high,exponent_ci95_low,\
         exponent_ci95_high,x_low,x_high,points,rmse,resamples\r\n",
    );
    for l in &c.laws {
        let (law, fit) = (&l.fit.law, &l.fit);
        let mut cells = vec![
            l.family.clone(),
            c.metric.clone().unwrap_or_default(),
            l.cost.column().to_owned(),
        ];
        let mut numbers = vec![law.e, law.a, law.b];
        numbers.extend(fit.ci95.iter().flat_map(|(low, high)| [*low, *high]));
        numbers.extend([l.range.0, l.range.1]);
        cells.extend(numbers.iter().map(f64::to_string));
        cells.extend([
            fit.n.to_string(),
            fit.rmse.to_string(),
            fit.n_resamples.to_string(),
        ]);
        let cells: Vec<String> = cells.into_iter().map(quote).collect();
        let _ = write!(out, "{}\r\n", cells.join(","));
    }
    out
}

pub(crate) fn quote(cell: String) -> String {
    if cell.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", cell.replace('"', "\"\""))
    } else {
        cell
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::compare::tests::{five_by_two, run};
    use crate::report::compare::{Options, compare};

    #[test]
    fn fits_the_terminal_and_says_what_it_dropped() {
        let mut runs = five_by_two();
        runs.push(run(
            "ein sehr langer Name mit größe und 日本語 im Namen",
            0,
            &[("eval/accuracy", 0.1)],
        ));
        let c = compare(&runs, &Options::default());
        for width in [40, 60, 80, 120, 200] {
            let text = terminal(&c, width);
            let rule = text.lines().find(|l| l.starts_with('─')).unwrap();
            assert!(rule.width() <= width, "{width}\n{text}");
            assert!(text.contains("eval/accuracy"), "{text}");
        }
        let narrow = terminal(&c, 60);
        assert!(narrow.contains("Not shown for want of width"), "{narrow}");
        assert!(terminal(&c, 200).contains("ein sehr langer Name mit größe und 日本語 im Namen"));
        assert!(terminal(&compare(&[], &Options::default()), 80).contains("No run"));
    }

    #[test]
    fn names_stay_apart_when_cut() {
        let cut = ["mamba2+attn 1:4", "mamba2+attn 1:4 moe"].map(|name| shorten(name, 12));
        assert_eq!(cut, ["mamba2…n 1:4", "mamba2…4 moe"]);
        assert!(shorten("日本語日本語", 7).width() <= 7);
        assert_eq!(shorten("short", 12), "short");
    }

    #[test]
    fn csv_has_every_number_and_quotes() {
        let mut runs = five_by_two();
        runs[0].group = "a, \"quoted\"".into();
        let text = csv(&compare(&runs, &Options::default()));
        let lines: Vec<&str> = text.split("\r\n").collect();
        assert_eq!(lines.len(), 1 + 4 + 1);
        assert!(text.contains("\"a, \"\"quoted\"\"\""));
        let fields = lines[0].split(',').count();
        assert!(
            lines[2..5]
                .iter()
                .filter(|l| !l.contains('"'))
                .all(|l| l.split(',').count() == fields)
        );
    }
}
