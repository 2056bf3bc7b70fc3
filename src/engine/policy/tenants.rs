//! One tier's places among tenants: each has an order of eviction of its own, a guaranteed share
//! and a limit.
//!
//! Guarantees, where `guaranteed` of all tenants together is at most the tier:
//! - Nobody else's block evicts a block of a tenant that has no more than its guaranteed share.
//! - A tenant that has less gets its share as fast as it stores, from those who have more than
//!   theirs, however recently they used what they have.
//! - A tenant that has reached its limit makes room among its own blocks only, even where places
//!   are free.
//!
//! Of those whose blocks may go, the one goes whose next victim was unused for the longest time:
//! with LRU and without shares that is the tier's LRU block, as if there were no tenants.
//!
//! A block belongs to the tenant that stored it, whoever else uses it. Blocks of before a restart
//! belong to nobody, until a tenant uses them. Without tenants there is one order, and nothing here
//! costs anything but a call.

use super::{Block, BlockOwner, Departure, Eviction, Heat, Index, PolicyName, Quota, Touch, build};
use crate::{limits, violated};

/// Blocks of one tenant.
struct TenantOrder<I> {
    order: Box<dyn Eviction<I>>,
    quota: Quota,
    /// Places that hold its blocks, evictable or not.
    blocks: u32,
}

impl<I> TenantOrder<I> {
    fn spare(&self) -> u32 {
        self.blocks.saturating_sub(self.quota.guaranteed)
    }
}

/// What is known of a place where there are tenants.
#[derive(Debug, Clone, Copy, Default)]
struct PlaceFacts {
    owner: BlockOwner,
    /// The block was there before the engine began: the first tenant that uses it gets it.
    is_found: bool,
    /// The clock at its last use.
    used: u64,
}

/// All places of a tier, by tenant.
pub struct Tenants<I> {
    /// The first is nobody's.
    parts: Vec<TenantOrder<I>>,
    /// Empty without tenants.
    places: Box<[PlaceFacts]>,
    clock: u64,
}

impl<I: Index + 'static> Tenants<I> {
    /// `places` places under a policy. `quotas`: of each tenant, none for a tier without.
    pub fn new(policy: PolicyName, places: u32, quotas: &[Quota]) -> Self {
        let part = |quota| TenantOrder { order: build(policy, places), quota, blocks: 0 };
        let known = if quotas.is_empty() { 0 } else { places as usize };
        Self {
            parts: std::iter::once(Quota::NONE).chain(quotas.iter().copied()).map(part).collect(),
            places: vec![PlaceFacts::default(); known].into_boxed_slice(),
            clock: 0,
        }
    }
}

impl<I: Index> Tenants<I> {
    /// No tenants: one order of eviction.
    pub fn single(order: Box<dyn Eviction<I>>) -> Self {
        Self { parts: vec![TenantOrder { order, quota: Quota::NONE, blocks: 0 }], places: Box::default(), clock: 0 }
    }

    /// There are tenants.
    pub fn has_tenants(&self) -> bool {
        self.parts.len() > 1
    }

    /// What each gets from now on.
    pub fn set_quotas(&mut self, quotas: &[Quota]) {
        for (part, quota) in self.parts[1..].iter_mut().zip(quotas) {
            part.quota = *quota;
        }
    }

    fn part_of(&self, place: I) -> usize {
        self.places.get(place.number() as usize).map_or(0, |facts| usize::from(facts.owner.0))
    }

    fn part(&self, place: I) -> &TenantOrder<I> {
        &self.parts[self.part_of(place)]
    }

    fn part_mut(&mut self, place: I) -> &mut TenantOrder<I> {
        let number = self.part_of(place);
        &mut self.parts[number]
    }

    /// The part of an owner; one that no quota names is nobody.
    fn known(&self, owner: BlockOwner) -> usize {
        if usize::from(owner.0) < self.parts.len() { usize::from(owner.0) } else { 0 }
    }

    /// Whose block a place holds.
    pub fn owner(&self, place: I) -> BlockOwner {
        BlockOwner(self.part_of(place) as u8)
    }

