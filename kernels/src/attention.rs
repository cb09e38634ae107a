//! Launches of attention: in f32 tiles of 32 queries or keys; in bf16 products of warps on tensor cores, and on sm_90, for widths in whole
//! words of 16 bytes, products of warpgroups over tiles that the copy engine brings. Equal runs give equal bits, but for dq of the latter where the target leaves the order of sums open: then one kernel computes
//! all gradients and adds its shares of dq in memory. One query a sequence, a step of decoding, has kernels of its own.

use crate::record::{Args, DType, Param, Recorder, Tensor, View, aligned, define, int, long};

/// Rows of a block's own tile.
const ROWS: usize = 32;

/// Rows of the tiles it walks over: fewer for wide heads, so that a block fits 99 KiB of shared memory.
fn walked(p: usize) -> usize {
    if p > 192 { 8 } else { 32 }
}

fn launch(
    r: &mut Recorder,
    a: &Args,
    name: &'static str,
    (grid, tiles, scores): ([usize; 3], (usize, usize), usize),
    params: Vec<Param>,
) {
    let p = a.arg(0).size(3);
    let bn = walked(p);
    let mut defines = a.types();
    defines.extend([define("P", p), define("BN", bn)]);
    let shared = 4 * ((tiles.0 * ROWS + tiles.1 * bn) * (p + 1) + scores * ROWS * (bn + 1));
    r.launch_shared(("attention", name), defines, grid, 256, shared, params);
}

fn window_param(window: Option<usize>) -> Param {
    int(window.unwrap_or(i32::MAX as usize))
}

/// Rows of a block's own tile in the kernels of warp products, and widest heads of which it walks tiles of as many.
const WARP_ROWS: usize = 64;

/// Whether the kernels of warp products serve these tensors.
fn warps(tensors: &[&Tensor], scale: f32) -> bool {
    let p = tensors[0].size(3);
    p <= 256 && scale > 0.0 && tensors.iter().all(|t| t.dtype == DType::Bf16)
}

/// A kernel of warp products with `own` tiles of 64 rows and `walked` tiles of those it walks over.
fn launch_warps(
    r: &mut Recorder,
    tensors: &[&Tensor],
    name: &'static str,
    (grid, own, walked): ([usize; 3], usize, usize),
    params: Vec<Param>,
) {
    let p = tensors[0].size(3);
    let padded = p.next_multiple_of(16);
    let each = if padded > 128 { 32 } else { 64 };
    let mut defines = vec![define("P", p), define("WARPS", 1)];
    if p.is_multiple_of(8) && tensors.iter().all(|t| t.ptr.is_multiple_of(16)) {
        defines.push(define("WHOLE", 1));
    }
    let shared = 2 * (own * WARP_ROWS + walked * each) * (padded + 8);
    r.launch_shared(("attention", name), defines, grid, 128, shared, params);
}

/// Rows of the tiles of the tensor-core kernels.
const TILE: usize = 128;

/// Fewest queries for which the tensor-core kernel is taken: below, most of its rows would be empty.
const FEW: usize = 16;

/// Bytes of keys and values that blocks running at the same time may share through the cache.
const CACHED: usize = 24 << 20;

/// Bytes that blocks of the backward pass running at the same time may read and add to: each walks over all of a head's queries, in step
/// with the others, so that this may be more than the cache holds.
const ADDED: usize = 64 << 20;

/// How many of `all` things of `bytes` each are worked on at the same time, where `room` bytes are shared through the cache.
fn shared_by(room: usize, bytes: usize, all: usize) -> usize {
    (room / bytes.max(1)).clamp(1, all.max(1))
}

/// Whether the tensor-core kernels serve these tensors.
fn tensor_cores(r: &Recorder, tensors: &[&Tensor], scale: f32, widest: usize) -> bool {
    let p = tensors[0].size(3);
    let target = r.target();
    target.hopper
        && target.multiprocessors > 0
        && p.is_multiple_of(8)
        && p <= widest
        && scale > 0.0
        && tensors[0].size(1) >= FEW
        && tensors
            .iter()
            .all(|t| t.dtype == DType::Bf16 && t.ptr.is_multiple_of(16))
}

