//! The rules of a model file, and its unrolled layers.

mod attention;
mod ffn;
mod layers;
mod layout;
mod mamba;

use super::{At, Cx};
use crate::diag::suggest;
use crate::model as m;
use crate::syntax::NONE;
use crate::syntax::model as s;
use crate::tree::{Kind, Node};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// What `check` accepts but lowering does not build yet, in words. Empty when all of it can run.
pub fn unsupported(_model: &m::Model) -> Vec<String> {
    Vec::new()
}

/// Resolves a model that stands at `at` in the document. `None` when so much is wrong that nothing can be resolved.
pub(crate) fn model(cx: &Cx<'_>, at: &At, file: &s::Model) -> Option<m::Model> {
    let before = cx.out.borrow().len();
    let vocab_size = cx.count(at, "vocab_size", file.vocab_size);
    let d_model = cx.count(at, "d_model", file.d_model);
    let context_len = cx.positive(at, "context_len", file.context_len.unwrap_or(2048));
    let norm = m::Norm {
        eps: cx.above_zero(at, "norm_eps", file.norm_eps.unwrap_or(1e-5)),
        zero_centered: file.norm_zero_centered.unwrap_or(false),
    };
    let embedding = m::Embedding {
        multiplier: cx.finite(
            at,
            "embedding_multiplier",
            file.embedding_multiplier.unwrap_or(1.0),
        ),
    };
    let head = m::Head {
        tied: file.tied.unwrap_or(false),
        multiplier: cx.finite(
            at,
            "logits_multiplier",
            file.logits_multiplier.unwrap_or(1.0),
        ),
    };
    let residual = cx.finite(
        at,
        "residual_multiplier",
        file.residual_multiplier.unwrap_or(1.0),
    );
    let init = file.init.unwrap_or_default();
    cx.above_zero(&at.at("init"), "std", init.std);
    let model = Build {
        cx,
        at,
        file,
        // A stand-in keeps the other rules at work when the width is missing or wrong.
        d_model: d_model.unwrap_or(DIVISIBLE),
        d_model_known: d_model.is_some(),
        context_len,
        norm,
        residual,
        used: RefCell::default(),
    };
    let final_norm = model.norm(&at.at("final_norm"), file.final_norm, norm);
    model.declared();
    let layers = model.layers();
    model.unused();
    if cx.out.borrow().len() > before {
        return None;
    }
    let model = m::Model {
        name: file.name.clone().unwrap_or_else(|| "model".to_owned()),
        vocab_size: vocab_size?,
        d_model: d_model?,
        context_len,
        embedding,
        layers: layers?,
        decoder: file.decoder,
        final_norm,
        head,
        init: m::Init {
            std: init.std,
            scale_output: init.scale_output,
        },
    };
    for what in unsupported(&model) {
        cx.error(at, "model::unsupported", what, "cannot be built yet", "");
    }
    Some(model).filter(|_| cx.out.borrow().len() == before)
}

/// Divides by all usual head counts.
const DIVISIBLE: usize = 1 << 20;

/// Longest stack.
const MAX_LAYERS: usize = 100_000;

struct Build<'a> {
    cx: &'a Cx<'a>,
    at: &'a At,
    file: &'a s::Model,
    d_model: usize,
    d_model_known: bool,
    context_len: usize,
    norm: m::Norm,
    residual: f64,
    used: RefCell<BTreeSet<String>>,
}

/// Names of one layer's halves; `None` is an empty place.
type Slot = (Option<String>, Option<String>);

