//! A directory for stores, and an engine's part played by the test: it writes and reads extents by
//! number.

use std::path::{Path, PathBuf};

use kvcellar_block::error::Result;
use kvcellar_block::{BlockKey, ExtentIndex, SaltTag, SlotGeometry};
use kvcellar_engine::nvme::buffer::Buffer;
use kvcellar_engine::nvme::disk::{Completion, Disk, Kind, Operation};
use kvcellar_engine::nvme::extent::{self, Expected};
use kvcellar_engine::nvme::recovery::{self, Arrivals, Scanned};
use kvcellar_engine::nvme::store::{Opened, Recovery, SnapshotEntry, Store, Wish};

use crate::stores::blocks::{geometry, image, key};
use crate::stores::disk::PlainDisk;

pub const NAMESPACE: [u8; 16] = [0xab; 16];

/// Room for 16 extents in segments of four.
pub const SMALL: u64 = 210_000;

/// A directory that goes away with the test.
pub struct Place {
    dir: tempfile::TempDir,
    pub geometry: SlotGeometry,
}

impl Place {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory"), geometry: geometry() }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn wish(&self) -> Wish<'_> {
        wish(self.path(), &self.geometry)
    }

    pub fn open(&self) -> Engine {
        Engine::open(&self.wish()).expect("a store")
    }

    /// A file of the store with this index.
    pub fn file(&self, index: u32, name: &str) -> PathBuf {
        let dir = kvcellar_engine::nvme::directory::path(self.path());
        let namespace = kvcellar_engine::owned::listing::namespace_name(&NAMESPACE);
        dir.join(format!("{namespace}-{index}")).join(name)
    }
}

pub fn wish<'a>(dir: &'a Path, geometry: &'a SlotGeometry) -> Wish<'a> {
    Wish {
        dir,
        namespace: NAMESPACE,
        facts: r#"{"model":"tiny"}"#,
        capacity_bytes: SMALL,
        total_bytes: u64::MAX,
        reserve_bytes: 0,
        geometry,
        reuse: true,
        segment_bytes_max: Some(4 * geometry.slot_bytes),
    }
}

/// One engine's life with a store.
pub struct Engine {
    pub store: Store,
    pub disk: PlainDisk,
    arrivals: Arrivals,
    pub recovery: Recovery,
    pub taken: Vec<String>,
    pub why: String,
    pub removed: Vec<String>,
    pub warnings: Vec<String>,
    pub sequence: u64,
    pub entries: Vec<SnapshotEntry>,
}

impl Engine {
    pub fn open(wish: &Wish<'_>) -> Result<Self> {
        let Opened { store, segments, recovery, taken, why, removed, warnings } = Store::open(wish)?;
        let (completions, arrivals) = recovery::channel();
        let disk = PlainDisk::new(segments, completions);
        let (sequence, entries) = (1, Vec::new());
        Ok(Self { store, disk, arrivals, recovery, taken, why, removed, warnings, sequence, entries })
    }

    pub fn grow(&mut self) -> bool {
        let Some(file) = self.store.grow().expect("grown") else { return false };
        self.disk.add_segment(file).expect("added");
        true
    }

    fn transfer(&self, kind: Kind, extent: u32, buffer: Buffer) -> Completion {
        let (segment, offset) = self.store.place(ExtentIndex(extent));
        self.disk.submit(vec![Operation { token: extent.into(), kind, segment, offset, buffer }]);
        self.arrivals.recv().expect("completed").remove(0)
    }

    /// Writes a block into an extent, growing the store as far as needed.
    pub fn put(&mut self, extent: u32, number: u64) {
        while extent >= self.store.extents_ready() {
            assert!(self.grow(), "no room for extent {extent}");
        }
        let geometry = self.store.geometry();
        let bytes = image(number, geometry, self.store.id(), self.store.cache_generation(), self.sequence);
        let mut buffer = Buffer::pages(bytes.len());
        buffer.bytes_mut().copy_from_slice(&bytes);
        self.transfer(Kind::Write, extent, buffer).outcome.expect("written");
        self.entries.retain(|entry| entry.extent.0 != extent);
        let extent = ExtentIndex(extent);
        let written_s = 1000 + self.sequence;
        let salt = SaltTag::UNKNOWN;
        self.entries.push(SnapshotEntry { extent, key: key(number), sequence: self.sequence, written_s, salt });
        self.sequence += 1;
    }

    /// The bytes of an extent.
    pub fn bytes(&self, extent: u32) -> Vec<u8> {
        let buffer = Buffer::pages(self.store.extent_bytes() as usize);
        let completion = self.transfer(Kind::Read, extent, buffer);
        completion.outcome.expect("read");
        completion.buffer.bytes().to_vec()
    }

    /// What a load of this extent would check.
    pub fn check(&self, extent: u32, wanted: Option<BlockKey>) -> Result<BlockKey> {
        let store = &self.store;
        let expected = Expected { store: store.id(), cache_generation: store.cache_generation(), key: wanted };
        extent::check(&self.bytes(extent), store.geometry(), &expected)
    }

    pub fn scan(&self) -> Scanned {
        let buffers = recovery::buffers(&self.store);
        recovery::scan(&self.store, &self.disk, &self.arrivals, buffers, &mut |_, _| {}).expect("scanned")
    }

    /// What the engine would know after its start.
    pub fn recover(&mut self) {
        (self.entries, self.sequence) = match &self.recovery {
            Recovery::Fresh => (Vec::new(), 1),
            Recovery::Snapshot(entries, next) => (entries.clone(), *next),
            Recovery::Scan => {
                let scanned = self.scan();
                (scanned.entries, scanned.next_sequence)
            }
        };
    }

    pub fn close(mut self) {
        let entries = std::mem::take(&mut self.entries);
        self.store.close_clean(&entries, self.sequence).expect("closed");
    }

    /// Extents and keys that are known, by extent.
    pub fn known(&self) -> Vec<(u32, BlockKey)> {
        let mut known: Vec<_> = self.entries.iter().map(|entry| (entry.extent.0, entry.key)).collect();
        known.sort_unstable_by_key(|(extent, _)| *extent);
        known
    }
}
