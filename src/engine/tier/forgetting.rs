//! How far a request is that wants its salt to be forgotten, and what came of it.

use serde::{Deserialize, Serialize};

/// What was forgotten, also as an engine's answer tells it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgetReport {
    /// Blocks that lookups found in the dram tier.
    pub dram_blocks: u64,
    /// Blocks that lookups found in the nvme tier.
    pub nvme_blocks: u64,
    /// Slots that were overwritten meanwhile, also those without a block.
    pub slots_erased: u64,
    /// Extents that were overwritten meanwhile, also those without a block.
    pub extents_erased: u64,
    /// Bytes of both.
    pub bytes_erased: u64,
    /// Extents that could not be overwritten: no lookup finds them, but they lie on disk.
    pub failed: u64,
}

/// A request's wish to forget, that has begun.
#[derive(Debug, Clone, Copy)]
pub(super) enum Forgetting {
    /// The blocks are dropped, and bytes are still to be overwritten. With the request's number,
    /// and what both tiers had overwritten before.
    Erasing(u64, ForgetReport),
    /// All is done.
    Over(ForgetReport),
}
