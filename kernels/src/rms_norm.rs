//! Launches of the RMS norm: one block a group of elements; the weight's gradient in two stages, in a fixed order.

use crate::record::{Args, DType, Param, Recorder, Tensor, aligned, chunks, flag, int, long};
use crate::reduce::sum_parts;

/// Attributes of the norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: f32,
    /// Elements normed together.
    pub group: usize,
    /// The weight is an offset from 1.
    pub zero_centered: bool,
    /// 0 no gate, 1 before the norm, 2 after it.
    pub gate: i32,
}

/// Whether rows can be walked 8 elements at a time.
fn wide(op: &RmsNorm, tensors: &[&Tensor]) -> bool {
    op.group.is_multiple_of(8) && aligned(tensors)
}

fn threads(group: usize, wide: bool) -> usize {
    let each = if wide { 8 } else { 4 };
    group.div_ceil(each).next_multiple_of(32).clamp(32, 1024)
}

/// `y`, `rstd` of `x, w?, z?`.
pub fn rms_norm(r: &mut Recorder, a: &Args, op: &RmsNorm) {
    let (x, w) = (a.arg(0), a.arg(1));
    let wide = wide(op, &[x, w, a.arg(2), a.res(0)]);
    let function = if wide { "rms_norm8" } else { "rms_norm" };
    r.launch(
        ("rms_norm", function),
        a.types(),
        [x.len() / op.group, 1, 1],
        threads(op.group, wide),
        vec![
            x.into(),
            w.into(),
            a.arg(2).into(),
            a.res(0).into(),
            a.res(1).into(),
            int(op.group),
            int(if w.is_present() { w.len() } else { 0 }),
            Param::Float(op.eps),
            flag(op.zero_centered),
            Param::Int(op.gate),
        ],
    );
}

/// `dx`, then `dw` and `dz` where their arguments are present, of `x, w?, z?, rstd, dy`.
pub fn rms_norm_bwd(r: &mut Recorder, a: &Args, op: &RmsNorm) {
    let (x, w, z, rstd, dy) = (a.arg(0), a.arg(1), a.arg(2), a.arg(3), a.arg(4));
    let w_len = if w.is_present() { w.len() } else { 0 };
    let dz = a.res(1 + usize::from(w.is_present()));
    // Results shift with what is present, so only the types of the arguments and of dx are named.
    let types: Vec<_> = a
        .types()
        .into_iter()
        .filter(|(name, _)| name.starts_with("TA") || name == "TR0")
        .collect();
    let wide = wide(op, &[x, w, z, dy, a.res(0), dz]);
    let function = if wide { "rms_norm_dx8" } else { "rms_norm_dx" };
    r.launch(
        ("rms_norm", function),
        types.clone(),
        [x.len() / op.group, 1, 1],
        threads(op.group, wide),
        vec![
            x.into(),
            w.into(),
            z.into(),
            rstd.into(),
            dy.into(),
            a.res(0).into(),
            dz.into(),
            int(op.group),
            int(w_len),
            flag(op.zero_centered),
            Param::Int(op.gate),
        ],
    );
    if w.is_present() {
        let rows = x.len() / w_len.max(1);
        let n = chunks(rows);
        let part = r.scratch(DType::F32, n * w_len);
        // A weight shorter than a row is repeated over groups: its rows are groups, each with a rstd of its own.
        let (function, each) = if wide {
            ("rms_norm_dw8", 8)
        } else {
            ("rms_norm_dw", 1)
        };
        r.launch(
            ("rms_norm", function),
            types,
            [w_len.div_ceil(128 * each), n, 1],
            128,
            vec![
                x.into(),
                z.into(),
                rstd.into(),
                dy.into(),
                (&part).into(),
                int(op.group),
                int(w_len),
                long(rows),
                Param::Int(op.gate),
            ],
        );
        sum_parts(r, &part, 0, n, w_len, a.res(1));
    }
}
