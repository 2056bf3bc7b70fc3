//! The private directories and files of stores: 0700 and 0600, ours, no links; and whether a file
//! passes the page cache by.
//!
//! Owns who may look: every file of a store is opened here, for engines, commands and
//! `kvcellar doctor` alike. Promises: a file that is open with `O_DIRECT` lies on a filesystem that
//! means it. Does not know what is in them.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, fstatfs};

use super::buffer::Buffer;
use crate::limits::SLOT_ALIGN;
use crate::owned::private_dir::{self, Role};
use kvcellar_block::error::{Error, Result};

/// Filesystems in memory, or on top of others, that take `O_DIRECT` without meaning it.
const NOT_DIRECT: [FsType; 3] = [TMPFS_MAGIC, OVERLAYFS_SUPER_MAGIC, RAMFS_MAGIC];
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// What a user can do when the system refuses something in a store.
pub const REMEDY: &str = "Give this user the rights, or set nvme_dir to a directory it may write to";

/// How errors speak of stores.
pub(super) const STORES: Role = Role {
    setting: "nvme_dir",
    creating: "creating the store's directory",
    remedy: REMEDY,
    instead: "Remove it, or set nvme_dir to another directory",
};

/// How to open a file of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// It must exist.
    Existing,
    /// It is made when it is not there.
    OrNew,
    /// It must not exist.
    New,
    /// It must exist; the page cache is passed by where the filesystem means it.
    Direct,
}

/// The directory below `nvme_dir` for this user's stores, created when it is not there.
///
/// # Errors
/// [`Error::Io`] when it cannot be made; [`Error::Config`] when something else stands in its place.
pub fn ensure(nvme_dir: &Path) -> Result<PathBuf> {
    let dir = path(nvme_dir);
    private(&dir)?;
    Ok(dir)
}

/// Where this user's stores lie below `nvme_dir`.
pub fn path(nvme_dir: &Path) -> PathBuf {
    private_dir::below(nvme_dir)
}

/// Makes a directory for this user alone, or checks the one that is there.
///
/// # Errors
/// [`Error::Io`] when it cannot be made; [`Error::Config`] when something else stands in its place.
pub fn private(dir: &Path) -> Result<()> {
    private_dir::ensure(dir, &STORES)
}

/// Refuses what stands in the place of this user's directory below `nvme_dir`, if something does.
///
/// # Errors
/// [`Error::Config`] when it is not a private directory of this user; [`Error::Io`].
pub fn check_present(nvme_dir: &Path) -> Result<()> {
    private_dir::check_present(nvme_dir, &STORES)
}

/// Opens a file of a store, following no link, refusing files of other users or open to them.
///
/// # Errors
/// [`Error::Io`] or [`Error::Config`].
pub fn open(path: &Path, how: How) -> Result<File> {
    let file = match attempt(path, how, libc::O_DIRECT) {
        // A filesystem without direct access: the page cache serves as well, only slower.
        Err(error) if how == How::Direct && error.raw_os_error() == Some(libc::EINVAL) => attempt(path, how, 0),
        other => other,
    }
    .map_err(|error| Error::io("opening", path, error, REMEDY))?;
    private_dir::refuse_strangers(&file, path, &STORES)?;
    if is_direct(&file) && !means_direct(&file) {
        make_buffered(&file).map_err(|error| Error::io("opening", path, error, REMEDY))?;
    }
    Ok(file)
}

fn attempt(path: &Path, how: How, direct: i32) -> std::io::Result<File> {
    let direct = if how == How::Direct { direct } else { 0 };
    private_dir::open(path, OpenOptions::new().create(how == How::OrNew).create_new(how == How::New), direct)
}

/// Whether transfers of this file pass the page cache by.
pub fn is_direct(file: &File) -> bool {
    fcntl(file, FcntlArg::F_GETFL).is_ok_and(|flags| OFlag::from_bits_retain(flags).contains(OFlag::O_DIRECT))
}

/// Whether the filesystem means `O_DIRECT`: known ones do not, and some refuse only the transfer. A
/// page that cannot be read for another reason says nothing about that.
fn means_direct(file: &File) -> bool {
    if fstatfs(file).is_ok_and(|found| NOT_DIRECT.contains(&found.filesystem_type())) {
        return false;
    }
    let refused = |error: std::io::Error| error.raw_os_error() == Some(libc::EINVAL);
    file.metadata().map_or(0, |found| found.len()) < SLOT_ALIGN
        || !file.read_at(Buffer::pages(SLOT_ALIGN as usize).bytes_mut(), 0).is_err_and(refused)
}

fn make_buffered(file: &File) -> std::io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?) - OFlag::O_DIRECT;
    fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// Opens a directory itself, so that its entries can be made durable and its identity kept.
///
/// # Errors
/// [`Error::Io`].
pub fn handle(dir: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(dir)
        .map_err(|error| Error::io("opening", dir, error, REMEDY))
}

/// Removes a file if it is there.
///
/// # Errors
/// [`Error::Io`].
pub fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("removing", path, error, REMEDY)),
        _ => Ok(()),
    }
}

/// Replaces a file's contents durably: at every moment, power cuts included, the name leads to the
/// old contents or the new.
///
/// # Errors
/// [`Error::Io`]; the old contents stand then.
pub fn replace(dir: &Path, name: &str, bytes: &[u8]) -> Result<File> {
    let (path, draft) = (dir.join(name), dir.join(format!("{name}.new")));
    remove(&draft)?;
    let written = (|| {
        let mut file = open(&draft, How::New)?;
        std::io::Write::write_all(&mut file, bytes)
            .and_then(|()| file.sync_all())
            .and_then(|()| std::fs::rename(&draft, &path))
            .map_err(|error| Error::io("writing", &path, error, REMEDY))?;
        Ok(file)
    })();
    if written.is_err() {
        // The first error is the one to report; a draft that stays is removed before the next.
        drop(remove(&draft));
    }
    let file = written?;
    handle(dir)?.sync_all().map_err(|error| Error::io("making durable", dir, error, REMEDY))?;
    Ok(file)
}
