//! Who owns the directory of a store, and what an owner may do with all of it: lock it, name
//! itself there, empty it.

use std::io::{ErrorKind, Read, Write};
use std::path::Path;

use super::directory::{self, How, REMEDY};
use super::{segments, snapshot, superblock};
use crate::limits;
use crate::owned::lock::FileLocks;
use kvcellar_block::error::{Error, Result};

/// Name of the file that the owner locks and writes its process id into.
pub(super) const LOCK_NAME: &str = "lock";

/// Becomes the owner of the store at `path`, if nobody is. Makes its directory.
pub(super) fn claim(path: &Path) -> Result<Option<FileLocks>> {
    let lock_path = path.join(LOCK_NAME);
    for _ in 0..limits::STORE_CLAIM_TRIES {
        directory::private(path)?;
        let file = match directory::open(&lock_path, How::OrNew) {
            // The directory was removed at this moment.
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => continue,
            other => other?,
        };
        let fail = |error| Error::io("locking", &lock_path, error, REMEDY);
        let mut note = file.try_clone().map_err(fail)?;
        if let Some(lock) = FileLocks::own(file, &lock_path) {
            note.set_len(0).and_then(|()| write!(note, "{}", std::process::id())).map_err(fail)?;
            return Ok(Some(lock));
        }
    }
    Ok(None)
}

/// Process id of the last owner of the store at `path`.
pub(super) fn owner_pid(path: &Path) -> Option<u32> {
    let mut text = String::new();
    let file = directory::open(&path.join(LOCK_NAME), How::Existing).ok()?;
    file.take(16).read_to_string(&mut text).ok()?;
    text.parse().ok()
}

/// Removes a store's contents, superblock first: half of them are no store. The lock and what is
/// not a store's stay.
pub(super) fn clear(path: &Path) -> Result<()> {
    for name in [superblock::NAME, snapshot::NAME] {
        directory::remove(&path.join(name))?;
        directory::remove(&path.join(format!("{name}.new")))?;
    }
    segments::remove_from(path, 0)
}