    /// Places that hold blocks of an owner.
    pub fn blocks(&self, owner: BlockOwner) -> u32 {
        self.parts[self.known(owner)].blocks
    }

    /// What is guaranteed to each owner, nobody first.
    pub fn guaranteed(&self) -> Vec<u64> {
        self.parts.iter().map(|part| part.quota.guaranteed.into()).collect()
    }

    /// So many places may hold blocks of this owner at the most.
    pub fn limit(&self, owner: BlockOwner) -> u32 {
        self.parts[self.known(owner)].quota.limit
    }

    /// So many more places may hold blocks of this owner.
    pub fn room(&self, owner: BlockOwner) -> u32 {
        let part = &self.parts[self.known(owner)];
        part.quota.limit.saturating_sub(part.blocks)
    }

    /// A place was given to a block of this owner. It is not in the order of eviction.
    pub fn assign(&mut self, place: I, owner: BlockOwner, block: &Block<I>) {
        self.place_at(place, self.known(owner), false, block);
    }

    /// As [`Self::assign`], for a block of before this engine began.
    pub fn adopt(&mut self, place: I, block: &Block<I>) {
        self.place_at(place, 0, true, block);
    }

    fn place_at(&mut self, place: I, number: usize, is_found: bool, block: &Block<I>) {
        // Another tenant's order knows nothing of it.
        let parent = block.parent.filter(|parent| self.part_of(*parent) == number);
        let block = &Block { parent, ..*block };
        self.clock += 1;
        let used = self.clock;
        if let Some(facts) = self.places.get_mut(place.number() as usize) {
            *facts = PlaceFacts { owner: BlockOwner(number as u8), is_found, used };
        }
        let part = &mut self.parts[number];
        part.blocks += 1;
        part.order.assign(place, block);
    }

    /// A block of before this engine began is used by somebody: it becomes a tenant's, who has room
    /// for it. `block`: what is known of it.
    pub fn claim(&mut self, place: I, by: BlockOwner, block: &Block<I>) {
        let number = self.known(by);
        if number == 0 || self.room(by) == 0 {
            return;
        }
        let found = self.places.get(place.number() as usize).is_some_and(|facts| facts.is_found);
        if !found {
            return;
        }
        let was_held = self.holds(place);
        self.release(place, Departure::Dropped);
        self.place_at(place, number, false, block);
        if was_held {
            self.insert(place, Heat::Hot);
        }
    }

    /// A place's block is gone. The place leaves the order of eviction.
    pub fn release(&mut self, place: I, departure: Departure) {
        let part = self.part_mut(place);
        part.order.release(place, departure);
        if let Some(left) = part.blocks.checked_sub(1) {
            part.blocks = left;
        } else {
            violated!("a tenant's block goes that was never counted");
        }
        if let Some(facts) = self.places.get_mut(place.number() as usize) {
            *facts = PlaceFacts::default();
        }
    }

    /// A place may be evicted from now on.
    pub fn insert(&mut self, place: I, heat: Heat) {
        self.stamp(place, heat);
        self.part_mut(place).order.insert(place, heat);
    }

    /// A place must not be evicted any more.
    pub fn remove(&mut self, place: I) {
        self.part_mut(place).order.remove(place);
    }

    /// A place's block was used.
    pub fn touch(&mut self, place: I, touch: Touch) {
        self.stamp(place, Heat::Hot);
        self.part_mut(place).order.touch(place, touch);
    }

    fn stamp(&mut self, place: I, heat: Heat) {
        self.clock += 1;
        let clock = self.clock;
        if let Some(facts) = self.places.get_mut(place.number() as usize) {
            facts.used = if heat == Heat::Hot { clock } else { 0 };
        }
    }

    /// The place to evict next so that `asker` gets room for `wanted` blocks, of those that `may`
    /// be evicted. It stays in the order until it is removed or released.
    pub fn victim(&mut self, asker: BlockOwner, wanted: u32, may: &dyn Fn(I) -> bool) -> Option<I> {
        if !self.has_tenants() {
            return self.parts[0].order.victim(may);
        }
        let own = self.known(asker);
        if self.room(asker) < wanted {
            return self.parts[own].order.victim(may);
        }
        let mut found: Option<(u64, I)> = None;
        for part in &mut self.parts {
            if part.spare() == 0 {
                continue;
            }
            let Some(place) = part.order.victim(may) else { continue };
            let used = self.places[place.number() as usize].used;
            if found.is_none_or(|(least, _)| used < least) {
                found = Some((used, place));
            }
        }
        // Where others' spare blocks are all held, its own have to do.
        found.map(|(_, place)| place).or_else(|| self.parts[own].order.victim(may))
    }

