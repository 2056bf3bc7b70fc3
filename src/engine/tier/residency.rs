//! Which block is in the dram tier, in which state: the one place that changes it.
//!
//! States and what follows from what are `super::slot_state`'s. Every change goes through
//! `Residency::transition`, which also keeps the counts and the free list and appends the event;
//! nothing else may. A slot is in the policy exactly while it is filled and unpinned.
//!
//! Beside a disk a filled slot is *clean* while the disk holds the same block, else *dirty*; dirty
//! slots that may be evicted stand in a second order, so that the coldest of them is found at once.
//! A slot that is being written to disk stays where it is in the order, but is no victim. A slot
//! that is kept for a time is in no order of eviction, and may be written to disk like any other.

mod erasure;
mod inheritance;
mod writing;

use std::sync::Arc;
use std::time::Instant;

use super::census::Census;
use super::dirty::DirtyOrder;
use super::kept::KeptSlots;
use super::remains::Remains;
use super::reservation::{Provenance, Reserved, User};
use super::slot_state::{Origin, SlotChange, SlotState};
use super::table::{Record, Table};
use crate::event_log::EventLog;
use crate::metrics::{Counters, DropReason};
use crate::policy::{Block, BlockOwner, Departure, Heat, Tenants, Touch};
use crate::pool::memory::SlotMemory;
use crate::{invariant, limits, violated};
use kvcellar_block::descriptor::Lineage;
use kvcellar_block::{BlockHash, BlockKey, Generation, GroupIndex, SlotIndex, Tier};

/// What the tier keeps of a slot, beside the key of its block.
#[derive(Debug, Clone, Copy, Default)]
struct SlotFacts {
    generation: u32,
    /// Serial of the request that used the slot last.
    toucher: u32,
    /// The tier's clock when it was used last.
    used: u32,
    state: SlotState,
    /// The slot's bytes are being written to disk: the kernel reads them.
    writing: bool,
    /// More than one request used the block.
    reused: bool,
}

impl Record<SlotFacts> {
    /// Lookups find the block.
    fn is_visible(&self) -> bool {
        self.facts.state.is_filled()
    }

    fn is_clean(&self) -> bool {
        matches!(self.facts.state, SlotState::Filled { clean: true, .. })
    }

    /// The slot must not be given away.
    fn is_held(&self) -> bool {
        self.pins > 0 || self.facts.writing
    }
}

/// The dram tier's contents.
pub struct Residency {
    memory: Arc<dyn SlotMemory>,
    table: Table<SlotIndex, SlotFacts>,
    policy: Tenants<SlotIndex>,
    dirty: DirtyOrder,
    kept: KeptSlots,
    free: Vec<SlotIndex>,
    census: Census,
    /// Whose bytes lie in the slots.
    pub(super) remains: Remains<SlotIndex>,
    /// Slots that were taken out of the tier: no block gets them.
    aside: Vec<SlotIndex>,
    /// Grows whenever another block is visible than before, and with every hold on one.
    changes: u64,
    /// Events of every transition.
    pub events: EventLog,
    /// Counters of every transition.
    pub counters: Counters,
}

impl Residency {
    /// An empty tier over `memory`. The slots' lines must be empty, or be adopted next.
    pub fn new(memory: Arc<dyn SlotMemory>, policy: Tenants<SlotIndex>, events: EventLog) -> Self {
        let slots = memory.slot_count();
        Self {
            table: Table::new(slots),
            kept: KeptSlots::new(slots, policy.guaranteed()),
            policy,
            dirty: DirtyOrder::new(slots),
            // Taken from the end: low slots first.
            free: (0..slots).rev().map(SlotIndex).collect(),
            census: Census { free: u64::from(slots), ..Census::default() },
            remains: Remains::new(slots),
            aside: Vec::new(),
            changes: 0,
            events,
            counters: Counters::default(),
            memory,
        }
    }

    /// The slots' shared memory.
    pub fn memory(&self) -> &Arc<dyn SlotMemory> {
        &self.memory
    }

    /// Slots by state, and pins.
    pub fn census(&self) -> Census {
        self.census
    }

