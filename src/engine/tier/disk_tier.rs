//! The nvme tier: the disk, and the ways of blocks to it and from it.
//!
//! Transfers under way are named by a token; a completion whose token is unknown is a bug.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Sender;
use hashbrown::HashSet;

use super::announce::Announcer;
use super::clock::now_s;
use super::extents::Stamp;
use super::jobs::{Job, Report};
use super::medium::Medium;
use super::residency::Residency;
use super::restore::{Consequences, Restores};
use super::retention::Retention;
use super::spill::Cleaner;
use super::trace::OperationLog;
use super::window::Window;
use crate::event_log::EventLog;
use crate::limits;
use crate::metrics::{DropReason, Gauges};
use crate::nvme::disk::Disk;
use crate::nvme::snapshot::SnapshotEntry;
use crate::nvme::store::Store;
use crate::pool::Pool;
use kvcellar_block::{BlockKey, ExtentIndex, SaltTag};

pub use super::medium::DiskSettings;

/// The number of the first extent that a store writes: one that is still to write it holds zeros.
const FIRST_SEQUENCE: u64 = 1;

/// What a store's opening gives a tier.
pub struct DiskParts<'a> {
    /// The store.
    pub store: Store,
    /// The device, with the store's segments.
    pub disk: Arc<dyn Disk>,
    /// Where the mover's work goes.
    pub jobs: Sender<Job>,
    /// What a reopened store holds.
    pub found: &'a [SnapshotEntry],
    /// The number of the next extent.
    pub next_sequence: u64,
    /// Bytes that transfers pass through; 0: they go directly.
    pub staging_bytes: u64,
}

/// The nvme tier of one engine.
pub(super) struct DiskTier {
    /// The disk itself.
    pub(super) medium: Medium,
    /// The way to it.
    pub(super) cleaner: Cleaner,
    /// The way from it.
    pub(super) restores: Restores,
    announcer: Announcer,
    retention: Retention,
    /// The mover erases extents of what is forgotten.
    erasing: bool,
    staging_bytes: u64,
}

impl DiskTier {
    /// A tier below `dram`, which lies in `pool` and gives up a few slots for the restore window.
    /// Blocks that are too old are not taken over.
    pub(super) fn open(
        parts: DiskParts<'_>,
        settings: DiskSettings,
        pool: &Arc<Pool>,
        dram: &mut Residency,
    ) -> (Self, OpenedDisk) {
        let window = set_window_aside(pool, dram);
        let window_slots = window.slots();
        let oldest = settings.retention_s.map_or(0, |retention| now_s().saturating_sub(retention));
        let mut medium = Medium::new(parts.store, parts.disk, Arc::clone(pool), parts.jobs, settings);
        for entry in parts.found.iter().filter(|entry| entry.written_s >= oldest) {
            let stamp = Stamp { sequence: entry.sequence, written_s: entry.written_s };
            if medium.extents.adopt(entry.extent, &entry.key, stamp) {
                medium.extents.remains.set(entry.extent, entry.salt);
            }
        }
        medium.extents.recount_free();
        if parts.next_sequence != FIRST_SEQUENCE {
            medium.extents.doubt_the_rest();
        }
        let reopened = medium.extents.committed();
        dram.track_dirty();
        dram.counters.nvme_reopened_blocks += reopened;
        for slot in dram.visible_slots() {
            if dram.key(slot).is_some_and(|key| medium.extents.find(&key).is_some()) {
                dram.set_clean(slot, true);
            }
        }
        let opened =
            OpenedDisk { extents: medium.extents.ready(), extents_max: medium.extents.max(), reopened, window_slots };
        let tier = Self {
            medium,
            cleaner: Cleaner::new(parts.next_sequence),
            restores: Restores::new(window),
            announcer: Announcer::new(reopened > 0),
            retention: Retention::default(),
            erasing: false,
            staging_bytes: parts.staging_bytes,
        };
        (tier, opened)
    }

