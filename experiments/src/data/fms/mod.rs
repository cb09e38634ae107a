//! IBM's fms-fsdp loader, as far as a run that it began can be followed: its `loader_state_*.pth` files, and which documents a logical shard
//! gives next.
//!
//! What is reproduced: the fragments that a logical shard owns, the order of its files (CPython's shuffle), the order of documents in them
//! ([`FmsV1`], whose state goes on from file to file), and where in all this a saved state stands. What is not: which logical shard of a worker
//! gives the next document (`torch.multinomial`, whose random numbers depend on how PyTorch was built), and the contents of its shuffle buffer.
//! A checkpoint of that loader is therefore continued document by document of each logical shard, not row by row.
//!
//! Its defects stay in this order: every epoch is the same, and after a resume the rest of the epoch is exactly once but later epochs are not.

pub mod pickle;

use super::order::FmsV1;
use super::{DataError, place};
use pickle::Value;
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// Where one logical shard stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ShardState {
    /// Name of its dataset.
    pub dataset: String,
    /// Number of the logical shard among all of the dataset.
    pub shard: u64,
    /// Number, in the shard's walk through its files, of the document being read.
    pub docset_index: u64,
    /// Last chunk served of that document; `None` before the first.
    pub chunk_index: Option<u64>,
    /// Times that the walk began.
    pub epochs_seen: i64,
    /// Tokens given.
    pub tokens_seen: u64,
    /// Documents given, in all epochs.
    pub docs_seen: u64,
    /// State of the order, before the document being read.
    pub lcg_state: u64,
    /// Documents that the mixture over logical shards still expects in this epoch, where it was saved.
    pub docs_remaining: Option<u64>,
}

/// What the workers of one run saved at one step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LoaderStates {
    /// Number of files, which is the number of workers.
    pub workers: usize,
    /// Tokens given by dataset, over all workers, where datasets were mixed.
    pub tokens_by_dataset: Vec<u64>,
    /// All logical shards, dataset by dataset, in order.
    pub shards: Vec<ShardState>,
}

/// What a logical shard gives next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NextDocuments {
    /// The logical shard.
    pub shard: u64,
    /// Number of the file in sorted order, document in it; first the one being read.
    pub documents: Vec<(usize, u64)>,
}

/// Answer of `data fms-state`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What was saved.
    #[serde(flatten)]
    pub states: LoaderStates,
    /// What comes next, where document counts were given.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub next: Vec<NextDocuments>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.states.fmt(f)?;
        for n in &self.next {
            write!(f, "shard {} gives next (file:document):", n.shard)?;
            for (file, doc) in &n.documents {
                write!(f, " {file}:{doc}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for LoaderStates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} workers, {} logical shards",
            self.workers,
            self.shards.len()
        )?;
        for (i, tokens) in self.tokens_by_dataset.iter().enumerate() {
            writeln!(f, "dataset {i}: {tokens} tokens given")?;
        }
        for s in &self.shards {
            let chunk = s.chunk_index.map_or("none".into(), |c| c.to_string());
            writeln!(
                f,
                "{} shard {}: document {} of its walk, last chunk {chunk}, epoch {}, {} documents and {} tokens given, order at {}",
                s.dataset,
                s.shard,
                s.docset_index,
                s.epochs_seen,
                s.docs_seen,
                s.tokens_seen,
                s.lcg_state
            )?;
        }
        Ok(())
    }
}

impl LoaderStates {
    /// Reads all `loader_state_*.pth` of a checkpoint folder, or one file.
    ///
    /// # Errors
    /// [`DataError::NoFiles`], [`DataError::Damaged`], [`DataError::State`] for files that are no loader states or do not belong together.
    pub fn read(path: &Path) -> Result<Self, DataError> {
        let mut files: Vec<(u64, PathBuf)> = Vec::new();
        if path.is_dir() {
            for entry in std::fs::read_dir(path).map_err(DataError::io("read", path))? {
                let file = entry.map_err(DataError::io("read", path))?.path();
                let name = file
                    .file_name()
                    .map(|n| n.to_string_lossy().into_owned())
                    .unwrap_or_default();
                let rank = name
                    .strip_prefix("loader_state_")
                    .and_then(|r| r.strip_suffix(".pth"))
                    .and_then(|r| r.parse().ok());
                files.extend(rank.map(|rank: u64| (rank, file)));
            }
            files.sort();
            if let Some((i, (rank, _))) = (0..).zip(&files).find(|(i, (rank, _))| i != rank) {
                return Err(DataError::State(format!(
                    "{} has loader_state_{rank}.pth but no loader_state_{i}.pth; expected one of every worker",
                    path.display()
                )));
            }
        } else if place::exists(path)? {
            files.push((0, path.into()));
        }
        if files.is_empty() {
            return Err(DataError::NoFiles {
                path: path.into(),
                expected: "loader_state_0.pth, loader_state_1.pth, ... of fms-fsdp",
            });
        }
        let mut out = Self {
            workers: files.len(),
            ..Self::default()
        };
        for (rank, (_, file)) in files.iter().enumerate() {
            let state = pickle::read_torch(file)?;
            out.add(rank as u64, &state).map_err(|what| {
                DataError::State(format!(
                    "{} is no loader state of fms-fsdp: {what}",
                    file.display()
                ))
            })?;
        }
        out.shards.sort_by_key(|s| s.shard);
        // A stable sort: datasets keep the order in which the first worker has them.
        let names: Vec<String> = out.shards.iter().map(|s| s.dataset.clone()).collect();
        let first = |name: &str| names.iter().position(|n| n == name);
        out.shards.sort_by_key(|s| first(&s.dataset));
        Ok(out)
    }

