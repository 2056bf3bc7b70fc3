//! Opening a pool as its owner: adopt what a dead engine left, or make a new one.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use super::budget::{Budget, Machine};
use super::header::{self, Purpose};
use super::lock::PoolLocks;
use super::mapping::Mapping;
use super::{Pool, directory, file_bytes, io, slots_in};
use crate::block::SlotGeometry;
use crate::config::size::show;
use crate::error::{Error, Result};
use crate::limits;

/// What kind of pool a start wants.
#[derive(Debug, Clone)]
pub struct Wish<'a> {
    /// Shared-memory directory.
    pub pool_dir: &'a Path,
    /// Fingerprint of everything that makes bytes interchangeable.
    pub namespace: [u8; 16],
    /// The facts behind the fingerprint, as JSON.
    pub facts: &'a str,
    /// Configured size.
    pub bytes: u64,
    /// The size was written by the user, not a default.
    pub explicit: bool,
    /// Whether contents of an earlier engine may be adopted.
    pub adopt: bool,
    /// Sizes of a slot.
    pub geometry: &'a SlotGeometry,
    /// Memory nodes next to the devices that copy; empty: not known.
    pub near: &'a [u32],
}

/// A pool that this process owns.
#[derive(Debug)]
pub struct Opened {
    /// The pool.
    pub pool: Pool,
    /// Its contents come from an earlier engine and may be adopted.
    pub adopted: bool,
    /// What bounded its size; `None` when it was adopted as it was.
    pub budget: Option<Budget>,
    /// Pools of this namespace that were taken, for the log.
    pub taken: Vec<String>,
}

/// Hex form of a namespace, as in file names.
pub fn namespace_name(namespace: &[u8; 16]) -> String {
    use std::fmt::Write;
    namespace.iter().fold(String::new(), |mut name, byte| {
        // Writing to a String cannot fail.
        let _infallible = write!(name, "{byte:02x}");
        name
    })
}

/// Opens the first pool of the namespace that no living engine owns.
///
/// # Errors
/// [`Error::TryLater`] when all indices are taken, [`Error::Config`] when not even one slot fits, [`Error::Io`].
pub fn open(wish: &Wish<'_>, progress: &mut dyn FnMut(u64, u64)) -> Result<Opened> {
    let dir = directory::ensure(wish.pool_dir)?;
    let mut taken = Vec::new();
    for index in 0..limits::POOL_INDEX_MAX {
        let path = dir.join(format!("{}-{index}.pool", namespace_name(&wish.namespace)));
        match claim(&path)? {
            None => taken.push(holder(&path)),
            Some((file, locks)) => match take(wish, &path, file, locks, progress) {
                Ok(opened) => return Ok(Opened { taken, ..opened }),
                // Another start was quicker between two of our steps.
                Err(Error::TryLater { .. }) => taken.push(holder(&path)),
                Err(error) => return Err(error),
            },
        }
    }
    Err(Error::TryLater { what: "every pool of this namespace".to_owned(), holder: taken.join(", ") })
}

/// Becomes the owner of the file at `path`, if nobody is.
fn claim(path: &Path) -> Result<Option<(File, PoolLocks)>> {
    // A few tries: between opening and locking, another start may replace the file.
    for _ in 0..3 {
        let file = directory::open_or_create(path)?;
        let lock_file = file.try_clone().map_err(|error| io(path, error))?;
        if let Some(locks) = PoolLocks::own(lock_file, path) {
            return Ok(Some((file, locks)));
        }
    }
    Ok(None)
}

fn holder(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match head(path).ok().and_then(|bytes| header::owner_pid_in(&bytes)) {
        Some(pid) => format!("{name} (process {pid})"),
        None => name,
    }
}

