//! Launches of routing: one thread a token.

use crate::record::{Args, DType, Param, Recorder, THREADS, flag, int};

/// Attributes of the choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Route {
    /// Experts per token.
    pub top_k: usize,
    /// 0 softmax over all, 1 softmax over the chosen, 2 sigmoid.
    pub score: i32,
    /// Divide by the sum of the chosen.
    pub normalize: bool,
    /// Groups of consecutive experts, at most 256.
    pub groups: usize,
    /// Groups that may be chosen from.
    pub top_groups: usize,
    /// Factor on weights.
    pub scale: f32,
}

fn grid(rows: usize) -> [usize; 3] {
    [rows.div_ceil(64), 1, 1]
}

/// `weights`, `experts` of `logits, bias?`.
pub fn route(r: &mut Recorder, a: &Args, op: &Route) {
    let logits = a.arg(0);
    r.launch(
        ("route", "route"),
        Vec::new(),
        grid(logits.rows()),
        64,
        vec![
            logits.into(),
            a.arg(1).into(),
            a.res(0).into(),
            a.res(1).into(),
            int(logits.rows()),
            int(logits.last()),
            int(op.top_k),
            Param::Int(op.score),
            flag(op.normalize),
            int(op.groups),
            int(op.top_groups),
            Param::Float(op.scale),
        ],
    );
}

/// `dlogits` of `logits, experts, dweights`.
pub fn route_bwd(r: &mut Recorder, a: &Args, op: &Route) {
    let logits = a.arg(0);
    r.launch(
        ("route", "route_bwd"),
        Vec::new(),
        grid(logits.rows()),
        64,
        vec![
            logits.into(),
            a.arg(1).into(),
            a.arg(2).into(),
            a.res(0).into(),
            int(logits.rows()),
            int(logits.last()),
            int(op.top_k),
            Param::Int(op.score),
            flag(op.normalize),
            Param::Float(op.scale),
        ],
    );
}

/// Shares of choices and the sum of share times probability of each row.
fn rows(r: &mut Recorder, a: &Args) -> (crate::Tensor, crate::Tensor) {
    let (logits, experts) = (a.arg(0), a.arg(1));
    let (n, e) = (logits.rows(), logits.last());
    let (share, part) = (r.scratch(DType::F32, e), r.scratch(DType::F32, n));
    r.launch(
        ("route", "shares"),
        Vec::new(),
        [e, 1, 1],
        THREADS,
        vec![experts.into(), (&share).into(), int(experts.len())],
    );
    r.launch(
        ("route", "balance_rows"),
        Vec::new(),
        grid(n),
        64,
        vec![
            logits.into(),
            (&share).into(),
            (&part).into(),
            int(n),
            int(e),
        ],
    );
    (share, part)
}

/// `loss` of `logits, experts`.
pub fn balance(r: &mut Recorder, a: &Args) {
    let (_, part) = rows(r, a);
    let logits = a.arg(0);
    r.launch(
        ("route", "balance"),
        Vec::new(),
        [1, 1, 1],
        THREADS,
        vec![
            (&part).into(),
            a.res(0).into(),
            int(logits.rows()),
            int(logits.last()),
        ],
    );
}

/// `dlogits` of `logits, experts, dloss`.
pub fn balance_bwd(r: &mut Recorder, a: &Args) {
    let (share, part) = rows(r, a);
    let logits = a.arg(0);
    r.launch(
        ("route", "balance_bwd"),
        Vec::new(),
        grid(logits.rows()),
        64,
        vec![
            logits.into(),
            (&share).into(),
            (&part).into(),
            a.arg(2).into(),
            a.res(0).into(),
            int(logits.rows()),
            int(logits.last()),
        ],
    );
}
