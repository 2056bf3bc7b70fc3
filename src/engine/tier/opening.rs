//! Opening the nvme tier: store, disk, what survived, mover.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::disk_tier::{DiskParts, DiskSettings};
use super::engine::TierEngine;
use super::mover::{Mover, ToMover};
use crate::config::nvme::StagingChoice;
use crate::config::{Config, NvmeConfig};
use crate::limits::{PAGE_TRIAL_BYTES, STAGING_BYTES, STAGING_POOL_SHARE};
use crate::nvme::buffer::Region;
use crate::nvme::disk::{Completions, Description};
use crate::nvme::page_trial::{self, PageTrial};
use crate::nvme::staging::HugeStaging;
use crate::nvme::store::{Opened, Recovery, Store, Wish};
use crate::nvme::{probe, recovery, space};
use crate::policy::WriteBudget;
use crate::policy::write_budget::WriteRate;
use crate::pool::Pool;
use kvcellar_block::error::{Error, Result};
use kvcellar_block::size::show;

/// What a start tells about its nvme tier.
#[derive(Debug, Clone)]
pub struct DiskReport {
    /// The store's directory.
    pub path: String,
    /// Blocks it can hold.
    pub extents_max: u32,
    /// Blocks that survived.
    pub blocks: u64,
    /// How they were found: `fresh`, `snapshot` or `scan`.
    pub recovery: &'static str,
    /// Extents whose descriptor was not whole.
    pub damaged: u64,
    /// The device.
    pub disk: Description,
    /// Why transfers pass through huge pages, or do not although they should; empty in the usual
    /// case.
    pub staging: String,
    /// Stores of this namespace that were taken.
    pub taken: Vec<String>,
    /// What else there is to say; empty for nothing.
    pub why: String,
    /// Stores that nobody used and that went for this one.
    pub removed: Vec<String>,
    /// What somebody should know, with the remedy.
    pub warnings: Vec<String>,
}

impl DiskReport {
    /// There is no tier, although one was asked for: the engine serves without it.
    fn none(dir: &Path, why: &Error) -> Self {
        let warning = match why {
            Error::Io { action, path, source, .. } => format!(
                "the nvme tier holds nothing: {action} {} failed: {source}. nvme_dir needs room that is not in use, and \
                 rights to write: free some, or set it to another disk. Memory serves without it",
                path.display()
            ),
            _ => format!(
                "there is no nvme tier: {why}. Raise nvme_size, set nvme_dir to another disk, or stop one of them"
            ),
        };
        Self {
            path: dir.display().to_string(),
            extents_max: 0,
            blocks: 0,
            recovery: "none",
            damaged: 0,
            disk: Description { engine: "none", direct: false, registered: false, why: String::new() },
            staging: String::new(),
            taken: Vec::new(),
            why: String::new(),
            removed: Vec::new(),
            warnings: vec![warning],
        }
    }
}

/// What a start knows of its contents.
#[derive(Debug, Clone, Copy)]
pub struct Identity<'a> {
    /// Fingerprint of everything that makes bytes interchangeable.
    pub namespace: [u8; 16],
    /// The facts behind it, as JSON.
    pub facts: &'a str,
    /// Block hashes mean the same after a restart.
    pub stable: bool,
}

