//! `marimba generate CKPT`

use super::{CliError, interactive};
use crate::chat::{ChatTemplate, Message};
use crate::checkpoint::Checkpoint;
use crate::data::tokenizer;
use crate::engine;
use crate::generate::{Settings, generate};
use clap::Args;
use marimba_backend::HostTensor;
use marimba_dsl::run::Backend;
use marimba_dsl::{Source, parse_model};
use std::io::Write;
use std::path::PathBuf;

/// Continue a prompt.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  marimba generate runs/text --prompt \"It was\" --max-tokens 200 --temperature 0.8 --top-k 40\n  marimba generate imported/model --chat --prompt \"Hello\""
)]
pub(super) struct GenerateArgs {
    /// A run folder, a folder of checkpoints, or a checkpoint
    checkpoint: PathBuf,
    /// The text to continue
    #[arg(long, default_value = "")]
    prompt: String,
    /// Most tokens to add
    #[arg(long, default_value_t = 100)]
    max_tokens: usize,
    /// Divides logits before sampling; 0 takes the most likely token
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Sample from this many most likely tokens only; 0 is all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Sample from the fewest tokens whose probabilities reach this sum
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Seed of the sampling
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A tokenizer.json [default: the checkpoint's; bytes where it has none]
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Put the prompt into the checkpoint's chat template
    #[arg(long)]
    chat: bool,
    /// Threads of the cpu backend [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
}

pub(super) fn run(args: &GenerateArgs) -> Result<(), CliError> {
    let below = args.checkpoint.join("checkpoints");
    let ckpt = Checkpoint::open(if below.is_dir() {
        &below
    } else {
        &args.checkpoint
    })?;
    let source = Source::new(
        ckpt.dir.join("model.ron").display().to_string(),
        ckpt.model_ron.clone(),
    );
    let model = parse_model(&source, &[])?;
    let params = marimba_ir::lower::params(&model)?;
    let mut engine = engine::open(Backend::Auto, args.threads.unwrap_or_else(engine::cores))?;
    ckpt.restore(&params, false, &mut |key, ty, data| {
        engine
            .write(key, ty, &HostTensor::F32(data))
            .map_err(|e| e.to_string())
    })?;

    let hf = ckpt.dir.join("hf");
    let file = args
        .tokenizer
        .clone()
        .or_else(|| Some(hf.join("tokenizer.json")).filter(|p| p.is_file()));
    let tokenizer = tokenizer::load(file.as_deref())?;
    let text = if args.chat {
        let template = ChatTemplate::load(&hf).map_err(|e| CliError::Other(e.to_string()))?;
        let turn = Message {
            role: "user".into(),
            content: args.prompt.clone(),
        };
        template
            .render(&[turn])
            .map_err(|e| CliError::Other(e.to_string()))?
    } else {
        args.prompt.clone()
    };
    let mut prompt: Vec<i32> = tokenizer
        .encode(&text)
        .map_err(|e| CliError::Other(e.to_string()))?
        .into_iter()
        .map(|t| t as i32)
        .collect();
    if prompt.is_empty() {
        // Something must be said first; a line break begins a text as well as anything.
        prompt.push(if model.vocab_size > 10 { 10 } else { 0 });
    }
    if let Some(big) = prompt.iter().find(|&&t| t as usize >= model.vocab_size) {
        return Err(CliError::Other(format!(
            "the prompt has token {big}, the model has {} tokens; give its own --tokenizer",
            model.vocab_size
        )));
    }
    let settings = Settings {
        max_new_tokens: args.max_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
        stop: Vec::new(),
    };
    let mut out = std::io::stdout().lock();
    write!(out, "{}", args.prompt)?;
    // Print what is certain as it comes: a character of several tokens only once it is whole.
    let (mut ids, mut shown): (Vec<u32>, usize) = (Vec::new(), 0);
    let live = interactive();
    let mut heard = |_: usize, token: i32| {
        ids.push(token as u32);
        if live {
            let text = tokenizer.decode(&ids).unwrap_or_default();
            let whole = text.trim_end_matches('\u{fffd}');
            if whole.len() > shown {
                // A closed pipe is noticed at the end.
                let _ = write!(out, "{}", &whole[shown..]);
                let _ = out.flush();
                shown = whole.len();
            }
        }
    };
    generate(engine.as_mut(), &model, &[prompt], &settings, &mut heard)
        .map_err(|e| CliError::Other(e.to_string()))?;
    let text = tokenizer
        .decode(&ids)
        .map_err(|e| CliError::Other(e.to_string()))?;
    writeln!(out, "{}", text.get(shown..).unwrap_or(""))?;
    Ok(())
}
