//! The tier engine as vLLM's hooks and the mover see it: with tiers or without.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::attached::{Attached, Progress};
use super::disk_tier::{DiskParts, DiskSettings, DiskTier};
use super::forgetting::{ForgetReport, Forgetting};
use super::jobs::Report;
use super::load::{self, Admission, Hit};
use super::medium::Medium;
use super::observe::{Collector, StatsDelta};
use super::offload::{Offer, Start};
use super::recorder::Recorder;
use super::requests::{Arrival, Finished, Requests};
use super::residency::Residency;
use super::savings::Savings;
use super::session::Session;
use super::tiers::Tiers;
use super::trace::{self, OperationLog};
use crate::config::{Config, OnReset, TenantList};
use crate::event_log::{EventLog, Run};
use crate::metrics::{Counters, Gauges};
use crate::nvme::buffer::PoolPart;
use crate::policy::{PolicyName, Tenants};
use crate::pool::Pool;
use crate::pool::memory::SlotMemory;
use crate::{invariant, limits, violated};
use kvcellar_block::error::{Error, Result};
use kvcellar_block::plan::{ANSWERED, StepPlan};
use kvcellar_block::{BlockHash, BlockKey, Grouping, SaltTag, SlotIndex, Tier};

/// Legal states: detached -> attached, by [`TierEngine::open`] or [`TierEngine::open_pool`], and
/// back by [`TierEngine::close`].
enum State {
    /// There are no slots: every lookup is a miss.
    Detached,
    /// There are tiers.
    Attached(Box<Attached>),
}

/// All of one engine's decisions. One owner, behind one lock.
pub struct TierEngine {
    session: Session,
    state: State,
    collector: Collector,
    /// What pending work had done when it last moved, and when that was.
    last_progress: (Progress, Instant),
    events_enabled: bool,
    /// Chooses which blocks stay in the dram tier.
    policy: PolicyName,
    /// Who shares the tiers.
    tenants: TenantList,
    on_reset: OnReset,
    /// A disk is to be opened, and may hold anything.
    awaits_disk: bool,
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

impl TierEngine {
    /// An engine without slots: every lookup is a miss until [`Self::open`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] when block sizes do not fit together, [`Error::Io`] for `trace_file`
    /// and `record_trace`.
    pub fn new(config: &Config, grouping: Grouping) -> Result<Self> {
        grouping.check()?;
        Ok(Self {
            session: Session {
                requests: Requests::new(grouping),
                plan: StepPlan::default(),
                log: OperationLog::open(config.trace_file.as_deref())?,
                recorder: config.record_trace.as_deref().map(Recorder::open).transpose()?,
                savings: Savings::default(),
            },
            state: State::Detached,
            collector: Collector::default(),
            last_progress: (Progress::default(), Instant::now()),
            events_enabled: config.events,
            on_reset: config.on_reset,
            policy: config.policy,
            tenants: config.tenants.clone(),
            awaits_disk: config.nvme.dir.is_some(),
            private: false,
        })
    }

    /// The groups this engine was made for.
    pub fn grouping(&self) -> &Grouping {
        self.session.requests.grouping()
    }

    /// The order of eviction of so many slots.
    fn places(&self, slots: u32) -> Tenants<SlotIndex> {
        Tenants::new(self.policy, slots, &self.tenants.quotas(slots))
    }

    fn attached(&self) -> Option<&Attached> {
        match &self.state {
            State::Attached(attached) => Some(attached),
            State::Detached => None,
        }
    }

    fn attach(&mut self, dram: Residency, pool: Option<Arc<Pool>>) {
        self.session.requests.forget_answers();
        let tiers = Tiers { dram, disk: None, pool };
        self.state = State::Attached(Box::new(Attached::new(tiers, self.policy, self.grouping())));
    }

    /// Gives the engine its slots, which hold nothing.
    pub fn open(&mut self, memory: Arc<dyn SlotMemory>) {
        let slots = memory.slot_count();
        self.attach(Residency::new(memory, self.places(slots), EventLog::new(self.events_enabled)), None);
        self.session.log.record(|| trace::line("open", &[("slots", slots.into()), ("adopted", 0.into())]));
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
        let mut dram = Residency::new(memory, self.places(pool.slot_count()), EventLog::new(self.events_enabled));
        let adopted = super::adoption::take_over(&mut dram, adopt);
        let fields = [
            ("slots", Value::from(pool.slot_count())),
            ("slot_bytes", pool.geometry().slot_bytes.into()),
            ("adopted", adopted.into()),
        ];
        self.attach(dram, Some(pool));
        self.session.log.record(|| trace::line("open", &fields));
        adopted
    }

    /// The pool, once there is one.
    pub fn pool(&self) -> Option<&Arc<Pool>> {
        self.attached()?.tiers.pool.as_ref()
    }

