//! `marimba bench ops`: every op, and mixers, beside the roofline of this device.

use super::{PrecisionArg, require};
use crate::bench::{Bound, Case, Ceilings, Rated, Row, Settings, Size, cases, ceilings, deviates};
use crate::cli::{CliError, hf, human, print_json};
use crate::engine;
use clap::{Args, ValueEnum};
use marimba_dsl::run::Backend;
use serde::Serialize;
use std::collections::BTreeSet;

/// Measure ops.
#[derive(Args)]
#[command(
    after_help = "Example:\n  marimba bench ops --op ssd --backend cuda --json\n\nThe fraction is the time that the ceilings of this device, \
                  measured in the same run, allow over the time taken: operations at the rate of a large matrix product, or bytes at the \
                  rate of a large copy, whichever takes longer."
)]
pub(in crate::cli) struct BenchOpsArgs {
    /// Only cases of this op, or where there are none, cases in which it runs; also mamba2, mamba1 and experts (may be repeated)
    #[arg(long, value_name = "NAME")]
    op: Vec<String>,
    /// auto, cpu, dfdx or cuda
    #[arg(long, default_value = "auto")]
    backend: String,
    /// Type of activations and matrices [default: bf16 on cuda, f32 elsewhere]
    #[arg(long, value_enum)]
    dtype: Option<PrecisionArg>,
    /// How large cases are [default: full on cuda, small elsewhere]
    #[arg(long, value_enum)]
    size: Option<SizeArg>,
    /// About how long each row is timed
    #[arg(long, default_value_t = 0.2, value_name = "SECONDS")]
    seconds: f64,
    /// Only the forward pass
    #[arg(long)]
    forward: bool,
    /// Equal bits in equal runs
    #[arg(long)]
    deterministic: bool,
    /// Also the time of each forward pass on the reference backend, dfdx, in f32; best with --size small
    #[arg(long)]
    reference: bool,
    /// Threads of the cpu backend [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Print as JSON on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SizeArg {
    /// A few numbers
    Tiny,
    /// A model of width 256
    Small,
    /// Models of width 4096, 16,384 tokens
    Full,
}

#[derive(Serialize)]
struct BenchOps {
    device: String,
    backend: &'static str,
    dtype: String,
    threads: usize,
    deterministic: bool,
    #[serde(flatten)]
    ceilings: Ceilings,
    #[serde(skip_serializing_if = "Option::is_none")]
    reference: Option<String>,
    rows: Vec<Rated>,
    /// Ops that give a view of memory and run nothing.
    views: BTreeSet<&'static str>,
    /// Cases that this backend refuses, and why.
    refused: Vec<Refused>,
}

#[derive(Serialize)]
struct Refused {
    subject: &'static str,
    shape: String,
    why: String,
}

pub(super) fn run(args: &BenchOpsArgs) -> Result<(), CliError> {
    let backend = hf::backend_of(&args.backend)?;
    let threads = args.threads.unwrap_or_else(engine::cores);
    let mut engine = engine::open(backend, threads)?;
    let engine = engine.as_mut();
    let on_gpu = engine.name() == "cuda";
    let precision = args.dtype.unwrap_or(match on_gpu {
        true => PrecisionArg::Bf16,
        false => PrecisionArg::F32,
    });
    require(precision, engine.name())?;
    let dtype = precision.dtype();
    let size = match (args.size, on_gpu) {
        (Some(SizeArg::Tiny), _) => Size::Tiny,
        (Some(SizeArg::Small), _) | (None, false) => Size::Small,
        (Some(SizeArg::Full), _) | (None, true) => Size::Full,
    };
    let settings = Settings {
        seconds: args.seconds.max(0.0),
        // The reference derives gradients from a tape of its own, which needs a loss.
        backward: !args.forward && engine.name() != "dfdx",
        by_op: true,
        rotate: true,
    };
    let (chosen, views) = choose(cases(size, dtype)?, &args.op)?;
    let fp8 = precision.fp8();
    let chosen: Vec<Case> = chosen.into_iter().map(|c| c.in_fp8(fp8)).collect();
    let mut reference = match args.reference {
        true => Some(engine::open(Backend::Dfdx, threads)?),
        false => None,
    };
    let plain = match args.reference {
        true => choose(cases(size, marimba_ir::DType::F32)?, &args.op)?.0,
        false => Vec::new(),
    };
    engine.set_deterministic(args.deterministic);
    let before = ceilings(engine, dtype)?;
    let noise = deviates();
    let (mut rows, mut refused): (Vec<Row>, Vec<Refused>) = (Vec::new(), Vec::new());
    for (i, case) in chosen.iter().enumerate() {
        eprintln!("{} {}", case.subject, case.shape);
        let mut measured = match case.measure(engine, &noise, &settings) {
            Ok(measured) => measured,
            Err(e) => {
                refused.push(Refused {
                    subject: case.subject,
                    shape: case.shape.clone(),
                    why: e.to_string(),
                });
                continue;
            }
        };
        // Said at once: what was measured outlives an interruption.
        for row in &measured {
            eprintln!("  {:24} {:.4} ms", row.what, row.secs * 1e3);
        }
        if let (Some(reference), Some(case), Some(row)) =
            (&mut reference, plain.get(i), measured.first_mut())
        {
            match case.forward_secs(reference.as_mut(), &noise, args.seconds) {
                Ok(secs) => row.reference_secs = Some(secs),
                Err(e) => refused.push(Refused {
                    subject: case.subject,
                    shape: format!("{} on the reference", case.shape),
                    why: e.to_string(),
                }),
            }
        }
        rows.extend(measured);
    }
    let ceilings = before.max(ceilings(engine, dtype)?);
    let result = BenchOps {
        device: engine.device(),
        backend: engine.name(),
        dtype: match fp8 {
            true => format!("{dtype} and fp8"),
            false => dtype.to_string(),
        },
        threads,
        deterministic: args.deterministic,
        ceilings,
        reference: reference.map(|r| r.device()),
        rows: rows.into_iter().map(|r| r.rated(&ceilings)).collect(),
        views,
        refused,
    };
    if args.json {
        return print_json(&result);
    }
    print(&result);
    Ok(())
}

