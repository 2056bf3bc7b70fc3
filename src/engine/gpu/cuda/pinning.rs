//! The pool's memory, pinned for the device in pieces and in the background, so that serving starts
//! at once.
//!
//! A piece is `Waiting -> Pinned` or `Waiting -> Refused` and stays so. Several neighbours are
//! pinned by one call; a call that the driver refuses is tried again in halves, for large ones fail
//! where smaller ones do not. Pieces that copies wait for go first. When the system pins no more,
//! what is pinned stays; slots in the rest are copied as ordinary memory, which is slower and never
//! wrong. One thread: while the driver pins, other calls of the process wait.
//!
//! Unpinning takes as long as pinning did, and a stopping process has no time for it: dropping a
//! pinning leaves it to a thread that keeps the memory mapped meanwhile. A process that ends takes
//! both with it; one that lives on waits by [`settle`] before it maps the pool again.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::device::Device;
use super::notes::Notes;
use crate::limits::{PIN_CALL_BYTES_MAX, UNPIN_EXIT_MS};
use crate::pool::{self, Pool};
use kvcellar_block::SlotIndex;

/// Memory may be used in every context of the process, and by kernels.
pub(super) const REGISTER_PORTABLE_MAPPED: u32 = 3;

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

struct PinningPlan {
    /// Neighbouring pieces that nobody has begun, the next call's first.
    waiting: VecDeque<Range<usize>>,
    /// What each call has pinned.
    pinned: Vec<Range<usize>>,
    closed: bool,
}

struct PinningState {
    pool: Arc<Pool>,
    device: Arc<Device>,
    notes: Arc<Notes>,
    piece_slots: u32,
    states: Vec<AtomicU8>,
    plan: Mutex<PinningPlan>,
    pinned_bytes: AtomicU64,
    started: Instant,
}

/// [`stop_unpinning`] is registered once.
static AT_EXIT: Once = Once::new();

/// No further piece is unpinned.
static STOPPING: AtomicBool = AtomicBool::new(false);

/// Threads that unpin what was let go of. Bounded by the pools that this process has had.
static UNPINNING: Mutex<Vec<JoinHandle<()>>> = Mutex::new(Vec::new());

/// Waits until everything that was let go of in this process is unpinned and unmapped.
pub fn settle() {
    let threads = std::mem::take(&mut *unpinning());
    for thread in threads {
        // One that panicked unpins nothing more; the kernel does at the process's end.
        drop(thread.join());
    }
}

/// The process ends, and the kernel will unpin all: no thread of ours is in the driver when that is
/// taken down.
extern "C" fn stop_unpinning() {
    STOPPING.store(true, Ordering::Release);
    let deadline = Instant::now() + Duration::from_millis(UNPIN_EXIT_MS);
    while unpinning().iter().any(|thread| !thread.is_finished()) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
}

fn unpinning() -> MutexGuard<'static, Vec<JoinHandle<()>>> {
    UNPINNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The pinning of one pool in this process. Dropped, it lets go of all memory, in the background:
/// no copy may be under way then.
pub struct Pinning {
    shared: Arc<PinningState>,
    thread: Option<JoinHandle<()>>,
}

impl Pinning {
    /// Begins to pin the pool's slots: `chunk_bytes` at once, or `piece_bytes` at least. Without a
    /// thread (the system refused one) everything stays ordinary memory. Waits for what an earlier
    /// pinning let go of: memory that is still pinned for that one is not ordinary, and must not be
    /// taken for it.
    pub fn start(pool: Arc<Pool>, device: Arc<Device>, notes: Arc<Notes>, chunk_bytes: u64, piece_bytes: u64) -> Self {
        settle();
        let slot_bytes = pool.geometry().slot_bytes;
        let piece_slots = piece_slots(piece_bytes.min(chunk_bytes), slot_bytes, pool::system_page_bytes());
        let at_once = (slots_in(chunk_bytes, slot_bytes) / piece_slots).max(1) as usize;
        let pieces = pool.slot_count().div_ceil(piece_slots) as usize;
        let waiting = (0..pieces).step_by(at_once).map(|first| first..pieces.min(first + at_once)).collect();
        let shared = Arc::new(PinningState {
            pool,
            device,
            notes,
            piece_slots,
            states: (0..pieces).map(|_| AtomicU8::new(Pin::Waiting as u8)).collect(),
            plan: Mutex::new(PinningPlan { waiting, pinned: Vec::new(), closed: false }),
            pinned_bytes: AtomicU64::new(0),
            started: Instant::now(),
        });
        let working = Arc::clone(&shared);
        let thread = thread::Builder::new().name("kvcellar-pin".to_owned()).spawn(move || working.run()).ok();
        if thread.is_none() {
            shared.give_up("the system starts no thread");
        }
        Self { shared, thread }
    }

