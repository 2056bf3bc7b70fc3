//! The disks of the NVMe tier: one suite that every [`kvcellar_engine::nvme::disk::Disk`] must pass, and
//! what only one of them has to do.
//!
//! The suite (`conformance.rs`) runs against the ring with and without registered memory, against
//! threads, and against a fake (`faulty.rs`) that fails, loses, tears and reorders what it is told
//! to. Everything random has a fixed seed, `KVCELLAR_SEED=n` takes another one; it is printed.

#![allow(clippy::doc_markdown, clippy::naive_bytecount, clippy::needless_for_each, reason = "reads better in a test")]
#![expect(clippy::expect_used, reason = "what goes wrong in a test's own helper fails the test")]

mod conformance;
mod faults;
mod inbox;
mod refusal;
mod ringing;
mod segments;
