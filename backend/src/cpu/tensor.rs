//! What an op sees: its arguments, its results, a thread pool and scratch memory.
//!
//! An op is `pub(super) fn <op>(op: &ir::op::X, a: &Args, r: &mut Results, cx: &Cx)`. Arguments are slots of the op's table, results
//! its results in order. An argument that a result overwrites in place is absent from [`Args`] (its type stays): the op finds the
//! old contents in the result. Other results hold garbage and must be written whole.
//!
//! Parallel work is a list of tasks ([`Cx::for_each`]) that own what they write. Which tasks there are must follow from shapes alone,
//! never from the number of threads, and partial sums must be added in task order: then results do not depend on the threads.
//!
//! Not here: where memory comes from (`memory.rs`), which op runs when (`exec.rs`).

#![allow(unsafe_code)] // slices of planned memory and of column blocks; each block says why it is sound

use super::memory::Buffer;
use marimba_ir::Type;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Memory of one argument.
#[derive(Clone, Copy)]
pub(super) enum Slot<'a> {
    /// Not given, or overwritten in place.
    Absent,
    /// Floats.
    F32(&'a [f32]),
    /// Integers.
    I32(&'a [i32]),
}

/// Memory of one result.
pub(super) enum SlotMut<'a> {
    /// Taken.
    Taken,
    /// Floats.
    F32(&'a mut [f32]),
    /// Integers.
    I32(&'a mut [i32]),
}

/// Arguments of a node by slot of the op's table.
pub(super) struct Args<'a> {
    pub(super) slots: &'a [Slot<'a>],
    pub(super) types: &'a [Option<Type>],
}

impl<'a> Args<'a> {
    /// Number of slots.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Floats of a required argument. Panics when the op's table and the op's code disagree: a bug, caught by any test of the op.
    pub(super) fn f(&self, i: usize) -> &'a [f32] {
        self.opt_f(i).expect("a required f32 argument")
    }

    /// Floats of an optional argument.
    pub(super) fn opt_f(&self, i: usize) -> Option<&'a [f32]> {
        match self.slots.get(i) {
            Some(Slot::F32(x)) => Some(x),
            Some(Slot::I32(_) | Slot::Absent) | None => None,
        }
    }

    /// Integers of a required argument.
    pub(super) fn i(&self, i: usize) -> &'a [i32] {
        self.opt_i(i).expect("a required i32 argument")
    }

    /// Integers of an optional argument.
    pub(super) fn opt_i(&self, i: usize) -> Option<&'a [i32]> {
        match self.slots.get(i) {
            Some(Slot::I32(x)) => Some(x),
            Some(Slot::F32(_) | Slot::Absent) | None => None,
        }
    }

    /// Type of a given argument, overwritten ones included.
    pub(super) fn ty(&self, i: usize) -> &'a Type {
        self.opt_ty(i).expect("a required argument")
    }

    /// Type of an argument, when given.
    pub(super) fn opt_ty(&self, i: usize) -> Option<&'a Type> {
        self.types.get(i).and_then(Option::as_ref)
    }

    /// Whether the argument is given (overwritten or not).
    pub(super) fn has(&self, i: usize) -> bool {
        self.opt_ty(i).is_some()
    }
}

/// Results of a node, each taken once.
pub(super) struct Results<'a> {
    pub(super) slots: Vec<SlotMut<'a>>,
    pub(super) types: &'a [Type],
}

impl<'a> Results<'a> {
    /// Type of result `k`.
    pub(super) fn ty(&self, k: usize) -> &'a Type {
        &self.types[k]
    }

    /// Floats of result `k`; panics when taken before or of another type.
    pub(super) fn take_f(&mut self, k: usize) -> &'a mut [f32] {
        match std::mem::replace(&mut self.slots[k], SlotMut::Taken) {
            SlotMut::F32(x) => x,
            SlotMut::I32(_) | SlotMut::Taken => panic!("result {k} is not f32 or was taken"),
        }
    }

    /// Integers of result `k`; panics when taken before or of another type.
    pub(super) fn take_i(&mut self, k: usize) -> &'a mut [i32] {
        match std::mem::replace(&mut self.slots[k], SlotMut::Taken) {
            SlotMut::I32(x) => x,
            SlotMut::F32(_) | SlotMut::Taken => panic!("result {k} is not i32 or was taken"),
        }
    }
}

/// Scratch memory of one thread, kept from call to call and grown to the largest request.
#[derive(Default)]
pub(super) struct Scratch {
    buffer: Buffer,
}

impl Scratch {
    /// `len` floats with arbitrary contents, aligned to 256 bytes.
    pub(super) fn f32(&mut self, len: usize) -> &mut [f32] {
        let [x] = self.split([len]);
        x
    }

