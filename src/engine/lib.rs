//! The offload engine: keeps a vLLM engine's KV blocks in host memory and on disk.
//!
//! # A block's way
//!
//! vLLM fills a block of its KV cache in some step. The connector tells the [`tier`] engine in
//! `EngineCore`, which finds or frees a slot of the shared host pool ([`pool`]), asking the
//! eviction policy ([`policy`]) whom to drop, and writes a copy order into the step's
//! [`kvcellar_block::plan`]. Every worker's [`gpu::worker`] executes its own rank's part of that
//! order after the step and sets its bit in the slot's line of the [`pool::slot_table`]. When the
//! bits of all writing ranks are there the tier engine makes the block visible, and from then on a
//! request with the same prefix finds it: its blocks are leased, copied back asynchronously, and
//! vLLM computes only what is missing.
//!
//! # An event's way
//!
//! The one function that changes a block's state ([`tier::residency`]) also appends the event to
//! the [`event_log`]. The connector takes runs of events after each step, turns them into vLLM's
//! own event objects, and vLLM publishes them after its own.
//!
//! # Who may call whom
//!
//! `tier -> {gpu, pool, nvme, policy, event_log}`; the test `architecture` holds the modules to
//! this.

pub mod checksum;
pub mod config;
pub mod event_log;
pub mod gpu;
pub mod invariant;
pub mod limits;
pub mod log_queue;
pub mod metrics;
pub mod nvme;
pub mod owned;
pub mod policy;
pub mod pool;
pub mod tier;
