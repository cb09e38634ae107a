//! Which kind of RON file a user named: a model, a run or a sweep, told by the fields at its top level.

use marimba_dsl::model::Model;
use marimba_dsl::{Report, Set, Source, Valid, parse_model, parse_run, parse_sweep};
use std::fmt;

/// Kinds of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileKind {
    Model,
    Run,
    Sweep,
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FileKind::Model => "model",
            FileKind::Run => "run",
            FileKind::Sweep => "sweep",
        })
    }
}

/// Fields that only one kind has. A file without any of them is read as a model, whose report then says what is missing.
pub(super) fn kind_of(text: &str) -> FileKind {
    let fields = top_level_fields(text);
    let has = |names: &[&str]| names.iter().any(|n| fields.iter().any(|f| f == n));
    if has(&["base", "points", "axes", "seeds"]) {
        FileKind::Sweep
    } else if has(&["model", "data", "phases", "optimizer", "steps", "schedule"]) {
        FileKind::Run
    } else {
        FileKind::Model
    }
}

/// Checks a file of any kind.
pub(super) fn check_file(source: &Source, sets: &[Set]) -> Result<FileKind, Report> {
    let kind = kind_of(&source.text);
    match kind {
        FileKind::Model => parse_model(source, sets).map(drop),
        FileKind::Run => parse_run(source, sets).map(drop),
        FileKind::Sweep => parse_sweep(source, sets).map(drop),
    }?;
    Ok(kind)
}

/// The model of a model file or of a run file.
pub(super) fn model_of(source: &Source, sets: &[Set]) -> Result<Model, Report> {
    match kind_of(&source.text) {
        FileKind::Run => parse_run(source, sets).map(|r| Valid::into_inner(r).model),
        FileKind::Model | FileKind::Sweep => parse_model(source, sets).map(Valid::into_inner),
    }
}

/// Names followed by a colon at the first level of brackets; comments and strings are skipped.
fn top_level_fields(text: &str) -> Vec<String> {
    let mut fields = Vec::new();
    let (mut depth, mut word) = (0i32, String::new());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '/' if chars.peek() == Some(&'/') => while chars.next().is_some_and(|c| c != '\n') {},
            '/' if chars.peek() == Some(&'*') => {
                let mut last = ' ';
                for c in chars.by_ref() {
                    if last == '*' && c == '/' {
                        break;
                    }
                    last = c;
                }
            }
            '"' => {
                while let Some(c) = chars.next() {
                    match c {
                        '\\' => drop(chars.next()),
                        '"' => break,
                        _ => {}
                    }
                }
            }
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            ':' if depth == 1 => fields.push(std::mem::take(&mut word)),
            c if c.is_alphanumeric() || c == '_' => {
                word.push(c);
                continue;
            }
            c if c.is_whitespace() => continue,
            _ => {}
        }
        word.clear();
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_by_their_fields() {
        assert_eq!(
            kind_of("( d_model: 3, mixers: { \"a\": Attention(steps: 3) } )"),
            FileKind::Model
        );
        assert_eq!(
            kind_of("// base: no\n( model: \"base: x\", /* axes: */ steps : 3 )"),
            FileKind::Run
        );
        assert_eq!(kind_of("(name: \"(\", base: (model: ()))"), FileKind::Sweep);
        assert_eq!(kind_of(""), FileKind::Model);
    }
}
