//! Shared memory mapped from a file, and the populating of its pages.

use std::fs::File;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use memmap2::{MmapOptions, MmapRaw};

use super::placement;
use crate::error::{Error, Result};
use crate::limits;

const REMEDY: &str = "Lower dram_size, or give /dev/shm and the container more memory";

/// A shared, writable mapping of a whole file.
#[derive(Debug)]
pub struct Mapping {
    raw: MmapRaw,
}

impl Mapping {
    /// Maps all of `file`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::DataLost`] for a file that does not even hold a header.
    pub fn of(file: &File, path: &Path) -> Result<Self> {
        let raw =
            MmapOptions::new().map_raw(file).map_err(|error| Error::io("mapping the pool", path, error, REMEDY))?;
        if (raw.len() as u64) < limits::HEADER_BYTES {
            return Err(Error::lost("pool file", format!("{} is too short", path.display())));
        }
        Ok(Self { raw })
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.raw.len()
    }

    /// Never true: a mapping holds at least a header.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Address of `len` bytes at `offset`.
    ///
    /// # Panics
    /// When the range passes the mapping's end: that is a bug of the caller, and going on would corrupt memory.
    #[inline]
    #[expect(clippy::panic, reason = "an address outside the pool must never be handed out")]
    pub fn at(&self, offset: usize, len: usize) -> NonNull<u8> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.raw.len());
        match NonNull::new(self.raw.as_mut_ptr().wrapping_add(offset)) {
            Some(address) if inside => address,
            _ => panic!("pool offset {offset} + {len} passes its end {}", self.raw.len()),
        }
    }

    /// Says where pages of the file that are not there yet shall lie: near these memory nodes, or everywhere if none is named.
    pub fn place(&self, near: &[u32]) {
        placement::place(self.at(0, self.len()), self.len(), near);
    }

    /// Populates all pages for writing, in chunks on several threads. Pages that are there stay as they are.
    ///
    /// `progress(done, total)` is called from this thread, in bytes.
    ///
    /// # Errors
    /// [`Error::Io`] when the system has no memory for a page: the mapping must then not be used.
    pub fn populate(&self, path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let total = self.len();
        placement::prefer_huge_pages(self.at(0, total), total);
        let chunks = total.div_ceil(limits::POPULATE_CHUNK_BYTES);
        let threads = thread::available_parallelism().map_or(1, usize::from).min(16).min(chunks);
        let next = AtomicUsize::new(0);
        let failure: Mutex<Option<std::io::Error>> = Mutex::new(None);
        let (done_tx, done_rx) = mpsc::channel();
        thread::scope(|scope| {
            for _ in 0..threads {
                let done_tx = done_tx.clone();
                let (next, failure) = (&next, &failure);
                scope.spawn(move || {
                    loop {
                        let start = next.fetch_add(1, Ordering::Relaxed) * limits::POPULATE_CHUNK_BYTES;
                        if start >= total {
                            return;
                        }
                        let len = limits::POPULATE_CHUNK_BYTES.min(total - start);
                        if let Err(error) = self.populate_range(start, len) {
                            // Let the other threads run out of chunks.
                            next.store(chunks, Ordering::Relaxed);
                            *failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
                            return;
                        }
                        // A closed channel only means that nobody looks at the progress any more.
                        let _nobody_looks = done_tx.send(len as u64);
                    }
                });
            }
            drop(done_tx);
            let mut done = 0;
            for len in done_rx {
                done += len;
                progress(done, total as u64);
            }
        });
        match failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some(error) => Err(Error::io("populating the pool", path, error, REMEDY)),
            None => Ok(()),
        }
    }

    fn populate_range(&self, start: usize, len: usize) -> std::io::Result<()> {
        let address = self.at(start, len);
        // SAFETY: the range lies inside this mapping, which outlives the call; populating does not change what the pages hold.
        let result = unsafe { libc::madvise(address.as_ptr().cast(), len, libc::MADV_POPULATE_WRITE) };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }
}
