//! Blocks that stay in memory until a time, because a request's user asked for it.

use std::collections::BTreeSet;
use std::time::Instant;

use hashbrown::HashMap;

use crate::policy::BlockOwner;
use kvcellar_block::SlotIndex;

/// Percent of the slots that are guaranteed to no tenant and that pins may take together.
const SHARE_MAX: u64 = 25;

/// How many slots may be kept, and for whom.
#[derive(Debug, Clone, Default)]
struct Allowance {
    /// By owner: what is guaranteed to it, it may keep.
    guaranteed: Vec<u64>,
    /// Slots beyond that, over all owners.
    shared: u64,
}

/// One kept slot.
#[derive(Debug, Clone, Copy)]
struct KeptSlot {
    until: Instant,
    owner: BlockOwner,
}

/// Slots that are kept. They are not in the order of eviction.
#[derive(Debug, Default)]
pub(super) struct KeptSlots {
    by_slot: HashMap<SlotIndex, KeptSlot>,
    by_end: BTreeSet<(Instant, SlotIndex)>,
    /// Slots that are kept for each owner.
    counts: Vec<u64>,
    allowance: Allowance,
}

impl KeptSlots {
    /// None are kept, of so many. `guaranteed`: slots of each owner, nobody first.
    pub(super) fn new(slots: u32, guaranteed: Vec<u64>) -> Self {
        let free = u64::from(slots).saturating_sub(guaranteed.iter().sum());
        let allowance = Allowance { shared: free * SHARE_MAX / 100, guaranteed };
        Self { counts: vec![0; allowance.guaranteed.len()], allowance, ..Self::default() }
    }

    /// How many are kept.
    pub(super) fn len(&self) -> usize {
        self.by_slot.len()
    }

    /// The slot is kept.
    pub(super) fn has(&self, slot: SlotIndex) -> bool {
        self.by_slot.contains_key(&slot)
    }

    /// Keeps a slot, or keeps it for longer. Returns whether that is allowed.
    pub(super) fn keep(&mut self, slot: SlotIndex, owner: BlockOwner, until: Instant) -> bool {
        if let Some(kept) = self.by_slot.get_mut(&slot) {
            if kept.until < until {
                self.by_end.remove(&(kept.until, slot));
                kept.until = until;
                self.by_end.insert((until, slot));
            }
            return true;
        }
        if !self.may_keep(owner) {
            return false;
        }
        self.counts[usize::from(owner.0)] += 1;
        self.by_slot.insert(slot, KeptSlot { until, owner });
        self.by_end.insert((until, slot));
        true
    }

    fn may_keep(&self, owner: BlockOwner) -> bool {
        let Some((own, guaranteed)) =
            self.counts.get(usize::from(owner.0)).zip(self.allowance.guaranteed.get(usize::from(owner.0)))
        else {
            return false;
        };
        let beyond = self.counts.iter().zip(&self.allowance.guaranteed).map(|(own, most)| own.saturating_sub(*most));
        own < guaranteed || beyond.sum::<u64>() < self.allowance.shared
    }

    /// The slot's block is gone.
    pub(super) fn forget(&mut self, slot: SlotIndex) {
        if let Some(KeptSlot { until, owner }) = self.by_slot.remove(&slot) {
            self.by_end.remove(&(until, slot));
            self.counts[usize::from(owner.0)] -= 1;
        }
    }

    /// Lets go of a slot whose time is over, if there is one.
    pub(super) fn next_over(&mut self, now: Instant) -> Option<SlotIndex> {
        let (until, slot) = *self.by_end.first()?;
        if until > now {
            return None;
        }
        self.forget(slot);
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use std::sync::Arc;

    use super::*;
    use crate::event_log::EventLog;
    use crate::metrics::DropReason;
    use crate::policy::{PolicyName, Tenants};
    use crate::pool::memory::HeapSlots;
    use crate::tier::reservation::{Provenance, User};
    use crate::tier::residency::Residency;
    use kvcellar_block::descriptor::Lineage;
    use kvcellar_block::{BlockHash, BlockKey, GroupIndex};

    const NOBODY: BlockOwner = BlockOwner::NOBODY;
    const TENANT: BlockOwner = BlockOwner(1);

    #[test]
    fn kept_slots_end_in_the_order_of_their_times() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let mut kept = KeptSlots::new(100, vec![0]);
        for (slot, seconds) in [(1, 30), (2, 10), (3, 20)] {
            assert!(kept.keep(SlotIndex(slot), NOBODY, at(seconds)));
        }
        // Longer, and never shorter.
        assert!(kept.keep(SlotIndex(2), NOBODY, at(40)) && kept.keep(SlotIndex(2), NOBODY, at(5)));
        kept.forget(SlotIndex(3));
        assert_eq!((kept.len(), kept.next_over(at(29))), (2, None));
        assert_eq!((kept.next_over(at(40)), kept.next_over(at(40))), (Some(SlotIndex(1)), Some(SlotIndex(2))));
        assert_eq!((kept.len(), kept.next_over(at(99)), kept.has(SlotIndex(1))), (0, None, false));
    }

