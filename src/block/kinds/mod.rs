//! What the kinds of KV cache groups need, one file each.
//!
//! A kind answers one question: which blocks must be there for a request to resume at a token? The
//! hit rule, the order of eviction and the size of a load follow from the answer. Which vLLM spec
//! is of which kind, and when a block's bytes are real, is told in `python/kvcellar/groups.py`.

mod chunked_local;
mod full;
mod sliding_window;
mod state;

pub use chunked_local::ChunkedLocal;
pub use full::Full;
use serde::{Deserialize, Serialize};
pub use sliding_window::SlidingWindow;
pub use state::StateAtEnd;

/// What a kind says of itself.
pub trait HitRule {
    /// The first block that a request needs which resumes at `end` tokens. It needs this block and
    /// all that follow it up to `end`, and none before.
    ///
    /// `block_tokens`: tokens of one block, which divides `end`. The answer never falls when `end`
    /// grows, and is at most `end / block_tokens`.
    fn first_needed(&self, end: u32, block_tokens: u32) -> u32;

    /// A request needs every block before its end, wherever that is.
    fn needs_whole_prefix(&self) -> bool {
        false
    }

    /// Window in tokens, for events.
    fn window(&self) -> Option<u32> {
        None
    }
}

/// How a group's blocks are needed by a request that resumes at some token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupKind {
    /// See [`Full`].
    Full,
    /// See [`SlidingWindow`].
    SlidingWindow(SlidingWindow),
    /// See [`ChunkedLocal`].
    ChunkedLocal(ChunkedLocal),
    /// See [`StateAtEnd`].
    State,
}

impl GroupKind {
    /// The kind's own description.
    pub fn rule(&self) -> &dyn HitRule {
        match self {
            Self::Full => &Full,
            Self::SlidingWindow(window) => window,
            Self::ChunkedLocal(chunks) => chunks,
            Self::State => &StateAtEnd,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [GroupKind; 8] = [
        GroupKind::Full,
        GroupKind::SlidingWindow(SlidingWindow { window: 1, extra: 0 }),
        GroupKind::SlidingWindow(SlidingWindow { window: 50, extra: 3 }),
        GroupKind::SlidingWindow(SlidingWindow { window: 1 << 20, extra: 0 }),
        GroupKind::ChunkedLocal(ChunkedLocal { chunk: 16 }),
        GroupKind::ChunkedLocal(ChunkedLocal { chunk: 40 }),
        GroupKind::ChunkedLocal(ChunkedLocal { chunk: 1 }),
        GroupKind::State,
    ];

    #[test]
    fn what_is_needed_moves_forward_only_and_never_past_the_end() {
        for kind in KINDS {
            for block_tokens in [1, 4, 16] {
                let mut before = 0;
                for block in 0..100 {
                    let first = kind.rule().first_needed(block * block_tokens, block_tokens);
                    assert!(first <= block && first >= before, "{kind:?}, {block} blocks of {block_tokens}");
                    before = first;
                }
            }
        }
    }

    #[test]
    fn kinds_are_what_the_connector_writes() {
        let texts = [
            (r#""full""#, GroupKind::Full),
            (r#"{"sliding_window":{"window":64,"extra":2}}"#, {
                GroupKind::SlidingWindow(SlidingWindow { window: 64, extra: 2 })
            }),
            (r#"{"chunked_local":{"chunk":8192}}"#, GroupKind::ChunkedLocal(ChunkedLocal { chunk: 8192 })),
            (r#""state""#, GroupKind::State),
        ];
        for (text, kind) in texts {
            assert_eq!(serde_json::from_str::<GroupKind>(text).expect(text), kind);
        }
    }
}