    /// As long as it is the same, lookups find the same blocks, and no more holds on them.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Changes a slot's state, and what depends on it. Returns whether that can be.
    fn transition(&mut self, slot: SlotIndex, change: SlotChange) -> bool {
        self.transition_as(slot, change, Departure::Dropped)
    }

    /// As [`Self::transition`]; `departure`: how a block leaves that is gone with it.
    fn transition_as(&mut self, slot: SlotIndex, change: SlotChange, departure: Departure) -> bool {
        let before = self.table.record(slot).facts.state;
        let after = match before.apply(change) {
            Ok(after) => after,
            Err(refused) => {
                violated!("{slot:?}: {refused}");
                return false;
            }
        };
        if matches!(after, SlotState::Empty | SlotState::Doomed) && before != SlotState::Doomed {
            self.forget_block(slot, before, departure);
        }
        self.table.record_mut(slot).facts.state = after;
        self.census.recount(before, after);
        self.changes += u64::from(before.is_filled() != after.is_filled());
        if after == SlotState::Empty {
            // Empty in shared memory first: a crash from here on must not find the old block in a
            // slot that is handed out again.
            self.memory.line(slot).clear();
            // One that has to be erased is free after that.
            if !self.remains.release(slot) {
                self.free.push(slot);
            }
        }
        true
    }

    /// The slot's block is gone from the tier.
    fn forget_block(&mut self, slot: SlotIndex, before: SlotState, departure: Departure) {
        if before.is_filled() {
            if let Some(key) = self.key(slot) {
                self.events.removed(Tier::Dram, key);
            }
            self.leave(slot);
        }
        self.kept.forget(slot);
        self.policy.release(slot, departure);
        self.table.remove(slot);
    }

    /// Makes the block of a slot visible, by this change.
    fn show_block(&mut self, slot: SlotIndex, change: SlotChange, lineage: Lineage) -> bool {
        self.remains.arrive(slot);
        if !self.transition(slot, change) {
            return false;
        }
        let Some(key) = self.key(slot) else {
            violated!("{slot:?} is filled but has no key");
            return false;
        };
        self.events.stored(Tier::Dram, key, lineage);
        true
    }

    /// The slot of a visible block.
    pub fn find(&self, key: &BlockKey) -> Option<SlotIndex> {
        self.table.find(key).filter(|slot| self.table.record(*slot).is_visible())
    }

    /// The slot that holds a block or is being filled with it.
    pub fn find_any(&self, key: &BlockKey) -> Option<(SlotIndex, bool)> {
        self.table.find(key).map(|slot| (slot, self.table.record(slot).is_visible()))
    }

    /// Number of consecutive visible blocks: every `step`-th hash, starting with the first.
    pub fn visible_run(&self, hashes: &[BlockHash], step: usize, group: GroupIndex) -> usize {
        let mut run = 0;
        self.table.find_run(hashes, step, group, |found| {
            let visible = found.is_some_and(|slot| self.table.record(slot).is_visible());
            run += usize::from(visible);
            visible
        });
        run
    }

    /// Looks every `step`-th hash up, starting with the first: the slot that has the key, and
    /// whether it is visible.
    pub fn find_all(
        &self,
        hashes: &[BlockHash],
        step: usize,
        group: GroupIndex,
        found: &mut Vec<Option<(SlotIndex, bool)>>,
    ) {
        self.table.find_run(hashes, step, group, |slot| {
            found.push(slot.map(|slot| (slot, self.table.record(slot).is_visible())));
            true
        });
    }

    /// Takes a slot for a new block, evicting the policy's choice when none is free.
    ///
    /// # Errors
    /// The reason why there is none: [`DropReason::NoSlot`], or [`DropReason::OwnPrefix`] when the
    /// victim was last used by the very request that asks (`by`).
    pub fn reserve(
        &mut self,
        key: &BlockKey,
        by: User,
        provenance: Provenance,
    ) -> std::result::Result<Reserved, DropReason> {
        self.reserve_for(key, by, provenance, Origin::Offload)
    }

