//! The way of a block from disk back into a slot, and from there, without another step, into vLLM's
//! KV cache.
//!
//! A restored block takes a slot as an offloaded one does: a free one, or that of the block to
//! evict next, but never one of its own prefix. A block that gets none streams through the
//! [`super::window`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use hashbrown::HashMap;

use super::jobs::Job;
use super::medium::Medium;
use super::reservation::{Provenance, User};
use super::residency::Residency;
use super::trace::{self, OperationLog, names};
use super::transfer::{self, Read, ReadPart, Trouble};
use super::window::Window;
use crate::metrics::DropReason;
use crate::pool::memory::SlotMemory;
use crate::{invariant, limits, violated};
use kvcellar_block::descriptor::Lineage;
use kvcellar_block::{BlockKey, ExtentIndex, SaltTag, SlotIndex};

/// A block on disk that a load needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    /// The block.
    pub(super) key: BlockKey,
    /// Where it lies.
    pub(super) extent: ExtentIndex,
    /// The first token of the block.
    pub(super) token: u32,
    /// The request that loads it.
    pub(super) request: &'a str,
    /// The request, and whose it is.
    pub(super) user: User,
    /// Where the block stands in it.
    pub(super) provenance: Provenance,
}

/// A block that a request waits for in vain.
#[derive(Debug)]
pub(super) struct LostBlock {
    /// The request.
    pub(super) request: String,
    /// The first token of the block.
    pub(super) token: u32,
}

/// What follows for others when reads have ended.
#[derive(Debug, Default)]
pub(super) struct Consequences {
    /// Slots whose followers are to be woken.
    pub(super) wake: Vec<SlotIndex>,
    /// Blocks that did not come.
    pub(super) lost: Vec<LostBlock>,
}

impl Consequences {
    fn lose(&mut self, part: &ReadPart) {
        self.lost.push(LostBlock { request: part.request.clone(), token: part.token });
    }
}

/// Reads from disk, under way or waiting for the window.
pub(super) struct Restores {
    /// Reads under way, by token.
    reads: HashMap<u64, Read>,
    window: Window,
}

impl Restores {
    /// No reads yet; what gets no slot streams through `window`.
    pub(super) fn new(window: Window) -> Self {
        Self { reads: HashMap::new(), window }
    }

    /// Blocks that are being read.
    pub(super) fn reading(&self) -> u64 {
        self.reads.values().map(|read| read.parts.len() as u64).sum()
    }

    /// Blocks that are being read or wait for it.
    pub(super) fn queued(&self) -> u64 {
        self.reading() + self.window.waiting() as u64
    }

    /// Nothing is being read or waits for it.
    pub(super) fn is_idle(&self) -> bool {
        self.reads.is_empty() && self.window.waiting() == 0
    }

    /// A reset came: what is being read is worthless.
    pub(super) fn on_reset(&mut self) {
        for read in self.reads.values_mut() {
            read.stale = true;
        }
    }

    /// Gives a block a slot to be read into: a free one if there is one, which the request holds
    /// then, else a place in the window. `None`: the window has no slots. A read into a slot of its
    /// own waits for [`Self::submit`], one into the window for its turn.
    pub(super) fn plan_read(
        &mut self,
        medium: &mut Medium,
        dram: &mut Residency,
        wanted: Wanted<'_>,
    ) -> Option<ReadPart> {
        let Wanted { key, extent, token, request, user, provenance } = wanted;
        // A block that is being offloaded has its slot already: it cannot have another.
        let is_known = dram.find_any(&key).is_some();
        let reserved = if is_known { None } else { dram.reserve_restore(&key, user, provenance).ok() };
        let (slot, generation, place) = if let Some(reserved) = reserved {
            invariant!(
                reserved.evicted.is_none(),
                "{:?} was evicted for a block that had room made for it",
                reserved.evicted
            );
            dram.pin(reserved.slot, user);
            dram.remains.expect(reserved.slot, medium.extents.remains.tag(extent));
            (reserved.slot, reserved.generation, None)
        } else {
            let (index, slot, generation) = self.window.promise()?;
            (slot, generation, Some(index))
        };
        let part =
            ReadPart { slot, generation, extent, key, window: place.is_some(), request: request.to_owned(), token };
        medium.extents.begin_read(extent, user.owner);
        if let Some(index) = place {
            self.window.enqueue(index, part.clone());
        }
        Some(part)
    }

    /// Slots of the window that nobody uses at this moment.
    pub(super) fn unused<'a>(&'a self, memory: &'a dyn SlotMemory) -> impl Iterator<Item = SlotIndex> + 'a {
        self.window.unused(memory)
    }

