//! The copy worker: executes every step's plan for one rank.
//!
//! Lives in the worker process (or in `EngineCore`'s, when they are one). It is `Detached` until
//! the first ticket comes, then `Attached`, and `Released` after it let go. Whatever happens, a
//! load that was ordered is reported exactly once, as finished or failed, because vLLM keeps its
//! blocks until then.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::follower::{FollowerLedger, LoadFollower};
use super::hasher::{BusyProbe, HashGuard, IdleHasher};
use super::{After, Answers, ComputeStream, Copier, CopyError, Direction, Order};
use crate::pool::{Pool, Ticket};
use crate::violated;
use kvcellar_block::error::Result;
use kvcellar_block::plan::{ANSWERED, BlockCopy, FOLLOW, Load, StepPlan};
use kvcellar_block::{GroupIndex, SlotIndex};

/// Work done since the last look, for the metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CopyStats {
    /// Bytes copied from the KV cache to slots.
    pub offload_bytes: u64,
    /// Bytes copied from slots to the KV cache.
    pub load_bytes: u64,
    /// Seconds during which at least one offload was under way.
    pub offload_seconds: f64,
    /// Seconds during which at least one load was under way.
    pub load_seconds: f64,
    /// Blocks whose loaded bytes were compared (debug mode).
    pub verified_blocks: u64,
    /// Blocks whose bytes did not match their checksum.
    pub mismatched_blocks: u64,
    /// Loads with blocks from disk.
    pub followed_loads: u64,
    /// Those whose first block was handed to the copier before their last one had been read.
    pub overlapped_loads: u64,
}

/// Loads that ended since the last look, by request id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadResults {
    /// All that ended, failed ones too.
    pub finished: Vec<String>,
    /// Those that failed.
    pub failed: Vec<String>,
}

#[derive(Debug)]
struct RunningLoad {
    request: String,
    remaining: usize,
    failed: bool,
}

/// Time during which one direction was busy: from the first order in flight to the last answer.
#[derive(Debug, Default)]
struct BusyClock {
    in_flight: usize,
    since: Option<Instant>,
    total: Duration,
}

impl BusyClock {
    fn add(&mut self, orders: usize) {
        if orders > 0 && self.in_flight == 0 {
            self.since = Some(Instant::now());
        }
        self.in_flight += orders;
    }

    fn done(&mut self) {
        self.in_flight -= 1;
        if self.in_flight == 0
            && let Some(since) = self.since.take()
        {
            self.total += since.elapsed();
        }
    }

    fn take(&mut self) -> f64 {
        std::mem::take(&mut self.total).as_secs_f64()
    }
}

#[derive(Default)]
struct StepProgress {
    loads: HashMap<u64, RunningLoad>,
    results: LoadResults,
    stats: CopyStats,
    offloading: BusyClock,
    loading: BusyClock,
    hasher: Option<IdleHasher>,
}

/// What the copier's threads share with the worker.
struct CopyState {
    pool: Arc<Pool>,
    rank: usize,
    verify_loads: bool,
    progress: Mutex<StepProgress>,
    answered: Condvar,
}

impl std::fmt::Debug for CopyState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board").field("rank", &self.rank).finish_non_exhaustive()
    }
}

