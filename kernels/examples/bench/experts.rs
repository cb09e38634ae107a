//! An expert layer: routing, products, and back.

use crate::harness::{Case, Graph};
use marimba_kernels::{
    Bin, Broadcast, DType, Instr, Program, Route, Un, combine, combine_bwd, dispatch, gather_rows,
    grouped_linear, grouped_linear_dw, grouped_linear_dx, pointwise, route, route_bwd,
};

#[derive(Clone, Copy)]
struct Shape {
    tokens: usize,
    experts: usize,
    top_k: usize,
    d: usize,
    f: usize,
}

fn program(args: usize, code: Vec<Instr>, outs: Vec<u16>) -> Program {
    Program {
        code,
        outs,
        broadcast: vec![Broadcast::Full; args],
    }
}

fn graph(s: Shape) -> Graph {
    let Shape {
        tokens: t,
        experts: e,
        top_k: k,
        d,
        f,
    } = s;
    let n = t * k;
    let op = Route {
        top_k: k,
        score: 0,
        normalize: true,
        groups: 1,
        top_groups: 1,
        scale: 1.0,
    };
    let mut x = Graph::default();
    let logits = x.single(&[t, e], 1.0, 0.0);
    let input = x.noise(&[t, d], 1.0);
    let gate_w = x.noise(&[e, f, d], 1.0 / (d as f32).sqrt());
    let up_w = x.noise(&[e, f, d], 1.0 / (d as f32).sqrt());
    let down_w = x.noise(&[e, d, f], 1.0 / (f as f32).sqrt());
    let dout = x.noise(&[t, d], 1.0);
    let weights = x.result_of(&[t, k], DType::F32);
    let chosen = x.result_of(&[t, k], DType::I32);
    let order = x.result_of(&[n], DType::I32);
    let slot = x.result_of(&[n], DType::I32);
    let offsets = x.result_of(&[e + 1], DType::I32);
    let rows = x.result(&[n, d]);
    let (gate, up, hidden) = (x.result(&[n, f]), x.result(&[n, f]), x.result(&[n, f]));
    let y = x.result(&[n, d]);
    let out = x.result(&[t, d]);
    let dy = x.result(&[n, d]);
    let dweights = x.result_of(&[t, k], DType::F32);
    let dlogits = x.result_of(&[t, e], DType::F32);
    let (dgate, dup, dhidden) = (x.result(&[n, f]), x.result(&[n, f]), x.result(&[n, f]));
    let (drows_a, drows_b, drows) = (x.result(&[n, d]), x.result(&[n, d]), x.result(&[n, d]));
    let dinput = x.result(&[t, d]);
    let dgate_w = x.result_of(&[e, f, d], DType::F32);
    let dup_w = x.result_of(&[e, f, d], DType::F32);
    let ddown_w = x.result_of(&[e, d, f], DType::F32);

    let one = 2.0 * (n * d * f) as f64;
    let (wide, thin) = ((n * f * 2) as f64, (n * d * 2) as f64);
    let matrix = (e * d * f * 2) as f64;
    let small = (t * e * 4) as f64;
    x.stage(
        "route",
        (0.0, small),
        &[Some(logits), None],
        &[weights, chosen],
        move |r, a| {
            route(r, a, &op);
        },
    );
    x.stage(
        "dispatch",
        (0.0, 12.0 * n as f64),
        &[Some(chosen)],
        &[order, slot, offsets],
        move |r, a| {
            dispatch(r, a, e);
        },
    );
    x.stage(
        "gather",
        (0.0, thin * (1.0 + 1.0 / k as f64)),
        &[Some(input), Some(order), Some(slot)],
        &[rows],
        gather_rows,
    );
    let product = (one, thin + wide + matrix);
    x.stage(
        "gate",
        product,
        &[Some(rows), Some(gate_w), Some(offsets)],
        &[gate],
        grouped_linear,
    );
    x.stage(
        "up",
        product,
        &[Some(rows), Some(up_w), Some(offsets)],
        &[up],
        grouped_linear,
    );
    let forward = program(
        2,
        vec![
            Instr::Arg(0),
            Instr::Arg(1),
            Instr::Un(Un::Silu, 0),
            Instr::Bin(Bin::Mul, 2, 1),
        ],
        vec![3],
    );
    x.stage(
        "gated",
        (0.0, 3.0 * wide),
        &[Some(gate), Some(up)],
        &[hidden],
        move |r, a| {
            pointwise(r, a, &forward);
        },
    );
    x.stage(
        "down",
        product,
        &[Some(hidden), Some(down_w), Some(offsets)],
        &[y],
        grouped_linear,
    );
    x.stage(
        "combine",
        (0.0, thin * (1.0 + 1.0 / k as f64)),
        &[Some(y), Some(order), Some(slot), Some(weights)],
        &[out],
        combine,
    );
    x.total("all forward");
    x.stage(
        "d combine",
        (0.0, thin * (2.0 + 1.0 / k as f64)),
        &[Some(y), Some(order), Some(slot), Some(weights), Some(dout)],
        &[dy, dweights],
        combine_bwd,
    );
    let dw = (one, thin + wide + 2.0 * matrix);
    x.stage(
        "dw down",
        dw,
        &[Some(hidden), Some(dy), Some(offsets), None, None],
        &[ddown_w],
        grouped_linear_dw,
    );
    x.stage(
        "dx down",
        product,
        &[Some(dy), Some(down_w), Some(offsets)],
        &[dhidden],
        grouped_linear_dx,
    );
    let backward = program(
        3,
        vec![
            Instr::Arg(0),
            Instr::Arg(1),
            Instr::Arg(2),
            Instr::Un(Un::Silu, 0),
            Instr::Bin(Bin::Mul, 3, 2),
            Instr::Un(Un::DSilu, 0),
            Instr::Bin(Bin::Mul, 5, 1),
            Instr::Bin(Bin::Mul, 6, 2),
        ],
        vec![7, 4],
    );
    x.stage(
        "d gated",
        (0.0, 5.0 * wide),
        &[Some(gate), Some(up), Some(dhidden)],
        &[dgate, dup],
        move |r, a| pointwise(r, a, &backward),
    );
    for (name, g, w, dw_to, dx_to) in [
        (("dw gate", "dx gate"), dgate, gate_w, dgate_w, drows_a),
        (("dw up", "dx up"), dup, up_w, dup_w, drows_b),
    ] {
        x.stage(
            name.0,
            dw,
            &[Some(rows), Some(g), Some(offsets), None, None],
            &[dw_to],
            grouped_linear_dw,
        );
        x.stage(
            name.1,
            product,
            &[Some(g), Some(w), Some(offsets)],
            &[dx_to],
            grouped_linear_dx,
        );
    }
    let add = program(
        2,
        vec![Instr::Arg(0), Instr::Arg(1), Instr::Bin(Bin::Add, 0, 1)],
        vec![2],
    );
    x.stage(
        "add",
        (0.0, 3.0 * thin),
        &[Some(drows_a), Some(drows_b)],
        &[drows],
        move |r, a| {
            pointwise(r, a, &add);
        },
    );
    x.stage(
        "d gather",
        (0.0, thin * (1.0 + 1.0 / k as f64)),
        &[Some(drows), Some(order), Some(slot), None],
        &[dinput],
        combine,
    );
    x.stage(
        "d route",
        (0.0, 2.0 * small),
        &[Some(logits), Some(chosen), Some(dweights)],
        &[dlogits],
        move |r, a| route_bwd(r, a, &op),
    );
    x.total("all");
    x
}

pub(crate) fn cases() -> Vec<Case> {
    let timed = Shape {
        tokens: 16384,
        experts: 16,
        top_k: 2,
        d: 4096,
        f: 14336,
    };
    let small = |tokens, experts, d, f| Shape {
        tokens,
        experts,
        top_k: 2,
        d,
        f,
    };
    vec![Case {
        name: "experts 32768 rows, 16 of 4096/14336".to_string(),
        timed: graph(timed),
        checked: vec![
            graph(small(700, 4, 512, 768)),
            graph(small(150, 5, 72, 200)),
            graph(small(33, 3, 33, 49)),
        ],
    }]
}
