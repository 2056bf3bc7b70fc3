//! A look at every extent of a store that no engine serves from, for `kvcellar store stat` and
//! `verify` and `kvcellar bench compression`.
//!
//! Reads past the page cache where the filesystem can, so that it is the device that is judged.
//! Changes nothing, unless damaged extents are to be dropped.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;

use super::buffer::Buffer;
use super::directory::{self, How, REMEDY};
use super::extent::{self, Expected};
use super::superblock::{self, Superblock};
use super::{recovery, registry, segments, snapshot};
use kvcellar_block::descriptor;
use kvcellar_block::error::{Error, Result};

/// An extent that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The segment it lies in.
    pub segment: u32,
    /// Its byte offset there.
    pub offset: u64,
    /// What is wrong.
    pub problem: String,
}

/// What lies in a store.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Inspected {
    /// `snapshot`, `descriptors` or `everything`: what was read to know.
    pub read: &'static str,
    /// Extents in its segments.
    pub extents: u64,
    /// Extents that hold a block of the present generation.
    pub used: u64,
    /// Extents that were never written, or were erased.
    pub empty: u64,
    /// Extents of an earlier generation.
    pub stale: u64,
    /// Extents that cannot be used.
    pub damaged: Vec<Damage>,
    /// Damaged extents that were dropped.
    pub dropped: u64,
    /// Bytes of the used extents.
    pub used_bytes: u64,
    /// When the oldest used extent was written, in seconds since 1970.
    pub oldest_s: Option<u64>,
    /// When the newest used extent was written, in seconds since 1970.
    pub newest_s: Option<u64>,
}

/// Hears of extents done and in all.
pub type InspectionProgress<'a> = &'a mut dyn FnMut(u64, u64);

/// Says what a store holds: by its snapshot if it was closed cleanly, else by its descriptors.
///
/// # Errors
/// [`Error::DataLost`] without a whole superblock; [`Error::Io`].
pub fn stat(path: &Path, progress: InspectionProgress<'_>) -> Result<Inspected> {
    let superblock = Superblock::load(path)?;
    match by_snapshot(path, &superblock)? {
        Some(inspected) => Ok(inspected),
        None => Inspection::new(path, superblock, false, false)?.run(progress),
    }
}

fn by_snapshot(path: &Path, superblock: &Superblock) -> Result<Option<Inspected>> {
    let Some(clean) = superblock.clean else { return Ok(None) };
    let slot_bytes = superblock.geometry.slot_bytes;
    let extents = files(path, slot_bytes)?.iter().map(|(_, _, extents)| extents).sum::<u64>();
    // Whatever is wrong with the snapshot, the descriptors know better.
    let Ok((_, entries, sum)) = snapshot::load(path, extents as u32) else { return Ok(None) };
    if sum != clean.snapshot_sum {
        return Ok(None);
    }
    let mut found = Inspected { read: "snapshot", extents, ..Inspected::default() };
    for entry in &entries {
        found.use_extent(entry.written_s, slot_bytes);
    }
    found.empty = extents.saturating_sub(found.used);
    Ok(Some(found))
}

/// Reads and checks every extent of a store. `repair` drops those that are damaged, so that no
/// start meets them again.
///
/// # Errors
/// [`Error::TryLater`] when an engine owns it; [`Error::DataLost`] without a whole superblock;
/// [`Error::Io`].
pub fn verify(path: &Path, repair: bool, progress: InspectionProgress<'_>) -> Result<Inspected> {
    let _owned = registry::own(path)?;
    let superblock = Superblock::load(path)?;
    let found = Inspection::new(path, superblock.clone(), true, repair)?.run(progress)?;
    if found.dropped > 0 {
        // A snapshot still lists what was dropped.
        let dirty = Superblock { clean: None, ..superblock };
        directory::replace(path, superblock::NAME, &dirty.encode()?)?;
    }
    Ok(found)
}

/// Hands the payload of every whole block of a store to `see`, rank by rank one after another,
/// until it says that it has seen enough.
///
/// # Errors
/// [`Error::TryLater`] when an engine owns it; [`Error::DataLost`] without a whole superblock;
/// [`Error::Io`]; those of `see`.
pub fn payloads(path: &Path, see: &mut dyn FnMut(&[u8]) -> Result<bool>) -> Result<()> {
    let _owned = registry::own(path)?;
    let Superblock { store, cache_generation, geometry, .. } = Superblock::load(path)?;
    let expected = Expected { store, cache_generation, key: None };
    let mut image = Buffer::pages(geometry.slot_bytes as usize);
    let mut payload = Vec::new();
    for (_, file, extents) in files(path, geometry.slot_bytes)? {
        for offset in (0..extents).map(|extent| extent * geometry.slot_bytes) {
            let whole = file.read_exact_at(image.bytes_mut(), offset).ok();
            // Empty, stale and damaged extents are `verify`'s affair.
            let Some(Ok(key)) = whole.map(|()| extent::check(image.bytes(), &geometry, &expected)) else { continue };
            payload.clear();
            extent::parts(image.bytes(), &geometry, key.group).for_each(|part| payload.extend_from_slice(part));
            if !see(&payload)? {
                return Ok(());
            }
        }
    }
    Ok(())
}

