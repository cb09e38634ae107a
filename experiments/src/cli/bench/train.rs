//! `marimba bench train`: training steps.

use super::{PrecisionArg, profile, recompute, require};
use crate::bench::ceilings;
use crate::cli::{CliError, Sets, files, hf, human, human_bytes, print_json};
use crate::data::rng::Rng;
use crate::engine;
use crate::init;
use crate::program::{self, Program, TrainOptions};
use clap::Args;
use marimba_backend::{CUDA_PRODUCT_SCRATCH as PRODUCT_SCRATCH, HostTensor, cuda_bytes};
use marimba_dsl::Source;
use marimba_dsl::run::AdamW;
use marimba_ir::{DType, cost};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

/// Measure training.
#[derive(Args)]
#[command(
    after_help = "Example:\n  marimba bench train experiments/bench/mamba2-hybrid.ron --batch 8 --seq 256 --steps 20 --json"
)]
pub(in crate::cli) struct BenchTrainArgs {
    /// A model or run file
    model: PathBuf,
    #[command(flatten)]
    sets: Sets,
    /// auto, cpu, dfdx or cuda
    #[arg(long, default_value = "auto")]
    backend: String,
    /// Number formats: f32, bf16 with f32 master weights, or that with the products of projections in 8 bits
    #[arg(long, value_enum, default_value = "f32")]
    precision: PrecisionArg,
    /// Launch kernel by kernel instead of replaying CUDA graphs
    #[arg(long)]
    no_graph: bool,
    /// Recompute activations so that they take at most so many GiB
    #[arg(long, value_name = "GIB")]
    activations: Option<f64>,
    /// Add in a fixed order everywhere, as runs do unless they say otherwise
    #[arg(long)]
    deterministic: bool,
    /// Rows of a batch
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of a row
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// Timed steps, after two that are not
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Threads of the cpu backend [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Print where the time goes, by op
    #[arg(long)]
    profile: bool,
    /// Print as JSON on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct BenchTrain {
    model: String,
    backend: &'static str,
    precision: String,
    deterministic: bool,
    threads: usize,
    batch: usize,
    seq_len: usize,
    params: usize,
    tokens_per_sec: f64,
    step_ms: f64,
    step_ms_min: f64,
    arena_bytes: usize,
    live_bytes: usize,
    /// What the program and the optimiser take on a GPU, by the plan.
    planned_bytes: usize,
    /// What the device reports as used more than before; on the cpu absent.
    device_bytes: Option<usize>,
    model_flops_per_token: f64,
    model_flops_per_sec: f64,
    matmul_flops_per_sec: f64,
    copy_bytes_per_sec: f64,
    /// Model FLOPs utilisation: of the rate of matrix products measured here, in the same run.
    mfu: f64,
    loss: f64,
}

pub(super) fn run(args: &BenchTrainArgs) -> Result<(), CliError> {
    let source = Source::read(&args.model)?;
    let model = files::model_of(&source, &args.sets.sets)?;
    let backend = hf::backend_of(&args.backend)?;
    let threads = args.threads.unwrap_or_else(engine::cores);
    let compute = args.precision.dtype();
    // The ceiling is measured on an engine of its own, so that its memory is not the run's.
    let before = ceilings(engine::open(backend, threads)?.as_mut(), compute)?;
    let mut engine = engine::open_with(backend, threads, !args.no_graph)?;
    engine.set_deterministic(args.deterministic);
    let empty = engine.memory();
    require(args.precision, engine.name())?;

    let Program {
        graph,
        plan: memory,
    } = program::training(
        &model,
        &TrainOptions {
            compute,
            fp8: args.precision.fp8(),
            recompute: recompute(args.activations),
            ..TrainOptions::plain()
        },
        args.batch.max(1),
        args.seq.max(1),
    )?;
    let tokens = args.batch * args.seq;
    let model_flops_per_token = cost::costs(&graph).model_flops() / tokens as f64;
    let params = graph.params.clone();
    init::init_all(&params, 0, engine::cores(), |p, data| {
        let data = HostTensor::F32(data);
        if p.compute != DType::F32 {
            engine.write(&format!("master:{}", p.name), &p.ty, &data)?;
        }
        let ty = p.ty.with_dtype(p.compute);
        engine.write(&format!("param:{}", p.name), &ty, &data)
    })?;
    let (arena_bytes, live_bytes) = (memory.arena_bytes, memory.live_bytes);
    let update = program::update_of(&params, &AdamW::default(), Some(1.0), &BTreeMap::new())?;
    let planned = cuda_bytes([(&graph, &memory), (&update.graph, &update.plan)]);
    let step = engine.load(graph, memory)?;
    let optimizer = engine.load(update.graph, update.plan)?;

    let mut rng = Rng::new(&[0]);
    let ids: Vec<i32> = (0..tokens)
        .map(|_| rng.below(model.vocab_size as u64) as i32)
        .collect();
    let targets: Vec<i32> = (0..tokens)
        .map(|_| rng.below(model.vocab_size as u64) as i32)
        .collect();
    let pos: Vec<i32> = (0..tokens).map(|i| (i % args.seq) as i32).collect();
    let inputs = [
        ("tokens", HostTensor::I32(ids)),
        ("targets", HostTensor::I32(targets)),
        ("pos", HostTensor::I32(pos)),
        ("loss_scale", HostTensor::F32(vec![1.0 / tokens as f32])),
        ("grad_keep", HostTensor::F32(vec![0.0])),
        ("aux_scale", HostTensor::F32(vec![1.0])),
    ];
    let mut update_inputs = [
        ("lr", HostTensor::F32(vec![1e-3])),
        ("step", HostTensor::F32(vec![1.0])),
    ];
    let mut times = Vec::new();
    let mut loss = f64::NAN;
    for i in 0..args.steps.max(1) + 2 {
        let begun = Instant::now();
        let out = engine.run(step, &inputs)?;
        update_inputs[1].1 = HostTensor::F32(vec![(i + 1) as f32]);
        engine.run(optimizer, &update_inputs)?;
        times.push(begun.elapsed().as_secs_f64());
        loss = out
            .get("loss")
            .and_then(|l| l.f32().first())
            .map_or(f64::NAN, |&l| f64::from(l));
    }
    let full = engine.memory();
    if args.profile {
        profile(
            engine.as_mut(),
            &[(step, &inputs), (optimizer, &update_inputs)],
        )?;
    }
    let name = engine.name();
    drop(engine);
    let after = ceilings(engine::open(backend, threads)?.as_mut(), compute)?;
    let ceilings = before.max(after);
    let matmul = ceilings.matmul_flops_per_sec;
    let mut times = times.split_off(2);
    times.sort_by(f64::total_cmp);
    let secs = times[times.len() / 2];
    let tokens_per_sec = tokens as f64 / secs;
    let result = BenchTrain {
        model: model.name.clone(),
        backend: name,
        precision: match args.precision.fp8() {
            true => format!("{compute} and fp8"),
            false => compute.to_string(),
        },
        deterministic: args.deterministic,
        threads,
        batch: args.batch,
        seq_len: args.seq,
        params: params.iter().map(|p| p.ty.len()).sum(),
        tokens_per_sec,
        step_ms: secs * 1e3,
        step_ms_min: times[0] * 1e3,
        arena_bytes,
        live_bytes,
        planned_bytes: planned.total(),
        device_bytes: full
            .zip(empty)
            .map(|(full, empty)| full.in_use.saturating_sub(empty.in_use) + PRODUCT_SCRATCH),
        model_flops_per_token,
        model_flops_per_sec: model_flops_per_token * tokens_per_sec,
        matmul_flops_per_sec: matmul,
        copy_bytes_per_sec: ceilings.copy_bytes_per_sec,
        mfu: model_flops_per_token * tokens_per_sec / matmul,
        loss,
    };
    if args.json {
        return print_json(&result);
    }
    println!(
        "{} in {} on {} with {} threads, {} x {} tokens, sums in {} order",
        result.model,
        result.precision,
        result.backend,
        threads,
        args.batch,
        args.seq,
        // Only a GPU has another order.
        match args.deterministic || result.backend != "cuda" {
            true => "a fixed",
            false => "any",
        }
    );
    println!(
        "  step          {:.1} ms (fastest {:.1} ms)   {} tokens/s",
        result.step_ms,
        result.step_ms_min,
        human(tokens_per_sec)
    );
    println!(
        "  model FLOPs   {}/token   {}/s",
        human(model_flops_per_token),
        human(result.model_flops_per_sec)
    );
    println!(
        "  ceilings here {}FLOP/s of matrix products, {}B/s of copies",
        human(matmul),
        human(ceilings.copy_bytes_per_sec)
    );
    println!(
        "  MFU           {:.1}% of the matrix products' rate",
        100.0 * result.mfu
    );
    println!(
        "  arena         {} (live bound {})",
        human_bytes(arena_bytes as u64),
        human_bytes(live_bytes as u64)
    );
    if let Some(bytes) = result.device_bytes {
        println!(
            "  on the GPU    {} planned: {} stored, {} arena, {} scratch; the device reports {}, {:+.2}%",
            human_bytes(planned.total() as u64),
            human_bytes(planned.stored as u64),
            human_bytes(planned.arena as u64),
            human_bytes(planned.scratch as u64),
            human_bytes(bytes as u64),
            100.0 * (bytes as f64 / planned.total() as f64 - 1.0)
        );
    }
    Ok(())
}
