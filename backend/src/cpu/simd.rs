//! One body, compiled for several instruction sets, chosen at run time: binaries stay portable.
//!
//! [`simd!`] wraps a function whose loops the compiler vectorises. What the body calls must be `#[inline(always)]`, or it falls back to
//! the baseline (SSE2 on x86-64). Sums do not vectorise by themselves (order matters); [`dot`], [`sum`] and friends keep
//! [`LANES`] partial sums, always in the same order, so that results are equal on every instruction set. Multiply-adds are fused
//! (`f32::mul_add`), by software where the machine cannot: slow there, but the same bits.

#![allow(unsafe_code)] // calls of functions compiled for instruction sets that were just detected

/// Partial sums of a reduction: two AVX-512 registers, four AVX2 registers.
pub(super) const LANES: usize = 32;

/// Instruction sets that bodies are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    /// What the target guarantees.
    Base,
    /// AVX2 and FMA (x86-64-v3).
    Avx2,
    /// AVX-512 F, BW, CD, DQ, VL (x86-64-v4).
    Avx512,
}

/// The best level of this machine. The standard library caches the answer.
#[inline(always)]
pub(super) fn level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
        {
            if std::arch::is_x86_feature_detected!("avx512f")
                && std::arch::is_x86_feature_detected!("avx512bw")
                && std::arch::is_x86_feature_detected!("avx512cd")
                && std::arch::is_x86_feature_detected!("avx512dq")
                && std::arch::is_x86_feature_detected!("avx512vl")
            {
                return Level::Avx512;
            }
            return Level::Avx2;
        }
    }
    Level::Base
}

/// `simd! { pub(super) fn scale(x: &mut [f32], c: f32) { for v in x { *v *= c } } }`: compiles the body for each [`Level`] and calls the
/// best. Const generics go in square brackets after the name, `fn f[const N: usize](..)`; such functions are called as usual,
/// `f::<4>(..)`. Arguments are plain names; `impl Fn` types are fine.
macro_rules! simd {
    ($($(#[$m:meta])* $vis:vis fn $name:ident $([$(const $c:ident: $ct:ty),*])? ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$m])*
        #[inline]
        #[allow(unsafe_code, clippy::too_many_arguments)]
        $vis fn $name $(<$(const $c: $ct),*>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body $(<$(const $c: $ct),*>)? ($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
            fn avx2 $(<$(const $c: $ct),*>)? ($($arg: $ty),*) $(-> $ret)? {
                body$(::<$($c),*>)?($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
            fn avx512 $(<$(const $c: $ct),*>)? ($($arg: $ty),*) $(-> $ret)? {
                body$(::<$($c),*>)?($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            match $crate::cpu::simd::level() {
                // SAFETY: `level` has just found these instruction sets.
                $crate::cpu::simd::Level::Avx512 => return unsafe { avx512$(::<$($c),*>)?($($arg),*) },
                // SAFETY: as above.
                $crate::cpu::simd::Level::Avx2 => return unsafe { avx2$(::<$($c),*>)?($($arg),*) },
                $crate::cpu::simd::Level::Base => {}
            }
            body$(::<$($c),*>)?($($arg),*)
        }
    )*};
}
pub(super) use simd;

/// Sum of lanes by halving: a fixed tree.
#[inline(always)]
pub(super) fn fold(mut acc: [f32; LANES]) -> f32 {
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            acc[i] += acc[i + n];
        }
        n /= 2;
    }
    acc[0]
}

/// `sum_i f(i-th element of x, of y)` in [`LANES`] partial sums; `f` adds to its first argument. For use inside [`simd!`] bodies.
#[inline(always)]
pub(super) fn fold2(x: &[f32], y: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut acc = [0.0f32; LANES];
    let n = x.len().min(y.len());
    let (x, y) = (&x[..n], &y[..n]);
    let (mut xs, mut ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    for (a, b) in (&mut xs).zip(&mut ys) {
        for i in 0..LANES {
            acc[i] = f(acc[i], a[i], b[i]);
        }
    }
    for (i, (&a, &b)) in xs.remainder().iter().zip(ys.remainder()).enumerate() {
        acc[i] = f(acc[i], a, b);
    }
    fold(acc)
}

/// `x . y`. For use inside [`simd!`] bodies.
#[inline(always)]
pub(super) fn dot(x: &[f32], y: &[f32]) -> f32 {
    fold2(x, y, |acc, a, b| a.mul_add(b, acc))
}

/// Sum of `x`. For use inside [`simd!`] bodies.
#[inline(always)]
pub(super) fn sum(x: &[f32]) -> f32 {
    fold2(x, x, |acc, a, _| acc + a)
}

/// Largest of `x`; negative infinity for none; NaNs are passed over. For use inside [`simd!`] bodies.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; LANES];
    let mut xs = x.chunks_exact(LANES);
    for a in &mut xs {
        for i in 0..LANES {
            acc[i] = if a[i] > acc[i] { a[i] } else { acc[i] };
        }
    }
    for (i, &a) in xs.remainder().iter().enumerate() {
        acc[i] = if a > acc[i] { a } else { acc[i] };
    }
    acc.iter()
        .fold(f32::NEG_INFINITY, |m, &a| if a > m { a } else { m })
}

/// `y += c x`. For use inside [`simd!`] bodies.
#[inline(always)]
pub(super) fn axpy(c: f32, x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = c.mul_add(x, *y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    simd! {
        fn dots(x: &[f32], y: &[f32]) -> (f32, f32, f32) { (dot(x, y), sum(x), max(x)) }
        fn scaled[const N: usize](x: &mut [f32]) { for v in x { *v *= N as f32 } }
    }

    #[test]
    fn reductions_have_the_same_bits_at_every_level() {
        for n in [0, 1, 31, 32, 33, 1000] {
            let x: Vec<f32> = (0..n)
                .map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0)
                .collect();
            let y: Vec<f32> = (0..n)
                .map(|i| ((i * 53 % 97) as f32 - 40.0) / 9.0)
                .collect();
            let exact: f64 = x
                .iter()
                .zip(&y)
                .map(|(&a, &b)| f64::from(a) * f64::from(b))
                .sum();
            assert_eq!(dots(&x, &y), (dot(&x, &y), sum(&x), max(&x)));
            assert!((f64::from(dot(&x, &y)) - exact).abs() < 1e-3);
        }
        let mut x = [1.0, 2.0];
        scaled::<3>(&mut x);
        assert_eq!(x, [3.0, 6.0]);
    }
}
