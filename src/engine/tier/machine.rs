//! What of a configuration cannot work on this machine, told before a model is loaded.
//!
//! Each mistake is one line that names the key and the remedy. Looks at directories and file
//! systems only: no thread, no pool, no store, and nothing is made but a missing `nvme_dir` in a
//! directory that exists.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::path::Path;

use nix::unistd::{AccessFlags, access};

use super::opening::default_reserve;
use crate::config::{Config, NvmeConfig};
use crate::limits::NVME_ROOM_MIN;
use crate::nvme::{directory as stores, registry, space};
use crate::pool::budget::{Bound, Machine};
use crate::pool::directory as pools;
use crate::pool::file_system::FileSystem;
use kvcellar_block::error::{Error, Result};
use kvcellar_block::size::show;

/// Checks directories and sizes. Returns what works but will hold less than the user may expect.
///
/// # Errors
/// [`Error::Config`] naming the key and the remedy.
pub fn check(config: &Config) -> Result<Vec<String>> {
    let mut warnings: Vec<String> = pool(config)?.into_iter().collect();
    if let Some(dir) = &config.nvme.dir {
        warnings.extend(disk(&config.nvme, dir, &config.pool_dir)?);
    }
    for (key, file) in [("trace_file", &config.trace_file), ("record_trace", &config.record_trace)] {
        if let Some(file) = file {
            output(key, file)?;
        }
    }
    Ok(warnings)
}

fn pool(config: &Config) -> Result<Option<String>> {
    let (key, dir) = ("pool_dir", config.pool_dir.as_path());
    let make = || format!("Make it (mkdir -p {}), on a tmpfs, or leave pool_dir out for /dev/shm", dir.display());
    is_directory(key, dir, &look(dir).map_err(|error| unreadable(key, dir, &error, make()))?)?;
    let found = FileSystem::of(dir);
    if found.is_some_and(|found| !found.is_memory()) {
        return Err(Error::config(
            key,
            format!("{} does not lie in memory", dir.display()),
            format!("Name a tmpfs such as /dev/shm, or mount one there (mount -t tmpfs tmpfs {})", dir.display()),
        ));
    }
    pools::check_present(dir)?;
    may_write(key, dir, &pools::path(dir))?;
    if !config.dram_explicit {
        return Ok(None);
    }
    let machine = Machine::look(dir);
    machine.refuse_impossible(config.dram_bytes)?;
    let whole = found.and_then(|found| found.total_bytes).filter(|whole| *whole < config.dram_bytes);
    Ok(whole.map(|whole| {
        format!(
            "dram_size: {} cannot be had, as {} has {} in all; to have all of it, {}",
            show(config.dram_bytes),
            dir.display(),
            show(whole),
            machine.remedy(Bound::SharedMemory)
        )
    }))
}

fn disk(nvme: &NvmeConfig, dir: &Path, pool_dir: &Path) -> Result<Option<String>> {
    let made = make_missing(dir)?;
    let checked = disk_there(nvme, dir, pool_dir);
    if made && checked.is_err() {
        // Another path was meant, perhaps. If it cannot be removed, the message above all matters.
        let _left_there = fs::remove_dir(dir);
    }
    checked
}

fn disk_there(nvme: &NvmeConfig, dir: &Path, pool_dir: &Path) -> Result<Option<String>> {
    let key = "nvme_dir";
    is_directory(key, dir, &look(dir).map_err(|error| missing_disk(dir, &error))?)?;
    if fs::canonicalize(dir).ok().is_some_and(|dir| fs::canonicalize(pool_dir).ok() == Some(dir)) {
        return Err(Error::config(key, "is the same directory as pool_dir", "Name a directory on a local disk"));
    }
    if let Some(found) = FileSystem::of(dir).filter(FileSystem::is_memory) {
        let problem = format!("{} lies in memory ({}), which is no disk", dir.display(), found.kind);
        return Err(Error::config(key, problem, "Name a directory on a local disk"));
    }
    stores::check_present(dir)?;
    may_write(key, dir, &stores::path(dir))?;
    let whole = FileSystem::of(dir).and_then(|found| found.total_bytes);
    if let Some(whole) = whole.filter(|whole| nvme.bytes_explicit && nvme.bytes > *whole) {
        return Err(Error::config(
            "nvme_size",
            format!("{} is more than {} has in all, {}", show(nvme.bytes), dir.display(), show(whole)),
            "Write less, or name a larger disk as nvme_dir",
        ));
    }
    room(nvme, dir)
}

