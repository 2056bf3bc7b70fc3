//! What a start wants of a pool, whether one is adopted or made.

use std::path::Path;

use kvcellar_block::SlotGeometry;

/// What kind of pool a start wants.
#[derive(Debug, Clone)]
pub struct Wish<'a> {
    /// Shared-memory directory.
    pub pool_dir: &'a Path,
    /// Fingerprint of everything that makes bytes interchangeable.
    pub namespace: [u8; 16],
    /// The facts behind the fingerprint, as JSON.
    pub facts: &'a str,
    /// This engine's part of the configured size.
    pub bytes: u64,
    /// The configured size, for all engines of this user below `pool_dir`.
    pub total: u64,
    /// The size was written by the user, not a default.
    pub explicit: bool,
    /// Whether contents of an earlier engine may be adopted.
    pub adopt: bool,
    /// Sizes of a slot.
    pub geometry: &'a SlotGeometry,
    /// Memory nodes next to the devices that copy; empty: not known.
    pub near: &'a [u32],
}

/// A number that no earlier owner of a pool used: time and process id, mixed.
pub(super) fn new_epoch() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    xxhash_rust::xxh3::xxh3_64_with_seed(&now.as_nanos().to_le_bytes(), u64::from(std::process::id())).max(1)
}
