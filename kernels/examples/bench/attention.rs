//! Attention.

use crate::harness::{Case, Graph};
use marimba_kernels::{DType, attention, attention_bwd};

#[derive(Clone, Copy)]
struct Shape {
    b: usize,
    t: usize,
    h: usize,
    g: usize,
    p: usize,
    window: Option<usize>,
    /// Tokens of a document; 0: one document a row.
    document: usize,
}

fn graph(s: Shape) -> Graph {
    let Shape { b, t, h, g, p, .. } = s;
    let mut x = Graph::default();
    let q = x.noise(&[b, t, h, p], 1.0);
    let k = x.noise(&[b, t, g, p], 1.0);
    let v = x.noise(&[b, t, g, p], 1.0);
    let dout = x.noise(&[b, t, h, p], 1.0);
    let of = |i: usize| if s.document == 0 { i } else { i % s.document };
    let pos = (s.document > 0).then(|| {
        let values = (0..b * t).map(|i| of(i % t) as i32).collect();
        x.ints(&[b, t], values)
    });
    let out = x.result(&[b, t, h, p]);
    let lse = x.result_of(&[b, h, t], DType::F32);
    let (dq, dk, dv) = (
        x.result(&[b, t, h, p]),
        x.result(&[b, t, g, p]),
        x.result(&[b, t, g, p]),
    );
    let pairs: usize = (0..t)
        .map(|i| (of(i) + 1).min(s.window.unwrap_or(usize::MAX)))
        .sum();
    let flops = 4.0 * (b * h * p) as f64 * pairs as f64;
    let wide = (b * t * h * p * 2) as f64;
    let narrow = (b * t * g * p * 2) as f64;
    let scale = 1.0 / (p as f32).sqrt();
    x.stage(
        "forward",
        (flops, 2.0 * wide + 2.0 * narrow),
        &[Some(q), Some(k), Some(v), pos, None],
        &[out, lse],
        move |r, a| attention(r, a, scale, s.window),
    );
    let bwd = [
        Some(q),
        Some(k),
        Some(v),
        pos,
        Some(out),
        Some(lse),
        Some(dout),
    ];
    x.stage(
        "backward",
        (2.5 * flops, 4.0 * wide + 4.0 * narrow),
        &bwd,
        &[dq, dk, dv],
        move |r, a| attention_bwd(r, a, scale, s.window),
    );
    x.total("both");
    x
}

pub(crate) fn cases() -> Vec<Case> {
    let base = Shape {
        b: 4,
        t: 4096,
        h: 32,
        g: 8,
        p: 128,
        window: None,
        document: 0,
    };
    let long = Shape {
        b: 1,
        t: 32768,
        ..base
    };
    let window = Shape {
        window: Some(1024),
        ..base
    };
    let packed = Shape {
        document: 1000,
        ..base
    };
    let narrow = Shape { p: 64, ..base };
    [
        ("B4 T4096 32/8x128", base),
        ("B1 T32768 32/8x128", long),
        ("B4 T4096 32/8x128 window 1024", window),
        ("B4 T4096 32/8x128 documents of 1000", packed),
        ("B4 T4096 32/8x64", narrow),
    ]
    .into_iter()
    .map(|(name, s)| {
        let small = |b, t| Shape {
            b,
            t,
            h: 8,
            g: 2,
            window: s.window.map(|_| 200),
            document: if s.document > 0 { 150 } else { 0 },
            ..s
        };
        Case {
            name: format!("attention {name}"),
            timed: graph(s),
            checked: [(1, 1024), (2, 777), (1, 65)]
                .into_iter()
                .map(|(b, t)| graph(small(b, t)))
                .collect(),
        }
    })
    .collect()
}
