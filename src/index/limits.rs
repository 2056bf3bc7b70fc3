//! Bounds of the index, and what happens at them.

pub use kvcellar_block::limits::GROUPS_MAX;

/// Hashes without a holder that an engine's group may keep although it has fewer blocks than that.
/// Beyond it, and beyond its number of blocks, the oldest are forgotten: a child stored later waits
/// as an orphan.
pub const GHOSTS_MIN: usize = 4096;

/// Bytes of blocks that wait for their parent, all engines together. At the bound the oldest are
/// dropped and counted: misses.
pub const ORPHAN_BYTES_MAX: usize = 64 << 20;

/// Smallest memory bound of an index.
pub const INDEX_BYTES_MIN: usize = 128 << 20;

/// Engines of one index at once. Further ones are refused.
pub const ENGINES_MAX: usize = 65_536;

const _: () = assert!(2 * ORPHAN_BYTES_MAX <= INDEX_BYTES_MIN, "orphans leave room for blocks");
const _: () = assert!(ENGINES_MAX * GROUPS_MAX <= 1 << 24, "a column's number fits beside its tiers");
