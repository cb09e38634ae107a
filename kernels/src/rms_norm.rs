//! Launches of the RMS norm: one pass over rows of aligned vectors, two over others; the weight's gradient in two stages, in a fixed
//! order.

use crate::record::{
    Args, DType, Param, Recorder, Tensor, aligned, chunks, define, flag, int, long,
};
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

/// How rows are shared when they can be walked in vectors of 8 elements: the threads of a row, a row's vectors of each, the rows of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Share {
    team: usize,
    vectors: usize,
    teams: usize,
}

/// Threads of a block whose rows are narrower than a block.
const BLOCK: usize = 256;

/// Threads that all blocks together have at most, forward and backward (there for teams in a warp and rows in shared memory, and for teams of
/// a block with rows in registers, which take more of them): what an H200 holds at once, so that blocks stay. Fixed numbers, since the order
/// of sums depends on them.
const RESIDENT: usize = 132 * 2048;
const RESIDENT_BWD: (usize, usize) = (132 * 1024, 132 * 512);

/// Rows in shared memory: one being worked on, one under way.
const STAGES: usize = 2;

fn share(op: &RmsNorm, tensors: &[&Tensor]) -> Option<Share> {
    if !op.group.is_multiple_of(8) || !aligned(tensors) {
        return None;
    }
    let n = op.group / 8;
    let (team, vectors) = match n {
        0..=32 => (n.next_power_of_two(), 1),
        33..=128 => (32, n.div_ceil(32)),
        129..=4096 => {
            let few = if op.gate == 0 { 2 } else { 1 };
            let vectors = n.div_ceil(512).clamp(few, 4);
            (n.div_ceil(vectors).next_multiple_of(32), vectors)
        }
        _ => return None,
    };
    let teams = if team > 32 { 1 } else { BLOCK / team };
    Some(Share {
        team,
        vectors,
        teams,
    })
}

impl Share {
    fn block(self) -> usize {
        self.team * self.teams
    }

    /// Blocks for that many rows, of which a weight has `of`: every team meets the same part of the weight in all its rows.
    fn blocks(self, rows: usize, of: usize, resident: usize) -> usize {
        let most = resident / self.block();
        rows.div_ceil(self.teams).min(most).next_multiple_of(of)
    }

    fn defines(self, op: &RmsNorm) -> [(String, String); 3] {
        [
            define("TEAM", self.team),
            define("NV", self.vectors),
            define("GATE", op.gate),
        ]
    }
}

fn threads(group: usize) -> usize {
    group.div_ceil(4).next_multiple_of(32).clamp(32, 1024)
}

/// `y`, `rstd` of `x, w?, z?`.
pub fn rms_norm(r: &mut Recorder, a: &Args, op: &RmsNorm) {
    let (x, w, z, y) = (a.arg(0), a.arg(1), a.arg(2), a.res(0));
    let w_len = if w.is_present() { w.len() } else { 0 };
    let rows = x.len() / op.group;
    let mut defines = a.types();
    let mut params: Vec<Param> = [x, w, z, y, a.res(1)].map(Param::from).to_vec();
    let (function, grid, block) = match share(op, &[x, w, z, y]) {
        Some(s) => {
            defines.extend(s.defines(op));
            params.push(long(rows));
            let blocks = s.blocks(rows, (w_len / op.group).max(1), RESIDENT);
            ("rms_norm_rows", blocks, s.block())
        }
        None => ("rms_norm", rows, threads(op.group)),
    };
    params.extend([
        int(op.group),
        int(w_len),
        Param::Float(op.eps),
        flag(op.zero_centered),
    ]);
    if function == "rms_norm" {
        params.push(Param::Int(op.gate));
    }
    r.launch(("rms_norm", function), defines, [grid, 1, 1], block, params);
    r.early();
}

/// `dx`, then `dw` and `dz` where their arguments are present, of `x, w?, z?, rstd, dy, add?`; `add` is added to dx.
pub fn rms_norm_bwd(r: &mut Recorder, a: &Args, op: &RmsNorm) {
    let (x, w, z, rstd, dy, add) = (a.arg(0), a.arg(1), a.arg(2), a.arg(3), a.arg(4), a.arg(5));
    let w_len = if w.is_present() { w.len() } else { 0 };
    let dz = match z.is_present() {
        true => a.res(1 + usize::from(w.is_present())),
        false => &Tensor::ABSENT,
    };
    // Results shift with what is present, so only the types of the arguments and of dx are named.
    let mut types: Vec<_> = a
        .types()
        .into_iter()
        .filter(|(name, _)| name.starts_with("TA") || name == "TR0")
        .collect();
    let rows = x.len() / op.group;
    let mut params: Vec<Param> = [x, w, z, rstd, dy, add, a.res(0), dz]
        .map(Param::from)
        .to_vec();
    if let Some(s) = share(op, &[x, w, z, dy, add, a.res(0), dz]) {
        let of = (w_len / op.group).max(1);
        // Gated rows come by way of shared memory, which leaves registers for a second block on a multiprocessor; others are faster without.
        let row: usize = [x, dy, z, add]
            .into_iter()
            .filter(|t| t.is_present())
            .map(|t| 8 * t.dtype.bytes() * s.vectors * s.block())
            .sum();
        let staged = z.is_present() && s.team > 32 && STAGES * row <= r.target().shared;
        let stages = if staged { STAGES } else { 0 };
        let most = match (s.team > 32, staged) {
            (true, false) => RESIDENT_BWD.1,
            _ => RESIDENT_BWD.0,
        };
        let blocks = s.blocks(rows, of, most);
        let n = blocks * s.teams / of;
        let part = match w.is_present() {
            true => r.scratch(DType::F32, n * w_len),
            false => Tensor::ABSENT,
        };
        types.extend(s.defines(op));
        types.extend([
            define("STAGES", stages),
            define("ADDED", i32::from(add.is_present())),
        ]);
        params.extend([
            Param::from(&part),
            long(rows),
            int(op.group),
            int(w_len),
            flag(op.zero_centered),
        ]);
        let launch = ("rms_norm", "rms_norm_bwd_rows");
        r.launch_shared(
            launch,
            types,
            [blocks, 1, 1],
            s.block(),
            stages * row,
            params,
        );
        if w.is_present() {
            sum_parts(r, &part, 0, n, w_len, a.res(1));
        }
        return;
    }
    params.extend([
        int(op.group),
        int(w_len),
        flag(op.zero_centered),
        Param::Int(op.gate),
    ]);
    r.launch(
        ("rms_norm", "rms_norm_dx"),
        types.clone(),
        [rows, 1, 1],
        threads(op.group),
        params,
    );
    if w.is_present() {
        let rows = x.len() / w_len.max(1);
        let n = chunks(rows);
        let part = r.scratch(DType::F32, n * w_len);
        // A weight shorter than a row is repeated over groups: its rows are groups, each with a rstd of its own.
        r.launch(
            ("rms_norm", "rms_norm_dw"),
            types,
            [w_len.div_ceil(128), n, 1],
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
