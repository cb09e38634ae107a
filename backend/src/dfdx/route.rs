//! Choosing experts: the choice is made on the host, its weights are composed. Also the load-balance loss. The contract is
//! `marimba_ir::op::Route`'s.

use super::tape::{Args, Cx, Res, Value, Var, indices};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::{Normalize, Route, Score};

pub(super) fn route<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &Route,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let logits = a.var(0)?;
    let all = match op.score {
        Score::SoftmaxAll | Score::SoftmaxChosen => cx.softmax(logits, &cx.log_sum_exp(logits)?)?,
        Score::Sigmoid => cx.sigmoid(logits)?,
    };
    let bias = a.opt(1).map(Var::host);
    let e = logits.last();
    let mut chosen = Vec::new();
    for row in all.host().chunks(e) {
        let rank: Vec<f64> = (0..e)
            .map(|i| row[i] + bias.as_ref().map_or(0.0, |b| b[i]))
            .collect();
        chosen.extend(choose(op, &rank));
    }
    let ids: Vec<i32> = chosen.iter().map(|&i| i as i32).collect();
    let scores = match op.score {
        Score::SoftmaxAll | Score::Sigmoid => cx.pick(&all, op.top_k, chosen)?,
        Score::SoftmaxChosen => {
            let picked = cx.pick(logits, op.top_k, chosen)?;
            cx.softmax(&picked, &cx.log_sum_exp(&picked)?)?
        }
    };
    let weights = match op.normalize {
        Normalize::None => scores,
        Normalize::Sum => {
            let per_row = (scores.rows(), op.top_k, 1);
            let mut sum = cx.sum(&scores, per_row)?;
            if op.score == Score::Sigmoid {
                sum = cx.offset(&sum, 1e-20)?;
            }
            cx.mul_mid(&scores, &cx.recip(&sum)?, per_row)?
        }
    };
    let weights = if op.scale == 1.0 {
        weights
    } else {
        cx.scale(&weights, op.scale)?
    };
    Ok(vec![weights.into(), ids.into()])
}

/// The `top_k` best of one row, best first, the lower index first among equals.
fn choose(op: &Route, rank: &[f64]) -> Vec<usize> {
    let per = rank.len() / op.n_groups;
    let best = |candidates: &mut Vec<usize>, score: &dyn Fn(usize) -> f64| {
        candidates.sort_by(|&i, &j| score(j).total_cmp(&score(i)).then(i.cmp(&j)));
    };
    let mut groups: Vec<usize> = (0..op.n_groups).collect();
    if op.n_groups > 1 {
        let two_best = |g: usize| {
            let mut r = rank[g * per..(g + 1) * per].to_vec();
            r.sort_by(|x, y| y.total_cmp(x));
            r.iter().take(2).sum()
        };
        best(&mut groups, &two_best);
        groups.truncate(op.top_groups);
    }
    let mut experts: Vec<usize> = groups.iter().flat_map(|g| g * per..(g + 1) * per).collect();
    best(&mut experts, &|i| rank[i]);
    experts.truncate(op.top_k);
    experts
}

pub(super) fn balance<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    a: &Args<E, D>,
) -> Res<Vec<Value<E, D>>> {
    let logits = a.var(0)?;
    let (rows, e) = (logits.rows(), logits.last());
    let experts = indices(a.ints(1)?, e)?;
    let mut share = vec![0.0; e];
    for &i in &experts {
        share[i] += 1.0 / experts.len() as f64;
    }
    let p = cx.softmax(logits, &cx.log_sum_exp(logits)?)?;
    let mean = cx.scale(&cx.sum(&p, (1, rows, e))?, 1.0 / rows as f64)?;
    let sum = cx.sum_all(&cx.mul(&mean, &cx.constant(&share, &[e])?)?)?;
    Ok(vec![cx.scale(&sum, e as f64)?.into()])
}
