//! Launches of the optimiser: many tensors a launch, their addresses in a table passed by value.

use crate::record::{Args, DType, Param, Recorder, THREADS, Tensor, types};
use crate::reduce::finish_sum;

/// Tensors of a table: `TABLE` of the source.
const TABLE: usize = 40;

/// Attributes of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    /// b1, b2.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Largest gradient norm; 0 never clips.
    pub clip: f32,
    /// Weight decay and factor on lr of each tensor.
    pub tensors: Vec<(f32, f32)>,
    /// Tensors that are also written in another type.
    pub copies: Vec<usize>,
}

/// Blocks that walk one tensor.
fn blocks(longest: usize) -> usize {
    longest.div_ceil(4 * THREADS).clamp(1, 512)
}

/// Two floats a word.
fn floats(list: impl Iterator<Item = f32>) -> Vec<u64> {
    let mut list: Vec<f32> = list.collect();
    list.resize(TABLE, 0.0);
    list.chunks(2)
        .map(|p| u64::from(p[0].to_bits()) | u64::from(p[1].to_bits()) << 32)
        .collect()
}

fn longs(list: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut list: Vec<u64> = list.collect();
    list.resize(TABLE, 0);
    list
}

/// `p, m, v` of each tensor, and copies of p, of `lr, step, norm, (p, g, m, v)..., copy...`.
pub fn adamw(r: &mut Recorder, a: &Args, op: &AdamW) {
    let at = |i: usize, k: usize| a.arg(3 + 4 * i + k);
    const ABSENT: &Tensor = &Tensor::ABSENT;
    let copy = |i: usize| match op.copies.iter().position(|&c| c == i) {
        Some(k) => a.arg(3 + 4 * op.tensors.len() + k),
        None => ABSENT,
    };
    // Those without a copy go with those that have one of the same type as p.
    let floats_of = [DType::F32, DType::Bf16, DType::F16];
    for (dtype, narrow) in floats_of
        .into_iter()
        .flat_map(|p| floats_of.map(|copy| (p, copy)))
    {
        let mut all: Vec<usize> = (0..op.tensors.len())
            .filter(|&i| {
                let copy = copy(i);
                let to = if copy.is_present() {
                    copy.dtype
                } else {
                    at(i, 0).dtype
                };
                (at(i, 0).dtype, to) == (dtype, narrow) && !at(i, 0).is_empty()
            })
            .collect();
        // Those of a launch have as many blocks as its longest.
        all.sort_by_key(|&i| std::cmp::Reverse(at(i, 0).len()));
        for list in all.chunks(TABLE) {
            let of = |k: usize| longs(list.iter().map(move |&i| at(i, k).ptr));
            let mut words: Vec<u64> = (0..4).flat_map(of).collect();
            words.extend(longs(list.iter().map(|&i| copy(i).ptr)));
            words.extend(longs(list.iter().map(|&i| at(i, 0).len() as u64)));
            words.extend(floats(list.iter().map(|&i| op.tensors[i].0)));
            words.extend(floats(list.iter().map(|&i| op.tensors[i].1)));
            let longest = list.iter().map(|&i| at(i, 0).len()).max().unwrap_or(0);
            r.launch(
                ("adamw", "adamw"),
                types(&[("TA0", dtype), ("TR0", narrow)]),
                [blocks(longest), list.len(), 1],
                THREADS,
                vec![
                    Param::Words(words),
                    a.arg(0).into(),
                    a.arg(1).into(),
                    a.arg(2).into(),
                    Param::Double(op.betas.0),
                    Param::Double(op.betas.1),
                    Param::Float(op.eps),
                    Param::Float(op.clip),
                ],
            );
        }
    }
}

/// `norm` of `g...`, added up in a fixed order.
pub fn global_norm(r: &mut Recorder, a: &Args) {
    let mut launches = Vec::new();
    let mut total = 0;
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let mut all: Vec<&Tensor> = a
            .args
            .iter()
            .flatten()
            .filter(|g| g.dtype == dtype && !g.is_empty())
            .collect();
        all.sort_by_key(|g| std::cmp::Reverse(g.len()));
        for list in all.chunks(TABLE) {
            let mut words = longs(list.iter().map(|g| g.ptr));
            words.extend(longs(list.iter().map(|g| g.len() as u64)));
            let n = blocks(list.iter().map(|g| g.len()).max().unwrap_or(0));
            launches.push((dtype, words, n, list.len(), total));
            total += n * list.len();
        }
    }
    let part = r.scratch_raw(total * 8);
    for (dtype, words, n, tensors, first) in launches {
        r.launch(
            ("adamw", "square_parts"),
            types(&[("TA0", dtype)]),
            [n, tensors, 1],
            THREADS,
            vec![Param::Words(words), Param::Ptr(part + 8 * first as u64)],
        );
    }
    finish_sum(r, part, total, a.res(0), 1.0, true);
}
