//! The same with the wide instructions of x86: XXH3's loop over long inputs, and copies past the
//! caches.
//!
//! XXH3 takes *stripes* of 64 bytes into eight sums of 64 bits; after sixteen stripes (a *round*)
//! the sums are scrambled. The stripe that holds the input's last 64 bytes is taken again, with
//! another part of the secret, in place of what is left after the last whole stripe.

use std::arch::x86_64::{
    __m256i, __m512i, _MM_HINT_T0, _mm_prefetch, _mm_sfence, _mm256_add_epi64, _mm256_loadu_si256, _mm256_mul_epu32,
    _mm256_set1_epi64x, _mm256_shuffle_epi32, _mm256_slli_epi64, _mm256_srli_epi64, _mm256_storeu_si256,
    _mm256_stream_si256, _mm256_xor_si256, _mm512_add_epi64, _mm512_loadu_si512, _mm512_mul_epu32, _mm512_set1_epi64,
    _mm512_shuffle_epi32, _mm512_slli_epi64, _mm512_srli_epi64, _mm512_storeu_si512, _mm512_stream_si512,
    _mm512_xor_si512,
};
use std::sync::OnceLock;

use xxhash_rust::const_xxh3::const_custom_default_secret;

const STRIPE: usize = 64;
const ROUND_STRIPES: usize = 16;
/// Shorter inputs are summed by other formulas, which the library has.
const LONG_MIN: usize = 241;
/// So far ahead is memory asked for: measured, twice as far and half as far are slower.
const AHEAD: usize = 1024;

/// XXH3's default secret: what it makes of the seed 0.
static SECRET: [u8; 192] = const_custom_default_secret(0);
const SECRET_SCRAMBLE: usize = 192 - 64;
const SECRET_LAST: usize = 192 - 64 - 7;
const SECRET_MERGE: usize = 11;

const PRIME32_1: u32 = 0x9e37_79b1;
const PRIME64_1: u64 = 0x9e37_79b1_85eb_ca87;
const START: [u64; 8] = [
    0xc2b2_ae3d,
    PRIME64_1,
    0xc2b2_ae3d_27d4_eb4f,
    0x1656_67b1_9e37_79f9,
    0x85eb_ca77_c2b2_ae63,
    0x85eb_ca77,
    0x27d4_eb2f_1656_67c5,
    PRIME32_1 as u64,
];

/// How wide the instructions are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    Avx2,
    Avx512,
}

impl Width {
    /// The widest that pays on this processor; `None`: the library's own is best.
    ///
    /// AVX-512 is left alone on its first generation, which runs slower whenever a core uses it
    /// and does not have VBMI2.
    pub(super) fn of_this_processor() -> Option<Self> {
        static FOUND: OnceLock<Option<Width>> = OnceLock::new();
        *FOUND.get_or_init(|| {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vbmi2") {
                Some(Self::Avx512)
            } else if is_x86_feature_detected!("avx2") {
                Some(Self::Avx2)
            } else {
                None
            }
        })
    }
}

/// The memory to ask for while a piece is read: some way ahead in the piece, then in the next one.
/// Asking behind the piece's end would move bytes that nobody wants.
struct Ahead {
    at: *const u8,
    end: *const u8,
    next: *const u8,
}

impl Ahead {
    /// For a piece up to `end` that is read from `from` on, before the one at `next`; null if there
    /// is none. Any address may be asked for.
    fn new(from: *const u8, end: *const u8, next: *const u8) -> Self {
        let next = if next.is_null() { from } else { next };
        let over = (from.addr() + AHEAD).saturating_sub(end.addr());
        if over == 0 {
            return Self { at: from.wrapping_add(AHEAD), end, next };
        }
        Self { at: next.wrapping_add(over), end: std::ptr::null(), next }
    }

    /// One cache line further.
    fn next(&mut self) -> *const u8 {
        let now = self.at;
        self.at = if now.addr() + STRIPE == self.end.addr() { self.next } else { now.wrapping_add(STRIPE) };
        now
    }
}

/// Where a kernel puts what it has read.
const NOWHERE: u8 = 0;
/// Through the caches: the target does not begin at a cache line.
const CACHED: u8 = 1;
/// Past the caches.
const STREAMED: u8 = 2;

