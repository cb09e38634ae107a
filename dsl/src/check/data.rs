//! The rules of data parameters.

use super::{At, Cx};
use crate::data::{Data, Mixture, MqarCell, Reading, Tokenizer, is_url};
use std::path::PathBuf;

/// What data parameters may depend on.
pub(crate) struct Given {
    /// V of the model, when known.
    pub(crate) vocab_size: Option<usize>,
    /// T of the rows, when known.
    pub(crate) seq_len: Option<usize>,
    /// The run's seed.
    pub(crate) seed: u64,
}

/// T that the data itself states, if it does.
pub(crate) fn own_seq_len(data: &Data) -> Option<usize> {
    match data {
        Data::Text(_) | Data::Tokens(_) => None,
        Data::Mixture(m) => m.parts.iter().find_map(|p| own_seq_len(&p.data)),
        Data::Mqar(d) => d
            .seq_len
            .or_else(|| d.train.iter().filter_map(|c| c.seq_len).max()),
        Data::InContextRecall(d) => d.seq_len,
        Data::NoisyRecall(d) => d.seq_len,
        Data::FuzzyRecall(d) => d.seq_len,
        Data::RecallGaps(d) => d.seq_len,
        Data::Memorization(d) => d.seq_len,
        Data::Compression(d) => d.seq_len,
        Data::SelectiveCopying(d) => d.seq_len,
        Data::Copying(d) => d.seq_len,
        Data::Induction(d) => d.seq_len,
        Data::Parity(d) => d.seq_len,
        Data::StateTracking(d) => d.seq_len,
        Data::Phonebook(d) => d.seq_len,
    }
}

