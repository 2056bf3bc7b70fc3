//! Opening a pool as its owner: adopt what a dead engine left, or make a new one.
//!
//! One start at a time in a directory ([`Turn`]): what it finds free is still free when it
//! takes it.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use super::adopt::{self, Fate};
use super::budget::{Bound, Budget, Machine};
use super::file_system::FileSystem;
use super::header::{self, Purpose};
use super::layout::Layout;
use super::ledger::{self, Room, Share};
use super::mapping::Mapping;
pub use super::wish::Wish;
use super::wish::new_epoch;
use super::{Pool, directory, io, pages, system_page_bytes};
use crate::limits;
use crate::owned::listing::{name_with_owner, namespace_name};
use crate::owned::lock::{FileLocks, Turn};
use kvcellar_block::error::{Error, Result};
use kvcellar_block::size::show;

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
    /// What the user should know and can change, each with its remedy.
    pub warnings: Vec<String>,
    /// What was removed for this pool's sake, for the log.
    pub removed: Vec<String>,
}

/// Opens the first pool of the namespace that no living engine owns.
///
/// # Errors
/// [`Error::TryLater`] when all indices are taken, or other starts take too long; [`Error::Config`]
/// when not even one slot fits, or other engines have all of the configured size; [`Error::Io`].
pub fn open(wish: &Wish<'_>, progress: &mut dyn FnMut(u64, u64)) -> Result<Opened> {
    let dir = directory::ensure(wish.pool_dir)?;
    let patience = Duration::from_millis(limits::POOL_TURN_WAIT_MS);
    let _turn = Turn::wait(&dir.join(directory::TURN_NAME), &directory::POOLS, patience)?;
    let mut taken = Vec::new();
    for index in 0..limits::POOL_INDEX_MAX {
        let path = dir.join(format!("{}-{index}.pool", namespace_name(&wish.namespace)));
        match claim(&path)? {
            None => taken.push(holder(&path)),
            Some((file, locks)) => match take(wish, &path, file, locks, progress) {
                Ok(opened) => return Ok(Opened { taken, ..opened }),
                // A command or another version took it between two of our steps.
                Err(Error::TryLater { .. }) => taken.push(holder(&path)),
                Err(error) => return Err(error),
            },
        }
    }
    Err(Error::TryLater { what: "every pool of this namespace".to_owned(), holder: taken.join(", ") })
}

/// Becomes the owner of the file at `path`, if nobody is.
fn claim(path: &Path) -> Result<Option<(File, FileLocks)>> {
    // A few tries: between opening and locking, another start may replace the file.
    for _ in 0..3 {
        let file = directory::open_or_create(path)?;
        let lock_file = file.try_clone().map_err(|error| io(path, error))?;
        if let Some(locks) = FileLocks::own(lock_file, path) {
            return Ok(Some((file, locks)));
        }
    }
    Ok(None)
}

fn holder(path: &Path) -> String {
    name_with_owner(path, header::head(path).ok().and_then(|bytes| header::owner_pid_in(&bytes)))
}

/// Files below the pool directory are multiples of this.
fn page_bytes(wish: &Wish<'_>) -> u64 {
    FileSystem::of(wish.pool_dir).map_or(limits::SLOT_ALIGN, |found| found.page_bytes)
}

