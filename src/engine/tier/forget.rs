//! The right to erasure: everything that the tiers hold of requests with one salt goes, and cannot
//! come back.
//!
//! At once no lookup finds the blocks, subscribers are told, and nothing more is kept of requests
//! with the salt that are there. Then the bytes are overwritten: slots with zeros, extents by the
//! mover and durably. What is copied, read or written at that moment is erased when that has ended,
//! and until all is erased the request that asked is not answered. Bytes of which nobody knows
//! whose they are (an earlier version's, or what a reopened store's free extents hold) go as well.
//!
//! Out of reach: vLLM's own KV cache, other machines, and copies that people made of the files.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::attached::Attached;
use super::forgetting::{ForgetReport, Forgetting};
use super::medium::Medium;
use super::session::Session;
use super::tiers::Tiers;
use super::trace;
use crate::limits;
use crate::metrics::DropReason;
use kvcellar_block::SaltTag;

impl Attached {
    /// Drops the blocks of a salt in both tiers, and has their bytes overwritten.
    pub(super) fn forget(&mut self, session: &mut Session, salt: SaltTag) -> Forgetting {
        // What is answered by now is no longer under way.
        self.poll(session);
        session.requests.forget(salt);
        let before = self.erased();
        self.forgets += 1;
        let request = self.forgets;
        let Tiers { dram, disk, .. } = &mut self.tiers;
        let dram_blocks = dram.forget(salt, request);
        let nvme_blocks = disk.as_mut().map_or(0, |disk| disk.forget(salt, request, &mut dram.events));
        dram.counters.dropped(DropReason::Forgotten, nvme_blocks);
        session.log.record(|| trace::line("forget", &[("dram", dram_blocks.into()), ("nvme", nvme_blocks.into())]));
        Forgetting::Erasing(request, ForgetReport { dram_blocks, nvme_blocks, ..before })
    }

    /// Looks whether all that was to be forgotten is erased.
    pub(super) fn advance_forgetting(&self, forgetting: Forgetting) -> Forgetting {
        match forgetting {
            Forgetting::Erasing(request, before) if self.to_erase_for(request) == 0 => {
                let now = self.erased();
                Forgetting::Over(ForgetReport {
                    slots_erased: now.slots_erased - before.slots_erased,
                    extents_erased: now.extents_erased - before.extents_erased,
                    bytes_erased: now.bytes_erased - before.bytes_erased,
                    failed: now.failed - before.failed,
                    ..before
                })
            }
            forgetting => forgetting,
        }
    }

    /// Overwrites some more slots, unless it has just done so: most calls come from vLLM's hooks.
    pub(super) fn erase_some(&mut self) {
        let Tiers { dram, disk, pool } = &mut self.tiers;
        let pause = Duration::from_millis(limits::ERASE_PAUSE_MS);
        if dram.remains.left() == 0 || self.erased_at.is_some_and(|last| last.elapsed() < pause) {
            return;
        }
        let slot_bytes = pool.as_ref().map_or(1, |pool| pool.geometry().slot_bytes);
        let memory = Arc::clone(dram.memory());
        let aside = disk.iter().flat_map(|disk| disk.restores.unused(memory.as_ref()));
        dram.erase(aside, (limits::ERASE_BYTES_PER_ROUND / slot_bytes).max(1) as usize);
        self.erased_at = Some(Instant::now());
    }

    /// Places that are still to be erased.
    pub(super) fn to_erase(&self) -> u64 {
        let on_disk = self.tiers.disk.as_ref().map_or(0, |disk| disk.medium.extents.remains.left());
        self.tiers.dram.remains.left() + on_disk
    }

    /// Those of them that a request waits for.
    fn to_erase_for(&self, request: u64) -> u64 {
        let on_disk = self.tiers.disk.as_ref().map_or(0, |disk| disk.medium.extents.remains.left_of(request));
        self.tiers.dram.remains.left_of(request) + on_disk
    }

    /// What both tiers have overwritten so far.
    fn erased(&self) -> ForgetReport {
        let medium = self.tiers.disk.as_ref().map(|disk| &disk.medium);
        let (slots_erased, _) = self.tiers.dram.remains.ended();
        let (extents_erased, failed) = medium.map_or((0, 0), |medium| medium.extents.remains.ended());
        let slot_bytes = self.tiers.pool.as_ref().map_or(0, |pool| pool.geometry().slot_bytes);
        let bytes_erased = slots_erased * slot_bytes + extents_erased * medium.map_or(0, Medium::extent_bytes);
        ForgetReport { slots_erased, extents_erased, bytes_erased, failed, ..ForgetReport::default() }
    }
}
