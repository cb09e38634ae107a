//! Launches of head and loss: block by block over rows. The logits of a block are of the products' type, and its gradient takes their place.

use crate::linear::{flipped, plain, product};
use crate::record::{Args, DType, Param, Recorder, Tensor, define, flag, int};
use crate::reduce::scale_into;

/// Bytes of the logits of a block: blocks of 4096 rows of 128k words in bf16. Each block adds to the gradient of the head in memory, so few
/// large blocks are faster.
const BLOCK_BYTES: usize = 1 << 30;

/// Most rows of a block.
const ROWS: usize = 16384;

/// Threads of a block that walks a row of logits, and of one that walks it twice.
const WALKERS: [usize; 2] = [512, 1024];

/// Shared memory that leaves room for one block on a multiprocessor of sm_90 only: the rows in work then fit the cache.
const ALONE: usize = 120 << 10;

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
    /// dx and dw.
    grads: Option<(&'a Tensor, &'a Tensor)>,
    /// Whether dw's memory holds nothing that is to be added to.
    fresh: bool,
    types: Vec<(String, String)>,
}

impl Walk<'_> {
    fn run(&self, r: &mut Recorder, op: &CrossEntropy) {
        let (n, v, d) = (self.x.rows(), self.w.size(0), self.w.size(1));
        // Half precision has too little range for logits.
        let held = match self.x.dtype {
            DType::Bf16 => DType::Bf16,
            _ => DType::F32,
        };
        // Whole tiles of the products where there are many.
        let fit = match BLOCK_BYTES / (held.bytes() * v.max(1)) {
            few @ 0..256 => few,
            many => many / 256 * 256,
        };
        let most = fit.min(ROWS).clamp(1, n.max(1));
        let logits = r.scratch(held, most * v);
        let grad = match self.grads {
            Some(_) if held == self.x.dtype => logits.clone(),
            Some(_) => r.scratch(self.x.dtype, most * v),
            None => Tensor::ABSENT,
        };
        let mut types = self.types.clone();
        if held == DType::Bf16 {
            types.push(define("TL", "bf16"));
        }
        // Rows of whole words of 16 bytes, each thread's 8 neighbours in one or two of them.
        let whole = flag(v.is_multiple_of(8));
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
            let rows = [&nll, &lse, &hit].map(Param::from);
            let factors: [Param; 2] = [self.scale.into(), self.dloss.into()];
            let attributes = [
                int(v),
                Param::Float(op.multiplier),
                Param::Float(op.z_loss),
                flag(op.z_all),
                whole.clone(),
            ];
            let mut params: Vec<Param> = vec![(&block).into(), (&targets).into()];
            let (name, walkers) = match (self.forward, self.grads) {
                (true, None) => {
                    params.extend(rows);
                    params.extend([int(v), whole.clone()]);
                    ("ce_rows", WALKERS[0])
                }
                (true, Some(_)) => {
                    params.extend(rows);
                    params.extend(factors);
                    params.push((&grad).into());
                    params.extend(attributes);
                    ("ce_both", WALKERS[1])
                }
                (false, _) => {
                    params.push((&lse).into());
                    params.extend(factors);
                    params.push((&grad).into());
                    params.extend(attributes);
                    ("ce_grad", WALKERS[0])
                }
            };
            let shared = match name == "ce_both" && r.target().hopper {
                true => ALONE,
                false => 0,
            };
            let stem = ("linear_cross_entropy", name);
            r.launch_shared(stem, types.clone(), [m, 1, 1], walkers, shared, params);
            if let Some((dx, dw)) = self.grads {
                let mut g = grad.clone();
                g.dims = vec![m, v];
                let dx = part(dx, from, m, d);
                product(r, plain(&g), plain(&wide), &dx, (m, d, v), 1.0, 0.0);
                let add = match from == 0 && self.fresh {
                    true => 0.0,
                    false => 1.0,
                };
                product(r, flipped(&g), plain(&x), dw, (v, d, m), 1.0, add);
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
        fresh: true,
        types: kernel_types(a),
    }
    .run(r, op);
    loss(r, a, op);
}

