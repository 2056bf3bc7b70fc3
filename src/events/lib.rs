//! KVEvents on the wire: what engines say has happened to their blocks.
//!
//! [`wire`], [`decode`], [`encode`]: batches of a fleet's engines as they travel. [`follow`]: one
//! publisher's numbered batches through losses and restarts. [`publisher`], [`subscriber`]: the
//! sockets.

pub mod decode;
pub mod encode;
mod endpoint;
pub mod follow;
mod incoming;
pub mod limits;
pub mod msgpack;
pub mod publisher;
pub mod recording;
pub mod subscriber;
pub mod wire;
pub mod zmtp;