    fn reserve_for(
        &mut self,
        key: &BlockKey,
        by: User,
        Provenance { parent, prompt_tokens }: Provenance,
        origin: Origin,
    ) -> std::result::Result<Reserved, DropReason> {
        let evicted = if self.room(by.owner) == 0 { Some(self.evict(by, 1)?) } else { None };
        let slot = self.free.pop().ok_or(DropReason::NoSlot)?;
        if !self.transition(slot, SlotChange::Reserve { origin }) {
            return Err(DropReason::NoSlot);
        }
        let generation = self.memory.line(slot).begin_fill(self.memory.cache_generation());
        self.table.insert(slot, key);
        let block = Block { parent, prompt_tokens, ..Block::unknown(key.fingerprint()) };
        self.policy.assign(slot, by.owner, &block);
        let facts = &mut self.table.record_mut(slot).facts;
        (facts.generation, facts.toucher, facts.reused) = (generation.0, by.serial, false);
        self.memory.prefetch(slot);
        Ok(Reserved { slot, generation, evicted })
    }

    /// Slots that this owner can have without any eviction.
    fn room(&self, owner: BlockOwner) -> usize {
        self.free.len().min(self.policy.room(owner) as usize)
    }

    /// Whose block a slot holds.
    pub fn owner(&self, slot: SlotIndex) -> BlockOwner {
        self.policy.owner(slot)
    }

    /// Slots that hold blocks of an owner.
    pub fn blocks_of(&self, owner: BlockOwner) -> u32 {
        self.policy.blocks(owner)
    }

    /// Empties the slot that the policy chooses, so that a user gets room for so many blocks.
    /// Returns the key of the block that is gone.
    fn evict(&mut self, by: User, wanted: u32) -> std::result::Result<BlockKey, DropReason> {
        let table = &self.table;
        let may = |slot: SlotIndex| !table.record(slot).facts.writing;
        let victim = self.policy.victim(by.owner, wanted, &may).ok_or(DropReason::NoSlot)?;
        let record = self.table.record(victim);
        // A clean block of the same prefix stays on disk: it may make room for what follows it.
        if record.facts.toucher == by.serial && !record.is_clean() {
            return Err(DropReason::OwnPrefix);
        }
        let (evicted, clean, owner) = (record.key(), record.is_clean(), self.policy.owner(victim));
        let remove = SlotChange::Remove { held: false };
        let Some(evicted) = evicted.filter(|_| self.transition_as(victim, remove, Departure::Evicted)) else {
            violated!("{victim:?} was to be evicted but holds no block");
            // Not to be chosen again.
            self.leave(victim);
            return Err(DropReason::NoSlot);
        };
        if self.dirty.is_tracking() && !clean {
            self.counters.dropped(DropReason::Unspilled, 1);
        }
        self.counters.evicted_blocks += 1;
        self.counters.of_mut(owner.0).evicted_blocks += 1;
        if !self.policy.has_tenants() {
            // The next victim is about known now: fetch its record while this one is being filled.
            self.policy.coldest(&mut |next| {
                self.table.prefetch(next);
                self.policy.prefetch(next);
                false
            });
        }
        Ok(evicted)
    }

    /// Empties slots, the next victims first, until `count` are free for this user or none may go.
    /// Returns what is gone. The next `count` slots that are reserved are handed out in ascending
    /// order: what is read together lies together.
    pub fn make_room(&mut self, count: usize, by: User) -> Vec<BlockKey> {
        let mut evicted = Vec::new();
        let most = u32::try_from(count).unwrap_or(u32::MAX).min(self.policy.limit(by.owner));
        while self.room(by.owner) < most as usize
            && let Ok(gone) = self.evict(by, most)
        {
            evicted.push(gone);
        }
        // Where it has nothing more of its own to give up, it gets as many as its limit allows.
        while self.free.len() < (most as usize).min(self.policy.room(by.owner) as usize)
            && let Ok(gone) = self.evict(by, 1)
        {
            evicted.push(gone);
        }
        let from = self.free.len().saturating_sub(count);
        self.free[from..].sort_unstable_by(|a, b| b.cmp(a));
        evicted
    }

