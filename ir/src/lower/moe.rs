//! Mixture of experts: score, choose, sort rows by expert, run each expert on its rows, sum back by weight.

use super::ffn::{act_program, gate_program};
use super::{Cx, lower_ffn, output_init};
use crate::op::{
    Balance, Bin, Combine, Dispatch, GatherRows, GroupedLinear, Normalize, Pointwise, Route, Score,
    Un,
};
use crate::{DType, TypeError, ValueId, dims};
use marimba_dsl::model::{Moe as Spec, RouterScore};

/// Parameters below `w`: `router [E, D]`, `router.bias [E]` (a buffer), `experts.{gate,up}_proj [E, F, L]`, `experts.down_proj [E, L, F]`,
/// `latent_in [L, D]`, `latent_out [D, L]`, `shared.*`, `shared_gate [1, D]`.
pub(super) fn lower(cx: &mut Cx, w: &str, spec: &Spec, x: ValueId) -> Result<ValueId, TypeError> {
    let (e, k, f, d) = (
        spec.n_experts,
        spec.top_k,
        spec.expert.d_ff,
        cx.model().d_model,
    );
    let l = spec.latent.unwrap_or(d);

    let router = cx.matrix_f32(&format!("{w}.router"), dims![E e, D d], cx.normal());
    let x32 = cx.cast(x, DType::F32)?;
    let logits = cx.product(x32, router)?;
    let bias = spec
        .router
        .correction_bias
        .then(|| cx.buffer(&format!("{w}.router.bias"), dims![E e]));
    let op = Route {
        top_k: k,
        score: match spec.router.score {
            RouterScore::SoftmaxAll => Score::SoftmaxAll,
            RouterScore::SoftmaxChosen => Score::SoftmaxChosen,
            RouterScore::Sigmoid => Score::Sigmoid,
        },
        normalize: if spec.router.normalize {
            Normalize::Sum
        } else {
            Normalize::None
        },
        n_groups: spec.router.n_groups,
        top_groups: spec.router.top_groups,
        scale: spec.router.scale,
    };
    let r = cx.push(op, vec![Some(logits), bias])?;
    let (weights, experts) = (r[0], r[1]);
    if spec.load_balance != 0.0 && cx.options().router_loss && !cx.stateful() {
        let loss = cx.push1(Balance, vec![Some(logits), Some(experts)])?;
        let name = format!("{}.balance", cx.path());
        cx.aux_loss(name, spec.load_balance, loss);
    }

    let h = match spec.latent {
        Some(l) => cx.linear(
            &format!("{w}.latent_in"),
            x,
            dims![D l],
            cx.normal(),
            spec.latent_bias,
        )?,
        None => x,
    };
    let r = cx.push(Dispatch { n_experts: e }, vec![Some(experts)])?;
    let (order, slot, offsets) = (r[0], r[1], r[2]);
    let rows = cx.push1(GatherRows, vec![Some(h), Some(order), Some(slot)])?;

    cx.active = (k, e);
    let up_w = cx.matrix(
        &format!("{w}.experts.up_proj"),
        dims![E e, F f],
        dims![D l],
        cx.normal(),
    );
    let hidden = if spec.expert.gated {
        let gate_w = cx.matrix(
            &format!("{w}.experts.gate_proj"),
            dims![E e, F f],
            dims![D l],
            cx.normal(),
        );
        let gate = cx.push1(GroupedLinear, vec![Some(rows), Some(gate_w), Some(offsets)])?;
        let up = cx.push1(GroupedLinear, vec![Some(rows), Some(up_w), Some(offsets)])?;
        cx.push1(
            gate_program(spec.expert.act, 1.0),
            vec![Some(gate), Some(up)],
        )?
    } else {
        let up = cx.push1(GroupedLinear, vec![Some(rows), Some(up_w), Some(offsets)])?;
        cx.push1(act_program(spec.expert.act), vec![Some(up)])?
    };
    let down_w = cx.matrix(
        &format!("{w}.experts.down_proj"),
        dims![E e, D l],
        dims![F f],
        output_init(cx),
    );
    cx.active = (1, 1);
    let y = cx.push1(
        GroupedLinear,
        vec![Some(hidden), Some(down_w), Some(offsets)],
    )?;
    let tap = format!("{}.expert_out", cx.path());
    cx.tap(&tap, y);
    let tokens = cx.ty(x).dims[..2].to_vec();
    let y = cx.push1(
        Combine { tokens },
        vec![Some(y), Some(order), Some(slot), Some(weights)],
    )?;
    let y = match spec.latent {
        Some(_) => cx.linear(
            &format!("{w}.latent_out"),
            y,
            dims![D d],
            output_init(cx),
            spec.latent_bias,
        )?,
        None => y,
    };

    let Some(shared) = &spec.shared else {
        return Ok(y);
    };
    let s = lower_ffn(cx, &format!("{w}.shared"), &shared.ffn, x)?;
    if !shared.gated {
        return cx.add(y, s);
    }
    let gate = cx.linear(
        &format!("{w}.shared_gate"),
        x,
        dims![X 1],
        cx.normal(),
        false,
    )?;
    let mut p = Pointwise::new(3);
    let g = p.un(Un::Sigmoid, 2);
    let gated = p.bin(Bin::Mul, g, 1);
    let out = p.bin(Bin::Add, 0, gated);
    cx.push1(p.out(out), vec![Some(y), Some(s), Some(gate)])
}
