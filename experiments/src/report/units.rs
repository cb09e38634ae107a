//! Numbers as people read them.

/// A count with a metric prefix: `412.7k`, `9.78B`.
pub fn count(x: f64) -> String {
    prefixed(x, 1000.0, &["", "k", "M", "B", "T", "P", "E"])
}

/// Bytes with a binary prefix: `36.0 KiB`.
pub fn bytes(x: f64) -> String {
    prefixed(x, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB", " PiB"])
}

fn prefixed(x: f64, base: f64, prefixes: &[&str]) -> String {
    if !x.is_finite() {
        return number(x);
    }
    let mut index = 0;
    let mut value = x;
    // 999.95 would print as 1000.0.
    while value.abs() >= base * (1.0 - 0.5e-3) && index + 1 < prefixes.len() {
        value /= base;
        index += 1;
    }
    let digits = if index == 0 && value.fract() == 0.0 {
        0
    } else if value.abs() < 10.0 {
        2
    } else {
        1
    };
    format!("{value:.digits$}{}", prefixes[index])
}

/// About four significant digits: `0.9938`, `12.3`, `1.2e-7`.
pub fn number(x: f64) -> String {
    let size = x.abs();
    if x.is_nan() {
        "nan".to_owned()
    } else if x.is_infinite() {
        if x > 0.0 { "inf" } else { "-inf" }.to_owned()
    } else if size == 0.0 {
        "0".to_owned()
    } else if !(1e-3..1e6).contains(&size) {
        format!("{x:.2e}")
    } else {
        let digits = (3 - size.log10().floor() as i32).clamp(0, 4) as usize;
        format!("{x:.digits$}")
    }
}

/// `0.9938 ± 0.0012`, both to the digits that the spread leaves meaningful.
pub fn mean_sd(mean: f64, sd: Option<f64>) -> String {
    match sd {
        Some(sd) if sd > 0.0 && sd.is_finite() && (1e-3..1e6).contains(&mean.abs().max(sd)) => {
            let digits = (1 - sd.log10().floor() as i32).clamp(0, 4) as usize;
            format!("{mean:.digits$} ± {sd:.digits$}")
        }
        Some(sd) => format!("{} ± {}", number(mean), number(sd)),
        None => number(mean),
    }
}

/// `0.165 to 0.256`, to the digits that its width leaves meaningful.
pub fn interval((low, high): (f64, f64)) -> String {
    let half = 0.5 * (high - low);
    let size = low.abs().max(high.abs());
    if half > 0.0 && half.is_finite() && (1e-3..1e6).contains(&size) {
        let digits = (1 - half.log10().floor() as i32).clamp(0, 4) as usize;
        format!("{low:.digits$} to {high:.digits$}")
    } else {
        format!("{} to {}", number(low), number(high))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        assert_eq!(
            ["0", "999", "412.7k", "1.00M", "9.78B"].map(String::from),
            [0.0, 999.0, 412_672.0, 999_960.0, 9.78e9].map(count)
        );
        assert_eq!(
            ["0 B", "512 B", "36.0 KiB", "1.00 MiB"].map(String::from),
            [0.0, 512.0, 36864.0, 1048576.0].map(bytes)
        );
        assert_eq!(
            ["0.9938", "12.35", "1235", "1.23e-7", "nan"].map(String::from),
            [0.99384, 12.345001, 1234.6, 1.23e-7, f64::NAN].map(number)
        );
        assert_eq!(mean_sd(0.98765, Some(0.0123)), "0.988 ± 0.012");
        assert_eq!(mean_sd(0.98765, None), "0.9877");
        assert_eq!(mean_sd(0.0, Some(0.0)), "0 ± 0");
        assert_eq!(interval((0.16478, 0.25641)), "0.165 to 0.256");
        assert_eq!(interval((-1.0, 14.0)), "-1.0 to 14.0");
        assert_eq!(interval((2.0, 2.0)), "2.000 to 2.000");
    }
}
