//! Typed reading of a [`Node`] through serde, collecting every structural error instead of the first.
//!
//! serde stops at one error. [`decode`] records it with its span, strikes the offending node from the tree and reads again, so one
//! misspelt field does not hide the next. What was struck is remembered: later checks do not complain that it is missing.

use crate::diag::{Diagnostic, Span, suggest};
use crate::tree::{Field, Ident, Kind, Node};
use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, Unexpected, Visitor};

/// Names of the fields, map keys or list indices that lead to a node.
pub(crate) type Path = Vec<String>;

/// Reads a `T`, reporting all structural errors into `out`; `None` when the tree cannot be read at all.
/// Struck paths are appended to `struck`.
pub(crate) fn decode<T: DeserializeOwned>(
    node: &mut Node,
    out: &mut Vec<Diagnostic>,
    struck: &mut Vec<Path>,
) -> Option<T> {
    loop {
        match T::deserialize(De::new(node)) {
            Ok(v) => return Some(v),
            Err(mut e) => {
                e.path.reverse();
                let gone = node.strike(&e.path);
                // A field that was struck for another fault is not missing.
                let known = match &e.kind {
                    ErrorKind::Missing(name) => struck.iter().any(|s| {
                        s.split_last()
                            .is_some_and(|(last, up)| last == name && up == e.path)
                    }),
                    _ => false,
                };
                struck.push(e.path.clone());
                if !known {
                    out.push(e.diagnostic(node));
                }
                if !gone || out.len() > 64 {
                    return None;
                }
            }
        }
    }
}

/// One structural error on its way up.
#[derive(Debug)]
pub(crate) struct Error {
    kind: ErrorKind,
    at: Option<Span>,
    found: Option<String>,
    /// From the inside out while unwinding.
    path: Path,
}

#[derive(Debug)]
enum ErrorKind {
    UnknownField(String, &'static [&'static str]),
    UnknownVariant(String, &'static [&'static str]),
    Missing(&'static str),
    Duplicate(String),
    Wanted(String),
    Other(String),
}

impl Error {
    fn new(kind: ErrorKind) -> Error {
        Error {
            kind,
            at: None,
            found: None,
            path: Vec::new(),
        }
    }

    fn locate(mut self, node: &Node) -> Error {
        if self.at.is_none() {
            self.at = Some(node.head());
            self.found = Some(node.describe());
        }
        self
    }

    fn under(mut self, key: impl Into<String>) -> Error {
        self.path.push(key.into());
        self
    }

    fn diagnostic(self, root: &Node) -> Diagnostic {
        let at = Some(self.at.unwrap_or_else(|| root.head()));
        let field = self
            .path
            .last()
            .map(|p| format!(" for `{p}`"))
            .unwrap_or_default();
        let found = self.found.unwrap_or_else(|| "something else".to_owned());
        let (code, message, label, help) = match self.kind {
            ErrorKind::UnknownField(name, known) => (
                "ron::unknown_field",
                format!("unknown field `{name}`"),
                "not a field here".to_owned(),
                Some(suggest(&name, known)),
            ),
            ErrorKind::UnknownVariant(name, known) => (
                "ron::unknown_variant",
                format!("unknown variant `{name}`{field}"),
                "not known here".to_owned(),
                Some(suggest(&name, known)),
            ),
            ErrorKind::Missing(name) => (
                "ron::missing_field",
                format!("`{name}` is missing"),
                format!("needs `{name}`"),
                Some(format!("add `{name}: ..`")),
            ),
            ErrorKind::Duplicate(name) => (
                "ron::duplicate_field",
                format!("`{name}` is given twice"),
                "second time".to_owned(),
                Some(
                    "keep one of the two (Hugging Face spellings count as the same field)"
                        .to_owned(),
                ),
            ),
            ErrorKind::Wanted(wanted) => {
                let bare = wanted == "a string" && found.starts_with('`');
                let wanted = plain_words(&wanted);
                let help = bare.then(|| format!("write it as \"{}\"", found.trim_matches('`')));
                (
                    "ron::wrong_type",
                    format!("expected {wanted}{field}, found {found}"),
                    format!("expected {wanted}"),
                    help,
                )
            }
            ErrorKind::Other(text) => ("ron::wrong_value", text, String::new(), None),
        };
        Diagnostic {
            code,
            message,
            at,
            label,
            help,
        }
    }
}