/// The eight sums, as wide as the widest load.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Sums([u64; 8]);

/// The sum of a long input whose length is known.
pub(super) struct LongSum {
    width: Width,
    sums: Sums,
    len: usize,
    /// Bytes that have come.
    seen: usize,
    /// Stripes since the last scramble.
    in_round: usize,
    /// A stripe that has not come whole, and how much of it is there.
    part: [u8; STRIPE],
    have: usize,
    /// The input's last 64 bytes, as far as they have come.
    last: [u8; STRIPE],
}

impl LongSum {
    /// `None`: the input is short, or the processor is old.
    pub(super) fn new(len: usize) -> Option<Self> {
        Width::of_this_processor().and_then(|width| Self::with(width, len))
    }

    /// With these instructions, which the processor must have.
    fn with(width: Width, len: usize) -> Option<Self> {
        let (part, last) = ([0; STRIPE], [0; STRIPE]);
        let sum = Self { width, sums: Sums(START), len, seen: 0, in_round: 0, part, have: 0, last };
        (len >= LONG_MIN).then_some(sum)
    }

    pub(super) fn read(&mut self, bytes: &[u8]) {
        // SAFETY: the bytes can be read, and nothing is written.
        unsafe { self.take::<NOWHERE>(std::ptr::null_mut(), bytes.as_ptr(), bytes.len(), std::ptr::null()) };
    }

    /// # Safety
    /// `from` must be valid for reads of `len` bytes and `to` for writes, without overlap.
    pub(super) unsafe fn copy(&mut self, to: *mut u8, from: *const u8, len: usize, next: *const u8) {
        // Whole stripes are streamed to whole cache lines; what lies before the first whole stripe
        // shifts them.
        let before = (STRIPE - self.have) % STRIPE;
        let aligned = (to.addr() + before.min(len)).is_multiple_of(STRIPE);
        // SAFETY: the caller's promise.
        unsafe {
            if aligned {
                self.take::<STREAMED>(to, from, len, next);
            } else {
                self.take::<CACHED>(to, from, len, next);
            }
        }
    }

    /// # Safety
    /// As [`Self::copy`]; `to` is not used for [`NOWHERE`], and for [`STREAMED`] the first whole
    /// stripe begins at a cache line there.
    unsafe fn take<const TO: u8>(&mut self, to: *mut u8, from: *const u8, len: usize, next: *const u8) {
        assert!(len <= self.len - self.seen, "more bytes than the {} announced", self.len);
        // Bytes behind the last stripe that is taken as such count only among the last 64.
        let whole = (self.len - 1) / STRIPE * STRIPE;
        let counted = len.min(whole.saturating_sub(self.seen));
        let mut at = 0;
        if self.have > 0 && counted > 0 {
            at = counted.min(STRIPE - self.have);
            // SAFETY: `at` bytes can be read, and the part has room for them.
            unsafe { copy_small::<TO>(to, from, at, &mut self.part[self.have..]) };
            self.have += at;
            if self.have == STRIPE {
                self.have = 0;
                let part = self.part;
                // SAFETY: a stripe of our own.
                unsafe {
                    self.stripes::<NOWHERE>(std::ptr::null_mut(), part.as_ptr(), 1, Ahead::new(from, from, from));
                };
            }
        }
        let stripes = (counted - at) / STRIPE;
        if stripes > 0 {
            let begin = from.wrapping_add(at);
            let ahead = Ahead::new(begin, begin.wrapping_add(stripes * STRIPE), next);
            // SAFETY: the stripes lie inside both sides.
            unsafe { self.stripes::<TO>(offset::<TO>(to, at), begin, stripes, ahead) };
            at += stripes * STRIPE;
        }
        if at < counted {
            // SAFETY: less than a stripe is left, and the part is empty.
            unsafe { copy_small::<TO>(offset::<TO>(to, at), from.add(at), counted - at, &mut self.part) };
            self.have = counted - at;
            at = counted;
        }
        // The rest is at most 64 bytes, the end of the whole input.
        let mut rest = [0; STRIPE];
        // SAFETY: `at` is within the input.
        unsafe { copy_small::<TO>(offset::<TO>(to, at), from.add(at), len - at, &mut rest) };
        let tail_from = self.len - STRIPE;
        if self.seen + len > tail_from {
            for index in tail_from.saturating_sub(self.seen)..len {
                // No byte of the source is read twice: somebody may change it.
                let copied = if TO == NOWHERE { from } else { to.cast_const() };
                // SAFETY: inside the input, or inside what was written of it above.
                let byte = if index >= at { rest[index - at] } else { unsafe { *copied.add(index) } };
                self.last[self.seen + index - tail_from] = byte;
            }
        }
        self.seen += len;
    }

