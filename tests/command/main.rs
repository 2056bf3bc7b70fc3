//! The command over what it is for: stores on disk, a machine that refuses something, a stub of a
//! GPU's driver, a router with its clients, and an engine whose client it is.

#![expect(clippy::expect_used, clippy::panic, reason = "what goes wrong in a test's own helper fails the test")]

mod api_engine;
#[cfg(feature = "cuda")]
mod benchmarks;
mod clients;
mod fleet;
mod forget;
mod health;
mod leaving;
mod output;
mod publishers;
mod refusal;
mod stores;
mod top;
mod warm;
