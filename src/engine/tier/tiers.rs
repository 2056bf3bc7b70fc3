//! Both tiers as one: where a block can be had.

use std::sync::Arc;

use super::disk_tier::DiskTier;
use super::residency::Residency;
use crate::policy::BlockOwner;
use crate::pool::Pool;
use kvcellar_block::{BlockKey, ExtentIndex, SlotIndex, Tier};

/// Where a load takes a block from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// A slot that holds it.
    Slot(SlotIndex),
    /// A slot that is being filled from disk with it.
    Restoring(SlotIndex),
    /// Disk.
    Extent(ExtentIndex),
}

/// How often each tier changed; see [`Tiers::changes`].
pub(super) type Changes = (u64, Option<u64>);

/// The dram tier, and the nvme tier if the user wants one.
pub(super) struct Tiers {
    /// Blocks in memory.
    pub(super) dram: Residency,
    /// Blocks on disk.
    pub(super) disk: Option<DiskTier>,
    /// The shared memory below the dram tier; `None` over a test's plain memory.
    pub(super) pool: Option<Arc<Pool>>,
}

impl Tiers {
    /// As long as they are the same, a lookup finds the same, unless time or a device's speed has a
    /// part in it.
    pub(super) fn changes(&self) -> Changes {
        (self.dram.changes(), self.disk.as_ref().map(|disk| disk.medium.extents.changes()))
    }

    /// Where a block can be had.
    pub(super) fn source(&self, key: &BlockKey) -> Option<Source> {
        match self.dram.find_any(key) {
            Some((slot, true)) => return Some(Source::Slot(slot)),
            Some((slot, false)) if self.dram.is_restoring(slot) => return Some(Source::Restoring(slot)),
            _ => {}
        }
        self.on_disk(key).map(Source::Extent)
    }

    /// The extent of a block that the disk can give now.
    pub(super) fn on_disk(&self, key: &BlockKey) -> Option<ExtentIndex> {
        self.disk.as_ref()?.medium.extents.find(key)
    }

    /// Blocks on disk were used, the first of them last of all.
    pub(super) fn touch_on_disk(&mut self, extents: &[ExtentIndex]) {
        if let Some(disk) = &mut self.disk {
            extents.iter().rev().for_each(|extent| disk.medium.extents.touch(*extent));
        }
    }

    /// Blocks of an owner, by tier.
    pub(super) fn blocks_of(&self, owner: BlockOwner) -> [(&'static str, u64); 2] {
        let on_disk = self.disk.as_ref().map_or(0, |disk| disk.medium.extents.blocks_of(owner));
        [("dram", self.dram.blocks_of(owner).into()), ("nvme", on_disk.into())]
    }

    /// Every block that a request could have now.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (Tier, BlockKey)> + '_ {
        let slots = self.dram.visible_slots().into_iter();
        let in_memory = slots.filter_map(|slot| Some((Tier::Dram, self.dram.key(slot)?)));
        let on_disk = self.disk.iter().flat_map(DiskTier::blocks).map(|key| (Tier::Nvme, key));
        in_memory.chain(on_disk)
    }
}
