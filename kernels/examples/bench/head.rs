//! Head and cross-entropy.

use crate::harness::{Case, Graph};
use marimba_kernels::{CrossEntropy, DType, linear_cross_entropy_grad};

fn graph(n: usize, d: usize, v: usize) -> Graph {
    let op = CrossEntropy {
        multiplier: 1.0,
        z_loss: 0.0,
        z_all: false,
    };
    let mut x = Graph::default();
    let h = x.noise(&[n, d], 1.0);
    let w = x.noise(&[v, d], 1.0 / (d as f32).sqrt());
    let targets = (0..n).map(|i| ((i * 7919 + 13) % v) as i32).collect();
    let targets = x.ints(&[n], targets);
    let scale = x.value(&[1], 1.0 / n as f32);
    let dloss = x.value(&[1], 1.0);
    let loss = x.result_of(&[1], DType::F32);
    let nll = x.result_of(&[n], DType::F32);
    let lse = x.result_of(&[n], DType::F32);
    let hit = x.result_of(&[n], DType::F32);
    let dx = x.result(&[n, d]);
    let dw = x.result_of(&[v, d], DType::F32);
    x.stage(
        "forward and backward",
        (6.0 * (n * d * v) as f64, (n * d * 4 + v * d * 6) as f64),
        &[
            Some(h),
            Some(w),
            Some(targets),
            Some(scale),
            Some(dloss),
            None,
            None,
        ],
        &[loss, nll, lse, hit, dx, dw],
        move |r, a| linear_cross_entropy_grad(r, a, &op),
    );
    x
}

pub(crate) fn cases() -> Vec<Case> {
    vec![Case {
        name: "head and loss 16384 x 4096 x 128256".to_string(),
        timed: graph(16384, 4096, 128256),
        checked: vec![graph(600, 256, 3000), graph(77, 64, 333)],
    }]
}
