//! What stands for a pool whose file has no name any more, so that its memory still counts.
//!
//! A claim is a sparse file of the pool's length beside the pools. It counts while its owner's lock
//! is held and is litter after that. Only its first pages exist, a copy of the pool's header for
//! `kvcellar pool ls`.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{directory, header, io};
use crate::owned::lock::FileLocks;
use kvcellar_block::error::{Error, Result};

/// The ending of claims' names.
pub(super) const ENDING: &str = "claim";

/// A claim that this process holds. Dropping it withdraws it.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    locks: FileLocks,
}

impl Claim {
    /// Claims `bytes` for the pool at `pool`, whose owner has this `epoch`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`] when its file cannot be made; [`Error::TryLater`] when
    /// somebody else has it.
    pub(super) fn stake(pool: &Path, epoch: u64, bytes: u64) -> Result<Self> {
        let path = pool.with_extension(format!("{epoch:016x}.{ENDING}"));
        let file = directory::open_or_create(&path)?;
        let again = file.try_clone().map_err(|error| io(&path, error))?;
        let locks = FileLocks::own(again, &path).ok_or_else(|| Error::TryLater {
            what: path.display().to_string(),
            holder: "somebody else has it".to_owned(),
        })?;
        let claim = Self { path, locks };
        file.set_len(bytes).map_err(|error| io(&claim.path, error))?;
        // For people only; some file systems for huge pages take no writes.
        drop(header::head(pool).and_then(|head| file.write_all_at(&head, 0)));
        Ok(claim)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.locks.is_owner() {
            // What stays is litter, which the next start removes.
            drop(self.locks.unlink(&self.path));
        }
    }
}
