//! Both tiers without bytes: what a simulation asks how a workload would fare.
//!
//! Books and decisions are the engine's own: where blocks are ([`Residency`], [`Extents`]), what a
//! hit is ([`hit`]), what is loaded or computed, what is written to disk (`cleaning`), which policy
//! evicts. Not here are the ways of bytes: copies, reads and writes end at once, there is one
//! group, and one request after another.

use std::sync::Arc;

use super::cleaning::{self, Cleaning, CleaningStep, WriteMeans, judge};
use super::extents::{Extents, Stamp};
use super::hit::{self, Sources};
use super::reservation::{Provenance, User};
use super::residency::Residency;
use crate::config::TenantList;
use crate::event_log::EventLog;
use crate::policy::load::Rates;
use crate::policy::write_budget::{WriteBudget, WriteRate};
use crate::policy::{Admission, BlockOwner, LoadPolicy, PolicyName, Tenants};
use crate::pool::memory::HeapSlots;
use kvcellar_block::descriptor::Lineage;
use kvcellar_block::{BlockHash, BlockKey, ExtentIndex, GroupIndex, GroupKind, GroupSpec, Grouping, SlotIndex};

const GROUP: GroupIndex = GroupIndex(0);

/// The tiers and what the user decided about them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReplaySettings {
    /// Slots of the dram tier.
    pub slots: u32,
    /// Extents of the nvme tier; 0: there is none.
    pub extents: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Chooses which blocks both tiers keep.
    pub policy: PolicyName,
    /// Which blocks are written to disk.
    pub admission: Admission,
    /// Whether a part on disk is loaded or computed.
    pub load_policy: LoadPolicy,
    /// What that is decided with.
    pub rates: Rates,
    /// Share of the slots, in percent, that are kept free or clean.
    pub clean_percent: u64,
    /// Bytes that may be written to disk in a time; `None`: no bound.
    pub write_budget: Option<WriteRate>,
}

/// What one request found and left, in blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReplayedHits {
    /// Loaded from memory.
    pub dram: u32,
    /// Loaded from disk.
    pub nvme: u32,
    /// Put into the dram tier.
    pub stored: u32,
    /// Written to disk.
    pub written: u32,
}

impl ReplayedHits {
    /// Blocks that were not computed.
    pub fn hits(self) -> u32 {
        self.dram + self.nvme
    }
}

/// Both tiers.
pub struct TierReplay {
    settings: ReplaySettings,
    grouping: Grouping,
    dram: Residency,
    disk: Option<Extents>,
    user: User,
    budget: Option<WriteBudget>,
    now_s: f64,
}

impl TierReplay {
    /// Empty tiers.
    pub fn new(settings: ReplaySettings) -> Self {
        Self::shared(settings, &TenantList::default())
    }

    /// Empty tiers that these tenants share.
    pub fn shared(settings: ReplaySettings, tenants: &TenantList) -> Self {
        let ReplaySettings { slots, extents, block_tokens, policy, .. } = settings;
        let budget = settings.write_budget.and_then(|rate| WriteBudget::new(rate, settings.block_bytes, 0.0));
        let memory = Arc::new(HeapSlots::new(slots, 1));
        let mut dram =
            Residency::new(memory, Tenants::new(policy, slots, &tenants.quotas(slots)), EventLog::new(false));
        let disk = (extents > 0).then(|| {
            dram.track_dirty();
            let mut disk = Extents::new(extents, policy, &tenants.quotas(extents));
            disk.make_ready(extents);
            disk
        });
        let group = GroupSpec { kind: GroupKind::Full, kind_name: String::new(), block_tokens, eagle: false };
        let grouping = Grouping { groups: vec![group], hash_tokens: block_tokens, hit_tokens: block_tokens };
        Self { settings, grouping, dram, disk, user: User::default(), budget, now_s: 0.0 }
    }

    /// So many seconds have passed since the beginning. What may be written depends on it.
    pub fn set_time(&mut self, now_s: f64) {
        self.now_s = now_s;
    }

    /// Serves a request of no tenant whose prompt has these blocks and so many tokens.
    pub fn serve(&mut self, hashes: &[BlockHash], prompt_tokens: u32) -> ReplayedHits {
        self.serve_for(BlockOwner::NOBODY, hashes, prompt_tokens)
    }

