//! Lowering: a checked model becomes a graph. One lowering per mixer serves training, prefill and decode; sharing is nothing but a
//! parameter name used twice.
//!
//! Inputs of every graph: `tokens i32[B T]`, `pos i32[B T]` (position within the document; 0 starts a new one). Training and
//! evaluation add `targets i32[B T]` and `loss_scale f32[X1]` (and `aux_scale f32[X1]` where routers have losses); prefill and decode add `slot i32[X1]`, the cache slot of the first
//! token. Outputs: `loss`, `nll`, `hit` (see `linear_cross_entropy`), `aux:<name>`, or `logits`, or `token`, for which there are the inputs
//! `sampling f32[X3]` and `bits i32[B 1 X2]` (see `draw`).

mod attention;
mod cx;
mod decoder;
mod ffn;
mod gated_deltanet;
mod mamba1;
mod mamba2;
mod moe;
pub mod rope;
mod update;

pub use cx::Cx;
pub use update::{OptimizerConfig, update, update_scaled};

use crate::op::{Concat, Draw, Embed, Gate, Last, LinearCrossEntropy, Pointwise, Un};
use crate::{DType, Graph, Letter, ParamInit, Type, TypeError, ValueId, dims};
use marimba_dsl::model::{Ffn, Inject, Layer, Mixer, Model, Norm, Sublayer};

/// What a graph is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Loss of whole sequences; no states.
    Train,
    /// A run of tokens through carried states, such as a prompt.
    Prefill,
    /// One token per sequence through carried states.
    Decode,
}

/// Which logits a graph puts out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// None.
    None,
    /// Of the last token of each row, `f32[B 1 V]`.
    Last,
    /// A token drawn from those of the last token of each row, `token i32[B 1]` ([`Draw`]).
    Drawn,
    /// Of all tokens, `f32[B T V]`.
    All,
}

/// Shapes and choices of a lowering.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// What for.
    pub mode: Mode,
    /// B.
    pub batch: usize,
    /// T: tokens of this run; 1 in decode.
    pub seq_len: usize,
    /// S: slots of the KV caches; prefill and decode.
    pub cache_len: usize,
    /// Element type of activations and matrices.
    pub compute: DType,
    /// Coefficient of the squared log-sum-exp of the logits.
    pub z_loss: f64,
    /// z-loss over ignored rows too (Bamba in transformers).
    pub z_all: bool,
    /// Logits put out; training graphs put out the loss besides.
    pub logits: Logits,
    /// Add the router losses that the model declares.
    pub router_loss: bool,
}

impl Options {
    /// Training in f32.
    pub fn train(batch: usize, seq_len: usize) -> Self {
        Options {
            mode: Mode::Train,
            batch,
            seq_len,
            cache_len: 0,
            compute: DType::F32,
            z_loss: 0.0,
            z_all: false,
            logits: Logits::None,
            router_loss: true,
        }
    }

    /// Prefill of `seq_len` tokens into caches of `cache_len` slots.
    pub fn prefill(batch: usize, seq_len: usize, cache_len: usize) -> Self {
        Options {
            mode: Mode::Prefill,
            cache_len,
            logits: Logits::Last,
            ..Options::train(batch, seq_len)
        }
    }

    /// One token per sequence.
    pub fn decode(batch: usize, cache_len: usize) -> Self {
        Options {
            mode: Mode::Decode,
            ..Options::prefill(batch, 1, cache_len)
        }
    }
}

