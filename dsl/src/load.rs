//! The way in: text and overrides to checked values.
//!
//! text -> tree -> files named inside put in their place -> `--set` -> typed reading -> rules. Every error of the last two stages
//! is collected into one [`Report`].

use crate::check::{At, Cx, Valid, check_model, check_run};
use crate::de::{Path as TreePath, decode};
use crate::diag::{Diagnostic, Report, Source, Span};
use crate::model::Model;
use crate::run::Run;
use crate::tree::{Ident, Kind, Node, parse, parse_loose};
use serde::de::DeserializeOwned;
use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

/// One `--set path=value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Such as `model.d_model` or `phases.0.steps`.
    pub path: String,
    /// In RON; text fields take it without quotes too.
    pub value: String,
}

impl Set {
    /// An override made by a program.
    pub fn new(path: impl Into<String>, value: impl Into<String>) -> Set {
        Set {
            path: path.into(),
            value: value.into(),
        }
    }

    fn source(&self) -> Arc<Source> {
        Arc::new(Source::new(
            "--set",
            format!("{}={}", self.path, self.value),
        ))
    }
}

impl std::str::FromStr for Set {
    type Err = Report;

    /// Splits `path=value` at the first `=`.
    fn from_str(text: &str) -> Result<Set, Report> {
        match text.split_once('=') {
            Some((path, value)) if !path.trim().is_empty() => {
                Ok(Set::new(path.trim(), value.trim()))
            }
            _ => {
                let source = Arc::new(Source::new("--set", text));
                let at = Some(Span {
                    start: 0,
                    end: text.len(),
                    source,
                });
                Err(Report::of(Diagnostic {
                    code: "set::form",
                    message: format!("`{text}` is not of the form path=value"),
                    at,
                    label: "expected path=value".to_owned(),
                    help: Some("for instance `--set model.d_model=512`".to_owned()),
                }))
            }
        }
    }
}

/// A document with its files put in and its overrides applied.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Document {
    pub(crate) root: Node,
    kind: Shape,
}

/// Which file a document is; decides where other files may be named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Model,
    Run,
    Sweep,
}

impl Document {
    pub(crate) fn open(source: &Source, kind: Shape) -> Result<Document, Report> {
        let source = Arc::new(Source {
            name: source.name.clone(),
            text: source.text.clone(),
            dir: source.dir.clone(),
        });
        let root = parse(&source).map_err(Report::of)?;
        let mut doc = Document { root, kind };
        doc.include()?;
        Ok(doc)
    }

    /// A document whose files are put in already.
    pub(crate) fn of(root: Node, kind: Shape) -> Document {
        Document { root, kind }
    }

    fn include(&mut self) -> Result<(), Report> {
        let run = match self.kind {
            Shape::Model => None,
            Shape::Run => Some(&mut self.root),
            Shape::Sweep => self.root.get_mut("base"),
        };
        let Some(run) = run else { return Ok(()) };
        include(run)?;
        run.get_mut("model").map_or(Ok(()), include)?;
        let transfer = run.get_mut("transfer");
        transfer
            .and_then(|t| t.get_mut("base"))
            .map_or(Ok(()), include)
    }

    /// Applies one override.
    pub(crate) fn set(&mut self, set: &Set) -> Result<(), Report> {
        let source = set.source();
        let value = parse_loose(&source, set.path.len() + 1);
        let key = Span {
            source,
            start: 0,
            end: set.path.len(),
        };
        self.set_node(&set.path, &key, value)
    }

    pub(crate) fn set_node(&mut self, path: &str, key: &Span, value: Node) -> Result<(), Report> {
        self.root.set(path, key, value).map_err(Report::of)?;
        let names = ["model", "base", "transfer", "transfer.base"];
        if names.contains(&path.strip_prefix("base.").unwrap_or(path)) {
            self.include()
        } else {
            Ok(())
        }
    }

    pub(crate) fn sets(mut self, sets: &[Set]) -> Result<Document, Report> {
        let mut all = Report::default();
        for s in sets {
            if let Err(mut r) = self.set(s) {
                all.diagnostics.append(&mut r.diagnostics);
            }
        }
        if all.diagnostics.is_empty() {
            Ok(self)
        } else {
            Err(all)
        }
    }

