//! Speeds of the data side, as `marimba bench data` reports them. Each figure is the best of several passes over data made for it.
//! Figures for one core count the time that the thread had a core; start, resume and figures for all threads count time on a wall.

use super::order::OrderMode;
use super::pipeline::docs::Framing;
use super::pipeline::prefetch::Prefetch;
use super::pipeline::{Dataset, OnBad, Phase, Pipeline, PipelineSpec, Source};
use super::prepare::{PrepareSpec, prepare};
use super::rng::{Rng, key};
use super::rows::RowLoader;
use super::source::files::Files;
use super::source::format::Columns;
use super::source::shards::ShardDocs;
use super::source::{Documents, Tokens};
use super::tasks::Task;
use super::tokenizer::{Bytes, Tokenize};
use super::{DataError, Loader, Worker};
use marimba_dsl::data::Data;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Answer of `bench data`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Speeds {
    /// Memory-mapped u16 shards of documents of 64 to 4,000 tokens into packed batches `[8 T2048]`, one thread.
    pub packed_tokens_per_sec: f64,
    /// `memcpy` of the same tokens as i32 into four arrays of the same size: what the memory allows.
    pub copy_tokens_per_sec: f64,
    /// A PyTorch `DataLoader` over the same shards (see `bench/torch_loader.py`), one thread, where a Python with PyTorch was named.
    pub torch_tokens_per_sec: Option<f64>,
    /// Ratio of the first figure to it.
    pub over_torch: Option<f64>,
    /// Text through the tokenizer alone, all threads.
    pub tokenizer_tokens_per_sec: f64,
    /// The same text, read and tokenised on the fly into batches, all threads, in turns with the one above.
    pub on_the_fly_tokens_per_sec: f64,
    /// Median of their ratios over the turns.
    pub on_the_fly_fraction: f64,
    /// Tokens per second that the two figures below are for: twice `train_rate`.
    pub wait_rate: f64,
    /// Share of the time that a training at this rate waits for token shards.
    pub data_wait_shards: f64,
    /// The same for text, tokenised on the fly.
    pub data_wait_text: f64,
    /// Opening 10^9 documents in 100,000 files (simulated index) and giving the first batch, 1,024 lanes.
    pub start_secs: f64,
    /// Restoring the state after 1,024 rows there, and giving the next batch.
    pub resume_secs: f64,
    /// State, JSON bytes per logical shard.
    pub state_bytes_per_shard: f64,
    /// Tokens/s of each synthetic task at T = 256, one thread.
    pub tasks_tokens_per_sec: Vec<(String, f64)>,
}

impl std::fmt::Display for Speeds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let m = |x: f64| x / 1e6;
        writeln!(
            f,
            "mapped shards to packed batches  {:9.1} M tokens/s on one core (copy {:.1})",
            m(self.packed_tokens_per_sec),
            m(self.copy_tokens_per_sec)
        )?;
        if let (Some(torch), Some(ratio)) = (self.torch_tokens_per_sec, self.over_torch) {
            writeln!(
                f,
                "PyTorch DataLoader, same shards  {:9.1} M tokens/s on one core; {ratio:.1} times as many here",
                m(torch)
            )?;
        }
        writeln!(
            f,
            "tokenised on the fly             {:9.2} M tokens/s, {:.2} of the tokenizer alone ({:.2})",
            m(self.on_the_fly_tokens_per_sec),
            self.on_the_fly_fraction,
            m(self.tokenizer_tokens_per_sec)
        )?;
        writeln!(
            f,
            "training at {:.2} M tokens/s waits {:.2}% of its time for shards, {:.2}% for text",
            m(self.wait_rate),
            100.0 * self.data_wait_shards,
            100.0 * self.data_wait_text
        )?;
        writeln!(
            f,
            "10^9 documents in 100,000 files: start {:.3} s, resume {:.3} s, state {:.1} bytes per logical shard",
            self.start_secs, self.resume_secs, self.state_bytes_per_shard
        )?;
        for (name, rate) in &self.tasks_tokens_per_sec {
            writeln!(f, "task {name:<28}{:9.1} M tokens/s on one core", m(*rate))?;
        }
        Ok(())
    }
}

