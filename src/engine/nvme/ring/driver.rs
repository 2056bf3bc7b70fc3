//! The ring thread's loop: takes operations from the queue, gives them to the kernel, hands their
//! ends out.
//!
//! One turn: what ended is subtracted, what may start is started, finished operations are handed
//! out, and only then does the thread wait.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use std::{io, mem};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::RingShared;
use super::flight::Flight;
use super::kernel::{Kernel, WAKE};
use crate::limits::{RING_FAILED_WAIT_MS, RING_PAUSE_MS, TRANSFER_RETRIES_MAX};
use crate::nvme::disk::{Completion, DiskError, Kind, Operation};
use crate::nvme::queue::{completion, outcome};
use crate::violated;

/// The thread's state.
pub(super) struct RingDriver {
    // Dropped first: the ring lets go of memory before anything else is given up.
    kernel: Kernel,
    flight: Flight,
    /// Slots of entries that were pushed and, as far as was seen, not taken by the kernel; `None`
    /// is the wake.
    pushed: VecDeque<Option<usize>>,
    /// The wake's entry is pushed or in the kernel.
    armed: bool,
    /// What ended since the queue was last told.
    ended: Vec<(Kind, usize)>,
    /// What is to be handed out.
    finished: Vec<Completion>,
    shared: Arc<RingShared>,
}

/// What became of a turn.
enum RingTurn {
    Again,
    Closed,
    Failed(i32),
}

impl RingDriver {
    pub(super) fn new(kernel: Kernel, shared: Arc<RingShared>) -> Self {
        let (pushed, ended, finished) = (VecDeque::new(), Vec::new(), Vec::new());
        Self { kernel, flight: Flight::default(), pushed, armed: false, ended, finished, shared }
    }

    /// Serves until the disk is closed and nothing is in flight.
    pub(super) fn run(mut self) {
        loop {
            match self.turn() {
                RingTurn::Again => {}
                RingTurn::Closed => return,
                RingTurn::Failed(errno) => return self.outlive(errno),
            }
        }
    }

    fn turn(&mut self) -> RingTurn {
        // Before the queue is looked at: a wake that is read away here announced what will be found
        // there.
        if let Err(errno) = self.arm() {
            return RingTurn::Failed(errno);
        }
        let (starts, closing) = self.take();
        if let Err(errno) = self.start(starts) {
            return RingTurn::Failed(errno);
        }
        if closing && self.flight.is_empty() && self.finished.is_empty() {
            return RingTurn::Closed;
        }
        let waits = self.finished.is_empty();
        let submitted = self.kernel.submit(usize::from(waits));
        self.deliver();
        self.settle(submitted.err().as_ref().map(errno_of))
    }

    /// Tells the queue what ended and takes what may start. What cannot start is finished.
    fn take(&mut self) -> (Vec<Operation>, bool) {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        self.ended.drain(..).for_each(|(kind, bytes)| state.queue.ended(kind, bytes));
        if state.closing {
            let left = state.queue.drain();
            self.finish_all(left, DiskError::Closed);
        }
        for file in state.segments.from(self.kernel.files()) {
            self.kernel.add_file(file.as_raw_fd());
        }
        let mut starts = Vec::new();
        while let Some(operation) = state.queue.next() {
            if state.segments.get(operation.segment).is_some() {
                starts.push(operation);
            } else {
                state.queue.ended(operation.kind, operation.buffer.len());
                self.finished.push(completion(operation, Err(DiskError::NoSegment)));
            }
        }
        state.sleeping = self.finished.is_empty();
        (starts, state.closing)
    }

    /// Gives all to the flight, then their entries to the ring: when that fails, none is forgotten.
    fn start(&mut self, operations: Vec<Operation>) -> Result<(), i32> {
        let slots: Vec<usize> = operations.into_iter().map(|operation| self.flight.insert(operation)).collect();
        self.pushed.extend(slots.iter().copied().map(Some));
        slots.into_iter().try_for_each(|slot| self.push(slot))
    }

    /// Pushes the entry of a slot that is listed as pushed already.
    fn push(&mut self, slot: usize) -> Result<(), i32> {
        let Some(flying) = self.flight.get_mut(slot) else {
            violated!("entry {slot} of the ring is pushed but no transfer is in flight there");
            return Ok(());
        };
        // SAFETY: the flight owns the operation until its completion was read or its entry was
        // found unsubmitted, and gives it up otherwise.
        unsafe { self.kernel.push_transfer(&flying.operation, slot) }.map_err(|error| errno_of(&error))
    }

    fn arm(&mut self) -> Result<(), i32> {
        if self.armed {
            return Ok(());
        }
        // Reading takes the wakes so far away. It fails when there were none.
        let _ = self.shared.wake.read();
        self.pushed.push_back(None);
        self.armed = true;
        self.kernel.push_wake(&self.shared.wake).map_err(|error| errno_of(&error))
    }

