//! `marimba show FILE`: layers as a table and a diagram, counts, and the memory of a step before anything runs.

use super::bench::{PrecisionArg, recompute};
use super::{CliError, Sets, human, human_bytes, print_json};
use crate::facts::facts;
use crate::program::{self, Program, TrainOptions};
use clap::{Args, ValueEnum};
use marimba_backend::cuda_bytes;
use marimba_dsl::Source;
use marimba_dsl::dialect::{self, DialectError};
use marimba_dsl::model::{Ffn, Layer, Mixer, Model};
use marimba_dsl::run::AdamW;
use marimba_ir::lower::Logits;
use marimba_ir::{DType, print};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Show a model.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  marimba show experiments/models/bamba-9b.ron\n  marimba show experiments/text.ron --plan --batch 8 --seq 256 --json"
)]
pub(super) struct ShowArgs {
    /// A model or run file
    file: PathBuf,
    #[command(flatten)]
    sets: Sets,
    /// Print the graph after all passes
    #[arg(long)]
    graph: bool,
    /// Print the memory plan: arena, live bound, largest values at the peak
    #[arg(long)]
    plan: bool,
    /// Number formats: f32, bf16 with f32 master weights, or that with the products of projections in 8 bits
    #[arg(long, value_enum, default_value = "f32")]
    precision: PrecisionArg,
    /// Recompute activations so that they take at most so many GiB
    #[arg(long, value_name = "GIB")]
    activations: Option<f64>,
    /// Which graph
    #[arg(long, value_enum, default_value = "train")]
    mode: ModeArg,
    /// Rows of a batch
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Tokens of a row [default: the model's context_len, at most 4096]
    #[arg(long)]
    seq: Option<usize>,
    /// Print only the layout, in another project's words
    #[arg(long, value_enum)]
    layout: Option<LayoutArg>,
    /// Print the facts as JSON on stdout
    #[arg(long)]
    json: bool,
}

/// Dialects of layouts.
#[derive(Clone, Copy, ValueEnum)]
enum LayoutArg {
    /// Megatron's and Nemotron-H's pattern string
    Megatron,
    /// Hugging Face's layer_types
    Hf,
    /// Jamba's periods and offsets
    Jamba,
    /// Bamba's attention indices
    Bamba,
}

/// The layout in a dialect, as JSON.
fn layout(model: &Model, dialect: LayoutArg) -> Result<Value, DialectError> {
    let kinds = |name| dialect::kinds(&model.layers, name);
    Ok(match dialect {
        LayoutArg::Megatron => {
            json!({ "hybrid_override_pattern": dialect::to_megatron(&kinds("megatron")?)? })
        }
        LayoutArg::Hf => json!({ "layer_types": dialect::to_hf(&kinds("hf")?)? }),
        LayoutArg::Jamba => {
            let j = dialect::to_jamba(&kinds("jamba")?)?;
            json!({
                "num_hidden_layers": j.n_layers,
                "attn_layer_period": j.attn_layer_period, "attn_layer_offset": j.attn_layer_offset,
                "expert_layer_period": j.expert_layer_period, "expert_layer_offset": j.expert_layer_offset,
            })
        }
        LayoutArg::Bamba => json!({ "attn_layer_indices": dialect::to_bamba(&kinds("bamba")?)? }),
    })
}

#[derive(Clone, Copy, ValueEnum)]
enum ModeArg {
    Train,
    Prefill,
    Decode,
}

pub(super) fn run(args: &ShowArgs) -> Result<(), CliError> {
    let source = Source::read(&args.file)?;
    let model = super::files::model_of(&source, &args.sets.sets)?;
    if let Some(dialect) = args.layout {
        let words = layout(&model, dialect).map_err(|e| CliError::Other(e.to_string()))?;
        return print_json(&words);
    }
    let seq = args.seq.unwrap_or(model.context_len.min(4096)).max(1);
    let batch = args.batch.max(1);
    let counts = facts(&model, seq)?;
    let Program { graph, plan } = match args.mode {
        ModeArg::Train => {
            let options = TrainOptions {
                compute: args.precision.dtype(),
                fp8: args.precision.fp8(),
                recompute: recompute(args.activations),
                ..TrainOptions::plain()
            };
            program::training(&model, &options, batch, seq)?
        }
        ModeArg::Prefill => {
            program::inference(&model, batch, seq.max(2), seq.max(2), Logits::Last)?
        }
        ModeArg::Decode => program::inference(&model, batch, 1, seq, Logits::Last)?,
    };
    let param_bytes = counts.params_total * 4;
    let train = matches!(args.mode, ModeArg::Train);
    let largest = plan.largest_at_peak(&graph, 8);
    let update = match args.mode {
        ModeArg::Train => Some(program::update_of(
            &graph.params,
            &AdamW::default(),
            None,
            &BTreeMap::new(),
        )?),
        ModeArg::Prefill | ModeArg::Decode => None,
    };
    let programs = update.iter().map(|u| (&u.graph, &u.plan));
    let cuda = cuda_bytes(programs.chain([(&graph, &plan)]));
    if args.json {
        let mut out = serde_json::to_value(&counts)?;
        if let Value::Object(map) = &mut out {
            map.insert("name".into(), json!(model.name));
            map.insert("n_layers".into(), json!(model.layers.len()));
            map.insert("batch".into(), json!(batch));
            map.insert("seq_len".into(), json!(seq));
            map.insert("arena_bytes".into(), json!(plan.arena_bytes));
            map.insert("live_bytes".into(), json!(plan.live_bytes));
            map.insert("param_bytes".into(), json!(param_bytes));
            map.insert("cuda_bytes".into(), json!(cuda.total()));
            map.insert(
                "grad_bytes".into(),
                json!(if train { param_bytes } else { 0 }),
            );
            map.insert(
                "optimizer_bytes".into(),
                json!(if train { 2 * param_bytes } else { 0 }),
            );
            map.insert(
                "kv_cache_bytes".into(),
                json!(counts.kv_bytes_per_token * (seq * batch) as u64),
            );
            map.insert(
                "layers".into(),
                json!(model.layers.iter().map(describe).collect::<Vec<_>>()),
            );
            if args.graph {
                map.insert("graph".into(), json!(graph.to_string()));
            }
            if args.plan {
                let rows: Vec<Value> = largest
                    .iter()
                    .map(|(path, ty, bytes)| json!({"path": path, "type": ty, "bytes": bytes}))
                    .collect();
                map.insert("largest_at_peak".into(), json!(rows));
            }
        }
        return print_json(&out);
    }
    print!("{}", table(&model));
    println!();
    println!(
        "parameters        {:>12}  ({} active, {} in the embedding)",
        human(counts.params_total as f64),
        human(counts.params_active as f64),
        human(counts.params_embedding as f64)
    );
    println!(
        "forward FLOPs     {:>12}  per token at {seq} tokens",
        human(counts.flops_per_token)
    );
    println!(
        "decode state      {:>12}  per sequence, and {} of KV cache per token of context",
        human_bytes(counts.state_bytes_per_seq),
        human_bytes(counts.kv_bytes_per_token)
    );
    println!(
        "arena             {:>12}  for {batch} x {seq} tokens (lower bound {})",
        human_bytes(plan.arena_bytes as u64),
        human_bytes(plan.live_bytes as u64)
    );
    if train {
        println!(
            "parameters        {:>12}  and as much for gradients, twice as much for AdamW's moments (f32)",
            human_bytes(param_bytes)
        );
    }
    println!(
        "on a GPU          {:>12}  in {}: {} stored, {} arena, {} scratch",
        human_bytes(cuda.total() as u64),
        graph.params.first().map_or(DType::F32, |p| p.compute),
        human_bytes(cuda.stored as u64),
        human_bytes(cuda.arena as u64),
        human_bytes(cuda.scratch as u64)
    );
    if args.plan {
        println!("\nlargest values at the peak:");
        for (path, ty, bytes) in &largest {
            println!("  {:>12}  {ty}  {path}", human_bytes(*bytes as u64));
        }
    }
    if args.graph {
        println!("\n{}", print::compact(&graph));
    }
    Ok(())
}

/// Runs of equal layers, one line each, and one character per sublayer below.
fn table(model: &Model) -> String {
    let mut out = format!(
        "{}: {} layers, d_model {}, vocabulary {}\n\n",
        model.name,
        model.layers.len(),
        model.d_model,
        model.vocab_size
    );
    let described: Vec<(String, String)> = model.layers.iter().map(describe).collect();
    let mut i = 0;
    while i < described.len() {
        let mut end = i + 1;
        while end < described.len() && described[end] == described[i] {
            end += 1;
        }
        let range = if end == i + 1 {
            format!("{i}")
        } else {
            format!("{i}-{}", end - 1)
        };
        out.push_str(&format!(
            "  {range:>7}  {:40}  {}\n",
            described[i].0, described[i].1
        ));
        i = end;
    }
    let line = |f: &dyn Fn(&Layer) -> char| model.layers.iter().map(f).collect::<String>();
    out.push_str(&format!("\n  mixers  {}   (* attention, 1 Mamba-1, 2 Mamba-2, D Gated DeltaNet, + parallel, . none)\n", line(&mixer_char)));
    out.push_str(&format!(
        "  ffns    {}   (- dense, E experts, . none)\n",
        line(&ffn_char)
    ));
    out
}

fn mixer_char(layer: &Layer) -> char {
    match layer.mixer.as_ref().map(|m| &m.body) {
        Some(Mixer::Attention(_)) => '*',
        Some(Mixer::Mamba1(_)) => '1',
        Some(Mixer::Mamba2(_)) => '2',
        Some(Mixer::GatedDeltaNet(_)) => 'D',
        Some(Mixer::Parallel(_)) => '+',
        None => '.',
    }
}

fn ffn_char(layer: &Layer) -> char {
    match layer.ffn.as_ref().map(|f| &f.body) {
        Some(Ffn::Glu(_) | Ffn::Mlp(_)) => '-',
        Some(Ffn::Moe(_)) => 'E',
        None => '.',
    }
}

fn describe(layer: &Layer) -> (String, String) {
    let mixer = layer
        .mixer
        .as_ref()
        .map_or_else(|| "none".to_string(), |m| describe_mixer(&m.name, &m.body));
    let inject = if layer.inject.is_some() {
        " + shared block"
    } else {
        ""
    };
    let ffn = layer.ffn.as_ref().map_or_else(
        || "none".to_string(),
        |f| format!("{}: {}", f.name, describe_ffn(&f.body)),
    );
    (format!("{mixer}{inject}"), ffn)
}

fn describe_mixer(name: &str, mixer: &Mixer) -> String {
    match mixer {
        Mixer::Attention(a) => {
            let rope = a.rope.as_ref().map_or_else(
                || "no RoPE".to_string(),
                |r| format!("RoPE on {} of {}", r.dims, a.head_dim),
            );
            let window = a
                .window
                .map(|w| format!(", window {w}"))
                .unwrap_or_default();
            format!(
                "{name}: attention {}/{} x {}, {rope}{window}",
                a.n_heads, a.n_kv_heads, a.head_dim
            )
        }
        Mixer::Mamba1(m) => format!(
            "{name}: Mamba-1 {} channels, state {}, dt rank {}",
            m.d_inner, m.d_state, m.dt_rank
        ),
        Mixer::Mamba2(m) => format!(
            "{name}: Mamba-2 {} x {}, state {}, {} groups",
            m.n_heads, m.head_dim, m.d_state, m.n_groups
        ),
        Mixer::GatedDeltaNet(d) => format!(
            "{name}: Gated DeltaNet {} x {} keys, {} x {} values",
            d.n_k_heads, d.k_head_dim, d.n_v_heads, d.v_head_dim
        ),
        Mixer::Parallel(branches) => branches
            .iter()
            .map(|b| describe_mixer(&b.name, &b.mixer))
            .collect::<Vec<_>>()
            .join(" + "),
    }
}

fn describe_ffn(ffn: &Ffn) -> String {
    match ffn {
        Ffn::Glu(g) => format!("gated {:?} {}", g.act, g.d_ff).to_lowercase(),
        Ffn::Mlp(m) => format!("plain {:?} {}", m.act, m.d_ff).to_lowercase(),
        Ffn::Moe(m) => {
            let shared = m
                .shared
                .as_ref()
                .map(|s| format!(" + shared {}", describe_ffn(&s.ffn)))
                .unwrap_or_default();
            format!(
                "{} of {} experts, {}{shared}",
                m.top_k, m.n_experts, m.expert.d_ff
            )
        }
    }
}
