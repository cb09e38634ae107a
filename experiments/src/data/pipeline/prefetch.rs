//! Reading ahead: a thread that fills a queue of batches, so that training waits only when data is slower than training.
//!
//! Each batch travels with the state after it, so [`Loader::state`] is that of the batches handed out, not of those read ahead.
//!
//! The depth of the queue follows from measured times: as many batches as training uses up while the slowest batch of late is read, one more
//! and at least 2, at most [`MAX_DEPTH`]. When data is slower than training on average no depth helps, and every step waits for the difference.

use crate::data::{Batch, DataError, EvalSet, Loader, LoaderState, Located, Piece, SkipCounts};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Batches read ahead at most.
pub const MAX_DEPTH: usize = 64;

/// A loader that reads ahead.
pub struct Prefetch {
    inner: Arc<Mutex<Box<dyn Loader>>>,
    queue: Arc<Queue>,
    reader: Option<std::thread::JoinHandle<()>>,
    rows: usize,
    state: LoaderState,
    tokens: Vec<(String, u64)>,
    skipped: Vec<SkipCounts>,
    waits: u64,
    pace: Pace,
    /// When the last batch was handed out.
    handed: Option<Instant>,
}

/// Times that decide the depth, seconds.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    /// The slowest batch of late: forgotten by a hundredth a batch.
    slowest_read: f64,
    /// Mean time that training takes for a batch; 0 before the first.
    use_secs: f64,
}

impl Pace {
    fn read(&mut self, secs: f64) {
        self.slowest_read = (self.slowest_read * 0.99).max(secs);
    }

    /// A pause for an evaluation or a checkpoint counts as a few batches, not as a slow training.
    fn used(&mut self, secs: f64) {
        self.use_secs = if self.use_secs > 0.0 {
            0.9 * self.use_secs + 0.1 * secs.min(4.0 * self.use_secs)
        } else {
            secs
        };
    }

    fn depth(self) -> usize {
        let during = (self.slowest_read / self.use_secs.max(1e-9)).ceil();
        (during.min(MAX_DEPTH as f64) as usize + 1).clamp(2, MAX_DEPTH)
    }
}

struct Queue {
    inside: Mutex<Inside>,
    changed: Condvar,
}

struct Ready {
    batch: Result<Batch, DataError>,
    state: LoaderState,
    tokens: Vec<(String, u64)>,
    skipped: Vec<SkipCounts>,
    secs: f64,
}

struct Inside {
    ready: VecDeque<Ready>,
    depth: usize,
    stop: bool,
}

/// A poisoned lock only says that another thread panicked; the queue itself is whole.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Prefetch {
    /// Wraps `inner`. Reading ahead begins with the first [`Loader::next`].
    pub fn new(inner: Box<dyn Loader>) -> Self {
        let (state, tokens) = (inner.state(), inner.tokens_by_dataset());
        let queue = Queue {
            inside: Mutex::new(Inside {
                ready: VecDeque::new(),
                depth: 2,
                stop: false,
            }),
            changed: Condvar::new(),
        };
        let (inner, queue) = (Arc::new(Mutex::new(inner)), Arc::new(queue));
        Self {
            inner,
            queue,
            reader: None,
            rows: 0,
            state,
            tokens,
            skipped: Vec::new(),
            waits: 0,
            pace: Pace::default(),
            handed: None,
        }
    }

    /// How often a batch had to be waited for since the start.
    pub fn waits(&self) -> u64 {
        self.waits
    }

    /// Stops the reader and drops what it read.
    fn halt(&mut self) {
        if let Some(reader) = self.reader.take() {
            lock(&self.queue.inside).stop = true;
            self.queue.changed.notify_all();
            // The reader's panic, if any, was its own; nothing is taken from it.
            let _ = reader.join();
        }
        let mut inside = lock(&self.queue.inside);
        inside.ready.clear();
        inside.stop = false;
    }

    fn start(&mut self, rows: usize) {
        let (inner, queue) = (self.inner.clone(), self.queue.clone());
        self.rows = rows;
        self.reader = Some(std::thread::spawn(move || {
            loop {
                {
                    let mut inside = lock(&queue.inside);
                    while !inside.stop && inside.ready.len() >= inside.depth {
                        inside = queue
                            .changed
                            .wait(inside)
                            .unwrap_or_else(PoisonError::into_inner);
                    }
                    if inside.stop {
                        return;
                    }
                }
                let mut loader = lock(&inner);
                let begin = Instant::now();
                let batch = loader.next(rows);
                let secs = begin.elapsed().as_secs_f64();
                let failed = batch.is_err();
                let ready = Ready {
                    batch,
                    state: loader.state(),
                    tokens: loader.tokens_by_dataset(),
                    skipped: loader.skip_counts(),
                    secs,
                };
                drop(loader);
                lock(&queue.inside).ready.push_back(ready);
                queue.changed.notify_all();
                if failed {
                    return;
                }
            }
        }));
    }
}

