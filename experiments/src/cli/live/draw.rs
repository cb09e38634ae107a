//! The picture of a [`Board`]: list of members, chart and facts of the one looked at, messages, keys.
//!
//! Every part gives way where the terminal is small: first the messages, then the chart, then columns, the least needed first.

use super::board::{Board, Row, State};
use super::usage::Usage;
use crate::cli::progress::clock;
use crate::cli::{human, human_bytes};
use crate::record::Series;
use crate::report::table::{shorten, wrap};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Borders, Chart, Dataset, GraphType, Paragraph};
use unicode_width::UnicodeWidthStr;

/// Rows of the chart and its frame.
const CHART_ROWS: u16 = 14;
/// Fewer rows than this show no chart.
const MIN_CHART_ROWS: u16 = 7;
/// Columns of the facts beside the chart.
const FACTS_COLUMNS: u16 = 38;
/// Messages shown.
const MESSAGE_ROWS: u16 = 4;
/// Members that come before the chart where there is little room.
const MIN_LIST_ROWS: u16 = 5;

/// What the picture shows beside the board.
pub(super) struct Scene<'a> {
    /// Seconds since the view was opened.
    pub(super) now: f64,
    /// The user asked to stop.
    pub(super) stopping: bool,
    /// What the process uses.
    pub(super) usage: &'a Usage,
    /// Whether colours may be used.
    pub(super) colour: bool,
}

impl Scene<'_> {
    fn ink(&self, colour: Color) -> Style {
        if self.colour {
            Style::new().fg(colour)
        } else {
            Style::new()
        }
    }

    fn soft(&self) -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }

    fn state(&self, state: State) -> Style {
        match state {
            State::Running => self.ink(Color::Cyan),
            State::Waiting | State::Halved => self.soft(),
            State::Interrupted | State::Paused => self.ink(Color::Yellow),
            State::Failed => self.ink(Color::Red),
            State::Done => self.ink(Color::Green),
        }
    }
}

fn glyph(state: State) -> &'static str {
    match state {
        State::Running => "▶",
        State::Waiting => "·",
        State::Interrupted | State::Paused => "‖",
        State::Halved => "½",
        State::Failed => "✗",
        State::Done => "✓",
    }
}

