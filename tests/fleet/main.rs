//! A fleet's events: the wire format, and an index that must equal a naive one after losses,
//! repeats, reconnections and restarts.
//!
//! `KVCELLAR_SEEDS=n` tries n fleets, `KVCELLAR_SEED=n` that one; a failure prints its seed.
//! `KVCELLAR_FLEET_STEPS=n` makes every engine live longer.

#![expect(clippy::expect_used, reason = "what goes wrong in a test's own code fails the test")]

mod allocations;
mod concurrent;
mod engine;
mod golden;
mod naive;
mod prompts;
mod simulation;
mod small;
