//! Blocks of the dram tier that are to be written to disk, are being written, or lie there.

use std::collections::VecDeque;

use super::{Residency, SlotFacts};
use crate::policy::Heat;
use crate::tier::dirty::Dirty;
use crate::tier::slot_state::SlotChange;
use crate::{invariant, limits};
use kvcellar_block::{BlockKey, SlotIndex};

impl Residency {
    /// From now on there is a disk: dirty slots are told from clean ones.
    pub fn track_dirty(&mut self) {
        self.dirty.track(self.policy.order());
    }

    /// The disk holds the visible block of this slot too, or does so no longer.
    pub fn set_clean(&mut self, slot: SlotIndex, clean: bool) {
        let record = *self.table.record(slot);
        let (was_clean, writing) = (record.is_clean(), record.facts.writing);
        if !self.transition(slot, SlotChange::SetClean(clean)) {
            // Not to be offered to the cleaner again.
            self.dirty.remove(slot);
            return;
        }
        if was_clean == clean {
            return;
        }
        if clean {
            self.dirty.remove(slot);
        } else if (self.policy.holds(slot) || (self.kept.has(slot) && record.pins == 0)) && !writing {
            self.dirty.insert(slot, Heat::Cold);
        }
    }

    /// The coldest dirty block that may be evicted.
    pub fn coldest_dirty(&self) -> Option<Dirty> {
        let slot = self.dirty.coldest()?;
        Some(self.describe_dirty(slot))
    }

    fn describe_dirty(&self, slot: SlotIndex) -> Dirty {
        let SlotFacts { reused, used, .. } = self.table.record(slot).facts;
        let uses_since = self.policy.is_by_last_use().then(|| self.dirty.uses_since(used));
        Dirty { slot, reused, uses_since }
    }

    /// Dirty blocks among the `count` that the policy would evict next. None where they are the
    /// longest unused, which [`Self::coldest_dirty`] finds.
    pub fn dirty_at_cold_end(&self, mut count: usize) -> VecDeque<Dirty> {
        let mut dirty = VecDeque::new();
        if self.policy.is_by_last_use() || self.dirty.coldest().is_none() {
            return dirty;
        }
        if self.policy.has_tenants() {
            count = count.min(limits::COLD_END_OF_TENANTS_MAX);
        }
        self.policy.coldest(&mut |slot| {
            if count > 0 && self.dirty.offers(slot) {
                dirty.push_back(self.describe_dirty(slot));
            }
            count = count.saturating_sub(1);
            count > 0
        });
        dirty
    }

    /// The key of the block before a slot's in its prefix, where the policy knows that the tier has
    /// it.
    pub fn parent_key(&self, slot: SlotIndex) -> Option<BlockKey> {
        self.key(self.policy.parent(slot)?)
    }

    /// A dirty block will not be written: it is no longer offered for that. It is as dirty as
    /// before, and dropped when evicted.
    pub fn pass_over(&mut self, slot: SlotIndex) {
        self.dirty.remove(slot);
    }

    /// A visible block is being written to disk: until [`Self::end_write`] its slot is not given
    /// away.
    pub fn begin_write(&mut self, slot: SlotIndex) {
        self.table.record_mut(slot).facts.writing = true;
        self.pass_over(slot);
        self.census.writing += 1;
    }

    /// The write has ended. Returns whether the slot still holds that block, visibly.
    pub fn end_write(&mut self, slot: SlotIndex, written: bool) -> bool {
        let record = self.table.record_mut(slot);
        if !invariant!(record.facts.writing, "a write of {slot:?} ended that nobody began") {
            return false;
        }
        record.facts.writing = false;
        let visible = record.is_visible();
        self.census.writing -= 1;
        if visible {
            // A block that could not be written is not tried again before it is used again: it is
            // dropped when evicted.
            self.set_clean(slot, written);
        } else {
            self.free_if_doomed(slot);
        }
        visible
    }
}