    /// Blocks that could be restored now.
    pub(super) fn blocks(&self) -> impl Iterator<Item = BlockKey> + '_ {
        self.medium.extents.committed_in(0, self.medium.extents.ready()).map(|(_, key, _)| key)
    }

    /// Bytes of reads under way or waiting for the window.
    pub(super) fn queued_bytes(&self) -> u64 {
        self.restores.queued() * self.medium.extent_bytes()
    }

    /// Nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.restores.is_idle() && self.cleaner.has_no_writes() && !self.cleaner.is_growing()
    }

    /// Blocks of a reopened store wait to be announced.
    pub(super) fn is_announcing(&self) -> bool {
        self.announcer.is_pending()
    }

    /// Every dirty block has been written.
    pub(super) fn is_flushed(&self) -> bool {
        self.medium.extents.writing() == 0 && !self.cleaner.is_growing()
    }

    /// Takes in what the mover found out.
    pub(super) fn on_report(&mut self, dram: &mut Residency, log: &mut OperationLog, report: Report) -> Consequences {
        match report {
            Report::ReadEnded { token, outcomes } => {
                return self.restores.on_read_ended(&mut self.medium, dram, log, token, outcomes);
            }
            Report::WriteEnded { token, trouble } => {
                self.cleaner.on_write_ended(&mut self.medium, dram, log, token, trouble);
            }
            Report::Described { found, trial } => {
                self.announcer.on_described(&mut self.medium, dram, log, found, trial);
            }
            Report::Grown { ready, last } => {
                self.medium.on_grown(ready);
                self.cleaner.on_grown(last);
                if last {
                    self.medium.share_what_there_is();
                }
            }
            Report::Erased(extents) => {
                // What is forgotten meanwhile is erased once more, durably.
                for extent in extents {
                    if !self.medium.extents.remains.has(extent) {
                        self.medium.extents.reinstate(extent, &mut dram.events);
                    }
                }
            }
            Report::ErasedDurably { extents, failed } => {
                let failed: HashSet<ExtentIndex> = failed.into_iter().collect();
                for extent in extents {
                    let erased = !failed.contains(&extent);
                    self.medium.extents.end_erasure(extent, erased, &mut dram.events);
                }
                self.erasing = false;
                self.erase();
            }
            Report::StoreRemoved => {
                // Nothing on it can be kept.
                if self.medium.health.lost() {
                    self.medium.leave_service(dram, log, "its directory is gone", "a restart makes a new one");
                }
            }
        }
        Consequences::default()
    }

    /// What has to be done now and then, also when nothing ended.
    pub(super) fn tick(&mut self, dram: &mut Residency, log: &mut OperationLog, now: Instant) -> Consequences {
        let consequences = self.restores.give_up_overdue(&mut self.medium, dram, log, now);
        Announcer::try_disk_again(&mut self.medium, now);
        self.restores.advance_window(&mut self.medium, dram);
        self.announcer.advance(&mut self.medium, dram);
        self.retention.expire(&mut self.medium, dram);
        self.erase();
        consequences
    }

    /// Drops the blocks of a salt, and has their extents erased. Returns how many blocks there
    /// were.
    pub(super) fn forget(&mut self, salt: SaltTag, request: u64, events: &mut EventLog) -> u64 {
        let dropped = self.medium.extents.forget(salt, request, events);
        self.erase();
        dropped
    }

    /// Has some more extents erased that wait for it, when the last ones are: the mover has reads
    /// and writes to look after, too.
    fn erase(&mut self) {
        if self.erasing {
            return;
        }
        let most = (limits::ERASE_BYTES_PER_JOB / self.medium.extent_bytes()).max(1);
        let waiting = self.medium.extents.remains.take(most as usize);
        if !waiting.is_empty() {
            self.erasing = true;
            self.medium.order(Job::EraseDurably(waiting));
        }
    }

    /// Orders writes of dirty blocks, as far as some have to be written.
    pub(super) fn clean(&mut self, dram: &mut Residency, log: &mut OperationLog) {
        self.cleaner.clean(&mut self.medium, dram, log);
    }

    /// Starts the reads of the window whose slots are free now.
    pub(super) fn advance_window(&mut self, dram: &mut Residency) {
        self.restores.advance_window(&mut self.medium, dram);
    }

    /// Nothing on disk is to be found again, by nobody.
    pub(super) fn reset(&mut self, dram: &mut Residency) {
        let medium = &mut self.medium;
        let bumped = medium.lock_store().bump_cache_generation();
        match bumped {
            Ok(generation) => medium.cache_generation = generation,
            Err(error) => {
                log::error!("the nvme tier could not be reset and is given up: {error}");
                medium.health.lost();
                medium.extents.withdraw(&mut dram.events);
            }
        }
        self.cleaner.on_reset();
        self.restores.on_reset();
        let all: Vec<ExtentIndex> = medium.extents.committed_in(0, u32::MAX).map(|(extent, _, _)| extent).collect();
        for extent in all {
            medium.extents.discard(extent, false, &mut dram.events);
            dram.counters.dropped(DropReason::Reset, 1);
        }
    }

    /// Leaves a snapshot of what lies where, for the next start.
    pub(super) fn close(self) {
        let entry = |(extent, key, stamp): (ExtentIndex, BlockKey, Stamp)| SnapshotEntry {
            extent,
            key,
            sequence: stamp.sequence,
            written_s: stamp.written_s,
            salt: self.medium.extents.remains.tag(extent),
        };
        self.erase_the_rest();
        // A write under way may still change an extent: then only a scan tells what is there.
        if !self.cleaner.has_no_writes() {
            return;
        }
        let entries: Vec<SnapshotEntry> = self.medium.extents.committed_in(0, u32::MAX).map(entry).collect();
        if let Err(error) = self.medium.lock_store().close_clean(&entries, self.cleaner.next_sequence()) {
            log::warn!("no snapshot of the nvme tier, the next start reads the descriptors instead: {error}");
        }
    }

    /// The mover erases no more: what it has not done is done now.
    fn erase_the_rest(&self) {
        let rest = self.medium.extents.remains.unerased();
        if !rest.is_empty() {
            // What could not be is in the log: there is nobody left to be told.
            let _failed = self.medium.lock_store().erase_durably(&rest);
        }
    }

    /// The gauges of the nvme tier; those of the dram tier are 0.
    pub(super) fn gauges(&self) -> Gauges {
        let (extents, device) = (&self.medium.extents, self.medium.description());
        Gauges {
            nvme_blocks: extents.committed(),
            nvme_extents: u64::from(extents.ready()),
            nvme_writing: extents.writing(),
            nvme_reading: self.restores.reading(),
            nvme_retired: extents.retired(),
            nvme_in_service: u64::from(self.medium.health.is_in()),
            nvme_io_uring: u64::from(device.engine == "io_uring"),
            nvme_direct: u64::from(device.direct),
            nvme_registered: u64::from(device.registered),
            nvme_staging_bytes: self.staging_bytes,
            nvme_write_budget_left_bytes: self.medium.budget_left(),
            ..Gauges::default()
        }
    }
}

/// What a tier has at its opening.
pub(super) struct OpenedDisk {
    /// Extents that exist.
    pub(super) extents: u32,
    /// Extents that may exist.
    pub(super) extents_max: u32,
    /// Blocks that were taken over.
    pub(super) reopened: u64,
    /// Slots of the restore window.
    pub(super) window_slots: usize,
}

/// Takes a few slots out of the dram tier for the restore window.
fn set_window_aside(pool: &Arc<Pool>, dram: &mut Residency) -> Window {
    let count = (pool.slot_count() / limits::WINDOW_POOL_SHARE)
        .clamp(limits::WINDOW_SLOTS_MIN, limits::WINDOW_SLOTS_MAX)
        .min(pool.slot_count() / 2)
        .max(1);
    let slots = dram.set_aside(count);
    let ranks = u64::MAX >> (64 - pool.geometry().parts.len());
    Window::new(slots, dram.memory().as_ref(), ranks)
}