/// Gives an engine that has a pool the nvme tier of its configuration, if there is one, and starts
/// its mover. `engines`: of this machine that start together and share `nvme_size`. Where others
/// have taken all of it, or the system refuses (a disk that is full to the last block), there is no
/// tier, no mover and a warning: a cache must not keep vLLM from serving, nor a disk the memory.
///
/// # Errors
/// Those of [`Store::open`] and of [`probe::open`] that a user can mend in the configuration; the
/// engine is as it was then.
pub fn open_disk(
    engine: &Arc<Mutex<TierEngine>>,
    config: &Config,
    identity: Identity<'_>,
    engines: u32,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Option<(Option<Mover>, DiskReport)>> {
    let Some(dir) = &config.nvme.dir else { return Ok(None) };
    // Where the pool could not be had there is nothing that a disk could lie below.
    let Some(pool) = lock(engine).pool().cloned() else { return Ok(None) };
    match opened(engine, config, (dir, &pool), identity, engines, progress) {
        Err(refused @ (Error::TryLater { .. } | Error::Io { .. })) => {
            lock(engine).expect_no_disk();
            Ok(Some((None, DiskReport::none(dir, &refused))))
        }
        outcome => outcome.map(Some),
    }
}

fn opened(
    engine: &Arc<Mutex<TierEngine>>,
    config: &Config,
    (dir, pool): (&Path, &Arc<Pool>),
    identity: Identity<'_>,
    engines: u32,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(Option<Mover>, DiskReport)> {
    let nvme = &config.nvme;
    let private = lock(engine).is_private();
    let reserve_bytes = nvme.reserve_bytes.unwrap_or_else(|| default_reserve(dir));
    let wish = Wish {
        dir,
        namespace: identity.namespace,
        facts: identity.facts,
        capacity_bytes: nvme.bytes / u64::from(engines.max(1)),
        total_bytes: nvme.bytes,
        reserve_bytes,
        geometry: pool.geometry(),
        reuse: identity.stable && !private,
        segment_bytes_max: None,
    };
    let Opened { mut store, mut segments, recovery, taken, why, removed, mut warnings } = Store::open(&wish)?;
    if private {
        store.bump_cache_generation()?;
    }
    if segments.is_empty() {
        // At once, so that it is known how the disk can be used, and that there is room at all.
        segments.extend(store.grow()?);
    }
    warnings.extend(shortage(&store, reserve_bytes)?);
    let (entries, next_sequence, found, damaged) = match recovery {
        Recovery::Fresh => (Vec::new(), 1, "fresh", 0),
        Recovery::Snapshot(entries, next) => (entries, next, "snapshot", 0),
        Recovery::Scan => {
            let scanned = scan(nvme, &store, &segments, progress)?;
            (scanned.entries, scanned.next_sequence, "scan", scanned.damaged)
        }
    };
    let (jobs, inbox) = crossbeam_channel::unbounded();
    let completions: Arc<dyn Completions> = Arc::new(ToMover::new(jobs.clone(), Arc::clone(pool)));
    let (staging, staged) = staging_of(nvme, reserve_bytes, engine, pool, store.path());
    let mut regions: Vec<Arc<dyn Region>> = vec![Arc::clone(pool) as Arc<dyn Region>];
    regions.extend(staging.as_ref().map(|staging| Arc::clone(staging.region())));
    let disk = probe::open(nvme.engine, regions, &completions, store.path())?;
    for segment in segments {
        disk.add_segment(segment)?;
    }
    let report = DiskReport {
        path: store.path().display().to_string(),
        extents_max: store.extents_max(),
        blocks: entries.len() as u64,
        recovery: found,
        damaged,
        disk: disk.describe(),
        staging: staged,
        taken,
        why,
        removed,
        warnings,
    };
    let staging_bytes = staging.as_ref().map_or(0, HugeStaging::bytes);
    check_budget(nvme, &store)?;
    let parts = DiskParts { store, disk, jobs, found: &entries, next_sequence, staging_bytes };
    lock(engine).open_disk(parts, settings_of(config));
    let mover = Mover::start(engine, inbox, staging).ok_or_else(|| Error::DeviceDead {
        device: "the nvme tier's mover".to_owned(),
        problem: "no thread could be started".to_owned(),
        remedy: "Raise the limit on processes".to_owned(),
    })?;
    Ok((Some(mover), report))
}

/// The memory that transfers pass through, and what there is to say about it; nothing in the usual
/// case.
fn staging_of(
    nvme: &NvmeConfig,
    reserve_bytes: u64,
    engine: &Arc<Mutex<TierEngine>>,
    pool: &Arc<Pool>,
    dir: &Path,
) -> (Option<HugeStaging>, String) {
    let bytes = pool.geometry().slot_bytes;
    let made = |why: String| match HugeStaging::new(bytes) {
        Some(staging) => (Some(staging), why),
        None => (None, "transfers go directly: blocks are too large for staging".to_owned()),
    };
    match nvme.staging {
        StagingChoice::Off => (None, String::new()),
        StagingChoice::On => made("transfers pass through huge pages: the configuration asks for it".to_owned()),
        // Half of it, because the ends of a mapping may not fill a huge page.
        StagingChoice::Auto
            if pool.huge_bytes() > pool.bytes() / 2 || pool.bytes() < STAGING_POOL_SHARE * STAGING_BYTES =>
        {
            (None, String::new())
        }
        StagingChoice::Auto => {
            let small = lock(engine).free_part(PAGE_TRIAL_BYTES).map(|part| part as Arc<dyn Region>);
            match page_trial::run(nvme.engine, dir, reserve_bytes, small) {
                trial @ PageTrial::Gain(gain) if trial.pays() => made(format!(
                    "transfers pass through {} of huge pages, from which this disk reads {gain:.1} times as fast as \
                     from the pool's small ones",
                    show(STAGING_BYTES)
                )),
                _ => (None, String::new()),
            }
        }
    }
}

/// A budget that no block fits into would be a store that nothing is ever written to.
fn check_budget(nvme: &NvmeConfig, store: &Store) -> Result<()> {
    let block = store.layout().extent_bytes;
    let is_enough = |rate: WriteRate| WriteBudget::new(rate, block, 0.0).is_some();
    match nvme.write_budget {
        Some(rate) if !is_enough(rate) => Err(Error::config(
            "nvme_write_budget",
            format!("{} in {} s do not hold two blocks of {}", show(rate.bytes), rate.seconds, show(block)),
            "Write a larger size, or a longer time: a day rather than a second",
        )),
        _ => Ok(()),
    }
}

fn settings_of(config: &Config) -> DiskSettings {
    let nvme = &config.nvme;
    DiskSettings {
        write_through: nvme.write_through,
        clean_percent: nvme.clean_percent,
        load_policy: nvme.load_policy,
        admission: nvme.admission,
        retention_s: nvme.retention_s,
        write_budget: nvme.write_budget,
        policy: config.policy,
        tenants: config.tenants.clone(),
    }
}

fn scan(
    nvme: &NvmeConfig,
    store: &Store,
    segments: &[std::fs::File],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<recovery::Scanned> {
    let (completions, arrivals) = recovery::channel();
    let disk = probe::open(nvme.engine, Vec::new(), &completions, store.path())?;
    for segment in segments {
        let again = segment
            .try_clone()
            .map_err(|error| Error::io("opening a segment of", store.path(), error, "Raise the limit on open files"))?;
        disk.add_segment(again)?;
    }
    recovery::scan(store, disk.as_ref(), &arrivals, recovery::buffers(store), progress)
}

/// What the disk has not: a store that will never hold what it was given.
fn shortage(store: &Store, reserve_bytes: u64) -> Result<Option<String>> {
    let free = space::free_bytes(store.path())?;
    let room = free.saturating_sub(reserve_bytes);
    let here = u64::from(store.extents_ready()) * store.extent_bytes();
    let facts = format!("{} free, reserve {}", show(free), show(reserve_bytes));
    let remedy = "Free some, write a smaller nvme_reserve, or set nvme_dir to another disk";
    if here == 0 {
        return Ok(Some(format!("the nvme tier holds nothing: {facts}. {remedy}")));
    }
    let most = here.saturating_add(room);
    let few = most < store.capacity_bytes() - store.capacity_bytes() / 10;
    Ok(few.then(|| {
        let wanted = show(store.capacity_bytes());
        format!("the nvme tier has room for {} of its {wanted} on this disk: {facts}. {remedy}", show(most))
    }))
}

/// A twentieth of the file system, at most 10 GiB: it is never ours alone.
pub(super) fn default_reserve(dir: &Path) -> u64 {
    let total = nix::sys::statvfs::statvfs(dir).map_or(0, |found| found.blocks() * found.fragment_size());
    (total / 20).min(10 << 30)
}

fn lock(engine: &Arc<Mutex<TierEngine>>) -> std::sync::MutexGuard<'_, TierEngine> {
    engine.lock().unwrap_or_else(PoisonError::into_inner)
}
