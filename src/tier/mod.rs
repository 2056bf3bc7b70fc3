//! The tier engine: every decision about blocks, in `EngineCore`.
//!
//! Owns all metadata of the dram tier. Promises: a block is found only under the key it was stored under and only when all its bytes are
//! there; every hold ends; nothing here waits for a copy. Read the files in a block's order: [`offload`] (a step completes blocks),
//! [`residency`] (where they are), [`hit`] and [`load`] (a request comes back for them), [`adoption`] (after a restart).

pub mod adoption;
pub mod engine;
pub mod hit;
pub mod load;
pub mod namespace;
pub mod offload;
pub mod requests;
pub mod residency;
pub mod table;
pub mod trace;

pub use engine::TierEngine;
pub use offload::Offer;
