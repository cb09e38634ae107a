//! Verification of a Hugging Face checkpoint against numbers that transformers gave: logits, loss, hidden states, gradients, norms of
//! gradients, and cached greedy decoding. Layout of the expected file and origin of the limits: `tests/fixtures/hf/README.md`.

use crate::checkpoint::hf::{self, Opened, Quirk};
use crate::checkpoint::{CheckpointError, Source};
use crate::data::rng;
use crate::generate::{GenerateError, Session, argmax, input_names};
use marimba_backend::{BackendError, Engine, HostTensor, Outputs};
use marimba_dsl::model::Model;
use marimba_ir::lower::Logits;
use marimba_ir::pass::{self, PassError};
use marimba_ir::{DType, Options, TypeError, differentiate, lower, plan};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// What passes in f32: largest relative deviations, `max|a-b| / max|b|` of a tensor, each tensor alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Of logits, hidden states and logits of generation.
    pub logits: f64,
    /// Of the loss.
    pub loss: f64,
    /// Of gradients.
    pub gradient: f64,
    /// Of norms of gradients.
    pub gradient_norm: f64,
    /// Share of generated ids that may differ.
    pub ids: f64,
}

impl Limits {
    /// In f32; the README measures transformers' own f32 an order of magnitude below.
    pub const F32: Limits = Limits {
        logits: 1e-4,
        loss: 1e-5,
        gradient: 1e-3,
        gradient_norm: 1e-3,
        ids: 0.0,
    };
}

/// In a narrow type: how many times as far from transformers' f32 as transformers' own run in that type, root mean square over
/// roundings of the weights, a quantity may be. An implementation that rounds as much as transformers does has a ratio of 1; what is left
/// is for two samples of such a mean (of the same weights, of other roundings of activations), of numbers that single tokens sent to another
/// expert dominate.
pub const NARROW_RATIO: f64 = 2.0;

/// Share of generated ids that may differ in a narrow type, where nearly equal logits may change places.
pub const NARROW_IDS: f64 = 0.25;

/// What a narrow type costs transformers on a case: the file `bf16.json` beside the expected tensors.
#[derive(Clone, Debug, Deserialize)]
struct Peer {
    /// How many roundings of the weights its means are over; as many are run here.
    roundings: u64,
    /// Root mean square deviation from f32 by quantity, as `short.logits` or `short.hidden.2`.
    deviation: BTreeMap<String, f64>,
}

/// How a comparison is judged.
enum Judge {
    /// Each tensor by its largest element.
    Each(Limits),
    /// Whole tensors, `|a-b| / |b|`, all gradients as one, by transformers' own deviations: a token that goes to another expert is wrong
    /// altogether, and gradients of few numbers that are sums over all tokens mean little.
    Whole(Peer),
}

impl Judge {
    fn deviation(&self, a: &[f32], b: &[f32]) -> f64 {
        match self {
            Judge::Each(_) => deviation(a, b),
            Judge::Whole(_) => {
                let mut all = Together::default();
                all.add(a, b);
                all.apart()
            }
        }
    }

    /// Whether every gradient counts alone.
    fn each(&self) -> bool {
        matches!(self, Judge::Each(_))
    }

    fn roundings(&self) -> u64 {
        match self {
            Judge::Each(_) => 1,
            Judge::Whole(peer) => peer.roundings,
        }
    }
}

/// Every deviation found, in order: quantity, place, and the deviation in each rounding.
#[derive(Default)]
struct Found(Vec<(String, String, Vec<f64>)>);

impl Found {
    fn note(&mut self, quantity: &str, place: &str, deviation: f64) {
        let at = self
            .0
            .iter()
            .position(|(q, p, _)| q == quantity && p == place);
        match at {
            Some(i) => self.0[i].2.push(deviation),
            None => {
                let new = (quantity.to_string(), place.to_string(), vec![deviation]);
                self.0.push(new);
            }
        }
    }

