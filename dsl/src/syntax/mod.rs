//! The surface syntax: what a RON file may say, field by field, before names are resolved and defaults depend on one another.
//!
//! Every struct here is documented for a writer of files: meaning, unit, default, range, effect on cost. [`crate::check`] turns
//! these into the resolved types ([`crate::model`], [`crate::run`], [`crate::sweep`]).

pub mod model;
pub mod run;
pub mod sweep;

use serde::de::value::{EnumAccessDeserializer, SeqAccessDeserializer};
use serde::de::{self, Deserializer, EnumAccess, MapAccess, SeqAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;
use std::marker::PhantomData;

/// A map `{"name": value}` that keeps the order of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Named<T>(pub Vec<(String, T)>);

impl<T> Default for Named<T> {
    fn default() -> Self {
        Named(Vec::new())
    }
}

impl<T> Named<T> {
    /// The entry of this name.
    pub fn get(&self, name: &str) -> Option<&T> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, v)| v)
    }

    /// No entries.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T: Serialize> Serialize for Named<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut m = s.serialize_map(Some(self.0.len()))?;
        for (k, v) in &self.0 {
            m.serialize_entry(k, v)?;
        }
        m.end()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Named<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for V<T> {
            type Value = Named<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut a: A) -> Result<Named<T>, A::Error> {
                let mut all = Vec::new();
                while let Some(entry) = a.next_entry()? {
                    all.push(entry);
                }
                Ok(Named(all))
            }
        }
        d.deserialize_map(V(PhantomData))
    }
}

/// A map `{3: value}` from indices, in the order of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Indexed<T>(pub Vec<(usize, T)>);

impl<T> Default for Indexed<T> {
    fn default() -> Self {
        Indexed(Vec::new())
    }
}

impl<T> Indexed<T> {
    /// No entries.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T: Serialize> Serialize for Indexed<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_map(self.0.iter().map(|(k, v)| (k, v)))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Indexed<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for V<T> {
            type Value = Indexed<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from layer indices")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut a: A) -> Result<Indexed<T>, A::Error> {
                let mut all = Vec::new();
                while let Some(entry) = a.next_entry()? {
                    all.push(entry);
                }
                Ok(Indexed(all))
            }
        }
        d.deserialize_map(V(PhantomData))
    }
}

/// A part that is read from the document tree itself (see its use), not by serde; it can be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Raw<T>(pub Option<T>);

impl<T> Default for Raw<T> {
    fn default() -> Self {
        Raw(None)
    }
}

impl<T: Serialize> Serialize for Raw<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            Some(v) => s.serialize_newtype_variant("Patch", 0, "Replace", v),
            None => s.serialize_none(),
        }
    }
}

impl<'de, T> Deserialize<'de> for Raw<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        de::IgnoredAny::deserialize(d).map(|_| Raw(None))
    }
}

/// Which name stands at each place of a row of layers.
///
/// ```ron
/// "mamba"                                                        // everywhere
/// ["mamba", "mamba", "attn"]                                     // repeated to fill
/// Every(name: "attn", period: 8, offset: 4, rest: "mamba")       // layers 4, 12, 20, ...
/// At(name: "attn", layers: [9, 18, 27], rest: "mamba")           // exactly these
/// ```
/// The name `"none"` leaves the place empty.
#[derive(Clone, Debug, PartialEq)]
pub enum Names {
    /// One name everywhere.
    All(String),
    /// A pattern, repeated from the first layer on and cut off at the last.
    Pattern(Vec<String>),
    /// One in `period`.
    Every(Every),
    /// Listed layers.
    At(At),
}

/// `name` at every layer i with `i % period == offset`, `rest` elsewhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Every {
    /// What stands at the chosen layers.
    pub name: String,
    /// Distance of the chosen layers, 1 or more.
    pub period: usize,
    /// First chosen layer, below `period`; default 0.
    #[serde(default)]
    pub offset: usize,
    /// What stands at the others; default `"none"`.
    #[serde(default = "none_name")]
    pub rest: String,
}

/// `name` at the listed layers, `rest` elsewhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct At {
    /// What stands at the chosen layers.
    pub name: String,
    /// The chosen layers, from 0.
    pub layers: Vec<usize>,
    /// What stands at the others; default `"none"`.
    #[serde(default = "none_name")]
    pub rest: String,
}

fn none_name() -> String {
    NONE.to_owned()
}

/// The name that leaves a place of the layout empty.
pub const NONE: &str = "none";

#[derive(Serialize, Deserialize)]
enum NamesForm {
    Every(Every),
    At(At),
}

impl Serialize for Names {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Names::All(n) => n.serialize(s),
            Names::Pattern(n) => n.serialize(s),
            Names::Every(e) => NamesForm::Every(e.clone()).serialize(s),
            Names::At(e) => NamesForm::At(e.clone()).serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Names;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name, a list of names, `Every(..)` or `At(..)`")
            }

            fn visit_str<E: de::Error>(self, s: &str) -> Result<Names, E> {
                Ok(Names::All(s.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, a: A) -> Result<Names, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(a)).map(Names::Pattern)
            }

            fn visit_enum<A: EnumAccess<'de>>(self, a: A) -> Result<Names, A::Error> {
                Ok(
                    match NamesForm::deserialize(EnumAccessDeserializer::new(a))? {
                        NamesForm::Every(e) => Names::Every(e),
                        NamesForm::At(e) => Names::At(e),
                    },
                )
            }
        }
        d.deserialize_any(V)
    }
}

/// A set of layers: `[2, 7, 13]` or `Every(period: 6, offset: 2)`.
#[derive(Clone, Debug, PartialEq)]
pub enum LayerSet {
    /// These.
    List(Vec<usize>),
    /// Every `period`-th from `offset` on.
    Every {
        /// Distance, 1 or more.
        period: usize,
        /// First one, below `period`; default 0.
        offset: usize,
    },
}

impl Default for LayerSet {
    fn default() -> Self {
        LayerSet::List(Vec::new())
    }
}

#[derive(Serialize, Deserialize)]
enum LayerSetForm {
    Every(Rhythm),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rhythm {
    period: usize,
    #[serde(default)]
    offset: usize,
}

impl Serialize for LayerSet {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            LayerSet::List(l) => l.serialize(s),
            LayerSet::Every { period, offset } => LayerSetForm::Every(Rhythm {
                period: *period,
                offset: *offset,
            })
            .serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for LayerSet {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = LayerSet;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of layers or `Every(period: .., offset: ..)`")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, a: A) -> Result<LayerSet, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(a)).map(LayerSet::List)
            }

            fn visit_enum<A: EnumAccess<'de>>(self, a: A) -> Result<LayerSet, A::Error> {
                let LayerSetForm::Every(r) =
                    LayerSetForm::deserialize(EnumAccessDeserializer::new(a))?;
                Ok(LayerSet::Every {
                    period: r.period,
                    offset: r.offset,
                })
            }
        }
        d.deserialize_any(V)
    }
}
