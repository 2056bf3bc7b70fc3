//! The way of a block from a slot to disk: the cleaner, and what follows when a write has ended.
//!
//! A share of the slots (`clean_percent`) is kept free or clean, and so is the same share of the
//! order of eviction, counted from its cold end: what must be evicted next can be, without waiting
//! for a write.

use hashbrown::HashMap;
use serde_json::Value;

use super::cleaning::{self, Cleaning, CleaningStep, WriteMeans, judge};
use super::clock::now_s;
use super::extents::Stamp;
use super::jobs::Job;
use super::medium::Medium;
use super::residency::Residency;
use super::trace::{self, OperationLog, names};
use super::transfer::{self, SealOrder, Trouble, Write, WritePart};
use crate::metrics::DropReason;
use crate::{limits, violated};
use kvcellar_block::descriptor::{self, Lineage, Seal};
use kvcellar_block::{BlockKey, SlotIndex};

/// Whether the store can become larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Growth {
    /// It can, when it is asked to.
    Possible,
    /// It was asked to, and has not answered.
    Ordered,
    /// It has its full size, or the system gives it no more.
    Ended,
}

/// Writes dirty blocks to disk, ahead of their eviction.
pub(super) struct Cleaner {
    /// Writes under way, by token.
    writes: HashMap<u64, Write>,
    growth: Growth,
    /// The number of the next extent written.
    next_sequence: u64,
    /// The engine stops: every dirty block is written.
    flushing: bool,
}

impl Cleaner {
    /// A cleaner that numbers its writes from `next_sequence` on.
    pub(super) fn new(next_sequence: u64) -> Self {
        Self { writes: HashMap::new(), growth: Growth::Possible, next_sequence, flushing: false }
    }

    /// The number of the next extent written.
    pub(super) fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    /// No write is under way.
    pub(super) fn has_no_writes(&self) -> bool {
        self.writes.is_empty()
    }

    /// The store is being made larger.
    pub(super) fn is_growing(&self) -> bool {
        self.growth == Growth::Ordered
    }

    /// From now on every dirty block is written, because the engine stops.
    pub(super) fn write_everything(&mut self) {
        self.flushing = true;
    }

    /// A reset came: what is being written is worthless.
    pub(super) fn on_reset(&mut self) {
        for write in self.writes.values_mut() {
            write.stale = true;
        }
    }

    /// Orders writes of the coldest dirty blocks until enough slots are free or clean, or enough
    /// writes are under way.
    pub(super) fn clean(&mut self, medium: &mut Medium, dram: &mut Residency, log: &mut OperationLog) {
        let mut chosen: Vec<(SlotIndex, BlockKey)> = Vec::new();
        let mut of_owners = [0; limits::TENANTS_MAX + 1];
        let mut evicted: Vec<BlockKey> = Vec::new();
        let everything = self.flushing || medium.settings.write_through;
        let mut cleaning = Cleaning::new(dram, medium.settings.clean_percent, everything);
        while medium.health.is_in() && medium.extents.writing() + (chosen.len() as u64) < medium.writes_max() {
            if !medium.may_write() {
                // What is evicted meanwhile is lost to the disk, and counted as such.
                break;
            }
            let Some(dirty) = cleaning.next(dram) else { break };
            let owner = dram.owner(dirty.slot);
            // Those that were chosen have no extents yet.
            let wanted = of_owners[usize::from(owner.0)] + 1;
            let is_at_limit = medium.extents.room(owner) < wanted;
            let room = medium.extents.free() > chosen.len() as u64 && !is_at_limit;
            let means = WriteMeans { room, scarce: medium.is_budget_short() };
            let key = match judge(&mut medium.extents, dram, medium.settings.admission, dirty, means) {
                CleaningStep::Done => continue,
                CleaningStep::Write(key) => key,
                CleaningStep::NeedsRoom(_) if self.growth != Growth::Ended && !is_at_limit => {
                    self.grow(medium);
                    break;
                }
                CleaningStep::NeedsRoom(key) => {
                    // Where all extents are being read or written, the block waits for its turn.
                    let Some(gone) = cleaning::make_room(&mut medium.extents, dram, owner, wanted) else {
                        if medium.extents.has_tenants() && chosen.is_empty() && medium.extents.writing() == 0 {
                            // All that is there is guaranteed to others: those behind it must not
                            // wait.
                            dram.pass_over(dirty.slot);
                            continue;
                        }
                        break;
                    };
                    evicted.push(gone);
                    key
                }
            };
            medium.spend();
            of_owners[usize::from(owner.0)] = wanted;
            dram.begin_write(dirty.slot);
            chosen.push((dirty.slot, key));
        }
        if chosen.is_empty() {
            return;
        }
        log.record(|| {
            let keys = names(chosen.iter().map(|(_, key)| *key));
            trace::line("spill", &[("keys", keys), ("evicted", names(evicted))])
        });
        // Chosen coldest first, but laid out as they lie in memory: neighbours there become
        // neighbours on disk, and go in one transfer.
        chosen.sort_by_key(|(slot, _)| slot.0);
        let parts = self.place(medium, dram, chosen);
        self.write(medium, dram, parts);
        if medium.extents.free() < medium.writes_max() {
            // The next segment is made before the last free extent is gone.
            self.grow(medium);
        }
    }