    /// The report: of each quantity the place that is worst beside its limit; or the quantity of which transformers' deviation is not known.
    fn judged(&self, judge: &Judge, tokens: &dyn Fn(&str) -> f64) -> Result<Report, String> {
        let mut report = Report {
            pass: true,
            quantities: Vec::new(),
        };
        for (quantity, place, deviations) in &self.0 {
            let squares: f64 = deviations.iter().map(|d| d * d).sum();
            let deviation = (squares / deviations.len() as f64).sqrt();
            let ids = quantity == "generated";
            let split = place.split([':', '.']).next().unwrap_or(place);
            let limit = match judge {
                Judge::Each(limits) => match quantity.as_str() {
                    "loss" => limits.loss,
                    "gradients" => limits.gradient,
                    "generated" => (limits.ids * tokens(split)).floor(),
                    "long_grad_norm" | "short_grad_norm" => limits.gradient_norm,
                    _ => limits.logits,
                },
                Judge::Whole(_) if ids => NARROW_IDS * tokens(split),
                Judge::Whole(peer) => {
                    let key = match quantity.as_str() {
                        "hidden" => place.clone(),
                        "long_grad_norm" | "short_grad_norm" => format!("{split}.grad_norm"),
                        other => format!("{split}.{other}"),
                    };
                    NARROW_RATIO * peer.deviation.get(&key).ok_or(key)?
                }
            };
            report.note(quantity, limit, deviation, place);
        }
        Ok(report)
    }
}

/// Tensors compared as one.
#[derive(Default)]
struct Together {
    apart: f64,
    right: f64,
}

impl Together {
    fn add(&mut self, a: &[f32], b: &[f32]) {
        if a.len() != b.len() {
            self.apart = f64::INFINITY;
        }
        for (x, y) in a.iter().zip(b) {
            self.apart += f64::from(x - y).powi(2);
            self.right += f64::from(*y).powi(2);
        }
    }

    fn apart(&self) -> f64 {
        match self.right > 0.0 {
            true => (self.apart / self.right).sqrt(),
            false => self.apart.sqrt(),
        }
    }
}

/// What can stop a verification.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The checkpoint or the expected file is not usable.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The backend refused.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A lowering or derivative is wrong.
    #[error(transparent)]
    Type(#[from] TypeError),
    /// A pass is wrong.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// Decoding failed.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// The expected file does not say what to compare.
    #[error("expected file {path}: {why}")]
    Expected {
        /// The file.
        path: String,
        /// What is wrong.
        why: String,
    },
}

/// One compared quantity.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Quantity {
    /// `logits`, `loss`, `hidden`, `gradients`, `long_grad_norm`, `generated` or `gen_logits`.
    pub name: String,
    /// Relative deviation of the tensor that is worst beside its limit; for `generated` the number of differing ids. In a narrow type the
    /// root of the mean square over roundings of the weights.
    pub worst: f64,
    /// Largest deviation that passes there.
    pub limit: f64,
    /// Whether it passed.
    pub pass: bool,
    /// Where the worst was found.
    #[serde(rename = "where")]
    pub place: String,
}

/// The outcome.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Whether all quantities passed.
    pub pass: bool,
    /// In the order of the README.
    pub quantities: Vec<Quantity>,
}

impl Report {
    fn note(&mut self, name: &str, limit: f64, deviation: f64, place: &str) {
        // NaN is no pass, and has no word in JSON.
        let deviation = if deviation.is_finite() {
            deviation
        } else {
            f64::MAX
        };
        let at = match self.quantities.iter().position(|q| q.name == name) {
            Some(i) => i,
            None => {
                let name = name.to_string();
                self.quantities.push(Quantity {
                    name,
                    worst: -1.0,
                    limit,
                    pass: true,
                    place: String::new(),
                });
                self.quantities.len() - 1
            }
        };
        let q = &mut self.quantities[at];
        // By products, since a limit may be 0.
        if q.worst < 0.0 || deviation * q.limit > q.worst * limit || deviation > limit && q.pass {
            q.worst = deviation;
            q.limit = limit;
            q.place = place.to_string();
            q.pass = deviation <= limit;
            self.pass &= q.pass;
        }
    }

