//! Launches of the Mamba-1 scan. Backward, the gradients of b and c add atomically: their last bits differ from run to run.

use crate::record::{Args, DType, Recorder, define, int};
use crate::reduce::sum_parts;

/// Threads of a block: channels.
const CHANNELS: usize = 64;

fn grid(a: &Args) -> [usize; 3] {
    let (x, g) = (a.arg(0), a.arg(3).size(2).max(1));
    [(x.size(2) / g).div_ceil(CHANNELS), g, x.size(0)]
}

/// `y`, then `state` or `saved`, of `x, dt, a, b, c, d?, dt_bias?, z?, pos?, state?`.
pub fn selective_scan(r: &mut Recorder, a: &Args, chunk: usize) {
    let x = a.arg(0);
    let carried = a.arg(9).is_present();
    let absent = crate::Tensor::ABSENT;
    let (state, saved) = match carried {
        true => (a.res(1), &absent),
        false => (&absent, a.res(1)),
    };
    let mut defines = a.types();
    defines.push(define("STATES", a.arg(2).size(1)));
    let mut params: Vec<crate::Param> = (0..9).map(|i| a.arg(i).into()).collect();
    params.extend([
        state.into(),
        a.res(0).into(),
        saved.into(),
        int(x.size(1)),
        int(x.size(2)),
        int(a.arg(3).size(2)),
        int(chunk),
    ]);
    r.launch(
        ("selective_scan", "scan_fwd"),
        defines,
        grid(a),
        CHANNELS,
        params,
    );
}

/// `dx, ddt, da, db, dc`, then `dd, ddt_bias, dz` where their arguments are present, of
/// `x, dt, a, b, c, d?, dt_bias?, z?, pos?, saved, dy`.
pub fn selective_scan_bwd(r: &mut Recorder, a: &Args, chunk: usize) {
    let (x, n) = (a.arg(0), a.arg(2).size(1));
    let (bs, t, i) = (x.size(0), x.size(1), x.size(2));
    let mut next = 5;
    let mut optional = |slot: usize| match a.arg(slot).is_present() {
        true => {
            next += 1;
            a.res(next - 1).clone()
        }
        false => crate::Tensor::ABSENT,
    };
    let (dd, ddt_bias, dz) = (optional(5), optional(6), optional(7));
    let (db, dc) = (r.sums_of(a.res(3)), r.sums_of(a.res(4)));
    let hist = r.scratch(DType::F32, chunk.min(t) * n * bs * i);
    let stride = i * (n + 2);
    let mut part = r.scratch(DType::F32, bs * stride);
    part.dims = vec![bs, stride];
    let mut defines = a.types();
    defines.retain(|(name, _)| name.starts_with("TA") || name == "TR0" || name == "TR1");
    defines.push(define("STATES", n));
    let mut params: Vec<crate::Param> = (0..11).map(|k| a.arg(k).into()).collect();
    params.extend([
        a.res(0).into(),
        a.res(1).into(),
        (&db).into(),
        (&dc).into(),
        (&dz).into(),
        (&hist).into(),
        (&part).into(),
        int(t),
        int(i),
        int(a.arg(3).size(2)),
        int(chunk),
    ]);
    r.launch(
        ("selective_scan", "scan_bwd"),
        defines,
        grid(a),
        CHANNELS,
        params,
    );
    r.settle(&db, a.res(3));
    r.settle(&dc, a.res(4));
    sum_parts(r, &part, 0, bs, i * n, a.res(2));
    if dd.is_present() {
        sum_parts(r, &part, i * n, bs, i, &dd);
    }
    if ddt_bias.is_present() {
        sum_parts(r, &part, i * (n + 1), bs, i, &ddt_bias);
    }
}
