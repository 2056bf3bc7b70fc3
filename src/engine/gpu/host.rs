//! The host copier: KV cache and pool are both plain memory (CPU vLLM). Threads copy, loads first.
//!
//! An offload sums the bytes while it copies them, so that nobody has to read them again.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, select_biased, unbounded};

use super::sides::Sides;
use super::views::GroupRuns;
use super::{After, Answers, Copier, CopyError, Direction, Order};
use crate::checksum::{self, Sum};
use kvcellar_block::error::{Error, Result};

fn carry_out(sides: &Sides, order: &Order) -> std::result::Result<(), CopyError> {
    let copy = order.copy;
    let admitted = sides.admit(order)?;
    match order.direction {
        Direction::Offload => {
            let sum = gather(admitted.group, copy.block, admitted.part)?;
            sides.set_checksum(&copy, sum);
        }
        Direction::Load => {
            scatter(admitted.group, copy.block, admitted.part)?;
            if sides.verify_loads {
                // Debug mode: what arrived in the KV cache is what was offloaded from it.
                sides.compare(&copy, sum_of_block(admitted.group, copy.block)?)?;
            }
        }
    }
    Ok(())
}

/// Copies a block into its part of a slot; the checksum of what it wrote.
fn gather(group: &GroupRuns, block: u32, part: NonNull<u8>) -> std::result::Result<u64, CopyError> {
    let mut sum = Sum::new(group.block_bytes() as usize);
    let mut to = part.as_ptr();
    let mut pieces = group.pieces(block).ok_or(CopyError::OutOfRange)?.peekable();
    while let Some((from, len)) = pieces.next() {
        let next = pieces.peek().map_or(0, |(next, _)| *next) as *const u8;
        // SAFETY: `from` is valid by the contract of `Sides::new`; `to` stays inside the span,
        // whose length is the sum of the pieces (checked by the caller). The block's source is
        // fenced until this order is answered, and the slot is ours while it is filling.
        unsafe {
            sum.copy(to, from as *const u8, len, next);
            to = to.add(len);
        }
    }
    Ok(sum.finish())
}

fn scatter(group: &GroupRuns, block: u32, part: NonNull<u8>) -> std::result::Result<(), CopyError> {
    let mut from = part.as_ptr().cast_const();
    for (to, len) in group.pieces(block).ok_or(CopyError::OutOfRange)? {
        // SAFETY: as in `gather`, the other way round: vLLM allocated the destination block for
        // this load alone and reads it only after the load was reported finished; the slot is
        // pinned by the load's lease.
        unsafe {
            checksum::copy(to as *mut u8, from, len, from.add(len));
            from = from.add(len);
        }
    }
    checksum::settle();
    Ok(())
}

fn sum_of_block(group: &GroupRuns, block: u32) -> std::result::Result<u64, CopyError> {
    let mut sum = Sum::new(group.block_bytes() as usize);
    for (address, len) in group.pieces(block).ok_or(CopyError::OutOfRange)? {
        // SAFETY: valid by the contract of `Sides::new`; nobody writes the block while its order is
        // not answered.
        sum.read(unsafe { std::slice::from_raw_parts(address as *const u8, len) });
    }
    Ok(sum.finish())
}

/// Copies with a few threads. An order in flight is bounded by the tier engine
/// (`limits::INFLIGHT_STORES_MAX` and the KV cache itself).
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
    pub fn start(sides: Sides, answers: &Arc<dyn Answers>, threads: usize) -> Result<Self> {
        let sides = Arc::new(sides);
        let (loads_tx, loads_rx) = unbounded();
        let (offloads_tx, offloads_rx) = unbounded();
        let in_flight = Arc::new(AtomicUsize::new(0));
        let mut copier = Self { loads: Some(loads_tx), offloads: Some(offloads_tx), threads: Vec::new(), in_flight };
        for number in 0..threads.max(1) {
            let (sides, answers, in_flight) = (Arc::clone(&sides), Arc::clone(answers), Arc::clone(&copier.in_flight));
            let (loads, offloads) = (loads_rx.clone(), offloads_rx.clone());
            let thread = thread::Builder::new()
                .name(format!("kvcellar-copy-{number}"))
                .spawn(move || {
                    while let Some(order) = next(&loads, &offloads) {
                        answers.answer(&order, carry_out(&sides, &order));
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
    fn submit(&self, orders: &[Order], _after: &After) -> Result<()> {
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
