//! The disk itself: store, device, what lies in which extent, and whether the device is well.
//!
//! Everything here happens under the engine's lock and takes no time: bytes are hashed, compared,
//! read and written by the mover and the disk, which are given their work as [`Job`]s.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam_channel::Sender;

use super::extents::Extents;
use super::health::Health;
use super::jobs::Job;
use super::residency::Residency;
use super::trace::{self, OperationLog};
use crate::config::TenantList;
use crate::config::nvme::WriteRate;
use crate::nvme::disk::{Description, Disk};
use crate::nvme::space::SegmentLayout;
use crate::nvme::store::Store;
use crate::policy::load::Rates;
use crate::policy::{Admission, LoadPolicy, PolicyName, WriteBudget};
use crate::pool::Pool;
use crate::{invariant, limits};

/// What the user decided about the nvme tier.
#[derive(Debug, Clone, PartialEq)]
pub struct DiskSettings {
    /// Write every block at once, not only the coldest.
    pub write_through: bool,
    /// Share of the slots, in percent, that are kept free or clean.
    pub clean_percent: u64,
    /// See [`LoadPolicy`].
    pub load_policy: LoadPolicy,
    /// See [`Admission`].
    pub admission: Admission,
    /// Seconds after which a block is erased from disk.
    pub retention_s: Option<u64>,
    /// Bytes that may be written in a time; `None`: no bound.
    pub write_budget: Option<WriteRate>,
    /// Chooses which blocks stay when the store is full.
    pub policy: PolicyName,
    /// Who shares it.
    pub tenants: TenantList,
}

/// The disk of one engine, as cleaner and restores use it.
pub(super) struct Medium {
    /// What is where.
    pub(super) extents: Extents,
    /// The device's health.
    pub(super) health: Health,
    /// How fast restore and prefill are.
    pub(super) rates: Rates,
    /// What the user decided.
    pub(super) settings: DiskSettings,
    /// The generation of contents.
    pub(super) cache_generation: u64,
    store: Arc<Mutex<Store>>,
    store_id: u64,
    layout: SegmentLayout,
    device: Arc<dyn Disk>,
    description: Description,
    pool: Arc<Pool>,
    jobs: Sender<Job>,
    last_token: u64,
    opened: Instant,
    budget: Option<WriteBudget>,
}

impl Medium {
    /// A store that is open, of which nothing is taken over yet.
    pub(super) fn new(
        store: Store,
        device: Arc<dyn Disk>,
        pool: Arc<Pool>,
        jobs: Sender<Job>,
        settings: DiskSettings,
    ) -> Self {
        let max = store.extents_max();
        let mut extents = Extents::new(max, settings.policy, &settings.tenants.quotas(max));
        extents.make_ready(store.extents_ready());
        let extent_bytes = store.layout().extent_bytes;
        // One that is too small for a single block was refused at the opening.
        let budget = settings.write_budget.and_then(|rate| WriteBudget::new(rate, extent_bytes, 0.0));
        Self {
            extents,
            health: Health::default(),
            rates: Rates::default(),
            settings,
            cache_generation: store.cache_generation(),
            store_id: store.id(),
            layout: store.layout(),
            store: Arc::new(Mutex::new(store)),
            description: device.describe(),
            device,
            pool,
            jobs,
            last_token: 0,
            opened: Instant::now(),
            budget,
        }
    }

    /// The store; the mover grows it without the engine's lock.
    pub(super) fn store(&self) -> &Arc<Mutex<Store>> {
        &self.store
    }

    /// The store, locked.
    pub(super) fn lock_store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store's id, for seals.
    pub(super) fn store_id(&self) -> u64 {
        self.store_id
    }

    /// Where extents lie.
    pub(super) fn layout(&self) -> SegmentLayout {
        self.layout
    }

    /// Bytes of an extent.
    pub(super) fn extent_bytes(&self) -> u64 {
        self.layout.extent_bytes
    }

    /// The device.
    pub(super) fn device(&self) -> &Arc<dyn Disk> {
        &self.device
    }

    /// How the device is used.
    pub(super) fn description(&self) -> &Description {
        &self.description
    }

    /// The slots that are read into and written from.
    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Blocks that one transfer may cover.
    pub(super) fn transfer_blocks_max(&self) -> usize {
        (limits::TRANSFER_BYTES_MAX / self.extent_bytes()).max(1) as usize
    }

    /// Blocks that may be written at once.
    pub(super) fn writes_max(&self) -> u64 {
        (limits::SPILL_BYTES_IN_FLIGHT_MAX / self.extent_bytes()).max(limits::SPILLS_IN_FLIGHT_MIN)
    }

    fn since_open_s(&self) -> f64 {
        self.opened.elapsed().as_secs_f64()
    }

    /// The write budget has enough left for a block, or there is none.
    pub(super) fn may_write(&self) -> bool {
        self.budget.as_ref().is_none_or(|budget| budget.bytes_left(self.since_open_s()) >= self.extent_bytes())
    }

    /// So little of the write budget is left that it is kept for what pays.
    pub(super) fn is_budget_short(&self) -> bool {
        self.budget.as_ref().is_some_and(|budget| budget.is_short(self.since_open_s()))
    }

    /// Takes a block's bytes from the write budget, which `may_write` has found enough.
    pub(super) fn spend(&mut self) {
        let (now_s, bytes) = (self.since_open_s(), self.extent_bytes());
        let taken = self.budget.as_mut().is_none_or(|budget| budget.take(now_s, bytes));
        invariant!(taken, "more is written than the write budget has left");
    }

    /// Bytes that the write budget has left at this moment; 0 without one.
    pub(super) fn budget_left(&self) -> u64 {
        self.budget.as_ref().map_or(0, |budget| budget.bytes_left(self.since_open_s()))
    }

    /// A name for a transfer that no other one has.
    pub(super) fn next_token(&mut self) -> u64 {
        self.last_token += 1;
        self.last_token
    }

    /// Hands work to the mover, and wakes it.
    pub(super) fn order(&self, job: Job) {
        // The channel closes only when the mover has ended, with the engine.
        let _mover_gone = self.jobs.send(job);
        self.pool.header().ring();
    }

    /// The store grows no more: tenants share what it has become, which may be less than was
    /// wanted.
    pub(super) fn share_what_there_is(&mut self) {
        let quotas = self.settings.tenants.quotas(self.extents.ready());
        self.extents.set_quotas(&quotas);
    }

    /// The store has grown to this many extents.
    pub(super) fn on_grown(&mut self, ready: u32) {
        self.extents.make_ready(ready);
        self.description = self.device.describe();
    }

    /// A transfer failed. The device goes out of service when it is one too many in a row.
    pub(super) fn on_device_error(&mut self, dram: &mut Residency, log: &mut OperationLog, what: &str) {
        dram.counters.disk_errors += 1;
        if self.health.failed(Instant::now()) {
            self.leave_service(dram, log, what, "the disk is tried again");
        }
    }

    /// The disk is out of service: its blocks are not to be had, and everybody is told. `then`:
    /// what will become of the disk.
    pub(super) fn leave_service(&mut self, dram: &mut Residency, log: &mut OperationLog, why: &str, then: &str) {
        self.extents.withdraw(&mut dram.events);
        dram.counters.nvme_outages += 1;
        log::warn!("the nvme tier is out of service: {why}. The dram tier goes on; {then}");
        log.record(|| trace::line("outage", &[]));
    }
}
