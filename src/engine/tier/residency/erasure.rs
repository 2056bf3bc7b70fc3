//! Forgetting in memory: blocks of a salt are dropped, and their bytes overwritten with zeros, also
//! those that blocks left behind which are long gone.

use super::{Residency, SlotState};
use crate::metrics::DropReason;
use kvcellar_block::{SaltTag, SlotIndex};

impl Residency {
    /// Drops the blocks of a salt, and has every slot erased that may hold bytes of it, one that is
    /// used at its last use's end. Returns how many blocks lookups found until now.
    pub(in crate::tier) fn forget(&mut self, salt: SaltTag) -> u64 {
        let mut dropped = 0;
        for slot in self.remains.of(salt) {
            self.remains.condemn(slot);
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
        // At once, while nobody else can be given them.
        let aside: Vec<SlotIndex> = unused.filter(|slot| self.remains.is_due(*slot)).take(count).collect();
        for slot in &aside {
            self.remains.release(*slot);
            // Whatever its line still says: no later start takes it over.
            self.memory.line(*slot).clear();
        }
        for slot in [self.remains.take_these(&aside), self.remains.take(count - aside.len())].concat() {
            self.memory.erase(slot);
            self.remains.end(slot, true);
            if !self.aside.contains(&slot) {
                self.free.push(slot);
            }
        }
    }
}
