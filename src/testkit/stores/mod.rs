//! Stores on disk whose blocks follow from their numbers, so that whatever is read can be checked
//! without trusting the disk.

pub mod blocks;
pub mod disk;
pub mod place;
