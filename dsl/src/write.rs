//! From resolved values back to RON text that checks to an equal value.
//!
//! Defaults that depend on other fields are written out, so a written file means the same under later defaults.

use crate::data::{Data, Tokenizer, is_url};
use crate::model as m;
use crate::run::Run;
use crate::syntax::model as s;
use crate::syntax::run as r;
use crate::syntax::{At, Every, Indexed, LayerSet, NONE, Named, Names, Raw};
use serde::Serialize;
use std::path::PathBuf;

impl m::Model {
    /// RON text that checks to an equal model. Names of mixers and ffns must be usable as names (letters, digits, `_`, `-`).
    pub fn to_ron(&self) -> String {
        text(&surface_model(self), 2)
    }
}

impl Run {
    /// RON text that checks to an equal run, with the model inline and paths of data absolute.
    pub fn to_ron(&self) -> String {
        text(&surface_run(self), 3)
    }
}

impl Data {
    /// RON text of the data parameters, paths absolute.
    pub fn to_ron(&self) -> String {
        text(&absolute(self), 1)
    }
}

/// Pretty RON in the dialect that this crate reads: options implicit, newtypes unwrapped, one entry a line
/// down to `depth`.
pub(crate) fn text(value: &impl Serialize, depth: usize) -> String {
    use ron::extensions::Extensions as E;
    let options = ron::Options::default()
        .with_default_extension(E::IMPLICIT_SOME | E::UNWRAP_NEWTYPES | E::UNWRAP_VARIANT_NEWTYPES);
    let pretty = ron::ser::PrettyConfig::new()
        .depth_limit(depth)
        .struct_names(false)
        .new_line("\n");
    // These types hold only texts, numbers, lists, maps with text or number keys, and enums: all can be written.
    let text = options.to_string_pretty(value, pretty).unwrap_or_default();
    // Our own variants named None need no escape here: options and they never meet in one field.
    text.replace(": r#None", ": None")
        + "
"
}

/// The syntax of a model.
pub fn surface_model(model: &m::Model) -> s::Model {
    let first = model.layers.iter().find_map(|l| {
        l.mixer
            .as_ref()
            .map(|x| (x.norm, x.residual_multiplier))
            .or(l.ffn.as_ref().map(|x| (x.norm, x.residual_multiplier)))
    });
    let (norm, residual) = first.unwrap_or((model.final_norm, 1.0));
    let mut mixers: Vec<(String, m::Mixer)> = Vec::new();
    let mut ffns: Vec<(String, m::Ffn)> = Vec::new();
    let mut patch = Vec::new();
    for (i, layer) in model.layers.iter().enumerate() {
        let mut p = s::Patch::default();
        if let Some(x) = &layer.mixer {
            p.mixer = Raw(declare(&mut mixers, &x.name, &x.body).map(|b| mixer(&b)));
            p.mixer_norm = (x.norm != norm).then(|| surface_norm(x.norm));
            p.mixer_residual = (x.residual_multiplier != residual).then_some(x.residual_multiplier);
        }
        if let Some(x) = &layer.ffn {
            p.ffn = Raw(declare(&mut ffns, &x.name, &x.body).map(|b| ffn(&b)));
            p.ffn_norm = (x.norm != norm).then(|| surface_norm(x.norm));
            p.ffn_residual = (x.residual_multiplier != residual).then_some(x.residual_multiplier);
        }
        if p != s::Patch::default() {
            patch.push((i, p));
        }
    }
    let inject = injections(model, norm, &mut mixers, &mut ffns);
    let name = |n: Option<&String>| n.cloned().unwrap_or_else(|| NONE.to_owned());
    let rows = |half: &dyn Fn(&m::Layer) -> Option<&String>| {
        model
            .layers
            .iter()
            .map(|l| name(half(l)))
            .collect::<Vec<_>>()
    };
    let layout = s::Layout {
        mixer: Some(rhythm(&rows(&|l| l.mixer.as_ref().map(|x| &x.name)))),
        ffn: Some(rhythm(&rows(&|l| l.ffn.as_ref().map(|x| &x.name)))),
        patch: Indexed(patch),
        share: shares(model),
        inject,
        ..s::Layout::default()
    };
    s::Model {
        name: Some(model.name.clone()),
        vocab_size: Some(model.vocab_size),
        d_model: Some(model.d_model),
        n_layers: Some(model.layers.len()),
        context_len: Some(model.context_len),
        norm_eps: Some(norm.eps),
        norm_zero_centered: norm.zero_centered.then_some(true),
        decoder: model.decoder,
        final_norm: (model.final_norm != norm).then(|| surface_norm(model.final_norm)),
        tied: Some(model.head.tied),
        embedding_multiplier: (model.embedding.multiplier != 1.0)
            .then_some(model.embedding.multiplier),
        logits_multiplier: (model.head.multiplier != 1.0).then_some(model.head.multiplier),
        residual_multiplier: (residual != 1.0).then_some(residual),
        init: Some(s::Init {
            std: model.init.std,
            scale_output: model.init.scale_output,
        }),
        mixers: Named(mixers.iter().map(|(n, b)| (n.clone(), mixer(b))).collect()),
        ffns: Named(ffns.iter().map(|(n, b)| (n.clone(), ffn(b))).collect()),
        layout,
    }
}

