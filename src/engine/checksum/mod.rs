//! XXH3 checksums of payloads, alone or while the bytes are copied.
//!
//! Promises: every way gives what the library's XXH3 (64 bits, seed 0, default secret) gives for
//! the same bytes, whatever the processor; a copy stores exactly the bytes that were summed, even
//! when somebody changes the source meanwhile.
//!
//! The library chooses its instructions when it is compiled, so that a wheel for every x86 has
//! SSE2. Long payloads are summed here with AVX2 or AVX-512, chosen when the process runs. Copies
//! write past the caches: what is offloaded is not read soon, and a store that first reads its
//! cache line moves half as much again.

#[cfg(target_arch = "x86_64")]
mod x86;

use xxhash_rust::xxh3::Xxh3Default;

#[cfg(target_arch = "x86_64")]
use self::x86::{LongSum, Width};

/// The checksum of `bytes`.
pub fn of(bytes: &[u8]) -> u64 {
    let mut sum = Sum::new(bytes.len());
    sum.read(bytes);
    sum.finish()
}

/// The checksum of bytes that come in pieces.
pub struct Sum(SumWay);

#[cfg_attr(target_arch = "x86_64", expect(clippy::large_enum_variant, reason = "one a block, on the stack"))]
enum SumWay {
    Library(Box<Xxh3Default>),
    #[cfg(target_arch = "x86_64")]
    Long(LongSum),
}

impl Sum {
    /// For `len` bytes in all.
    pub fn new(len: usize) -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(long) = LongSum::new(len) {
            return Self(SumWay::Long(long));
        }
        let _ = len;
        Self(SumWay::Library(Box::new(Xxh3Default::new())))
    }

    /// Adds the next bytes.
    ///
    /// # Panics
    /// When they are more than was said: the sum would be that of other bytes.
    pub fn read(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            SumWay::Library(library) => library.update(bytes),
            #[cfg(target_arch = "x86_64")]
            SumWay::Long(long) => long.read(bytes),
        }
    }

    /// Adds the next bytes while it copies them. They are where they belong, for every other
    /// thread that hears of it, once [`Self::finish`] has returned. `next` is where the bytes after
    /// these will come from, to be fetched early; null if nobody knows. It is never read.
    ///
    /// # Safety
    /// `from` must be valid for reads of `len` bytes and `to` for writes, and they must not
    /// overlap.
    ///
    /// # Panics
    /// As [`Self::read`].
    pub unsafe fn copy(&mut self, to: *mut u8, from: *const u8, len: usize, next: *const u8) {
        match &mut self.0 {
            SumWay::Library(library) => {
                let _ = next;
                // SAFETY: the caller's promise.
                let copied = unsafe {
                    to.copy_from_nonoverlapping(from, len);
                    std::slice::from_raw_parts(to.cast_const(), len)
                };
                library.update(copied);
            }
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller's promise.
            SumWay::Long(long) => unsafe { long.copy(to, from, len, next) },
        }
    }

    /// As [`Self::copy`], for two slices.
    ///
    /// # Panics
    /// When they are not of one length; as [`Self::read`].
    pub fn copy_slice(&mut self, to: &mut [u8], from: &[u8]) {
        assert_eq!(to.len(), from.len(), "a copy has the length of what is copied");
        // SAFETY: both are slices of this length, and a mutable one overlaps no other.
        unsafe { self.copy(to.as_mut_ptr(), from.as_ptr(), from.len(), std::ptr::null()) };
    }

    /// The checksum of all bytes.
    ///
    /// # Panics
    /// When they are fewer than was said.
    pub fn finish(self) -> u64 {
        match self.0 {
            SumWay::Library(library) => library.digest(),
            #[cfg(target_arch = "x86_64")]
            SumWay::Long(long) => long.finish(),
        }
    }
}

/// Copies `len` bytes past the caches. They are where they belong, for every other thread that
/// hears of it, after [`settle`]. `next` as for [`Sum::copy`].
///
/// # Safety
/// As for [`Sum::copy`].
pub unsafe fn copy(to: *mut u8, from: *const u8, len: usize, next: *const u8) {
    #[cfg(target_arch = "x86_64")]
    if let Some(width) = Width::of_this_processor() {
        // SAFETY: the caller's promise.
        unsafe { x86::copy(width, to, from, len, next) };
        return;
    }
    let _ = next;
    // SAFETY: the caller's promise.
    unsafe { to.copy_from_nonoverlapping(from, len) };
}

