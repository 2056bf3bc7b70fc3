//! Pure decisions. No I/O, no clock, no randomness: what a decision needs is an argument.

pub mod admission;
pub mod index;
pub mod load;
pub mod lru;

pub use admission::Admission;
pub use index::Index;
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

/// Chooses whom to evict. It only ever knows places that may be evicted now: a slot that is pinned
/// or being filled is not in it.
pub trait Eviction<I: Index>: Send {
    /// A place may be evicted from now on.
    fn insert(&mut self, place: I, heat: Heat);
    /// A place must not be evicted any more: it is held, or holds nothing.
    fn remove(&mut self, place: I);
    /// A place was used.
    fn touch(&mut self, place: I);
    /// The place to evict next, of those that `may` be evicted.
    fn victim(&self, may: &dyn Fn(I) -> bool) -> Option<I>;
    /// Whether the place is in the order of eviction.
    fn holds(&self, place: I) -> bool;
    /// Places that may be evicted.
    fn len(&self) -> usize;
    /// No place may be evicted.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// All of them, the one to evict next first. For inspection.
    fn order(&self) -> Vec<I>;
    /// Asks the processor to fetch what a decision on `place` will read.
    fn prefetch(&self, place: I);
}
