//! KV Cellar: keeps the KV cache of LLM inference beyond GPU memory.
//!
//! # A block's way
//!
//! vLLM fills a block of its KV cache in some step. The connector tells the [`tier`] engine in
//! `EngineCore`, which finds or frees a slot of the shared host pool ([`pool`]), asking the
//! eviction policy ([`policy`]) whom to drop, and writes a copy order into the step's
//! [`block::plan`]. Every worker's [`gpu::worker`] executes its own rank's part of that order after
//! the step and sets its bit in the slot's line of the [`pool::slot_table`]. When the bits of all
//! writing ranks are there the tier engine makes the block visible, and from then on a request with
//! the same prefix finds it: its blocks are leased, copied back asynchronously, and vLLM computes
//! only what is missing.
//!
//! # An event's way
//!
//! The one function that changes a block's state ([`tier::residency`]) also appends the event to
//! the [`events::log`]. The connector takes runs of events after each step, turns them into vLLM's
//! own event objects, and vLLM publishes them after its own.
//!
//! # Who may call whom
//!
//! `python -> tier -> {gpu, pool, nvme, policy, events} -> block`; `cli` may call everything. The
//! test `architecture` holds the crate to this.

#![warn(missing_docs)]

pub mod block;
pub mod cli;
pub mod config;
pub mod error;
pub mod events;
pub mod gpu;
pub mod index;
pub mod limits;
pub mod logging;
pub mod metrics;
pub mod nvme;
pub mod policy;
pub mod pool;
#[cfg(feature = "serve")]
pub mod route;
pub mod tier;

#[cfg(feature = "python")]
mod python;
