//! Launches of expert layers. Offsets stay on the device: a grid covers the most tiles there can be, and each block finds its expert, in bf16
//! with products of warps on tensor cores; in bf16 on sm_90 blocks that stay make up the list of tiles from the offsets and work through it with products of warpgroups.

use crate::record::{Args, DType, Param, Recorder, THREADS, Tensor, View, define, int, long, over};

/// Side of a tile of a product.
const TILE: usize = 64;

/// Side of a tile of a product by warps.
const WARP_TILE: usize = 128;

/// Defines of the kernels of warp products where all tensors are bf16.
fn warps(tensors: &[&Tensor]) -> Option<Vec<(String, String)>> {
    let mut defines = vec![define("WARPS", 1)];
    if in_16_bytes(tensors) {
        defines.push(define("WHOLE", 1));
    }
    let all = tensors.iter().all(|t| t.dtype == DType::Bf16);
    all.then_some(defines)
}

/// Choices that a block sorts.
const CHUNK: usize = 256;

/// Most experts whose counts fit a block's shared memory when sorting, and its list of tiles when multiplying.
const COUNTED: usize = 1024;

/// Whether all are bf16 in rows of whole 16 bytes.
fn in_16_bytes(tensors: &[&Tensor]) -> bool {
    tensors
        .iter()
        .all(|t| t.dtype == DType::Bf16 && t.last().is_multiple_of(8) && t.ptr.is_multiple_of(16))
}

/// Threads of a block that walks a row in steps of 8 elements.
fn walkers(width: usize) -> usize {
    (width / 8).next_multiple_of(32).clamp(32, 512)
}