    /// So many bytes of the pool's slots that hold nothing, if there are as many in a row. Only
    /// before the engine is handed out: until the part is dropped no block may be kept.
    pub fn free_part(&self, bytes: u64) -> Option<Arc<PoolPart>> {
        let pool = self.pool()?;
        let count = u32::try_from(bytes.div_ceil(pool.geometry().slot_bytes)).ok()?;
        let mut first = 0;
        let taken = self.attached()?.tiers.dram.visible_slots().into_iter().map(|slot| slot.0);
        for taken in taken.chain([pool.slot_count()]) {
            if taken - first >= count {
                return PoolPart::new(pool, SlotIndex(first), count);
            }
            first = taken + 1;
        }
        None
    }

    /// Gives the engine a disk below its pool, with what a reopened store holds.
    ///
    /// `parts.disk`: over the store's segments, completing to a [`super::mover::ToMover`] of the
    /// same `jobs`.
    pub fn open_disk(&mut self, parts: DiskParts<'_>, settings: DiskSettings) {
        let State::Attached(attached) = &mut self.state else {
            violated!("a disk is opened before there is a pool");
            return;
        };
        self.awaits_disk = false;
        if let Some(opened) = attached.open_disk(parts, settings) {
            let fields = [
                ("extents", Value::from(opened.extents)),
                ("extents_max", opened.extents_max.into()),
                ("reopened", opened.reopened.into()),
                ("window", opened.window_slots.into()),
            ];
            self.session.log.record(|| trace::line("open_disk", &fields));
        }
    }

    /// The disk that was asked for cannot be had.
    pub(super) fn expect_no_disk(&mut self) {
        self.awaits_disk = false;
    }

    /// The disk, if there is one.
    pub(super) fn medium(&self) -> Option<&Medium> {
        self.attached()?.tiers.disk.as_ref().map(|disk| &disk.medium)
    }

    /// One round of writing everything dirty to disk before the engine stops. Returns whether
    /// nothing is left to do.
    pub fn flush(&mut self) -> bool {
        match &mut self.state {
            // What belongs to this process alone is worth nothing when it ends.
            State::Attached(attached) if !self.private => attached.flush(&mut self.session),
            _ => true,
        }
    }

    /// Lets go of the slots: every lookup is a miss again. Running loads are forgotten with their
    /// engine.
    pub fn close(&mut self) {
        if let State::Attached(attached) = std::mem::replace(&mut self.state, State::Detached)
            && let Some(disk) = attached.tiers.disk
        {
            disk.close();
        }
        self.session.plan = StepPlan::default();
    }

    /// A request arrived.
    pub fn add_request(&mut self, id: &str, arrival: Arrival<'_>) {
        let owner = self.tenants.owner(arrival.controls.tenant.as_deref(), arrival.salt);
        self.session.requests.add(id, owner, arrival);
    }

    /// What a request was told to forget, once all of it is erased.
    pub fn forgotten(&self, id: &str) -> Option<ForgetReport> {
        match self.session.requests.get(id)?.forgetting? {
            Forgetting::Over(report) => Some(report),
            Forgetting::Erasing(..) => None,
        }
    }

    /// A request that forgets its own salt loads nothing, and is kept waiting until all is erased.
    fn forget_first(&mut self, id: &str, salt: SaltTag) -> Hit {
        // There may be tiers soon, whose blocks have to go, too.
        let State::Attached(attached) = &mut self.state else { return Hit::AskAgain };
        if self.awaits_disk {
            return Hit::AskAgain;
        }
        let begun = self.session.requests.get(id).and_then(|request| request.forgetting);
        let forgetting = match begun {
            Some(forgetting) => attached.advance_forgetting(forgetting),
            None => attached.forget(&mut self.session, salt),
        };
        if let Some(request) = self.session.requests.get_mut(id) {
            request.forgetting = Some(forgetting);
        }
        if matches!(forgetting, Forgetting::Over(_)) { Hit::Tokens(0) } else { Hit::AskAgain }
    }

    /// Appends block hashes of a request; those of one that was left out are not needed.
    pub fn add_hashes(&mut self, id: &str, hashes: &[BlockHash]) {
        if let Some(request) = self.session.requests.get_mut(id) {
            request.add_hashes(hashes);
        }
    }

    /// Finishes what the ranks have answered. Called at every hook; costs one load for each rank's
    /// bits of the oldest batch when nothing happened.
    pub fn poll(&mut self) {
        if let State::Attached(attached) = &mut self.state {
            attached.poll(&mut self.session);
        }
        self.session.log.end_if_failed();
    }

    /// Takes in what the mover found out. Returns the slots whose followers are to be woken.
    pub(super) fn on_reports(&mut self, reports: Vec<Report>) -> Vec<SlotIndex> {
        match &mut self.state {
            State::Attached(attached) => attached.on_reports(&mut self.session, reports),
            // The engine was closed: the mover notices next.
            State::Detached => Vec::new(),
        }
    }

