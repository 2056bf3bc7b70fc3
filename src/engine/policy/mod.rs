//! Pure decisions. No I/O, no clock, no randomness: what a decision needs is an argument.

pub mod admission;
pub mod load;
pub mod lru;

use kvcellar_block::SlotIndex;

pub use admission::Admission;
pub use load::LoadPolicy;
pub use lru::Lru;

/// Where a block enters the order of eviction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heat {
    /// Last to be evicted.
    Hot,
    /// First to be evicted.
    Cold,
}

/// Chooses whom to evict. It only ever knows slots that may be evicted now: a pinned or filling
/// slot is not in it.
pub trait Eviction: Send {
    /// A slot may be evicted from now on.
    fn insert(&mut self, slot: SlotIndex, heat: Heat);
    /// A slot must not be evicted any more: it was pinned, or is gone.
    fn remove(&mut self, slot: SlotIndex);
    /// A slot was used.
    fn touch(&mut self, slot: SlotIndex);
    /// The slot to evict next, of those that `may` be evicted.
    fn victim(&self, may: &dyn Fn(SlotIndex) -> bool) -> Option<SlotIndex>;
    /// Whether the slot is in the order of eviction.
    fn holds(&self, slot: SlotIndex) -> bool;
    /// Slots that may be evicted.
    fn len(&self) -> usize;
    /// No slot may be evicted.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// All of them, the one to evict next first. For inspection.
    fn order(&self) -> Vec<SlotIndex>;
    /// Asks the processor to fetch what a decision on `slot` will read.
    fn prefetch(&self, slot: SlotIndex);
}