    /// As [`Self::serve`], of this tenant.
    pub fn serve_for(&mut self, owner: BlockOwner, hashes: &[BlockHash], prompt_tokens: u32) -> ReplayedHits {
        self.user = User { serial: self.user.serial.wrapping_add(1), owner };
        let mut served = ReplayedHits::default();
        let hit = self.reach(hashes);
        self.load(&hashes[..hit], prompt_tokens, &mut served);
        self.store(hashes, prompt_tokens, &mut served);
        served.written = self.clean();
        // Touched from last to first when it ends.
        let held: Vec<SlotIndex> = hashes.iter().filter_map(|hash| self.dram.find(&key(*hash))).collect();
        self.dram.touch(&held, self.user);
        served
    }

    /// Blocks that an owner has in memory and on disk.
    pub fn blocks_of(&self, owner: BlockOwner) -> (u32, u32) {
        (self.dram.blocks_of(owner), self.disk.as_ref().map_or(0, |disk| disk.blocks_of(owner)))
    }

    /// Blocks of the hit.
    fn reach(&self, hashes: &[BlockHash]) -> usize {
        let Self { settings, grouping, dram, disk, .. } = self;
        let block_tokens = settings.block_tokens;
        let limit = hashes.len() as u32 * block_tokens;
        let end = |extents: Option<&Extents>| {
            let sources = Sources { residency: dram, extents };
            hit::resume_at(sources, grouping, hashes, 0, limit) / block_tokens
        };
        let in_memory = end(None);
        let both = disk.as_ref().filter(|_| settings.load_policy != LoadPolicy::Never).map(|disk| end(Some(disk)));
        let Some(both) = both.filter(|both| *both > in_memory) else { return in_memory as usize };
        let blocks = both - in_memory;
        let bytes = u64::from(blocks) * settings.block_bytes;
        let loads = settings.load_policy.loads(&settings.rates, blocks * block_tokens, bytes, 0);
        (if loads { both } else { in_memory }) as usize
    }

    /// Holds the blocks of a hit, reads those that only the disk has, and lets go.
    fn load(&mut self, hashes: &[BlockHash], prompt_tokens: u32, served: &mut ReplayedHits) {
        let user = self.user;
        let found: Vec<Option<SlotIndex>> = hashes.iter().map(|hash| self.dram.find(&key(*hash))).collect();
        for slot in found.iter().flatten() {
            self.dram.pin(*slot, user);
        }
        served.dram = found.iter().flatten().count() as u32;
        served.nvme = found.len() as u32 - served.dram;
        let mut held: Vec<SlotIndex> = Vec::with_capacity(found.len());
        if let Some(disk) = &mut self.disk {
            for gone in self.dram.make_room(served.nvme as usize, user) {
                // As recent on disk as it was in memory.
                if let Some(extent) = disk.find(&gone) {
                    disk.touch(extent);
                }
            }
        }
        for (hash, found) in hashes.iter().zip(found) {
            let provenance = Provenance { parent: held.last().copied(), prompt_tokens };
            let slot = found.or_else(|| self.restore(&key(*hash), provenance));
            held.extend(slot);
        }
        for slot in held.iter().rev() {
            self.dram.unpin(*slot);
        }
    }

    /// Reads a block from disk. Returns the slot that it got; without one it passed through the
    /// window.
    fn restore(&mut self, key: &BlockKey, provenance: Provenance) -> Option<SlotIndex> {
        let disk = self.disk.as_mut()?;
        let extent = disk.find(key)?;
        disk.begin_read(extent, self.user.owner);
        disk.end_read(extent, &mut self.dram.events);
        let slot = self.dram.reserve_restore(key, self.user, provenance).ok()?.slot;
        self.dram.pin(slot, self.user);
        self.dram.end_restore(slot, Some(Lineage::default()));
        Some(slot)
    }

