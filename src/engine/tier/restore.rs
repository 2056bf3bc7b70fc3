//! The way of a block from disk back into a slot, and from there, without another step, into vLLM's
//! KV cache.
//!
//! A restored block takes a slot as an offloaded one does: a free one, or that of the block to
//! evict next, but never one of its own prefix. A block that gets none streams through the
//! [`super::window`].

use std::time::Instant;

use serde_json::Value;

use super::disk_tier::{DescriptorRead, Job, Moved, Read, ReadPart, Trouble};
use super::engine::TierEngine;
use super::trace::{self, names};
use crate::limits;
use crate::metrics::DropReason;
use kvcellar_block::descriptor::Lineage;
use kvcellar_block::{BlockKey, ExtentIndex, SlotIndex};

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

impl TierEngine {
    /// Where a block can be had.
    pub(super) fn source(&self, key: &BlockKey) -> Option<Source> {
        let residency = self.residency.as_ref()?;
        match residency.find_any(key) {
            Some((slot, true)) => return Some(Source::Slot(slot)),
            Some((slot, false)) if residency.is_restoring(slot) => return Some(Source::Restoring(slot)),
            _ => {}
        }
        self.disk.as_ref()?.extents.find(key).map(Source::Extent)
    }

    /// Plans the read of one block, into a free slot if there is one.
    pub(super) fn plan_read(
        &mut self,
        key: &BlockKey,
        extent: ExtentIndex,
        serial: u32,
        request: &str,
        token: u32,
    ) -> Option<ReadPart> {
        let (residency, disk) = (self.residency.as_mut()?, self.disk.as_mut()?);
        let mut part = ReadPart {
            slot: SlotIndex(0),
            generation: kvcellar_block::Generation(0),
            extent,
            key: *key,
            window: false,
            request: request.to_owned(),
            token,
        };
        // A block that is being offloaded has its slot already: it cannot have another.
        let reserved =
            if residency.find_any(key).is_some() { None } else { residency.reserve_restore(key, serial).ok() };
        let place = if let Some(reserved) = reserved {
            debug_assert!(reserved.evicted.is_none(), "room is made before");
            (part.slot, part.generation) = (reserved.slot, reserved.generation);
            residency.pin(part.slot, serial);
            None
        } else {
            let (index, slot, generation) = disk.window.promise()?;
            (part.slot, part.generation, part.window) = (slot, generation, true);
            Some(index)
        };
        disk.extents.begin_read(extent);
        if let Some(index) = place {
            disk.window.enqueue(index, part.clone());
        }
        Some(part)
    }

    /// Starts the reads of the window whose slots are free now.
    pub(super) fn advance_window(&mut self) {
        let (Some(residency), Some(disk)) = (&self.residency, &mut self.disk) else { return };
        if disk.window.waiting() > 0 {
            let ready = disk.window.advance(residency.memory().as_ref());
            disk.read(ready);
        }
    }

    /// Takes in what the mover found out. Returns the slots whose followers are to be woken.
    pub fn moved(&mut self, moved: Vec<Moved>) -> Vec<SlotIndex> {
        let mut wake = Vec::new();
        for one in moved {
            match one {
                Moved::Read { token, outcomes } => self.read_ended(token, outcomes, &mut wake),
                Moved::Written { token, trouble } => self.written(token, trouble),
                Moved::Described { found, trial } => self.described(found, trial),
                Moved::Grown { ready, last } => {
                    if let Some(disk) = &mut self.disk {
                        disk.extents.make_ready(ready);
                        (disk.growing, disk.full_grown) = (false, last);
                        disk.description = disk.disk.describe();
                    }
                }
                Moved::Erased(extents) => {
                    if let (Some(residency), Some(disk)) = (&mut self.residency, &mut self.disk) {
                        let events = &mut residency.events;
                        for extent in extents {
                            disk.extents.reinstate(extent, events);
                        }
                    }
                }
                Moved::Gone => self.store_gone(),
            }
        }
        self.advance_window();
        self.clean(self.flushing);
        wake
    }

    /// What has to be done now and then, also when nothing ended. Returns the slots whose followers
    /// are to be woken.
    pub fn tick(&mut self, now: Instant) -> Vec<SlotIndex> {
        self.poll();
        let mut wake = Vec::new();
        for token in self.disk.as_ref().map_or_else(Vec::new, |disk| disk.overdue(now)) {
            self.give_up(token, &mut wake);
        }
        self.try_disk_again(now);
        self.advance_window();
        self.announce();
        self.expire();
        wake
    }