    /// Reads and checks.
    pub(crate) fn check<S: DeserializeOwned, T>(
        mut self,
        rules: impl FnOnce(&Cx<'_>, &At, &S) -> Option<T>,
    ) -> Result<T, Report> {
        let mut errors: Vec<Diagnostic> = Vec::new();
        let mut struck: Vec<TreePath> = Vec::new();
        let root = self.root.clone();
        let file: Option<S> = decode(&mut self.root, &mut errors, &mut struck);
        let clean = errors.is_empty();
        let out = RefCell::new(errors);
        let cx = Cx {
            root: &root,
            struck: &struck,
            out: &out,
        };
        let value = file.and_then(|f| rules(&cx, &At::default(), &f));
        let diagnostics = out.into_inner();
        match value {
            Some(v) if clean && diagnostics.is_empty() => Ok(v),
            _ => Err(Report { diagnostics }.sorted()),
        }
    }
}

/// Puts the named file in the place of `"x.ron"`, `File("x.ron")` or `File(path: "x.ron", set: {..})`; unwraps `Inline(..)`.
pub(crate) fn include(node: &mut Node) -> Result<(), Report> {
    let (path, sets) = match &node.kind {
        Kind::Str(s) => (
            Node {
                loose: false,
                ..node.with(Kind::Str(s.clone()))
            },
            None,
        ),
        Kind::Tuple(Some(n), items) if n.text == "File" && items.len() == 1 => {
            (items[0].clone(), None)
        }
        Kind::Struct(Some(n), fields) if n.text == "File" => {
            if let Some(f) = fields
                .iter()
                .find(|f| f.name.text != "path" && f.name.text != "set")
            {
                return Err(wrong(
                    &f.name.span,
                    "ron::unknown_field",
                    format!("unknown field `{}`", f.name.text),
                    "known here: `path`, `set`",
                ));
            }
            let Some(path) = node.get("path") else {
                return Err(wrong(
                    &n.span,
                    "ron::missing_field",
                    "`path` is missing".to_owned(),
                    "write `File(path: \"x.ron\")`",
                ));
            };
            (path.clone(), node.get("set").cloned())
        }
        Kind::Tuple(Some(n), items) if n.text == "Inline" && items.len() == 1 => {
            *node = items[0].clone();
            return Ok(());
        }
        Kind::Struct(Some(n), fields) if n.text == "Inline" => {
            *node = node.with(Kind::Struct(None::<Ident>, fields.clone()));
            return Ok(());
        }
        _ => return Ok(()),
    };
    let Kind::Str(name) = &path.kind else {
        return Err(wrong(
            &path.head(),
            "ron::wrong_type",
            format!("expected a path, found {}", path.describe()),
            "paths are texts in double quotes",
        ));
    };
    let file = match &path.span.source.dir {
        Some(d) if Path::new(name).is_relative() => d.join(name),
        _ => Path::new(name).to_path_buf(),
    };
    let source = Source::read(&file).map_err(|mut r| {
        for d in &mut r.diagnostics {
            d.at = Some(path.head());
            d.label = "named here".to_owned();
            d.help = Some("paths are relative to the file that names them; an inline value is written `( .. )`".to_owned());
        }
        r
    })?;
    let mut found = parse(&Arc::new(source)).map_err(Report::of)?;
    match sets.map(|s| s.kind) {
        None => {}
        Some(Kind::Map(entries)) => {
            for (k, v) in entries {
                let Kind::Str(p) = &k.kind else {
                    return Err(wrong(
                        &k.head(),
                        "ron::wrong_type",
                        format!("expected a path, found {}", k.describe()),
                        "for instance `set: {\"d_model\": 512}`",
                    ));
                };
                found.set(p, &k.span, v).map_err(Report::of)?;
            }
        }
        Some(_) => {
            return Err(wrong(
                &node.head(),
                "ron::wrong_type",
                "`set` is not a map".to_owned(),
                "for instance `set: {\"d_model\": 512}`",
            ));
        }
    }
    *node = found;
    Ok(())
}

fn wrong(at: &Span, code: &'static str, message: String, help: &str) -> Report {
    Report::of(Diagnostic {
        code,
        message,
        at: Some(at.clone()),
        label: "here".to_owned(),
        help: Some(help.to_owned()),
    })
}

/// Parses and checks a model file.
///
/// # Errors
/// All violations of the file.
pub fn parse_model(source: &Source, sets: &[Set]) -> Result<Valid<Model>, Report> {
    Document::open(source, Shape::Model)?
        .sets(sets)?
        .check(check_model)
}

/// Parses and checks a run file, reading the model file it names.
///
/// # Errors
/// All violations of the files.
pub fn parse_run(source: &Source, sets: &[Set]) -> Result<Valid<Run>, Report> {
    Document::open(source, Shape::Run)?
        .sets(sets)?
        .check(check_run)
}

/// [`parse_model`] of a file.
///
/// # Errors
/// When it cannot be read, and all violations.
pub fn load_model(path: impl AsRef<Path>, sets: &[Set]) -> Result<Valid<Model>, Report> {
    parse_model(&Source::read(path)?, sets)
}

/// [`parse_run`] of a file.
///
/// # Errors
/// When it cannot be read, and all violations.
pub fn load_run(path: impl AsRef<Path>, sets: &[Set]) -> Result<Valid<Run>, Report> {
    parse_run(&Source::read(path)?, sets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Ffn, Mixer};

    fn model(text: &str) -> Valid<Model> {
        parse_model(&Source::new("m.ron", text), &[]).unwrap_or_else(|r| panic!("{r}"))
    }

    fn errors(text: &str) -> Report {
        parse_model(&Source::new("m.ron", text), &[]).expect_err("should not check")
    }

    const JAMBA: &str = r#"(
    name: "jamba-like", vocab_size: 1000, d_model: 64, n_layers: 16, norm_eps: 1e-6,
    mixers: {
        "attn": Attention(n_heads: 4, n_kv_heads: 2, rope: None),
        "mamba": Mamba1(d_state: 8, dt_bc_norm: ()),
    },
    ffns: {
        "mlp": Glu(d_ff: 128),
        "moe": Moe(n_experts: 8, top_k: 2, d_ff: 128, router: (normalize: false)),
    },
    layout: (
        mixer: Every(name: "attn", period: 8, offset: 4, rest: "mamba"),
        ffn: Every(name: "moe", period: 2, offset: 1, rest: "mlp"),
    ),
)"#;

