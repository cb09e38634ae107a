//! What a run may read: parameters of corpora and synthetic tasks, as written in RON and, after `check`, with all defaults filled.
//!
//! Generators and readers live above; here are only meanings, defaults and ranges. Letters: V vocabulary, T tokens of a row.
//! Fields that are `Option` because their default depends on the run are `Some` in a checked run: `seq_len` (the phase's), `seed`
//! (the run's), `vocab_size` of tasks that can have any (the model's).

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A source of rows. Closed: adding one makes the compiler print the to-do list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Data {
    /// Text files, tokenised on the fly.
    Text(Text),
    /// Prepared token shards.
    Tokens(Tokens),
    /// Several sources, drawn by weight: `Mixture([(weight: 0.7, data: Text(path: "a")), ..])`.
    Mixture(Vec<Part>),
    /// Multi-query associative recall.
    Mqar(Mqar),
    /// In-context recall (MAD).
    InContextRecall(Recall),
    /// In-context recall between noise tokens (MAD).
    NoisyRecall(NoisyRecall),
    /// In-context recall of motifs (MAD).
    FuzzyRecall(FuzzyRecall),
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

/// One source of a mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Share of tokens, relative to the other weights. Above 0.
    pub weight: f64,
    /// The source; not itself a mixture.
    pub data: Data,
}

/// Text files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Text {
    /// A file or a folder of files, relative to the file that says so. Required. Absolute or relative to the current folder after `check`.
    pub path: PathBuf,
    /// How text becomes tokens. Default bytes (V = 256).
    pub tokenizer: Tokenizer,
    /// Part of each file, from its end, kept for validation, 0 to below 1. Default 0.05.
    pub valid_fraction: f64,
    /// At most this many validation rows. Default 1000.
    pub valid_rows: u64,
    /// Accept bytes that are not UTF-8 (bytes tokenizer only). Default false.
    pub raw_bytes: bool,
    /// Decides the order. Default: the run's seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

impl Default for Text {
    fn default() -> Self {
        Text {
            path: PathBuf::new(),
            tokenizer: Tokenizer::Bytes,
            valid_fraction: 0.05,
            valid_rows: 1000,
            raw_bytes: false,
            seed: None,
        }
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

/// Prepared token shards with a manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tokens {
    /// The folder. Required.
    pub path: PathBuf,
    /// Part of the documents kept for validation, 0 to below 1. Default 0.01.
    pub valid_fraction: f64,
    /// At most this many validation rows. Default 1000.
    pub valid_rows: u64,
    /// Decides the order. Default: the run's seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

impl Default for Tokens {
    fn default() -> Self {
        Tokens {
            path: PathBuf::new(),
            valid_fraction: 0.01,
            valid_rows: 1000,
            seed: None,
        }
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

impl Data {
    /// V that the rows need, where it is known without reading files.
    pub fn vocab_size(&self) -> Option<usize> {
        match self {
            Data::Text(t) => (t.tokenizer == Tokenizer::Bytes).then_some(256),
            Data::Tokens(_) => None,
            Data::Mixture(parts) => parts.iter().filter_map(|p| p.data.vocab_size()).max(),
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
