//! One direction's copies: a queue of orders, and the jobs that were given to the direction's
//! stream.
//!
//! An order is `Queued -> In a job -> Answered`, or answered at once when it may not be carried
//! out. A job ends when its event is over, and only then are its orders answered. Jobs of a lane
//! end in their order.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::device::{Device, DeviceEvent, DeviceStream};
use super::dispatch::{Dispatch, DispatchWay, Thresholds};
use super::driver::{Answer, Refused};
use super::kernel::{FragmentTable, GatherKernel};
use super::notes::Notes;
use super::pinning::{Pin, Pinning};
use super::staging::Staging;
use crate::checksum;
use crate::gpu::fragments::{self, Fragment};
use crate::gpu::sides::{Admitted, Sides};
use crate::gpu::{Answers, ComputeStream, CopyError, Direction, Order};
use crate::limits::{COMMANDS_IN_FLIGHT_MAX, JOB_BYTES, JOB_FRAGMENTS_MAX, JOBS_IN_FLIGHT_MAX};
use crate::violated;
use kvcellar_block::SlotIndex;
use kvcellar_block::plan::BlockCopy;

/// A place in vLLM's stream that copies come after.
pub(super) struct ComputeMark {
    pub(super) number: u64,
    pub(super) event: DeviceEvent,
}

/// An order and what it comes after.
pub(super) struct Queued {
    pub(super) order: Order,
    pub(super) mark: Option<Arc<ComputeMark>>,
}

struct LaneJob {
    event: DeviceEvent,
    /// What it put on the stream.
    commands: usize,
    orders: Vec<Order>,
    /// Some of it could not be given to the stream.
    failed: bool,
    table: Option<FragmentTable>,
}

/// What both lanes share.
pub(super) struct Common {
    pub(super) device: Arc<Device>,
    pub(super) sides: Sides,
    pub(super) pinning: Pinning,
    pub(super) answers: Arc<dyn Answers>,
    pub(super) notes: Arc<Notes>,
    pub(super) in_flight: Arc<AtomicUsize>,
    pub(super) dead: Arc<AtomicBool>,
}

impl Common {
    fn answer(&self, order: &Order, outcome: std::result::Result<(), CopyError>) {
        self.answers.answer(order, outcome);
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
    }

    fn fail(&self, orders: &[Order]) {
        for order in orders {
            self.answer(order, Err(CopyError::Device));
        }
    }

    /// A call was refused: of a device that still works (its orders fail, the next ones are tried),
    /// or of one from which nothing is taken any more.
    fn was_refused(&self, refused: &Refused, stream: &DeviceStream) {
        if stream.works() {
            self.notes.push(format!("copies could not be started: {refused}"));
        } else if !self.dead.swap(true, Ordering::AcqRel) {
            self.notes.push(format!("the GPU no longer copies: {refused}. Restart the engine"));
        }
    }

    fn pin(&self, order: &Order) -> Pin {
        // An order without a slot is refused before it is copied.
        let known = order.copy.slot < self.sides.pool.slot_count();
        if known { self.pinning.state(SlotIndex(order.copy.slot)) } else { Pin::Pinned }
    }
}

/// One direction.
pub(super) struct Lane {
    direction: Direction,
    stream: DeviceStream,
    dispatch: Dispatch,
    thresholds: Thresholds,
    queue: VecDeque<Queued>,
    jobs: VecDeque<LaneJob>,
    fragments: Vec<Fragment>,
    tables: Vec<FragmentTable>,
    /// Number of the mark that the stream was told to wait for last.
    followed: u64,
}

impl Lane {
    /// An empty lane. To be called with the device's context current.
    pub(super) fn new(
        device: &Arc<Device>,
        direction: Direction,
        stream: DeviceStream,
        thresholds: Thresholds,
        kernel: Option<Arc<GatherKernel>>,
        staging: Option<Staging>,
    ) -> Answer<Self> {
        let takes_tables = kernel.is_some() || staging.is_some();
        let tables = FragmentTable::several(device, if takes_tables { JOBS_IN_FLIGHT_MAX } else { 0 })?;
        Ok(Self {
            direction,
            stream,
            dispatch: Dispatch::new(device, kernel, staging),
            thresholds,
            queue: VecDeque::new(),
            jobs: VecDeque::new(),
            fragments: Vec::new(),
            tables,
            followed: 0,
        })
    }

    pub(super) fn push(&mut self, order: Order, mark: Option<Arc<ComputeMark>>) {
        self.queue.push_back(Queued { order, mark });
    }

