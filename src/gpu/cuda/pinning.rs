//! The pool's memory, pinned for the device in pieces and in the background, so that serving starts at once.
//!
//! A piece is `Waiting -> Pinned` or `Waiting -> Refused` and stays so. Pieces that copies wait for go first. When the system has no more memory to pin,
//! what is pinned stays; slots in the rest are copied as ordinary memory, which is slower and never wrong.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::device::Device;
use super::driver::Refused;
use super::notes::Notes;
use crate::block::SlotIndex;
use crate::limits::{PIN_CALL_BYTES_MAX, PIN_THREADS_MAX};
use crate::pool::Pool;

/// Memory may be used in every context of the process.
const REGISTER_PORTABLE: u32 = 1;

/// How a slot's memory can be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pin {
    /// Its piece is not pinned yet.
    Waiting,
    /// The device reaches it directly.
    Pinned,
    /// The system did not pin it: ordinary memory for good.
    Refused,
}

struct Plan {
    /// Pieces that nobody has begun, the next one first.
    waiting: VecDeque<usize>,
    closed: bool,
}

struct Shared {
    pool: Arc<Pool>,
    device: Arc<Device>,
    notes: Arc<Notes>,
    chunk_slots: u32,
    states: Vec<AtomicU8>,
    plan: Mutex<Plan>,
    pinned_bytes: AtomicU64,
    started: Instant,
}

/// The pinning of one pool in this process. Dropped, it lets go of all memory: no copy may be under way then.
pub struct Pinning {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pinning {
    /// Begins to pin the pool's slots. Without a thread (the system refused one) everything stays ordinary memory.
    pub fn start(pool: Arc<Pool>, device: Arc<Device>, notes: Arc<Notes>, chunk_bytes: u64) -> Self {
        let chunk_slots = chunk_slots(chunk_bytes, pool.geometry().slot_bytes);
        let chunks = pool.slot_count().div_ceil(chunk_slots) as usize;
        let shared = Arc::new(Shared {
            pool,
            device,
            notes,
            chunk_slots,
            states: (0..chunks).map(|_| AtomicU8::new(Pin::Waiting as u8)).collect(),
            plan: Mutex::new(Plan { waiting: (0..chunks).collect(), closed: false }),
            pinned_bytes: AtomicU64::new(0),
            started: Instant::now(),
        });
        let count = thread::available_parallelism().map_or(1, |cores| cores.get() / 4).clamp(1, PIN_THREADS_MAX);
        let threads: Vec<JoinHandle<()>> = (0..count.min(chunks))
            .filter_map(|number| {
                let shared = Arc::clone(&shared);
                thread::Builder::new().name(format!("kvcellar-pin-{number}")).spawn(move || shared.run()).ok()
            })
            .collect();
        if threads.is_empty() {
            shared.give_up("the system starts no thread");
        }
        Self { shared, threads }
    }

    /// How this slot can be copied now.
    pub fn state(&self, slot: SlotIndex) -> Pin {
        self.shared.state((slot.0 / self.shared.chunk_slots) as usize)
    }

    /// A copy waits for this slot: its piece is the next one.
    pub fn urge(&self, slot: SlotIndex) {
        let chunk = (slot.0 / self.shared.chunk_slots) as usize;
        let mut plan = self.shared.lock();
        if let Some(at) = plan.waiting.iter().position(|waiting| *waiting == chunk)
            && at > 0
        {
            plan.waiting.remove(at);
            plan.waiting.push_front(chunk);
        }
    }

    /// Bytes pinned so far, and bytes of all slots.
    pub fn progress(&self) -> (u64, u64) {
        (self.shared.pinned_bytes.load(Ordering::Relaxed), self.shared.total())
    }
}

impl Drop for Pinning {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        for thread in self.threads.drain(..) {
            // A thread that panicked pins nothing more.
            drop(thread.join());
        }
        let shared = &self.shared;
        let unpin = || {
            for chunk in (0..shared.states.len()).filter(|chunk| shared.state(*chunk) == Pin::Pinned) {
                let (start, _) = shared.range(chunk);
                // SAFETY: pinned by us as this very range, still mapped, and its owner promises that no copy is under way.
                let code = unsafe { (shared.device.driver.functions.cuMemHostUnregister)(start) };
                shared.device.driver.check("cuMemHostUnregister", code)?;
            }
            Ok(())
        };
        // A driver that refuses has lost its context; the kernel unpins the memory with the process.
        let _gone = shared.device.with(unpin);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self, chunk: usize) -> Pin {
        match self.states[chunk].load(Ordering::Acquire) {
            1 => Pin::Pinned,
            2 => Pin::Refused,
            _ => Pin::Waiting,
        }
    }