    /// # Safety
    /// `stripes` stripes must be valid at `from`, and as `TO` says at `to`.
    unsafe fn stripes<const TO: u8>(&mut self, to: *mut u8, from: *const u8, stripes: usize, ahead: Ahead) {
        // SAFETY: the caller's promise; the processor has the instructions.
        unsafe {
            match self.width {
                Width::Avx2 => stripes_avx2::<TO>(&mut self.sums, self.in_round, to, from, stripes, ahead),
                Width::Avx512 => stripes_avx512::<TO>(&mut self.sums, self.in_round, to, from, stripes, ahead),
            }
        }
        self.in_round = (self.in_round + stripes) % ROUND_STRIPES;
    }

    pub(super) fn finish(self) -> u64 {
        assert!(self.seen == self.len, "fewer bytes than the {} announced: {}", self.len, self.seen);
        settle();
        let mut sums = self.sums.0;
        accumulate(&mut sums, &self.last, SECRET_LAST);
        let mut merged = (self.len as u64).wrapping_mul(PRIME64_1);
        for (pair, sums) in sums.chunks_exact(2).enumerate() {
            let key = |half: usize| word(&SECRET, SECRET_MERGE + 16 * pair + 8 * half);
            let product = u128::from(sums[0] ^ key(0)) * u128::from(sums[1] ^ key(1));
            merged = merged.wrapping_add(product as u64 ^ (product >> 64) as u64);
        }
        merged ^= merged >> 37;
        merged = merged.wrapping_mul(0x1656_6791_9e37_79f9);
        merged ^ merged >> 32
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn accumulate(sums: &mut [u64; 8], stripe: &[u8; STRIPE], secret: usize) {
    for lane in 0..8 {
        let value = word(stripe, 8 * lane);
        let key = value ^ word(&SECRET, secret + 8 * lane);
        sums[lane ^ 1] = sums[lane ^ 1].wrapping_add(value);
        sums[lane] = sums[lane].wrapping_add((key & 0xffff_ffff).wrapping_mul(key >> 32));
    }
}

/// The pointer `by` bytes on, unless nothing is written.
fn offset<const TO: u8>(to: *mut u8, by: usize) -> *mut u8 {
    if TO == NOWHERE { to } else { to.wrapping_add(by) }
}

/// Copies `len` bytes into `kept`, and from there to `to`: each byte of the source is read once.
///
/// # Safety
/// `from` must be valid for reads of `len` bytes, and `to` for writes unless it is nowhere; `kept`
/// must not be shorter.
unsafe fn copy_small<const TO: u8>(to: *mut u8, from: *const u8, len: usize, kept: &mut [u8]) {
    // SAFETY: the caller's promise.
    unsafe {
        kept[..len].as_mut_ptr().copy_from_nonoverlapping(from, len);
        if TO != NOWHERE {
            to.copy_from_nonoverlapping(kept.as_ptr(), len);
        }
    }
}

/// # Safety
/// The processor must have AVX-512F; `stripes` stripes must be valid at `from`, and as `TO` says at
/// `to`.
#[target_feature(enable = "avx512f")]
unsafe fn stripes_avx512<const TO: u8>(
    sums: &mut Sums,
    mut in_round: usize,
    mut to: *mut u8,
    mut from: *const u8,
    mut stripes: usize,
    mut ahead: Ahead,
) {
    // SAFETY: every access lies inside a stripe that the caller vouches for, inside the sums, or
    // inside the secret: its offsets end at 8 * 15 + 64 and 128 + 64 of 192 bytes. A prefetch
    // touches nothing.
    unsafe {
        let secret = SECRET.as_ptr();
        let mut all = _mm512_loadu_si512(sums.0.as_ptr().cast());
        let scramble = _mm512_loadu_si512(secret.add(SECRET_SCRAMBLE).cast());
        let prime = _mm512_set1_epi64(i64::from(PRIME32_1));
        while stripes > 0 {
            let now = stripes.min(ROUND_STRIPES - in_round);
            for stripe in 0..now {
                let at = STRIPE * stripe;
                _mm_prefetch::<_MM_HINT_T0>(ahead.next().cast());
                let value = _mm512_loadu_si512(from.add(at).cast());
                match TO {
                    STREAMED => _mm512_stream_si512(to.add(at).cast(), value),
                    CACHED => _mm512_storeu_si512(to.add(at).cast(), value),
                    _ => {}
                }
                let key = _mm512_xor_si512(value, _mm512_loadu_si512(secret.add(8 * (in_round + stripe)).cast()));
                let product = _mm512_mul_epu32(key, _mm512_srli_epi64::<32>(key));
                // The neighbour's value: words 2, 3, 0, 1 of each half.
                let swapped: __m512i = _mm512_shuffle_epi32::<0x4e>(value);
                all = _mm512_add_epi64(all, _mm512_add_epi64(product, swapped));
            }
            from = from.add(STRIPE * now);
            to = offset::<TO>(to, STRIPE * now);
            stripes -= now;
            in_round += now;
            if in_round == ROUND_STRIPES {
                in_round = 0;
                let mixed = _mm512_xor_si512(_mm512_xor_si512(all, _mm512_srli_epi64::<47>(all)), scramble);
                let high = _mm512_mul_epu32(_mm512_srli_epi64::<32>(mixed), prime);
                all = _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), _mm512_slli_epi64::<32>(high));
            }
        }
        _mm512_storeu_si512(sums.0.as_mut_ptr().cast(), all);
    }
}