impl CopyState {
    fn lock(&self) -> MutexGuard<'_, StepProgress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn block_bytes(&self, group: u16) -> u64 {
        self.pool.geometry().parts[self.rank].spans.get(group as usize).map_or(0, |(_, len)| *len)
    }

    fn offload_answered(&self, order: &Order, outcome: std::result::Result<(), CopyError>) {
        // A stale order's slot belongs to somebody else: its bits are not ours to set. An order
        // that passes some end was refused before its slot was looked at; without an answer the
        // slot would stay filling for good.
        let ours = match outcome {
            Err(CopyError::Stale) => false,
            Err(CopyError::OutOfRange) => {
                order.copy.slot < self.pool.slot_count()
                    && self.pool.line(SlotIndex(order.copy.slot)).may_write(order.copy.generation)
            }
            _ => true,
        };
        if ours {
            self.pool.line(SlotIndex(order.copy.slot)).answer(self.rank, outcome.is_ok());
        }
        let mut progress = self.lock();
        progress.offloading.done();
        if outcome.is_ok() {
            progress.stats.offload_bytes += self.block_bytes(order.copy.group);
            // Some copiers sum what they copy.
            let copy = &order.copy;
            let summed = self.pool.checksum(SlotIndex(copy.slot), self.rank, copy.generation).is_some();
            if let Some(hasher) = progress.hasher.as_ref().filter(|_| !summed) {
                hasher.push(order.copy);
            }
        }
    }

    fn load_answered(&self, order: &Order, outcome: std::result::Result<(), CopyError>) {
        if outcome.is_err() && order.copy.slot < self.pool.slot_count() {
            self.pool.line(SlotIndex(order.copy.slot)).refuse_load(self.rank);
        }
        if order.copy.flags & FOLLOW != 0 && order.copy.slot < self.pool.slot_count() {
            // The slot may be the window's, and be waited for.
            self.pool.line(SlotIndex(order.copy.slot)).release_restored(self.rank);
            self.pool.header().ring();
        }
        let mut progress = self.lock();
        progress.loading.done();
        match outcome {
            Ok(()) => {
                progress.stats.load_bytes += self.block_bytes(order.copy.group);
                progress.stats.verified_blocks += u64::from(self.verify_loads);
            }
            Err(CopyError::Mismatch) => progress.stats.mismatched_blocks += 1,
            Err(_) => {}
        }
        let Some(load) = progress.loads.get_mut(&order.ticket) else {
            violated!("{:?} of a load was answered after the load had ended", order.copy);
            return;
        };
        load.failed |= outcome.is_err();
        load.remaining -= 1;
        if load.remaining == 0
            && let Some(load) = progress.loads.remove(&order.ticket)
        {
            report(&mut progress.results, load.request, load.failed);
        }
    }
}

fn report(results: &mut LoadResults, request: String, failed: bool) {
    if failed {
        results.failed.push(request.clone());
    }
    results.finished.push(request);
}

impl Answers for CopyState {
    fn answer(&self, order: &Order, outcome: std::result::Result<(), CopyError>) {
        match order.direction {
            Direction::Offload => self.offload_answered(order, outcome),
            Direction::Load => self.load_answered(order, outcome),
        }
        self.answered.notify_all();
    }
}

impl FollowerLedger for CopyState {
    fn followed(&self, overlapped: bool) {
        let mut progress = self.lock();
        progress.stats.followed_loads += 1;
        progress.stats.overlapped_loads += u64::from(overlapped);
    }
}

#[derive(Debug)]
struct CopyQueue(std::sync::Weak<CopyState>);

impl BusyProbe for CopyQueue {
    fn busy(&self) -> bool {
        self.0.upgrade().is_some_and(|board| {
            let progress = board.lock();
            progress.offloading.in_flight + progress.loading.in_flight > 0
        })
    }
}

struct Attached {
    // The follower drops first, then the copier: it carries out what is in flight while the board
    // and the pool still stand.
    follower: LoadFollower,
    copier: Arc<dyn Copier>,
    board: Arc<CopyState>,
}

/// One rank's executor of step plans.
pub struct CopyWorker {
    rank: usize,
    verify_loads: bool,
    make_copier: Box<MakeCopierGuarded>,
    attached: Option<Attached>,
    released: bool,
    unattached_results: LoadResults,
    pending_after: Vec<BlockCopy>,
    pending_loads: Vec<Load>,
    next_ticket: AtomicU64,
    compute: Option<ComputeStream>,
}

/// Makes a rank's copier: the pool, where its answers go, and the guard it must respect before it
/// writes a slot.
pub type MakeCopierGuarded =
    dyn Fn(Arc<Pool>, Arc<dyn Answers>, Arc<HashGuard>) -> Result<Box<dyn Copier>> + Send + Sync;

impl CopyWorker {
    /// A worker for rank `rank` that will build its copier when it attaches.
    pub fn new(rank: usize, verify_loads: bool, make_copier: Box<MakeCopierGuarded>) -> Self {
        Self {
            rank,
            verify_loads,
            make_copier,
            attached: None,
            released: false,
            unattached_results: LoadResults::default(),
            pending_after: Vec::new(),
            pending_loads: Vec::new(),
            next_ticket: AtomicU64::new(1),
            compute: None,
        }
    }

    /// Names the stream on which vLLM computes, for the hooks that follow. None where vLLM computes
    /// in host memory.
    pub fn set_compute(&mut self, compute: Option<ComputeStream>) {
        self.compute = compute;
    }

