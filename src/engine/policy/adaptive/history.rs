//! What is known of a block's past, and the class that follows from it: blocks of one class are
//! taken to come back alike.
//!
//! A block that was used once is told by the prompt that brought it: how long that was, and how
//! many earlier requests its prefix goes back to (the turns of a conversation). One that was used
//! more often is told by how often, and by how long it took to come back.

use super::ages::age_range;

/// Number of classes.
pub(super) const CLASSES: usize = SHAPES + GAPS * 3;

/// Classes of blocks that were used once.
const SHAPES: usize = LENGTHS * TURNS;
const LENGTHS: usize = 4;
const TURNS: usize = 4;

/// Times between uses that are told apart: each is about three times the one before.
const GAPS: usize = 8;

/// A prefix that so many requests have used is shared by conversations: what follows it is the
/// first turn of a new one.
const SHARED_USES: u8 = 8;

/// Tokens from which on a prompt is longer than one of the class before.
const PROMPT_TOKENS: [u32; LENGTHS - 1] = [2 << 10, 8 << 10, 32 << 10];

/// A block's past.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct History {
    /// The epoch of its last use.
    pub(super) used: u32,
    /// Its class since then.
    pub(super) class: u8,
    /// Requests that used it, as far as they are counted.
    uses: u8,
    /// Which time it took to come back, lately.
    gap: u8,
    /// Turns of its conversation before the one that brought it, as far as they are counted.
    turn: u8,
}

impl History {
    /// The past of a block that was never seen before, below a block with this past.
    pub(super) fn begin(now: u32, prompt_tokens: u32, parent: Option<Self>) -> Self {
        let turn = match parent {
            Some(Self { uses: 1, turn, .. }) => turn,
            Some(Self { uses, turn, .. }) if uses <= SHARED_USES => (turn + 1).min(TURNS as u8 - 1),
            _ => 0,
        };
        let length = PROMPT_TOKENS.partition_point(|least| *least <= prompt_tokens) as u8;
        Self { used: now, class: length * TURNS as u8 + turn, uses: 1, gap: 0, turn }
    }

    /// The past after one more use.
    pub(super) fn go_on(self, now: u32) -> Self {
        let took = (age_range(now.wrapping_sub(self.used)).saturating_sub(1) / 3).min(GAPS - 1) as u8;
        let gap = if self.uses == 1 { took } else { (self.gap + took).div_ceil(2) };
        let uses = self.uses.saturating_add(1);
        let often = match uses {
            ..=2 => 0,
            3..=5 => 1,
            _ => 2,
        };
        let class = SHAPES as u8 + often * GAPS as u8 + gap;
        Self { used: now, class, uses, gap, turn: self.turn }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_turn_follows_from_the_parent() {
        let first = History::begin(0, 1000, None);
        let next = |parent: History| History::begin(9, 1000, Some(parent)).turn;
        assert_eq!((first.turn, next(first)), (0, 0), "one request brought both");
        let continued = first.go_on(5);
        assert_eq!(next(continued), 1, "the parent is of an earlier request");
        let shared = (0..SHARED_USES).fold(first, |block, _| block.go_on(5));
        assert_eq!(next(shared), 0, "what many share is no turn");
        let late = (0..9).fold(first, |block, _| History::begin(0, 1000, Some(block.go_on(1))));
        assert_eq!(usize::from(late.turn), TURNS - 1);
    }

    #[test]
    fn every_past_has_a_class() {
        for prompt_tokens in [0, 3000, 9000, u32::MAX] {
            let mut block = History::begin(0, prompt_tokens, None);
            assert!(usize::from(block.class) < SHAPES);
            for (uses, gap) in [(2, 0), (3, 1), (6, 40), (7, 100_000), (8, u32::MAX)] {
                block = History { uses: uses - 1, ..block }.go_on(block.used.wrapping_add(gap));
                assert!((SHAPES..CLASSES).contains(&usize::from(block.class)), "{block:?}");
            }
        }
    }
}
