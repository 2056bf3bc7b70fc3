//! What the requests of each prefix have lost because too few engines hold it: the credit for which
//! it is computed once more ([`super::cost`]). The least recently asked are forgotten.

use std::num::NonZeroUsize;

use lru::LruCache;

use crate::limits;

/// Credits by the key of a prefix's last block.
#[derive(Debug)]
pub struct Credits(LruCache<u64, f64>);

impl Default for Credits {
    fn default() -> Self {
        Self(LruCache::new(NonZeroUsize::new(limits::CREDITS_MAX).unwrap_or(NonZeroUsize::MIN)))
    }
}

impl Credits {
    /// A prefix's credit, in seconds.
    pub fn of(&self, prefix: u64) -> f64 {
        self.0.peek(&prefix).copied().unwrap_or(0.0)
    }

    /// Its credit is now so much.
    pub fn settle(&mut self, prefix: u64, credit_s: f64) {
        if credit_s > 0.0 {
            self.0.put(prefix, credit_s);
        } else {
            self.0.pop(&prefix);
        }
    }

    /// The last `count`, oldest first.
    pub fn last(&self, count: usize) -> Vec<(u64, f64)> {
        let mut last: Vec<_> = self.0.iter().take(count).map(|(prefix, credit_s)| (*prefix, *credit_s)).collect();
        last.reverse();
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credits_are_bounded() {
        let mut credits = Credits::default();
        (0..=limits::CREDITS_MAX as u64).for_each(|prefix| credits.settle(prefix, 1.0));
        assert_eq!((credits.0.len(), credits.of(0)), (limits::CREDITS_MAX, 0.0));
        credits.settle(1, 0.0);
        assert_eq!((credits.0.len(), credits.of(1)), (limits::CREDITS_MAX - 1, 0.0));
        assert_eq!(credits.last(1), [(limits::CREDITS_MAX as u64, 1.0)]);
    }
}