    /// The next `n` documents (file, document in it) of each logical shard of `dataset`, whose files have `docs` documents each.
    ///
    /// # Errors
    /// [`DataError::State`] for a dataset that the state does not name, or that has fewer documents than were walked through.
    pub fn next_documents(
        &self,
        dataset: &str,
        docs: &[u64],
        seed: u64,
        n: usize,
    ) -> Result<Vec<NextDocuments>, DataError> {
        let shards = || self.shards.iter().filter(|s| s.dataset == dataset);
        let of = shards().count() as u64;
        if of == 0 {
            return Err(DataError::State(format!(
                "the state has no dataset {dataset}; expected one that it names"
            )));
        }
        let next = |s: &ShardState| {
            let walk = walk(docs, s.shard, of, seed)?;
            let total = walk.iter().map(|f| f.len).sum::<u64>();
            if s.docset_index >= total.max(1) {
                return Err(DataError::State(format!(
                    "shard {} stands at document {} of {total}; expected the counts of the run's files",
                    s.shard, s.docset_index
                )));
            }
            let reading = Reading::resumed(walk, s.shard, seed, s.docset_index, s.lcg_state);
            Ok(NextDocuments {
                shard: s.shard,
                documents: reading.take(n).collect(),
            })
        };
        shards().map(next).collect()
    }

    /// One worker's file: a flat dictionary `Class.field`, with the states of inner loaders in lists.
    fn add(&mut self, rank: u64, state: &Value) -> Result<(), String> {
        if let Some(tokens) = field(state, "Sampling", "tokens_seen") {
            let tokens = numbers(&tokens)?;
            self.tokens_by_dataset.resize(tokens.len(), 0);
            for (sum, t) in self.tokens_by_dataset.iter_mut().zip(tokens) {
                *sum += t;
            }
        }
        if let Some(inner) = field(state, "Sampling", "sample_iterator_states") {
            for one in items(&inner)? {
                self.add_dataset(rank, &one)?;
            }
            return Ok(());
        }
        self.add_dataset(rank, state)
    }

    fn add_dataset(&mut self, rank: u64, state: &Value) -> Result<(), String> {
        let Some(inner) = field(state, "ScalableShard", "logical_shard_states") else {
            // One shard a worker.
            self.shards.push(shard(state, rank, None)?);
            return Ok(());
        };
        let inner = items(&inner)?;
        let remaining = field(state, "ScalableShard", "n_docs_remaining");
        let remaining = remaining.map(|r| numbers(&r)).transpose()?;
        let per_worker = inner.len() as u64;
        for (i, one) in inner.iter().enumerate() {
            let left = remaining.as_ref().and_then(|r| r.get(i).copied());
            let number = rank * per_worker + i as u64;
            self.shards.push(shard(one, number, left)?);
        }
        Ok(())
    }
}

/// The field of a layer; layers are called `NameDataset` or, in early versions, `Name_Dataset`.
fn field(state: &Value, layer: &str, name: &str) -> Option<Value> {
    let snake: String = layer
        .char_indices()
        .flat_map(|(i, c)| {
            (i > 0 && c.is_uppercase())
                .then_some('_')
                .into_iter()
                .chain([c])
        })
        .collect();
    [
        format!("{layer}Dataset.{name}"),
        format!("{snake}_Dataset.{name}"),
    ]
    .iter()
    .find_map(|key| state.get(key))
}

fn items(value: &Value) -> Result<Vec<Value>, String> {
    value
        .items()
        .ok_or_else(|| format!("{} where a list was expected", value.kind()))
}

