//! What a reopened store holds is announced to subscribers, from the extents' own descriptors, in
//! the background. The same reads try a disk again that is out of service.

use std::time::Instant;

use super::jobs::Job;
use super::medium::Medium;
use super::residency::Residency;
use super::trace::OperationLog;
use super::transfer::{DescriptorRead, Trouble};
use crate::limits;
use crate::metrics::DropReason;
use kvcellar_block::ExtentIndex;

/// How far the announcement is.
#[derive(Debug)]
pub(super) struct Announcer {
    /// The first extent whose block may not be announced yet; `None`: all are.
    next: Option<u32>,
    /// Descriptors are being read for it.
    reading: bool,
}

impl Announcer {
    /// `found`: a reopened store holds blocks.
    pub(super) fn new(found: bool) -> Self {
        Self { next: found.then_some(0), reading: false }
    }

    /// Blocks wait to be announced.
    pub(super) fn is_pending(&self) -> bool {
        self.next.is_some()
    }

    /// Orders the descriptors of some more blocks, while few events wait.
    pub(super) fn advance(&mut self, medium: &mut Medium, dram: &mut Residency) {
        // All are announced, or must wait until the disk is in service again.
        let (Some(from), true) = (self.next, medium.health.is_in()) else { return };
        if self.reading || dram.events.len() >= limits::EVENTS_PER_STEP_MAX {
            return;
        }
        if !dram.events.enabled() {
            self.next = None;
            return;
        }
        let mut next = from;
        let mut batch = Vec::with_capacity(limits::ANNOUNCE_BATCH);
        while batch.len() < limits::ANNOUNCE_BATCH
            && let Some(extent) = medium.extents.unannounced(next)
        {
            batch.push(extent);
            next = extent.0 + 1;
        }
        if batch.is_empty() {
            self.next = None;
            return;
        }
        self.next = Some(next);
        self.reading = true;
        medium.order(Job::Describe { extents: batch, trial: false });
    }

    /// Reads one descriptor of a disk that is out of service, when it is time to try it again.
    pub(super) fn try_disk_again(medium: &mut Medium, now: Instant) {
        if medium.health.wants_trial(now) {
            medium.order(Job::Describe { extents: vec![ExtentIndex(0)], trial: true });
        }
    }

    /// Descriptors were read. `trial`: to try the disk, not to announce them.
    pub(super) fn on_described(
        &mut self,
        medium: &mut Medium,
        dram: &mut Residency,
        log: &mut OperationLog,
        found: Vec<(ExtentIndex, DescriptorRead)>,
        trial: bool,
    ) {
        self.reading &= trial;
        let failed = found.iter().any(|(_, read)| matches!(read, Err(Trouble::Device)));
        for (extent, read) in found.into_iter().filter(|_| !trial) {
            match read {
                Ok((key, lineage)) => medium.extents.announce(extent, &key, lineage, &mut dram.events),
                Err(Trouble::Device) => {
                    dram.counters.dropped(DropReason::DiskFailed, 1);
                    medium.extents.discard(extent, true, &mut dram.events);
                }
                // What cannot describe itself is not what the directory says, unless it was written
                // anew meanwhile.
                Err(_) if medium.extents.is_unannounced(extent) => {
                    dram.counters.corrupt_extents += 1;
                    dram.counters.dropped(DropReason::Corrupt, 1);
                    medium.extents.discard(extent, false, &mut dram.events);
                }
                Err(_) => {}
            }
        }
        if failed {
            medium.on_device_error(dram, log, "reading failed repeatedly");
        } else if medium.health.well() {
            medium.extents.return_to_service();
            self.next = Some(0);
            log::info!("the nvme tier is in service again");
        }
        self.advance(medium, dram);
    }
}
