//! What the writer knows of one engine's group beside what readers see.

use hashbrown::HashMap;

use super::joined::Joined;
use super::links::Links;
use super::roster::{EngineId, Need};
use super::split::Split;

/// How an engine's blocks relate to those of the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ratio {
    /// The same size.
    Same,
    /// One is so many of the index.
    Split(usize),
    /// So many are one of the index.
    Join(usize),
    /// Neither divides the other: tokens are of no use.
    Odd,
}

impl Ratio {
    /// Of blocks with so many tokens each.
    pub fn of(engine: u32, index: u32) -> Self {
        match (engine, index) {
            (0, _) | (_, 0) => Self::Odd,
            (engine, index) if engine == index => Self::Same,
            (engine, index) if engine.is_multiple_of(index) => Self::Split((engine / index) as usize),
            (engine, index) if index.is_multiple_of(engine) => Self::Join((index / engine) as usize),
            _ => Self::Odd,
        }
    }
}

/// One engine's group.
#[derive(Debug)]
pub struct ColumnState {
    /// Its engine.
    pub engine: EngineId,
    /// Its number in events.
    pub group: u32,
    /// What it needs of a prefix.
    pub need: Need,
    /// Tokens of its blocks, once an event has told.
    pub block_tokens: u32,
    /// How they relate to those of the index.
    pub ratio: Ratio,
    /// Its hashes.
    pub links: Links,
    /// Blocks that are several of the index.
    pub split: Split,
    /// Blocks that are pieces of one of the index.
    pub joined: Joined,
    /// Keys expected here after a decision, and until when, in ms.
    pub expected: HashMap<u64, u64>,
    /// Bytes of all this as last counted.
    pub counted: usize,
}

impl ColumnState {
    /// Without a block.
    pub fn new(engine: EngineId, group: u32) -> Self {
        Self {
            engine,
            group,
            need: Need::Whole,
            block_tokens: 0,
            ratio: Ratio::Odd,
            links: Links::default(),
            split: Split::default(),
            joined: Joined::default(),
            expected: HashMap::new(),
            counted: 0,
        }
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.links.bytes() + self.split.bytes() + self.joined.bytes() + self.expected.allocation_size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_divide_each_other_are_bridged() {
        assert_eq!(Ratio::of(16, 16), Ratio::Same);
        assert_eq!(Ratio::of(64, 16), Ratio::Split(4));
        assert_eq!(Ratio::of(16, 64), Ratio::Join(4));
        assert_eq!((Ratio::of(48, 64), Ratio::of(0, 16)), (Ratio::Odd, Ratio::Odd));
    }
}
