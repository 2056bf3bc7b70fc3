//! The two sides of one rank's copies: its KV cache and its parts of the pool's slots. Says which
//! orders may be carried out, and where their bytes lie.

use std::ptr::NonNull;
use std::sync::Arc;

use super::hasher::HashGuard;
use super::views::GroupRuns;
use super::{CopyError, Direction, Order};
use crate::checksum;
use crate::pool::Pool;
use kvcellar_block::plan::{BlockCopy, VERIFY};
use kvcellar_block::{GroupIndex, SlotIndex};

/// Everything a copier needs to know of one rank; shared by all its threads.
pub struct Sides {
    pub(super) pool: Arc<Pool>,
    groups: Arc<Vec<GroupRuns>>,
    rank: usize,
    pub(super) verify_loads: bool,
    guard: Arc<HashGuard>,
}

/// An order that may be carried out now.
pub(super) struct Admitted<'a> {
    /// Where the block's pieces lie in the KV cache.
    pub(super) group: &'a GroupRuns,
    /// The slot.
    pub(super) slot: SlotIndex,
    /// This rank's part of the slot, as long as all pieces together.
    pub(super) part: NonNull<u8>,
    /// Its length in bytes.
    pub(super) len: usize,
}

impl Sides {
    /// Describes one rank's two sides.
    ///
    /// # Safety
    /// Every address that `groups` resolves must be valid for reads and writes by the copier that
    /// is built on this (in its device's memory, for a copier of a device), and stay so until that
    /// copier is dropped. vLLM allocates the KV cache once, before it registers it with the
    /// connector, and frees it after the connector's `shutdown`.
    pub unsafe fn new(
        pool: Arc<Pool>,
        groups: Arc<Vec<GroupRuns>>,
        rank: usize,
        verify_loads: bool,
        guard: Arc<HashGuard>,
    ) -> Self {
        Self { pool, groups, rank, verify_loads, guard }
    }

    /// Whether an order may be carried out, and where its bytes lie. The slot stays what it is
    /// until the order was answered.
    pub(super) fn admit(&self, order: &Order) -> std::result::Result<Admitted<'_>, CopyError> {
        let copy = &order.copy;
        let admitted = self.locate(copy)?;
        let line = self.pool.line(admitted.slot);
        match order.direction {
            Direction::Offload if !line.may_write(copy.generation) => return Err(CopyError::Stale),
            Direction::Offload => self.guard.wait_until_free(admitted.slot),
            Direction::Load if !line.may_read(copy.generation) => return Err(CopyError::Stale),
            Direction::Load => self.check_stored(&admitted, copy)?,
        }
        Ok(admitted)
    }

    /// Where a copy's bytes lie.
    pub(super) fn locate(&self, copy: &BlockCopy) -> std::result::Result<Admitted<'_>, CopyError> {
        let geometry = self.pool.geometry();
        let group = self.groups.get(copy.group as usize).ok_or(CopyError::OutOfRange)?;
        let span = geometry.parts.get(self.rank).and_then(|part| part.spans.get(copy.group as usize));
        let (offset, len) = *span.ok_or(CopyError::OutOfRange)?;
        if copy.slot >= self.pool.slot_count() || len != group.block_bytes() || u64::from(copy.block) >= group.blocks()
        {
            return Err(CopyError::OutOfRange);
        }
        let slot = SlotIndex(copy.slot);
        // SAFETY: the span lies inside the payload: `SlotGeometry::lay_out` sized the slot for all
        // spans.
        let part = unsafe { self.pool.payload(slot).add(offset as usize) };
        Ok(Admitted { group, slot, part, len: len as usize })
    }

    /// An adopted slot's bytes are used only when they are what was stored.
    fn check_stored(&self, admitted: &Admitted<'_>, copy: &BlockCopy) -> std::result::Result<(), CopyError> {
        if copy.flags & VERIFY == 0 {
            return Ok(());
        }
        // SAFETY: these are this rank's span of a filled slot; the engine holds a pin on it for
        // this load, so nobody writes it.
        let bytes = unsafe { std::slice::from_raw_parts(admitted.part.as_ptr(), admitted.len) };
        self.compare(copy, checksum::of(bytes))
    }

    /// Whether the bytes with this checksum are those that were stored for the order.
    pub(super) fn compare(&self, copy: &BlockCopy, sum: u64) -> std::result::Result<(), CopyError> {
        if self.groups.get(copy.group as usize).is_some_and(|group| group.block_bytes() == 0) {
            // No layers of the group on this rank: nobody has a checksum of nothing.
            return Ok(());
        }
        let stored = self.pool.checksum(SlotIndex(copy.slot), self.writer_rank(copy.group), copy.generation);
        if stored == Some(sum) { Ok(()) } else { Err(CopyError::Mismatch) }
    }

    /// Records the checksum of what this rank wrote.
    pub(super) fn set_checksum(&self, copy: &BlockCopy, sum: u64) {
        self.pool.set_checksum(SlotIndex(copy.slot), self.rank, copy.generation, sum);
    }

    /// The rank that wrote (and hashed) the bytes this rank uses: itself, or the first that holds
    /// the same span.
    fn writer_rank(&self, group: u16) -> usize {
        let parts = &self.pool.geometry().parts;
        let own = parts[self.rank].spans[group as usize];
        parts
            .iter()
            .position(|part| part.writes(GroupIndex(group)) && part.spans[group as usize] == own)
            .unwrap_or(self.rank)
    }
}
