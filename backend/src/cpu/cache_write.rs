//! Appends keys or values to a cache: see `ir/src/op/cache_write.rs`. The cache is the result; only new rows are written.

use super::tensor::{Args, Cx, Results};
use marimba_ir::op;

/// Forward.
pub(super) fn cache_write(_: &op::CacheWrite, a: &Args, r: &mut Results, _: &Cx) {
    let (x, slot) = (a.f(1), a.i(2)[0].max(0) as usize);
    let cache = r.take_f(0);
    let ty = a.ty(1);
    let width = ty.size(2) * ty.size(3);
    let (row, slots) = (ty.size(1) * width, a.ty(0).size(1) * width);
    if row == 0 {
        return;
    }
    for (cache, x) in cache.chunks_exact_mut(slots).zip(x.chunks_exact(row)) {
        cache[slot * width..][..row].copy_from_slice(x);
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{floats, ints, noise, run};
    use super::*;
    use marimba_ir::dims;

    #[test]
    fn writes_only_the_new_rows() {
        let (b, s, g, p, t) = (2, 9, 2, 3, 4);
        let cache = noise(1, b * s * g * p, 1.0);
        let x = noise(2, b * t * g * p, 1.0);
        for slot in [0, 3, 5] {
            let args = [
                floats(dims![B b, S s, G g, P p], &cache),
                floats(dims![B b, T t, G g, P p], &x),
                ints(dims![X 1], &[slot as i32]),
            ];
            let got = run(&op::CacheWrite, &args, cache_write);
            for i in 0..b * s * g * p {
                let (row, at) = (i / (s * g * p), i % (s * g * p));
                let new = (slot * g * p..(slot + t) * g * p).contains(&at);
                let want = if new {
                    x[row * t * g * p + at - slot * g * p]
                } else {
                    cache[i]
                };
                assert_eq!(got[0][i], want);
            }
        }
    }
}
