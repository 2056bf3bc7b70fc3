//! What was overwritten in a pool or a store that nobody uses.

use serde::Serialize;

/// Places that were overwritten.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Erased {
    /// Places that held bytes of the salt, found by lookups or not.
    pub blocks: u64,
    /// Places that held bytes of which nobody knows whose they are.
    pub unknown: u64,
    /// Bytes of all places that were overwritten, empty ones included.
    pub bytes: u64,
}

impl Erased {
    /// One place more. `is_of_salt`: it said so; `held_a_block`: there was something.
    pub fn add(&mut self, is_of_salt: bool, held_a_block: bool, bytes: u64) {
        self.blocks += u64::from(is_of_salt);
        self.unknown += u64::from(!is_of_salt && held_a_block);
        self.bytes += bytes;
    }
}
