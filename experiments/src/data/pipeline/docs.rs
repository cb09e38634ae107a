//! Stage 1: the documents of one dataset that one lane sees, in order, epoch after epoch.
//!
//! A dataset of n documents is cut into S contiguous shards, S the largest divisor of the number of lanes L that leaves every shard
//! [`MIN_SHARD_DOCS`] documents. Lane l reads shard `l % S` together with L / S - 1 others: of the shard's endless order
//! (epoch 0, epoch 1, ...) it takes one place of each group of L / S, k = 0, 1, ... So every place is read by exactly one lane, whatever n
//! and L are, and a shard's epoch is exactly once each document.
//!
//! State: documents drawn. The k-th document and the place of a document are closed forms ([`Shards::place`], [`Shards::find`]).

use super::{OnBad, Stage};
use crate::data::DataError;
use crate::data::order::{FmsV1, OrderMode, Permutation};
use crate::data::rng::key;
use crate::data::source::{Documents, Tokens};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Documents a shard has at least, unless the dataset has fewer.
pub const MIN_SHARD_DOCS: u64 = 16;

/// How one dataset's documents are spread over lanes, and in which order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shards {
    /// Number in the mixture.
    pub dataset: u32,
    /// n, documents used for training: numbers `0..n`.
    pub n_docs: u64,
    /// L.
    pub lanes: u32,
    /// S.
    pub shards: u32,
    /// Which order.
    pub mode: OrderMode,
    /// Decides the order.
    pub seed: u64,
}

/// A place in the endless order of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which shard.
    pub shard: u32,
    /// Which epoch of the shard.
    pub epoch: u64,
    /// Which document of the dataset.
    pub doc: u64,
}

impl Shards {
    /// Chooses S.
    pub fn new(dataset: u32, n_docs: u64, lanes: u32, mode: OrderMode, seed: u64) -> Self {
        let fits = |s: &u32| {
            lanes.is_multiple_of(*s) && (*s == 1 || n_docs / u64::from(*s) >= MIN_SHARD_DOCS)
        };
        let shards = (1..=lanes).rev().find(fits).unwrap_or(1);
        Self {
            dataset,
            n_docs,
            lanes,
            shards,
            mode,
            seed,
        }
    }

    /// The documents of shard `shard`.
    pub fn range(&self, shard: u32) -> std::ops::Range<u64> {
        let cut =
            |s: u32| (u128::from(self.n_docs) * u128::from(s) / u128::from(self.shards)) as u64;
        cut(shard)..cut(shard + 1)
    }

    /// Lanes that share a shard.
    pub fn sharing(&self) -> u64 {
        u64::from(self.lanes / self.shards)
    }

    fn permutation(&self, shard: u32, epoch: u64) -> Permutation {
        let range = self.range(shard);
        Permutation::new(
            range.end - range.start,
            &[self.seed, u64::from(self.dataset), u64::from(shard), epoch],
        )
    }

    /// Shard and place number of the `k`-th document of lane `lane`. The lanes of a shard take turns by a rotation that `k`
    /// decides, so that in an order that every epoch repeats no lane sees the same documents for ever.
    fn number(&self, lane: u32, k: u64) -> (u32, u64) {
        let (shard, sharing) = (lane % self.shards, self.sharing());
        let turn = (u64::from(lane / self.shards) + self.rotation(shard, k)) % sharing;
        (shard, k * sharing + turn)
    }

    fn rotation(&self, shard: u32, k: u64) -> u64 {
        match self.sharing() {
            1 => 0,
            c => key(&[self.seed, 3, u64::from(self.dataset), u64::from(shard), k]) % c,
        }
    }

    /// Where the `k`-th document of lane `lane` lies. Closed form, except in mode `fms_v1`.
    pub fn place(&self, lane: u32, k: u64) -> Place {
        Walk::new(*self, lane).place(k)
    }

