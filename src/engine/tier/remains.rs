//! Whose bytes lie in the places of a tier, also in those that hold no block any more, and which of
//! them have to be overwritten.
//!
//! A place that is evicted or dropped keeps its bytes until the next block comes. So a salt is
//! forgotten by the bytes and not by the blocks: every place has the tag of what was last put into
//! it, and [`SaltTag::NONE`] when it is known to hold zeros. Until a block has come to a place
//! whole, what lay there before counts as well; where it does not come, nobody knows what lies
//! there.
//!
//! Of the places to be erased, some are still used: copied from, read or written. Legal states of
//! such a place: *due* (in use) -> *waiting* (nobody uses it, and no block gets it) -> *under way*
//! -> erased, or failed. One that is *doubted* has a block on its way that is not to be forgotten,
//! over bytes that are: it becomes due when the block does not come, and else nothing is left to be
//! erased. Places pass from one to the next only here.
//!
//! Requests to forget are numbered. A place is counted with the first that wants it erased, so that
//! a request waits for nothing that only later ones want.

use std::collections::{BTreeMap, BTreeSet};

use hashbrown::HashMap;

use crate::policy::Index;
use kvcellar_block::SaltTag;

/// How far the erasure of a place is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ErasureStep {
    /// It is not to be erased.
    Kept,
    /// Only if the block on its way does not come.
    Doubted,
    /// It is, and somebody still uses it.
    Due,
    /// Nobody uses it.
    Waiting,
    /// It is being erased.
    UnderWay,
}

/// What is known of the bytes in a tier's places.
#[derive(Debug)]
pub(super) struct Remains<I> {
    tags: Box<[SaltTag]>,
    steps: Box<[ErasureStep]>,
    /// Whose bytes lie in a place whose block has not come yet, where they are somebody else's.
    before: HashMap<u32, SaltTag>,
    /// Numbers of places to be erased that nobody uses.
    waiting: BTreeSet<u32>,
    /// Of every place that is not kept: the first request that wants it erased.
    wanted_by: HashMap<u32, u64>,
    /// How many places each request waits for.
    left: BTreeMap<u64, u64>,
    /// The last request.
    last: u64,
    /// Times that a place could not be erased.
    failures: u64,
    /// Times that one was.
    erased: u64,
    place: std::marker::PhantomData<I>,
}

impl<I: Index> Remains<I> {
    /// So many places that hold zeros.
    pub(super) fn new(places: u32) -> Self {
        Self {
            tags: vec![SaltTag::NONE; places as usize].into_boxed_slice(),
            steps: vec![ErasureStep::Kept; places as usize].into_boxed_slice(),
            before: HashMap::new(),
            waiting: BTreeSet::new(),
            wanted_by: HashMap::new(),
            left: BTreeMap::new(),
            last: 0,
            failures: 0,
            erased: 0,
            place: std::marker::PhantomData,
        }
    }

    fn step(&self, place: I) -> ErasureStep {
        self.steps[place.number() as usize]
    }

    /// Whose bytes lie in a place, or will when its block has come.
    pub(super) fn tag(&self, place: I) -> SaltTag {
        self.tags[place.number() as usize]
    }

    /// It is known whose bytes an earlier engine left in a place, or that nobody knows.
    pub(super) fn set(&mut self, place: I, tag: SaltTag) {
        self.tags[place.number() as usize] = tag;
    }

    /// A block is on its way to a place. Returns whether somebody else's bytes may lie there.
    pub(super) fn expect(&mut self, place: I, tag: SaltTag) -> bool {
        let before = std::mem::replace(&mut self.tags[place.number() as usize], tag);
        let foreign = before != SaltTag::NONE && before != tag;
        if foreign {
            self.before.insert(place.number(), before);
        }
        foreign
    }

    /// A block has come whole: nothing is left of what lay there before.
    pub(super) fn arrive(&mut self, place: I) {
        self.before.remove(&place.number());
        if self.step(place) == ErasureStep::Doubted {
            self.keep(place);
        }
    }

    /// A block did not come, or not whole. Returns whether somebody else's bytes may lie there
    /// still.
    pub(super) fn miss(&mut self, place: I) -> bool {
        let foreign = self.before.remove(&place.number()).is_some();
        if foreign {
            self.set(place, SaltTag::UNKNOWN);
        }
        if self.step(place) == ErasureStep::Doubted {
            self.steps[place.number() as usize] = ErasureStep::Due;
        }
        foreign
    }

