//! Holder sets: who has a block, in which tiers. Equal sets exist once, however many blocks they
//! belong to.
//!
//! Blocks of one prefix lie on the same engines, so that a fleet with millions of blocks has few
//! different sets; a block's entry in the table is the 64-bit [`SetRef`] of its set. One writer
//! makes, counts and frees sets; any number of readers copy them without a lock: a set's generation
//! is odd while its memory changes, and a reader that finds another generation than its reference
//! names knows that the reference is old.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use hashbrown::HashTable;
use xxhash_rust::xxh3::xxh3_64;

use super::chunked::Chunked;
use super::tiers::{Column, pack, unpack};

/// Sizes of sets are powers of two, up to 2^20 holders.
const CLASSES: usize = 21;

/// Transitions remembered: all blocks of a stored prefix go from one set to the same other one.
const MEMO: usize = 1024;

/// Generation and number of a set. 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetRef(pub u64);

impl SetRef {
    /// No holder.
    pub const NONE: Self = Self(0);

    fn new(generation: u32, set: u32) -> Self {
        Self(u64::from(generation) << 32 | u64::from(set))
    }

    fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }

    fn set(self) -> u32 {
        self.0 as u32
    }
}

/// What readers see. Of a set's two words the first is generation and length, the second size class
/// and place.
#[derive(Debug)]
pub struct Sets {
    heads: Chunked<AtomicU64>,
    classes: [Chunked<AtomicU32>; CLASSES],
}

impl Sets {
    fn new() -> Self {
        Self { heads: Chunked::new(2), classes: std::array::from_fn(|class| Chunked::new(1 << class)) }
    }

    /// Copies a set's holders into `into`, in the order of columns. `false`: the reference is old,
    /// ask the table again.
    #[inline]
    pub fn read(&self, wanted: SetRef, into: &mut Vec<u32>) -> bool {
        into.clear();
        if wanted == SetRef::NONE {
            return true;
        }
        let Some([head, place]) = self.heads.get(wanted.set()) else { return false };
        let before = head.load(Ordering::Acquire);
        if (before >> 32) as u32 != wanted.generation() {
            return false;
        }
        let place = place.load(Ordering::Acquire);
        let (class, index) = ((place >> 32) as usize, place as u32);
        let Some(words) = self.classes.get(class).and_then(|class| class.get(index)) else { return false };
        let Some(words) = words.get(..before as u32 as usize) else { return false };
        into.extend(words.iter().map(|word| word.load(Ordering::Relaxed)));
        // The copies above must not be read after this check.
        fence(Ordering::Acquire);
        head.load(Ordering::Relaxed) == before
    }

    /// Bytes of all sets, free ones included.
    pub fn bytes(&self) -> usize {
        self.heads.bytes() + self.classes.iter().map(Chunked::bytes).sum::<usize>()
    }
}

/// One remembered transition.
#[derive(Debug, Clone, Copy)]
struct SetMemo {
    from: SetRef,
    holder: u32,
    to: SetRef,
}

/// The writer's side.
#[derive(Debug)]
pub struct SetWriter {
    sets: Arc<Sets>,
    /// Blocks that refer to a set, by its number.
    references: Vec<u32>,
    free_sets: Vec<u32>,
    /// Unused places, by size class, and how many were ever used.
    free_places: [Vec<u32>; CLASSES],
    used_places: [u32; CLASSES],
    known: HashTable<u32>,
    memo: Box<[SetMemo]>,
    scratch: Vec<u32>,
    bytes: usize,
    allowance: usize,
}

impl SetWriter {
    /// Without any set.
    pub fn new() -> Self {
        let none = SetMemo { from: SetRef::NONE, holder: 0, to: SetRef::NONE };
        Self {
            sets: Arc::new(Sets::new()),
            // Number 0 is taken, so that no reference is 0.
            references: vec![0],
            free_sets: Vec::new(),
            free_places: [const { Vec::new() }; CLASSES],
            used_places: [0; CLASSES],
            known: HashTable::new(),
            memo: vec![none; MEMO].into(),
            scratch: Vec::new(),
            bytes: 0,
            allowance: usize::MAX,
        }
    }

    /// What readers need.
    pub fn shared(&self) -> Arc<Sets> {
        Arc::clone(&self.sets)
    }

    /// Different sets in use.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// There is no set.
    pub fn is_empty(&self) -> bool {
        self.known.len() == 0
    }

    /// Bytes of all sets and of what belongs to them.
    pub fn bytes(&self) -> usize {
        self.bytes + self.known.allocation_size() + self.references.capacity() * 4 + MEMO * size_of::<SetMemo>()
    }