    /// Lane and number in it (`k`) at which document `doc` comes in `epoch` of its shard; the inverse of [`Shards::place`].
    pub fn find(&self, doc: u64, epoch: u64) -> Option<(u32, u64)> {
        if doc >= self.n_docs {
            return None;
        }
        let guess = (u128::from(doc) * u128::from(self.shards) / u128::from(self.n_docs)) as u32;
        let shard = (guess.saturating_sub(1)..=guess + 1)
            .find(|&s| s < self.shards && self.range(s).contains(&doc))?;
        let range = self.range(shard);
        let (n, local) = (range.end - range.start, doc - range.start);
        let position = match self.mode {
            OrderMode::Default => self.permutation(shard, epoch).position(local),
            OrderMode::Sequential => local,
            OrderMode::FmsV1 => FmsV1::new(n, u64::from(shard), self.seed)
                .take(n as usize)
                .position(|d| d == local)? as u64,
        };
        let number = epoch * n + position;
        let (k, c) = (number / self.sharing(), self.sharing());
        let nth = (number % c + c - self.rotation(shard, k)) % c;
        Some((shard + self.shards * nth as u32, k))
    }
}

/// The places of one lane, with the permutation of the current epoch at hand.
#[derive(Clone, Debug)]
struct Walk {
    shards: Shards,
    lane: u32,
    epoch: Option<(u64, Permutation)>,
    /// Mode `fms_v1` has no closed form: its order of the shard, the same in every epoch.
    listed: Vec<u64>,
}

impl Walk {
    fn new(shards: Shards, lane: u32) -> Self {
        Self {
            shards,
            lane,
            epoch: None,
            listed: Vec::new(),
        }
    }

    fn place(&mut self, k: u64) -> Place {
        let (shard, number) = self.shards.number(self.lane, k);
        let range = self.shards.range(shard);
        let n = range.end - range.start;
        let (epoch, at) = (number / n, number % n);
        let local = match self.shards.mode {
            OrderMode::Sequential => at,
            OrderMode::FmsV1 => {
                if self.listed.is_empty() {
                    self.listed = FmsV1::new(n, u64::from(shard), self.shards.seed)
                        .take(n as usize)
                        .collect();
                }
                self.listed[at as usize]
            }
            OrderMode::Default => match &self.epoch {
                Some((e, permutation)) if *e == epoch => permutation.at(at),
                _ => {
                    let permutation = self.shards.permutation(shard, epoch);
                    let local = permutation.at(at);
                    self.epoch = Some((epoch, permutation));
                    local
                }
            },
        };
        Place {
            shard,
            epoch,
            doc: range.start + local,
        }
    }
}

/// What is done to a document's tokens, and which documents are left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Framing {
    /// Put before every document.
    pub bos: Option<u32>,
    /// Put after every document.
    pub eos: Option<u32>,
    /// Taken off a document's first and last place before framing (data that brings its own delimiters).
    pub strip: Vec<u32>,
    /// Documents with fewer tokens, framed, are left out. Empty documents always are.
    pub min_length: u64,
    /// V.
    pub vocab_size: usize,
}

/// A framed document.
#[derive(Clone, Debug)]
pub struct Document {
    /// Number in the mixture.
    pub dataset: u32,
    /// Where it comes from.
    pub place: Place,
    tokens: Tokens,
    /// First token used, number of tokens used.
    body: (u64, u64),
    bos: Option<u32>,
    eos: Option<u32>,
}

impl Document {
    fn frame(dataset: u32, place: Place, tokens: Tokens, framing: &Framing) -> Self {
        let (mut first, mut last) = (0, tokens.len());
        if first < last && framing.strip.contains(&tokens.get(first)) {
            first += 1;
        }
        if first < last && framing.strip.contains(&tokens.get(last - 1)) {
            last -= 1;
        }
        Self {
            dataset,
            place,
            tokens,
            body: (first, last - first),
            bos: framing.bos,
            eos: framing.eos,
        }
    }

