//! A store: the directory that keeps blocks on disk across engines, and the one engine that may
//! write it.
//!
//! States: *dirty* from the moment it is opened (durably, before anyone can write an extent),
//! *clean* after [`Store::close_clean`]. Promises: one owner at a time, by a lock that the kernel
//! drops with the process; capacity and reserve hold in real bytes; a damaged store opens as a new
//! one. Which block lies in which extent is the tier engine's to decide; whether an extent's bytes
//! are true is [`super::extent::check`]'s.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::directory::{self, REMEDY};
use super::ledger::{Ledger, Room};
use super::ownership::{LOCK_NAME, claim, clear, owner_pid};
use super::segments::{self, Segments};
use super::snapshot::{self, Subject};
use super::space::{self, SegmentLayout};
use super::superblock::{self, Clean, Superblock};
use crate::limits;
use crate::owned::listing::{name_with_owner, namespace_name};
use crate::owned::lock::FileLocks;
use crate::owned::private_dir::names;
use kvcellar_block::error::{Error, Result};
use kvcellar_block::size::show;
use kvcellar_block::{ExtentIndex, SlotGeometry};

pub use super::snapshot::SnapshotEntry;

/// What kind of store a start wants.
#[derive(Debug, Clone)]
pub struct Wish<'a> {
    /// Directory on the device.
    pub dir: &'a Path,
    /// Fingerprint of everything that makes bytes interchangeable.
    pub namespace: [u8; 16],
    /// The facts behind the fingerprint, as JSON.
    pub facts: &'a str,
    /// Bound of everything in the store, in bytes on disk. It gets less where other engines have
    /// taken some of `total_bytes`.
    pub capacity_bytes: u64,
    /// Bound of all stores of this user below `dir` together, in bytes on disk.
    pub total_bytes: u64,
    /// Bytes of the filesystem that stay free for others.
    pub reserve_bytes: u64,
    /// Sizes of an extent.
    pub geometry: &'a SlotGeometry,
    /// Whether contents of an earlier engine may be used.
    pub reuse: bool,
    /// Bounds the size of segments further, for tests with small stores; `None` in production.
    pub segment_bytes_max: Option<u64>,
}

/// Where the contents of a store stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovery {
    /// There are none.
    Fresh,
    /// It was closed cleanly: what lies in which extent, and the next sequence number.
    Snapshot(Vec<SnapshotEntry>, u64),
    /// The descriptors say, see [`super::recovery::scan`].
    Scan,
}

/// A store that this process owns.
#[derive(Debug)]
pub struct Opened {
    /// The store.
    pub store: Store,
    /// Its segment files that are there, in order, for a disk.
    pub segments: Vec<File>,
    /// Where its contents stand.
    pub recovery: Recovery,
    /// Stores of this namespace that were taken, for the log.
    pub taken: Vec<String>,
    /// Why earlier contents are gone or must be scanned, for the log; empty when there is nothing
    /// to say.
    pub why: String,
    /// Stores that nobody used and that went for this one, for the log.
    pub removed: Vec<String>,
    /// What somebody should know, with the remedy.
    pub warnings: Vec<String>,
}

impl Opened {
    fn of(store: Store, segments: Vec<File>, recovery: Recovery, why: String) -> Self {
        let (taken, removed, warnings) = (Vec::new(), Vec::new(), Vec::new());
        Self { store, segments, recovery, taken, why, removed, warnings }
    }
}

/// A store on disk, owned by this process.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    dir: File,
    superblock: Superblock,
    superblock_file: File,
    layout: SegmentLayout,
    segments: Segments,
    reserve_bytes: u64,
    // Last, so that everything else is closed before another engine may own the store.
    _lock: FileLocks,
}