    fn names(m: &Model) -> Vec<String> {
        let name = |s: &Option<String>| s.clone().unwrap_or_else(|| "_".to_owned());
        m.layers
            .iter()
            .map(|l| {
                let (a, b) = (
                    l.mixer.as_ref().map(|m| m.name.clone()),
                    l.ffn.as_ref().map(|m| m.name.clone()),
                );
                format!("{}+{}", name(&a), name(&b))
            })
            .collect()
    }

    #[test]
    fn two_independent_rhythms() {
        let m = model(JAMBA);
        assert_eq!(m.layers.len(), 16);
        assert_eq!(names(&m)[3..6], ["mamba+moe", "attn+mlp", "mamba+moe"]);
        let Some(Mixer::Mamba1(mamba)) = m.layers[0].mixer.as_ref().map(|m| &m.body) else {
            panic!("{m:?}")
        };
        assert_eq!((mamba.d_inner, mamba.dt_rank, mamba.d_conv), (128, 4, 4));
        assert_eq!(
            mamba.dt_bc_norm.map(|n| (n.eps, n.weighted)),
            Some((1e-6, true))
        );
        let Some(Mixer::Attention(a)) = m.layers[4].mixer.as_ref().map(|m| &m.body) else {
            panic!("{m:?}")
        };
        assert_eq!((a.head_dim, a.scale, a.rope.is_none()), (16, 0.25, true));
        let Some(Ffn::Moe(moe)) = m.layers[1].ffn.as_ref().map(|m| &m.body) else {
            panic!("{m:?}")
        };
        assert!(!moe.router.normalize);
    }

