//! Which block is in the nvme tier, in which state: the one place that changes it.
//!
//! Legal states of an extent: `Free -> Writing -> Committed -> Free`, `Writing -> Free` (the write failed), and `Committed -> Doomed -> Free` (dropped while it is
//! read). Every change goes through `Extents::transition`, which also appends the event; nothing else may. A committed extent that nobody reads is in the
//! order of eviction, and only then.

use super::table::BlockTable;
use crate::block::descriptor::Lineage;
use crate::block::{BlockHash, BlockKey, ExtentIndex, GroupIndex, SlotIndex, Tier};
use crate::events::EventLog;
use crate::policy::{Eviction, Heat, Lru};

const FREE: u8 = 0;
const WRITING: u8 = 1;
const COMMITTED: u8 = 2;
const DOOMED: u8 = 3;

/// Its stored event was appended. Without that no removed event is due either.
const ANNOUNCED: u8 = 1;

/// A change of an extent's state.
#[derive(Debug)]
enum Transition {
    /// Free -> Writing, under a key.
    Reserve(BlockKey),
    /// Writing -> Committed.
    Commit(Lineage),
    /// Writing -> Free.
    Fail,
    /// Committed -> Free, or -> Doomed while it is read.
    Remove,
    /// Doomed -> Free.
    Release,
}

/// When an extent was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stamp {
    /// The store's running number.
    pub sequence: u64,
    /// Seconds since 1970.
    pub written_s: u64,
}

/// The nvme tier's contents.
pub struct Extents {
    table: BlockTable,
    order: Lru,
    free: Vec<u32>,
    stamps: Box<[Stamp]>,
    ready: u32,
    committed: u64,
    writing: u64,
    /// Extents whose device failed: they are not used again before the next start.
    retired: u64,
    /// Lookups see the tier.
    pub in_service: bool,
}

fn slot(extent: ExtentIndex) -> SlotIndex {
    SlotIndex(extent.0)
}

impl Extents {
    /// An empty tier of at most `max` extents, of which none exists yet.
    pub fn new(max: u32) -> Self {
        Self {
            table: BlockTable::new(max),
            order: Lru::new(max),
            free: Vec::new(),
            stamps: vec![Stamp::default(); max as usize].into_boxed_slice(),
            ready: 0,
            committed: 0,
            writing: 0,
            retired: 0,
            in_service: true,
        }
    }

    /// This many extents exist on disk now; new ones are free.
    pub fn make_ready(&mut self, ready: u32) {
        let ready = ready.min(self.table.slots());
        // Taken from the end: low extents first, so that blocks written together lie together.
        let fresh: Vec<u32> = (self.ready..ready).rev().collect();
        self.free.splice(0..0, fresh);
        self.ready = self.ready.max(ready);
    }

    /// Extents that may exist.
    pub fn max(&self) -> u32 {
        self.table.slots()
    }

    /// Extents that exist on disk.
    pub fn ready(&self) -> u32 {
        self.ready
    }

    /// Blocks on disk.
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// Blocks being written.
    pub fn writing(&self) -> u64 {
        self.writing
    }

    /// Extents that hold nothing.
    pub fn free(&self) -> u64 {
        self.free.len() as u64
    }

    /// When an extent was written.
    pub fn stamp(&self, extent: ExtentIndex) -> Stamp {
        self.stamps[extent.0 as usize]
    }

    /// Somebody is reading it.
    pub fn is_read(&self, extent: ExtentIndex) -> bool {
        self.table.record(slot(extent)).pins > 0
    }

    /// A retired extent was erased: it may be used again.
    pub fn reinstate(&mut self, extent: ExtentIndex) {
        self.retired = self.retired.saturating_sub(1);
        self.free.push(extent.0);
    }