    #[test]
    fn no_more_is_kept_than_others_can_spare() {
        let until = Instant::now();
        let mut kept = KeptSlots::new(100, vec![0, 60]);
        let tried = |kept: &mut KeptSlots, from: u32, owner| {
            (from..from + 100).filter(|slot| kept.keep(SlotIndex(*slot), owner, until)).count()
        };
        assert_eq!(tried(&mut kept, 0, NOBODY), 10, "a quarter of what is guaranteed to nobody");
        assert_eq!(tried(&mut kept, 100, TENANT), 60, "its own share");
        kept.forget(SlotIndex(0));
        assert_eq!(tried(&mut kept, 200, TENANT), 1, "and what is free of the rest");
        assert_eq!(tried(&mut kept, 300, BlockOwner(9)), 0);
    }

    fn key(byte: u8) -> BlockKey {
        BlockKey { hash: BlockHash::new(&[byte; 32]).expect("32 bytes"), group: GroupIndex(0) }
    }

    /// Stores a block for another request each time.
    fn store(tier: &mut Residency, byte: u8) -> Result<SlotIndex, DropReason> {
        store_for(tier, NOBODY, byte)
    }

    fn store_for(tier: &mut Residency, owner: BlockOwner, byte: u8) -> Result<SlotIndex, DropReason> {
        let by = User { serial: u32::from(byte) + 1, owner };
        let slot = tier.reserve(&key(byte), by, Provenance::default())?.slot;
        tier.publish_all(&[slot], [Lineage::default()]);
        Ok(slot)
    }

    #[test]
    fn kept_blocks_stay_until_their_time_is_over() {
        for policy in PolicyName::ALL {
            let memory = Arc::new(HeapSlots::new(8, 1));
            let mut tier = Residency::new(memory, Tenants::new(policy, 8, &[]), EventLog::new(false));
            tier.track_dirty();
            let slots: Vec<SlotIndex> = (0..4).map(|byte| store(&mut tier, byte).expect("room")).collect();
            let (now, later) = (Instant::now(), Instant::now() + Duration::from_mins(1));
            assert_eq!((tier.keep(&slots, later), tier.kept()), (2, 2), "{policy:?}: a quarter");
            for byte in 10..60 {
                store(&mut tier, byte).expect("others make room");
                tier.let_go_of_kept(now);
            }
            let is_there = |tier: &Residency| (0..4).map(|byte| tier.find(&key(byte)).is_some()).collect::<Vec<_>>();
            assert_eq!(is_there(&tier), [true, true, false, false], "{policy:?}");
            // Held and let go, written to disk and no longer there, used again: they stay.
            tier.pin(slots[0], User { serial: 1_000, owner: NOBODY });
            tier.unpin(slots[0]);
            tier.set_clean(slots[0], true);
            tier.set_clean(slots[0], false);
            tier.touch(&slots[..2], User { serial: 1_001, owner: NOBODY });
            tier.cool(slots[1]);
            for byte in 60..100 {
                store(&mut tier, byte).expect("others make room");
            }
            assert_eq!(is_there(&tier)[..2], [true, true], "{policy:?}");
            // What is dropped is kept no longer.
            tier.drop_block(slots[0], DropReason::Reset);
            assert_eq!((tier.kept(), is_there(&tier)[0]), (1, false));
            let may_go = |tier: &Residency| tier.eviction_order().iter().any(|(of, _)| *of == key(1));
            assert!(!may_go(&tier));
            tier.let_go_of_kept(later);
            assert!(tier.kept() == 0 && may_go(&tier), "{policy:?}: like any other");
        }
    }

    #[test]
    fn where_everything_is_kept_nothing_is_evicted_and_nothing_breaks() {
        let memory = Arc::new(HeapSlots::new(4, 1));
        let quotas = [crate::policy::Quota { guaranteed: 4, limit: 4 }];
        let mut tier = Residency::new(memory, Tenants::new(PolicyName::Lru, 4, &quotas), EventLog::new(false));
        let by = |serial| User { serial, owner: TENANT };
        let slots: Vec<SlotIndex> = (0..4).map(|byte| store_for(&mut tier, TENANT, byte).expect("room")).collect();
        assert_eq!(tier.keep(&slots, Instant::now() + Duration::from_mins(1)), 4);
        assert_eq!(tier.reserve(&key(9), by(9), Provenance::default()), Err(DropReason::NoSlot));
        assert!(tier.make_room(2, by(9)).is_empty());
    }

    #[test]
    fn a_tenant_whose_share_is_pinned_gets_what_its_limit_leaves_it() {
        let memory = Arc::new(HeapSlots::new(8, 1));
        let quotas = [crate::policy::Quota { guaranteed: 2, limit: 3 }];
        let mut tier = Residency::new(memory, Tenants::new(PolicyName::Lru, 8, &quotas), EventLog::new(false));
        let by = |serial| User { serial, owner: TENANT };
        let slots: Vec<SlotIndex> = (0..2).map(|byte| store_for(&mut tier, TENANT, byte).expect("room")).collect();
        assert_eq!(tier.keep(&slots, Instant::now() + Duration::from_mins(1)), 2);
        for byte in 10..16 {
            store(&mut tier, byte).expect("room");
        }
        assert_eq!(tier.make_room(2, by(9)).len(), 1, "one more, of others'");
        assert_eq!(tier.reserve(&key(20), by(9), Provenance::default()).map(|reserved| reserved.evicted), Ok(None));
        assert_eq!(tier.reserve(&key(21), by(9), Provenance::default()), Err(DropReason::NoSlot));
    }
}
