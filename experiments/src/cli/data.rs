//! `marimba data ...` and `marimba bench data`: arguments to calls of [`crate::data::verbs`].

use crate::data::bench;
use crate::data::order::OrderMode;
use crate::data::pipeline::OnBad;
use crate::data::prepare::{PrepareSpec, prepare};
use crate::data::source::format::Columns;
use crate::data::{DataError, fms, tokenizer, verbs};
use clap::{Args, Subcommand, ValueEnum};
use marimba_dsl::{Report, Set};
use serde::Serialize;
use std::fmt::Display;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// What a data verb can fail with.
#[derive(Debug, thiserror::Error)]
pub enum DataCmdError {
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The run file.
    #[error("{0}")]
    Run(Box<Report>),
    /// The result could not be printed as JSON.
    #[error("cannot print the result as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// Look at data, prepare it, and ask what a run reads.
#[derive(Debug, Subcommand)]
pub enum DataCmd {
    /// Print the order in which a logical shard's documents are seen.
    Order(OrderArgs),
    /// Which documents were in a step of a run.
    Which(WhichArgs),
    /// In which steps of a run a document is seen.
    When(WhenArgs),
    /// Format, documents, tokens, lengths and samples of files.
    Inspect(InspectArgs),
    /// Who reads what with so many workers, and the mixture that results.
    Plan(PlanArgs),
    /// Make token shards of any readable files.
    Prepare(PrepareArgs),
    /// Where the logical shards of IBM's fms-fsdp loader stand in a checkpoint, and what they give next.
    FmsState(FmsStateArgs),
    /// Compare prepared shards with their manifest, or read other files completely.
    Verify(VerifyArgs),
}

/// How documents are ordered.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Mode {
    /// The keyed permutation, new in every epoch.
    Default,
    /// IBM fms-fsdp's, bit-exact.
    FmsV1,
    /// As stored.
    Sequential,
}

impl From<Mode> for OrderMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Default => Self::Default,
            Mode::FmsV1 => Self::FmsV1,
            Mode::Sequential => Self::Sequential,
        }
    }
}

/// Arguments of `data order`.
#[derive(Debug, Args)]
pub struct OrderArgs {
    /// Documents in the shard.
    #[arg(long)]
    size: u64,
    /// Number of the logical shard.
    #[arg(long, default_value_t = 0)]
    rank: u64,
    /// Seed of the data.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Epoch, from 0.
    #[arg(long, default_value_t = 0)]
    epoch: u64,
    /// Which order.
    #[arg(long, value_enum, default_value_t = Mode::Default)]
    mode: Mode,
    /// Also draw how well it is shuffled, as SVG.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A run file and changes to it.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The run file.
    run: PathBuf,
    /// Change a field of the run: `key=value`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Number of workers that the run has.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `data which`.
#[derive(Debug, Args)]
pub struct WhichArgs {
    #[command(flatten)]
    run: RunArgs,
    /// The optimiser step, from 0 over all phases.
    #[arg(long)]
    step: u64,
    /// Only this row of the step.
    #[arg(long)]
    row: Option<u64>,
}

/// Arguments of `data when`.
#[derive(Debug, Args)]
pub struct WhenArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Name of the dataset, as `data plan` prints it.
    #[arg(long)]
    dataset: String,
    /// Number of the document in the dataset.
    #[arg(long)]
    doc: u64,
}

/// Arguments of `data plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Phase of the run, from 0.
    #[arg(long, default_value_t = 0)]
    phase: usize,
    /// Rows over which the mixture is drawn.
    #[arg(long, default_value_t = 1024)]
    rows: u64,
}

/// Where documents are in files, and how text becomes tokens.
#[derive(Debug, Args)]
pub struct ReadArgs {
    /// A Hugging Face tokenizer.json or its folder; bytes without it.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// The column or field that holds documents; found by its usual names without it.
    #[arg(long)]
    column: Option<String>,
}

