//! Whose bytes lie in the places of a tier, also in those that hold no block any more, and which of
//! them have to be overwritten.
//!
//! A place that is evicted or dropped keeps its bytes until the next block comes. So a salt is
//! forgotten by the bytes and not by the blocks: every place has the tag of what was last put into
//! it, and [`SaltTag::NONE`] when it is known to hold zeros.
//!
//! Of the places to be erased, some are still used: copied from, read or written. Legal states of
//! such a place: *due* (in use) -> *waiting* (nobody uses it, and no block gets it) -> *under way*
//! -> erased, or failed. Places pass from one to the next only here.

use std::collections::BTreeSet;

use crate::policy::Index;
use kvcellar_block::SaltTag;

/// What is known of the bytes in a tier's places.
#[derive(Debug)]
pub(super) struct Remains<I> {
    tags: Box<[SaltTag]>,
    /// Numbers of places to be erased that somebody still uses.
    due: BTreeSet<u32>,
    /// Those that nobody uses.
    waiting: BTreeSet<u32>,
    /// Those that are being erased.
    under_way: BTreeSet<u32>,
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
            due: BTreeSet::new(),
            waiting: BTreeSet::new(),
            under_way: BTreeSet::new(),
            failures: 0,
            erased: 0,
            place: std::marker::PhantomData,
        }
    }

    /// Whose bytes lie in a place.
    pub(super) fn tag(&self, place: I) -> SaltTag {
        self.tags[place.number() as usize]
    }

    /// A block comes to a place, or it is known whose bytes an earlier engine left there.
    pub(super) fn set(&mut self, place: I, tag: SaltTag) {
        self.tags[place.number() as usize] = tag;
    }

    /// Places whose bytes may be of a salt, and that are not being erased already.
    pub(super) fn of(&self, salt: SaltTag) -> Vec<I> {
        let numbers = (0_u32..).zip(&self.tags).filter(|(_, tag)| tag.may_be_of(salt)).map(|(number, _)| number);
        let ends = |number: &u32| self.waiting.contains(number) || self.under_way.contains(number);
        numbers.filter(|number| !ends(number)).map(I::from_number).collect()
    }

    /// A place has to be erased as soon as nobody uses it.
    pub(super) fn condemn(&mut self, place: I) {
        self.due.insert(place.number());
    }

    /// Whether a place has to be erased, and is used meanwhile: what is in it is worth nothing.
    pub(super) fn is_due(&self, place: I) -> bool {
        self.due.contains(&place.number())
    }

    /// Nobody uses a place any more. Returns whether it has to be erased before the next block.
    pub(super) fn release(&mut self, place: I) -> bool {
        self.due.remove(&place.number()) && self.waiting.insert(place.number())
    }

    /// Whether a place will be erased, or is at this moment.
    pub(super) fn has(&self, place: I) -> bool {
        let number = place.number();
        self.due.contains(&number) || self.waiting.contains(&number) || self.under_way.contains(&number)
    }

    /// Up to so many places whose turn it is, in ascending order: they are under way now.
    pub(super) fn take(&mut self, count: usize) -> Vec<I> {
        let taken: Vec<u32> = std::iter::from_fn(|| self.waiting.pop_first()).take(count).collect();
        self.under_way.extend(&taken);
        taken.into_iter().map(I::from_number).collect()
    }

    /// As [`Self::take`], those of these places that wait.
    pub(super) fn take_these(&mut self, places: &[I]) -> Vec<I> {
        let taken: Vec<I> = places.iter().copied().filter(|place| self.waiting.remove(&place.number())).collect();
        self.under_way.extend(taken.iter().map(|place| place.number()));
        taken
    }

    /// A place holds zeros, or could not be overwritten.
    pub(super) fn end(&mut self, place: I, erased: bool) {
        self.under_way.remove(&place.number());
        if erased {
            self.set(place, SaltTag::NONE);
            self.erased += 1;
        } else {
            self.failures += 1;
        }
    }

    /// All places that nobody uses and that are not erased: whoever asks does it, or nobody.
    pub(super) fn unerased(&self) -> Vec<I> {
        self.waiting.union(&self.under_way).copied().map(I::from_number).collect()
    }

    /// Places that are still to be erased.
    pub(super) fn left(&self) -> u64 {
        (self.due.len() + self.waiting.len() + self.under_way.len()) as u64
    }

    /// How often a place was erased, and how often one could not be.
    pub(super) fn ended(&self) -> (u64, u64) {
        (self.erased, self.failures)
    }
}

#[cfg(test)]
mod tests {
    use kvcellar_block::ExtentIndex;

    use super::*;

    #[test]
    fn a_place_goes_its_way_once_and_its_tag_goes_with_its_bytes() {
        let (ada, bob) = (SaltTag::of(b"ada"), SaltTag::of(b"bob"));
        let place = ExtentIndex;
        let mut remains = Remains::new(4);
        for (number, tag) in [ada, bob, SaltTag::UNKNOWN, SaltTag::NONE].into_iter().enumerate() {
            remains.set(place(number as u32), tag);
        }
        assert_eq!(remains.of(ada), [place(0), place(2)], "hers, and what may be");
        remains.condemn(place(2));
        remains.condemn(place(0));
        assert!(remains.is_due(place(0)) && !remains.release(place(1)), "nobody else is touched");
        assert!(remains.release(place(0)) && !remains.release(place(0)));
        assert_eq!((remains.take(9), remains.left()), (vec![place(0)], 2));
        assert!(remains.has(place(0)) && remains.of(ada) == [place(2)], "under way already");
        remains.end(place(0), true);
        assert!(remains.release(place(2)) && remains.take(9) == [place(2)]);
        remains.end(place(2), false);
        assert_eq!((remains.left(), remains.ended(), remains.of(ada)), (0, (1, 1), vec![place(2)]), "tried again");
    }
}
