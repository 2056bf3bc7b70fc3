//! Blocks by number: everything about a block follows from it.

use kvcellar_block::BlockHash;
use kvcellar_testkit::random::mix;

/// Tokens of one block.
pub(crate) const TOKENS: u32 = 16;

pub(crate) fn hash(number: u64) -> BlockHash {
    let mut bytes = [0xb1; 32];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[24..].copy_from_slice(&mix(number).to_le_bytes());
    BlockHash::new(&bytes).expect("32 bytes")
}

/// The number of a block by its hash, if there is such a block.
pub(crate) fn number(found: &BlockHash) -> Option<u64> {
    let head: [u8; 8] = found.as_bytes().get(..8)?.try_into().ok()?;
    let number = u64::from_le_bytes(head);
    (hash(number) == *found).then_some(number)
}

pub(crate) fn tokens(number: u64) -> Vec<u32> {
    (0..TOKENS).map(|at| (number as u32).wrapping_mul(TOKENS) + at).collect()
}

/// A rank's bytes of a block.
pub(crate) fn part(number: u64, rank: usize, len: usize) -> Vec<u8> {
    let word = mix(number.wrapping_mul(64) + rank as u64 + 1).to_le_bytes();
    word.iter().copied().cycle().take(len).collect()
}
