//! Ghosts: what is remembered of blocks that were evicted, so that a policy notices their return.

/// No entry.
const NONE: u32 = 0;

#[derive(Debug, Clone, Copy)]
struct Ghost<T> {
    fingerprint: u64,
    facts: T,
    /// It has not come back.
    is_away: bool,
}

/// The last evicted blocks, as many as it was made for, each with facts `T`. A block that comes
/// back leaves a gap that ages with the others: what is remembered is a window over evictions.
///
/// All memory is taken at the beginning; every operation is O(1) on average.
#[derive(Debug)]
pub(super) struct Ghosts<T> {
    /// The ghosts in the order of their eviction, round and round.
    ring: Box<[Ghost<T>]>,
    /// Where the next one goes.
    next: u32,
    /// Entries of the ring that were written since the oldest one was forgotten.
    span: u32,
    /// Those that are away.
    len: u32,
    /// Positions in the ring plus 1, by fingerprint: open addressing, at most half full.
    index: Box<[u32]>,
}

impl<T: Copy + Default> Ghosts<T> {
    /// Remembers the last `capacity` evictions.
    pub(super) fn new(capacity: u32) -> Self {
        let capacity = capacity.max(1);
        let empty = Ghost { fingerprint: 0, facts: T::default(), is_away: false };
        Self {
            ring: vec![empty; capacity as usize].into_boxed_slice(),
            next: 0,
            span: 0,
            len: 0,
            index: vec![NONE; (capacity as usize * 2).next_power_of_two()].into_boxed_slice(),
        }
    }

    /// Blocks that are remembered.
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    fn home(&self, fingerprint: u64) -> usize {
        // The upper half: a tier's own index may use the lower one.
        (fingerprint >> 32) as usize & (self.index.len() - 1)
    }

    /// Where the index names this block.
    fn find(&self, fingerprint: u64) -> Option<usize> {
        let mut at = self.home(fingerprint);
        loop {
            let position = self.index[at].checked_sub(1)?;
            if self.ring[position as usize].fingerprint == fingerprint {
                return Some(at);
            }
            at = (at + 1) & (self.index.len() - 1);
        }
    }

    /// Remembers an evicted block. Returns the facts of those that are forgotten for it: an older
    /// ghost of the same fingerprint, and the oldest one.
    pub(super) fn push(&mut self, fingerprint: u64, facts: T) -> [Option<T>; 2] {
        let replaced = self.take(fingerprint);
        let forgotten = if self.span == self.ring.len() as u32 { self.pop() } else { None };
        let position = self.next;
        self.ring[position as usize] = Ghost { fingerprint, facts, is_away: true };
        self.next = (self.next + 1) % self.ring.len() as u32;
        self.span += 1;
        self.len += 1;
        let mut at = self.home(fingerprint);
        while self.index[at] != NONE {
            at = (at + 1) & (self.index.len() - 1);
        }
        self.index[at] = position + 1;
        [replaced, forgotten]
    }

    /// Forgets the oldest eviction of the window. Returns its facts, unless its block came back.
    pub(super) fn pop(&mut self) -> Option<T> {
        if self.span == 0 {
            return None;
        }
        let oldest = (self.next + self.ring.len() as u32 - self.span) % self.ring.len() as u32;
        self.span -= 1;
        let Ghost { fingerprint, is_away, .. } = self.ring[oldest as usize];
        if is_away { self.take(fingerprint) } else { None }
    }

    /// A block comes back: what was remembered of it.
    pub(super) fn take(&mut self, fingerprint: u64) -> Option<T> {
        let at = self.find(fingerprint)?;
        let position = (self.index[at] - 1) as usize;
        self.unindex(at);
        self.ring[position].is_away = false;
        self.len -= 1;
        Some(self.ring[position].facts)
    }

    /// Empties an entry of the index. Entries behind it move up, so that no gap ends another
    /// block's search early.
    fn unindex(&mut self, mut gap: usize) {
        let mask = self.index.len() - 1;
        let mut at = gap;
        loop {
            at = (at + 1) & mask;
            let Some(position) = self.index[at].checked_sub(1) else { break };
            let home = self.home(self.ring[position as usize].fingerprint);
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(gap) & mask {
                self.index[gap] = self.index[at];
                gap = at;
            }
        }
        self.index[gap] = NONE;
    }

    /// Bytes of memory taken.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.ring) + size_of_val(&*self.index)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn is_a_window_over_evictions(
            capacity in 1_u32..12,
            steps in prop::collection::vec((0_u8..8, 0_u64..20), 0..400),
        ) {
            let mut ghosts: Ghosts<u32> = Ghosts::new(capacity);
            // Evictions, oldest first; `None`: the block came back.
            let mut model: VecDeque<Option<(u64, u32)>> = VecDeque::new();
            // Equal upper halves for many, so that they collide.
            let named = |number: u64| number | (number % 3) << 32;
            for (clock, (step, number)) in steps.into_iter().enumerate() {
                let (fingerprint, clock) = (named(number), clock as u32);
                let known = model.iter().position(|it| it.is_some_and(|(held, _)| held == fingerprint));
                match step {
                    0..=3 => {
                        let replaced = known.and_then(|at| model[at].take()).map(|(_, facts)| facts);
                        let oldest = if model.len() == capacity as usize { model.pop_front().flatten() } else { None };
                        model.push_back(Some((fingerprint, clock)));
                        let forgotten = oldest.map(|(_, facts)| facts);
                        prop_assert_eq!(ghosts.push(fingerprint, clock), [replaced, forgotten]);
                    }
                    4..=6 => {
                        let expected = known.and_then(|at| model[at].take()).map(|(_, facts)| facts);
                        prop_assert_eq!(ghosts.take(fingerprint), expected);
                    }
                    _ => {
                        let expected = model.pop_front().flatten().map(|(_, facts)| facts);
                        prop_assert_eq!(ghosts.pop(), expected);
                    }
                }
                prop_assert_eq!(ghosts.len() as usize, model.iter().flatten().count());
            }
        }
    }
}
