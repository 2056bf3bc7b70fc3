//! Which block is in the dram tier, in which state: the one place that changes it.
//!
//! Legal private states of a slot: `Empty -> Filling -> Filled -> Empty`, `Filling -> Empty` (lost), and `Filled -> Doomed -> Empty` (dropped
//! while pinned: no lookup finds it any more, and it is freed with its last pin). Every change goes through `Residency::transition`, which also appends
//! the event; nothing else may. A slot is in the policy exactly while it is `Filled` and unpinned.

use std::sync::Arc;

use super::table::{BlockTable, Record};
use crate::block::descriptor::Lineage;
use crate::block::{BlockHash, BlockKey, Generation, GroupIndex, SlotIndex};
use crate::events::EventLog;
use crate::metrics::{Counters, DropReason};
use crate::policy::{Eviction, Heat};
use crate::pool::memory::SlotMemory;

const EMPTY: u8 = 0;
const FILLING: u8 = 1;
const FILLED: u8 = 2;
const DOOMED: u8 = 3;

/// The slot was adopted and its bytes were not compared with their checksum yet.
const UNVERIFIED: u8 = 1;

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
}

/// The dram tier's contents.
pub struct Residency {
    memory: Arc<dyn SlotMemory>,
    table: BlockTable,
    policy: Box<dyn Eviction>,
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
                    self.events.stored(key, lineage);
                }
            }
            (FILLING, Transition::Lose) => {
                self.table.remove(slot);
                self.empty(slot);
                self.census.filling -= 1;
            }
            (FILLED, Transition::Remove) => {
                if let Some(key) = self.table.record(slot).key() {
                    self.events.removed(key);
                }
                self.table.remove(slot);
                if self.table.record(slot).pins > 0 {
                    self.table.record_mut(slot).state = DOOMED;
                } else {
                    self.policy.remove(slot);
                    self.empty(slot);
                    self.census.filled -= 1;
                }
            }
            (DOOMED, Transition::Free) => {
                self.empty(slot);
                self.census.filled -= 1;
            }
            (state, change) => debug_assert!(false, "slot {slot:?} in state {state} cannot take {change:?}"),
        }
    }

    fn empty(&mut self, slot: SlotIndex) {
        // Empty in shared memory first: a crash from here on must not find the old block in a slot that is handed out again.
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

    /// Looks every `step`-th hash up, starting with the first: the slot that has the key, and whether it is visible.
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
    /// The reason why there is none: [`DropReason::NoSlot`], or [`DropReason::OwnPrefix`] when the victim was last used by the very request (`toucher`) that asks.
    pub fn reserve(&mut self, key: &BlockKey, toucher: u32) -> std::result::Result<Reserved, DropReason> {
        let mut evicted = None;
        if self.free.is_empty() {
            let victim = self.policy.victim().ok_or(DropReason::NoSlot)?;
            let record = self.table.record(victim);
            if record.toucher == toucher {
                return Err(DropReason::OwnPrefix);
            }
            evicted = record.key();
            self.transition(victim, Transition::Remove);
            self.counters.evicted_blocks += 1;
            if let Some(next) = self.policy.victim() {
                // The next victim is known now: fetch its record while this one is being filled.
                self.table.prefetch(next);
                self.policy.prefetch(next);
            }
        }
        let slot = SlotIndex(self.free.pop().ok_or(DropReason::NoSlot)?);
        self.transition(slot, Transition::Reserve(*key));
        let record = self.table.record_mut(slot);
        record.toucher = toucher;
        let generation = Generation(record.generation);
        self.memory.prefetch(slot);
        Ok(Reserved { slot, generation, evicted })
    }

    /// A block's bytes are all there: lookups find it from now on. It may be evicted after [`Self::settle`].
    pub fn publish(&mut self, slot: SlotIndex, lineage: Lineage) {
        self.transition(slot, Transition::Publish(lineage));
    }

    /// Published blocks enter the order of eviction, the first of them as the last to go.
    pub fn settle(&mut self, slots: &[SlotIndex]) {
        for slot in slots.iter().rev() {
            // A lookup cannot have pinned it in between: both happen under the engine's lock.
            self.policy.insert(*slot, Heat::Hot);
        }
    }

    /// A block's bytes did not all arrive.
    pub fn lose(&mut self, slot: SlotIndex) {
        self.transition(slot, Transition::Lose);
    }

    /// Drops a visible block. Pinned, it stays where it is until its last pin goes, but no lookup finds it.
    pub fn drop_block(&mut self, slot: SlotIndex, reason: DropReason) {
        self.transition(slot, Transition::Remove);
        self.counters.dropped(reason, 1);
    }

    /// Holds a visible block.
    pub fn pin(&mut self, slot: SlotIndex, toucher: u32) {
        let record = self.table.record_mut(slot);
        debug_assert_eq!(record.state, FILLED);
        record.pins += 1;
        record.toucher = toucher;
        let first = record.pins == 1;
        self.census.pins += 1;
        if first {
            self.policy.remove(slot);
        }
    }

    /// Lets go of a held block.
    pub fn unpin(&mut self, slot: SlotIndex) {
        let record = self.table.record_mut(slot);
        debug_assert!(record.pins > 0, "unpin without pin");
        record.pins = record.pins.saturating_sub(1);
        let (last, state) = (record.pins == 0, record.state);
        self.census.pins -= 1;
        match state {
            FILLED if last => self.policy.insert(slot, Heat::Hot),
            DOOMED if last => self.transition(slot, Transition::Free),
            _ => {}
        }
    }

    /// Holds on a block.
    pub fn pins(&self, slot: SlotIndex) -> u32 {
        self.table.record(slot).pins
    }

    /// Blocks were used: they become the last to be evicted, the first of them last of all. Pinned ones stay as they are.
    pub fn touch(&mut self, slots: &[SlotIndex], toucher: u32) {
        for slot in slots.iter().rev() {
            let record = self.table.record_mut(*slot);
            if record.pins == 0 {
                record.toucher = toucher;
                self.policy.touch(*slot);
            }
        }
    }

    /// No future hit is likely to need this block: it goes first.
    pub fn cool(&mut self, slot: SlotIndex) {
        let record = self.table.record(slot);
        if record.state == FILLED && record.pins == 0 {
            self.policy.remove(slot);
            self.policy.insert(slot, Heat::Cold);
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
        self.policy.insert(slot, Heat::Hot);
    }

    /// After adoption: the slots that hold nothing, and nothing else, are free.
    pub fn recount_free(&mut self) {
        let empty = |slot: &u32| self.table.record(SlotIndex(*slot)).state == EMPTY;
        self.free = (0..self.table.slots()).rev().filter(empty).collect();
        self.census.free = self.free.len() as u64;
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

    /// Blocks that may be evicted, the next one first, each with the serial of the request that used it last. For inspection.
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
