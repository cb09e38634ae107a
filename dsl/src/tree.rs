//! A RON document as a tree in which every node knows its span, and edits on it.
//!
//! `ron` decides what is valid RON; this module only outlines text that `ron` accepted, because neither `ron::Value` (which drops
//! variant names and spans) nor typed deserialisation (which stops at the first error) can serve overrides, files included by name,
//! and reports of all violations at once. Typed reading of the tree is in [`crate::de`].

use crate::diag::{Diagnostic, Source, Span, suggest};
use std::sync::Arc;

/// A value and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) kind: Kind,
    pub(crate) span: Span,
    /// From a `--set` argument: a text field takes it verbatim, quoted or not.
    pub(crate) loose: bool,
}

/// The shapes of RON.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    Unit,
    Bool(bool),
    /// As written; integers and floats are told apart when read.
    Number(String),
    Str(String),
    Char(char),
    /// A bare identifier such as `None` or `Silu`.
    Name(String),
    List(Vec<Node>),
    /// `(a, b)` or `Name(a, b)`.
    Tuple(Option<Ident>, Vec<Node>),
    /// `(a: 1)` or `Name(a: 1)`.
    Struct(Option<Ident>, Vec<Field>),
    Map(Vec<(Node, Node)>),
}

/// An identifier with its place.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ident {
    pub(crate) text: String,
    pub(crate) span: Span,
}

/// `name: value`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Field {
    pub(crate) name: Ident,
    pub(crate) value: Node,
}

/// Hugging Face spellings (left) of our names (right), accepted for any struct field.
const ALIASES: &[(&str, &str)] = &[
    ("hidden_size", "d_model"),
    ("num_hidden_layers", "n_layers"),
    ("num_attention_heads", "n_heads"),
    ("num_key_value_heads", "n_kv_heads"),
    ("max_position_embeddings", "context_len"),
    ("intermediate_size", "d_ff"),
    ("hidden_act", "act"),
    ("rms_norm_eps", "norm_eps"),
    ("rope_theta", "theta"),
    ("partial_rotary_factor", "fraction"),
    ("original_max_position_embeddings", "original_context_len"),
    ("sliding_window", "window"),
    ("attention_bias", "qkv_bias"),
    ("tie_word_embeddings", "tied"),
    ("lm_head_multiplier", "logits_multiplier"),
    ("initializer_range", "std"),
    ("num_experts", "n_experts"),
    ("num_local_experts", "n_experts"),
    ("n_routed_experts", "n_experts"),
    ("num_experts_per_tok", "top_k"),
    ("moe_intermediate_size", "d_ff"),
    ("norm_topk_prob", "normalize"),
    ("n_group", "n_groups"),
    ("topk_group", "top_groups"),
    ("routed_scaling_factor", "scale"),
    ("router_aux_loss_coef", "load_balance"),
    ("state_size", "d_state"),
    ("conv_kernel", "d_conv"),
    ("time_step_rank", "dt_rank"),
    ("use_conv_bias", "conv_bias"),
];

fn canonical(name: &str) -> &str {
    ALIASES
        .iter()
        .find(|(a, _)| *a == name)
        .map_or(name, |(_, ours)| ours)
}

impl Node {
    /// A node of another shape at the same place.
    pub(crate) fn with(&self, kind: Kind) -> Node {
        Node {
            kind,
            span: self.span.clone(),
            loose: self.loose,
        }
    }

    /// What to underline when this node is at fault: a scalar itself, a composite's name or opening bracket.
    pub(crate) fn head(&self) -> Span {
        match &self.kind {
            Kind::Tuple(Some(n), _) | Kind::Struct(Some(n), _) => n.span.clone(),
            Kind::List(_) | Kind::Tuple(None, _) | Kind::Struct(None, _) | Kind::Map(_) => {
                if self.span.text().contains('\n') || self.span.text().len() > 40 {
                    Span {
                        end: self.span.start + 1,
                        ..self.span.clone()
                    }
                } else {
                    self.span.clone()
                }
            }
            _ => self.span.clone(),
        }
    }

    /// As RON text.
    pub(crate) fn text(&self) -> String {
        match &self.kind {
            Kind::Number(n) => n.clone(),
            _ => self.span.text().to_owned(),
        }
    }

