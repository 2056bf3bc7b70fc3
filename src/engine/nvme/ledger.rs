//! What all stores of this user below one directory take together, and which of them go when a
//! start needs room.
//!
//! The directory is the ledger. A store in use counts with its capacity, for it may grow to that at
//! any moment; one that nobody owns is a *leftover* and counts with its bytes on disk. Whoever
//! opens a store holds the ledger's lock from the look at the others until its own capacity is in
//! its superblock and its surplus segments are gone: so the bound holds in real bytes, whoever
//! starts beside it. Never removes a store in use. Does not choose the store that a start takes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::directory;
use super::registry::{self, Entry};
use crate::limits;
use crate::owned::listing::Ownership;
use crate::owned::lock::Turn;
use kvcellar_block::error::{Error, Result};
use kvcellar_block::size::show;

/// Name of the file whose lock makes looking and taking one step.
pub const LOCK_NAME: &str = "ledger";

/// The ledger of one directory, locked by this process.
#[derive(Debug)]
pub struct Ledger {
    dir: PathBuf,
    _turn: Turn,
}

/// What a start may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// Bytes on disk.
    pub capacity_bytes: u64,
    /// Leftovers that were removed for it, for the log.
    pub removed: Vec<String>,
    /// What somebody should know, with the remedy.
    pub warnings: Vec<String>,
    /// Stores that others use, for messages.
    pub used: Vec<String>,
}

impl Ledger {
    /// Locks the ledger of this user's directory; waits while another start holds it.
    ///
    /// # Errors
    /// [`Error::TryLater`] when it is held for longer than a start may take; [`Error::Io`];
    /// [`Error::Config`].
    pub fn lock(dir: &Path) -> Result<Self> {
        let turn = Turn::wait(&dir.join(LOCK_NAME), &directory::STORES, Duration::from_millis(limits::LEDGER_WAIT_MS))?;
        Ok(Self { dir: dir.to_owned(), _turn: turn })
    }

    /// Makes room for `wanted` bytes in the store at `own`, all stores together staying within
    /// `total`: leftovers go, as many as needed, in [`registry::order`]. `own` is its caller's and
    /// does not count.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory cannot be listed. What cannot be removed is a warning.
    pub fn make_room(&self, own: &Path, wanted: u64, total: u64) -> Result<Room> {
        let mut others = registry::list_in(&self.dir)?;
        others.retain(|entry| entry.path != own);
        let (used, mut left): (Vec<Entry>, Vec<Entry>) =
            others.into_iter().partition(|entry| entry.state == Ownership::InUse);
        sort(&mut left, own);
        let available = total.saturating_sub(limits::LEDGER_BYTES);
        let free = available.saturating_sub(used.iter().map(charge).sum());
        let mut room = Room {
            capacity_bytes: wanted.min(free),
            removed: Vec::new(),
            warnings: Vec::new(),
            used: used.iter().map(named).collect(),
        };
        let mut taken: u64 = left.iter().map(|entry| entry.bytes).sum();
        for entry in &left {
            if taken.saturating_add(room.capacity_bytes) <= free {
                break;
            }
            taken -= remove(entry, &mut room);
        }
        room.capacity_bytes = wanted.min(free.saturating_sub(taken));
        room.tell_cut(wanted, total);
        Ok(room)
    }
}

impl Room {
    /// A wish that was cut by more than a tenth is worth a word.
    fn tell_cut(&mut self, wanted: u64, total: u64) {
        if self.capacity_bytes >= wanted - wanted / 10 || self.used.is_empty() {
            return;
        }
        self.warnings.push(format!(
            "nvme_size {} is for all engines below nvme_dir, and others use some of it ({}): {} of the wanted {} are left \
             for this one. Raise nvme_size, or set nvme_dir to another disk",
            show(total),
            self.used.join(", "),
            show(self.capacity_bytes),
            show(wanted),
        ));
    }
}

/// Removes a leftover, and says so. Returns how many bytes that gave.
fn remove(entry: &Entry, room: &mut Room) -> u64 {
    match registry::remove(entry) {
        Ok(()) => {
            room.removed.push(format!("{} ({})", entry.name, show(entry.bytes)));
            entry.bytes
        }
        // Somebody looks at it, as `kvcellar store verify` does: it stays and counts.
        Err(Error::TryLater { .. }) => 0,
        Err(error) => {
            room.warnings.push(format!("a store that nobody uses could not be removed: {error}"));
            entry.bytes.saturating_sub(registry::bytes_on_disk(&entry.path).unwrap_or(0))
        }
    }
}

/// Bytes that a store in use may have on disk at any moment.
fn charge(entry: &Entry) -> u64 {
    entry.capacity_bytes.unwrap_or(0).max(entry.bytes)
}

fn named(entry: &Entry) -> String {
    match entry.owner_pid {
        Some(pid) => format!("{} (process {pid}): {}", entry.name, show(charge(entry))),
        None => format!("{}: {}", entry.name, show(charge(entry))),
    }
}

/// Leftovers in the order in which they go: those that no start can use first, those of the
/// namespace of `own` last, and the one that was used longest ago before the others.
fn sort(left: &mut [Entry], own: &Path) {
    let namespace = |path: &Path| registry::name(path).split_once('-').map(|(namespace, _)| namespace.to_owned());
    let wanted = namespace(own);
    left.sort_by_cached_key(|entry| (namespace(&entry.path) == wanted, registry::order(entry)));
}
