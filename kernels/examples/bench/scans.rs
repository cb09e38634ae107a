//! The scans and the convolution before them.

use crate::harness::{Case, Graph};
use marimba_kernels::{
    DType, causal_conv1d, causal_conv1d_bwd, gated_delta, gated_delta_bwd, selective_scan,
    selective_scan_bwd, ssd, ssd_bwd,
};

#[derive(Clone, Copy)]
struct Ssd {
    b: usize,
    t: usize,
    h: usize,
    p: usize,
    g: usize,
    n: usize,
    /// Tokens of a document; 0: nothing is said about documents.
    document: usize,
}

fn mamba2(s: Ssd) -> Graph {
    let Ssd {
        b,
        t,
        h,
        p,
        g,
        n,
        document,
    } = s;
    let chunk = 256;
    let limit = (0.0, f32::INFINITY);
    let mut x = Graph::default();
    let (wide, step) = ([b, t, h, p], [b, t, h]);
    let narrow = [b, t, g, n];
    let (u, dt) = (x.noise(&wide, 1.0), x.noise(&step, 1.0));
    let a = x.value(&[h], -1.0);
    let (bm, cm) = (x.noise(&narrow, 0.3), x.noise(&narrow, 0.3));
    let d = x.single(&[h], 1.0, 0.0);
    // Steps of about 0.02, as models start with.
    let bias = x.value(&[h], -4.0);
    let pos = (document > 0).then(|| {
        let at = (0..b * t).map(|i| (i % t % document) as i32).collect();
        x.ints(&[b, t], at)
    });
    let dy = x.noise(&wide, 1.0);
    let y = x.result(&wide);
    let saved = x.result_of(&[b, t.div_ceil(chunk), h, p, n], DType::F32);
    let results = [
        x.result(&wide),
        x.result(&step),
        x.result_of(&[h], DType::F32),
        x.result(&narrow),
        x.result(&narrow),
        x.result_of(&[h], DType::F32),
        x.result_of(&[h], DType::F32),
    ];
    // The chunked form with tiles of 64 tokens, c b' once for each group.
    let tile = (b * t * 64) as f64;
    let state = 2.0 * (b * t * h * p * n) as f64;
    let within = tile * (h * p) as f64;
    let scores = tile * (g * n) as f64;
    let stream = (b * t * (h * p + g * n + h) * 2) as f64;
    let args = [
        Some(u),
        Some(dt),
        Some(a),
        Some(bm),
        Some(cm),
        Some(d),
        Some(bias),
        pos,
    ];
    x.stage(
        "forward",
        (2.0 * state + within + scores, 2.0 * stream),
        &args,
        &[y, saved],
        move |r, a| ssd(r, a, chunk, limit),
    );
    let mut bwd = args.to_vec();
    bwd.extend([Some(saved), Some(dy)]);
    x.stage(
        "backward",
        (5.0 * state + 2.0 * within + 3.0 * scores, 3.0 * stream),
        &bwd,
        &results,
        move |r, a| ssd_bwd(r, a, chunk, limit),
    );
    x.total("both");
    x
}

fn mamba1(b: usize, t: usize, i: usize, n: usize) -> Graph {
    let chunk = 32;
    let mut x = Graph::default();
    let (wide, narrow) = ([b, t, i], [b, t, 1, n]);
    let (u, dt) = (x.noise(&wide, 1.0), x.noise(&wide, 1.0));
    let a = x.single(&[i, n], 0.5, -4.0);
    let (bm, cm) = (x.noise(&narrow, 0.5), x.noise(&narrow, 0.5));
    let d = x.single(&[i], 1.0, 0.0);
    let bias = x.value(&[i], -4.0);
    let z = x.noise(&wide, 1.0);
    let dy = x.noise(&wide, 1.0);
    let y = x.result(&wide);
    let saved = x.result_of(&[b, t.div_ceil(chunk), i, n], DType::F32);
    let results = [
        x.result(&wide),
        x.result(&wide),
        x.result_of(&[i, n], DType::F32),
        x.result(&narrow),
        x.result(&narrow),
        x.result_of(&[i], DType::F32),
        x.result_of(&[i], DType::F32),
        x.result(&wide),
    ];
    let stream = (b * t * i * 2) as f64;
    let args = [
        Some(u),
        Some(dt),
        Some(a),
        Some(bm),
        Some(cm),
        Some(d),
        Some(bias),
        Some(z),
        None,
    ];
    x.stage(
        "forward",
        (0.0, 4.0 * stream),
        &args,
        &[y, saved],
        move |r, a| selective_scan(r, a, chunk),
    );
    let mut bwd = args.to_vec();
    bwd.extend([Some(saved), Some(dy)]);
    x.stage(
        "backward",
        (0.0, 7.0 * stream),
        &bwd,
        &results,
        move |r, a| selective_scan_bwd(r, a, chunk),
    );
    x.total("both");
    x
}

