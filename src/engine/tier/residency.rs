//! Which block is in the dram tier, in which state: the one place that changes it.
//!
//! Legal private states of a slot: `Empty -> Filling -> Filled -> Empty`, `Filling -> Empty`
//! (lost), and `Filled -> Doomed -> Empty` or `Filling -> Doomed -> Empty` (dropped or lost while
//! held: no lookup finds it any more, and it is freed with its last hold). Every change goes
//! through `Residency::transition`, which also appends the event; nothing else may. A slot is in
//! the policy exactly while it is `Filled` and unpinned.
//!
//! Beside a disk a filled slot is *clean* while the disk holds the same block, else *dirty*; dirty
//! slots that may be evicted stand in a second order, so that the coldest of them is found at once.
//! A slot that is being written to disk stays where it is in the order, but is no victim.

use std::sync::Arc;

use super::table::{BlockTable, Record};
use crate::event_log::EventLog;
use crate::metrics::{Counters, DropReason};
use crate::policy::{Eviction, Heat, Lru};
use crate::pool::memory::SlotMemory;
use crate::{invariant, violated};
use kvcellar_block::descriptor::Lineage;
use kvcellar_block::{BlockHash, BlockKey, Generation, GroupIndex, SlotIndex, Tier};

const EMPTY: u8 = 0;
const FILLING: u8 = 1;
const FILLED: u8 = 2;
const DOOMED: u8 = 3;

/// The slot was adopted and its bytes were not compared with their checksum yet.
const UNVERIFIED: u8 = 1;
/// The disk holds the same block.
const CLEAN: u8 = 2;
/// The slot's bytes are being written to disk: the kernel reads them.
const WRITING: u8 = 4;
/// The slot is being filled from disk; requests may hold it already.
const RESTORING: u8 = 8;
/// More than one request used the block.
const REUSED: u8 = 16;

/// A change of a slot's state.
#[derive(Debug)]
enum Transition {
    /// Empty -> Filling, under a key.
    Reserve(BlockKey),
    /// Filling -> Filled.
    Publish(Lineage),
    /// Filling -> Empty.
    Lose,
    /// Filled -> Empty, or -> Doomed when pinned.
    Remove,
    /// Doomed -> Empty.
    Free,
    /// Filling -> Filled, from disk.
    Restored(Lineage),
}

/// A slot that was taken for a new block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserved {
    /// The slot.
    pub slot: SlotIndex,
    /// Its generation, which copy orders must name.
    pub generation: Generation,
    /// The block that was evicted for it.
    pub evicted: Option<BlockKey>,
}

/// A dirty block that may be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dirty {
    /// Its slot.
    pub slot: SlotIndex,
    /// More than one request used it.
    pub reused: bool,
    /// Uses of blocks since its own last one: at most so many blocks are hotter.
    pub uses_since: u32,
}

/// Number of slots in each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    /// Holding nothing.
    pub free: u64,
    /// Being filled.
    pub filling: u64,
    /// Holding a block, doomed ones included.
    pub filled: u64,
    /// Holds on blocks.
    pub pins: u64,
    /// Blocks that the disk holds too.
    pub clean: u64,
    /// Blocks being written to disk.
    pub writing: u64,
}

/// The dram tier's contents.
pub struct Residency {
    memory: Arc<dyn SlotMemory>,
    table: BlockTable,
    policy: Box<dyn Eviction>,
    /// Dirty slots that may be evicted; `None` without a disk.
    dirty: Option<Lru>,
    /// Counts uses: how many there were since a block's last one bounds how far it is from the hot
    /// end of the order.
    clock: u32,
    free: Vec<u32>,
    census: Census,
    /// Events of every transition.
    pub events: EventLog,
    /// Counters of every transition.
    pub counters: Counters,
}