    /// In words, for "found ...".
    pub(crate) fn describe(&self) -> String {
        match &self.kind {
            Kind::Unit => "`()`".to_owned(),
            Kind::Bool(b) => format!("`{b}`"),
            Kind::Number(n) => format!("the number {n}"),
            Kind::Str(s) => format!("the text \"{s}\""),
            Kind::Char(c) => format!("the character '{c}'"),
            Kind::Name(n) => format!("`{n}`"),
            Kind::List(_) => "a list".to_owned(),
            Kind::Tuple(None, _) => "a tuple".to_owned(),
            Kind::Struct(None, _) => "a struct `( .. )`".to_owned(),
            Kind::Tuple(Some(n), _) | Kind::Struct(Some(n), _) => format!("`{}(..)`", n.text),
            Kind::Map(_) => "a map".to_owned(),
        }
    }

    fn is_transparent(&self) -> bool {
        matches!(&self.kind, Kind::Tuple(_, items) if transparent(items))
    }

    /// Past all transparent brackets. Always found.
    fn opened(&mut self) -> Option<&mut Node> {
        if !self.is_transparent() {
            return Some(self);
        }
        match &mut self.kind {
            Kind::Tuple(_, items) => items.first_mut()?.opened(),
            _ => None,
        }
    }

    /// Child by field name, map key or list index.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        match &self.kind {
            Kind::Struct(_, fields) => fields.iter().find(|f| f.name.text == key).map(|f| &f.value),
            Kind::Map(entries) => entries.iter().find(|(k, _)| k.key_is(key)).map(|(_, v)| v),
            Kind::Tuple(_, items) if transparent(items) => items[0].get(key),
            Kind::List(items) | Kind::Tuple(_, items) => {
                key.parse::<usize>().ok().and_then(|i| items.get(i))
            }
            _ => None,
        }
    }

    fn key_is(&self, key: &str) -> bool {
        match &self.kind {
            Kind::Str(s) | Kind::Number(s) | Kind::Name(s) => s == key,
            Kind::Char(c) => key.chars().eq([*c]),
            _ => false,
        }
    }

    pub(crate) fn key_text(&self) -> &str {
        match &self.kind {
            Kind::Str(s) | Kind::Number(s) | Kind::Name(s) => s,
            _ => self.span.text(),
        }
    }

    /// Node at a path, if all of it exists.
    pub(crate) fn find<S: AsRef<str>>(&self, path: &[S]) -> Option<&Node> {
        path.iter().try_fold(self, |n, s| n.get(s.as_ref()))
    }

    /// What to underline for a path: the node, or the deepest ancestor that is written down. A composite is shown by its key.
    pub(crate) fn place<S: AsRef<str>>(&self, path: &[S]) -> Span {
        let mut node = self;
        let mut shown = self.head();
        for s in path {
            let key = s.as_ref();
            let Some(next) = node.get(key) else { break };
            let key_span = match &node.kind {
                Kind::Struct(_, fields) => fields
                    .iter()
                    .find(|f| f.name.text == key)
                    .map(|f| f.name.span.clone()),
                Kind::Map(entries) => entries
                    .iter()
                    .find(|(k, _)| k.key_is(key))
                    .map(|(k, _)| k.span.clone()),
                _ => None,
            };
            node = next;
            shown = match (&node.kind, key_span) {
                (Kind::Struct(None, _) | Kind::Tuple(None, _) | Kind::Map(_), Some(k)) => k,
                _ => node.head(),
            };
        }
        shown
    }

    /// Removes what stands at a path. False when there is nothing, or the path is the root.
    pub(crate) fn strike<S: AsRef<str>>(&mut self, path: &[S]) -> bool {
        let Some((last, up)) = path.split_last() else {
            return false;
        };
        let Some(parent) = up.iter().try_fold(self, |n, s| n.get_mut(s.as_ref())) else {
            return false;
        };
        let last = last.as_ref();
        match &mut parent.kind {
            Kind::Struct(_, fields) => {
                let n = fields.len();
                // The last of two equal names goes, so that a repeated field strikes its repetition.
                if let Some(i) = fields.iter().rposition(|f| f.name.text == last) {
                    fields.remove(i);
                }
                fields.len() < n
            }
            Kind::Map(entries) => {
                let n = entries.len();
                if let Some(i) = entries.iter().rposition(|(k, _)| k.key_is(last)) {
                    entries.remove(i);
                }
                entries.len() < n
            }
            Kind::List(items) => match last.parse::<usize>() {
                Ok(i) if i < items.len() => {
                    items.remove(i);
                    true
                }
                _ => false,
            },
            _ => false,
        }
    }

    pub(crate) fn get_mut(&mut self, key: &str) -> Option<&mut Node> {
        if self.is_transparent() {
            return match &mut self.kind {
                Kind::Tuple(_, items) => items.first_mut()?.get_mut(key),
                _ => None,
            };
        }
        match &mut self.kind {
            Kind::Struct(_, fields) => fields
                .iter_mut()
                .find(|f| f.name.text == key)
                .map(|f| &mut f.value),
            Kind::Map(entries) => entries
                .iter_mut()
                .find(|(k, _)| k.key_is(key))
                .map(|(_, v)| v),
            Kind::List(items) | Kind::Tuple(_, items) => {
                key.parse::<usize>().ok().and_then(|i| items.get_mut(i))
            }
            _ => None,
        }
    }

    /// Puts a value at a dotted path, making structs on the way where a field is not written down. `key` is the place of the path.
    pub(crate) fn set(&mut self, path: &str, key: &Span, value: Node) -> Result<(), Diagnostic> {
        let parts: Vec<&str> = path.split('.').collect();
        let fail = |message: String, help: String| Diagnostic {
            code: "set::path",
            message,
            at: Some(key.clone()),
            label: "leads nowhere".to_owned(),
            help: Some(help),
        };
        if parts.iter().any(|p| p.trim().is_empty()) {
            return Err(fail(
                format!("`{path}` has an empty part"),
                "write a path such as `model.d_model`".to_owned(),
            ));
        }
        let mut node = self;
        for (i, part) in parts.iter().enumerate() {
            let last = i + 1 == parts.len();
            let name = canonical(part.trim());
            let so_far = if i == 0 {
                "the file".to_owned()
            } else {
                format!("`{}`", parts[..i].join("."))
            };
            // A newtype such as `Some((..))` or `Text((..))` is transparent.
            let Some(inner) = node.opened() else {
                return Ok(());
            };
            node = inner;
            // `Mamba2` and `Mamba2()` and `()` are structs without fields.
            let empty = match &node.kind {
                Kind::Unit => Some(None),
                Kind::Tuple(n, items) if items.is_empty() => Some(n.clone()),
                Kind::Name(n) if n != "None" => Some(Some(Ident {
                    text: n.clone(),
                    span: node.span.clone(),
                })),
                _ => None,
            };
            if let Some(n) = empty {
                node.kind = Kind::Struct(n, Vec::new());
            }
            if matches!(&node.kind, Kind::Name(n) if n == "None") {
                node.kind = Kind::Struct(None, Vec::new());
            }
            let found = node.describe();
            match &mut node.kind {
                Kind::Struct(_, fields) => {
                    let at = fields.iter().position(|f| f.name.text == name);
                    let at = at.unwrap_or_else(|| {
                        let value = Node {
                            kind: Kind::Struct(None, Vec::new()),
                            span: key.clone(),
                            loose: true,
                        };
                        fields.push(Field {
                            name: Ident {
                                text: name.to_owned(),
                                span: key.clone(),
                            },
                            value,
                        });
                        fields.len() - 1
                    });
                    node = &mut fields[at].value;
                }
                Kind::Map(entries) => {
                    let at = entries.iter().position(|(k, _)| k.key_is(name));
                    let at = match at {
                        Some(at) => at,
                        None if last => {
                            let kind = if name.parse::<u64>().is_ok() {
                                Kind::Number(name.to_owned())
                            } else {
                                Kind::Str(name.to_owned())
                            };
                            entries.push((
                                Node {
                                    kind,
                                    span: key.clone(),
                                    loose: true,
                                },
                                value.clone(),
                            ));
                            entries.len() - 1
                        }
                        None => {
                            let known: Vec<&str> =
                                entries.iter().map(|(k, _)| k.key_text()).collect();
                            return Err(fail(
                                format!("no `{name}` in {so_far}"),
                                suggest(name, &known),
                            ));
                        }
                    };
                    node = &mut entries[at].1;
                }
                Kind::List(items) | Kind::Tuple(_, items) => {
                    let n = items.len();
                    match name.parse::<usize>() {
                        Ok(i) if i < n => node = &mut items[i],
                        _ => {
                            return Err(fail(
                                format!("`{name}` is no item of {so_far}, a list of {n}"),
                                format!("items are numbered from 0 to {}", n.saturating_sub(1)),
                            ));
                        }
                    }
                }
                _ => {
                    return Err(fail(
                        format!("`{name}` cannot be looked up in {so_far}, which is {found}"),
                        "shorten the path, or replace the whole value".to_owned(),
                    ));
                }
            }
        }
        *node = value;
        Ok(())
    }
}

