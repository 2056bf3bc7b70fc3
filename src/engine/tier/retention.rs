//! Blocks that have lain on disk for longer than the user allows are erased.

use super::clock::now_s;
use super::jobs::Job;
use super::medium::Medium;
use super::residency::Residency;
use crate::limits;
use crate::metrics::DropReason;
use kvcellar_block::{BlockKey, ExtentIndex};

/// Goes round the extents, some of them at a time.
#[derive(Debug, Default)]
pub(super) struct Retention {
    /// The extent that the next round begins with.
    next: u32,
}

impl Retention {
    /// Looks at some more extents, and has those erased that are too old.
    pub(super) fn expire(&mut self, medium: &mut Medium, dram: &mut Residency) {
        // Without a limit blocks may lie there for ever.
        let Some(retention_s) = medium.settings.retention_s else { return };
        let (from, to) = (self.next, self.next.saturating_add(limits::RETENTION_BATCH));
        self.next = if to >= medium.extents.ready() { 0 } else { to };
        let oldest = now_s().saturating_sub(retention_s);
        let expired: Vec<(ExtentIndex, BlockKey)> = medium
            .extents
            .committed_in(from, to)
            .filter(|(extent, _, stamp)| stamp.written_s < oldest && !medium.extents.is_read(*extent))
            .map(|(extent, key, _)| (extent, key))
            .collect();
        if expired.is_empty() {
            return;
        }
        for (extent, key) in &expired {
            // Kept out of use until it has been erased.
            medium.extents.discard(*extent, true, &mut dram.events);
            dram.counters.dropped(DropReason::Expired, 1);
            if let Some(held) = dram.find(key) {
                dram.drop_block(held, DropReason::Expired);
            }
        }
        medium.order(Job::Erase(expired.into_iter().map(|(extent, _)| extent).collect()));
    }
}