    fn transition(&mut self, extent: ExtentIndex, change: Transition, events: &mut EventLog) {
        let at = slot(extent);
        match (self.table.record(at).state, change) {
            (FREE, Transition::Reserve(key)) => {
                self.table.insert(at, &key);
                let record = self.table.record_mut(at);
                (record.state, record.flags) = (WRITING, 0);
                self.writing += 1;
            }
            (WRITING, Transition::Commit(lineage)) => {
                let record = self.table.record_mut(at);
                (record.state, record.flags) = (COMMITTED, ANNOUNCED);
                self.writing -= 1;
                self.committed += 1;
                if let Some(key) = self.table.record(at).key() {
                    events.stored(Tier::Nvme, key, lineage);
                }
            }
            (WRITING, Transition::Fail) => {
                self.table.remove(at);
                self.table.record_mut(at).state = FREE;
                self.writing -= 1;
            }
            (COMMITTED, Transition::Remove) => {
                let record = self.table.record(at);
                if let Some(key) = record.key().filter(|_| record.flags & ANNOUNCED != 0) {
                    events.removed(Tier::Nvme, key);
                }
                let read = record.pins > 0;
                self.table.remove(at);
                self.order.remove(at);
                self.committed -= 1;
                self.table.record_mut(at).state = if read { DOOMED } else { FREE };
            }
            (DOOMED, Transition::Release) => self.table.record_mut(at).state = FREE,
            (state, change) => debug_assert!(false, "extent {extent:?} in state {state} cannot take {change:?}"),
        }
    }

    /// Takes over what a reopened store holds. It is announced later, when its descriptor has been read.
    pub fn adopt(&mut self, extent: ExtentIndex, key: &BlockKey, stamp: Stamp) -> bool {
        if extent.0 >= self.ready || self.table.find(key).is_some() || self.table.record(slot(extent)).state != FREE {
            return false;
        }
        self.table.insert(slot(extent), key);
        let record = self.table.record_mut(slot(extent));
        (record.state, record.flags) = (COMMITTED, 0);
        self.stamps[extent.0 as usize] = stamp;
        self.committed += 1;
        self.order.insert(slot(extent), Heat::Hot);
        true
    }

    /// After adoption: the extents that hold nothing, and nothing else, are free.
    pub fn recount_free(&mut self) {
        let free = |extent: &u32| self.table.record(SlotIndex(*extent)).state == FREE;
        self.free = (0..self.ready).rev().filter(free).collect();
    }

    /// The extent of a block on disk, while the tier is in service.
    pub fn find(&self, key: &BlockKey) -> Option<ExtentIndex> {
        if !self.in_service {
            return None;
        }
        let found = self.table.find(key)?;
        (self.table.record(found).state == COMMITTED).then_some(ExtentIndex(found.0))
    }

    /// Whether the key has an extent, committed or not.
    pub fn knows(&self, key: &BlockKey) -> bool {
        self.table.find(key).is_some()
    }

    /// Number of consecutive blocks on disk: every `step`-th hash, starting with the first.
    pub fn run(&self, hashes: &[BlockHash], step: usize, group: GroupIndex) -> usize {
        if !self.in_service || self.committed == 0 {
            return 0;
        }
        let mut run = 0;
        self.table.find_run(hashes, step, group, |found| {
            let here = found.is_some_and(|extent| self.table.record(extent).state == COMMITTED);
            run += usize::from(here);
            here
        });
        run
    }

    /// Drops the coldest block to make one more extent free. Returns its key. `None`: all are being read or written.
    pub fn evict(&mut self, events: &mut EventLog) -> Option<BlockKey> {
        let victim = self.order.victim(&|_| true)?;
        let evicted = self.table.record(victim).key();
        self.transition(ExtentIndex(victim.0), Transition::Remove, events);
        self.free.push(victim.0);
        evicted
    }

    /// The next `count` extents to be reserved are handed out in ascending order, so that blocks written together lie together.
    pub fn line_up(&mut self, count: usize) {
        let from = self.free.len().saturating_sub(count);
        self.free[from..].sort_unstable_by(|a, b| b.cmp(a));
    }

    /// Takes a free extent for a block that will be written.
    pub fn reserve(&mut self, key: &BlockKey, stamp: Stamp, events: &mut EventLog) -> Option<ExtentIndex> {
        let extent = ExtentIndex(self.free.pop()?);
        self.transition(extent, Transition::Reserve(*key), events);
        self.stamps[extent.0 as usize] = stamp;
        Some(extent)
    }

