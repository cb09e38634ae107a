//! What a run may read: parameters of corpora and synthetic tasks, as written in RON and, after `check`, with all defaults filled.
//!
//! Generators and readers live above; here are only meanings, defaults and ranges. Letters: V vocabulary, T tokens of a row.
//! Fields that are `Option` because their default depends on the run are `Some` in a checked run: `seq_len` (the phase's), `seed`
//! (the run's), `vocab_size` of tasks that can have any (the model's).

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A source of rows. Closed: adding one makes the compiler print the to-do list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Data {
    /// Text files, tokenised on the fly.
    Text(Text),
    /// Prepared token shards.
    Tokens(Tokens),
    /// Several sources, drawn by weight: `Mixture(parts: [(weight: 0.7, data: Text(path: "a")), ..])`.
    Mixture(Mixture),
    /// Multi-query associative recall.
    Mqar(Mqar),
    /// In-context recall (MAD).
    InContextRecall(Recall),
    /// In-context recall between noise tokens (MAD).
    NoisyRecall(NoisyRecall),
    /// In-context recall of motifs (MAD).
    FuzzyRecall(FuzzyRecall),
    /// Recall across a stretch of noise of known length.
    RecallGaps(RecallGaps),
    /// A fixed key-value map, learned by heart (MAD).
    Memorization(Memorization),
    /// Reproduce a row from its last hidden state (MAD).
    Compression(Compression),
    /// Copy the tokens between blanks (MAD).
    SelectiveCopying(SelectiveCopying),
    /// Copy a string after a separator.
    Copying(Copying),
    /// What followed the special token's first occurrence?
    Induction(Induction),
    /// Parity of the bits so far.
    Parity(Parity),
    /// Product of permutations of five things so far.
    StateTracking(StateTracking),
    /// Look a number up in a phone book.
    Phonebook(Phonebook),
}

/// What an unreadable document does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnBad {
    /// Stop with the error.
    #[default]
    #[serde(alias = "stop")]
    Stop,
    /// Count it, log it with file and offset, go on.
    #[serde(alias = "skip")]
    Skip,
}

/// The order of a logical shard's documents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// A keyed permutation, a new one every epoch.
    #[default]
    #[serde(alias = "default")]
    Default,
    /// The linear congruential order of IBM's fms-fsdp loader, the same in every epoch.
    #[serde(alias = "fms_v1")]
    FmsV1,
    /// As stored.
    #[serde(alias = "sequential")]
    Sequential,
}

/// How documents are read, where it was said; `None` is the default that each field states.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// L, logical shards.
    pub lanes: Option<u32>,
    /// Rows per shuffle block.
    pub window: Option<u64>,
    /// Order within a shard.
    pub order: Option<Order>,
    /// What an unreadable document does.
    pub on_bad: Option<OnBad>,
    /// Framed tokens that a document has at least.
    pub min_length: Option<u64>,
    /// Before every document.
    pub bos: Option<u32>,
    /// After every document.
    pub eos: Option<u32>,
    /// Taken off a document's ends before framing.
    pub strip: Vec<u32>,
}

impl Reading {
    /// Names of the fields that were said.
    pub fn said(&self) -> Vec<&'static str> {
        let all = [
            ("lanes", self.lanes.is_some()),
            ("window", self.window.is_some()),
            ("order", self.order.is_some()),
            ("on_bad", self.on_bad.is_some()),
            ("min_length", self.min_length.is_some()),
            ("bos", self.bos.is_some()),
            ("eos", self.eos.is_some()),
            ("strip", !self.strip.is_empty()),
        ];
        all.iter()
            .filter(|(_, said)| *said)
            .map(|(name, _)| *name)
            .collect()
    }
}

