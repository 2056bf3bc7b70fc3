//! One request of a workload.

use serde::Deserialize;

/// One request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct TracedRequest {
    /// When it came, in ms from the trace's beginning.
    #[serde(rename = "timestamp")]
    pub at_ms: u64,
    /// Tokens of its prompt.
    #[serde(rename = "input_length")]
    pub prompt_tokens: u32,
    /// Tokens of its answer.
    #[serde(rename = "output_length")]
    pub answer_tokens: u32,
    /// Its prompt's blocks in order. Equal ids stand for equal prefixes up to and including the
    /// block. The last one may be partial.
    #[serde(rename = "hash_ids")]
    pub blocks: Vec<u64>,
    /// Tokens of a block, where the trace says it.
    #[serde(default)]
    pub block_tokens: Option<u32>,
    /// Its tenant, where the trace says it.
    #[serde(default)]
    pub tenant: Option<String>,
}

impl TracedRequest {
    /// Tokens of its first `blocks` blocks.
    pub fn tokens_of(&self, blocks: u32, block_tokens: u32) -> u32 {
        blocks.saturating_mul(block_tokens).min(self.prompt_tokens)
    }
}
