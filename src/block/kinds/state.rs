//! States of recurrences and convolutions.

use super::HitRule;

/// A block holds the state of a recurrence or convolution at its end, which stands for all tokens
/// before it: Mamba, gated delta net, Kimi's KDA, short convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateAtEnd;

impl HitRule for StateAtEnd {
    fn first_needed(&self, end: u32, block_tokens: u32) -> u32 {
        (end / block_tokens).saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_at_the_end_is_all_that_is_needed() {
        assert_eq!([0, 16, 32, 160].map(|end| StateAtEnd.first_needed(end, 16)), [0, 0, 1, 9]);
    }
}
