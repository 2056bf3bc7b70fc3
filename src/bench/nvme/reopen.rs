//! `kvcellar bench nvme --reopen N`: how long a store of `N` small blocks takes to open, after a
//! clean stop and after a crash.
//!
//! Clean: the time of [`Store::open`], which reads the snapshot; its pages were dropped from the
//! page cache before. Crash: the scan of all descriptors, in turn with a bare loop that reads the
//! same bytes with the same disk, in the same order and depth, and looks at none of them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::json;

use super::bare::pump;
use super::meter::metered;
use super::{NvmeBench, NvmeOutcome, ScratchDir, load, surroundings};
use crate::report::{Goal, GoalBound, measured};
use kvcellar_block::descriptor::{self, Lineage, Seal};
use kvcellar_block::error::{Error, Result};
use kvcellar_block::{BlockHash, BlockKey, ExtentIndex, Generation, GroupIndex, SlotGeometry};
use kvcellar_engine::config::nvme::DiskEngine;
use kvcellar_engine::limits;
use kvcellar_engine::nvme::buffer::Buffer;
use kvcellar_engine::nvme::disk::{Disk, Kind, Operation};
use kvcellar_engine::nvme::recovery::{self, Arrivals};
use kvcellar_engine::nvme::snapshot::{self, SnapshotEntry};
use kvcellar_engine::nvme::store::{Opened, Recovery, Store, Wish};
use kvcellar_engine::nvme::{extent, probe, space};

/// Bytes of an extent: a descriptor and a little.
const EXTENT_BYTES: u64 = 8192;
/// Extents written at once while the store is made.
const PIECE: u32 = 512;

fn wish<'a>(dir: &'a Path, geometry: &'a SlotGeometry, blocks: u32) -> Wish<'a> {
    let capacity_bytes = u64::from(blocks) * (EXTENT_BYTES + snapshot::RECORD_BYTES) * 33 / 32 + (8 << 20);
    Wish {
        dir,
        namespace: [4; 16],
        facts: "{}",
        capacity_bytes,
        total_bytes: u64::MAX,
        reserve_bytes: 0,
        geometry,
        reuse: true,
        segment_bytes_max: None,
    }
}

fn key(number: u32) -> BlockKey {
    let mut bytes = [0; 32];
    for (part, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&xxhash_rust::xxh3::xxh3_64_with_seed(&number.to_le_bytes(), part as u64).to_le_bytes());
    }
    // 32 bytes are a length every hash may have.
    let hash = BlockHash::new(&bytes).unwrap_or_else(|| unreachable!("32 bytes"));
    BlockKey { hash, group: GroupIndex(0) }
}

/// Makes the image of block `number` and returns its entry.
fn seal(image: &mut [u8], store: &Store, number: u32) -> Result<SnapshotEntry> {
    let geometry = store.geometry();
    let key = key(number);
    let lineage = Lineage { tokens: (number..number + super::TOKENS).collect(), ..Lineage::default() };
    let given = Seal {
        store: store.id(),
        sequence: u64::from(number) + 1,
        cache_generation: store.cache_generation(),
        written_s: 1,
        stored_bytes: geometry.payload_bytes[0],
        encoding: 0,
    };
    let sums = extent::sums(image, geometry, key.group);
    let page = &mut image[..geometry.descriptor_bytes as usize];
    descriptor::write(page, &key, Generation(1), geometry.parts.len(), &lineage);
    descriptor::seal(page, &given, &sums)?;
    let salt = lineage.salt;
    Ok(SnapshotEntry { extent: ExtentIndex(number), key, sequence: given.sequence, written_s: given.written_s, salt })
}

/// Fills a new store with `blocks` blocks, segment after segment.
fn build(store: &mut Store, blocks: u32) -> Result<Vec<SnapshotEntry>> {
    let mut entries = Vec::with_capacity(blocks as usize);
    let mut buffer = Buffer::pages(PIECE as usize * EXTENT_BYTES as usize);
    while (entries.len() as u32) < blocks {
        let from = store.extents_ready();
        let Some(segment) = store.grow()? else {
            return Err(Error::lost("benchmark", format!("the store ends after {from} of {blocks} blocks")));
        };
        let to = store.extents_ready().min(blocks);
        for first in (from..to).step_by(PIECE as usize) {
            let count = PIECE.min(to - first);
            let bytes = &mut buffer.bytes_mut()[..count as usize * EXTENT_BYTES as usize];
            for (number, image) in (first..).zip(bytes.chunks_exact_mut(EXTENT_BYTES as usize)) {
                entries.push(seal(image, store, number)?);
            }
            let (_, offset) = store.place(ExtentIndex(first));
            let fail = |error| Error::io("writing a segment of", store.path(), error, "See whether the disk is full");
            segment.write_all_at(bytes, offset).map_err(fail)?;
        }
    }
    Ok(entries)
}

/// Takes a file's pages out of the page cache, so that it is read as after a restart of the
/// machine.
fn forget(path: &Path) -> Result<()> {
    let fail = |error| Error::io("reading", path, error, "Name a directory that you may read");
    let file = File::open(path).map_err(fail)?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(|errno| fail(errno.into()))
}

