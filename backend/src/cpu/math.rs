//! Elementary functions without branches, so that loops over them vectorise inside [`super::simd::simd!`] bodies.
//!
//! Each is within 2.5 units in the last place of the exact value over its whole range (`sigmoid`, `silu` and `softplus` 3, measured in the tests
//! here against f64), passes NaN on and has the right limits. Polynomials are minimax fits in relative error, made by a Remez
//! exchange in rational arithmetic. All are bitwise equal on every instruction set.

/// 1.5 * 2^23: adding it rounds a float of magnitude below 2^22 to an integer that then sits in its low bits.
const ROUND: f32 = 12_582_912.0;

/// `e^x`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Below, e^x rounds to 0; above, to infinity. Comparisons this way round keep NaN.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 = 0.693359375 - 2.12194440e-4, the first exact in 9 bits.
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.985_781_2e-4f32;
    let p = p.mul_add(r, 1.393_363e-3);
    let p = p.mul_add(r, 8.333_361e-3);
    let p = p.mul_add(r, 4.166_646_5e-2);
    let p = p.mul_add(r, 0.166_666_67);
    let p = p.mul_add(r, 0.5);
    let y = (r * r).mul_add(p, r) + 1.0;
    // 2^n in two factors, because n reaches from -150 to 128.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let pow2 = |k: i32| f32::from_bits((k.wrapping_add(127) as u32) << 23);
    y * pow2(half) * pow2(n.wrapping_sub(half))
}

/// `ln(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]`.
#[inline(always)]
fn ln_1p_small(f: f32) -> (f32, f32) {
    let p = -0.077_780_48f32;
    let p = p.mul_add(f, 0.127_773_66);
    let p = p.mul_add(f, -0.131_140_36);
    let p = p.mul_add(f, 0.141_961_45);
    let p = p.mul_add(f, -0.166_270_94);
    let p = p.mul_add(f, 0.200_016_36);
    let p = p.mul_add(f, -0.250_007_8);
    let p = p.mul_add(f, 0.333_333_25);
    let p = p.mul_add(f, -0.5);
    (f, f * f * p)
}

/// `x = 2^k m`, m in [sqrt(1/2), sqrt(2)): (k, m - 1). For positive normal x.
#[inline(always)]
fn split(x: f32) -> (f32, f32) {
    // 0x3f3504f3 are the bits of sqrt(1/2).
    let shifted = (x.to_bits() as i32).wrapping_sub(0x3f35_04f3);
    let k = shifted >> 23;
    let m = f32::from_bits((shifted.wrapping_sub(k << 23)).wrapping_add(0x3f35_04f3) as u32);
    (k as f32, m - 1.0)
}

/// `ln x`.
#[inline(always)]
pub(super) fn ln(x: f32) -> f32 {
    let tiny = x < f32::MIN_POSITIVE;
    let scaled = if tiny { x * 8_388_608.0 } else { x };
    let (k, f) = split(scaled);
    let k = if tiny { k - 23.0 } else { k };
    let (a, b) = ln_1p_small(f);
    let y = k.mul_add(0.693_359_4, k.mul_add(-2.121_944_4e-4, b) + a);
    let y = if x == f32::INFINITY { x } else { y };
    let y = if x == 0.0 { f32::NEG_INFINITY } else { y };
    if x >= 0.0 { y } else { f32::NAN }
}

