//! Blocks of an engine that are several of the index.
//!
//! Blocks of two prompts that part within an engine's block share the index blocks before that
//! point: such a key is held as long as any block with it is. What an engine can use ends at a
//! border of its own blocks, which a question takes into account.

use hashbrown::HashMap;

/// The keys of one column's blocks before each block's last one.
#[derive(Debug, Default)]
pub struct Split {
    keys: HashMap<u64, Box<[u64]>>,
    blocks: HashMap<u64, Vec<u64>>,
}

impl Split {
    /// Names a block: its keys but the last.
    pub fn name(&mut self, hash: u64, keys: Vec<u64>) {
        if self.keys.contains_key(&hash) {
            return;
        }
        for key in &keys {
            self.blocks.entry(*key).or_default().push(hash);
        }
        self.keys.insert(hash, keys.into());
    }

    /// Keys of a block but its last.
    pub fn keys(&self, hash: u64) -> &[u64] {
        self.keys.get(&hash).map_or(&[], |keys| keys)
    }

    /// Tiers in which any block with this key is.
    pub fn mask(&self, key: u64, mask_of: impl Fn(u64) -> u8) -> u8 {
        self.blocks.get(&key).map_or(0, |blocks| blocks.iter().fold(0, |mask, hash| mask | mask_of(*hash)))
    }

    /// Forgets a block that nobody holds.
    pub fn forget(&mut self, hash: u64) {
        for key in self.keys.remove(&hash).unwrap_or_default() {
            if let Some(blocks) = self.blocks.get_mut(&key) {
                blocks.retain(|other| *other != hash);
                if blocks.is_empty() {
                    self.blocks.remove(&key);
                }
            }
        }
    }

    /// Bytes in memory, roughly.
    pub fn bytes(&self) -> usize {
        let keys = self.keys.values().next().map_or(0, |keys| keys.len());
        self.keys.allocation_size()
            + self.blocks.allocation_size()
            + self.keys.len() * keys * 8
            + self.blocks.len() * 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_key_is_held_by_any_of_its_blocks() {
        let mut split = Split::default();
        split.name(1, vec![10, 11]);
        split.name(2, vec![10, 21]);
        let mask = |key| split.mask(key, |hash| hash as u8);
        assert_eq!((mask(10), mask(11), mask(21), mask(9)), (3, 1, 2, 0));
        split.forget(1);
        assert_eq!((split.mask(10, |hash| hash as u8), split.keys(1), split.keys(2)), (2, &[][..], &[10, 21][..]));
    }
}