/// `Some((..))`, `Text((..))` or `Parallel([..])`: paths lead through the bracket.
fn transparent(items: &[Node]) -> bool {
    let composite = |n: &Node| {
        matches!(
            n.kind,
            Kind::List(_) | Kind::Tuple(..) | Kind::Struct(..) | Kind::Map(_)
        )
    };
    items.len() == 1 && composite(&items[0])
}

/// Outlines a text that stands in a source from `offset` to `end`.
pub(crate) fn parse(source: &Arc<Source>) -> Result<Node, Diagnostic> {
    let text = &source.text;
    let options =
        ron::Options::default().with_default_extension(ron::extensions::Extensions::all());
    if let Err(e) = options.from_str::<serde::de::IgnoredAny>(text) {
        return Err(syntax_error(source, &e));
    }
    let mut p = Parser {
        source,
        text,
        at: 0,
        loose: false,
    };
    p.value_then_end()
}

/// Outlines the value of a `--set` argument, `source.text[offset..]`; text that is not RON becomes a string.
pub(crate) fn parse_loose(source: &Arc<Source>, offset: usize) -> Node {
    let text = &source.text;
    let options =
        ron::Options::default().with_default_extension(ron::extensions::Extensions::all());
    if options
        .from_str::<serde::de::IgnoredAny>(&text[offset..])
        .is_ok()
    {
        let mut p = Parser {
            source,
            text,
            at: offset,
            loose: true,
        };
        if let Ok(mut node) = p.value_then_end() {
            // A text field takes all that stands after `=`, also what RON would skip as a comment.
            if matches!(node.kind, Kind::Name(_) | Kind::Number(_)) {
                node.span = Span {
                    source: source.clone(),
                    start: offset,
                    end: text.len(),
                };
            }
            return node;
        }
    }
    let span = Span {
        source: source.clone(),
        start: offset,
        end: text.len(),
    };
    Node {
        kind: Kind::Str(text[offset..].to_owned()),
        span,
        loose: true,
    }
}