/// Checks and fills in.
pub(crate) fn data(cx: &Cx<'_>, at: &At, file: &Data, given: &Given) -> Data {
    let mut data = file.clone();
    let seq_len = own_seq_len(&data).or(given.seq_len);
    match &mut data {
        Data::Text(d) => {
            d.path = path(cx, at, "path", &d.path);
            if let Tokenizer::File(p) = &mut d.tokenizer {
                *p = path(cx, at, "tokenizer", p);
            }
            if d.raw_bytes && (d.tokenizer != Tokenizer::Bytes || !d.reading().said().is_empty()) {
                cx.error(
                    &at.at("raw_bytes"),
                    "data::raw_bytes",
                    "`raw_bytes` with a tokenizer or with fields about documents",
                    "only for plain text read in bytes",
                    "",
                );
            }
            fraction(cx, at, "valid_fraction", d.valid_fraction);
            reading(cx, at, &d.reading());
            d.seed.get_or_insert(given.seed);
        }
        Data::Tokens(d) => {
            d.path = path(cx, at, "path", &d.path);
            fraction(cx, at, "valid_fraction", d.valid_fraction);
            reading(cx, at, &d.reading());
            d.seed.get_or_insert(given.seed);
        }
        Data::Mixture(d) => mixture(cx, at, d, given),
        Data::Mqar(d) => mqar(cx, at, d, seq_len, given.seed),
        Data::InContextRecall(d) => {
            halves(cx, at, "vocab_size", d.vocab_size);
            task(
                cx,
                at,
                (&mut d.seq_len, &mut d.seed),
                d.n_train,
                d.n_eval,
                seq_len,
                given,
                4,
            );
        }
        Data::NoisyRecall(d) => {
            cx.positive(at, "n_noise", d.n_noise);
            fraction(cx, at, "noise_fraction", d.noise_fraction);
            halves(cx, at, "vocab_size", d.vocab_size.saturating_sub(d.n_noise));
            task(
                cx,
                at,
                (&mut d.seq_len, &mut d.seed),
                d.n_train,
                d.n_eval,
                seq_len,
                given,
                4,
            );
        }
        Data::FuzzyRecall(d) => {
            halves(cx, at, "vocab_size", d.vocab_size);
            cx.positive(at, "max_motif", d.max_motif);
            task(
                cx,
                at,
                (&mut d.seq_len, &mut d.seed),
                d.n_train,
                d.n_eval,
                seq_len,
                given,
                4 * d.max_motif.max(1),
            );
        }
        Data::RecallGaps(d) => {
            let pairs = cx.positive(at, "n_pairs", d.n_pairs);
            let need = pairs.saturating_add(1).saturating_mul(3);
            if d.vocab_size < need {
                cx.error(
                    &at.at("vocab_size"),
                    "value::out_of_range",
                    format!("`vocab_size` {} for {pairs} pairs", d.vocab_size),
                    format!("must be at least {need}"),
                    "a third of the tokens are keys, a third values, a third noise",
                );
            }
            let fit = seq_len.map_or(0, |t| t.saturating_sub(3 * pairs));
            if d.gaps.is_empty() {
                let powers = (0..).map(|i| 4usize.saturating_pow(i));
                d.gaps = std::iter::once(0)
                    .chain(powers.take_while(|&gap| gap <= fit))
                    .collect();
            }
            let longest = d.gaps.iter().copied().max().unwrap_or(0);
            task(
                cx,
                at,
                (&mut d.seq_len, &mut d.seed),
                d.n_train,
                d.n_eval,
                seq_len,
                given,
                pairs.saturating_mul(3).saturating_add(longest),
            );
        }
        Data::Memorization(d) => {
            cx.number(
                at,
                "vocab_size",
                d.vocab_size as f64,
                |v| v >= 5.0,
                "5 or more",
            );
            task(
                cx,
                at,
                (&mut d.seq_len, &mut d.seed),
                d.n_train,
                d.n_eval,
                seq_len,
                given,
                2,
            );
        }
        Data::Compression(d) => {
            cx.number(
                at,
                "vocab_size",
                d.vocab_size as f64,
                |v| v >= 3.0,
                "3 or more",
            );
            task(
                cx,
                at,
                (&mut d.seq_len, &mut d.seed),
                d.n_train,
                d.n_eval,
                seq_len,
                given,
                2,
            );
        }
        Data::SelectiveCopying(d) => {
            cx.number(
                at,
                "vocab_size",
                d.vocab_size as f64,
                |v| v >= 4.0,
                "4 or more",
            );
            let n = cx.positive(at, "n_copy", d.n_copy);
            task(
                cx,
                at,
                (&mut d.seq_len, &mut d.seed),
                d.n_train,
                d.n_eval,
                seq_len,
                given,
                2 * n + 1,
            );
        }
        Data::Copying(d) => {
            cx.number(
                at,
                "vocab_size",
                d.vocab_size as f64,
                |v| v >= 3.0,
                "3 or more",
            );
            let min = cx.positive(at, "min_len", d.min_len);
            let max = d
                .max_len
                .or(seq_len.map(|t| (t.saturating_sub(1) / 2).max(1)))
                .unwrap_or(min);
            if max < min {
                cx.error(
                    &at.at("max_len"),
                    "value::out_of_range",
                    format!("`max_len` {max} is below `min_len` {min}"),
                    format!("must be at least {min}"),
                    "",
                );
            }
            d.max_len = Some(max);
            task(
                cx,
                at,
                (&mut d.seq_len, &mut d.seed),
                d.n_train,
                d.n_eval,
                seq_len,
                given,
                2 * max + 1,
            );
        }
        Data::Induction(d) => {
            cx.number(
                at,
                "vocab_size",
                d.vocab_size as f64,
                |v| v >= 3.0,
                "3 or more",
            );
            task(
                cx,
                at,
                (&mut d.seq_len, &mut d.seed),
                d.n_train,
                d.n_eval,
                seq_len,
                given,
                4,
            );
        }
        Data::Parity(d) => {
            cx.number(
                at,
                "p_one",
                d.p_one,
                |p| p > 0.0 && p < 1.0,
                "between 0 and 1",
            );
            task(
                cx,
                at,
                (&mut d.seq_len, &mut d.seed),
                d.n_train,
                d.n_eval,
                seq_len,
                given,
                1,
            );
        }
        Data::StateTracking(d) => {
            cx.number(at, "n", d.n as f64, |n| (2.0..=5.0).contains(&n), "2 to 5");
            task(
                cx,
                at,
                (&mut d.seq_len, &mut d.seed),
                d.n_train,
                d.n_eval,
                seq_len,
                given,
                1,
            );
        }
        Data::Phonebook(d) => {
            cx.number(
                at,
                "vocab_size",
                d.vocab_size as f64,
                |v| v >= 16.0,
                "16 or more",
            );
            let name = cx.positive(at, "name_len", d.name_len);
            let digits = cx.positive(at, "n_digits", d.n_digits);
            let entries = d.n_entries.map_or(1, |n| cx.positive(at, "n_entries", n));
            // An entry is name, separator, number, separator; the query is another one.
            task(
                cx,
                at,
                (&mut d.seq_len, &mut d.seed),
                d.n_train,
                d.n_eval,
                seq_len,
                given,
                entries.saturating_add(1).saturating_mul(name + digits + 2),
            );
        }
    }
    if let (Some(need), Some(have)) = (data.vocab_size(), given.vocab_size)
        && need > have
        && !matches!(data, Data::Mixture(_))
    {
        let key = if cx.root.find(&at.at("vocab_size").0).is_some() {
            at.at("vocab_size")
        } else {
            at.clone()
        };
        cx.error(
            &key,
            "data::vocab",
            format!(
                "the data has tokens up to {}, the model's vocab_size is {have}",
                need - 1
            ),
            format!("needs a model with vocab_size of at least {need}"),
            "set `model.vocab_size`, or use data with fewer tokens",
        );
    }
    data
}

