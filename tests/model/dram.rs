//! The dram tier as its documentation describes it: sets and one list, nothing clever.

use std::collections::{BTreeMap, BTreeSet};

use kvcellar_block::kinds::{ChunkedLocal, SlidingWindow};
use kvcellar_block::{BlockKey, GroupKind, GroupSpec, Grouping};

/// One life of a block in a slot.
pub(crate) type Life = u64;

/// A block's content, as the simulation's memories hold it.
pub(crate) type Name = String;

#[derive(Debug, Default)]
pub(crate) struct Dram {
    slots: usize,
    next: Life,
    /// Visible or being filled, by name.
    known: BTreeMap<Name, Life>,
    names: BTreeMap<Life, Name>,
    /// Blocks that may be evicted, the first one next.
    order: Vec<Life>,
    pinned: BTreeMap<Life, usize>,
    filling: BTreeSet<Life>,
    /// Dropped while held: nobody finds them, but they take a slot.
    doomed: BTreeMap<Life, usize>,
    toucher: BTreeMap<Life, u32>,
}

pub(crate) fn name(key: &BlockKey) -> Name {
    format!("{:?}/{}", &key.hash.as_bytes()[..4], key.group.0)
}

/// Whether a token at `end` has any use for what a block holds. Written token by token, as the
/// models' papers define their attention.
pub(crate) fn is_needed(group: &GroupSpec, block: u32, end: u32) -> bool {
    let mut tokens = block * group.block_tokens..((block + 1) * group.block_tokens).min(end);
    match group.kind {
        GroupKind::Full => !tokens.is_empty(),
        GroupKind::SlidingWindow(SlidingWindow { window, extra }) => tokens.any(|token| token + window + extra > end),
        GroupKind::ChunkedLocal(ChunkedLocal { chunk }) => tokens.any(|token| token / chunk == end / chunk),
        GroupKind::State => tokens.end == end && !tokens.is_empty(),
    }
}

/// Whether a hit could ever need a block: no kind of these tests looks back further than 64 tokens.
pub(crate) fn is_ever_needed(grouping: &Grouping, group: usize, block: u32) -> bool {
    let (spec, unit) = (&grouping.groups[group], grouping.hit_tokens);
    let begin = block * spec.block_tokens;
    let ends = (begin / unit..=(begin + spec.block_tokens + 64) / unit).map(|end| end * unit);
    ends.filter(|end| *end >= begin + spec.block_tokens).any(|end| is_needed(spec, block, end))
        || (spec.eagle && begin % unit == 0)
}

impl Dram {
    pub(crate) fn new(slots: u32) -> Self {
        Self { slots: slots as usize, ..Self::default() }
    }

    pub(crate) fn visible(&self, key: &BlockKey) -> Option<Life> {
        self.known.get(&name(key)).copied().filter(|life| !self.filling.contains(life))
    }

    pub(crate) fn knows(&self, key: &BlockKey) -> bool {
        self.known.contains_key(&name(key))
    }

    pub(crate) fn is_pinned(&self, life: Life) -> bool {
        self.pinned.contains_key(&life)
    }

    pub(crate) fn pins(&self) -> usize {
        self.pinned.values().sum::<usize>() + self.doomed.values().sum::<usize>()
    }

    pub(crate) fn filling(&self) -> usize {
        self.filling.len()
    }

    pub(crate) fn free(&self) -> usize {
        self.slots - self.order.len() - self.pinned.len() - self.filling.len() - self.doomed.len()
    }

    /// The definition of a hit, tried from the largest end down.
    pub(crate) fn resume_at(
        &self,
        grouping: &Grouping,
        keys: &dyn Fn(usize, u32) -> Option<BlockKey>,
        local: u32,
        limit: u32,
    ) -> u32 {
        let mut end = limit - limit % grouping.hit_tokens;
        while end > local {
            let fits = grouping.groups.iter().enumerate().all(|(index, group)| {
                let last = end / group.block_tokens;
                let held = |block| keys(index, block).is_some_and(|key| self.visible(&key).is_some());
                (local / group.block_tokens..last).filter(|block| is_needed(group, *block, end)).all(held)
                    && (!group.eagle || held(last))
            });
            if fits {
                return end;
            }
            end -= grouping.hit_tokens;
        }
        local
    }

