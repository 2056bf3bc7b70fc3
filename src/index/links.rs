//! One engine's own names for blocks, in one KV cache group: which request key a hash stands for,
//! and how often each tier holds it.
//!
//! A hash is opaque and means something to its engine alone. A link lives as long as any tier holds
//! its block, and then on as a *ghost*: a child that is stored later still finds its parent, and a
//! block that comes back without tokens is known again. Ghosts go when there are too many of them,
//! those without a holder for the longest time first.

use std::collections::VecDeque;

use hashbrown::HashMap;
use hashbrown::hash_map::Entry;

use super::tiers::{FleetTier, TOLD_TIERS};
use crate::limits;

/// The key is not known: the block is an orphan.
pub const UNKNOWN: u64 = 0;

/// What a hash stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashLink {
    /// Its request key; the last one where an engine's block is several of the index; [`UNKNOWN`]
    /// for an orphan.
    pub key: u64,
    counts: [u8; TOLD_TIERS],
    stamp: u16,
}

impl HashLink {
    /// Tiers that hold it.
    pub fn mask(&self) -> u8 {
        self.counts.iter().enumerate().fold(0, |mask, (tier, count)| mask | u8::from(*count > 0) << tier)
    }

    /// Copies in each tier.
    pub fn counts(&self) -> [u8; TOLD_TIERS] {
        self.counts
    }
}

/// All links of one engine's group.
#[derive(Debug, Default)]
pub struct Links {
    by_hash: HashMap<u64, HashLink>,
    ghosts: VecDeque<(u64, u16)>,
    ghost_count: usize,
    stamp: u16,
    /// Hashes in each tier.
    in_tier: [usize; TOLD_TIERS],
}

impl Links {
    /// What a hash stands for.
    #[inline]
    pub fn get(&self, hash: u64) -> Option<&HashLink> {
        self.by_hash.get(&hash)
    }

    /// Tiers that hold a block.
    pub fn mask(&self, hash: u64) -> u8 {
        self.get(hash).map_or(0, HashLink::mask)
    }

    /// Hashes with a holder.
    pub fn held(&self) -> usize {
        self.by_hash.len() - self.ghost_count
    }

    /// Hashes without.
    pub fn ghosts(&self) -> usize {
        self.ghost_count
    }

    /// Hashes in each tier that events tell of.
    pub fn in_tiers(&self) -> [usize; TOLD_TIERS] {
        self.in_tier
    }

    /// A hash has come into and left these tiers.
    fn moved(in_tier: &mut [usize; TOLD_TIERS], before: u8, after: u8) {
        if before == after {
            return;
        }
        for (tier, count) in in_tier.iter_mut().enumerate() {
            *count += usize::from(after >> tier & 1);
            *count -= usize::from(before >> tier & 1);
        }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &HashLink)> {
        self.by_hash.iter().map(|(hash, link)| (*hash, link))
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.by_hash.allocation_size() + self.ghosts.capacity() * size_of::<(u64, u16)>()
    }

    /// Bytes that so many more hashes may allocate, the present ones still being there.
    pub fn growth(&self, count: usize) -> usize {
        let wanted = self.by_hash.len() + count;
        if wanted <= self.by_hash.capacity() {
            return 0;
        }
        // A power of two of buckets, an eighth of them free, each with its entry and a byte of
        // control.
        (wanted * 8 / 7 + 1).next_power_of_two() * (size_of::<(u64, HashLink)>() + 1) + 64
    }

    /// One more copy in a tier. `key` when it is known. Returns the link, and whether its tiers or
    /// its key are new.
    #[inline]
    pub fn store(&mut self, hash: u64, key: u64, tier: FleetTier) -> (HashLink, bool) {
        match self.by_hash.entry(hash) {
            Entry::Occupied(mut entry) => {
                let link = entry.get_mut();
                let before = link.mask();
                self.ghost_count -= usize::from(before == 0);
                let named = link.key == UNKNOWN && key != UNKNOWN;
                if named {
                    link.key = key;
                }
                link.counts[tier as usize] = link.counts[tier as usize].saturating_add(1);
                Self::moved(&mut self.in_tier, before, link.mask());
                (*link, named || link.mask() != before)
            }
            Entry::Vacant(entry) => {
                let mut link = HashLink { key, counts: [0; TOLD_TIERS], stamp: 0 };
                link.counts[tier as usize] = 1;
                Self::moved(&mut self.in_tier, 0, link.mask());
                entry.insert(link);
                (link, true)
            }
        }
    }

    /// One copy less in a tier. Returns the link as it is now and the tiers that held it before;
    /// `None` when the tier had no copy.
    pub fn remove(&mut self, hash: u64, tier: FleetTier) -> Option<(HashLink, u8)> {
        let link = self.by_hash.get_mut(&hash)?;
        let before = link.mask();
        let count = &mut link.counts[tier as usize];
        *count = count.checked_sub(1)?;
        let link = *link;
        Self::moved(&mut self.in_tier, before, link.mask());
        if link.mask() == 0 {
            self.lay_to_rest(hash);
        }
        Some((link, before))
    }

