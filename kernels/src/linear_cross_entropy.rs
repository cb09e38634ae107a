//! Launches of head and loss: block by block over rows; the logits of a block are f32.

use crate::linear::{flipped, plain, product};
use crate::record::{Args, DType, Param, Recorder, Tensor, flag, int};
use crate::reduce::scale_into;

/// Bytes of the logits of a block.
const BLOCK_BYTES: usize = 512 << 20;

/// Attributes of the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropy {
    /// Factor on logits.
    pub multiplier: f32,
    /// Coefficient of the squared log-sum-exp.
    pub z_loss: f32,
    /// z-loss over ignored rows too.
    pub z_all: bool,
}

/// Rows `from..from + n` of a tensor whose last dimension is `width`.
fn part(t: &Tensor, from: usize, n: usize, width: usize) -> Tensor {
    match t.is_present() {
        true => Tensor {
            ptr: t.ptr + (from * width * t.dtype.bytes()) as u64,
            dtype: t.dtype,
            dims: vec![n, width],
        },
        false => Tensor::ABSENT,
    }
}

struct Walk<'a> {
    x: &'a Tensor,
    w: &'a Tensor,
    targets: &'a Tensor,
    scale: &'a Tensor,
    dloss: &'a Tensor,
    /// nll, lse, hit; written when `forward`.
    rows: [&'a Tensor; 3],
    forward: bool,
    /// dx and dw, whose memory holds what is added to.
    grads: Option<(&'a Tensor, &'a Tensor)>,
    types: Vec<(String, String)>,
}

impl Walk<'_> {
    fn run(&self, r: &mut Recorder, op: &CrossEntropy) {
        let (n, v, d) = (self.x.rows(), self.w.size(0), self.w.size(1));
        let most = (BLOCK_BYTES / (4 * v.max(1))).clamp(1, n.max(1)).min(4096);
        let logits = r.scratch(DType::F32, most * v);
        let grad = match self.grads {
            Some(_) => r.scratch(self.x.dtype, most * v),
            None => Tensor::ABSENT,
        };
        // Operands of other types are widened once, not once a block.
        let wide = match self.w.dtype == self.x.dtype {
            true => self.w.clone(),
            false => {
                let mut wide = r.scratch(self.x.dtype, v * d);
                wide.dims = self.w.dims.clone();
                crate::cast::convert(r, self.w, &wide);
                wide
            }
        };
        for from in (0..n).step_by(most) {
            let m = most.min(n - from);
            let x = part(self.x, from, m, d);
            let [nll, lse, hit] = self.rows.map(|t| part(t, from, m, 1));
            let targets = part(self.targets, from, m, 1);
            let mut block = logits.clone();
            block.dims = vec![m, v];
            product(
                r,
                plain(&x),
                flipped(&wide),
                &block,
                (m, v, d),
                op.multiplier,
                0.0,
            );
            if self.forward {
                r.launch(
                    ("linear_cross_entropy", "ce_rows"),
                    self.types.clone(),
                    [m, 1, 1],
                    512,
                    vec![
                        (&block).into(),
                        (&targets).into(),
                        (&nll).into(),
                        (&lse).into(),
                        (&hit).into(),
                        int(v),
                    ],
                );
            }
            if let Some((dx, dw)) = self.grads {
                r.launch(
                    ("linear_cross_entropy", "ce_grad"),
                    self.types.clone(),
                    [m, 1, 1],
                    512,
                    vec![
                        (&block).into(),
                        (&targets).into(),
                        (&lse).into(),
                        self.scale.into(),
                        self.dloss.into(),
                        (&grad).into(),
                        int(v),
                        Param::Float(op.multiplier),
                        Param::Float(op.z_loss),
                        flag(op.z_all),
                    ],
                );
                let mut g = grad.clone();
                g.dims = vec![m, v];
                let dx = part(dx, from, m, d);
                product(r, plain(&g), plain(&wide), &dx, (m, d, v), 1.0, 0.0);
                product(r, flipped(&g), plain(&x), dw, (v, d, m), 1.0, 1.0);
            }
        }
    }
}

fn loss(r: &mut Recorder, a: &Args, op: &CrossEntropy) {
    let targets = a.arg(2);
    r.launch(
        ("linear_cross_entropy", "ce_loss"),
        kernel_types(a),
        [1, 1, 1],
        1024,
        vec![
            a.res(1).into(),
            a.res(2).into(),
            targets.into(),
            a.arg(3).into(),
            a.res(0).into(),
            int(targets.len()),
            Param::Float(op.z_loss),
            flag(op.z_all),
        ],
    );
}

fn kernel_types(a: &Args) -> Vec<(String, String)> {
    let mut types = a.types();
    types.retain(|(name, _)| name == "TA0");
    types
}

/// `loss, nll, lse, hit` of `x, w, targets, scale`.
pub fn linear_cross_entropy(r: &mut Recorder, a: &Args, op: &CrossEntropy) {
    Walk {
        x: a.arg(0),
        w: a.arg(1),
        targets: a.arg(2),
        scale: a.arg(3),
        dloss: &Tensor::ABSENT,
        rows: [a.res(1), a.res(2), a.res(3)],
        forward: true,
        grads: None,
        types: kernel_types(a),
    }
    .run(r, op);
    loss(r, a, op);
}

/// `dx`, `dw` of `x, w, targets, scale, lse, dloss`.
pub fn linear_cross_entropy_bwd(r: &mut Recorder, a: &Args, op: &CrossEntropy) {
    let dw = a.res(1);
    r.zero(dw);
    Walk {
        x: a.arg(0),
        w: a.arg(1),
        targets: a.arg(2),
        scale: a.arg(3),
        dloss: a.arg(5),
        rows: [&Tensor::ABSENT, a.arg(4), &Tensor::ABSENT],
        forward: false,
        grads: Some((a.res(0), dw)),
        types: kernel_types(a),
    }
    .run(r, op);
}

/// `loss, nll, lse, hit, dx, dw` of `x, w, targets, scale, dloss, into?, beta?`.
pub fn linear_cross_entropy_grad(r: &mut Recorder, a: &Args, op: &CrossEntropy) {
    let (beta, dw) = (a.arg(6), a.res(5));
    if beta.is_present() {
        scale_into(r, dw, beta);
    } else {
        r.zero(dw);
    }
    Walk {
        x: a.arg(0),
        w: a.arg(1),
        targets: a.arg(2),
        scale: a.arg(3),
        dloss: a.arg(4),
        rows: [a.res(1), a.res(2), a.res(3)],
        forward: true,
        grads: Some((a.res(4), dw)),
        types: kernel_types(a),
    }
    .run(r, op);
    loss(r, a, op);
}
