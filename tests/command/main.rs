//! The command over what it is for: stores on disk, a machine that refuses something, a stub of a
//! GPU's driver, and a router with its clients.

#![expect(clippy::expect_used, clippy::panic, reason = "what goes wrong in a test's own helper fails the test")]

#[cfg(feature = "cuda")]
mod benchmarks;
mod clients;
mod fleet;
mod health;
mod leaving;
mod publishers;
mod refusal;
mod stores;
mod top;