fn syntax_error(source: &Arc<Source>, e: &ron::error::SpannedError) -> Diagnostic {
    let offset = |p: ron::error::Position| {
        let line = source
            .text
            .split_inclusive('\n')
            .take(p.line.saturating_sub(1))
            .map(str::len)
            .sum::<usize>();
        let rest = &source.text[line.min(source.text.len())..];
        line + rest
            .char_indices()
            .nth(p.col.saturating_sub(1))
            .map_or(rest.len(), |(i, _)| i)
    };
    let end = offset(e.span.end);
    let mut start = offset(e.span.start).min(end);
    if start == end {
        start = end.min(source.text.len());
    }
    let end = end.max((start + 1).min(source.text.len()));
    let message = e.code.to_string();
    let mut message = message.trim_end_matches('.').to_owned();
    if let Some(first) = message.get(..1).map(str::to_lowercase) {
        message.replace_range(..1, &first);
    }
    Diagnostic {
        code: "ron::syntax",
        message: format!("not valid RON: {message}"),
        at: Some(Span {
            source: source.clone(),
            start,
            end,
        }),
        label: "here".to_owned(),
        help: Some(syntax_help(&e.code).to_owned()),
    }
}

fn syntax_help(code: &ron::Error) -> &'static str {
    use ron::Error as E;
    match code {
        E::ExpectedComma | E::ExpectedStructLikeEnd | E::ExpectedArrayEnd | E::ExpectedMapEnd => {
            "separate fields and items by commas, and close every bracket"
        }
        E::Eof => "a bracket or a quote is not closed",
        E::ExpectedMapColon => "write `name: value`",
        E::ExpectedString | E::ExpectedStringEnd => "texts stand between double quotes",
        _ => "RON is written `(field: value, list: [1, 2], text: \"abc\", Variant(field: value))`",
    }
}