    /// What has to be done now and then, also when nothing ended. Returns the slots whose followers
    /// are to be woken.
    pub(super) fn tick(&mut self, now: Instant) -> Vec<SlotIndex> {
        match &mut self.state {
            State::Attached(attached) => attached.tick(&mut self.session, now),
            // As in `on_reports`.
            State::Detached => Vec::new(),
        }
    }

    /// How many tokens beyond `local` the tier can load for a request of `tokens` tokens. Changes
    /// nothing that another lookup can see.
    pub fn lookup(&mut self, id: &str, tokens: u32, local: u32) -> Hit {
        self.poll();
        // A request that is not known was left out.
        let Some(request) = self.session.requests.get_mut(id) else { return Hit::Tokens(0) };
        request.local = local;
        request.counted = false;
        // vLLM looks up only what it has not computed: whatever a reset tainted is computed anew.
        request.tainted = false;
        if request.controls.forget && request.salt != SaltTag::NONE {
            let salt = request.salt;
            return self.forget_first(id, salt);
        }
        match &mut self.state {
            State::Attached(attached) => attached.lookup(&mut self.session, id, tokens, local),
            State::Detached => Hit::Tokens(0),
        }
    }

    /// Offers complete blocks. Those the tier holds are touched; the others get slots, as far as
    /// there are any, and copy orders.
    pub fn offer(&mut self, offer: &Offer<'_>, start: Start) {
        if let State::Attached(attached) = &mut self.state {
            attached.offer(&mut self.session, offer, start);
        }
    }

    /// vLLM admitted the request, with `external` tokens to come from us after the local ones of
    /// its lookup. `blocks`: per group, vLLM's block ids from that of the first such token on.
    /// Holds the blocks and orders the copies; what cannot be found any more makes the load fail,
    /// never a wrong byte.
    pub fn admit(&mut self, id: &str, external: u32, blocks: &[Vec<u32>]) {
        self.poll();
        match &mut self.state {
            State::Attached(attached) => {
                attached.admit(&mut self.session, Admission { id, external, destinations: blocks });
            }
            // vLLM waits for tokens that were found before the engine was closed.
            State::Detached if external > 0 => self.session.plan.loads.push(load::doomed(id)),
            State::Detached => {}
        }
    }

    /// Every rank reported the end of a load. Ids of loads that are not ours are ignored.
    pub fn load_ended(&mut self, id: &str, failed: bool) {
        if let State::Attached(attached) = &mut self.state {
            attached.load_ended(&mut self.session, id, failed);
        }
    }

    /// vLLM finished a request of `prompt` and altogether `total` tokens. Its last blocks should
    /// have been offered before.
    pub fn finish(&mut self, id: &str, prompt: u32, total: u32) {
        // A request that is not known was left out.
        let Some(request) = self.session.requests.get_mut(id) else { return };
        let finished = Finished { prompt, total };
        request.finished = Some(finished);
        if let (Some(recorder), Some(request)) = (&self.session.recorder, self.session.requests.get(id)) {
            recorder.record(request, finished, self.session.requests.grouping().hash_tokens);
        }
        match &mut self.state {
            State::Attached(attached) => attached.finish(&mut self.session, id),
            State::Detached => drop(self.session.requests.take_finished(id)),
        }
    }

    /// The orders of this step, as bytes for the workers.
    pub fn take_plan(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.session.plan).encode()
    }

    /// vLLM gives these blocks to somebody in this step: whoever still reads them is waited for.
    pub fn reallocate(&mut self, blocks: impl Iterator<Item = u32>) {
        if let State::Attached(attached) = &self.state {
            attached.wait_for(&mut self.session, blocks, 0);
        }
    }

    /// As [`Self::reallocate`], where vLLM's model runner writes blocks before it lets the workers
    /// wait: offloads that still read one of them are given up.
    pub fn overwrite(&mut self, blocks: impl Iterator<Item = u32>) {
        if let State::Attached(attached) = &mut self.state {
            attached.overwrite(blocks);
        }
    }

    /// vLLM gives these blocks to another connector. Its writes are not on vLLM's compute stream,
    /// so that workers wait for the copies themselves before it is told of the step.
    pub fn hand_to_others(&mut self, blocks: impl Iterator<Item = u32>) {
        if let State::Attached(attached) = &self.state {
            attached.wait_for(&mut self.session, blocks, ANSWERED);
        }
    }

    /// Tells subscribers that nothing is to be had from our tiers any more. What lies in them stays
    /// for the next start.
    pub fn withdraw(&mut self) {
        if let State::Attached(attached) = &mut self.state {
            attached.withdraw();
        }
    }

