//! A directory for pools, and the wishes with which they are opened.

use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use kvcellar_block::error::Result;
use kvcellar_block::geometry::RankBytes;
use kvcellar_block::{GroupKind, GroupSpec, Grouping, SlotGeometry};
use kvcellar_engine::limits;
use kvcellar_engine::owned::listing::namespace_name;
use kvcellar_engine::pool::directory;
use kvcellar_engine::pool::open::{Opened, Wish, open};

use crate::blocks::TOKENS;

/// Tests that start processes run alone: between fork and exec a child shares every lock of this
/// process, also those of other tests' pools.
static PROCESSES: RwLock<()> = RwLock::new(());

/// For a test that starts processes.
pub(crate) fn alone() -> RwLockWriteGuard<'static, ()> {
    PROCESSES.write().unwrap_or_else(PoisonError::into_inner)
}

/// What a pool is wanted for.
#[derive(Debug, Clone)]
pub(crate) struct Purpose {
    pub(crate) namespace: [u8; 16],
    pub(crate) bytes: u64,
    pub(crate) geometry: SlotGeometry,
    pub(crate) adopt: bool,
    /// What all engines get together.
    pub(crate) total: u64,
    pub(crate) explicit: bool,
}

impl Purpose {
    /// A pool of `slots` slots, whose blocks have `part` bytes on each of `ranks` ranks.
    pub(crate) fn of(slots: u64, ranks: usize, part: u64) -> Self {
        let own = RankBytes { block_bytes: vec![part], replica_of: vec![None] };
        let geometry = SlotGeometry::lay_out(&grouping(), &vec![own; ranks]).expect("it fits");
        let bytes = bytes_for(slots, &geometry);
        // Far more than the tests of one directory ever have at once.
        Self { namespace: [0xab; 16], bytes, geometry, adopt: true, total: 1 << 30, explicit: true }
    }

    /// The same for another model.
    pub(crate) fn of_model(&self, number: u8) -> Self {
        Self { namespace: [number; 16], ..self.clone() }
    }

    pub(crate) fn small() -> Self {
        Self::of(8, 2, 1000)
    }

    pub(crate) fn file(&self, dir: &Path, index: u32) -> PathBuf {
        directory::path(dir).join(format!("{}-{index}.pool", namespace_name(&self.namespace)))
    }

    pub(crate) fn open(&self, dir: &Path) -> Result<Opened> {
        self.open_with(dir, &mut |_, _| ())
    }

    pub(crate) fn open_with(&self, dir: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Opened> {
        let Self { namespace, bytes, ref geometry, adopt, total, explicit } = *self;
        let facts = r#"{"model":"tiny"}"#;
        open(&Wish { pool_dir: dir, namespace, facts, bytes, total, explicit, adopt, geometry, near: &[] }, progress)
    }
}

/// The configured size that gives exactly this number of slots.
pub(crate) fn bytes_for(slots: u64, geometry: &SlotGeometry) -> u64 {
    limits::HEADER_BYTES + limits::SLOT_ALIGN + slots * (geometry.slot_bytes + 64)
}

/// One group of full attention.
pub(crate) fn grouping() -> Grouping {
    let spec = GroupSpec { kind: GroupKind::Full, kind_name: String::new(), block_tokens: TOKENS, eagle: false };
    Grouping { groups: vec![spec], hash_tokens: TOKENS, hit_tokens: TOKENS }
}

/// A directory on shared memory, removed with everything in it.
pub(crate) struct Place {
    dir: tempfile::TempDir,
    _no_processes: Option<RwLockReadGuard<'static, ()>>,
}

impl Place {
    pub(crate) fn new() -> Self {
        let guard = PROCESSES.read().unwrap_or_else(PoisonError::into_inner);
        Self { _no_processes: Some(guard), ..Self::unguarded() }
    }

    /// For a test that runs [`alone`].
    pub(crate) fn unguarded() -> Self {
        let shm = Path::new("/dev/shm");
        let below = if shm.is_dir() { shm } else { Path::new("/tmp") };
        let dir = tempfile::Builder::new().prefix("kvcellar-pools-").tempdir_in(below).expect("a directory");
        Self { dir, _no_processes: None }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn open(&self, purpose: &Purpose) -> Opened {
        purpose.open(self.path()).expect("a pool")
    }
}

/// Waits until something holds, and fails the test by name when it never does.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("never happened: {what}");
}
