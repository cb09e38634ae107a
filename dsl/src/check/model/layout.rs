//! The layout language: which names stand at which layer.

use super::{At, Build, MAX_LAYERS, Slot, s};
use crate::diag::suggest;
use crate::syntax::{NONE, Names};
use std::collections::BTreeSet;

impl Build<'_> {
    pub(super) fn rhythm(&self, at: &At, period: usize, offset: usize) -> bool {
        if period == 0 {
            self.cx.error(
                &at.at("period"),
                "value::zero",
                "`period` is 0",
                "must be 1 or more",
                "",
            );
        } else if offset >= period {
            self.cx.error(
                &at.at("offset"),
                "layout::offset",
                format!("offset {offset} is not below period {period}"),
                format!("must be at most {}", period - 1),
                "the offset is the first chosen layer",
            );
        }
        period > 0 && offset < period
    }

    /// Names per layer. `None` when the number of layers cannot be known.
    pub(super) fn slots(&self) -> Option<Vec<Slot>> {
        let cx = self.cx;
        let l = &self.file.layout;
        let at = self.at.at("layout");
        let rhythms = l.mixer.is_some() || l.ffn.is_some();
        let forms = [
            (rhythms, if l.mixer.is_some() { "mixer" } else { "ffn" }),
            (!l.groups.is_empty(), "groups"),
            (l.pattern.is_some(), "pattern"),
        ];
        let mut given = forms.iter().filter(|(g, _)| *g).map(|(_, k)| *k);
        let first = given.next();
        if let (Some(a), Some(b)) = (first, given.next()) {
            cx.error(
                &at.at(b),
                "layout::two_forms",
                format!("the layout is given by `{a}` and by `{b}`"),
                "second form",
                "use `mixer`/`ffn`, or `groups`, or `pattern`",
            );
            return None;
        }
        if l.pattern.is_none() && !l.symbols.is_empty() {
            cx.error(
                &at.at("symbols"),
                "layout::symbols",
                "`symbols` without a `pattern`",
                "has no effect",
                "",
            );
        }
        let n_layers = self
            .file
            .n_layers
            .map(|n| cx.positive(self.at, "n_layers", n));
        if let Some(n) = n_layers.filter(|n| *n > MAX_LAYERS) {
            cx.error(
                &self.at.at("n_layers"),
                "value::too_large",
                format!("{n} layers"),
                format!("must be at most {MAX_LAYERS}"),
                "",
            );
            return None;
        }
        let slots = if let Some(p) = &l.pattern {
            self.pattern_slots(p)
        } else if !l.groups.is_empty() {
            self.group_slots()?
        } else {
            let n = cx.require(self.at, "n_layers", n_layers)?;
            let mixer = match &l.mixer {
                Some(names) => self.row(&at.at("mixer"), names, n, true),
                None => self.only(n, true),
            };
            let ffn = match &l.ffn {
                Some(names) => self.row(&at.at("ffn"), names, n, false),
                None => self.only(n, false),
            };
            return Some(mixer?.into_iter().zip(ffn?).collect());
        };
        if let Some(n) = n_layers.filter(|n| *n != slots.len()) {
            let form = if l.pattern.is_some() {
                "pattern"
            } else {
                "groups"
            };
            cx.error(
                &self.at.at("n_layers"),
                "layout::length",
                format!(
                    "n_layers is {n}, but the {form} of the layout has {} layers",
                    slots.len()
                ),
                format!("expected {}", slots.len()),
                "leave out n_layers: the layout says it",
            );
        }
        if slots.is_empty() && l.pattern.is_some() {
            cx.error(
                &at.at("pattern"),
                "layout::length",
                "the pattern is empty",
                "needs one character per layer",
                "",
            );
        }
        Some(slots)
    }

    /// The default row: the only name there is.
    fn only(&self, n: usize, mixers: bool) -> Option<Vec<Option<String>>> {
        let (list, what, names): (&str, &str, Vec<&String>) = if mixers {
            let injected: Vec<&String> = self.file.layout.inject.iter().map(|i| &i.mixer).collect();
            let in_groups: Vec<&String> = self
                .file
                .mixers
                .0
                .iter()
                .filter_map(|(_, b)| {
                    if let s::Mixer::Parallel(b) = b {
                        Some(b)
                    } else {
                        None
                    }
                })
                .flatten()
                .map(|b| &b.name)
                .collect();
            let free = self
                .file
                .mixers
                .0
                .iter()
                .map(|(n, _)| n)
                .filter(|n| !injected.contains(n) && !in_groups.contains(n))
                .collect();
            ("mixers", "mixer", free)
        } else {
            let injected: Vec<&String> = self.file.layout.inject.iter().map(|i| &i.ffn).collect();
            (
                "ffns",
                "ffn",
                self.file
                    .ffns
                    .0
                    .iter()
                    .map(|(n, _)| n)
                    .filter(|n| !injected.contains(n))
                    .collect(),
            )
        };
        match names.as_slice() {
            [] => Some(vec![None; n]),
            [one] => {
                self.used.borrow_mut().insert((*one).clone());
                Some(vec![Some((*one).clone()); n])
            }
            several => {
                if !self.cx.struck(&self.at.at("layout")) {
                    self.cx.error(
                        &self.at.at(list),
                        "layout::ambiguous",
                        format!("{} {list} are declared, and the layout does not say which stands where", several.len()),
                        "which one stands in which layer?",
                        format!("add `layout: ({what}: Every(name: \"{}\", period: 8, offset: 4, rest: \"{}\"))` or another rhythm", several[0], several[1]),
                    );
                }
                None
            }
        }
    }

    /// `n` places named by a rhythm. Complaints about unknown names are made here, at the word.
    fn row(&self, at: &At, names: &Names, n: usize, mixers: bool) -> Option<Vec<Option<String>>> {
        let cx = self.cx;
        let known = |name: &str, at: &At| -> Option<String> {
            if name == NONE {
                return None;
            }
            if mixers {
                self.named_mixer(name, at).map(|_| ())
            } else {
                self.named_ffn(name, at).map(|_| ())
            };
            Some(name.to_owned())
        };
        Some(match names {
            Names::All(name) => vec![known(name, at); n],
            Names::Pattern(list) => {
                if list.is_empty() {
                    cx.error(
                        at,
                        "layout::length",
                        "an empty list of names",
                        "needs at least one name",
                        "",
                    );
                    return None;
                }
                if list.len() > n {
                    cx.error(
                        at,
                        "layout::length",
                        format!("{} names for {n} layers", list.len()),
                        format!("must have at most {n}"),
                        "a list is repeated until the layers are filled",
                    );
                }
                let row: Vec<_> = list
                    .iter()
                    .enumerate()
                    .map(|(i, name)| known(name, &at.at(i)))
                    .collect();
                row.into_iter().cycle().take(n).collect()
            }
            Names::Every(e) => {
                let ok = self.rhythm(at, e.period, e.offset);
                let (one, rest) = (
                    known(&e.name, &at.at("name")),
                    known(&e.rest, &at.at("rest")),
                );
                if ok && e.offset >= n {
                    cx.error(
                        &at.at("offset"),
                        "layout::offset",
                        format!("offset {} lies beyond the {n} layers", e.offset),
                        format!("`{}` would stand nowhere", e.name),
                        "",
                    );
                }
                (0..n)
                    .map(|i| {
                        if i % e.period.max(1) == e.offset {
                            one.clone()
                        } else {
                            rest.clone()
                        }
                    })
                    .collect()
            }
            Names::At(e) => {
                let (one, rest) = (
                    known(&e.name, &at.at("name")),
                    known(&e.rest, &at.at("rest")),
                );
                let mut row = vec![rest; n];
                for (j, &i) in e.layers.iter().enumerate() {
                    let place = at.at("layers").at(j);
                    if self.in_range(&place, i, n) {
                        row[i] = one.clone();
                    }
                    if e.layers[..j].contains(&i) {
                        cx.error(
                            &place,
                            "layout::index",
                            format!("layer {i} is listed twice"),
                            "second time",
                            "",
                        );
                    }
                }
                row
            }
        })
    }

    fn group_slots(&self) -> Option<Vec<Slot>> {
        let mut slots = Vec::new();
        for (k, g) in self.file.layout.groups.iter().enumerate() {
            let at = self.at.at("layout").at("groups").at(k);
            let times = self.cx.positive(&at, "times", g.times);
            let listed = |n: &Option<Names>| match n {
                Some(Names::Pattern(l)) => l.len(),
                _ => 1,
            };
            let len = match g.len {
                Some(l) => self.cx.positive(&at, "len", l),
                None => listed(&g.mixer).max(listed(&g.ffn)).max(1),
            };
            if times.saturating_mul(len).saturating_add(slots.len()) > MAX_LAYERS {
                self.cx.error(
                    &at.at("times"),
                    "value::too_large",
                    format!("more than {MAX_LAYERS} layers"),
                    "too many",
                    "",
                );
                return None;
            }
            let half = |key: &str, names: &Option<Names>, mixers| match names {
                Some(n) => self.row(&at.at(key), n, len, mixers),
                None => Some(vec![None; len]),
            };
            let (mixer, ffn) = (half("mixer", &g.mixer, true)?, half("ffn", &g.ffn, false)?);
            let group: Vec<Slot> = mixer.into_iter().zip(ffn).collect();
            for _ in 0..times {
                slots.extend(group.iter().cloned());
            }
        }
        Some(slots)
    }

    fn pattern_slots(&self, pattern: &str) -> Vec<Slot> {
        let at = self.at.at("layout");
        let sole = |of: &dyn Fn(&s::Mixer) -> bool| {
            let mut found = self
                .file
                .mixers
                .0
                .iter()
                .filter(|(_, b)| of(b))
                .map(|(n, _)| n);
            found.next().filter(|_| found.next().is_none()).cloned()
        };
        let sole_ffn = |moe: bool| {
            let mut found = self
                .file
                .ffns
                .0
                .iter()
                .filter(|(_, b)| matches!(b, s::Ffn::Moe(_)) == moe)
                .map(|(n, _)| n);
            found.next().filter(|_| found.next().is_none()).cloned()
        };
        for (sym, name) in &self.file.layout.symbols.0 {
            let place = at.at("symbols").at(sym);
            if sym.chars().count() != 1 {
                self.cx.error(
                    &place,
                    "layout::symbols",
                    format!("the symbol `{sym}` is not one character"),
                    "must be one character",
                    "",
                );
            }
            if !sym.is_empty() && !pattern.contains(sym.as_str()) {
                self.cx.error(
                    &place,
                    "layout::symbols",
                    format!("the symbol `{sym}` does not stand in the pattern"),
                    format!("`{name}` would be unused"),
                    "",
                );
            }
            if name != NONE
                && self.file.mixers.get(name).is_none()
                && self.file.ffns.get(name).is_none()
            {
                let known: Vec<&str> = self
                    .file
                    .mixers
                    .0
                    .iter()
                    .map(|(n, _)| n)
                    .chain(self.file.ffns.0.iter().map(|(n, _)| n))
                    .map(String::as_str)
                    .collect();
                let declared = self.cx.struck(&self.at.at("mixers").at(name))
                    || self.cx.struck(&self.at.at("ffns").at(name));
                if !declared {
                    self.cx.error(
                        &place,
                        "layout::undefined",
                        format!("no mixer or ffn is named `{name}`"),
                        "not declared",
                        suggest(name, &known),
                    );
                }
            }
        }
        let mut unknown = BTreeSet::new();
        let mut slots = Vec::new();
        for c in pattern.chars() {
            let name = self
                .file
                .layout
                .symbols
                .get(&c.to_string())
                .cloned()
                .or_else(|| match c {
                    'M' => sole(&|b| !matches!(b, s::Mixer::Attention(_))),
                    '*' => sole(&|b| matches!(b, s::Mixer::Attention(_))),
                    '-' => sole_ffn(false),
                    'E' => sole_ffn(true),
                    _ => None,
                });
            let Some(name) = name else {
                if unknown.insert(c)
                    && !self.cx.struck(&self.at.at("mixers"))
                    && !self.cx.struck(&self.at.at("ffns"))
                {
                    let i = pattern.chars().position(|d| d == c).unwrap_or(0);
                    let mut span = self.cx.root.place(&at.at("pattern").0);
                    // The character itself, when the text is written plainly.
                    let inner = span
                        .text()
                        .strip_prefix('"')
                        .and_then(|t| t.strip_suffix('"'));
                    if inner == Some(pattern) {
                        let skip: usize = pattern.chars().take(i).map(char::len_utf8).sum();
                        span.start += 1 + skip;
                        span.end = span.start + c.len_utf8();
                    }
                    self.cx.error_at(
                        span,
                        "layout::symbols",
                        format!("the character `{c}` of the pattern means nothing"),
                        "not in `symbols`",
                        format!("add `symbols: {{\"{c}\": \"name\"}}`"),
                    );
                }
                slots.push((None, None));
                continue;
            };
            self.used.borrow_mut().insert(name.clone());
            slots.push(if self.file.mixers.get(&name).is_some() {
                (Some(name), None)
            } else if self.file.ffns.get(&name).is_some() {
                (None, Some(name))
            } else {
                (None, None)
            });
        }
        slots
    }
}
