//! Vocabulary without I/O: what a block is called, how large it is, what describes it, and the
//! orders that move it.

pub mod descriptor;
pub mod geometry;
pub mod key;
pub mod plan;
mod prefetch;

pub use geometry::{GroupKind, GroupSpec, Grouping, RankPart, SlotGeometry};
pub use key::{AdapterId, BlockHash, BlockKey, ExtentIndex, Generation, GroupIndex, SlotIndex, Tier};
pub use prefetch::prefetch;
