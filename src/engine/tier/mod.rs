//! The tier engine: every decision about blocks, in `EngineCore`.
//!
//! Owns all metadata of the dram and nvme tiers. Promises: a block is found only under the key it
//! was stored under and only when all its bytes are there; every hold ends; nothing here waits for
//! a copy. Read the files in a block's order: [`offload`] (a step completes blocks), [`residency`]
//! and [`extents`] (where they are), [`spill`] (to disk), [`hit`] and [`load`] (a request comes
//! back for them), [`restore`] (from disk), [`adoption`] (after a restart). [`disk_tier`] is the
//! nvme tier's state, [`mover`] its thread. [`machine`] tells before all that what cannot work.

pub mod adoption;
pub mod disk_tier;
pub mod engine;
mod extent_state;
pub mod extents;
pub mod health;
pub mod hit;
pub mod load;
pub mod machine;
pub mod mover;
pub mod namespace;
pub mod offload;
pub mod opening;
pub mod requests;
pub mod residency;
pub mod restore;
pub mod spill;
pub mod table;
pub mod trace;
pub mod warm_table;
pub mod window;

pub use engine::TierEngine;
pub use offload::Offer;
