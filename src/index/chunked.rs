//! Memory that grows and never moves, so that readers need no lock to look into it.
//!
//! Items of the same number of words, found by index. Chunks double in size; a chunk that was made
//! stays until the end.

use std::sync::OnceLock;

/// Items of the first chunk.
const FIRST: usize = 64;
const CHUNKS: usize = 27;

/// Items of `words` words each.
#[derive(Debug)]
pub struct Chunked<W> {
    words: usize,
    chunks: [OnceLock<Box<[W]>>; CHUNKS],
}

impl<W: Default> Chunked<W> {
    /// Empty.
    pub fn new(words: usize) -> Self {
        Self { words, chunks: [const { OnceLock::new() }; CHUNKS] }
    }

    fn place(index: u32) -> (usize, usize) {
        let shifted = index as usize + FIRST;
        let chunk = (shifted / FIRST).ilog2() as usize;
        (chunk, shifted - (FIRST << chunk))
    }

    /// The words of an item; `None` when its chunk was never made.
    #[inline]
    pub fn get(&self, index: u32) -> Option<&[W]> {
        let (chunk, item) = Self::place(index);
        let chunk = self.chunks.get(chunk)?.get()?;
        chunk.get(item * self.words..(item + 1) * self.words)
    }

    /// The words of an item, whose chunk is made if need be.
    pub fn make(&self, index: u32) -> &[W] {
        let (chunk, item) = Self::place(index);
        let words = self.words;
        let made = self.chunks[chunk].get_or_init(|| (0..(FIRST << chunk) * words).map(|_| W::default()).collect());
        &made[item * words..(item + 1) * words]
    }

    /// Bytes that making this item allocates; 0 when its chunk is there.
    pub fn cost(&self, index: u32) -> usize {
        let (chunk, _) = Self::place(index);
        if self.chunks[chunk].get().is_some() { 0 } else { (FIRST << chunk) * self.words * size_of::<W>() }
    }

    /// Bytes of all chunks.
    pub fn bytes(&self) -> usize {
        self.chunks.iter().filter_map(OnceLock::get).map(|chunk| size_of_val(&**chunk)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn every_item_has_its_own_words() {
        let items = Chunked::<AtomicU32>::new(3);
        for index in 0..1000 {
            items.make(index).iter().for_each(|word| word.store(index, Ordering::Relaxed));
        }
        for index in 0..1000 {
            assert!(items.get(index).expect("made").iter().all(|word| word.load(Ordering::Relaxed) == index));
        }
        assert!(items.get(100_000).is_none());
        assert!(items.cost(100_000) > 0 && items.cost(5) == 0);
        assert_eq!(items.bytes(), (64 + 128 + 256 + 512 + 1024) * 3 * 4);
    }
}
