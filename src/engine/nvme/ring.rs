//! A disk on `io_uring`: one thread that owns the ring, fixed files, and fixed memory where the
//! kernel takes it.
//!
//! Promises what [`super::disk`] asks. The thread sleeps in the kernel when there is nothing to do;
//! a submission wakes it through an eventfd that is polled by the ring itself, so that new work
//! never waits for old work to end. States of an operation: waiting in the queue, in flight (the
//! `Flight` owns it and its memory), completed.
//!
//! When the ring itself fails, everything that the kernel does not hold is completed with the
//! errno, later submissions too. Transfers that the kernel still holds are completed when it ends
//! them. Should it not even do that until the disk is closed, their memory is given up and never
//! completed: handing it back would let someone use memory that the kernel may still write to.

mod driver;
mod flight;
mod kernel;

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};

use nix::sys::eventfd::{EfdFlags, EventFd};

use self::driver::RingDriver;
use self::kernel::Kernel;
use super::buffer::Region;
use super::disk::{Completions, Description, Disk, Operation};
use super::queue::{Depth, Outbox, Queue, SegmentTable, refused};
use super::threads::no_thread;
use crate::limits::RING_STARTED_MAX;
use kvcellar_block::error::{Error, Result};

/// The disk.
pub struct RingDisk {
    shared: Arc<RingShared>,
    thread: Option<JoinHandle<()>>,
    registered: bool,
    why: String,
}

/// What the disk's handle and its thread share.
struct RingShared {
    state: Mutex<RingState>,
    wake: EventFd,
    outbox: Outbox,
}

struct RingState {
    queue: Queue,
    segments: SegmentTable,
    /// The thread waits in the kernel, or is about to: the next submission wakes it.
    sleeping: bool,
    closing: bool,
    /// The ring does not work any more: the errno that said so.
    failed: Option<i32>,
}

/// Whether memory was registered, and if not, why.
type Registration = std::result::Result<(), String>;

impl RingDisk {
    /// Starts the ring and its thread, with at most `bytes_in_flight_max` bytes given to the kernel
    /// at once. Memory of `regions` is registered, if the kernel lets us; the second value tells.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the system refuses `io_uring`; [`Error::DeviceDead`] when it
    /// refuses a thread or an eventfd.
    pub fn start(
        regions: Vec<Arc<dyn Region>>,
        completions: Arc<dyn Completions>,
        bytes_in_flight_max: u64,
    ) -> Result<(Self, bool)> {
        let queue = Queue::new(Depth { operations_max: RING_STARTED_MAX, bytes_max: bytes_in_flight_max });
        let segments = SegmentTable::default();
        let state = Mutex::new(RingState { queue, segments, sleeping: false, closing: false, failed: None });
        let shared = Arc::new(RingShared { state, wake: eventfd()?, outbox: Outbox::new(completions) });
        let (ready, started) = mpsc::sync_channel(1);
        let of_thread = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("kvc-ring".to_owned())
            .spawn(move || run(of_thread, regions, &ready))
            .map_err(|error| no_thread(&error))?;
        match started.recv() {
            Ok(Ok(registration)) => {
                let registered = registration.is_ok();
                let why = registration.err().unwrap_or_default();
                Ok((Self { shared, thread: Some(thread), registered, why }, registered))
            }
            Ok(Err(error)) => Err(unsupported(&error)),
            Err(_) => Err(unsupported(&io::Error::other("its thread ended"))),
        }
    }
}

/// Whether a ring can be made here and does something.
pub(super) fn attempt() -> io::Result<()> {
    Kernel::new().map(drop)
}

/// Why the system refuses `io_uring`, in words.
pub(super) fn why_refused(error: &io::Error) -> String {
    let sysctl = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let switched_off = matches!(sysctl.trim(), "1" | "2");
    match error.raw_os_error() {
        Some(libc::EPERM) if switched_off => {
            format!("the system switched it off (sysctl kernel.io_uring_disabled={})", sysctl.trim())
        }
        Some(libc::EPERM | libc::EACCES) => {
            format!("a security policy (seccomp, as containers have it) refused it: {error}")
        }
        Some(libc::ENOSYS) => format!("the kernel, or the sandbox around it, does not have it: {error}"),
        Some(libc::ENOMEM) => format!("the limit of locked memory is too low for it (ulimit -l): {error}"),
        _ => error.to_string(),
    }
}

fn unsupported(error: &io::Error) -> Error {
    Error::Unsupported {
        what: "io_uring".to_owned(),
        why: why_refused(error),
        remedy: "Allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile and set sysctl \
                 kernel.io_uring_disabled=0, or choose the engine `threads`"
            .to_owned(),
    }
}

fn eventfd() -> Result<EventFd> {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(|errno| {
        Error::DeviceDead {
            device: "the NVMe tier's disk".to_owned(),
            problem: format!("no eventfd could be made: {errno}"),
            remedy: "Raise the limit of open files (ulimit -n)".to_owned(),
        }
    })
}

/// The thread: the ring belongs to it alone, from its making to its end.
fn run(shared: Arc<RingShared>, regions: Vec<Arc<dyn Region>>, ready: &mpsc::SyncSender<io::Result<Registration>>) {
    let made = Kernel::new().map(|mut kernel| {
        let registration = kernel.register(regions);
        (kernel, registration)
    });
    let (kernel, registration) = match made {
        Ok((kernel, registration)) => (Some(kernel), Ok(registration)),
        Err(error) => (None, Err(error)),
    };
    // The one who starts the disk waits for this; it cannot be gone.
    let _ = ready.send(registration);
    if let Some(kernel) = kernel {
        RingDriver::new(kernel, shared).run();
    }
}

impl RingShared {
    fn lock(&self) -> MutexGuard<'_, RingState> {
        // No code that holds the lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gets the thread out of the kernel, if it is there.
    fn wake(&self, mut state: MutexGuard<'_, RingState>) {
        let sleeping = std::mem::take(&mut state.sleeping);
        drop(state);
        if sleeping {
            // It fails only at 2^64 - 1 unread wakes; then the thread is awake anyway.
            let _ = self.wake.write(1);
        }
    }
}

impl Disk for RingDisk {
    fn submit(&self, operations: Vec<Operation>) {
        self.shared.outbox.owe(operations.len());
        let mut state = self.shared.lock();
        state.queue.push_all(operations);
        self.shared.wake(state);
    }

    fn add_segment(&self, file: File) -> Result<u32> {
        let mut state = self.shared.lock();
        if let Some(errno) = state.failed {
            let problem = format!("its ring failed: {}", io::Error::from_raw_os_error(errno));
            return Err(refused(problem, "Start again with the engine `threads`"));
        }
        state.segments.add(file)
    }

    fn describe(&self) -> Description {
        let state = self.shared.lock();
        let why = state.segments.explain(&self.why);
        Description { engine: "io_uring", direct: state.segments.are_direct(), registered: self.registered, why }
    }

    fn in_flight(&self) -> usize {
        self.shared.outbox.owed()
    }
}

impl Drop for RingDisk {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closing = true;
        self.shared.wake(state);
        let Some(thread) = self.thread.take() else { return };
        // The last owner may be a receiver of completions, which runs on the ring's thread: it ends
        // by itself. The thread has no result, and its panic was reported by the panic hook.
        if thread.thread().id() != thread::current().id() {
            let _ = thread.join();
        }
    }
}