/// What to measure with.
pub struct BenchSpec<'a> {
    /// Folder for test files.
    pub folder: &'a Path,
    /// Tokens of the largest data set; 32 M take 64 MB of disk.
    pub tokens: u64,
    /// Tokens per second of the fastest training.
    pub train_rate: f64,
    /// A Python with PyTorch to compare with.
    pub python: Option<&'a Path>,
}

/// Measures everything.
///
/// # Errors
/// [`DataError`]: an unwritable folder, a Python without PyTorch.
pub fn speeds(spec: &BenchSpec<'_>) -> Result<Speeds, DataError> {
    let shards = shards(spec.folder, spec.tokens)?;
    let (packed, copy) = packed(&shards)?;
    let torch = spec.python.map(|p| torch(p, &shards)).transpose()?;
    let wait_rate = 2.0 * spec.train_rate;
    let data_wait_shards = wait(reader(&shards)?, wait_rate)?;
    let text = text(spec.folder)?;
    let (alone, on_the_fly, fraction) = on_the_fly(&text)?;
    let data_wait_text = wait(text.pipeline()?, wait_rate)?;
    let (start_secs, resume_secs, state_bytes_per_shard) = start()?;
    Ok(Speeds {
        packed_tokens_per_sec: packed,
        copy_tokens_per_sec: copy,
        torch_tokens_per_sec: torch,
        over_torch: torch.map(|t| packed / t),
        tokenizer_tokens_per_sec: alone,
        on_the_fly_tokens_per_sec: on_the_fly,
        on_the_fly_fraction: fraction,
        wait_rate,
        data_wait_shards,
        data_wait_text,
        start_secs,
        resume_secs,
        state_bytes_per_shard,
        tasks_tokens_per_sec: tasks()?,
    })
}

/// Share of the time that a reader of `rate` tokens a second waits, over two seconds after the first batches.
fn wait(pipeline: Pipeline, rate: f64) -> Result<f64, DataError> {
    let seq_len = pipeline.seq_len();
    let rows = 8.max(16_384 / seq_len);
    let step = Duration::from_secs_f64((rows * seq_len) as f64 / rate);
    let mut loader = Prefetch::new(Box::new(pipeline));
    let mut waited = Duration::ZERO;
    let mut begin = Instant::now();
    let mut steps = 0u32;
    while steps < 20 || begin.elapsed().as_secs_f64() < 2.0 {
        if steps == 20 {
            // The first steps find the depth.
            (waited, begin) = (Duration::ZERO, Instant::now());
        }
        let asked = Instant::now();
        std::hint::black_box(loader.next(rows)?);
        waited += asked.elapsed();
        std::thread::sleep(step);
        steps += 1;
    }
    Ok(waited.as_secs_f64() / begin.elapsed().as_secs_f64())
}

/// Rate of PyTorch's loader over the same shards.
fn torch(python: &Path, shards: &Path) -> Result<f64, DataError> {
    let mut command = std::process::Command::new(python);
    command.args(["-c", include_str!("../../bench/torch_loader.py")]);
    let ran = command.arg(shards).output();
    let ran = ran.map_err(DataError::io("run", python))?;
    let text = String::from_utf8_lossy(&ran.stdout);
    text.trim().parse().map_err(|_| {
        let said = String::from_utf8_lossy(&ran.stderr);
        let last = said.lines().last().unwrap_or_default();
        DataError::Parameter(format!(
            "{} did not measure PyTorch's loader: {last}; expected a Python with torch and numpy",
            python.display()
        ))
    })
}

/// Units per second of the fastest of `passes` calls, each of which returns how many it did.
fn best(
    passes: usize,
    clock: Clock,
    mut pass: impl FnMut() -> Result<u64, DataError>,
) -> Result<f64, DataError> {
    let mut rate = 0f64;
    for _ in 0..passes {
        // The time on a core is counted in ticks of some milliseconds.
        let (start, begin, mut units) = (clock.secs(), Instant::now(), 0);
        while begin.elapsed().as_secs_f64() < 0.2 {
            units += pass()?;
        }
        rate = rate.max(units as f64 / (clock.secs() - start).max(1e-9));
    }
    Ok(rate)
}

