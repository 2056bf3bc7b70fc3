//! ARC: two lists, of blocks used once and of blocks used more often, whose shares follow what
//! comes back: a block that was evicted from one of them and is wanted again makes that list
//! larger.
//!
//! Guarantee: a scan passes through the first list and leaves the second alone; each list is in the
//! order of last use; the share moves by at least one place for each ghost that returns, so that it
//! crosses its whole range within as many returns as there are places. O(1).
//!
//! Two things differ from the published algorithm, because a tier makes room before it says for
//! what: the share moves after the victim was chosen, and a tie at the share does not look at the
//! block that comes. Ghosts are windows over the last evictions from each list.

use std::marker::PhantomData;

use super::ghosts::Ghosts;
use super::rings::Rings;
use super::{Block, Departure, Eviction, Heat, Index, Touch};
use crate::invariant;

const ONCE: u32 = 0;
const OFTEN: u32 = 1;

#[derive(Debug, Clone, Copy, Default)]
struct Listed {
    fingerprint: u64,
    list: u32,
}

/// The lists and their ghosts. [`Eviction::coldest`] begins with the next victim and shows the list
/// that is evicted from before the other.
#[derive(Debug)]
pub struct Arc<I> {
    lists: Rings,
    facts: Box<[Listed]>,
    /// Evicted from the list of this number.
    ghosts: [Ghosts<()>; 2],
    /// Blocks of each list, those that may not be evicted now included.
    held: [u32; 2],
    /// Places that blocks used once may take.
    share: u32,
    places: PhantomData<I>,
}

impl<I: Index> Arc<I> {
    /// A policy for `places` places, none of which may be evicted yet.
    pub fn new(places: u32) -> Self {
        Self {
            lists: Rings::new(places, 2),
            facts: vec![Listed::default(); places as usize].into_boxed_slice(),
            ghosts: [Ghosts::new(places), Ghosts::new(places)],
            held: [0; 2],
            share: 0,
            places: PhantomData,
        }
    }

    fn capacity(&self) -> u32 {
        self.facts.len() as u32
    }

    /// The list to evict from, then the other.
    fn lists_in_turn(&self) -> [u32; 2] {
        if self.lists.len(ONCE) > self.share || self.lists.len(OFTEN) == 0 { [ONCE, OFTEN] } else { [OFTEN, ONCE] }
    }

    /// Moves the share towards a list whose ghost came back.
    fn favour(&mut self, list: u32) {
        let [once, often] = [self.ghosts[0].len() + 1, self.ghosts[1].len() + 1];
        self.share = if list == ONCE {
            (self.share + (often / once).max(1)).min(self.capacity())
        } else {
            self.share.saturating_sub((once / often).max(1))
        };
    }

    fn move_to(&mut self, place: I, list: u32) {
        let number = place.number();
        let before = std::mem::replace(&mut self.facts[number as usize].list, list);
        self.held[before as usize] -= 1;
        self.held[list as usize] += 1;
        if self.holds(place) {
            self.lists.take(before, number);
            self.lists.push_hot(list, number);
        }
    }

    /// Forgets what a cache of twice as many places would not hold.
    fn trim(&mut self) {
        let places = self.capacity();
        while self.ghosts[0].len() > 0 && self.held[0] + self.ghosts[0].len() > places {
            self.ghosts[0].pop();
        }
        let all = |arc: &Self| arc.held[0] + arc.held[1] + arc.ghosts[0].len() + arc.ghosts[1].len();
        while self.ghosts[1].len() > 0 && all(self) > places.saturating_mul(2) {
            self.ghosts[1].pop();
        }
    }
}

impl<I: Index> Eviction<I> for Arc<I> {
    fn assign(&mut self, place: I, block: &Block<I>) {
        let mut list = ONCE;
        for from in [ONCE, OFTEN] {
            if self.ghosts[from as usize].take(block.fingerprint).is_some() {
                self.favour(from);
                list = OFTEN;
            }
        }
        self.facts[place.number() as usize] = Listed { fingerprint: block.fingerprint, list };
        self.held[list as usize] += 1;
        self.trim();
    }

    fn release(&mut self, place: I, departure: Departure) {
        self.remove(place);
        let Listed { fingerprint, list } = self.facts[place.number() as usize];
        self.held[list as usize] -= 1;
        if departure == Departure::Evicted {
            self.ghosts[list as usize].push(fingerprint, ());
            self.trim();
        }
    }

    fn insert(&mut self, place: I, heat: Heat) {
        if !invariant!(!self.holds(place), "{place:?} enters the order of eviction twice") {
            return;
        }
        let list = self.facts[place.number() as usize].list;
        match heat {
            Heat::Hot => self.lists.push_hot(list, place.number()),
            Heat::Cold => self.lists.push_cold(list, place.number()),
        }
    }

    fn remove(&mut self, place: I) {
        if self.holds(place) {
            self.lists.take(self.facts[place.number() as usize].list, place.number());
        }
    }

    fn touch(&mut self, place: I, touch: Touch) {
        let list = if touch == Touch::Fresh { OFTEN } else { self.facts[place.number() as usize].list };
        self.move_to(place, list);
    }

    fn victim(&mut self, may: &dyn Fn(I) -> bool) -> Option<I> {
        let mut in_turn = self.lists_in_turn().into_iter().flat_map(|list| self.lists.iter(list)).map(I::from_number);
        in_turn.find(|place| may(*place))
    }

    fn coldest(&self, visit: &mut dyn FnMut(I) -> bool) {
        let in_turn = self.lists_in_turn().into_iter().flat_map(|list| self.lists.iter(list));
        in_turn.map(I::from_number).all(visit);
    }

    fn holds(&self, place: I) -> bool {
        self.lists.holds(place.number())
    }

    fn len(&self) -> usize {
        (self.lists.len(ONCE) + self.lists.len(OFTEN)) as usize
    }

    fn prefetch(&self, place: I) {
        self.lists.prefetch(place);
        kvcellar_block::prefetch(&self.facts[place.number() as usize]);
    }

    fn bytes(&self) -> usize {
        self.lists.bytes() + size_of_val(&*self.facts) + self.ghosts.iter().map(Ghosts::bytes).sum::<usize>()
    }
}