/// Rust's names of types, in the words of a reader of RON.
fn plain_words(wanted: &str) -> String {
    match wanted {
        "usize" | "u64" | "u32" | "u16" | "u8" => "a whole number, 0 or more".to_owned(),
        "i64" | "i32" => "a whole number".to_owned(),
        "f64" | "f32" => "a number".to_owned(),
        "a string" => "a text in double quotes".to_owned(),
        "a boolean" => "`true` or `false`".to_owned(),
        "a sequence" => "a list `[..]`".to_owned(),
        "a map" => "a map `{\"name\": ..}`".to_owned(),
        "a tuple of size 2" => "a pair `(a, b)`".to_owned(),
        other => match other
            .strip_prefix("struct ")
            .or_else(|| other.strip_prefix("tuple struct "))
        {
            Some(name) => format!("`{name}( .. )`"),
            None => other
                .strip_prefix("enum ")
                .or_else(|| other.strip_prefix("variant of enum "))
                .map_or_else(|| other.to_owned(), |name| format!("a variant of `{name}`")),
        },
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.kind)
    }
}

impl std::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: std::fmt::Display>(msg: T) -> Self {
        Error::new(ErrorKind::Other(msg.to_string()))
    }

    fn invalid_type(_: Unexpected<'_>, exp: &dyn de::Expected) -> Self {
        Error::new(ErrorKind::Wanted(exp.to_string()))
    }

    fn invalid_value(_: Unexpected<'_>, exp: &dyn de::Expected) -> Self {
        Error::new(ErrorKind::Wanted(exp.to_string()))
    }

    fn invalid_length(_: usize, exp: &dyn de::Expected) -> Self {
        Error::new(ErrorKind::Wanted(exp.to_string()))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Error::new(ErrorKind::UnknownVariant(variant.to_owned(), expected))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Error::new(ErrorKind::UnknownField(field.to_owned(), expected))
    }

    fn missing_field(field: &'static str) -> Self {
        Error::new(ErrorKind::Missing(field))
    }

    fn duplicate_field(field: &'static str) -> Self {
        Error::new(ErrorKind::Duplicate(field.to_owned()))
    }
}

/// The deserializer of one node.
#[derive(Clone, Copy)]
struct De<'a> {
    node: &'a Node,
    /// The name before the bracket was a variant and is done with.
    unnamed: bool,
}

impl<'a> De<'a> {
    fn new(node: &'a Node) -> De<'a> {
        De {
            node,
            unnamed: false,
        }
    }

    fn wanted<T>(self, what: &str) -> Result<T, Error> {
        Err(Error::new(ErrorKind::Wanted(what.to_owned())).locate(self.node))
    }

    fn verbatim(self) -> Option<&'a str> {
        match &self.node.kind {
            Kind::Str(s) => Some(s),
            _ if self.node.loose => Some(self.node.span.text()),
            _ => None,
        }
    }

    fn number<'de, V: Visitor<'de>>(self, text: &str, v: V) -> Result<V::Value, Error> {
        let text = text.replace('_', "");
        let (sign, digits) = match text.strip_prefix('-') {
            Some(d) => (-1, d),
            None => (1, text.strip_prefix('+').unwrap_or(&text)),
        };
        let radix = [("0x", 16), ("0b", 2), ("0o", 8)]
            .into_iter()
            .find_map(|(p, r)| digits.strip_prefix(p).map(|d| (d, r)));
        let (digits, radix) = radix.unwrap_or((digits, 10));
        if let Ok(n) = u64::from_str_radix(digits, radix) {
            if sign > 0 {
                return v.visit_u64(n);
            }
            if let Ok(n) = i64::try_from(n) {
                return v.visit_i64(-n);
            }
        }
        match text.parse::<f64>() {
            Ok(x) => v.visit_f64(x),
            Err(_) => self.wanted("a number"),
        }
    }
}

macro_rules! scalars {
    ($($method:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, v: V) -> Result<V::Value, Error> {
            match &self.node.kind {
                Kind::Number(n) => self.number(n, v).map_err(|e| e.locate(self.node)),
                _ => self.deserialize_any(v),
            }
        })*
    };
}

