//! The block table: which slot holds which block.
//!
//! Open addressing with linear probing over 64-bit entries (32 bits of the hash, 32 bits of slot
//! number), at most half full, fixed in size because the pool is: nothing is ever allocated or
//! rehashed. The key itself lies in the slot's record, so a hit touches one cache line of the index
//! and one record, and a run of lookups prefetches both ahead.

use std::hash::{BuildHasher, RandomState};

use crate::violated;
use kvcellar_block::{BlockHash, BlockKey, GroupIndex, SlotIndex, prefetch};

/// How far ahead index entries and slot records are fetched. Records wait for their entry, so they
/// are fetched later.
const ENTRY_AHEAD: usize = 16;
const RECORD_AHEAD: usize = 8;

/// The key of what a slot holds, in one cache line with the engine's private state of the slot.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct Record {
    hash: [u8; 32],
    hash_len: u8,
    /// Private state; see [`super::residency`].
    pub(super) state: u8,
    group: u16,
    pub(super) generation: u32,
    pub(super) pins: u32,
    /// Serial of the request that used the slot last.
    pub(super) toucher: u32,
    /// The tier's clock when it was used last.
    pub(super) used: u32,
    pub(super) flags: u8,
}

const _: () = assert!(size_of::<Record>() == 64);

impl Record {
    const EMPTY: Self =
        Self { hash: [0; 32], hash_len: 0, state: 0, group: 0, generation: 0, pins: 0, toucher: 0, used: 0, flags: 0 };

    #[inline]
    fn is(&self, hash: &BlockHash, group: GroupIndex) -> bool {
        self.hash == *hash.padded() && self.group == group.0 && usize::from(self.hash_len) == hash.as_bytes().len()
    }

    /// The key, if the slot has one.
    pub fn key(&self) -> Option<BlockKey> {
        let hash = BlockHash::new(self.hash.get(..usize::from(self.hash_len))?)?;
        Some(BlockKey { hash, group: GroupIndex(self.group) })
    }
}

/// Records of all slots and the index over their keys.
#[derive(Debug)]
pub struct BlockTable {
    records: Box<[Record]>,
    entries: Box<[u64]>,
    shift: u32,
    seeds: [u64; 2],
}

impl BlockTable {
    /// A table for `slots` slots, all without key.
    pub fn new(slots: u32) -> Self {
        let size = (u64::from(slots.max(8)) * 2).next_power_of_two();
        let random = RandomState::new();
        Self {
            records: vec![Record::EMPTY; slots as usize].into_boxed_slice(),
            entries: vec![0; size as usize].into_boxed_slice(),
            shift: 32 - size.trailing_zeros(),
            // Seeded, so that nobody who chooses prompts can choose where their hashes fall.
            seeds: [random.hash_one(1_u8), random.hash_one(2_u8) | 1],
        }
    }

    /// Number of slots.
    pub fn slots(&self) -> u32 {
        self.records.len() as u32
    }

    /// A slot's record.
    #[inline]
    pub fn record(&self, slot: SlotIndex) -> &Record {
        &self.records[slot.0 as usize]
    }

    #[inline]
    pub(super) fn record_mut(&mut self, slot: SlotIndex) -> &mut Record {
        &mut self.records[slot.0 as usize]
    }

    /// 32 bits that place a key and tell most others from it. Block hashes are uniform already;
    /// this only mixes in group and seed.
    #[inline]
    fn tag(&self, hash: &BlockHash, group: GroupIndex) -> u32 {
        let bytes = hash.padded();
        let word = |at: usize| {
            u64::from_le_bytes([
                bytes[at],
                bytes[at + 1],
                bytes[at + 2],
                bytes[at + 3],
                bytes[at + 4],
                bytes[at + 5],
                bytes[at + 6],
                bytes[at + 7],
            ])
        };
        let low = word(0) ^ self.seeds[0] ^ (u64::from(group.0) << 48);
        let product = u128::from(low) * u128::from(word(8) ^ self.seeds[1]);
        let folded = product as u64 ^ (product >> 64) as u64;
        (folded >> 32) as u32
    }

    #[inline]
    fn home(&self, tag: u32) -> usize {
        (tag >> self.shift) as usize
    }

    #[inline]
    fn mask(&self) -> usize {
        self.entries.len() - 1
    }

    #[inline]
    fn find_tagged(&self, tag: u32, hash: &BlockHash, group: GroupIndex) -> Option<SlotIndex> {
        let mut at = self.home(tag);
        loop {
            let entry = self.entries[at];
            if entry == 0 {
                return None;
            }
            if (entry >> 32) as u32 == tag {
                let slot = SlotIndex(entry as u32 - 1);
                if self.record(slot).is(hash, group) {
                    return Some(slot);
                }
            }
            at = (at + 1) & self.mask();
        }
    }

    /// The slot that has this key.
    #[inline]
    pub fn find(&self, key: &BlockKey) -> Option<SlotIndex> {
        self.find_tagged(self.tag(&key.hash, key.group), &key.hash, key.group)
    }