    /// Tokens, framed.
    pub fn len(&self) -> u64 {
        self.body.1 + u64::from(self.bos.is_some()) + u64::from(self.eos.is_some())
    }

    /// Whether there is nothing but the frame.
    pub fn is_empty(&self) -> bool {
        self.body.1 == 0
    }

    /// Appends framed tokens `start..start + len`, which must lie inside.
    pub fn append(&self, start: u64, len: usize, out: &mut Vec<i32>) {
        let end = out.len() + len;
        let lead = u64::from(self.bos.is_some());
        let mut at = start;
        if let (Some(bos), true, true) = (self.bos, at == 0, len > 0) {
            out.push(bos as i32);
            at = 1;
        }
        let body = ((end - out.len()) as u64).min((lead + self.body.1).saturating_sub(at));
        if body > 0 {
            self.tokens
                .append(self.body.0 + at - lead, body as usize, out);
        }
        if let (Some(eos), true) = (self.eos, out.len() < end) {
            out.push(eos as i32);
        }
    }

    /// Framed token `at`, which must lie inside.
    pub fn get(&self, at: u64) -> i32 {
        let lead = u64::from(self.bos.is_some());
        match (self.bos, self.eos) {
            (Some(bos), _) if at == 0 => bos as i32,
            (_, Some(eos)) if at == lead + self.body.1 => eos as i32,
            _ => self.tokens.get(self.body.0 + at - lead) as i32,
        }
    }
}

/// Counts of documents that were left out, shared by all lanes of a dataset.
#[derive(Debug, Default)]
pub struct Skipped {
    /// Without tokens.
    pub empty: AtomicU64,
    /// Below `min_length`.
    pub short: AtomicU64,
    /// Unreadable, under `on_bad: skip`.
    pub bad: AtomicU64,
}

/// The stage.
pub struct DocStream {
    source: Arc<dyn Documents>,
    name: Arc<str>,
    walk: Walk,
    framing: Arc<Framing>,
    on_bad: OnBad,
    skipped: Arc<Skipped>,
    drawn: u64,
    /// Set once the whole shard was searched.
    has_usable: Option<bool>,
}

impl DocStream {
    /// Starts at the lane's first document.
    pub fn new(
        name: Arc<str>,
        source: Arc<dyn Documents>,
        shards: Shards,
        lane: u32,
        framing: Arc<Framing>,
        on_bad: OnBad,
        skipped: Arc<Skipped>,
    ) -> Self {
        Self {
            source,
            name,
            walk: Walk::new(shards, lane),
            framing,
            on_bad,
            skipped,
            drawn: 0,
            has_usable: None,
        }
    }

    /// Its dataset's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The document at place number `k` of this lane, if usable.
    fn load(&mut self, k: u64) -> Result<Option<Document>, DataError> {
        let place = self.walk.place(k);
        let skip = |counter: &AtomicU64| {
            counter.fetch_add(1, Ordering::Relaxed);
            Ok(None)
        };
        let tokens = match self.source.tokens(place.doc) {
            Ok(tokens) => tokens,
            Err(error) if self.on_bad == OnBad::Skip && error.is_of_document() => {
                tracing::warn!(dataset = &*self.name, doc = place.doc, %error, "document skipped");
                return skip(&self.skipped.bad);
            }
            Err(error) => return Err(error),
        };
        let document = Document::frame(self.walk.shards.dataset, place, tokens, &self.framing);
        if document.is_empty() {
            skip(&self.skipped.empty)
        } else if document.len() < self.framing.min_length {
            skip(&self.skipped.short)
        } else {
            Ok(Some(document))
        }
    }

    /// The document drawn last: a cut document is read again on resume.
    ///
    /// # Errors
    /// [`DataError::State`] when nothing usable stands there.
    pub fn last(&mut self) -> Result<Document, DataError> {
        let gone = || {
            DataError::State(
                "the document that the state cut is gone; expected the data of the run".into(),
            )
        };
        let k = self.drawn.checked_sub(1).ok_or_else(gone)?;
        self.load(k)?.ok_or_else(gone)
    }

