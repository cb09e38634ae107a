//! Joining and splitting along the last dimension: row copies.

use super::tensor::{Args, Cx, Results};
use marimba_ir::op::{Concat, Split};

/// Rows per task: enough that a task outweighs its start.
const ROWS: usize = 128;

/// Joins rows.
pub(super) fn concat(_: &Concat, a: &Args, r: &mut Results, cx: &Cx) {
    let parts: Vec<(&[f32], usize)> = (0..a.len()).map(|i| (a.f(i), a.ty(i).last())).collect();
    let width = r.ty(0).last().max(1);
    let chunks = r.take_f(0).chunks_mut(ROWS * width).collect();
    cx.for_each(chunks, |task, chunk: &mut [f32], _| {
        for (i, row) in chunk.chunks_exact_mut(width).enumerate() {
            let mut rest = row;
            for (x, n) in &parts {
                let (head, tail) = rest.split_at_mut(*n);
                let at = (task * ROWS + i) * n;
                head.copy_from_slice(&x[at..at + n]);
                rest = tail;
            }
        }
    });
}

/// Splits rows.
pub(super) fn split(op: &Split, a: &Args, r: &mut Results, cx: &Cx) {
    let (x, width) = (a.f(0), a.ty(0).last().max(1));
    let n_tasks = a.ty(0).rows().div_ceil(ROWS);
    let mut tasks: Vec<Vec<&mut [f32]>> = (0..n_tasks).map(|_| Vec::new()).collect();
    for (k, size) in op.sizes.iter().enumerate() {
        if size.size > 0 {
            for (task, chunk) in tasks
                .iter_mut()
                .zip(r.take_f(k).chunks_mut(ROWS * size.size))
            {
                task.push(chunk);
            }
        }
    }
    let sizes: Vec<usize> = op.sizes.iter().map(|d| d.size).filter(|&n| n > 0).collect();
    cx.for_each(tasks, |task, mut parts, _| {
        let first = task * ROWS * width;
        let last = (first + ROWS * width).min(x.len());
        for (i, row) in x[first..last].chunks_exact(width).enumerate() {
            let mut at = 0;
            for (part, &n) in parts.iter_mut().zip(&sizes) {
                part[i * n..(i + 1) * n].copy_from_slice(&row[at..at + n]);
                at += n;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use marimba_ir::{Dim, Letter, Type, dims};

    #[test]
    fn split_undoes_concat() {
        let (rows, sizes) = (300, [5usize, 1, 64]);
        let parts: Vec<Vec<f32>> = sizes
            .iter()
            .enumerate()
            .map(|(i, n)| randn(i as u64, rows * n))
            .collect();
        let args: Vec<_> = parts
            .iter()
            .zip(sizes)
            .map(|(x, n)| f(Type::f32(dims![B 3, T 100, D n]), x))
            .collect();
        let y = run(Concat { letter: Letter::I }, &args);
        let joined = floats(&y[0]);
        assert_eq!(joined[70 * 2 + 5], parts[1][2]);
        assert_eq!(joined[70 * 299 + 6], parts[2][299 * 64]);
        let sizes = sizes
            .map(|size| Dim {
                letter: Letter::D,
                size,
            })
            .to_vec();
        let back = run(
            Split { sizes },
            &[f(Type::f32(dims![B 3, T 100, I 70]), joined)],
        );
        for (got, want) in back.iter().zip(&parts) {
            assert_eq!(floats(got), &want[..]);
        }
    }
}
