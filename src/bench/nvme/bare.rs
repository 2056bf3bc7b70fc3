//! The yardstick: a disk that moves the same extents between the same kind of memory and the same
//! kind of files, and does nothing else.

use std::path::Path;
use std::sync::Arc;

use kvcellar_block::error::{Error, Result};
use kvcellar_block::{ExtentIndex, GroupIndex, SlotGeometry, SlotIndex};
use kvcellar_engine::config::nvme::DiskEngine;
use kvcellar_engine::limits;
use kvcellar_engine::nvme::buffer::{Arena, Buffer, PoolPart, Region};
use kvcellar_engine::nvme::disk::{Description, Disk, Kind, Operation};
use kvcellar_engine::nvme::recovery::{self, Arrivals};
use kvcellar_engine::nvme::store::{Store, Wish};
use kvcellar_engine::nvme::{extent, probe};
use kvcellar_engine::pool::Pool;

use super::meter::DiskWay;

/// Keeps at most `depth` operations with the disk until `total` of them have ended well. `make`
/// gets an ended operation's buffer for the next one.
///
/// # Errors
/// [`Error::DataLost`] when one fails, [`Error::DeviceDead`] when the disk ends.
pub fn pump(
    disk: &dyn Disk,
    arrivals: &Arrivals,
    depth: usize,
    total: u32,
    make: &mut dyn FnMut(u32, Option<Buffer>) -> Operation,
) -> Result<()> {
    let mut numbers = 0..total;
    disk.submit(numbers.by_ref().take(depth).map(|number| make(number, None)).collect());
    let mut done = 0;
    while done < total {
        let first = arrivals.recv().map_err(|_| Error::DeviceDead {
            device: "the benchmark's disk".to_owned(),
            problem: "it ended".to_owned(),
            remedy: "Look at the system's log".to_owned(),
        })?;
        let mut next = Vec::new();
        for completion in std::iter::once(first).chain(arrivals.try_iter()).flatten() {
            completion.outcome.map_err(|error| Error::lost("benchmark's transfer", error.to_string()))?;
            done += 1;
            next.extend(numbers.next().map(|number| make(number, Some(completion.buffer))));
        }
        if !next.is_empty() {
            disk.submit(next);
        }
    }
    Ok(())
}

/// Fills the payload of every slot with bytes that no device can compress. Nobody may use the slots
/// yet.
pub fn fill(pool: &Arc<Pool>) {
    for slot in 0..pool.slot_count() {
        scramble(&mut Buffer::slots(pool, SlotIndex(slot), 1), pool.geometry(), slot);
    }
}

/// Random bytes for the payload of one image.
fn scramble(image: &mut Buffer, geometry: &SlotGeometry, seed: u32) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::from(seed);
    for word in image.bytes_mut()[geometry.descriptor_bytes as usize..].chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

/// The memory that a bare ring transfers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BareMemory {
    /// A pool's slots.
    Pool,
    /// Private memory in huge pages: the best that a system has.
    Huge,
}

/// A disk over a store's segments, a pool's memory, and as much in huge pages.
pub struct Bare {
    disk: Arc<dyn Disk>,
    arrivals: Arrivals,
    pool: Arc<Pool>,
    huge: Arc<dyn Region>,
    store: Store,
}

impl Bare {
    /// Over a new store below `dir`, grown to its full size.
    ///
    /// # Errors
    /// Those of the store and of the disk.
    pub fn open(dir: &Path, pool: Pool, capacity_bytes: u64, geometry: &SlotGeometry) -> Result<Self> {
        let wish = Wish {
            dir,
            namespace: [3; 16],
            facts: "{}",
            capacity_bytes,
            total_bytes: u64::MAX,
            reserve_bytes: 0,
            geometry,
            reuse: false,
            segment_bytes_max: None,
        };
        let mut store = Store::open(&wish)?.store;
        let pool = Arc::new(pool);
        fill(&pool);
        let (completions, arrivals) = recovery::channel();
        let slots = pool.slot_count();
        let huge: Arc<dyn Region> = Arena::in_huge_pages(slots as usize * geometry.slot_bytes as usize)
            .ok_or_else(|| Error::lost("benchmark", "the system has no more memory"))?;
        for slot in 0..slots {
            scramble(&mut piece(&huge, geometry, slot), geometry, slot);
        }
        let regions: Vec<Arc<dyn Region>> = vec![Arc::clone(&pool) as Arc<dyn Region>, Arc::clone(&huge)];
        let disk = probe::open(DiskEngine::Auto, regions, &completions, store.path())?;
        while let Some(segment) = store.grow()? {
            disk.add_segment(segment)?;
        }
        Ok(Self { disk, arrivals, pool, huge, store })
    }

