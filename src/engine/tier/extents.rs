//! Which block is in the nvme tier, in which state: the one place that changes it.
//!
//! States and what follows from what are `super::extent_state`'s. Every change of a running engine
//! goes through `Extents::transition`, which also keeps the counts and the free list and appends
//! the event; nothing else may. A committed extent that nobody reads is in the order of eviction,
//! and only then.

use super::extent_state::{Change, State};
use super::table::BlockTable;
use crate::event_log::EventLog;
use crate::policy::{Eviction, Heat, Lru};
use crate::{invariant, violated};
use kvcellar_block::descriptor::Lineage;
use kvcellar_block::{BlockHash, BlockKey, ExtentIndex, GroupIndex, SlotIndex, Tier};

/// Its stored event was appended. Without that no removed event is due either.
const ANNOUNCED: u8 = 1;

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

    /// Extents that are not used again before the next start, or before they are erased.
    pub fn retired(&self) -> u64 {
        self.retired
    }

    /// A retired extent was erased: it may be used again.
    pub fn reinstate(&mut self, extent: ExtentIndex, events: &mut EventLog) {
        self.transition(extent, Change::Reinstate, events);
    }

    fn state(&self, extent: ExtentIndex) -> State {
        State::of(self.table.record(slot(extent)).state)
    }

    fn transition(&mut self, extent: ExtentIndex, change: Change, events: &mut EventLog) {
        let (before, at) = (self.state(extent), slot(extent));
        let Some(after) = before.after(change, self.is_read(extent)) else {
            violated!("{extent:?} is {before:?} and cannot take {change:?}");
            return;
        };
        if before == State::Committed {
            let record = self.table.record(at);
            if let Some(key) = record.key().filter(|_| record.flags & ANNOUNCED != 0) {
                events.removed(Tier::Nvme, key);
            }
            self.order.remove(at);
        }
        if matches!(before, State::Writing | State::Committed) && after != State::Committed {
            self.table.remove(at);
        }
        self.table.record_mut(at).state = after as u8;
        self.recount(extent, before, after);
    }

    fn recount(&mut self, extent: ExtentIndex, before: State, after: State) {
        for (state, count) in [
            (State::Writing, &mut self.writing),
            (State::Committed, &mut self.committed),
            (State::Retired, &mut self.retired),
        ] {
            *count = *count + u64::from(after == state) - u64::from(before == state);
        }
        if after == State::Free && before != State::Free {
            self.free.push(extent.0);
        }
    }

    /// Takes over what a reopened store holds. It is announced later, when its descriptor has been
    /// read.
    pub fn adopt(&mut self, extent: ExtentIndex, key: &BlockKey, stamp: Stamp) -> bool {
        if extent.0 >= self.ready || self.table.find(key).is_some() || self.state(extent) != State::Free {
            return false;
        }
        self.table.insert(slot(extent), key);
        let record = self.table.record_mut(slot(extent));
        (record.state, record.flags) = (State::Committed as u8, 0);
        self.recount(extent, State::Free, State::Committed);
        self.stamps[extent.0 as usize] = stamp;
        self.order.insert(slot(extent), Heat::Hot);
        true
    }

    /// After adoption: the extents that hold nothing, and nothing else, are free.
    pub fn recount_free(&mut self) {
        let free = |extent: &u32| self.state(ExtentIndex(*extent)) == State::Free;
        self.free = (0..self.ready).rev().filter(free).collect();
    }

    /// The extent of a block on disk, while the tier is in service.
    pub fn find(&self, key: &BlockKey) -> Option<ExtentIndex> {
        if !self.in_service {
            return None;
        }
        let found = self.table.find(key)?;
        (self.state(ExtentIndex(found.0)) == State::Committed).then_some(ExtentIndex(found.0))
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
            let here = found.is_some_and(|extent| self.state(ExtentIndex(extent.0)) == State::Committed);
            run += usize::from(here);
            here
        });
        run
    }

    /// Drops the coldest block to make one more extent free. Returns its key. `None`: all are being
    /// read or written.
    pub fn evict(&mut self, events: &mut EventLog) -> Option<BlockKey> {
        let victim = self.order.victim(&|_| true)?;
        let evicted = self.table.record(victim).key();
        self.transition(ExtentIndex(victim.0), Change::Drop { retire: false }, events);
        evicted
    }

    /// The next `count` extents to be reserved are handed out in ascending order, so that blocks
    /// written together lie together.
    pub fn line_up(&mut self, count: usize) {
        let from = self.free.len().saturating_sub(count);
        self.free[from..].sort_unstable_by(|a, b| b.cmp(a));
    }

    /// Takes a free extent for a block that will be written.
    pub fn reserve(&mut self, key: &BlockKey, stamp: Stamp, events: &mut EventLog) -> Option<ExtentIndex> {
        let extent = ExtentIndex(self.free.pop()?);
        self.transition(extent, Change::Reserve, events);
        self.table.insert(slot(extent), key);
        self.table.record_mut(slot(extent)).flags = 0;
        self.stamps[extent.0 as usize] = stamp;
        Some(extent)
    }

    /// The write has ended well.
    pub fn commit(&mut self, extent: ExtentIndex, lineage: Lineage, events: &mut EventLog) {
        self.transition(extent, Change::Commit, events);
        let record = self.table.record_mut(slot(extent));
        record.flags = ANNOUNCED;
        if let Some(key) = record.key() {
            events.stored(Tier::Nvme, key, lineage);
        }
        self.order.insert(slot(extent), Heat::Hot);
    }

    /// The write failed. A `retired` extent is not used again.
    pub fn fail(&mut self, extent: ExtentIndex, retire: bool, events: &mut EventLog) {
        self.transition(extent, Change::Fail { retire }, events);
    }

    /// Drops a block from disk, also one that was dropped before and is still read. A `retired`
    /// extent is not used again.
    pub fn discard(&mut self, extent: ExtentIndex, retire: bool, events: &mut EventLog) {
        if matches!(self.state(extent), State::Committed | State::Doomed | State::Condemned) {
            self.transition(extent, Change::Drop { retire }, events);
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
        if !invariant!(record.pins > 0, "a read of {extent:?} ended that nobody began") {
            return;
        }
        record.pins -= 1;
        if record.pins > 0 {
            return;
        }
        match self.state(extent) {
            State::Committed => self.order.insert(slot(extent), Heat::Hot),
            State::Doomed | State::Condemned => self.transition(extent, Change::Release, events),
            state => violated!("{extent:?} was read while it was {state:?}"),
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
            if State::of(record.state) == State::Committed && record.flags & ANNOUNCED != 0 {
                record.flags &= !ANNOUNCED;
                if let Some(key) = record.key() {
                    events.removed(Tier::Nvme, key);
                }
            }
        }
    }

    /// The next extent from `from` on whose block was not announced.
    pub fn unannounced(&self, from: u32) -> Option<ExtentIndex> {
        (from..self.ready).map(ExtentIndex).find(|extent| self.is_unannounced(*extent))
    }

    /// Whether an extent holds a block that was not announced.
    pub fn is_unannounced(&self, extent: ExtentIndex) -> bool {
        self.state(extent) == State::Committed && self.table.record(slot(extent)).flags & ANNOUNCED == 0
    }

    /// Announces a block of a reopened store, if it is still the one that was read.
    pub fn announce(&mut self, extent: ExtentIndex, key: &BlockKey, lineage: Lineage, events: &mut EventLog) {
        if self.is_unannounced(extent) && self.key(extent).as_ref() == Some(key) {
            self.table.record_mut(slot(extent)).flags |= ANNOUNCED;
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
            let key = record.key().filter(|_| State::of(record.state) == State::Committed)?;
            Some((ExtentIndex(extent), key, self.stamps[extent as usize]))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: ExtentIndex = ExtentIndex(0);

    fn key(byte: u8) -> BlockKey {
        BlockKey { hash: BlockHash::new(&[byte; 32]).expect("32 bytes"), group: GroupIndex(0) }
    }

    /// One extent, committed and being read by so many.
    fn read_by(readers: u32) -> (Extents, EventLog) {
        let (mut extents, mut events) = (Extents::new(1), EventLog::new(true));
        extents.make_ready(1);
        assert_eq!(extents.reserve(&key(1), Stamp::default(), &mut events), Some(HERE));
        extents.commit(HERE, Lineage::default(), &mut events);
        for _ in 0..readers {
            extents.begin_read(HERE);
        }
        (extents, events)
    }

    #[test]
    fn an_extent_whose_read_failed_is_never_handed_out_again() {
        let (mut extents, mut events) = read_by(1);
        extents.discard(HERE, true, &mut events);
        extents.end_read(HERE, &mut events);
        assert_eq!((extents.retired(), extents.free(), extents.committed()), (1, 0, 0));
        assert_eq!(extents.reserve(&key(2), Stamp::default(), &mut events), None);
    }

    #[test]
    fn a_failed_read_retires_what_was_dropped_before_it_ended() {
        // By a reset, by another reader that found other bytes, in either order.
        for retires in [[false, true], [true, false], [true, true]] {
            let (mut extents, mut events) = read_by(2);
            for retire in retires {
                extents.discard(HERE, retire, &mut events);
                extents.end_read(HERE, &mut events);
            }
            assert_eq!((extents.retired(), extents.free()), (1, 0), "{retires:?}");
        }
    }

    #[test]
    fn what_was_dropped_while_it_was_read_is_free_after_it() {
        let (mut extents, mut events) = read_by(2);
        extents.discard(HERE, false, &mut events);
        extents.end_read(HERE, &mut events);
        assert_eq!((extents.free(), extents.evict(&mut events)), (0, None));
        extents.end_read(HERE, &mut events);
        assert_eq!((extents.retired(), extents.free()), (0, 1));
        assert_eq!(extents.reserve(&key(2), Stamp::default(), &mut events), Some(HERE));
    }

    #[test]
    fn a_retired_extent_comes_back_when_it_was_erased() {
        let (mut extents, mut events) = read_by(0);
        extents.discard(HERE, true, &mut events);
        assert_eq!((extents.retired(), extents.free()), (1, 0));
        extents.reinstate(HERE, &mut events);
        assert_eq!((extents.retired(), extents.free()), (0, 1));
    }
}