    /// Shows the places in the order of eviction, the coldest first, until `visit` returns `false`.
    /// With tenants: first what each has beyond its guaranteed share, the longest unused first.
    pub fn coldest(&self, visit: &mut dyn FnMut(I) -> bool) {
        if !self.has_tenants() {
            return self.parts[0].order.coldest(visit);
        }
        // Orders can only be walked from their beginning: ever longer pieces are, so that whoever
        // wants a few pays for a few.
        let (mut shown, mut length) = (0, limits::COLD_END_OF_TENANTS_MAX);
        loop {
            let (merged, is_all) = self.merged(length);
            for place in &merged[shown.min(merged.len())..] {
                if !visit(*place) {
                    return;
                }
            }
            if is_all {
                return;
            }
            (shown, length) = (merged.len(), length * 4);
        }
    }

    /// The beginning of the whole order, of at most `length` places of each tenant, as far as that
    /// is known from them; and whether it is the end, too.
    fn merged(&self, length: usize) -> (Vec<I>, bool) {
        let pieces: Vec<Vec<I>> = self.parts.iter().map(|part| beginning(part.order.as_ref(), length)).collect();
        let spare: Vec<usize> = self.parts.iter().map(|part| part.spare() as usize).collect();
        let mut merged = Vec::new();
        let mut at = vec![0; pieces.len()];
        for beyond in [true, false] {
            loop {
                let mut next: Option<(u64, usize)> = None;
                for (number, piece) in pieces.iter().enumerate() {
                    if beyond && at[number] >= spare[number] {
                        continue;
                    }
                    let Some(place) = piece.get(at[number]) else {
                        if piece.len() == length {
                            // What comes next of this one is not known.
                            return (merged, false);
                        }
                        continue;
                    };
                    let used = self.places[place.number() as usize].used;
                    if next.is_none_or(|(least, _)| used < least) {
                        next = Some((used, number));
                    }
                }
                let Some((_, number)) = next else { break };
                merged.push(pieces[number][at[number]]);
                at[number] += 1;
            }
        }
        (merged, true)
    }

    /// The order is exactly that of the last use, whatever else is known of blocks.
    pub fn is_by_last_use(&self) -> bool {
        !self.has_tenants() && self.parts[0].order.is_by_last_use()
    }

    /// Whether the place is in the order of eviction.
    pub fn holds(&self, place: I) -> bool {
        self.part(place).order.holds(place)
    }

    /// All places that may be evicted, the coldest first. For inspection.
    pub fn order(&self) -> Vec<I> {
        let mut all = Vec::new();
        self.coldest(&mut |place| {
            all.push(place);
            true
        });
        all
    }

    /// The place of the block's parent, where the policy knows that it still holds it.
    pub fn parent(&self, place: I) -> Option<I> {
        self.part(place).order.parent(place)
    }

    /// Asks the processor to fetch what a decision on `place` will read.
    pub fn prefetch(&self, place: I) {
        self.part(place).order.prefetch(place);
    }
}

fn beginning<I: Index>(order: &dyn Eviction<I>, length: usize) -> Vec<I> {
    let mut found = Vec::new();
    order.coldest(&mut |place| {
        if found.len() < length {
            found.push(place);
        }
        found.len() < length
    });
    found
}

#[cfg(test)]
mod tests {
    use kvcellar_block::SlotIndex;
    use proptest::prelude::*;

    use super::*;

    const ONE: BlockOwner = BlockOwner(1);
    const TWO: BlockOwner = BlockOwner(2);