/// Rules and defaults that all tasks share; `need` is the shortest row that makes sense.
fn task(
    cx: &Cx<'_>,
    at: &At,
    (own, seed): (&mut Option<usize>, &mut Option<u64>),
    n_train: Option<u64>,
    n_eval: u64,
    seq_len: Option<usize>,
    given: &Given,
    need: usize,
) {
    if n_train == Some(0) {
        cx.error(
            &at.at("n_train"),
            "value::zero",
            "`n_train` is 0",
            "must be 1 or more",
            "leave it out for examples without end",
        );
    }
    if n_eval == 0 {
        cx.error(
            &at.at("n_eval"),
            "value::zero",
            "`n_eval` is 0",
            "must be 1 or more",
            "",
        );
    }
    if let Some(t) = seq_len {
        cx.positive(at, "seq_len", t);
        if t < need {
            let key = if own.is_some() {
                at.at("seq_len")
            } else {
                at.clone()
            };
            cx.error(
                &key,
                "data::too_short",
                format!("rows of {t} tokens are too short for this task"),
                format!("needs seq_len of at least {need}"),
                "",
            );
        }
    }
    *own = own.or(seq_len);
    seed.get_or_insert(given.seed);
}

/// Ranges of the fields that sources of documents share.
fn reading(cx: &Cx<'_>, at: &At, d: &Reading) {
    const MOST: f64 = (1u64 << 20) as f64;
    let within = |n: f64| (1.0..=MOST).contains(&n);
    for (name, value) in [("lanes", d.lanes.map(u64::from)), ("window", d.window)] {
        if let Some(n) = value {
            cx.number(at, name, n as f64, within, "1 to 1048576");
        }
    }
}

