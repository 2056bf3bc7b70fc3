//! Attention over all tokens before: full attention, MLA, attention with sinks.

use super::HitRule;

/// A token attends to all tokens before it: full attention, MLA, attention with sinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

impl HitRule for Full {
    fn first_needed(&self, _end: u32, _block_tokens: u32) -> u32 {
        0
    }

    fn needs_whole_prefix(&self) -> bool {
        true
    }
}
