//! Memory in huge pages that transfers pass through where the pool lies in small ones.
//!
//! Some disks move few pieces of memory in one request, so that 4 KiB pages make them slow. There
//! the disk reads into staging and writes from it, and the mover copies between staging and the
//! slots, in the same pass that sums the bytes.
//!
//! Promises: staging is bounded; a piece that is with the disk is nobody else's, and one that the
//! disk never gives back is never used again.

use std::sync::Arc;

use super::buffer::{Arena, Buffer, Region};
use crate::limits::{STAGING_BYTES, TRANSFER_BYTES_MAX};

/// One engine's staging memory, cut into places of one extent each.
pub struct HugeStaging {
    region: Arc<dyn Region>,
    extent_bytes: usize,
    /// Whether each place is free.
    free: Vec<bool>,
}

impl std::fmt::Debug for HugeStaging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HugeStaging").field("places", &self.free.len()).finish_non_exhaustive()
    }
}

impl HugeStaging {
    /// For extents of this many bytes. `None`: too few of them would fit to keep a disk busy.
    pub fn new(extent_bytes: u64) -> Option<Self> {
        let places = STAGING_BYTES / extent_bytes;
        // Half of the places are for writes, and each way has one more transfer than is under way.
        let most = (TRANSFER_BYTES_MAX / extent_bytes).max(1);
        if places < 4 * most {
            return None;
        }
        let region: Arc<dyn Region> = Arena::in_huge_pages((places * extent_bytes) as usize)?;
        Some(Self { region, extent_bytes: extent_bytes as usize, free: vec![true; places as usize] })
    }

    /// The memory, for a ring to register.
    pub fn region(&self) -> &Arc<dyn Region> {
        &self.region
    }

    /// Bytes of all places.
    pub fn bytes(&self) -> u64 {
        (self.free.len() * self.extent_bytes) as u64
    }

    /// Places in all.
    pub fn places(&self) -> usize {
        self.free.len()
    }

    /// Room for `extents` adjacent extents, if there is some.
    pub fn take(&mut self, extents: usize) -> Option<Buffer> {
        let first = self.free.windows(extents.max(1)).position(|places| places.iter().all(|free| *free))?;
        // The mutant that the tests must notice: others get the place too.
        if !cfg!(feature = "mutant-shared-place") {
            self.free[first..first + extents].fill(false);
        }
        let (offset, len) = (first * self.extent_bytes, extents * self.extent_bytes);
        // SAFETY: the places were free, and are nobody else's until the buffer comes back.
        Some(unsafe { Buffer::of_region(Arc::clone(&self.region), offset, len) })
    }

    /// The end of a buffer that [`Self::take`] gave; how many places it had.
    pub fn give_back(&mut self, buffer: Buffer) -> usize {
        let first = buffer.offset() / self.extent_bytes;
        let places = buffer.len() / self.extent_bytes;
        drop(buffer);
        self.free[first..first + places].fill(true);
        places
    }

    /// Whether a buffer is of this memory.
    pub fn owns(&self, buffer: &Buffer) -> bool {
        buffer.is_of(&self.region)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENT: u64 = 64 << 10;

    fn free(staging: &HugeStaging) -> usize {
        staging.free.iter().filter(|free| **free).count()
    }

    #[test]
    fn places_are_given_once_and_come_back() {
        let mut staging = HugeStaging::new(EXTENT).expect("memory");
        let places = staging.places();
        assert_eq!((staging.bytes(), free(&staging)), (STAGING_BYTES, places));
        let mut held: Vec<Buffer> = std::iter::from_fn(|| staging.take(3)).collect();
        assert_eq!((held.len(), free(&staging)), (places / 3, places % 3));
        let starts: std::collections::HashSet<usize> = held.iter().map(Buffer::offset).collect();
        assert_eq!(starts.len(), held.len(), "two buffers lie in one place");
        // Two neighbours come back: there is room for six again, and for no more.
        for buffer in held.drain(4..6) {
            assert!(staging.owns(&buffer) && buffer.len() == 3 * EXTENT as usize);
            assert_eq!(staging.give_back(buffer), 3);
        }
        assert!(staging.take(7).is_none());
        let six = staging.take(6).expect("room");
        assert!(staging.take(places % 3 + 1).is_none());
        staging.give_back(six);
        for buffer in held {
            staging.give_back(buffer);
        }
        assert_eq!(free(&staging), places);
        assert!(!staging.owns(&Buffer::pages(4096)));
    }

    #[test]
    fn a_buffer_that_never_comes_back_keeps_its_place() {
        let mut staging = HugeStaging::new(EXTENT).expect("memory");
        let places = staging.places();
        drop(staging.take(1));
        assert_eq!(free(&staging), places - 1);
        assert!(staging.take(places).is_none());
    }

    #[test]
    fn extents_of_which_few_would_fit_have_none() {
        assert!(HugeStaging::new(STAGING_BYTES / 4).is_some());
        assert!(HugeStaging::new(STAGING_BYTES / 4 + 4096).is_none());
    }
}
