//! Counters, gauges and samples of the tier engine, with units in their names.

use crate::limits::{LATENCY_SAMPLES_MAX, TENANTS_MAX};

/// Why a block was not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropReason {
    /// Every slot is pinned or being filled.
    NoSlot,
    /// Only blocks of the same request could have been evicted for it.
    OwnPrefix,
    /// Too many offloads were in flight.
    QueueFull,
    /// The copy failed.
    CopyFailed,
    /// Its bytes did not match their checksum when they were loaded.
    Corrupt,
    /// `reset_cache` made it worthless.
    Reset,
    /// It was evicted before it could be written to disk.
    Unspilled,
    /// Reading or writing it on disk failed.
    DiskFailed,
    /// It lay on disk for longer than `retention`.
    Expired,
    /// vLLM wrote over it before it was copied, and could not be told to wait.
    Overwritten,
    /// Whoever it was of asked for it to be forgotten.
    Forgotten,
}

impl DropReason {
    /// All reasons, in the order of [`Counters::dropped_blocks`].
    pub const ALL: [Self; 11] = [
        Self::NoSlot,
        Self::OwnPrefix,
        Self::QueueFull,
        Self::CopyFailed,
        Self::Corrupt,
        Self::Reset,
        Self::Unspilled,
        Self::DiskFailed,
        Self::Expired,
        Self::Overwritten,
        Self::Forgotten,
    ];

    /// The label's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoSlot => "no_slot",
            Self::OwnPrefix => "own_prefix",
            Self::QueueFull => "queue_full",
            Self::CopyFailed => "copy_failed",
            Self::Corrupt => "corrupt",
            Self::Reset => "reset",
            Self::Unspilled => "unspilled",
            Self::DiskFailed => "disk_failed",
            Self::Expired => "expired",
            Self::Overwritten => "overwritten",
            Self::Forgotten => "forgotten",
        }
    }
}

/// What is counted of one tenant, or of all who are none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OwnerCounts {
    /// Tokens that its requests loaded from the dram tier.
    pub hit_tokens: u64,
    /// Tokens that they loaded from disk.
    pub nvme_hit_tokens: u64,
    /// Tokens that neither vLLM's own cache nor a tier had for them.
    pub miss_tokens: u64,
    /// Blocks of its own that were evicted from the dram tier.
    pub evicted_blocks: u64,
}

impl OwnerCounts {
    /// Name and value of each.
    pub fn plain(&self) -> [(&'static str, u64); 4] {
        [
            ("hit_tokens", self.hit_tokens),
            ("nvme_hit_tokens", self.nvme_hit_tokens),
            ("miss_tokens", self.miss_tokens),
            ("evicted_blocks", self.evicted_blocks),
        ]
    }
}

/// Everything that only grows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Blocks that requests loaded from the dram tier.
    pub hit_blocks: u64,
    /// Tokens of them.
    pub hit_tokens: u64,
    /// Blocks of admitted requests that neither vLLM's own cache nor this tier held.
    pub miss_blocks: u64,
    /// Tokens of them.
    pub miss_tokens: u64,
    /// Blocks that became available.
    pub stored_blocks: u64,
    /// Blocks evicted for others.
    pub evicted_blocks: u64,
    /// Blocks dropped, by reason.
    pub dropped_blocks: [u64; DropReason::ALL.len()],
    /// Loads that failed.
    pub load_failures: u64,
    /// Blocks taken over from an earlier engine.
    pub adopted_blocks: u64,
    /// Lookups that were asked to wait for another request's load of the same prefix.
    pub shared_load_waits: u64,
    /// Slots whose descriptor did not fit: served as ever, never adopted.
    pub undescribed_blocks: u64,
    /// Blocks that requests loaded from disk.
    pub nvme_hit_blocks: u64,
    /// Tokens of them.
    pub nvme_hit_tokens: u64,
    /// Blocks written to disk.
    pub spilled_blocks: u64,
    /// Bytes of them, descriptors included.
    pub spilled_bytes: u64,
    /// Blocks that came from disk into a slot of the dram tier.
    pub restored_blocks: u64,
    /// Bytes read for restores, descriptors included.
    pub restored_bytes: u64,
    /// Blocks evicted from disk for others.
    pub nvme_evicted_blocks: u64,
    /// Blocks found on disk at start.
    pub nvme_reopened_blocks: u64,
    /// Transfers that the disk refused or cut short.
    pub disk_errors: u64,
    /// Extents whose bytes did not match their checksums.
    pub corrupt_extents: u64,
    /// Times the nvme tier went out of service.
    pub nvme_outages: u64,
    /// Lookups whose part on disk was to be loaded.
    pub load_decisions: u64,
    /// Lookups whose part on disk was to be computed instead.
    pub recompute_decisions: u64,
    /// Blocks that a request wanted pinned and that were not, because others need the room.
    pub pins_refused: u64,
    /// States that cannot be, found in this process: bugs.
    pub invariant_violations: u64,
    /// What is counted by tenant, too.
    pub(crate) by_owner: [OwnerCounts; TENANTS_MAX + 1],
    /// What the live what-if found.
    pub what_if: WhatIfCounts,
    /// Microseconds of prefill that blocks of the dram tier replaced.
    pub saved_us: u64,
    /// The same, of blocks from disk.
    pub nvme_saved_us: u64,
}

