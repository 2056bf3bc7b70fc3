//! Forgetting on disk: blocks of a salt are dropped, and no extent that may hold bytes of it is
//! used again before it was erased.

use super::{ExtentChange, ExtentState, Extents};
use crate::event_log::EventLog;
use kvcellar_block::{ExtentIndex, SaltTag};

impl Extents {
    /// A reopened store's extents may hold anybody's bytes where no block was found in them.
    pub(in crate::tier) fn doubt_the_rest(&mut self) {
        for extent in (0..self.ready).map(ExtentIndex) {
            if self.state(extent) == ExtentState::Free {
                self.remains.set(extent, SaltTag::UNKNOWN);
            }
        }
    }

    /// Drops the blocks of a salt, and takes every extent out of use that may hold bytes of it, one
    /// that is read or written at its last use's end. Returns how many blocks were there until now.
    pub(in crate::tier) fn forget(&mut self, salt: SaltTag, request: u64, events: &mut EventLog) -> u64 {
        let mut dropped = 0;
        for extent in self.remains.condemn_all(salt, request) {
            match self.state(extent) {
                ExtentState::Committed { .. } => {
                    self.discard(extent, true, events);
                    dropped += 1;
                }
                ExtentState::Doomed | ExtentState::Condemned => self.discard(extent, true, events),
                ExtentState::Free => {
                    self.transition(extent, ExtentChange::Withhold, events);
                }
                ExtentState::Retired => {
                    self.remains.release(extent);
                }
                // Its write's end finds it.
                ExtentState::Writing => {}
            }
        }
        self.free.retain(|extent| !self.remains.has(*extent));
        dropped
    }

    /// An extent was erased, or could not be: then it stays out of use.
    pub(in crate::tier) fn end_erasure(&mut self, extent: ExtentIndex, erased: bool, events: &mut EventLog) {
        self.remains.end(extent, erased);
        if erased {
            self.reinstate(extent, events);
        }
    }
}
