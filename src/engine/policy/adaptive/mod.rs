//! Adaptive: keeps the blocks that bring the most hits for the time that they take a place.
//!
//! Every block has a class that follows from its past (`history`). For each class the policy
//! measures how likely a block is to be used again at each age since its last use (`hazards`), on
//! blocks that it holds and on ghosts of those it evicted. From that follows what keeping a block
//! is worth now: the most uses that an epoch of its place can bring, over all times to give it up.
//! This is the Gittins index; keeping what has the largest is the best that can be done for blocks
//! whose uses do not depend on each other, with one place each. Times what a hit saves, it orders
//! classes and ages; within one, the longest unused goes first.
//!
//! Three things are built in, not learned:
//!
//! - **A suffix goes before its prefix.** A block whose next block may be evicted, too, is not
//!   chosen: it moves behind that one and waits for it. This is done once for each change of place,
//!   so that it costs O(1) on average.
//! - **Blocks of one prompt share their fate**: in one class and age they stand in the order in
//!   which they were touched, and a prefix is touched last.
//! - **What was just used stays**, for a sixteenth of the time in which every place is used once: a
//!   scan can take no more than that share.
//!
//! Guarantee: before anything was seen the order is that of LRU, and it stays so while all classes
//! come back alike and ever less with age. Nothing is tuned to a workload: the constants are the
//! resolution of ages and classes and how fast is forgotten. Ghosts are bounded
//! ([`limits::GHOSTS_PER_PLACE`]), memory is taken at the beginning, and a decision is O(1) on
//! average; what an epoch costs is spread over its uses.
//!
//! States of a place: *unknown*; *known*, which [`Eviction::assign`] and [`Eviction::release`]
//! begin and end; and *in the order* of eviction, in one segment: a class and a range of ages.

mod ages;
mod hazards;
mod history;
#[cfg(test)]
mod oracle;
mod segments;

use std::marker::PhantomData;

use self::ages::{AGE_RANGES, age_end};
use self::hazards::Hazards;
use self::history::{CLASSES, History};
use self::segments::{COLD, RankedSegments};
use super::ghosts::Ghosts;
use super::{Block, Departure, Eviction, Heat, Index, Touch};
use crate::{invariant, limits};

const OUT: u32 = u32::MAX;

/// One epoch has so many uses of blocks for each place: 1 by this number.
const EPOCHS_PER_ROUND: u32 = 16;

/// Counts are halved after so many epochs, but not before so many uses.
const HALF_LIFE_EPOCHS: f64 = 256.0;
const HALF_LIFE_USES: f64 = 20_000.0;

/// What classes and ages are worth is computed anew after so many uses, and with an epoch.
const USES_PER_ESTIMATE: u32 = 1024;

/// For each use of a block: segments that are looked at for blocks that have grown older, and
/// blocks that are moved.
const AGING_LOOKS: usize = 24;
const AGING_MOVES: usize = 6;

/// More than any index times any worth of a class.
const FRESH: f64 = 1e12;

/// Share of a new block in the mean worth of its class.
const WORTH_SHARE: f64 = 1.0 / 64.0;

/// What is known of the block in a place.
#[derive(Debug, Clone, Copy)]
struct KnownBlock {
    fingerprint: u64,
    history: History,
    /// The place of the block before it, and what its fingerprint begins with: the place may hold
    /// another one by now.
    parent: u32,
    parent_tag: u32,
    /// The place of the block after it that was used last.
    child: u32,
    segment: u16,
}

/// What each segment is worth. What was used in this epoch goes after all that was not: so soon
/// after a use nobody knows yet what follows from it, and the next turn of a conversation needs all
/// of it.
fn worth_of(hazards: &Hazards, worth: &[f64; CLASSES]) -> Box<[f64]> {
    let mut segments = hazards.indices();
    for (segments, worth) in segments.chunks_exact_mut(AGE_RANGES).zip(worth) {
        for segment in segments.iter_mut() {
            *segment *= worth;
        }
        segments[0] += FRESH;
    }
    segments
}

/// Evicted blocks that are remembered beside so many places.
fn ghosts_of(places: u32) -> u32 {
    places.saturating_mul(limits::GHOSTS_PER_PLACE).max(limits::GHOSTS_MIN)
}

fn tag(fingerprint: u64) -> u32 {
    fingerprint as u32
}