/// Declares a body under its name; gives it back when the name already means another body.
fn declare<T: Clone + PartialEq>(all: &mut Vec<(String, T)>, name: &str, body: &T) -> Option<T> {
    match all.iter().find(|(n, _)| n == name) {
        Some((_, b)) => (b != body).then(|| body.clone()),
        None => {
            all.push((name.to_owned(), body.clone()));
            None
        }
    }
}

/// The shortest description of a row of names.
pub(crate) fn rhythm(row: &[String]) -> Names {
    let n = row.len();
    let period = (1..=n)
        .find(|p| (0..n).all(|i| row[i] == row[i % p]))
        .unwrap_or(1);
    let Some(first) = row.first() else {
        return Names::All(NONE.to_owned());
    };
    if period == 1 {
        return Names::All(first.clone());
    }
    let mut names: Vec<&String> = row.iter().collect();
    names.sort();
    names.dedup();
    if let [a, b] = names.as_slice() {
        let count = |of: &[String], name: &str| of.iter().filter(|x| *x == name).count();
        let (rare, rest) = if count(row, a) <= count(row, b) {
            (a, b)
        } else {
            (b, a)
        };
        if count(&row[..period], rare) == 1 && period < n {
            let offset = row.iter().position(|x| x == *rare).unwrap_or(0);
            return Names::Every(Every {
                name: (*rare).clone(),
                period,
                offset,
                rest: (*rest).clone(),
            });
        }
        if period > 8 {
            let layers = (0..n).filter(|i| row[*i] == **rare).collect();
            return Names::At(At {
                name: (*rare).clone(),
                layers,
                rest: (*rest).clone(),
            });
        }
    }
    Names::Pattern(row[..period].to_vec())
}

fn shares(model: &m::Model) -> Vec<s::Share> {
    let owner = |weights: &str, i: usize, half: &str| -> Option<usize> {
        let j: usize = weights
            .strip_prefix("layers.")?
            .strip_suffix(half)?
            .strip_suffix('.')?
            .parse()
            .ok()?;
        (j != i).then_some(j)
    };
    let group = |of: &dyn Fn(&m::Layer, usize) -> Option<usize>| {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for (i, l) in model.layers.iter().enumerate() {
            let Some(j) = of(l, i) else { continue };
            match groups.iter_mut().find(|g| g[0] == j) {
                Some(g) => g.push(i),
                None => groups.push(vec![j, i]),
            }
        }
        groups
    };
    let mixers = group(&|l, i| l.mixer.as_ref().and_then(|x| owner(&x.weights, i, "mixer")));
    let mut ffns = group(&|l, i| l.ffn.as_ref().and_then(|x| owner(&x.weights, i, "ffn")));
    let mut all = Vec::new();
    for layers in mixers {
        let both = ffns.iter().position(|g| *g == layers);
        let part = match both {
            Some(k) => {
                ffns.remove(k);
                s::SharePart::Both
            }
            None => s::SharePart::Mixer,
        };
        all.push(s::Share { layers, part });
    }
    all.extend(ffns.into_iter().map(|layers| s::Share {
        layers,
        part: s::SharePart::Ffn,
    }));
    all
}