impl Store {
    /// Opens the first store of the namespace that nobody owns. It is marked as not closed,
    /// durably, when this returns. Stores that nobody uses are removed as far as needed to stay
    /// within the wish's total.
    ///
    /// # Errors
    /// [`Error::TryLater`] when all are taken, or others leave no room for one block;
    /// [`Error::Config`] when not even one block fits or something is not private; [`Error::Io`].
    pub fn open(wish: &Wish<'_>) -> Result<Opened> {
        let new = blank(wish)?;
        let most = wish.capacity_bytes.min(wish.total_bytes.saturating_sub(limits::LEDGER_BYTES));
        if layout(wish, most, &new)?.extents_max == 0 {
            return Err(Error::config(
                "nvme_size",
                format!("{} does not hold one block of {}", show(most), show(wish.geometry.slot_bytes)),
                "Give it at least some hundred blocks",
            ));
        }
        let dir = directory::ensure(wish.dir)?;
        let ledger = Ledger::lock(&dir)?;
        let mut taken = Vec::new();
        for index in 0..limits::STORE_INDEX_MAX {
            let path = dir.join(format!("{}-{index}", namespace_name(&wish.namespace)));
            match claim(&path)? {
                None => taken.push(name_with_owner(&path, owner_pid(&path))),
                Some(lock) => {
                    let room = ledger.make_room(&path, wish.capacity_bytes, wish.total_bytes)?;
                    return take(wish, path, lock, new, room).map(|opened| Opened { taken, ..opened });
                }
            }
        }
        Err(Error::TryLater { what: "every store of this namespace".to_owned(), holder: taken.join(", ") })
    }

    /// The store's random id.
    pub fn id(&self) -> u64 {
        self.superblock.store
    }

    /// The store's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sizes of an extent.
    pub fn geometry(&self) -> &SlotGeometry {
        &self.superblock.geometry
    }

    /// The most bytes that it may take on disk.
    pub fn capacity_bytes(&self) -> u64 {
        self.superblock.capacity_bytes
    }

    /// The generation of contents: extents of another one are worthless.
    pub fn cache_generation(&self) -> u64 {
        self.superblock.cache_generation
    }

    /// Makes everything written so far worthless, and what is written from here on worth something
    /// to this process alone, for its weights changed: durably, when it returns. The next start
    /// makes the store anew. Where no new superblock can be written (a full disk), the old one is
    /// removed instead: the store is no more.
    ///
    /// # Errors
    /// [`Error::Io`]; the store must be used no further. Only when not even its superblock could be
    /// removed do the old contents still count later.
    pub fn bump_cache_generation(&mut self) -> Result<u64> {
        let cache_generation = self.superblock.cache_generation + 1;
        let next = Superblock { cache_generation, private: true, clean: None, ..self.superblock.clone() };
        let written = self.write_superblock(next);
        if written.is_err() && directory::remove(&self.path.join(superblock::NAME)).is_ok() {
            self.dir.sync_all().map_err(|error| Error::io("making durable", &self.path, error, REMEDY))?;
        }
        written.map(|()| cache_generation)
    }

    /// Where extents lie.
    pub fn layout(&self) -> SegmentLayout {
        self.layout
    }

    /// Bytes of an extent.
    pub fn extent_bytes(&self) -> u64 {
        self.layout.extent_bytes
    }

    /// Extents in the segments that are there.
    pub fn extents_ready(&self) -> u32 {
        self.segments.extents_ready()
    }

    /// Extents that the capacity holds.
    pub fn extents_max(&self) -> u32 {
        self.layout.extents_max
    }

    /// Segment and byte offset of an extent.
    pub fn place(&self, extent: ExtentIndex) -> (u32, u64) {
        self.layout.place(extent)
    }

    /// Preallocates the next segment. `None`: capacity or disk have no room for it, or the reserve
    /// would be touched.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Unsupported`] when the filesystem cannot preallocate.
    pub fn grow(&mut self) -> Result<Option<File>> {
        self.segments.grow(self.reserve_bytes)
    }

    /// Whether the store's names still lead to this store: nobody removed or replaced it.
    pub fn still_there(&self) -> bool {
        names(&self.path, &self.dir) && names(&self.path.join(superblock::NAME), &self.superblock_file)
    }

