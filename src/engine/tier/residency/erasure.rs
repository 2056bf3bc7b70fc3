//! Forgetting in memory: blocks of a salt are dropped, and their bytes overwritten with zeros, also
//! those that blocks left behind which are long gone.

use super::{Residency, SlotState};
use crate::metrics::DropReason;
use kvcellar_block::{SaltTag, SlotIndex};

impl Residency {
    /// Drops the blocks of a salt, and has every slot erased that may hold bytes of it, one that is
    /// used at its last use's end: the request of this number waits for them. Returns how many
    /// blocks lookups found until now.
    pub(in crate::tier) fn forget(&mut self, salt: SaltTag, request: u64) -> u64 {
        let mut dropped = 0;
        for slot in self.remains.condemn_all(salt, request) {
            match self.table.record(slot).facts.state {
                SlotState::Filled { .. } => {
                    self.drop_block(slot, DropReason::Forgotten);
                    dropped += 1;
                }
                // Those set aside may be in use all the same; their owner releases them.
                SlotState::Empty if !self.aside.contains(&slot) => {
                    self.remains.release(slot);
                }
                SlotState::Empty | SlotState::Filling { .. } | SlotState::Doomed => {}
            }
        }
        self.free.retain(|slot| !self.remains.has(*slot));
        dropped
    }

    /// Overwrites up to `count` slots that wait for it. `unused`: those of the slots that were set
    /// aside which nobody uses at this moment.
    pub(in crate::tier) fn erase(&mut self, unused: impl Iterator<Item = SlotIndex>, count: usize) {
        let count = count - self.erase_aside(unused, count);
        for slot in self.remains.take(count) {
            self.memory.erase(slot);
            self.remains.end(slot, true);
            self.free.push(slot);
        }
    }

    /// Overwrites up to `count` of the slots that were set aside and that nobody uses at this
    /// moment, as far as they are due. Returns how many.
    pub(in crate::tier) fn erase_aside(&mut self, unused: impl Iterator<Item = SlotIndex>, count: usize) -> usize {
        // At once, while nobody else can be given them.
        let aside: Vec<SlotIndex> = unused.filter(|slot| self.remains.is_due(*slot)).take(count).collect();
        for slot in &aside {
            self.remains.release(*slot);
            // Whatever its line still says: no later start takes it over.
            self.memory.line(*slot).clear();
        }
        for slot in self.remains.take_these(&aside) {
            self.memory.erase(slot);
            self.remains.end(slot, true);
        }
        aside.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::event_log::EventLog;
    use crate::policy::{PolicyName, Tenants};
    use crate::pool::memory::HeapSlots;
    use crate::tier::reservation::{Provenance, User};
    use kvcellar_block::{BlockHash, BlockKey, GroupIndex};

    #[test]
    fn a_slot_whose_block_did_not_come_is_erased_before_the_next() {
        let key = |byte| BlockKey { hash: BlockHash::new(&[byte; 32]).expect("32 bytes"), group: GroupIndex(0) };
        let (by, provenance) = (User::default(), Provenance::default());
        let policy = Tenants::new(PolicyName::Lru, 1, &[]);
        let mut dram = Residency::new(Arc::new(HeapSlots::new(1, 1)), policy, EventLog::new(false));
        for (byte, salt, foreign) in [(1, SaltTag::of(b"ada"), false), (2, SaltTag::of(b"bob"), true)] {
            let slot = dram.reserve(&key(byte), by, provenance).expect("a slot").slot;
            assert_eq!(dram.remains.expect(slot, salt), foreign);
            dram.lose(slot);
            assert_eq!((dram.remains.left() == 1, dram.remains.left_of(0)), (foreign, 0), "no request waits for it");
        }
        assert!(dram.reserve(&key(3), by, provenance).is_err());
        dram.erase(std::iter::empty(), 9);
        assert!(dram.reserve(&key(3), by, provenance).is_ok());
    }
}