    /// Maps the pool that `ticket` names and starts the copier. Does nothing when attached already,
    /// or let go.
    ///
    /// # Errors
    /// Those of [`Pool::attach`] and of the copier. The worker then stays detached and reports
    /// every load failed.
    pub fn attach(&mut self, ticket: &Ticket) -> Result<()> {
        if self.attached.is_some() || self.released {
            return Ok(());
        }
        let pool = Arc::new(Pool::attach(ticket)?);
        let guard = Arc::new(HashGuard::default());
        let board = Arc::new(CopyState {
            pool: Arc::clone(&pool),
            rank: self.rank,
            verify_loads: self.verify_loads,
            progress: Mutex::default(),
            answered: Condvar::new(),
        });
        let copier = (self.make_copier)(Arc::clone(&pool), Arc::clone(&board) as Arc<dyn Answers>, Arc::clone(&guard))?;
        let copier: Arc<dyn Copier> = Arc::from(copier);
        let follower = LoadFollower::start(
            Arc::clone(&pool),
            Arc::clone(&copier),
            Arc::clone(&board) as Arc<dyn Answers>,
            Arc::clone(&board) as Arc<dyn FollowerLedger>,
        )?;
        touch_in_background(&pool);
        if pool.geometry().parts[self.rank].writes_any() {
            let probe = Box::new(CopyQueue(Arc::downgrade(&board)));
            board.lock().hasher = Some(IdleHasher::start(pool, self.rank, guard, probe));
        }
        self.attached = Some(Attached { follower, copier, board });
        Ok(())
    }

    /// Before the step's forward pass: starts offloads of complete blocks, waits for fences, and
    /// remembers loads and later offloads.
    ///
    /// A copier with streams makes the compute stream wait. Else the wait is over when this rank
    /// has answered every fenced order: at most the time of the copies themselves.
    ///
    /// # Errors
    /// [`kvcellar_block::error::Error::DataLost`] when `plan` is no plan. Loads whose copies could
    /// not be started are reported failed instead.
    pub fn begin_step(&mut self, plan: &[u8]) -> Result<()> {
        let plan = StepPlan::decode(plan)?;
        self.pending_after = plan.stores_after;
        self.offload(&plan.stores_before);
        self.wait_for(&plan.waits);
        self.pending_loads.extend(plan.loads);
        Ok(())
    }

    /// Starts the loads of the step: when vLLM has prepared its blocks (zeroed them, where a model
    /// needs that), before the forward pass.
    pub fn start_loads(&mut self) {
        let loads = std::mem::take(&mut self.pending_loads);
        if loads.is_empty() {
            return;
        }
        // The destinations may be in use by the steps submitted so far, and vLLM's own preparation
        // of them is on the stream too.
        let after = match &self.attached {
            Some(attached) => attached.copier.mark(self.compute).ok(),
            None => Some(After::default()),
        };
        for load in loads {
            self.start_load(load, after.as_ref());
        }
    }

    /// What people should know of the copier, once.
    pub fn take_notes(&self) -> Vec<String> {
        self.attached.as_ref().map_or_else(Vec::new, |attached| attached.copier.take_notes())
    }

    /// Offloaded blocks that the idle hasher has not reached.
    pub fn unhashed(&self) -> usize {
        let Some(attached) = &self.attached else { return 0 };
        let progress = attached.board.lock();
        progress.offloading.in_flight + progress.hasher.as_ref().map_or(0, IdleHasher::waiting)
    }

    /// After the step's forward pass: starts the offloads of what it computed.
    pub fn finish_step(&mut self) {
        let copies = std::mem::take(&mut self.pending_after);
        self.offload(&copies);
    }

    /// Loads that ended since the last call.
    pub fn take_results(&mut self) -> LoadResults {
        let mut results = std::mem::take(&mut self.unattached_results);
        if let Some(attached) = &self.attached {
            let mut progress = attached.board.lock();
            results.finished.append(&mut progress.results.finished);
            results.failed.append(&mut progress.results.failed);
        }
        results
    }

    /// Work done since the last call.
    pub fn take_stats(&mut self) -> CopyStats {
        let Some(attached) = &self.attached else { return CopyStats::default() };
        let mut progress = attached.board.lock();
        let mut stats = std::mem::take(&mut progress.stats);
        stats.offload_seconds = progress.offloading.take();
        stats.load_seconds = progress.loading.take();
        stats
    }

    /// Orders submitted and not answered.
    pub fn in_flight(&self) -> usize {
        self.attached.as_ref().map_or(0, |attached| attached.copier.in_flight())
    }

    /// Whether the pool is mapped.
    pub fn is_attached(&self) -> bool {
        self.attached.is_some()
    }