/// `order, slot, offsets` of `experts`.
pub fn dispatch(r: &mut Recorder, a: &Args, experts: usize) {
    let (choices, offsets) = (a.arg(0), a.res(2));
    let n = choices.len();
    if experts <= COUNTED && n > CHUNK {
        return dispatch_chunks(r, a, experts);
    }
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

fn dispatch_chunks(r: &mut Recorder, a: &Args, experts: usize) {
    let (choices, offsets) = (a.arg(0), a.res(2));
    let n = choices.len();
    let chunks = n.div_ceil(CHUNK);
    let tally = r.scratch(DType::I32, chunks * experts);
    let mut step = |name, blocks, threads, copies: usize, params| {
        let shared = 4 * copies * experts;
        r.launch_shared(
            ("moe", name),
            Vec::new(),
            [blocks, 1, 1],
            threads,
            shared,
            params,
        );
    };
    step(
        "expert_tally",
        chunks,
        CHUNK,
        1,
        vec![choices.into(), (&tally).into(), int(n), int(experts)],
    );
    let params = vec![(&tally).into(), offsets.into(), int(chunks), int(experts)];
    step("expert_bases", 1, experts.next_multiple_of(32), 1, params);
    step(
        "expert_sort",
        chunks,
        CHUNK,
        8,
        vec![
            choices.into(),
            (&tally).into(),
            offsets.into(),
            a.res(0).into(),
            a.res(1).into(),
            int(n),
            int(experts),
        ],
    );
}

/// `y` of `x, order, slot`.
pub fn gather_rows(r: &mut Recorder, a: &Args) {
    let (x, y) = (a.arg(0), a.res(0));
    let k = y.rows() / x.rows().max(1);
    let row = y.last() * y.dtype.bytes();
    if x.dtype == y.dtype && row.is_multiple_of(16) && (x.ptr | y.ptr).is_multiple_of(16) {
        let params = vec![x.into(), a.arg(1).into(), y.into(), int(row / 16), int(k)];
        let threads = (row / 16).next_multiple_of(32).clamp(32, 512);
        let grid = [y.rows(), 1, 1];
        r.launch(("moe", "gather_rows_16"), Vec::new(), grid, threads, params);
        return;
    }
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
    if in_16_bytes(&[y, x]) && a.arg(3).dtype == DType::F32 {
        r.launch(
            ("moe", "combine_16"),
            Vec::new(),
            [x.rows(), 1, 1],
            walkers(x.last()),
            vec![
                y.into(),
                a.arg(2).into(),
                a.arg(3).into(),
                x.into(),
                int(x.last()),
                int(k),
            ],
        );
        return;
    }
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
    let singles = [a.arg(3), a.res(1)].iter().all(|t| t.dtype == DType::F32);
    let (name, types, threads) = match in_16_bytes(&[y, dx, a.res(0)]) && singles {
        true => ("combine_bwd_16", Vec::new(), walkers(y.last())),
        false => ("combine_bwd", a.types(), 128),
    };
    r.launch(
        ("moe", name),
        types,
        [y.rows(), 1, 1],
        threads,
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

/// A stack of row-major matrices `[E R C]` for the copy engine.
fn view(t: &Tensor, (e, rows, columns): (usize, usize, usize), tall: usize) -> Param {
    Param::View(View {
        ptr: t.ptr,
        dims: vec![columns, rows, e],
        strides: vec![columns * 2, rows * columns * 2],
        sizes: vec![64, tall, 1],
    })
}

/// Whether the tensor-core kernels serve these bf16 operands and this many experts.
fn tensor_cores(r: &Recorder, operands: &[&Tensor], experts: usize) -> bool {
    let target = r.target();
    target.hopper
        && target.multiprocessors > 0
        && experts <= COUNTED
        && operands.iter().all(|t| !t.is_empty())
        && in_16_bytes(operands)
}

fn launch_tensor(r: &mut Recorder, name: &'static str, experts: usize, params: Vec<Param>) {
    let shared = 4 * (128 + 256) * 128 + 1024 + 128 + 8 * (experts + 1);
    let blocks = r.target().multiprocessors;
    let defines = vec![define("TENSOR", 1)];
    r.launch_shared(("moe", name), defines, [blocks, 1, 1], 384, shared, params);
}

fn by_rows(r: &mut Recorder, a: &Args, name: &'static str, columns: usize) {
    let w = a.arg(1);
    let (e, n, k) = (w.size(0), w.size(1), w.size(2));
    if tensor_cores(r, &[a.arg(0), w, a.res(0)], e) {
        let x = a.arg(0);
        let rows = view(x, (1, x.rows(), x.last()), 128);
        let (name, tall) = match name {
            "grouped_linear" => ("grouped_linear_tc", 256),
            _ => ("grouped_linear_dx_tc", 64),
        };
        let mut params = vec![rows, view(w, (e, n, k), tall)];
        params.extend([a.arg(2).into(), a.res(0).into(), int(e), int(n), int(k)]);
        return launch_tensor(r, name, e, params);
    }
    let (tile, types, name) = match warps(&[a.arg(0), w, a.res(0)]) {
        Some(defines) => {
            let name = match name {
                "grouped_linear" => "grouped_linear_warps",
                _ => "grouped_linear_dx_warps",
            };
            (WARP_TILE, defines, name)
        }
        None => (TILE, a.types(), name),
    };
    let tiles = a.arg(0).rows().div_ceil(tile) + e;
    r.launch(
        ("moe", name),
        types,
        [columns.div_ceil(tile), tiles, 1],
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
    let (x, dy) = (a.arg(0), a.arg(1));
    if tensor_cores(r, &[x, dy], e) && dw.ptr.is_multiple_of(16) {
        let mut params = [x, dy]
            .map(|t| view(t, (1, t.rows(), t.last()), 64))
            .to_vec();
        params.extend([2, 4].map(|i| a.arg(i).into()));
        params.extend([dw.into(), int(e), int(n), int(k)]);
        return launch_tensor(r, "grouped_linear_dw_tc", e, params);
    }
    let (tile, types, name) = match warps(&[x, dy]) {
        Some(defines) => (WARP_TILE, defines, "grouped_linear_dw_warps"),
        None => (TILE, a.types(), "grouped_linear_dw"),
    };
    r.launch(
        ("moe", name),
        types,
        [k.div_ceil(tile), n.div_ceil(tile), e],
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