/// Fields that all sources of documents have in common. In a member of a mixture they are left out: the mixture says them for all.
macro_rules! documents {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $ty:ty = $default:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $($(#[$fdoc])* pub $field: $ty,)*
            /// Logical shards, 1 to 2^20: independent streams of rows, of which each worker reads its share. A number that the worker counts
            /// of the run divide spares reading twice. Default: one for 64 documents, a power of two, at most 1024.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub lanes: Option<u32>,
            /// Rows of a logical shard that are shuffled together, 1 (none) to 2^20. Default 8.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub window: Option<u64>,
            /// Order of documents. Default `Default`.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub order: Option<Order>,
            /// What an unreadable document does: `Stop` or `Skip`. Default `Stop`.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub on_bad: Option<OnBad>,
            /// Documents with fewer tokens, delimiters included, are left out; empty ones always are. Default 0.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub min_length: Option<u64>,
            /// Token put before every document. Default none.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub bos: Option<u32>,
            /// Token put after every document. Default: the one of the tokenizer or of the shards, if they have one.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub eos: Option<u32>,
            /// Tokens taken off the first and last place of a document that brings its own delimiters. Default none.
            #[serde(skip_serializing_if = "Vec::is_empty")]
            pub strip: Vec<u32>,
            /// Decides the order. Default: the run's seed.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub seed: Option<u64>,
        }

        impl Default for $name {
            fn default() -> Self {
                $name {
                    $($field: $default,)*
                    lanes: None, window: None, order: None, on_bad: None, min_length: None,
                    bos: None, eos: None, strip: Vec::new(), seed: None,
                }
            }
        }

        impl $name {
            /// The fields that all sources of documents have.
            pub fn reading(&self) -> Reading {
                Reading {
                    lanes: self.lanes,
                    window: self.window,
                    order: self.order,
                    on_bad: self.on_bad,
                    min_length: self.min_length,
                    bos: self.bos,
                    eos: self.eos,
                    strip: self.strip.clone(),
                }
            }
        }
    };
}

documents! {
    /// Several sources of documents, drawn by weight.
    Mixture {
        /// The sources. Required.
        parts: Vec<Part> = Vec::new(),
        /// Other weights from some point on, in order. Default none. Another phase of the run changes everything else as well, and starts anew.
        schedule: Vec<Shift> = Vec::new(),
    }
}

/// One source of a mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Share of tokens, relative to the other weights. Above 0.
    pub weight: f64,
    /// The source: `Text`, `Tokens` or a synthetic task, whose examples are rows of their own between the packed ones.
    pub data: Data,
}

/// A change of weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shift {
    /// Tokens of the phase, of all workers, after which it comes: a step has `batch x accumulate x workers x seq_len`. Above 0, increasing.
    pub after_tokens: u64,
    /// One weight per part, relative, 0 or more; 0 leaves the part out.
    pub weights: Vec<f64>,
}

documents! {
    /// Files of text, or of tokens that the tokenizer's vocabulary holds: plain, JSON Lines (also gzip, zstd), Parquet, Arrow, Megatron.
    Text {
        /// A file, a folder of files (relative to the file that says so), or a URL of an object store. Required. Absolute or relative to
        /// the current folder after `check`.
        path: PathBuf = PathBuf::new(),
        /// How text becomes tokens. Default bytes (V = 256). Plain text in bytes is cut into rows anywhere, unless a field below says how
        /// documents are read.
        tokenizer: Tokenizer = Tokenizer::Bytes,
        /// The column or field that holds documents. Default: `text`, `contents`, `content`, `tokens` or `input_ids`, the first there is.
        column: Option<String> = None,
        /// Part of each file, from its end, kept for validation, 0 to below 1. Default 0.05.
        valid_fraction: f64 = 0.05,
        /// At most this many validation rows. Default 1000.
        valid_rows: u64 = 1000,
        /// Accept bytes that are not UTF-8 (bytes tokenizer only). Default false.
        raw_bytes: bool = false,
    }
}

/// How text becomes tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tokenizer {
    /// One token a byte, V = 256.
    #[default]
    Bytes,
    /// A Hugging Face `tokenizer.json`, by path.
    File(PathBuf),
}

documents! {
    /// Prepared token shards with a manifest.
    Tokens {
        /// The folder, or its URL. Required.
        path: PathBuf = PathBuf::new(),
        /// Part of the documents kept for validation, 0 to below 1. Default 0.01.
        valid_fraction: f64 = 0.01,
        /// At most this many validation rows. Default 1000.
        valid_rows: u64 = 1000,
    }
}