impl Build<'_> {
    fn norm(&self, at: &At, n: Option<s::Norm>, default: m::Norm) -> m::Norm {
        let n = n.unwrap_or_default();
        m::Norm {
            // An inherited eps was checked where it stands.
            eps: n
                .eps
                .map_or(default.eps, |e| self.cx.above_zero(at, "eps", e)),
            zero_centered: n.zero_centered.unwrap_or(default.zero_centered),
        }
    }

    fn eps(&self, at: &At, name: &str, eps: Option<f64>) -> f64 {
        eps.map_or(self.norm.eps, |e| self.cx.above_zero(at, name, e))
    }

    /// Checks every declared mixer and ffn once, used or not, and the names.
    fn declared(&self) {
        let cx = self.cx;
        let names = |list: &str, all: Vec<&String>| {
            for n in all {
                let at = self.at.at(list).at(n);
                let fine = !n.is_empty()
                    && n.chars()
                        .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
                if !fine || n == NONE {
                    cx.error(
                        &at,
                        "model::bad_name",
                        format!("`{n}` cannot name a part of {list}"),
                        "not a usable name",
                        "names are letters, digits, `_` and `-`; `none` means an empty place",
                    );
                }
            }
        };
        names(
            "mixers",
            self.file.mixers.0.iter().map(|(n, _)| n).collect(),
        );
        names("ffns", self.file.ffns.0.iter().map(|(n, _)| n).collect());
        for (n, _) in &self.file.ffns.0 {
            if self.file.mixers.get(n).is_some() {
                let at = self.at.at("ffns").at(n);
                cx.error(
                    &at,
                    "model::name_clash",
                    format!("`{n}` names a mixer and an ffn"),
                    "also a mixer",
                    "give them different names",
                );
            }
        }
        let injected: Vec<&str> = self
            .file
            .layout
            .inject
            .iter()
            .map(|i| i.mixer.as_str())
            .collect();
        for (n, body) in &self.file.mixers.0 {
            // An injected mixer reads another width; it is checked where it is injected.
            if !injected.contains(&n.as_str()) {
                self.mixer(&self.at.at("mixers").at(n), body, self.d_model, true);
            }
        }
        for (n, body) in &self.file.ffns.0 {
            self.ffn(&self.at.at("ffns").at(n), body);
        }
        if self.file.mixers.is_empty()
            && self.file.ffns.is_empty()
            && !cx.struck(&self.at.at("mixers"))
            && !cx.struck(&self.at.at("ffns"))
        {
            cx.error(
                self.at,
                "model::empty",
                "the model declares no mixers and no ffns",
                "needs `mixers`",
                "add `mixers: {\"attn\": Attention(n_heads: 8)}` and `ffns: {\"mlp\": Glu(d_ff: 1024)}`",
            );
        }
    }

    fn unused(&self) {
        let used = self.used.borrow();
        let mixers = self
            .file
            .mixers
            .0
            .iter()
            .map(|(n, _)| ("mixers", "mixer", n));
        let ffns = self.file.ffns.0.iter().map(|(n, _)| ("ffns", "ffn", n));
        if !self.cx.out.borrow().is_empty() || !self.cx.struck.is_empty() {
            // Misspelt names and broken layouts leave others unused; that would be noise.
            let names_wrong = self
                .cx
                .out
                .borrow()
                .iter()
                .any(|d| d.code.starts_with("ron::") || d.code.starts_with("layout::"));
            if names_wrong {
                return;
            }
        }
        for (list, kind, n) in mixers.chain(ffns) {
            if !used.contains(n) {
                self.cx.error(
                    &self.at.at(list).at(n),
                    "layout::unused",
                    format!("{kind} `{n}` stands in no layer"),
                    "unused",
                    format!("name it in `layout`, or remove it from `{list}`"),
                );
            }
        }
    }

    /// Divides, or complains.
    fn divides(
        &self,
        at: &At,
        key: &str,
        code: &'static str,
        (what, whole): (&str, usize),
        (by, part): (&str, usize),
        help: &str,
    ) -> Option<usize> {
        if part == 0 || whole % part != 0 {
            self.cx.error(
                &at.at(key),
                code,
                format!("{what} {whole} is not divisible by {by} {part}"),
                format!(
                    "{whole} = {} x {part} + {}",
                    whole / part.max(1),
                    whole % part.max(1)
                ),
                help,
            );
            return None;
        }
        Some(whole / part)
    }

    fn mixer(&self, at: &At, body: &s::Mixer, width: usize, top: bool) -> Option<m::Mixer> {
        Some(match body {
            s::Mixer::Attention(a) => m::Mixer::Attention(self.attention(at, a, width)?),
            s::Mixer::Mamba1(a) => m::Mixer::Mamba1(self.mamba1(at, a)),
            s::Mixer::Mamba2(a) => m::Mixer::Mamba2(self.mamba2(at, a)),
            s::Mixer::GatedDeltaNet(a) => m::Mixer::GatedDeltaNet(self.gated_delta_net(at, a)?),
            s::Mixer::Parallel(branches) => {
                if !top {
                    self.cx.error(
                        at,
                        "model::nested_parallel",
                        "a parallel group inside a parallel group",
                        "not allowed here",
                        "list all mixers in one `Parallel([..])`",
                    );
                    return None;
                }
                m::Mixer::Parallel(self.parallel(at, branches)?)
            }
        })
    }

    fn parallel(&self, at: &At, branches: &[s::Branch]) -> Option<Vec<m::Branch>> {
        let cx = self.cx;
        if branches.is_empty() {
            cx.error(
                at,
                "model::empty_parallel",
                "a parallel group without mixers",
                "needs mixers",
                "write `Parallel([(name: \"attn\"), (name: \"mamba\")])`",
            );
        }
        let mut all = Vec::new();
        let mut seen = BTreeSet::new();
        for (i, b) in branches.iter().enumerate() {
            let at = at.at(i);
            if !seen.insert(&b.name) {
                cx.error(
                    &at.at("name"),
                    "model::branch_twice",
                    format!("`{}` stands twice in one parallel group", b.name),
                    "second time",
                    "declare a second mixer under another name",
                );
            }
            cx.finite(&at, "in_multiplier", b.in_multiplier);
            cx.finite(&at, "out_multiplier", b.out_multiplier);
            let mixer = match &b.mixer {
                Some(body) => self.mixer(&at.at("mixer"), body, self.d_model, false),
                None => self
                    .named_mixer(&b.name, &at.at("name"))
                    .and_then(|(body, declared)| {
                        if matches!(body, s::Mixer::Parallel(_)) {
                            cx.error(
                                &at.at("name"),
                                "model::nested_parallel",
                                format!("`{}` is itself a parallel group", b.name),
                                "a parallel group",
                                "list its mixers here",
                            );
                            return None;
                        }
                        // Complaints about it are made at its declaration.
                        self.quietly(|q| q.mixer(&declared, body, self.d_model, false))
                    }),
            };
            all.extend(mixer.map(|mixer| m::Branch {
                name: b.name.clone(),
                mixer,
                in_multiplier: b.in_multiplier,
                out_multiplier: b.out_multiplier,
            }));
        }
        (all.len() == branches.len()).then_some(all)
    }

    /// Runs rules whose complaints were already made elsewhere.
    fn quietly<T>(&self, f: impl FnOnce(&Build<'_>) -> T) -> T {
        let out = RefCell::default();
        let cx = Cx {
            root: self.cx.root,
            struck: self.cx.struck,
            out: &out,
        };
        f(&Build {
            cx: &cx,
            used: self.used.clone(),
            ..*self
        })
    }

    fn named_mixer(&self, name: &str, at: &At) -> Option<(&s::Mixer, At)> {
        self.used.borrow_mut().insert(name.to_owned());
        let declared = self.at.at("mixers").at(name);
        let found = self.file.mixers.get(name);
        if found.is_none() && !self.cx.struck(&declared) {
            let known: Vec<&str> = self.file.mixers.0.iter().map(|(n, _)| n.as_str()).collect();
            self.cx.error(
                at,
                "layout::undefined",
                format!("no mixer is named `{name}`"),
                "not declared in `mixers`",
                suggest(name, &known),
            );
        }
        found.map(|f| (f, declared))
    }

    fn named_ffn(&self, name: &str, at: &At) -> Option<(&s::Ffn, At)> {
        self.used.borrow_mut().insert(name.to_owned());
        let declared = self.at.at("ffns").at(name);
        let found = self.file.ffns.get(name);
        if found.is_none() && !self.cx.struck(&declared) {
            let known: Vec<&str> = self.file.ffns.0.iter().map(|(n, _)| n.as_str()).collect();
            self.cx.error(
                at,
                "layout::undefined",
                format!("no ffn is named `{name}`"),
                "not declared in `ffns`",
                suggest(name, &known),
            );
        }
        found.map(|f| (f, declared))
    }
}