fn numbers(value: &Value) -> Result<Vec<u64>, String> {
    let one = |v: &Value| v.int().and_then(|n| u64::try_from(n).ok());
    let list: Option<Vec<u64>> = items(value)?.iter().map(one).collect();
    list.ok_or_else(|| "a count is negative or no whole number".into())
}

fn shard(state: &Value, number: u64, docs_remaining: Option<u64>) -> Result<ShardState, String> {
    let int = |name: &str| {
        field(state, "StreamingDoc", name)
            .and_then(|v| v.int())
            .ok_or_else(|| format!("no whole number StreamingDocDataset.{name}"))
    };
    let count = |name: &str| {
        let n = int(name)?;
        u64::try_from(n).map_err(|_| format!("StreamingDocDataset.{name} is {n}"))
    };
    let dataset = field(state, "StreamingDoc", "dataset").and_then(|v| v.text());
    Ok(ShardState {
        dataset: dataset.unwrap_or_default(),
        shard: number,
        docset_index: count("docset_index")?,
        chunk_index: u64::try_from(int("chunk_index")?).ok(),
        epochs_seen: int("epochs_seen")?,
        tokens_seen: count("tokens_seen")?,
        docs_seen: count("docs_seen")?,
        lcg_state: count("lcg_state")?,
        docs_remaining,
    })
}

/// Documents of one file that a logical shard owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Fragment {
    /// Number of the file, in sorted order.
    pub file: usize,
    /// First document.
    pub start: u64,
    /// Number of documents.
    pub len: u64,
}

/// What logical shard `shard` of `shards` owns of files with `docs` documents each, in the order in which it walks through them.
///
/// Every file is cut into as many fragments as there are logical shards, and each owns as many fragments in a row as there are files.
/// Fragments of one file are joined, even with a gap of none, and the files are shuffled as CPython does from `seed + shard`.
///
/// # Errors
/// [`DataError::Parameter`] unless `shard < shards`.
pub fn walk(docs: &[u64], shard: u64, shards: u64, seed: u64) -> Result<Vec<Fragment>, DataError> {
    if shard >= shards {
        return Err(DataError::Parameter(format!(
            "logical shard {shard} of {shards}; numbers go from 0 to one less"
        )));
    }
    let files = docs.len() as u64;
    let mut owned: Vec<Fragment> = Vec::new();
    for i in shard * files..(shard + 1) * files {
        let (file, fragment) = ((i / shards) as usize, u128::from(i % shards));
        let n = u128::from(docs[file]);
        let start = (n * fragment / u128::from(shards)) as u64;
        let end = ((n * fragment + n) / u128::from(shards)) as u64;
        match owned.last_mut() {
            Some(last) if last.file == file => last.len = end - last.start,
            _ => owned.push(Fragment {
                file,
                start,
                len: end - start,
            }),
        }
    }
    let order = shuffled(owned.len(), seed.wrapping_add(shard));
    Ok(order.into_iter().map(|i| owned[i]).collect())
}

/// Files and documents in the order in which a logical shard reads them, endlessly, as a process of the reference does that begins here.
///
/// It goes round from where it began; the order's state goes on over files and over the end of the walk, and is set back with every round. So
/// epochs of a run that was never stopped are alike, and after a resume the rounds no longer are what they were: the rest of the epoch is exactly
/// once, later ones need not be. Documents are taken as not empty: on an empty one the reference would not advance the order.
pub struct Reading {
    walk: Vec<Fragment>,
    shard: u64,
    seed: u64,
    begin: (u64, u64),
    /// Documents given in this round.
    given: u64,
    total: u64,
    lcg_state: u64,
}

impl Reading {
    /// From the start of a run.
    pub fn new(walk: Vec<Fragment>, shard: u64, seed: u64) -> Self {
        Self::resumed(walk, shard, seed, 0, shard.wrapping_add(seed))
    }

    /// From a saved state: first comes the document that was being read.
    pub fn resumed(
        walk: Vec<Fragment>,
        shard: u64,
        seed: u64,
        docset_index: u64,
        lcg_state: u64,
    ) -> Self {
        let total = walk.iter().map(|f| f.len).sum();
        Self {
            walk,
            shard,
            seed,
            begin: (docset_index, lcg_state),
            given: 0,
            total,
            lcg_state,
        }
    }

    /// `docset_index` and `lcg_state` that a state saved now has.
    pub fn state(&self) -> (u64, u64) {
        let at = (self.begin.0 + self.given) % self.total.max(1);
        (at, self.lcg_state)
    }
}

