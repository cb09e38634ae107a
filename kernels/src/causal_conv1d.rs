//! Launches of the causal convolution; sums over tokens in two stages, in a fixed order.

use crate::record::{Args, DType, Recorder, THREADS, chunks, define, flag, int, long, over};
use crate::reduce::sum_parts;

fn defines(a: &Args) -> Vec<(String, String)> {
    let mut d = a.types();
    d.push(define("K", a.arg(1).size(1)));
    d
}

/// `y`, `state` of `x, w, b?, pos?, state?`.
pub fn causal_conv1d(r: &mut Recorder, a: &Args, silu: bool) {
    let (x, state) = (a.arg(0), a.arg(4));
    let (t, i) = (x.size(1), x.size(2));
    r.launch(
        ("causal_conv1d", "conv"),
        defines(a),
        over(x.len()),
        THREADS,
        vec![
            x.into(),
            a.arg(1).into(),
            a.arg(2).into(),
            a.arg(3).into(),
            state.into(),
            a.res(0).into(),
            long(x.len()),
            int(t),
            int(i),
            flag(silu),
        ],
    );
    if !state.is_empty() && state.is_present() {
        r.launch(
            ("causal_conv1d", "conv_state"),
            defines(a),
            [(x.size(0) * i).div_ceil(THREADS), 1, 1],
            THREADS,
            vec![x.into(), a.res(1).into(), int(x.size(0)), int(t), int(i)],
        );
    }
}

/// `dx`, `dw`, `db` (when b is present) of `x, w, b?, pos?, dy`.
pub fn causal_conv1d_bwd(r: &mut Recorder, a: &Args, silu: bool) {
    let (x, w, b, pos) = (a.arg(0), a.arg(1), a.arg(2), a.arg(3));
    let (t, i, k) = (x.size(1), x.size(2), w.size(1));
    let dpre = r.scratch(DType::F32, x.len());
    r.launch(
        ("causal_conv1d", "conv_dpre"),
        defines(a),
        over(x.len()),
        THREADS,
        vec![
            x.into(),
            w.into(),
            b.into(),
            pos.into(),
            a.arg(4).into(),
            (&dpre).into(),
            long(x.len()),
            int(t),
            int(i),
            flag(silu),
        ],
    );
    r.launch(
        ("causal_conv1d", "conv_dx"),
        defines(a),
        over(x.len()),
        THREADS,
        vec![
            w.into(),
            pos.into(),
            (&dpre).into(),
            a.res(0).into(),
            long(x.len()),
            int(t),
            int(i),
        ],
    );
    let rows = x.rows();
    let n = chunks(rows);
    let stride = i * (k + 1);
    let part = r.scratch(DType::F32, n * stride);
    r.launch(
        ("causal_conv1d", "conv_dw"),
        defines(a),
        [i.div_ceil(128), n, 1],
        128,
        vec![
            x.into(),
            pos.into(),
            (&dpre).into(),
            (&part).into(),
            long(rows),
            int(t),
            int(i),
        ],
    );
    let mut from = part.clone();
    from.dims = vec![n, stride];
    sum_parts(r, &from, 0, n, i * k, a.res(1));
    if b.is_present() {
        sum_parts(r, &from, i * k, n, i, a.res(2));
    }
}
