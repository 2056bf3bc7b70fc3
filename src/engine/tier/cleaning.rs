//! Which dirty blocks have to be written, and whether each is: what the cleaner decides, without
//! the disk.

use std::collections::VecDeque;

use super::dirty::Dirty;
use super::extents::Extents;
use super::residency::Residency;
use crate::policy::admission::Candidate;
use crate::policy::{Admission, BlockOwner};
use crate::{limits, violated};
use kvcellar_block::BlockKey;

/// What there is to do for a dirty block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CleaningStep {
    /// Nothing: the disk has it, or it is not to be written.
    Done,
    /// It is to be written, to a free extent.
    Write(BlockKey),
    /// It is to be written, and needs an extent.
    NeedsRoom(BlockKey),
}

/// One round of the cleaner.
pub(super) struct Cleaning {
    /// Every dirty block is written.
    pub(super) everything: bool,
    /// Slots that are to be free or clean.
    wanted: u64,
    /// Dirty blocks that the policy would evict next.
    cold: VecDeque<Dirty>,
}

impl Cleaning {
    /// A round that keeps so many percent of the slots free or clean.
    pub(super) fn new(dram: &Residency, clean_percent: u64, everything: bool) -> Self {
        let wanted = dram.census().slots() * clean_percent / 100;
        let cold = dram.dirty_at_cold_end(limits::COLD_END_MAX.min(wanted as usize));
        Self { everything, wanted, cold }
    }

    /// The next dirty block to be written, if one has to be.
    pub(super) fn next(&mut self, dram: &Residency) -> Option<Dirty> {
        if let Some(next) = self.cold.pop_front() {
            return Some(next);
        }
        let census = dram.census();
        let dirty = dram.coldest_dirty()?;
        // The share counts from the cold end: hot clean blocks do not help when cold dirty ones
        // must go.
        let cold = dirty.uses_since.is_some_and(|uses| u64::from(uses) >= census.slots() - self.wanted);
        let few = census.free + census.clean + census.writing < self.wanted;
        (self.everything || (self.wanted > 0 && (few || cold))).then_some(dirty)
    }
}

/// What there is to write a block with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WriteMeans {
    /// An extent is free for it.
    pub(super) room: bool,
    /// Little of the write budget is left.
    pub(super) scarce: bool,
}

/// What there is to do for a dirty block.
pub(super) fn judge(
    extents: &mut Extents,
    dram: &mut Residency,
    admission: Admission,
    Dirty { slot, reused, .. }: Dirty,
    WriteMeans { room, scarce }: WriteMeans,
) -> CleaningStep {
    let Some(key) = dram.key(slot) else {
        violated!("dirty {slot:?} has no key");
        dram.pass_over(slot);
        return CleaningStep::Done;
    };
    if let Some(extent) = extents.find(&key) {
        extents.touch(extent);
        dram.set_clean(slot, true);
        return CleaningStep::Done;
    }
    if extents.knows(&key) || !admission.admits(Candidate { reused, room, scarce }) {
        dram.pass_over(slot);
        return CleaningStep::Done;
    }
    if room { CleaningStep::Write(key) } else { CleaningStep::NeedsRoom(key) }
}

/// Drops the coldest block on disk to make room for `wanted` blocks of `owner`. `None`: all that
/// may go are being read or written.
pub(super) fn make_room(
    extents: &mut Extents,
    dram: &mut Residency,
    owner: BlockOwner,
    wanted: u32,
) -> Option<BlockKey> {
    let gone = extents.evict(owner, wanted, &mut dram.events)?;
    dram.counters.nvme_evicted_blocks += 1;
    if let Some(held) = dram.find(&gone) {
        dram.set_clean(held, false);
    }
    Some(gone)
}
