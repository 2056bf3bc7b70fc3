//! Whose block it is: the salt (vLLM's `cache_salt`) of the request that it was computed for.
//!
//! vLLM mixes the salt into the hash of a prompt's first block, and every later hash follows from
//! that one. So a block has one salt, but only the first block of a chain says so: every block
//! carries a tag of its salt, so that all of a salt's blocks are found without the chain.
//!
//! A tag hides nothing: who reads a tier's files can try salts, and reads the salt itself in first
//! blocks. Two salts with one tag cost a cached block, never a wrong one: tags only say what is to
//! be forgotten.

use bytemuck::{Pod, Zeroable};
use xxhash_rust::xxh3::xxh3_64;

/// The tag of a salt: 64 bits of its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct SaltTag(u64);

impl SaltTag {
    /// Nobody knows: the block was kept by a version that wrote down no tags, whose reserved bytes
    /// are zeros, or what lies there cannot be read.
    pub const UNKNOWN: Self = Self(0);

    /// There is no salt, or nothing is kept.
    pub const NONE: Self = Self(1);

    /// The tag of a salt. vLLM takes an empty one for none.
    pub fn of(salt: &[u8]) -> Self {
        if salt.is_empty() { Self::NONE } else { Self(xxh3_64(salt).max(2)) }
    }

    /// Whether a block with this tag may be one of `salt`: it is, or nobody knows.
    pub fn may_be_of(self, salt: Self) -> bool {
        self == salt || self == Self::UNKNOWN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_salt_is_told_from_others_and_from_none() {
        let (ada, bob) = (SaltTag::of(b"ada"), SaltTag::of(b"bob"));
        assert!(ada != bob && SaltTag::of(b"") == SaltTag::NONE && SaltTag::default() == SaltTag::UNKNOWN);
        assert!(![ada, bob].iter().any(|tag| [SaltTag::UNKNOWN, SaltTag::NONE].contains(tag)));
        assert!(ada.may_be_of(ada) && !bob.may_be_of(ada) && !SaltTag::NONE.may_be_of(ada));
        assert!(SaltTag::UNKNOWN.may_be_of(ada), "what may be hers is hers");
    }
}