/// As the scan reads, without looking at what is read.
fn read_bare(store: &Store, disk: &dyn Disk, arrivals: &Arrivals, mut buffers: Vec<Buffer>) -> Result<()> {
    let depth = buffers.len();
    pump(disk, arrivals, depth, store.extents_ready(), &mut |number, ended| {
        let (segment, offset) = store.place(ExtentIndex(number));
        // Every operation but the first ones gets the buffer of one that has ended.
        let buffer = ended.or_else(|| buffers.pop()).unwrap_or_else(|| Buffer::pages(limits::SLOT_ALIGN as usize));
        Operation { token: number.into(), kind: Kind::Read, segment, offset, buffer }
    })
}

/// Seconds to open the store by its snapshot, which is then there again.
fn reopen(wish: &Wish<'_>, entries: &[SnapshotEntry]) -> Result<f64> {
    let (opened, reading) = metered(|| Store::open(wish))?;
    let Opened { mut store, recovery, .. } = opened;
    match recovery {
        Recovery::Snapshot(found, next) if found.len() == entries.len() => {
            store.close_clean(entries, next)?;
            forget(&store.path().join(snapshot::NAME))?;
            Ok(reading.seconds)
        }
        other => Err(Error::lost("benchmark", format!("the store opened as {}", name(&other)))),
    }
}

fn name(recovery: &Recovery) -> &'static str {
    match recovery {
        Recovery::Fresh => "a new one",
        Recovery::Snapshot(..) => "closed with other blocks",
        Recovery::Scan => "not closed",
    }
}

/// Seconds of a scan and of bare reads, in turn.
fn scan(opened: Opened, blocks: u32, repetitions: u32) -> Result<(Vec<f64>, Vec<f64>, &'static str)> {
    let Opened { store, segments, recovery, .. } = opened;
    if recovery != Recovery::Scan {
        return Err(Error::lost("benchmark", format!("the store opened as {}", name(&recovery))));
    }
    let (completions, arrivals) = recovery::channel();
    let disk = probe::open(DiskEngine::Auto, Vec::new(), &completions, store.path())?;
    for segment in segments {
        disk.add_segment(segment)?;
    }
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for repetition in 0..2 * repetitions {
        let buffers = recovery::buffers(&store);
        // Ours first, bare first, bare first, ours first, ...
        if (repetition + repetition / 2).is_multiple_of(2) {
            let (scanned, reading) =
                metered(|| recovery::scan(&store, disk.as_ref(), &arrivals, buffers, &mut |_, _| ()))?;
            if scanned.entries.len() != blocks as usize || scanned.damaged > 0 {
                return Err(Error::lost("benchmark", format!("{} of {blocks} blocks found", scanned.entries.len())));
            }
            ours.push(reading.seconds);
        } else {
            bare.push(metered(|| read_bare(&store, disk.as_ref(), &arrivals, buffers))?.1.seconds);
        }
    }
    Ok((ours, bare, disk.describe().engine))
}

/// Runs the measurements.
///
/// # Errors
/// [`Error::Config`] when the disk has no room for it, those of the store and of the disk,
/// [`Error::DataLost`] when blocks are not found again.
pub fn measure(options: &NvmeBench, blocks: u32) -> Result<NvmeOutcome> {
    let most = limits::EXTENTS_MAX / 2;
    if blocks == 0 || blocks > most || options.repetitions == 0 {
        let problem = format!("{blocks} blocks, {} times", options.repetitions);
        return Err(Error::config("--reopen, --repetitions", problem, format!("Write 1 to {most}, at least once")));
    }
    let geometry = super::geometry(EXTENT_BYTES)?;
    let dir = ScratchDir::new(&options.dir)?;
    let wish = wish(&dir.0, &geometry, blocks);
    let free = space::free_bytes(&dir.0)?;
    if free < wish.capacity_bytes {
        let problem = format!("{} bytes are needed, {free} are free", wish.capacity_bytes);
        return Err(Error::config("--reopen", problem, "Write less, or name another directory"));
    }
    let load_before = load();
    let Opened { mut store, .. } = Store::open(&wish)?;
    let entries = build(&mut store, blocks)?;
    store.close_clean(&entries, u64::from(blocks) + 1)?;
    forget(&store.path().join(snapshot::NAME))?;
    drop(store);
    let opening: Vec<f64> = (0..options.repetitions).map(|_| reopen(&wish, &entries)).collect::<Result<_>>()?;
    // Opened and dropped: as after a crash.
    drop(Store::open(&wish)?);
    let (ours, bare, engine) = scan(Store::open(&wish)?, blocks, options.repetitions)?;
    let ratios: Vec<f64> = ours.iter().zip(&bare).map(|(ours, bare)| bare / ours).collect();
    let results = vec![
        measured("open_with_snapshot", "s", opening),
        measured("scan", "s", ours),
        measured("bare_reads", "s", bare),
        measured("scan_rate_over_bare", "", ratios),
    ];
    let (snapshot_s, ratio) = (results[0].value, results[3].value);
    let name = format!("seconds to open {blocks} blocks with a snapshot");
    let opening = Goal::of(name, GoalBound::Below(1.0), snapshot_s);
    let goals = vec![
        Goal { goal: "below 1 for a million".to_owned(), met: opening.met && blocks >= 1_000_000, ..opening },
        Goal::of("scan's rate over bare reads'", GoalBound::AtLeast(0.8), ratio),
    ];
    let disk = json!({
        "blocks": blocks,
        "engine": engine,
        "depth": limits::SCAN_DEPTH,
        "repetitions": options.repetitions,
        "surroundings": surroundings(&dir.0, &load_before),
    });
    Ok(NvmeOutcome { results, goals, disk })
}
