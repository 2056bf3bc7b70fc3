//! Which dirty blocks may be written to disk, coldest first, and how long ago each block was used.

use crate::policy::{Eviction, Heat, Lru, Touch};
use kvcellar_block::SlotIndex;

/// A dirty block that may be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dirty {
    /// Its slot.
    pub slot: SlotIndex,
    /// More than one request used it.
    pub reused: bool,
    /// Uses of blocks since its own last one: at most so many blocks are hotter. `None` where the
    /// order of eviction is another than that of uses.
    pub uses_since: Option<u32>,
}

/// Dirty slots that may be evicted, and the tier's clock.
///
/// The clock counts uses: how many there were since a block's last one bounds how far the block is
/// from the hot end of the order of eviction.
pub(super) struct DirtyOrder {
    /// `None` without a disk: nothing is ever written.
    order: Option<Lru<SlotIndex>>,
    clock: u32,
    slots: u32,
}

impl DirtyOrder {
    /// The order of a tier of so many slots without disk.
    pub(super) fn new(slots: u32) -> Self {
        Self { order: None, clock: 0, slots }
    }

    /// From now on there is a disk. `evictable`: slots that may be evicted, all of them dirty, the
    /// one to evict next first.
    pub(super) fn track(&mut self, evictable: Vec<SlotIndex>) {
        let mut order = Lru::new(self.slots);
        for slot in evictable {
            order.insert(slot, Heat::Hot);
        }
        self.order = Some(order);
    }

    /// There is a disk.
    pub(super) fn is_tracking(&self) -> bool {
        self.order.is_some()
    }

    /// The time of a use now. What enters cold was used before anything else.
    pub(super) fn stamp(&mut self, heat: Heat) -> u32 {
        self.clock = self.clock.wrapping_add(1);
        match heat {
            Heat::Hot => self.clock,
            Heat::Cold => self.clock.wrapping_sub(self.slots),
        }
    }

    /// Uses since that time.
    pub(super) fn uses_since(&self, used: u32) -> u32 {
        self.clock.wrapping_sub(used)
    }

    /// A dirty slot may be written from now on.
    pub(super) fn insert(&mut self, slot: SlotIndex, heat: Heat) {
        if let Some(order) = &mut self.order {
            order.insert(slot, heat);
        }
    }

    /// A slot is not to be written (any more).
    pub(super) fn remove(&mut self, slot: SlotIndex) {
        if let Some(order) = &mut self.order {
            order.remove(slot);
        }
    }

    /// A slot was used; one that is not to be written stays so.
    pub(super) fn touch(&mut self, slot: SlotIndex) {
        if let Some(order) = &mut self.order {
            order.touch(slot, Touch::Again);
        }
    }

    /// A slot waits to be written.
    pub(super) fn offers(&self, slot: SlotIndex) -> bool {
        self.order.as_ref().is_some_and(|order| order.holds(slot))
    }

    /// The slot to write next.
    pub(super) fn coldest(&self) -> Option<SlotIndex> {
        self.order.as_ref()?.iter().next()
    }
}