/// Which time a rate is per.
#[derive(Clone, Copy)]
enum Clock {
    /// Time on a wall.
    Wall(Instant),
    /// Time that this thread had a core, where Linux tells it, so that other programs do not lower a rate per core.
    Core(Instant),
}

impl Clock {
    fn wall() -> Self {
        Self::Wall(Instant::now())
    }

    fn core() -> Self {
        Self::Core(Instant::now())
    }

    fn secs(self) -> f64 {
        match self {
            Self::Wall(start) => start.elapsed().as_secs_f64(),
            Self::Core(start) => {
                let on_core = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
                let nanos = on_core.and_then(|s| {
                    s.split_whitespace()
                        .next()
                        .and_then(|n| n.parse::<u64>().ok())
                });
                nanos.map_or_else(|| start.elapsed().as_secs_f64(), |n| n as f64 * 1e-9)
            }
        }
    }
}

fn spec(seq_len: usize, lanes: u32, vocab_size: usize) -> PipelineSpec {
    PipelineSpec {
        seq_len,
        lanes,
        window: 1,
        order: OrderMode::Default,
        seed: 1,
        framing: Framing {
            vocab_size,
            ..Framing::default()
        },
        on_bad: OnBad::Stop,
        phases: vec![Phase {
            start_row: 0,
            weights: vec![1.0],
        }],
        valid_rows: 0,
    }
}

fn pipeline(docs: impl Documents + 'static, spec: PipelineSpec) -> Result<Pipeline, DataError> {
    Pipeline::new(
        vec![Dataset {
            name: "bench".into(),
            source: Source::Documents {
                docs: Arc::new(docs),
                valid_docs: 0,
            },
        }],
        spec,
        Worker::ALL,
    )
}

/// Token shards of documents of 64 to 4,000 tokens.
fn shards(folder: &Path, tokens: u64) -> Result<PathBuf, DataError> {
    let source = folder.join("packed.jsonl");
    let out = folder.join("packed");
    // A Megatron pair is the quickest way to known tokens.
    let (mut lengths, mut made, mut rng) = (Vec::new(), 0, Rng::new(&[1]));
    while made < tokens {
        let n = 64 + rng.below(3937);
        lengths.push(n);
        made += n;
    }
    let bin: Vec<u8> = (0..made)
        .flat_map(|_| (rng.below(50_000) as u16).to_le_bytes())
        .collect();
    let mut idx = b"MMIDIDX\0\0".to_vec();
    idx.extend(1u64.to_le_bytes());
    idx.push(8);
    idx.extend((lengths.len() as u64).to_le_bytes());
    idx.extend((lengths.len() as u64 + 1).to_le_bytes());
    lengths
        .iter()
        .for_each(|&n| idx.extend((n as i32).to_le_bytes()));
    let mut at = 0u64;
    for n in &lengths {
        idx.extend(at.to_le_bytes());
        at += 2 * n;
    }
    (0..=lengths.len() as u64).for_each(|i| idx.extend(i.to_le_bytes()));
    let idx_path = source.with_extension("idx");
    std::fs::write(source.with_extension("bin"), bin).map_err(DataError::io("write", &source))?;
    std::fs::write(&idx_path, idx).map_err(DataError::io("write", &source))?;
    let prepare_spec = PrepareSpec {
        inputs: vec![idx_path],
        out: out.clone(),
        tokenizer: Arc::new(Bytes),
        vocab_size: Some(50_000),
        columns: Columns::default(),
        shard: (0, 1),
        on_bad: OnBad::Stop,
    };
    prepare(&prepare_spec, &mut |_| ())?;
    Ok(out)
}

fn reader(shards: &Path) -> Result<Pipeline, DataError> {
    pipeline(ShardDocs::open(shards)?, spec(2048, 64, 50_000))
}