/// Draws the board into the whole frame.
pub(super) fn draw(frame: &mut Frame<'_>, board: &mut Board, scene: &Scene<'_>) {
    let area = frame.area();
    if area.width == 0 || area.height == 0 {
        return;
    }
    // Title, bar, head of the list, keys.
    let fixed = 4;
    let room = area.height.saturating_sub(fixed);
    let wanted = u16::try_from(board.rows.len()).unwrap_or(u16::MAX);
    let messages = match u16::try_from(board.messages.len()).unwrap_or(MESSAGE_ROWS) {
        0 => 0,
        n if room >= MIN_LIST_ROWS + CHART_ROWS + 1 + MESSAGE_ROWS => 1 + n.min(MESSAGE_ROWS),
        _ => 0,
    };
    let spare = room.saturating_sub(messages);
    let chart =
        spare.saturating_sub(wanted.min(MIN_LIST_ROWS.max(spare.saturating_sub(CHART_ROWS))));
    let chart = if chart >= MIN_CHART_ROWS && !board.rows.is_empty() {
        chart
    } else {
        0
    };
    let [title, bar, head, list, chart, messages, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(spare - chart),
        Constraint::Length(chart),
        Constraint::Length(messages),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(title_line(board, scene, title.width), title);
    frame.render_widget(bar_line(board, scene, bar.width), bar);
    members(frame, head, list, board, scene);
    if chart.height > 0 {
        selected(frame, chart, board, scene);
    }
    if messages.height > 0 {
        let n = usize::from(messages.height - 1);
        let skip = board.messages.len().saturating_sub(n);
        let width = usize::from(messages.width);
        let lines = board.messages.iter().skip(skip);
        let lines: Vec<Line> = lines.map(|m| Line::from(cut(m, width))).collect();
        let block = Block::new()
            .borders(Borders::TOP)
            .border_style(scene.soft());
        frame.render_widget(Paragraph::new(lines).block(block), messages);
    }
    frame.render_widget(keys_line(board, scene, keys.width), keys);
}

/// Two texts, one at either end of a line of `width` columns: the right one is the first of `right` for which there is room.
fn ends(left: Vec<Span<'static>>, right: &[String], width: u16, style: Style) -> Line<'static> {
    let used: usize = left.iter().map(|s| s.content.width()).sum();
    let mut line = left;
    let free = usize::from(width).saturating_sub(used);
    if let Some(right) = right.iter().find(|r| free > r.width() + 1) {
        line.push(Span::raw(" ".repeat(free - right.width())));
        line.push(Span::styled(right.clone(), style));
    }
    Line::from(line)
}

fn title_line(board: &Board, scene: &Scene<'_>, width: u16) -> Line<'static> {
    let title = cut(&board.title, usize::from(width / 2));
    let states = [
        State::Done,
        State::Running,
        State::Failed,
        State::Halved,
        State::Paused,
        State::Interrupted,
        State::Waiting,
    ];
    let counts = || {
        states
            .iter()
            .map(|s| (*s, board.count(*s)))
            .filter(|(_, n)| *n > 0)
    };
    let words: Vec<(State, String)> = counts()
        .map(|(s, n)| (s, format!("{n} {}", s.word())))
        .collect();
    let long: usize = words.iter().map(|(_, w)| w.width() + 2).sum();
    let parts = if title.width() + long <= usize::from(width) {
        words
    } else {
        counts()
            .map(|(s, n)| (s, format!("{}{n}", glyph(s))))
            .collect()
    };
    let mut left = vec![Span::styled(
        title,
        Style::new().add_modifier(Modifier::BOLD),
    )];
    for (state, text) in parts {
        left.push(Span::raw("  "));
        left.push(Span::styled(text, scene.state(state)));
    }
    let now = clock(scene.now);
    let right = match board.left(scene.now).map(clock) {
        Some(secs) => vec![format!("{now}, about {secs} left"), format!("{secs} left")],
        None => vec![now],
    };
    ends(left, &right, width, Style::new())
}

fn bar_line(board: &Board, scene: &Scene<'_>, width: u16) -> Line<'static> {
    let percent = format!(" {:3.0}%", 100.0 * board.share());
    let room = usize::from(width).saturating_sub(percent.len());
    let (full, rest) = bar(board.share(), room);
    Line::from(vec![
        Span::styled(full, scene.ink(Color::Cyan)),
        Span::styled(rest, scene.soft()),
        Span::raw(percent),
    ])
}

/// A bar of `width` cells: its full and its empty part.
fn bar(share: f64, width: usize) -> (String, String) {
    let full = ((share.clamp(0.0, 1.0) * width as f64).floor() as usize).min(width);
    ("━".repeat(full), "─".repeat(width - full))
}

fn keys_line(board: &Board, scene: &Scene<'_>, width: u16) -> Line<'static> {
    if scene.stopping {
        let text = "stopping: every running member finishes its step and writes a checkpoint; q again stops at once";
        return Line::styled(cut(text, usize::from(width)), scene.ink(Color::Yellow));
    }
    let chart = if board.show_evals {
        "loss"
    } else {
        board.metric.as_str()
    };
    let keys = [
        ("q", "stop".to_owned()),
        ("↑↓", "select".to_owned()),
        ("e", chart.to_owned()),
        (
            "l",
            if board.log_axis { "linear" } else { "log" }.to_owned(),
        ),
        ("s", format!("order: {}", board.order.word())),
    ];
    let mut left = Vec::new();
    let mut used = 0;
    for (key, what) in keys {
        used += key.width() + what.width() + 3;
        if used > usize::from(width) {
            break;
        }
        left.push(Span::styled(key, Style::new().add_modifier(Modifier::BOLD)));
        left.push(Span::styled(format!(" {what}  "), scene.soft()));
    }
    ends(left, &[scene.usage.text()], width, scene.soft())
}

/// A column of the list.
struct Column {
    head: String,
    width: usize,
    right: bool,
    /// Where the list is too wide the largest goes first; 0 stays.
    drop: u8,
    cell: fn(&Row, f64) -> String,
}

/// A loss or metric in seven columns.
fn figure(v: Option<f64>) -> String {
    match v {
        None => String::new(),
        Some(v) if v.is_finite() && v.abs() < 1e4 => format!("{v:.4}"),
        Some(v) if v.is_finite() => format!("{v:.1e}"),
        Some(v) => format!("{v}"),
    }
}

/// Place of the name among the columns.
const NAME: usize = 0;
/// Cells of a member's bar.
const MIN_BAR: usize = 8;
const MAX_BAR: usize = 40;

fn columns(board: &Board, width: usize) -> Vec<Column> {
    let column = |head: &str, width: usize, right, drop, cell| Column {
        head: head.to_owned(),
        width: width.max(head.width()),
        right,
        drop,
        cell,
    };
    let names = board.rows.iter().map(|r| r.name.width()).max();
    let steps = board.rows.iter().map(|r| r.steps.to_string().len()).max();
    let mut columns = vec![
        column("member", names.unwrap_or(0), false, 0, |r, _| {
            r.name.clone()
        }),
        column("state", 7, false, 3, |r, _| r.state.word().to_owned()),
        column("", MIN_BAR, false, 1, |_, _| String::new()),
        column(
            "step",
            2 * steps.unwrap_or(1) + 1,
            true,
            5,
            |r, _| match r.steps {
                0 => String::new(),
                n => format!("{}/{n}", r.step),
            },
        ),
        column("loss", 8, true, 0, |r, _| figure(r.loss)),
        column(&cut(&board.metric, 16), 8, true, 0, |r, _| figure(r.score)),
        column("tokens/s", 8, true, 4, |r, _| match (&r.log, r.state) {
            (Some(l), State::Running) => human(l.tokens_per_sec),
            _ => String::new(),
        }),
        column("left", 7, true, 2, |r, now| {
            r.left(now).map(clock).unwrap_or_default()
        }),
    ];
    // Two columns for the glyph, two between columns.
    let total = |c: &[Column]| 2 + c.iter().map(|c| c.width + 2).sum::<usize>() - 2;
    loop {
        let excess = total(&columns).saturating_sub(width);
        let shortest = columns[NAME].width.min(18);
        if excess == 0 {
            // What is free goes to the bar.
            let free = width - total(&columns);
            if let Some(bar) = columns.iter_mut().find(|c| c.head.is_empty()) {
                bar.width += free.min(MAX_BAR - MIN_BAR);
            }
            break;
        }
        if columns[NAME].width - shortest >= excess {
            columns[NAME].width -= excess;
            break;
        }
        let Some(at) = (0..columns.len())
            .filter(|i| columns[*i].drop > 0)
            .max_by_key(|i| columns[*i].drop)
        else {
            columns[NAME].width = columns[NAME].width.saturating_sub(excess).max(4);
            break;
        };
        columns.remove(at);
    }
    columns
}

fn members(frame: &mut Frame<'_>, head: Rect, list: Rect, board: &mut Board, scene: &Scene<'_>) {
    let columns = columns(board, usize::from(list.width));
    let mut heads = vec![Span::raw("  ")];
    for c in &columns {
        heads.push(Span::styled(
            pad(&c.head, c.width, c.right) + "  ",
            scene.soft(),
        ));
    }
    frame.render_widget(Line::from(heads), head);
    let listed = board.listed();
    board.page = usize::from(list.height).max(1);
    let at = listed
        .iter()
        .position(|i| *i == board.selected)
        .unwrap_or(0);
    let last = listed.len().saturating_sub(board.page);
    board.top = board
        .top
        .min(at)
        .max((at + 1).saturating_sub(board.page))
        .min(last);
    let mut lines = Vec::new();
    for i in listed.iter().skip(board.top).take(board.page) {
        let row = &board.rows[*i];
        let style = scene.state(row.state);
        let mut spans = vec![Span::styled(format!("{} ", glyph(row.state)), style)];
        for c in &columns {
            if c.head.is_empty() {
                let (full, rest) = bar(row.share(), c.width);
                spans.push(Span::styled(full, style));
                spans.push(Span::styled(rest, scene.soft()));
                spans.push(Span::raw("  "));
                continue;
            }
            let text = pad(&(c.cell)(row, scene.now), c.width, c.right) + "  ";
            let plain = c.head != "state" && row.state != State::Waiting;
            spans.push(if plain {
                Span::raw(text)
            } else {
                Span::styled(text, style)
            });
        }
        let mut line = Line::from(spans);
        if *i == board.selected {
            line = line.patch_style(Style::new().add_modifier(Modifier::REVERSED));
        }
        lines.push(line);
    }
    frame.render_widget(Paragraph::new(lines), list);
}

/// The member looked at: its chart, and beside it, where there is room, what is known of it.
fn selected(frame: &mut Frame<'_>, area: Rect, board: &Board, scene: &Scene<'_>) {
    let Some(row) = board.rows.get(board.selected) else {
        return;
    };
    let beside = if area.width >= 100 { FACTS_COLUMNS } else { 0 };
    let [left, right] =
        Layout::horizontal([Constraint::Min(1), Constraint::Length(beside)]).areas(area);
    let (what, series) = if board.show_evals {
        (board.metric.as_str(), &row.evals)
    } else {
        ("loss", &row.losses)
    };
    chart(frame, left, what, row, series, board.log_axis, scene);
    if beside > 0 {
        let block = Block::new()
            .borders(Borders::ALL)
            .border_style(scene.soft());
        let lines = facts(row, usize::from(beside - 2));
        frame.render_widget(Paragraph::new(lines).block(block), right);
    }
}

fn chart(
    frame: &mut Frame<'_>,
    area: Rect,
    what: &str,
    row: &Row,
    series: &Series,
    log: bool,
    scene: &Scene<'_>,
) {
    let title = format!(" {} of {} ", what, row.name);
    let block = Block::new()
        .borders(Borders::ALL)
        .border_style(scene.soft())
        .title(Span::raw(cut(
            &title,
            usize::from(area.width.saturating_sub(2)),
        )));
    let points = means(series, 2 * usize::from(area.width), log);
    let (Some(first), Some(last)) = (points.first(), points.last()) else {
        let text = match row.state {
            State::Done => "made before this view was opened",
            _ if row.why.is_some() => "it failed before its first value",
            _ => "no value yet",
        };
        frame.render_widget(
            Paragraph::new(Line::styled(text, scene.soft())).block(block),
            area,
        );
        return;
    };
    let (low, high) = points
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), p| {
            (l.min(p.1), h.max(p.1))
        });
    let pad = if high > low { 0.02 * (high - low) } else { 0.5 };
    let (y0, y1) = (low - pad, high + pad);
    let (x0, x1) = (first.0, last.0.max(first.0 + 1.0));
    let value = |y: f64| {
        format!(
            "{:>8}",
            figure(Some(if log { 10f64.powf(y) } else { y })).trim()
        )
    };
    let data = Dataset::default()
        .marker(Marker::Braille)
        .graph_type(if points.len() > 1 {
            GraphType::Line
        } else {
            GraphType::Scatter
        })
        .style(scene.ink(Color::Cyan))
        .data(&points);
    let axis = |bounds: [f64; 2], labels: Vec<String>| {
        Axis::default()
            .bounds(bounds)
            .labels(labels)
            .style(scene.soft())
    };
    let middle = 0.5 * (y0 + y1);
    let chart = Chart::new(vec![data])
        .block(block)
        .x_axis(axis(
            [x0, x1],
            vec![format!("step {x0:.0}"), format!("{x1:.0}")],
        ))
        .y_axis(axis([y0, y1], vec![value(y0), value(middle), value(y1)]))
        .legend_position(None);
    frame.render_widget(chart, area);
}

/// The curve in at most `n` points, each the mean of its neighbours; what is not finite is left out, with `log` also what is not
/// above zero.
fn means(series: &Series, n: usize, log: bool) -> Vec<(f64, f64)> {
    let all: Vec<(f64, f64)> = series
        .points()
        .map(|p| (p.step as f64, if log { p.value.log10() } else { p.value }))
        .filter(|p| p.1.is_finite())
        .collect();
    let each = all.len().div_ceil(n.max(1)).max(1);
    let mean = |c: &[(f64, f64)]| {
        let n = c.len() as f64;
        (c[c.len() - 1].0, c.iter().map(|p| p.1).sum::<f64>() / n)
    };
    all.chunks(each).map(mean).collect()
}

fn facts(row: &Row, width: usize) -> Vec<Line<'static>> {
    let mut lines: Vec<String> = Vec::new();
    if let Some(why) = &row.why {
        lines.extend(wrap(why, width, "").lines().map(str::to_owned));
    }
    for (name, value) in &row.scores {
        lines.push(format!("{name:<16} {}", figure(Some(*value))));
    }
    if let Some(log) = &row.log {
        lines.push(format!("{:<16} {:.2e}", "learning rate", log.lr));
        lines.push(format!("{:<16} {:.3}", "gradient norm", log.grad_norm));
        lines.push(format!("{:<16} {}", "tokens/s", human(log.tokens_per_sec)));
    }
    if let Some(f) = &row.facts {
        lines.push(format!(
            "{:<16} {}",
            "parameters",
            human(f.params_total as f64)
        ));
        if f.params_active != f.params_total {
            lines.push(format!(
                "{:<16} {}",
                "active",
                human(f.params_active as f64)
            ));
        }
        lines.push(format!(
            "{:<16} {}",
            "FLOPs/token",
            human(f.flops_per_token)
        ));
        lines.push(format!(
            "{:<16} {}",
            "state",
            human_bytes(f.state_bytes_per_seq)
        ));
        lines.push(format!(
            "{:<16} {}/token",
            "KV cache",
            human_bytes(f.kv_bytes_per_token)
        ));
    }
    lines
        .into_iter()
        .map(|l| Line::from(cut(&l, width)))
        .collect()
}

fn pad(text: &str, width: usize, right: bool) -> String {
    let text = cut(text, width);
    let space = " ".repeat(width.saturating_sub(text.width()));
    if right { space + &text } else { text + &space }
}

/// Cuts to `width` columns. Control characters are left out: they would move the cursor.
fn cut(text: &str, width: usize) -> String {
    let clean: String = text.chars().filter(|c| !c.is_control()).collect();
    match width {
        0 => String::new(),
        width => shorten(&clean, width),
    }
}

#[cfg(test)]
mod tests {
    use super::super::board::tests::board;
    use super::*;
    use crate::sweep::Event;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn picture(board: &mut Board, width: u16, height: u16, stopping: bool) -> Vec<String> {
        let usage = Usage::known(1.9, 310 << 20, Some(24 << 30), 2);
        let scene = Scene {
            now: 40.0,
            stopping,
            usage: &usage,
            colour: true,
        };
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|f| draw(f, board, &scene)).unwrap();
        let cells = terminal
            .backend()
            .buffer()
            .content()
            .chunks(usize::from(width).max(1));
        cells
            .map(|row| row.iter().map(|c| c.symbol()).collect::<String>())
            .collect()
    }

    #[test]
    fn a_wide_terminal_shows_everything() {
        let lines = picture(&mut board(), 120, 40, false);
        let text = lines.join("\n");
        for part in [
            "which mixer recalls  1 done  2 running  1 failed  1 stopped  1 waiting",
            "0:40, about 2:00 left",
            "50%",
            "member",
            "state",
            "step",
            "loss",
            "accuracy",
            "tokens/s",
            "left",
            "▶ attention-seed=0  running",
            "400/800",
            "0.8000",
            "21.34 k",
            "0:40",
            "✗ mamba2-seed=0     failed",
            "loss of attention-seed=0",
            "gradient norm    1.250",
            "parameters       412.67 k",
            "mamba2-seed=0: failed: loss is not finite at step 3",
            "q stop",
            "cpu 1.9 of 2",
            "310.00 MiB of 24.00 GiB",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(
            text.chars().any(|c| ('\u{2801}'..='\u{28ff}').contains(&c)),
            "no curve in\n{text}"
        );
    }

    #[test]
    fn a_narrow_terminal_keeps_what_matters() {
        let lines = picture(&mut board(), 60, 24, false);
        let text = lines.join("\n");
        for part in [
            "▶ attention-seed=0",
            "loss",
            "accuracy",
            "0.8000",
            "left",
            "0:40",
            "✗1",
            "2:00 left",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        for part in ["tokens/s", "400/800", "gradient norm"] {
            assert!(!text.contains(part), "{part} is in\n{text}");
        }
        // No column is cut off at the border.
        assert!(lines[3].trim_end().ends_with("0:40"), "{text}");
    }

    #[test]
    fn no_size_and_no_name_breaks_it() {
        for width in [1, 2, 5, 13, 30, 61, 200] {
            for height in [1, 2, 3, 4, 7, 12, 60] {
                for log in [false, true] {
                    let mut b = board();
                    b.rows[1].name = "日本語\u{1b}[2J\nein sehr langer Name mit größe".into();
                    b.log_axis = log;
                    b.select(1);
                    b.say("");
                    picture(&mut b, width, height, true);
                    b.show_evals = true;
                    let text = picture(&mut b, width, height, false).join("\n");
                    assert!(!text.contains('\u{1b}'));
                }
            }
        }
        let mut empty = Board::new("", "", marimba_dsl::run::Goal::Min, &[]);
        picture(&mut empty, 80, 24, false);
    }

    #[test]
    fn values_that_are_not_finite_are_shown_and_not_drawn() {
        let mut b = board();
        for step in 401..410 {
            b.take(
                0,
                Event::Step {
                    step,
                    loss: f64::NAN,
                },
                41.0,
            );
        }
        let text = picture(&mut b, 120, 40, false).join("\n");
        assert!(text.contains("NaN"), "{text}");
        assert!(
            means(&b.rows[0].losses, 100, false)
                .iter()
                .all(|p| p.1.is_finite())
        );
        assert!(means(&b.rows[0].losses, 100, false).len() <= 100);
    }

    #[test]
    fn the_selected_member_stays_in_sight() {
        let members: Vec<_> = (0..100).map(|i| (format!("member{i:02}"), 10)).collect();
        let mut b = Board::new("s", "loss", marimba_dsl::run::Goal::Min, &members);
        b.select(73);
        let text = picture(&mut b, 80, 24, false).join("\n");
        assert!(text.contains("member73"), "{text}");
        b.select(-73);
        assert!(
            picture(&mut b, 80, 24, false)
                .join("\n")
                .contains("member00")
        );
        assert!(
            picture(&mut b, 80, 24, true)
                .join("\n")
                .contains("q again stops at once")
        );
    }
}