fn name_of(slot: &Slot, half: &str) -> String {
    let name = if half == "mixer" { &slot.0 } else { &slot.1 };
    name.as_ref()
        .map_or_else(|| "nothing".to_owned(), |n| format!("`{n}`"))
}

/// Fields of `patch` over those of `base`; a patch of another variant replaces it.
fn merge(base: &Node, patch: &Node) -> Node {
    let name = |n: &Node| match &n.kind {
        Kind::Struct(Some(i), _) | Kind::Tuple(Some(i), _) => Some(i.text.clone()),
        Kind::Name(n) => Some(n.clone()),
        _ => None,
    };
    match &patch.kind {
        Kind::Tuple(Some(i), items) if i.text == "Replace" && items.len() == 1 => {
            return items[0].clone();
        }
        _ => {}
    }
    if name(patch).is_some() && name(patch) != name(base) {
        return patch.clone();
    }
    match (&base.kind, &patch.kind) {
        (Kind::Struct(n, old), Kind::Struct(_, new)) => {
            let mut fields = old.clone();
            for f in new {
                match fields.iter_mut().find(|g| g.name.text == f.name.text) {
                    Some(g) => {
                        *g = crate::tree::Field {
                            name: f.name.clone(),
                            value: merge(&g.value, &f.value),
                        }
                    }
                    None => fields.push(f.clone()),
                }
            }
            base.with(Kind::Struct(n.clone(), fields))
        }
        (Kind::Tuple(Some(n), items), Kind::Struct(_, new)) if items.is_empty() => {
            base.with(Kind::Struct(Some(n.clone()), new.clone()))
        }
        (Kind::Name(n), Kind::Struct(_, new)) if n != "None" => {
            let ident = crate::tree::Ident {
                text: n.clone(),
                span: base.span.clone(),
            };
            base.with(Kind::Struct(Some(ident), new.clone()))
        }
        (_, Kind::Unit) => base.clone(),
        _ => patch.clone(),
    }
}

