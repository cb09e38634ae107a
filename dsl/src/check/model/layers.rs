//! The unrolled layers: what each takes from its names and patches, what it shares, what is injected into it.

use super::{At, Build, Slot, m, merge, name_of, s, shape_of_ffn, shape_of_mixer};
use crate::check::Cx;
use crate::de::decode;
use crate::syntax::LayerSet;
use crate::tree::Node;
use std::cell::RefCell;

impl Build<'_> {
    /// The unrolled stack.
    pub(super) fn layers(&self) -> Option<Vec<m::Layer>> {
        let slots = self.slots()?;
        let layout = self.at.at("layout");
        let n = slots.len();
        let mut layers = Vec::with_capacity(n);
        // Bodies of declared names, resolved once; patches make others.
        let mut whole = true;
        for (i, (mixer, ffn)) in slots.iter().enumerate() {
            let patch = self
                .file
                .layout
                .patch
                .0
                .iter()
                .find(|(k, _)| *k == i)
                .map(|(_, p)| p.clone())
                .unwrap_or_default();
            let at = layout.at("patch").at(i);
            let mut layer = m::Layer {
                inject: None,
                mixer: None,
                ffn: None,
            };
            if let Some(name) = mixer {
                let body = self.patched_mixer(name, &at.at("mixer"));
                whole &= body.is_some();
                layer.mixer = body.map(|body| m::Sublayer {
                    weights: format!("layers.{i}.mixer"),
                    name: name.clone(),
                    norm: self.norm(&at.at("mixer_norm"), patch.mixer_norm, self.norm),
                    body,
                    residual_multiplier: self.cx.finite(
                        &at,
                        "mixer_residual",
                        patch.mixer_residual.unwrap_or(self.residual),
                    ),
                });
            } else {
                let given = patch.mixer_norm.is_some()
                    || patch.mixer_residual.is_some()
                    || self.cx.root.find(&at.at("mixer").0).is_some();
                self.patch_of_nothing(given, &at, "mixer", i);
            }
            if let Some(name) = ffn {
                let body = self.patched_ffn(name, &at.at("ffn"));
                whole &= body.is_some();
                layer.ffn = body.map(|body| m::Sublayer {
                    weights: format!("layers.{i}.ffn"),
                    name: name.clone(),
                    norm: self.norm(&at.at("ffn_norm"), patch.ffn_norm, self.norm),
                    body,
                    residual_multiplier: self.cx.finite(
                        &at,
                        "ffn_residual",
                        patch.ffn_residual.unwrap_or(self.residual),
                    ),
                });
            } else {
                let given = patch.ffn_norm.is_some()
                    || patch.ffn_residual.is_some()
                    || self.cx.root.find(&at.at("ffn").0).is_some();
                self.patch_of_nothing(given, &at, "ffn", i);
            }
            layers.push(layer);
        }
        for (i, _) in &self.file.layout.patch.0 {
            self.in_range(&layout.at("patch").at(i), *i, n);
        }
        self.share(&mut layers, &slots);
        self.inject(&mut layers, &slots);
        whole.then_some(layers)
    }

    fn patch_of_nothing(&self, given: bool, at: &At, half: &str, i: usize) {
        if given {
            self.cx.error(
                at,
                "layout::patch_empty",
                format!("layer {i} has no {half} to patch"),
                format!("no {half} here"),
                "",
            );
        }
    }

    pub(super) fn in_range(&self, at: &At, i: usize, n: usize) -> bool {
        if i >= n {
            self.cx.error(
                at,
                "layout::index",
                format!("there is no layer {i}"),
                format!("layers are 0 to {}", n.saturating_sub(1)),
                "",
            );
        }
        i < n
    }

    /// The document's node of a body with the patch's fields put over it.
    fn patched(&self, list: &str, name: &str, at: &At) -> Option<Node> {
        let patch = self.cx.root.find(&at.0)?;
        let base = self.cx.root.find(&self.at.at(list).at(name).0)?;
        Some(merge(base, patch))
    }

    fn patched_mixer(&self, name: &str, at: &At) -> Option<m::Mixer> {
        // A name that is not declared was complained about where it stands.
        let body = self.file.mixers.get(name)?;
        let declared = self.at.at("mixers").at(name);
        let Some(node) = self.patched("mixers", name, at) else {
            return self.quietly(|q| q.mixer(&declared, body, self.d_model, true));
        };
        self.decoded(node, at, |q, at, body: &s::Mixer| {
            q.mixer(at, body, self.d_model, true)
        })
    }

    fn patched_ffn(&self, name: &str, at: &At) -> Option<m::Ffn> {
        let body = self.file.ffns.get(name)?;
        let declared = self.at.at("ffns").at(name);
        let Some(node) = self.patched("ffns", name, at) else {
            return self.quietly(|q| q.ffn(&declared, body));
        };
        self.decoded(node, at, |q, at, body: &s::Ffn| q.ffn(at, body))
    }

    /// Reads a merged node and applies the rules to it, complaining at the patch.
    fn decoded<T: serde::de::DeserializeOwned, R>(
        &self,
        mut node: Node,
        at: &At,
        rule: impl FnOnce(&Build<'_>, &At, &T) -> Option<R>,
    ) -> Option<R> {
        let mut errors = Vec::new();
        let mut struck = Vec::new();
        let body: Option<T> = decode(&mut node, &mut errors, &mut struck);
        self.cx.out.borrow_mut().append(&mut errors);
        let body = body?;
        let out = RefCell::default();
        let cx = Cx {
            root: &node,
            struck: &struck,
            out: &out,
        };
        let found = rule(
            &Build {
                cx: &cx,
                used: self.used.clone(),
                ..*self
            },
            &At::default(),
            &body,
        );
        let here = self.cx.root.place(&at.0);
        for mut d in out.into_inner() {
            // A fault of the unpatched part is shown at the patch that brought it about.
            let in_patch = self.cx.root.find(&at.0).is_some_and(|p| {
                d.at.as_ref().is_some_and(|s| {
                    s.source == p.span.source && s.start >= p.span.start && s.end <= p.span.end
                })
            });
            if !in_patch {
                d.at = Some(here.clone());
            }
            self.cx.out.borrow_mut().push(d);
        }
        found
    }

    fn share(&self, layers: &mut [m::Layer], slots: &[Slot]) {
        let n = layers.len();
        for (k, share) in self.file.layout.share.iter().enumerate() {
            let at = self.at.at("layout").at("share").at(k).at("layers");
            if share.layers.len() < 2 {
                self.cx.error(
                    &at,
                    "layout::share",
                    "fewer than two layers share nothing",
                    "needs two or more layers",
                    "",
                );
            }
            let mut ok = true;
            for (j, i) in share.layers.iter().enumerate() {
                ok &= self.in_range(&at.at(j), *i, n);
                if share.layers[..j].contains(i) {
                    self.cx.error(
                        &at.at(j),
                        "layout::share",
                        format!("layer {i} stands twice in one sharing group"),
                        "second time",
                        "",
                    );
                }
            }
            let Some(&owner) = share.layers.first().filter(|_| ok) else {
                continue;
            };
            for (j, &i) in share.layers.iter().enumerate().skip(1) {
                let differ = |what: &str| {
                    self.cx.error(
                        &at.at(j),
                        "layout::share_shapes",
                        format!("layers {owner} and {i} cannot share their {what}: the weights differ in shape"),
                        format!("{} here, {} there", name_of(&slots[i], what), name_of(&slots[owner], what)),
                        "shared layers need the same kind and sizes",
                    );
                };
                if share.part != s::SharePart::Ffn {
                    let first = layers[owner]
                        .mixer
                        .as_ref()
                        .map(|m| (m.weights.clone(), shape_of_mixer(&m.body)));
                    match (first, &mut layers[i].mixer) {
                        (None, _) if slots[owner].0.is_some() => {}
                        (_, None) if slots[i].0.is_some() => {}
                        (None, None) => {}
                        (Some((w, shape)), Some(m)) if shape == shape_of_mixer(&m.body) => {
                            m.weights = w
                        }
                        _ => differ("mixer"),
                    }
                }
                if share.part != s::SharePart::Mixer {
                    let first = layers[owner]
                        .ffn
                        .as_ref()
                        .map(|m| (m.weights.clone(), shape_of_ffn(&m.body)));
                    match (first, &mut layers[i].ffn) {
                        (None, _) if slots[owner].1.is_some() => {}
                        (_, None) if slots[i].1.is_some() => {}
                        (None, None) => {}
                        (Some((w, shape)), Some(m)) if shape == shape_of_ffn(&m.body) => {
                            m.weights = w
                        }
                        _ => differ("ffn"),
                    }
                }
            }
        }
    }

    fn inject(&self, layers: &mut [m::Layer], slots: &[Slot]) {
        let n = layers.len();
        let mut shapes: Vec<(String, m::Mixer, m::Ffn)> = Vec::new();
        for (k, inj) in self.file.layout.inject.iter().enumerate() {
            let at = self.at.at("layout").at("inject").at(k);
            let fine = !inj.name.is_empty()
                && inj
                    .name
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
            if !fine {
                self.cx.error(
                    &at.at("name"),
                    "model::bad_name",
                    format!("`{}` cannot name shared weights", inj.name),
                    "not a usable name",
                    "names are letters, digits, `_` and `-`",
                );
            }
            let width = 2 * self.d_model;
            let mixer = self.named_mixer(&inj.mixer, &at.at("mixer")).and_then(
                |(body, declared)| match body {
                    s::Mixer::Attention(a) => self.attention(&declared, a, width),
                    _ => {
                        self.cx.error(
                            &at.at("mixer"),
                            "layout::inject",
                            format!("`{}` is not attention", inj.mixer),
                            "must name an `Attention(..)`",
                            "an injected block is a transformer block",
                        );
                        None
                    }
                },
            );
            let ffn = self
                .named_ffn(&inj.ffn, &at.at("ffn"))
                .and_then(|(body, declared)| self.quietly(|q| q.ffn(&declared, body)));
            let norm = self.norm(&at.at("norm"), inj.norm, self.norm);
            let ffn_norm = self.norm(&at.at("ffn_norm"), inj.ffn_norm, self.norm);
            let chosen = match &inj.layers {
                LayerSet::List(l) => l.clone(),
                LayerSet::Every { period, offset } => {
                    self.rhythm(&at.at("layers"), *period, *offset);
                    (*offset..n).step_by((*period).max(1)).collect()
                }
            };
            if let (Some(m1), Some(f1)) = (&mixer, &ffn) {
                let shape = (
                    shape_of_mixer(&m::Mixer::Attention(m1.clone())),
                    shape_of_ffn(f1),
                );
                match shapes.iter().find(|(n, ..)| *n == inj.name) {
                    Some((_, m2, f2)) if (m2, f2) != (&shape.0, &shape.1) => self.cx.error(
                        &at.at("name"),
                        "layout::share_shapes",
                        format!(
                            "two blocks named `{}` differ in the shape of their weights",
                            inj.name
                        ),
                        "shared with an earlier one",
                        "give them different names",
                    ),
                    Some(_) => {}
                    None => shapes.push((inj.name.clone(), shape.0, shape.1)),
                }
            }
            for (j, i) in chosen.into_iter().enumerate() {
                let place = at.at("layers").at(j);
                if !self.in_range(&place, i, n) {
                    continue;
                }
                let layer = &mut layers[i];
                if layer.inject.is_some() {
                    self.cx.error(
                        &place,
                        "layout::inject",
                        format!("layer {i} is fed by two blocks"),
                        "second time",
                        "one injected block per layer",
                    );
                }
                if slots[i].0.is_none() {
                    self.cx.error(
                        &place,
                        "layout::inject",
                        format!("layer {i} has no mixer to feed"),
                        "no mixer here",
                        "",
                    );
                }
                if let (Some(mixer), Some(ffn)) = (&mixer, &ffn) {
                    layer.inject = Some(m::Inject {
                        weights: format!("shared.{}", inj.name),
                        own_weights: format!("layers.{i}.inject"),
                        norm,
                        mixer: mixer.clone(),
                        ffn_norm,
                        ffn: ffn.clone(),
                    });
                }
            }
        }
    }
}