    /// Whether the shard has any usable document; searched once, when a whole epoch's worth of places gave none.
    fn search(&mut self) -> Result<bool, DataError> {
        if let Some(known) = self.has_usable {
            return Ok(known);
        }
        let range = self
            .walk
            .shards
            .range(self.walk.lane % self.walk.shards.shards);
        let mut found = false;
        for doc in range {
            found = match self.source.tokens(doc) {
                Ok(tokens) => {
                    let place = Place {
                        shard: 0,
                        epoch: 0,
                        doc,
                    };
                    let d = Document::frame(0, place, tokens, &self.framing);
                    !d.is_empty() && d.len() >= self.framing.min_length
                }
                Err(error) if self.on_bad == OnBad::Skip && error.is_of_document() => false,
                Err(error) => return Err(error),
            };
            if found {
                break;
            }
        }
        self.has_usable = Some(found);
        Ok(found)
    }
}

impl Stage for DocStream {
    /// `None`: the shard has no usable document, now and for ever.
    type Item = Option<Document>;
    type State = u64;

    fn next(&mut self, _row: u64) -> Result<Self::Item, DataError> {
        let range = self
            .walk
            .shards
            .range(self.walk.lane % self.walk.shards.shards);
        let n = range.end - range.start;
        if n == 0 || self.has_usable == Some(false) {
            return Ok(None);
        }
        let (start, mut without) = (self.drawn, 0);
        loop {
            let found = self.load(self.drawn)?;
            self.drawn += 1;
            if found.is_some() {
                self.has_usable = Some(true);
                return Ok(found);
            }
            without += 1;
            if without == n && !self.search()? {
                self.drawn = start;
                return Ok(None);
            }
        }
    }

    fn state(&self) -> u64 {
        self.drawn
    }

    fn restore(&mut self, state: &u64) -> Result<(), DataError> {
        self.drawn = *state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn framing_copies_any_part() {
        let place = Place {
            shard: 0,
            epoch: 0,
            doc: 0,
        };
        let framing = Framing {
            bos: Some(90),
            eos: Some(91),
            strip: vec![7],
            min_length: 0,
            vocab_size: 100,
        };
        for (tokens, want) in [
            (vec![7, 1, 2, 7], vec![90, 1, 2, 91]),
            (vec![1, 2, 3], vec![90, 1, 2, 3, 91]),
            (vec![7, 7, 5], vec![90, 7, 5, 91]),
            (vec![7], vec![90, 91]),
        ] {
            let d = Document::frame(0, place, Tokens::Owned(tokens.into()), &framing);
            assert_eq!(d.len(), want.len() as u64);
            (0..want.len()).for_each(|i| assert_eq!(d.get(i as u64), want[i]));
            for start in 0..=want.len() {
                for end in start..=want.len() {
                    let mut out = vec![-1];
                    d.append(start as u64, end - start, &mut out);
                    assert_eq!(out[1..], want[start..end]);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn lanes_share_out_every_epoch(n in 1u64..400, lanes in 1u32..40, seed: u64, mode in 0usize..3) {
            let mode = [OrderMode::Default, OrderMode::FmsV1, OrderMode::Sequential][mode];
            let shards = Shards::new(0, n, lanes, mode, seed);
            prop_assert_eq!(lanes % shards.shards, 0);
            let mut seen = std::collections::BTreeMap::new();
            for lane in 0..lanes {
                for k in 0..2 * n {
                    let place = shards.place(lane, k);
                    prop_assert_eq!(shards.find(place.doc, place.epoch), Some((lane, k)));
                    if place.epoch < 2 {
                        *seen.entry((place.epoch, place.doc)).or_insert(0) += 1;
                    }
                }
            }
            prop_assert_eq!(seen.len() as u64, 2 * n);
            prop_assert!(seen.values().all(|&times| times == 1));
        }
    }
}