    /// Bytes that sets may allocate from now on.
    pub fn allow(&mut self, bytes: usize) {
        self.allowance = bytes;
    }

    /// The set that differs from `from` in one column, which has the tiers `mask` in it (0: it is
    /// not in it). `None`: there is no room for another set, and nothing has changed.
    ///
    /// The caller gets one reference to it, and [releases](Self::release) its own to `from` only
    /// when readers no longer find `from`: a writer that is interrupted in between would otherwise
    /// leave them with a reference to nothing, and a block that is held would look lost.
    pub fn change(&mut self, from: SetRef, column: Column, mask: u8) -> Option<SetRef> {
        let holder = pack(column, mask);
        let slot = (xxh3_64(&(from.0 ^ u64::from(holder).rotate_left(40)).to_le_bytes()) as usize) % MEMO;
        let memo = self.memo[slot];
        let to = if memo.from == from && memo.holder == holder && self.is_current(memo.to) {
            memo.to
        } else {
            let to = self.derive(from, column, mask)?;
            self.memo[slot] = SetMemo { from, holder, to };
            to
        };
        if to != SetRef::NONE {
            self.references[to.set() as usize] += 1;
        }
        Some(to)
    }

    fn is_current(&self, set: SetRef) -> bool {
        set == SetRef::NONE
            || self
                .sets
                .heads
                .get(set.set())
                .is_some_and(|head| (head[0].load(Ordering::Relaxed) >> 32) as u32 == set.generation())
    }

    /// A column's tiers in a set.
    pub fn mask(&self, set: SetRef, column: Column) -> u8 {
        if set == SetRef::NONE {
            return 0;
        }
        let words = self.words(set.set());
        let found = words.binary_search_by_key(&column, |word| unpack(word.load(Ordering::Relaxed)).0);
        found.map_or(0, |at| unpack(words[at].load(Ordering::Relaxed)).1)
    }

    fn words(&self, set: u32) -> &[AtomicU32] {
        let head = self.sets.heads.make(set);
        let place = head[1].load(Ordering::Relaxed);
        let len = head[0].load(Ordering::Relaxed) as u32 as usize;
        &self.sets.classes[(place >> 32) as usize].make(place as u32)[..len]
    }

    fn derive(&mut self, from: SetRef, column: Column, mask: u8) -> Option<SetRef> {
        let mut holders = std::mem::take(&mut self.scratch);
        let whole = self.sets.read(from, &mut holders);
        debug_assert!(whole, "the writer's own references are never old");
        match (holders.binary_search_by_key(&column, |holder| unpack(*holder).0), mask) {
            (Ok(at), 0) => drop(holders.remove(at)),
            (Ok(at), _) => holders[at] = pack(column, mask),
            (Err(_), 0) => {}
            (Err(at), _) => holders.insert(at, pack(column, mask)),
        }
        let set = self.intern(&holders);
        self.scratch = holders;
        set
    }

    /// The set with these holders, made if need be.
    fn intern(&mut self, holders: &[u32]) -> Option<SetRef> {
        if holders.is_empty() {
            return Some(SetRef::NONE);
        }
        let hash = xxh3_64(bytemuck::cast_slice(holders));
        let same = |set: &u32| {
            let words = self.words(*set);
            words.len() == holders.len()
                && words.iter().zip(holders).all(|(word, holder)| word.load(Ordering::Relaxed) == *holder)
        };
        if let Some(set) = self.known.find(hash, same) {
            let generation = (self.sets.heads.make(*set)[0].load(Ordering::Relaxed) >> 32) as u32;
            return Some(SetRef::new(generation, *set));
        }
        let class = holders.len().next_power_of_two().ilog2() as usize;
        let set = self.free_sets.last().copied().unwrap_or(self.references.len() as u32);
        let place = self.free_places[class].last().copied().unwrap_or(self.used_places[class]);
        let cost = self.sets.heads.cost(set) + self.sets.classes[class].cost(place);
        self.allowance = self.allowance.checked_sub(cost)?;
        self.bytes += cost;
        if self.free_sets.pop().is_none() {
            self.references.push(0);
        }
        if self.free_places[class].pop().is_none() {
            self.used_places[class] += 1;
        }
        let words = self.sets.classes[class].make(place);
        for (word, holder) in words.iter().zip(holders) {
            word.store(*holder, Ordering::Relaxed);
        }
        let head = self.sets.heads.make(set);
        let generation = ((head[0].load(Ordering::Relaxed) >> 32) as u32).wrapping_add(1);
        // Odd while nobody may read it: a new number starts at 0 and becomes 2.
        let generation = generation + generation % 2;
        head[1].store((class as u64) << 32 | u64::from(place), Ordering::Relaxed);
        head[0].store(u64::from(generation) << 32 | holders.len() as u64, Ordering::Release);
        let (known, sets) = (&mut self.known, &self.sets);
        known.insert_unique(hash, set, |set| hash_of(sets, *set));
        Some(SetRef::new(generation, set))
    }

