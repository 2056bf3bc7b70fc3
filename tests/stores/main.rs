//! Stores on disk: their formats, who may open them, what a later engine finds, and what damage
//! leaves of them.
//!
//! What each block's key and bytes must be follows from its number (`blocks.rs`), so that whatever
//! is read can be checked without trusting the disk.
//!
//! `KVCELLAR_SEEDS=n` tries n damaged stores; a failure prints the seed, and `KVCELLAR_SEED=n`
//! tries that one.

#![expect(clippy::expect_used, reason = "what goes wrong in a test's own code fails the test")]

mod adoption;
mod capacity;
mod damage;
mod formats;
mod ledger;
mod privacy;
mod torn;
