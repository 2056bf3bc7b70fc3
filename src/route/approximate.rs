//! What engines probably hold, without their events: whoever got a prompt has it, until it was
//! probably evicted.
//!
//! Each engine has a recency list of prefix hashes. A prompt's first block counts as used after its
//! last one, so a prefix always outlives what follows it, and the longest held prefix is found by
//! halving. The bound of a list begins at the engine's own capacity where it tells it, and it
//! learns: an answer that says fewer cached tokens than were expected shows what age the engine has
//! already evicted; one that says more shows that it has tiers below the GPU's memory, which hold
//! what the list had to forget.

use lru::LruCache;

/// Blocks remembered of an engine that does not tell its size.
pub const BLOCKS_DEFAULT: usize = 31_250;

const BLOCKS_MIN: u64 = 64;

/// Blocks remembered of an engine at most: 67 million tokens, about 70 MiB here.
const BLOCKS_MAX: u64 = 1 << 20;

/// One engine's list.
#[derive(Debug)]
pub struct Recent {
    /// Hash to the count of blocks at its last use.
    blocks: LruCache<u64, u64>,
    /// Blocks used so far.
    clock: u64,
    /// What the engine is taken to hold, in blocks.
    capacity: u64,
    /// What it said of its GPU's memory.
    told: u64,
}

impl Default for Recent {
    fn default() -> Self {
        Self::new(BLOCKS_DEFAULT)
    }
}

impl Recent {
    /// Nothing yet, of an engine that holds so many blocks.
    pub fn new(capacity: usize) -> Self {
        let capacity = (capacity as u64).clamp(1, BLOCKS_MAX);
        Self { blocks: LruCache::unbounded(), clock: 0, capacity, told: capacity }
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
        self.forget_surplus();
    }

    fn forget_surplus(&mut self) {
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
            self.forget_surplus();
        } else if found > expected && self.is_full() {
            // It still had what was forgotten here, however long ago that was.
            let missed = (found - expected) as u64;
            self.grow(missed.max(self.capacity / 8));
        } else if found == expected && expected > 0 && age * 10 >= self.capacity * 9 {
            // It holds more than was thought.
            self.grow(self.capacity / 16 + 1);
        }
    }

    /// Something was forgotten, so that what the engine has may once have been known.
    fn is_full(&self) -> bool {
        self.blocks.len() as u64 * 10 >= self.capacity * 9
    }

    fn grow(&mut self, blocks: u64) {
        self.capacity = (self.capacity + blocks).min(BLOCKS_MAX);
    }

    /// How many blocks were used since the first block of this prompt was.
    pub fn age(&self, hashes: &[u64]) -> u64 {
        let last = hashes.first().and_then(|hash| self.blocks.peek(hash));
        last.map_or(0, |last| self.clock - last)
    }

    /// The last `count` blocks that were used, the latest first: the order in which [`Self::used`]
    /// takes them.
    pub fn last(&self, count: usize) -> Vec<u64> {
        self.blocks.iter().take(count).map(|(hash, _)| *hash).collect()
    }

    /// Holds nothing any more: it was started anew.
    pub fn clear(&mut self) {
        self.blocks.clear();
    }

    /// The engine has told its size. What was learned of it goes on if that is the size it had.
    pub fn resize(&mut self, told: usize) {
        let told = (told as u64).min(BLOCKS_MAX);
        if told != self.told && told > 0 {
            (self.capacity, self.told) = (told, told);
            self.forget_surplus();
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
        let mut other = Recent::new(90);
        other.used(&recent.last(1000));
        assert_eq!((other.held(&prompt(2, 60)), other.held(&prompt(1, 60))), (60, 30), "in the same order");
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
    fn tiers_below_the_gpu_let_the_list_grow() {
        // A GPU for two of the ten prompts that take turns, and tiers for all of them.
        let mut recent = Recent::new(BLOCKS_DEFAULT);
        recent.resize(32);
        let prompts: Vec<Vec<u64>> = (0..10).map(|name| prompt(name, 16)).collect();
        let mut predicted = Vec::new();
        for round in 0..20 {
            for prompt in &prompts {
                let expected = recent.held(prompt);
                let age = recent.give(prompt);
                recent.resize(32);
                recent.learn(expected, if round == 0 { 0 } else { 16 }, age);
                predicted.push(expected);
            }
        }
        assert_eq!(predicted[predicted.len() - 10..], [16; 10]);
        assert!(recent.sizes().1 < 400, "no more than is needed, by little");
        let mut fresh = Recent::new(1000);
        fresh.used(&prompt(1, 50));
        fresh.learn(0, 500, 0);
        assert_eq!(fresh.sizes().1, 1000, "others filled the engine before");
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