/// # Safety
/// The processor must have AVX2; the rest as for [`stripes_avx512`].
#[target_feature(enable = "avx2")]
unsafe fn stripes_avx2<const TO: u8>(
    sums: &mut Sums,
    mut in_round: usize,
    mut to: *mut u8,
    mut from: *const u8,
    mut stripes: usize,
    mut ahead: Ahead,
) {
    // SAFETY: as in `stripes_avx512`; each half of a stripe is 32 bytes.
    unsafe {
        let secret = SECRET.as_ptr();
        let load = |at: *const u8| _mm256_loadu_si256(at.cast());
        let start: *const u8 = sums.0.as_ptr().cast();
        let mut all: [__m256i; 2] = [load(start), load(start.add(32))];
        let scramble = [load(secret.add(SECRET_SCRAMBLE)), load(secret.add(SECRET_SCRAMBLE + 32))];
        let prime = _mm256_set1_epi64x(i64::from(PRIME32_1));
        while stripes > 0 {
            let now = stripes.min(ROUND_STRIPES - in_round);
            for stripe in 0..now {
                _mm_prefetch::<_MM_HINT_T0>(ahead.next().cast());
                for (half, all) in all.iter_mut().enumerate() {
                    let at = STRIPE * stripe + 32 * half;
                    let value = load(from.add(at));
                    match TO {
                        STREAMED => _mm256_stream_si256(to.add(at).cast(), value),
                        CACHED => _mm256_storeu_si256(to.add(at).cast(), value),
                        _ => {}
                    }
                    let key = _mm256_xor_si256(value, load(secret.add(8 * (in_round + stripe) + 32 * half)));
                    let product = _mm256_mul_epu32(key, _mm256_srli_epi64::<32>(key));
                    let swapped = _mm256_shuffle_epi32::<0x4e>(value);
                    *all = _mm256_add_epi64(*all, _mm256_add_epi64(product, swapped));
                }
            }
            from = from.add(STRIPE * now);
            to = offset::<TO>(to, STRIPE * now);
            stripes -= now;
            in_round += now;
            if in_round == ROUND_STRIPES {
                in_round = 0;
                for (all, scramble) in all.iter_mut().zip(scramble) {
                    let mixed = _mm256_xor_si256(_mm256_xor_si256(*all, _mm256_srli_epi64::<47>(*all)), scramble);
                    let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(mixed), prime);
                    *all = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64::<32>(high));
                }
            }
        }
        let end: *mut u8 = sums.0.as_mut_ptr().cast();
        _mm256_storeu_si256(end.cast(), all[0]);
        _mm256_storeu_si256(end.add(32).cast(), all[1]);
    }
}

