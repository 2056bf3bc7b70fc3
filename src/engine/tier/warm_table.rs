//! A block table full of known blocks, without shared memory and without copies: what benchmarks
//! measure lookups and evictions with.

use std::sync::Arc;

use super::reservation::{Provenance, User};
use super::residency::Residency;
use crate::event_log::EventLog;
use crate::policy::{BlockOwner, Lru, Tenants};
use crate::pool::memory::HeapSlots;
use kvcellar_block::descriptor::Lineage;
use kvcellar_block::{BlockHash, BlockKey, GroupIndex, SlotIndex};

const GROUP: GroupIndex = GroupIndex(0);

/// A table full of known blocks.
pub struct WarmTable {
    residency: Residency,
    user: User,
}

impl WarmTable {
    /// A table with exactly as many slots as `hashes`, holding them all.
    pub fn new(hashes: &[BlockHash]) -> Self {
        let memory = Arc::new(HeapSlots::new(hashes.len() as u32, 1));
        let policy = Tenants::single(Box::new(Lru::new(hashes.len() as u32)));
        let mut table = Self {
            residency: Residency::new(memory, policy, EventLog::new(false)),
            user: User { serial: 1, owner: BlockOwner::NOBODY },
        };
        table.allocate(hashes);
        table
    }

    /// Length of the run of known blocks.
    pub fn lookup(&self, hashes: &[BlockHash]) -> usize {
        self.residency.visible_run(hashes, 1, GROUP)
    }

    /// How many of these blocks are known, each looked up for itself.
    pub fn known(&self, hashes: &[BlockHash]) -> usize {
        let mut found = Vec::with_capacity(hashes.len());
        self.residency.find_all(hashes, 1, GROUP, &mut found);
        found.iter().flatten().count()
    }

    /// Takes slots for new blocks, makes them visible, and returns how many others were evicted.
    pub fn allocate(&mut self, hashes: &[BlockHash]) -> usize {
        self.user.serial += 1;
        let mut evicted = 0;
        let mut slots: Vec<SlotIndex> = Vec::with_capacity(hashes.len());
        for hash in hashes {
            let key = BlockKey { hash: *hash, group: GROUP };
            if let Ok(reserved) = self.residency.reserve(&key, self.user, Provenance::default()) {
                evicted += usize::from(reserved.evicted.is_some());
                slots.push(reserved.slot);
            }
        }
        self.residency.publish_all(&slots, std::iter::repeat_with(Lineage::default));
        evicted
    }
}