fn injections(
    model: &m::Model,
    norm: m::Norm,
    mixers: &mut Vec<(String, m::Mixer)>,
    ffns: &mut Vec<(String, m::Ffn)>,
) -> Vec<s::Inject> {
    let mut found: Vec<(m::Inject, Vec<usize>)> = Vec::new();
    for (i, layer) in model.layers.iter().enumerate() {
        let Some(x) = &layer.inject else { continue };
        // The layer's own weights follow from its index.
        let plain = m::Inject {
            own_weights: String::new(),
            ..x.clone()
        };
        match found.iter_mut().find(|(y, _)| *y == plain) {
            Some((_, layers)) => layers.push(i),
            None => found.push((plain, vec![i])),
        }
    }
    let free = |taken: &dyn Fn(&str) -> bool, stem: &str| {
        (0..)
            .map(|k| format!("{stem}-{k}"))
            .find(|n| !taken(n))
            .unwrap_or_else(|| stem.to_owned())
    };
    let mut all = Vec::new();
    for (x, layers) in found {
        // A name of its own: an injected mixer reads another width than those of layers.
        let mixer_name = free(
            &|n| mixers.iter().any(|(o, _)| o == n) || ffns.iter().any(|(o, _)| o == n),
            "shared-mixer",
        );
        mixers.push((mixer_name.clone(), m::Mixer::Attention(x.mixer.clone())));
        let ffn_name = free(
            &|n| mixers.iter().any(|(o, _)| o == n) || ffns.iter().any(|(o, _)| o == n),
            "shared-ffn",
        );
        ffns.push((ffn_name.clone(), x.ffn.clone()));
        all.push(s::Inject {
            name: x
                .weights
                .strip_prefix("shared.")
                .unwrap_or(&x.weights)
                .to_owned(),
            layers: LayerSet::List(layers),
            mixer: mixer_name,
            ffn: ffn_name,
            norm: (x.norm != norm).then(|| surface_norm(x.norm)),
            ffn_norm: (x.ffn_norm != norm).then(|| surface_norm(x.ffn_norm)),
        });
    }
    all
}

fn surface_norm(n: m::Norm) -> s::Norm {
    s::Norm {
        eps: Some(n.eps),
        zero_centered: Some(n.zero_centered),
    }
}

fn dt_init(d: m::DtInit) -> s::DtInit {
    s::DtInit {
        min: d.min,
        max: d.max,
        floor: d.floor,
    }
}

