//! How many requests may be sent a second time.
//!
//! A retry costs an engine as much as a request. Without a bound a fleet that fails under its load
//! would get twice the load. Every request earns a share of a retry, and a few are there from the
//! start: retries are at most [`SHARE_PERCENT`] of the requests in the long run, and
//! [`BURST`] at once.

use std::sync::atomic::{AtomicU32, Ordering};

/// Retries among a hundred requests.
pub const SHARE_PERCENT: u32 = 20;
/// Retries at once.
pub const BURST: u32 = 20;

/// In hundredths of a retry.
#[derive(Debug)]
pub struct RetryBudget(AtomicU32);

impl Default for RetryBudget {
    fn default() -> Self {
        Self(AtomicU32::new(100 * BURST))
    }
}

impl RetryBudget {
    /// A request has come.
    pub fn earn(&self) {
        let earned = |left: u32| Some((left + SHARE_PERCENT).min(100 * BURST));
        let _before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, earned);
    }

    /// Takes a retry; `false`: there is none left.
    pub fn spend(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(100)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifth_of_the_requests() {
        let budget = RetryBudget::default();
        assert_eq!((0..100).filter(|_| budget.spend()).count(), BURST as usize);
        let retried = (0..1000).filter(|_| {
            budget.earn();
            budget.spend()
        });
        assert_eq!(retried.count(), 200);
        (0..10_000).for_each(|_| budget.earn());
        assert_eq!((0..100).filter(|_| budget.spend()).count(), BURST as usize, "idle time saves up no more");
    }
}