impl Iterator for Reading {
    /// File, document in it.
    type Item = (usize, u64);

    fn next(&mut self) -> Option<Self::Item> {
        if self.total == 0 {
            return None;
        }
        if self.given == self.total {
            (self.given, self.lcg_state) = (0, self.begin.1);
        }
        let mut left = self.state().0;
        let fragment = self.walk.iter().find(|f| {
            let here = left < f.len;
            left -= if here { 0 } else { f.len };
            here
        })?;
        let mut order = FmsV1::resumed(fragment.len, self.shard, self.seed, self.lcg_state);
        let doc = order.next()?;
        self.lcg_state = order.state();
        self.given += 1;
        Some((fragment.file, fragment.start + doc))
    }
}

/// `list(range(n))` after `random.seed(seed)` and `random.shuffle` of CPython 3.2 and later.
pub fn shuffled(n: usize, seed: u64) -> Vec<usize> {
    let mut twister = Twister::seeded(seed);
    let mut list: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        list.swap(i, twister.below(i as u64 + 1) as usize);
    }
    list
}

/// The Mersenne Twister MT19937 (Matsumoto and Nishimura 1998), seeded by an array as CPython seeds it by an integer.
struct Twister {
    state: [u32; Self::N],
    at: usize,
}

impl Twister {
    const N: usize = 624;
    const M: usize = 397;

