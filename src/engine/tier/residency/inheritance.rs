//! What a tier is given at its opening, and what of it serves something else.

use super::{Residency, SlotChange, SlotState};
use crate::policy::{Block, Heat};
use kvcellar_block::descriptor::Lineage;
use kvcellar_block::{BlockKey, Generation, SlotIndex};

impl Residency {
    /// Takes a slot over as an earlier engine left it.
    pub fn adopt(&mut self, slot: SlotIndex, key: &BlockKey, generation: Generation, lineage: Lineage) {
        self.table.insert(slot, key);
        let parent = lineage.parent.and_then(|hash| self.table.find(&BlockKey { hash, ..*key }));
        self.policy.adopt(slot, &Block { parent, ..Block::unknown(key.fingerprint()) });
        self.table.record_mut(slot).facts.generation = generation.0;
        self.remains.set(slot, lineage.salt);
        // The line is filled already.
        if self.show_block(slot, SlotChange::Adopt, lineage) {
            self.counters.adopted_blocks += 1;
            self.enter(slot, Heat::Hot);
        }
    }

    /// After adoption: the slots that hold nothing, and nothing else, are free.
    pub fn recount_free(&mut self) {
        let empty = |slot: &SlotIndex| self.table.record(*slot).facts.state == SlotState::Empty;
        self.free = (0..self.table.places()).rev().map(SlotIndex).filter(empty).collect();
        self.census.free = self.free.len() as u64;
    }

    /// Takes up to `count` free slots out of the tier for good, for the restore window.
    pub fn set_aside(&mut self, count: u32) -> Vec<SlotIndex> {
        let taken: Vec<SlotIndex> = (0..count).map_while(|_| self.free.pop()).collect();
        self.census.free -= taken.len() as u64;
        self.aside.extend(&taken);
        taken
    }
}
