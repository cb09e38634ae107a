//! The rules of a run file.

use super::data::{Given, data, own_seq_len};
use super::{At, Cx};
use crate::data::Data;
use crate::model::Decoder;
use crate::run::{ActivationLoss, AdamW, Decay, Eval, Phase, Run, Schedule, Transfer, Warmup};
use crate::syntax::run as s;

/// Resolves a run that stands at `at` in the document. `None` when anything is wrong.
pub(crate) fn run(cx: &Cx<'_>, at: &At, file: &s::Run) -> Option<Run> {
    let before = cx.out.borrow().len();
    let model = match &file.model {
        Some(m) => super::model(cx, &at.at("model"), m),
        None => {
            cx.require(at, "model", None::<()>);
            None
        }
    };
    optimizer(cx, &at.at("optimizer"), &file.optimizer);
    if let Some(c) = file.grad_clip {
        cx.above_zero(at, "grad_clip", c);
    }
    cx.not_negative(at, "z_loss", file.z_loss);
    if let Some(a) = &file.activation_loss {
        activation_loss(cx, &at.at("activation_loss"), a);
    }
    let transfer = file.transfer.as_ref().map(|t| {
        let base = super::model(cx, &at.at("transfer").at("base"), &t.base);
        base.map(|base| Transfer { base })
    });
    cx.positive(at, "log_every", file.log_every);
    let ck = at.at("checkpoint");
    if let Some(n) = file.checkpoint.every {
        cx.positive(&ck, "every", n);
    }
    cx.positive(&ck, "keep", file.checkpoint.keep);
    if let Some(n) = file.probe_every {
        cx.positive(at, "probe_every", n);
    }
    if let Some(e) = &file.early_stop {
        let at = at.at("early_stop");
        if let Some(t) = e.threshold {
            cx.finite(&at, "threshold", t);
        }
        if let Some(n) = e.patience {
            cx.positive(&at, "patience", n);
        }
        if e.threshold.is_none() && e.patience.is_none() && !cx.struck(&at) {
            cx.error(
                &at,
                "run::early_stop",
                "an early stop that never stops",
                "needs `threshold` or `patience`",
                "",
            );
        }
        if e.metric.trim().is_empty() {
            cx.error(
                &at.at("metric"),
                "run::metric",
                "the metric has no name",
                "such as \"accuracy\"",
                "",
            );
        }
    }
    let name = file
        .name
        .clone()
        .or_else(|| file.model.as_ref().and_then(|m| m.name.clone()))
        .unwrap_or_else(|| "run".to_owned());
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
        cx.error(
            &at.at("name"),
            "run::bad_name",
            format!("`{name}` cannot name a folder"),
            "not a usable name",
            "names have no slashes and do not begin with a dot",
        );
    }
    let vocab_size = file.model.as_ref().and_then(|m| m.vocab_size);
    let context_len = file.model.as_ref().map(|m| m.context_len.unwrap_or(2048));
    let blank = [s::Phase::default()];
    let several = !file.phases.is_empty();
    let listed: &[s::Phase] = if several { &file.phases } else { &blank };
    let mut phases = Vec::new();
    for (i, p) in listed.iter().enumerate() {
        let own = at.at("phases").at(i);
        // Where a value stands: in the phase, or in the run.
        let home = |given: bool| if given { own.clone() } else { at.clone() };
        let missing = |name: &'static str| {
            cx.require(
                &if several { own.clone() } else { at.clone() },
                name,
                None::<()>,
            )
        };
        let steps = p
            .steps
            .or(file.steps)
            .map(|n| cx.positive(&home(p.steps.is_some()), "steps", n));
        if steps.is_none() && !cx.struck(&at.at("steps")) {
            missing("steps");
        }
        let batch = p
            .batch
            .or(file.batch)
            .map_or(8, |n| cx.positive(&home(p.batch.is_some()), "batch", n));
        let accumulate = p.accumulate.or(file.accumulate).map_or(1, |n| {
            cx.positive(&home(p.accumulate.is_some()), "accumulate", n)
        });
        let spec = p.data.as_ref().or(file.data.as_ref());
        if spec.is_none() && !cx.struck(&at.at("data")) {
            missing("data");
        }
        let stated = p.seq_len.or(file.seq_len);
        let seq_home = home(p.seq_len.is_some());
        let seq_len = stated
            .map(|n| cx.positive(&seq_home, "seq_len", n))
            .or_else(|| spec.and_then(own_seq_len))
            .or(context_len);
        if let (Some(t), Some(max)) = (seq_len, context_len)
            && t > max
        {
            let place = if stated.is_some() {
                seq_home.at("seq_len")
            } else {
                home(p.data.is_some()).at("data")
            };
            cx.error(
                &place,
                "run::context",
                format!("rows of {t} tokens for a model whose context_len is {max}"),
                format!("must be at most {max}"),
                "raise `model.context_len`, or shorten the rows",
            );
        }
        let given = Given {
            vocab_size,
            seq_len,
            seed: file.seed,
        };
        let data_home = home(p.data.is_some()).at("data");
        let rows = spec.map(|d| data(cx, &data_home, d, &given));
        let decoder = file.model.as_ref().and_then(|m| m.decoder);
        if file.model.is_some()
            && let Some(d) = &rows
        {
            reads_back(cx, at, &data_home, d, decoder);
        }
        if let (Some(t), Some(own_t)) = (stated, spec.and_then(own_seq_len))
            && own_t > t
        {
            cx.error(
                &data_home,
                "data::too_long",
                format!("the data has rows of {own_t} tokens, the run takes {t}"),
                format!("must be at most {t}"),
                "give seq_len once, in the run",
            );
        }
        let lr = p.lr.unwrap_or(file.optimizer.lr);
        if p.lr.is_some() {
            cx.above_zero(&own, "lr", lr);
        }
        let sched = p.schedule.or(file.schedule).unwrap_or_default();
        if let Some(n) = steps {
            schedule(cx, &home(p.schedule.is_some()).at("schedule"), &sched, n);
        }
        let ev = p
            .eval
            .as_ref()
            .or(file.eval.as_ref())
            .cloned()
            .unwrap_or_default();
        let eval_home = home(p.eval.is_some()).at("eval");
        if let Some(n) = ev.every {
            cx.positive(&eval_home, "every", n);
        }
        cx.positive(&eval_home, "rows", ev.rows);
        let sets = ev
            .sets
            .0
            .iter()
            .map(|(name, d)| {
                (
                    name.clone(),
                    data(cx, &eval_home.at("sets").at(name), d, &given),
                )
            })
            .collect();
        if let (Some(steps), Some(data), Some(seq_len)) = (steps, rows, seq_len) {
            let name = p.name.clone().unwrap_or_else(|| {
                if several {
                    format!("phase-{i}")
                } else {
                    "train".to_owned()
                }
            });
            let eval = Eval {
                every: ev.every,
                rows: ev.rows,
                sets,
            };
            phases.push(Phase {
                name,
                steps,
                data,
                batch,
                seq_len,
                accumulate,
                lr,
                schedule: sched,
                eval,
            });
        }
    }
    if cx.out.borrow().len() > before {
        return None;
    }
    Some(Run {
        name,
        model: model?,
        precision: file.precision,
        seed: file.seed,
        phases,
        optimizer: file.optimizer,
        grad_clip: file.grad_clip,
        z_loss: file.z_loss,
        activation_loss: file.activation_loss.clone(),
        transfer: match transfer {
            Some(t) => Some(t?),
            None => None,
        },
        recompute: file.recompute,
        log_every: file.log_every,
        checkpoint: file.checkpoint,
        probe_every: file.probe_every,
        early_stop: file.early_stop.clone(),
        backend: file.backend,
        deterministic: file.deterministic,
    })
}