    /// The write has ended well.
    pub fn commit(&mut self, extent: ExtentIndex, lineage: Lineage, events: &mut EventLog) {
        self.transition(extent, Transition::Commit(lineage), events);
        self.order.insert(slot(extent), Heat::Hot);
    }

    /// The write failed. A `retired` extent is not used again.
    pub fn fail(&mut self, extent: ExtentIndex, retire: bool, events: &mut EventLog) {
        self.transition(extent, Transition::Fail, events);
        self.give_back(extent, retire);
    }

    fn give_back(&mut self, extent: ExtentIndex, retire: bool) {
        if retire {
            self.retired += 1;
        } else {
            self.free.push(extent.0);
        }
    }

    /// Drops a block from disk. A `retired` extent is not used again.
    pub fn discard(&mut self, extent: ExtentIndex, retire: bool, events: &mut EventLog) {
        if self.table.record(slot(extent)).state != COMMITTED {
            return;
        }
        let read = self.table.record(slot(extent)).pins > 0;
        self.transition(extent, Transition::Remove, events);
        if !read {
            self.give_back(extent, retire);
        }
    }

    /// A block is being read: its extent is not given away.
    pub fn begin_read(&mut self, extent: ExtentIndex) {
        self.table.record_mut(slot(extent)).pins += 1;
        self.order.remove(slot(extent));
    }

    /// A read has ended.
    pub fn end_read(&mut self, extent: ExtentIndex, events: &mut EventLog) {
        let record = self.table.record_mut(slot(extent));
        record.pins -= 1;
        if record.pins > 0 {
            return;
        }
        match record.state {
            COMMITTED => self.order.insert(slot(extent), Heat::Hot),
            DOOMED => {
                self.transition(extent, Transition::Release, events);
                self.free.push(extent.0);
            }
            _ => debug_assert!(false, "extent {extent:?} was read in another state"),
        }
    }

    /// The block was used: it becomes the last to be evicted.
    pub fn touch(&mut self, extent: ExtentIndex) {
        if self.order.holds(slot(extent)) {
            self.order.touch(slot(extent));
        }
    }

    /// The tier went out of service: its blocks are not to be had, and everybody is told.
    pub fn withdraw(&mut self, events: &mut EventLog) {
        self.in_service = false;
        for extent in (0..self.ready).map(SlotIndex) {
            let record = self.table.record_mut(extent);
            if record.state == COMMITTED && record.flags & ANNOUNCED != 0 {
                record.flags &= !ANNOUNCED;
                if let Some(key) = record.key() {
                    events.removed(Tier::Nvme, key);
                }
            }
        }
    }

    /// The next extent from `from` on whose block was not announced.
    pub fn unannounced(&self, from: u32) -> Option<ExtentIndex> {
        (from..self.ready)
            .find(|extent| {
                let record = self.table.record(SlotIndex(*extent));
                record.state == COMMITTED && record.flags & ANNOUNCED == 0
            })
            .map(ExtentIndex)
    }

    /// Announces a block of a reopened store, if it is still the one that was read.
    pub fn announce(&mut self, extent: ExtentIndex, key: &BlockKey, lineage: Lineage, events: &mut EventLog) {
        let record = self.table.record_mut(slot(extent));
        if record.state == COMMITTED && record.flags & ANNOUNCED == 0 && record.key().as_ref() == Some(key) {
            record.flags |= ANNOUNCED;
            events.stored(Tier::Nvme, *key, lineage);
        }
    }

    /// The key of what an extent holds.
    pub fn key(&self, extent: ExtentIndex) -> Option<BlockKey> {
        self.table.record(slot(extent)).key()
    }

    /// Committed extents among `from..to` with their keys and stamps.
    pub fn committed_in(&self, from: u32, to: u32) -> impl Iterator<Item = (ExtentIndex, BlockKey, Stamp)> + '_ {
        (from..to.min(self.ready)).filter_map(|extent| {
            let record = self.table.record(SlotIndex(extent));
            let key = record.key().filter(|_| record.state == COMMITTED)?;
            Some((ExtentIndex(extent), key, self.stamps[extent as usize]))
        })
    }
}
