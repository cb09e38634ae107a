//! The last token of each row, and its derivative. `reshape` and `rows` are the same bytes and run nothing.

use super::tensor::{Args, Cx, Results};
use marimba_ir::op::{Last, LastBwd};

/// `y[b,0,:] = x[b,T-1,:]`.
pub(super) fn last(_: &Last, a: &Args, r: &mut Results, _: &Cx) {
    let (t, d) = (a.ty(0).size(1), a.ty(0).size(2));
    let x = a.f(0);
    for (y, x) in r
        .take_f(0)
        .chunks_exact_mut(d.max(1))
        .zip(x.chunks_exact((t * d).max(1)))
    {
        y.copy_from_slice(&x[(t - 1) * d..]);
    }
}

/// `dx[b,T-1,:] = dy[b,0,:]`, zero elsewhere.
pub(super) fn last_bwd(op: &LastBwd, a: &Args, r: &mut Results, _: &Cx) {
    let (t, d) = (op.time, a.ty(0).size(2));
    let dy = a.f(0);
    for (dx, dy) in r
        .take_f(0)
        .chunks_exact_mut((t * d).max(1))
        .zip(dy.chunks_exact(d.max(1)))
    {
        let (zero, tail) = dx.split_at_mut((t - 1) * d);
        zero.fill(0.0);
        tail.copy_from_slice(dy);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use marimba_ir::{Type, dims};

    #[test]
    fn picks_the_last_token_and_gives_it_the_gradient() {
        let x = randn(1, 2 * 3 * 4);
        let y = run(Last, &[f(Type::f32(dims![B 2, T 3, D 4]), &x)]);
        assert_eq!(floats(&y[0]), [&x[8..12], &x[20..24]].concat());
        let dx = run(
            LastBwd { time: 3 },
            &[f(Type::f32(dims![B 2, T 1, D 4]), floats(&y[0]))],
        );
        let mut want = vec![0.0; 24];
        want[8..12].copy_from_slice(&x[8..12]);
        want[20..24].copy_from_slice(&x[20..24]);
        assert_eq!(floats(&dx[0]), want);
    }
}
