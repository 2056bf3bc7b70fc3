//! Copies on a GPU, over a stub of the driver's library (`stub/`): built here with the system's C
//! compiler and loaded in the driver's place.
//!
//! The copier passes the suite of all copiers; the order of copies and steps is checked by the
//! stub, and the check is shown to find what it is for; faults, missing functions and old drivers
//! are values. What a GPU does and how fast it is, the stub cannot say. Everything random has a
//! fixed seed, `KVCELLAR_SEED=n` takes another one; it is printed.

#![allow(
    clippy::needless_for_each,
    clippy::single_match_else,
    clippy::doc_markdown,
    clippy::type_complexity,
    clippy::duration_suboptimal_units,
    reason = "reads better in a test"
)]
#![expect(clippy::expect_used, reason = "what goes wrong in a test's own helper fails the test")]

mod apart;
mod drivers;
mod faults;
mod histories;
mod kernels;
mod maker;
mod order;
mod pinning;
mod vllm;

kvcellar_testkit::copier_conformance!(copier, crate::maker::Cuda);
