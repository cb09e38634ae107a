//! `marimba generate CHECKPOINT --prompt TEXT`

use super::hf::{FormatArg, backend_of};
use super::{CliError, print_json};
use crate::chat::{ChatTemplate, Message};
use crate::checkpoint::Weights;
use crate::data::tokenizer;
use crate::engine;
use crate::generate::{Settings, generate};
use clap::Args;
use marimba_backend::HostTensor;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

/// Continue prompts.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  marimba generate runs/text --prompt 'Once upon a time' --temperature 0.8\n  marimba generate ./Bamba-9B --chat --prompt 'Why is the sky blue?'\n  marimba generate ckpt --ids 5,9,12 --json"
)]
pub(super) struct GenerateArgs {
    /// A run folder, a Marimba checkpoint, a folder of them (the latest counts), or a Hugging Face folder
    checkpoint: PathBuf,
    /// Text to continue (may be repeated; all are continued as one batch)
    #[arg(long, value_name = "TEXT", default_value = "")]
    prompt: Vec<String>,
    /// Token ids to continue instead of text, such as 5,9,12 (may be repeated)
    #[arg(long, value_name = "IDS", conflicts_with_all = ["prompt", "chat"])]
    ids: Vec<String>,
    /// Take each prompt as the user's turn of a conversation, by the checkpoint's chat template
    #[arg(long)]
    chat: bool,
    /// System message of the conversation
    #[arg(long, requires = "chat")]
    system: Option<String>,
    /// Most tokens to add
    #[arg(long, default_value_t = 100)]
    max_tokens: usize,
    /// Divides logits before sampling; 0 takes the most likely token
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Sample from this many most likely tokens; 0 is all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Sample from the most likely tokens that together have this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Seed of the sampling
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Token id that ends a continuation (may be repeated) [default: the checkpoint's eos_token_id, else the tokenizer's end of text]
    #[arg(long)]
    stop: Vec<i32>,
    /// A tokenizer.json [default: the checkpoint's or its run's; bytes where there is none]
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// auto, cpu, dfdx or cuda
    #[arg(long, default_value = "auto")]
    backend: String,
    /// Number format of activations and matrices; bf16 needs a GPU
    #[arg(long, value_enum, default_value = "f32")]
    precision: FormatArg,
    /// Launch kernel by kernel instead of replaying CUDA graphs
    #[arg(long)]
    no_graph: bool,
    /// Threads of the cpu backend [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Print prompts and continuations as JSON on stdout
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &GenerateArgs) -> Result<(), CliError> {
    let weights = Weights::open(&args.checkpoint)?;
    let dir = weights.text_dir();
    let file = args.tokenizer.clone().or_else(|| weights.tokenizer());
    let tokenizer = tokenizer::load(file.as_deref())?;
    let vocab_size = weights.model.vocab_size;
    let prompts = prompts(args, &dir, tokenizer.as_ref(), vocab_size)?;
    if let Some(big) = prompts
        .iter()
        .flatten()
        .find(|t| **t as usize >= vocab_size)
    {
        return Err(CliError::Other(format!(
            "the prompt has token {big}, the model has {vocab_size} tokens; give its own --tokenizer"
        )));
    }
    let mut stop = args.stop.clone();
    if stop.is_empty() && args.ids.is_empty() {
        stop = weights.stop_tokens()?;
        if stop.is_empty() {
            stop.extend(tokenizer.eos().map(|t| t as i32));
        }
    }
    let threads = args.threads.unwrap_or_else(engine::cores);
    let mut engine = engine::open_with(backend_of(&args.backend)?, threads, !args.no_graph)?;
    for (i, p) in weights.params.iter().enumerate() {
        engine.write(
            &format!("param:{}", p.name),
            &p.ty,
            &HostTensor::F32(weights.param(i)?),
        )?;
    }
    let settings = Settings {
        max_new_tokens: args.max_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
        stop,
        compute: args.precision.dtype(),
    };
    // One prompt is heard as it comes; a batch would come mixed.
    let live = !args.json && prompts.len() == 1 && args.ids.is_empty();
    if live && !args.chat {
        print!("{}", args.prompt.concat());
    }
    let (mut so_far, mut printed) = (Vec::new(), String::new());
    let said = generate(
        engine.as_mut(),
        &weights.model,
        &prompts,
        &settings,
        &mut |_, token| {
            so_far.push(token as u32);
            // A token may be half a character: what is not text yet waits.
            if live
                && let Ok(text) = tokenizer.decode(&so_far)
                && !text.ends_with('\u{fffd}')
                && let Some(new) = text.strip_prefix(printed.as_str())
            {
                print!("{new}");
                std::io::stdout().flush().unwrap_or_default();
                printed = text;
            }
        },
    )?;
    if live {
        let text = tokenizer.decode(&so_far)?;
        println!(
            "{}",
            text.strip_prefix(printed.as_str()).unwrap_or_default()
        );
        return Ok(());
    }
    let mut facts = Vec::new();
    for (prompt, ids) in prompts.iter().zip(&said) {
        let unsigned: Vec<u32> = ids.iter().map(|t| *t as u32).collect();
        let text = if args.ids.is_empty() {
            Some(tokenizer.decode(&unsigned)?)
        } else {
            None
        };
        if !args.json {
            match &text {
                Some(text) => println!("{text}"),
                None => println!(
                    "{}",
                    ids.iter().map(i32::to_string).collect::<Vec<_>>().join(",")
                ),
            }
        }
        facts.push(json!({ "prompt_ids": prompt, "ids": ids, "text": text }));
    }
    if args.json {
        print_json(&facts)?;
    }
    Ok(())
}

fn prompts(
    args: &GenerateArgs,
    dir: &std::path::Path,
    tokenizer: &dyn tokenizer::Tokenize,
    vocab_size: usize,
) -> Result<Vec<Vec<i32>>, CliError> {
    if !args.ids.is_empty() {
        let ids = |text: &String| {
            let numbers: Result<Vec<i32>, _> = text.split(',').map(|t| t.trim().parse()).collect();
            numbers.map_err(|_| {
                CliError::Other(format!(
                    "--ids {text} is not a list of token ids, such as 5,9,12"
                ))
            })
        };
        return args.ids.iter().map(ids).collect();
    }
    let template = if args.chat {
        Some(ChatTemplate::load(dir)?)
    } else {
        None
    };
    let mut out = Vec::new();
    for prompt in &args.prompt {
        let text = match &template {
            Some(t) => {
                let say = |role: &str, content: &String| Message {
                    role: role.into(),
                    content: content.clone(),
                };
                let mut talk: Vec<Message> = args.system.iter().map(|s| say("system", s)).collect();
                talk.push(say("user", prompt));
                t.render(&talk)?
            }
            None => prompt.clone(),
        };
        let mut ids: Vec<i32> = tokenizer
            .encode(&text)?
            .into_iter()
            .map(|t| t as i32)
            .collect();
        if ids.is_empty() {
            // Something must be said first; a line break begins a text as well as anything.
            ids.push(if vocab_size > 10 { 10 } else { 0 });
        }
        out.push(ids);
    }
    Ok(out)
}
