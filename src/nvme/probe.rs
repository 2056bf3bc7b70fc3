//! Which disk works here: `io_uring` if the system allows it, threads otherwise, and how a segment's file is opened.
//!
//! Promises: what is chosen was tried, and why it is not better is said in words.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::unistd::Uid;

use super::buffer::{Buffer, Region};
use super::disk::{Completions, Disk};
use super::queue::is_direct;
use super::ring::{self, RingDisk};
use super::threads::ThreadDisk;
use crate::error::{Error, Result};
use crate::limits::{DISK_BYTES_IN_FLIGHT, DISK_THREADS, SLOT_ALIGN};

/// File systems in memory, or on top of others, that take `O_DIRECT` without meaning it.
const NOT_DIRECT: [FsType; 3] = [TMPFS_MAGIC, OVERLAYFS_SUPER_MAGIC, RAMFS_MAGIC];
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// The engine that the configuration asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// `io_uring`, or threads where it is refused.
    #[default]
    Auto,
    /// `io_uring`, or an error.
    IoUring,
    /// Threads.
    Threads,
}

impl FromStr for Engine {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "io_uring" => Ok(Self::IoUring),
            "threads" => Ok(Self::Threads),
            _ => Err(Error::config(
                "nvme_engine",
                format!("`{name}` is no engine"),
                "Write auto, io_uring or threads".to_owned(),
            )),
        }
    }
}

/// Opens a disk whose segments will lie in `segment_dir`.
///
/// # Errors
/// [`Error::Unsupported`] when `io_uring` is insisted on and refused, [`Error::Io`] when the directory cannot be looked at, [`Error::DeviceDead`]
/// when no thread can be started.
pub fn open(
    engine: Engine,
    regions: Vec<Arc<dyn Region>>,
    completions: &Arc<dyn Completions>,
    segment_dir: &Path,
) -> Result<Arc<dyn Disk>> {
    std::fs::metadata(segment_dir).map_err(|error| {
        Error::io("look at", segment_dir, error, "Name a directory that exists and can be written to")
    })?;
    let threads = |why: String| -> Result<Arc<dyn Disk>> {
        Ok(Arc::new(ThreadDisk::start(Arc::clone(completions), DISK_THREADS)?.because(why)))
    };
    if engine == Engine::Threads {
        return threads("the configuration asks for threads".to_owned());
    }
    match RingDisk::start(regions, Arc::clone(completions), DISK_BYTES_IN_FLIGHT) {
        Ok((disk, _)) => Ok(Arc::new(disk)),
        Err(error) if engine == Engine::IoUring => Err(error),
        Err(Error::Unsupported { why, .. }) => threads(format!("io_uring is refused: {why}")),
        Err(error) => threads(format!("io_uring cannot be used: {error}")),
    }
}

/// Opens a segment's file for reading and writing, without following links, and tells whether it is open with `O_DIRECT`. Where that is refused,
/// or means nothing, the file is buffered.
///
/// # Errors
/// [`Error::Io`] when it cannot be opened, is no regular file, or is someone else's.
pub fn open_segment(path: &Path, create: bool) -> Result<(File, bool)> {
    let refused =
        |error| Error::io("open the segment", path, error, "See who owns it and whether the file system is writable");
    let file = match open_with(path, create, OFlag::O_DIRECT) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => open_with(path, create, OFlag::empty()),
        opened => opened,
    };
    let file = file.map_err(refused)?;
    check_ours(&file).map_err(refused)?;
    let mut direct = is_direct(&file);
    if direct && !direct_works(&file).map_err(refused)? {
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(|errno| refused(errno.into()))?;
        let buffered = OFlag::from_bits_retain(flags) - OFlag::O_DIRECT;
        fcntl(&file, FcntlArg::F_SETFL(buffered)).map_err(|errno| refused(errno.into()))?;
        direct = false;
    }
    Ok((file, direct))
}

fn open_with(path: &Path, create: bool, more: OFlag) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | more;
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(create)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags.bits())
        .open(path)
}

fn check_ours(file: &File) -> io::Result<()> {
    let facts = file.metadata()?;
    if !facts.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    if facts.uid() != Uid::effective().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to someone else"));
    }
    Ok(())
}

/// Whether the file system means it: known ones do not, and some refuse only the transfer.
fn direct_works(file: &File) -> io::Result<bool> {
    if NOT_DIRECT.contains(&fstatfs(file)?.filesystem_type()) {
        return Ok(false);
    }
    if file.metadata()?.len() < SLOT_ALIGN {
        return Ok(true);
    }
    match file.read_at(Buffer::pages(SLOT_ALIGN as usize).bytes_mut(), 0) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Why `io_uring` does not work here, if so, for `kvcellar doctor`.
pub fn refusal() -> Option<String> {
    ring::attempt().err().map(|error| ring::why_refused(&error))
}