fn take(
    wish: &Wish<'_>,
    path: &Path,
    file: File,
    locks: FileLocks,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Opened> {
    let wanted = purpose(wish, Layout::within(0, 0, wish.geometry.slot_bytes));
    let head = header::head(path).ok().filter(|bytes| !header::is_private_in(bytes));
    let found = head.and_then(|bytes| Purpose::read(&bytes).ok()).filter(|found| found.fits(&wanted));
    let patience = Duration::from_millis(limits::ADOPTION_WAIT_MS);
    let quiet = locks.drain_mappers(if found.is_some() { patience } else { Duration::ZERO });
    let page = page_bytes(wish);
    let left = found.filter(|_| quiet && wish.adopt).and_then(|found| adopt::Left::look(found, &file, page));
    let Some(left) = left else {
        // A new file in any case: a process of an earlier engine may still map the old one.
        fs::remove_file(path).map_err(|error| io(path, error))?;
        drop((file, locks));
        let room = make_room(wish, path, 0, patience)?;
        return create(wish, path, &room, progress);
    };
    let mut room = make_room(wish, path, left.bytes, patience)?;
    let machine = Machine::look(wish.pool_dir);
    let budget = machine.budget(room.most, left.bytes);
    let fate = left.fate(floor(room.most.bytes, page), floor(budget.bytes, page));
    if fate != Fate::Replace
        && let Ok((pool, slots)) = adopt::adopt(wish, path, &file, left, fate, &locks, progress)
    {
        let changed = slots != left.layout.slots;
        let got = Budget { bytes: pool.bytes(), bound: if changed { budget.bound } else { room.most.bound } };
        let warnings =
            cut(wish, &machine, &room, Budget { bytes: pool.bytes(), bound: budget.bound }).into_iter().collect();
        let pool = Pool { locks, ..pool };
        let removed = ledger::describe_removed(&room.removed).into_iter().collect();
        let budget = changed.then_some(got);
        return Ok(Opened { pool, adopted: true, budget, taken: Vec::new(), warnings, removed });
    }
    fs::remove_file(path).map_err(|error| io(path, error))?;
    drop((file, locks));
    room.replaced = (fate == Fate::Replace).then_some(left.bytes);
    create(wish, path, &room, progress)
}

/// `bytes` as a file can have them. Where pages are no larger than what slots are multiples of, a
/// pool's length always is one.
fn floor(bytes: u64, page: u64) -> u64 {
    if page > limits::SLOT_ALIGN { bytes / page * page } else { bytes }
}

fn make_room(wish: &Wish<'_>, path: &Path, own_bytes: u64, patience: Duration) -> Result<Room> {
    if wish.explicit {
        Machine::look(wish.pool_dir).refuse_impossible(wish.total.max(wish.bytes))?;
    }
    let share = Share { bytes: wish.bytes, total: wish.total, explicit: wish.explicit };
    ledger::make_room(wish.pool_dir, share, (path, own_bytes), smallest(wish), patience)
}

/// Bytes of a pool with one slot.
fn smallest(wish: &Wish<'_>) -> u64 {
    let slot_bytes = wish.geometry.slot_bytes;
    // A page more, as the place of the slots is rounded up.
    Layout { slots: 1, table_slots: 1, slot_bytes }.file_bytes(page_bytes(wish)) + system_page_bytes()
}

fn purpose(wish: &Wish<'_>, layout: Layout) -> Purpose {
    let geometry = wish.geometry;
    Purpose::new(wish.namespace, geometry.parts.len() as u32, layout, geometry.descriptor_bytes)
}

/// What to tell about a written size of which a tenth or more is missing.
fn cut(wish: &Wish<'_>, machine: &Machine, room: &Room, got: Budget) -> Option<String> {
    let who = if got.bound == Bound::Engines { format!(": {}", room.holders) } else { String::new() };
    (wish.explicit && got.bound != Bound::Configured && got.bytes < wish.bytes / 10 * 9).then(|| {
        format!(
            "dram_size: {} instead of {} for this engine, because of {} ({}{who}); to have all of it, {}",
            show(got.bytes),
            show(wish.bytes),
            got.bound,
            wish.pool_dir.display(),
            machine.remedy(got.bound)
        )
    })
}

fn create(wish: &Wish<'_>, path: &Path, room: &Room, progress: &mut dyn FnMut(u64, u64)) -> Result<Opened> {
    let (machine, page) = (Machine::look(wish.pool_dir), page_bytes(wish));
    let budget = machine.budget(room.most, 0);
    let layout = Layout::within(floor(budget.bytes, page), wish.bytes, wish.geometry.slot_bytes);
    if layout.slots == 0 {
        return Err(too_small(wish, &machine, budget));
    }
    let (file, locks) = claim(path)?.ok_or_else(|| Error::TryLater {
        what: path.display().to_string(),
        holder: "somebody took it at the same moment".to_owned(),
    })?;
    match build(wish, path, layout, &file, &locks, progress) {
        Ok(map) => {
            let counts = (layout.slots as u32, layout.table_slots as u32);
            let pool = Pool::assemble(map, path.to_owned(), counts, wish.geometry.clone(), locks)?;
            let warnings = cut(wish, &machine, room, budget).into_iter().collect();
            let mut removed: Vec<String> = ledger::describe_removed(&room.removed).into_iter().collect();
            removed.extend(room.replaced.map(|old| {
                format!(
                    "replaced this model's pool of {} by one of {}; its blocks are lost",
                    show(old),
                    show(pool.bytes())
                )
            }));
            Ok(Opened { pool, adopted: false, budget: Some(budget), taken: Vec::new(), warnings, removed })
        }
        Err(error) => {
            // Half a pool is of no use to anyone; the first error is the one to report.
            drop(locks.unlink(path));
            Err(error)
        }
    }
}

fn build(
    wish: &Wish<'_>,
    path: &Path,
    layout: Layout,
    file: &File,
    locks: &FileLocks,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Mapping> {
    locks.share_mapping(path)?;
    locks.mark_used();
    file.set_len(layout.file_bytes(page_bytes(wish))).map_err(|error| io(path, error))?;
    let map = Mapping::of(file, path)?;
    map.place(wish.near);
    pages::fill(&map, file, path, progress)?;
    let header = header::Header::of(&map);
    header.write(purpose(wish, layout), wish.facts);
    header.take_over(new_epoch());
    Ok(map)
}

fn too_small(wish: &Wish<'_>, machine: &Machine, budget: Budget) -> Error {
    let remedy = match budget.bound {
        Bound::Configured => String::new(),
        bound => format!("; {}", machine.remedy(bound)),
    };
    Error::config(
        "dram_size",
        format!("{} (bounded by {}) does not hold one block", show(budget.bytes), budget.bound),
        format!("Give it at least {}{remedy}", show(smallest(wish))),
    )
}
