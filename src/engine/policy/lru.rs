//! Least recently used, in O(1): a ring of links over slot numbers.

use super::{Eviction, Heat};
use crate::invariant;
use kvcellar_block::SlotIndex;

const OUT: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Link {
    colder: u32,
    hotter: u32,
}

/// A doubly linked ring through one sentinel, which is the last element of `links`.
#[derive(Debug)]
pub struct Lru {
    links: Box<[Link]>,
    len: usize,
}

impl Lru {
    /// A policy for `slots` slots, none of which may be evicted yet.
    pub fn new(slots: u32) -> Self {
        let mut links = vec![Link { colder: OUT, hotter: OUT }; slots as usize + 1].into_boxed_slice();
        links[slots as usize] = Link { colder: slots, hotter: slots };
        Self { links, len: 0 }
    }

    fn sentinel(&self) -> u32 {
        self.links.len() as u32 - 1
    }

    fn put_after(&mut self, colder: u32, slot: u32) {
        let hotter = self.links[colder as usize].hotter;
        self.links[slot as usize] = Link { colder, hotter };
        self.links[colder as usize].hotter = slot;
        self.links[hotter as usize].colder = slot;
    }

    fn take_out(&mut self, slot: u32) {
        let Link { colder, hotter } = self.links[slot as usize];
        self.links[colder as usize].hotter = hotter;
        self.links[hotter as usize].colder = colder;
        self.links[slot as usize] = Link { colder: OUT, hotter: OUT };
    }

    /// Slots from the one to evict first to the one to evict last.
    pub fn iter(&self) -> impl Iterator<Item = SlotIndex> + '_ {
        let sentinel = self.sentinel();
        let next = move |slot: u32| (slot != sentinel).then_some(slot);
        std::iter::successors(next(self.links[sentinel as usize].hotter), move |slot| {
            next(self.links[*slot as usize].hotter)
        })
        .map(SlotIndex)
    }
}

impl Eviction for Lru {
    fn insert(&mut self, slot: SlotIndex, heat: Heat) {
        if !invariant!(!self.holds(slot), "{slot:?} enters the order of eviction twice") {
            return;
        }
        let sentinel = self.sentinel();
        let colder = match heat {
            Heat::Hot => self.links[sentinel as usize].colder,
            Heat::Cold => sentinel,
        };
        self.put_after(colder, slot.0);
        self.len += 1;
    }

    fn remove(&mut self, slot: SlotIndex) {
        if self.holds(slot) {
            self.take_out(slot.0);
            self.len -= 1;
        }
    }

    fn touch(&mut self, slot: SlotIndex) {
        if self.holds(slot) {
            self.take_out(slot.0);
            self.put_after(self.links[self.sentinel() as usize].colder, slot.0);
        }
    }

    fn victim(&self, may: &dyn Fn(SlotIndex) -> bool) -> Option<SlotIndex> {
        self.iter().find(|slot| may(*slot))
    }

    fn holds(&self, slot: SlotIndex) -> bool {
        self.links[slot.0 as usize].hotter != OUT
    }

    fn len(&self) -> usize {
        self.len
    }

    fn order(&self) -> Vec<SlotIndex> {
        self.iter().collect()
    }

    fn prefetch(&self, slot: SlotIndex) {
        // A plain read of the link would stall; reading its address is enough for the compiler to
        // emit nothing on other machines.
        kvcellar_block::prefetch(&self.links[slot.0 as usize]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(lru: &Lru) -> Vec<u32> {
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