    /// A line per quantity.
    pub fn table(&self) -> String {
        let mut out = format!(
            "{:<16} {:>10} {:>10}       where\n",
            "quantity", "worst", "limit"
        );
        for q in &self.quantities {
            let verdict = if q.pass { "ok" } else { "FAIL" };
            out.push_str(&format!(
                "{:<16} {:>10.2e} {:>10.2e} {verdict:>5} {}\n",
                q.name, q.worst, q.limit, q.place
            ));
        }
        out.push_str(if self.pass {
            "all quantities pass\n"
        } else {
            "FAILED\n"
        });
        out
    }
}

/// Makes a fresh engine.
pub type MakeEngine<'a> = dyn Fn() -> Result<Box<dyn Engine>, BackendError> + 'a;

/// `max|a-b| / max|b|`; infinite for another length.
fn deviation(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let mut worst = 0.0f64;
    let mut scale = 0.0f64;
    for (x, y) in a.iter().zip(b) {
        let d = f64::from(x - y).abs();
        // `max` would drop a NaN.
        if d.is_nan() {
            return f64::INFINITY;
        }
        worst = worst.max(d);
        scale = scale.max(f64::from(y.abs()));
    }
    if scale > 0.0 { worst / scale } else { worst }
}

/// One prompt set of the expected file.
struct Split<'a> {
    name: &'a str,
    batch: usize,
    len: usize,
    ids: Vec<i32>,
}

/// Compares a checkpoint with an expected file on fresh engines. Quirks of transformers that the numbers carry are put on by
/// `quirks`. A `case.json` beside the expected file gives norms of gradients.
///
/// # Errors
/// [`VerifyError`]: unusable files, unknown families and options, a backend that cannot run an op.
pub fn verify(
    dir: &Path,
    expected: &Path,
    quirks: &[Quirk],
    make: &MakeEngine,
) -> Result<Report, VerifyError> {
    verify_in(DType::F32, dir, expected, quirks, make)
}

/// [`verify`] with activations and matrices of another type. In a narrow one the weights are rounded several times, to nearest and at
/// random, and the deviations from transformers' f32 are compared with those of transformers in that type ([`NARROW_RATIO`]), which
/// `bf16.json` beside the expected file holds: which token goes to another expert, and a large part of a gradient with it, is chance.
///
/// # Errors
/// As [`verify`]; a narrow type without that file.
pub fn verify_in(
    compute: DType,
    dir: &Path,
    expected: &Path,
    quirks: &[Quirk],
    make: &MakeEngine,
) -> Result<Report, VerifyError> {
    let opened = hf::open(dir)?;
    let mut model = opened.model.clone().into_inner();
    for q in quirks {
        q.put_on(&mut model);
    }
    let file = Source::open(expected, "expected")?;
    let complain = |why: String| VerifyError::Expected {
        path: expected.display().to_string(),
        why,
    };
    let case = expected
        .parent()
        .unwrap_or(Path::new("."))
        .join("case.json");
    let norms: Value = match std::fs::read_to_string(&case) {
        Ok(text) => serde_json::from_str(&text)
            .map_err(|e| complain(format!("case.json beside it: {e}")))?,
        Err(_) => Value::Null,
    };
    let judge = match compute {
        DType::F32 | DType::E4m3 | DType::E5m2 | DType::I32 => Judge::Each(Limits::F32),
        DType::Bf16 | DType::F16 => {
            let name = format!("{compute}.json");
            let text = std::fs::read_to_string(expected.with_file_name(&name)).map_err(|e| {
                complain(format!(
                    "{name} beside it, which says how far transformers in {compute} is from its f32: {e}; make_fixtures.py --{compute} \
                     --folder {} writes it",
                    match expected.parent() {
                        Some(folder) if !folder.as_os_str().is_empty() => folder,
                        _ => Path::new("."),
                    }
                    .display()
                ))
            })?;
            let peer: Peer = serde_json::from_str(&text)
                .map_err(|e| complain(format!("{name} beside it: {e}")))?;
            if peer.roundings == 0 {
                return Err(complain(format!("{name} beside it has no roundings")));
            }
            Judge::Whole(peer)
        }
    };
    let mut found = Found::default();
    let mut tokens = BTreeMap::new();
    for name in ["short", "long"] {
        let key = format!("{name}.input_ids");
        let Some(spec) = file.spec(&key) else {
            continue;
        };
        let [batch, len] = spec.shape[..] else {
            return Err(complain(format!(
                "{key} has shape {:?}, expected [batch, length]",
                spec.shape
            )));
        };
        let ids: Vec<i32> = file
            .tensor(&key)?
            .to_i64()
            .iter()
            .map(|i| *i as i32)
            .collect();
        let vocab = model.vocab_size;
        if ids.len() != batch * len || len < 2 || ids.iter().any(|i| *i < 0 || *i as usize >= vocab)
        {
            return Err(complain(format!(
                "{key} is not made of at least 2 ids below {vocab} a row"
            )));
        }
        let split = Split {
            name,
            batch,
            len,
            ids,
        };
        let norms = norms
            .get(format!("{name}_grad_norm"))
            .and_then(Value::as_object);
        let cx = Cx {
            opened: &opened,
            model: &model,
            file: &file,
            compute,
            judge: &judge,
            make,
        };
        forward(&cx, &split, norms, &mut found)?;
        let n = decode(&cx, &split, &mut found)?;
        tokens.insert(name, (batch * n) as f64);
    }
    let mut report = found
        .judged(&judge, &|split| tokens.get(split).copied().unwrap_or(0.0))
        .map_err(|key| complain(format!("{compute}.json beside it says nothing of {key}")))?;
    if report.quantities.is_empty() {
        return Err(complain(
            "nothing to compare; expected short.input_ids with short.logits and the like".into(),
        ));
    }
    let order = [
        "logits",
        "loss",
        "hidden",
        "gradients",
        "long_grad_norm",
        "short_grad_norm",
        "generated",
        "gen_logits",
    ];
    report
        .quantities
        .sort_by_key(|q| order.iter().position(|o| *o == q.name));
    Ok(report)
}

