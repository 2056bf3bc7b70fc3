//! The mover: one thread that does for the nvme tier whatever takes time, without the engine's
//! lock.
//!
//! It computes and compares checksums, hands transfers to the disk, and tells the engine how they
//! ended. It sleeps on the *bell* in the pool's header, which the engine, the disk and the copy
//! workers of other processes ring. It never waits for a transfer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use hashbrown::HashMap;

use super::engine::TierEngine;
use super::jobs::{Job, Report};
use super::staging_queue::{StagedWork, StagingQueue, Waiting};
use super::transfer::{DescriptorRead, SealOrder, Trouble};
use crate::limits;
use crate::nvme::buffer::Buffer;
use crate::nvme::disk::{Completion, Completions, Disk, Kind, Operation};
use crate::nvme::extent::{self, Expected};
use crate::nvme::space::SegmentLayout;
use crate::nvme::staging::HugeStaging;
use crate::nvme::store::Store;
use crate::pool::{Pool, futex};
use crate::violated;
use kvcellar_block::descriptor::{self, Lineage};
use kvcellar_block::{BlockKey, ExtentIndex, Generation, SlotIndex};

/// How often the mover looks whether the store's directory is still there.
const PLACE_CHECK: Duration = Duration::from_secs(2);

/// Hands the disk's completions to the mover.
pub struct ToMover {
    jobs: Sender<Job>,
    pool: Arc<Pool>,
}

impl ToMover {
    /// Completions go to whoever receives `jobs`, woken by the pool's bell.
    pub fn new(jobs: Sender<Job>, pool: Arc<Pool>) -> Self {
        Self { jobs, pool }
    }
}

impl Completions for ToMover {
    fn complete(&self, completions: Vec<Completion>) {
        for completion in completions {
            // The mover ends after the disk; without it nobody wants to know.
            let _mover_gone = self.jobs.send(Job::Done(completion));
        }
        self.pool.header().ring();
    }
}

/// What a token of the disk stands for.
enum Under {
    Read { expected: Vec<(BlockKey, Generation)>, slot: SlotIndex, cache_generation: u64 },
    Write,
    Describe(ExtentIndex),
}

struct Desk {
    engine: Weak<Mutex<TierEngine>>,
    jobs: Receiver<Job>,
    pool: Arc<Pool>,
    disk: Arc<dyn Disk>,
    store: Arc<Mutex<Store>>,
    store_id: u64,
    layout: SegmentLayout,
    /// What transfers pass through, if they do not go between disk and slots directly.
    staging: Option<StagingQueue>,
    under: HashMap<u64, Under>,
    /// Descriptor reads of one `Describe` that have not ended, with what was found.
    described: HashMap<u64, Described>,
    next_group: u64,
    checked: Instant,
}

struct Described {
    waiting: usize,
    found: Vec<(ExtentIndex, DescriptorRead)>,
    trial: bool,
}

/// Tokens of descriptor reads have this bit: the engine's own never do.
const DESCRIBE: u64 = 1 << 63;
/// Their low bits count within a group.
const GROUP_SHIFT: u32 = 16;

const _: () = assert!(limits::ANNOUNCE_BATCH < 1 << GROUP_SHIFT);

/// The running mover of an engine.
#[derive(Debug)]
pub struct Mover {
    stop: Arc<AtomicBool>,
    pool: Arc<Pool>,
    thread: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whoever panicked with it reported that; each operation re-establishes its own invariants.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mover {
    /// Starts the mover of an engine whose nvme tier is open. With `staging` transfers pass through
    /// it. `None`: there is no tier, or the system refused a thread.
    pub fn start(engine: &Arc<Mutex<TierEngine>>, jobs: Receiver<Job>, staging: Option<HugeStaging>) -> Option<Self> {
        let desk = {
            let locked = lock(engine);
            let medium = locked.medium()?;
            Desk {
                engine: Arc::downgrade(engine),
                jobs,
                pool: Arc::clone(medium.pool()),
                disk: Arc::clone(medium.device()),
                store: Arc::clone(medium.store()),
                store_id: medium.store_id(),
                layout: medium.layout(),
                staging: staging.map(StagingQueue::new),
                under: HashMap::new(),
                described: HashMap::new(),
                next_group: 0,
                checked: Instant::now(),
            }
        };
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, pool) = (Arc::clone(&stop), Arc::clone(&desk.pool));
        let thread = thread::Builder::new().name("kvcellar-mover".to_owned()).spawn(move || desk.run(&stopped)).ok()?;
        Some(Self { stop, pool, thread: Some(thread) })
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.pool.header().ring();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // A mover that panicked has nothing more to move.
            drop(thread.join());
        }
    }
}

