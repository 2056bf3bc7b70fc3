//! LRFU: each use of a block counts, and counts for less the longer ago it was.
//!
//! Guarantee: the block to evict is the one with the smallest sum of its uses, each halved once for
//! every [`HALF_LIFE`] times as many uses of blocks as there are places. A use is never worth more
//! than a later one. O(log n): a heap over places, because two blocks that are not used keep their
//! order however much time passes.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::marker::PhantomData;

use super::{Block, Departure, Eviction, Heat, Index, Touch};
use crate::invariant;

/// Half-life of a use, in uses of blocks for each place.
pub const HALF_LIFE: f64 = 4.0;

const OUT: u32 = u32::MAX;

/// What orders blocks: the sum of uses, as a binary logarithm and as if it had been taken when time
/// began; then the order in which they were touched.
#[derive(Debug, Clone, Copy)]
struct Rank {
    weight: f64,
    stamp: u64,
}

impl Rank {
    fn is_colder(self, other: Self) -> bool {
        self < other
    }
}

impl Ord for Rank {
    fn cmp(&self, other: &Self) -> Ordering {
        self.weight.total_cmp(&other.weight).then(self.stamp.cmp(&other.stamp))
    }
}

impl PartialOrd for Rank {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Rank {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Rank {}

#[derive(Debug, Clone, Copy)]
struct Weighed {
    rank: Rank,
    /// Uses of blocks when this one was touched last, and the logarithm of the sum of its uses
    /// then.
    touched: u64,
    sum: f64,
    /// Where the heap has it.
    position: u32,
}

/// A heap of places, the coldest at its root. [`Eviction::coldest`] is the exact order of victims.
#[derive(Debug)]
pub struct Lrfu<I> {
    facts: Box<[Weighed]>,
    heap: Box<[u32]>,
    len: u32,
    /// Uses of blocks so far.
    clock: u64,
    /// Touches so far.
    stamps: u64,
    /// Halvings for each use of a block.
    decay: f64,
    places: PhantomData<I>,
}

impl<I: Index> Lrfu<I> {
    /// A policy for `places` places, none of which may be evicted yet.
    pub fn new(places: u32) -> Self {
        let facts = Weighed { rank: Rank { weight: 0.0, stamp: 0 }, touched: 0, sum: 0.0, position: OUT };
        Self {
            facts: vec![facts; places as usize].into_boxed_slice(),
            heap: vec![OUT; places as usize].into_boxed_slice(),
            len: 0,
            clock: 0,
            stamps: 0,
            decay: 1.0 / (HALF_LIFE * f64::from(places.max(1))),
            places: PhantomData,
        }
    }

    fn stamp(&mut self) -> u64 {
        self.stamps += 1;
        self.stamps
    }

    fn rank(&self, at: u32) -> Rank {
        self.facts[self.heap[at as usize] as usize].rank
    }

    fn put(&mut self, at: u32, place: u32) {
        self.heap[at as usize] = place;
        self.facts[place as usize].position = at;
    }

    fn swap(&mut self, one: u32, other: u32) {
        let (first, second) = (self.heap[one as usize], self.heap[other as usize]);
        self.put(one, second);
        self.put(other, first);
    }

    /// Moves what is at a position to where its rank belongs.
    fn settle(&mut self, mut at: u32) {
        while at > 0 && self.rank(at).is_colder(self.rank((at - 1) / 2)) {
            self.swap(at, (at - 1) / 2);
            at = (at - 1) / 2;
        }
        while let Some(child) = self.colder_child(at).filter(|child| self.rank(*child).is_colder(self.rank(at))) {
            self.swap(at, child);
            at = child;
        }
    }

    fn colder_child(&self, at: u32) -> Option<u32> {
        let (left, right) = (2 * at + 1, 2 * at + 2);
        if right < self.len && self.rank(right).is_colder(self.rank(left)) {
            Some(right)
        } else {
            (left < self.len).then_some(left)
        }
    }

