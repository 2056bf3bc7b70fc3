//! The atomics of the slot table: the processor's, or a schedule explorer's under the feature
//! `shuttle`.

#[cfg(not(feature = "shuttle"))]
pub(super) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

#[cfg(feature = "shuttle")]
pub(super) use shuttle::sync::atomic::{AtomicU32, AtomicU64, Ordering};