impl Desk {
    fn run(mut self, stop: &AtomicBool) {
        loop {
            let heard = self.pool.header().bell().load(Ordering::Acquire);
            let jobs: Vec<Job> = self.jobs.try_iter().collect();
            let idle = jobs.is_empty();
            let mut reports = self.carry_out(jobs);
            reports.extend(self.check_place());
            // Dropped without having been closed: nobody wants to know.
            let Some(engine) = self.engine.upgrade() else { return };
            let (wake, busy) = {
                let mut engine = lock(&engine);
                if engine.medium().is_none() {
                    // The engine was closed, and its store with it.
                    return;
                }
                let mut wake = engine.on_reports(reports);
                wake.extend(engine.tick(Instant::now()));
                (wake, !engine.disk_is_idle())
            };
            drop(engine);
            for slot in wake {
                futex::wake(self.pool.line(slot).restored_word());
            }
            if stop.load(Ordering::Acquire) {
                return;
            }
            if idle {
                let patience = if busy { limits::MOVER_TICK_MS.0 } else { limits::MOVER_TICK_MS.1 };
                futex::wait(self.pool.header().bell(), heard, Duration::from_millis(patience));
            }
        }
    }

    fn carry_out(&mut self, jobs: Vec<Job>) -> Vec<Report> {
        let (mut reports, mut operations) = (Vec::new(), Vec::new());
        for job in jobs {
            match job {
                Job::Read { token, slot, extent, count, expected, cache_generation } => {
                    self.under.insert(token, Under::Read { expected, slot, cache_generation });
                    if let Some(staging) = &mut self.staging {
                        staging.push(Waiting { token, extent, work: StagedWork::Read(count as usize) });
                        continue;
                    }
                    let buffer = Buffer::slots(&self.pool, slot, count);
                    operations.push(self.operation(token, Kind::Read, extent, buffer));
                }
                Job::Write { token, orders, extent } => {
                    if let Some(staging) = &mut self.staging {
                        staging.push(Waiting { token, extent, work: StagedWork::Write(orders) });
                        continue;
                    }
                    if let Err(trouble) = self.seal(&orders) {
                        reports.push(Report::WriteEnded { token, trouble: Some(trouble) });
                        continue;
                    }
                    self.under.insert(token, Under::Write);
                    let buffer = Buffer::slots(&self.pool, orders[0].slot, orders.len() as u32);
                    operations.push(self.operation(token, Kind::Write, extent, buffer));
                    // The disk starts on it while the next ones are hashed.
                    self.disk.submit(std::mem::take(&mut operations));
                }
                Job::Describe { extents, trial } => self.describe(&extents, trial, &mut operations),
                Job::Grow => reports.push(self.grow()),
                Job::Erase(extents) => reports.push(self.erase(extents)),
                Job::EraseDurably(extents) => reports.push(self.erase_durably(extents)),
                Job::Done(completion) => {
                    // Reads that were ordered before go to the disk before time is spent on this
                    // one.
                    self.start_staged(&mut operations, &mut reports);
                    if !operations.is_empty() {
                        self.disk.submit(std::mem::take(&mut operations));
                    }
                    reports.extend(self.done(completion));
                }
            }
        }
        self.start_staged(&mut operations, &mut reports);
        if !operations.is_empty() {
            self.disk.submit(operations);
        }
        reports
    }

    /// Starts what has a place in staging by now.
    fn start_staged(&mut self, operations: &mut Vec<Operation>, reports: &mut Vec<Report>) {
        while let Some((waiting, mut buffer)) = self.staging.as_mut().and_then(StagingQueue::next) {
            let Waiting { token, extent, work } = waiting;
            let StagedWork::Write(orders) = work else {
                operations.push(self.operation(token, Kind::Read, extent, buffer));
                continue;
            };
            if let Err(trouble) = self.seal_into(&orders, &mut buffer) {
                self.end_staged(Kind::Write, buffer);
                reports.push(Report::WriteEnded { token, trouble: Some(trouble) });
                continue;
            }
            self.under.insert(token, Under::Write);
            operations.push(self.operation(token, Kind::Write, extent, buffer));
            // The disk starts on it while the next ones are copied.
            self.disk.submit(std::mem::take(operations));
        }
    }

    /// A buffer is back. If it is a place in staging, others may have it.
    fn end_staged(&mut self, kind: Kind, buffer: Buffer) {
        if let Some(staging) = self.staging.as_mut().filter(|staging| staging.owns(&buffer)) {
            staging.end(kind, buffer);
        }
    }