    #[test]
    fn patterns_groups_patches_sharing_and_injection() {
        let m = model(
            r#"(vocab_size: 10, d_model: 32,
                mixers: {"m": Mamba2(head_dim: 16, d_state: 8), "a": Attention(n_heads: 2)}, ffns: {"f": Mlp(d_ff: 64, act: Relu2)},
                layout: (pattern: "M-M*-", patch: {3: (mixer: (window: 5))}, share: [(layers: [0, 2])]))"#,
        );
        assert_eq!(names(&m), ["m+_", "_+f", "m+_", "a+_", "_+f"]);
        assert_eq!(
            m.layers[2].mixer.as_ref().map(|s| s.weights.as_str()),
            Some("layers.0.mixer")
        );
        assert!(
            matches!(&m.layers[3].mixer.as_ref().map(|s| &s.body), Some(Mixer::Attention(a)) if a.window == Some(5) && a.n_heads == 2)
        );
        let m = model(
            r#"(vocab_size: 10, d_model: 32, tie_word_embeddings: true,
                mixers: {"m": Mamba1(), "shared": Attention(n_heads: 4, rope: None), "both": Parallel([(name: "m"), (name: "a", out_multiplier: 0.5)]), "a": Attention(num_attention_heads: 2)},
                ffns: {"f": Glu(d_ff: 64), "g": Mlp(d_ff: 64)},
                layout: (groups: [(times: 2, mixer: ["m", "both"], ffn: "f")], inject: [(layers: [2], mixer: "shared", ffn: "g")]))"#,
        );
        assert!(m.head.tied);
        assert_eq!(names(&m), ["m+f", "both+f", "m+f", "both+f"]);
        let inject = m.layers[2].inject.as_ref().expect("fed");
        assert_eq!(
            (inject.mixer.head_dim, inject.weights.as_str()),
            (16, "shared.block")
        );
    }

    #[test]
    fn all_violations_at_once() {
        let r = errors(
            r#"(
    vocab_size: 0,
    dmodel: 64,
    n_layers: 4,
    mixers: {
        "attn": Attention(n_heads: 6, n_kv_heads: 4, window: 0, head_dim: 8),
        "mamba": Mamba2(d_state: "big"),
    },
    ffns: {"moe": Moe(n_experts: 2, top_k: 3, d_ff: 8)},
    layout: (mixer: Every(name: "atn", period: 4, offset: 4, rest: "mamba")),
)"#,
        );
        let codes: Vec<&str> = r.diagnostics.iter().map(|d| d.code).collect();
        println!("{r}");
        for want in [
            "value::zero",
            "ron::unknown_field",
            "model::heads_divide",
            "model::window_zero",
            "ron::wrong_type",
            "model::top_k",
            "layout::undefined",
            "layout::offset",
        ] {
            assert!(codes.contains(&want), "{want} not in {codes:?}\n{r}");
        }
    }

    #[test]
    fn overrides_reach_everything() {
        let set = |s: &str| s.parse::<Set>().expect("a set");
        let src = Source::new("m.ron", JAMBA);
        let m = parse_model(
            &src,
            &[
                set("d_model=32"),
                set("mixers.attn.n_heads=8"),
                set("layout.ffn=mlp"),
                set("ffns.moe.shared=(ffn: Mlp(d_ff: 4))"),
                set("layout.mixer=[attn, mamba]"),
                set("layout.ffn=[mlp, moe]"),
                set("name=a//b"),
            ],
        );
        let m = m.unwrap_or_else(|r| panic!("{r}"));
        assert_eq!((m.d_model, m.name.as_str()), (32, "a//b"));
        assert_eq!(names(&m)[..2], ["attn+mlp", "mamba+moe"]);
        for (bad, code) in [
            ("d_modl=3", "ron::unknown_field"),
            ("mixers.atn.n_heads=3", "set::path"),
            ("d_model.x=3", "set::path"),
            ("n_layers=x", "ron::wrong_type"),
        ] {
            let r = parse_model(&src, &[set(bad)]).expect_err(bad);
            assert!(r.has(code), "{bad}: {r}");
            assert!(r.to_string().contains("--set:1:"), "{r}");
        }
    }

    #[test]
    fn written_models_and_runs_check_to_equal_ones() {
        let m = model(JAMBA);
        println!("{}", m.to_ron());
        assert_eq!(model(&m.to_ron()), m);
        let text = format!(
            "(model: {JAMBA}, data: Mqar(vocab_size: 1000, n_pairs: 4), steps: 10, seq_len: 16, grad_clip: None)"
        );
        let run = parse_run(&Source::new("r.ron", text), &[]).unwrap_or_else(|r| panic!("{r}"));
        println!("{}", run.to_ron());
        assert_eq!(
            parse_run(&Source::new("w.ron", run.to_ron()), &[]).unwrap_or_else(|r| panic!("{r}")),
            run
        );
    }

    #[test]
    fn a_short_run_and_phases() {
        let text = format!(
            "(model: {JAMBA}, data: Text(path: \"a.txt\"), steps: 10, seq_len: 16, schedule: (warmup: Linear(2), decay: Cosine(final_fraction: 0.1)))"
        );
        let src = Source::new("r.ron", text);
        let run = parse_run(
            &src,
            &[
                "data.path=/x/b.txt".parse().expect("a set"),
                "optimizer.lr=3e-4".parse().expect("a set"),
            ],
        )
        .unwrap_or_else(|r| panic!("{r}"));
        assert_eq!(run.phases.len(), 1);
        assert_eq!(run.phases[0].batch, 8);
        assert!(
            matches!(&run.phases[0].data, crate::data::Data::Text(t) if t.path == Path::new("/x/b.txt"))
        );
        assert_eq!(run.lr_at(0), 1.5e-4);
        assert!((run.lr_at(9) - 3e-5).abs() < 1e-12);
        let r =
            parse_run(&Source::new("r.ron", "(model: \"nowhere.ron\")"), &[]).expect_err("no file");
        assert!(r.has("file::unreadable"));
        let text = format!(
            "(model: {JAMBA}, data: Mqar(vocab_size: 2000, n_pairs: 9), seq_len: 32, phases: [(steps: 10), (steps: 5, lr: 0)])"
        );
        let r = parse_run(&Source::new("r.ron", text), &[]).expect_err("wrong");
        for code in ["data::vocab", "data::mqar_pairs", "value::out_of_range"] {
            assert!(r.has(code), "{r}");
        }
    }
}
