//! The idle hasher: gives filled slots the checksum without which no later engine adopts them.
//!
//! It runs at low priority, one slot at a time, only while nothing waits to be copied. A slot that
//! is taken again meanwhile is left alone: its copy waits for the hash of that one slot
//! (microseconds), so that the hasher never reads bytes that are being written.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::checksum;
use crate::limits::HASH_QUEUE_MAX;
use crate::pool::Pool;
use kvcellar_block::SlotIndex;
use kvcellar_block::plan::BlockCopy;

/// Which slot is being hashed: 0 for none, else slot + 1.
#[derive(Debug, Default)]
pub struct HashGuard {
    current: AtomicU64,
}

impl HashGuard {
    /// Copier: waits while the hasher reads this very slot.
    pub fn wait_until_free(&self, slot: SlotIndex) {
        while self.is_reading(slot) {
            thread::yield_now();
        }
    }

    /// Whether the hasher reads this very slot now.
    pub fn is_reading(&self, slot: SlotIndex) -> bool {
        // SeqCst pairs with `enter`: either the hasher sees the slot's new generation, or we see
        // that it is at work.
        self.current.load(Ordering::SeqCst) == u64::from(slot.0) + 1
    }

    fn enter(&self, slot: SlotIndex) {
        self.current.store(u64::from(slot.0) + 1, Ordering::SeqCst);
    }

    fn leave(&self) {
        self.current.store(0, Ordering::SeqCst);
    }
}

#[derive(Debug, Default)]
struct HashQueue {
    waiting: VecDeque<BlockCopy>,
    closed: bool,
}

#[derive(Debug)]
struct HasherState {
    pool: Arc<Pool>,
    rank: usize,
    guard: Arc<HashGuard>,
    queue: Mutex<HashQueue>,
    wake: Condvar,
    busy: Box<dyn BusyProbe>,
}

/// Tells whether copies wait. Its own trait so that the hasher needs no copier.
pub trait BusyProbe: Send + Sync + std::fmt::Debug {
    /// Copies are waiting or running: hash later.
    fn busy(&self) -> bool;
}

/// One rank's hasher thread.
#[derive(Debug)]
pub struct IdleHasher {
    shared: Arc<HasherState>,
    thread: Option<JoinHandle<()>>,
}

impl IdleHasher {
    /// Starts the thread. Without one (the system refused) nothing is hashed, and nothing adopted
    /// later.
    pub fn start(pool: Arc<Pool>, rank: usize, guard: Arc<HashGuard>, busy: Box<dyn BusyProbe>) -> Self {
        let shared = Arc::new(HasherState { pool, rank, guard, queue: Mutex::default(), wake: Condvar::new(), busy });
        let worker = Arc::clone(&shared);
        let thread = thread::Builder::new().name("kvcellar-hash".to_owned()).spawn(move || worker.run()).ok();
        Self { shared, thread }
    }

    /// Hash this rank's part of a slot when there is time.
    pub fn push(&self, copy: BlockCopy) {
        let mut queue = self.shared.lock();
        if queue.waiting.len() < HASH_QUEUE_MAX {
            queue.waiting.push_back(copy);
            self.shared.wake.notify_one();
        }
    }

    /// Slots that wait to be hashed.
    pub fn waiting(&self) -> usize {
        self.shared.lock().waiting.len()
    }
}

impl Drop for IdleHasher {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panicked hasher leaves slots without checksum, which is safe.
            drop(thread.join());
        }
    }
}

impl HasherState {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        // SAFETY: takes integers only; who = 0 means the calling thread on Linux. Failure leaves
        // the priority as it is.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
        loop {
            let mut queue = self.lock();
            let copy = loop {
                if queue.closed {
                    return;
                }
                match queue.waiting.pop_front() {
                    Some(copy) => break copy,
                    None => queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(queue);
            while self.busy.busy() && !self.lock().closed {
                thread::sleep(Duration::from_millis(2));
            }
            self.hash(copy);
        }
    }

    fn hash(&self, copy: BlockCopy) {
        let slot = SlotIndex(copy.slot);
        let (offset, len) = self.pool.geometry().parts[self.rank].spans[copy.group as usize];
        self.guard.enter(slot);
        if self.pool.line(slot).may_hash(copy.generation) {
            // SAFETY: the span lies inside the slot's payload and the pool stays mapped through
            // `self.pool`. The part was written for this generation; before this rank writes it
            // again its copier waits for the guard.
            let bytes = unsafe {
                std::slice::from_raw_parts(self.pool.payload(slot).as_ptr().add(offset as usize), len as usize)
            };
            let sum = checksum::of(bytes);
            self.pool.set_checksum(slot, self.rank, copy.generation, sum);
        }
        self.guard.leave();
    }
}
