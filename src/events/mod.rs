//! What happened to blocks, in order, until vLLM takes it.
//!
//! Owns: the queue of events and the joining of neighbours. Promises: order is kept; a full queue loses new events, counts them, and never
//! grows. Only the tier engine's transition function appends.

pub mod log;

pub use log::{EventLog, Run};
