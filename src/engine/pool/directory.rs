//! The private directory that holds pool files.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use crate::owned::private_dir::{self, Role};
use kvcellar_block::error::{Error, Result};

/// How errors speak of pools.
pub(crate) const POOLS: Role = Role {
    setting: "pool_dir",
    creating: "creating the pool directory",
    remedy: "Give this user the rights, or set pool_dir to a tmpfs it may write to",
    instead: "Remove it, or set pool_dir to another tmpfs",
};

/// Name of the file in a pool directory whose lock is the turn there.
pub(super) const TURN_NAME: &str = "lock";

/// The directory below `pool_dir` for this user's pools, created when it is not there.
///
/// # Errors
/// [`Error::Io`] when it cannot be made; [`Error::Config`] when something else stands in its place.
pub fn ensure(pool_dir: &Path) -> Result<PathBuf> {
    let dir = path(pool_dir);
    match private_dir::ensure(&dir, &POOLS) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound && !pool_dir.exists() => {
            let problem = format!("{} does not exist", pool_dir.display());
            Err(Error::config("pool_dir", problem, "Make it, on a tmpfs, or leave pool_dir out for /dev/shm"))
        }
        other => other.map(|()| dir),
    }
}

/// Where this user's pools lie below `pool_dir`.
pub fn path(pool_dir: &Path) -> PathBuf {
    private_dir::below(pool_dir)
}

/// Refuses what stands in the place of this user's directory below `pool_dir`, if something does.
///
/// # Errors
/// [`Error::Config`] when it is not a private directory of this user; [`Error::Io`].
pub fn check_present(pool_dir: &Path) -> Result<()> {
    private_dir::check_present(pool_dir, &POOLS)
}

/// Opens a pool file that exists, following no link, refusing files of other users.
///
/// # Errors
/// [`Error::Io`] or [`Error::Config`].
pub fn open_private(path: &Path) -> Result<File> {
    let file = private_dir::open(path, &mut OpenOptions::new(), 0)
        .map_err(|error| Error::io("opening the pool", path, error, POOLS.remedy))?;
    private_dir::refuse_strangers(&file, path, &POOLS)?;
    Ok(file)
}

/// Opens a pool file, making it when it is not there.
///
/// # Errors
/// [`Error::Io`] or [`Error::Config`].
pub fn open_or_create(path: &Path) -> Result<File> {
    private_dir::open_or_create(path, &POOLS)
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
