//! Launches of expert layers. Offsets stay on the device: a grid covers the most tiles there can be, and each block finds its expert.

use crate::record::{Args, DType, Recorder, THREADS, int, long, over};

/// Side of a tile of a product.
const TILE: usize = 64;

/// `order, slot, offsets` of `experts`.
pub fn dispatch(r: &mut Recorder, a: &Args, experts: usize) {
    let (choices, offsets) = (a.arg(0), a.res(2));
    let n = choices.len();
    let counts = r.scratch(DType::I32, experts);
    r.launch(
        ("moe", "expert_count"),
        Vec::new(),
        [experts, 1, 1],
        32,
        vec![choices.into(), (&counts).into(), int(n)],
    );
    r.launch(
        ("moe", "expert_offsets"),
        Vec::new(),
        [1, 1, 1],
        1,
        vec![(&counts).into(), offsets.into(), int(experts)],
    );
    r.launch(
        ("moe", "expert_place"),
        Vec::new(),
        [experts, 1, 1],
        32,
        vec![
            choices.into(),
            offsets.into(),
            a.res(0).into(),
            a.res(1).into(),
            int(n),
        ],
    );
}

/// `y` of `x, order, slot`.
pub fn gather_rows(r: &mut Recorder, a: &Args) {
    let (x, y) = (a.arg(0), a.res(0));
    let k = y.rows() / x.rows().max(1);
    r.launch(
        ("moe", "gather_rows"),
        a.types(),
        over(y.len()),
        THREADS,
        vec![
            x.into(),
            a.arg(1).into(),
            y.into(),
            long(y.len()),
            int(y.last()),
            int(k),
        ],
    );
}

/// `x` of `y, order, slot, weights?`.
pub fn combine(r: &mut Recorder, a: &Args) {
    let (y, x) = (a.arg(0), a.res(0));
    let k = y.rows() / x.rows().max(1);
    r.launch(
        ("moe", "combine"),
        a.types(),
        over(x.len()),
        THREADS,
        vec![
            y.into(),
            a.arg(2).into(),
            a.arg(3).into(),
            x.into(),
            long(x.len()),
            int(x.last()),
            int(k),
        ],
    );
}

/// `dy`, `dweights` of `y, order, slot, weights, dx`.
pub fn combine_bwd(r: &mut Recorder, a: &Args) {
    let (y, dx) = (a.arg(0), a.arg(4));
    let k = y.rows() / dx.rows().max(1);
    r.launch(
        ("moe", "combine_bwd"),
        a.types(),
        [y.rows(), 1, 1],
        128,
        vec![
            y.into(),
            a.arg(1).into(),
            a.arg(3).into(),
            dx.into(),
            a.res(0).into(),
            a.res(1).into(),
            int(y.last()),
            int(k),
        ],
    );
}

fn by_rows(r: &mut Recorder, a: &Args, name: &'static str, columns: usize) {
    let w = a.arg(1);
    let (e, n, k) = (w.size(0), w.size(1), w.size(2));
    let tiles = a.arg(0).rows().div_ceil(TILE) + e;
    r.launch(
        ("moe", name),
        a.types(),
        [columns.div_ceil(TILE), tiles, 1],
        256,
        vec![
            a.arg(0).into(),
            w.into(),
            a.arg(2).into(),
            a.res(0).into(),
            int(e),
            int(n),
            int(k),
        ],
    );
}

/// `y` of `x, w, offsets`.
pub fn grouped_linear(r: &mut Recorder, a: &Args) {
    by_rows(r, a, "grouped_linear", a.arg(1).size(1));
}

/// `dx` of `dy, w, offsets`.
pub fn grouped_linear_dx(r: &mut Recorder, a: &Args) {
    by_rows(r, a, "grouped_linear_dx", a.arg(1).size(2));
}

/// `dw` of `x, dy, offsets, into?, beta?`.
pub fn grouped_linear_dw(r: &mut Recorder, a: &Args) {
    let dw = a.res(0);
    let (e, n, k) = (dw.size(0), dw.size(1), dw.size(2));
    r.launch(
        ("moe", "grouped_linear_dw"),
        a.types(),
        [k.div_ceil(TILE), n.div_ceil(TILE), e],
        256,
        vec![
            a.arg(0).into(),
            a.arg(1).into(),
            a.arg(2).into(),
            a.arg(4).into(),
            dw.into(),
            int(n),
            int(k),
        ],
    );
}