    fn total(&self) -> u64 {
        u64::from(self.pool.slot_count()) * self.pool.geometry().slot_bytes
    }

    /// A piece's memory: whole slots.
    fn range(&self, chunk: usize) -> (*mut c_void, usize) {
        let first = chunk as u32 * self.chunk_slots;
        let slots = self.chunk_slots.min(self.pool.slot_count() - first);
        let len = slots as usize * self.pool.geometry().slot_bytes as usize;
        // SAFETY: the slots lie inside the pool's mapping, one after another.
        (unsafe { self.pool.start().add(self.pool.image_offset(SlotIndex(first))) }.as_ptr().cast(), len)
    }

    fn next(&self) -> Option<usize> {
        let mut plan = self.lock();
        if plan.closed { None } else { plan.waiting.pop_front() }
    }

    fn run(&self) {
        self.device.stay_out_of_captures();
        while let Some(chunk) = self.next() {
            match self.pin(chunk) {
                Ok(len) => {
                    self.states[chunk].store(Pin::Pinned as u8, Ordering::Release);
                    self.tell_progress(len as u64);
                }
                Err(refused) => {
                    self.states[chunk].store(Pin::Refused as u8, Ordering::Release);
                    self.give_up(&refused.to_string());
                }
            }
        }
    }

    fn pin(&self, chunk: usize) -> Result<usize, Refused> {
        let (start, len) = self.range(chunk);
        // SAFETY: the range lies inside the mapping, which `self.pool` keeps; it is unpinned before that is dropped.
        let register = || unsafe { (self.device.driver.functions.cuMemHostRegister_v2)(start, len, REGISTER_PORTABLE) };
        self.device.with(|| self.device.driver.check("cuMemHostRegister", register())).map(|()| len)
    }

    /// What nobody has begun stays ordinary memory.
    fn give_up(&self, why: &str) {
        let rest: Vec<usize> = self.lock().waiting.drain(..).collect();
        for chunk in rest {
            self.states[chunk].store(Pin::Refused as u8, Ordering::Release);
        }
        self.notes.push(format!(
            "{} of the pool's {} GiB are pinned, the rest is copied as ordinary memory, which is slower ({why}). Raise the limit on locked memory (ulimit -l \
             unlimited, docker --ulimit memlock=-1) and the container's memory limit, or lower dram_size",
            gib(self.pinned_bytes.load(Ordering::Relaxed)),
            gib(self.total()),
        ));
    }

    fn tell_progress(&self, len: u64) {
        let total = self.total();
        let before = self.pinned_bytes.fetch_add(len, Ordering::Relaxed);
        let quarter = |bytes: u64| u128::from(bytes) * 4 / u128::from(total.max(1));
        if quarter(before) != quarter(before + len) {
            let seconds = self.started.elapsed().as_secs_f64();
            self.notes.push(format!("pinned {} of {} GiB after {seconds:.1} s", gib(before + len), gib(total)));
        }
    }
}

/// Slots of one piece.
fn chunk_slots(chunk_bytes: u64, slot_bytes: u64) -> u32 {
    (chunk_bytes.min(PIN_CALL_BYTES_MAX) / slot_bytes.max(1)).clamp(1, u64::from(u32::MAX)) as u32
}

fn gib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::PIN_CHUNK_BYTES;

    #[test]
    fn pieces_hold_whole_slots_and_no_more_than_the_driver_takes() {
        for slot_bytes in [8192, 1 << 20, (3 << 20) + 4096, PIN_CHUNK_BYTES, 3 * PIN_CHUNK_BYTES] {
            let slots = u64::from(chunk_slots(PIN_CHUNK_BYTES, slot_bytes));
            assert!(slots >= 1);
            assert!(slots * slot_bytes <= PIN_CHUNK_BYTES.max(slot_bytes) && slot_bytes <= PIN_CALL_BYTES_MAX);
        }
    }
}