    /// Whether vLLM should keep stepping although no request runs: orders wait to be sent, copies
    /// to be noticed or events to be published. Without any progress for
    /// [`limits::PENDING_WORK_STALL_MS`] the answer is no until something moves.
    pub fn pending_work(&mut self) -> bool {
        self.poll();
        let (pending, progress) = self.attached().map_or((false, Progress::default()), |attached| {
            (attached.has_pending_work(self.events_enabled), attached.progress())
        });
        let pending = pending || !self.session.plan.is_empty();
        if !pending || progress != self.last_progress.0 {
            self.last_progress = (progress, Instant::now());
        }
        pending && self.last_progress.1.elapsed() < Duration::from_millis(limits::PENDING_WORK_STALL_MS)
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
        self.session.requests.taint_all();
        // Without tiers nothing is stored.
        let State::Attached(attached) = &mut self.state else { return ResetReport::default() };
        let report = droppable(&attached.tiers);
        let generation = attached.reset();
        self.session.log.record(|| trace::line("reset", &[("generation", generation.into())]));
        report
    }

    /// Nothing is under way and nothing waits: until the next request or offer, a step has nothing
    /// to ask of the engine.
    pub fn is_quiet(&self) -> bool {
        self.session.plan.is_empty() && self.attached().is_none_or(Attached::is_quiet)
    }

    /// Events for this step, neighbours joined.
    pub fn take_events(&mut self) -> Vec<Run> {
        self.poll();
        match &mut self.state {
            State::Attached(attached) => attached.take_events(),
            State::Detached => Vec::new(),
        }
    }

    /// Blocks that may be evicted, the next one first, with the serial of the request that used
    /// each last. For inspection.
    pub fn eviction_order(&self) -> Vec<(BlockKey, u32)> {
        self.attached().map(|attached| attached.tiers.dram.eviction_order()).unwrap_or_default()
    }

    /// Everything that only grows.
    pub fn counters(&self) -> Counters {
        let counters = self.attached().map(Attached::counters).unwrap_or_default();
        let Savings { dram_us: saved_us, nvme_us: nvme_saved_us, .. } = self.session.savings;
        Counters { invariant_violations: invariant::violations(), saved_us, nvme_saved_us, ..counters }
    }

    /// The engine's state now.
    pub fn gauges(&self) -> Gauges {
        self.attached().map(Attached::gauges).unwrap_or_default()
    }

    /// Every block that a request could have from a tier of ours now.
    pub fn held(&self) -> Vec<(Tier, BlockKey)> {
        self.attached().map_or_else(Vec::new, |attached| attached.tiers.blocks().collect())
    }

    /// Nothing is being read, written or made on disk.
    pub fn disk_is_idle(&self) -> bool {
        self.attached().and_then(|attached| attached.tiers.disk.as_ref()).is_none_or(DiskTier::is_idle)
    }

    /// A step computed this many tokens in so many seconds.
    pub fn prefilled(&mut self, tokens: u64, seconds: f64) {
        self.session.savings.prefilled(tokens, seconds);
        if let State::Attached(attached) = &mut self.state
            && let Some(disk) = &mut attached.tiers.disk
        {
            disk.medium.rates.prefilled(tokens, seconds);
        }
    }

    /// Tokens of a request's last admission that come from disk.
    pub fn disk_tokens(&self, id: &str) -> u32 {
        self.session.requests.get(id).map_or(0, |request| request.disk_tokens)
    }

    /// How long a lookup took.
    pub fn sample_lookup(&mut self, seconds: f64) {
        self.collector.sample_lookup(seconds);
    }

    /// What changed since the last call; `None` when nothing did.
    pub fn take_stats(&mut self) -> Option<StatsDelta> {
        let (counters, gauges) = (self.counters(), self.gauges());
        let tiers = match &self.state {
            State::Attached(attached) => Some(&attached.tiers),
            State::Detached => None,
        };
        let blocks = |owner| tiers.map_or([("dram", 0), ("nvme", 0)], |tiers| tiers.blocks_of(owner));
        let tenants = self.tenants.names().map(|(owner, name)| (owner, name, blocks(owner)));
        self.collector.collect(&counters, &gauges, tenants)
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

/// What a reset drops now.
fn droppable(tiers: &Tiers) -> ResetReport {
    let slots = tiers.dram.visible_slots().len() as u64;
    let slot_bytes = tiers.pool.as_ref().map_or(0, |pool| pool.geometry().slot_bytes);
    let medium = tiers.disk.as_ref().map(|disk| &disk.medium);
    let (extents, extent_bytes) = medium.map_or((0, 0), |medium| (medium.extents.committed(), medium.extent_bytes()));
    ResetReport {
        blocks_dropped_dram: slots,
        blocks_dropped_nvme: extents,
        bytes: slots * slot_bytes + extents * extent_bytes,
        kept: false,
    }
}