    /// Keeps what the request computed, and touches what it used.
    fn store(&mut self, hashes: &[BlockHash], prompt_tokens: u32, served: &mut ReplayedHits) {
        let (mut resident, mut on_disk, mut missing) = (Vec::new(), Vec::new(), Vec::new());
        for (at, hash) in hashes.iter().enumerate() {
            match (self.dram.find(&key(*hash)), self.disk.as_ref().and_then(|disk| disk.find(&key(*hash)))) {
                (Some(slot), _) => resident.push(slot),
                (None, Some(extent)) => on_disk.push(extent),
                (None, None) => missing.push(at),
            }
        }
        self.touch_on_disk(&on_disk);
        self.dram.touch(&resident, self.user);
        self.dram.make_room(missing.len(), self.user);
        let mut slots = Vec::with_capacity(missing.len());
        for at in missing {
            let before = at.checked_sub(1).and_then(|before| self.dram.find_any(&key(hashes[before])));
            let provenance = Provenance { parent: before.map(|(slot, _)| slot), prompt_tokens };
            let Ok(reserved) = self.dram.reserve(&key(hashes[at]), self.user, provenance) else { break };
            slots.push(reserved.slot);
        }
        self.dram.publish_all(&slots, std::iter::repeat_with(Lineage::default));
        served.stored = slots.len() as u32;
    }

    fn touch_on_disk(&mut self, extents: &[ExtentIndex]) {
        if let Some(disk) = &mut self.disk {
            extents.iter().rev().for_each(|extent| disk.touch(*extent));
        }
    }

    /// Writes what has to be written. Returns how many blocks that are.
    fn clean(&mut self) -> u32 {
        let Self { settings, dram, disk: Some(disk), budget, now_s, .. } = self else { return 0 };
        let mut cleaning = Cleaning::new(dram, settings.clean_percent, false);
        let mut written = 0;
        let (now_s, bytes) = (*now_s, settings.block_bytes);
        let may_write = |budget: &Option<WriteBudget>| budget.as_ref().is_none_or(|it| it.bytes_left(now_s) >= bytes);
        while may_write(budget)
            && let Some(dirty) = cleaning.next(dram)
        {
            let scarce = budget.as_ref().is_some_and(|budget| budget.is_short(now_s));
            let owner = dram.owner(dirty.slot);
            let room = disk.free() > 0 && disk.room(owner) > 0;
            let means = WriteMeans { room, scarce };
            let key = match judge(disk, dram, settings.admission, dirty, means) {
                CleaningStep::Done => continue,
                CleaningStep::Write(key) => key,
                CleaningStep::NeedsRoom(key) => {
                    if cleaning::make_room(disk, dram, owner, 1).is_none() {
                        break;
                    }
                    key
                }
            };
            if budget.as_mut().is_some_and(|budget| !budget.take(now_s, bytes)) {
                break;
            }
            dram.begin_write(dirty.slot);
            let parent = dram.parent_key(dirty.slot);
            let extent = disk.reserve(&key, owner, parent.as_ref(), Stamp::default(), &mut dram.events);
            dram.end_write(dirty.slot, extent.is_some());
            let Some(extent) = extent else { break };
            disk.commit(extent, Lineage::default(), &mut dram.events);
            written += 1;
        }
        written
    }
}