    /// Seals the images of adjacent slots, and copies them.
    fn seal_into(&self, orders: &[SealOrder], buffer: &mut Buffer) -> std::result::Result<(), Trouble> {
        let geometry = self.pool.geometry();
        let (pages, extent_bytes) = (geometry.descriptor_bytes as usize, geometry.slot_bytes as usize);
        for (order, into) in orders.iter().zip(buffer.bytes_mut().chunks_exact_mut(extent_bytes)) {
            let slot = Buffer::slots(&self.pool, order.slot, 1);
            let made = extent::copy_payload(slot.bytes(), into, geometry, order.key.group);
            // Those that were made when the block was offloaded know what it was then.
            let sums = self.known_sums(order).unwrap_or(made);
            self.seal_slot(order, &sums)?;
            into[..pages].copy_from_slice(&slot.bytes()[..pages]);
        }
        Ok(())
    }

    fn operation(&self, token: u64, kind: Kind, extent: ExtentIndex, buffer: Buffer) -> Operation {
        let (segment, offset) = self.layout.place(extent);
        Operation { token, kind, segment, offset, buffer }
    }

    /// Gives the images of adjacent slots their checksums: those that the ranks' hashers have, else
    /// computed here.
    fn seal(&self, orders: &[SealOrder]) -> std::result::Result<(), Trouble> {
        for order in orders {
            let sums = self.known_sums(order).unwrap_or_else(|| {
                let image = Buffer::slots(&self.pool, order.slot, 1);
                extent::sums(image.bytes(), self.pool.geometry(), order.key.group)
            });
            self.seal_slot(order, &sums)?;
        }
        Ok(())
    }

    /// The checksums of a block that the ranks have made, if all of them have.
    fn known_sums(&self, order: &SealOrder) -> Option<Vec<u64>> {
        let known = |rank: usize| self.pool.checksum(order.slot, rank, order.generation.0);
        let parts = self.pool.geometry().parts.iter().enumerate();
        parts.map(|(rank, part)| if part.writes(order.key.group) { known(rank) } else { Some(0) }).collect()
    }

    fn seal_slot(&self, order: &SealOrder, sums: &[u64]) -> std::result::Result<(), Trouble> {
        let sealed = self.pool.with_descriptor_mut(order.slot, |page| descriptor::seal(page, &order.seal, sums));
        // A descriptor that did not fit is never an extent.
        sealed.map_err(|_| Trouble::Undescribed)
    }

    fn describe(&mut self, extents: &[ExtentIndex], trial: bool, operations: &mut Vec<Operation>) {
        self.next_group += 1;
        let group = DESCRIBE | self.next_group << GROUP_SHIFT;
        let bytes = self.pool.geometry().descriptor_bytes as usize;
        for (index, extent) in extents.iter().enumerate() {
            let token = group | index as u64;
            self.under.insert(token, Under::Describe(*extent));
            operations.push(self.operation(token, Kind::Read, *extent, Buffer::pages(bytes)));
        }
        let waiting = extents.len();
        self.described.insert(group, Described { waiting, found: Vec::with_capacity(waiting), trial });
    }

    fn done(&mut self, completion: Completion) -> Option<Report> {
        let Completion { token, buffer, outcome, kind } = completion;
        let Some(under) = self.under.remove(&token) else {
            violated!("transfer {token} ended but is not under way");
            return None;
        };
        match under {
            Under::Write => {
                self.end_staged(kind, buffer);
                Some(Report::WriteEnded { token, trouble: outcome.err().map(|_| Trouble::Device) })
            }
            Under::Read { expected, slot, cache_generation } => {
                let outcomes = if outcome.is_ok() {
                    self.compare(buffer, slot, &expected, cache_generation)
                } else {
                    self.end_staged(kind, buffer);
                    expected.iter().map(|_| Err(Trouble::Device)).collect()
                };
                Some(Report::ReadEnded { token, outcomes })
            }
            Under::Describe(extent) => {
                let group = token >> GROUP_SHIFT << GROUP_SHIFT;
                let Some(described) = self.described.get_mut(&group) else {
                    violated!("the descriptor of {extent:?} was read for nobody");
                    return None;
                };
                let ranks = self.pool.geometry().parts.len();
                let whole = || {
                    let (key, seal, _) = descriptor::unseal(buffer.bytes(), ranks).ok()?;
                    let (_, _, lineage) = descriptor::read(buffer.bytes(), ranks).ok()?;
                    (seal.store == self.store_id).then_some((key, lineage))
                };
                let read = outcome.map_err(|_| Trouble::Device).and_then(|()| whole().ok_or(Trouble::Corrupt));
                described.found.push((extent, read));
                described.waiting -= 1;
                if described.waiting > 0 {
                    return None;
                }
                let Described { found, trial, .. } = self.described.remove(&group)?;
                Some(Report::Described { found, trial })
            }
        }
    }

