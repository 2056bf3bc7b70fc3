//! Blocks that may be evicted, in segments, and segments in the order of their worth.

use super::super::rings::Rings;
use super::OUT;
use super::ages::AGE_RANGES;
use super::history::CLASSES;
use crate::policy::Index;

/// The segment of what goes first whatever it is.
pub(super) const COLD: u16 = (CLASSES * AGE_RANGES) as u16;

const SEGMENTS: usize = COLD as usize + 1;

/// Words of a set of segments.
const WORDS: usize = SEGMENTS.div_ceil(64);

/// A list for each class and range of ages, the longest unused first, and one for what goes first.
#[derive(Debug)]
pub(super) struct RankedSegments {
    lists: Rings,
    /// Segments from the least to the most worth, and where each stands there.
    by_rank: Box<[u16]>,
    ranks: Box<[u16]>,
    /// Ranks whose segments hold something.
    occupied: [u64; WORDS],
    /// The rank that is looked at next for blocks that have grown older.
    look: usize,
    len: usize,
}

impl RankedSegments {
    /// Empty segments over `places` places, of this worth.
    pub(super) fn new(places: u32, worth: &[f64]) -> Self {
        let mut segments = Self {
            lists: Rings::new(places, SEGMENTS as u32),
            by_rank: (0..SEGMENTS as u16).collect(),
            ranks: vec![0; SEGMENTS].into_boxed_slice(),
            occupied: [0; WORDS],
            look: 0,
            len: 0,
        };
        segments.rank(worth);
        segments
    }

    /// Orders segments by their worth. Of equal ones the older goes first.
    pub(super) fn rank(&mut self, worth: &[f64]) {
        let of = |segment: u16| worth.get(usize::from(segment)).copied().unwrap_or(f64::NEG_INFINITY);
        self.by_rank.sort_unstable_by(|one, other| {
            let by_age = || (other % AGE_RANGES as u16).cmp(&(one % AGE_RANGES as u16)).then(one.cmp(other));
            of(*one).total_cmp(&of(*other)).then_with(by_age)
        });
        self.occupied = [0; WORDS];
        for (rank, segment) in self.by_rank.iter().enumerate() {
            self.ranks[usize::from(*segment)] = rank as u16;
            if self.lists.len(u32::from(*segment)) > 0 {
                self.occupied[rank / 64] |= 1 << (rank % 64);
            }
        }
    }

    fn note(&mut self, segment: u16) {
        let rank = usize::from(self.ranks[usize::from(segment)]);
        let bit = 1 << (rank % 64);
        if self.lists.len(u32::from(segment)) > 0 {
            self.occupied[rank / 64] |= bit;
        } else {
            self.occupied[rank / 64] &= !bit;
        }
    }

    /// The first rank from this one on whose segment holds something.
    fn occupied_from(&self, rank: usize) -> Option<usize> {
        let mut word = rank / 64;
        let mut bits = self.occupied.get(word)? & (u64::MAX << (rank % 64));
        while bits == 0 {
            word += 1;
            bits = *self.occupied.get(word)?;
        }
        Some(word * 64 + bits.trailing_zeros() as usize)
    }

    /// Puts a place that is in no segment to the hot end of this one.
    pub(super) fn push_hot(&mut self, segment: u16, place: u32) {
        self.lists.push_hot(u32::from(segment), place);
        self.entered(segment);
    }

    /// Puts a place that is in no segment to the cold end of this one.
    pub(super) fn push_cold(&mut self, segment: u16, place: u32) {
        self.lists.push_cold(u32::from(segment), place);
        self.entered(segment);
    }

    /// Puts a place that is in no segment next to one in this segment, on its hotter side.
    pub(super) fn push_hotter(&mut self, segment: u16, place: u32, than: u32) {
        self.lists.push_hotter(u32::from(segment), place, than);
        self.entered(segment);
    }

    fn entered(&mut self, segment: u16) {
        self.len += 1;
        self.note(segment);
    }

    /// Takes a place out of its segment, which is this one.
    pub(super) fn take(&mut self, segment: u16, place: u32) {
        self.lists.take(u32::from(segment), place);
        self.len -= 1;
        self.note(segment);
    }

    /// Whether the place is in a segment.
    pub(super) fn holds(&self, place: u32) -> bool {
        place != OUT && self.lists.holds(place)
    }

    /// Places in all segments.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The longest unused place of a segment.
    pub(super) fn coldest(&self, segment: u16) -> Option<u32> {
        self.lists.coldest(u32::from(segment))
    }

    /// All places, those of the segment with the least worth first.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let ranks = std::iter::successors(self.occupied_from(0), |rank| self.occupied_from(rank + 1));
        ranks.flat_map(|rank| self.lists.iter(u32::from(self.by_rank[rank])))
    }

    /// The segment whose turn it is, of those that hold something; in the order of their ranks,
    /// round and round.
    pub(super) fn next_to_look_at(&mut self) -> Option<u16> {
        self.look = self.occupied_from(self.look).or_else(|| self.occupied_from(0))?;
        Some(self.by_rank[self.look])
    }

    /// It is the next segment's turn.
    pub(super) fn look_further(&mut self) {
        self.look += 1;
    }

    /// Asks the processor to fetch a place's links.
    pub(super) fn prefetch<I: Index>(&self, place: I) {
        self.lists.prefetch(place);
    }

    /// Bytes of memory taken.
    pub(super) fn bytes(&self) -> usize {
        self.lists.bytes() + size_of_val(&*self.by_rank) + size_of_val(&*self.ranks)
    }
}
