//! Prompts of a fleet: families that share a beginning, and what each of their blocks is called.

use kvcellar_index::keys::{self, Extras};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Tokens of an index block.
pub(crate) const BLOCK: usize = 4;
/// Tokens of a prompt.
pub(crate) const TOKENS: usize = 64;
/// Tokens that a family shares.
const SHARED: usize = 24;
const FAMILY: u64 = 5;

pub(crate) const MODEL: &str = "model";

pub(crate) fn tokens(prompt: u64) -> Vec<u32> {
    let of = |whose: u64, at: usize| xxh3_64_with_seed(&whose.to_le_bytes(), at as u64) as u32 % 50_000;
    (0..TOKENS).map(|at| if at < SHARED { of(1_000_000 + prompt / FAMILY, at) } else { of(prompt, at) }).collect()
}

pub(crate) fn keys(prompt: u64) -> Vec<u64> {
    let mut found = Vec::new();
    keys::of_prompt(keys::root(MODEL, None), &tokens(prompt), BLOCK, &Extras::default(), &mut found);
    found
}

/// An engine's own name for the block that ends at token `end`: equal contents have equal names
/// within one life.
pub(crate) fn hash(life: u64, tokens: &[u32], end: usize) -> u64 {
    let bytes: Vec<u8> = tokens[..end].iter().flat_map(|token| token.to_le_bytes()).collect();
    xxh3_64_with_seed(&xxh3_64(&bytes).to_le_bytes(), life)
}

/// Prompts that begin with the same `end` tokens, this one included.
pub(crate) fn same_until(prompt: u64, end: usize) -> impl Iterator<Item = u64> {
    let family = prompt / FAMILY * FAMILY;
    (family..family + FAMILY).filter(move |other| *other == prompt || end <= SHARED)
}