    /// Gives every chosen block its extent. As many are free.
    fn place(
        &mut self,
        medium: &mut Medium,
        dram: &mut Residency,
        chosen: Vec<(SlotIndex, BlockKey)>,
    ) -> Vec<WritePart> {
        medium.extents.line_up(chosen.len());
        let mut placed = Vec::with_capacity(chosen.len());
        for (slot, key) in chosen {
            let stamp = Stamp { sequence: self.next_sequence, written_s: now_s() };
            let parent = dram.parent_key(slot);
            let owner = dram.owner(slot);
            let Some(extent) = medium.extents.reserve(&key, owner, parent.as_ref(), stamp, &mut dram.events) else {
                violated!("more blocks were chosen to be written than extents are free");
                dram.end_write(slot, false);
                continue;
            };
            medium.extents.remains.expect(extent, dram.remains.tag(slot));
            self.next_sequence += 1;
            placed.push(WritePart { slot, extent, key });
        }
        placed
    }

    /// Hands blocks to the mover, neighbours in memory and on disk in one transfer.
    fn write(&mut self, medium: &mut Medium, dram: &Residency, parts: Vec<WritePart>) {
        let most = medium.transfer_blocks_max();
        for parts in transfer::runs(parts, medium.layout(), most, |part| (part.slot, part.extent)) {
            let orders = parts.iter().map(|part| {
                let stamp = medium.extents.stamp(part.extent);
                SealOrder {
                    slot: part.slot,
                    generation: dram.generation(part.slot),
                    key: part.key,
                    seal: Seal {
                        store: medium.store_id(),
                        sequence: stamp.sequence,
                        cache_generation: medium.cache_generation,
                        written_s: stamp.written_s,
                        stored_bytes: medium.pool().geometry().payload_bytes[part.key.group.0 as usize],
                        encoding: 0,
                    },
                }
            });
            let (orders, extent) = (orders.collect(), parts[0].extent);
            let token = medium.next_token();
            medium.order(Job::Write { token, orders, extent });
            self.writes.insert(token, Write { parts, stale: false });
        }
    }

    fn grow(&mut self, medium: &Medium) {
        if self.growth == Growth::Possible {
            self.growth = Growth::Ordered;
            medium.order(Job::Grow);
        }
    }

    /// The store was made larger, or cannot be when `last`.
    pub(super) fn on_grown(&mut self, last: bool) {
        self.growth = if last { Growth::Ended } else { Growth::Possible };
    }

    /// A write has ended, well or not.
    pub(super) fn on_write_ended(
        &mut self,
        medium: &mut Medium,
        dram: &mut Residency,
        log: &mut OperationLog,
        token: u64,
        trouble: Option<Trouble>,
    ) {
        let Some(Write { parts, stale }) = self.writes.remove(&token) else {
            violated!("write {token} ended but is not under way");
            return;
        };
        let whole = trouble.is_none() && !stale;
        if trouble.is_none() {
            medium.health.well();
        }
        for WritePart { slot, extent, key } in &parts {
            let forgotten = medium.extents.remains.is_due(*extent);
            let well = whole && !forgotten;
            // Before the slot may be given away.
            let lineage = if dram.events.enabled() && well { lineage_of(medium, *slot) } else { Lineage::default() };
            let held = dram.end_write(*slot, well);
            if well {
                dram.counters.spilled_blocks += 1;
                dram.counters.spilled_bytes += medium.extent_bytes();
                medium.extents.commit(*extent, lineage, &mut dram.events);
                // The same block may have been dropped and computed again meanwhile.
                if !held && let Some(again) = dram.find(key) {
                    dram.set_clean(again, true);
                }
            } else {
                if trouble.is_some() && trouble != Some(Trouble::Undescribed) {
                    dram.counters.dropped(DropReason::DiskFailed, 1);
                }
                medium.extents.fail(*extent, forgotten || trouble == Some(Trouble::Device), &mut dram.events);
            }
        }
        log.record(|| {
            let keys = names(parts.iter().map(|part| part.key));
            trace::line("spilled", &[("keys", keys), ("ok", Value::from(whole))])
        });
        if trouble == Some(Trouble::Device) {
            medium.on_device_error(dram, log, "writing failed repeatedly");
        }
    }
}

fn lineage_of(medium: &Medium, slot: SlotIndex) -> Lineage {
    let pool = medium.pool();
    let read = descriptor::read(&pool.descriptor(slot), pool.geometry().parts.len());
    // It was whole when it was sealed; a block without tokens is what consumers know otherwise.
    read.map(|(_, _, lineage)| lineage).unwrap_or_default()
}
