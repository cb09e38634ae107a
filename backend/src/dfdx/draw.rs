//! Drawing a token, on the host: the definition word by word over the sorted row. The contract is
//! `marimba_ir::op::Draw`'s.

use super::tape::{Args, Fault, Res, Value};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::op::WEIGHT_BITS;

pub(super) fn draw<E: Dtype, D: Device<E>>(a: &Args<E, D>) -> Res<Vec<Value<E, D>>> {
    let (logits, settings, bits) = (a.var(0)?, a.var(1)?.host(), a.ints(2)?);
    let &[temperature, top_k, top_p] = &settings[..] else {
        return Err(Fault(format!("{} settings, not 3", settings.len())));
    };
    let one = f64::from(WEIGHT_BITS).exp2();
    let mut tokens = Vec::new();
    for (row, bits) in logits.host().chunks(logits.last()).zip(bits.chunks(2)) {
        // A stable sort: equals stay in the order of their numbers. NaN goes below the smallest number.
        let mut order: Vec<(usize, f64)> = row.iter().copied().enumerate().collect();
        let place = |l: f64| (!l.is_nan(), if l.is_nan() { 0.0 } else { l });
        order.sort_by(|(_, x), (_, y)| {
            let falling = place(*y).partial_cmp(&place(*x));
            falling.unwrap_or(std::cmp::Ordering::Equal)
        });
        if temperature.is_nan() || temperature <= 0.0 {
            order.truncate(1);
        }
        if top_k >= 1.0 {
            order.truncate(top_k as usize);
        }
        let top = order[0].1;
        let weights: Vec<u128> = order
            .iter()
            .map(|(_, l)| match *l == top {
                true => one as u128,
                false => (((l - top) / temperature).exp() * one).round_ties_even() as u128,
            })
            .collect();
        let all: u128 = weights.iter().sum();
        let wanted = (top_p * all as f64).ceil().min(all as f64) as u128;
        let mut kept = 0;
        for w in &weights {
            kept += w;
            if kept >= wanted {
                break;
            }
        }
        let word = |i: usize| u128::from(bits[i] as u32);
        let at = (((word(1) << 32) + word(0)) * kept) >> 64;
        let mut sum = 0;
        let mut token = order[0].0;
        for ((i, _), w) in order.iter().zip(&weights) {
            sum += w;
            if sum > at {
                token = *i;
                break;
            }
        }
        tokens.push(token as i32);
    }
    Ok(vec![tokens.into()])
}