fn key(hash: BlockHash) -> BlockKey {
    BlockKey { hash, group: GROUP }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use kvcellar_block::SaltTag;

    fn hashes(from: u8, to: u8) -> Vec<BlockHash> {
        (from..to).map(|byte| BlockHash::new(&[byte; 32]).expect("32 bytes")).collect()
    }

    fn settings(slots: u32, extents: u32) -> ReplaySettings {
        ReplaySettings {
            slots,
            extents,
            block_tokens: 16,
            block_bytes: 1 << 20,
            policy: PolicyName::Lru,
            admission: Admission::All,
            load_policy: LoadPolicy::Always,
            rates: Rates::default(),
            clean_percent: 100,
            write_budget: None,
        }
    }

    #[test]
    fn a_prefix_is_found_and_the_rest_is_kept() {
        let mut replay = TierReplay::new(settings(8, 0));
        assert_eq!(replay.serve(&hashes(0, 4), 64), ReplayedHits { stored: 4, ..ReplayedHits::default() });
        assert_eq!(replay.serve(&hashes(0, 6), 96), ReplayedHits { dram: 4, stored: 2, ..ReplayedHits::default() });
        // The suffix goes first.
        assert_eq!(replay.serve(&hashes(10, 14), 64).stored, 4);
        assert_eq!(replay.serve(&hashes(0, 6), 96).dram, 4);
    }

    #[test]
    fn a_request_does_not_evict_its_own_prefix() {
        let mut replay = TierReplay::new(settings(4, 0));
        assert_eq!(replay.serve(&hashes(0, 10), 160).stored, 4);
        assert_eq!(replay.serve(&hashes(0, 10), 160), ReplayedHits { dram: 4, ..ReplayedHits::default() });
    }

    #[test]
    fn no_more_is_written_than_the_budget_allows() {
        let rate = WriteRate { bytes: 40 << 20, seconds: 10 };
        let mut replay = TierReplay::new(ReplaySettings { write_budget: Some(rate), ..settings(8, 200) });
        let mut written = Vec::new();
        for at in 0..50_u8 {
            replay.set_time(f64::from(at) / 2.0);
            written.push(replay.serve(&hashes(at * 5, at * 5 + 5), 80).written);
        }
        let within = |from: usize| written[from..(from + 20).min(written.len())].iter().sum::<u32>();
        assert!((0..written.len()).all(|from| within(from) <= 40), "{written:?}");
        assert!(written.iter().sum::<u32>() > 50, "what is allowed is used: {written:?}");
    }

    #[test]
    fn tenants_keep_their_shares_in_both_tiers() {
        let json = r#"{"tenants": {"quiet": {"guaranteed": "25%"}, "scan": {"limit": "50%"}}}"#;
        let tenants = Config::parse(json).expect("tenants").tenants;
        let (quiet, scan) = (tenants.owner(Some("quiet"), SaltTag::NONE), tenants.owner(Some("scan"), SaltTag::NONE));
        for policy in PolicyName::ALL {
            let settings = ReplaySettings { policy, clean_percent: 50, ..settings(40, 100) };
            let mut replay = TierReplay::shared(settings, &tenants);
            // What a request brings is written when others come.
            let blocks = |from: u8| hashes(from, from + 5);
            for at in 0..5 {
                replay.serve_for(quiet, &blocks(at * 5), 80);
            }
            for at in 0..60 {
                replay.serve_for(scan, &blocks(50 + at % 40 * 5), 80);
                let (dram, nvme) = replay.blocks_of(scan);
                assert!(dram <= 20 && nvme <= 50, "{policy:?}: the limit holds at every moment: {dram}, {nvme}");
            }
            for at in 0..60 {
                replay.serve(&blocks(50 + at % 40 * 5), 80);
            }
            // A prompt beyond the limit takes no more than the limit from others.
            replay.serve_for(scan, &hashes(0, 200)[50..], 150 * 16);
            let left = [quiet, BlockOwner::NOBODY].map(|owner| replay.blocks_of(owner).0);
            assert!(left[0] >= 10 && left[0] + left[1] >= 20, "{policy:?}: {left:?}");
            let (dram, _) = replay.blocks_of(quiet);
            assert!(dram >= 10, "{policy:?}: others take nothing of what is guaranteed: {dram}");
            let found: u32 = (0..5).map(|at| replay.serve_for(quiet, &blocks(at * 5), 80).hits()).sum();
            assert_eq!(found, 25, "{policy:?}: in memory or on disk");
        }
    }

    #[test]
    fn what_left_memory_comes_from_disk_unless_computing_is_faster() {
        let mut always = TierReplay::new(settings(4, 32));
        let rounds = [(0, 4), (10, 14), (20, 24)];
        let written: u32 = rounds.iter().map(|(from, to)| always.serve(&hashes(*from, *to), 64).written).sum();
        assert!(written >= 8, "what was evicted had been written: {written}");
        let again = always.serve(&hashes(0, 4), 64);
        assert_eq!((again.dram, again.nvme), (0, 4));
        let rates = Rates { restore_bytes_per_s: 1.0, prefill_tokens_per_s: 1e6 };
        let mut auto = TierReplay::new(ReplaySettings { load_policy: LoadPolicy::Auto, rates, ..settings(4, 32) });
        for (from, to) in rounds {
            auto.serve(&hashes(from, to), 64);
        }
        assert_eq!(auto.serve(&hashes(0, 4), 64).hits(), 0);
    }
}