    /// Neither queued nor under way.
    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.jobs.is_empty()
    }

    /// Gives the next job to the stream. `false`: nothing waits, enough is under way, or the first
    /// order's memory is being pinned.
    pub(super) fn start_job(&mut self, common: &Common) -> bool {
        let Some(first) = self.queue.front() else { return false };
        let commands: usize = self.jobs.iter().map(|job| job.commands).sum();
        if self.jobs.len() >= JOBS_IN_FLIGHT_MAX || commands >= COMMANDS_IN_FLIGHT_MAX {
            return false;
        }
        match common.pin(&first.order) {
            Pin::Waiting => {
                common.pinning.urge(SlotIndex(first.order.copy.slot));
                false
            }
            // Copies of ordinary memory make their caller wait for all that comes before them on
            // the stream: not before vLLM's step is over. An event that cannot be asked is found
            // out about when it is used.
            Pin::Refused if first.mark.as_ref().is_some_and(|mark| matches!(mark.event.is_over(), Ok(false))) => false,
            _ => {
                self.start(common);
                true
            }
        }
    }

    /// Makes vLLM's stream wait for these offloads, after giving those to our stream that still
    /// wait, whatever else is under way. `false`: it will not.
    pub(super) fn fence(&mut self, common: &Common, compute: ComputeStream, offloads: &[BlockCopy]) -> bool {
        let named: HashSet<(u32, u32)> = offloads.iter().map(|copy| (copy.slot, copy.generation)).collect();
        let is_named = |order: &Order| named.contains(&(order.copy.slot, order.copy.generation));
        // They go before what else waits: vLLM's step waits for them. Every order has its own mark,
        // so they may be carried out in any order.
        let (first, rest): (VecDeque<_>, _) = self.queue.drain(..).partition(|queued| is_named(&queued.order));
        let left = rest.len();
        self.queue = first;
        self.queue.extend(rest);
        while self.queue.len() > left {
            self.start(common);
        }
        // The stream passes jobs in their order: the last one of them comes after all of them.
        // None: all were answered meanwhile.
        let Some(job) = self.jobs.iter().rev().find(|job| job.orders.iter().any(is_named)) else { return true };
        match job.event.hold(compute) {
            Ok(()) => true,
            Err(refused) => {
                common.was_refused(&refused, &self.stream);
                false
            }
        }
    }

    /// Takes orders that come after the same mark and lie in the same kind of memory, and gives
    /// them to the stream.
    fn start(&mut self, common: &Common) {
        let Some(first) = self.queue.front() else { return };
        let (mark, pinned) = (first.mark.clone(), common.pin(&first.order) == Pin::Pinned);
        let number = |mark: &Option<Arc<ComputeMark>>| mark.as_ref().map(|mark| mark.number);
        let (mut orders, mut bytes) = (Vec::new(), 0);
        self.fragments.clear();
        while let Some(next) = self.queue.pop_front_if(|next| {
            number(&next.mark) == number(&mark)
                && (common.pin(&next.order) == Pin::Pinned) == pinned
                && bytes < JOB_BYTES
                && self.fragments.len() < JOB_FRAGMENTS_MAX
        }) {
            match common.sides.admit(&next.order).and_then(|admitted| self.append(&next.order.copy, &admitted)) {
                // This rank has no layers of the group: there is nothing to give to the stream.
                Ok(0) => common.answer(&next.order, Ok(())),
                Ok(len) => {
                    bytes += len;
                    orders.push(next.order);
                }
                Err(error) => common.answer(&next.order, Err(error)),
            }
        }
        if !orders.is_empty() {
            fragments::join(&mut self.fragments);
            self.give(common, orders, mark.as_deref(), pinned);
        }
    }

    fn append(&mut self, copy: &BlockCopy, admitted: &Admitted<'_>) -> std::result::Result<u64, CopyError> {
        let mut host = admitted.part.as_ptr() as u64;
        for (device, len) in admitted.group.pieces(copy.block).ok_or(CopyError::OutOfRange)? {
            self.fragments.push(Fragment { device, host, len: len as u64 });
            host += len as u64;
        }
        Ok(admitted.len as u64)
    }

    fn give(&mut self, common: &Common, orders: Vec<Order>, mark: Option<&ComputeMark>, pinned: bool) {
        let event = match self.prepare(common, mark) {
            Ok(event) => event,
            Err(refused) => {
                // Nothing was given to the stream.
                common.was_refused(&refused, &self.stream);
                return common.fail(&orders);
            }
        };
        let way = self.thresholds.way(self.direction, &self.fragments, pinned);
        let commands = way.commands(self.fragments.len());
        let mut table = if matches!(way, DispatchWay::Gather | DispatchWay::Staged) { self.tables.pop() } else { None };
        let mark = mark.map(|mark| &mark.event);
        let given =
            self.dispatch.hand_over(way, self.direction, &mut self.fragments, table.as_mut(), &self.stream, mark);
        if let Err(refused) = &given {
            common.was_refused(refused, &self.stream);
        }
        // Part of a job that failed may be under way: its memory is given back when the stream has
        // passed it.
        let job = LaneJob { event, commands, orders, failed: given.is_err(), table };
        match job.event.record(&self.stream) {
            Ok(()) => self.jobs.push_back(job),
            Err(refused) => {
                let over = self.wait_for_stream(common, &refused);
                self.answer(common, job, over);
            }
        }
    }

    /// Without the event that would tell: waits, in this thread, until the stream has passed
    /// everything. `false`: the context is gone, and its copies with it.
    fn wait_for_stream(&self, common: &Common, refused: &Refused) -> bool {
        common.was_refused(refused, &self.stream);
        self.stream.synchronize().is_ok()
    }

    /// An event for a job, and the stream behind its mark.
    fn prepare(&mut self, common: &Common, mark: Option<&ComputeMark>) -> Answer<DeviceEvent> {
        let event = common.device.event()?;
        if let Some(mark) = mark.filter(|mark| mark.number != self.followed) {
            self.stream.wait(&mark.event)?;
            self.followed = mark.number;
        }
        Ok(event)
    }

    /// Answers the orders of jobs that are over.
    pub(super) fn finish_jobs(&mut self, common: &Common) {
        while let Some(job) = self.jobs.front() {
            let over = match job.event.is_over() {
                Ok(false) => return,
                Ok(true) => true,
                Err(refused) => self.wait_for_stream(common, &refused),
            };
            let Some(job) = self.jobs.pop_front() else {
                violated!("the job that ended is gone from its queue");
                return;
            };
            self.answer(common, job, over);
        }
    }

    /// Answers a job's orders. `over`: the stream has passed it; else it was lost with the context.
    fn answer(&mut self, common: &Common, job: LaneJob, over: bool) {
        self.tables.extend(job.table);
        for order in &job.orders {
            let outcome = if over && !job.failed { self.examine(common, order) } else { Err(CopyError::Device) };
            common.answer(order, outcome);
        }
    }

    /// Debug mode: keeps the checksum of what was offloaded, and compares what was loaded with it.
    fn examine(&self, common: &Common, order: &Order) -> std::result::Result<(), CopyError> {
        if !common.sides.verify_loads {
            return Ok(());
        }
        let located = common.sides.locate(&order.copy)?;
        match self.direction {
            Direction::Offload => {
                // SAFETY: this rank's part of a slot that is being filled; the copy into it is over
                // and the order not answered.
                let bytes = unsafe { std::slice::from_raw_parts(located.part.as_ptr(), located.len) };
                common.sides.set_checksum(&order.copy, checksum::of(bytes));
                Ok(())
            }
            Direction::Load => {
                let bytes = self.read_back(common, &order.copy, &located).map_err(|_| CopyError::Device)?;
                common.sides.compare(&order.copy, checksum::of(&bytes))
            }
        }
    }

    fn read_back(&self, common: &Common, copy: &BlockCopy, located: &Admitted<'_>) -> Answer<Vec<u8>> {
        let mut bytes = vec![0_u8; located.len];
        let mut done = 0;
        let (driver, functions) = (common.device.driver, &common.device.driver.functions);
        for (device, len) in located.group.pieces(copy.block).into_iter().flatten() {
            let into = bytes[done..done + len].as_mut_ptr().cast();
            // SAFETY: the piece is `len` bytes on both sides, and the memory here outlives the
            // copy, which is waited for below.
            let code = unsafe { (functions.cuMemcpyDtoHAsync_v2)(into, device, len, self.stream.handle) };
            driver.check("cuMemcpyDtoHAsync", code)?;
            done += len;
        }
        self.stream.synchronize().map(|()| bytes)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if !self.jobs.is_empty() {
            // Only after a panic: nothing that is under way may lose its memory.
            let _gone = self.stream.synchronize();
        }
    }
}
