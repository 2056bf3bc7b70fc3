//! The engine's state and the operations that are not about one way of a block: requests, reset,
//! events, metrics.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use hashbrown::HashMap;
use serde_json::Value;

use super::disk_tier::{DiskParts, DiskSettings, DiskTier, Job};
use super::extents::Stamp;
use super::offload::Batch;
use super::requests::{Lease, Request};
use super::residency::{Census, Residency};
use super::trace::{self, Trace};
use super::window::Window;
use crate::config::{Config, Controls, OnReset};
use crate::event_log::{EventLog, Run};
use crate::metrics::{Counters, DropReason, Gauges, Samples};
use crate::nvme::disk::Disk;
use crate::nvme::snapshot::Entry;
use crate::nvme::store::Store;
use crate::policy::Lru;
use crate::pool::Pool;
use crate::pool::memory::SlotMemory;
use crate::{invariant, limits};
use kvcellar_block::error::{Error, Result};
use kvcellar_block::plan::{ANSWERED, BlockCopy, StepPlan};
use kvcellar_block::{AdapterId, BlockHash, BlockKey, ExtentIndex, Grouping, SlotIndex, Tier};

/// All of one engine's decisions. One owner, behind one lock.
pub struct TierEngine {
    pub(super) grouping: Grouping,
    pub(super) residency: Option<Residency>,
    pub(super) disk: Option<DiskTier>,
    /// The engine stops: every dirty block is written.
    pub(super) flushing: bool,
    pub(super) requests: HashMap<String, Request>,
    pub(super) leases: HashMap<String, Lease>,
    /// Offload batches in the order in which they were planned; they become visible in this order.
    pub(super) batches: VecDeque<Batch>,
    pub(super) inflight_stores: usize,
    /// vLLM block -> the offload that still reads it.
    pub(super) fences: HashMap<u32, BlockCopy>,
    pub(super) plan: StepPlan,
    pub(super) trace: Option<Trace>,
    pub(super) batch_number: u64,
    events_enabled: bool,
    pool: Option<Arc<Pool>>,
    serial: u32,
    lookup_seconds: Samples,
    reported: (Counters, Gauges),
    progress: (u64, Instant),
    on_reset: OnReset,
    /// A reset came: what is stored belongs to this process alone, in whatever pool or store.
    private: bool,
}

/// What a reset dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResetReport {
    /// Blocks of the dram tier.
    pub blocks_dropped_dram: u64,
    /// Blocks of the nvme tier.
    pub blocks_dropped_nvme: u64,
    /// Bytes of both.
    pub bytes: u64,
    /// Nothing was dropped: the user promised that weights never change in a running engine.
    pub kept: bool,
}

