//! Pool files: who may open them, what a later engine takes over, and what damage and sudden death
//! leave behind.
//!
//! Blocks are stored as in production, through the tier engine, with this test in the place of the
//! copy workers. What each block's key, tokens and bytes must be follows from its number
//! (`blocks.rs`), so that anything adopted can be checked without trusting the file.
//!
//! `KVCELLAR_SEEDS=n` tries n damaged files; `KVCELLAR_SEED=n` seeds the kills. Both print what
//! they used.

#![allow(
    clippy::needless_for_each,
    clippy::single_match_else,
    clippy::doc_markdown,
    clippy::type_complexity,
    clippy::duration_suboptimal_units,
    reason = "reads better in a test"
)]
#![expect(clippy::expect_used, clippy::panic, reason = "what goes wrong in a test's own helper fails the test")]

mod adapters;
mod adoption;
mod blocks;
mod damage;
mod growth;
mod huge;
mod killed;
mod listing;
mod mounts;
mod opening;
mod place;
mod privacy;
mod refused;
mod room;
mod sharing;
mod stock;
