//! `kvcellar simulate`: how a recorded or made-up workload would fare with tiers of a size, under
//! each policy, and what the best possible one would make of it.
//!
//! The tiers' books, policies and decisions are the engine's own
//! ([`kvcellar_engine::tier::replay`]); the [`device`] is a model. Not modelled: requests that run
//! beside each other, queues, the GPU's own cache, blocks of answers that a trace does not name,
//! and the time of writes.

pub mod account;
pub mod clairvoyant;
pub mod device;
pub mod options;
pub mod picture;
pub mod replay;
pub mod request;
pub mod sweep;
pub mod synthetic;
pub mod table;
pub mod trace;
pub mod what_if;

pub use options::{SimulateOptions, run};
