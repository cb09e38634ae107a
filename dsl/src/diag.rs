//! What is wrong with a file, and where: sources, spans, diagnostics and their rendering.
//!
//! A [`Report`] holds every violation that was found, each with its own source, so that a report on a run may speak of the model
//! file it names and of a `--set` argument. Rendering is plain text (stable, for tests and pipes) or miette's (for terminals).

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A text with the name under which errors speak of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Source {
    /// File path as given, or a name such as `--set`.
    pub name: String,
    /// The whole text.
    pub text: String,
    /// Folder against which relative paths inside the text are resolved; `None` is the current folder.
    pub dir: Option<PathBuf>,
}

impl Source {
    /// Reads a file.
    ///
    /// # Errors
    /// `file::unreadable` when it cannot be read or is not UTF-8.
    pub fn read(path: impl AsRef<Path>) -> Result<Source, Report> {
        let path = path.as_ref();
        let fail = |what: String, help: &str| {
            Report::of(Diagnostic {
                code: "file::unreadable",
                message: what,
                at: None,
                label: String::new(),
                help: Some(help.to_owned()),
            })
        };
        let bytes = std::fs::read(path).map_err(|e| {
            fail(
                format!("cannot read `{}`: {e}", path.display()),
                "give the path of a RON file that exists and can be read",
            )
        })?;
        let text = String::from_utf8(bytes).map_err(|e| {
            fail(
                format!(
                    "`{}` is not UTF-8 text: the byte at offset {} is wrong",
                    path.display(),
                    e.utf8_error().valid_up_to()
                ),
                "RON files are UTF-8 text",
            )
        })?;
        Ok(Source {
            name: path.display().to_string(),
            text,
            dir: path.parent().map(Path::to_path_buf),
        })
    }

    /// A text that does not come from a file.
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Source {
        Source {
            name: name.into(),
            text: text.into(),
            dir: None,
        }
    }

    /// Line and column of a byte offset, both from 1, columns in characters.
    pub fn line_col(&self, offset: usize) -> (usize, usize) {
        let mut offset = offset.min(self.text.len());
        while !self.text.is_char_boundary(offset) {
            offset -= 1;
        }
        let before = &self.text[..offset];
        let line = before.matches('\n').count() + 1;
        let start = before.rfind('\n').map_or(0, |i| i + 1);
        (line, before[start..].chars().count() + 1)
    }
}

/// A byte range of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The text.
    pub source: Arc<Source>,
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

impl Span {
    /// The text under the span.
    pub fn text(&self) -> &str {
        &self.source.text[self.start..self.end]
    }
}

/// One violation.
#[derive(Clone, Debug, PartialEq)]
pub struct Diagnostic {
    /// Stable name, such as `model::heads_divide`.
    pub code: &'static str,
    /// What is wrong: lower case, no final full stop.
    pub message: String,
    /// Where; absent when it concerns a whole file that could not be read.
    pub at: Option<Span>,
    /// Written under the underlined text: what was expected.
    pub label: String,
    /// What would be right.
    pub help: Option<String>,
}

impl Diagnostic {
    /// File, line and column of the offending text, as `file:line:column`; empty without a place.
    pub fn place(&self) -> String {
        self.at.as_ref().map_or_else(String::new, |s| {
            let (line, column) = s.source.line_col(s.start);
            format!("{}:{line}:{column}", s.source.name)
        })
    }

    /// The facts for `--json`.
    pub fn fact(&self) -> Fact {
        let (line, column) = self
            .at
            .as_ref()
            .map_or((0, 0), |s| s.source.line_col(s.start));
        let (end_line, end_column) = self
            .at
            .as_ref()
            .map_or((0, 0), |s| s.source.line_col(s.end));
        Fact {
            code: self.code,
            message: self.message.clone(),
            file: self
                .at
                .as_ref()
                .map_or_else(String::new, |s| s.source.name.clone()),
            line,
            column,
            end_line,
            end_column,
            label: self.label.clone(),
            help: self.help.clone(),
        }
    }
}

/// A diagnostic as serialisable facts. Lines and columns count from 1; 0 where there is no place.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Fact {
    /// Stable name.
    pub code: &'static str,
    /// What is wrong.
    pub message: String,
    /// Name of the source.
    pub file: String,
    /// First line.
    pub line: usize,
    /// First column, in characters.
    pub column: usize,
    /// Line of the end.
    pub end_line: usize,
    /// Column one past the end.
    pub end_column: usize,
    /// What was expected.
    pub label: String,
    /// What would be right.
    pub help: Option<String>,
}

/// All violations of a file, in the order in which they stand in it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Never empty in an `Err`.
    pub diagnostics: Vec<Diagnostic>,
}

impl Report {
    /// A report of one.
    pub fn of(d: Diagnostic) -> Report {
        Report {
            diagnostics: vec![d],
        }
    }

    /// The facts of all diagnostics.
    pub fn facts(&self) -> Vec<Fact> {
        self.diagnostics.iter().map(Diagnostic::fact).collect()
    }

    /// Does any diagnostic carry this code?
    pub fn has(&self, code: &str) -> bool {
        self.diagnostics.iter().any(|d| d.code == code)
    }