impl<'de> de::Deserializer<'de> for De<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, v: V) -> Result<V::Value, Error> {
        let node = self.node;
        let r = match &node.kind {
            Kind::Unit => v.visit_unit(),
            Kind::Bool(b) => v.visit_bool(*b),
            Kind::Number(n) => self.number(n, v),
            Kind::Str(s) => v.visit_str(s),
            Kind::Char(c) => v.visit_char(*c),
            Kind::Name(_) if node.loose => v.visit_str(node.span.text()),
            Kind::Name(_) => v.visit_enum(Enum(node)),
            Kind::List(items) | Kind::Tuple(None, items) => v.visit_seq(Items::new(items)),
            Kind::Tuple(Some(_), items) if self.unnamed => v.visit_seq(Items::new(items)),
            Kind::Struct(None, fields) => v.visit_map(Fields::new(fields)),
            Kind::Struct(Some(_), fields) if self.unnamed => v.visit_map(Fields::new(fields)),
            Kind::Tuple(Some(_), _) | Kind::Struct(Some(_), _) => v.visit_enum(Enum(node)),
            Kind::Map(entries) => v.visit_map(Entries { entries, at: 0 }),
        };
        r.map_err(|e| e.locate(node))
    }

    scalars! { deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_u8 deserialize_u16 deserialize_u32
    deserialize_u64 deserialize_f32 deserialize_f64 }

    fn deserialize_bool<V: Visitor<'de>>(self, v: V) -> Result<V::Value, Error> {
        self.deserialize_any(v)
    }

    fn deserialize_char<V: Visitor<'de>>(self, v: V) -> Result<V::Value, Error> {
        match self.verbatim() {
            Some(s) => v.visit_str(s).map_err(|e: Error| e.locate(self.node)),
            None => self.deserialize_any(v),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, v: V) -> Result<V::Value, Error> {
        match (self.verbatim(), &self.node.kind) {
            (Some(s), _) => v.visit_str(s).map_err(|e: Error| e.locate(self.node)),
            (None, Kind::Char(c)) => v.visit_char(*c),
            _ => self.wanted("a string"),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, v: V) -> Result<V::Value, Error> {
        self.deserialize_str(v)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, v: V) -> Result<V::Value, Error> {
        self.deserialize_any(v)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, v: V) -> Result<V::Value, Error> {
        self.deserialize_any(v)
    }

    fn deserialize_option<V: Visitor<'de>>(self, v: V) -> Result<V::Value, Error> {
        match &self.node.kind {
            Kind::Name(n) if n == "None" => v.visit_none(),
            Kind::Tuple(Some(n), items) if n.text == "Some" && items.len() == 1 => {
                v.visit_some(De::new(&items[0]))
            }
            _ => v.visit_some(self),
        }
    }

    fn deserialize_unit<V: Visitor<'de>>(self, v: V) -> Result<V::Value, Error> {
        self.deserialize_any(v)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        v: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_any(v)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        v: V,
    ) -> Result<V::Value, Error> {
        match &self.node.kind {
            Kind::Tuple(Some(n), items) if n.text == name && items.len() == 1 => {
                v.visit_newtype_struct(De::new(&items[0]))
            }
            _ => v.visit_newtype_struct(self),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, v: V) -> Result<V::Value, Error> {
        match &self.node.kind {
            Kind::List(_) | Kind::Tuple(None, _) => self.deserialize_any(v),
            Kind::Unit => v.visit_seq(Items::new(&[])),
            Kind::Tuple(Some(_), _) if self.unnamed => self.deserialize_any(v),
            _ => self.wanted("a sequence"),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, v: V) -> Result<V::Value, Error> {
        match &self.node.kind {
            Kind::List(items) | Kind::Tuple(_, items) if items.len() == len => v
                .visit_seq(Items::new(items))
                .map_err(|e| e.locate(self.node)),
            _ => self.wanted(&format!("a tuple of size {len}")),
        }
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        len: usize,
        v: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_tuple(len, v)
    }

    fn deserialize_map<V: Visitor<'de>>(self, v: V) -> Result<V::Value, Error> {
        match &self.node.kind {
            Kind::Map(entries) => v
                .visit_map(Entries { entries, at: 0 })
                .map_err(|e| e.locate(self.node)),
            _ => self.wanted("a map"),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        _: &'static [&'static str],
        v: V,
    ) -> Result<V::Value, Error> {
        let fits = |n: &Option<Ident>| self.unnamed || n.as_ref().is_none_or(|n| n.text == name);
        let r = match &self.node.kind {
            Kind::Struct(n, fields) if fits(n) => v.visit_map(Fields::new(fields)),
            Kind::Tuple(n, items) if items.is_empty() && fits(n) => v.visit_map(Fields::new(&[])),
            Kind::Unit => v.visit_map(Fields::new(&[])),
            Kind::Name(n) if self.unnamed || n == name => v.visit_map(Fields::new(&[])),
            // `Variant((a: 1))` as well as `Variant(a: 1)`.
            Kind::Tuple(n, items)
                if items.len() == 1
                    && fits(n)
                    && matches!(items[0].kind, Kind::Struct(None, _) | Kind::Unit) =>
            {
                return De::new(&items[0]).deserialize_struct(name, &[], v);
            }
            _ => return self.wanted(&format!("struct {name}")),
        };
        r.map_err(|e| e.locate(self.node))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        _: &'static [&'static str],
        v: V,
    ) -> Result<V::Value, Error> {
        match &self.node.kind {
            Kind::Name(_) | Kind::Struct(Some(_), _) | Kind::Tuple(Some(_), _) => v
                .visit_enum(Enum(self.node))
                .map_err(|e| e.locate(self.node)),
            _ => self.wanted(&format!("enum {name}")),
        }
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, v: V) -> Result<V::Value, Error> {
        self.deserialize_str(v)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, v: V) -> Result<V::Value, Error> {
        v.visit_unit()
    }
}

