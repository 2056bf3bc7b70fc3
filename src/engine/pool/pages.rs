//! How a pool's pages come to be there before anyone uses them.
//!
//! Promises: afterwards no access faults for want of memory; what cannot be had is an error, never
//! a SIGBUS; contents stay. Where the kernel does not populate (before 5.14, gVisor, a seccomp
//! profile) pages are allocated through the file and touched, and where it does not allocate
//! either, a byte of each is read and written back through the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use nix::fcntl::{FallocateFlags, fallocate};

use super::mapping::Mapping;
use super::placement;
use crate::limits::POPULATE_CHUNK_BYTES;
use kvcellar_block::error::{Error, Result};

const NO_MEMORY: &str = "Lower dram_size, or give the pool_dir's file system and the container more memory";
const REFUSED: &str = "Allow madvise and fallocate in the container's seccomp profile, or set pool_dir to a tmpfs";

/// Ways to get pages, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Means {
    /// The kernel populates the mapping.
    Populate = 0,
    /// The file allocates, and each page is touched.
    Allocate = 1,
    /// A byte of each page is read and written back through the file. Nobody else may write
    /// meanwhile.
    Rewrite = 2,
}

impl Means {
    fn of(number: u8) -> Self {
        match number {
            0 => Self::Populate,
            1 => Self::Allocate,
            _ => Self::Rewrite,
        }
    }

    fn next(self) -> Option<Self> {
        match self {
            Self::Populate => Some(Self::Allocate),
            Self::Allocate => Some(Self::Rewrite),
            Self::Rewrite => None,
        }
    }

    fn get(self, map: &Mapping, file: &File, start: usize, len: usize) -> io::Result<()> {
        match self {
            Self::Populate => populate(map, start, len),
            Self::Allocate => {
                allocate(file, start, len)?;
                touch_range(map, start, len);
                Ok(())
            }
            Self::Rewrite => rewrite(file, start, len),
        }
    }
}

/// Makes every page of the mapping exist. For the pool's owner, while nobody else writes.
///
/// `progress(done, total)` is called from this thread, in bytes.
///
/// # Errors
/// [`Error::Io`] when the system has no memory for a page: the mapping must then not be used.
pub fn fill(map: &Mapping, file: &File, path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Means> {
    placement::prefer_huge_pages(map.at(0, map.len()), map.len());
    let means = AtomicU8::new(Means::Populate as u8);
    let get = |start, len| loop {
        let way = Means::of(means.load(Ordering::Relaxed));
        match (way.get(map, file, start, len), way.next()) {
            (Err(error), Some(next)) if is_refusal(&error) => {
                means.fetch_max(next as u8, Ordering::Relaxed);
            }
            (outcome, _) => return outcome,
        }
    };
    in_chunks(map.len(), progress, &get).map_err(|error| {
        let remedy = if is_refusal(&error) { REFUSED } else { NO_MEMORY };
        Error::io("populating the pool", path, error, remedy)
    })?;
    Ok(Means::of(means.into_inner()))
}

/// Maps pages that exist into this process. Refused, accesses fault as they come.
pub fn touch(map: &Mapping) {
    // What is refused is slower and nothing else.
    drop(in_chunks(map.len(), &mut |_, _| (), &|start, len| populate(map, start, len)));
}

/// Why this kernel does not populate; `None`: it does.
pub fn refusal() -> Option<io::Error> {
    let page = memmap2::MmapMut::map_anon(super::system_page_bytes() as usize);
    page.and_then(|page| advise_populate(page.as_ptr().cast_mut(), page.len())).err()
}

/// The kernel or a filter does not know this call, as opposed to having no memory.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM | libc::ENOSYS | libc::EOPNOTSUPP | libc::EACCES))
}

