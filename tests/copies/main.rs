//! Copies between a KV cache and the pool: one suite that every [`kvcellar_engine::gpu::Copier`] must
//! pass, and the copy worker on top of it.
//!
//! The suite (`conformance.rs`) runs against the host copier and against a fake (`fake.rs`) that
//! fails, holds and reorders what it is told to. The fake passes the same suite, so what the
//! worker's tests show with it holds for a real copier. Everything random has a fixed seed,
//! `KVCELLAR_SEED=n` takes another one; it is printed.

#![allow(
    clippy::needless_for_each,
    clippy::single_match_else,
    clippy::doc_markdown,
    clippy::type_complexity,
    clippy::duration_suboptimal_units,
    reason = "reads better in a test"
)]
#![expect(clippy::expect_used, reason = "what goes wrong in a test's own helper fails the test")]

mod hashing;
mod views;
mod worker;

kvcellar_testkit::copier_conformance!(of_host, kvcellar_testkit::copies::scene::Host);
kvcellar_testkit::copier_conformance!(of_fake, kvcellar_testkit::copies::scene::Fake);
