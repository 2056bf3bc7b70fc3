//! Which block is in the nvme tier, in which state: the one place that changes it.
//!
//! States and what follows from what are `super::extent_state`'s. Every change goes through
//! `Extents::transition`, which also keeps the counts and the free list and appends events of
//! removal; nothing else may. A committed extent that nobody reads is in the order of eviction, and
//! only then.

mod erasure;

use super::extent_state::{ExtentChange, ExtentState};
use super::remains::Remains;
use super::table::Table;
use crate::event_log::EventLog;
use crate::policy::{Block, BlockOwner, Departure, Heat, PolicyName, Quota, Tenants, Touch};
use crate::{invariant, violated};
use kvcellar_block::descriptor::Lineage;
use kvcellar_block::{BlockHash, BlockKey, ExtentIndex, GroupIndex, Tier};

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
    table: Table<ExtentIndex, ExtentState>,
    order: Tenants<ExtentIndex>,
    free: Vec<ExtentIndex>,
    stamps: Box<[Stamp]>,
    /// Whose bytes lie in the extents.
    pub(super) remains: Remains<ExtentIndex>,
    ready: u32,
    committed: u64,
    writing: u64,
    /// Extents whose device failed: they are not used again before the next start.
    retired: u64,
    /// Lookups see the tier.
    in_service: bool,
    /// Grows whenever lookups find another block than before.
    changes: u64,
}

impl Extents {
    /// An empty tier of at most `max` extents, of which none exists yet. `policy`: chooses whom to
    /// evict. `quotas`: what each tenant gets of it.
    pub fn new(max: u32, policy: PolicyName, quotas: &[Quota]) -> Self {
        Self {
            table: Table::new(max),
            order: Tenants::new(policy, max, quotas),
            free: Vec::new(),
            stamps: vec![Stamp::default(); max as usize].into_boxed_slice(),
            remains: Remains::new(max),
            ready: 0,
            committed: 0,
            writing: 0,
            retired: 0,
            in_service: true,
            changes: 0,
        }
    }

    /// This many extents exist on disk now; new ones are free.
    pub fn make_ready(&mut self, ready: u32) {
        let ready = ready.min(self.table.places());
        // Taken from the end: low extents first, so that blocks written together lie together.
        let fresh: Vec<ExtentIndex> = (self.ready..ready).rev().map(ExtentIndex).collect();
        self.free.splice(0..0, fresh);
        self.ready = self.ready.max(ready);
    }

    /// Extents that may exist.
    pub fn max(&self) -> u32 {
        self.table.places()
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
        self.table.record(extent).pins > 0
    }

    /// Extents that are not used again before the next start, or before they are erased.
    pub fn retired(&self) -> u64 {
        self.retired
    }

    /// A retired extent was erased: it may be used again.
    pub fn reinstate(&mut self, extent: ExtentIndex, events: &mut EventLog) {
        self.transition(extent, ExtentChange::Reinstate, events);
    }

    fn state(&self, extent: ExtentIndex) -> ExtentState {
        self.table.record(extent).facts
    }

    /// Changes an extent's state, and what depends on it. Returns whether that can be.
    fn transition(&mut self, extent: ExtentIndex, change: ExtentChange, events: &mut EventLog) -> bool {
        self.transition_as(extent, change, Departure::Dropped, events)
    }

    /// As [`Self::transition`]; `departure`: how a block leaves that is gone with it.
    fn transition_as(
        &mut self,
        extent: ExtentIndex,
        change: ExtentChange,
        departure: Departure,
        events: &mut EventLog,
    ) -> bool {
        let before = self.state(extent);
        let after = match before.apply(change) {
            Ok(after) => after,
            Err(refused) => {
                violated!("{extent:?}: {refused}");
                return false;
            }
        };
        let is_announced = after == ExtentState::Committed { announced: true };
        if before == (ExtentState::Committed { announced: true })
            && !is_announced
            && let Some(key) = self.key(extent)
        {
            // Without a stored event none of removal is due either.
            events.removed(Tier::Nvme, key);
        }
        if !after.is_committed() && (before.is_committed() || before == ExtentState::Writing) {
            self.order.release(extent, departure);
            self.table.remove(extent);
        }
        self.table.record_mut(extent).facts = after;
        let class = |state: ExtentState| {
            [state == ExtentState::Writing, state.is_committed(), state == ExtentState::Retired].map(u64::from)
        };
        let counts = [&mut self.writing, &mut self.committed, &mut self.retired];
        for ((count, left), entered) in counts.into_iter().zip(class(before)).zip(class(after)) {
            *count = *count + entered - left;
        }
        if after == ExtentState::Free {
            self.free.push(extent);
        }
        if after == ExtentState::Retired {
            self.remains.release(extent);
        }
        self.changes += u64::from(before.is_committed() != after.is_committed());
        true
    }