    /// The coldest place below a position, itself included, that `may` be evicted. Looks below
    /// those only that may not.
    fn coldest_below(&self, at: u32, may: &dyn Fn(I) -> bool) -> Option<u32> {
        if at >= self.len {
            return None;
        }
        if may(I::from_number(self.heap[at as usize])) {
            return Some(at);
        }
        let found = [self.coldest_below(2 * at + 1, may), self.coldest_below(2 * at + 2, may)];
        found
            .into_iter()
            .flatten()
            .reduce(|one, other| if self.rank(other).is_colder(self.rank(one)) { other } else { one })
    }
}

impl<I: Index> Eviction<I> for Lrfu<I> {
    fn assign(&mut self, place: I, _block: &Block<I>) {
        self.clock += 1;
        let weight = self.clock as f64 * self.decay;
        let stamp = self.stamp();
        let facts = &mut self.facts[place.number() as usize];
        (facts.rank, facts.touched, facts.sum) = (Rank { weight, stamp }, self.clock, 0.0);
    }

    fn release(&mut self, place: I, _departure: Departure) {
        self.remove(place);
    }

    fn insert(&mut self, place: I, heat: Heat) {
        if !invariant!(!self.holds(place), "{place:?} enters the order of eviction twice") {
            return;
        }
        let stamp = self.stamp();
        let facts = &mut self.facts[place.number() as usize];
        let weight = match heat {
            Heat::Hot => facts.touched as f64 * self.decay + facts.sum,
            Heat::Cold => f64::NEG_INFINITY,
        };
        facts.rank = Rank { weight, stamp };
        self.len += 1;
        self.put(self.len - 1, place.number());
        self.settle(self.len - 1);
    }

    fn remove(&mut self, place: I) {
        if !self.holds(place) {
            return;
        }
        let at = self.facts[place.number() as usize].position;
        self.len -= 1;
        self.swap(at, self.len);
        self.facts[place.number() as usize].position = OUT;
        if at < self.len {
            self.settle(at);
        }
    }

    fn touch(&mut self, place: I, touch: Touch) {
        let fresh = touch == Touch::Fresh;
        self.clock += u64::from(fresh);
        let (clock, stamp) = (self.clock, self.stamp());
        let facts = &mut self.facts[place.number() as usize];
        if fresh {
            let aged = (clock - facts.touched) as f64 * self.decay;
            facts.sum = (1.0 + (facts.sum - aged).exp2()).log2();
        }
        // Else the last use goes on until now.
        facts.rank = Rank { weight: clock as f64 * self.decay + facts.sum, stamp };
        facts.touched = clock;
        let at = facts.position;
        if at != OUT {
            self.settle(at);
        }
    }

    fn victim(&mut self, may: &dyn Fn(I) -> bool) -> Option<I> {
        self.coldest_below(0, may).map(|at| I::from_number(self.heap[at as usize]))
    }

    fn coldest(&self, visit: &mut dyn FnMut(I) -> bool) {
        // Positions whose parents were shown: the next one is among them.
        let mut next = BinaryHeap::new();
        let shown_next = |at: u32| (at < self.len).then(|| Reverse((self.rank(at), at)));
        next.extend(shown_next(0));
        while let Some(Reverse((_, at))) = next.pop() {
            if !visit(I::from_number(self.heap[at as usize])) {
                return;
            }
            next.extend([2 * at + 1, 2 * at + 2].into_iter().filter_map(shown_next));
        }
    }

    fn holds(&self, place: I) -> bool {
        self.facts[place.number() as usize].position != OUT
    }

    fn len(&self) -> usize {
        self.len as usize
    }

    fn prefetch(&self, place: I) {
        kvcellar_block::prefetch(&self.facts[place.number() as usize]);
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.facts) + size_of_val(&*self.heap)
    }
}