    /// A request wants all places erased whose bytes may be of a salt. Returns those that have to
    /// be as soon as nobody uses them, and are not being erased already.
    pub(super) fn condemn_all(&mut self, salt: SaltTag, request: u64) -> Vec<I> {
        self.last = request;
        let ends = |step| matches!(step, ErasureStep::Waiting | ErasureStep::UnderWay);
        let places = (0_u32..).zip(self.tags.iter().zip(&self.steps));
        let of_salt = places.filter(|(_, (tag, step))| tag.may_be_of(salt) && !ends(**step));
        let found: Vec<I> = of_salt.map(|(number, _)| I::from_number(number)).collect();
        for place in &found {
            self.condemn(*place, request);
        }
        let covered = self.before.iter().filter(|(_, tag)| tag.may_be_of(salt)).map(|(number, _)| *number);
        for number in covered.collect::<Vec<u32>>() {
            if self.steps[number as usize] == ErasureStep::Kept {
                self.steps[number as usize] = ErasureStep::Doubted;
                self.count(number, request);
            }
        }
        found
    }

    /// A place has to be erased as soon as nobody uses it: this request waits for it.
    pub(super) fn condemn(&mut self, place: I, request: u64) {
        let step = &mut self.steps[place.number() as usize];
        if matches!(step, ErasureStep::Kept | ErasureStep::Doubted) {
            *step = ErasureStep::Due;
        }
        self.count(place.number(), request);
    }

    /// As [`Self::condemn`], but no request waits for it that is there.
    pub(super) fn condemn_later(&mut self, place: I) {
        self.condemn(place, self.last + 1);
    }

    /// The first request that wants a place erased.
    pub(super) fn wanted_by(&self, place: I) -> u64 {
        self.wanted_by.get(&place.number()).copied().unwrap_or(self.last)
    }

    fn count(&mut self, number: u32, request: u64) {
        let before = self.wanted_by.get(&number).copied();
        if before.is_none_or(|before| before > request) {
            self.uncount(number);
            self.wanted_by.insert(number, request);
            *self.left.entry(request).or_default() += 1;
        }
    }

    fn uncount(&mut self, number: u32) {
        let Some(request) = self.wanted_by.remove(&number) else { return };
        if let Some(left) = self.left.get_mut(&request) {
            *left -= 1;
            if *left == 0 {
                self.left.remove(&request);
            }
        }
    }

    fn keep(&mut self, place: I) {
        self.steps[place.number() as usize] = ErasureStep::Kept;
        self.uncount(place.number());
    }

    /// Whether a place has to be erased, and is used meanwhile: what is in it is worth nothing.
    pub(super) fn is_due(&self, place: I) -> bool {
        self.step(place) == ErasureStep::Due
    }

    /// Nobody uses a place any more. Returns whether it has to be erased before the next block.
    pub(super) fn release(&mut self, place: I) -> bool {
        let due = matches!(self.step(place), ErasureStep::Due | ErasureStep::Doubted);
        if due {
            self.steps[place.number() as usize] = ErasureStep::Waiting;
            self.waiting.insert(place.number());
        }
        due
    }

    /// Whether a place will be erased, or is at this moment.
    pub(super) fn has(&self, place: I) -> bool {
        self.step(place) != ErasureStep::Kept
    }

    /// Up to so many places whose turn it is, in ascending order: they are under way now.
    pub(super) fn take(&mut self, count: usize) -> Vec<I> {
        let taken = std::iter::from_fn(|| self.waiting.pop_first()).take(count).map(I::from_number).collect();
        self.begin(taken)
    }

    /// As [`Self::take`], those of these places that wait.
    pub(super) fn take_these(&mut self, places: &[I]) -> Vec<I> {
        let taken = places.iter().copied().filter(|place| self.waiting.remove(&place.number())).collect();
        self.begin(taken)
    }

    fn begin(&mut self, taken: Vec<I>) -> Vec<I> {
        for place in &taken {
            self.steps[place.number() as usize] = ErasureStep::UnderWay;
        }
        taken
    }

    /// A place holds zeros, or could not be overwritten.
    pub(super) fn end(&mut self, place: I, erased: bool) {
        self.keep(place);
        if erased {
            self.set(place, SaltTag::NONE);
            self.erased += 1;
        } else {
            self.failures += 1;
        }
    }

