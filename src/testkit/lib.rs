//! What the tests of several crates share: seeded choices, a KV cache and copiers that do as they
//! are told, a disk that fails as told, stores with known contents. Suites that every
//! implementation of a trait has to pass are here, too.
//!
//! What goes wrong in a helper ends the test.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    clippy::needless_for_each,
    clippy::single_match_else,
    clippy::doc_markdown,
    clippy::type_complexity,
    clippy::duration_suboptimal_units,
    clippy::new_without_default,
    clippy::should_implement_trait,
    missing_docs,
    reason = "tests, which only live elsewhere because several crates need them"
)]

pub mod confined;
pub mod copies;
pub mod faulty_disk;
pub mod random;
pub mod stores;
#[cfg(feature = "cuda")]
pub mod stub_cuda;