    /// Orders by source (in order of first mention) and place, and drops repetitions.
    pub(crate) fn sorted(mut self) -> Report {
        let mut names: Vec<String> = Vec::new();
        for s in self.diagnostics.iter().filter_map(|d| d.at.as_ref()) {
            if !names.contains(&s.source.name) {
                names.push(s.source.name.clone());
            }
        }
        self.diagnostics.sort_by_key(|d| {
            d.at.as_ref().map(|s| {
                (
                    names.iter().position(|n| *n == s.source.name),
                    s.start,
                    s.end,
                )
            })
        });
        self.diagnostics.dedup();
        self
    }

    /// Stable plain text: no colour, no box drawing, independent of the terminal.
    pub fn plain(&self) -> String {
        let mut out = String::new();
        for (i, d) in self.diagnostics.iter().enumerate() {
            if i > 0 {
                out.push('\n');
            }
            plain_one(&mut out, d);
        }
        let n = self.diagnostics.len();
        out.push_str(&format!("\n{n} error{}\n", if n == 1 { "" } else { "s" }));
        out
    }

    /// For a terminal of this width, with or without colour.
    pub fn fancy(&self, colour: bool, width: usize) -> String {
        let theme = if colour {
            miette::GraphicalTheme::unicode()
        } else {
            miette::GraphicalTheme::unicode_nocolor()
        };
        let handler = miette::GraphicalReportHandler::new_themed(theme)
            .with_width(width.max(40))
            .with_links(false);
        let mut out = String::new();
        for d in &self.diagnostics {
            // Writing to a String cannot fail.
            let _ = handler.render_report(&mut out, &Shown::new(d));
        }
        out
    }

    /// For standard error: miette's rendering on a terminal, plain text otherwise.
    pub fn for_stderr(&self) -> String {
        use std::io::IsTerminal;
        if std::io::stderr().is_terminal() {
            let colour = std::env::var_os("NO_COLOR").is_none();
            self.fancy(colour, 110)
        } else {
            self.plain()
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.plain().trim_end())
    }
}

impl std::error::Error for Report {}

fn plain_one(out: &mut String, d: &Diagnostic) {
    out.push_str(&format!("error[{}]: {}\n", d.code, d.message));
    let mut pad = String::new();
    if let Some(s) = &d.at {
        let (line, column) = s.source.line_col(s.start);
        let text = s.source.text.lines().nth(line - 1).unwrap_or("");
        let room = text.chars().count().saturating_sub(column - 1).max(1);
        let marked = s
            .source
            .text
            .get(s.start..s.end)
            .map_or(1, |t| t.lines().next().unwrap_or("").chars().count());
        let number = line.to_string();
        pad = " ".repeat(number.len());
        // A tab counts as one column but prints as several: blanks keep the marks under their text.
        let text = text.replace('\t', " ");
        out.push_str(&format!("{pad}--> {}:{line}:{column}\n", s.source.name));
        out.push_str(&format!("{pad} |\n{number} | {}\n", text.trim_end()));
        let marks = "^".repeat(marked.clamp(1, room));
        let line = format!("{pad} | {}{marks} {}", " ".repeat(column - 1), d.label);
        out.push_str(line.trim_end());
        out.push('\n');
    }
    if let Some(help) = &d.help {
        out.push_str(&format!("{pad} = help: {help}\n"));
    }
}

/// A diagnostic as miette wants it.
#[derive(Debug)]
struct Shown {
    diagnostic: Diagnostic,
    source: Option<miette::NamedSource<String>>,
}

impl Shown {
    fn new(d: &Diagnostic) -> Shown {
        let source =
            d.at.as_ref()
                .map(|s| miette::NamedSource::new(&s.source.name, s.source.text.clone()));
        Shown {
            diagnostic: d.clone(),
            source,
        }
    }
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.diagnostic.message)
    }
}

impl std::error::Error for Shown {}

impl miette::Diagnostic for Shown {
    fn code<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        Some(Box::new(self.diagnostic.code))
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.diagnostic
            .help
            .as_ref()
            .map(|h| Box::new(h) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn miette::SourceCode> {
        self.source.as_ref().map(|s| s as &dyn miette::SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = miette::LabeledSpan> + '_>> {
        let s = self.diagnostic.at.as_ref()?;
        let label = Some(self.diagnostic.label.clone()).filter(|l| !l.is_empty());
        let span = miette::LabeledSpan::new(label, s.start, (s.end - s.start).max(1));
        Some(Box::new(std::iter::once(span)))
    }
}

/// The names nearest to a misspelt one, best first; empty when nothing is near.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let mut scored: Vec<(f64, &str)> = known
        .into_iter()
        .map(|k| {
            (
                strsim::jaro_winkler(&name.to_lowercase(), &k.to_lowercase()),
                k,
            )
        })
        .collect();
    scored.retain(|(s, _)| *s > 0.78);
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.into_iter().map(|(_, k)| k).take(3).collect()
}

/// "did you mean `a` or `b`? known: ..." for a misspelt name.
pub(crate) fn suggest<'a>(name: &str, known: &[&'a str]) -> String {
    let near: Vec<&'a str> = nearest(name, known.iter().copied());
    let list = |v: &[&str]| {
        v.iter()
            .map(|k| format!("`{k}`"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    match (near.as_slice(), known) {
        (_, []) => "nothing is allowed here".to_owned(),
        ([], all) => format!("known here: {}", list(all)),
        ([one, ..], all) if all.len() <= 6 => {
            format!("did you mean `{one}`? known here: {}", list(all))
        }
        (some, _) => format!(
            "did you mean {}?",
            some.iter()
                .map(|k| format!("`{k}`"))
                .collect::<Vec<_>>()
                .join(" or ")
        ),
    }
}