/// `[B T H P]` for the copy engine, in boxes of `rows` tokens of one head.
fn view(t: &Tensor, rows: usize) -> Param {
    let (b, len, h, p) = (t.size(0), t.size(1), t.size(2), t.size(3));
    Param::View(View {
        ptr: t.ptr,
        dims: vec![p, len, h, b],
        strides: vec![h * p * 2, p * 2, len * h * p * 2],
        sizes: vec![64, rows, 1, 1],
    })
}

fn launch_tensor(
    r: &mut Recorder,
    p: usize,
    name: &'static str,
    (blocks, threads, shared): (usize, usize, usize),
    params: Vec<Param>,
) {
    let defines = vec![define("P", p), define("TENSOR", 1)];
    let stem = ("attention", name);
    r.launch_shared(stem, defines, [blocks, 1, 1], threads, shared, params);
}

/// Room for barriers, and for moving the start of shared memory to a multiple of 1024.
const SLACK: usize = 1024 + 256;

fn forward_tensor(r: &mut Recorder, a: &Args, scale: f32, window: Option<usize>) {
    let (q, k, v) = (a.arg(0), a.arg(1), a.arg(2));
    let (b, t, h, p) = (q.size(0), q.size(1), q.size(2), q.size(3));
    let (s, g) = (k.size(1), k.size(2));
    let wide = p.div_ceil(64);
    let walked = if wide > 2 { 64 } else { TILE };
    let mut params = vec![view(q, TILE), view(k, walked), view(v, walked)];
    params.extend([3, 4].map(|i| a.arg(i).into()));
    params.extend([a.res(0).into(), a.res(1).into()]);
    params.extend([int(b), int(t), int(h), int(g), Param::Float(scale)]);
    params.push(window_param(window));
    params.push(int(shared_by(CACHED, s * p * 4, b * g) * (h / g)));
    let shared = wide * 128 * (TILE + 4 * walked) + SLACK;
    let blocks = (t.div_ceil(TILE) * b * h).min(r.target().multiprocessors);
    launch_tensor(r, p, "attn_fwd_tc", (blocks, 384, shared), params);
}

fn backward_tensor(r: &mut Recorder, a: &Args, scale: f32, window: Option<usize>) {
    let (q, k, v, dout) = (a.arg(0), a.arg(1), a.arg(2), a.arg(6));
    let (b, t, h, p) = (q.size(0), q.size(1), q.size(2), q.size(3));
    let g = k.size(2);
    let rows = b * t * h;
    let delta = r.scratch(DType::F32, rows);
    let lanes = match p {
        0..=32 => 4,
        33..=64 => 8,
        _ => 16,
    };
    let params = vec![
        a.arg(4).into(),
        dout.into(),
        (&delta).into(),
        long(rows),
        int(t),
        int(h),
    ];
    let blocks = (rows * lanes).div_ceil(256);
    launch_tensor(r, p, "attn_delta_tc", (blocks, 256, 0), params);
    let inputs: [Param; 3] = [a.arg(3).into(), a.arg(5).into(), (&delta).into()];
    let sizes = [
        int(b),
        int(t),
        int(h),
        int(g),
        Param::Float(scale),
        window_param(window),
    ];
    let tile = p.div_ceil(64) * 128 * TILE;
    let tiles = t.div_ceil(TILE);
    let summed = !r.target().deterministic && p > 64;
    let mut sums = Tensor::ABSENT;
    if summed {
        sums = r.scratch(DType::F32, b * h * t.next_multiple_of(64) * 128);
        r.zero(&sums);
    } else {
        let mut params: Vec<Param> = [q, k, v, dout].map(|x| view(x, TILE)).to_vec();
        params.extend(inputs.clone());
        params.push(a.res(0).into());
        params.extend(sizes.clone());
        params.push(int(b * h));
        let blocks = tiles * b * h;
        launch_tensor(r, p, "attn_dq_tc", (blocks, 384, 6 * tile + SLACK), params);
    }
    let mut params: Vec<Param> = [(q, 64), (k, TILE), (v, TILE), (dout, 64)]
        .map(|(x, n)| view(x, n))
        .to_vec();
    params.extend(inputs);
    params.extend([a.res(1).into(), a.res(2).into(), (&sums).into()]);
    params.extend(sizes);
    // The longest first: the last to start must not be long. Over as many groups as have a head's queries, `dout` and sums of dq in the cache.
    let reach = window.map_or(t, |w| t.min(w.saturating_add(TILE)));
    params.push(int(match summed {
        true => shared_by(ADDED, reach * p * 8, b * g),
        false => b * g,
    }));
    let blocks = tiles * b * g;
    let shared = 4 * tile + tile / 2 + 4 * 1024 + SLACK;
    if !summed {
        return launch_tensor(r, p, "attn_dkv_tc", (blocks, 384, shared), params);
    }
    let shared = shared + 4 * 128 * TILE;
    let defines = || vec![define("P", p), define("TENSOR", 1), define("SUMS", 1)];
    let stem = ("attention", "attn_dkv_tc");
    r.launch_shared(stem, defines(), [blocks, 1, 1], 384, shared, params);
    let params = vec![
        (&sums).into(),
        a.res(0).into(),
        int(b),
        int(t),
        int(h),
        Param::Float(scale),
    ];
    let grid = [b * h * t.div_ceil(64), 1, 1];
    r.launch(("attention", "attn_scale_tc"), defines(), grid, 256, params);
}