    /// Compares what was read with what must be there, and makes the good images those of their
    /// slots.
    fn compare(
        &mut self,
        buffer: Buffer,
        first: SlotIndex,
        expected: &[(BlockKey, Generation)],
        cache_generation: u64,
    ) -> Vec<std::result::Result<Lineage, Trouble>> {
        let staged = self.staging.as_ref().is_some_and(|staging| staging.owns(&buffer));
        let (geometry, store) = (self.pool.geometry(), self.store_id);
        let images = buffer.bytes().chunks_exact(geometry.slot_bytes as usize);
        let checked: Vec<bool> = images
            .zip(expected)
            .zip(first.0..)
            .map(|((image, (key, _)), slot)| {
                let wanted = Expected { store, cache_generation, key: Some(*key) };
                if !staged {
                    return extent::check(image, geometry, &wanted).is_ok();
                }
                let mut into = Buffer::slots(&self.pool, SlotIndex(slot), 1);
                extent::check_into(image, into.bytes_mut(), geometry, &wanted).is_ok()
            })
            .collect();
        // The bytes are the slots' from here on.
        self.end_staged(Kind::Read, buffer);
        let geometry = self.pool.geometry();
        let ranks = geometry.parts.len();
        let accept = |(index, good): (usize, bool)| {
            let slot = SlotIndex(first.0 + index as u32);
            let generation = expected[index].1;
            if !good {
                return Err(Trouble::Corrupt);
            }
            let taken = self.pool.with_descriptor_mut(slot, |page| {
                let (_, _, sums) = descriptor::unseal(page, ranks)?;
                let (_, _, lineage) = descriptor::read(page, ranks)?;
                descriptor::renew(page, ranks, generation).map(|()| (sums, lineage))
            });
            let (sums, lineage) = taken.map_err(|_| Trouble::Corrupt)?;
            let group = expected[index].0.group;
            for (rank, sum) in sums.into_iter().enumerate().filter(|(rank, _)| geometry.parts[*rank].writes(group)) {
                self.pool.set_checksum(slot, rank, generation.0, sum);
            }
            Ok(lineage)
        };
        checked.into_iter().enumerate().map(accept).collect()
    }

    fn grow(&self) -> Report {
        let mut store = lock(&self.store);
        let last = match store.grow() {
            Ok(Some(file)) => match self.disk.add_segment(file) {
                Ok(_) => false,
                Err(error) => {
                    log::warn!("the nvme tier grows no further: {error}");
                    true
                }
            },
            Ok(None) => true,
            Err(error) => {
                log::warn!("the nvme tier grows no further: {error}");
                true
            }
        };
        Report::Grown { ready: store.extents_ready(), last }
    }

    fn erase(&self, extents: Vec<ExtentIndex>) -> Report {
        let store = lock(&self.store);
        let erased = extents.into_iter().filter(|extent| match store.erase(*extent) {
            Ok(()) => true,
            Err(error) => {
                // Not used again; the next start finds it, and that it has expired.
                log::warn!("an expired block could not be erased: {error}");
                false
            }
        });
        Report::Erased(erased.collect())
    }

    fn erase_durably(&self, extents: Vec<ExtentIndex>) -> Report {
        let failed = lock(&self.store).erase_durably(&extents);
        Report::ErasedDurably { extents, failed }
    }

    fn check_place(&mut self) -> Option<Report> {
        if self.checked.elapsed() < PLACE_CHECK {
            return None;
        }
        self.checked = Instant::now();
        (!lock(&self.store).still_there()).then_some(Report::StoreRemoved)
    }
}

/// Stops an engine: writes dirty blocks to disk for at most [`limits::FLUSH_MS`], leaves a
/// snapshot, and lets go of everything.
pub fn shut(engine: &Arc<Mutex<TierEngine>>) {
    let deadline = Instant::now() + Duration::from_millis(limits::FLUSH_MS);
    while Instant::now() < deadline {
        if lock(engine).flush() {
            break;
        }
        thread::sleep(Duration::from_millis(2));
    }
    lock(engine).close();
}
