//! The NVMe tier's device and format: what lies on disk, and how bytes get there and back.
//!
//! Owns: the store's directory, its files, the format of superblock, extents and snapshot, and the
//! implementations of [`disk::Disk`]. Promises: nothing that is read is trusted before its
//! checksums were compared; a buffer in flight is owned by its operation. Does not decide which
//! block lies where: that is the tier engine's.

pub mod buffer;
pub mod directory;
pub mod disk;
pub mod erasure;
pub mod extent;
pub mod inspection;
pub mod ledger;
mod ownership;
pub mod page_trial;
pub mod probe;
mod queue;
pub mod recovery;
pub mod registry;
pub mod ring;
pub mod segments;
pub mod snapshot;
pub mod space;
pub mod staging;
pub mod store;
pub mod superblock;
pub mod threads;
