//! Attention over the last tokens.

use serde::{Deserialize, Serialize};

use super::HitRule;

/// A token attends to itself and the `window - 1` tokens before it, also with MLA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlidingWindow {
    /// Window in tokens.
    pub window: u32,
    /// Tokens kept below the window for speculative decoding.
    pub extra: u32,
}

impl HitRule for SlidingWindow {
    fn first_needed(&self, end: u32, block_tokens: u32) -> u32 {
        let tail = (self.window.saturating_sub(1) + self.extra).div_ceil(block_tokens);
        (end / block_tokens).saturating_sub(tail)
    }

    fn window(&self) -> Option<u32> {
        Some(self.window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_needs_the_blocks_its_tokens_touch() {
        let tail = |window, extra| 100 - SlidingWindow { window, extra }.first_needed(1600, 16);
        assert_eq!([tail(64, 0), tail(65, 0), tail(66, 0), tail(1, 0), tail(64, 2)], [4, 4, 5, 0, 5]);
    }
}