    fn seeded(seed: u64) -> Self {
        let key = match (seed as u32, (seed >> 32) as u32) {
            (low, 0) => vec![low],
            (low, high) => vec![low, high],
        };
        let mut s = [0u32; Self::N];
        s[0] = 19_650_218;
        for i in 1..Self::N {
            let before = s[i - 1] ^ s[i - 1] >> 30;
            s[i] = before.wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        let (mut i, mut j) = (1, 0);
        let step = |s: &mut [u32; Self::N], i: &mut usize| {
            *i += 1;
            if *i == Self::N {
                s[0] = s[Self::N - 1];
                *i = 1;
            }
        };
        for _ in 0..Self::N.max(key.len()) {
            let before = s[i - 1] ^ s[i - 1] >> 30;
            let mixed = s[i] ^ before.wrapping_mul(1_664_525);
            s[i] = mixed.wrapping_add(key[j]).wrapping_add(j as u32);
            step(&mut s, &mut i);
            j = (j + 1) % key.len();
        }
        for _ in 1..Self::N {
            let before = s[i - 1] ^ s[i - 1] >> 30;
            s[i] = (s[i] ^ before.wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            step(&mut s, &mut i);
        }
        s[0] = 1 << 31;
        Self {
            state: s,
            at: Self::N,
        }
    }

    fn next(&mut self) -> u32 {
        if self.at == Self::N {
            for i in 0..Self::N {
                let y = self.state[i] & 1 << 31 | self.state[(i + 1) % Self::N] & !(1 << 31);
                let twist = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + Self::M) % Self::N] ^ y >> 1 ^ twist;
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= y << 7 & 0x9d2c_5680;
        y ^= y << 15 & 0xefc6_0000;
        y ^ y >> 18
    }

    /// As `Random._randbelow`: as many bits as `n` has, again until they are below it.
    fn below(&mut self, n: u64) -> u64 {
        let bits = 64 - n.leading_zeros();
        loop {
            let drawn = if bits <= 32 {
                u64::from(self.next() >> (32 - bits))
            } else {
                let low = u64::from(self.next());
                low | u64::from(self.next() >> (64 - bits)) << 32
            };
            if drawn < n {
                return drawn;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn files_are_shuffled_as_cpython_does() {
        // random.seed(seed); random.shuffle(list(range(n))) of CPython 3.11.
        assert_eq!(shuffled(10, 42), [7, 3, 2, 8, 5, 6, 9, 4, 0, 1]);
        assert_eq!(shuffled(7, 2023), [0, 2, 1, 4, 6, 5, 3]);
        let twenty = [
            5, 2, 0, 1, 13, 4, 11, 7, 18, 6, 8, 12, 9, 15, 14, 19, 17, 16, 10, 3,
        ];
        assert_eq!(shuffled(20, 2026), twenty);
        let beyond_32_bits = [9, 6, 8, 11, 3, 1, 10, 5, 0, 4, 7, 2];
        assert_eq!(shuffled(12, (1 << 32) + 5), beyond_32_bits);
        assert_eq!(shuffled(1, 5), [0]);
    }

    #[test]
    fn logical_shards_own_each_document_once_and_walk_through_all() {
        let docs = [10, 100, 3, 0, 57];
        for shards in [1u64, 2, 5, 7, 64] {
            let mut seen = BTreeSet::new();
            for shard in 0..shards {
                let walk = walk(&docs, shard, shards, 2023).expect("in range");
                let n: u64 = walk.iter().map(|f| f.len).sum();
                let one: Vec<_> = Reading::new(walk.clone(), shard, 2023)
                    .take(n as usize)
                    .collect();
                assert!(one.iter().all(|&(f, d)| d < docs[f]));
                assert!(one.iter().all(|x| seen.insert(*x)), "owned twice");
                let two: Vec<_> = Reading::new(walk, shard, 2023)
                    .take(2 * n as usize)
                    .collect();
                assert_eq!(one, two[n as usize..], "the reference's epochs are alike");
            }
            assert_eq!(seen.len() as u64, docs.iter().sum::<u64>());
        }
        assert!(walk(&docs, 3, 3, 0).is_err());
    }

    /// The reference itself was run at every resume point of these sets of files (seed 42, rank 0): the rest of the epoch was always right, the
    /// epoch after it wrong at so many points.
    #[test]
    fn a_saved_state_is_continued_with_the_reference_s_defects() {
        let found = [
            (&[10u64, 100][..], 99),
            (&[7, 20, 5], 19),
            (&[3, 33, 12], 32),
            (&[5, 70, 9, 130], 0),
        ];
        for (docs, want) in found {
            let walk = walk(docs, 0, 1, 42).expect("in range");
            let total = docs.iter().sum::<u64>() as usize;
            let all: Vec<_> = Reading::new(walk.clone(), 0, 42).take(total).collect();
            let (mut reading, mut later_wrong) = (Reading::new(walk.clone(), 0, 42), 0);
            for k in 0..total {
                let (at, lcg_state) = reading.state();
                let resumed = Reading::resumed(walk.clone(), 0, 42, at, lcg_state);
                let two: Vec<_> = resumed.take(2 * total).collect();
                assert_eq!(two[..total - k], all[k..], "the rest of the epoch");
                let next: BTreeSet<_> = two[total - k..2 * total - k].iter().collect();
                later_wrong += usize::from(next.len() < total);
                reading.next();
            }
            assert_eq!(later_wrong, want, "{docs:?}");
        }
    }

    #[test]
    fn states_of_several_workers_come_together() {
        let dir = tempfile::tempdir().expect("dir");
        // Made by torch.save of PyTorch 2.15 of what two workers with two logical shards of two datasets hold.
        let fixture = |name: &str| {
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("testdata")
                .join(name)
        };
        for rank in 0..2 {
            let name = format!("loader_state_{rank}.pth");
            std::fs::copy(fixture(&name), dir.path().join(&name)).expect("copied");
        }
        let states = LoaderStates::read(dir.path()).expect("reads");
        assert_eq!((states.workers, states.shards.len()), (2, 8));
        assert_eq!(states.tokens_by_dataset, [3000, 500]);
        let names: Vec<_> = states
            .shards
            .iter()
            .map(|s| (s.dataset.as_str(), s.shard))
            .collect();
        let want = [
            ("c4", 0),
            ("c4", 1),
            ("c4", 2),
            ("c4", 3),
            ("wiki", 0),
            ("wiki", 1),
            ("wiki", 2),
            ("wiki", 3),
        ];
        assert_eq!(names, want);
        let one = ShardState {
            dataset: "wiki".into(),
            shard: 3,
            docset_index: 113,
            chunk_index: None,
            epochs_seen: -1,
            tokens_seen: 1130,
            docs_seen: 13,
            lcg_state: 2026,
            docs_remaining: Some(93),
        };
        assert_eq!(states.shards[7], one);
        assert_eq!(states.shards[0].chunk_index, Some(2));
        let next = states
            .next_documents("c4", &[500, 700], 2023, 3)
            .expect("enough documents");
        assert_eq!(
            (next.len(), next[3].shard, next[3].documents.len()),
            (4, 3, 3)
        );
        assert!(states.next_documents("c4", &[10], 2023, 3).is_err());
        assert!(states.next_documents("c5", &[500], 2023, 3).is_err());
        std::fs::remove_file(dir.path().join("loader_state_0.pth")).expect("removed");
        let gap = LoaderStates::read(dir.path()).expect_err("a gap");
        assert!(gap.to_string().contains("no loader_state_0.pth"), "{gap}");
        assert!(matches!(
            LoaderStates::read(&dir.path().join("none")),
            Err(DataError::NoFiles { .. })
        ));
    }
}