    /// Several float slices at once, arbitrary contents, each aligned to 256 bytes.
    pub(super) fn split<const N: usize>(&mut self, lens: [usize; N]) -> [&mut [f32]; N] {
        const STEP: usize = 64;
        let total: usize = lens.iter().map(|l| l.next_multiple_of(STEP)).sum();
        self.buffer.grow(total * 4);
        let mut rest = self.buffer.f32_mut();
        lens.map(|len| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(len.next_multiple_of(STEP));
            rest = tail;
            &mut head[..len]
        })
    }
}

/// Threads and scratch memory of an engine.
pub(super) struct Cx {
    threads: usize,
    scratch: Vec<Mutex<Scratch>>,
    shared: Mutex<Scratch>,
}

impl Cx {
    /// For an engine of `threads` threads. The caller runs ops inside a rayon pool of that size (1: on any thread).
    pub(super) fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        Cx {
            threads,
            scratch: (0..threads).map(|_| Mutex::default()).collect(),
            shared: Mutex::default(),
        }
    }

    /// Number of threads: for tuning only, never for what is computed.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `f(index, item, scratch)` for every item, in parallel; items own what they write (chunks of results, [`Columns`]).
    /// Tasks must not call `for_each` again.
    pub(super) fn for_each<I: Send>(
        &self,
        items: Vec<I>,
        f: impl Fn(usize, I, &mut Scratch) + Sync,
    ) {
        if self.threads == 1 || items.len() <= 1 {
            let mut scratch = lock(&self.scratch[0]);
            for (i, item) in items.into_iter().enumerate() {
                f(i, item, &mut scratch);
            }
        } else {
            items
                .into_par_iter()
                .enumerate()
                .with_max_len(1)
                .for_each(|(i, item)| {
                    let thread = rayon::current_thread_index().unwrap_or(0) % self.threads;
                    f(i, item, &mut lock(&self.scratch[thread]));
                });
        }
    }

    /// Scratch of the op as a whole: partial sums of tasks, temporaries. One at a time; not the memory that tasks see.
    pub(super) fn shared(&self) -> MutexGuard<'_, Scratch> {
        lock(&self.shared)
    }
}

fn lock(m: &Mutex<Scratch>) -> MutexGuard<'_, Scratch> {
    // A panic elsewhere leaves scratch with arbitrary contents, which is what scratch has anyway.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A block of columns of a row-major matrix, writable by one task while others write the other columns.
pub(super) struct Columns<'a> {
    start: *mut f32,
    rows: usize,
    stride: usize,
    width: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `Columns` is the only one that reaches its elements (`column_blocks` hands each element to one block), as `&mut [f32]` is.
unsafe impl Send for Columns<'_> {}

impl Columns<'_> {
    /// Number of rows.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Row `r` of the block.
    pub(super) fn row(&mut self, r: usize) -> &mut [f32] {
        assert!(r < self.rows);
        // SAFETY: `column_blocks` checked that the block's rows lie in the matrix; no other block holds these elements, and the
        // borrow of self keeps a second slice from being made.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(r * self.stride), self.width) }
    }
}

/// Splits the row-major matrix `x [rows, cols]` into `cols / width` blocks of `width` columns.
pub(super) fn column_blocks(x: &mut [f32], cols: usize, width: usize) -> Vec<Columns<'_>> {
    assert!(width > 0 && cols.is_multiple_of(width) && x.len().is_multiple_of(cols));
    let rows = x.len() / cols;
    let start = x.as_mut_ptr();
    (0..cols / width)
        .map(|i| Columns {
            // SAFETY: i * width < cols <= the length of the first row (no row, no access: `row` checks against rows).
            start: if rows == 0 {
                start
            } else {
                unsafe { start.add(i * width) }
            },
            rows,
            stride: cols,
            width,
            life: PhantomData,
        })
        .collect()
}

/// Splits the row-major matrix `x [_, cols]` into blocks of `rows` rows by `width` columns, row blocks outermost.
pub(super) fn tiles(x: &mut [f32], cols: usize, width: usize, rows: usize) -> Vec<Columns<'_>> {
    x.chunks_mut((rows * cols).max(1))
        .flat_map(|part| column_blocks(part, cols, width))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn column_blocks_cover_each_element_once() {
        let mut x = vec![0.0; 5 * 12];
        let cx = Cx::new(1);
        cx.for_each(column_blocks(&mut x, 12, 4), |i, mut block, _| {
            for r in 0..block.rows() {
                for (c, v) in block.row(r).iter_mut().enumerate() {
                    *v += (r * 12 + i * 4 + c) as f32;
                }
            }
        });
        assert!(x.iter().enumerate().all(|(i, &v)| v == i as f32));
    }

    #[test]
    fn scratch_parts_are_apart_and_aligned() {
        let mut s = Scratch::default();
        let [a, b] = s.split([3, 70]);
        a.fill(1.0);
        b.fill(2.0);
        assert!(a.iter().all(|&v| v == 1.0) && b.len() == 70);
        assert_eq!(b.as_ptr() as usize % 256, 0);
    }
}
