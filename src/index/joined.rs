//! Index blocks that are made of several smaller blocks of an engine.
//!
//! An index block is held where all its pieces are. Pieces before the last are *partial*: their
//! tokens are kept until the last one tells the key.

use hashbrown::HashMap;

use super::keys::PLAIN;
use super::tiers::FleetTier;
use xxhash_rust::xxh3::xxh3_64;

/// A piece that is not the last one of its index block.
#[derive(Debug, Clone)]
struct Partial {
    /// Key before the index block.
    base: u64,
    /// Hashes of the pieces so far, this one included.
    pieces: Vec<u64>,
    tokens: Vec<u32>,
    extras: Vec<u64>,
}

/// What one more piece makes.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// Not yet a whole block.
    Partial,
    /// A whole one: what is before it, its tokens, the digest of its extra keys.
    Whole(u64, Vec<u32>, u64),
}

/// What is after which point of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    /// A border of index blocks: the key before it.
    Key(u64),
    /// The piece with this hash.
    Piece(u64),
}

/// The pieces of one column.
#[derive(Debug, Default)]
pub struct Joined {
    partials: HashMap<u64, Partial>,
    /// Pieces of an index block.
    blocks: HashMap<u64, Box<[u64]>>,
    /// Index blocks that a piece is part of.
    memberships: HashMap<u64, Vec<u64>>,
}

impl Joined {
    /// Whether this is a known piece within an index block.
    pub fn has_partial(&self, hash: u64) -> bool {
        self.partials.contains_key(&hash)
    }

    /// Adds a piece; `ratio` of them make a block. `None`: what is before it is not known.
    pub fn add(&mut self, before: Before, hash: u64, tokens: &[u32], extra: u64, ratio: usize) -> Option<Piece> {
        let mut partial = match before {
            Before::Key(base) => Partial { base, pieces: Vec::new(), tokens: Vec::new(), extras: Vec::new() },
            Before::Piece(parent) => self.partials.get(&parent)?.clone(),
        };
        partial.pieces.push(hash);
        partial.tokens.extend_from_slice(tokens);
        partial.extras.push(extra);
        if partial.pieces.len() < ratio {
            self.partials.insert(hash, partial);
            return Some(Piece::Partial);
        }
        // A salt stands at the very start, on both sides. Anything else lies differently in blocks
        // of another size: such a block is never asked for.
        let extra = match partial.extras.split_first() {
            Some((first, rest)) if rest.iter().all(|extra| *extra == PLAIN) => *first,
            _ => xxh3_64(bytemuck::cast_slice(&partial.extras)),
        };
        Some(Piece::Whole(partial.base, partial.tokens, extra))
    }

    /// Names a whole block, whose last piece is `hash` after `before`.
    pub fn name(&mut self, key: u64, before: Before, hash: u64) {
        if self.blocks.contains_key(&key) {
            return;
        }
        let mut pieces = match before {
            Before::Key(_) => Vec::new(),
            Before::Piece(parent) => self.partials.get(&parent).map_or_else(Vec::new, |partial| partial.pieces.clone()),
        };
        pieces.push(hash);
        for piece in &pieces {
            self.memberships.entry(*piece).or_default().push(key);
        }
        self.blocks.insert(key, pieces.into());
    }

    /// Index blocks that this piece is part of.
    pub fn memberships(&self, hash: u64) -> &[u64] {
        self.memberships.get(&hash).map_or(&[], Vec::as_slice)
    }

    /// Tiers of an index block, from those of its pieces: the tiers that have them all; else, where
    /// every piece is somewhere, the slowest needed.
    pub fn mask(&self, key: u64, mask_of: impl Fn(u64) -> u8) -> u8 {
        let Some(pieces) = self.blocks.get(&key) else { return 0 };
        let masks = || pieces.iter().map(|piece| mask_of(*piece));
        let common = masks().fold(u8::MAX, |all, mask| all & mask);
        if common != 0 || masks().any(|mask| mask == 0) {
            return common;
        }
        masks().map(FleetTier::best).max().map_or(0, FleetTier::bit)
    }

    /// Forgets a piece, and the blocks it was part of. Returns them.
    pub fn forget(&mut self, hash: u64) -> Vec<u64> {
        self.partials.remove(&hash);
        let keys = self.memberships.remove(&hash).unwrap_or_default();
        for key in &keys {
            for piece in self.blocks.remove(key).unwrap_or_default() {
                if let Some(of) = self.memberships.get_mut(&piece) {
                    of.retain(|other| other != key);
                }
            }
        }
        keys
    }

    /// Bytes in memory, roughly.
    pub fn bytes(&self) -> usize {
        let partial = |it: &Partial| (it.pieces.capacity() + it.extras.capacity()) * 8 + it.tokens.capacity() * 4;
        self.partials.allocation_size()
            + self.blocks.allocation_size()
            + self.memberships.allocation_size()
            + self.partials.len() * self.partials.values().next().map_or(0, partial)
            + self.blocks.len() * 64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_there_when_all_its_pieces_are() {
        let mut joined = Joined::default();
        assert_eq!(joined.add(Before::Key(9), 1, &[1, 2], PLAIN, 2), Some(Piece::Partial));
        assert_eq!(joined.add(Before::Piece(7), 8, &[3, 4], PLAIN, 2), None);
        let whole = joined.add(Before::Piece(1), 2, &[3, 4], PLAIN, 2);
        assert_eq!(whole, Some(Piece::Whole(9, vec![1, 2, 3, 4], PLAIN)));
        joined.name(77, Before::Piece(1), 2);
        assert_eq!((joined.memberships(1), joined.memberships(2)), (&[77][..], &[77][..]));
        let mask = |first: u8, second: u8| joined.mask(77, |piece| if piece == 1 { first } else { second });
        assert_eq!((mask(0b11, 0b01), mask(0b01, 0), mask(0b01, 0b110)), (0b01, 0, 0b10));
        assert_eq!((joined.forget(1), joined.memberships(2).len()), (vec![77], 0));
    }
}
