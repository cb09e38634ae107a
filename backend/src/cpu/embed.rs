//! Token embedding: row look-up, and the scatter of gradients in token order. A token outside the table gives a row of NaN, which the
//! engine's search for the first non-finite result then finds here.

use super::simd::{axpy, simd};
use super::tensor::{Args, Cx, Results};
use marimba_ir::op::{Embed, EmbedBwd};

/// Rows per task.
const ROWS: usize = 128;

/// Parts of the vocabulary in the derivative, each scattered to by one task.
const PARTS: usize = 16;

/// `y[t] = table[token[t]]`.
pub(super) fn embed(_: &Embed, a: &Args, r: &mut Results, cx: &Cx) {
    let (tokens, table, d) = (a.i(0), a.f(1), a.ty(1).size(1).max(1));
    let chunks = r.take_f(0).chunks_mut(ROWS * d).collect();
    cx.for_each(chunks, |task, chunk: &mut [f32], _| {
        for (y, &token) in chunk.chunks_exact_mut(d).zip(&tokens[task * ROWS..]) {
            match usize::try_from(token)
                .ok()
                .and_then(|t| table.get(t * d..(t + 1) * d))
            {
                Some(row) => y.copy_from_slice(row),
                None => y.fill(f32::NAN),
            }
        }
    });
}

/// `dtable = (beta into) + scatter(dy)`: each task owns a range of the vocabulary and walks all tokens, so the order of sums is that of
/// the tokens.
pub(super) fn embed_bwd(op: &EmbedBwd, a: &Args, r: &mut Results, cx: &Cx) {
    let (tokens, dy, d) = (a.i(0), a.f(1), a.ty(1).last().max(1));
    let beta = if op.accumulate { a.f(3)[0] } else { 0.0 };
    let rows = op.vocab.size.div_ceil(PARTS).max(1);
    let chunks = r.take_f(0).chunks_mut(rows * d).collect();
    cx.for_each(chunks, |task, chunk: &mut [f32], _| {
        scatter(chunk, beta, tokens, task * rows, dy, d);
    });
}

simd! {
    fn scatter(chunk: &mut [f32], beta: f32, tokens: &[i32], first: usize, dy: &[f32], d: usize) {
        if beta == 0.0 {
            chunk.fill(0.0);
        } else if beta != 1.0 {
            for v in chunk.iter_mut() {
                *v *= beta;
            }
        }
        let n = chunk.len() / d;
        for (i, &token) in tokens.iter().enumerate() {
            let v = (token as usize).wrapping_sub(first);
            if token >= 0 && v < n {
                axpy(1.0, &dy[i * d..(i + 1) * d], &mut chunk[v * d..(v + 1) * d]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use marimba_ir::{Dim, Letter, Type, dims};

    #[test]
    fn looks_rows_up_and_scatters_gradients() {
        let (v, d, t) = (37, 10, 500);
        let tokens: Vec<i32> = (0..t as i32).map(|i| (i * 7919) % v as i32).collect();
        let (table, dy, into) = (randn(1, v * d), randn(2, t * d), randn(3, v * d));
        let tt = Type::i32(dims![B 5, T 100]);
        let y = run(
            Embed,
            &[
                i(tt.clone(), &tokens),
                f(Type::f32(dims![V v, D d]), &table),
            ],
        );
        for (row, &token) in floats(&y[0]).chunks(d).zip(&tokens) {
            assert_eq!(row, &table[token as usize * d..][..d]);
        }
        let mut scattered = vec![0.0f64; v * d];
        for (i, &token) in tokens.iter().enumerate() {
            for c in 0..d {
                scattered[token as usize * d + c] += f64::from(dy[i * d + c]);
            }
        }
        let vocab = Dim {
            letter: Letter::V,
            size: v,
        };
        let tdy = Type::f32(dims![B 5, T 100, D d]);
        let op = EmbedBwd {
            vocab,
            accumulate: false,
        };
        let got = run(
            op,
            &[i(tt.clone(), &tokens), f(tdy.clone(), &dy), None, None],
        );
        close(floats(&got[0]), &scattered, 1e-5);
        for beta in [0.0, 1.0, 0.25] {
            let op = EmbedBwd {
                vocab,
                accumulate: true,
            };
            let start = if beta == 0.0 {
                vec![f32::NAN; v * d]
            } else {
                into.clone()
            };
            let args = [
                i(tt.clone(), &tokens),
                f(tdy.clone(), &dy),
                f(Type::f32(dims![V v, D d]), &start),
                f(Type::scalar(), &[beta]),
            ];
            let want: Vec<f64> = scattered
                .iter()
                .zip(&into)
                .map(|(s, &o)| s + f64::from(beta) * f64::from(o))
                .collect();
            close(floats(&run(op, &args)[0]), &want, 1e-5);
        }
    }

    #[test]
    fn a_token_outside_the_table_is_nan_not_a_crash() {
        let y = run(
            Embed,
            &[
                i(Type::i32(dims![B 1, T 3]), &[1, 2, -1]),
                f(Type::f32(dims![V 2, D 1]), &[5.0, 6.0]),
            ],
        );
        assert_eq!(floats(&y[0])[0], 6.0);
        assert!(floats(&y[0])[1].is_nan() && floats(&y[0])[2].is_nan());
    }
}