    /// No copy in these tiers any more.
    pub fn remove_all(&mut self, hash: u64, tiers: u8) {
        let Some(link) = self.by_hash.get_mut(&hash).filter(|link| link.mask() & tiers != 0) else { return };
        let before = link.mask();
        for (tier, count) in link.counts.iter_mut().enumerate() {
            if tiers & 1 << tier != 0 {
                *count = 0;
            }
        }
        Self::moved(&mut self.in_tier, before, link.mask());
        if link.mask() == 0 {
            self.lay_to_rest(hash);
        }
    }

    /// The key of an orphan has become known. Returns the link; `None` when it is no longer there.
    pub fn adopt(&mut self, hash: u64, key: u64) -> Option<HashLink> {
        let link = self.by_hash.get_mut(&hash)?;
        link.key = key;
        Some(*link)
    }

    /// A link as another index knew it.
    pub fn restore(&mut self, hash: u64, key: u64, counts: [u8; TOLD_TIERS]) -> HashLink {
        let link = HashLink { key, counts, stamp: 0 };
        let before = self.by_hash.insert(hash, link);
        self.ghost_count -= usize::from(before.is_some_and(|before| before.mask() == 0));
        Self::moved(&mut self.in_tier, before.map_or(0, |before| before.mask()), link.mask());
        if link.mask() == 0 {
            self.lay_to_rest(hash);
        }
        link
    }

    fn lay_to_rest(&mut self, hash: u64) {
        self.stamp = self.stamp.wrapping_add(1);
        let Some(link) = self.by_hash.get_mut(&hash) else { return };
        // An orphan without a holder says nothing: its key is not known.
        if link.key == UNKNOWN {
            self.by_hash.remove(&hash);
            return;
        }
        link.stamp = self.stamp;
        self.ghosts.push_back((hash, self.stamp));
        self.ghost_count += 1;
    }

    /// Forgets ghosts until there are at most as many as may be. Returns their hashes.
    pub fn bury(&mut self, into: &mut Vec<u64>) {
        let most = self.held().max(limits::GHOSTS_MIN);
        while self.ghost_count > most && self.bury_one(into) {}
        // Entries of ghosts that have come back are passed over one by one; where most are of that
        // kind they go together.
        if self.ghosts.len() > 4 * self.ghost_count + limits::GHOSTS_MIN {
            let links = &self.by_hash;
            let is_ghost =
                |hash: &u64, stamp: u16| links.get(hash).is_some_and(|it| it.mask() == 0 && it.stamp == stamp);
            self.ghosts.retain(|(hash, stamp)| is_ghost(hash, *stamp));
        }
    }

    /// Forgets so many ghosts, or all there are, to make room without growing. Returns their
    /// hashes.
    pub fn bury_for(&mut self, count: usize, into: &mut Vec<u64>) {
        for _ in 0..count {
            if !self.bury_one(into) {
                return;
            }
        }
    }

    fn bury_one(&mut self, into: &mut Vec<u64>) -> bool {
        while let Some((hash, stamp)) = self.ghosts.pop_front() {
            if self.by_hash.get(&hash).is_some_and(|link| link.mask() == 0 && link.stamp == stamp) {
                self.by_hash.remove(&hash);
                self.ghost_count -= 1;
                into.push(hash);
                return true;
            }
        }
        false
    }

    /// Room for more hashes without growing.
    pub fn room(&self) -> usize {
        self.by_hash.capacity() - self.by_hash.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_counted_in_each_tier() {
        let mut links = Links::default();
        links.store(7, 70, FleetTier::Gpu);
        assert!(!links.store(7, 70, FleetTier::Gpu).1, "a second copy");
        links.store(7, 70, FleetTier::Cpu);
        assert_eq!(links.remove(7, FleetTier::Gpu).map(|(link, _)| link.mask()), Some(0b11));
        assert_eq!(links.remove(7, FleetTier::Gpu).map(|(link, _)| link.mask()), Some(0b10));
        assert_eq!(links.remove(7, FleetTier::Gpu), None, "there is no third copy");
        assert_eq!((links.held(), links.ghosts()), (1, 0));
        links.remove_all(7, FleetTier::Cpu.bit());
        assert_eq!((links.held(), links.ghosts(), links.get(7).map(|link| link.key)), (0, 1, Some(70)));
        assert_eq!(links.in_tiers(), [0; TOLD_TIERS]);
        links.restore(7, 70, [1, 2, 0, 0, 0]);
        links.restore(8, 80, [0, 0, 3, 0, 0]);
        links.restore(7, 70, [0, 2, 0, 0, 0]);
        assert_eq!(links.in_tiers(), [0, 1, 1, 0, 0]);
    }

    #[test]
    fn the_oldest_ghosts_go_first() {
        let mut links = Links::default();
        let many = limits::GHOSTS_MIN as u64 + 10;
        for hash in 0..many {
            links.store(hash, hash + 2, FleetTier::Gpu);
        }
        for hash in 0..many {
            links.remove(hash, FleetTier::Gpu);
        }
        links.store(0, 2, FleetTier::Cpu);
        let mut buried = Vec::new();
        links.bury(&mut buried);
        assert_eq!(buried, (1..10).collect::<Vec<_>>(), "0 has come back");
        assert_eq!((links.held(), links.ghosts()), (1, limits::GHOSTS_MIN));
        links.bury_for(2, &mut buried);
        assert_eq!(buried.len(), 11);
    }
}