fn mixer(body: &m::Mixer) -> s::Mixer {
    match body {
        m::Mixer::Attention(a) => s::Mixer::Attention(s::Attention {
            n_heads: Some(a.n_heads),
            n_kv_heads: Some(a.n_kv_heads),
            head_dim: Some(a.head_dim),
            rope: a.rope.as_ref().map(rope),
            window: a.window,
            qkv_bias: a.qkv_bias,
            out_bias: a.out_bias,
            scale: (a.scale != (a.head_dim as f64).powf(-0.5)).then_some(a.scale),
            qk_norm: a.qk_norm.map(surface_norm),
            key_multiplier: a.key_multiplier,
            output_gate: a.output_gate,
        }),
        m::Mixer::Mamba1(a) => s::Mixer::Mamba1(s::Mamba1 {
            expand: None,
            d_inner: Some(a.d_inner),
            d_state: a.d_state,
            d_conv: a.d_conv,
            dt_rank: Some(a.dt_rank),
            n_heads: a.n_heads,
            conv_bias: a.conv_bias,
            in_proj_bias: a.in_proj_bias,
            out_proj_bias: a.out_proj_bias,
            dt_bc_norm: a.dt_bc_norm.map(|n| s::DtBcNorm {
                eps: Some(n.eps),
                weighted: n.weighted,
            }),
            dt_init: dt_init(a.dt_init),
        }),
        m::Mixer::Mamba2(a) => s::Mixer::Mamba2(s::Mamba2 {
            expand: None,
            n_heads: Some(a.n_heads),
            head_dim: a.head_dim,
            d_state: a.d_state,
            n_groups: a.n_groups,
            d_conv: a.d_conv,
            chunk_size: a.chunk_size,
            conv_bias: a.conv_bias,
            in_proj_bias: a.in_proj_bias,
            out_proj_bias: a.out_proj_bias,
            dt_limit: a.dt_limit,
            dt_limit_in_decode: a.dt_limit_in_decode,
            gate: match a.gate {
                m::GatedNorm::GateOnly => s::Gate::GateOnly,
                m::GatedNorm::GateThenNorm { eps } => s::Gate::GateThenNorm { eps: Some(eps) },
                m::GatedNorm::NormThenGate { eps } => s::Gate::NormThenGate { eps: Some(eps) },
            },
            multipliers: a.multipliers,
            dt_init: dt_init(a.dt_init),
            a_init: a.a_init,
        }),
        m::Mixer::GatedDeltaNet(a) => s::Mixer::GatedDeltaNet(s::GatedDeltaNet {
            n_k_heads: Some(a.n_k_heads),
            n_v_heads: Some(a.n_v_heads),
            k_head_dim: a.k_head_dim,
            v_head_dim: a.v_head_dim,
            d_conv: a.d_conv,
            chunk_size: a.chunk_size,
            norm_eps: Some(a.norm_eps),
            dt_init: dt_init(a.dt_init),
            a_init: a.a_init,
        }),
        m::Mixer::Parallel(branches) => s::Mixer::Parallel(
            branches
                .iter()
                .map(|b| s::Branch {
                    name: b.name.clone(),
                    mixer: Some(Box::new(mixer(&b.mixer))),
                    in_multiplier: b.in_multiplier,
                    out_multiplier: b.out_multiplier,
                })
                .collect(),
        ),
    }
}

fn rope(r: &m::Rope) -> s::Rope {
    let scaling = match &r.scaling {
        m::RopeScaling::None => None,
        m::RopeScaling::Linear { factor } => {
            Some(s::RopeScaling::Linear(s::Linear { factor: *factor }))
        }
        m::RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context_len,
        } => Some(s::RopeScaling::Llama3(s::Llama3 {
            factor: *factor,
            low_freq_factor: *low_freq_factor,
            high_freq_factor: *high_freq_factor,
            original_context_len: *original_context_len,
        })),
        m::RopeScaling::Yarn {
            factor,
            original_context_len,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        } => Some(s::RopeScaling::Yarn(s::Yarn {
            factor: *factor,
            original_context_len: *original_context_len,
            beta_fast: *beta_fast,
            beta_slow: *beta_slow,
            attention_factor: Some(*attention_factor),
            truncate: *truncate,
        })),
        m::RopeScaling::LongRope {
            short_factor,
            long_factor,
            original_context_len,
            attention_factor,
            recompute_on_crossing,
        } => Some(s::RopeScaling::LongRope(s::LongRope {
            short_factor: short_factor.clone(),
            long_factor: long_factor.clone(),
            original_context_len: *original_context_len,
            attention_factor: Some(*attention_factor),
            recompute_on_crossing: *recompute_on_crossing,
        })),
    };
    s::Rope {
        theta: r.theta,
        dims: Some(r.dims),
        fraction: None,
        scaling,
    }
}

