//! Least recently used, in O(1).
//!
//! Guarantee: the block to evict is the one that was not used for the longest time; a cache of n
//! blocks misses at most n times as often as the best possible one, and never more often than a
//! smaller one of its kind. A scan of n blocks empties it.

use std::marker::PhantomData;

use super::rings::Rings;
use super::{Block, Departure, Eviction, Heat, Index, Touch};
use crate::invariant;

/// The only list.
const ALL: u32 = 0;

/// One list, the longest unused first. [`Eviction::coldest`] is the exact order of victims.
#[derive(Debug)]
pub struct Lru<I> {
    ring: Rings,
    places: PhantomData<I>,
}

impl<I: Index> Lru<I> {
    /// A policy for `places` places, none of which may be evicted yet.
    pub fn new(places: u32) -> Self {
        Self { ring: Rings::new(places, 1), places: PhantomData }
    }

    /// Places from the one to evict first to the one to evict last.
    pub fn iter(&self) -> impl Iterator<Item = I> + '_ {
        self.ring.iter(ALL).map(I::from_number)
    }
}

impl<I: Index> Eviction<I> for Lru<I> {
    fn assign(&mut self, _place: I, _block: &Block<I>) {}

    fn release(&mut self, place: I, _departure: Departure) {
        self.remove(place);
    }

    fn insert(&mut self, place: I, heat: Heat) {
        if !invariant!(!self.holds(place), "{place:?} enters the order of eviction twice") {
            return;
        }
        match heat {
            Heat::Hot => self.ring.push_hot(ALL, place.number()),
            Heat::Cold => self.ring.push_cold(ALL, place.number()),
        }
    }

    fn remove(&mut self, place: I) {
        if self.holds(place) {
            self.ring.take(ALL, place.number());
        }
    }

    fn touch(&mut self, place: I, _touch: Touch) {
        if self.holds(place) {
            self.ring.take(ALL, place.number());
            self.ring.push_hot(ALL, place.number());
        }
    }

    fn victim(&mut self, may: &dyn Fn(I) -> bool) -> Option<I> {
        self.iter().find(|place| may(*place))
    }

    fn coldest(&self, visit: &mut dyn FnMut(I) -> bool) {
        self.iter().all(visit);
    }

    fn is_by_last_use(&self) -> bool {
        true
    }

    fn holds(&self, place: I) -> bool {
        self.ring.holds(place.number())
    }

    fn len(&self) -> usize {
        self.ring.len(ALL) as usize
    }

    fn prefetch(&self, place: I) {
        self.ring.prefetch(place);
    }

    fn bytes(&self) -> usize {
        self.ring.bytes()
    }
}

#[cfg(test)]
mod tests {
    use kvcellar_block::SlotIndex;

    use super::*;

    fn order(lru: &Lru<SlotIndex>) -> Vec<u32> {
        lru.iter().map(|slot| slot.0).collect()
    }

    #[test]
    fn the_longest_unused_goes_first() {
        let mut lru = Lru::new(4);
        assert_eq!(lru.victim(&|_| true), None);
        for slot in 0..4 {
            lru.insert(SlotIndex(slot), Heat::Hot);
        }
        lru.touch(SlotIndex(0), Touch::Fresh);
        assert_eq!(order(&lru), [1, 2, 3, 0]);
        assert_eq!(lru.victim(&|_| true), Some(SlotIndex(1)));
        lru.remove(SlotIndex(1));
        lru.remove(SlotIndex(1));
        assert_eq!((lru.victim(&|_| true), lru.len()), (Some(SlotIndex(2)), 3));
        lru.insert(SlotIndex(1), Heat::Cold);
        assert_eq!(order(&lru), [1, 2, 3, 0]);
    }
}
