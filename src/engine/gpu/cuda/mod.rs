//! Copies on NVIDIA GPUs. Owns: the driver's library, our streams and events, the pinning of the
//! pool, and how copies are dispatched.
//!
//! Promises: nothing here waits on vLLM's thread, except for a fence whose copies still have to be
//! handed to the device, and then only for that; no copy reads a block before the steps that vLLM's
//! stream was given at its hook have written it; no order is answered before the device has said
//! that its copies are over. Where there is no driver, or an old one, everything is an error with a
//! remedy.
//!
//! To be read in this order: [`driver`] (the library), [`device`] (context, streams, events),
//! [`pinning`], [`dispatch`] with [`kernel`], `staging` and [`nvrtc`] (how fragments are moved),
//! [`calibration`] (which way for which size), `lane` (one direction's jobs), [`copier`] (all of it
//! behind the trait).

pub mod calibration;
pub mod copier;
pub mod device;
pub mod dispatch;
pub mod driver;
pub mod kernel;
mod lane;
pub mod meter;
pub mod notes;
pub mod nvrtc;
pub mod pinning;
mod room;
mod staging;
