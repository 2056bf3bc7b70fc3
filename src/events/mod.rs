//! What happened to blocks: an engine's own log of it, and KVEvents on the wire.
//!
//! [`log`]: the queue of one engine's events until vLLM takes them. [`wire`], [`decode`],
//! [`encode`]: batches of a fleet's engines as they travel. [`follow`]: one publisher's numbered
//! batches through losses and restarts. [`publisher`], [`subscriber`]: the sockets.

pub mod decode;
pub mod encode;
pub mod follow;
pub mod log;
pub mod msgpack;
#[cfg(feature = "serve")]
pub mod publisher;
pub mod recording;
#[cfg(feature = "serve")]
pub mod subscriber;
pub mod wire;

pub use log::{EventLog, Run};