/// Lowers a model.
///
/// # Errors
/// [`TypeError`]: a bug, since everything a model can do wrong was found by `check`.
pub fn lower(model: &Model, options: &Options) -> Result<Graph, TypeError> {
    let mut cx = Cx::new(model, options);
    let (b, t) = (options.batch, options.seq_len);
    let tokens = cx.input("tokens", Type::i32(dims![B b, T t]));

    cx.at("embedding", None);
    let table = cx.matrix(
        "embedding",
        dims![V model.vocab_size],
        dims![D model.d_model],
        cx.normal(),
    );
    let embedded = cx.push1(Embed, vec![Some(tokens), Some(table)])?;
    cx.tap("embedding.out", embedded);
    let mut x = cx.scale(embedded, model.embedding.multiplier)?;
    let embeddings = x;

    for (i, layer) in model.layers.iter().enumerate() {
        x = lower_layer(&mut cx, i, layer, x, embeddings)?;
        cx.at(&format!("layers[{i}]"), Some(i));
        cx.tap(&format!("layers[{i}].out"), x);
    }

    if let Some(spec) = model.decoder {
        cx.at("decoder", None);
        x = decoder::lower(&mut cx, spec, x)?;
    }

    cx.at("final_norm", None);
    let x = cx.norm("final_norm", x, &model.final_norm)?;
    cx.at("head", None);
    let head = if model.head.tied {
        table
    } else {
        cx.matrix(
            "head",
            dims![V model.vocab_size],
            dims![D model.d_model],
            cx.normal(),
        )
    };
    if options.mode == Mode::Train {
        let targets = cx.input("targets", Type::i32(dims![B b, T t]));
        let scale = cx.input("loss_scale", Type::scalar());
        let op = LinearCrossEntropy {
            multiplier: model.head.multiplier,
            z_loss: options.z_loss,
            z_all: options.z_all,
        };
        let r = cx.push(op, vec![Some(x), Some(head), Some(targets), Some(scale)])?;
        let loss = cx.total_loss(r[0])?;
        cx.output("loss", loss);
        cx.output("nll", r[1]);
        cx.output("hit", r[3]);
    }
    let rows = match options.logits {
        Logits::None => None,
        Logits::Last | Logits::Drawn if t == 1 => Some(x),
        Logits::Last | Logits::Drawn => Some(cx.push1(Last, vec![Some(x)])?),
        Logits::All => Some(x),
    };
    if let Some(rows) = rows {
        let logits = cx.product(rows, head)?;
        let logits = cx.cast(logits, DType::F32)?;
        let logits = cx.scale(logits, model.head.multiplier)?;
        if options.logits == Logits::Drawn {
            let settings = cx.input("sampling", Type::f32(dims![X 3]));
            let bits = cx.input("bits", Type::i32(dims![B b, T 1, X 2]));
            let args = vec![Some(logits), Some(settings), Some(bits)];
            let token = cx.push1(Draw, args)?;
            cx.output("token", token);
        } else {
            cx.output("logits", logits);
        }
    }
    Ok(cx.finish())
}

/// Half of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// What acts over time.
    Mixer,
    /// What acts over channels.
    Ffn,
}

/// The mixer or the ffn of a layer on its own, without norm and residual stream: from the external `x` (`param:x`, no trainable parameter) to
/// the output `y`, both f[B T D]. A layer without it gives `x`.
///
/// # Errors
/// As [`lower`].
pub fn lower_half(
    model: &Model,
    options: &Options,
    layer: usize,
    half: Half,
) -> Result<Graph, TypeError> {
    let mut cx = Cx::new(model, options);
    let ty = Type::new(
        options.compute,
        dims![B options.batch, T options.seq_len, D model.d_model],
    );
    let x = cx.external(crate::External::Param, "x", ty);
    let y = match (model.layers.get(layer), half) {
        (Some(Layer { mixer: Some(s), .. }), Half::Mixer) => {
            cx.at(&format!("layers[{layer}].mixer"), Some(layer));
            let state = format!("layers.{layer}.mixer");
            lower_mixer(&mut cx, &s.weights, &state, &s.body, x)?
        }
        (Some(Layer { ffn: Some(s), .. }), Half::Ffn) => {
            cx.at(&format!("layers[{layer}].ffn"), Some(layer));
            lower_ffn(&mut cx, &s.weights, &s.body, x)?
        }
        _ => x,
    };
    cx.output("y", y);
    Ok(cx.finish())
}

/// `x += r mixer(norm(x [+ inject]))`, `x += r ffn(norm(x))`.
fn lower_layer(
    cx: &mut Cx,
    i: usize,
    layer: &Layer,
    x: ValueId,
    embeddings: ValueId,
) -> Result<ValueId, TypeError> {
    let mut x = x;
    if let Some(sub) = &layer.mixer {
        let mut input = x;
        if let Some(inject) = &layer.inject {
            cx.at(&format!("layers[{i}].inject"), Some(i));
            let t = lower_inject(cx, i, inject, x, embeddings)?;
            input = cx.add(x, t)?;
        }
        cx.at(&format!("layers[{i}].mixer"), Some(i));
        let h = cx.norm(&format!("{}.norm", sub.weights), input, &sub.norm)?;
        let y = lower_mixer(cx, &sub.weights, &format!("layers.{i}.mixer"), &sub.body, h)?;
        x = close_residual(cx, &format!("layers[{i}].mixer.out"), sub, x, y)?;
    }
    if let Some(sub) = &layer.ffn {
        cx.at(&format!("layers[{i}].ffn"), Some(i));
        let h = cx.norm(&format!("{}.norm", sub.weights), x, &sub.norm)?;
        let y = lower_ffn(cx, &sub.weights, &sub.body, h)?;
        x = close_residual(cx, &format!("layers[{i}].ffn.out"), sub, x, y)?;
    }
    Ok(x)
}

fn close_residual<T>(
    cx: &mut Cx,
    tap: &str,
    sub: &Sublayer<T>,
    x: ValueId,
    y: ValueId,
) -> Result<ValueId, TypeError> {
    cx.tap(tap, y);
    cx.push1(
        Pointwise::add_scaled(sub.residual_multiplier as f32),
        vec![Some(x), Some(y)],
    )
}

