//! Attention within chunks of tokens.

use serde::{Deserialize, Serialize};

use super::HitRule;

/// A token attends to the tokens of its own chunk alone, up to itself (Llama 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkedLocal {
    /// Tokens of a chunk.
    pub chunk: u32,
}

impl HitRule for ChunkedLocal {
    /// The block in which the next token's chunk begins; at the end of a chunk, nothing is needed.
    fn first_needed(&self, end: u32, block_tokens: u32) -> u32 {
        (end - end % self.chunk.max(1)) / block_tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chunk_of_the_next_token_is_needed_and_nothing_before_it() {
        let first = |end| ChunkedLocal { chunk: 32 }.first_needed(end, 16);
        assert_eq!([0, 16, 32, 48, 64].map(first), [0, 0, 2, 2, 4]);
        // A chunk that begins within a block needs that block.
        assert_eq!(ChunkedLocal { chunk: 40 }.first_needed(64, 16), 2);
    }
}
