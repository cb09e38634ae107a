//! `marimba bench step`: decoding steps through carried states.

use super::{PrecisionArg, profile, require};
use crate::bench::{ceilings, fill, runs_in};
use crate::cli::{CliError, Sets, files, hf, human, human_bytes, print_json};
use crate::engine;
use crate::generate::input_names;
use crate::program::{self, Program};
use clap::Args;
use marimba_backend::HostTensor;
use marimba_dsl::Source;
use marimba_ir::lower::{Logits, rope};
use marimba_ir::{Options, cost};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

/// Measure decoding.
#[derive(Args)]
#[command(
    after_help = "Example:\n  marimba bench step experiments/models/bamba-9b.ron --backend cuda --precision bf16 --batch 16 --cache 4096"
)]
pub(in crate::cli) struct BenchStepArgs {
    /// A model or run file
    model: PathBuf,
    #[command(flatten)]
    sets: Sets,
    /// auto, cpu, dfdx or cuda
    #[arg(long, default_value = "auto")]
    backend: String,
    /// Type of activations, matrices and caches
    #[arg(long, value_enum, default_value = "f32")]
    precision: PrecisionArg,
    /// Launch kernel by kernel instead of replaying CUDA graphs
    #[arg(long)]
    no_graph: bool,
    /// Sequences
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Slots of the caches, all but one taken
    #[arg(long, default_value_t = 1024)]
    cache: usize,
    /// Tokens are drawn with this temperature; 0 takes the most likely
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Of the fewest tokens whose probabilities reach this sum
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// About how long is timed
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS")]
    seconds: f64,
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
struct BenchStep {
    model: String,
    device: String,
    backend: &'static str,
    precision: String,
    threads: usize,
    batch: usize,
    cache: usize,
    params: usize,
    /// Median of whole steps: inputs handed in, drawn tokens on the host.
    step_ms: f64,
    step_ms_min: f64,
    /// Median of the programs alone; on a GPU by its own clock.
    device_ms: f64,
    tokens_per_sec: f64,
    /// Weights, states and caches, activations, each once: by the graph.
    bytes_per_step: f64,
    bytes_per_sec: f64,
    copy_bytes_per_sec: f64,
    /// Of the copy rate, of whole steps.
    fraction_of_copy: f64,
    /// The same of the programs alone.
    device_fraction_of_copy: f64,
    model_flops_per_step: f64,
    model_flops_per_sec: f64,
    matmul_flops_per_sec: f64,
    /// Of the rate of matrix products.
    mfu: f64,
}

pub(super) fn run(args: &BenchStepArgs) -> Result<(), CliError> {
    let source = Source::read(&args.model)?;
    let model = files::model_of(&source, &args.sets.sets)?;
    let backend = hf::backend_of(&args.backend)?;
    let threads = args.threads.unwrap_or_else(engine::cores);
    let compute = args.precision.dtype();
    let (batch, cache) = (args.batch.max(1), args.cache.max(1));
    let mut engine = engine::open_with(backend, threads, !args.no_graph)?;
    let engine = engine.as_mut();
    require(args.precision, engine.name())?;
    if args.precision.fp8() {
        return Err(CliError::Other(
            "8 bits are for training; decoding takes f32 or bf16".into(),
        ));
    }
    let before = ceilings(engine, compute)?;
    let Program {
        graph,
        plan: memory,
    } = program::lowered(
        &model,
        &Options {
            compute,
            logits: Logits::Drawn,
            ..Options::decode(batch, cache)
        },
    )?;
    let costs = cost::costs(&graph);
    let params = cost::params(&graph).total;
    fill(engine, &graph)?;
    let names = input_names(&graph);
    let program = engine.load(graph, memory)?;
    let last = cache as i32 - 1;
    let ids = (0..batch).map(|i| (i * 7919 % model.vocab_size) as i32);
    let mut inputs = vec![
        ("tokens".to_string(), HostTensor::I32(ids.collect())),
        ("pos".to_string(), HostTensor::I32(vec![last; batch])),
        ("slot".to_string(), HostTensor::I32(vec![last])),
        (
            "bits".to_string(),
            HostTensor::I32(vec![1 << 30; 2 * batch]),
        ),
        (
            "sampling".to_string(),
            HostTensor::F32(vec![args.temperature, 0.0, args.top_p]),
        ),
    ];
    let frequencies = rope::dynamic_inputs(&model, cache).into_iter();
    inputs.extend(frequencies.map(|(n, f)| (n, HostTensor::F32(f))));
    inputs.retain(|(n, _)| names.contains(n));
    let inputs: Vec<(&str, HostTensor)> = inputs
        .iter()
        .map(|(n, data)| (n.as_str(), data.clone()))
        .collect();

    let programs = [(program, inputs.as_slice())];
    let first = engine.time(&programs, 1)?;
    let runs = runs_in(args.seconds, first.first().copied().unwrap_or(0.0));
    let device = median(engine.time(&programs, runs)?);
    let mut times = Vec::with_capacity(runs);
    engine.run(program, &inputs)?;
    for _ in 0..runs {
        let begun = Instant::now();
        engine.run(program, &inputs)?;
        times.push(begun.elapsed().as_secs_f64());
    }
    let least = times.iter().copied().fold(f64::INFINITY, f64::min);
    let secs = median(times);
    if args.profile {
        profile(engine, &programs)?;
    }
    engine.clear();
    let ceilings = before.max(ceilings(engine, compute)?);
    let flops = costs.model_flops();
    let result = BenchStep {
        model: model.name.clone(),
        device: engine.device(),
        backend: engine.name(),
        precision: compute.to_string(),
        threads,
        batch,
        cache,
        params,
        step_ms: secs * 1e3,
        step_ms_min: least * 1e3,
        device_ms: device * 1e3,
        tokens_per_sec: batch as f64 / secs,
        bytes_per_step: costs.moved_bytes,
        bytes_per_sec: costs.moved_bytes / secs,
        copy_bytes_per_sec: ceilings.copy_bytes_per_sec,
        fraction_of_copy: costs.moved_bytes / secs / ceilings.copy_bytes_per_sec,
        device_fraction_of_copy: costs.moved_bytes / device / ceilings.copy_bytes_per_sec,
        model_flops_per_step: flops,
        model_flops_per_sec: flops / secs,
        matmul_flops_per_sec: ceilings.matmul_flops_per_sec,
        mfu: flops / secs / ceilings.matmul_flops_per_sec,
    };
    if args.json {
        return print_json(&result);
    }
    println!(
        "{} in {} on {}, {} sequences, caches of {} slots",
        result.model, result.precision, result.device, batch, cache
    );
    println!(
        "  step          {:.3} ms (fastest {:.3} ms), {:.3} ms of it the program   {} tokens/s",
        result.step_ms,
        result.step_ms_min,
        result.device_ms,
        human(result.tokens_per_sec)
    );
    println!(
        "  memory        {} a step   {}B/s, {:.1}% of the {}B/s of a copy here ({:.1}% in the program)",
        human_bytes(result.bytes_per_step as u64),
        human(result.bytes_per_sec),
        100.0 * result.fraction_of_copy,
        human(result.copy_bytes_per_sec),
        100.0 * result.device_fraction_of_copy
    );
    println!(
        "  model FLOPs   {} a step   {}FLOP/s, MFU {:.2}% of the {}FLOP/s of matrix products here",
        human(result.model_flops_per_step),
        human(result.model_flops_per_sec),
        100.0 * result.mfu,
        human(result.matmul_flops_per_sec)
    );
    Ok(())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}
