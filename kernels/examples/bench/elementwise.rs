//! Norms, elementwise programs, casts and the optimiser: all bound by memory.

use crate::harness::{Case, Graph};
use marimba_kernels::{
    AdamW, Bin, Broadcast, DType, Instr, Program, RmsNorm, Un, adamw, cast, global_norm, pointwise,
    rms_norm, rms_norm_bwd,
};

/// `gate` as in [`RmsNorm`]; `add`: a gradient is added to that of the input.
fn norm(rows: usize, width: usize, group: usize, gate: i32, add: bool) -> Graph {
    let op = RmsNorm {
        eps: 1e-5,
        group,
        zero_centered: false,
        gate,
    };
    let mut x = Graph::default();
    let wide = [rows, width];
    let u = x.noise(&wide, 1.0);
    let w = x.single(&[width.min(group)], 0.1, 1.0);
    let z = (gate > 0).then(|| x.noise(&wide, 1.0));
    let dy = x.noise(&wide, 1.0);
    let more = add.then(|| x.noise(&wide, 1.0));
    let y = x.result(&wide);
    let rstd = x.result_of(&[rows, width / group], DType::F32);
    let mut results = vec![
        x.result(&wide),
        x.result_of(&[width.min(group)], DType::F32),
    ];
    let gated = usize::from(gate > 0);
    if gate > 0 {
        results.push(x.result(&wide));
    }
    let stream = (rows * width * 2) as f64;
    let args = [Some(u), Some(w), z];
    x.stage(
        "forward",
        (0.0, (2 + gated) as f64 * stream),
        &args,
        &[y, rstd],
        move |r, a| rms_norm(r, a, &op),
    );
    let mut bwd = args.to_vec();
    bwd.extend([Some(rstd), Some(dy), more]);
    x.stage(
        "backward",
        (0.0, (3 + 2 * gated + usize::from(add)) as f64 * stream),
        &bwd,
        &results,
        move |r, a| rms_norm_bwd(r, a, &op),
    );
    x.total("both");
    x
}

/// A program over `[rows width]` of so many arguments.
fn program(rows: usize, width: usize, args: usize, code: &[Instr], outs: &[u16]) -> Graph {
    let mut x = Graph::default();
    let wide = [rows, width];
    let inputs: Vec<_> = (0..args).map(|_| Some(x.noise(&wide, 1.0))).collect();
    let results: Vec<_> = outs.iter().map(|_| x.result(&wide)).collect();
    let bytes = ((args + outs.len()) * rows * width * 2) as f64;
    let program = Program {
        code: code.to_vec(),
        outs: outs.to_vec(),
        broadcast: vec![Broadcast::Full; args],
    };
    x.stage("all", (0.0, bytes), &inputs, &results, move |r, a| {
        pointwise(r, a, &program)
    });
    x
}

fn swiglu(rows: usize, width: usize) -> Graph {
    let code = [
        Instr::Arg(0),
        Instr::Arg(1),
        Instr::Un(Un::Silu, 0),
        Instr::Bin(Bin::Mul, 2, 1),
    ];
    program(rows, width, 2, &code, &[3])
}

fn swiglu_bwd(rows: usize, width: usize) -> Graph {
    let code = [
        Instr::Arg(0),
        Instr::Arg(1),
        Instr::Arg(2),
        Instr::Bin(Bin::Mul, 2, 1),
        Instr::Un(Un::DSilu, 0),
        Instr::Bin(Bin::Mul, 3, 4),
        Instr::Un(Un::Silu, 0),
        Instr::Bin(Bin::Mul, 2, 6),
    ];
    program(rows, width, 3, &code, &[5, 7])
}

/// The optimiser over `n` tensors of `len` elements each.
fn optimizer(n: usize, len: usize) -> Graph {
    let mut x = Graph::default();
    let [lr, step, norm] = [1e-3, 10.0, 1.0].map(|v| x.value(&[1], v));
    let mut args = vec![Some(lr), Some(step), Some(norm)];
    let (mut grads, mut results, mut narrow) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..n {
        let p = x.single(&[len], 1.0, 0.0);
        let g = x.single(&[len], 1e-3, 0.0);
        let (m, v) = (x.single(&[len], 1e-3, 0.0), x.value(&[len], 1e-6));
        args.extend([p, g, m, v].map(Some));
        grads.push(Some(g));
        results.extend([p, m, v]);
        narrow.push(x.noise(&[len], 1.0));
    }
    args.extend(narrow.iter().map(|&c| Some(c)));
    results.extend(&narrow);
    let op = AdamW {
        betas: (0.9, 0.95),
        eps: 1e-8,
        clip: 1.0,
        tensors: vec![(0.1, 1.0); n],
        copies: (0..n).collect(),
    };
    let words = (n * len * 4) as f64;
    let total = x.result_of(&[1], DType::F32);
    x.stage("norm", (0.0, words), &grads, &[total], global_norm);
    x.stage("adamw", (0.0, 7.5 * words), &args, &results, move |r, a| {
        adamw(r, a, &op)
    });
    let narrow = x.result(&[len]);
    let first = args[3];
    x.stage("cast", (0.0, 6.0 * len as f64), &[first], &[narrow], cast);
    x
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, timed: Graph, checked: Vec<Graph>| Case {
        name: name.to_string(),
        timed,
        checked,
    };
    vec![
        case(
            "norm 16384x2048",
            norm(16384, 2048, 2048, 0, false),
            vec![norm(333, 2048, 2048, 0, false), norm(5, 300, 300, 0, true)],
        ),
        case(
            "norm 16384x2048 with a gradient added",
            norm(16384, 2048, 2048, 0, true),
            vec![norm(333, 2048, 2048, 0, true)],
        ),
        case(
            "norm 16384x4096 gated",
            norm(16384, 4096, 4096, 1, false),
            vec![
                norm(333, 4096, 4096, 1, false),
                norm(77, 1024, 256, 2, false),
            ],
        ),
        case(
            "norm 524288x128",
            norm(524_288, 128, 128, 0, false),
            vec![norm(3331, 128, 128, 0, false)],
        ),
        case("glu 16384x7168", swiglu(16384, 7168), vec![swiglu(33, 77)]),
        case(
            "glu backward 16384x7168",
            swiglu_bwd(16384, 7168),
            vec![swiglu_bwd(33, 77)],
        ),
        case(
            "optimizer 8x64M",
            optimizer(8, 64 << 20),
            vec![optimizer(3, 1001)],
        ),
    ]
}
