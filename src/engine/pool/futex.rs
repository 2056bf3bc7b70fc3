//! Waiting on a 32-bit word of shared memory, across processes.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Sleeps while `word` holds `value`, at most for `patience`. May wake early: the caller looks at
/// the word again.
pub fn wait(word: &AtomicU32, value: u32, patience: Duration) {
    let patience = libc::timespec { tv_sec: patience.as_secs().cast_signed(), tv_nsec: patience.subsec_nanos().into() };
    // SAFETY: the word is valid for the call (a reference), the timeout is a local, and the kernel
    // only reads both. Not FUTEX_PRIVATE: other processes wake us. Errors (woken early, value
    // changed, timed out) all mean "look again".
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const patience) };
}

/// Wakes everybody who waits on `word`.
pub fn wake(word: &AtomicU32) {
    // SAFETY: as above; the kernel uses the address as a name only.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}