    /// All places that nobody uses and that are not erased: whoever asks does it, or nobody.
    pub(super) fn unerased(&self) -> Vec<I> {
        let ends = |step: &ErasureStep| matches!(step, ErasureStep::Waiting | ErasureStep::UnderWay);
        let places = (0_u32..).zip(&self.steps).filter(|(_, step)| ends(step));
        places.map(|(number, _)| I::from_number(number)).collect()
    }

    /// Places that are still to be erased.
    pub(super) fn left(&self) -> u64 {
        self.wanted_by.len() as u64
    }

    /// Those of them that this request waits for.
    pub(super) fn left_of(&self, request: u64) -> u64 {
        self.left.range(..=request).map(|(_, left)| left).sum()
    }

    /// How often a place was erased, and how often one could not be.
    pub(super) fn ended(&self) -> (u64, u64) {
        (self.erased, self.failures)
    }
}

#[cfg(test)]
mod tests {
    use kvcellar_block::ExtentIndex as Place;

    use super::*;

    fn tags() -> (SaltTag, SaltTag) {
        (SaltTag::of(b"ada"), SaltTag::of(b"bob"))
    }

    #[test]
    fn a_place_goes_its_way_once_and_its_tag_goes_with_its_bytes() {
        let (ada, bob) = tags();
        let mut remains = Remains::new(4);
        for (number, tag) in [ada, bob, SaltTag::UNKNOWN, SaltTag::NONE].into_iter().enumerate() {
            remains.set(Place(number as u32), tag);
        }
        assert_eq!(remains.condemn_all(ada, 1), [Place(0), Place(2)], "hers, and what may be");
        assert!(remains.is_due(Place(0)) && !remains.release(Place(1)), "nobody else is touched");
        assert!(remains.release(Place(0)) && !remains.release(Place(0)));
        assert_eq!((remains.take(9), remains.left()), (vec![Place(0)], 2));
        assert!(remains.has(Place(0)) && remains.condemn_all(ada, 2) == [Place(2)], "under way already");
        remains.end(Place(0), true);
        assert_eq!((remains.left_of(1), remains.left_of(2)), (1, 1), "the first request wanted it");
        assert!(remains.release(Place(2)) && remains.take(9) == [Place(2)]);
        remains.end(Place(2), false);
        assert_eq!((remains.left(), remains.ended(), remains.unerased()), (0, (1, 1), vec![]));
        assert_eq!(remains.condemn_all(ada, 3), [Place(2)], "tried again");
    }

    #[test]
    fn what_lay_there_before_counts_until_the_block_has_come() {
        let (ada, bob) = tags();
        for comes in [true, false] {
            let mut remains = Remains::new(2);
            assert!(!remains.expect(Place(0), ada), "zeros are nobody's");
            remains.arrive(Place(0));
            assert!(remains.expect(Place(0), bob) && !remains.expect(Place(1), bob));
            assert_eq!(remains.condemn_all(ada, 1), [], "his block may still come");
            assert_eq!((remains.left_of(1), remains.is_due(Place(0))), (1, false));
            if comes {
                remains.arrive(Place(0));
                assert_eq!((remains.left(), remains.tag(Place(0))), (0, bob));
            } else {
                assert!(remains.miss(Place(0)) && !remains.miss(Place(1)), "and his own bytes are his");
                assert!(remains.is_due(Place(0)) && remains.tag(Place(0)) == SaltTag::UNKNOWN);
            }
        }
        // His block did not come, and only then she asks.
        let mut remains = Remains::new(1);
        remains.set(Place(0), ada);
        assert!(remains.expect(Place(0), bob) && remains.miss(Place(0)));
        assert_eq!(remains.condemn_all(ada, 1), [Place(0)]);
    }

    #[test]
    fn a_request_waits_for_nothing_that_only_later_ones_want() {
        let (ada, bob) = tags();
        let mut remains = Remains::new(3);
        remains.set(Place(0), ada);
        remains.set(Place(1), bob);
        remains.condemn_all(ada, 1);
        remains.condemn_all(bob, 2);
        remains.condemn_later(Place(2));
        assert_eq!([1, 2, 3].map(|request| remains.left_of(request)), [1, 2, 3]);
        remains.condemn(Place(2), 1);
        assert_eq!([1, 2, 3].map(|request| remains.left_of(request)), [2, 3, 3], "with the first");
    }
}