    /// How this slot can be copied now.
    pub fn state(&self, slot: SlotIndex) -> Pin {
        self.shared.state((slot.0 / self.shared.piece_slots) as usize)
    }

    /// A copy waits for this slot: its piece is among the next ones.
    pub fn urge(&self, slot: SlotIndex) {
        let piece = (slot.0 / self.shared.piece_slots) as usize;
        let mut plan = self.shared.lock();
        if let Some(at) = plan.waiting.iter().position(|waiting| waiting.contains(&piece))
            && at > 0
            && let Some(wanted) = plan.waiting.remove(at)
        {
            plan.waiting.push_front(wanted);
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
        let (shared, pinning) = (Arc::clone(&self.shared), self.thread.take());
        // Where it is refused, the driver may meet a thread of ours when it is taken down.
        AT_EXIT.call_once(|| {
            // SAFETY: the function may run at any time and does not unwind.
            let _refused = unsafe { libc::atexit(stop_unpinning) };
        });
        let mut threads = unpinning();
        threads.retain(|thread| !thread.is_finished());
        let unpin = move || shared.unpin(pinning);
        match thread::Builder::new().name("kvcellar-unpin".to_owned()).spawn(unpin) {
            Ok(thread) => threads.push(thread),
            // What is pinned must stay mapped: until the process ends.
            Err(_) => std::mem::forget(Arc::clone(&self.shared)),
        }
    }
}

impl PinningState {
    fn lock(&self) -> MutexGuard<'_, PinningPlan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self, piece: usize) -> Pin {
        match self.states[piece].load(Ordering::Acquire) {
            1 => Pin::Pinned,
            2 => Pin::Refused,
            _ => Pin::Waiting,
        }
    }

    fn set(&self, pieces: Range<usize>, state: Pin) {
        self.states[pieces].iter().for_each(|it| it.store(state as u8, Ordering::Release));
    }

    fn total(&self) -> u64 {
        u64::from(self.pool.slot_count()) * self.pool.geometry().slot_bytes
    }

    /// The memory of some pieces: whole slots.
    fn memory(&self, pieces: &Range<usize>) -> (*mut c_void, usize) {
        let first = pieces.start as u32 * self.piece_slots;
        let end = (pieces.end as u64 * u64::from(self.piece_slots)).min(u64::from(self.pool.slot_count()));
        let len = (end - u64::from(first)) as usize * self.pool.geometry().slot_bytes as usize;
        // SAFETY: the slots lie inside the pool's mapping, one after another.
        (unsafe { self.pool.start().add(self.pool.image_offset(SlotIndex(first))) }.as_ptr().cast(), len)
    }

    /// Unpins what was pinned, once the thread that pins has ended. The memory is unmapped by
    /// whoever lets go of it last.
    fn unpin(&self, pinning: Option<JoinHandle<()>>) {
        if let Some(thread) = pinning {
            // A thread that panicked pins nothing more.
            drop(thread.join());
        }
        let pinned = std::mem::take(&mut self.lock().pinned);
        let unpin = || {
            for pieces in pinned.iter().take_while(|_| !STOPPING.load(Ordering::Acquire)) {
                let (start, _) = self.memory(pieces);
                // SAFETY: pinned by us as this very range; `self.pool` keeps it mapped; no copy is
                // under way any more, as the owner of the `Pinning` promised.
                let code = unsafe { (self.device.driver.functions.cuMemHostUnregister)(start) };
                self.device.driver.check("cuMemHostUnregister", code)?;
            }
            Ok(())
        };
        // A driver that refuses has lost its context; the kernel unpins the memory with the
        // process.
        let _gone = self.device.with(unpin);
    }