    /// What the disk is.
    pub fn describe(&self) -> Description {
        self.disk.describe()
    }

    /// So many bytes of the pool's memory, if it has as many.
    pub fn part(&self, bytes: u64) -> Option<Arc<dyn Region>> {
        let count = u32::try_from(bytes.div_ceil(self.pool.geometry().slot_bytes)).ok()?;
        PoolPart::new(&self.pool, SlotIndex(0), count).map(|part| part as Arc<dyn Region>)
    }

    /// Extents of the store.
    pub fn extents(&self) -> u32 {
        self.store.extents_ready()
    }

    /// Moves `count` extents from `first` on, between them and the begin of this memory; as many at
    /// once as the tier has.
    ///
    /// # Errors
    /// Those of [`pump`].
    pub fn run(&self, memory: BareMemory, way: DiskWay, first: u32, count: u32) -> Result<()> {
        let (kind, depth) = match way {
            DiskWay::Write => (
                Kind::Write,
                (limits::SPILL_BYTES_IN_FLIGHT_MAX / self.pool.geometry().slot_bytes).max(limits::SPILLS_IN_FLIGHT_MIN)
                    as usize,
            ),
            DiskWay::Read => (Kind::Read, count as usize),
        };
        let extents = self.extents();
        pump(self.disk.as_ref(), &self.arrivals, depth, count, &mut |number, _| {
            let (segment, offset) = self.store.place(ExtentIndex((first + number) % extents));
            let slot = number % self.pool.slot_count();
            let buffer = match memory {
                BareMemory::Pool => Buffer::slots(&self.pool, SlotIndex(slot), 1),
                BareMemory::Huge => piece(&self.huge, self.pool.geometry(), slot),
            };
            Operation { token: number.into(), kind, segment, offset, buffer }
        })
    }

    /// Computes the checksums of the first `count` slots, as sealing and checking do. Returns
    /// something made of them.
    pub fn checksums(&self, count: u32) -> u64 {
        let sum = |slot| {
            let image = Buffer::slots(&self.pool, SlotIndex(slot), 1);
            extent::sums(image.bytes(), self.pool.geometry(), GroupIndex(0)).into_iter().fold(0, u64::wrapping_add)
        };
        (0..count.min(self.pool.slot_count())).map(sum).fold(0, u64::wrapping_add)
    }

    /// Copies the first `count` payloads from huge pages into their slots and sums them meanwhile,
    /// as staging does. Returns something made of the sums.
    pub fn passes(&self, count: u32) -> u64 {
        let pass = |slot| {
            let (from, mut into) =
                (piece(&self.huge, self.pool.geometry(), slot), Buffer::slots(&self.pool, SlotIndex(slot), 1));
            extent::copy_payload(from.bytes(), into.bytes_mut(), self.pool.geometry(), GroupIndex(0))
                .into_iter()
                .fold(0, u64::wrapping_add)
        };
        (0..count.min(self.pool.slot_count())).map(pass).fold(0, u64::wrapping_add)
    }
}

/// One image's place in memory of its own.
fn piece(huge: &Arc<dyn Region>, geometry: &SlotGeometry, slot: u32) -> Buffer {
    let bytes = geometry.slot_bytes as usize;
    // SAFETY: the benchmark has one transfer or one pass at work on a place at a time.
    unsafe { Buffer::of_region(Arc::clone(huge), slot as usize * bytes, bytes) }
}
