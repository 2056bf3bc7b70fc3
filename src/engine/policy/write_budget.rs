//! How much may be written to a disk that wears out.

pub use crate::config::nvme::WriteRate;

/// Of a budget so much may be written in one go. What is left over comes at a steady rate, so that
/// no stretch of time as long as the budget's own sees more than the budget.
const BURST_SHARE: u64 = 20;

/// What is left of a [`WriteRate`].
///
/// Guarantee: what [`WriteBudget::take`] grants within any `seconds` of the rate is at most its
/// `bytes`. It begins with nothing, so that a process that starts over and over keeps to it, too.
#[derive(Debug, Clone)]
pub struct WriteBudget {
    /// Bytes at most in one go.
    burst: f64,
    bytes_per_s: f64,
    left: f64,
    /// When `left` was that, in seconds of any clock that never goes back.
    at_s: f64,
}

impl WriteBudget {
    /// A budget for writes of up to `unit` bytes each, from `now_s` on. `None`: it is so small that
    /// no unit could ever be written.
    pub fn new(rate: WriteRate, unit: u64, now_s: f64) -> Option<Self> {
        let burst = (rate.bytes / BURST_SHARE).max(unit);
        let steady = rate.bytes.checked_sub(burst).filter(|bytes| *bytes > 0)?;
        let bytes_per_s = steady as f64 / f64::from(rate.seconds.max(1));
        Some(Self { burst: burst as f64, bytes_per_s, left: 0.0, at_s: now_s })
    }

    /// Takes what a write needs. `false`: there is not as much left, and nothing is taken.
    pub fn take(&mut self, now_s: f64, bytes: u64) -> bool {
        self.left = self.left(now_s);
        self.at_s = self.at_s.max(now_s);
        let bytes = bytes as f64;
        if bytes > self.left {
            return false;
        }
        self.left -= bytes;
        true
    }

    /// Whole bytes that could be written at this moment.
    #[expect(clippy::cast_sign_loss, reason = "it is never less than nothing")]
    pub fn bytes_left(&self, now_s: f64) -> u64 {
        self.left(now_s) as u64
    }

    fn left(&self, now_s: f64) -> f64 {
        (self.left + (now_s - self.at_s).max(0.0) * self.bytes_per_s).min(self.burst)
    }

    /// Less than half of what may be written in one go is left: it is kept for what pays.
    pub fn is_short(&self, now_s: f64) -> bool {
        self.left(now_s) < self.burst / 2.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_begins_empty_and_fills_to_its_burst() {
        let mut budget = WriteBudget::new(WriteRate { bytes: 2_000, seconds: 100 }, 10, 5.0).expect("a budget");
        assert!(!budget.take(5.0, 10));
        assert!(budget.take(6.0, 19) && !budget.take(6.0, 1), "19 bytes a second");
        assert!((budget.left(1_000.0) - 100.0).abs() < 1e-9, "a twentieth");
        assert!(!budget.is_short(1_000.0) && budget.is_short(8.0));
        assert!(!budget.take(3.0, 1), "a clock that goes back gives nothing");
    }

    #[test]
    fn one_that_no_unit_fits_into_is_none() {
        let rate = WriteRate { bytes: 2_000, seconds: 100 };
        assert!(WriteBudget::new(rate, 2_000, 0.0).is_none());
        let mut tight = WriteBudget::new(rate, 1_999, 0.0).expect("one unit");
        assert!(tight.take(199_900.0, 1_999), "however slowly");
    }

    proptest! {
        #[test]
        fn no_stretch_of_time_sees_more_than_the_budget(
            bytes in 100_u64..100_000,
            seconds in 1_u32..1_000,
            unit in 1_u64..50,
            wishes in proptest::collection::vec((0.0_f64..30.0, 1_u64..50), 1..200),
        ) {
            let Some(mut budget) = WriteBudget::new(WriteRate { bytes, seconds }, unit, 0.0) else { return Ok(()) };
            let (mut now_s, mut written) = (0.0, Vec::new());
            for (pause, units) in wishes {
                now_s += pause;
                for _ in 0..units {
                    if budget.take(now_s, unit) {
                        written.push((now_s, unit));
                    }
                }
            }
            for (at, (from, _)) in written.iter().enumerate() {
                let within = written[at..].iter().take_while(|(to, _)| to - from < f64::from(seconds));
                let sum: u64 = within.map(|(_, bytes)| bytes).sum();
                prop_assert!(sum <= bytes, "{sum} from {from}");
            }
        }
    }
}
