//! Sizes with units, as people write them.

use parse_size::Config as Units;
use serde_json::Value;

use super::wrong;
use kvcellar_block::error::Result;

/// Parses a positive size in bytes: a whole number, or text such as `"4GiB"` (powers of 1024) or
/// `"4GB"` (powers of 1000).
///
/// # Errors
/// [`kvcellar_block::error::Error::Config`] naming `key` for anything else.
pub fn parse(key: &str, value: &Value) -> Result<u64> {
    parse_or_zero(key, value).ok().filter(|bytes| *bytes > 0).ok_or_else(|| wrong(key, value))
}

/// The same for a size that may be 0.
///
/// # Errors
/// As [`parse`].
pub fn parse_or_zero(key: &str, value: &Value) -> Result<u64> {
    let bytes = match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => Units::new().with_decimal().parse_size(text).ok(),
        _ => None,
    };
    bytes.ok_or_else(|| wrong(key, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_read() {
        let read = |text: &str| parse("dram_size", &Value::from(text)).ok();
        assert_eq!(read("4GiB"), Some(4 << 30));
        assert_eq!(read("4GB"), Some(4_000_000_000));
        assert_eq!(read("64 MiB"), Some(64 << 20));
        assert_eq!(read("-4GiB"), None);
        assert_eq!(read(""), None);
    }

    #[test]
    fn only_some_sizes_may_be_zero() {
        for zero in [Value::from(0), Value::from("0"), Value::from("0GiB")] {
            assert_eq!(parse_or_zero("nvme_reserve", &zero).ok(), Some(0), "{zero}");
            assert!(parse("dram_size", &zero).is_err(), "{zero}");
        }
        assert!(parse_or_zero("nvme_reserve", &Value::from(-1)).is_err());
        assert!(parse_or_zero("nvme_reserve", &Value::from(false)).is_err());
    }
}
