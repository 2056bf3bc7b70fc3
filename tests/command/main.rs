//! The command over what it is for: stores on disk, a machine that refuses something, a stub of a
//! GPU's driver.

#![expect(clippy::expect_used, reason = "what goes wrong in a test's own helper fails the test")]

#[cfg(feature = "cuda")]
mod benchmarks;
mod health;
mod refusal;
mod stores;
