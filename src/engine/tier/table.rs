//! The block table: which place (slot or extent) holds which block.
//!
//! Open addressing with linear probing over 64-bit entries (32 bits of the hash, 32 bits of the
//! place's number), at most half full, fixed in size because the tier is: nothing is ever allocated
//! or rehashed. The key itself lies in the place's record, so a hit touches one cache line of the
//! index and one record, and a run of lookups prefetches both ahead.

use std::hash::{BuildHasher, RandomState};
use std::marker::PhantomData;

use crate::policy::Index;
use crate::violated;
use kvcellar_block::{BlockHash, BlockKey, GroupIndex, prefetch};

/// How far ahead index entries and records are fetched. Records wait for their entry, so they
/// are fetched later.
const ENTRY_AHEAD: usize = 16;
const RECORD_AHEAD: usize = 8;

/// The key of what a place holds, in one cache line with the state that its tier keeps of it.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct Record<S> {
    hash: [u8; 32],
    hash_len: u8,
    group: u16,
    /// Holds on the place: loads of a slot, reads of an extent.
    pub(super) pins: u32,
    /// What else the tier keeps of the place.
    pub(super) facts: S,
}

impl<S: Default> Default for Record<S> {
    fn default() -> Self {
        Self { hash: [0; 32], hash_len: 0, group: 0, pins: 0, facts: S::default() }
    }
}

impl<S> Record<S> {
    #[inline]
    fn is(&self, hash: &BlockHash, group: GroupIndex) -> bool {
        self.hash == *hash.padded() && self.group == group.0 && usize::from(self.hash_len) == hash.as_bytes().len()
    }

    /// The key, if the place has one.
    pub fn key(&self) -> Option<BlockKey> {
        let hash = BlockHash::new(self.hash.get(..usize::from(self.hash_len))?)?;
        Some(BlockKey { hash, group: GroupIndex(self.group) })
    }
}

/// Records of all places of a tier and the index over their keys.
#[derive(Debug)]
pub struct Table<I, S> {
    records: Box<[Record<S>]>,
    entries: Box<[u64]>,
    shift: u32,
    seeds: [u64; 2],
    places: PhantomData<I>,
}

impl<I: Index, S: Copy + Default> Table<I, S> {
    /// A table for `places` places, all without key.
    pub fn new(places: u32) -> Self {
        // A tier's record fills exactly one cache line.
        const { assert!(size_of::<Record<S>>() == 64) };
        let size = (u64::from(places.max(8)) * 2).next_power_of_two();
        let random = RandomState::new();
        Self {
            records: vec![Record::default(); places as usize].into_boxed_slice(),
            entries: vec![0; size as usize].into_boxed_slice(),
            shift: 32 - size.trailing_zeros(),
            // Seeded, so that nobody who chooses prompts can choose where their hashes fall.
            seeds: [random.hash_one(1_u8), random.hash_one(2_u8) | 1],
            places: PhantomData,
        }
    }

    /// Number of places.
    pub fn places(&self) -> u32 {
        self.records.len() as u32
    }

    /// A place's record.
    #[inline]
    pub fn record(&self, place: I) -> &Record<S> {
        &self.records[place.number() as usize]
    }

    #[inline]
    pub(super) fn record_mut(&mut self, place: I) -> &mut Record<S> {
        &mut self.records[place.number() as usize]
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
    fn find_tagged(&self, tag: u32, hash: &BlockHash, group: GroupIndex) -> Option<I> {
        let mut at = self.home(tag);
        loop {
            let entry = self.entries[at];
            if entry == 0 {
                return None;
            }
            if (entry >> 32) as u32 == tag {
                let place = I::from_number(entry as u32 - 1);
                if self.record(place).is(hash, group) {
                    return Some(place);
                }
            }
            at = (at + 1) & self.mask();
        }
    }

    /// The place that has this key.
    #[inline]
    pub fn find(&self, key: &BlockKey) -> Option<I> {
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
        mut visit: impl FnMut(Option<I>) -> bool,
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
                    prefetch(self.record(I::from_number(entry as u32 - 1)));
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

    /// Gives a place a key. The place has none and no other place has this one.
    pub(super) fn insert(&mut self, place: I, key: &BlockKey) {
        let record = self.record_mut(place);
        record.hash = *key.hash.padded();
        record.hash_len = key.hash.as_bytes().len() as u8;
        record.group = key.group.0;
        let tag = self.tag(&key.hash, key.group);
        let mut at = self.home(tag);
        while self.entries[at] != 0 {
            at = (at + 1) & self.mask();
        }
        self.entries[at] = u64::from(tag) << 32 | u64::from(place.number() + 1);
    }

    /// Fetches what taking a place's key away will read.
    pub(super) fn prefetch(&self, place: I) {
        prefetch(self.record(place));
    }

    /// Takes a place's key away. Entries behind it move up, so that no gap ends another key's
    /// search early.
    pub(super) fn remove(&mut self, place: I) {
        let Some(key) = self.record(place).key() else {
            violated!("{place:?} has no key that could be taken away");
            return;
        };
        self.record_mut(place).hash_len = 0;
        let wanted = place.number() + 1;
        let mut gap = self.home(self.tag(&key.hash, key.group));
        while self.entries[gap] as u32 != wanted {
            if self.entries[gap] == 0 {
                violated!("{place:?} has a key but no entry in the index");
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

    use kvcellar_block::SlotIndex;
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
            let mut table: Table<SlotIndex, ()> = Table::new(64);
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