/// Rate into packed batches, and of the bare copies.
fn packed(shards: &Path) -> Result<(f64, f64), DataError> {
    let docs = ShardDocs::open(shards)?;
    docs.verify()?; // also brings the pages into memory
    let batches = (docs.manifest().tokens / (8 * 2049)).max(1);
    let mut loader = pipeline(docs, spec(2048, 64, 50_000))?;
    let rate = best(5, Clock::core(), || {
        for _ in 0..batches {
            std::hint::black_box(loader.next(8)?);
        }
        Ok(batches * 8 * 2048)
    })?;
    let from: Vec<i32> = vec![7; 8 * 2048];
    let copy = best(5, Clock::core(), || {
        for _ in 0..batches {
            std::hint::black_box([from.clone(), from.clone(), from.clone(), from.clone()]);
        }
        Ok(batches * 8 * 2048)
    })?;
    Ok((rate, copy))
}

/// A byte-level BPE of 4,096 tokens, trained on the text itself: no file has to be at hand.
struct Bpe(tokenizers::Tokenizer);

impl Tokenize for Bpe {
    fn vocab_size(&self) -> usize {
        self.0.get_vocab_size(true)
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoded = self.0.encode_fast(text, false).map_err(bpe_error)?;
        Ok(encoded.get_ids().to_vec())
    }

    fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        self.0.decode(tokens, false).map_err(bpe_error)
    }

    fn eos(&self) -> Option<u32> {
        None
    }

    fn fingerprint(&self) -> String {
        "bench".into()
    }

    fn name(&self) -> String {
        "bench".into()
    }
}

fn bpe_error(e: tokenizers::Error) -> DataError {
    DataError::Tokenizer {
        path: "bench".into(),
        what: e.to_string(),
    }
}

/// Text in a file and in memory, and a tokenizer for it.
struct TextSet {
    docs: Vec<String>,
    path: PathBuf,
    bpe: Arc<Bpe>,
}

impl TextSet {
    fn pipeline(&self) -> Result<Pipeline, DataError> {
        let files = Files::open(
            std::slice::from_ref(&self.path),
            &Columns::default(),
            self.bpe.clone(),
        )?;
        pipeline(files, spec(512, 64, 4096))
    }
}

/// A thousand documents of a made-up language.
fn text(folder: &Path) -> Result<TextSet, DataError> {
    use tokenizers::models::TrainerWrapper;
    use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    let mut rng = Rng::new(&[2]);
    // Words of a made-up language, frequent ones short.
    let words: Vec<String> = (0..8000u64)
        .map(|i| {
            let n = 1 + i.ilog2_or_zero() as usize / 2 + rng.index(3);
            (0..n)
                .map(|_| {
                    ["ka", "to", "ri", "men", "s", "al", "ve", "un", "do", "ix"][rng.index(10)]
                })
                .collect()
        })
        .collect();
    let mut document = |n: usize| {
        let mut text = String::new();
        for _ in 0..n {
            let word = (8000f64.powf(rng.unit()) as usize).min(7999);
            text.push_str(&words[word]);
            text.push_str(if rng.below(12) == 0 { ". " } else { " " });
        }
        text
    };
    let docs: Vec<String> = (0..1000).map(|i| document(100 + i % 900)).collect();
    let mut bpe = tokenizers::Tokenizer::new(BPE::default());
    bpe.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    let alphabet = ByteLevel::alphabet().into_iter().collect();
    let mut trainer = TrainerWrapper::from(
        BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(4096)
            .initial_alphabet(alphabet)
            .build(),
    );
    bpe.train(&mut trainer, docs.iter().take(100).map(String::as_str))
        .map_err(bpe_error)?;
    let bpe = Arc::new(Bpe(bpe));
    let path = folder.join("text.jsonl");
    let lines: String = docs
        .iter()
        .map(|d| format!("{{\"text\":{}}}\n", serde_json::Value::from(d.as_str())))
        .collect();
    std::fs::write(&path, lines).map_err(DataError::io("write", &path))?;

    Ok(TextSet { docs, path, bpe })
}

