//! The pictures of the report that need no script: learning curves with bands, and the small dot plots of the table.
//!
//! Colours are CSS variables of the page (`--c0` and on), so one picture serves light and dark.

use std::fmt::Write;

use super::compare::{Comparison, Group, Member};
use super::load::RunData;
use super::units::number;
use crate::record::Series;

/// Colours of the page; further groups use them again with another dash.
pub(super) const N_COLOURS: usize = 7;
const W: f64 = 1000.0;
const H: f64 = 420.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 190.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 40.0;
/// Points of a drawn line.
const GRID: usize = 240;

/// Text for HTML and SVG.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Round numbers that divide `low..=high` into about `n` parts.
pub(super) fn ticks(low: f64, high: f64, n: usize) -> Vec<f64> {
    let span = high - low;
    if !(span > 0.0 && span.is_finite()) {
        return vec![low];
    }
    let raw = span / n as f64;
    let unit = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0]
        .map(|m| m * unit)
        .into_iter()
        .find(|s| *s >= raw)
        .unwrap_or(raw);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

/// The value of a curve at `x` by linear interpolation; `None` outside of it or next to a value that is not finite.
fn at(points: &[(f64, f64)], x: f64) -> Option<f64> {
    let right = points.partition_point(|p| p.0 < x);
    let (x1, y1) = *points.get(right)?;
    if x1 == x {
        return Some(y1);
    }
    let (x0, y0) = *points.get(right.checked_sub(1)?)?;
    Some(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
}

struct Line {
    name: String,
    colour: usize,
    /// x, mean, standard deviation.
    points: Vec<(f64, f64, f64)>,
}

fn line(colour: usize, group: &Group, runs: &[RunData], tag: &str) -> Line {
    let finite = |s: &Series| -> Vec<(f64, f64)> {
        s.points()
            .filter(|p| p.value.is_finite())
            .map(|p| (p.step as f64, p.value))
            .collect()
    };
    let curves: Vec<Vec<(f64, f64)>> = runs
        .iter()
        .filter(|r| r.group == group.name)
        .filter_map(|r| r.series.get(tag).map(finite))
        .filter(|c| !c.is_empty())
        .collect();
    let mut xs: Vec<f64> = curves.iter().flatten().map(|p| p.0).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    if xs.len() > GRID {
        let (low, high) = (xs[0], xs[xs.len() - 1]);
        xs = (0..GRID)
            .map(|i| low + (high - low) * i as f64 / (GRID - 1) as f64)
            .collect();
    }
    let mut points = Vec::with_capacity(xs.len());
    for x in xs {
        let ys: Vec<f64> = curves.iter().filter_map(|c| at(c, x)).collect();
        let n = ys.len() as f64;
        let mean = ys.iter().sum::<f64>() / n;
        let sd = if ys.len() > 1 {
            (ys.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt()
        } else {
            0.0
        };
        if mean.is_finite() {
            points.push((x, mean, sd));
        }
    }
    Line {
        name: group.name.clone(),
        colour,
        points,
    }
}

/// Learning curves of `tag`: the mean of each group over its seeds, with a band of one standard deviation. Empty where
/// no run has the metric.
pub(super) fn curves(c: &Comparison, runs: &[RunData], tag: &str) -> String {
    let lines: Vec<Line> = c
        .groups
        .iter()
        .enumerate()
        .map(|(i, g)| line(i, g, runs, tag))
        .filter(|l| !l.points.is_empty())
        .collect();
    let all = || lines.iter().flat_map(|l| &l.points);
    if all().next().is_none() {
        return String::new();
    }
    let (x0, x1) = all().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), p| {
        (a.min(p.0), b.max(p.0))
    });
    let (mut y0, mut y1) = all().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), p| {
        (a.min(p.1 - p.2), b.max(p.1 + p.2))
    });
    if y1 - y0 < 1e-12 * y1.abs().max(1e-300) {
        (y0, y1) = (y0 - 0.5, y1 + 0.5);
    }
    let pad = 0.04 * (y1 - y0);
    (y0, y1) = (y0 - pad, y1 + pad);
    let px = |x: f64| LEFT + (x - x0) / (x1 - x0).max(1e-300) * (W - LEFT - RIGHT);
    let py = |y: f64| H - BOTTOM - (y - y0) / (y1 - y0) * (H - TOP - BOTTOM);

    let mut s = format!(
        "<svg viewBox=\"0 0 {W} {H}\" role=\"img\" aria-label=\"{} over training steps\" class=\"chart\">",
        escape(tag)
    );
    for y in ticks(y0, y1, 5) {
        let _ = write!(
            s,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" class=\"grid\"/>",
            W - RIGHT,
            y = py(y)
        );
        let _ = write!(
            s,
            "<text x=\"{:.1}\" y=\"{:.1}\" class=\"tick\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            py(y) + 4.0,
            tick(y)
        );
    }
    for x in ticks(x0, x1, 7) {
        let _ = write!(
            s,
            "<text x=\"{:.1}\" y=\"{:.1}\" class=\"tick\" text-anchor=\"middle\">{}</text>",
            px(x),
            H - BOTTOM + 18.0,
            tick(x)
        );
    }
    let _ = write!(
        s,
        "<text x=\"{:.1}\" y=\"{:.1}\" class=\"axis\" text-anchor=\"middle\">step</text>",
        0.5 * (LEFT + W - RIGHT),
        H - 4.0
    );
    for l in &lines {
        let colour = l.colour % N_COLOURS;
        if l.points.iter().any(|p| p.2 > 0.0) {
            let up = l
                .points
                .iter()
                .map(|p| format!("{:.1},{:.1}", px(p.0), py(p.1 + p.2)));
            let down = l
                .points
                .iter()
                .rev()
                .map(|p| format!("{:.1},{:.1}", px(p.0), py(p.1 - p.2)));
            let outline: Vec<String> = up.chain(down).collect();
            let _ = write!(
                s,
                "<polygon points=\"{}\" fill=\"var(--c{colour})\" class=\"band\"/>",
                outline.join(" ")
            );
        }
        let path: Vec<String> = l
            .points
            .iter()
            .map(|p| format!("{:.1},{:.1}", px(p.0), py(p.1)))
            .collect();
        let _ = write!(
            s,
            "<polyline points=\"{}\" stroke=\"var(--c{colour})\" stroke-dasharray=\"{}\" class=\"line\"/>",
            path.join(" "),
            dash(l.colour)
        );
    }
    let mut labels: Vec<(f64, &Line)> = lines
        .iter()
        .map(|l| (py(l.points[l.points.len() - 1].1), l))
        .collect();
    labels.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut ys: Vec<f64> = labels.iter().map(|l| l.0).collect();
    spread(&mut ys, 16.0, TOP + 6.0, H - BOTTOM);
    for ((_, l), y) in labels.iter().zip(ys) {
        let _ = write!(
            s,
            "<text x=\"{:.1}\" y=\"{:.1}\" class=\"label\" fill=\"var(--c{})\">{}</text>",
            W - RIGHT + 8.0,
            y + 4.0,
            l.colour % N_COLOURS,
            escape(&short(&l.name, 26))
        );
    }
    s.push_str("</svg>");
    s
}

