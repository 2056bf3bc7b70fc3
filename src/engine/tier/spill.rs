//! The way of a block from a slot to disk: the cleaner, and what follows when a write has ended.
//!
//! A share of the slots (`clean_percent`) is kept free or clean, and so is the same share of the
//! order of eviction, counted from its cold end: what must be evicted next can be, without waiting
//! for a write.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::disk_tier::{Job, SealOrder, Trouble, Write, same_segment};
use super::engine::TierEngine;
use super::extents::Stamp;
use super::residency::Dirty;
use super::trace::{self, names};
use crate::limits;
use crate::metrics::DropReason;
use crate::policy::admission::Candidate;
use kvcellar_block::descriptor::{self, Lineage, Seal};
use kvcellar_block::{BlockKey, ExtentIndex, SlotIndex};

/// Seconds since 1970.
pub(super) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl TierEngine {
    /// The cleaner: orders writes of the coldest dirty blocks until enough slots are free or clean,
    /// or enough writes are under way.
    ///
    /// `all`: every dirty block, because the engine stops.
    pub(super) fn clean(&mut self, all: bool) {
        let mut chosen: Vec<(SlotIndex, BlockKey)> = Vec::new();
        let mut evicted: Vec<BlockKey> = Vec::new();
        while let Some(Dirty { slot, reused, .. }) = self.next_dirty(all, chosen.len() as u64) {
            let (Some(residency), Some(disk)) = (&mut self.residency, &mut self.disk) else { return };
            let Some(key) = residency.key(slot) else { return };
            if let Some(extent) = disk.extents.find(&key) {
                disk.extents.touch(extent);
                residency.set_clean(slot, true);
                continue;
            }
            let room = disk.extents.free() > chosen.len() as u64;
            if disk.extents.knows(&key) || !disk.settings.admission.admits(Candidate { reused, room }) {
                residency.pass_over(slot);
                continue;
            }
            if !room && !disk.full_grown {
                self.grow();
                break;
            }
            if !room {
                let Some(gone) = disk.extents.evict(&mut residency.events) else { break };
                residency.counters.nvme_evicted_blocks += 1;
                if let Some(held) = residency.find(&gone) {
                    residency.set_clean(held, false);
                }
                evicted.push(gone);
            }
            residency.begin_write(slot);
            chosen.push((slot, key));
        }
        if chosen.is_empty() {
            return;
        }
        self.record(|_| {
            let keys = names(chosen.iter().map(|(_, key)| *key));
            trace::line("spill", &[("keys", keys), ("evicted", names(evicted))])
        });
        // Chosen coldest first, but laid out as they lie in memory: neighbours there become
        // neighbours on disk, and go in one transfer.
        chosen.sort_by_key(|(slot, _)| slot.0);
        let planned = self.place(chosen);
        self.write(planned);
        self.grow_ahead();
    }

    /// Gives every chosen block its extent. As many are free.
    fn place(&mut self, chosen: Vec<(SlotIndex, BlockKey)>) -> Vec<(SlotIndex, ExtentIndex, BlockKey)> {
        let (Some(residency), Some(disk)) = (&mut self.residency, &mut self.disk) else { return Vec::new() };
        disk.extents.line_up(chosen.len());
        let mut planned = Vec::with_capacity(chosen.len());
        for (slot, key) in chosen {
            let stamp = Stamp { sequence: disk.sequence, written_s: now_s() };
            let Some(extent) = disk.extents.reserve(&key, stamp, &mut residency.events) else {
                debug_assert!(false, "more blocks were chosen than extents are free");
                residency.end_write(slot, false);
                continue;
            };
            disk.sequence += 1;
            planned.push((slot, extent, key));
        }
        planned
    }

    /// The next dirty block to be written, if one has to be.
    /// `chosen`: blocks that will be written beside those that are being written.
    fn next_dirty(&self, all: bool, chosen: u64) -> Option<Dirty> {
        let (residency, disk) = (self.residency.as_ref()?, self.disk.as_ref()?);
        if !disk.health.is_in() || disk.extents.writing() + chosen >= disk.writes_max() {
            return None;
        }
        let census = residency.census();
        let slots = census.free + census.filling + census.filled;
        let wanted = slots * disk.settings.clean_percent / 100;
        let dirty = residency.coldest_dirty()?;
        // The share counts from the cold end: hot clean blocks do not help when cold dirty ones
        // must go.
        let cold = u64::from(dirty.uses_since) >= slots - wanted;
        let few = census.free + census.clean + census.writing < wanted;
        (all || disk.settings.write_through || (wanted > 0 && (few || cold))).then_some(dirty)
    }

    /// Hands blocks to the mover, neighbours in memory and on disk in one transfer.
    fn write(&mut self, planned: Vec<(SlotIndex, ExtentIndex, BlockKey)>) {
        let (Some(residency), Some(disk)) = (&self.residency, &mut self.disk) else { return };
        let most = (limits::TRANSFER_BYTES_MAX / disk.layout.extent_bytes).max(1) as usize;
        let mut rest = planned.into_iter().peekable();
        while let Some(first) = rest.next() {
            let mut parts = vec![first];
            while let (Some(last), Some(next)) = (parts.last(), rest.peek()) {
                let adjacent =
                    next.0.0 == last.0.0 + 1 && next.1.0 == last.1.0 + 1 && same_segment(disk.layout, last.1, next.1);
                if !adjacent || parts.len() >= most {
                    break;
                }
                parts.extend(rest.next());
            }
            let token = disk.token();
            let orders = parts.iter().map(|(slot, extent, key)| {
                let stamp = disk.extents.stamp(*extent);
                SealOrder {
                    slot: *slot,
                    generation: residency.generation(*slot),
                    key: *key,
                    seal: Seal {
                        store: disk.store_id,
                        sequence: stamp.sequence,
                        cache_generation: disk.cache_generation,
                        written_s: stamp.written_s,
                        stored_bytes: disk.pool.geometry().payload_bytes[key.group.0 as usize],
                        encoding: 0,
                    },
                }
            });
            disk.order(Job::Write { token, orders: orders.collect(), extent: parts[0].1 });
            disk.writes.insert(token, Write { parts, started: Instant::now(), stale: false });
        }
    }

    fn grow(&mut self) {
        let Some(disk) = &mut self.disk else { return };
        if !disk.growing && !disk.full_grown {
            disk.growing = true;
            disk.order(Job::Grow);
        }
    }

    /// Makes the next segment before the last free extent is gone.
    fn grow_ahead(&mut self) {
        let few = self.disk.as_ref().is_some_and(|disk| disk.extents.free() < disk.writes_max());
        if few {
            self.grow();
        }
    }

    /// A write has ended.
    pub(super) fn written(&mut self, token: u64, trouble: Option<Trouble>) {
        let (Some(residency), Some(disk)) = (&mut self.residency, &mut self.disk) else { return };
        let Some(Write { parts, stale, .. }) = disk.writes.remove(&token) else { return };
        let well = trouble.is_none() && !stale;
        let mut outage = false;
        match trouble {
            None => {
                disk.health.well();
            }
            Some(Trouble::Device) => {
                residency.counters.disk_errors += 1;
                outage = disk.health.failed(Instant::now());
            }
            Some(Trouble::Corrupt | Trouble::Undescribed) => {}
        }
        for (slot, extent, key) in &parts {
            // Before the slot may be given away.
            let lineage =
                if residency.events.enabled() && well { lineage_of(&disk.pool, *slot) } else { Lineage::default() };
            let held = residency.end_write(*slot, well);
            if well {
                residency.counters.spilled_blocks += 1;
                residency.counters.spilled_bytes += disk.layout.extent_bytes;
                disk.extents.commit(*extent, lineage, &mut residency.events);
                // The same block may have been dropped and computed again meanwhile.
                if !held && let Some(again) = residency.find(key) {
                    residency.set_clean(again, true);
                }
            } else {
                if trouble.is_some() && trouble != Some(Trouble::Undescribed) {
                    residency.counters.dropped(DropReason::DiskFailed, 1);
                }
                disk.extents.fail(*extent, trouble == Some(Trouble::Device), &mut residency.events);
            }
        }
        let keys: Vec<BlockKey> = parts.iter().map(|(_, _, key)| *key).collect();
        self.record(|_| trace::line("spilled", &[("keys", names(keys)), ("ok", Value::from(well))]));
        if outage {
            self.outage("writing failed repeatedly");
        }
    }

    /// The disk goes out of service: its blocks are not to be had, and everybody is told.
    pub(super) fn outage(&mut self, why: &str) {
        self.out_of_service(why, "the disk is tried again");
    }

    /// As [`Self::outage`]; `then`: what will become of the disk.
    pub(super) fn out_of_service(&mut self, why: &str, then: &str) {
        let (Some(residency), Some(disk)) = (&mut self.residency, &mut self.disk) else { return };
        disk.extents.withdraw(&mut residency.events);
        residency.counters.nvme_outages += 1;
        log::warn!("the nvme tier is out of service: {why}. The dram tier goes on; {then}");
        self.record(|_| trace::line("outage", &[]));
    }

    /// Erases blocks that have lain on disk for too long; looks at some of them a round.
    pub(super) fn expire(&mut self) {
        let (Some(residency), Some(disk)) = (&mut self.residency, &mut self.disk) else { return };
        let Some(retention) = disk.settings.retention_s else { return };
        let (from, to) = (disk.retention_from, disk.retention_from.saturating_add(limits::RETENTION_BATCH));
        disk.retention_from = if to >= disk.extents.ready() { 0 } else { to };
        let oldest = now_s().saturating_sub(retention);
        let old = |stamp: Stamp| stamp.written_s < oldest;
        let expired: Vec<(ExtentIndex, BlockKey)> = disk
            .extents
            .committed_in(from, to)
            .filter(|(extent, _, stamp)| old(*stamp) && !disk.extents.is_read(*extent))
            .map(|(extent, key, _)| (extent, key))
            .collect();
        if expired.is_empty() {
            return;
        }
        for (extent, key) in &expired {
            // Kept out of use until it has been erased.
            disk.extents.discard(*extent, true, &mut residency.events);
            residency.counters.dropped(DropReason::Expired, 1);
            if let Some(held) = residency.find(key) {
                residency.drop_block(held, DropReason::Expired);
            }
        }
        disk.order(Job::Erase(expired.into_iter().map(|(extent, _)| extent).collect()));
    }
}

pub(super) fn lineage_of(pool: &crate::pool::Pool, slot: SlotIndex) -> Lineage {
    let read = descriptor::read(&pool.descriptor(slot), pool.geometry().parts.len());
    // It was whole when it was sealed; a block without tokens is what consumers know otherwise.
    read.map(|(_, _, lineage)| lineage).unwrap_or_default()
}
