//! Vocabulary without I/O, for all crates: what a block is called, how large it is, what describes
//! it, and the orders that move it; what can go wrong; sizes as people read them.

pub mod descriptor;
pub mod error;
pub mod geometry;
pub mod key;
pub mod kinds;
pub mod limits;
pub mod log_lines;
pub mod plan;
mod prefetch;
pub mod salt;
pub mod size;

pub use geometry::{GroupSpec, Grouping, RankPart, SlotGeometry};
pub use key::{AdapterId, BlockHash, BlockKey, ExtentIndex, Generation, GroupIndex, SlotIndex, Tier};
pub use kinds::GroupKind;
pub use prefetch::prefetch;
pub use salt::SaltTag;
