//! The host copier: KV cache and pool are both plain memory (CPU vLLM). Threads copy, loads first.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, select_biased, unbounded};
use xxhash_rust::xxh3::Xxh3Default;

use super::hasher::HashGuard;
use super::views::GroupRuns;
use super::{Answers, Copier, CopyError, Direction, Order};
use crate::block::SlotIndex;
use crate::block::plan::VERIFY;
use crate::error::{Error, Result};
use crate::pool::Pool;

/// Everything a copying thread needs to know; shared by all of them.
pub struct HostSide {
    pool: Arc<Pool>,
    groups: Arc<Vec<GroupRuns>>,
    rank: usize,
    verify_loads: bool,
    guard: Arc<HashGuard>,
}

impl HostSide {
    /// Describes one rank's two sides.
    ///
    /// # Safety
    /// Every address that `groups` resolves must be valid for reads and writes, and stay so until the copier built on this is dropped. vLLM
    /// allocates the KV cache once, before it registers it with the connector, and frees it after the connector's `shutdown`.
    pub unsafe fn new(
        pool: Arc<Pool>,
        groups: Arc<Vec<GroupRuns>>,
        rank: usize,
        verify_loads: bool,
        guard: Arc<HashGuard>,
    ) -> Self {
        Self { pool, groups, rank, verify_loads, guard }
    }

    fn carry_out(&self, order: &Order) -> std::result::Result<(), CopyError> {
        let copy = order.copy;
        let geometry = self.pool.geometry();
        let group = self.groups.get(copy.group as usize).ok_or(CopyError::OutOfRange)?;
        let span = geometry.parts.get(self.rank).and_then(|part| part.spans.get(copy.group as usize));
        let (offset, len) = *span.ok_or(CopyError::OutOfRange)?;
        if copy.slot >= self.pool.slot_count() || len != group.block_bytes() {
            return Err(CopyError::OutOfRange);
        }
        let slot = SlotIndex(copy.slot);
        let line = self.pool.line(slot);
        // SAFETY: the span lies inside the payload: `SlotGeometry::lay_out` sized the slot for all spans.
        let part = unsafe { self.pool.payload(slot).add(offset as usize) };
        match order.direction {
            Direction::Offload => {
                if !line.may_write(copy.generation) {
                    return Err(CopyError::Stale);
                }
                self.guard.wait_until_free(slot);
                gather(group, copy.block, part)?;
                if self.verify_loads {
                    let sum = sum_of_block(group, copy.block)?;
                    self.pool.set_checksum(slot, self.rank, copy.generation, sum);
                }
            }
            Direction::Load => {
                if !line.may_read(copy.generation) {
                    return Err(CopyError::Stale);
                }
                self.check_stored(slot, &copy, part, len as usize)?;
                scatter(group, copy.block, part)?;
                if self.verify_loads {
                    self.check_loaded(slot, &copy, group)?;
                }
            }
        }
        Ok(())
    }

    /// An adopted slot's bytes are used only when they are what was stored.
    fn check_stored(
        &self,
        slot: SlotIndex,
        copy: &crate::block::plan::BlockCopy,
        part: NonNull<u8>,
        len: usize,
    ) -> std::result::Result<(), CopyError> {
        if copy.flags & VERIFY == 0 {
            return Ok(());
        }
        // SAFETY: `len` bytes at `part` are this rank's span of a filled slot; the engine holds a pin on it for this load, so nobody writes it.
        let bytes = unsafe { std::slice::from_raw_parts(part.as_ptr(), len) };
        let stored = self.pool.checksum(slot, self.writer_rank(copy.group), copy.generation);
        if stored == Some(xxhash_rust::xxh3::xxh3_64(bytes)) { Ok(()) } else { Err(CopyError::Mismatch) }
    }

    /// Debug mode: what arrived in the KV cache is what was offloaded from it.
    fn check_loaded(
        &self,
        slot: SlotIndex,
        copy: &crate::block::plan::BlockCopy,
        group: &GroupRuns,
    ) -> std::result::Result<(), CopyError> {
        let stored = self.pool.checksum(slot, self.writer_rank(copy.group), copy.generation);
        let arrived = sum_of_block(group, copy.block)?;
        if stored == Some(arrived) { Ok(()) } else { Err(CopyError::Mismatch) }
    }

    /// The rank that wrote (and hashed) the bytes this rank uses: itself, or the first that holds the same span.
    fn writer_rank(&self, group: u16) -> usize {
        let parts = &self.pool.geometry().parts;
        let own = parts[self.rank].spans[group as usize];
        parts.iter().position(|part| part.writer && part.spans[group as usize] == own).unwrap_or(self.rank)
    }
}

