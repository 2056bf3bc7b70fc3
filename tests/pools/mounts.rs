//! File systems in memory of their own size. Where none can be mounted (no root, no mounts in this
//! container) a test says so and ends.

use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use kvcellar_block::SlotIndex;
use kvcellar_engine::pool::Pool;

use crate::place::Place;

/// A tmpfs of its own size, unmounted when dropped.
pub(crate) struct Tmpfs {
    pub(crate) path: PathBuf,
    // Dropped after the file system is unmounted.
    _place: Place,
}

impl Tmpfs {
    pub(crate) fn mount(bytes: u64) -> Option<Self> {
        Self::mounted(c"tmpfs", &format!("size={bytes}"))
    }

    /// Huge pages of the usual size; there may be none of them.
    pub(crate) fn huge() -> Option<Self> {
        Self::mounted(c"hugetlbfs", "")
    }

    fn mounted(kind: &CStr, options: &str) -> Option<Self> {
        let place = Place::new();
        let path = place.path().join("small");
        fs::create_dir(&path).expect("made");
        let target = CString::new(path.as_os_str().as_bytes()).expect("no zero in a path");
        let options = CString::new(options).expect("no zero");
        // SAFETY: all strings live through the call and end with a zero; mount keeps none of them.
        let done = unsafe { libc::mount(c"none".as_ptr(), target.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) };
        if done != 0 {
            println!("skipped: no {kind:?} can be mounted here ({})", std::io::Error::last_os_error());
            return None;
        }
        Some(Self { path, _place: place })
    }

    /// Makes what was filled up free again.
    pub(crate) fn empty(&self) {
        fs::remove_file(self.path.join("filler")).expect("it was filled up");
    }

    /// Leaves this many bytes free.
    pub(crate) fn fill_up(&self, leave: u64) {
        let found = nix::sys::statvfs::statvfs(&self.path).expect("it is mounted");
        let free = found.blocks_available() * found.fragment_size();
        fs::write(self.path.join("filler"), vec![1; free.saturating_sub(leave) as usize]).expect("it fits");
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let target = CString::new(self.path.as_os_str().as_bytes()).expect("no zero in a path");
        // SAFETY: the string lives through the call. Detached, so that a pool that is still mapped
        // does not keep it.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

/// Touches every page of every slot: a page that is not there kills the test.
pub(crate) fn touch_all(pool: &Pool) {
    for slot in 0..pool.slot_count() {
        let len = (pool.geometry().slot_bytes - pool.geometry().descriptor_bytes) as usize;
        let start = pool.payload(SlotIndex(slot)).as_ptr();
        // SAFETY: inside the slot's payload; this test owns the pool.
        unsafe { start.write_bytes(0x5a, len) };
    }
}