/// Rate of the tokenizer alone, of the pipeline around it, and their ratio. They take turns, so that what else the machine does weighs on both.
fn on_the_fly(text: &TextSet) -> Result<(f64, f64, f64), DataError> {
    use rayon::prelude::*;
    let mut loader = text.pipeline()?;
    let (mut alone, mut fly, mut ratios) = (0f64, 0f64, Vec::new());
    for _ in 0..7 {
        let a = best(1, Clock::wall(), || {
            let encoded = text.docs.par_iter().map(|d| text.bpe.encode(d));
            encoded.map(|t| t.map(|t| t.len() as u64)).sum()
        })?;
        let b = best(1, Clock::wall(), || {
            for _ in 0..8 {
                std::hint::black_box(loader.next(256)?);
            }
            Ok(8 * 256 * 513)
        })?;
        (alone, fly) = (alone.max(a), fly.max(b));
        ratios.push(b / a);
    }
    ratios.sort_by(f64::total_cmp);
    Ok((alone, fly, ratios[ratios.len() / 2]))
}

trait Log2 {
    fn ilog2_or_zero(self) -> u32;
}

impl Log2 for u64 {
    fn ilog2_or_zero(self) -> u32 {
        self.checked_ilog2().unwrap_or(0)
    }
}

/// 10^9 documents in 100,000 files of unequal sizes: an index without files.
struct Simulated {
    ends: Vec<u64>,
}

impl Simulated {
    fn new() -> Self {
        let mut end = 0;
        let ends = (0..100_000u64).map(|f| {
            end += 5_000 + key(&[f]) % 10_001;
            end
        });
        Self {
            ends: ends.collect(),
        }
    }
}

impl Documents for Simulated {
    fn n_docs(&self) -> u64 {
        self.ends[self.ends.len() - 1]
    }

    fn tokens(&self, doc: u64) -> Result<Tokens, DataError> {
        Ok(Tokens::Owned(
            vec![1; 50 + (key(&[doc]) % 500) as usize].into(),
        ))
    }

    fn locate(&self, doc: u64) -> (String, u64) {
        let file = self.ends.partition_point(|&end| end <= doc);
        (
            format!("file-{file}"),
            doc - if file == 0 { 0 } else { self.ends[file - 1] },
        )
    }

    fn fingerprint(&self) -> String {
        "simulated".into()
    }
}

/// Start, resume, bytes per shard.
fn start() -> Result<(f64, f64, f64), DataError> {
    let begin = Instant::now();
    let mut loader = pipeline(Simulated::new(), spec(2048, 1024, 2))?;
    loader.next(8)?;
    let start = begin.elapsed().as_secs_f64();
    loader.next(1024)?;
    let json =
        serde_json::to_string(&loader.state()).map_err(|e| DataError::State(e.to_string()))?;
    let begin = Instant::now();
    let state = serde_json::from_str(&json).map_err(|e| DataError::State(e.to_string()))?;
    let mut again = pipeline(Simulated::new(), spec(2048, 1024, 2))?;
    again.restore(&state)?;
    again.next(8)?;
    Ok((
        start,
        begin.elapsed().as_secs_f64(),
        json.len() as f64 / 1024.0,
    ))
}

fn tasks() -> Result<Vec<(String, f64)>, DataError> {
    use marimba_dsl::data::{Mqar, RecallGaps};
    let all = [
        Data::Mqar(Mqar {
            n_pairs: Some(64),
            ..Mqar::default()
        }),
        Data::InContextRecall(Default::default()),
        Data::NoisyRecall(Default::default()),
        Data::FuzzyRecall(Default::default()),
        Data::RecallGaps(RecallGaps {
            gaps: vec![0, 64],
            ..RecallGaps::default()
        }),
        Data::Memorization(Default::default()),
        Data::Compression(Default::default()),
        Data::SelectiveCopying(Default::default()),
        Data::Copying(Default::default()),
        Data::Induction(Default::default()),
        Data::Parity(Default::default()),
        Data::StateTracking(Default::default()),
        Data::Phonebook(Default::default()),
    ];
    let rate = |data: &Data| {
        let mut loader = RowLoader::new(Task::from_data(data, 256, 1)?, Worker::ALL);
        let rate = best(5, Clock::core(), || {
            for _ in 0..20 {
                std::hint::black_box(loader.next(64)?);
            }
            Ok(20 * 64 * 256)
        })?;
        Ok((data.kind().to_owned(), rate))
    };
    all.iter().map(rate).collect()
}
