//! Directories and files of this user alone: 0700 and 0600, ours, no links.

use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

use kvcellar_block::error::{Error, Result};

/// What a private place is for: how errors name it, and what they advise.
#[derive(Debug)]
pub struct Role {
    /// The setting that chose the place.
    pub setting: &'static str,
    /// What is done when its directory is made.
    pub creating: &'static str,
    /// What a user can do when the system refuses something.
    pub remedy: &'static str,
    /// What a user can do when something else stands in the place.
    pub instead: &'static str,
}

/// Where this user's files lie below the directory of a setting.
pub fn below(parent: &Path) -> PathBuf {
    parent.join(format!("kvcellar-{}", Uid::effective()))
}

/// Makes a directory for this user alone, or checks the one that is there.
///
/// # Errors
/// [`Error::Io`] when it cannot be made; [`Error::Config`] when something else stands in its place.
pub fn ensure(dir: &Path, role: &Role) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => check(dir, role),
        Err(error) => Err(Error::io(role.creating, dir, error, role.remedy)),
    }
}

/// Refuses what stands in the place of this user's directory below `parent`, if something does.
///
/// # Errors
/// [`Error::Config`] when it is not a private directory of this user; [`Error::Io`].
pub fn check_present(parent: &Path, role: &Role) -> Result<()> {
    let dir = below(parent);
    if dir.symlink_metadata().is_ok() { check(&dir, role) } else { Ok(()) }
}

fn check(dir: &Path, role: &Role) -> Result<()> {
    let found = std::fs::symlink_metadata(dir).map_err(|error| Error::io("reading", dir, error, role.remedy))?;
    if found.is_dir() && is_ours(&found) {
        return Ok(());
    }
    let problem = format!("{} is not a private directory of this user", dir.display());
    Err(Error::config(role.setting, problem, role.instead))
}

/// Whether it belongs to this user alone.
pub fn is_ours(found: &Metadata) -> bool {
    // Six low bits clear: nothing for group and others.
    found.uid() == Uid::effective().as_raw() && found.mode().trailing_zeros() >= 6
}

/// Opens a file to read and write, as `options` say further and with these flags beside, following
/// no link. A file that is made is this user's alone. One that was there may be anybody's: see
/// [`refuse_strangers`].
///
/// # Errors
/// Those of the system.
pub fn open(path: &Path, options: &mut OpenOptions, flags: i32) -> std::io::Result<File> {
    let options = options.read(true).write(true).truncate(false).mode(0o600);
    options.custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | flags).open(path)
}

/// Refuses a file of another user, or one that others may open.
///
/// # Errors
/// [`Error::Config`]; [`Error::Io`].
pub fn refuse_strangers(file: &File, path: &Path, role: &Role) -> Result<()> {
    let found = file.metadata().map_err(|error| Error::io("reading", path, error, role.remedy))?;
    if found.is_file() && is_ours(&found) {
        return Ok(());
    }
    Err(Error::config(role.setting, format!("{} is not a private file of this user", path.display()), "Remove it"))
}

/// Opens a file of this user alone, making it when it is not there.
///
/// # Errors
/// [`Error::Io`] or [`Error::Config`].
pub fn open_or_create(path: &Path, role: &Role) -> Result<File> {
    let file = open(path, OpenOptions::new().create(true), 0)
        .map_err(|error| Error::io("opening", path, error, role.remedy))?;
    refuse_strangers(&file, path, role)?;
    Ok(file)
}

/// Does `path` still name the file behind `file`?
pub fn names(path: &Path, file: &File) -> bool {
    let (Ok(there), Ok(here)) = (std::fs::symlink_metadata(path), file.metadata()) else { return false };
    (there.dev(), there.ino()) == (here.dev(), here.ino())
}