/// The cases that these names mean, and the views among their ops; all cases where there are no names.
fn choose(
    all: Vec<Case>,
    names: &[String],
) -> Result<(Vec<Case>, BTreeSet<&'static str>), CliError> {
    let mut ops = Vec::with_capacity(all.len());
    let mut views = BTreeSet::new();
    for case in &all {
        let (mut runs, seen) = case.ops()?;
        runs.extend(&seen);
        views.extend(seen);
        ops.push(runs);
    }
    let mut keep = vec![names.is_empty(); all.len()];
    for name in names {
        let about: Vec<usize> = (0..all.len()).filter(|&i| all[i].subject == name).collect();
        let within = || (0..all.len()).filter(|&i| ops[i].contains(name.as_str()));
        let found = if about.is_empty() {
            within().collect()
        } else {
            about
        };
        if found.is_empty() {
            let mut names: BTreeSet<&str> = ops.iter().flatten().copied().collect();
            names.extend(all.iter().map(|c| c.subject));
            return Err(CliError::Other(format!(
                "no op {name}; there are {}",
                names.into_iter().collect::<Vec<_>>().join(", ")
            )));
        }
        found.into_iter().for_each(|i| keep[i] = true);
    }
    let chosen = all.into_iter().zip(keep);
    Ok((chosen.filter(|(_, k)| *k).map(|(c, _)| c).collect(), views))
}

fn print(result: &BenchOps) {
    // Rates in units that suit the machine.
    let unit = |ceiling: f64| match ceiling >= 1e12 {
        true => (1e12, "T"),
        false => (1e9, "G"),
    };
    let (flop, flop_name) = unit(result.ceilings.matmul_flops_per_sec);
    let (byte, byte_name) = unit(result.ceilings.copy_bytes_per_sec);
    println!(
        "{} in {}: ceilings {}FLOP/s of matrix products, {}B/s of copies (read and written), in this run{}",
        result.device,
        result.dtype,
        human(result.ceilings.matmul_flops_per_sec),
        human(result.ceilings.copy_bytes_per_sec),
        if result.deterministic {
            "; equal bits in equal runs"
        } else {
            ""
        }
    );
    let last = match &result.reference {
        Some(device) => format!("  {device}, f32"),
        None => String::new(),
    };
    println!(
        "{:54} {:>5} {:>10} {:>8} {:>8} {:>10} {:>5}  bound{last}",
        "",
        "nodes",
        "ms",
        format!("{flop_name}FLOP/s"),
        format!("{byte_name}B/s"),
        "floor ms",
        "of it"
    );
    let mut case = None;
    for r in &result.rows {
        let this = (&r.row.subject, &r.row.shape);
        if case != Some(this) {
            println!("{} {}", this.0, this.1);
            case = Some(this);
        }
        let indent = if r.row.is_op { "      " } else { "  " };
        println!(
            "{:54} {:>5} {:>10.4} {:>8.2} {:>8.3} {:>10.4} {:>4.0}%  {}{}",
            format!("{indent}{}", r.row.what),
            r.row.nodes,
            r.row.secs * 1e3,
            r.flops_per_sec / flop,
            r.bytes_per_sec / byte,
            r.floor_secs * 1e3,
            100.0 * r.fraction,
            match r.bound {
                Bound::Flops => "products",
                Bound::Bytes => "bytes",
            },
            match r.row.reference_secs {
                Some(secs) => format!("  {:.3} ms", secs * 1e3),
                None => String::new(),
            }
        );
    }
    for r in &result.refused {
        println!("refused: {} {}: {}", r.subject, r.shape, r.why);
    }
}
