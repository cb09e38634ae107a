//! Elementwise programs, one dfdx primitive or a few per instruction. The contract is `marimba_ir::op::Pointwise`'s.

use super::tape::{Args, Cx, Fault, Res, Value, Var};
use dfdx::prelude::{Device, Dtype};
use marimba_ir::Type;
use marimba_ir::op::{Bin, Broadcast, Instr, Pointwise, Un};

pub(super) fn pointwise<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    op: &Pointwise,
    a: &Args<E, D>,
    types: &[Option<Type>],
    result: &Type,
) -> Res<Vec<Value<E, D>>> {
    let (n, sizes) = (result.len(), result.sizes());
    let mut regs: Vec<Var<E, D>> = Vec::new();
    for instr in &op.code {
        let r = match *instr {
            Instr::Arg(k) => {
                let k = usize::from(k);
                let x = a.var(k)?;
                let how = types
                    .get(k)
                    .and_then(Option::as_ref)
                    .and_then(|t| Broadcast::of(t, result))
                    .ok_or_else(|| Fault(format!("argument {k} does not broadcast")))?;
                match how {
                    Broadcast::Full => x.clone(),
                    Broadcast::Scalar => cx.expand(x, (1, n, 1))?,
                    Broadcast::Suffix { period } => cx.expand(x, (1, n / period, period))?,
                    Broadcast::Prefix { repeat } => cx.expand(x, (n / repeat, repeat, 1))?,
                }
                .view(&sizes)
            }
            Instr::Const(c) => cx.full(f64::from(c), &sizes)?,
            Instr::Un(f, x) => un(cx, f, &regs[usize::from(x)])?,
            Instr::Bin(f, x, y) => {
                let (x, y) = (&regs[usize::from(x)], &regs[usize::from(y)]);
                match f {
                    Bin::Add => cx.add(x, y)?,
                    Bin::Sub => cx.sub(x, y)?,
                    Bin::Mul => cx.mul(x, y)?,
                }
            }
        };
        regs.push(r);
    }
    Ok(op
        .outs
        .iter()
        .map(|&o| regs[usize::from(o)].clone().into())
        .collect())
}

fn un<E: Dtype, D: Device<E>>(cx: &Cx<E, D>, f: Un, x: &Var<E, D>) -> Res<Var<E, D>> {
    match f {
        Un::Neg => cx.scale(x, -1.0),
        Un::Exp => cx.exp(x),
        Un::Sigmoid => cx.sigmoid(x),
        Un::Silu => cx.silu(x),
        Un::Softplus => cx.softplus(x),
        Un::Gelu => cx.gelu(x),
        Un::GeluTanh => cx.gelu_tanh(x),
        Un::Relu => cx.relu(x),
        Un::Step => {
            let step: Vec<f64> = x
                .host()
                .iter()
                .map(|&x| if x > 0.0 { 1.0 } else { 0.0 })
                .collect();
            cx.constant(&step, &x.sizes)
        }
        // The derivatives below come from a tape of their own: that of the function they are the derivative of.
        Un::DSilu => slope(cx, x, Cx::silu),
        Un::DGelu => slope(cx, x, Cx::gelu),
        Un::DGeluTanh => slope(cx, x, Cx::gelu_tanh),
        Un::Scale(c) => cx.scale(x, f64::from(c)),
        Un::Offset(c) => cx.offset(x, f64::from(c)),
    }
}

/// `f'(x)` as a constant: no lowering differentiates a derivative.
fn slope<E: Dtype, D: Device<E>>(
    cx: &Cx<E, D>,
    x: &Var<E, D>,
    f: impl Fn(&Cx<E, D>, &Var<E, D>) -> Res<Var<E, D>>,
) -> Res<Var<E, D>> {
    let own = cx.another();
    let leaf = own.leaf(&x.host(), &x.sizes)?;
    let y = own.sum_all(&f(&own, &leaf)?)?;
    let d = own.backward(&y)?.of(&leaf)?;
    cx.constant(&d, &x.sizes)
}