impl<'de> IntoDeserializer<'de, Error> for De<'de> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

struct Items<'a> {
    items: &'a [Node],
    at: usize,
}

impl<'a> Items<'a> {
    fn new(items: &'a [Node]) -> Items<'a> {
        Items { items, at: 0 }
    }
}

impl<'de> de::SeqAccess<'de> for Items<'de> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        let Some(node) = self.items.get(self.at) else {
            return Ok(None);
        };
        self.at += 1;
        seed.deserialize(De::new(node))
            .map(Some)
            .map_err(|e| e.locate(node).under((self.at - 1).to_string()))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len() - self.at)
    }
}

struct Fields<'a> {
    fields: &'a [Field],
    at: usize,
}

impl<'a> Fields<'a> {
    fn new(fields: &'a [Field]) -> Fields<'a> {
        Fields { fields, at: 0 }
    }
}

impl<'de> de::MapAccess<'de> for Fields<'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some(f) = self.fields.get(self.at) else {
            return Ok(None);
        };
        let locate = |mut e: Error| {
            e.at = Some(f.name.span.clone());
            e.under(&f.name.text)
        };
        if self.fields[..self.at]
            .iter()
            .any(|g| g.name.text == f.name.text)
        {
            // serde would report it without saying which.
            return Err(locate(Error::new(ErrorKind::Duplicate(
                f.name.text.clone(),
            ))));
        }
        seed.deserialize(f.name.text.as_str().into_deserializer())
            .map(Some)
            .map_err(locate)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let f = &self.fields[self.at];
        self.at += 1;
        seed.deserialize(De::new(&f.value))
            .map_err(|e| e.locate(&f.value).under(&f.name.text))
    }
}

struct Entries<'a> {
    entries: &'a [(Node, Node)],
    at: usize,
}

fn key_text(node: &Node) -> String {
    match &node.kind {
        Kind::Str(s) | Kind::Number(s) | Kind::Name(s) => s.clone(),
        Kind::Char(c) => c.to_string(),
        _ => node.span.text().to_owned(),
    }
}

impl<'de> de::MapAccess<'de> for Entries<'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some((k, _)) = self.entries.get(self.at) else {
            return Ok(None);
        };
        let text = key_text(k);
        if self.entries[..self.at]
            .iter()
            .any(|(g, _)| key_text(g) == text)
        {
            return Err(Error::new(ErrorKind::Duplicate(text.clone()))
                .locate(k)
                .under(text));
        }
        seed.deserialize(De::new(k))
            .map(Some)
            .map_err(|e| e.locate(k).under(text))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let (k, v) = &self.entries[self.at];
        self.at += 1;
        seed.deserialize(De::new(v))
            .map_err(|e| e.locate(v).under(key_text(k)))
    }
}

struct Enum<'a>(&'a Node);

impl<'de> de::EnumAccess<'de> for Enum<'de> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Error> {
        let name = match &self.0.kind {
            Kind::Name(n) => n.as_str(),
            Kind::Struct(Some(n), _) | Kind::Tuple(Some(n), _) => n.text.as_str(),
            _ => return De::new(self.0).wanted("a variant"),
        };
        let v = seed
            .deserialize(name.into_deserializer())
            .map_err(|e: Error| e.locate(self.0))?;
        Ok((v, self))
    }
}

impl<'de> de::VariantAccess<'de> for Enum<'de> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        match &self.0.kind {
            Kind::Name(_) => Ok(()),
            Kind::Tuple(Some(_), items) if items.is_empty() => Ok(()),
            _ => De::new(self.0).wanted("a name without brackets"),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Error> {
        let node = self.0;
        match &node.kind {
            Kind::Tuple(Some(_), items) if items.len() == 1 => seed
                .deserialize(De::new(&items[0]))
                .map_err(|e| e.locate(&items[0])),
            _ => seed
                .deserialize(De {
                    node,
                    unnamed: true,
                })
                .map_err(|e| e.locate(node)),
        }
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, v: V) -> Result<V::Value, Error> {
        de::Deserializer::deserialize_tuple(De::new(self.0), len, v)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        v: V,
    ) -> Result<V::Value, Error> {
        de::Deserializer::deserialize_struct(
            De {
                node: self.0,
                unnamed: true,
            },
            "variant",
            fields,
            v,
        )
    }
}
