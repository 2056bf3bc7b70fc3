//! What the tier engine needs of slots: the shared pool, or plain memory for tests and core-only
//! benchmarks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Pool;
use super::slot_table::{SlotLine, SlotState};
use kvcellar_block::descriptor::{self, Lineage};
use kvcellar_block::{BlockKey, Generation, GroupIndex, RankPart, SlotIndex};

/// Slots as the tier engine sees them.
pub trait SlotMemory: Send + Sync {
    /// Number of slots.
    fn slot_count(&self) -> u32;
    /// A slot's line.
    fn line(&self, slot: SlotIndex) -> &SlotLine;
    /// Bits of the ranks that write a block.
    fn writers(&self, group: GroupIndex) -> u64;
    /// Writes the descriptor of a slot that is about to be filled. `false`: it did not fit and the
    /// slot is never adopted.
    fn describe(&self, slot: SlotIndex, key: &BlockKey, generation: Generation, lineage: &Lineage) -> bool;
    /// Overwrites with zeros what no block of this group fills of a slot that nobody uses.
    fn erase_tail(&self, slot: SlotIndex, group: GroupIndex);
    /// Fetches what `describe` will write.
    fn prefetch(&self, slot: SlotIndex);
    /// The generation of all contents.
    fn cache_generation(&self) -> u64;
    /// Makes all contents worthless, and what follows this process's alone.
    fn bump_cache_generation(&self) -> u64;
    /// Overwrites a slot that nobody uses with zeros.
    fn erase(&self, slot: SlotIndex);
    /// What a slot holds, if an earlier engine left a whole block of the present generation with
    /// all its checksums.
    fn left_behind(&self, slot: SlotIndex) -> Option<(BlockKey, Generation, Lineage)>;
}

impl SlotMemory for Arc<Pool> {
    fn slot_count(&self) -> u32 {
        Pool::slot_count(self)
    }

    fn line(&self, slot: SlotIndex) -> &SlotLine {
        Pool::line(self, slot)
    }

    fn writers(&self, group: GroupIndex) -> u64 {
        self.geometry().writers(group)
    }

    fn describe(&self, slot: SlotIndex, key: &BlockKey, generation: Generation, lineage: &Lineage) -> bool {
        let ranks = self.geometry().parts.len();
        self.with_descriptor_mut(slot, |page| descriptor::write(page, key, generation, ranks, lineage))
    }

    fn erase_tail(&self, slot: SlotIndex, group: GroupIndex) {
        Pool::erase_tail(self, slot, group);
    }

    fn prefetch(&self, slot: SlotIndex) {
        self.prefetch_descriptor(slot);
    }

    fn cache_generation(&self) -> u64 {
        self.header().cache_generation()
    }

    fn bump_cache_generation(&self) -> u64 {
        self.header().bump_cache_generation()
    }

    fn erase(&self, slot: SlotIndex) {
        Pool::erase(self, slot);
    }

    fn left_behind(&self, slot: SlotIndex) -> Option<(BlockKey, Generation, Lineage)> {
        let (state, generation, cache_generation) = self.line(slot).remains();
        if state != Some(SlotState::Filled) || cache_generation != self.header().cache_generation() {
            return None;
        }
        let parts = &self.geometry().parts;
        // A damaged descriptor only means that nobody knows what the slot holds: it is not adopted.
        let (key, described, lineage) = descriptor::read(&self.descriptor(slot), parts.len()).ok()?;
        if described != generation || usize::from(key.group.0) >= self.geometry().payload_bytes.len() {
            return None;
        }
        let hashed = |(rank, part): (usize, &RankPart)| {
            !part.writes(key.group) || self.checksum(slot, rank, generation.0).is_some()
        };
        parts.iter().enumerate().all(hashed).then_some((key, generation, lineage))
    }
}

/// Slots without payload in plain memory: the real slot table, nothing to copy.
#[derive(Debug)]
pub struct HeapSlots {
    lines: Box<[SlotLine]>,
    writers: u64,
    cache_generation: AtomicU64,
}

impl HeapSlots {
    /// `slots` empty slots that `ranks` ranks write.
    pub fn new(slots: u32, ranks: u32) -> Self {
        let lines = (0..slots).map(|_| SlotLine::default()).collect();
        Self { lines, writers: u64::MAX >> (64 - ranks), cache_generation: AtomicU64::new(0) }
    }
}

impl SlotMemory for HeapSlots {
    fn slot_count(&self) -> u32 {
        self.lines.len() as u32
    }

    fn line(&self, slot: SlotIndex) -> &SlotLine {
        &self.lines[slot.0 as usize]
    }

    fn writers(&self, _group: GroupIndex) -> u64 {
        self.writers
    }

    fn describe(&self, _slot: SlotIndex, _key: &BlockKey, _generation: Generation, _lineage: &Lineage) -> bool {
        true
    }

    fn erase_tail(&self, _slot: SlotIndex, _group: GroupIndex) {}

    fn prefetch(&self, slot: SlotIndex) {
        kvcellar_block::prefetch(self.line(slot));
    }

    fn cache_generation(&self) -> u64 {
        self.cache_generation.load(Ordering::Relaxed)
    }

    fn bump_cache_generation(&self) -> u64 {
        self.cache_generation.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn erase(&self, _slot: SlotIndex) {}

    fn left_behind(&self, _slot: SlotIndex) -> Option<(BlockKey, Generation, Lineage)> {
        None
    }
}