impl ReadArgs {
    fn columns(&self) -> Columns {
        self.column
            .as_deref()
            .map_or_else(Columns::default, Columns::only)
    }
}

/// Arguments of `data inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A file, a folder of files, or a folder of prepared shards.
    path: PathBuf,
    #[command(flatten)]
    read: ReadArgs,
    /// Look at no more documents than this.
    #[arg(long, default_value_t = 1_000_000)]
    limit: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `data prepare`.
#[derive(Debug, Args)]
pub struct PrepareArgs {
    /// Files, or folders of files.
    #[arg(required = true)]
    inputs: Vec<PathBuf>,
    /// The folder to write.
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    read: ReadArgs,
    /// V of inputs that are tokens already.
    #[arg(long)]
    vocab_size: Option<usize>,
    /// Do this share of the files: i/n, i from 0.
    #[arg(long, default_value = "0/1", value_parser = parse_shard)]
    shard: (usize, usize),
    /// Leave unreadable documents out and count them, instead of stopping.
    #[arg(long)]
    skip_bad: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn parse_shard(text: &str) -> Result<(usize, usize), String> {
    let parsed = text
        .split_once('/')
        .and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parsed
        .filter(|(i, n)| i < n)
        .ok_or_else(|| "expected i/n with i from 0 to n - 1, such as 0/8".to_owned())
}

/// Arguments of `data fms-state`.
#[derive(Debug, Args)]
pub struct FmsStateArgs {
    /// A checkpoint folder with loader_state_0.pth, loader_state_1.pth, ..., or one such file.
    path: PathBuf,
    /// Documents of each file of the dataset, in sorted order of the files: also tell which documents come next.
    #[arg(long, value_delimiter = ',', requires = "dataset")]
    counts: Vec<u64>,
    /// The dataset whose files are counted, as the state names it.
    #[arg(long, requires = "counts")]
    dataset: Option<String>,
    /// Seed of the reference's loader.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// How many documents to tell of each logical shard.
    #[arg(long, default_value_t = 5)]
    next: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `data verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// A folder of prepared shards, or any readable files.
    path: PathBuf,
    #[command(flatten)]
    read: ReadArgs,
}

/// Arguments of `bench data`.
#[derive(Debug, Args)]
pub struct BenchDataArgs {
    /// Tokens of the largest test set; two bytes each on disk.
    #[arg(long, default_value_t = 64_000_000)]
    tokens: u64,
    /// Tokens per second of the fastest training; data is tried at twice this rate.
    #[arg(long, default_value_t = 100_000.0)]
    train_rate: f64,
    /// A Python with PyTorch, whose DataLoader is measured over the same files.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Folder for test files, removed afterwards; the system's temporary folder without it.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn print<T: Serialize + Display>(value: &T, json: bool) -> Result<(), DataCmdError> {
    if json {
        println!("{}", serde_json::to_string(value)?);
    } else {
        println!("{}", value.to_string().trim_end());
    }
    Ok(())
}

fn load(args: &RunArgs) -> Result<marimba_dsl::run::Run, DataCmdError> {
    let sets = args
        .set
        .iter()
        .map(|s| s.parse::<Set>())
        .collect::<Result<Vec<_>, _>>();
    let sets = sets.map_err(|e| DataCmdError::Run(Box::new(e)))?;
    let run =
        marimba_dsl::load_run(&args.run, &sets).map_err(|e| DataCmdError::Run(Box::new(e)))?;
    Ok((*run).clone())
}

/// Runs a data verb.
///
/// # Errors
/// [`DataCmdError`].
pub fn run(cmd: &DataCmd) -> Result<(), DataCmdError> {
    match cmd {
        DataCmd::Order(a) => {
            let list = verbs::order_of(a.mode.into(), a.size, a.rank, a.seed, a.epoch)?;
            if let Some(path) = &a.plot {
                let title = format!(
                    "{:?}: {} documents, shard {}, seed {}, epoch {}",
                    a.mode, a.size, a.rank, a.seed, a.epoch
                );
                crate::data::plots::draw_order(&list.order, &title, path)?;
            }
            print(&list, a.json)
        }
        DataCmd::Which(a) => print(
            &verbs::which(&load(&a.run)?, a.run.workers, a.step, a.row)?,
            a.run.json,
        ),
        DataCmd::When(a) => print(
            &verbs::when(&load(&a.run)?, a.run.workers, &a.dataset, a.doc)?,
            a.run.json,
        ),
        DataCmd::Plan(a) => print(
            &verbs::plan(&load(&a.run)?, a.phase, a.run.workers, a.rows)?,
            a.run.json,
        ),
        DataCmd::Inspect(a) => {
            let tokenizer = tokenizer::load(a.read.tokenizer.as_deref())?;
            print(
                &verbs::inspect(&a.path, &tokenizer, &a.read.columns(), a.limit)?,
                a.json,
            )
        }
        DataCmd::FmsState(a) => {
            let states = fms::LoaderStates::read(&a.path)?;
            let next = match &a.dataset {
                Some(name) => states.next_documents(name, &a.counts, a.seed, a.next)?,
                None => Vec::new(),
            };
            print(&fms::Report { states, next }, a.json)
        }
        DataCmd::Prepare(a) => run_prepare(a),
        DataCmd::Verify(a) => {
            let tokenizer = tokenizer::load(a.read.tokenizer.as_deref())?;
            let docs = verbs::verify(&a.path, tokenizer, &a.read.columns())?;
            println!("{}: {docs} documents, all readable", a.path.display());
            Ok(())
        }
    }
}

fn run_prepare(a: &PrepareArgs) -> Result<(), DataCmdError> {
    let spec = PrepareSpec {
        inputs: a.inputs.clone(),
        out: a.out.clone(),
        tokenizer: tokenizer::load(a.read.tokenizer.as_deref())?,
        vocab_size: a.vocab_size,
        columns: a.read.columns(),
        shard: a.shard,
        on_bad: if a.skip_bad { OnBad::Skip } else { OnBad::Stop },
    };
    let bar = if std::io::stderr().is_terminal() {
        indicatif::ProgressBar::new_spinner()
    } else {
        indicatif::ProgressBar::hidden()
    };
    let start = std::time::Instant::now();
    let made = prepare(&spec, &mut |p| {
        let rate = p.tokens as f64 / start.elapsed().as_secs_f64() / 1e6;
        bar.set_message(format!(
            "{} of {} files, {} documents, {} tokens, {rate:.2} M tokens/s",
            p.done, p.parts, p.docs, p.tokens
        ));
        bar.tick();
    })?;
    bar.finish_and_clear();
    if a.json {
        println!("{}", serde_json::to_string(&made)?);
        return Ok(());
    }
    let p = &made.progress;
    println!(
        "{} documents, {} tokens written; {} files kept from before; {} unreadable documents left out",
        p.docs, p.tokens, p.kept, p.bad
    );
    match &made.manifest {
        Some(path) => println!("complete: {}", path.display()),
        None => println!(
            "{} files are left to other shards; the last one writes the manifest",
            made.missing
        ),
    }
    Ok(())
}

/// Runs `bench data`.
///
/// # Errors
/// [`DataCmdError`].
pub fn run_bench(a: &BenchDataArgs) -> Result<(), DataCmdError> {
    let base = a.folder.clone().unwrap_or_else(std::env::temp_dir);
    let folder = base.join(format!("marimba-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(DataError::io("create", &folder))?;
    let speeds = bench::speeds(&bench::BenchSpec {
        folder: &folder,
        tokens: a.tokens,
        train_rate: a.train_rate,
        python: a.python.as_deref(),
    });
    remove(&folder);
    print(&speeds?, a.json)
}

/// Leaves nothing behind; a file that cannot be removed is no reason to fail a measurement.
fn remove(folder: &Path) {
    if let Err(error) = std::fs::remove_dir_all(folder) {
        tracing::warn!(%error, folder = %folder.display(), "test files stay");
    }
}