    /// The bytes of these blocks are all there: lookups find them from now on. They enter the order
    /// of eviction, the first of them as the last to go.
    pub fn publish_all(&mut self, slots: &[SlotIndex], lineages: impl IntoIterator<Item = Lineage>) {
        for (slot, lineage) in slots.iter().zip(lineages) {
            if self.show_block(*slot, SlotChange::Fill, lineage) {
                self.memory.line(*slot).publish();
                self.counters.stored_blocks += 1;
            }
        }
        for slot in slots.iter().rev() {
            if self.table.record(*slot).is_visible() {
                self.enter(*slot, Heat::Hot);
            }
        }
    }

    /// A block's bytes did not all arrive.
    pub fn lose(&mut self, slot: SlotIndex) {
        if self.remains.miss(slot) {
            // Its descriptor says whose the block would have been, and the bytes are another's.
            self.remains.condemn_later(slot);
        }
        self.transition(slot, SlotChange::Lose { held: self.table.record(slot).is_held() });
    }

    /// Drops a visible block. Pinned, it stays where it is until its last pin goes, but no lookup
    /// finds it.
    pub fn drop_block(&mut self, slot: SlotIndex, reason: DropReason) {
        if self.transition(slot, SlotChange::Remove { held: self.table.record(slot).is_held() }) {
            self.counters.dropped(reason, 1);
        }
    }

    /// Holds a visible block.
    pub fn pin(&mut self, slot: SlotIndex, by: User) {
        let can_be_held = self.table.record(slot).is_visible() || self.is_restoring(slot);
        if !invariant!(can_be_held, "{slot:?} is to be held but holds no block") {
            return;
        }
        let touch = self.used_by(slot, by);
        self.policy.touch(slot, touch);
        let record = self.table.record_mut(slot);
        record.pins += 1;
        let first = record.pins == 1;
        self.census.pins += 1;
        self.changes += 1;
        if first {
            self.leave(slot);
        }
    }

    /// Lets go of a held block.
    pub fn unpin(&mut self, slot: SlotIndex) {
        let record = self.table.record_mut(slot);
        if !invariant!(record.pins > 0, "{slot:?} is let go but nobody holds it") {
            return;
        }
        record.pins -= 1;
        let record = *record;
        self.census.pins -= 1;
        if record.is_visible() && record.pins == 0 {
            self.enter(slot, Heat::Hot);
        }
        self.free_if_doomed(slot);
    }

    /// Holds on a block.
    pub fn pins(&self, slot: SlotIndex) -> u32 {
        self.table.record(slot).pins
    }

    /// Blocks were used: they become the last to be evicted, the first of them last of all. Pinned
    /// ones stay as they are.
    pub fn touch(&mut self, slots: &[SlotIndex], by: User) {
        for slot in slots.iter().rev() {
            if self.table.record(*slot).pins == 0 {
                let touch = self.used_by(*slot, by);
                self.table.record_mut(*slot).facts.used = self.dirty.stamp(Heat::Hot);
                self.policy.touch(*slot, touch);
                self.dirty.touch(*slot);
            }
        }
    }

    /// Keeps visible blocks until a time, as many as may be kept; a block that is kept longer
    /// already stays so. Returns how many are kept now.
    pub fn keep(&mut self, slots: &[SlotIndex], until: Instant) -> usize {
        let mut count = 0;
        for slot in slots {
            let is_kept = self.table.record(*slot).is_visible() && self.kept.keep(*slot, self.owner(*slot), until);
            if is_kept {
                self.policy.remove(*slot);
                count += 1;
            }
        }
        count
    }

    /// Blocks whose time is over may be evicted like any other; a bounded number at once.
    pub fn let_go_of_kept(&mut self, now: Instant) {
        for _ in 0..limits::PINS_ENDED_MAX {
            let Some(slot) = self.kept.next_over(now) else { return };
            let record = self.table.record(slot);
            if record.is_visible() && record.pins == 0 {
                self.policy.insert(slot, Heat::Hot);
            }
        }
    }

    /// Blocks that are kept.
    pub fn kept(&self) -> u64 {
        self.kept.len() as u64
    }

    /// No future hit is likely to need this block: it goes first.
    pub fn cool(&mut self, slot: SlotIndex) {
        let record = self.table.record(slot);
        if record.is_visible() && record.pins == 0 {
            self.leave(slot);
            self.enter(slot, Heat::Cold);
        }
    }