/// The policy. [`Eviction::coldest`] shows segments in the order of their worth and, within one,
/// the longest unused first; victims come in this order but for prefixes, which wait for their
/// suffix.
#[derive(Debug)]
pub struct Adaptive<I> {
    known: Box<[KnownBlock]>,
    segments: RankedSegments,
    ghosts: Ghosts<History>,
    hazards: Hazards,
    /// Mean worth of each class.
    worth: [f64; CLASSES],
    /// Uses of blocks in one epoch, and in this epoch so far.
    epoch_uses: u32,
    uses: u32,
    /// Uses after which worth is computed anew, and those since the last time.
    estimate_uses: u32,
    uses_since_estimate: u32,
    places: PhantomData<I>,
}

impl<I: Index> Adaptive<I> {
    /// A policy for `places` places, none of which may be evicted yet.
    pub fn new(places: u32) -> Self {
        Self::sized(places, ghosts_of(places), USES_PER_ESTIMATE)
    }

    /// A policy for `places` places that stand for `of` of them: it remembers as many ghosts less.
    pub fn miniature(places: u32, of: u32) -> Self {
        let ghosts = u64::from(ghosts_of(of)) * u64::from(places) / u64::from(of.max(1));
        Self::sized(places, ghosts as u32, USES_PER_ESTIMATE)
    }

    fn sized(places: u32, ghosts: u32, estimate_uses: u32) -> Self {
        let known = KnownBlock {
            fingerprint: 0,
            history: History::default(),
            parent: OUT,
            parent_tag: 0,
            child: OUT,
            segment: COLD,
        };
        let epoch_uses = (places / EPOCHS_PER_ROUND).max(1);
        let hazards = Hazards::new(HALF_LIFE_EPOCHS.max(HALF_LIFE_USES / f64::from(epoch_uses)));
        let segments = RankedSegments::new(places, &worth_of(&hazards, &[1.0; CLASSES]));
        Self {
            known: vec![known; places as usize].into_boxed_slice(),
            segments,
            ghosts: Ghosts::new(ghosts),
            hazards,
            worth: [1.0; CLASSES],
            epoch_uses,
            uses: 0,
            estimate_uses,
            uses_since_estimate: 0,
            places: PhantomData,
        }
    }

    fn at(&self, place: u32) -> &KnownBlock {
        &self.known[place as usize]
    }

    /// Time goes on by one use.
    fn tick(&mut self) {
        self.uses += 1;
        self.uses_since_estimate += 1;
        if self.uses == self.epoch_uses {
            self.uses = 0;
            self.hazards.advance();
            if self.uses_since_estimate >= self.estimate_uses {
                self.uses_since_estimate = 0;
                self.estimate();
            }
        }
        self.age();
    }

    /// Orders segments by what the counts say now.
    fn estimate(&mut self) {
        self.segments.rank(&worth_of(&self.hazards, &self.worth));
    }

    /// Moves some blocks on that have grown older than their segment is for.
    fn age(&mut self) {
        let mut moves = 0;
        for _ in 0..AGING_LOOKS {
            let Some(segment) = self.segments.next_to_look_at() else { return };
            let end = age_end(usize::from(segment) % AGE_RANGES);
            while let Some(place) = self.segments.coldest(segment) {
                let age = self.hazards.epoch().wrapping_sub(self.at(place).history.used);
                let is_last = usize::from(segment) % AGE_RANGES == AGE_RANGES - 1;
                if segment == COLD || is_last || age < end {
                    break;
                }
                if moves == AGING_MOVES {
                    return;
                }
                self.segments.take(segment, place);
                self.segments.push_hot(segment + 1, place);
                self.known[place as usize].segment = segment + 1;
                moves += 1;
            }
            self.segments.look_further();
        }
    }

    /// The place of a block's parent, if that still holds it.
    fn parent_of(&self, place: u32) -> Option<u32> {
        let KnownBlock { parent, parent_tag, .. } = *self.at(place);
        (parent != OUT && tag(self.at(parent).fingerprint) == parent_tag).then_some(parent)
    }

    /// Tells a block's parent that this is what follows it.
    fn tell_parent(&mut self, place: u32) {
        if let Some(parent) = self.parent_of(place) {
            self.known[parent as usize].child = place;
        }
    }

    /// The block that a place waits for: the next of its prefix, while that may be evicted.
    fn waits_for(&self, place: u32) -> Option<u32> {
        let child = self.at(place).child;
        (child != OUT && self.segments.holds(child) && self.parent_of(child) == Some(place)).then_some(child)
    }

    fn enter(&mut self, place: u32) {
        let segment = u16::from(self.at(place).history.class) * AGE_RANGES as u16;
        self.known[place as usize].segment = segment;
        self.segments.push_hot(segment, place);
    }

