//! The kernel's side of the ring: making it, registering files and memory, entries in and results
//! out.
//!
//! Used by one thread only, the one that made it. Knows nothing of order or bounds.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};

use super::Registration;
use crate::limits::{DISK_SEGMENTS_MAX, REGISTERED_PIECE_BYTES, REGISTERED_PIECES_MAX, RING_ENTRIES};
use crate::nvme::buffer::{Buffer, Region};
use crate::nvme::disk::{Kind, Operation};

/// The name of the wake's entry; operations are named by their slots.
pub(super) const WAKE: u64 = u64::MAX;

/// The ring.
pub(super) struct Kernel {
    ring: IoUring,
    /// The kernel has a table of files for us.
    file_table: bool,
    files: Vec<Target>,
    /// Registered regions, each with the number of its first piece. They are held until the ring is
    /// gone.
    regions: Vec<(Arc<dyn Region>, usize)>,
}

/// How a segment's file is named to the kernel.
#[derive(Debug, Clone, Copy)]
enum Target {
    Fixed(u32),
    Plain(RawFd),
}

impl Kernel {
    /// Makes a ring and tries it: sandboxes exist that allow the making and refuse the rest.
    pub(super) fn new() -> io::Result<Self> {
        let ring = match IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(RING_ENTRIES) {
            // Kernels before 6.1 do not know these.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder().build(RING_ENTRIES)?,
            made => made?,
        };
        let file_table = ring.submitter().register_files_sparse(DISK_SEGMENTS_MAX as u32).is_ok();
        let mut kernel = Self { ring, file_table, files: Vec::new(), regions: Vec::new() };
        kernel.try_out()?;
        Ok(kernel)
    }

    fn try_out(&mut self) -> io::Result<()> {
        // SAFETY: the entry names no memory.
        unsafe { self.push(&opcode::Nop::new().build().user_data(WAKE)) }?;
        while self.unread() == 0 {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        match self.ring.completion().next() {
            Some(entry) if entry.result() < 0 => Err(io::Error::from_raw_os_error(-entry.result())),
            _ => Ok(()),
        }
    }

    fn unread(&mut self) -> usize {
        self.ring.completion().len()
    }

    /// Registers all of `regions`, or says why not.
    pub(super) fn register(&mut self, regions: Vec<Arc<dyn Region>>) -> Registration {
        if regions.is_empty() {
            return Err("no memory was given to be registered".to_owned());
        }
        let mut pieces = Vec::new();
        let firsts: Vec<usize> = regions
            .iter()
            .map(|region| {
                let first = pieces.len();
                pieces.extend(pieces_of(region.as_ref()));
                first
            })
            .collect();
        if pieces.len() > REGISTERED_PIECES_MAX {
            return Err(format!(
                "memory is not registered: its {} pieces are more than the kernel takes",
                pieces.len()
            ));
        }
        // SAFETY: the regions keep the memory mapped; they are held until the ring is dropped.
        unsafe { self.ring.submitter().register_buffers(&pieces) }.map_err(|error| {
            let bytes: usize = regions.iter().map(|region| region.len()).sum();
            not_registered(bytes, &error)
        })?;
        self.regions = regions.into_iter().zip(firsts).collect();
        Ok(())
    }

    /// Makes the next segment's file known. The caller keeps it open until the ring is gone.
    pub(super) fn add_file(&mut self, file: RawFd) {
        let number = self.files.len() as u32;
        let fixed = self.file_table
            && self.ring.submitter().register_files_update(number, &[file]).is_ok_and(|updated| updated == 1);
        self.files.push(if fixed { Target::Fixed(number) } else { Target::Plain(file) });
    }

    pub(super) fn files(&self) -> usize {
        self.files.len()
    }

    /// Puts the transfer of `operation` into the submission queue.
    ///
    /// # Safety
    /// The operation's buffer must stay where it is until the entry's completion was read, or the
    /// entry was found unsubmitted.
    pub(super) unsafe fn push_transfer(&mut self, operation: &Operation, slot: usize) -> io::Result<()> {
        let Some(&target) = self.files.get(operation.segment as usize) else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        let (file, flags) = match target {
            Target::Fixed(number) => (number.cast_signed(), squeue::Flags::FIXED_FILE),
            Target::Plain(fd) => (fd, squeue::Flags::empty()),
        };
        let entry = transfer(types::Fd(file), operation, self.piece(&operation.buffer)).flags(flags);
        // SAFETY: the caller keeps the buffer.
        unsafe { self.push(&entry.user_data(slot as u64)) }
    }

    /// Asks to be woken once `wake` is readable.
    pub(super) fn push_wake(&mut self, wake: &impl AsRawFd) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fd(wake.as_raw_fd()), libc::POLLIN as u32).build().user_data(WAKE);
        // SAFETY: the entry names no memory.
        unsafe { self.push(&entry) }
    }

    /// # Safety
    /// Memory that the entry names must stay until its completion was read.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the caller keeps what the entry names.
        unsafe { self.ring.submission().push(entry) }.map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
    }

    /// Entries that the kernel has not taken: the last ones pushed.
    pub(super) fn unsubmitted(&mut self) -> usize {
        self.ring.submission().len()
    }

    /// Gives the kernel what was pushed and waits until at least `completions` results can be read.
    pub(super) fn submit(&self, completions: usize) -> io::Result<()> {
        self.ring.submit_and_wait(completions).map(drop)
    }

    /// Lets the kernel bring results, without giving it anything.
    pub(super) fn collect(&self) -> io::Result<()> {
        const GETEVENTS: u32 = 1;
        // SAFETY: nothing is submitted, and no argument is passed.
        unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 0, GETEVENTS, None) }.map(drop)
    }

    /// The results that can be read, with their names.
    pub(super) fn results(&mut self) -> Vec<(u64, i32)> {
        self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect()
    }

    /// The registered piece in which all of `buffer` lies.
    fn piece(&self, buffer: &Buffer) -> Option<u16> {
        let (_, first) = self.regions.iter().find(|(region, _)| buffer.is_of(region))?;
        let piece = buffer.offset() / REGISTERED_PIECE_BYTES;
        let last = (buffer.offset() + buffer.len().max(1) - 1) / REGISTERED_PIECE_BYTES;
        (piece == last).then(|| u16::try_from(first + piece).ok()).flatten()
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if !self.regions.is_empty() {
            // A ring's own end is left to a kernel worker; the memory counts against the limit
            // until then. A refusal changes nothing.
            let _ = self.ring.submitter().unregister_buffers();
        }
    }
}