struct Parser<'a> {
    source: &'a Arc<Source>,
    text: &'a str,
    at: usize,
    loose: bool,
}

type Parsed<T> = Result<T, Diagnostic>;

impl Parser<'_> {
    fn value_then_end(&mut self) -> Parsed<Node> {
        self.blank();
        while self.rest().starts_with("#!") {
            match self.rest().find(']') {
                Some(i) => self.at += i + 1,
                None => return Err(self.bad("a closing `]`")),
            }
            self.blank();
        }
        let v = self.value()?;
        self.blank();
        if self.rest().is_empty() {
            Ok(v)
        } else {
            Err(self.bad("the end of the file"))
        }
    }

    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn span(&self, start: usize) -> Span {
        Span {
            source: self.source.clone(),
            start,
            end: self.at,
        }
    }

    fn bad(&self, wanted: &str) -> Diagnostic {
        let end = (self.at + self.peek().map_or(0, char::len_utf8)).min(self.text.len());
        Diagnostic {
            code: "ron::syntax",
            message: format!("not valid RON: expected {wanted}"),
            at: Some(Span {
                source: self.source.clone(),
                start: self.at,
                end,
            }),
            label: "here".to_owned(),
            help: None,
        }
    }

    /// Skips white space and comments; block comments nest.
    fn blank(&mut self) {
        loop {
            let r = &self.text[self.at..];
            let trimmed = r.trim_start();
            self.at += r.len() - trimmed.len();
            if trimmed.starts_with("//") {
                self.at += trimmed.find('\n').unwrap_or(trimmed.len());
            } else if trimmed.starts_with("/*") {
                let mut depth = 0;
                let mut i = 0;
                while i < trimmed.len() {
                    if trimmed[i..].starts_with("/*") {
                        depth += 1;
                        i += 2;
                    } else if trimmed[i..].starts_with("*/") {
                        depth -= 1;
                        i += 2;
                        if depth == 0 {
                            break;
                        }
                    } else {
                        i += trimmed[i..].chars().next().map_or(1, char::len_utf8);
                    }
                }
                self.at += i;
            } else {
                return;
            }
        }
    }

    fn eat(&mut self, c: char) -> bool {
        let hit = self.peek() == Some(c);
        if hit {
            self.at += c.len_utf8();
        }
        hit
    }

    fn value(&mut self) -> Parsed<Node> {
        let start = self.at;
        let kind = match self.peek() {
            Some('(') => self.parens(None)?,
            Some('[') => {
                self.at += 1;
                Kind::List(self.items(']')?)
            }
            Some('{') => self.map()?,
            Some('"') => self.string(start)?,
            Some('\'') => self.character(start)?,
            Some(c) if c.is_ascii_digit() || matches!(c, '-' | '+' | '.') => {
                self.take(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.' | '_'));
                Kind::Number(self.text[start..self.at].to_owned())
            }
            Some(c) if c.is_alphabetic() || c == '_' => {
                let r = self.rest();
                if r.starts_with("r\"")
                    || r.starts_with("r#\"")
                    || r.starts_with("r##")
                    || r.starts_with("b\"")
                    || r.starts_with("br") && r[2..].starts_with(['"', '#'])
                {
                    self.string(start)?
                } else {
                    self.named()?
                }
            }
            _ => return Err(self.bad("a value")),
        };
        Ok(Node {
            kind,
            span: self.span(start),
            loose: self.loose,
        })
    }

    fn take(&mut self, keep: impl Fn(char) -> bool) {
        let r = self.rest();
        self.at += r.find(|c| !keep(c)).unwrap_or(r.len());
    }

    fn ident(&mut self) -> Ident {
        let start = self.at;
        if self.rest().starts_with("r#") {
            self.at += 2;
        }
        let from = self.at;
        self.take(|c| c.is_alphanumeric() || c == '_');
        Ident {
            text: self.text[from..self.at].to_owned(),
            span: self.span(start),
        }
    }

    fn named(&mut self) -> Parsed<Kind> {
        let name = self.ident();
        let after = self.at;
        self.blank();
        if self.peek() == Some('(') {
            return self.parens(Some(name));
        }
        self.at = after;
        Ok(match name.text.as_str() {
            "true" => Kind::Bool(true),
            "false" => Kind::Bool(false),
            "inf" | "NaN" => Kind::Number(name.text),
            _ => Kind::Name(name.text),
        })
    }

    fn parens(&mut self, name: Option<Ident>) -> Parsed<Kind> {
        let open = self.at;
        self.at += 1;
        self.blank();
        if self.eat(')') {
            return Ok(match name {
                None => Kind::Unit,
                Some(n) => Kind::Tuple(Some(n), Vec::new()),
            });
        }
        // A struct begins with an identifier and a colon.
        let c = self.peek().unwrap_or(' ');
        if c.is_alphabetic() || c == '_' {
            self.ident();
            self.blank();
            if self.peek() == Some(':') {
                self.at = open + 1;
                return Ok(Kind::Struct(name, self.fields()?));
            }
        }
        self.at = open + 1;
        Ok(Kind::Tuple(name, self.items(')')?))
    }

    fn fields(&mut self) -> Parsed<Vec<Field>> {
        let mut fields = Vec::new();
        loop {
            self.blank();
            if self.eat(')') {
                return Ok(fields);
            }
            let mut name = self.ident();
            self.blank();
            if name.text.is_empty() || !self.eat(':') {
                return Err(self.bad("`name: value`"));
            }
            name.text = canonical(&name.text).to_owned();
            self.blank();
            let value = self.value()?;
            fields.push(Field { name, value });
            self.blank();
            if !self.eat(',') && self.peek() != Some(')') {
                return Err(self.bad("`,` or `)`"));
            }
        }
    }

    fn items(&mut self, close: char) -> Parsed<Vec<Node>> {
        let mut items = Vec::new();
        loop {
            self.blank();
            if self.eat(close) {
                return Ok(items);
            }
            items.push(self.value()?);
            self.blank();
            if !self.eat(',') && self.peek() != Some(close) {
                return Err(self.bad(&format!("`,` or `{close}`")));
            }
        }
    }

    fn map(&mut self) -> Parsed<Kind> {
        self.at += 1;
        let mut entries = Vec::new();
        loop {
            self.blank();
            if self.eat('}') {
                return Ok(Kind::Map(entries));
            }
            let key = self.value()?;
            self.blank();
            if !self.eat(':') {
                return Err(self.bad("`:`"));
            }
            self.blank();
            entries.push((key, self.value()?));
            self.blank();
            if !self.eat(',') && self.peek() != Some('}') {
                return Err(self.bad("`,` or `}`"));
            }
        }
    }

    /// Finds the end of a quoted text; `ron` decodes it.
    fn string(&mut self, start: usize) -> Parsed<Kind> {
        let prefix = self.rest().find('"').unwrap_or(0);
        let opening = self.rest()[..prefix].to_owned();
        self.at += prefix + 1;
        let end = if opening.contains('r') {
            let close = format!("\"{}", "#".repeat(opening.matches('#').count()));
            self.rest().find(&close).map(|i| i + close.len())
        } else {
            let mut escaped = false;
            self.rest().char_indices().find_map(|(i, c)| {
                let end = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                end.then_some(i + 1)
            })
        };
        let Some(end) = end else {
            return Err(self.bad("a closing quote"));
        };
        self.at += end;
        ron::from_str::<String>(&self.text[start..self.at])
            .map(Kind::Str)
            .map_err(|_| self.bad("a text"))
    }

    fn character(&mut self, start: usize) -> Parsed<Kind> {
        self.at += 1;
        let mut escaped = false;
        let end = self.rest().char_indices().find_map(|(i, c)| {
            let end = c == '\'' && !escaped && i > 0;
            escaped = c == '\\' && !escaped;
            end.then_some(i + 1)
        });
        let Some(end) = end else {
            return Err(self.bad("a closing quote"));
        };
        self.at += end;
        ron::from_str::<char>(&self.text[start..self.at])
            .map(Kind::Char)
            .map_err(|_| self.bad("a character"))
    }
}