/// What a comparison is made of, for every split.
struct Cx<'a> {
    opened: &'a Opened,
    model: &'a Model,
    file: &'a Source,
    compute: DType,
    judge: &'a Judge,
    make: &'a MakeEngine<'a>,
}

/// Gives the engine the weights. In a narrow type all of them are what a checkpoint in that type holds: rounded to nearest, and in later
/// roundings up or down at random, each as likely as it is near. The random bits are a function of the rounding and of tensor and place in the
/// checkpoint, the same in `make_fixtures.py`: what is left between the two are roundings of activations and gradients.
fn upload(cx: &Cx, rounding: u64, engine: &mut dyn Engine) -> Result<(), VerifyError> {
    for (i, p) in cx.opened.params.iter().enumerate() {
        let narrow = !cx.judge.each() && p.trainable;
        let x = cx.opened.changed_param(i, &mut |name, before, x| {
            if narrow {
                round_piece(rounding, name, before as u64, x);
            }
        })?;
        engine.write(&format!("param:{}", p.name), &p.ty, &HostTensor::F32(x))?;
    }
    Ok(())
}

/// Rounds elements of the checkpoint's tensor `name` that come after `before` others to bf16.
fn round_piece(rounding: u64, name: &str, before: u64, x: &mut [f32]) {
    let key = rng::key(&[rounding, rng::name(name)]);
    for (j, x) in (before..).zip(x) {
        *x = match rounding {
            0 => round_bf16(*x, 0x7fff + (x.to_bits() >> 16 & 1)),
            _ => round_bf16(*x, (rng::at(key, j) >> 48) as u32),
        };
    }
}

/// Rounds to bf16, upwards where what is cut off and `add` carry; numbers that are not finite stay.
fn round_bf16(x: f32, add: u32) -> f32 {
    match x.is_finite() {
        true => f32::from_bits(x.to_bits().wrapping_add(add) & 0xffff_0000),
        false => x,
    }
}

