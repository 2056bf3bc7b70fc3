//! The engine's state and the operations that are not about one way of a block: requests, reset, events, metrics.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hashbrown::HashMap;
use serde_json::Value;

use super::offload::Batch;
use super::requests::{Lease, Request};
use super::residency::{Census, Residency};
use super::trace::{self, Trace};
use crate::block::plan::{BlockCopy, StepPlan};
use crate::block::{BlockHash, BlockKey, Grouping, SlotIndex};
use crate::config::{Config, Controls};
use crate::error::{Error, Result};
use crate::events::{EventLog, Run};
use crate::limits;
use crate::metrics::{Counters, DropReason, Gauges, Samples};
use crate::policy::Lru;
use crate::pool::Pool;
use crate::pool::memory::SlotMemory;

/// All of one engine's decisions. One owner, behind one lock.
pub struct TierEngine {
    pub(super) grouping: Grouping,
    pub(super) residency: Option<Residency>,
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

    /// Gives the engine a pool, and takes over what an earlier engine left in it. Returns the number of blocks taken over.
    pub fn open_pool(&mut self, pool: Pool, adopt: bool) -> u64 {
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

    /// Lets go of the slots: every lookup is a miss again. Running loads are forgotten with their engine.
    pub fn close(&mut self) {
        self.residency = None;
        self.pool = None;
        self.leases.clear();
        self.batches.clear();
        self.fences.clear();
        self.inflight_stores = 0;
        self.plan = StepPlan::default();
    }

    /// A request arrived.
    pub fn add_request(&mut self, id: &str, controls: Controls, lora: &str) {
        self.serial = self.serial.wrapping_add(1).max(1);
        self.requests.insert(id.to_owned(), Request::new(self.serial, controls, lora.into()));
    }

    /// Block hashes the engine already has of a request; `None` for an unknown request.
    pub fn known_hashes(&self, id: &str) -> Option<usize> {
        self.requests.get(id).map(|request| request.hashes.len())
    }

    /// Appends block hashes of a request.
    pub fn add_hashes(&mut self, id: &str, hashes: &[BlockHash]) {
        if let Some(request) = self.requests.get_mut(id) {
            request.hashes.extend_from_slice(hashes);
        }
    }

    /// Finishes what the ranks have answered. Called at every hook; costs one load for each rank's bits of the oldest batch when nothing happened.
    pub fn poll(&mut self) {
        while self.batches.front().is_some_and(|batch| self.is_answered(batch)) {
            if let Some(batch) = self.batches.pop_front() {
                self.complete(batch);
            }
        }
        if let Some(error) = self.trace.as_mut().and_then(Trace::take_failure) {
            self.trace = None;
            eprintln!("kvcellar: {error}");
        }
    }

    /// The orders of this step, as bytes for the workers.
    pub fn take_plan(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.plan).encode()
    }

    /// vLLM gives these blocks to somebody in this step: whoever still reads them is waited for.
    pub fn reallocate(&mut self, blocks: impl Iterator<Item = u32>) {
        if self.fences.is_empty() {
            return;
        }
        for block in blocks {
            if let Some(copy) = self.fences.get(&block) {
                self.plan.waits.push(*copy);
            }
        }
    }

    /// Whether vLLM should keep stepping although no request runs: orders wait to be sent, copies to be noticed or events to be published.
    /// Without any progress for [`limits::PENDING_WORK_STALL_MS`] the answer is no until something moves.
    pub fn pending_work(&mut self) -> bool {
        self.poll();
        let events = self.residency.as_ref().map_or(0, |residency| residency.events.len());
        let pending = !self.plan.is_empty() || !self.batches.is_empty() || events > 0;
        let census = self.census();
        let state = census.filling.wrapping_mul(31).wrapping_add(events as u64).wrapping_mul(31) + self.batch_number;
        if !pending || state != self.progress.0 {
            self.progress = (state, Instant::now());
        }
        pending && self.progress.1.elapsed() < Duration::from_millis(limits::PENDING_WORK_STALL_MS)
    }

    /// Makes everything stored so far worthless, durably: weights changed. Copies under way end where they are and are then forgotten.
    pub fn reset(&mut self) {
        self.poll();
        for request in self.requests.values_mut() {
            request.tainted = true;
        }
        for batch in &mut self.batches {
            batch.stale = true;
        }
        let Some(residency) = &mut self.residency else { return };
        let generation = residency.memory().bump_cache_generation();
        for slot in residency.visible_slots() {
            residency.drop_block(slot, DropReason::Reset);
        }
        self.record(|_| trace::line("reset", &[("generation", generation.into())]));
    }

    /// Nothing is under way and nothing waits: until the next request or offer, a step has nothing to ask of the engine.
    pub fn is_quiet(&self) -> bool {
        let events = self.residency.as_ref().is_some_and(|residency| !residency.events.is_empty());
        self.plan.is_empty() && self.batches.is_empty() && self.fences.is_empty() && !events
    }

    /// Events for this step, neighbours joined.
    pub fn take_events(&mut self) -> Vec<Run> {
        self.poll();
        self.residency.as_mut().map_or_else(Vec::new, |residency| residency.events.take(limits::EVENTS_PER_STEP_MAX))
    }

    /// Blocks that may be evicted, the next one first, with the serial of the request that used each last. For inspection.
    pub fn eviction_order(&self) -> Vec<(BlockKey, u32)> {
        self.residency.as_ref().map(Residency::eviction_order).unwrap_or_default()
    }

    pub(super) fn census(&self) -> Census {
        self.residency.as_ref().map(Residency::census).unwrap_or_default()
    }

    /// Everything that only grows.
    pub fn counters(&self) -> Counters {
        self.residency.as_ref().map(|residency| residency.counters).unwrap_or_default()
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
        }
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
