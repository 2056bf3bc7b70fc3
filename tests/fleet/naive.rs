//! The index as one would write it first: everything in maps, every question from scratch.

use std::collections::HashMap;

use kvcellar_events::decode::decode;
use kvcellar_events::follow::FollowStep;
use kvcellar_events::wire::{BatchArena, Event};

use crate::engine::{Contents, Shape, TIERS};
use crate::prompts::{BLOCK, same_until};

/// What one engine has told since it was forgotten the last time.
pub(crate) struct Naive {
    shape: Shape,
    pub(crate) groups: Vec<Contents>,
    /// Parents of hashes that came with tokens; `None`: it is the first of a prompt.
    parents: HashMap<u64, Option<u64>>,
}

impl Naive {
    pub(crate) fn new(shape: Shape) -> Self {
        Self { shape, groups: vec![Contents::new(); 2], parents: HashMap::new() }
    }

    pub(crate) fn run(&mut self, step: &FollowStep<Vec<u8>>) {
        match step {
            FollowStep::Apply(_, payload) => self.apply(payload),
            FollowStep::Forget(_) => *self = Self::new(self.shape),
            FollowStep::Replay(_) => {}
        }
    }

    fn apply(&mut self, payload: &[u8]) {
        let mut arena = BatchArena::default();
        let batch = decode(payload, &mut arena).expect("a batch");
        let tier = |medium: Option<&str>, locality: Option<&str>| {
            TIERS.iter().position(|it| (Some(it.0), it.1) == (medium, locality)).expect("a known tier")
        };
        for event in &batch.events {
            match event {
                Event::Stored(it) => {
                    let at = tier(it.medium, it.locality);
                    let mut parent = it.parent.map(|parent| parent.name());
                    for hash in &arena.hashes[it.hashes.range.clone()] {
                        self.groups[it.group.expect("a group") as usize].entry(*hash).or_default()[at] += 1;
                        if !it.tokens.is_empty() {
                            self.parents.insert(*hash, parent);
                        }
                        parent = Some(*hash);
                    }
                }
                Event::Removed(it) => {
                    let at = tier(it.medium, it.locality);
                    for hash in &arena.hashes[it.hashes.range.clone()] {
                        let counts = self.groups[it.group.expect("a group") as usize].entry(*hash).or_default();
                        counts[at] = counts[at].saturating_sub(1);
                    }
                }
                Event::TierCleared { medium, locality } => {
                    let at = tier(*medium, *locality);
                    self.groups.iter_mut().flat_map(Contents::values_mut).for_each(|counts| counts[at] = 0);
                }
                Event::Cleared { .. } => {
                    self.groups.iter_mut().flat_map(Contents::values_mut).for_each(|counts| counts[0] = 0);
                }
            }
        }
    }

    /// Whether a hash's whole prefix has been told.
    fn placed(&self, hash: u64) -> bool {
        let mut at = hash;
        while let Some(parent) = self.parents.get(&at) {
            match parent {
                None => return true,
                Some(parent) => at = *parent,
            }
        }
        false
    }

    fn mask(&self, group: usize, hash: u64) -> u8 {
        if !self.placed(hash) {
            return 0;
        }
        masked(self.groups[group].get(&hash))
    }

    /// Tiers in which a group has the index block that ends at token `end`; `hash` names the
    /// engine's block of a prompt that ends at a token.
    pub(crate) fn holds(&self, group: usize, prompt: u64, end: usize, hash: &dyn Fn(u64, usize) -> u64) -> u8 {
        holds(self.shape.block, prompt, end, &|prompt, end| self.mask(group, hash(prompt, end)))
    }
}

pub(crate) fn masked(counts: Option<&[u32; 4]>) -> u8 {
    counts.map_or(0, |counts| counts.iter().enumerate().fold(0, |mask, (tier, n)| mask | u8::from(*n > 0) << tier))
}

/// From the tiers of an engine's blocks, by prompt and end, to those of an index block.
pub(crate) fn holds(block: usize, prompt: u64, end: usize, mask: &dyn Fn(u64, usize) -> u8) -> u8 {
    if block > BLOCK {
        // Prompts with the same beginning share the index block, whichever engine block it lies in.
        return same_until(prompt, end).fold(0, |all, prompt| all | mask(prompt, end.next_multiple_of(block)));
    }
    let pieces: Vec<u8> = (1..=BLOCK / block).map(|piece| mask(prompt, end - BLOCK + piece * block)).collect();
    let common = pieces.iter().fold(u8::MAX, |all, piece| all & piece);
    if common != 0 || pieces.contains(&0) {
        return common;
    }
    1 << pieces.iter().map(|piece| piece.trailing_zeros()).max().expect("pieces")
}
