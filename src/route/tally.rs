//! What is counted of one engine's requests.
//!
//! The counts belong to the engine and go with it: no series of an engine that left the fleet stays
//! behind, neither in memory nor in `/metrics`. One that comes back begins at 0, as after a
//! restart, which Prometheus's `rate` and `increase` understand. [`super::metrics::Metrics`] counts
//! ends and retries of the router as a whole, which no leaving engine takes along.

use std::sync::atomic::{AtomicU64, Ordering};

use super::outcome::Outcome;
use super::prefix_source::PrefixSource;

/// Counts of one engine.
#[derive(Debug, Default)]
pub struct Tally {
    decisions: [AtomicU64; PrefixSource::ALL.len()],
    outcomes: [AtomicU64; Outcome::ALL.len()],
    prefills: [AtomicU64; 2],
    retries: AtomicU64,
    sources: AtomicU64,
}

impl Tally {
    /// A decision for it was made.
    pub fn decided(&self, prefix: PrefixSource) {
        self.decisions[prefix as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// One of its requests has ended.
    pub fn ended(&self, outcome: Outcome) {
        self.outcomes[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// It computed a prompt for another engine, or failed to.
    pub fn prefilled(&self, done: bool) {
        self.prefills[usize::from(done)].fetch_add(1, Ordering::Relaxed);
    }

    /// Another engine got a request after this one failed.
    pub fn retried(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    /// A request was told to fetch KV from it.
    pub fn sourced(&self) {
        self.sources.fetch_add(1, Ordering::Relaxed);
    }

    /// Decisions so far, by where prefixes were looked up.
    pub fn decisions(&self) -> impl Iterator<Item = (&'static str, u64)> {
        PrefixSource::ALL.iter().zip(&self.decisions).map(|(prefix, count)| (prefix.as_str(), value(count)))
    }

    /// Requests that ended, by how.
    pub fn outcomes(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Outcome::ALL.iter().zip(&self.outcomes).map(|(outcome, count)| (outcome.as_str(), value(count)))
    }

    /// Prompts that it computed for others, by how that ended.
    pub fn prefills(&self) -> impl Iterator<Item = (&'static str, u64)> {
        ["failed", "done"].into_iter().zip(&self.prefills).map(|(outcome, count)| (outcome, value(count)))
    }

    /// Requests that others got after it failed.
    pub fn retries(&self) -> u64 {
        value(&self.retries)
    }

    /// Requests that were told to fetch KV from it.
    pub fn sources(&self) -> u64 {
        value(&self.sources)
    }
}

fn value(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_shown_under_its_name() {
        let tally = Tally::default();
        for (at, prefix) in PrefixSource::ALL.into_iter().enumerate() {
            (0..=at).for_each(|_| tally.decided(prefix));
        }
        for (at, outcome) in Outcome::ALL.into_iter().enumerate() {
            (0..=at).for_each(|_| tally.ended(outcome));
        }
        tally.prefilled(true);
        tally.retried();
        (0..2).for_each(|_| tally.sourced());
        let decisions: Vec<_> = tally.decisions().collect();
        assert_eq!(decisions, [("precise", 1), ("approximate", 2), ("none", 3)]);
        let names: Vec<_> = tally.outcomes().map(|(name, _)| name).collect();
        assert_eq!(names, ["open", "done", "aborted", "failed", "timeout", "broken", "engine_error"]);
        assert!(tally.outcomes().map(|(_, count)| count).eq(1..=Outcome::ALL.len() as u64));
        assert_eq!(tally.prefills().collect::<Vec<_>>(), [("failed", 0), ("done", 1)]);
        assert_eq!((tally.retries(), tally.sources()), (1, 2));
    }
}
