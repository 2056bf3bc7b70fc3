//! The scan: what lies in which extent, read from the extents' own descriptors after a crash.
//!
//! Reads descriptor pages only, many at once: each batch of completions is answered by one batch of
//! reads. Believes a descriptor when descriptor and seal are whole and of this store and
//! generation; payloads are checked when they are read.

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use hashbrown::HashMap;
use hashbrown::hash_map::Entry as Slot;

use super::buffer::Buffer;
use super::disk::{Completion, Completions, Disk, Kind, Operation};
use super::snapshot::SnapshotEntry;
use super::store::Store;
use crate::limits;
use kvcellar_block::descriptor::{self, Seal};
use kvcellar_block::error::{Error, Result};
use kvcellar_block::{BlockKey, ExtentIndex, SaltTag};

/// Completions of a scan, waiting to be looked at. Bounded by the reads in flight.
pub type Arrivals = Receiver<Vec<Completion>>;

struct Channel(Sender<Vec<Completion>>);

impl Completions for Channel {
    fn complete(&self, completions: Vec<Completion>) {
        // Nobody listens any more: the buffers are freed here, which is all that is left to do.
        drop(self.0.send(completions));
    }
}

/// What a disk gets for its completions, and where they arrive.
pub fn channel() -> (Arc<dyn Completions>, Arrivals) {
    let (sender, receiver) = crossbeam_channel::unbounded();
    (Arc::new(Channel(sender)), receiver)
}

/// What a scan found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scanned {
    /// Whole descriptors of this store and generation, one a key, by extent.
    pub entries: Vec<SnapshotEntry>,
    /// Larger than every sequence number in the store.
    pub next_sequence: u64,
    /// Extents that could not be read, or whose descriptor is not whole or not this store's.
    pub damaged: u64,
    /// Extents that were never written or were erased, that an earlier generation wrote, or that a
    /// later extent of the same key replaces.
    pub empty: u64,
}

/// Buffers for a scan, of memory of their own. Pieces of a registered region serve as well.
pub fn buffers(store: &Store) -> Vec<Buffer> {
    let count = limits::SCAN_DEPTH.min(store.extents_ready() as usize);
    (0..count).map(|_| Buffer::pages(store.geometry().descriptor_bytes as usize)).collect()
}

/// Reads the descriptors of all extents that are there. `disk` has the store's segments, and its
/// completions come to `arrivals` and are nobody else's meanwhile. Each of `buffers` holds one
/// descriptor; there are as many reads in flight. `progress` hears of extents done and in all.
///
/// # Errors
/// [`Error::DeviceDead`] when the disk ends without completing a read, [`Error::Config`] without
/// any buffer. Unreadable extents are no error.
pub fn scan(
    store: &Store,
    disk: &dyn Disk,
    arrivals: &Arrivals,
    buffers: Vec<Buffer>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Scanned> {
    let total = store.extents_ready();
    if total == 0 {
        return Ok(Scanned::default());
    }
    if buffers.is_empty() {
        return Err(Error::config("buffers", "a scan needs at least one", "Give it some"));
    }
    let mut unread = 0..total;
    let mut read = |buffer| {
        let extent = unread.next()?;
        let (segment, offset) = store.place(ExtentIndex(extent));
        Some(Operation { token: extent.into(), kind: Kind::Read, segment, offset, buffer })
    };
    disk.submit(buffers.into_iter().filter_map(&mut read).collect());
    let mut findings = Findings::new(store);
    let mut done = 0;
    while done < u64::from(total) {
        let first = arrivals.recv().map_err(|_| Error::DeviceDead {
            device: "the store's disk".to_owned(),
            problem: "it ended while descriptors were being read".to_owned(),
            remedy: "Look at the system's log; the tier works without it".to_owned(),
        })?;
        let mut next = Vec::new();
        for completion in std::iter::once(first).chain(arrivals.try_iter()).flatten() {
            findings.note(&completion);
            done += 1;
            next.extend(read(completion.buffer));
        }
        if !next.is_empty() {
            disk.submit(next);
        }
        progress(done, total.into());
    }
    Ok(findings.finish())
}

/// What is known so far.
struct Findings<'a> {
    store: &'a Store,
    newest: HashMap<BlockKey, SnapshotEntry>,
    found: Scanned,
}

impl<'a> Findings<'a> {
    fn new(store: &'a Store) -> Self {
        Self { store, newest: HashMap::new(), found: Scanned::default() }
    }

    fn note(&mut self, completion: &Completion) {
        let page = completion.buffer.bytes();
        if completion.outcome.is_err() {
            self.found.damaged += 1;
        } else if is_empty(page) {
            self.found.empty += 1;
        } else {
            match descriptor::unseal(page, self.store.geometry().parts.len()) {
                Ok((key, seal, _)) if self.is_ours(&key, &seal) => {
                    self.keep(ExtentIndex(completion.token as u32), key, &seal, descriptor::salt(page));
                }
                _ => self.found.damaged += 1,
            }
        }
    }

    fn is_ours(&self, key: &BlockKey, seal: &Seal) -> bool {
        seal.store == self.store.id() && usize::from(key.group.0) < self.store.geometry().payload_bytes.len()
    }

    fn keep(&mut self, extent: ExtentIndex, key: BlockKey, seal: &Seal, salt: SaltTag) {
        self.found.next_sequence = self.found.next_sequence.max(seal.sequence.saturating_add(1));
        if seal.cache_generation != self.store.cache_generation() {
            self.found.empty += 1;
            return;
        }
        let entry = SnapshotEntry { extent, key, sequence: seal.sequence, written_s: seal.written_s, salt };
        match self.newest.entry(key) {
            Slot::Vacant(slot) => {
                slot.insert(entry);
            }
            Slot::Occupied(mut slot) => {
                self.found.empty += 1;
                // By extent where sequences are equal, so that the order of completions decides
                // nothing.
                if (entry.sequence, entry.extent) > (slot.get().sequence, slot.get().extent) {
                    slot.insert(entry);
                }
            }
        }
    }

    fn finish(self) -> Scanned {
        let mut entries: Vec<SnapshotEntry> = self.newest.into_values().collect();
        entries.sort_unstable_by_key(|entry| entry.extent);
        Scanned { entries, ..self.found }
    }
}

/// Nothing was ever written there, or it was erased.
pub fn is_empty(page: &[u8]) -> bool {
    page[..descriptor::FIXED_BYTES as usize].iter().all(|byte| *byte == 0)
}