fn gather(group: &GroupRuns, block: u32, part: NonNull<u8>) -> std::result::Result<(), CopyError> {
    let mut to = part.as_ptr();
    for (from, len) in group.pieces(block).ok_or(CopyError::OutOfRange)? {
        // SAFETY: `from` is valid by the contract of `new`; `to` stays inside the span, whose length is the sum of the pieces (checked by
        // the caller). The block's source is fenced until this order is answered, and the slot is ours while it is filling.
        unsafe {
            to.copy_from_nonoverlapping(from as *const u8, len);
            to = to.add(len);
        }
    }
    Ok(())
}

fn scatter(group: &GroupRuns, block: u32, part: NonNull<u8>) -> std::result::Result<(), CopyError> {
    let mut from = part.as_ptr().cast_const();
    for (to, len) in group.pieces(block).ok_or(CopyError::OutOfRange)? {
        // SAFETY: as in `gather`, the other way round: vLLM allocated the destination block for this load alone and reads it only after the
        // load was reported finished; the slot is pinned by the load's lease.
        unsafe {
            (to as *mut u8).copy_from_nonoverlapping(from, len);
            from = from.add(len);
        }
    }
    Ok(())
}

fn sum_of_block(group: &GroupRuns, block: u32) -> std::result::Result<u64, CopyError> {
    let mut hasher = Xxh3Default::new();
    for (address, len) in group.pieces(block).ok_or(CopyError::OutOfRange)? {
        // SAFETY: valid by the contract of `new`; nobody writes the block while its order is not answered.
        hasher.update(unsafe { std::slice::from_raw_parts(address as *const u8, len) });
    }
    Ok(hasher.digest())
}

/// Copies with a few threads. An order in flight is bounded by the tier engine (`limits::INFLIGHT_STORES_MAX` and the KV cache itself).
pub struct HostCopier {
    loads: Option<Sender<Order>>,
    offloads: Option<Sender<Order>>,
    threads: Vec<JoinHandle<()>>,
    in_flight: Arc<AtomicUsize>,
}

impl HostCopier {
    /// Starts `threads` copying threads.
    ///
    /// # Errors
    /// [`Error::DeviceDead`] when the system refuses a thread.
    pub fn start(side: HostSide, answers: &Arc<dyn Answers>, threads: usize) -> Result<Self> {
        let side = Arc::new(side);
        let (loads_tx, loads_rx) = unbounded();
        let (offloads_tx, offloads_rx) = unbounded();
        let in_flight = Arc::new(AtomicUsize::new(0));
        let mut copier = Self { loads: Some(loads_tx), offloads: Some(offloads_tx), threads: Vec::new(), in_flight };
        for number in 0..threads.max(1) {
            let (side, answers, in_flight) = (Arc::clone(&side), Arc::clone(answers), Arc::clone(&copier.in_flight));
            let (loads, offloads) = (loads_rx.clone(), offloads_rx.clone());
            let thread = thread::Builder::new()
                .name(format!("kvcellar-copy-{number}"))
                .spawn(move || {
                    while let Some(order) = next(&loads, &offloads) {
                        answers.answer(&order, side.carry_out(&order));
                        in_flight.fetch_sub(1, Ordering::AcqRel);
                    }
                })
                .map_err(|error| Error::DeviceDead {
                    device: "the host copier".to_owned(),
                    problem: format!("no thread could be started ({error})"),
                    remedy: "Lower copy_threads, or raise the limit on processes".to_owned(),
                })?;
            copier.threads.push(thread);
        }
        Ok(copier)
    }
}

/// The next order, loads first; `None` when both queues are closed and empty.
fn next(loads: &Receiver<Order>, offloads: &Receiver<Order>) -> Option<Order> {
    select_biased! {
        recv(loads) -> order => order.ok().or_else(|| offloads.recv().ok()),
        recv(offloads) -> order => order.ok().or_else(|| loads.recv().ok()),
    }
}

impl Copier for HostCopier {
    fn submit(&self, orders: &[Order]) -> Result<()> {
        let gone = || Error::DeviceDead {
            device: "the host copier".to_owned(),
            problem: "its threads have ended".to_owned(),
            remedy: "Restart the engine".to_owned(),
        };
        let (Some(loads), Some(offloads)) = (&self.loads, &self.offloads) else { return Err(gone()) };
        self.in_flight.fetch_add(orders.len(), Ordering::AcqRel);
        for order in orders {
            let queue = match order.direction {
                Direction::Load => loads,
                Direction::Offload => offloads,
            };
            queue.send(*order).map_err(|_| gone())?;
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }
}

impl Drop for HostCopier {
    /// Carries out what was submitted, then ends: a buffer in flight is never abandoned.
    fn drop(&mut self) {
        (self.loads, self.offloads) = (None, None);
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing more to copy.
            drop(thread.join());
        }
    }
}
