//! The whole way of a block over the disk: engine, pool, store, device, mover, copy worker and
//! follower are the real ones; only vLLM is played by the test, whose KV cache holds bytes that are
//! computed from each block's key. So a byte that comes back under a wrong key is a wrong byte.
//!
//! All of it runs three times: over a disk that reads and writes the slots, over staging, and with
//! the adaptive policy in both tiers.

#![allow(clippy::expect_used, clippy::panic, reason = "a broken expectation is a failed test")]
#![allow(unsafe_code, reason = "the KV cache's addresses are handed to the copier")]

mod budget;
mod faults;
mod forget;
mod kills;
mod restart;
mod rig;
mod tenants;
mod way;