/// The entry of a transfer, its memory named by its registered piece if there is one. A length
/// beyond 32 bits is cut, so that it ends short.
fn transfer(file: types::Fd, operation: &Operation, piece: Option<u16>) -> squeue::Entry {
    let (start, offset) = (operation.buffer.start().as_ptr(), operation.offset);
    let len = u32::try_from(operation.buffer.len()).unwrap_or(u32::MAX);
    match (operation.kind, piece) {
        (Kind::Read, Some(piece)) => opcode::ReadFixed::new(file, start, len, piece).offset(offset).build(),
        (Kind::Read, None) => opcode::Read::new(file, start, len).offset(offset).build(),
        (Kind::Write, Some(piece)) => opcode::WriteFixed::new(file, start, len, piece).offset(offset).build(),
        (Kind::Write, None) => opcode::Write::new(file, start, len).offset(offset).build(),
    }
}

fn pieces_of(region: &dyn Region) -> Vec<libc::iovec> {
    let start = region.start().as_ptr();
    (0..region.len())
        .step_by(REGISTERED_PIECE_BYTES)
        .map(|offset| libc::iovec {
            iov_base: start.wrapping_add(offset).cast(),
            iov_len: REGISTERED_PIECE_BYTES.min(region.len() - offset),
        })
        .collect()
}

fn not_registered(bytes: usize, error: &io::Error) -> String {
    let mib = bytes >> 20;
    match error.raw_os_error() {
        Some(libc::ENOMEM) => format!(
            "{mib} MiB of memory are not registered with the kernel: the limit of locked memory is too low; raise RLIMIT_MEMLOCK (ulimit -l, \
             docker run --ulimit memlock=-1, LimitMEMLOCK= of a systemd unit) or grant CAP_IPC_LOCK"
        ),
        _ => format!("{mib} MiB of memory are not registered with the kernel: {error}"),
    }
}
