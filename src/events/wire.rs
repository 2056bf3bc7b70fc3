//! KVEvents as they travel: vLLM's and `SGLang`'s batches of block events.
//!
//! Vocabulary only; `decode` and `encode` turn it from and into bytes. What repeats by the
//! thousand, hashes and token ids, lies in an [`BatchArena`] that its owner uses again for the next
//! batch; names and extra keys are borrowed from the payload.

use std::ops::Range;

/// Hashes and token ids of one batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BatchArena {
    /// Hashes of blocks as 64-bit numbers: see [`name`].
    pub hashes: Vec<u64>,
    /// Token ids.
    pub tokens: Vec<u32>,
}

impl BatchArena {
    /// Forgets everything and keeps the memory.
    pub fn clear(&mut self) {
        self.hashes.clear();
        self.tokens.clear();
    }
}

/// The 64-bit name of a block hash that travels as a byte string: its last eight bytes, big-endian,
/// as vLLM itself shortens digests.
pub fn name(digest: &[u8]) -> u64 {
    digest.iter().rev().take(8).rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A published batch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch<'a> {
    /// When it was made, in seconds since 1970.
    pub at_s: f64,
    /// The data-parallel rank that made it.
    pub rank: Option<u32>,
    /// What happened, in order.
    pub events: Vec<Event<'a>>,
    /// Events of a kind or shape that is not known, which were left out.
    pub skipped: u32,
}

/// One event.
#[derive(Debug, Clone, PartialEq)]
pub enum Event<'a> {
    /// Blocks are there now.
    Stored(Box<Stored<'a>>),
    /// Blocks are gone.
    Removed(Removed<'a>),
    /// Everything is gone.
    Cleared {
        /// Written as a map, as vLLM does since 0.25: the prefix cache in GPU memory alone. As an
        /// array (`SGLang`, earlier vLLM): all tiers.
        map_form: bool,
    },
    /// All blocks of one tier are gone.
    TierCleared {
        /// The tier, as vLLM calls it.
        medium: Option<&'a str>,
        /// `LOCAL` or `REMOTE`.
        locality: Option<&'a str>,
    },
}

/// Hashes of an event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hashes<'a> {
    /// Their numbers in [`BatchArena::hashes`].
    pub range: Range<usize>,
    /// The byte strings, where they travelled as such.
    pub digests: Option<Vec<&'a [u8]>>,
}

/// A parent's hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent<'a> {
    /// As a number.
    Number(u64),
    /// As a byte string.
    Digest(&'a [u8]),
}

impl Parent<'_> {
    /// Its 64-bit name.
    pub fn name(&self) -> u64 {
        match self {
            Self::Number(number) => *number,
            Self::Digest(digest) => name(digest),
        }
    }
}

/// Blocks that follow one another in a prefix were stored.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stored<'a> {
    /// Their hashes, in prefix order.
    pub hashes: Hashes<'a>,
    /// The block before the first.
    pub parent: Option<Parent<'a>>,
    /// All their tokens, in [`BatchArena::tokens`]; empty when the publisher does not know them.
    pub tokens: Range<usize>,
    /// Tokens of a block.
    pub block_size: u32,
    /// Number of the LoRA adapter (old publishers).
    pub lora_id: Option<u64>,
    /// Where they are, as vLLM calls it.
    pub medium: Option<&'a str>,
    /// Name of the LoRA adapter.
    pub lora_name: Option<&'a str>,
    /// Extra keys, one a block, as msgpack: see `index::keys`.
    pub extra_keys: Option<&'a [u8]>,
    /// The KV cache group.
    pub group: Option<u32>,
    /// What attention the group has.
    pub kind: Option<&'a str>,
    /// Tokens that a sliding window covers.
    pub window: Option<u32>,
    /// `LOCAL` or `REMOTE`.
    pub locality: Option<&'a str>,
    /// The secondary tier that made the event.
    pub ownership: Option<&'a str>,
    /// The session that caused it.
    pub session: Option<&'a str>,
}

/// Blocks were removed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Removed<'a> {
    /// Their hashes.
    pub hashes: Hashes<'a>,
    /// Where from.
    pub medium: Option<&'a str>,
    /// Their KV cache group.
    pub group: Option<u32>,
    /// `LOCAL` or `REMOTE`.
    pub locality: Option<&'a str>,
    /// The secondary tier that made the event.
    pub ownership: Option<&'a str>,
}

#[cfg(test)]
mod tests {
    use super::name;

    #[test]
    fn a_digest_is_named_by_its_low_bits() {
        assert_eq!(name(&[1, 2, 0xff, 0, 0, 0, 0, 0, 0, 7]), 0xff00_0000_0000_0007);
        assert_eq!((name(&[0xaa; 4]), name(&[])), (0xaaaa_aaaa, 0));
    }
}