/// Lowers a mixer. `weights` names parameters (shared uses share it), `state` names recurrent state (unique per use).
fn lower_mixer(
    cx: &mut Cx,
    weights: &str,
    state: &str,
    mixer: &Mixer,
    x: ValueId,
) -> Result<ValueId, TypeError> {
    match mixer {
        Mixer::Attention(spec) => attention::lower(cx, weights, state, spec, x),
        Mixer::Mamba1(spec) => mamba1::lower(cx, weights, state, spec, x),
        Mixer::Mamba2(spec) => mamba2::lower(cx, weights, state, spec, x),
        Mixer::GatedDeltaNet(spec) => gated_deltanet::lower(cx, weights, state, spec, x),
        Mixer::Parallel(branches) => {
            let mut sum: Option<ValueId> = None;
            for branch in branches {
                let h = cx.scale(x, branch.in_multiplier)?;
                let (w, s) = (
                    format!("{weights}.{}", branch.name),
                    format!("{state}.{}", branch.name),
                );
                let y = lower_mixer(cx, &w, &s, &branch.mixer, h)?;
                let y = cx.scale(y, branch.out_multiplier)?;
                sum = Some(match sum {
                    Some(acc) => cx.add(acc, y)?,
                    None => y,
                });
            }
            Ok(sum.unwrap_or(x))
        }
    }
}

fn lower_ffn(cx: &mut Cx, weights: &str, ffn: &Ffn, x: ValueId) -> Result<ValueId, TypeError> {
    match ffn {
        Ffn::Glu(spec) => ffn::glu(cx, weights, spec, x),
        Ffn::Mlp(spec) => ffn::mlp(cx, weights, spec, x),
        Ffn::Moe(spec) => moe::lower(cx, weights, spec, x),
    }
}

/// Zamba's shared block over the concatenation of the residual stream and the embeddings.
fn lower_inject(
    cx: &mut Cx,
    i: usize,
    spec: &Inject,
    x: ValueId,
    embeddings: ValueId,
) -> Result<ValueId, TypeError> {
    let w = &spec.weights;
    let h = cx.push1(
        Concat { letter: Letter::D },
        vec![Some(x), Some(embeddings)],
    )?;
    let h = cx.norm(&format!("{w}.norm"), h, &spec.norm)?;
    let h = attention::lower(
        cx,
        &format!("{w}.mixer"),
        &format!("layers.{i}.inject"),
        &spec.mixer,
        h,
    )?;
    let h = cx.norm(&format!("{w}.ffn_norm"), h, &spec.ffn_norm)?;
    let h = lower_ffn(cx, &format!("{w}.ffn"), &spec.ffn, h)?;
    let d = cx.model().d_model;
    cx.linear(
        &format!("{}.linear", spec.own_weights),
        h,
        dims![D d],
        cx.normal(),
        false,
    )
}

/// Function of an activation.
fn act(a: marimba_dsl::model::Act) -> Un {
    use marimba_dsl::model::Act;
    match a {
        Act::Silu => Un::Silu,
        Act::Gelu => Un::Gelu,
        Act::GeluTanh => Un::GeluTanh,
        // relu squared is relu times itself: see `ffn::activate`.
        Act::Relu | Act::Relu2 => Un::Relu,
    }
}

/// A norm without gate as the op wants it.
fn plain(norm: &Norm, group: usize) -> crate::op::RmsNorm {
    crate::op::RmsNorm {
        eps: norm.eps,
        group,
        zero_centered: norm.zero_centered,
        gate: Gate::None,
    }
}

/// The parameters of a model, in the order of first use, without building a graph for particular shapes.
///
/// # Errors
/// [`TypeError`]: a bug.
pub fn params(model: &Model) -> Result<Vec<crate::Param>, TypeError> {
    params_in(model, DType::F32)
}

/// The same for graphs that compute in another type.
///
/// # Errors
/// [`TypeError`]: a bug.
pub fn params_in(model: &Model, compute: DType) -> Result<Vec<crate::Param>, TypeError> {
    let options = Options {
        compute,
        ..Options::train(1, 1)
    };
    Ok(lower(model, &options)?.params)
}

/// Initialisation of a matrix that writes to the residual stream.
fn output_init(cx: &Cx) -> ParamInit {
    let init = &cx.model().init;
    let sublayers: usize = cx
        .model()
        .layers
        .iter()
        .map(|l| usize::from(l.mixer.is_some()) + usize::from(l.ffn.is_some()))
        .sum();
    if init.scale_output {
        ParamInit::Normal(init.std / (sublayers.max(1) as f64).sqrt())
    } else {
        ParamInit::Normal(init.std)
    }
}

#[cfg(test)]
mod tests;