/// `ln(1 + x)` for x >= 0.
#[inline(always)]
pub(super) fn ln_1p(x: f32) -> f32 {
    let u = 1.0 + x;
    // What rounding took from 1 + x, relative to u: ln(u + c) = ln u + c/u.
    let c = (x - (u - 1.0)) / u;
    let (k, f) = split(u);
    let (a, b) = ln_1p_small(f);
    let y = k.mul_add(0.693_359_4, k.mul_add(-2.121_944_4e-4, b + c) + a);
    if x < f32::INFINITY { y } else { x }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x sigmoid(x)`.
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `sigmoid(x)` and `1 - sigmoid(x)`, neither by cancellation.
#[inline(always)]
fn sigmoid_pair(x: f32) -> (f32, f32) {
    let e = exp(-x.abs());
    let big = 1.0 / (1.0 + e);
    let small = e * big;
    if x < 0.0 { (small, big) } else { (big, small) }
}

/// Derivative of [`silu`].
#[inline(always)]
pub(super) fn d_silu(x: f32) -> f32 {
    let (s, rest) = sigmoid_pair(x);
    s * x.mul_add(rest, 1.0)
}

/// `ln(1 + e^x)`, x above 20.
#[inline(always)]
pub(super) fn softplus(x: f32) -> f32 {
    let y = ln_1p(exp(-x.abs()));
    let y = if x > 0.0 { x + y } else { y };
    if x > 20.0 { x } else { y }
}

/// `erf(a)/a` for a in [0, 1], from `a^2`.
#[inline(always)]
fn erf_over(z: f32) -> f32 {
    let p = 7.853_861e-5f32;
    let p = p.mul_add(z, -8.010_193e-4);
    let p = p.mul_add(z, 5.188_327_7e-3);
    let p = p.mul_add(z, -2.685_381_2e-2);
    let p = p.mul_add(z, 0.112_835_85);
    let p = p.mul_add(z, -0.376_126_26);
    p.mul_add(z, std::f32::consts::FRAC_2_SQRT_PI)
}

/// `erfc(a)` for a >= 1, given `e^(-a^2)`.
#[inline(always)]
fn erfc_large(a: f32, gauss: f32) -> f32 {
    let t = 2.0 / (2.0 + a);
    let p = 8.089_069e-2f32;
    let p = p.mul_add(t, -0.185_039_02);
    let p = p.mul_add(t, 2.505_796_4e-2);
    let p = p.mul_add(t, 0.105_344_48);
    let p = p.mul_add(t, 0.158_040_5);
    let p = p.mul_add(t, 0.252_967_62);
    let p = p.mul_add(t, 0.280_990_73);
    let p = p.mul_add(t, 0.282_199_4);
    let p = p.mul_add(t, -4.103_562e-6);
    p * gauss
}

/// The normal distribution function `Phi(x)` and density `phi(x)`.
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    let a = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let gauss = exp(-0.5 * x * x);
    let tail = 0.5 * erfc_large(a, gauss);
    let large = if x > 0.0 { 1.0 - tail } else { tail };
    let near = (0.5 * std::f32::consts::FRAC_1_SQRT_2 * x).mul_add(erf_over(a * a), 0.5);
    (if a < 1.0 { near } else { large }, 0.398_942_3 * gauss)
}

/// `x Phi(x)`.
#[inline(always)]
pub(super) fn gelu(x: f32) -> f32 {
    x * normal(x).0
}

/// Derivative of [`gelu`].
#[inline(always)]
pub(super) fn d_gelu(x: f32) -> f32 {
    let (cdf, pdf) = normal(x);
    x.mul_add(pdf, cdf)
}

/// `x/2 (1 + tanh(u)) = x sigmoid(2u)`, `u = sqrt(2/pi) (x + 0.044715 x^3)`; the right side does not cancel.
#[inline(always)]
pub(super) fn gelu_tanh(x: f32) -> f32 {
    x * sigmoid(twice_u(x))
}

/// `2u` of [`gelu_tanh`].
#[inline(always)]
fn twice_u(x: f32) -> f32 {
    TWICE_SQRT_2_OVER_PI * (0.044_715 * x * x).mul_add(x, x)
}

const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769;

/// Derivative of [`gelu_tanh`].
#[inline(always)]
pub(super) fn d_gelu_tanh(x: f32) -> f32 {
    let (s, rest) = sigmoid_pair(twice_u(x));
    let du = TWICE_SQRT_2_OVER_PI * (3.0 * 0.044_715 * x).mul_add(x, 1.0);
    s * (x * rest).mul_add(du, 1.0)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Distance in units in the last place of the exact value (of the smallest normal number below it).
    fn ulps(got: f32, exact: f64) -> f64 {
        let ulp =
            2f64.powi((exact.abs().max(f64::from(f32::MIN_POSITIVE)).log2().floor() as i32) - 23);
        (f64::from(got) - exact).abs() / ulp
    }

    fn worst(
        range: std::ops::Range<f64>,
        f: impl Fn(f32) -> f32,
        exact: impl Fn(f64) -> f64,
    ) -> f64 {
        let n = 200_000;
        let mut worst = 0.0f64;
        for i in 0..n {
            let x = (range.start + (range.end - range.start) * f64::from(i) / f64::from(n)) as f32;
            worst = worst.max(ulps(f(x), exact(f64::from(x))));
        }
        worst
    }

    /// `erfc x` in f64: Taylor series of erf below 3, continued fraction above (Abramowitz and Stegun 7.1.6, 7.1.14).
    pub(crate) fn erfc64(x: f64) -> f64 {
        if x < 0.0 {
            return 2.0 - erfc64(-x);
        }
        let scale = (-x * x).exp() / std::f64::consts::PI.sqrt();
        if x < 3.0 {
            let (mut term, mut sum, mut n) = (2.0 * x, 2.0 * x, 0.0);
            while term > 1e-18 * sum {
                n += 1.0;
                term *= 2.0 * x * x / (2.0 * n + 1.0);
                sum += term;
            }
            return 1.0 - scale * sum;
        }
        let mut frac = x;
        for k in (1..200).rev() {
            frac = x + f64::from(k) / 2.0 / frac;
        }
        scale / frac
    }

    #[test]
    fn within_a_few_units_of_f64() {
        let sig = |x: f64| 1.0 / (1.0 + (-x).exp());
        for (name, bound, got) in [
            ("exp", 2.0, worst(-87.0..88.7, exp, f64::exp)),
            ("exp near 0", 2.0, worst(-1.0..1.0, exp, f64::exp)),
            ("ln", 2.0, worst(1e-30..3.0, ln, f64::ln)),
            ("ln large", 2.0, worst(1.0..1e30, ln, f64::ln)),
            ("ln_1p", 2.5, worst(0.0..1.0, ln_1p, f64::ln_1p)),
            ("ln_1p large", 2.0, worst(1.0..1e6, ln_1p, f64::ln_1p)),
            ("sigmoid", 3.0, worst(-87.0..30.0, sigmoid, sig)),
            ("silu", 3.0, worst(-80.0..30.0, silu, |x| x * sig(x))),
            (
                "softplus",
                3.0,
                worst(-80.0..19.9, softplus, |x| x.exp().ln_1p()),
            ),
        ] {
            println!("{name}: {got:.2} ulp");
            assert!(got <= bound, "{name}: {got} ulp");
        }
    }

    /// Differences of rounded terms: bounded in absolute error.
    #[test]
    fn gelu_and_derivatives_are_close() {
        let cdf = |x: f64| 0.5 * erfc64(-x / 2f64.sqrt());
        let pdf = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let sig = |x: f64| 1.0 / (1.0 + (-x).exp());
        let gt = |x: f64| {
            0.5 * x
                * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        };
        let h = 1e-5;
        for i in -1000..1000 {
            let x = f64::from(i) / 100.0;
            let y = x as f32;
            let x = f64::from(y);
            for (name, got, exact) in [
                ("gelu", gelu(y), x * cdf(x)),
                ("d_gelu", d_gelu(y), cdf(x) + x * pdf(x)),
                ("d_silu", d_silu(y), sig(x) * (1.0 + x * (1.0 - sig(x)))),
                ("gelu_tanh", gelu_tanh(y), gt(x)),
                (
                    "d_gelu_tanh",
                    d_gelu_tanh(y),
                    (gt(x + h) - gt(x - h)) / (2.0 * h),
                ),
            ] {
                let bound = 4e-7 * (1.0 + exact.abs());
                assert!(
                    (f64::from(got) - exact).abs() < bound,
                    "{name}({x}) = {got}, not {exact}"
                );
            }
        }
    }

    #[test]
    fn limits_and_nan() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(ln(0.0), f32::NEG_INFINITY);
        assert_eq!(ln(f32::INFINITY), f32::INFINITY);
        assert!(ln(-1.0).is_nan());
        assert_eq!(ln(1.0), 0.0);
        assert!((ln(1e-40) - (1e-40f64).ln() as f32).abs() < 1e-3);
        assert_eq!(sigmoid(f32::NEG_INFINITY), 0.0);
        assert_eq!(sigmoid(f32::INFINITY), 1.0);
        assert_eq!(softplus(1000.0), 1000.0);
        assert_eq!(softplus(-1000.0), 0.0);
        assert_eq!(gelu(30.0), 30.0);
        assert_eq!(gelu(-30.0), 0.0);
        for f in [
            exp,
            ln,
            ln_1p,
            sigmoid,
            silu,
            softplus,
            gelu,
            gelu_tanh,
            d_silu,
            d_gelu,
            d_gelu_tanh,
        ] {
            assert!(f(f32::NAN).is_nan());
        }
    }
}