    /// A request uses a slot: whether for the first time.
    fn used_by(&mut self, slot: SlotIndex, by: User) -> Touch {
        let facts = &mut self.table.record_mut(slot).facts;
        if facts.toucher == by.serial {
            return Touch::Again;
        }
        facts.toucher = by.serial;
        facts.reused = true;
        if let Some(key) = self.key(slot) {
            self.policy.claim(slot, by.owner, &Block::unknown(key.fingerprint()));
        }
        Touch::Fresh
    }

    /// A doomed slot is empty once nobody holds it.
    fn free_if_doomed(&mut self, slot: SlotIndex) {
        let record = self.table.record(slot);
        if record.facts.state == SlotState::Doomed && !record.is_held() {
            self.transition(slot, SlotChange::Free);
        }
    }

    fn enter(&mut self, slot: SlotIndex, heat: Heat) {
        let record = self.table.record_mut(slot);
        record.facts.used = self.dirty.stamp(heat);
        let spillable = !record.is_clean() && !record.facts.writing;
        if !self.kept.has(slot) {
            self.policy.insert(slot, heat);
        }
        if spillable {
            self.dirty.insert(slot, heat);
        }
    }

    fn leave(&mut self, slot: SlotIndex) {
        self.policy.remove(slot);
        self.dirty.remove(slot);
    }

    /// As [`Self::reserve`], for a block that comes from disk: requests may hold the slot at once.
    ///
    /// # Errors
    /// As [`Self::reserve`].
    pub fn reserve_restore(
        &mut self,
        key: &BlockKey,
        by: User,
        provenance: Provenance,
    ) -> std::result::Result<Reserved, DropReason> {
        self.reserve_for(key, by, provenance, Origin::Disk)
    }

    /// Whether the slot is being filled from disk.
    pub fn is_restoring(&self, slot: SlotIndex) -> bool {
        self.table.record(slot).facts.state == SlotState::Filling { origin: Origin::Disk }
    }

    /// A restore has ended. The slot's followers are to be woken by the caller.
    pub fn end_restore(&mut self, slot: SlotIndex, restored: Option<Lineage>) {
        let generation = self.generation(slot);
        let memory = Arc::clone(&self.memory);
        let ok = restored.is_some();
        match restored {
            Some(lineage) => {
                if self.show_block(slot, SlotChange::Fill, lineage) {
                    self.counters.restored_blocks += 1;
                    let record = self.table.record_mut(slot);
                    record.facts.reused = false;
                    if record.pins == 0 {
                        self.enter(slot, Heat::Hot);
                    }
                }
            }
            None => self.lose(slot),
        }
        memory.line(slot).end_restore(generation, ok);
    }

    /// A restore that was given up before (its followers know) has ended at last: the slot's bytes
    /// are the device's no longer.
    pub fn end_abandoned(&mut self, slot: SlotIndex) {
        self.lose(slot);
    }

    /// Whether loads of this slot must compare its checksum first.
    pub fn unverified(&self, slot: SlotIndex) -> bool {
        matches!(self.table.record(slot).facts.state, SlotState::Filled { verified: false, .. })
    }

    /// The slot's bytes were compared and are good.
    pub fn verified(&mut self, slot: SlotIndex) {
        if self.unverified(slot) {
            self.transition(slot, SlotChange::Verify);
        }
    }

    /// The slot's generation.
    pub fn generation(&self, slot: SlotIndex) -> Generation {
        Generation(self.table.record(slot).facts.generation)
    }

    /// The key of what a slot holds.
    pub fn key(&self, slot: SlotIndex) -> Option<BlockKey> {
        self.table.record(slot).key()
    }

    /// Blocks that may be evicted, the next one first, each with the serial of the request that
    /// used it last. For inspection.
    pub fn eviction_order(&self) -> Vec<(BlockKey, u32)> {
        let described = |slot: SlotIndex| self.key(slot).map(|key| (key, self.table.record(slot).facts.toucher));
        self.policy.order().into_iter().filter_map(described).collect()
    }

    /// All visible blocks.
    pub fn visible_slots(&self) -> Vec<SlotIndex> {
        let slots = (0..self.table.places()).map(SlotIndex);
        slots.filter(|slot| self.table.record(*slot).is_visible()).collect()
    }
}
