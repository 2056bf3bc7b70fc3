//! The slot table: one cache line a slot, shared by `EngineCore` and all workers.
//!
//! Legal states: `Empty -> Filling -> Filled -> Empty` and `Filling -> Empty` (a copy failed). Only
//! the tier engine changes the state and the generation. Workers add their own bit to `parts_done`,
//! `parts_failed` or `load_failed` of the generation they were ordered to copy, and do nothing when
//! they find another generation. The tier engine takes a slot back only when every writing rank has
//! answered, so a bit never comes late.

use std::sync::atomic::AtomicU32 as FutexWord;

use super::sync::{AtomicU32, AtomicU64, Ordering};
use kvcellar_block::Generation;

/// State of a slot as stored in shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum SlotState {
    /// Holds nothing.
    Empty = 0,
    /// Ranks are writing their parts.
    Filling = 1,
    /// Holds a whole block.
    Filled = 2,
}

/// How far the ranks are with filling a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// A writing rank has not answered yet.
    Pending,
    /// Every writing rank wrote its part.
    Done,
    /// Every writing rank answered and at least one failed.
    Failed,
}

/// One slot's shared state.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct SlotLine {
    state: AtomicU32,
    generation: AtomicU32,
    parts_done: AtomicU64,
    parts_failed: AtomicU64,
    load_failed: AtomicU64,
    cache_generation: AtomicU64,
    /// Ranks that have copied out of a restored slot.
    load_done: AtomicU64,
    /// The generation whose restore has ended; copy workers wait on this word. The standard
    /// library's atomic in every build: the kernel waits on it too.
    restored: FutexWord,
    /// The generation whose restore failed.
    restore_failed: AtomicU32,
}

#[cfg(not(feature = "shuttle"))]
const _: () = assert!(size_of::<SlotLine>() == 64, "one cache line a slot");

impl Default for SlotLine {
    /// An empty slot that was never used: what zeroed shared memory reads as.
    fn default() -> Self {
        Self {
            state: AtomicU32::new(SlotState::Empty as u32),
            generation: AtomicU32::new(0),
            parts_done: AtomicU64::new(0),
            parts_failed: AtomicU64::new(0),
            load_failed: AtomicU64::new(0),
            cache_generation: AtomicU64::new(0),
            load_done: AtomicU64::new(0),
            restored: FutexWord::new(0),
            restore_failed: AtomicU32::new(0),
        }
    }
}

impl SlotLine {
    /// Tier engine: takes an empty slot for a new block and returns the generation that copy orders
    /// must name.
    pub fn begin_fill(&self, cache_generation: u64) -> Generation {
        // Generation 0 means "never used" (see `Pool::checksum`).
        let generation = self.generation.load(Ordering::Relaxed).wrapping_add(1).max(1);
        self.parts_done.store(0, Ordering::Relaxed);
        self.parts_failed.store(0, Ordering::Relaxed);
        self.load_failed.store(0, Ordering::Relaxed);
        self.load_done.store(0, Ordering::Relaxed);
        self.cache_generation.store(cache_generation, Ordering::Relaxed);
        self.generation.store(generation, Ordering::SeqCst);
        self.state.store(SlotState::Filling as u32, Ordering::Release);
        Generation(generation)
    }

    /// Tier engine: every writing rank is done.
    pub fn publish(&self) {
        self.state.store(SlotState::Filled as u32, Ordering::Release);
    }

    /// Tier engine: the slot holds nothing any more.
    pub fn clear(&self) {
        self.state.store(SlotState::Empty as u32, Ordering::SeqCst);
    }

    /// Tier engine: what the writing ranks (`writers`: one bit each) have answered.
    #[inline]
    pub fn fill(&self, writers: u64) -> Fill {
        // Acquire: whoever sees a rank's bit also sees the bytes it wrote before.
        let done = self.parts_done.load(Ordering::Acquire);
        if done & writers == writers {
            return Fill::Done;
        }
        let failed = self.parts_failed.load(Ordering::Acquire);
        if (done | failed) & writers == writers { Fill::Failed } else { Fill::Pending }
    }