/// Multi-query associative recall (Zoology, arXiv 2312.04927). K keys of [1, V/2) and values of [V/2, V) in pairs, then queries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mqar {
    /// V, even, above T. Default 8192.
    pub vocab_size: usize,
    /// T, even. Default: the phase's `seq_len`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq_len: Option<usize>,
    /// K of the only training cell; 4 K <= T. Default 4; ignored when `train` is given. `train` holds it after `check`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_pairs: Option<usize>,
    /// Training cells, drawn by weight.
    pub train: Vec<MqarCell>,
    /// Evaluation sets; default: one for each training cell.
    pub eval: Vec<MqarCell>,
    /// a of the query gaps' distribution x^(a-1), x = 1, 2, ...; above 0. Default 0.01: most queries come soon.
    pub power: f64,
    /// Fill the rest with random tokens instead of token 0. Default true.
    pub random_non_queries: bool,
    /// Keys that get a second value, of which the last counts (forgetting). Default 0.
    pub n_reassigned: usize,
    /// Keys of two tokens. Default false.
    pub composite_keys: bool,
    /// Training examples, after which they repeat in a new order. Default: never repeats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_train: Option<u64>,
    /// Rows of each evaluation set. Default 1000.
    pub n_eval: u64,
    /// Reproduce the reference where it differs. Default false.
    pub compat: bool,
    /// Decides the examples. Default: the run's seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

impl Default for Mqar {
    fn default() -> Self {
        Mqar {
            vocab_size: 8192,
            seq_len: None,
            n_pairs: None,
            train: Vec::new(),
            eval: Vec::new(),
            power: 0.01,
            random_non_queries: true,
            n_reassigned: 0,
            composite_keys: false,
            n_train: None,
            n_eval: 1000,
            compat: false,
            seed: None,
        }
    }
}

/// One size of MQAR.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MqarCell {
    /// K; 4 K <= T.
    pub n_pairs: usize,
    /// T of the cell, even, at most the data's. Default: the data's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq_len: Option<usize>,
    /// Relative frequency in training. Above 0. Default 1.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

/// Fields that all tasks of fixed examples have in common, with this task's defaults.
macro_rules! task {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $ty:ty = $default:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $($(#[$fdoc])* pub $field: $ty,)*
            /// T. Default: the phase's `seq_len`.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub seq_len: Option<usize>,
            /// Training examples, after which they repeat in a new order. Default: never repeats.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub n_train: Option<u64>,
            /// Rows of the evaluation set. Default 1280 (MAD).
            pub n_eval: u64,
            /// Reproduce the reference where it differs. Default false.
            pub compat: bool,
            /// Decides the examples. Default: the run's seed.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub seed: Option<u64>,
        }

        impl Default for $name {
            fn default() -> Self {
                $name { $($field: $default,)* seq_len: None, n_train: None, n_eval: 1280, compat: false, seed: None }
            }
        }
    };
}

task! {
    /// Pairs with replacement; the value of every key seen before is asked.
    Recall {
        /// V: keys [0, V/2), values [V/2, V). Even, 4 or more. Default 16.
        vocab_size: usize = 16,
    }
}
task! {
    /// As [`Recall`], with pairs replaced by noise.
    NoisyRecall {
        /// V, noise included. Default 32.
        vocab_size: usize = 32,
        /// Noise tokens, the last of V; below V - 3. Default 16.
        n_noise: usize = 16,
        /// Share of pairs replaced by noise, 0 to below 1. Default 0.2.
        noise_fraction: f64 = 0.2,
    }
}
task! {
    /// As [`Recall`], keys and values are motifs of several tokens.
    FuzzyRecall {
        /// V. Default 16.
        vocab_size: usize = 16,
        /// Longest motif, 1 or more. Default 3.
        max_motif: usize = 3,
    }
}
task! {
    /// Pairs, a stretch of noise, then all keys. Every gap is an evaluation set of its own, so that the score is known over the distance.
    RecallGaps {
        /// V: keys, values and noise, a third each; 3 (n_pairs + 1) or more. Default 96.
        vocab_size: usize = 96,
        /// Pairs, 1 or more; 3 n_pairs and the longest gap <= T. Default 8.
        n_pairs: usize = 8,
        /// Lengths of the noise, tokens; training rows draw one of them. Default: 0 and the powers of four that fit.
        gaps: Vec<usize> = Vec::new(),
    }
}
task! {
    /// Key, insert token: the value of a map that never changes.
    Memorization {
        /// V: keys, values and the insert token. Default 256.
        vocab_size: usize = 256,
    }
}
task! {
    /// Random tokens and a compression token, after which the row must be decoded from the last hidden state.
    Compression {
        /// V, the compression token included. Default 16.
        vocab_size: usize = 16,
    }
}
task! {
    /// Tokens between blanks, to be repeated in order.
    SelectiveCopying {
        /// V: tokens, blank and copy token. Default 16.
        vocab_size: usize = 16,
        /// Tokens to copy, 1 or more; 2 n_copy + 1 <= T. Default 16.
        n_copy: usize = 16,
    }
}
task! {
    /// A random string, a separator, the string again.
    Copying {
        /// V: tokens and separator. Default 32.
        vocab_size: usize = 32,
        /// Shortest string. Default 1.
        min_len: usize = 1,
        /// Longest string; 2 max_len + 1 <= T. Default: the longest that fits.
        max_len: Option<usize> = None,
    }
}
task! {
    /// A special token occurs twice; what followed it first must follow again (induction heads).
    Induction {
        /// V: tokens and the special one. Default 16.
        vocab_size: usize = 16,
    }
}
task! {
    /// Bits; every target is the parity so far. V = 2.
    Parity {
        /// Probability of a one, in (0, 1). Default 0.5.
        p_one: f64 = 0.5,
    }
}
task! {
    /// Permutations of `n` things as tokens; every target is their product so far (S5: V = 120, not solvable by shallow circuits).
    StateTracking {
        /// 2 to 5 things; V = n!. Default 5.
        n: usize = 5,
        /// Only swaps of neighbours as inputs. Default false.
        swaps_only: bool = false,
    }
}
task! {
    /// Names with numbers, then a name: what is its number? Training-size version of the phone book probe.
    Phonebook {
        /// V: digits, separators and name tokens. Default 128.
        vocab_size: usize = 128,
        /// Entries, 1 or more. Default: as many as fit.
        n_entries: Option<usize> = None,
        /// Tokens of a name, 1 or more. Default 2.
        name_len: usize = 2,
        /// Digits of a number, 1 or more. Default 7.
        n_digits: usize = 7,
        /// Ask before the book as well (reversed). Default false.
        reversed: bool = false,
    }
}