/// `dx`, `dw` of `x, w, targets, scale, lse, dloss`.
pub fn linear_cross_entropy_bwd(r: &mut Recorder, a: &Args, op: &CrossEntropy) {
    let dw = a.res(1);
    if a.arg(0).is_empty() {
        r.zero(dw);
    }
    Walk {
        x: a.arg(0),
        w: a.arg(1),
        targets: a.arg(2),
        scale: a.arg(3),
        dloss: a.arg(5),
        rows: [&Tensor::ABSENT, a.arg(4), &Tensor::ABSENT],
        forward: false,
        grads: Some((a.res(0), dw)),
        fresh: true,
        types: kernel_types(a),
    }
    .run(r, op);
}

/// `loss, nll, lse, hit, dx, dw` of `x, w, targets, scale, dloss, into?, beta?`.
pub fn linear_cross_entropy_grad(r: &mut Recorder, a: &Args, op: &CrossEntropy) {
    let (beta, dw) = (a.arg(6), a.res(5));
    if beta.is_present() {
        scale_into(r, dw, beta);
    } else if a.arg(0).is_empty() {
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
        fresh: !beta.is_present(),
        types: kernel_types(a),
    }
    .run(r, op);
    loss(r, a, op);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Command;

    fn tensor(ptr: u64, dtype: DType, dims: &[usize]) -> Tensor {
        Tensor {
            ptr,
            dtype,
            dims: dims.to_vec(),
        }
    }

    /// Blocks cover all rows, and only the first block may leave out what the gradient of the head held.
    #[test]
    fn blocks_cover_all_rows_and_add_up() {
        let (n, d, v) = (10_000, 64, 128_256);
        for accumulate in [false, true] {
            let mut args: Vec<Option<Tensor>> = vec![
                Some(tensor(1 << 40, DType::Bf16, &[n, d])),
                Some(tensor(2 << 40, DType::Bf16, &[v, d])),
                Some(tensor(3 << 40, DType::I32, &[n])),
                Some(tensor(4 << 40, DType::F32, &[1])),
                Some(tensor(5 << 40, DType::F32, &[1])),
            ];
            if accumulate {
                args.push(Some(tensor(11 << 40, DType::F32, &[v, d])));
                args.push(Some(tensor(12 << 40, DType::F32, &[1])));
            }
            let mut results = vec![tensor(6 << 40, DType::F32, &[1])];
            results.extend((7..10).map(|i| tensor(i << 40, DType::F32, &[n])));
            results.push(tensor(10 << 40, DType::Bf16, &[n, d]));
            results.push(tensor(11 << 40, DType::F32, &[v, d]));
            let mut r = Recorder::new(256);
            let a = Args {
                args: &args,
                results: &results,
                fixed: &[],
            };
            let op = CrossEntropy {
                multiplier: 1.0,
                z_loss: 0.0,
                z_all: false,
            };
            linear_cross_entropy_grad(&mut r, &a, &op);
            assert!(r.scratch_bytes() <= BLOCK_BYTES);
            let to_head: Vec<(usize, f32)> = r
                .commands
                .iter()
                .filter_map(|c| match c {
                    Command::Product(p) if p.c == 11 << 40 => Some((p.sizes.2, p.beta)),
                    _ => None,
                })
                .collect();
            let rows: usize = to_head.iter().map(|(rows, _)| rows).sum();
            assert_eq!(rows, n);
            assert!(to_head.len() > 1);
            let first = if accumulate { 1.0 } else { 0.0 };
            for (i, (_, beta)) in to_head.iter().enumerate() {
                assert_eq!(*beta, if i == 0 { first } else { 1.0 });
            }
        }
    }
}
