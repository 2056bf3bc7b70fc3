//! Copies between a KV cache and the pool: [`conformance`] is the suite that every
//! [`kvcellar_engine::gpu::Copier`] must pass; [`fake`] is one that fails, holds and reorders what
//! it is told to, and passes the same suite.

pub mod cache;
pub mod conformance;
pub mod fake;
pub mod ledger;
pub mod scene;