    /// Moves evictable blocks to the end of the order, the first of them last.
    pub(crate) fn touch(&mut self, lives: &[Life], toucher: u32) {
        for life in lives.iter().rev() {
            if let Some(at) = self.order.iter().position(|other| other == life) {
                self.toucher.insert(*life, toucher);
                self.order.remove(at);
                self.order.push(*life);
            }
        }
    }

    fn forget(&mut self, life: Life) {
        if let Some(name) = self.names.get(&life)
            && self.known.get(name) == Some(&life)
        {
            self.known.remove(&name.clone());
        }
    }

    /// A slot for one block; `None`: none can be had, and no later one of the same offer either.
    pub(crate) fn reserve(&mut self, key: &BlockKey, toucher: u32) -> Option<Life> {
        if self.free() == 0 {
            let victim = *self.order.first()?;
            if self.toucher.get(&victim) == Some(&toucher) {
                return None;
            }
            self.order.remove(0);
            self.forget(victim);
        }
        self.next += 1;
        self.known.insert(name(key), self.next);
        self.names.insert(self.next, name(key));
        self.filling.insert(self.next);
        self.toucher.insert(self.next, toucher);
        Some(self.next)
    }

    pub(crate) fn filled(&mut self, lives: &[Life]) {
        for life in lives {
            assert!(self.filling.remove(life), "filled twice");
        }
        self.order.extend(lives.iter().rev());
    }

    pub(crate) fn lost(&mut self, life: Life) {
        assert!(self.filling.remove(&life), "lost twice");
        self.forget(life);
    }

    pub(crate) fn pin(&mut self, life: Life, toucher: u32) {
        self.order.retain(|other| *other != life);
        *self.pinned.entry(life).or_default() += 1;
        self.toucher.insert(life, toucher);
    }

    pub(crate) fn unpin(&mut self, lives: &[Life]) {
        for life in lives.iter().rev() {
            if let Some(holds) = self.pinned.get_mut(life) {
                *holds -= 1;
                if *holds == 0 {
                    self.pinned.remove(life);
                    self.order.push(*life);
                }
            } else {
                let holds = self.doomed.get_mut(life).expect("a held block is pinned or doomed");
                *holds -= 1;
                if *holds == 0 {
                    self.doomed.remove(life);
                }
            }
        }
    }

    /// Drops a visible block, if it still is one.
    pub(crate) fn discard(&mut self, life: Life) {
        if self.doomed.contains_key(&life) {
            return;
        }
        self.order.retain(|other| *other != life);
        self.forget(life);
        if let Some(holds) = self.pinned.remove(&life) {
            self.doomed.insert(life, holds);
        }
    }

    /// Moves evictable blocks to the start of the order, the first of them first.
    pub(crate) fn cool(&mut self, lives: &[Life]) {
        for life in lives.iter().rev() {
            if let Some(at) = self.order.iter().position(|other| other == life) {
                self.order.remove(at);
                self.order.insert(0, *life);
            }
        }
    }

    pub(crate) fn reset(&mut self) {
        let visible: Vec<Life> = self.order.iter().copied().chain(self.pinned.keys().copied()).collect();
        for life in visible {
            self.discard(life);
        }
    }

    pub(crate) fn eviction_order(&self) -> Vec<(Name, u32)> {
        self.order.iter().map(|life| (self.names[life].clone(), self.toucher[life])).collect()
    }

    pub(crate) fn visible_names(&self) -> BTreeSet<Name> {
        let lives = self.order.iter().chain(self.pinned.keys());
        lives.filter_map(|life| self.names.get(life).cloned()).collect()
    }
}