    fn next(&self) -> Option<Range<usize>> {
        let mut plan = self.lock();
        if plan.closed { None } else { plan.waiting.pop_front() }
    }

    fn run(&self) {
        // What cannot begin is said like any other refusal, by the first piece.
        let _began = self.device.with(|| {
            self.device.stay_out_of_captures();
            while let Some(pieces) = self.next() {
                self.pin(pieces);
            }
            Ok(())
        });
        if !self.lock().closed && !self.lock().waiting.is_empty() {
            self.give_up("the device's context is gone");
        }
    }

    fn pin(&self, pieces: Range<usize>) {
        let (start, len) = self.memory(&pieces);
        let driver = self.device.driver;
        // SAFETY: the range lies inside the mapping, which `self.pool` keeps; it is unpinned before
        // that is dropped.
        let code = unsafe { (driver.functions.cuMemHostRegister_v2)(start, len, REGISTER_PORTABLE_MAPPED) };
        match driver.check("cuMemHostRegister", code) {
            Ok(()) => {
                self.lock().pinned.push(pieces.clone());
                self.set(pieces, Pin::Pinned);
                self.tell_progress(len as u64);
            }
            Err(_) if pieces.len() > 1 => {
                let middle = pieces.start + pieces.len() / 2;
                let mut plan = self.lock();
                plan.waiting.push_front(middle..pieces.end);
                plan.waiting.push_front(pieces.start..middle);
            }
            Err(refused) => {
                self.set(pieces, Pin::Refused);
                self.give_up(&refused.to_string());
            }
        }
    }

    /// What nobody has begun stays ordinary memory.
    fn give_up(&self, why: &str) {
        let rest: Vec<Range<usize>> = self.lock().waiting.drain(..).collect();
        for pieces in rest {
            self.set(pieces, Pin::Refused);
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

/// Slots in so many bytes: at least one.
fn slots_in(bytes: u64, slot_bytes: u64) -> u32 {
    (bytes.min(PIN_CALL_BYTES_MAX) / slot_bytes.max(1)).clamp(1, u64::from(u32::MAX)) as u32
}

/// Slots of one piece: whole pages of the system, so that no page belongs to two pieces. The first
/// slot begins on a page.
fn piece_slots(piece_bytes: u64, slot_bytes: u64, page_bytes: u64) -> u32 {
    // Slots are multiples of a power of two, and so is a page: this many of them end on a page.
    let whole = (page_bytes >> slot_bytes.trailing_zeros()).max(1) as u32;
    slots_in(piece_bytes, slot_bytes).next_multiple_of(whole)
}

fn gib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{PIN_CHUNK_BYTES, PIN_PIECE_BYTES};

    #[test]
    fn no_page_belongs_to_two_pieces() {
        for page_bytes in [4096, 16_384, 65_536] {
            for slot_bytes in [8192, 12_288, 1 << 20, (3 << 20) + 4096, 40 << 20] {
                let slots = piece_slots(PIN_PIECE_BYTES, slot_bytes, page_bytes);
                assert_eq!(u64::from(slots) * slot_bytes % page_bytes, 0, "{slots} slots of {slot_bytes}");
                assert!(u64::from(slots) * slot_bytes <= PIN_PIECE_BYTES.max(slot_bytes) + 16 * slot_bytes);
            }
        }
        assert_eq!(piece_slots(100 << 10, 12_288, 4096), 8, "ordinary pages change nothing");
    }

    #[test]
    fn pieces_hold_whole_slots_and_no_more_than_the_driver_takes() {
        for slot_bytes in [8192, 1 << 20, (3 << 20) + 4096, PIN_CHUNK_BYTES, 3 * PIN_CHUNK_BYTES] {
            let slots = u64::from(slots_in(PIN_CHUNK_BYTES, slot_bytes));
            assert!(slots >= 1);
            assert!(slots * slot_bytes <= PIN_CHUNK_BYTES.max(slot_bytes) && slot_bytes <= PIN_CALL_BYTES_MAX);
        }
    }
}