    /// Carries out what is in flight, then unmaps the pool and lets go of its locks. Later loads
    /// are reported failed.
    pub fn release(&mut self) {
        self.released = true;
        let results = self.take_results();
        self.unattached_results = results;
        if let Some(Attached { follower, copier, board }) = self.attached.take() {
            drop(follower);
            drop(copier);
            // The hasher holds the pool too; it ends here.
            let hasher = board.lock().hasher.take();
            drop(hasher);
            let mut progress = board.lock();
            self.unattached_results.finished.append(&mut progress.results.finished);
            self.unattached_results.failed.append(&mut progress.results.failed);
        }
    }

    /// Of a step's copies, those that this rank has a part in.
    fn written_here(&self, copies: &[BlockCopy]) -> Option<(&Attached, Vec<BlockCopy>)> {
        let attached = self.attached.as_ref()?;
        let part = &attached.board.pool.geometry().parts[self.rank];
        let ours: Vec<BlockCopy> = copies.iter().filter(|copy| part.writes(GroupIndex(copy.group))).copied().collect();
        (!ours.is_empty()).then_some((attached, ours))
    }

    fn offload(&self, copies: &[BlockCopy]) {
        let Some((attached, copies)) = self.written_here(copies) else { return };
        let orders: Vec<Order> =
            copies.into_iter().map(|copy| Order { copy, direction: Direction::Offload, ticket: 0 }).collect();
        attached.board.lock().offloading.add(orders.len());
        // The sources were computed by steps that the stream was given before this hook.
        if attached.copier.mark(self.compute).and_then(|after| attached.copier.submit(&orders, &after)).is_err() {
            for order in &orders {
                attached.board.answer(order, Err(CopyError::Device));
            }
        }
    }

    fn wait_for(&self, waits: &[BlockCopy]) {
        let Some((attached, waits)) = self.written_here(waits) else { return };
        let board = &attached.board;
        let open = |wait: &BlockCopy| {
            wait.slot < board.pool.slot_count()
                && !board.pool.line(SlotIndex(wait.slot)).answered(self.rank, wait.generation)
        };
        let (mut fenced, by_stream): (Vec<BlockCopy>, Vec<BlockCopy>) =
            waits.into_iter().filter(open).partition(|wait| wait.flags & ANSWERED != 0);
        if !by_stream.is_empty() && !attached.copier.fence(self.compute, &by_stream) {
            fenced.extend(by_stream);
        }
        if fenced.is_empty() {
            return;
        }
        let mut progress = board.lock();
        // Nothing in flight means that every order was answered, also orders that were refused as
        // stale.
        while progress.offloading.in_flight > 0 && fenced.iter().any(open) {
            progress = board.answered.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Without a place to come after it fails.
    fn start_load(&mut self, load: Load, after: Option<&After>) {
        let Some(attached) = self.attached.as_ref().filter(|_| !load.doomed) else {
            report(&mut self.unattached_results, load.request, true);
            return;
        };
        if load.copies.is_empty() {
            report(&mut self.unattached_results, load.request, false);
            return;
        }
        let ticket = self.next_ticket.fetch_add(1, Ordering::Relaxed);
        let orders: Vec<Order> =
            load.copies.iter().map(|copy| Order { copy: *copy, direction: Direction::Load, ticket }).collect();
        {
            let mut progress = attached.board.lock();
            progress.loading.add(orders.len());
            progress
                .loads
                .insert(ticket, RunningLoad { request: load.request, remaining: orders.len(), failed: false });
        }
        let (followed, here): (Vec<Order>, Vec<Order>) =
            orders.into_iter().partition(|order| order.copy.flags & FOLLOW != 0);
        let mut refused = Vec::new();
        if !here.is_empty() && after.is_none_or(|after| attached.copier.submit(&here, after).is_err()) {
            refused = here;
        }
        if !followed.is_empty() {
            let rest = match after {
                Some(after) => attached.follower.follow(followed, after.clone()),
                None => Err(followed),
            };
            refused.extend(rest.err().unwrap_or_default());
        }
        for order in &refused {
            attached.board.answer(order, Err(CopyError::Device));
        }
    }
}

/// Maps the pool's pages, which exist already, into this process, so that the first copies do not
/// fault on each. Losing that is only slower.
fn touch_in_background(pool: &Arc<Pool>) {
    let pool = Arc::clone(pool);
    let touch = move || pool.touch();
    drop(std::thread::Builder::new().name("kvcellar-touch".to_owned()).spawn(touch));
}

impl Drop for CopyWorker {
    fn drop(&mut self) {
        self.release();
    }
}