fn ffn(body: &m::Ffn) -> s::Ffn {
    match body {
        m::Ffn::Glu(g) => s::Ffn::Glu(s::Glu {
            d_ff: Some(g.d_ff),
            act: g.act,
            bias: g.bias,
            gate_multiplier: g.gate_multiplier,
            out_multiplier: g.out_multiplier,
        }),
        m::Ffn::Mlp(g) => s::Ffn::Mlp(s::Mlp {
            d_ff: Some(g.d_ff),
            act: g.act,
            bias: g.bias,
        }),
        m::Ffn::Moe(g) => s::Ffn::Moe(s::Moe {
            n_experts: Some(g.n_experts),
            top_k: g.top_k,
            d_ff: Some(g.expert.d_ff),
            act: g.expert.act,
            gated: g.expert.gated,
            router: s::Router {
                score: g.router.score,
                normalize: g.router.normalize,
                correction_bias: g.router.correction_bias,
                n_groups: g.router.n_groups,
                top_groups: g.router.top_groups,
                scale: g.router.scale,
            },
            shared: g.shared.as_ref().map(|x| s::SharedExpert {
                ffn: Box::new(ffn(&x.ffn)),
                gated: x.gated,
            }),
            latent: g.latent,
            latent_bias: g.latent_bias,
            load_balance: g.load_balance,
        }),
    }
}

/// The syntax of a run.
pub fn surface_run(run: &Run) -> r::Run {
    let mut out = r::Run {
        name: Some(run.name.clone()),
        model: Some(Box::new(surface_model(&run.model))),
        precision: run.precision,
        seed: run.seed,
        optimizer: run.optimizer,
        grad_clip: run.grad_clip,
        z_loss: run.z_loss,
        activation_loss: run.activation_loss.clone(),
        transfer: run.transfer.as_ref().map(|t| r::Transfer {
            base: Box::new(surface_model(&t.base)),
        }),
        recompute: run.recompute,
        log_every: run.log_every,
        checkpoint: run.checkpoint,
        probe_every: run.probe_every,
        early_stop: run.early_stop.clone(),
        backend: run.backend,
        deterministic: run.deterministic,
        ..r::Run::default()
    };
    let phases = run.phases.iter().map(|p| r::Phase {
        name: Some(p.name.clone()),
        steps: Some(p.steps),
        data: Some(absolute(&p.data)),
        batch: Some(p.batch),
        seq_len: Some(p.seq_len),
        accumulate: Some(p.accumulate),
        lr: Some(p.lr),
        schedule: Some(p.schedule),
        eval: Some(r::Eval {
            every: p.eval.every,
            rows: p.eval.rows,
            sets: Named(
                p.eval
                    .sets
                    .iter()
                    .map(|(n, d)| (n.clone(), absolute(d)))
                    .collect(),
            ),
        }),
    });
    let mut phases: Vec<r::Phase> = phases.collect();
    match (run.phases.as_slice(), phases.pop()) {
        ([only], Some(p)) if only.name == "train" && only.lr == run.optimizer.lr => {
            out = r::Run {
                steps: p.steps,
                data: p.data,
                batch: p.batch,
                seq_len: p.seq_len,
                accumulate: p.accumulate,
                schedule: p.schedule,
                eval: p.eval,
                ..out
            };
        }
        (_, last) => {
            phases.extend(last);
            out.phases = phases;
        }
    }
    out
}

/// With absolute paths, so that the text means the same from any folder.
fn absolute(data: &Data) -> Data {
    let whole = |p: &PathBuf| match is_url(p) {
        true => p.clone(),
        false => std::path::absolute(p).unwrap_or_else(|_| p.clone()),
    };
    let mut data = data.clone();
    match &mut data {
        Data::Text(t) => {
            t.path = whole(&t.path);
            if let Tokenizer::File(p) = &mut t.tokenizer {
                *p = whole(p);
            }
        }
        Data::Tokens(t) => t.path = whole(&t.path),
        Data::Mixture(m) => m.parts.iter_mut().for_each(|p| p.data = absolute(&p.data)),
        Data::Mqar(_)
        | Data::InContextRecall(_)
        | Data::NoisyRecall(_)
        | Data::FuzzyRecall(_)
        | Data::RecallGaps(_)
        | Data::Memorization(_)
        | Data::Compression(_)
        | Data::SelectiveCopying(_)
        | Data::Copying(_)
        | Data::Induction(_)
        | Data::Parity(_)
        | Data::StateTracking(_)
        | Data::Phonebook(_) => {}
    }
    data
}
