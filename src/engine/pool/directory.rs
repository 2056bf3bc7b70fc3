//! The private directory that holds pool files: 0700, ours, no links.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

use kvcellar_block::error::{Error, Result};

const REMEDY: &str = "Give this user the rights, or set pool_dir to a tmpfs it may write to";

/// The directory below `pool_dir` for this user's pools, created when it is not there.
///
/// # Errors
/// [`Error::Io`] when it cannot be made; [`Error::Config`] when something else stands in its place.
pub fn ensure(pool_dir: &Path) -> Result<PathBuf> {
    let dir = path(pool_dir);
    match DirBuilder::new().mode(0o700).create(&dir) {
        Ok(()) => return Ok(dir),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !pool_dir.exists() => {
            let problem = format!("{} does not exist", pool_dir.display());
            return Err(Error::config("pool_dir", problem, "Make it, on a tmpfs, or leave pool_dir out for /dev/shm"));
        }
        Err(error) => return Err(Error::io("creating the pool directory", dir, error, REMEDY)),
    }
    check(&dir)?;
    Ok(dir)
}

/// Where this user's pools lie below `pool_dir`.
pub fn path(pool_dir: &Path) -> PathBuf {
    pool_dir.join(format!("kvcellar-{}", Uid::effective()))
}

/// Refuses what stands in the place of this user's directory below `pool_dir`, if something does.
///
/// # Errors
/// [`Error::Config`] when it is not a private directory of this user; [`Error::Io`].
pub fn check_present(pool_dir: &Path) -> Result<()> {
    let dir = path(pool_dir);
    if dir.symlink_metadata().is_ok() { check(&dir) } else { Ok(()) }
}

fn check(dir: &Path) -> Result<()> {
    let found = std::fs::symlink_metadata(dir).map_err(|error| Error::io("reading", dir, error, REMEDY))?;
    // Six low bits clear: nothing for group and others.
    let private = found.is_dir() && found.uid() == Uid::effective().as_raw() && found.mode().trailing_zeros() >= 6;
    if private {
        return Ok(());
    }
    Err(Error::config(
        "pool_dir",
        format!("{} is not a private directory of this user", dir.display()),
        "Remove it, or set pool_dir to another tmpfs",
    ))
}

/// Opens a pool file that exists, following no link, refusing files of other users.
///
/// # Errors
/// [`Error::Io`] or [`Error::Config`].
pub fn open_private(path: &Path) -> Result<File> {
    let file = open(path, false)?;
    refuse_strangers(&file, path)?;
    Ok(file)
}

/// Opens a pool file, making it when it is not there.
///
/// # Errors
/// [`Error::Io`] or [`Error::Config`].
pub fn open_or_create(path: &Path) -> Result<File> {
    let file = open(path, true)?;
    refuse_strangers(&file, path)?;
    Ok(file)
}

fn open(path: &Path, create: bool) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(create)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)
        .map_err(|error| Error::io("opening the pool", path, error, REMEDY))
}

fn refuse_strangers(file: &File, path: &Path) -> Result<()> {
    let found = file.metadata().map_err(|error| Error::io("reading", path, error, REMEDY))?;
    if found.is_file() && found.uid() == Uid::effective().as_raw() && found.mode().trailing_zeros() >= 6 {
        return Ok(());
    }
    Err(Error::config("pool_dir", format!("{} is not a private file of this user", path.display()), "Remove it"))
}

/// A directory that is not there is a mistake, and not an empty one: nobody wants to hear that all
/// is well in it.
///
/// # Errors
/// [`Error::Config`] naming the argument.
pub fn present(argument: &str, dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let problem = format!("{} is no directory", dir.display());
    Err(Error::config(argument, problem, "Name the directory that the engine was given"))
}
