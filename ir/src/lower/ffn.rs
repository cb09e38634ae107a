//! Dense ffns: gated (Shazeer 2020, arXiv 2002.05202) and plain.

use super::{Cx, act, output_init};
use crate::op::{Bin, Pointwise, Un};
use crate::{TypeError, ValueId, dims};
use marimba_dsl::model::{Act, Glu, Mlp};

/// `act(gate_multiplier * x0) * x1`.
pub(super) fn gate_program(a: Act, multiplier: f64) -> Pointwise {
    let mut p = Pointwise::new(2);
    let inner = if multiplier == 1.0 {
        0
    } else {
        p.un(Un::Scale(multiplier as f32), 0)
    };
    let gated = activate(&mut p, a, inner);
    let out = p.bin(Bin::Mul, gated, 1);
    p.out(out)
}

/// `act(x0)`.
pub(super) fn act_program(a: Act) -> Pointwise {
    let mut p = Pointwise::new(1);
    let out = activate(&mut p, a, 0);
    p.out(out)
}

fn activate(p: &mut Pointwise, a: Act, x: u16) -> u16 {
    let y = p.un(act(a), x);
    match a {
        Act::Relu2 => p.bin(Bin::Mul, y, y),
        Act::Silu | Act::Gelu | Act::GeluTanh | Act::Relu => y,
    }
}

/// Parameters below `w`: `gate_proj up_proj [F, D]`, `down_proj [D, F]`.
pub(super) fn glu(cx: &mut Cx, w: &str, spec: &Glu, x: ValueId) -> Result<ValueId, TypeError> {
    let gate = cx.linear(
        &format!("{w}.gate_proj"),
        x,
        dims![F spec.d_ff],
        cx.normal(),
        spec.bias,
    )?;
    let up = cx.linear(
        &format!("{w}.up_proj"),
        x,
        dims![F spec.d_ff],
        cx.normal(),
        spec.bias,
    )?;
    let h = cx.push1(
        gate_program(spec.act, spec.gate_multiplier),
        vec![Some(gate), Some(up)],
    )?;
    let y = down(cx, w, h, spec.bias)?;
    cx.scale(y, spec.out_multiplier)
}

/// Parameters below `w`: `up_proj [F, D]`, `down_proj [D, F]`.
pub(super) fn mlp(cx: &mut Cx, w: &str, spec: &Mlp, x: ValueId) -> Result<ValueId, TypeError> {
    let up = cx.linear(
        &format!("{w}.up_proj"),
        x,
        dims![F spec.d_ff],
        cx.normal(),
        spec.bias,
    )?;
    let h = cx.push1(act_program(spec.act), vec![Some(up)])?;
    down(cx, w, h, spec.bias)
}

fn down(cx: &mut Cx, w: &str, h: ValueId, bias: bool) -> Result<ValueId, TypeError> {
    let d = cx.model().d_model;
    let init = output_init(cx);
    cx.linear(&format!("{w}.down_proj"), h, dims![D d], init, bias)
}