    fn tier(policy: PolicyName, places: u32, quotas: &[(u32, u32)]) -> Tenants<SlotIndex> {
        let quota = |(guaranteed, limit): &(u32, u32)| Quota { guaranteed: *guaranteed, limit: *limit };
        Tenants::new(policy, places, &quotas.iter().map(quota).collect::<Vec<_>>())
    }

    /// A tier that stores: free places first, then those of victims.
    struct StoringTier {
        tenants: Tenants<SlotIndex>,
        free: Vec<SlotIndex>,
        next: u64,
    }

    impl StoringTier {
        fn new(policy: PolicyName, places: u32, quotas: &[(u32, u32)]) -> Self {
            let free = (0..places).rev().map(SlotIndex).collect();
            Self { tenants: tier(policy, places, quotas), free, next: 1 }
        }

        /// Stores one block, if it finds a place.
        fn store(&mut self, owner: BlockOwner) -> Option<SlotIndex> {
            if self.free.is_empty() || self.tenants.room(owner) == 0 {
                let victim = self.tenants.victim(owner, 1, &|_| true)?;
                self.tenants.release(victim, Departure::Evicted);
                self.free.push(victim);
            }
            let place = self.free.pop()?;
            self.next += 1;
            self.tenants.assign(place, owner, &Block::unknown(self.next.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            self.tenants.insert(place, Heat::Hot);
            Some(place)
        }

        /// Stores as many blocks as find places.
        fn fill(&mut self, owner: BlockOwner, count: usize) {
            let stored = (0..count).filter_map(|_| self.store(owner)).count();
            assert!(stored > 0);
        }

        fn has(&self) -> [u32; 3] {
            [BlockOwner::NOBODY, ONE, TWO].map(|owner| self.tenants.blocks(owner))
        }
    }

    #[test]
    fn a_scan_takes_nothing_of_a_guaranteed_share() {
        for policy in PolicyName::ALL {
            let mut tier = StoringTier::new(policy, 100, &[(30, 100), (0, 100)]);
            tier.fill(ONE, 40);
            tier.fill(TWO, 1_000);
            assert_eq!(tier.has(), [0, 30, 70], "{policy:?}");
            // It gets back what is guaranteed as fast as it stores, and no more while others are
            // busier.
            let mut tier = StoringTier::new(policy, 100, &[(30, 100), (0, 100)]);
            tier.fill(TWO, 1_000);
            tier.fill(ONE, 30);
            assert_eq!(tier.has(), [0, 30, 70], "{policy:?}");
        }
    }

    #[test]
    fn a_tenant_at_its_limit_makes_room_among_its_own() {
        for policy in PolicyName::ALL {
            let mut tier = StoringTier::new(policy, 100, &[(0, 20), (0, 100)]);
            tier.fill(ONE, 50);
            assert_eq!((tier.has(), tier.free.len()), ([0, 20, 0], 80), "{policy:?}");
            assert_eq!(tier.tenants.room(ONE), 0);
        }
    }

    #[test]
    fn where_all_is_guaranteed_everybody_evicts_his_own() {
        let mut tier = StoringTier::new(PolicyName::Lru, 10, &[(5, 10), (5, 10)]);
        tier.fill(ONE, 5);
        tier.fill(TWO, 5);
        let oldest = tier.tenants.order()[0];
        assert_eq!(tier.tenants.owner(oldest), ONE);
        assert_eq!(tier.store(TWO).map(|place| tier.tenants.owner(place)), Some(TWO));
        assert_eq!(tier.has(), [0, 5, 5]);
        // Nobody's requests find no place where every block is guaranteed to somebody.
        assert_eq!(tier.store(BlockOwner::NOBODY), None);
    }

    #[test]
    fn what_was_found_at_the_start_becomes_its_first_users() {
        let mut tier = tier(PolicyName::Lru, 4, &[(1, 1), (0, 4)]);
        let places = [0, 1, 2].map(SlotIndex);
        for place in places {
            tier.adopt(place, &Block::unknown(u64::from(place.0) + 1));
            tier.insert(place, Heat::Hot);
        }
        tier.claim(places[0], ONE, &Block::unknown(1));
        tier.claim(places[0], TWO, &Block::unknown(1));
        tier.claim(places[1], ONE, &Block::unknown(2));
        tier.claim(places[2], BlockOwner::NOBODY, &Block::unknown(3));
        assert_eq!(
            places.map(|place| tier.owner(place)),
            [ONE, BlockOwner::NOBODY, BlockOwner::NOBODY],
            "as far as its limit"
        );
        assert!(places.iter().all(|place| tier.holds(*place)));
    }

    proptest! {
        /// Against a list of all blocks, that is gone through for each victim.
        #[test]
        fn victims_are_those_of_a_plain_model(
            places in 4_u32..24,
            quotas in proptest::collection::vec((0_u32..8, 1_u32..24), 1..3),
            steps in proptest::collection::vec((0_u8..3, 0_u8..4, any::<u8>()), 1..200),
        ) {
            let total: u32 = quotas.iter().map(|(guaranteed, _)| guaranteed).sum();
            prop_assume!(total <= places && quotas.iter().all(|(guaranteed, limit)| guaranteed <= limit));
            let mut tier = StoringTier::new(PolicyName::Lru, places, &quotas);
            // BlockOwner, place; the longest unused first.
            let mut model: Vec<(BlockOwner, SlotIndex)> = Vec::new();
            let quota = |owner: BlockOwner| match owner {
                BlockOwner::NOBODY => (0, u32::MAX),
                BlockOwner(number) => quotas[usize::from(number) - 1],
            };
            for (owner, what, which) in steps {
                let owner = BlockOwner(owner.min(quotas.len() as u8));
                if what == 0 && !model.is_empty() {
                    let at = usize::from(which) % model.len();
                    let used = model.remove(at);
                    tier.tenants.touch(used.1, Touch::Fresh);
                    model.push(used);
                    continue;
                }
                let count = |model: &[(BlockOwner, SlotIndex)], of: BlockOwner| {
                    model.iter().filter(|(owner, _)| *owner == of).count() as u32
                };
                let at_limit = count(&model, owner) >= quota(owner).1;
                if at_limit || model.len() as u32 == places {
                    let spare = |of: BlockOwner| count(&model, of) > quota(of).0;
                    let first = |may: &dyn Fn(BlockOwner) -> bool| model.iter().position(|(owner, _)| may(*owner));
                    let own = || first(&|of| of == owner);
                    let victim = if at_limit { own() } else { first(&spare).or_else(own) };
                    let Some(victim) = victim else {
                        prop_assert_eq!(tier.store(owner), None);
                        continue;
                    };
                    let gone = model.remove(victim);
                    prop_assert_eq!(tier.tenants.victim(owner, 1, &|_| true), Some(gone.1));
                }
                let stored = tier.store(owner);
                prop_assert!(stored.is_some());
                model.extend(stored.map(|place| (owner, place)));
                for of in 0..=quotas.len() as u8 {
                    prop_assert_eq!(tier.tenants.blocks(BlockOwner(of)), count(&model, BlockOwner(of)));
                    prop_assert!(tier.tenants.blocks(BlockOwner(of)) <= quota(BlockOwner(of)).1);
                }
            }
            let mut order = tier.tenants.order();
            order.sort_unstable();
            let mut all: Vec<_> = model.iter().map(|(_, place)| *place).collect();
            all.sort_unstable();
            prop_assert_eq!(order, all);
        }

        /// What is shown as coldest goes first, as long as nobody stores for himself.
        #[test]
        fn the_coldest_are_the_next_victims(
            stored in proptest::collection::vec(0_u8..3, 300..600),
            guaranteed in 0_u32..100,
        ) {
            let mut tier = StoringTier::new(PolicyName::Lru, 300, &[(guaranteed, 300), (50, 300)]);
            let found = stored.iter().filter(|owner| tier.store(BlockOwner(**owner)).is_some()).count();
            prop_assert!(found >= 300);
            let order = tier.tenants.order();
            let beyond: u32 = tier.tenants.parts.iter().map(TenantOrder::spare).sum();
            for expected in &order[..beyond as usize] {
                let victim = tier.tenants.victim(BlockOwner::NOBODY, 1, &|_| true);
                prop_assert_eq!(victim, Some(*expected));
                tier.tenants.release(*expected, Departure::Evicted);
            }
        }
    }
}