    fn leave(&mut self, place: u32) -> bool {
        let is_in = self.segments.holds(place);
        if is_in {
            self.segments.take(self.at(place).segment, place);
        }
        is_in
    }

    /// The history of a block that is used again now.
    fn on_reuse(&mut self, before: History) -> History {
        self.hazards.on_reuse(before.class, before.used);
        let after = before.go_on(self.hazards.epoch());
        self.hazards.watch(after.class);
        after
    }
}

impl<I: Index> Eviction<I> for Adaptive<I> {
    fn assign(&mut self, place: I, block: &Block<I>) {
        self.tick();
        let parent = block.parent.map(I::number);
        let history = if let Some(before) = self.ghosts.take(block.fingerprint) {
            self.on_reuse(before)
        } else {
            let above = parent.map(|parent| self.at(parent).history);
            let history = History::begin(self.hazards.epoch(), block.prompt_tokens, above);
            self.hazards.watch(history.class);
            history
        };
        let worth = &mut self.worth[usize::from(history.class)];
        *worth += (f64::from(block.worth) - *worth) * WORTH_SHARE;
        self.known[place.number() as usize] = KnownBlock {
            fingerprint: block.fingerprint,
            history,
            parent: parent.unwrap_or(OUT),
            parent_tag: parent.map_or(0, |parent| tag(self.at(parent).fingerprint)),
            child: OUT,
            segment: COLD,
        };
        self.tell_parent(place.number());
    }

    fn release(&mut self, place: I, departure: Departure) {
        let number = place.number();
        self.leave(number);
        let KnownBlock { fingerprint, history, .. } = *self.at(number);
        if let Some(parent) = self.parent_of(number)
            && self.at(parent).child == number
        {
            self.known[parent as usize].child = OUT;
        }
        let forgotten = match departure {
            Departure::Evicted => self.ghosts.push(fingerprint, history),
            Departure::Dropped => [Some(history), None],
        };
        for History { class, used, .. } in forgotten.into_iter().flatten() {
            self.hazards.on_loss(class, used);
        }
        // No child takes the place for its parent any more.
        let known = &mut self.known[number as usize];
        (known.fingerprint, known.parent, known.child) = (!fingerprint, OUT, OUT);
    }

    fn insert(&mut self, place: I, heat: Heat) {
        if !invariant!(!self.holds(place), "{place:?} enters the order of eviction twice") {
            return;
        }
        match heat {
            Heat::Hot => self.enter(place.number()),
            Heat::Cold => {
                self.known[place.number() as usize].segment = COLD;
                self.segments.push_cold(COLD, place.number());
            }
        }
    }

    fn remove(&mut self, place: I) {
        self.leave(place.number());
    }

    fn touch(&mut self, place: I, touch: Touch) {
        let number = place.number();
        let was_in = self.leave(number);
        self.tell_parent(number);
        if touch == Touch::Fresh {
            self.tick();
            self.known[number as usize].history = self.on_reuse(self.at(number).history);
        }
        if was_in {
            self.enter(number);
        }
    }

    fn victim(&mut self, may: &dyn Fn(I) -> bool) -> Option<I> {
        for _ in 0..limits::WAITS_PER_VICTIM {
            let place = self.segments.iter().find(|place| may(I::from_number(*place)))?;
            let child = self.waits_for(place).filter(|child| may(I::from_number(*child)));
            let Some(child) = child else { return Some(I::from_number(place)) };
            let segment = self.at(child).segment;
            self.leave(place);
            self.known[place as usize].segment = segment;
            self.segments.push_hotter(segment, place, child);
        }
        // So long a prefix is followed to its end at once; it cannot have more blocks than there
        // are.
        let first = self.segments.iter().find(|place| may(I::from_number(*place)))?;
        let next = |place: &u32| self.waits_for(*place).filter(|child| may(I::from_number(*child)));
        std::iter::successors(Some(first), next).take(self.known.len()).last().map(I::from_number)
    }

    fn coldest(&self, visit: &mut dyn FnMut(I) -> bool) {
        self.segments.iter().map(I::from_number).all(visit);
    }

    fn holds(&self, place: I) -> bool {
        self.segments.holds(place.number())
    }

    fn len(&self) -> usize {
        self.segments.len()
    }

    fn parent(&self, place: I) -> Option<I> {
        self.parent_of(place.number()).map(I::from_number)
    }

    fn prefetch(&self, place: I) {
        self.segments.prefetch(place);
        kvcellar_block::prefetch(self.at(place.number()));
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.known) + self.segments.bytes() + self.ghosts.bytes() + self.hazards.bytes()
    }
}