impl Loader for Prefetch {
    fn next(&mut self, rows: usize) -> Result<Batch, DataError> {
        if self.reader.is_some() && rows != self.rows {
            self.halt();
            let state = self.state.clone();
            lock(&self.inner).restore(&state)?;
        }
        let first = self.reader.is_none();
        if first {
            self.start(rows);
        }
        if let Some(handed) = self.handed.take() {
            self.pace.used(handed.elapsed().as_secs_f64());
        }
        let mut inside = lock(&self.queue.inside);
        if inside.ready.is_empty() && !first {
            self.waits += 1;
        }
        let ready = loop {
            if let Some(ready) = inside.ready.pop_front() {
                break ready;
            }
            if self.reader.as_ref().is_none_or(|r| r.is_finished()) {
                drop(inside);
                self.halt();
                return Err(DataError::State(
                    "the reader thread ended without a batch; see the panic above".into(),
                ));
            }
            let waited = self
                .queue
                .changed
                .wait_timeout(inside, std::time::Duration::from_millis(200));
            inside = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        self.pace.read(ready.secs);
        inside.depth = self.pace.depth();
        drop(inside);
        self.queue.changed.notify_all();
        match ready.batch {
            Ok(batch) => {
                self.handed = Some(Instant::now());
                (self.state, self.tokens) = (ready.state, ready.tokens);
                self.skipped = ready.skipped;
                Ok(batch)
            }
            Err(error) => {
                self.halt();
                let state = self.state.clone();
                lock(&self.inner).restore(&state)?;
                Err(error)
            }
        }
    }

    fn state(&self) -> LoaderState {
        self.state.clone()
    }

    fn restore(&mut self, state: &LoaderState) -> Result<(), DataError> {
        self.halt();
        let mut inner = lock(&self.inner);
        inner.restore(state)?;
        (self.state, self.tokens) = (inner.state(), inner.tokens_by_dataset());
        Ok(())
    }

    fn vocab_size(&self) -> usize {
        lock(&self.inner).vocab_size()
    }

    fn seq_len(&self) -> usize {
        lock(&self.inner).seq_len()
    }

    fn eval_sets(&self) -> Vec<EvalSet> {
        lock(&self.inner).eval_sets()
    }

    fn eval_batch(&self, set: usize, start: u64, rows: usize) -> Result<Batch, DataError> {
        lock(&self.inner).eval_batch(set, start, rows)
    }

    fn locate(&self, piece: &Piece) -> Located {
        lock(&self.inner).locate(piece)
    }

    fn rows_of(&self, dataset: &str, doc: u64, epoch: u64) -> Result<Vec<u64>, DataError> {
        lock(&self.inner).rows_of(dataset, doc, epoch)
    }

    fn tokens_by_dataset(&self) -> Vec<(String, u64)> {
        self.tokens.clone()
    }

    fn skip_counts(&self) -> Vec<SkipCounts> {
        self.skipped.clone()
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.halt();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Worker;
    use crate::data::rows::RowLoader;
    use crate::data::tasks::Task;
    use marimba_dsl::data::Data;

    fn plain() -> Box<dyn Loader> {
        Box::new(RowLoader::new(
            Task::from_data(&Data::Mqar(Default::default()), 64, 0).expect("valid"),
            Worker::ALL,
        ))
    }

    #[test]
    fn reading_ahead_changes_nothing() {
        let (mut ahead, mut direct) = (Prefetch::new(plain()), plain());
        for rows in [3, 3, 3, 5, 5, 2, 3] {
            assert_eq!(
                ahead.next(rows).expect("reads"),
                direct.next(rows).expect("reads")
            );
            assert_eq!(ahead.state(), direct.state());
            assert_eq!(ahead.tokens_by_dataset(), direct.tokens_by_dataset());
        }
        let state = ahead.state();
        let next = ahead.next(4).expect("reads");
        ahead.restore(&state).expect("its own state");
        assert_eq!(ahead.next(4).expect("reads"), next);
        assert_eq!(
            ahead.eval_batch(0, 0, 2).expect("reads"),
            direct.eval_batch(0, 0, 2).expect("reads")
        );
    }

    #[test]
    fn the_depth_covers_the_slowest_batch() {
        let mut pace = Pace::default();
        pace.used(0.01);
        for _ in 0..20 {
            pace.read(0.001);
            pace.used(0.01);
        }
        assert_eq!(pace.depth(), 2, "reading is ten times as fast");
        pace.read(0.095);
        assert_eq!(pace.depth(), 11, "one batch takes as long as ten steps");
        pace.used(60.0);
        assert!(pace.depth() >= 6, "a pause is not a slow step");
        (0..500).for_each(|_| pace.read(0.001));
        assert_eq!(pace.depth(), 2, "forgotten");
        pace.read(1e9);
        assert_eq!(pace.depth(), MAX_DEPTH);
    }

    #[test]
    fn an_error_arrives_in_its_place() {
        struct Fails(u64);
        impl Loader for Fails {
            fn next(&mut self, rows: usize) -> Result<Batch, DataError> {
                self.0 += 1;
                if self.0 == 4 {
                    Err(DataError::State("fourth".into()))
                } else {
                    Ok(Batch::blank(rows, 1))
                }
            }
            fn state(&self) -> LoaderState {
                LoaderState {
                    version: 1,
                    fingerprint: String::new(),
                    next_row: self.0,
                    lanes: Vec::new(),
                }
            }
            fn restore(&mut self, state: &LoaderState) -> Result<(), DataError> {
                self.0 = state.next_row;
                Ok(())
            }
            fn vocab_size(&self) -> usize {
                1
            }
            fn seq_len(&self) -> usize {
                1
            }
            fn eval_sets(&self) -> Vec<EvalSet> {
                Vec::new()
            }
            fn eval_batch(&self, set: usize, _: u64, _: usize) -> Result<Batch, DataError> {
                Err(DataError::NoSuchEvalSet { set, have: 0 })
            }
            fn locate(&self, piece: &Piece) -> Located {
                Located {
                    dataset: String::new(),
                    file: String::new(),
                    index: piece.doc,
                }
            }
            fn rows_of(&self, _: &str, _: u64, _: u64) -> Result<Vec<u64>, DataError> {
                Ok(Vec::new())
            }
        }
        let mut ahead = Prefetch::new(Box::new(Fails(0)));
        for want in 1..=3 {
            ahead.next(1).expect("before the error");
            assert_eq!(ahead.state().next_row, want);
        }
        assert!(
            ahead
                .next(1)
                .expect_err("the fourth")
                .to_string()
                .contains("fourth")
        );
        assert_eq!(ahead.state().next_row, 3);
    }
}