/// `out`, `lse` of `q, k, v, pos?, slot?`.
pub fn attention(r: &mut Recorder, a: &Args, scale: f32, window: Option<usize>) {
    let (q, k) = (a.arg(0), a.arg(1));
    if q.size(1) == 1 {
        return step(r, a, scale, window);
    }
    if tensor_cores(r, &[q, k, a.arg(2), a.res(0)], scale, 256) {
        return forward_tensor(r, a, scale, window);
    }
    let mut params: Vec<Param> = (0..5).map(|i| a.arg(i).into()).collect();
    params.extend([
        a.res(0).into(),
        a.res(1).into(),
        int(q.size(1)),
        int(k.size(1)),
        int(q.size(2)),
        int(k.size(2)),
        Param::Float(scale),
        window_param(window),
    ]);
    let tensors = [q, k, a.arg(2), a.res(0)];
    if warps(&tensors, scale) {
        let grid = [q.size(1).div_ceil(WARP_ROWS), q.size(2), q.size(0)];
        return launch_warps(r, &tensors, "attn_fwd_warps", (grid, 1, 2), params);
    }
    let grid = [q.size(1).div_ceil(ROWS), q.size(2), q.size(0)];
    launch(r, a, "attn_fwd", (grid, (1, 1), 1), params);
}

/// Blocks among which a step shares its slots: what keeps the memory of a large device busy. A fixed number, since the order of sums depends
/// on it.
const STEP_BLOCKS: usize = 132 * 4;

/// Most shares of one head's slots, and fewest slots of a share.
const STEP_SHARES: usize = 32;
const STEP_SLOTS: usize = 64;