/// Whether a path is a URL (`s3://`, `gs://`, `az://`, `http://`, `https://`) and not a place on this machine.
pub fn is_url(path: &Path) -> bool {
    let text = path.to_string_lossy();
    ["s3://", "gs://", "az://", "http://", "https://"]
        .iter()
        .any(|scheme| text.starts_with(scheme))
}

impl Data {
    /// V that the rows need, where it is known without reading files.
    pub fn vocab_size(&self) -> Option<usize> {
        match self {
            Data::Text(t) => (t.tokenizer == Tokenizer::Bytes).then_some(256),
            Data::Tokens(_) => None,
            Data::Mixture(m) => m.parts.iter().filter_map(|p| p.data.vocab_size()).max(),
            Data::RecallGaps(d) => Some(d.vocab_size),
            Data::Mqar(d) => Some(d.vocab_size),
            Data::InContextRecall(d) => Some(d.vocab_size),
            Data::NoisyRecall(d) => Some(d.vocab_size),
            Data::FuzzyRecall(d) => Some(d.vocab_size),
            Data::Memorization(d) => Some(d.vocab_size),
            Data::Compression(d) => Some(d.vocab_size),
            Data::SelectiveCopying(d) => Some(d.vocab_size),
            Data::Copying(d) => Some(d.vocab_size),
            Data::Induction(d) => Some(d.vocab_size),
            Data::Parity(_) => Some(2),
            Data::StateTracking(d) => Some((1..=d.n.min(12)).product()),
            Data::Phonebook(d) => Some(d.vocab_size),
        }
    }

    /// Name of the kind, as in RON.
    pub fn kind(&self) -> &'static str {
        match self {
            Data::Text(_) => "Text",
            Data::Tokens(_) => "Tokens",
            Data::Mixture(_) => "Mixture",
            Data::Mqar(_) => "Mqar",
            Data::InContextRecall(_) => "InContextRecall",
            Data::NoisyRecall(_) => "NoisyRecall",
            Data::FuzzyRecall(_) => "FuzzyRecall",
            Data::RecallGaps(_) => "RecallGaps",
            Data::Memorization(_) => "Memorization",
            Data::Compression(_) => "Compression",
            Data::SelectiveCopying(_) => "SelectiveCopying",
            Data::Copying(_) => "Copying",
            Data::Induction(_) => "Induction",
            Data::Parity(_) => "Parity",
            Data::StateTracking(_) => "StateTracking",
            Data::Phonebook(_) => "Phonebook",
        }
    }
}
