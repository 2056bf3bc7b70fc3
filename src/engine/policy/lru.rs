//! Least recently used, in O(1): a ring of links over the numbers of places.

use std::marker::PhantomData;

use super::{Eviction, Heat, Index};
use crate::invariant;

const OUT: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Link {
    colder: u32,
    hotter: u32,
}

/// A doubly linked ring through one sentinel, which is the last element of `links`.
#[derive(Debug)]
pub struct Lru<I> {
    links: Box<[Link]>,
    len: usize,
    places: PhantomData<I>,
}

impl<I: Index> Lru<I> {
    /// A policy for `places` places, none of which may be evicted yet.
    pub fn new(places: u32) -> Self {
        let mut links = vec![Link { colder: OUT, hotter: OUT }; places as usize + 1].into_boxed_slice();
        links[places as usize] = Link { colder: places, hotter: places };
        Self { links, len: 0, places: PhantomData }
    }

    fn sentinel(&self) -> u32 {
        self.links.len() as u32 - 1
    }

    fn put_after(&mut self, colder: u32, place: u32) {
        let hotter = self.links[colder as usize].hotter;
        self.links[place as usize] = Link { colder, hotter };
        self.links[colder as usize].hotter = place;
        self.links[hotter as usize].colder = place;
    }

    fn take_out(&mut self, place: u32) {
        let Link { colder, hotter } = self.links[place as usize];
        self.links[colder as usize].hotter = hotter;
        self.links[hotter as usize].colder = colder;
        self.links[place as usize] = Link { colder: OUT, hotter: OUT };
    }

    /// Places from the one to evict first to the one to evict last.
    pub fn iter(&self) -> impl Iterator<Item = I> + '_ {
        let sentinel = self.sentinel();
        let next = move |place: u32| (place != sentinel).then_some(place);
        std::iter::successors(next(self.links[sentinel as usize].hotter), move |place| {
            next(self.links[*place as usize].hotter)
        })
        .map(I::from_number)
    }
}

impl<I: Index> Eviction<I> for Lru<I> {
    fn insert(&mut self, place: I, heat: Heat) {
        if !invariant!(!self.holds(place), "{place:?} enters the order of eviction twice") {
            return;
        }
        let sentinel = self.sentinel();
        let colder = match heat {
            Heat::Hot => self.links[sentinel as usize].colder,
            Heat::Cold => sentinel,
        };
        self.put_after(colder, place.number());
        self.len += 1;
    }

    fn remove(&mut self, place: I) {
        if self.holds(place) {
            self.take_out(place.number());
            self.len -= 1;
        }
    }

    fn touch(&mut self, place: I) {
        if self.holds(place) {
            self.take_out(place.number());
            self.put_after(self.links[self.sentinel() as usize].colder, place.number());
        }
    }

    fn victim(&self, may: &dyn Fn(I) -> bool) -> Option<I> {
        self.iter().find(|place| may(*place))
    }

    fn holds(&self, place: I) -> bool {
        self.links[place.number() as usize].hotter != OUT
    }

    fn len(&self) -> usize {
        self.len
    }

    fn order(&self) -> Vec<I> {
        self.iter().collect()
    }

    fn prefetch(&self, place: I) {
        // A plain read of the link would stall; reading its address is enough for the compiler to
        // emit nothing on other machines.
        kvcellar_block::prefetch(&self.links[place.number() as usize]);
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
        lru.touch(SlotIndex(0));
        assert_eq!(order(&lru), [1, 2, 3, 0]);
        assert_eq!(lru.victim(&|_| true), Some(SlotIndex(1)));
        lru.remove(SlotIndex(1));
        lru.remove(SlotIndex(1));
        assert_eq!((lru.victim(&|_| true), lru.len()), (Some(SlotIndex(2)), 3));
        lru.insert(SlotIndex(1), Heat::Cold);
        assert_eq!(order(&lru), [1, 2, 3, 0]);
    }
}