fn forward(
    cx: &Cx,
    split: &Split,
    norms: Option<&serde_json::Map<String, Value>>,
    found: &mut Found,
) -> Result<(), VerifyError> {
    let Cx {
        opened,
        model,
        file,
        judge,
        ..
    } = cx;
    let Split {
        name,
        batch,
        len,
        ids,
    } = split;
    let (b, t) = (*batch, *len);
    let want = |what: &str| file.spec(&format!("{name}.{what}")).is_some();
    let gradients: Vec<String> = file
        .specs()
        .filter_map(|s| {
            s.name
                .strip_prefix(&format!("{name}.grad."))
                .map(str::to_string)
        })
        .collect();
    let hidden: Vec<usize> = (0..=model.layers.len())
        .filter(|i| want(&format!("hidden.{i}")))
        .collect();
    let backward = !gradients.is_empty() || norms.is_some();
    if !(want("logits") || want("loss") || !hidden.is_empty() || backward) {
        return Ok(());
    }

    // Of B T positions, B (T-1) have a target, over which the loss is a mean; the z term is one over all positions.
    let options = Options {
        logits: if want("logits") {
            Logits::All
        } else {
            Logits::None
        },
        router_loss: false,
        z_loss: opened.z_loss * (t - 1) as f64 / t as f64,
        z_all: true,
        compute: cx.compute,
        ..Options::train(b, t)
    };
    let mut graph = lower(model, &options)?;
    for &i in &hidden {
        let tap = if i == 0 {
            "embedding.out".to_string()
        } else {
            format!("layers[{}].out", i - 1)
        };
        if let Some((_, v)) = graph.taps.iter().find(|(n, _)| *n == tap) {
            graph.outputs.push((format!("hidden.{i}"), *v));
        }
    }
    if backward && let Some(loss) = graph.output("loss") {
        differentiate(&mut graph, loss)?;
    }
    let graph = pass::run_passes(&graph, &pass::Config::default())?;
    let names = input_names(&graph);
    let plan = plan(&graph);
    let mut engine = (cx.make)()?;
    upload(cx, 0, engine.as_mut())?;
    let program = engine.load(graph, plan)?;
    let target = |k: usize| if k % t + 1 < t { ids[k + 1] } else { -100 };
    let inputs = [
        ("tokens", HostTensor::I32(ids.clone())),
        (
            "pos",
            HostTensor::I32((0..b * t).map(|k| (k % t) as i32).collect()),
        ),
        ("targets", HostTensor::I32((0..b * t).map(target).collect())),
        (
            "loss_scale",
            HostTensor::F32(vec![1.0 / (b * (t - 1)) as f32]),
        ),
        ("grad_keep", HostTensor::F32(vec![0.0])),
    ];
    let inputs: Vec<_> = inputs
        .into_iter()
        .filter(|(n, _)| names.iter().any(|m| m == n))
        .collect();
    let got = |key: &str, out: &Outputs| out.get(key).map(|h| h.f32().to_vec()).unwrap_or_default();
    let index = |name: &str| opened.table.foreign.iter().position(|f| f.name == name);
    for rounding in 0..judge.roundings() {
        if rounding > 0 {
            upload(cx, rounding, engine.as_mut())?;
        }
        let out = engine.run(program, &inputs)?;
        for what in ["logits", "loss"] {
            if want(what) {
                let right = file.tensor(&format!("{name}.{what}"))?.to_f32();
                let d = judge.deviation(&got(what, &out), &right);
                found.note(what, name, d);
            }
        }
        for &i in &hidden {
            let key = format!("{name}.hidden.{i}");
            let right = file.tensor(&key)?.to_f32();
            let all = got(&format!("hidden.{i}"), &out);
            // Batch row 0.
            let d = judge.deviation(all.get(..right.len()).unwrap_or_default(), &right);
            found.note("hidden", &key, d);
        }
        if !backward {
            continue;
        }
        let ours = |p: usize| match engine.read(&format!("grad:{}", opened.params[p].name)) {
            Ok(HostTensor::F32(g)) => g,
            _ => vec![f32::NAN; opened.params[p].ty.len()],
        };
        let mut all = Together::default();
        for g in &gradients {
            let right = file.tensor(&format!("{name}.grad.{g}"))?.to_f32();
            let mine = match index(g) {
                Some(k) => opened.table.gather(k, &opened.params, &ours),
                None => Vec::new(),
            };
            if judge.each() {
                let d = deviation(&mine, &right);
                found.note("gradients", &format!("{name}: {g}"), d);
            }
            all.add(&mine, &right);
        }
        if !judge.each() && !gradients.is_empty() {
            found.note("gradients", name, all.apart());
        }
        let quantity = format!("{name}_grad_norm");
        let (mut mine2, mut right2) = (0.0f64, 0.0f64);
        for (g, norm) in norms.into_iter().flatten() {
            let right = norm.as_f64().unwrap_or(f64::NAN);
            let mine = match index(g) {
                Some(k) => {
                    let grad = opened.table.gather(k, &opened.params, &ours);
                    grad.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>()
                }
                None => f64::INFINITY,
            };
            if judge.each() {
                let d = relative(mine.sqrt(), right);
                found.note(&quantity, &format!("{name}: {g}"), d);
            }
            mine2 += mine;
            right2 += right.powi(2);
        }
        if !judge.each() && norms.is_some() {
            found.note(&quantity, name, relative(mine2.sqrt(), right2.sqrt()));
        }
    }
    Ok(())
}