/// Works through `total` bytes on several threads, until one fails.
fn in_chunks(
    total: usize,
    progress: &mut dyn FnMut(u64, u64),
    work: &(dyn Fn(usize, usize) -> io::Result<()> + Sync),
) -> io::Result<()> {
    let chunks = total.div_ceil(POPULATE_CHUNK_BYTES);
    let threads = thread::available_parallelism().map_or(1, usize::from).min(16).min(chunks);
    let next = AtomicUsize::new(0);
    let failure: Mutex<Option<io::Error>> = Mutex::new(None);
    let (done_tx, done_rx) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..threads {
            let done_tx = done_tx.clone();
            let (next, failure) = (&next, &failure);
            scope.spawn(move || {
                loop {
                    let start = next.fetch_add(1, Ordering::Relaxed) * POPULATE_CHUNK_BYTES;
                    if start >= total {
                        return;
                    }
                    let len = POPULATE_CHUNK_BYTES.min(total - start);
                    if let Err(error) = work(start, len) {
                        // Let the other threads run out of chunks.
                        next.store(chunks, Ordering::Relaxed);
                        *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
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
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

fn populate(map: &Mapping, start: usize, len: usize) -> io::Result<()> {
    advise_populate(map.at(start, len).as_ptr(), len)
}

/// Populates `len` mapped bytes at `address`; no other address is read or written.
fn advise_populate(address: *mut u8, len: usize) -> io::Result<()> {
    repeat_interrupted(|| {
        // SAFETY: the range is a mapping that the caller keeps for the call; populating does not
        // change what pages hold.
        let result = unsafe { libc::madvise(address.cast(), len, libc::MADV_POPULATE_WRITE) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    })
}

fn allocate(file: &File, start: usize, len: usize) -> io::Result<()> {
    repeat_interrupted(|| {
        fallocate(file, FallocateFlags::empty(), start.cast_signed() as libc::off_t, len.cast_signed() as libc::off_t)
            .map_err(io::Error::from)
    })
}

/// Reads a byte of each page, which exists.
fn touch_range(map: &Mapping, start: usize, len: usize) {
    let step = super::system_page_bytes() as usize;
    for offset in (start..start + len).step_by(step) {
        // SAFETY: inside the mapping, whose pages the file has allocated; volatile, so that it
        // happens. Whoever writes the byte meanwhile is not disturbed, and what is read is not
        // used.
        unsafe { map.at(offset, 1).as_ptr().read_volatile() };
    }
}

fn rewrite(file: &File, start: usize, len: usize) -> io::Result<()> {
    let mut byte = [0];
    for offset in (start..start + len).step_by(super::system_page_bytes() as usize) {
        file.read_exact_at(&mut byte, offset as u64)?;
        file.write_all_at(&byte, offset as u64)?;
    }
    Ok(())
}

fn repeat_interrupted(mut call: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const LEN: usize = 300 * 4096;

    fn file() -> File {
        let file = tempfile::tempfile_in("/dev/shm").expect("a file");
        file.set_len(LEN as u64).expect("grown");
        file
    }

    #[test]
    fn every_way_makes_all_pages_exist_and_keeps_what_they_hold() {
        for means in [Means::Populate, Means::Allocate, Means::Rewrite] {
            let file = file();
            file.write_all_at(b"kept", 5 * 4096).expect("written");
            let map = Mapping::of(&file, Path::new("test")).expect("mapped");
            if let Err(error) = means.get(&map, &file, 0, LEN) {
                assert!(means == Means::Populate && is_refusal(&error), "{means:?}: {error}");
                println!("skipped: this kernel does not populate");
                continue;
            }
            assert_eq!(file.metadata().expect("looked at").blocks() * 512, LEN as u64, "{means:?}");
            let mut found = [0; 4];
            file.read_exact_at(&mut found, 5 * 4096).expect("read");
            assert_eq!(&found, b"kept", "{means:?}");
        }
    }

    #[test]
    fn refusals_and_want_of_memory_are_told_apart() {
        for errno in [libc::EINVAL, libc::EPERM, libc::ENOSYS, libc::EOPNOTSUPP] {
            assert!(is_refusal(&io::Error::from_raw_os_error(errno)));
        }
        for errno in [libc::ENOSPC, libc::ENOMEM, libc::EFAULT, libc::EIO] {
            assert!(!is_refusal(&io::Error::from_raw_os_error(errno)));
        }
    }
}
