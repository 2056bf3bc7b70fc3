//! All stores of this user below one directory, for `kvcellar store`.
//!
//! Looking changes nothing and disturbs no engine. Removing needs the store's lock, so that nothing
//! is taken from an engine that uses it.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::directory::{self, How, REMEDY};
use super::ownership::{self, LOCK_NAME};
use super::segments;
use super::superblock::{self, Superblock};
use crate::owned::listing::{Ownership, in_use};
use crate::owned::lock::{self, FileLocks};
use kvcellar_block::error::{Error, Result};

/// One store, as people see it.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// Name of its directory: `<namespace>-<index>`.
    pub name: String,
    /// Its directory.
    pub path: PathBuf,
    /// Bytes on disk.
    pub bytes: u64,
    /// Who has it; damaged: no whole superblock.
    pub state: Ownership,
    /// The last owner's process id.
    pub owner_pid: Option<u32>,
    /// Its bound, in bytes on disk.
    pub capacity_bytes: Option<u64>,
    /// Bytes of an extent.
    pub extent_bytes: Option<u64>,
    /// Extents in its segments.
    pub extents: Option<u64>,
    /// Its contents are of weights that were changed in its last owner's process: no start can use
    /// them.
    pub private: bool,
    /// When it was made, in seconds since 1970.
    pub created_s: Option<u64>,
    /// When an engine last opened it, closed it or wrote to it, in seconds since 1970.
    pub used_s: Option<u64>,
    /// The same, as exact as the filesystem has it.
    #[serde(skip)]
    pub last_use: Option<SystemTime>,
    /// Its turn when a start needs room, from 1; `None` for one in use.
    pub goes: Option<usize>,
    /// The facts behind its namespace.
    pub facts: Option<serde_json::Value>,
}

/// Lists the stores below `nvme_dir`, by name.
///
/// # Errors
/// [`Error::Io`] when the directory is there but cannot be read.
pub fn list(nvme_dir: &Path) -> Result<Vec<Entry>> {
    let mut entries = list_in(&directory::path(nvme_dir))?;
    let mut turns: Vec<usize> = (0..entries.len()).filter(|at| entries[*at].state != Ownership::InUse).collect();
    turns.sort_by_cached_key(|at| order(&entries[*at]));
    for (turn, at) in turns.into_iter().enumerate() {
        entries[at].goes = Some(turn + 1);
    }
    Ok(entries)
}

/// The stores in this user's directory, by name.
pub(super) fn list_in(dir: &Path) -> Result<Vec<Entry>> {
    let found = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|error| Error::io("listing", dir, error, REMEDY))?,
    };
    let mut entries: Vec<Entry> = found
        .filter_map(|place| place.ok().map(|place| place.path()))
        .filter(|path| is_named_as_store(path))
        // A store that another process removes between the listing and the look is no longer an
        // entry.
        .filter_map(|path| describe(path).ok())
        .collect();
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

/// Name of a store's directory.
pub(super) fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn is_named_as_store(path: &Path) -> bool {
    let name = name(path);
    let Some((namespace, index)) = name.split_once('-') else { return false };
    namespace.len() == 32 && namespace.bytes().all(|digit| digit.is_ascii_hexdigit()) && index.parse::<u32>().is_ok()
}

fn describe(path: PathBuf) -> Result<Entry> {
    let bytes = bytes_on_disk(&path)?;
    let superblock = Superblock::load(&path).ok();
    let lock = directory::open(&path.join(LOCK_NAME), How::Existing).ok();
    let is_owned = lock.is_some_and(|file| lock::holders(&file).0);
    let state = Ownership::of((is_owned, false), superblock.is_some());
    let last_use = last_use(&path);
    let extents = superblock.as_ref().map(|found| extents(&path, found.geometry.slot_bytes)).transpose()?;
    Ok(Entry {
        name: name(&path),
        bytes,
        state,
        owner_pid: ownership::owner_pid(&path),
        capacity_bytes: superblock.as_ref().map(|found| found.capacity_bytes),
        extent_bytes: superblock.as_ref().map(|found| found.geometry.slot_bytes),
        extents,
        private: superblock.as_ref().is_some_and(|found| found.private),
        created_s: superblock.as_ref().map(|found| found.created_s),
        used_s: last_use.and_then(|when| when.duration_since(UNIX_EPOCH).ok()).map(|since| since.as_secs()),
        last_use,
        goes: None,
        facts: superblock.and_then(|found| serde_json::from_str(&found.facts).ok()),
        path,
    })
}

/// When an engine last did something to a store: its superblock is written when it is opened and
/// closed, its segments in between. Reading leaves no trace.
fn last_use(dir: &Path) -> Option<SystemTime> {
    let segments = segments::present(dir).unwrap_or_default().into_iter().map(|number| segments::path(dir, number));
    let files = segments.chain([dir.join(superblock::NAME)]);
    let changed = |path: PathBuf| fs::symlink_metadata(path).and_then(|found| found.modified()).ok();
    files.filter_map(changed).max().or_else(|| changed(dir.join(LOCK_NAME)))
}

/// Bytes that a store takes on disk, its directory included.
pub(super) fn bytes_on_disk(dir: &Path) -> Result<u64> {
    let fail = |error| Error::io("reading", dir, error, REMEDY);
    let mut bytes = fs::symlink_metadata(dir).map_err(fail)?.blocks() * 512;
    for file in fs::read_dir(dir).map_err(fail)? {
        // A draft that is renamed meanwhile is counted under its new name or not at all.
        bytes += file.and_then(|file| file.metadata()).map_or(0, |found| found.blocks() * 512);
    }
    Ok(bytes)
}

fn extents(dir: &Path, extent_bytes: u64) -> Result<u64> {
    let in_segment = |number| fs::metadata(segments::path(dir, number)).map_or(0, |found| found.len() / extent_bytes);
    Ok(segments::present(dir)?.into_iter().map(in_segment).sum())
}

/// Becomes the owner of a store that no engine uses.
///
/// # Errors
/// [`Error::TryLater`] when an engine owns it; [`Error::Io`]; [`Error::Config`] when it is not
/// private.
pub fn own(path: &Path) -> Result<FileLocks> {
    fs::symlink_metadata(path).map_err(|error| Error::io("reading", path, error, "See `kvcellar store ls`"))?;
    ownership::claim(path)?.ok_or_else(|| in_use(name(path), ownership::owner_pid(path)))
}

/// Removes a store that no engine uses.
///
/// # Errors
/// [`Error::TryLater`] when an engine owns it; [`Error::Io`], also when its directory holds files
/// that are not a store's: they stay.
pub fn remove(entry: &Entry) -> Result<()> {
    let owned = own(&entry.path)?;
    ownership::clear(&entry.path)?;
    owned.unlink(&entry.path.join(LOCK_NAME))?;
    fs::remove_dir(&entry.path)
        .map_err(|error| Error::io("removing", &entry.path, error, "Look what else lies there and remove it by hand"))
}

/// Where an entry stands among those that go when room is needed, whatever needs it.
pub fn order(entry: &Entry) -> (bool, Option<std::time::SystemTime>, String) {
    let usable = entry.state == Ownership::Orphaned && !entry.private;
    (usable, entry.last_use, entry.name.clone())
}
