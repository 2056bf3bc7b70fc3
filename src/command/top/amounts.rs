//! Numbers as people read them in a narrow column.

/// At most five characters of a number.
pub(super) fn short(value: f64) -> String {
    let value = if value.is_finite() { value.max(0.0) } else { 0.0 };
    for (size, letter) in [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")] {
        if value >= size {
            let scaled = value / size;
            let digits = usize::from(scaled < 99.95);
            return format!("{scaled:.digits$}{letter}");
        }
    }
    format!("{value:.0}")
}

/// A count that may be missing.
pub(super) fn blocks(count: Option<u64>) -> String {
    count.map_or_else(|| "-".to_owned(), |count| short(count as f64))
}

/// A share of 1.
pub(super) fn percent(share: f64) -> String {
    format!("{:.0}%", if share.is_finite() { (100.0 * share).clamp(0.0, 999.0) } else { 0.0 })
}

/// A short time, given in s.
pub(super) fn seconds(value: f64) -> String {
    if value < 1.0 { format!("{:.0} ms", 1000.0 * value.max(0.0)) } else { format!("{} s", tenths(value)) }
}

fn tenths(value: f64) -> String {
    if value < 10.0 { format!("{value:.1}") } else { short(value) }
}

/// A time that has passed, given in s.
pub(super) fn age(value: f64) -> String {
    match value {
        value if value < 100.0 => format!("{value:.0} s"),
        value if value < 6_000.0 => format!("{:.0} min", value / 60.0),
        value => format!("{} h", tenths(value / 3600.0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let cases = [(0.0, "0"), (999.0, "999"), (1_234.0, "1.2k"), (99_960.0, "100k"), (5e6, "5.0M"), (f64::NAN, "0")];
        for (value, wanted) in cases {
            assert_eq!(short(value), wanted);
        }
        assert_eq!([seconds(0.0004), seconds(3.21), seconds(75.0)], ["0 ms", "3.2 s", "75 s"]);
        assert_eq!([age(5.0), age(600.0), age(7_200.0)], ["5 s", "10 min", "2.0 h"]);
    }
}