    /// Looks up every `step`-th hash, starting with the first, and calls `visit` with each answer
    /// in order until it returns `false`.
    #[inline]
    pub fn find_run(
        &self,
        hashes: &[BlockHash],
        step: usize,
        group: GroupIndex,
        mut visit: impl FnMut(Option<SlotIndex>) -> bool,
    ) {
        let count = hashes.len().div_ceil(step);
        let mut tags = [0_u32; ENTRY_AHEAD];
        let fetch_entry = |tags: &mut [u32; ENTRY_AHEAD], index: usize| {
            if index < count {
                let tag = self.tag(&hashes[index * step], group);
                tags[index % ENTRY_AHEAD] = tag;
                prefetch(&self.entries[self.home(tag)]);
            }
        };
        let fetch_record = |tags: &[u32; ENTRY_AHEAD], index: usize| {
            if index < count {
                let entry = self.entries[self.home(tags[index % ENTRY_AHEAD])];
                if entry != 0 {
                    prefetch(self.record(SlotIndex(entry as u32 - 1)));
                }
            }
        };
        for index in 0..ENTRY_AHEAD.min(count) {
            fetch_entry(&mut tags, index);
        }
        for index in 0..RECORD_AHEAD {
            fetch_record(&tags, index);
        }
        for index in 0..count {
            fetch_record(&tags, index + RECORD_AHEAD);
            let tag = tags[index % ENTRY_AHEAD];
            let found = self.find_tagged(tag, &hashes[index * step], group);
            fetch_entry(&mut tags, index + ENTRY_AHEAD);
            if !visit(found) {
                return;
            }
        }
    }

    /// Gives a slot a key. The slot has none and no other slot has this one.
    pub(super) fn insert(&mut self, slot: SlotIndex, key: &BlockKey) {
        let record = self.record_mut(slot);
        record.hash = *key.hash.padded();
        record.hash_len = key.hash.as_bytes().len() as u8;
        record.group = key.group.0;
        let tag = self.tag(&key.hash, key.group);
        let mut at = self.home(tag);
        while self.entries[at] != 0 {
            at = (at + 1) & self.mask();
        }
        self.entries[at] = u64::from(tag) << 32 | u64::from(slot.0 + 1);
    }

    /// Fetches what taking a slot's key away will read.
    pub(super) fn prefetch(&self, slot: SlotIndex) {
        prefetch(self.record(slot));
    }

    /// Takes a slot's key away. Entries behind it move up, so that no gap ends another key's search
    /// early.
    pub(super) fn remove(&mut self, slot: SlotIndex) {
        let Some(key) = self.record(slot).key() else { return };
        self.record_mut(slot).hash_len = 0;
        let wanted = slot.0 + 1;
        let mut gap = self.home(self.tag(&key.hash, key.group));
        while self.entries[gap] as u32 != wanted {
            if self.entries[gap] == 0 {
                violated!("{slot:?} has a key but no entry in the index");
                return;
            }
            gap = (gap + 1) & self.mask();
        }
        let mut at = gap;
        loop {
            at = (at + 1) & self.mask();
            let entry = self.entries[at];
            if entry == 0 {
                break;
            }
            let home = self.home((entry >> 32) as u32);
            // The entry may move into the gap unless its home lies after the gap on the way to
            // where it stands.
            if at.wrapping_sub(home) & self.mask() >= at.wrapping_sub(gap) & self.mask() {
                self.entries[gap] = entry;
                gap = at;
            }
        }
        self.entries[gap] = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn key(number: u16) -> BlockKey {
        // Equal leading bytes for many keys, so that tags collide and probes run long.
        let mut bytes = [0_u8; 32];
        bytes[30..].copy_from_slice(&number.to_le_bytes());
        bytes[0] = (number % 3) as u8;
        BlockKey { hash: BlockHash::new(&bytes).expect("length"), group: GroupIndex(number % 2) }
    }

    proptest! {
        #[test]
        fn behaves_like_a_map(steps in prop::collection::vec((any::<bool>(), 0_u16..40), 0..300)) {
            let mut table = BlockTable::new(64);
            let mut model: HashMap<u16, SlotIndex> = HashMap::new();
            let mut free: Vec<u32> = (0..64).collect();
            for (insert, number) in steps {
                let held = model.get(&number).copied();
                match (insert, held) {
                    (true, None) => {
                        let slot = SlotIndex(free.pop().expect("40 keys fit into 64 slots"));
                        table.insert(slot, &key(number));
                        model.insert(number, slot);
                    }
                    (false, Some(slot)) => {
                        table.remove(slot);
                        free.push(slot.0);
                        model.remove(&number);
                    }
                    _ => {}
                }
                for number in 0..40 {
                    prop_assert_eq!(table.find(&key(number)), model.get(&number).copied());
                }
            }
            let hashes: Vec<BlockHash> = (0..40).map(|number| key(number).hash).collect();
            let mut seen = Vec::new();
            table.find_run(&hashes, 2, GroupIndex(0), |found| { seen.push(found); true });
            let expected: Vec<_> = (0..40).step_by(2).map(|number| model.get(&number).copied()).collect();
            prop_assert_eq!(seen, expected);
        }
    }
}
