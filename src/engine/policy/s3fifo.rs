//! S3-FIFO: three queues. New blocks pass through a small one and are evicted from there unless
//! they are used; what is used moves to the main one; ghosts tell which evictions were wrong.
//!
//! Guarantee: a block that is used once, by one request, takes at most the small queue's tenth of
//! the places once the main queue is full, so that a scan does not empty the cache. A decision is
//! O(1) on average: each step of a search that does not find a victim uses up one use of a block.
//!
//! A block that was held comes back to the hot end of its queue.

use std::marker::PhantomData;

use super::ghosts::Ghosts;
use super::rings::Rings;
use super::{Block, Departure, Eviction, Heat, Index, Touch};
use crate::invariant;

const SMALL: u32 = 0;
const MAIN: u32 = 1;

/// The small queue's share: one of so many places.
const SMALL_SHARE: u32 = 10;

/// Uses that are counted at most.
const USES_MAX: u8 = 3;

/// Uses that move a block from the small to the main queue.
const USES_TO_STAY: u8 = 2;

#[derive(Debug, Clone, Copy, Default)]
struct Queued {
    fingerprint: u64,
    queue: u32,
    uses: u8,
}

/// The queues. [`Eviction::coldest`] begins with the next victim; it shows the queue that is
/// evicted from before the other, and within a queue blocks with fewer uses first.
#[derive(Debug)]
pub struct S3Fifo<I> {
    queues: Rings,
    facts: Box<[Queued]>,
    ghosts: Ghosts<()>,
    small_places: u32,
    places: PhantomData<I>,
}

impl<I: Index> S3Fifo<I> {
    /// A policy for `places` places, none of which may be evicted yet.
    pub fn new(places: u32) -> Self {
        Self {
            queues: Rings::new(places, 2),
            facts: vec![Queued::default(); places as usize].into_boxed_slice(),
            ghosts: Ghosts::new(places),
            small_places: (places / SMALL_SHARE).max(1),
            places: PhantomData,
        }
    }

    fn uses(&self, place: u32) -> u8 {
        self.facts[place as usize].uses
    }

    fn is_small_first(&self) -> bool {
        self.queues.len(SMALL) >= self.small_places || self.queues.len(MAIN) == 0
    }

    /// The next victim in the small queue. What was used on the way to it moves to the main one.
    fn small_victim(&mut self, may: &dyn Fn(I) -> bool) -> Option<I> {
        let mut next = self.queues.coldest(SMALL);
        while let Some(place) = next {
            next = self.queues.hotter(place);
            if !may(I::from_number(place)) {
                continue;
            }
            if self.uses(place) < USES_TO_STAY {
                return Some(I::from_number(place));
            }
            self.queues.take(SMALL, place);
            self.queues.push_hot(MAIN, place);
            (self.facts[place as usize].queue, self.facts[place as usize].uses) = (MAIN, 0);
        }
        None
    }

    /// The next victim in the main queue. What was used on the way to it goes round once more.
    fn main_victim(&mut self, may: &dyn Fn(I) -> bool) -> Option<I> {
        for _ in 0..=USES_MAX {
            let mut next = self.queues.coldest(MAIN);
            for _ in 0..self.queues.len(MAIN) {
                let Some(place) = next else { break };
                next = self.queues.hotter(place);
                if !may(I::from_number(place)) {
                    continue;
                }
                if self.uses(place) == 0 {
                    return Some(I::from_number(place));
                }
                self.queues.take(MAIN, place);
                self.queues.push_hot(MAIN, place);
                self.facts[place as usize].uses -= 1;
            }
        }
        None
    }
}

impl<I: Index> Eviction<I> for S3Fifo<I> {
    fn assign(&mut self, place: I, block: &Block<I>) {
        let came_back = self.ghosts.take(block.fingerprint).is_some();
        self.facts[place.number() as usize] =
            Queued { fingerprint: block.fingerprint, queue: if came_back { MAIN } else { SMALL }, uses: 0 };
    }

    fn release(&mut self, place: I, departure: Departure) {
        self.remove(place);
        let Queued { fingerprint, queue, .. } = self.facts[place.number() as usize];
        if departure == Departure::Evicted && queue == SMALL {
            self.ghosts.push(fingerprint, ());
        }
    }

    fn insert(&mut self, place: I, heat: Heat) {
        if !invariant!(!self.holds(place), "{place:?} enters the order of eviction twice") {
            return;
        }
        let facts = &mut self.facts[place.number() as usize];
        match heat {
            Heat::Hot => self.queues.push_hot(facts.queue, place.number()),
            Heat::Cold => {
                facts.uses = 0;
                self.queues.push_cold(facts.queue, place.number());
            }
        }
    }

    fn remove(&mut self, place: I) {
        if self.holds(place) {
            self.queues.take(self.facts[place.number() as usize].queue, place.number());
        }
    }

    fn touch(&mut self, place: I, touch: Touch) {
        if touch == Touch::Fresh {
            let facts = &mut self.facts[place.number() as usize];
            facts.uses = (facts.uses + 1).min(USES_MAX);
        }
    }

    fn victim(&mut self, may: &dyn Fn(I) -> bool) -> Option<I> {
        if self.is_small_first() {
            self.small_victim(may).or_else(|| self.main_victim(may))
        } else {
            self.main_victim(may).or_else(|| self.small_victim(may))
        }
    }

    fn coldest(&self, visit: &mut dyn FnMut(I) -> bool) {
        let mut show = |queue: u32, least: u8, most: u8| {
            let of_these = |place: &u32| (least..=most).contains(&self.uses(*place));
            self.queues.iter(queue).filter(of_these).all(|place| visit(I::from_number(place)))
        };
        let small = [(SMALL, 0, USES_TO_STAY - 1)].into_iter();
        let main = (0..=USES_MAX).map(|uses| (MAIN, uses, uses));
        let used = [(SMALL, USES_TO_STAY, USES_MAX)];
        if self.is_small_first() {
            small.chain(main).chain(used).all(|(queue, least, most)| show(queue, least, most));
        } else {
            main.chain(small).chain(used).all(|(queue, least, most)| show(queue, least, most));
        }
    }

    fn holds(&self, place: I) -> bool {
        self.queues.holds(place.number())
    }

    fn len(&self) -> usize {
        (self.queues.len(SMALL) + self.queues.len(MAIN)) as usize
    }

    fn prefetch(&self, place: I) {
        self.queues.prefetch(place);
        kvcellar_block::prefetch(&self.facts[place.number() as usize]);
    }

    fn bytes(&self) -> usize {
        self.queues.bytes() + size_of_val(&*self.facts) + self.ghosts.bytes()
    }
}
