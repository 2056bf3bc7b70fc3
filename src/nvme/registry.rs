//! All stores of this user below one directory, for `kvcellar store`.
//!
//! Looking changes nothing and disturbs no engine. Removing needs the store's lock, so that nothing is taken from an engine that uses it.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::directory::{self, How, REMEDY};
use super::segments;
use super::store::{self, LOCK_NAME};
use super::superblock::Superblock;
use crate::error::{Error, Result};
use crate::pool::lock::{self, PoolLocks};

/// One store, as people see it.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// Name of its directory: `<namespace>-<index>`.
    pub name: String,
    /// Its directory.
    pub path: PathBuf,
    /// Bytes on disk.
    pub bytes: u64,
    /// `used`: an engine owns it; `left`: nobody does; `damaged`: nobody does, and there is no whole superblock.
    pub state: &'static str,
    /// The last owner's process id.
    pub owner_pid: Option<u32>,
    /// Its bound, in bytes on disk.
    pub capacity_bytes: Option<u64>,
    /// Bytes of an extent.
    pub extent_bytes: Option<u64>,
    /// Extents in its segments.
    pub extents: Option<u64>,
    /// When it was made, in seconds since 1970.
    pub created_s: Option<u64>,
    /// The facts behind its namespace.
    pub facts: Option<serde_json::Value>,
}

/// Lists the stores below `nvme_dir`, by name.
///
/// # Errors
/// [`Error::Io`] when the directory is there but cannot be read.
pub fn list(nvme_dir: &Path) -> Result<Vec<Entry>> {
    let dir = directory::path(nvme_dir);
    let found = match fs::read_dir(&dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|error| Error::io("listing", &dir, error, REMEDY))?,
    };
    let mut entries: Vec<Entry> = found
        .filter_map(|place| place.ok().map(|place| place.path()))
        .filter(|path| is_named_as_store(path))
        // A store that another process removes between the listing and the look is no longer an entry.
        .filter_map(|path| describe(path).ok())
        .collect();
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

fn name(path: &Path) -> String {
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
    let state = match (lock.is_some_and(|file| lock::holders(&file).0), &superblock) {
        (true, _) => "used",
        (false, Some(_)) => "left",
        (false, None) => "damaged",
    };
    let extents = superblock.as_ref().map(|found| extents(&path, found.geometry.slot_bytes)).transpose()?;
    Ok(Entry {
        name: name(&path),
        bytes,
        state,
        owner_pid: store::owner_pid(&path),
        capacity_bytes: superblock.as_ref().map(|found| found.capacity_bytes),
        extent_bytes: superblock.as_ref().map(|found| found.geometry.slot_bytes),
        extents,
        created_s: superblock.as_ref().map(|found| found.created_s),
        facts: superblock.and_then(|found| serde_json::from_str(&found.facts).ok()),
        path,
    })
}

fn bytes_on_disk(dir: &Path) -> Result<u64> {
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
/// [`Error::TryLater`] when an engine owns it; [`Error::Io`]; [`Error::Config`] when it is not private.
pub fn own(path: &Path) -> Result<PoolLocks> {
    fs::symlink_metadata(path).map_err(|error| Error::io("reading", path, error, "See `kvcellar store ls`"))?;
    let busy = || match store::owner_pid(path) {
        Some(pid) => format!("process {pid} uses it"),
        None => "an engine uses it".to_owned(),
    };
    store::claim(path)?.ok_or_else(|| Error::TryLater { what: name(path), holder: busy() })
}

/// Removes a store that no engine uses.
///
/// # Errors
/// [`Error::TryLater`] when an engine owns it; [`Error::Io`], also when its directory holds files that are not a store's: they stay.
pub fn remove(entry: &Entry) -> Result<()> {
    let owned = own(&entry.path)?;
    store::clear(&entry.path)?;
    owned.unlink(&entry.path.join(LOCK_NAME))?;
    fs::remove_dir(&entry.path)
        .map_err(|error| Error::io("removing", &entry.path, error, "Look what else lies there and remove it by hand"))
}
