//! Texts that were encoded lately, with their ids: turns of a conversation come again with every
//! request.

use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;
use xxhash_rust::xxh3::xxh3_128;

const SHARDS: usize = 16;

/// Recent texts and their ids, within a bound of bytes.
#[derive(Debug)]
pub struct Memo {
    shards: Vec<Mutex<Shard>>,
    bytes_max: usize,
}

#[derive(Debug)]
struct Shard {
    entries: LruCache<u128, Arc<[u32]>>,
    bytes: usize,
}

/// What an entry takes beside its ids.
const ENTRY_BYTES: usize = 96;

impl Memo {
    /// Empty. `bytes_max`: bound of its memory.
    pub fn new(bytes_max: usize) -> Self {
        let shard = || Mutex::new(Shard { entries: LruCache::unbounded(), bytes: 0 });
        Self { shards: (0..SHARDS).map(|_| shard()).collect(), bytes_max: bytes_max / SHARDS }
    }

    /// The name of a text: 128 bits of hash, so that two texts share one never in practice.
    pub fn name(text: &str) -> u128 {
        xxh3_128(text.as_bytes())
    }

    fn shard(&self, name: u128) -> std::sync::MutexGuard<'_, Shard> {
        self.shards[name as usize % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ids of a text.
    pub fn get(&self, name: u128) -> Option<Arc<[u32]>> {
        self.shard(name).entries.get(&name).cloned()
    }

    /// Remembers.
    pub fn put(&self, name: u128, ids: Arc<[u32]>) {
        let mut shard = self.shard(name);
        shard.bytes += ENTRY_BYTES + ids.len() * 4;
        if let Some(old) = shard.entries.put(name, ids) {
            shard.bytes -= ENTRY_BYTES + old.len() * 4;
        }
        while shard.bytes > self.bytes_max {
            let Some((_, old)) = shard.entries.pop_lru() else { break };
            shard.bytes -= ENTRY_BYTES + old.len() * 4;
        }
    }

    /// Bytes in use.
    pub fn bytes(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner).bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_first() {
        let memo = Memo::new(SHARDS * 300);
        for number in 0..1000_u128 {
            memo.put(number * SHARDS as u128, Arc::from(vec![number as u32; 10]));
        }
        assert!(memo.bytes() <= 300 && memo.bytes() > 200);
        assert!(memo.get(0).is_none());
        assert_eq!(memo.get(999 * SHARDS as u128).as_deref(), Some(&[999_u32; 10][..]));
    }
}