/// What the live what-if found, in blocks, since the beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WhatIfCounts {
    /// Blocks that were looked up.
    pub blocks: u64,
    /// Those of them that a cache of the present capacity would miss.
    pub now_misses: u64,
    /// The same, with twice the capacity.
    pub double_misses: u64,
    /// The same, with a cache that keeps everything.
    pub infinite_misses: u64,
}

impl Counters {
    /// Counts dropped blocks.
    pub fn dropped(&mut self, reason: DropReason, blocks: u64) {
        let index = DropReason::ALL.iter().position(|known| *known == reason).unwrap_or(0);
        self.dropped_blocks[index] += blocks;
    }

    /// What is counted of one tenant, by its number in the configuration; 0 is nobody.
    pub fn of(&self, owner: u8) -> &OwnerCounts {
        &self.by_owner[usize::from(owner).min(TENANTS_MAX)]
    }

    /// As [`Self::of`], to count.
    pub fn of_mut(&mut self, owner: u8) -> &mut OwnerCounts {
        &mut self.by_owner[usize::from(owner).min(TENANTS_MAX)]
    }

    /// Name and value of each plain counter.
    pub fn plain(&self) -> [(&'static str, u64); 29] {
        [
            ("hit_blocks", self.hit_blocks),
            ("hit_tokens", self.hit_tokens),
            ("miss_blocks", self.miss_blocks),
            ("miss_tokens", self.miss_tokens),
            ("stored_blocks", self.stored_blocks),
            ("evicted_blocks", self.evicted_blocks),
            ("load_failures", self.load_failures),
            ("adopted_blocks", self.adopted_blocks),
            ("shared_load_waits", self.shared_load_waits),
            ("undescribed_blocks", self.undescribed_blocks),
            ("nvme_hit_blocks", self.nvme_hit_blocks),
            ("nvme_hit_tokens", self.nvme_hit_tokens),
            ("spilled_blocks", self.spilled_blocks),
            ("spilled_bytes", self.spilled_bytes),
            ("restored_blocks", self.restored_blocks),
            ("restored_bytes", self.restored_bytes),
            ("nvme_evicted_blocks", self.nvme_evicted_blocks),
            ("nvme_reopened_blocks", self.nvme_reopened_blocks),
            ("disk_errors", self.disk_errors),
            ("corrupt_extents", self.corrupt_extents),
            ("nvme_outages", self.nvme_outages),
            ("load_decisions", self.load_decisions),
            ("recompute_decisions", self.recompute_decisions),
            ("pins_refused", self.pins_refused),
            ("invariant_violations", self.invariant_violations),
            ("what_if_blocks", self.what_if.blocks),
            ("now_what_if_misses", self.what_if.now_misses),
            ("double_what_if_misses", self.what_if.double_misses),
            ("infinite_what_if_misses", self.what_if.infinite_misses),
        ]
    }

    /// Name and microseconds of each counter that is shown in seconds.
    pub fn microseconds(&self) -> [(&'static str, u64); 2] {
        [("saved_seconds", self.saved_us), ("nvme_saved_seconds", self.nvme_saved_us)]
    }
}

/// The engine's state at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gauges {
    /// All slots.
    pub total_slots: u64,
    /// Slots that hold nothing.
    pub free_slots: u64,
    /// Slots being filled.
    pub filling_slots: u64,
    /// Slots that hold a block.
    pub filled_slots: u64,
    /// Holds on blocks.
    pub pins: u64,
    /// Blocks that requests have pinned for a time.
    pub pinned_blocks: u64,
    /// Owners of holds: running loads.
    pub leases: u64,
    /// vLLM blocks that must not be overwritten before they were copied.
    pub fences: u64,
    /// Events that wait for a step.
    pub pending_events: u64,
    /// Bytes of the pool file.
    pub pool_bytes: u64,
    /// Those of them that lie in huge pages.
    pub pool_huge_bytes: u64,
    /// Blocks that the disk holds too.
    pub clean_slots: u64,
    /// Blocks on disk.
    pub nvme_blocks: u64,
    /// Extents that exist on disk, used or not.
    pub nvme_extents: u64,
    /// Blocks being written to disk.
    pub nvme_writing: u64,
    /// Reads from disk under way.
    pub nvme_reading: u64,
    /// Extents that failed, or wait to be erased, and hold no blocks meanwhile.
    pub nvme_retired: u64,
    /// 1 while the nvme tier is in service, else 0.
    pub nvme_in_service: u64,
    /// 1 with `io_uring`, 0 with threads.
    pub nvme_io_uring: u64,
    /// 1 with `O_DIRECT`.
    pub nvme_direct: u64,
    /// 1 with memory registered with the kernel.
    pub nvme_registered: u64,
    /// Bytes in huge pages that transfers pass through; 0: they go directly.
    pub nvme_staging_bytes: u64,
    /// Bytes that `nvme_write_budget` allows to be written at this moment; 0 without one.
    pub nvme_write_budget_left_bytes: u64,
}

impl Gauges {
    /// Name and value of each gauge.
    pub fn all(&self) -> [(&'static str, u64); 23] {
        [
            ("total_slots", self.total_slots),
            ("free_slots", self.free_slots),
            ("filling_slots", self.filling_slots),
            ("filled_slots", self.filled_slots),
            ("pins", self.pins),
            ("pinned_blocks", self.pinned_blocks),
            ("leases", self.leases),
            ("fences", self.fences),
            ("pending_events", self.pending_events),
            ("pool_bytes", self.pool_bytes),
            ("pool_huge_bytes", self.pool_huge_bytes),
            ("clean_slots", self.clean_slots),
            ("nvme_blocks", self.nvme_blocks),
            ("nvme_extents", self.nvme_extents),
            ("nvme_writing", self.nvme_writing),
            ("nvme_reading", self.nvme_reading),
            ("nvme_retired", self.nvme_retired),
            ("nvme_in_service", self.nvme_in_service),
            ("nvme_io_uring", self.nvme_io_uring),
            ("nvme_direct", self.nvme_direct),
            ("nvme_registered", self.nvme_registered),
            ("nvme_staging_bytes", self.nvme_staging_bytes),
            ("nvme_write_budget_left_bytes", self.nvme_write_budget_left_bytes),
        ]
    }
}

/// Durations between two collections, in seconds, bounded in number.
#[derive(Debug, Default)]
pub struct Samples {
    seconds: Vec<f64>,
}

impl Samples {
    /// Adds a duration, unless the interval has enough.
    pub fn add(&mut self, seconds: f64) {
        if self.seconds.len() < LATENCY_SAMPLES_MAX {
            self.seconds.push(seconds);
        }
    }

    /// Takes what was collected.
    pub fn take(&mut self) -> Vec<f64> {
        std::mem::take(&mut self.seconds)
    }

    /// Nothing was collected.
    pub fn is_empty(&self) -> bool {
        self.seconds.is_empty()
    }
}