impl Inspected {
    fn use_extent(&mut self, written_s: u64, extent_bytes: u64) {
        self.used += 1;
        self.used_bytes += extent_bytes;
        self.oldest_s = Some(self.oldest_s.map_or(written_s, |oldest| oldest.min(written_s)));
        self.newest_s = Some(self.newest_s.map_or(written_s, |newest| newest.max(written_s)));
    }
}

/// Segment files with their numbers and whole extents.
pub(super) fn files(path: &Path, extent_bytes: u64) -> Result<Vec<(u32, File, u64)>> {
    let open = |number| {
        let path = segments::path(path, number);
        let file = directory::open(&path, How::Direct)?;
        let len = file.metadata().map_err(|error| Error::io("reading", &path, error, REMEDY))?.len();
        Ok((number, file, len / extent_bytes))
    };
    segments::present(path)?.into_iter().map(open).collect()
}

struct Inspection {
    superblock: Superblock,
    files: Vec<(u32, File, u64)>,
    whole: bool,
    repair: bool,
    found: Inspected,
}

enum State {
    Used(u64),
    Empty,
    Stale,
}

impl Inspection {
    fn new(path: &Path, superblock: Superblock, whole: bool, repair: bool) -> Result<Self> {
        let files = files(path, superblock.geometry.slot_bytes)?;
        let extents = files.iter().map(|(_, _, extents)| extents).sum();
        let read = if whole { "everything" } else { "descriptors" };
        Ok(Self { superblock, files, whole, repair, found: Inspected { read, extents, ..Inspected::default() } })
    }

    fn run(mut self, progress: InspectionProgress<'_>) -> Result<Inspected> {
        let geometry = &self.superblock.geometry;
        let bytes = if self.whole { geometry.slot_bytes } else { geometry.descriptor_bytes };
        let (slot_bytes, descriptor_bytes) = (geometry.slot_bytes, geometry.descriptor_bytes);
        let mut buffer = Buffer::pages(bytes as usize);
        let zeros = Buffer::pages(descriptor_bytes as usize);
        let mut done = 0;
        for (segment, file, extents) in std::mem::take(&mut self.files) {
            for offset in (0..extents).map(|extent| extent * slot_bytes) {
                let state = file
                    .read_exact_at(buffer.bytes_mut(), offset)
                    .map_err(|error| Error::lost("extent", format!("it cannot be read: {error}")))
                    .and_then(|()| self.judge(buffer.bytes()));
                match state {
                    Ok(State::Used(written_s)) => self.found.use_extent(written_s, slot_bytes),
                    Ok(State::Empty) => self.found.empty += 1,
                    Ok(State::Stale) => self.found.stale += 1,
                    Err(error) => {
                        self.found.damaged.push(Damage { segment, offset, problem: error.to_string() });
                        // What cannot be written stays damaged, and is reported as that.
                        self.found.dropped +=
                            u64::from(self.repair && file.write_all_at(zeros.bytes(), offset).is_ok());
                    }
                }
                done += 1;
                progress(done, self.found.extents);
            }
            if self.repair {
                file.sync_data().map_err(|error| Error::io("writing", format!("segment {segment}"), error, REMEDY))?;
            }
        }
        Ok(self.found)
    }

    fn judge(&self, image: &[u8]) -> Result<State> {
        let block = &self.superblock;
        if recovery::is_empty(image) {
            return Ok(State::Empty);
        }
        let page = &image[..block.geometry.descriptor_bytes as usize];
        let (_, seal, _) = descriptor::unseal(page, block.geometry.parts.len())?;
        if seal.store != block.store {
            return Err(Error::lost("extent", format!("it belongs to store {:016x}", seal.store)));
        }
        if seal.cache_generation != block.cache_generation {
            return Ok(State::Stale);
        }
        if self.whole {
            let expected = Expected { store: block.store, cache_generation: block.cache_generation, key: None };
            extent::check(image, &block.geometry, &expected)?;
        }
        Ok(State::Used(seal.written_s))
    }
}
