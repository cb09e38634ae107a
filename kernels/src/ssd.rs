//! Launches of the Mamba-2 scan: token by token, each thread with a few states in registers. Backward is three more runs of the same
//! recurrence and a sum over time, without stored states; the gradients of b and c add atomically.

use crate::record::{Args, DType, Param, Recorder, THREADS, Tensor, define, int, long, over};
use crate::reduce::sum_parts;

/// Threads of a block of the recurrence.
const BLOCK: usize = 128;

/// Lanes that share a row of the state, and the states of each: at most 16 where 32 lanes suffice.
pub(crate) fn lanes(others: usize) -> (usize, usize) {
    let lanes = others.div_ceil(16).next_power_of_two().clamp(1, 32);
    (lanes, others.div_ceil(lanes).max(1))
}

struct Shape {
    b: usize,
    t: usize,
    h: usize,
    p: usize,
    g: usize,
    n: usize,
}

impl Shape {
    fn of(a: &Args) -> Shape {
        let (x, b) = (a.arg(0), a.arg(3));
        Shape {
            b: x.size(0),
            t: x.size(1),
            h: x.size(2),
            p: x.size(3),
            g: b.size(2),
            n: b.size(3),
        }
    }

    fn defines(&self, a: &Args) -> Vec<(String, String)> {
        let mut d = a.types();
        d.retain(|(name, _)| name.starts_with("TA") || name == "TR0" || name == "TR1");
        let ((ln, sn), (lp, sp)) = (lanes(self.n), lanes(self.p));
        d.extend([
            define("LN", ln),
            define("SN", sn),
            define("LP", lp),
            define("SP", sp),
        ]);
        d
    }

    fn grid(&self, own: usize, others: usize) -> [usize; 3] {
        [(own * lanes(others).0).div_ceil(BLOCK), self.h, self.b]
    }

    fn sizes(&self) -> [Param; 5] {
        [
            int(self.t),
            int(self.h),
            int(self.p),
            int(self.g),
            int(self.n),
        ]
    }
}

fn steps(r: &mut Recorder, a: &Args, s: &Shape, limit: (f32, f32)) -> (Tensor, Tensor) {
    let n = s.b * s.t * s.h;
    let (dts, decay) = (r.scratch(DType::F32, n), r.scratch(DType::F32, n));
    r.launch(
        ("ssd", "ssd_dt"),
        s.defines(a),
        over(n),
        THREADS,
        vec![
            a.arg(1).into(),
            a.arg(2).into(),
            a.arg(6).into(),
            a.arg(7).into(),
            (&dts).into(),
            (&decay).into(),
            long(n),
            int(s.h),
            Param::Float(limit.0),
            Param::Float(limit.1),
        ],
    );
    (dts, decay)
}

/// `y`, then `state` or `saved`, of `x, dt, a, b, c, d?, dt_bias?, pos?, state?`.
pub fn ssd(r: &mut Recorder, a: &Args, chunk: usize, limit: (f32, f32)) {
    let s = Shape::of(a);
    let (dts, decay) = steps(r, a, &s, limit);
    let absent = Tensor::ABSENT;
    let (state, saved) = match a.arg(8).is_present() {
        true => (a.res(1), &absent),
        false => (&absent, a.res(1)),
    };
    let mut params = vec![
        a.arg(0).into(),
        a.arg(3).into(),
        a.arg(4).into(),
        a.arg(5).into(),
        (&dts).into(),
        (&decay).into(),
        a.res(0).into(),
        state.into(),
        saved.into(),
    ];
    params.extend(s.sizes());
    params.push(int(chunk));
    r.launch(
        ("ssd", "ssd_y"),
        s.defines(a),
        s.grid(s.p, s.n),
        BLOCK,
        params,
    );
}

/// `dx, ddt, da, db, dc`, then `dd, ddt_bias` where their arguments are present, of
/// `x, dt, a, b, c, d?, dt_bias?, pos?, saved, dy`; `saved` holds a state every `chunk` tokens.
pub fn ssd_bwd(r: &mut Recorder, a: &Args, chunk: usize, limit: (f32, f32)) {
    debug_assert_eq!(a.arg(8).size(1), a.arg(0).size(1).div_ceil(chunk.max(1)));
    let s = Shape::of(a);
    let (x, d, dy) = (a.arg(0), a.arg(5), a.arg(9));
    let (dts, decay) = steps(r, a, &s, limit);
    let (db, dc) = (r.sums_of(a.res(3)), r.sums_of(a.res(4)));
    let rows = s.b * s.t * s.h;
    let (yc, xb) = (r.scratch(DType::F32, rows), r.scratch(DType::F32, rows));
    r.zero(&yc);
    r.zero(&xb);
    let scan =
        |r: &mut Recorder, name: &'static str, own: usize, others: usize, tensors: &[&Tensor]| {
            let mut params: Vec<Param> = tensors.iter().map(|&t| t.into()).collect();
            params.extend(s.sizes());
            r.launch(
                ("ssd", name),
                s.defines(a),
                s.grid(own, others),
                BLOCK,
                params,
            );
        };
    let (b, c) = (a.arg(3), a.arg(4));
    scan(
        r,
        "ssd_dc",
        s.n,
        s.p,
        &[x, b, c, dy, &dts, &decay, &dc, &yc],
    );
    scan(
        r,
        "ssd_dx",
        s.p,
        s.n,
        &[x, b, c, d, dy, &dts, &decay, a.res(0), &xb],
    );
    scan(r, "ssd_db", s.n, s.p, &[x, c, dy, &dts, &decay, &db]);
    r.settle(&db, a.res(3));
    r.settle(&dc, a.res(4));
    let mut part = r.scratch(DType::F32, s.b * 2 * s.h);
    part.dims = vec![s.b, 2 * s.h];
    r.launch(
        ("ssd", "ssd_ddt"),
        s.defines(a),
        [(s.b * s.h).div_ceil(32), 1, 1],
        32,
        vec![
            a.arg(1).into(),
            a.arg(2).into(),
            a.arg(6).into(),
            a.arg(7).into(),
            (&dts).into(),
            (&yc).into(),
            (&xb).into(),
            a.res(1).into(),
            (&part).into(),
            int(s.b),
            int(s.t),
            int(s.h),
            Param::Float(limit.0),
            Param::Float(limit.1),
        ],
    );
    sum_parts(r, &part, 0, s.b, s.h, a.res(2));
    if d.is_present() {
        r.launch(
            ("ssd", "ssd_dd"),
            s.defines(a),
            [s.h, 1, 1],
            THREADS,
            vec![
                x.into(),
                dy.into(),
                a.res(5).into(),
                long(s.b * s.t),
                int(s.h),
                int(s.p),
            ],
        );
    }
    if a.arg(6).is_present() {
        let at = 5 + usize::from(d.is_present());
        sum_parts(r, &part, s.h, s.b, s.h, a.res(at));
    }
}