/// The body with everything reset that does not decide the shape or the names of its weights.
pub(crate) fn shape_of_mixer(body: &m::Mixer) -> m::Mixer {
    let mut body = body.clone();
    match &mut body {
        m::Mixer::Attention(a) => {
            a.rope = None;
            a.window = None;
            a.scale = 1.0;
            a.key_multiplier = 1.0;
            if let Some(n) = &mut a.qk_norm {
                *n = m::Norm {
                    eps: 1.0,
                    zero_centered: n.zero_centered,
                };
            }
        }
        m::Mixer::Mamba1(a) => {
            if let Some(n) = &mut a.dt_bc_norm {
                n.eps = 1.0;
                if !n.weighted {
                    a.dt_bc_norm = None;
                }
            }
            a.dt_init = m::DtInit {
                min: 1.0,
                max: 1.0,
                floor: 1.0,
            };
        }
        m::Mixer::Mamba2(a) => {
            a.chunk_size = 1;
            a.dt_limit = (0.0, 1.0);
            a.dt_limit_in_decode = true;
            a.multipliers = [1.0; 5];
            a.dt_init = m::DtInit {
                min: 1.0,
                max: 1.0,
                floor: 1.0,
            };
            a.a_init = (1.0, 1.0);
            if a.gate != m::GatedNorm::GateOnly {
                a.gate = m::GatedNorm::GateThenNorm { eps: 1.0 };
            }
        }
        m::Mixer::GatedDeltaNet(a) => {
            a.chunk_size = 1;
            a.norm_eps = 1.0;
        }
        m::Mixer::Parallel(branches) => {
            for b in branches {
                b.mixer = shape_of_mixer(&b.mixer);
                b.in_multiplier = 1.0;
                b.out_multiplier = 1.0;
            }
        }
    }
    body
}

/// As [`shape_of_mixer`].
pub(crate) fn shape_of_ffn(body: &m::Ffn) -> m::Ffn {
    let mut body = body.clone();
    match &mut body {
        m::Ffn::Glu(g) => {
            g.act = m::Act::Silu;
            g.gate_multiplier = 1.0;
            g.out_multiplier = 1.0;
        }
        m::Ffn::Mlp(g) => g.act = m::Act::Silu,
        m::Ffn::Moe(g) => {
            g.top_k = 1;
            g.expert.act = m::Act::Silu;
            g.load_balance = 0.0;
            let correction_bias = g.router.correction_bias;
            g.router = m::Router {
                score: m::RouterScore::SoftmaxAll,
                normalize: false,
                correction_bias,
                n_groups: 1,
                top_groups: 1,
                scale: 1.0,
            };
            if let Some(x) = &mut g.shared {
                x.ffn = shape_of_ffn(&x.ffn);
            }
        }
    }
    body
}