impl Residency {
    /// An empty tier over `memory`. The slots' lines must be empty, or be adopted next.
    pub fn new(memory: Arc<dyn SlotMemory>, policy: Box<dyn Eviction>, events: EventLog) -> Self {
        let slots = memory.slot_count();
        Self {
            table: BlockTable::new(slots),
            policy,
            dirty: None,
            clock: 0,
            // Taken from the end: low slots first.
            free: (0..slots).rev().collect(),
            census: Census { free: u64::from(slots), ..Census::default() },
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

    fn transition(&mut self, slot: SlotIndex, change: Transition) {
        let state = self.table.record(slot).state;
        match (state, change) {
            (EMPTY, Transition::Reserve(key)) => {
                let generation = self.memory.line(slot).begin_fill(self.memory.cache_generation());
                self.table.insert(slot, &key);
                let record = self.table.record_mut(slot);
                (record.state, record.generation, record.flags) = (FILLING, generation.0, 0);
                self.census.free -= 1;
                self.census.filling += 1;
            }
            (FILLING, Transition::Publish(lineage)) => {
                self.memory.line(slot).publish();
                self.table.record_mut(slot).state = FILLED;
                self.census.filling -= 1;
                self.census.filled += 1;
                self.counters.stored_blocks += 1;
                if let Some(key) = self.table.record(slot).key() {
                    self.events.stored(Tier::Dram, key, lineage);
                }
            }
            (FILLING, Transition::Restored(lineage)) => {
                let record = self.table.record_mut(slot);
                (record.state, record.flags) = (FILLED, CLEAN);
                self.census.filling -= 1;
                self.census.filled += 1;
                self.census.clean += 1;
                self.counters.restored_blocks += 1;
                if let Some(key) = self.table.record(slot).key() {
                    self.events.stored(Tier::Dram, key, lineage);
                }
            }
            (FILLING, Transition::Lose) => {
                self.table.remove(slot);
                self.census.filling -= 1;
                if self.table.record(slot).pins > 0 {
                    self.table.record_mut(slot).state = DOOMED;
                    self.census.filled += 1;
                } else {
                    self.empty(slot);
                }
            }
            (FILLED, Transition::Remove) => {
                if let Some(key) = self.table.record(slot).key() {
                    self.events.removed(Tier::Dram, key);
                }
                self.table.remove(slot);
                self.leave(slot);
                self.set_clean(slot, false);
                if self.is_held(slot) {
                    self.table.record_mut(slot).state = DOOMED;
                } else {
                    self.empty(slot);
                    self.census.filled -= 1;
                }
            }
            (DOOMED, Transition::Free) => {
                self.empty(slot);
                self.census.filled -= 1;
            }
            (state, change) => violated!("{slot:?} in state {state} cannot take {change:?}"),
        }
    }

    fn empty(&mut self, slot: SlotIndex) {
        // Empty in shared memory first: a crash from here on must not find the old block in a slot
        // that is handed out again.
        self.memory.line(slot).clear();
        self.table.record_mut(slot).state = EMPTY;
        self.free.push(slot.0);
        self.census.free += 1;
    }

    /// Whether this record is a block that lookups may find.
    fn visible(record: &Record) -> bool {
        record.state == FILLED
    }

    /// The slot of a visible block.
    pub fn find(&self, key: &BlockKey) -> Option<SlotIndex> {
        self.table.find(key).filter(|slot| Self::visible(self.table.record(*slot)))
    }

    /// The slot that holds a block or is being filled with it.
    pub fn find_any(&self, key: &BlockKey) -> Option<(SlotIndex, bool)> {
        self.table.find(key).map(|slot| (slot, Self::visible(self.table.record(slot))))
    }

    /// Number of consecutive visible blocks: every `step`-th hash, starting with the first.
    pub fn visible_run(&self, hashes: &[BlockHash], step: usize, group: GroupIndex) -> usize {
        let mut run = 0;
        self.table.find_run(hashes, step, group, |found| {
            let visible = found.is_some_and(|slot| Self::visible(self.table.record(slot)));
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
            found.push(slot.map(|slot| (slot, Self::visible(self.table.record(slot)))));
            true
        });
    }

    /// Takes a slot for a new block, evicting the policy's choice when none is free.
    ///
    /// # Errors
    /// The reason why there is none: [`DropReason::NoSlot`], or [`DropReason::OwnPrefix`] when the
    /// victim was last used by the very request (`toucher`) that asks.
    pub fn reserve(&mut self, key: &BlockKey, toucher: u32) -> std::result::Result<Reserved, DropReason> {
        let evicted = if self.free.is_empty() { Some(self.evict(toucher)?) } else { None };
        let slot = SlotIndex(self.free.pop().ok_or(DropReason::NoSlot)?);
        self.transition(slot, Transition::Reserve(*key));
        let record = self.table.record_mut(slot);
        record.toucher = toucher;
        let generation = Generation(record.generation);
        self.memory.prefetch(slot);
        Ok(Reserved { slot, generation, evicted })
    }

    /// Empties the slot that the policy chooses. Returns the key of the block that is gone.
    fn evict(&mut self, toucher: u32) -> std::result::Result<BlockKey, DropReason> {
        let table = &self.table;
        let may = |slot: SlotIndex| table.record(slot).flags & WRITING == 0;
        let victim = self.policy.victim(&may).ok_or(DropReason::NoSlot)?;
        let record = self.table.record(victim);
        // A clean block of the same prefix stays on disk: it may make room for what follows it.
        if record.toucher == toucher && record.flags & CLEAN == 0 {
            return Err(DropReason::OwnPrefix);
        }
        let evicted = record.key().ok_or(DropReason::NoSlot)?;
        if self.dirty.is_some() && record.flags & CLEAN == 0 {
            self.counters.dropped(DropReason::Unspilled, 1);
        }
        self.transition(victim, Transition::Remove);
        self.counters.evicted_blocks += 1;
        if let Some(next) = self.policy.victim(&|_| true) {
            // The next victim is known now: fetch its record while this one is being filled.
            self.table.prefetch(next);
            self.policy.prefetch(next);
        }
        Ok(evicted)
    }

    /// Empties slots, the next victims first, until `count` are free or none may go. Returns what
    /// is gone. The next `count` slots that are reserved are handed out in ascending order: what is
    /// read together lies together.
    pub fn make_room(&mut self, count: usize, toucher: u32) -> Vec<BlockKey> {
        let mut evicted = Vec::new();
        while self.free.len() < count
            && let Ok(gone) = self.evict(toucher)
        {
            evicted.push(gone);
        }
        let from = self.free.len().saturating_sub(count);
        self.free[from..].sort_unstable_by(|a, b| b.cmp(a));
        evicted
    }

    /// A block's bytes are all there: lookups find it from now on. It may be evicted after
    /// [`Self::settle`].
    pub fn publish(&mut self, slot: SlotIndex, lineage: Lineage) {
        self.transition(slot, Transition::Publish(lineage));
    }

    /// Published blocks enter the order of eviction, the first of them as the last to go.
    pub fn settle(&mut self, slots: &[SlotIndex]) {
        for slot in slots.iter().rev() {
            // A lookup cannot have pinned it in between: both happen under the engine's lock.
            self.enter(*slot, Heat::Hot);
        }
    }

    /// A block's bytes did not all arrive.
    pub fn lose(&mut self, slot: SlotIndex) {
        self.transition(slot, Transition::Lose);
    }

    /// Drops a visible block. Pinned, it stays where it is until its last pin goes, but no lookup
    /// finds it.
    pub fn drop_block(&mut self, slot: SlotIndex, reason: DropReason) {
        if !Self::visible(self.table.record(slot)) {
            return;
        }
        self.transition(slot, Transition::Remove);
        self.counters.dropped(reason, 1);
    }

    /// Holds a visible block.
    pub fn pin(&mut self, slot: SlotIndex, toucher: u32) {
        self.used_by(slot, toucher);
        let record = self.table.record_mut(slot);
        invariant!(record.state == FILLED || record.flags & RESTORING != 0, "{slot:?} is held but holds no block");
        record.pins += 1;
        let first = record.pins == 1;
        self.census.pins += 1;
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
        let (last, state) = (record.pins == 0, record.state);
        self.census.pins -= 1;
        match state {
            FILLED if last => self.enter(slot, Heat::Hot),
            DOOMED if !self.is_held(slot) => self.transition(slot, Transition::Free),
            _ => {}
        }
    }

    /// Holds on a block.
    pub fn pins(&self, slot: SlotIndex) -> u32 {
        self.table.record(slot).pins
    }

    /// Blocks were used: they become the last to be evicted, the first of them last of all. Pinned
    /// ones stay as they are.
    pub fn touch(&mut self, slots: &[SlotIndex], toucher: u32) {
        for slot in slots.iter().rev() {
            if self.table.record(*slot).pins == 0 {
                self.used_by(*slot, toucher);
                self.clock = self.clock.wrapping_add(1);
                self.table.record_mut(*slot).used = self.clock;
                self.policy.touch(*slot);
                if let Some(dirty) = self.dirty.as_mut().filter(|dirty| dirty.holds(*slot)) {
                    dirty.touch(*slot);
                }
            }
        }
    }

    /// No future hit is likely to need this block: it goes first.
    pub fn cool(&mut self, slot: SlotIndex) {
        let record = self.table.record(slot);
        if record.state == FILLED && record.pins == 0 {
            self.leave(slot);
            self.enter(slot, Heat::Cold);
        }
    }

    /// Takes a slot over as an earlier engine left it.
    pub fn adopt(&mut self, slot: SlotIndex, key: &BlockKey, generation: Generation, lineage: Lineage) {
        // The line is filled already: it goes through the same states without a new generation.
        self.table.insert(slot, key);
        let record = self.table.record_mut(slot);
        (record.state, record.generation, record.flags) = (FILLING, generation.0, UNVERIFIED);
        self.census.free -= 1;
        self.census.filling += 1;
        self.transition(slot, Transition::Publish(lineage));
        self.counters.stored_blocks -= 1;
        self.counters.adopted_blocks += 1;
        self.enter(slot, Heat::Hot);
    }

    /// After adoption: the slots that hold nothing, and nothing else, are free.
    pub fn recount_free(&mut self) {
        let empty = |slot: &u32| self.table.record(SlotIndex(*slot)).state == EMPTY;
        self.free = (0..self.table.slots()).rev().filter(empty).collect();
        self.census.free = self.free.len() as u64;
    }

    fn used_by(&mut self, slot: SlotIndex, toucher: u32) {
        let record = self.table.record_mut(slot);
        if record.toucher != toucher {
            record.toucher = toucher;
            record.flags |= REUSED;
        }
    }

    fn is_held(&self, slot: SlotIndex) -> bool {
        let record = self.table.record(slot);
        record.pins > 0 || record.flags & WRITING != 0
    }

    fn enter(&mut self, slot: SlotIndex, heat: Heat) {
        self.clock = self.clock.wrapping_add(1);
        let age = if heat == Heat::Hot { 0 } else { self.table.slots() };
        self.table.record_mut(slot).used = self.clock.wrapping_sub(age);
        self.policy.insert(slot, heat);
        let spillable = self.table.record(slot).flags & (CLEAN | WRITING) == 0;
        if let Some(dirty) = self.dirty.as_mut().filter(|_| spillable) {
            dirty.insert(slot, heat);
        }
    }

    fn leave(&mut self, slot: SlotIndex) {
        self.policy.remove(slot);
        if let Some(dirty) = &mut self.dirty {
            dirty.remove(slot);
        }
    }

    /// From now on there is a disk: dirty slots are told from clean ones.
    pub fn track_dirty(&mut self) {
        let mut dirty = Lru::new(self.table.slots());
        for slot in self.policy.order() {
            dirty.insert(slot, Heat::Hot);
        }
        self.dirty = Some(dirty);
    }

    /// The disk holds the block of this slot too, or does so no longer.
    pub fn set_clean(&mut self, slot: SlotIndex, clean: bool) {
        let in_order = self.policy.holds(slot);
        let record = self.table.record_mut(slot);
        if (record.flags & CLEAN != 0) == clean {
            return;
        }
        record.flags ^= CLEAN;
        let writing = record.flags & WRITING != 0;
        self.census.clean = if clean { self.census.clean + 1 } else { self.census.clean - 1 };
        let Some(dirty) = &mut self.dirty else { return };
        if clean {
            dirty.remove(slot);
        } else if in_order && !writing {
            dirty.insert(slot, Heat::Cold);
        }
    }

    /// The coldest dirty block that may be evicted.
    pub fn coldest_dirty(&self) -> Option<Dirty> {
        let slot = self.dirty.as_ref()?.victim(&|_| true)?;
        let record = self.table.record(slot);
        Some(Dirty { slot, reused: record.flags & REUSED != 0, uses_since: self.clock.wrapping_sub(record.used) })
    }

    /// A dirty block will not be written: it is no longer offered for that. It is as dirty as
    /// before, and dropped when evicted.
    pub fn pass_over(&mut self, slot: SlotIndex) {
        if let Some(dirty) = &mut self.dirty {
            dirty.remove(slot);
        }
    }

    /// A visible block is being written to disk: until [`Self::end_write`] its slot is not given
    /// away.
    pub fn begin_write(&mut self, slot: SlotIndex) {
        self.table.record_mut(slot).flags |= WRITING;
        self.pass_over(slot);
        self.census.writing += 1;
    }

    /// The write has ended. Returns whether the slot still holds that block, visibly.
    pub fn end_write(&mut self, slot: SlotIndex, written: bool) -> bool {
        self.table.record_mut(slot).flags &= !WRITING;
        self.census.writing -= 1;
        match self.table.record(slot).state {
            FILLED => {
                // A block that could not be written is not tried again before it is used again: it
                // is dropped when evicted.
                self.set_clean(slot, written);
                true
            }
            DOOMED if !self.is_held(slot) => {
                self.transition(slot, Transition::Free);
                false
            }
            _ => false,
        }
    }

    /// As [`Self::reserve`], for a block that comes from disk: requests may hold the slot at once.
    ///
    /// # Errors
    /// As [`Self::reserve`].
    pub fn reserve_restore(&mut self, key: &BlockKey, toucher: u32) -> std::result::Result<Reserved, DropReason> {
        let reserved = self.reserve(key, toucher)?;
        self.table.record_mut(reserved.slot).flags |= RESTORING;
        Ok(reserved)
    }

    /// Whether the slot is being filled from disk.
    pub fn is_restoring(&self, slot: SlotIndex) -> bool {
        let record = self.table.record(slot);
        record.state == FILLING && record.flags & RESTORING != 0
    }

    /// A restore has ended. The slot's followers are to be woken by the caller.
    pub fn end_restore(&mut self, slot: SlotIndex, restored: Option<Lineage>) {
        let generation = self.generation(slot);
        let memory = Arc::clone(&self.memory);
        let ok = restored.is_some();
        match restored {
            Some(lineage) => {
                self.transition(slot, Transition::Restored(lineage));
                if self.table.record(slot).pins == 0 {
                    self.enter(slot, Heat::Hot);
                }
            }
            None => self.transition(slot, Transition::Lose),
        }
        memory.line(slot).end_restore(generation, ok);
    }

    /// A restore that was given up before (its followers know) has ended at last: the slot's bytes
    /// are the device's no longer.
    pub fn end_abandoned(&mut self, slot: SlotIndex) {
        self.transition(slot, Transition::Lose);
    }

    /// Takes up to `count` free slots out of the tier for good, for the restore window.
    pub fn set_aside(&mut self, count: u32) -> Vec<SlotIndex> {
        let taken: Vec<SlotIndex> = (0..count).map_while(|_| self.free.pop()).map(SlotIndex).collect();
        self.census.free -= taken.len() as u64;
        taken
    }

    /// Whether loads of this slot must compare its checksum first.
    pub fn unverified(&self, slot: SlotIndex) -> bool {
        self.table.record(slot).flags & UNVERIFIED != 0
    }

    /// The slot's bytes were compared and are good.
    pub fn verified(&mut self, slot: SlotIndex) {
        self.table.record_mut(slot).flags &= !UNVERIFIED;
    }

    /// The slot's generation.
    pub fn generation(&self, slot: SlotIndex) -> Generation {
        Generation(self.table.record(slot).generation)
    }

    /// The key of what a slot holds.
    pub fn key(&self, slot: SlotIndex) -> Option<BlockKey> {
        self.table.record(slot).key()
    }

    /// Blocks that may be evicted, the next one first, each with the serial of the request that
    /// used it last. For inspection.
    pub fn eviction_order(&self) -> Vec<(BlockKey, u32)> {
        let described = |slot: SlotIndex| self.key(slot).map(|key| (key, self.table.record(slot).toucher));
        self.policy.order().into_iter().filter_map(described).collect()
    }

    /// All visible blocks.
    pub fn visible_slots(&self) -> Vec<SlotIndex> {
        let slots = (0..self.table.slots()).map(SlotIndex);
        slots.filter(|slot| Self::visible(self.table.record(*slot))).collect()
    }
}