/// [`attention`] of one query a sequence: shares of the slots, and where there are several, their sum.
fn step(r: &mut Recorder, a: &Args, scale: f32, window: Option<usize>) {
    let (q, k, v, out) = (a.arg(0), a.arg(1), a.arg(2), a.res(0));
    let (b, h, p) = (q.size(0), q.size(2), q.size(3));
    let (s, g) = (k.size(1), k.size(2));
    let by_warps = p.is_multiple_of(8)
        && scale > 0.0
        && [q, k, v, out].iter().all(|t| t.dtype == DType::Bf16)
        && aligned(&[q, k, v, out]);
    let heads = h / g.max(1);
    let rows = match (by_warps, heads) {
        (true, 0..=8) => 8,
        (true, _) => 16,
        (false, _) => heads.clamp(1, 8),
    };
    let blocks = heads.div_ceil(rows) * g;
    let seen = window.map_or(s, |w| w.min(s));
    let shares = STEP_BLOCKS
        .div_ceil((blocks * b).max(1))
        .min(seen.div_ceil(STEP_SLOTS))
        .clamp(1, STEP_SHARES);
    let part = match shares {
        1 => Tensor::ABSENT,
        _ => r.scratch(DType::F32, b * h * shares * (p + 2)),
    };
    let mut defines = a.types();
    defines.extend([
        define("P", p),
        define("ROWS", rows),
        define("MOST", STEP_SHARES),
    ]);
    let mut params: Vec<Param> = (0..5).map(|i| a.arg(i).into()).collect();
    params.extend([
        out.into(),
        a.res(1).into(),
        (&part).into(),
        int(s),
        int(h),
        int(g),
        Param::Float(scale),
        window_param(window),
    ]);
    let (name, block, words) = if by_warps {
        const WARPS: usize = 4;
        defines.push(define("WARPS", WARPS));
        let words = WARPS * rows * (2 + p.next_multiple_of(64));
        ("attn_step_warps", 32 * WARPS, words)
    } else {
        ("attn_step", 256, rows * p + 32 * (2 * p + 1) + 32 * rows)
    };
    let grid = [shares, blocks, b];
    let stem = "attention_step";
    r.launch_shared(
        (stem, name),
        defines.clone(),
        grid,
        block,
        4 * words,
        params,
    );
    r.early();
    if shares > 1 {
        let params = vec![(&part).into(), out.into(), a.res(1).into(), int(shares)];
        let block = p.next_multiple_of(32);
        r.launch(
            (stem, "attn_step_sum"),
            defines,
            [b * h, 1, 1],
            block,
            params,
        );
        r.early();
    }
}

/// `dq, dk, dv` of `q, k, v, pos?, out, lse, dout`.
pub fn attention_bwd(r: &mut Recorder, a: &Args, scale: f32, window: Option<usize>) {
    let (q, k) = (a.arg(0), a.arg(1));
    let tensors = [0, 1, 2, 4, 6].map(|i| a.arg(i));
    let results = [0, 1, 2].map(|i| a.res(i));
    let all = [&tensors[..], &results].concat();
    if tensor_cores(r, &all, scale, 128) {
        return backward_tensor(r, a, scale, window);
    }
    let by_warps = warps(&all, scale);
    let (b, t, h, g) = (q.size(0), q.size(1), q.size(2), k.size(2));
    let rows = b * t * h;
    let delta = r.scratch(DType::F32, rows);
    launch(
        r,
        a,
        "attn_delta",
        ([rows.div_ceil(8), 1, 1], (0, 0), 0),
        vec![
            a.arg(4).into(),
            a.arg(6).into(),
            (&delta).into(),
            long(rows),
            int(t),
            int(h),
        ],
    );
    let common: Vec<Param> = [0, 1, 2, 3, 5, 6].map(|i| a.arg(i).into()).to_vec();
    let sizes = [
        int(t),
        int(h),
        int(g),
        Param::Float(scale),
        window_param(window),
    ];
    let mut params = common.clone();
    params.extend([(&delta).into(), a.res(0).into()]);
    params.extend(sizes.clone());
    if by_warps {
        let grid = [t.div_ceil(WARP_ROWS), h, b];
        launch_warps(r, &all, "attn_dq_warps", (grid, 2, 2), params);
        let mut params = common;
        params.extend([(&delta).into(), a.res(1).into(), a.res(2).into()]);
        params.extend(sizes);
        let halves = if q.size(3) > 128 { 2 } else { 1 };
        let grid = [t.div_ceil(WARP_ROWS), g * halves, b];
        return launch_warps(r, &all, "attn_dkv_warps", (grid, 2, 2), params);
    }
    launch(
        r,
        a,
        "attn_dq",
        ([t.div_ceil(ROWS), h, b], (2, 1), 1),
        params,
    );
    let mut params = common;
    params.extend([(&delta).into(), a.res(1).into(), a.res(2).into()]);
    params.extend(sizes);
    launch(
        r,
        a,
        "attn_dkv",
        ([t.div_ceil(ROWS), g, b], (2, 2), 2),
        params,
    );
}