/// A tier that cannot grow by a few blocks is said to be one.
fn room(nvme: &NvmeConfig, dir: &Path) -> Result<Option<String>> {
    let (free, reserve) = (space::free_bytes(dir)?, nvme.reserve_bytes.unwrap_or_else(|| default_reserve(dir)));
    if free >= reserve.saturating_add(NVME_ROOM_MIN) {
        return Ok(None);
    }
    let there: u64 = registry::list(dir)?.iter().map(|store| store.bytes).sum();
    let effect = match there {
        0 => "the nvme tier will hold nothing".to_owned(),
        there => format!("stores there have {} and cannot grow", show(there)),
    };
    Ok(Some(format!(
        "nvme_dir: {effect}: {} has {} free, and nvme_reserve keeps {}. Free some, name a larger disk, or write a smaller \
         nvme_reserve (0 reserves nothing)",
        dir.display(),
        show(free),
        show(reserve)
    )))
}

/// A file that is to be written.
fn output(key: &'static str, file: &Path) -> Result<()> {
    if fs::metadata(file).is_ok_and(|found| found.is_dir()) {
        return Err(Error::config(key, format!("{} is a directory", file.display()), "Name a file in it"));
    }
    let dir = file.parent().unwrap_or(file);
    let make = || format!("Make {}, or name a file in another directory", dir.display());
    is_directory(key, dir, &look(dir).map_err(|error| unreadable(key, dir, &error, make()))?)?;
    may_write(key, dir, file)
}

fn look(dir: &Path) -> std::io::Result<Metadata> {
    fs::metadata(dir)
}

/// Makes the directory when only that is missing: on a fresh disk it usually is. Returns whether it
/// was made.
fn make_missing(dir: &Path) -> Result<bool> {
    match look(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            fs::create_dir(dir).map(|()| true).map_err(|error| missing_disk(dir, &error))
        }
        _ => Ok(false),
    }
}

fn missing_disk(dir: &Path, error: &std::io::Error) -> Error {
    let remedy = format!("Make it (mkdir -p {}) for this user, or name another directory", dir.display());
    unreadable("nvme_dir", dir, error, remedy)
}

fn unreadable(key: &str, dir: &Path, error: &std::io::Error, remedy: String) -> Error {
    let problem = match error.kind() {
        ErrorKind::NotFound => format!("{} does not exist", dir.display()),
        _ => format!("{} cannot be used ({error})", dir.display()),
    };
    Error::config(key, problem, remedy)
}

fn is_directory(key: &str, dir: &Path, found: &Metadata) -> Result<()> {
    if found.is_dir() {
        return Ok(());
    }
    Err(Error::config(key, format!("{} is no directory", dir.display()), "Name a directory"))
}

/// This user must be able to write to `own` where that is there, else to make it in `dir`.
fn may_write(key: &str, dir: &Path, own: &Path) -> Result<()> {
    let (place, how) = match fs::symlink_metadata(own) {
        Ok(found) if found.is_dir() => (own, AccessFlags::W_OK | AccessFlags::X_OK),
        Ok(_) => (own, AccessFlags::W_OK),
        Err(_) => (dir, AccessFlags::W_OK | AccessFlags::X_OK),
    };
    access(place, how).map_err(|errno| {
        let problem = format!("{} cannot be written to by this user ({errno})", place.display());
        Error::config(key, problem, "Give this user the rights, or name another directory")
    })
}