    /// Overwrites an extent with zeros; its room stays allocated. Nobody may be reading or writing
    /// it. It reaches the disk when the system next writes back, or with [`Store::close_clean`].
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Config`] for an extent that is not there.
    pub fn erase(&self, extent: ExtentIndex) -> Result<()> {
        self.segments.erase(extent, self.layout.extent_bytes)
    }

    /// Overwrites extents with zeros as [`Store::erase`] does, durably when it returns. Returns
    /// those that could not be, and may still be read by a later start; the first reason is logged.
    pub fn erase_durably(&self, extents: &[ExtentIndex]) -> Vec<ExtentIndex> {
        let (mut failed, mut why) = (Vec::new(), None);
        for run in runs(extents, self.layout) {
            let bytes = run.len() as u64 * self.layout.extent_bytes;
            if let Err(error) = self.segments.erase(run[0], bytes) {
                failed.extend_from_slice(run);
                why = why.or(Some(error));
            }
        }
        let segments: BTreeSet<u32> = extents.iter().map(|extent| self.place(*extent).0).collect();
        if let Err(error) = self.segments.sync_whole(segments.into_iter()) {
            (failed, why) = (extents.to_vec(), Some(error));
        }
        if let Some(error) = why {
            log::error!("{} blocks that were to be forgotten could not be erased from disk: {error}", failed.len());
        }
        failed
    }

    /// Writes down what lies where, so that the next start needs no scan. Nothing may be written to
    /// the store after it.
    ///
    /// # Errors
    /// [`Error::Io`]; the next start scans then.
    pub fn close_clean(&mut self, entries: &[SnapshotEntry], next_sequence: u64) -> Result<()> {
        let subject = Subject { store: self.id(), cache_generation: self.cache_generation(), next_sequence };
        let (bytes, snapshot_sum) = snapshot::encode(&subject, entries);
        self.segments.sync()?;
        directory::replace(&self.path, snapshot::NAME, &bytes)?;
        let clean = Some(Clean { next_sequence, snapshot_sum });
        self.write_superblock(Superblock { clean, ..self.superblock.clone() })
    }

    fn write_superblock(&mut self, next: Superblock) -> Result<()> {
        self.superblock_file = directory::replace(&self.path, superblock::NAME, &next.encode()?)?;
        self.superblock = next;
        Ok(())
    }
}

/// A superblock that may be used, or why there is none.
fn reusable(wish: &Wish<'_>, path: &Path) -> Result<std::result::Result<Superblock, String>> {
    let found = match Superblock::load(path) {
        Ok(found) => found,
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
            let rest = if segments::present(path)?.is_empty() { "" } else { "its superblock is missing" };
            return Ok(Err(rest.to_owned()));
        }
        Err(Error::DataLost { what, problem }) => return Ok(Err(format!("its {what} is damaged: {problem}"))),
        Err(error) => return Err(error),
    };
    if found.private {
        return Ok(Err("it was of weights that were changed in the process that stored it".to_owned()));
    }
    if !wish.reuse {
        return Ok(Err("earlier contents were not wanted".to_owned()));
    }
    if found.namespace != wish.namespace || found.geometry != *wish.geometry {
        return Ok(Err("it was made for another model or deployment".to_owned()));
    }
    Ok(Ok(found))
}

/// The superblock of a new store, but for its segments' size.
fn blank(wish: &Wish<'_>) -> Result<Superblock> {
    Ok(Superblock {
        store: random()?,
        namespace: wish.namespace,
        capacity_bytes: wish.capacity_bytes,
        segment_bytes: 0,
        cache_generation: 0,
        private: false,
        created_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        clean: None,
        facts: wish.facts.to_owned(),
        geometry: wish.geometry.clone(),
    })
}

/// How a capacity is divided in a store made anew.
fn layout(wish: &Wish<'_>, capacity_bytes: u64, new: &Superblock) -> Result<SegmentLayout> {
    let segment_bytes = space::segment_bytes(capacity_bytes, wish.segment_bytes_max);
    Ok(SegmentLayout::new(capacity_bytes, new.encode()?.len() as u64, wish.geometry.slot_bytes, segment_bytes))
}

fn take(wish: &Wish<'_>, path: PathBuf, lock: FileLocks, new: Superblock, room: Room) -> Result<Opened> {
    let Room { capacity_bytes, removed, warnings, used } = room;
    let fresh = layout(wish, capacity_bytes, &new)?;
    if fresh.extents_max == 0 {
        return Err(no_room(wish, &path, &lock, &used)?);
    }
    let wish = &Wish { capacity_bytes, ..wish.clone() };
    let (superblock_bytes, extent_bytes) = (new.encode()?.len() as u64, wish.geometry.slot_bytes);
    let reused = reusable(wish, &path)?.and_then(|found| {
        let per_segment = (found.segment_bytes / extent_bytes) as u32;
        let layout = SegmentLayout::with(capacity_bytes, superblock_bytes, extent_bytes, per_segment);
        let grown_out = layout.extents_max < fresh.extents_max / 2;
        if grown_out { Err("its segments are too small for its new capacity".to_owned()) } else { Ok((found, layout)) }
    });
    let opened = match reused {
        Ok((found, layout)) => reopen(wish, path, lock, found, layout),
        Err(why) => create(wish, path, lock, Superblock { capacity_bytes, ..new }, fresh, why),
    };
    opened.map(|opened| Opened { removed, warnings, ..opened })
}

/// Others leave no room for one block: what the claim made goes again, with whatever lay there.
fn no_room(wish: &Wish<'_>, path: &Path, lock: &FileLocks, used: &[String]) -> Result<Error> {
    clear(path)?;
    lock.unlink(&path.join(LOCK_NAME))?;
    // Files of others may lie there: they stay.
    drop(std::fs::remove_dir(path));
    Ok(Error::TryLater { what: format!("nvme_size {}", show(wish.total_bytes)), holder: used.join(", ") })
}

fn create(
    wish: &Wish<'_>,
    path: PathBuf,
    lock: FileLocks,
    superblock: Superblock,
    layout: SegmentLayout,
    why: String,
) -> Result<Opened> {
    clear(&path)?;
    let segment_bytes = u64::from(layout.per_segment) * layout.extent_bytes;
    let store = assemble(wish, path, lock, Superblock { segment_bytes, ..superblock }, layout)?;
    Ok(Opened::of(store, Vec::new(), Recovery::Fresh, why))
}

fn reopen(wish: &Wish<'_>, path: PathBuf, lock: FileLocks, found: Superblock, layout: SegmentLayout) -> Result<Opened> {
    let listed = entries(&path, &found, layout.extent_bytes);
    let superblock =
        Superblock { clean: None, capacity_bytes: wish.capacity_bytes, facts: wish.facts.to_owned(), ..found };
    let store = assemble(wish, path, lock, superblock, layout)?;
    directory::remove(&store.path.join(snapshot::NAME))?;
    let (ready, groups) = (store.extents_ready(), store.geometry().payload_bytes.len());
    let there = |entry: &SnapshotEntry| entry.extent.0 < ready && usize::from(entry.key.group.0) < groups;
    let (recovery, why) = match listed {
        Ok((mut entries, next_sequence)) => {
            entries.retain(there);
            (Recovery::Snapshot(entries, next_sequence), String::new())
        }
        Err(why) => (Recovery::Scan, why),
    };
    let segments = store.segments.open_direct()?;
    Ok(Opened::of(store, segments, recovery, why))
}

/// What a clean close left, or why it cannot be used.
fn entries(
    path: &Path,
    found: &Superblock,
    extent_bytes: u64,
) -> std::result::Result<(Vec<SnapshotEntry>, u64), String> {
    let clean = found.clean.ok_or_else(|| "it was not closed".to_owned())?;
    let superblock_bytes = found.encode().map_err(|error| error.to_string())?.len() as u64;
    let per_segment = (found.segment_bytes / extent_bytes) as u32;
    let layout = SegmentLayout::with(found.capacity_bytes, superblock_bytes, extent_bytes, per_segment);
    let (subject, entries, sum) = snapshot::load(path, layout.extents_max).map_err(|error| error.to_string())?;
    let wanted =
        Subject { store: found.store, cache_generation: found.cache_generation, next_sequence: clean.next_sequence };
    if subject != wanted || sum != clean.snapshot_sum {
        return Err("its snapshot belongs to another close".to_owned());
    }
    Ok((entries, clean.next_sequence))
}

/// Marks the store as not closed, then looks after its segments.
fn assemble(
    wish: &Wish<'_>,
    path: PathBuf,
    lock: FileLocks,
    superblock: Superblock,
    layout: SegmentLayout,
) -> Result<Store> {
    let superblock_file = directory::replace(&path, superblock::NAME, &superblock.encode()?)?;
    let segments = Segments::adopt(&path, layout, wish.reserve_bytes)?;
    Ok(Store {
        dir: directory::handle(&path)?,
        path,
        superblock,
        superblock_file,
        layout,
        segments,
        reserve_bytes: wish.reserve_bytes,
        _lock: lock,
    })
}

/// Runs of neighbours within a segment.
fn runs(extents: &[ExtentIndex], layout: SegmentLayout) -> impl Iterator<Item = &[ExtentIndex]> {
    extents.chunk_by(move |one, next| next.0 == one.0 + 1 && layout.place(*one).0 == layout.place(*next).0)
}

fn random() -> Result<u64> {
    let source = Path::new("/dev/urandom");
    let mut bytes = [0; 8];
    File::open(source)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| Error::io("reading", source, error, "Make it available to this process"))?;
    Ok(u64::from_le_bytes(bytes))
}