fn mixture(cx: &Cx<'_>, at: &At, d: &mut Mixture, given: &Given) {
    reading(cx, at, &d.reading());
    if d.parts.is_empty() {
        cx.error(
            at,
            "data::empty_mixture",
            "a mixture of nothing",
            "needs at least one source",
            "write `Mixture(parts: [(weight: 1, data: Text(path: \"a.txt\"))])`",
        );
    }
    for (i, p) in d.parts.iter_mut().enumerate() {
        let at = at.at("parts").at(i);
        cx.above_zero(&at, "weight", p.weight);
        let at = at.at("data");
        let said = match &p.data {
            Data::Text(t) => t.reading().said(),
            Data::Tokens(t) => t.reading().said(),
            Data::Mixture(_) => {
                cx.error(
                    &at,
                    "data::nested_mixture",
                    "a mixture inside a mixture",
                    "not allowed here",
                    "multiply the weights and list all sources once",
                );
                continue;
            }
            task => {
                if let (Some(own), Some(all)) = (own_seq_len(task), given.seq_len)
                    && own != all
                {
                    let said = at.at("seq_len");
                    let place = cx.root.find(&said.0).map_or(&at, |_| &said);
                    cx.error(
                        place,
                        "data::mixed_seq_len",
                        format!("rows of `{}` have {own} tokens", task.kind()),
                        format!("the mixture's rows have {all}"),
                        "leave out the task's own `seq_len`",
                    );
                    continue;
                }
                Vec::new()
            }
        };
        for name in said {
            cx.error(
                &at.at(name),
                "data::member_field",
                format!("`{name}` of one member of a mixture"),
                "not allowed here",
                format!("say `{name}` once, beside `parts`: it holds for all members"),
            );
        }
        if let Data::Text(t) = &p.data
            && t.raw_bytes
        {
            cx.error(
                &at.at("raw_bytes"),
                "data::raw_bytes",
                "`raw_bytes` in a mixture",
                "only for plain text read in bytes, alone",
                "",
            );
        }
        p.data = self::data(cx, &at, &p.data, given);
    }
    let mut before = 0;
    for (i, shift) in d.schedule.iter().enumerate() {
        let at = at.at("schedule").at(i);
        if shift.after_tokens <= before {
            cx.error(
                &at.at("after_tokens"),
                "data::schedule",
                format!("`after_tokens` is {}", shift.after_tokens),
                format!("must be above {before}"),
                "changes of weights come in order, the first weights hold from token 0",
            );
        }
        before = shift.after_tokens;
        let (have, want) = (shift.weights.len(), d.parts.len());
        if have != want {
            cx.error(
                &at.at("weights"),
                "data::schedule",
                format!("{have} weights for {want} parts"),
                format!("needs {want} weights"),
                "0 leaves a part out",
            );
        }
        let sum: f64 = shift.weights.iter().sum();
        if shift.weights.iter().any(|w| !w.is_finite() || *w < 0.0)
            || !(sum > 0.0 && sum.is_finite())
        {
            cx.error(
                &at.at("weights"),
                "data::schedule",
                "weights that are no shares",
                "must be finite, 0 or more, and not all 0",
                "",
            );
        }
    }
    d.seed.get_or_insert(given.seed);
}

fn fraction(cx: &Cx<'_>, at: &At, name: &str, x: f64) {
    cx.number(
        at,
        name,
        x,
        |x| (0.0..1.0).contains(&x),
        "0 or more and below 1",
    );
}

fn halves(cx: &Cx<'_>, at: &At, name: &str, v: usize) {
    if !v.is_multiple_of(2) || v < 4 {
        cx.error(
            &at.at(name),
            "data::vocab_halves",
            format!("{v} tokens cannot be half keys and half values"),
            "must be even, 4 or more, without noise tokens",
            "",
        );
    }
}

