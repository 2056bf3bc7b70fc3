//! Files and directories that one engine at a time owns: the pools below `pool_dir` and the stores
//! below `nvme_dir`.
//!
//! Owns who may look ([`private_dir`]), who may use ([`lock`]), and how both are shown to people
//! ([`listing`]). Does not know what is in them, nor which setting it works for: a
//! [`private_dir::Role`] says that.

pub mod erased;
pub mod listing;
pub mod lock;
pub mod private_dir;
