//! A modelled engine's KV cache: blocks in GPU memory, and those that were evicted from it in host
//! memory.
//!
//! A block in GPU memory is pinned by running requests, or free: free ones stay in recency order
//! until their room is needed, then they go to host memory, whose oldest go for good. Room that
//! running requests will still fill is reserved, and counts as used.

use hashbrown::HashMap;
use lru::LruCache;

/// What happens to a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// In GPU memory now; the block before it; its content.
    Stored(u64, Option<u64>, u32),
    /// Out of GPU memory, into host memory.
    Moved(u64),
    /// Out of host memory.
    Dropped(u64),
}

/// Blocks of one engine.
#[derive(Debug)]
pub struct Cache {
    gpu_blocks: usize,
    host_blocks: usize,
    /// In GPU memory, pinned by so many running requests.
    pinned: HashMap<u64, u32>,
    /// In GPU memory, unpinned.
    free: LruCache<u64, ()>,
    host: LruCache<u64, ()>,
    /// Blocks that running requests will still fill.
    reserved: usize,
    /// What happened since it was last taken.
    pub changes: Vec<Change>,
}

impl Cache {
    /// Empty.
    pub fn new(gpu_blocks: usize, host_blocks: usize) -> Self {
        Self {
            gpu_blocks,
            host_blocks,
            pinned: HashMap::new(),
            free: LruCache::unbounded(),
            host: LruCache::unbounded(),
            reserved: 0,
            changes: Vec::new(),
        }
    }

    /// Share of GPU memory that running requests use.
    pub fn usage(&self) -> f64 {
        (self.pinned.len() + self.reserved) as f64 / self.gpu_blocks as f64
    }

    /// Leading blocks of a prompt in GPU memory, and after them in host memory.
    pub fn held(&self, hashes: &[u64]) -> (usize, usize) {
        let in_gpu = |hash: &u64| self.pinned.contains_key(hash) || self.free.contains(hash);
        let gpu = hashes.iter().take_while(|hash| in_gpu(hash)).count();
        (gpu, hashes[gpu..].iter().take_while(|hash| self.host.contains(hash)).count())
    }

    /// Whether `blocks` more fit, of which `held` are there already.
    pub fn fits(&self, held: &[u64], blocks: usize) -> bool {
        let pinned = held.iter().filter(|hash| self.pinned.contains_key(*hash)).count();
        self.pinned.len() + self.reserved + blocks - pinned <= self.gpu_blocks
    }

    /// Pins the leading blocks of a prompt, of which `gpu` are in GPU memory and `loaded` come from
    /// host memory, and reserves others.
    pub fn admit(&mut self, hashes: &[u64], contents: &[u32], (gpu, loaded): (usize, usize), others: usize) {
        for hash in &hashes[..gpu] {
            self.pin(*hash);
        }
        self.reserved += loaded + others;
        self.make_room();
        (gpu..gpu + loaded).for_each(|at| self.fill(hashes, contents, at));
    }

    /// A reserved block is filled with one of a prompt, and pinned.
    pub fn fill(&mut self, hashes: &[u64], contents: &[u32], at: usize) {
        self.reserved -= 1;
        if self.pin(hashes[at]) {
            let parent = at.checked_sub(1).map(|before| hashes[before]);
            self.changes.push(Change::Stored(hashes[at], parent, contents[at]));
        }
    }

    /// Returns whether it is new in GPU memory.
    fn pin(&mut self, hash: u64) -> bool {
        let pins = self.pinned.entry(hash).or_insert(0);
        *pins += 1;
        *pins == 1 && self.free.pop(&hash).is_none()
    }

    /// A request has ended: its blocks are free, the last one the first to go, and `reserved`
    /// blocks that it did not fill are given back.
    pub fn release(&mut self, hashes: &[u64], reserved: usize) {
        self.reserved -= reserved;
        for hash in hashes.iter().rev() {
            let Some(pins) = self.pinned.get_mut(hash) else { continue };
            *pins -= 1;
            if *pins == 0 {
                self.pinned.remove(hash);
                self.free.put(*hash, ());
            }
        }
    }

    fn make_room(&mut self) {
        while self.pinned.len() + self.free.len() + self.reserved > self.gpu_blocks {
            let Some((hash, ())) = self.free.pop_lru() else { return };
            self.changes.push(Change::Moved(hash));
            self.host.put(hash, ());
            if self.host.len() > self.host_blocks
                && let Some((old, ())) = self.host.pop_lru()
            {
                self.changes.push(Change::Dropped(old));
            }
        }
    }

    /// Nothing is pinned or reserved.
    #[cfg(test)]
    pub fn is_released(&self) -> bool {
        self.pinned.is_empty() && self.reserved == 0
    }
}