fn mqar(cx: &Cx<'_>, at: &At, d: &mut crate::data::Mqar, seq_len: Option<usize>, seed: u64) {
    let v = cx.positive(at, "vocab_size", d.vocab_size);
    if !v.is_multiple_of(2) {
        cx.error(
            &at.at("vocab_size"),
            "data::vocab_halves",
            format!("vocab_size {v} cannot be half keys and half values"),
            "must be even",
            "",
        );
    }
    cx.above_zero(at, "power", d.power);
    if d.n_eval == 0 {
        cx.error(
            &at.at("n_eval"),
            "value::zero",
            "`n_eval` is 0",
            "must be 1 or more",
            "",
        );
    }
    if d.n_train == Some(0) {
        cx.error(
            &at.at("n_train"),
            "value::zero",
            "`n_train` is 0",
            "must be 1 or more",
            "leave it out for examples without end",
        );
    }
    d.seed.get_or_insert(seed);
    d.seq_len = d.seq_len.or(seq_len);
    let whole = d.seq_len;
    if d.n_pairs.is_some() && !d.train.is_empty() {
        cx.error(
            &at.at("n_pairs"),
            "data::pairs_twice",
            "`n_pairs` and `train` both give the number of pairs",
            "remove one of the two",
            "",
        );
    }
    let short = d.train.is_empty();
    if short {
        d.train = vec![MqarCell {
            n_pairs: d.n_pairs.take().unwrap_or(4),
            seq_len: whole,
            weight: 1.0,
        }];
    }
    let cell = |list: &str, i: usize, c: &mut MqarCell| {
        let at = if short && list == "train" {
            at.clone()
        } else {
            at.at(list).at(i)
        };
        let k = cx.positive(&at, "n_pairs", c.n_pairs);
        cx.above_zero(&at, "weight", c.weight);
        c.seq_len = c.seq_len.or(whole);
        let Some(t) = c.seq_len else { return };
        if t % 2 != 0 {
            cx.error(
                &at.at("seq_len"),
                "data::mqar_odd",
                format!("seq_len {t} is odd"),
                "must be even",
                "pairs and gaps take two tokens each",
            );
        }
        let per_pair = if d.composite_keys { 6 } else { 4 };
        if per_pair * k > t {
            cx.error(
                &at.at("n_pairs"),
                "data::mqar_pairs",
                format!("{k} pairs and their queries do not fit {t} tokens"),
                format!("must be at most {}", t / per_pair),
                format!("{per_pair} x n_pairs <= seq_len"),
            );
        }
        if k >= v / 2 {
            cx.error(
                &at.at("n_pairs"),
                "data::mqar_keys",
                format!(
                    "{k} distinct keys out of {} tokens",
                    (v / 2).saturating_sub(1)
                ),
                format!("must be below {}", v / 2),
                "raise vocab_size",
            );
        }
        if v <= t {
            cx.error(
                &at.at("vocab_size"),
                "data::mqar_vocab",
                format!("vocab_size {v} is not above seq_len {t}"),
                format!("must be at least {}", t + 2 - t % 2),
                "",
            );
        }
        if let Some(w) = whole.filter(|w| t > *w && list == "train") {
            cx.error(
                &at.at("seq_len"),
                "data::too_long",
                format!("a training cell of {t} tokens in rows of {w}"),
                format!("must be at most {w}"),
                "",
            );
        }
        if d.n_reassigned > k {
            cx.error(
                &at.at("n_reassigned"),
                "data::mqar_reassigned",
                format!("{} of {k} keys cannot get a second value", d.n_reassigned),
                format!("must be at most {k}"),
                "",
            );
        }
    };
    let (mut train, mut eval) = (d.train.clone(), d.eval.clone());
    train
        .iter_mut()
        .enumerate()
        .for_each(|(i, c)| cell("train", i, c));
    eval.iter_mut()
        .enumerate()
        .for_each(|(i, c)| cell("eval", i, c));
    if eval.is_empty() {
        eval.clone_from(&train);
    }
    (d.train, d.eval) = (train, eval);
}

/// A path, resolved against the folder of the file that says it.
fn path(cx: &Cx<'_>, at: &At, name: &'static str, p: &std::path::Path) -> PathBuf {
    let at = at.at(name);
    if p.as_os_str().is_empty() {
        if cx.root.find(&at.0).is_some() {
            cx.error(
                &at,
                "data::empty_path",
                format!("`{name}` is empty"),
                "must name a file or a folder",
                "",
            );
        } else if !cx.struck(&at) {
            cx.error(
                &at,
                "ron::missing_field",
                format!("`{name}` is missing"),
                format!("needs `{name}`"),
                format!("add `{name}: \"..\"`, or pass `--set data.{name}=FILE`"),
            );
        }
        return PathBuf::new();
    }
    let dir = cx
        .root
        .find(&at.0)
        .and_then(|n| n.span.source.dir.as_deref());
    match dir {
        Some(d) if p.is_relative() && !is_url(p) => tidy(&d.join(p)),
        _ => p.to_path_buf(),
    }
}

/// Takes `.` and `a/..` out of a path, textually.
fn tidy(p: &std::path::Path) -> PathBuf {
    use std::path::Component as C;
    let mut out = PathBuf::new();
    for c in p.components() {
        match c {
            C::CurDir => {}
            C::ParentDir if matches!(out.components().next_back(), Some(C::Normal(_))) => {
                out.pop();
            }
            c => out.push(c),
        }
    }
    out
}
