//! A pool and the KV caches of all ranks around it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvcellar_block::geometry::RankBytes;
use kvcellar_block::plan::BlockCopy;
use kvcellar_block::{GroupKind, GroupSpec, Grouping, SlotGeometry, SlotIndex};
use kvcellar_engine::gpu::hasher::HashGuard;
use kvcellar_engine::gpu::host::HostCopier;
use kvcellar_engine::gpu::sides::Sides;
use kvcellar_engine::gpu::views::GroupRuns;
use kvcellar_engine::gpu::{Answers, Copier};
use kvcellar_engine::limits;
use kvcellar_engine::pool::Pool;
use kvcellar_engine::pool::open::{Wish, open};
use kvcellar_engine::pool::slot_table::SlotLine;

use crate::copies::cache::{KvCache, Shape};
use crate::copies::fake::{Control, FakeCopier};
use crate::random::Random;

/// Builds the copier under test. The memory that `groups` names outlives it: a [`Scene`] is dropped
/// last.
pub trait Maker {
    /// Called when a test begins; what it returns lives as long as the test.
    fn turn(_test: &str) -> Box<dyn std::any::Any> {
        Box::new(())
    }

    fn make(side: Side, answers: Arc<dyn Answers>, threads: usize) -> Box<dyn Copier>;
}

/// What every copier gets.
pub struct Side {
    pub pool: Arc<Pool>,
    pub groups: Arc<Vec<GroupRuns>>,
    pub rank: usize,
    pub verify_loads: bool,
    pub guard: Arc<HashGuard>,
}

impl Side {
    /// For a copier over the memory of a [`Scene`].
    pub fn host(self) -> Sides {
        // SAFETY: the addresses are those of a scene's KV caches; every test drops its copiers
        // before its scene.
        unsafe { Sides::new(self.pool, self.groups, self.rank, self.verify_loads, self.guard) }
    }
}

pub struct Host;
pub struct Fake;

impl Maker for Host {
    fn make(side: Side, answers: Arc<dyn Answers>, threads: usize) -> Box<dyn Copier> {
        Box::new(HostCopier::start(side.host(), &answers, threads).expect("threads"))
    }
}

impl Maker for Fake {
    fn make(side: Side, answers: Arc<dyn Answers>, _threads: usize) -> Box<dyn Copier> {
        Box::new(FakeCopier::start(side, answers, Arc::new(Control::new(3))))
    }
}

/// One rank's KV cache; `replica_of` names an earlier rank with the same bytes.
pub struct Rank {
    pub cache: KvCache,
    pub groups: Arc<Vec<GroupRuns>>,
    pub replica_of: Option<u32>,
}

pub struct Scene {
    pub pool: Arc<Pool>,
    pub ranks: Vec<Rank>,
    // Removed last.
    _dir: tempfile::TempDir,
}

impl Scene {
    pub fn new(shapes: &[(Shape, Option<u32>)], slots: u64) -> Self {
        let ranks: Vec<Rank> = shapes
            .iter()
            .map(|(shape, replica_of)| {
                let cache = KvCache::new(shape.clone());
                let groups = Arc::new(cache.runs());
                Rank { cache, groups, replica_of: *replica_of }
            })
            .collect();
        let dir = tempfile::Builder::new().prefix("kvcellar-copies-").tempdir_in(shared_memory()).expect("a directory");
        let pool = Arc::new(open_pool(dir.path(), &lay_out(&ranks), slots));
        assert_eq!(u64::from(pool.slot_count()), slots);
        Self { pool, ranks, _dir: dir }
    }

    /// One rank, one group.
    pub fn simple(slots: u64) -> Self {
        Self::new(&[(Shape::plain(3), None)], slots)
    }

    pub fn side(&self, rank: usize, verify_loads: bool) -> Side {
        Side {
            pool: Arc::clone(&self.pool),
            groups: Arc::clone(&self.ranks[rank].groups),
            rank,
            verify_loads,
            guard: Arc::default(),
        }
    }

    pub fn line(&self, slot: u32) -> &SlotLine {
        self.pool.line(SlotIndex(slot))
    }

    /// Takes a slot for a block of a group, and names the order that fills it.
    pub fn begin(&self, slot: u32, group: u16, block: u32) -> BlockCopy {
        BlockCopy { slot, generation: self.line(slot).begin_fill(0).0, block, group, flags: 0 }
    }

    /// Gives all writers new random bytes, and replicas those of their twins.
    pub fn scramble(&self, random: &mut Random) {
        for rank in &self.ranks {
            match rank.replica_of {
                Some(twin) => rank.cache.set(&self.ranks[twin as usize].cache.bytes()),
                None => rank.cache.set(&random.bytes(rank.cache.bytes().len())),
            }
        }
    }

    /// A slot's whole payload. Only when no order is under way.
    pub fn payload(&self, slot: u32) -> Vec<u8> {
        let len = *self.pool.geometry().payload_bytes.iter().max().expect("a group") as usize;
        // SAFETY: the payload holds at least the bytes of its largest group, the pool lives as long
        // as `self`, and nobody writes now.
        unsafe { std::slice::from_raw_parts(self.pool.payload(SlotIndex(slot)).as_ptr(), len) }.to_vec()
    }

    /// A rank's part of a slot.
    pub fn part(&self, slot: u32, group: usize, rank: usize) -> Vec<u8> {
        let (offset, len) = self.pool.geometry().parts[rank].spans[group];
        self.payload(slot)[offset as usize..][..len as usize].to_vec()
    }

    /// As if nobody had summed a rank's part of a slot.
    pub fn forget_checksum(&self, slot: u32, rank: usize) {
        forget_checksum(&self.pool, slot, rank);
    }

    /// Flips a bit of a slot's payload.
    pub fn flip(&self, slot: u32, at: usize) {
        // SAFETY: as in `payload`.
        unsafe { *self.pool.payload(SlotIndex(slot)).as_ptr().add(at) ^= 0x10 };
    }
}

/// As if nobody had summed a rank's part of a slot.
pub fn forget_checksum(pool: &Pool, slot: u32, rank: usize) {
    for word in pool.checksum_pair(SlotIndex(slot), rank) {
        word.store(0, Ordering::SeqCst);
    }
}

fn lay_out(ranks: &[Rank]) -> SlotGeometry {
    let groups = ranks[0].cache.shape.groups.len();
    let spec = GroupSpec { kind: GroupKind::Full, kind_name: String::new(), block_tokens: 16, eagle: false };
    let grouping = Grouping { groups: vec![spec; groups], hash_tokens: 16, hit_tokens: 16 };
    let bytes = |rank: &Rank| RankBytes {
        block_bytes: (0..groups).map(|group| rank.cache.shape.block_bytes(group)).collect(),
        replica_of: vec![rank.replica_of; groups],
    };
    SlotGeometry::lay_out(&grouping, &ranks.iter().map(bytes).collect::<Vec<_>>()).expect("it fits")
}

fn open_pool(dir: &Path, geometry: &SlotGeometry, slots: u64) -> Pool {
    let bytes = limits::HEADER_BYTES + limits::SLOT_ALIGN + slots * (geometry.slot_bytes + 64);
    let wish = Wish {
        pool_dir: dir,
        namespace: [1; 16],
        facts: "{}",
        bytes,
        total: bytes,
        explicit: true,
        adopt: false,
        geometry,
        near: &[],
    };
    open(&wish, &mut |_, _| ()).expect("a pool").pool
}

fn shared_memory() -> &'static Path {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { shm } else { Path::new("/tmp") }
}