    fn deliver(&mut self) {
        self.shared.outbox.deliver(mem::take(&mut self.finished));
    }

    /// Forgets entries that the kernel took, and reads results.
    fn settle(&mut self, failure: Option<i32>) -> RingTurn {
        let left = self.kernel.unsubmitted();
        self.pushed.drain(..self.pushed.len().saturating_sub(left));
        let progress = self.reap();
        match failure {
            None | Some(libc::EINTR) => RingTurn::Again,
            Some(libc::EAGAIN | libc::EBUSY) => {
                // The kernel is short of memory, or wants results read first.
                if matches!(progress, Ok(0)) {
                    thread::sleep(Duration::from_millis(RING_PAUSE_MS));
                }
                RingTurn::Again
            }
            Some(errno) => RingTurn::Failed(errno),
        }
        .or(progress)
    }

    /// Reads results; their count. A transfer that shall be tried again is pushed again.
    fn reap(&mut self) -> Result<usize, i32> {
        let results = self.kernel.results();
        for &(name, result) in &results {
            if name == WAKE {
                self.armed = false;
            } else if self.is_to_retry(name as usize, result) {
                self.pushed.push_back(Some(name as usize));
                self.push(name as usize)?;
            } else if let Some(operation) = self.flight.remove(name as usize) {
                let outcome = outcome(operation.buffer.len(), i64::from(result));
                self.ended.push((operation.kind, operation.buffer.len()));
                self.finished.push(completion(operation, outcome));
            }
        }
        Ok(results.len())
    }

    fn is_to_retry(&mut self, slot: usize, result: i32) -> bool {
        let Some(flying) = self.flight.get_mut(slot) else {
            violated!("entry {slot} of the ring ended but no transfer is in flight there");
            return false;
        };
        let again = matches!(-result, libc::EINTR | libc::EAGAIN) && flying.retries < TRANSFER_RETRIES_MAX;
        flying.retries += u32::from(again);
        again
    }

    fn finish_all(&mut self, operations: Vec<Operation>, error: DiskError) {
        self.finished.extend(operations.into_iter().map(|operation| completion(operation, Err(error))));
    }

    /// The ring failed: from now on everything is completed with its errno, until the disk is
    /// closed.
    fn outlive(mut self, errno: i32) {
        self.shared.lock().failed = Some(errno);
        let unsubmitted: Vec<_> = mem::take(&mut self.pushed).into_iter().flatten().collect();
        let unsubmitted = unsubmitted.into_iter().filter_map(|slot| self.flight.remove(slot)).collect();
        self.finish_all(unsubmitted, DiskError::Os(errno));
        let mut closing_since = None;
        loop {
            let (left, closing) = self.refuse();
            self.finish_all(left, if closing { DiskError::Closed } else { DiskError::Os(errno) });
            self.deliver();
            let since = closing.then(|| *closing_since.get_or_insert_with(Instant::now));
            let late = since.is_some_and(|since| since.elapsed() >= Duration::from_millis(RING_FAILED_WAIT_MS));
            if closing && (self.flight.is_empty() || late) {
                return;
            }
            self.idle();
            self.reap_last(errno);
        }
    }

    fn refuse(&mut self) -> (Vec<Operation>, bool) {
        let mut state = self.shared.lock();
        state.sleeping = true;
        (state.queue.drain(), state.closing)
    }

    /// Waits for a wake without the ring. While the kernel holds transfers it looks again now and
    /// then.
    fn idle(&self) {
        let timeout = if self.flight.is_empty() { PollTimeout::NONE } else { PollTimeout::from(10u8) };
        // An interrupted wait is a wait that ended.
        let _ = poll(&mut [PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN)], timeout);
        // It fails when there was no wake.
        let _ = self.shared.wake.read();
    }

    /// Reads what the kernel still brings. Nothing is started again.
    fn reap_last(&mut self, errno: i32) {
        if self.flight.is_empty() {
            return;
        }
        // The ring may refuse this too; results may be there all the same.
        let _ = self.kernel.collect();
        for (name, result) in self.kernel.results() {
            let Some(operation) = (name != WAKE).then(|| self.flight.remove(name as usize)).flatten() else { continue };
            let retry = matches!(-result, libc::EINTR | libc::EAGAIN);
            let result = if retry { -errno } else { result };
            let outcome = outcome(operation.buffer.len(), i64::from(result));
            self.finished.push(completion(operation, outcome));
        }
    }
}

impl RingTurn {
    /// This turn's end, unless reading results failed.
    fn or(self, progress: Result<usize, i32>) -> Self {
        match progress {
            Ok(_) => self,
            Err(errno) => Self::Failed(errno),
        }
    }
}

fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}