/// What changed since the last collection.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StatsDelta {
    /// Growth of each counter that grew: name and amount.
    pub counters: Vec<(&'static str, u64)>,
    /// Dropped blocks by reason.
    pub dropped: Vec<(&'static str, u64)>,
    /// Gauges that changed.
    pub gauges: Vec<(&'static str, u64)>,
    /// Durations of lookups, in seconds.
    pub lookup_seconds: Vec<f64>,
}

impl TierEngine {
    /// An engine without slots: every lookup is a miss until [`Self::open`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] when block sizes do not fit together, [`Error::Io`] for `trace_file`.
    pub fn new(config: &Config, grouping: Grouping) -> Result<Self> {
        grouping.check()?;
        let trace = config.trace_file.as_deref().map(Trace::open).transpose()?;
        Ok(Self {
            grouping,
            residency: None,
            disk: None,
            flushing: false,
            requests: HashMap::new(),
            leases: HashMap::new(),
            batches: VecDeque::new(),
            inflight_stores: 0,
            fences: HashMap::new(),
            plan: StepPlan::default(),
            trace,
            batch_number: 0,
            events_enabled: config.events,
            pool: None,
            serial: 0,
            lookup_seconds: Samples::default(),
            reported: (Counters::default(), Gauges::default()),
            progress: (0, Instant::now()),
            on_reset: config.on_reset,
            private: false,
        })
    }

    /// The groups this engine was made for.
    pub fn grouping(&self) -> &Grouping {
        &self.grouping
    }

    /// Gives the engine its slots, which hold nothing.
    pub fn open(&mut self, memory: Arc<dyn SlotMemory>) {
        let slots = memory.slot_count();
        let policy = Box::new(Lru::new(slots));
        self.residency = Some(Residency::new(memory, policy, EventLog::new(self.events_enabled)));
        self.record(|_| trace::line("open", &[("slots", slots.into()), ("adopted", 0.into())]));
    }

    /// Whether a reset came: nothing of an earlier engine may be used, and no later one may use
    /// what is stored.
    pub fn is_private(&self) -> bool {
        self.private
    }

    /// Gives the engine a pool, and takes over what an earlier engine left in it. Returns the
    /// number of blocks taken over.
    pub fn open_pool(&mut self, pool: Pool, adopt: bool) -> u64 {
        let adopt = adopt && !self.private;
        if self.private {
            pool.header().make_private();
        }
        let pool = Arc::new(pool);
        let memory: Arc<dyn SlotMemory> = Arc::new(Arc::clone(&pool));
        let mut residency =
            Residency::new(memory, Box::new(Lru::new(pool.slot_count())), EventLog::new(self.events_enabled));
        let adopted = super::adoption::take_over(&mut residency, adopt);
        self.residency = Some(residency);
        let fields = [
            ("slots", Value::from(pool.slot_count())),
            ("slot_bytes", pool.geometry().slot_bytes.into()),
            ("adopted", adopted.into()),
        ];
        self.record(|_| trace::line("open", &fields));
        self.pool = Some(pool);
        adopted
    }

    /// The pool, once there is one.
    pub fn pool(&self) -> Option<&Arc<Pool>> {
        self.pool.as_ref()
    }

    /// Gives the engine a disk below its pool, with what a reopened store holds.
    ///
    /// `disk`: over the store's segments, completing to a [`super::mover::ToMover`] of the same
    /// `jobs`.
    pub fn open_disk(
        &mut self,
        store: Store,
        disk: Arc<dyn Disk>,
        jobs: Sender<Job>,
        found: &[Entry],
        next_sequence: u64,
        settings: DiskSettings,
    ) {
        let (Some(residency), Some(pool)) = (&mut self.residency, &self.pool) else { return };
        let count = (pool.slot_count() / limits::WINDOW_POOL_SHARE)
            .clamp(limits::WINDOW_SLOTS_MIN, limits::WINDOW_SLOTS_MAX)
            .min(pool.slot_count() / 2)
            .max(1);
        let slots = residency.set_aside(count);
        let ranks = u64::MAX >> (64 - pool.geometry().parts.len());
        let window = Window::new(slots, residency.memory().as_ref(), ranks);
        let parts = DiskParts { store, disk, pool: Arc::clone(pool), window, jobs, next_sequence };
        let mut tier = DiskTier::new(parts, settings);
        let oldest = settings.retention_s.map_or(0, |retention| super::spill::now_s().saturating_sub(retention));
        for entry in found.iter().filter(|entry| entry.written_s >= oldest) {
            let stamp = Stamp { sequence: entry.sequence, written_s: entry.written_s };
            tier.extents.adopt(entry.extent, &entry.key, stamp);
        }
        tier.extents.recount_free();
        residency.track_dirty();
        residency.counters.nvme_reopened_blocks += tier.extents.committed();
        for slot in residency.visible_slots() {
            if residency.key(slot).is_some_and(|key| tier.extents.find(&key).is_some()) {
                residency.set_clean(slot, true);
            }
        }
        tier.announce_from = (tier.extents.committed() > 0).then_some(0);
        let fields = [
            ("extents", Value::from(tier.extents.ready())),
            ("extents_max", tier.extents_max().into()),
            ("reopened", tier.extents.committed().into()),
            ("window", tier.window.slots().into()),
        ];
        self.disk = Some(tier);
        self.record(|_| trace::line("open_disk", &fields));
    }

    /// One round of writing everything dirty to disk before the engine stops. Returns whether
    /// nothing is left to do.
    pub fn flush(&mut self) -> bool {
        // What belongs to this process alone is worth nothing when it ends.
        if self.disk.is_none() || self.private {
            return true;
        }
        self.flushing = true;
        self.poll();
        self.clean(true);
        self.disk.as_ref().is_none_or(|disk| disk.extents.writing() == 0 && !disk.growing)
    }

    fn close_disk(&mut self) {
        let Some(disk) = self.disk.take() else { return };
        let entry = |(extent, key, stamp): (ExtentIndex, BlockKey, Stamp)| Entry {
            extent,
            key,
            sequence: stamp.sequence,
            written_s: stamp.written_s,
        };
        let entries: Vec<Entry> = disk.extents.committed_in(0, u32::MAX).map(entry).collect();
        // A write under way may still change an extent: then only a scan tells what is there.
        let quiet = disk.writes.is_empty();
        let mut store = disk.store.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if quiet && let Err(error) = store.close_clean(&entries, disk.sequence) {
            log::warn!("no snapshot of the nvme tier, the next start reads the descriptors instead: {error}");
        }
    }

    /// Lets go of the slots: every lookup is a miss again. Running loads are forgotten with their
    /// engine.
    pub fn close(&mut self) {
        self.close_disk();
        self.flushing = false;
        self.residency = None;
        self.pool = None;
        self.leases.clear();
        self.batches.clear();
        self.fences.clear();
        self.inflight_stores = 0;
        self.plan = StepPlan::default();
    }

    /// A request arrived. `lora`: name of its adapter, empty for none; `adapter`: what that
    /// consists of.
    pub fn add_request(&mut self, id: &str, controls: Controls, lora: &str, adapter: Option<AdapterId>) {
        self.serial = self.serial.wrapping_add(1).max(1);
        self.requests.insert(id.to_owned(), Request::new(self.serial, controls, lora.into(), adapter));
    }

    /// Block hashes the engine already has of a request; `None` for an unknown request.
    pub fn known_hashes(&self, id: &str) -> Option<usize> {
        self.requests.get(id).map(|request| request.hashes.len())
    }

    /// Appends block hashes of a request.
    pub fn add_hashes(&mut self, id: &str, hashes: &[BlockHash]) {
        if let Some(request) = self.requests.get_mut(id) {
            request.add_hashes(hashes);
        }
    }

    /// Finishes what the ranks have answered. Called at every hook; costs one load for each rank's
    /// bits of the oldest batch when nothing happened.
    pub fn poll(&mut self) {
        while self.batches.front().is_some_and(|batch| self.is_answered(batch)) {
            if let Some(batch) = self.batches.pop_front() {
                self.complete(batch);
            }
        }
        self.clean(self.flushing);
        if let Some(error) = self.trace.as_mut().and_then(Trace::take_failure) {
            self.trace = None;
            log::warn!("{error}");
        }
    }

    /// The orders of this step, as bytes for the workers.
    pub fn take_plan(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.plan).encode()
    }

    /// vLLM gives these blocks to somebody in this step: whoever still reads them is waited for.
    pub fn reallocate(&mut self, blocks: impl Iterator<Item = u32>) {
        self.wait_for(blocks, 0);
    }

    /// vLLM gives these blocks to another connector. Its writes are not on vLLM's compute stream,
    /// so that workers wait for the copies themselves before it is told of the step.
    pub fn hand_to_others(&mut self, blocks: impl Iterator<Item = u32>) {
        self.wait_for(blocks, ANSWERED);
    }

    fn wait_for(&mut self, blocks: impl Iterator<Item = u32>, flags: u16) {
        if self.fences.is_empty() {
            return;
        }
        for block in blocks {
            if let Some(copy) = self.fences.get(&block) {
                self.plan.waits.push(BlockCopy { flags: copy.flags | flags, ..*copy });
            }
        }
    }

    /// Tells subscribers that nothing is to be had from our tiers any more. What lies in them stays
    /// for the next start.
    pub fn withdraw(&mut self) {
        let Some(residency) = &mut self.residency else { return };
        for slot in residency.visible_slots() {
            if let Some(key) = residency.key(slot) {
                residency.events.removed(Tier::Dram, key);
            }
        }
        if let Some(disk) = &mut self.disk {
            disk.extents.withdraw(&mut residency.events);
        }
    }

    /// Whether vLLM should keep stepping although no request runs: orders wait to be sent, copies
    /// to be noticed or events to be published. Without any progress for
    /// [`limits::PENDING_WORK_STALL_MS`] the answer is no until something moves.
    pub fn pending_work(&mut self) -> bool {
        self.poll();
        let events = self.residency.as_ref().map_or(0, |residency| residency.events.len());
        let announcing = self.disk.as_ref().is_some_and(|disk| disk.announce_from.is_some() && disk.health.is_in());
        // What is being written will be announced.
        let moving = self.events_enabled && self.disk.as_ref().is_some_and(|disk| !disk.is_idle());
        let pending = !self.plan.is_empty() || !self.batches.is_empty() || events > 0 || announcing || moving;
        let census = self.census();
        let on_disk = self.disk.as_ref().map_or(0, |disk| disk.extents.committed());
        let facts = [census.filling, census.writing, events as u64, on_disk, self.batch_number];
        let state = facts.into_iter().fold(0_u64, |state, fact| state.wrapping_mul(31).wrapping_add(fact));
        if !pending || state != self.progress.0 {
            self.progress = (state, Instant::now());
        }
        pending && self.progress.1.elapsed() < Duration::from_millis(limits::PENDING_WORK_STALL_MS)
    }

    /// Makes everything stored so far worthless: weights may have changed. What is stored from here
    /// on belongs to this process alone, for such weights exist nowhere else: both tiers are marked
    /// durably when this returns, and no later start uses them. Copies under way end where they are
    /// and are then forgotten. With `on_reset: keep` nothing happens.
    pub fn reset(&mut self) -> ResetReport {
        if self.on_reset == OnReset::Keep {
            return ResetReport { kept: true, ..ResetReport::default() };
        }
        self.poll();
        self.private = true;
        let report = self.droppable();
        for request in self.requests.values_mut() {
            request.tainted = true;
        }
        for batch in &mut self.batches {
            batch.stale = true;
        }
        self.reset_disk();
        let Some(residency) = &mut self.residency else { return report };
        let generation = residency.memory().bump_cache_generation();
        for slot in residency.visible_slots() {
            residency.drop_block(slot, DropReason::Reset);
        }
        self.record(|_| trace::line("reset", &[("generation", generation.into())]));
        report
    }

    /// What a reset drops now.
    fn droppable(&self) -> ResetReport {
        let slots = self.residency.as_ref().map_or(0, |residency| residency.visible_slots().len() as u64);
        let slot_bytes = self.pool.as_ref().map_or(0, |pool| pool.geometry().slot_bytes);
        let (extents, extent_bytes) =
            self.disk.as_ref().map_or((0, 0), |disk| (disk.extents.committed(), disk.layout.extent_bytes));
        ResetReport {
            blocks_dropped_dram: slots,
            blocks_dropped_nvme: extents,
            bytes: slots * slot_bytes + extents * extent_bytes,
            kept: false,
        }
    }

    /// Nothing on disk is to be found again, by nobody.
    fn reset_disk(&mut self) {
        let (Some(residency), Some(disk)) = (&mut self.residency, &mut self.disk) else { return };
        let bumped = disk.store.lock().unwrap_or_else(std::sync::PoisonError::into_inner).bump_cache_generation();
        match bumped {
            Ok(generation) => disk.cache_generation = generation,
            Err(error) => {
                log::error!("the nvme tier could not be reset and is given up: {error}");
                disk.health.lost();
                disk.extents.withdraw(&mut residency.events);
            }
        }
        for write in disk.writes.values_mut() {
            write.stale = true;
        }
        for read in disk.reads.values_mut() {
            read.stale = true;
        }
        let all: Vec<ExtentIndex> = disk.extents.committed_in(0, u32::MAX).map(|(extent, _, _)| extent).collect();
        for extent in all {
            disk.extents.discard(extent, false, &mut residency.events);
            residency.counters.dropped(DropReason::Reset, 1);
        }
    }

    /// Nothing is under way and nothing waits: until the next request or offer, a step has nothing
    /// to ask of the engine.
    pub fn is_quiet(&self) -> bool {
        let events = self.residency.as_ref().is_some_and(|residency| !residency.events.is_empty());
        let moving = self.disk.as_ref().is_some_and(|disk| !disk.is_idle() || disk.announce_from.is_some());
        self.plan.is_empty() && self.batches.is_empty() && self.fences.is_empty() && !events && !moving
    }

    /// Events for this step, neighbours joined.
    pub fn take_events(&mut self) -> Vec<Run> {
        self.poll();
        self.residency.as_mut().map_or_else(Vec::new, |residency| residency.events.take(limits::EVENTS_PER_STEP_MAX))
    }

    /// Blocks that may be evicted, the next one first, with the serial of the request that used
    /// each last. For inspection.
    pub fn eviction_order(&self) -> Vec<(BlockKey, u32)> {
        self.residency.as_ref().map(Residency::eviction_order).unwrap_or_default()
    }

    pub(super) fn census(&self) -> Census {
        self.residency.as_ref().map(Residency::census).unwrap_or_default()
    }

    /// Everything that only grows.
    pub fn counters(&self) -> Counters {
        let counters = self.residency.as_ref().map(|residency| residency.counters).unwrap_or_default();
        Counters { invariant_violations: invariant::violations(), ..counters }
    }

    /// The engine's state now.
    pub fn gauges(&self) -> Gauges {
        let census = self.census();
        Gauges {
            total_slots: census.free + census.filling + census.filled,
            free_slots: census.free,
            filling_slots: census.filling,
            filled_slots: census.filled,
            pins: census.pins,
            leases: self.leases.len() as u64,
            fences: self.fences.len() as u64,
            pending_events: self.residency.as_ref().map_or(0, |residency| residency.events.len() as u64),
            pool_bytes: self.pool.as_ref().map_or(0, |pool| pool.bytes()),
            clean_slots: census.clean,
            ..self.disk_gauges()
        }
    }

    /// Every block that a request could have from a tier of ours now.
    pub fn held(&self) -> Vec<(Tier, BlockKey)> {
        let dram = self.residency.iter().flat_map(|residency| {
            residency.visible_slots().into_iter().filter_map(|slot| Some((Tier::Dram, residency.key(slot)?)))
        });
        let nvme = self.disk.iter().flat_map(DiskTier::held).map(|key| (Tier::Nvme, key));
        dram.chain(nvme).collect()
    }

    /// Nothing is being read, written or made on disk.
    pub fn disk_is_idle(&self) -> bool {
        self.disk.as_ref().is_none_or(DiskTier::is_idle)
    }

    fn disk_gauges(&self) -> Gauges {
        let Some(disk) = &self.disk else { return Gauges::default() };
        let device = &disk.description;
        Gauges {
            nvme_blocks: disk.extents.committed(),
            nvme_extents: u64::from(disk.extents.ready()),
            nvme_writing: disk.extents.writing(),
            nvme_reading: disk.reads.values().map(|read| read.parts.len() as u64).sum(),
            nvme_retired: disk.extents.retired(),
            nvme_in_service: u64::from(disk.health.is_in()),
            nvme_io_uring: u64::from(device.engine == "io_uring"),
            nvme_direct: u64::from(device.direct),
            nvme_registered: u64::from(device.registered),
            ..Gauges::default()
        }
    }

    /// A step computed this many tokens in so many seconds.
    pub fn prefilled(&mut self, tokens: u64, seconds: f64) {
        if let Some(disk) = &mut self.disk {
            disk.rates.prefilled(tokens, seconds);
        }
    }

    /// Tokens of a request's last admission that come from disk.
    pub fn disk_tokens(&self, id: &str) -> u32 {
        self.requests.get(id).map_or(0, |request| request.disk_tokens)
    }

    /// How long a lookup took.
    pub fn sample_lookup(&mut self, seconds: f64) {
        self.lookup_seconds.add(seconds);
    }

    /// What changed since the last call; `None` when nothing did.
    pub fn take_stats(&mut self) -> Option<StatsDelta> {
        let now = (self.counters(), self.gauges());
        if now == self.reported && self.lookup_seconds.is_empty() {
            return None;
        }
        let before = std::mem::replace(&mut self.reported, now);
        let grown = now
            .0
            .plain()
            .into_iter()
            .zip(before.0.plain())
            .map(|((name, now), (_, before))| (name, now.saturating_sub(before)));
        let changed =
            now.1.all().into_iter().zip(before.1.all()).filter(|(now, before)| now != before).map(|(now, _)| now);
        let dropped = DropReason::ALL.iter().enumerate().map(|(index, reason)| {
            (reason.name(), now.0.dropped_blocks[index].saturating_sub(before.0.dropped_blocks[index]))
        });
        Some(StatsDelta {
            counters: grown.filter(|(_, amount)| *amount > 0).collect(),
            dropped: dropped.filter(|(_, amount)| *amount > 0).collect(),
            gauges: changed.collect(),
            lookup_seconds: self.lookup_seconds.take(),
        })
    }

    pub(super) fn key_of(&self, slot: SlotIndex) -> Option<BlockKey> {
        self.residency.as_ref().and_then(|residency| residency.key(slot))
    }

    /// Writes a line to the operation log, if there is one.
    pub(super) fn record(&mut self, line: impl FnOnce(&Self) -> Value) {
        if self.trace.is_none() {
            return;
        }
        let line = line(self);
        if let Some(trace) = &mut self.trace {
            trace.write(&line);
        }
    }

    pub(super) fn record_state(&mut self) {
        self.record(|engine| {
            let gauges = engine.gauges();
            trace::line(
                "state",
                &[
                    ("total", gauges.total_slots.into()),
                    ("free", gauges.free_slots.into()),
                    ("filling", gauges.filling_slots.into()),
                    ("filled", gauges.filled_slots.into()),
                    ("pins", gauges.pins.into()),
                    ("leases", gauges.leases.into()),
                    ("fences", gauges.fences.into()),
                ],
            )
        });
    }

    /// An id that cannot travel in a plan is refused where it enters.
    ///
    /// # Errors
    /// [`Error::Config`] naming the request id.
    pub fn check_request_id(id: &str) -> Result<()> {
        if id.len() <= limits::REQUEST_ID_BYTES_MAX {
            return Ok(());
        }
        Err(Error::config(
            "request_id",
            format!("it has {} bytes", id.len()),
            format!("Use at most {} bytes", limits::REQUEST_ID_BYTES_MAX),
        ))
    }
}