/// The header pages of a pool file.
pub(super) fn head(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limits::HEADER_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn take(
    wish: &Wish<'_>,
    path: &Path,
    file: File,
    locks: PoolLocks,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Opened> {
    let wanted = purpose(wish, 0);
    let head = head(path).ok().filter(|bytes| !header::is_private_in(bytes));
    let found = head.and_then(|bytes| Purpose::read(&bytes).ok()).filter(|found| found.fits(&wanted));
    let quiet = locks.drain_mappers(Duration::from_millis(if found.is_some() { limits::ADOPTION_WAIT_MS } else { 0 }));
    if let Some(found) = found.filter(|_| quiet && wish.adopt)
        && let Ok(pool) = adopt(wish, path, &file, &found, &locks, progress)
    {
        return Ok(Opened { pool: Pool { locks, ..pool }, adopted: true, budget: None, taken: Vec::new() });
    }
    // A new file in any case: a process of an earlier engine may still map the old one.
    fs::remove_file(path).map_err(|error| io(path, error))?;
    drop((file, locks));
    create(wish, path, progress)
}

fn purpose(wish: &Wish<'_>, slot_count: u64) -> Purpose {
    let geometry = wish.geometry;
    let ranks = geometry.parts.len() as u32;
    Purpose::new(wish.namespace, ranks, slot_count, geometry.slot_bytes, geometry.descriptor_bytes, wish.bytes)
}

fn adopt(
    wish: &Wish<'_>,
    path: &Path,
    file: &File,
    found: &Purpose,
    locks: &PoolLocks,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Pool> {
    locks.share_mapping(path)?;
    let slot_count = u32::try_from(found.slot_count).map_err(|_| Error::lost("pool header", "slot count"))?;
    // The assembled pool gets the caller's locks; these stand in until then and hold nothing the caller does not.
    let stand_in = PoolLocks::attach(file.try_clone().map_err(|error| io(path, error))?, path)?;
    let pool = Pool::assemble(Mapping::of(file, path)?, path.to_owned(), slot_count, wish.geometry.clone(), stand_in)?;
    pool.header().take_over(new_epoch());
    pool.place(wish.near);
    pool.populate(progress)?;
    Ok(pool)
}

fn create(wish: &Wish<'_>, path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Opened> {
    let budget = Machine::look(wish.pool_dir).budget(wish.bytes, wish.explicit)?;
    let slot_count = slots_in(budget.bytes, wish.geometry);
    if slot_count == 0 {
        let one = file_bytes(1, wish.geometry) + limits::SLOT_ALIGN;
        return Err(Error::config(
            "dram_size",
            format!("{} (bounded by {}) does not hold one block", show(budget.bytes), budget.bound),
            format!("Give it at least {}", show(one)),
        ));
    }
    let (file, locks) = claim(path)?.ok_or_else(|| Error::TryLater {
        what: path.display().to_string(),
        holder: "another start took it at the same moment".to_owned(),
    })?;
    let built = (|| {
        locks.share_mapping(path)?;
        file.set_len(file_bytes(slot_count, wish.geometry)).map_err(|error| io(path, error))?;
        let map = Mapping::of(&file, path)?;
        map.place(wish.near);
        map.populate(path, progress)?;
        let header = header::Header::of(&map);
        header.write(purpose(wish, slot_count), wish.facts);
        header.take_over(new_epoch());
        Ok(map)
    })();
    match built {
        Ok(map) => {
            let pool = Pool::assemble(map, path.to_owned(), slot_count as u32, wish.geometry.clone(), locks)?;
            Ok(Opened { pool, adopted: false, budget: Some(budget), taken: Vec::new() })
        }
        Err(error) => {
            // Half a pool is of no use to anyone; the first error is the one to report.
            drop(locks.unlink(path));
            Err(error)
        }
    }
}

/// A number that no earlier owner of a pool used: time and process id, mixed.
fn new_epoch() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    xxhash_rust::xxh3::xxh3_64_with_seed(&now.as_nanos().to_le_bytes(), u64::from(std::process::id())).max(1)
}