/// Rows that ask for themselves and models that read a row back from one state belong together: either alone has the answer before it.
fn reads_back(cx: &Cx<'_>, at: &At, data_home: &At, data: &Data, decoder: Option<Decoder>) {
    let compresses = |d: &Data| matches!(d, Data::Compression(_));
    if let Data::Mixture(m) = data
        && m.parts.iter().any(|p| compresses(&p.data))
    {
        cx.error(
            data_home,
            "run::decoder",
            "compression is a part of a mixture",
            "asks for the row itself, the other parts for the next token",
            "train on Compression alone",
        );
        return;
    }
    match (data, decoder) {
        (Data::Compression(_), None) => cx.error(
            data_home,
            "run::decoder",
            "compression asks for the row itself, which this model reads at every place",
            "needs a model with a decoder",
            "add `decoder: LastState` to the model",
        ),
        (Data::Compression(_), Some(Decoder::LastState)) | (_, None) => {}
        (_, Some(Decoder::LastState)) => cx.error(
            &at.at("model").at("decoder"),
            "run::decoder",
            "a decoder that reads all places from the last state, for data that ask for the next token",
            "would see the answers",
            "leave `decoder` out, or train on Compression",
        ),
    }
}

fn optimizer(cx: &Cx<'_>, at: &At, o: &AdamW) {
    cx.above_zero(at, "lr", o.lr);
    cx.above_zero(at, "eps", o.eps);
    cx.not_negative(at, "weight_decay", o.weight_decay);
    let fine = |b: f64| (0.0..1.0).contains(&b);
    if !fine(o.betas.0) || !fine(o.betas.1) {
        cx.error(
            &at.at("betas"),
            "value::out_of_range",
            format!("`betas` are ({}, {})", o.betas.0, o.betas.1),
            "both must be 0 or more and below 1",
            "",
        );
    }
}

fn activation_loss(cx: &Cx<'_>, at: &At, a: &ActivationLoss) {
    cx.above_zero(at, "alpha", a.alpha);
    if a.taps.is_empty() {
        cx.error(
            &at.at("taps"),
            "run::taps",
            "an activation loss without taps measures nothing",
            "needs at least one tap",
            "taps are ExpertOut, FfnOut, MambaOut, Residual",
        );
    }
    for (i, t) in a.taps.iter().enumerate() {
        if a.taps[..i].contains(t) {
            cx.error(
                &at.at("taps").at(i),
                "run::taps",
                format!("the tap {t:?} is listed twice"),
                "second time",
                "",
            );
        }
    }
}

fn schedule(cx: &Cx<'_>, at: &At, s: &Schedule, steps: usize) {
    let n = match s.warmup {
        Warmup::None => 0,
        Warmup::Linear(n) | Warmup::Quadratic(n) => n,
    };
    if n > steps {
        cx.error(
            &at.at("warmup"),
            "run::warmup",
            format!("a warm-up of {n} steps in a phase of {steps}"),
            format!("must be at most {steps}"),
            "",
        );
    }
    match s.decay {
        Decay::Constant => {}
        Decay::Cosine(f) | Decay::Linear(f) => {
            let at = at.at("decay");
            cx.number(
                &at,
                "final_fraction",
                f.final_fraction,
                |x| (0.0..=1.0).contains(&x),
                "0 to 1",
            );
            if n.saturating_add(f.hold) > steps {
                cx.error(
                    &at.at("hold"),
                    "run::warmup",
                    format!(
                        "warm-up and hold take {} steps of {steps}",
                        n.saturating_add(f.hold)
                    ),
                    "leaves no step to fall",
                    "",
                );
            }
        }
    }
}
