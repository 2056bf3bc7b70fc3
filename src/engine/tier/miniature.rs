//! A cache of a few sampled blocks under a real policy: what a tier of a size would find.
//!
//! It does what `super::replay` does with a whole tier, in the same order, to the sampled blocks
//! alone: holds what a hit loads, touches what is there, evicts for what is not, and touches all
//! from last to first when the request ends. All memory is taken at the beginning, but for two
//! lists as long as the longest request's sample.

use std::ops::Range;

use hashbrown::HashTable;

use crate::policy::{self, Block, Departure, Eviction, Heat, PolicyName, Touch};
use kvcellar_block::SlotIndex;

/// The sampled blocks of one request, in the order of its tokens.
#[derive(Debug, Default)]
pub(super) struct SampledRequest {
    /// What tells blocks apart.
    pub(super) fingerprints: Vec<u64>,
    /// Those of them that are looked up.
    pub(super) asked: Range<usize>,
    /// Tells the request from the one before.
    pub(super) serial: u32,
    /// Tokens of its prompt.
    pub(super) prompt_tokens: u32,
    /// Its blocks are kept.
    pub(super) is_kept: bool,
}

/// What a place holds.
#[derive(Debug, Clone, Copy, Default)]
struct Occupant {
    fingerprint: u64,
    /// Serial of the request that used it last.
    user: u32,
}

/// The cache. A place is free, or holds a block and is in the policy's order.
pub(super) struct Miniature {
    policy: Box<dyn Eviction<SlotIndex>>,
    occupants: Box<[Occupant]>,
    /// Places by fingerprint.
    places: HashTable<u32>,
    free: Vec<u32>,
    /// Of the request that is being served: the place of each block.
    found: Vec<Option<u32>>,
    /// Of the same: places of new blocks.
    stored: Vec<u32>,
}

impl Miniature {
    /// An empty cache of `places` places, which stand for `of` places.
    pub(super) fn new(policy: PolicyName, places: u32, of: u32) -> Self {
        Self {
            policy: policy::miniature(policy, places, of),
            occupants: vec![Occupant::default(); places as usize].into_boxed_slice(),
            // Twice as many: places of blocks that are gone are cleared without growing.
            places: HashTable::with_capacity(places as usize * 2),
            free: (0..places).rev().collect(),
            found: Vec::new(),
            stored: Vec::new(),
        }
    }

    /// Serves a request. Returns how many of the blocks that it asks for are found.
    pub(super) fn serve(&mut self, request: &SampledRequest) -> u32 {
        let mut found = std::mem::take(&mut self.found);
        found.clear();
        found.extend(request.fingerprints.iter().map(|block| self.find(*block)));
        let asked = found.get(request.asked.clone()).unwrap_or_default();
        let hits = asked.iter().take_while(|place| place.is_some()).count();
        self.load(&found[request.asked.start..][..hits], request.serial);
        self.touch(&found, request.serial);
        if request.is_kept {
            self.store(&mut found, request);
        }
        self.touch(&found, request.serial);
        self.found = found;
        hits as u32
    }

    fn find(&self, fingerprint: u64) -> Option<u32> {
        let is_it = |place: &u32| self.occupants[*place as usize].fingerprint == fingerprint;
        self.places.find(fingerprint, is_it).copied()
    }

    /// Holds the blocks of a hit, and lets go of them.
    fn load(&mut self, hit: &[Option<u32>], serial: u32) {
        for place in hit.iter().flatten() {
            let touch = self.used_by(*place, serial);
            self.policy.touch(SlotIndex(*place), touch);
            self.policy.remove(SlotIndex(*place));
        }
        for place in hit.iter().rev().flatten() {
            // Two equal fingerprints in one request are one block here.
            if !self.policy.holds(SlotIndex(*place)) {
                self.policy.insert(SlotIndex(*place), Heat::Hot);
            }
        }
    }

    /// Blocks were used, the first of them last of all.
    fn touch(&mut self, found: &[Option<u32>], serial: u32) {
        for place in found.iter().rev().flatten() {
            let touch = self.used_by(*place, serial);
            self.policy.touch(SlotIndex(*place), touch);
        }
    }

    /// Keeps the blocks that are not there, as far as there is room beside the request's own.
    fn store(&mut self, found: &mut [Option<u32>], request: &SampledRequest) {
        let missing = found.iter().filter(|place| place.is_none()).count();
        while self.free.len() < missing && self.evict(request.serial) {}
        // Handed out in ascending order, as slots are.
        let from = self.free.len().saturating_sub(missing);
        self.free[from..].sort_unstable_by(|a, b| b.cmp(a));
        self.stored.clear();
        for at in 0..found.len() {
            if found[at].is_some() {
                continue;
            }
            if self.free.is_empty() {
                self.evict(request.serial);
            }
            let Some(place) = self.free.pop() else { break };
            let fingerprint = request.fingerprints[at];
            let parent = at.checked_sub(1).and_then(|before| found[before]).map(SlotIndex);
            let block = Block { parent, prompt_tokens: request.prompt_tokens, ..Block::unknown(fingerprint) };
            self.policy.assign(SlotIndex(place), &block);
            self.occupants[place as usize] = Occupant { fingerprint, user: request.serial };
            let occupants = &self.occupants;
            self.places.insert_unique(fingerprint, place, |place| occupants[*place as usize].fingerprint);
            found[at] = Some(place);
            self.stored.push(place);
        }
        for place in self.stored.iter().rev() {
            self.policy.insert(SlotIndex(*place), Heat::Hot);
        }
    }

    /// Empties the place that the policy chooses. Returns whether there is one: the request's own
    /// blocks make no room for it.
    fn evict(&mut self, serial: u32) -> bool {
        let Some(victim) = self.policy.victim(&|_| true) else { return false };
        let Occupant { fingerprint, user } = self.occupants[victim.0 as usize];
        if user == serial {
            return false;
        }
        self.policy.release(victim, Departure::Evicted);
        if let Ok(entry) = self.places.find_entry(fingerprint, |place| *place == victim.0) {
            entry.remove();
        }
        self.free.push(victim.0);
        true
    }

    fn used_by(&mut self, place: u32, serial: u32) -> Touch {
        let before = std::mem::replace(&mut self.occupants[place as usize].user, serial);
        if before == serial { Touch::Again } else { Touch::Fresh }
    }

    /// Bytes of memory taken, the lists of one request aside.
    pub(super) fn bytes(&self) -> usize {
        self.policy.bytes() + size_of_val(&*self.occupants) + self.places.allocation_size() + self.free.capacity() * 4
    }
}