/// Dash pattern of a group: solid for the first round of colours.
fn dash(index: usize) -> &'static str {
    ["none", "6 4", "2 3", "8 3 2 3"][(index / N_COLOURS) % 4]
}

/// Moves rising positions apart until neighbours are `gap` away from each other, inside `low..=high` where there is room.
fn spread(ys: &mut [f64], gap: f64, low: f64, high: f64) {
    let mut floor = low;
    for y in ys.iter_mut() {
        *y = y.max(floor);
        floor = *y + gap;
    }
    let mut ceiling = high;
    for y in ys.iter_mut().rev() {
        *y = y.min(ceiling);
        ceiling = *y - gap;
    }
}

fn short(text: &str, max: usize) -> String {
    if text.chars().count() <= max {
        text.to_owned()
    } else {
        text.chars().take(max - 1).chain(['…']).collect()
    }
}

fn tick(v: f64) -> String {
    let v = if v.abs() < 1e-12 { 0.0 } else { v };
    if v.fract() == 0.0 && v.abs() < 1e5 {
        return format!("{v}");
    }
    if v.abs() >= 1e5 {
        return super::units::count(v);
    }
    let text = number(v);
    if text.contains('.') && !text.contains('e') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// A small dot plot: one dot a seed and a bar at the mean, on the scale `low..=high`.
pub(super) fn dots(
    group: &Group,
    colour: usize,
    members: &[Member],
    metric: &str,
    low: f64,
    high: f64,
) -> String {
    const DW: f64 = 120.0;
    let x = |v: f64| {
        5.0 + if high > low {
            (v - low) / (high - low)
        } else {
            0.5
        } * (DW - 10.0)
    };
    let mut s = format!(
        "<svg viewBox=\"0 0 {DW} 16\" class=\"dots\" aria-hidden=\"true\"><line x1=\"5\" x2=\"{}\" y1=\"8\" y2=\"8\" class=\"grid\"/>",
        DW - 5.0
    );
    for v in members
        .iter()
        .filter(|m| m.group == group.name)
        .filter_map(|m| m.finals.get(metric))
    {
        let _ = write!(
            s,
            "<circle cx=\"{:.1}\" cy=\"8\" r=\"3.6\" fill=\"var(--c{})\" fill-opacity=\".55\"/>",
            x(*v),
            colour % N_COLOURS
        );
    }
    if let Some(mean) = group.metrics.get(metric).and_then(|e| e.mean) {
        let _ = write!(
            s,
            "<rect x=\"{:.1}\" y=\"1\" width=\"2\" height=\"14\" rx=\"1\" fill=\"var(--c{})\"/>",
            x(mean) - 1.0,
            colour % N_COLOURS
        );
    }
    s.push_str("</svg>");
    s
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(
            ticks(0.0, 1.0, 5),
            [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
        );
        assert_eq!(ticks(3.0, 3.0, 5), [3.0]);
        assert_eq!(ticks(-120.0, 730.0, 4), [0.0, 250.0, 500.0]);
        assert!(ticks(f64::NAN, 1.0, 5).len() == 1);
    }

    #[test]
    fn labels_move_apart_and_stay_inside() {
        let mut ys = [10.0, 11.0, 95.0, 99.0];
        spread(&mut ys, 10.0, 0.0, 100.0);
        assert_eq!(ys, [10.0, 20.0, 90.0, 100.0]);
    }

    #[test]
    fn interpolates_inside_only() {
        let c = [(0.0, 0.0), (10.0, 1.0)];
        assert_eq!(
            [at(&c, 5.0), at(&c, 10.0), at(&c, 11.0), at(&c, -1.0)],
            [Some(0.5), Some(1.0), None, None]
        );
    }
}
