//! Host-side costs of a large model: lowering, differentiating, passes, planning, and recording what a GPU is to run.

use criterion::{Criterion, criterion_group, criterion_main};
use marimba_backend::cuda_bytes;
use marimba_dsl::{Source, parse_model};
use marimba_experiments::program::{TrainOptions, training};
use marimba_ir::{Options, differentiate, lower, plan};
use std::hint::black_box;
use std::path::Path;

fn planning(c: &mut Criterion) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../experiments/bench/jamba-like.ron");
    let source = Source::read(&path).expect("the model file");
    let model = parse_model(&source, &[]).expect("a valid model");
    c.bench_function("lower and differentiate, 8 layers", |b| {
        b.iter(|| {
            let mut g = lower(&model, &Options::train(8, 256)).expect("lowers");
            let loss = g.output("loss").expect("a loss");
            differentiate(&mut g, loss).expect("differentiates");
            black_box(g)
        })
    });
    let program = training(&model, &TrainOptions::plain(), 8, 256).expect("compiles");
    c.bench_function("plan, 8 layers", |b| {
        b.iter(|| black_box(plan(&program.graph)))
    });
    // What the cuda backend does for every program before the driver is asked: every launch of a Hopper card with its parameters.
    c.bench_function("record the launches of a step, 8 layers", |b| {
        b.iter(|| black_box(cuda_bytes([(&program.graph, &program.plan)])))
    });
    c.bench_function("whole compilation, 8 layers", |b| {
        b.iter(|| black_box(training(&model, &TrainOptions::plain(), 8, 256).expect("compiles")))
    });
}

criterion_group!(benches, planning);
criterion_main!(benches);
