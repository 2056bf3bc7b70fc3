//! Slots taken for blocks that are to come, and for whom.

use crate::policy::BlockOwner;
use kvcellar_block::{BlockKey, Generation, SlotIndex};

/// Who uses blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct User {
    /// The request's serial, which tells its uses from others'.
    pub serial: u32,
    /// Whose request it is.
    pub owner: BlockOwner,
}

/// A slot that was taken for a new block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserved {
    /// The slot.
    pub slot: SlotIndex,
    /// Its generation, which copy orders must name.
    pub generation: Generation,
    /// The block that was evicted for it.
    pub evicted: Option<BlockKey>,
}

/// Where a block comes from, as far as that tells how likely it is to come back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Provenance {
    /// The slot of the block before it in its prefix, if the tier has that one.
    pub parent: Option<SlotIndex>,
    /// Tokens of the prompt that brings it.
    pub prompt_tokens: u32,
}
