//! Pure decisions. No I/O, no clock, no randomness: what a decision needs is an argument.
//!
//! **Eviction** is behind the trait [`Eviction`]. A policy is told of a block when a place is given
//! to it ([`Eviction::assign`]) and when it is gone ([`Eviction::release`]); in between the place
//! may enter and leave the order of eviction any number of times, because holds on it come and go,
//! and the policy remembers what it knows of the block. Time is counted in uses of blocks.

pub mod adaptive;
pub mod admission;
pub mod arc;
mod ghosts;
pub mod index;
pub mod load;
pub mod lrfu;
pub mod lru;
#[cfg(test)]
mod oracle;
mod rings;
pub mod s3fifo;
pub mod tenants;
pub mod write_budget;

pub use adaptive::Adaptive;
pub use admission::Admission;
pub use arc::Arc;
pub use index::Index;
pub use load::LoadPolicy;
pub use lrfu::Lrfu;
pub use lru::Lru;
pub use s3fifo::S3Fifo;
pub use tenants::Tenants;
pub use write_budget::WriteBudget;

pub use crate::config::policy::PolicyName;
pub use crate::config::tenants::{BlockOwner, Quota};

/// Where a block enters the order of eviction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heat {
    /// As one that was just used.
    Hot,
    /// First to be evicted.
    Cold,
}

/// Which use of a block a touch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    /// The first by another request than the last one.
    Fresh,
    /// One more by the same request: it says nothing new of how often the block is needed.
    Again,
}

/// How a block left its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// It had to make room: whether that was right shows when it comes back.
    Evicted,
    /// It became worthless or was never whole.
    Dropped,
}

/// What a policy is told of a block that comes to a place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Block<I> {
    /// Tells the block from others, evenly spread over all numbers.
    pub fingerprint: u64,
    /// The place of the block before it in its prefix, if the tier holds that one.
    pub parent: Option<I>,
    /// Tokens of the prompt that brought it.
    pub prompt_tokens: u32,
    /// What a hit saves, as seconds of prefill for each byte kept. Only ratios between blocks
    /// count; 1 where nothing is known.
    pub worth: f32,
}

impl<I> Block<I> {
    /// A block of which nothing but its fingerprint is known.
    pub fn unknown(fingerprint: u64) -> Self {
        Self { fingerprint, parent: None, prompt_tokens: 0, worth: 1.0 }
    }
}

/// Chooses whom to evict. In its order are only places that may be evicted now: a slot that is
/// pinned or being filled is not.
pub trait Eviction<I: Index>: Send {
    /// A place was given to a block. It is not in the order of eviction.
    fn assign(&mut self, place: I, block: &Block<I>);
    /// A place's block is gone. The place leaves the order of eviction.
    fn release(&mut self, place: I, departure: Departure);
    /// A place may be evicted from now on.
    fn insert(&mut self, place: I, heat: Heat);
    /// A place must not be evicted any more: it is held, or holds nothing.
    fn remove(&mut self, place: I);
    /// A place's block was used. Also told of places that may not be evicted.
    fn touch(&mut self, place: I, touch: Touch);
    /// The place to evict next, of those that `may` be evicted. It stays in the order until it is
    /// removed or released.
    fn victim(&mut self, may: &dyn Fn(I) -> bool) -> Option<I>;
    /// Shows the places in the order of eviction, the coldest first, until `visit` returns `false`.
    /// A step costs O(1), or O(log n) of the places shown so far. Where nothing is used in between,
    /// victims come in about this order; policies say how exactly.
    fn coldest(&self, visit: &mut dyn FnMut(I) -> bool);
    /// The order is exactly that of the last use, whatever else is known of blocks.
    fn is_by_last_use(&self) -> bool {
        false
    }
    /// Whether the place is in the order of eviction.
    fn holds(&self, place: I) -> bool;
    /// Places that may be evicted.
    fn len(&self) -> usize;
    /// No place may be evicted.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// All of them, the coldest first. For inspection.
    fn order(&self) -> Vec<I> {
        let mut all = Vec::with_capacity(self.len());
        self.coldest(&mut |place| {
            all.push(place);
            true
        });
        all
    }
    /// The place of the block's parent, where the policy knows that it still holds it.
    fn parent(&self, _place: I) -> Option<I> {
        None
    }
    /// Asks the processor to fetch what a decision on `place` will read.
    fn prefetch(&self, place: I);
    /// Bytes of memory that the policy takes, all of them from its beginning on.
    fn bytes(&self) -> usize;
}

/// A policy of this name for `places` places, none of which may be evicted yet.
pub fn build<I: Index + 'static>(name: PolicyName, places: u32) -> Box<dyn Eviction<I>> {
    match name {
        PolicyName::Lru => Box::new(Lru::new(places)),
        PolicyName::S3Fifo => Box::new(S3Fifo::new(places)),
        PolicyName::Arc => Box::new(Arc::new(places)),
        PolicyName::Lrfu => Box::new(Lrfu::new(places)),
        PolicyName::Adaptive => Box::new(Adaptive::new(places)),
    }
}

/// A policy of this name for a sample of blocks: its `places` places stand for `of` of them, and
/// what it remembers beside them shrinks alike.
pub fn miniature<I: Index + 'static>(name: PolicyName, places: u32, of: u32) -> Box<dyn Eviction<I>> {
    match name {
        PolicyName::Adaptive => Box::new(Adaptive::miniature(places, of)),
        // What they remember follows from their places alone.
        PolicyName::Lru | PolicyName::S3Fifo | PolicyName::Arc | PolicyName::Lrfu => build(name, places),
    }
}