    /// Hands reads to the disk, neighbours in one transfer.
    pub(super) fn submit(&mut self, medium: &mut Medium, parts: Vec<ReadPart>) {
        let most = medium.transfer_blocks_max();
        for parts in transfer::runs(parts, medium.layout(), most, |part| (part.slot, part.extent)) {
            let token = medium.next_token();
            medium.order(Job::Read {
                token,
                slot: parts[0].slot,
                extent: parts[0].extent,
                count: parts.len() as u32,
                expected: parts.iter().map(|part| (part.key, part.generation)).collect(),
                cache_generation: medium.cache_generation,
            });
            self.reads.insert(token, Read { parts, started: Instant::now(), given_up: false, stale: false });
        }
    }

    /// Starts the reads of the window whose slots are free now.
    pub(super) fn advance_window(&mut self, medium: &mut Medium, dram: &mut Residency) {
        if self.window.waiting() > 0 {
            if dram.remains.left() > 0 {
                // Now or never: a busy window uses its slots again at once.
                let memory = Arc::clone(dram.memory());
                dram.erase_aside(self.window.unused(memory.as_ref()), usize::MAX);
            }
            let ready = self.window.advance(dram.memory().as_ref());
            for part in &ready {
                // Blocks of several salts follow each other there, and may lie there in pieces.
                dram.remains.set(part.slot, SaltTag::UNKNOWN);
            }
            self.submit(medium, ready);
        }
    }

    /// A read has ended: each block with its lineage, or why it is not to be had.
    pub(super) fn on_read_ended(
        &mut self,
        medium: &mut Medium,
        dram: &mut Residency,
        log: &mut OperationLog,
        token: u64,
        outcomes: Vec<std::result::Result<Lineage, Trouble>>,
    ) -> Consequences {
        let mut consequences = Consequences::default();
        let Some(Read { parts, started, given_up, stale }) = self.reads.remove(&token) else {
            violated!("read {token} ended but is not under way");
            return consequences;
        };
        invariant!(
            parts.len() == outcomes.len(),
            "read {token} of {} blocks ended with {} outcomes",
            parts.len(),
            outcomes.len()
        );
        let mut failed_device = false;
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        medium.rates.restored(parts.len() as u64 * medium.extent_bytes(), started.elapsed().as_secs_f64());
        for (part, outcome) in parts.into_iter().zip(outcomes) {
            let forgotten = medium.extents.remains.is_due(part.extent);
            // A slot of its own is due with the block's salt; one of the window with any.
            let stale = stale || forgotten || (!part.window && dram.remains.is_due(part.slot));
            if forgotten && part.window {
                // Its bytes came after its salt was forgotten.
                dram.remains.condemn(part.slot, medium.extents.remains.wanted_by(part.extent));
            }
            dram.counters.restored_bytes += medium.extent_bytes();
            match outcome {
                Ok(_) => {
                    medium.health.well();
                    good.push(part.key);
                }
                Err(trouble) => {
                    let by_device = trouble == Trouble::Device;
                    failed_device |= by_device;
                    dram.counters.corrupt_extents += u64::from(!by_device);
                    dram.counters.dropped(if by_device { DropReason::DiskFailed } else { DropReason::Corrupt }, 1);
                    medium.extents.discard(part.extent, by_device, &mut dram.events);
                    bad.push(part.key);
                }
            }
            medium.extents.end_read(part.extent, &mut dram.events);
            let failed = outcome.is_err() || given_up || stale;
            if failed {
                consequences.lose(&part);
            }
            match (part.window, given_up) {
                // Its followers were answered; only now is the slot the window's again.
                (true, true) => dram.memory().line(part.slot).release_all(u64::MAX),
                (true, false) => dram.memory().line(part.slot).end_restore(part.generation, !failed),
                (false, true) => dram.end_abandoned(part.slot),
                (false, false) => dram.end_restore(part.slot, outcome.ok().filter(|_| !stale)),
            }
            consequences.wake.push(part.slot);
        }
        log.record(|| trace::line("restored", &[("keys", names(good)), ("lost", names(bad))]));
        if failed_device {
            // One transfer failed, however many blocks it was for.
            medium.on_device_error(dram, log, "reading failed repeatedly");
        }
        consequences
    }

    /// Gives up reads that took longer than any device may: who follows them is told that they
    /// failed. Their slots stay the device's until it answers.
    pub(super) fn give_up_overdue(
        &mut self,
        medium: &mut Medium,
        dram: &mut Residency,
        log: &mut OperationLog,
        now: Instant,
    ) -> Consequences {
        let mut consequences = Consequences::default();
        let deadline = Duration::from_millis(limits::DISK_DEADLINE_MS);
        for read in self.reads.values_mut() {
            if read.given_up || now.duration_since(read.started) <= deadline {
                continue;
            }
            read.given_up = true;
            for part in &read.parts {
                dram.memory().line(part.slot).end_restore(part.generation, false);
                consequences.lose(part);
                consequences.wake.push(part.slot);
            }
            medium.on_device_error(dram, log, "a read took too long, repeatedly");
        }
        consequences
    }
}
