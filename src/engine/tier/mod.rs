//! The tier engine: every decision about blocks, in `EngineCore`.
//!
//! Owns all metadata of the dram and nvme tiers. Promises: a block is found only under the key it
//! was stored under and only when all its bytes are there; every hold ends; nothing here waits for
//! a copy.
//!
//! [`engine`] is what vLLM's hooks and the mover call. It is detached, or has an `attached` part
//! with the two `tiers`. Read the rest in a block's order: [`offload`] (a step completes blocks),
//! [`residency`] and [`extents`] (where they are; their states: [`slot_state`], [`extent_state`]),
//! `spill` (to disk), [`hit`] and [`load`] (a request comes back for them), `restore` (from disk),
//! `retire` (a request ends), [`adoption`] (after a restart), `forget` (erasure, by `remains`).
//! [`disk_tier`] is the nvme tier, `medium` its disk, [`mover`] its thread. [`machine`] tells
//! before all that what cannot work. [`what_if`] says what other capacities would find, `savings`
//! what loads were worth.

pub mod adoption;
mod announce;
mod attached;
mod census;
mod cleaning;
mod clock;
mod dirty;
pub mod disk_tier;
mod distinct;
pub mod engine;
pub mod extent_state;
pub mod extents;
mod forget;
mod forgetting;
pub mod health;
pub mod hit;
pub mod jobs;
mod kept;
pub mod load;
pub mod machine;
mod medium;
mod miniature;
pub mod mover;
pub mod namespace;
mod observe;
pub mod offload;
pub mod opening;
mod recorder;
mod remains;
pub mod replay;
pub mod requests;
pub mod reservation;
pub mod residency;
mod restore;
mod retention;
mod retire;
mod savings;
mod session;
pub mod slot_state;
mod spill;
mod staging_queue;
pub mod table;
mod tiers;
pub mod trace;
pub mod transfer;
pub mod transition;
pub mod warm_table;
pub mod what_if;
pub mod window;

pub use engine::TierEngine;
pub use forgetting::ForgetReport;
pub use observe::{StatsDelta, TenantDelta};
pub use offload::Offer;
pub use requests::Arrival;
