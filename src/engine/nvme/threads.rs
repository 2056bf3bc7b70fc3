//! A disk of ordinary threads that call `pread` and `pwrite`: the one that works everywhere.
//!
//! Promises what [`super::disk`] asks. States of an operation: waiting in the queue, in the hands
//! of one thread, completed. When the disk is dropped, what waits is completed as closed, and what
//! a thread has in hand ends first.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::disk::{Completion, Completions, Description, Disk, DiskError, Kind, Operation};
use super::queue::{Depth, Outbox, Queue, SegmentTable, completion, outcome};
use crate::limits::{DISK_BYTES_IN_FLIGHT, DISK_THREADS_MAX, TRANSFER_RETRIES_MAX};
use kvcellar_block::error::{Error, Result};

/// The disk.
pub struct ThreadDisk {
    shared: Arc<ThreadsShared>,
    threads: Vec<JoinHandle<()>>,
    why: String,
}

struct ThreadsShared {
    state: Mutex<ThreadsState>,
    work: Condvar,
    outbox: Outbox,
}

struct ThreadsState {
    queue: Queue,
    segments: SegmentTable,
    closing: bool,
}

impl ThreadDisk {
    /// Starts `threads` threads: at least one, at most [`DISK_THREADS_MAX`].
    ///
    /// # Errors
    /// [`Error::DeviceDead`] when the system refuses a thread.
    pub fn start(completions: Arc<dyn Completions>, threads: usize) -> Result<Self> {
        let operations_max = threads.clamp(1, DISK_THREADS_MAX);
        let queue = Queue::new(Depth { operations_max, bytes_max: DISK_BYTES_IN_FLIGHT });
        let state = Mutex::new(ThreadsState { queue, segments: SegmentTable::default(), closing: false });
        let shared = Arc::new(ThreadsShared { state, work: Condvar::new(), outbox: Outbox::new(completions) });
        let mut disk = Self { shared, threads: Vec::new(), why: String::new() };
        for number in 0..operations_max {
            let shared = Arc::clone(&disk.shared);
            let thread = thread::Builder::new().name(format!("kvc-disk-{number}")).spawn(move || shared.serve());
            disk.threads.push(thread.map_err(|error| no_thread(&error))?);
        }
        Ok(disk)
    }

    /// The same disk, which says why it is not a better one.
    #[must_use]
    pub fn because(mut self, why: String) -> Self {
        self.why = why;
        self
    }
}

pub(super) fn no_thread(error: &std::io::Error) -> Error {
    Error::DeviceDead {
        device: "the NVMe tier's disk".to_owned(),
        problem: format!("its thread could not be started: {error}"),
        remedy: "Raise the limit of processes (ulimit -u, the container's pids limit)".to_owned(),
    }
}

impl Disk for ThreadDisk {
    fn submit(&self, operations: Vec<Operation>) {
        let count = operations.len();
        self.shared.outbox.owe(count);
        let mut state = self.shared.lock();
        state.queue.push_all(operations);
        drop(state);
        if count == 1 { self.shared.work.notify_one() } else { self.shared.work.notify_all() }
    }

    fn add_segment(&self, file: File) -> Result<u32> {
        self.shared.lock().segments.add(file)
    }

    fn describe(&self) -> Description {
        let state = self.shared.lock();
        let why = state.segments.explain(&self.why);
        Description { engine: "threads", direct: state.segments.are_direct(), registered: false, why }
    }

    fn in_flight(&self) -> usize {
        self.shared.outbox.owed()
    }
}

impl Drop for ThreadDisk {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // The last owner may be a receiver of completions, which runs on a disk thread: that
            // one ends by itself. A thread has no result, and its panic was reported by the panic
            // hook.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

/// What a thread does next.
enum TransferStep {
    Transfer(Operation, Option<Arc<File>>),
    Close(Vec<Operation>),
}

impl ThreadsShared {
    fn lock(&self) -> MutexGuard<'_, ThreadsState> {
        // No code that holds the lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        loop {
            match self.step() {
                TransferStep::Transfer(operation, file) => {
                    self.outbox.deliver(vec![self.transfer(operation, file.as_deref())]);
                }
                TransferStep::Close(left) => {
                    let closed = left.into_iter().map(|operation| completion(operation, Err(DiskError::Closed)));
                    return self.outbox.deliver(closed.collect());
                }
            }
        }
    }

    fn step(&self) -> TransferStep {
        let mut state = self.lock();
        loop {
            if state.closing {
                return TransferStep::Close(state.queue.drain());
            }
            if let Some(operation) = state.queue.next() {
                let file = state.segments.get(operation.segment).map(Arc::clone);
                return TransferStep::Transfer(operation, file);
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn transfer(&self, mut operation: Operation, file: Option<&File>) -> Completion {
        let result = match file {
            Some(file) => outcome(operation.buffer.len(), transfer(file, &mut operation)),
            None => Err(DiskError::NoSegment),
        };
        let mut state = self.lock();
        state.queue.ended(operation.kind, operation.buffer.len());
        // This thread looks for work itself; a second operation may have become startable for
        // another one that sleeps.
        if !state.queue.is_empty() {
            self.work.notify_one();
        }
        drop(state);
        completion(operation, result)
    }
}

/// Bytes transferred, or a negative errno.
fn transfer(file: &File, operation: &mut Operation) -> i64 {
    let Ok(offset) = libc::off_t::try_from(operation.offset) else { return -i64::from(libc::EINVAL) };
    let (start, len) = (operation.buffer.start().as_ptr(), operation.buffer.len());
    for _ in 0..TRANSFER_RETRIES_MAX {
        let done = match operation.kind {
            // SAFETY: the operation owns the buffer's `len` bytes, and this thread has it until the
            // call returns.
            Kind::Read => unsafe { libc::pread(file.as_raw_fd(), start.cast(), len, offset) },
            // SAFETY: as above; the bytes are only read.
            Kind::Write => unsafe { libc::pwrite(file.as_raw_fd(), start.cast(), len, offset) },
        };
        if done >= 0 {
            return done as i64;
        }
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        if errno != libc::EINTR && errno != libc::EAGAIN {
            return -i64::from(errno);
        }
    }
    -i64::from(libc::EAGAIN)
}