    /// Worker: may rank write its part for this order? `false`: the order is stale and must not
    /// touch memory.
    pub fn may_write(&self, generation: u32) -> bool {
        self.state.load(Ordering::Acquire) == SlotState::Filling as u32
            && self.generation.load(Ordering::SeqCst) == generation
    }

    /// Worker: does the slot hold the whole block this order names?
    pub fn may_read(&self, generation: u32) -> bool {
        self.state.load(Ordering::SeqCst) == SlotState::Filled as u32
            && self.generation.load(Ordering::SeqCst) == generation
    }

    /// Worker: does the slot still belong to the order after which this rank's part was written?
    /// Also while other ranks write theirs.
    pub fn may_hash(&self, generation: u32) -> bool {
        self.state.load(Ordering::SeqCst) != SlotState::Empty as u32
            && self.generation.load(Ordering::SeqCst) == generation
    }

    /// Worker: rank `rank` wrote its part (`ok`), or could not.
    pub fn answer(&self, rank: usize, ok: bool) {
        let bits = if ok { &self.parts_done } else { &self.parts_failed };
        // Release: the bytes of this part become visible with the bit.
        bits.fetch_or(1 << rank, Ordering::AcqRel);
    }

    /// Worker: has rank `rank` answered for this generation, or is the generation over?
    pub fn answered(&self, rank: usize, generation: u32) -> bool {
        let bits = self.parts_done.load(Ordering::Acquire) | self.parts_failed.load(Ordering::Acquire);
        bits & (1 << rank) != 0 || self.generation.load(Ordering::SeqCst) != generation
    }

    /// Worker: the bytes of this slot could not be used by rank `rank`.
    pub fn refuse_load(&self, rank: usize) {
        self.load_failed.fetch_or(1 << rank, Ordering::AcqRel);
    }

    /// Tier engine: did any rank refuse this slot's bytes?
    pub fn load_refused(&self) -> bool {
        self.load_failed.load(Ordering::Acquire) != 0
    }

    /// Tier engine: the restore of this generation has ended. Whoever follows it must be woken
    /// ([`Self::restored_word`]).
    pub fn end_restore(&self, generation: Generation, ok: bool) {
        if ok {
            self.publish();
        } else {
            self.restore_failed.store(generation.0, Ordering::Relaxed);
        }
        // Release: state, failure and the bytes become visible with the word.
        self.restored.store(generation.0, Ordering::Release);
    }

    /// Worker: how the restore of `generation` ended; `None` while it is under way. Also the value
    /// to wait on.
    pub fn restore_ended(&self, generation: u32) -> (Option<bool>, u32) {
        let seen = self.restored.load(Ordering::Acquire);
        ((seen == generation).then(|| self.restore_failed.load(Ordering::Relaxed) != generation), seen)
    }

    /// The word that changes when a restore ends.
    pub fn restored_word(&self) -> &FutexWord {
        &self.restored
    }

    /// Worker: rank `rank` needs the bytes of a restored slot no longer.
    pub fn release_restored(&self, rank: usize) {
        self.load_done.fetch_or(1 << rank, Ordering::AcqRel);
    }

    /// Tier engine: nobody needs the bytes of a restored slot, because its followers were told that
    /// it failed.
    pub fn release_all(&self, ranks: u64) {
        self.load_done.store(ranks, Ordering::Release);
    }

    /// Tier engine: has every one of these ranks copied what it needed?
    pub fn released(&self, ranks: u64) -> bool {
        self.load_done.load(Ordering::Acquire) & ranks == ranks
    }

    /// Adoption: the slot's state, generation and cache generation as an earlier engine left them.
    pub fn remains(&self) -> (Option<SlotState>, Generation, u64) {
        let state = match self.state.load(Ordering::Acquire) {
            0 => Some(SlotState::Empty),
            1 => Some(SlotState::Filling),
            2 => Some(SlotState::Filled),
            _ => None,
        };
        (state, Generation(self.generation.load(Ordering::Acquire)), self.cache_generation.load(Ordering::Relaxed))
    }
}