/// Copies past the caches; the ends that do not fill a cache line go through them.
///
/// # Safety
/// `from` must be valid for reads of `len` bytes and `to` for writes, without overlap; the
/// processor must have the instructions.
pub(super) unsafe fn copy(width: Width, to: *mut u8, from: *const u8, len: usize, next: *const u8) {
    let head = to.align_offset(STRIPE).min(len);
    let lines = (len - head) / STRIPE;
    let tail = head + lines * STRIPE;
    let ahead = Ahead::new(from.wrapping_add(head), from.wrapping_add(len), next);
    // SAFETY: the three parts make up the whole.
    unsafe {
        to.copy_from_nonoverlapping(from, head);
        match width {
            Width::Avx2 => lines_avx2(to.add(head), from.add(head), lines, ahead),
            Width::Avx512 => lines_avx512(to.add(head), from.add(head), lines, ahead),
        }
        to.add(tail).copy_from_nonoverlapping(from.add(tail), len - tail);
    }
}

/// # Safety
/// The processor must have AVX-512F; `lines` times 64 bytes must be valid on both sides, and `to`
/// begin at a cache line.
#[target_feature(enable = "avx512f")]
unsafe fn lines_avx512(to: *mut u8, from: *const u8, lines: usize, mut ahead: Ahead) {
    for at in (0..lines).map(|line| STRIPE * line) {
        // SAFETY: inside both sides; a prefetch touches nothing.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(ahead.next().cast());
            _mm512_stream_si512(to.add(at).cast(), _mm512_loadu_si512(from.add(at).cast()));
        }
    }
}

/// # Safety
/// The processor must have AVX2; the rest as for [`lines_avx512`].
#[target_feature(enable = "avx2")]
unsafe fn lines_avx2(to: *mut u8, from: *const u8, lines: usize, mut ahead: Ahead) {
    for at in (0..lines).map(|line| STRIPE * line) {
        // SAFETY: inside both sides; a prefetch touches nothing.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(ahead.next().cast());
            _mm256_stream_si256(to.add(at).cast(), _mm256_loadu_si256(from.add(at).cast()));
            _mm256_stream_si256(to.add(at + 32).cast(), _mm256_loadu_si256(from.add(at + 32).cast()));
        }
    }
}

/// Stores past the caches come to light in any order, until this.
pub(super) fn settle() {
    // SAFETY: every x86-64 has it.
    unsafe { _mm_sfence() };
}

#[cfg(test)]
mod tests {
    use xxhash_rust::xxh3::xxh3_64;

    use super::*;

    /// Both widths, whichever the process would choose.
    #[test]
    fn each_width_that_the_processor_has_gives_the_same() {
        let bytes: Vec<u8> = (0..70_000_u32).map(|n| (n.wrapping_mul(PRIME32_1) >> 13) as u8).collect();
        let mut widths = Vec::new();
        widths.extend(is_x86_feature_detected!("avx2").then_some(Width::Avx2));
        widths.extend(is_x86_feature_detected!("avx512f").then_some(Width::Avx512));
        for (width, len) in widths.into_iter().flat_map(|width| [241, 1024, 1025, 5000, 70_000].map(|len| (width, len)))
        {
            let mut sum = LongSum::with(width, len).expect("a long input");
            for piece in bytes[..len].chunks(1000) {
                sum.read(piece);
            }
            assert_eq!(sum.finish(), xxh3_64(&bytes[..len]), "{len} bytes by {width:?}");
            let mut to = vec![0_u8; len + 64];
            // SAFETY: both have `len` bytes.
            unsafe { copy(width, to[1..].as_mut_ptr(), bytes.as_ptr(), len, std::ptr::null()) };
            settle();
            assert_eq!(&to[1..=len], &bytes[..len]);
        }
    }
}