/// Ends a row of [`copy`] calls of this thread.
pub fn settle() {
    #[cfg(target_arch = "x86_64")]
    x86::settle();
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use xxhash_rust::xxh3::xxh3_64;

    use super::*;

    /// Whether this processor is left to the library.
    fn is_the_librarys() -> bool {
        #[cfg(target_arch = "x86_64")]
        return Width::of_this_processor().is_none();
        #[cfg(not(target_arch = "x86_64"))]
        true
    }

    /// `len` bytes that differ everywhere.
    fn bytes(len: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ len as u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..len).map(|_| next()).collect()
    }

    /// Copies `from` in pieces that end at `cuts`, into memory that begins `shift` bytes after a
    /// cache line; the sum, and what was written.
    fn copied(from: &[u8], cuts: &[usize], shift: usize) -> (u64, Vec<u8>) {
        let mut memory = vec![0_u8; from.len() + 128];
        let start = memory.as_ptr().align_offset(64) + shift;
        let mut sum = Sum::new(from.len());
        let mut at = 0;
        for end in cuts.iter().copied().chain([from.len()]) {
            // SAFETY: both sides have the bytes from `at` to `end`, which is at most the length.
            unsafe { sum.copy(memory[start + at..].as_mut_ptr(), from[at..].as_ptr(), end - at, from.as_ptr()) };
            at = end;
        }
        let sum = sum.finish();
        assert!(memory[..start].iter().all(|byte| *byte == 0), "bytes before the target were written");
        assert!(memory[start + from.len()..].iter().all(|byte| *byte == 0), "bytes behind it were written");
        (sum, memory[start..start + from.len()].to_vec())
    }

    #[test]
    fn every_length_has_the_librarys_sum() {
        for len in (0..600).chain([1023, 1024, 1025, 1087, 1088, 1089, 2047, 2048, 2049, 4096, 65_536, 100_003]) {
            let bytes = bytes(len);
            assert_eq!(of(&bytes), xxh3_64(&bytes), "{len} bytes");
            let (sum, written) = copied(&bytes, &[], 0);
            assert_eq!((sum, written), (xxh3_64(&bytes), bytes), "{len} bytes copied");
        }
    }

    #[test]
    fn a_sum_of_the_specification_stays_what_it_is() {
        // Stores on disk hold these: a change would make all of them worthless.
        let bytes: Vec<u8> = (0..4096_u32).map(|n| (n.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect();
        assert_eq!(of(&bytes), 0x9bf6_7f8d_eff8_76ae);
        assert_eq!(of(b""), 0x2d06_8005_38d3_94c2);
    }

    #[test]
    #[should_panic(expected = "more bytes than")]
    fn more_bytes_than_were_announced_are_a_bug() {
        let mut sum = Sum::new(1024);
        sum.read(&[0; 1000]);
        sum.read(&[0; 25]);
        assert!(!is_the_librarys(), "more bytes than the library minds");
    }

    #[test]
    #[should_panic(expected = "fewer bytes than")]
    fn fewer_bytes_than_were_announced_are_a_bug() {
        let mut sum = Sum::new(1024);
        sum.read(&[0; 1000]);
        sum.finish();
        assert!(!is_the_librarys(), "fewer bytes than the library minds");
    }

    proptest! {
        #[test]
        fn pieces_give_the_sum_of_the_whole(
            len in 1_usize..9000,
            cuts in proptest::collection::vec(0_usize..9000, 0..12),
            shift in 0_usize..64,
            aligned: bool,
        ) {
            let bytes = bytes(len);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut % len).collect();
            if aligned {
                for cut in &mut cuts {
                    *cut &= !63;
                }
            }
            cuts.sort_unstable();
            let wanted = xxh3_64(&bytes);
            prop_assert_eq!(copied(&bytes, &cuts, if aligned { 0 } else { shift }), (wanted, bytes.clone()));
            let mut sum = Sum::new(len);
            let mut at = 0;
            for end in cuts.into_iter().chain([len]) {
                sum.read(&bytes[at..end]);
                at = end;
            }
            prop_assert_eq!(sum.finish(), wanted);
        }

        #[test]
        fn a_copy_moves_what_it_is_told_and_nothing_else(
            len in 0_usize..3000, from_shift in 0_usize..64, to_shift in 0_usize..64,
        ) {
            let from = bytes(len + 64);
            let mut to = vec![0_u8; len + 256];
            let start = to.as_ptr().align_offset(64) + to_shift;
            // SAFETY: both have `len` bytes from there on.
            unsafe { copy(to[start..].as_mut_ptr(), from[from_shift..].as_ptr(), len, std::ptr::null()) };
            settle();
            prop_assert_eq!(&to[start..start + len], &from[from_shift..from_shift + len]);
            prop_assert!(to[..start].iter().chain(&to[start + len..]).all(|byte| *byte == 0));
        }
    }
}