/// `|a - b| / |b|`; `|a|` where b is 0.
fn relative(a: f64, b: f64) -> f64 {
    let apart = (a - b).abs();
    if b == 0.0 { apart } else { apart / b.abs() }
}

/// Compares cached decoding; the number of tokens of a row.
fn decode(cx: &Cx, split: &Split, found: &mut Found) -> Result<usize, VerifyError> {
    let Cx {
        model, file, judge, ..
    } = cx;
    let Split {
        name,
        batch,
        len,
        ids,
    } = split;
    let key = format!("{name}.generated");
    let Some(spec) = file.spec(&key) else {
        return Ok(0);
    };
    let n = spec.shape.last().copied().unwrap_or(0);
    let right: Vec<i32> = file
        .tensor(&key)?
        .to_i64()
        .iter()
        .map(|i| *i as i32)
        .collect();
    let logits_key = format!("{name}.gen_logits");
    let stored = match file.spec(&logits_key) {
        Some(_) => Some(file.tensor(&logits_key)?.to_f32()),
        None => None,
    };
    let mut engine = (cx.make)()?;
    let prompts: Vec<Vec<i32>> = ids.chunks(*len).map(<[i32]>::to_vec).collect();
    let v = model.vocab_size;
    for rounding in 0..judge.roundings() {
        upload(cx, rounding, engine.as_mut())?;
        let mut session =
            Session::new(engine.as_mut(), model, *batch, len + n).computing_in(cx.compute);
        let (mut wrong, mut first) = (0usize, name.to_string());
        let mut all = vec![0.0; batch * n * v];
        let mut logits = session.prefill(&prompts)?;
        for step in 0..n {
            for row in 0..*batch {
                let mine = &logits[row * v..(row + 1) * v];
                all[(row * n + step) * v..][..v].copy_from_slice(mine);
                // Later steps are fed the expected ids, so that one wrong token counts once.
                if argmax(mine) != right[row * n + step] {
                    if wrong == 0 && judge.each() {
                        first = format!("{name}: row {row}, token {step}");
                    }
                    wrong += 1;
                }
            }
            if step + 1 < n {
                let next: Vec<i32> = (0..*batch).map(|row| right[row * n + step]).collect();
                logits = session.step(&next)?;
            }
        }
        found.note("generated", &first, wrong as f64);
        if let Some(stored) = &stored {
            found.note("gen_logits", name, judge.deviation(&all, stored));
        }
    }
    Ok(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_compared_each_or_together() {
        let (a, b) = ([1.0, 2.0, 4.0], [1.0, 2.0, 2.0]);
        let whole = Judge::Whole(Peer {
            roundings: 1,
            deviation: BTreeMap::new(),
        });
        assert_eq!(Judge::Each(Limits::F32).deviation(&a, &b), 1.0);
        assert_eq!(whole.deviation(&a, &b), 2.0 / 3.0);
        assert!(whole.deviation(&a[..2], &b).is_infinite());
        assert!(whole.deviation(&[f32::NAN], &[1.0]).is_nan());
        assert_eq!(whole.deviation(&[0.5], &[0.0]), 0.5);
    }

    #[test]
    fn a_narrow_type_is_judged_by_the_mean_over_roundings() {
        let peer = |short: f64| {
            Judge::Whole(Peer {
                roundings: 2,
                deviation: BTreeMap::from([("short.logits".into(), short)]),
            })
        };
        let mut found = Found::default();
        // Root mean square 5.
        found.note("logits", "short", 1.0);
        found.note("logits", "short", 7.0);
        found.note("generated", "short", 8.0);
        let report = found.judged(&peer(2.6), &|_| 32.0).unwrap();
        assert!(report.pass, "{report:?}");
        assert_eq!(report.quantities[0].worst, 5.0);
        assert_eq!(report.quantities[0].limit, 2.0 * 2.6);
        assert_eq!(report.quantities[1].limit, 8.0);
        assert!(!found.judged(&peer(2.4), &|_| 32.0).unwrap().pass);
        found.note("logits", "short", f64::NAN);
        assert!(!found.judged(&peer(9.0), &|_| 32.0).unwrap().pass);
        found.note("logits", "long", 1.0);
        let unknown = found.judged(&peer(9.0), &|_| 32.0).unwrap_err();
        assert_eq!(unknown, "long.logits");
    }

    #[test]
    fn roundings_are_those_of_the_fixtures_generator() {
        // `rounded` of make_fixtures.py.
        let x = [1.001f32, -2.34567, 0.0031415, -1e-30, 7.7e8, 0.3333333];
        let name = "model.layers.0.mamba.in_proj.weight";
        for (rounding, bits) in [
            (0, [0x3f80, 0xc016, 0x3b4e, 0x8da2, 0x4e38, 0x3eab]),
            (1, [0x3f80, 0xc016, 0x3b4e, 0x8da3, 0x4e37, 0x3eaa]),
            (11, [0x3f80, 0xc016, 0x3b4e, 0x8da2, 0x4e37, 0x3eab]),
        ] {
            let mut whole = x;
            round_piece(rounding, name, 0, &mut whole);
            assert_eq!(whole.map(|y| y.to_bits() >> 16), bits);
            let mut end = [x[3], x[4], x[5]];
            round_piece(rounding, name, 3, &mut end);
            assert_eq!(end[..], whole[3..]);
        }
    }

    #[test]
    fn roundings_keep_means() {
        // A quarter of the way between two neighbours in bf16.
        let (below, step) = (1.0f32, 1.0f32 / 128.0);
        let x = below + step / 4.0;
        let mut many = [-x; 4000];
        round_piece(7, "w", 0, &mut many);
        let up = many.iter().filter(|y| **y != -below).count();
        assert!(many.iter().all(|y| [-below, -below - step].contains(y)));
        assert!((900..1100).contains(&up), "{up} of 4000");
        assert!(round_bf16(f32::NAN, 0xffff).is_nan());
        assert_eq!(round_bf16(f32::INFINITY, 0xffff), f32::INFINITY);
    }

    #[test]
    fn a_deviation_that_is_no_number_does_not_pass() {
        assert_eq!(deviation(&[1.0, 2.5], &[1.0, 2.0]), 0.25);
        assert!(deviation(&[f32::NAN, 2.0], &[1.0, 2.0]).is_infinite());
        assert!(deviation(&[1.0], &[1.0, 2.0]).is_infinite());
        let mut r = Report {
            pass: true,
            quantities: Vec::new(),
        };
        r.note("logits", 1e-4, 1e-6, "short");
        assert!(r.pass);
        r.note("logits", 1e-4, f64::NAN, "long");
        assert!(!r.pass && r.quantities[0].place == "long");
        assert!(serde_json::to_string(&r).is_ok());
    }
}