/// Gated delta rule: h value heads of width p, g key heads of width n.
fn delta([b, t, h, g, p, n]: [usize; 6]) -> Graph {
    let chunk = 64;
    let mut x = Graph::default();
    let (wide, narrow, step) = ([b, t, h, p], [b, t, g, n], [b, t, h]);
    // Keys and queries of length about 1.
    let unit = 1.0 / (n as f32).sqrt();
    let (q, k) = (x.noise(&narrow, unit), x.noise(&narrow, unit));
    let v = x.noise(&wide, 1.0);
    let gate = x.single(&step, 0.02, -0.1);
    let beta = x.single(&step, 0.1, 0.5);
    let dout = x.noise(&wide, 1.0);
    let o = x.result(&wide);
    let saved = x.result_of(&[b, t.div_ceil(chunk), h, n, p], DType::F32);
    let results = [
        x.result(&narrow),
        x.result(&narrow),
        x.result(&wide),
        x.result_of(&step, DType::F32),
        x.result_of(&step, DType::F32),
    ];
    // The chunked form with tiles of 64 tokens: products of keys once for each group, of what a token writes and of outputs within the
    // tile, and four more of those backward; the states read and written.
    let tile = (b * t * 64) as f64;
    let state = 2.0 * (b * t * h * p * n) as f64;
    let scores = 2.0 * tile * (g * n) as f64;
    let within = 2.0 * tile * (h * p) as f64;
    let stream = (2 * b * t * (2 * h * p + 2 * g * n + 4 * h)) as f64;
    let states = (4 * b * t.div_ceil(chunk) * h * n * p) as f64;
    let args = [Some(q), Some(k), Some(v), Some(gate), Some(beta), None];
    x.stage(
        "forward",
        (3.0 * state + within + scores, stream + states),
        &args,
        &[o, saved],
        move |r, a| gated_delta(r, a, chunk),
    );
    let mut bwd = args.to_vec();
    bwd.extend([Some(saved), Some(dout)]);
    x.stage(
        "backward",
        (
            7.0 * state + 3.0 * within + 3.0 * scores,
            1.75 * stream + states,
        ),
        &bwd,
        &results,
        move |r, a| gated_delta_bwd(r, a, chunk),
    );
    x.total("both");
    x
}

fn conv(b: usize, t: usize, i: usize) -> Graph {
    let mut x = Graph::default();
    let wide = [b, t, i];
    let u = x.noise(&wide, 1.0);
    let (w, bias) = (x.single(&[i, 4], 0.5, 0.0), x.single(&[i], 0.5, 0.0));
    let dy = x.noise(&wide, 1.0);
    let y = x.result(&wide);
    let results = [
        x.result(&wide),
        x.result_of(&[i, 4], DType::F32),
        x.result_of(&[i], DType::F32),
    ];
    let stream = (b * t * i * 2) as f64;
    let args = [Some(u), Some(w), Some(bias), None];
    x.stage("forward", (0.0, 2.0 * stream), &args, &[y], |r, a| {
        causal_conv1d(r, a, true)
    });
    let mut bwd = args.to_vec();
    bwd.push(Some(dy));
    x.stage("backward", (0.0, 3.0 * stream), &bwd, &results, |r, a| {
        causal_conv1d_bwd(r, a, true)
    });
    x.total("both");
    x
}

pub(crate) fn cases() -> Vec<Case> {
    let base = Ssd {
        b: 4,
        t: 4096,
        h: 128,
        p: 64,
        g: 1,
        n: 128,
        document: 0,
    };
    let small = Ssd {
        b: 1,
        t: 700,
        h: 4,
        ..base
    };
    let scans = [
        ("B4 T4096 128x64 N128", base),
        (
            "B4 T4096 128x64 N128 documents of 1000",
            Ssd {
                document: 1000,
                ..base
            },
        ),
        ("B4 T4096 64x64 N128", Ssd { h: 64, ..base }),
        (
            "B1 T32768 64x64 N128",
            Ssd {
                b: 1,
                t: 32768,
                h: 64,
                ..base
            },
        ),
    ];
    let mut out: Vec<Case> = scans
        .into_iter()
        .map(|(name, s)| Case {
            name: format!("ssd {name}"),
            timed: mamba2(s),
            checked: vec![mamba2(Ssd {
                document: s.document.min(150),
                ..small
            })],
        })
        .collect();
    out.push(Case {
        name: "selective scan B4 T4096 I8192 N16".to_string(),
        timed: mamba1(4, 4096, 8192, 16),
        checked: vec![mamba1(2, 333, 192, 16)],
    });
    for (name, sizes) in [
        ("B4 T4096 32/16 heads 128x128", [4, 4096, 32, 16, 128, 128]),
        (
            "B1 T32768 32/16 heads 128x128",
            [1, 32768, 32, 16, 128, 128],
        ),
        ("B4 T4096 16/16 heads 256x128", [4, 4096, 16, 16, 256, 128]),
    ] {
        out.push(Case {
            name: format!("delta rule {name}"),
            timed: delta(sizes),
            checked: vec![delta([1, 700, 4, 2, sizes[4], sizes[5]])],
        });
    }
    for i in [8448, 4096, 128] {
        out.push(Case {
            name: format!("conv1d B4 T4096 I{i}"),
            timed: conv(4, 4096, i),
            checked: vec![conv(2, 333, 136)],
        });
    }
    out
}
