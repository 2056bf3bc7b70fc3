//! All pools of this user below one directory, for `kvcellar pool ls` and `rm` and for the ledger.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::header::{self, Purpose};
use super::{claim, directory};
use crate::owned::listing::{Ownership, in_use};
use crate::owned::lock::{self, FileLocks};
use kvcellar_block::error::{Error, Result};

/// One pool file, as people see it.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// File name without the ending: `<namespace>-<index>`.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// Bytes of memory it takes.
    pub bytes: u64,
    /// Length of the file: the memory it takes once all of it exists, or that a pool without a name
    /// has.
    pub file_bytes: u64,
    /// Who has it; damaged: no valid header.
    pub state: Ownership,
    /// The last owner's process id.
    pub owner_pid: Option<u32>,
    /// Slots, when the header is valid.
    pub slots: Option<u64>,
    /// When it was made, in seconds since 1970.
    pub created_s: Option<u64>,
    /// When an engine last took it or let go of it, in seconds since 1970.
    pub used_s: Option<u64>,
    /// Its place, from 1, among the pools that a start removes when it needs their room; none for
    /// one that is in use.
    pub would_go: Option<u32>,
    /// The facts behind its namespace.
    pub facts: Option<serde_json::Value>,
}

/// Lists the pools below `pool_dir`, by name.
///
/// # Errors
/// [`Error::Io`] when the directory is there but cannot be read.
pub fn list(pool_dir: &Path) -> Result<Vec<Entry>> {
    let dir = directory::path(pool_dir);
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let files = fs::read_dir(&dir).map_err(|error| Error::io("listing", &dir, error, "Check its rights"))?;
    let mut entries: Vec<(SystemTime, Entry)> = files
        .filter_map(|file| file.ok().map(|file| file.path()))
        .filter(|path| path.extension().is_some_and(|ending| ending == "pool" || ending == claim::ENDING))
        // A pool that another process removes between the listing and the look is no longer an
        // entry.
        .filter_map(|path| describe(path).ok())
        .collect();
    // Those that were out of use longest go first.
    entries.sort_by(|(a_used, a), (b_used, b)| (a_used, &a.name).cmp(&(b_used, &b.name)));
    let nobodys = entries.iter_mut().filter(|(_, entry)| !entry.is_in_use());
    nobodys.zip(1..).for_each(|((_, entry), place)| entry.would_go = Some(place));
    let mut entries: Vec<Entry> = entries.into_iter().map(|(_, entry)| entry).collect();
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

impl Entry {
    /// Whether an engine owns it, or processes of a dead one still map it.
    pub fn is_in_use(&self) -> bool {
        matches!(self.state, Ownership::InUse | Ownership::Mapped)
    }
}

fn describe(path: PathBuf) -> Result<(SystemTime, Entry)> {
    let file = directory::open_private(&path)?;
    let head = header::head(&path).map_err(|error| Error::io("reading", &path, error, "Check its rights"))?;
    let purpose = Purpose::read(&head).ok();
    let state = Ownership::of(lock::holders(&file), purpose.is_some());
    let found = file.metadata().map_err(|error| Error::io("reading", &path, error, "Check its rights"))?;
    let used = found.modified().unwrap_or(UNIX_EPOCH);
    let entry = Entry {
        name: path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        bytes: found.blocks() * 512,
        file_bytes: found.len(),
        state,
        owner_pid: header::owner_pid_in(&head),
        slots: purpose.map(|purpose| purpose.slot_count),
        created_s: purpose.map(|purpose| purpose.created_s),
        used_s: used.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs()),
        would_go: None,
        facts: purpose.and_then(|purpose| serde_json::from_str(&purpose.facts(&head)).ok()),
        path,
    };
    Ok((used, entry))
}

/// Removes a pool that no engine uses. Processes that still map it keep their memory until they
/// end.
///
/// # Errors
/// [`Error::TryLater`] when an engine owns it, [`Error::Io`].
pub fn remove(entry: &Entry) -> Result<()> {
    let file = directory::open_private(&entry.path)?;
    let locks = FileLocks::own(file, &entry.path).ok_or_else(|| in_use(entry.name.clone(), entry.owner_pid))?;
    locks.unlink(&entry.path)
}
