//! From surface syntax to resolved types: defaults, names, layouts, and every semantic rule, all violations at once.
//!
//! Only this module makes a [`Valid`].

mod data;
mod model;
mod run;

pub(crate) use model::model;
pub use model::unsupported;
pub(crate) use run::run;

use crate::de::Path;
use crate::diag::{Diagnostic, Span};
use crate::model::Model;
use crate::run::Run;
use crate::syntax;
use crate::tree::Node;
use std::cell::RefCell;
use std::ops::Deref;

/// A value that passed `check`. Nothing else makes one.
#[derive(Clone, Debug, PartialEq)]
pub struct Valid<T>(T);

impl<T> Valid<T> {
    /// For sweeps, whose rules are the expansion itself.
    pub(crate) fn of_sweep(sweep: T) -> Valid<T>
    where
        T: SweepOnly,
    {
        Valid(sweep)
    }

    /// Gives the value up, and with it the proof.
    pub fn into_inner(self) -> T {
        self.0
    }
}

/// Keeps [`Valid::of_sweep`] from making anything else valid.
pub(crate) trait SweepOnly {}

impl SweepOnly for crate::sweep::Sweep {}

/// The rules of a model file.
pub(crate) fn check_model(
    cx: &Cx<'_>,
    at: &At,
    file: &syntax::model::Model,
) -> Option<Valid<Model>> {
    model(cx, at, file).map(Valid)
}

/// The rules of a run file.
pub(crate) fn check_run(cx: &Cx<'_>, at: &At, file: &syntax::run::Run) -> Option<Valid<Run>> {
    run(cx, at, file).map(Valid)
}

impl<T> Deref for Valid<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> AsRef<T> for Valid<T> {
    fn as_ref(&self) -> &T {
        &self.0
    }
}

/// What the rules need: the document for spans, what was struck from it, and where complaints go.
pub(crate) struct Cx<'a> {
    pub(crate) root: &'a Node,
    pub(crate) struck: &'a [Path],
    pub(crate) out: &'a RefCell<Vec<Diagnostic>>,
}

/// A path into the document, made of field names, map keys and indices.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct At(pub(crate) Vec<String>);

impl At {
    pub(crate) fn at(&self, key: impl ToString) -> At {
        let mut path = self.0.clone();
        path.push(key.to_string());
        At(path)
    }
}

impl Cx<'_> {
    /// Complains about what stands at a path.
    pub(crate) fn error(
        &self,
        at: &At,
        code: &'static str,
        message: impl Into<String>,
        label: impl Into<String>,
        help: impl Into<String>,
    ) {
        self.error_at(self.root.place(&at.0), code, message, label, help);
    }

    /// Complains about a span.
    pub(crate) fn error_at(
        &self,
        span: Span,
        code: &'static str,
        message: impl Into<String>,
        label: impl Into<String>,
        help: impl Into<String>,
    ) {
        let help: String = help.into();
        self.out.borrow_mut().push(Diagnostic {
            code,
            message: message.into(),
            at: Some(span),
            label: label.into(),
            help: Some(help).filter(|h| !h.is_empty()),
        });
    }

    /// Was something at, below or above this path wrong already?
    pub(crate) fn struck(&self, at: &At) -> bool {
        self.struck.iter().any(|s| {
            s.iter().zip(&at.0).all(|(a, b)| a == b) && s.len() <= at.0.len()
                || s.starts_with(&at.0)
        })
    }

    /// A required field.
    pub(crate) fn require<T>(&self, at: &At, name: &'static str, value: Option<T>) -> Option<T> {
        let misspelt = |s: &Path| {
            s.split_last().is_some_and(|(last, up)| {
                up == at.0.as_slice() && strsim::jaro_winkler(last, name) > 0.85
            })
        };
        if value.is_none() && !self.struck(&at.at(name)) && !self.struck.iter().any(misspelt) {
            self.error(
                at,
                "ron::missing_field",
                format!("`{name}` is missing"),
                format!("needs `{name}`"),
                format!("add `{name}: ..`"),
            );
        }
        value
    }

    /// A count that must be at least one. Gives 1 in its stead, so that later rules can divide.
    pub(crate) fn positive(&self, at: &At, name: &str, value: usize) -> usize {
        if value == 0 {
            self.error(
                &at.at(name),
                "value::zero",
                format!("`{name}` is 0"),
                "must be 1 or more",
                "",
            );
            return 1;
        }
        // Sizes multiply: beyond this their products no longer fit 64 bits.
        if value > MAX_SIZE {
            self.error(
                &at.at(name),
                "value::too_large",
                format!("`{name}` is {value}"),
                format!("must be at most {MAX_SIZE}"),
                "",
            );
            return 1;
        }
        value
    }

    /// A required count of at least one.
    pub(crate) fn count(&self, at: &At, name: &'static str, value: Option<usize>) -> Option<usize> {
        self.require(at, name, value)
            .map(|v| self.positive(at, name, v))
    }

    /// A number in a range; `wanted` says which.
    pub(crate) fn number(
        &self,
        at: &At,
        name: &str,
        value: f64,
        ok: impl Fn(f64) -> bool,
        wanted: &str,
    ) -> f64 {
        if value.is_nan() || !ok(value) {
            self.error(
                &at.at(name),
                "value::out_of_range",
                format!("`{name}` is {value}"),
                format!("must be {wanted}"),
                "",
            );
        }
        value
    }

    /// A finite number above 0.
    pub(crate) fn above_zero(&self, at: &At, name: &str, value: f64) -> f64 {
        self.number(
            at,
            name,
            value,
            |x| x > 0.0 && x.is_finite(),
            "a finite number above 0",
        )
    }

    /// A finite number, 0 or more.
    pub(crate) fn not_negative(&self, at: &At, name: &str, value: f64) -> f64 {
        self.number(
            at,
            name,
            value,
            |x| x >= 0.0 && x.is_finite(),
            "a finite number, 0 or more",
        )
    }

    /// A finite number.
    pub(crate) fn finite(&self, at: &At, name: &str, value: f64) -> f64 {
        self.number(at, name, value, f64::is_finite, "a finite number")
    }
}

/// Largest size, count or length that a file may state.
pub(crate) const MAX_SIZE: usize = 1 << 40;