    /// As long as it is the same, lookups find the same blocks.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Takes over what a reopened store holds. It is announced later, when its descriptor has been
    /// read.
    pub fn adopt(&mut self, extent: ExtentIndex, key: &BlockKey, stamp: Stamp) -> bool {
        // The store's own files say so, and may be damaged.
        if extent.0 >= self.ready || self.table.find(key).is_some() || self.state(extent) != ExtentState::Free {
            return false;
        }
        self.transition(extent, ExtentChange::Adopt, &mut EventLog::new(false));
        self.table.insert(extent, key);
        self.order.adopt(extent, &Block::unknown(key.fingerprint()));
        self.stamps[extent.0 as usize] = stamp;
        self.order.insert(extent, Heat::Hot);
        true
    }

    /// After adoption: the extents that hold nothing, and nothing else, are free.
    pub fn recount_free(&mut self) {
        let free = |extent: &ExtentIndex| self.state(*extent) == ExtentState::Free;
        self.free = (0..self.ready).rev().map(ExtentIndex).filter(free).collect();
    }

    /// The extent of a block on disk, while the tier is in service.
    pub fn find(&self, key: &BlockKey) -> Option<ExtentIndex> {
        if !self.in_service {
            return None;
        }
        self.table.find(key).filter(|found| self.state(*found).is_committed())
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
            let here = found.is_some_and(|extent| self.state(extent).is_committed());
            run += usize::from(here);
            here
        });
        run
    }

    /// So many more blocks of this owner may lie on disk, whether or not extents are free.
    pub fn room(&self, owner: BlockOwner) -> u32 {
        self.order.room(owner)
    }

    /// Extents that hold blocks of an owner.
    pub fn blocks_of(&self, owner: BlockOwner) -> u32 {
        self.order.blocks(owner)
    }

    /// Tenants share the store.
    pub fn has_tenants(&self) -> bool {
        self.order.has_tenants()
    }

    /// What each tenant gets from now on.
    pub fn set_quotas(&mut self, quotas: &[Quota]) {
        self.order.set_quotas(quotas);
    }

    /// Drops the coldest block to make room for `wanted` blocks of `asker`. Returns its key.
    /// `None`: all that may go are being read or written.
    pub fn evict(&mut self, asker: BlockOwner, wanted: u32, events: &mut EventLog) -> Option<BlockKey> {
        let victim = self.order.victim(asker, wanted, &|_| true)?;
        let evicted = self.key(victim);
        // What is in the order of eviction is not read.
        let drop = ExtentChange::Drop { retire: false, read: false };
        self.transition_as(victim, drop, Departure::Evicted, events);
        evicted
    }

    /// The next `count` extents to be reserved are handed out in ascending order, so that blocks
    /// written together lie together.
    pub fn line_up(&mut self, count: usize) {
        let from = self.free.len().saturating_sub(count);
        self.free[from..].sort_unstable_by(|a, b| b.cmp(a));
    }

    /// Takes a free extent for a block of `owner` that will be written. `parent`: the block before
    /// it in its prefix, as far as that is known.
    pub fn reserve(
        &mut self,
        key: &BlockKey,
        owner: BlockOwner,
        parent: Option<&BlockKey>,
        stamp: Stamp,
        events: &mut EventLog,
    ) -> Option<ExtentIndex> {
        let extent = self.free.pop()?;
        if !self.transition(extent, ExtentChange::Reserve, events) {
            return None;
        }
        let parent = parent.and_then(|parent| self.table.find(parent));
        self.table.insert(extent, key);
        self.order.assign(extent, owner, &Block { parent, ..Block::unknown(key.fingerprint()) });
        self.stamps[extent.0 as usize] = stamp;
        Some(extent)
    }

    /// The write has ended well.
    pub fn commit(&mut self, extent: ExtentIndex, lineage: Lineage, events: &mut EventLog) {
        self.remains.arrive(extent);
        if !self.transition(extent, ExtentChange::Commit, events) {
            return;
        }
        let Some(key) = self.key(extent) else {
            violated!("{extent:?} is committed but has no key");
            return;
        };
        events.stored(Tier::Nvme, key, lineage);
        self.order.insert(extent, Heat::Hot);
    }

    /// The write failed. A `retired` extent is not used again.
    pub fn fail(&mut self, extent: ExtentIndex, retire: bool, events: &mut EventLog) {
        self.remains.miss(extent);
        // What was to be forgotten lies there still, where the block would have overwritten it.
        let retire = retire || self.remains.is_due(extent);
        self.transition(extent, ExtentChange::Fail { retire }, events);
    }

    /// Drops a block from disk, also one that was dropped before and is still read. A `retired`
    /// extent is not used again.
    pub fn discard(&mut self, extent: ExtentIndex, retire: bool, events: &mut EventLog) {
        // Whoever reads a descriptor does not hold the extent: its block may be gone meanwhile.
        if matches!(self.state(extent), ExtentState::Free | ExtentState::Writing | ExtentState::Retired) {
            return;
        }
        self.transition(extent, ExtentChange::Drop { retire, read: self.is_read(extent) }, events);
    }

    /// A block is being read for a request of `owner`: its extent is not given away.
    pub fn begin_read(&mut self, extent: ExtentIndex, owner: BlockOwner) {
        self.table.record_mut(extent).pins += 1;
        if let Some(key) = self.key(extent) {
            self.order.claim(extent, owner, &Block::unknown(key.fingerprint()));
        }
        self.order.touch(extent, Touch::Fresh);
        self.order.remove(extent);
    }

    /// A read has ended.
    pub fn end_read(&mut self, extent: ExtentIndex, events: &mut EventLog) {
        let record = self.table.record_mut(extent);
        if !invariant!(record.pins > 0, "a read of {extent:?} ended that nobody began") {
            return;
        }
        record.pins -= 1;
        if record.pins > 0 {
            return;
        }
        match self.state(extent) {
            ExtentState::Committed { .. } => self.order.insert(extent, Heat::Hot),
            _ => {
                self.transition(extent, ExtentChange::Release, events);
            }
        }
    }

    /// The block was used where a faster tier has it: it is as recent here. Only what is read from
    /// here counts as one more use of what is here.
    pub fn touch(&mut self, extent: ExtentIndex) {
        self.order.touch(extent, Touch::Again);
    }

    /// The tier went out of service: its blocks are not to be had, and everybody is told.
    pub fn withdraw(&mut self, events: &mut EventLog) {
        self.in_service = false;
        self.changes += 1;
        for extent in (0..self.ready).map(ExtentIndex) {
            if self.state(extent).is_committed() {
                self.transition(extent, ExtentChange::Announce(false), events);
            }
        }
    }

    /// The tier is in service again.
    pub fn return_to_service(&mut self) {
        self.in_service = true;
        self.changes += 1;
    }

    /// The next extent from `from` on whose block was not announced.
    pub fn unannounced(&self, from: u32) -> Option<ExtentIndex> {
        (from..self.ready).map(ExtentIndex).find(|extent| self.is_unannounced(*extent))
    }

    /// Whether an extent holds a block that was not announced.
    pub fn is_unannounced(&self, extent: ExtentIndex) -> bool {
        self.state(extent) == ExtentState::Committed { announced: false }
    }

    /// Announces a block of a reopened store, if it is still the one that was read.
    pub fn announce(&mut self, extent: ExtentIndex, key: &BlockKey, lineage: Lineage, events: &mut EventLog) {
        if self.is_unannounced(extent) && self.key(extent).as_ref() == Some(key) {
            self.transition(extent, ExtentChange::Announce(true), events);
            events.stored(Tier::Nvme, *key, lineage);
        }
    }

    /// The key of what an extent holds.
    pub fn key(&self, extent: ExtentIndex) -> Option<BlockKey> {
        self.table.record(extent).key()
    }

    /// Committed extents among `from..to` with their keys and stamps.
    pub fn committed_in(&self, from: u32, to: u32) -> impl Iterator<Item = (ExtentIndex, BlockKey, Stamp)> + '_ {
        (from..to.min(self.ready))
            .map(ExtentIndex)
            .filter(|extent| self.state(*extent).is_committed())
            .filter_map(|extent| Some((extent, self.key(extent)?, self.stamp(extent))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvcellar_block::SaltTag;

    const HERE: ExtentIndex = ExtentIndex(0);

    fn key(byte: u8) -> BlockKey {
        BlockKey { hash: BlockHash::new(&[byte; 32]).expect("32 bytes"), group: GroupIndex(0) }
    }

    /// One extent, committed and being read by so many.
    fn read_by(readers: u32) -> (Extents, EventLog) {
        let (mut extents, mut events) = (Extents::new(1, PolicyName::Lru, &[]), EventLog::new(true));
        extents.make_ready(1);
        assert_eq!(extents.reserve(&key(1), BlockOwner::NOBODY, None, Stamp::default(), &mut events), Some(HERE));
        extents.commit(HERE, Lineage::default(), &mut events);
        for _ in 0..readers {
            extents.begin_read(HERE, BlockOwner::NOBODY);
        }
        (extents, events)
    }

    #[test]
    fn an_extent_whose_read_failed_is_never_handed_out_again() {
        let (mut extents, mut events) = read_by(1);
        extents.discard(HERE, true, &mut events);
        extents.end_read(HERE, &mut events);
        assert_eq!((extents.retired(), extents.free(), extents.committed()), (1, 0, 0));
        assert_eq!(extents.reserve(&key(2), BlockOwner::NOBODY, None, Stamp::default(), &mut events), None);
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
        assert_eq!((extents.free(), extents.evict(BlockOwner::NOBODY, 1, &mut events)), (0, None));
        extents.end_read(HERE, &mut events);
        assert_eq!((extents.retired(), extents.free()), (0, 1));
        assert_eq!(extents.reserve(&key(2), BlockOwner::NOBODY, None, Stamp::default(), &mut events), Some(HERE));
    }

    #[test]
    fn what_a_failed_write_left_there_is_forgotten_with_its_salt() {
        let (ada, bob) = (SaltTag::of(b"ada"), SaltTag::of(b"bob"));
        let (mut extents, mut events) = read_by(0);
        extents.remains.set(HERE, ada);
        // Told before the write has ended, and after it.
        for request in 1..=2 {
            if request == 2 {
                extents.remains.take(1);
                extents.end_erasure(HERE, true, &mut events);
                extents.reserve(&key(1), BlockOwner::NOBODY, None, Stamp::default(), &mut events);
                extents.remains.expect(HERE, ada);
                extents.commit(HERE, Lineage::default(), &mut events);
            }
            extents.evict(BlockOwner::NOBODY, 1, &mut events);
            assert_eq!(extents.reserve(&key(2), BlockOwner::NOBODY, None, Stamp::default(), &mut events), Some(HERE));
            assert!(extents.remains.expect(HERE, bob), "her bytes are there");
            if request == 1 {
                assert_eq!((extents.forget(ada, request, &mut events), extents.remains.left_of(request)), (0, 1));
                extents.fail(HERE, false, &mut events);
            } else {
                extents.fail(HERE, false, &mut events);
                assert_eq!(extents.forget(ada, request, &mut events), 0);
            }
            assert_eq!((extents.free(), extents.retired(), extents.remains.left_of(request)), (0, 1, 1));
        }
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