    fn read_ended(
        &mut self,
        token: u64,
        outcomes: Vec<std::result::Result<Lineage, Trouble>>,
        wake: &mut Vec<SlotIndex>,
    ) {
        let (Some(residency), Some(disk)) = (&mut self.residency, &mut self.disk) else { return };
        let Some(Read { parts, started, given_up, stale }) = disk.reads.remove(&token) else { return };
        let mut failed_device = false;
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        let seconds = started.elapsed().as_secs_f64();
        disk.rates.restored(parts.len() as u64 * disk.layout.extent_bytes, seconds);
        for (part, outcome) in parts.into_iter().zip(outcomes) {
            residency.counters.restored_bytes += disk.layout.extent_bytes;
            match outcome {
                Ok(_) => {
                    disk.health.well();
                    good.push(part.key);
                }
                Err(trouble) => {
                    if trouble == Trouble::Device {
                        failed_device = true;
                    } else {
                        residency.counters.corrupt_extents += 1;
                    }
                    let reason = if trouble == Trouble::Device { DropReason::DiskFailed } else { DropReason::Corrupt };
                    residency.counters.dropped(reason, 1);
                    disk.extents.discard(part.extent, trouble == Trouble::Device, &mut residency.events);
                    bad.push(part.key);
                }
            }
            disk.extents.end_read(part.extent, &mut residency.events);
            let failed = outcome.is_err() || given_up || stale;
            if failed && let Some(lease) = self.leases.get_mut(&part.request) {
                lease.lost_at = Some(lease.lost_at.map_or(part.token, |first| first.min(part.token)));
            }
            let line = residency.memory().line(part.slot);
            if given_up && part.window {
                // Its followers were answered; only now is the slot the window's again.
                line.release_all(u64::MAX);
            } else if part.window {
                line.end_restore(part.generation, !failed);
            } else if !given_up {
                residency.end_restore(part.slot, outcome.ok().filter(|_| !stale));
            } else {
                residency.end_abandoned(part.slot);
            }
            wake.push(part.slot);
        }
        let outage = failed_device && {
            // One transfer failed, however many blocks it was for.
            residency.counters.disk_errors += 1;
            disk.health.failed(Instant::now())
        };
        self.record(|_| trace::line("restored", &[("keys", names(good)), ("lost", names(bad))]));
        if outage {
            self.outage("reading failed repeatedly");
        }
    }

    /// A read took longer than any device may: who follows it is told that it failed. Its slots
    /// stay the device's until it answers.
    fn give_up(&mut self, token: u64, wake: &mut Vec<SlotIndex>) {
        let (Some(residency), Some(disk)) = (&mut self.residency, &mut self.disk) else { return };
        let Some(read) = disk.reads.get_mut(&token) else { return };
        read.given_up = true;
        for part in &read.parts {
            residency.memory().line(part.slot).end_restore(part.generation, false);
            if let Some(lease) = self.leases.get_mut(&part.request) {
                lease.lost_at = Some(lease.lost_at.map_or(part.token, |first| first.min(part.token)));
            }
            wake.push(part.slot);
        }
        residency.counters.disk_errors += 1;
        if disk.health.failed(Instant::now()) {
            self.outage("a read took too long, repeatedly");
        }
    }

    fn try_disk_again(&mut self, now: Instant) {
        let Some(disk) = &mut self.disk else { return };
        if disk.health.wants_trial(now) {
            disk.order(Job::Describe { extents: vec![ExtentIndex(0)], trial: true });
        }
    }

    /// Orders the descriptors of some more blocks that a reopened store holds, while few events
    /// wait.
    fn announce(&mut self) {
        let (Some(residency), Some(disk)) = (&mut self.residency, &mut self.disk) else { return };
        let (Some(from), true) = (disk.announce_from, disk.health.is_in()) else { return };
        if disk.describing || residency.events.len() >= limits::EVENTS_PER_STEP_MAX {
            return;
        }
        if !residency.events.enabled() {
            disk.announce_from = None;
            return;
        }
        let mut next = from;
        let mut batch = Vec::with_capacity(limits::ANNOUNCE_BATCH);
        while batch.len() < limits::ANNOUNCE_BATCH
            && let Some(extent) = disk.extents.unannounced(next)
        {
            batch.push(extent);
            next = extent.0 + 1;
        }
        if batch.is_empty() {
            disk.announce_from = None;
            return;
        }
        disk.announce_from = Some(next);
        disk.describing = true;
        disk.order(Job::Describe { extents: batch, trial: false });
    }

    fn described(&mut self, found: Vec<(ExtentIndex, DescriptorRead)>, trial: bool) {
        let (Some(residency), Some(disk)) = (&mut self.residency, &mut self.disk) else { return };
        disk.describing &= trial;
        let failed = found.iter().any(|(_, read)| matches!(read, Err(Trouble::Device)));
        for (extent, read) in found.into_iter().filter(|_| !trial) {
            match read {
                Ok((key, lineage)) => disk.extents.announce(extent, &key, lineage, &mut residency.events),
                Err(Trouble::Device) => {
                    residency.counters.dropped(DropReason::DiskFailed, 1);
                    disk.extents.discard(extent, true, &mut residency.events);
                }
                // What cannot describe itself is not what the directory says, unless it was written
                // anew meanwhile.
                Err(_) if disk.extents.is_unannounced(extent) => {
                    residency.counters.corrupt_extents += 1;
                    residency.counters.dropped(DropReason::Corrupt, 1);
                    disk.extents.discard(extent, false, &mut residency.events);
                }
                Err(_) => {}
            }
        }
        if failed {
            residency.counters.disk_errors += 1;
            if disk.health.failed(Instant::now()) {
                self.outage("reading failed repeatedly");
            }
        } else if disk.health.well() {
            disk.extents.in_service = true;
            disk.announce_from = Some(0);
            log::info!("the nvme tier is in service again");
        }
        self.announce();
    }

    /// The store's directory was removed under us: nothing on it can be kept.
    fn store_gone(&mut self) {
        let Some(disk) = &mut self.disk else { return };
        if disk.health.lost() {
            self.out_of_service("its directory is gone", "a restart makes a new one");
        }
    }

    /// Fields of the operation log about where a load's blocks come from.
    pub(super) fn restore_fields(
        own: &[BlockKey],
        window: &[BlockKey],
        evicted: Vec<BlockKey>,
    ) -> [(&'static str, Value); 3] {
        [
            ("restore", names(own.iter().copied())),
            ("window", names(window.iter().copied())),
            ("evicted", names(evicted)),
        ]
    }
}