    /// Gives a reference back. The last one frees the set.
    pub fn release(&mut self, set: SetRef) {
        if set == SetRef::NONE {
            return;
        }
        let count = &mut self.references[set.set() as usize];
        *count -= 1;
        if *count > 0 {
            return;
        }
        let number = set.set();
        let hash = hash_of(&self.sets, number);
        if let Ok(entry) = self.known.find_entry(hash, |known| *known == number) {
            entry.remove();
        }
        let head = self.sets.heads.make(number);
        let place = head[1].load(Ordering::Relaxed);
        let generation = set.generation() + 1;
        head[0].store(u64::from(generation) << 32, Ordering::Relaxed);
        // Whoever sees the memory's next contents also sees that this generation is over.
        fence(Ordering::Release);
        self.free_places[(place >> 32) as usize].push(place as u32);
        self.free_sets.push(number);
    }
}

impl Default for SetWriter {
    fn default() -> Self {
        Self::new()
    }
}

fn hash_of(sets: &Sets, set: u32) -> u64 {
    let head = sets.heads.make(set);
    let place = head[1].load(Ordering::Relaxed);
    let len = head[0].load(Ordering::Relaxed) as u32 as usize;
    let words = &sets.classes[(place >> 32) as usize].make(place as u32)[..len];
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    if words.len() <= 64 {
        let mut holders = [0_u32; 64];
        for (holder, word) in holders.iter_mut().zip(words) {
            *holder = word.load(Ordering::Relaxed);
        }
        return xxh3_64(bytemuck::cast_slice(&holders[..words.len()]));
    }
    for word in words {
        hash.update(&word.load(Ordering::Relaxed).to_le_bytes());
    }
    hash.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holders(writer: &SetWriter, set: SetRef) -> Vec<u32> {
        let mut found = Vec::new();
        assert!(writer.sets.read(set, &mut found));
        found
    }

    fn exchange(writer: &mut SetWriter, from: SetRef, column: Column, mask: u8) -> SetRef {
        let to = writer.change(from, column, mask).expect("room");
        writer.release(from);
        to
    }

    #[test]
    fn a_set_can_be_read_until_its_last_reference_is_given_back() {
        let mut writer = SetWriter::new();
        let before = writer.change(SetRef::NONE, Column(7), 1).expect("room");
        let after = writer.change(before, Column(3), 4).expect("room");
        assert_eq!(holders(&writer, before), [pack(Column(7), 1)], "readers still find it");
        assert_eq!(holders(&writer, after).len(), 2);
        writer.release(before);
        assert!(!writer.sets.read(before, &mut Vec::new()));
    }

    #[test]
    fn equal_sets_are_one_and_unused_ones_are_used_again() {
        let mut writer = SetWriter::new();
        let one = exchange(&mut writer, SetRef::NONE, Column(7), 1);
        let both = exchange(&mut writer, one, Column(3), 4);
        assert_eq!(holders(&writer, both), [pack(Column(3), 4), pack(Column(7), 1)]);
        assert_eq!(writer.len(), 1, "the first set had one reference, which was given back");
        let other = exchange(&mut writer, SetRef::NONE, Column(3), 4);
        let same = exchange(&mut writer, other, Column(7), 1);
        assert_eq!((same, writer.len()), (both, 1));
        assert_eq!((writer.mask(both, Column(3)), writer.mask(both, Column(4))), (4, 0));
        let mut found = Vec::new();
        assert!(!writer.sets.read(one, &mut found), "an old reference is noticed");
        let left = exchange(&mut writer, both, Column(3), 0);
        assert_eq!(holders(&writer, left), [pack(Column(7), 1)]);
        writer.release(left);
        writer.release(same);
        assert!(writer.is_empty());
    }

    #[test]
    fn many_holders_in_many_sets() {
        let mut writer = SetWriter::new();
        let mut set = SetRef::NONE;
        for column in 0..3000 {
            set = exchange(&mut writer, set, Column(column * 7 % 3000), 1 << (column % 5));
        }
        assert_eq!((holders(&writer, set).len(), writer.len()), (3000, 1));
        assert!(holders(&writer, set).is_sorted());
        assert!(writer.bytes() >= writer.sets.bytes());
        for column in 0..3000 {
            set = exchange(&mut writer, set, Column(column), 0);
        }
        assert_eq!((set, writer.len()), (SetRef::NONE, 0));
    }
}
