//! What engines probably hold, without their events: whoever got a prompt has it, until it was
//! probably evicted.
//!
//! Each engine has a recency list of prefix hashes. A prompt's first block counts as used after its
//! last one, so a prefix always outlives what follows it, and the longest held prefix is found by
//! halving. The bound of a list is the engine's own capacity where it tells it, and it learns: an
//! answer that says fewer cached tokens than were expected shows what age the engine has already
//! evicted.

use std::num::NonZeroUsize;

use lru::LruCache;

/// Blocks remembered of an engine that does not tell its size.
pub const BLOCKS_DEFAULT: usize = 31_250;

const BLOCKS_MIN: u64 = 64;

/// One engine's list.
#[derive(Debug)]
pub struct Recent {
    /// Hash to the count of blocks at its last use.
    blocks: LruCache<u64, u64>,
    /// Blocks used so far.
    clock: u64,
    /// What the engine is taken to hold, in blocks.
    capacity: u64,
    capacity_max: u64,
}

impl Default for Recent {
    fn default() -> Self {
        Self::new(BLOCKS_DEFAULT)
    }
}

impl Recent {
    /// Nothing yet, of an engine that holds so many blocks.
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.max(1);
        Self {
            blocks: LruCache::new(NonZeroUsize::new(capacity).unwrap_or(NonZeroUsize::MIN)),
            clock: 0,
            capacity: capacity as u64,
            capacity_max: capacity as u64,
        }
    }

    /// Leading blocks of a prompt that are probably held.
    pub fn held(&self, hashes: &[u64]) -> usize {
        hashes.partition_point(|hash| self.blocks.contains(hash))
    }

    /// The engine gets this prompt. What is too old by now is forgotten.
    pub fn used(&mut self, hashes: &[u64]) {
        for hash in hashes.iter().rev() {
            self.clock += 1;
            self.blocks.put(*hash, self.clock);
        }
        while self.blocks.len() as u64 > self.capacity {
            self.blocks.pop_lru();
        }
    }

    /// The engine gets this prompt. Returns its age until now, for [`Self::learn`].
    pub fn give(&mut self, hashes: &[u64]) -> u64 {
        let age = self.age(hashes);
        self.used(hashes);
        age
    }

    /// The engine said how much of a prompt it had, of which `expected` blocks were taken to be
    /// held. `age`: what [`Self::give`] said at the decision.
    pub fn learn(&mut self, expected: usize, found: usize, age: u64) {
        if found < expected && age >= BLOCKS_MIN {
            // It had evicted what was that old.
            self.capacity = self.capacity.min(age).max(BLOCKS_MIN);
            while self.blocks.len() as u64 > self.capacity {
                self.blocks.pop_lru();
            }
        } else if found >= expected && expected > 0 && age * 10 >= self.capacity * 9 {
            // It holds more than was thought.
            self.capacity = (self.capacity + self.capacity / 16 + 1).min(self.capacity_max);
        }
    }

    /// How many blocks were used since the first block of this prompt was.
    pub fn age(&self, hashes: &[u64]) -> u64 {
        let last = hashes.first().and_then(|hash| self.blocks.peek(hash));
        last.map_or(0, |last| self.clock - last)
    }

    /// Holds nothing any more: it was started anew.
    pub fn clear(&mut self) {
        self.blocks.clear();
    }

    /// The engine has told its size.
    pub fn resize(&mut self, capacity: usize) {
        if capacity as u64 != self.capacity_max && capacity > 0 {
            (self.capacity, self.capacity_max) = (capacity as u64, capacity as u64);
            self.blocks.resize(NonZeroUsize::new(capacity).unwrap_or(NonZeroUsize::MIN));
        }
    }

    /// Blocks remembered, and what the engine is taken to hold.
    pub fn sizes(&self) -> (usize, u64) {
        (self.blocks.len(), self.capacity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(name: u64, blocks: u64) -> Vec<u64> {
        (0..blocks).map(|block| name << 32 | block).collect()
    }

    #[test]
    fn a_prefix_outlives_what_follows_it() {
        let mut recent = Recent::new(100);
        recent.used(&prompt(1, 60));
        assert_eq!(recent.held(&prompt(1, 90)), 60);
        recent.used(&prompt(2, 60));
        let held = recent.held(&prompt(1, 60));
        assert_eq!(held, 40, "the last blocks went first");
        assert_eq!(recent.held(&prompt(3, 10)), 0);
    }

    #[test]
    fn evictions_are_inferred_from_answers() {
        let mut recent = Recent::new(1000);
        for name in 0..10 {
            recent.used(&prompt(name, 50));
        }
        let oldest = prompt(0, 50);
        let age = recent.age(&oldest);
        assert_eq!((recent.held(&oldest), age), (50, 450));
        recent.learn(50, 0, age);
        assert_eq!(recent.sizes(), (450, 450));
        assert_eq!(recent.held(&oldest), 0, "what is that old is not expected any more");
        assert_eq!(recent.held(&prompt(9, 50)), 50);
        let second = prompt(1, 50);
        recent.learn(50, 50, recent.age(&second) + 10);
        assert!(recent.sizes().1 > 450, "a hit of that age says that it holds more");
    }

    #[test]
    fn a_restart_forgets_and_a_size_bounds() {
        let mut recent = Recent::new(1000);
        recent.used(&prompt(1, 500));
        recent.resize(200);
        assert_eq!(recent.held(&prompt(1, 500)), 200);
        recent.clear();
        assert_eq!(recent.held(&prompt(1, 500)), 0);
    }
}
