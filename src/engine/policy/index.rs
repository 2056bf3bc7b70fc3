//! Numbers of places: of slots, of extents.

use std::fmt::Debug;

use kvcellar_block::{ExtentIndex, SlotIndex};

/// A number that names one of several places of a kind, counted from 0. Tables and orders are over
/// one kind, so that a slot's number is never taken for an extent's.
pub trait Index: Copy + Eq + Debug + Send {
    /// The place with this number.
    fn from_number(number: u32) -> Self;
    /// The number of this place.
    fn number(self) -> u32;
}

impl Index for SlotIndex {
    #[inline]
    fn from_number(number: u32) -> Self {
        Self(number)
    }

    #[inline]
    fn number(self) -> u32 {
        self.0
    }
}

impl Index for ExtentIndex {
    #[inline]
    fn from_number(number: u32) -> Self {
        Self(number)
    }

    #[inline]
    fn number(self) -> u32 {
        self.0
    }
}
