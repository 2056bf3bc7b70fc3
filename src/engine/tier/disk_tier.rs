//! The nvme tier's state: its store, its disk, what is under way, and what the mover is to do next.
//!
//! Everything here happens under the engine's lock and takes no time: bytes are hashed, compared,
//! read and written by the mover and the disk. What is under way is named by a token; a completion
//! whose token is unknown is a bug.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use hashbrown::HashMap;

use super::extents::Extents;
use super::health::Health;
use super::window::Window;
use crate::limits;
use crate::nvme::disk::{Completion, Description, Disk};
use crate::nvme::space::Layout;
use crate::nvme::store::Store;
use crate::policy::load::Rates;
use crate::policy::{Admission, LoadPolicy};
use crate::pool::Pool;
use kvcellar_block::descriptor::{Lineage, Seal};
use kvcellar_block::{BlockKey, ExtentIndex, Generation, SlotIndex};

/// What the user decided about the nvme tier.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DiskSettings {
    /// Write every block at once, not only the coldest.
    pub write_through: bool,
    /// Share of the slots, in percent, that are kept free or clean.
    pub clean_percent: u64,
    /// See [`LoadPolicy`].
    pub load_policy: LoadPolicy,
    /// See [`Admission`].
    pub admission: Admission,
    /// Seconds after which a block is erased from disk.
    pub retention_s: Option<u64>,
}

/// One block of a read.
#[derive(Debug, Clone)]
pub struct ReadPart {
    /// Where its bytes go.
    pub slot: SlotIndex,
    /// The slot's generation, which copy orders name.
    pub generation: Generation,
    /// Where they come from.
    pub extent: ExtentIndex,
    /// What they must be.
    pub key: BlockKey,
    /// The slot belongs to the window.
    pub window: bool,
    /// Who asked first, and the first token of the block.
    pub request: String,
    /// The first token of the block.
    pub token: u32,
}

/// A read under way: adjacent slots from adjacent extents.
#[derive(Debug)]
pub struct Read {
    /// Its blocks, in order.
    pub parts: Vec<ReadPart>,
    /// When it was handed to the disk.
    pub started: Instant,
    /// Its followers were told that it failed, because it took too long.
    pub given_up: bool,
    /// A reset came in between: what it brings is worthless.
    pub stale: bool,
}

/// A write under way.
#[derive(Debug)]
pub struct Write {
    /// Its blocks, in order.
    pub parts: Vec<(SlotIndex, ExtentIndex, BlockKey)>,
    /// When it was planned.
    pub started: Instant,
    /// A reset came in between: the extents are freed.
    pub stale: bool,
}

/// One block to be sealed and written.
#[derive(Debug, Clone)]
pub struct SealOrder {
    /// Whose image.
    pub slot: SlotIndex,
    /// Its generation.
    pub generation: Generation,
    /// Its key.
    pub key: BlockKey,
    /// What to write into its descriptor.
    pub seal: Seal,
}

/// Work for the mover, done without the engine's lock.
#[derive(Debug)]
pub enum Job {
    /// Compute checksums, seal, and write adjacent slots to adjacent extents.
    Write {
        /// Names the write.
        token: u64,
        /// The blocks, in order.
        orders: Vec<SealOrder>,
        /// The first extent.
        extent: ExtentIndex,
    },
    /// Read adjacent extents into adjacent slots.
    Read {
        /// Names the read.
        token: u64,
        /// The first slot.
        slot: SlotIndex,
        /// The first extent.
        extent: ExtentIndex,
        /// How many.
        count: u32,
        /// What the blocks must be, with the generation of their slots.
        expected: Vec<(BlockKey, Generation)>,
        /// The generation of contents they must have.
        cache_generation: u64,
    },
    /// Read descriptors for their announcement, or one as a trial.
    Describe {
        /// Which extents.
        extents: Vec<ExtentIndex>,
        /// It is the trial of a disk that was out of service.
        trial: bool,
    },
    /// Make the store larger by a segment.
    Grow,
    /// Erase these extents.
    Erase(Vec<ExtentIndex>),
    /// A transfer ended.
    Done(Completion),
}

/// What the mover found out.
#[derive(Debug)]
pub enum Moved {
    /// A read ended: for each block its lineage, or why it is not to be had.
    Read {
        /// Names the read.
        token: u64,
        /// One a block.
        outcomes: Vec<std::result::Result<Lineage, Trouble>>,
    },
    /// A write ended. `None`: well.
    Written {
        /// Names the write.
        token: u64,
        /// Why it failed.
        trouble: Option<Trouble>,
    },
    /// Descriptors were read.
    Described {
        /// Which extents, with what was found.
        found: Vec<(ExtentIndex, DescriptorRead)>,
        /// It was a trial.
        trial: bool,
    },
    /// The store has this many extents now, and cannot grow further when `last`.
    Grown {
        /// Extents that exist.
        ready: u32,
        /// No further growth.
        last: bool,
    },
    /// These extents hold nothing readable any more.
    Erased(Vec<ExtentIndex>),
    /// The store's directory is gone.
    Gone,
}

/// What an extent's own descriptor says it holds, or why it says nothing.
pub type DescriptorRead = std::result::Result<(BlockKey, Lineage), Trouble>;

/// Why a transfer was of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// The device refused or cut it short.
    Device,
    /// The bytes are not what was stored.
    Corrupt,
    /// The block's descriptor cannot be an extent's (it did not fit).
    Undescribed,
}

/// Whether two extents lie in one file, so that one transfer can cover both.
pub(super) fn same_segment(layout: Layout, a: ExtentIndex, b: ExtentIndex) -> bool {
    layout.place(a).0 == layout.place(b).0
}

/// The nvme tier of one engine.
pub struct DiskTier {
    /// The store; the mover grows it without the engine's lock.
    pub store: Arc<Mutex<Store>>,
    /// The store's id, for seals.
    pub store_id: u64,
    /// Where extents lie.
    pub layout: Layout,
    /// The device.
    pub disk: Arc<dyn Disk>,
    /// What the device is.
    pub description: Description,
    /// The slots.
    pub pool: Arc<Pool>,
    /// What is where.
    pub extents: Extents,
    /// Where restores go that find no slot.
    pub window: Window,
    /// Reads under way.
    pub reads: HashMap<u64, Read>,
    /// Writes under way.
    pub writes: HashMap<u64, Write>,
    /// The device's health.
    pub health: Health,
    /// How fast restore and prefill are.
    pub rates: Rates,
    /// What the user decided.
    pub settings: DiskSettings,
    /// The generation of contents.
    pub cache_generation: u64,
    /// The number of the next extent written.
    pub sequence: u64,
    /// The first extent that may not be announced yet; `None`: all are.
    pub announce_from: Option<u32>,
    pub(super) describing: bool,
    pub(super) growing: bool,
    pub(super) full_grown: bool,
    pub(super) retention_from: u32,
    jobs: Sender<Job>,
    next_token: u64,
}

/// What a store's opening gives a tier.
pub struct DiskParts {
    /// The store.
    pub store: Store,
    /// The device, with the store's segments.
    pub disk: Arc<dyn Disk>,
    /// The slots.
    pub pool: Arc<Pool>,
    /// The window.
    pub window: Window,
    /// Where the mover's work goes.
    pub jobs: Sender<Job>,
    /// The number of the next extent.
    pub next_sequence: u64,
}

impl DiskTier {
    /// A tier over an open store, holding nothing.
    pub fn new(parts: DiskParts, settings: DiskSettings) -> Self {
        let DiskParts { store, disk, pool, window, jobs, next_sequence } = parts;
        let mut extents = Extents::new(store.extents_max());
        extents.make_ready(store.extents_ready());
        Self {
            store_id: store.id(),
            layout: store.layout(),
            cache_generation: store.cache_generation(),
            store: Arc::new(Mutex::new(store)),
            description: disk.describe(),
            disk,
            pool,
            extents,
            window,
            reads: HashMap::new(),
            writes: HashMap::new(),
            health: Health::default(),
            rates: Rates::default(),
            settings,
            sequence: next_sequence,
            announce_from: None,
            describing: false,
            growing: false,
            full_grown: false,
            retention_from: 0,
            jobs,
            next_token: 0,
        }
    }

    /// Blocks that could be restored now.
    pub fn held(&self) -> impl Iterator<Item = BlockKey> + '_ {
        self.extents.committed_in(0, self.extents.ready()).map(|(_, key, _)| key)
    }

    /// Extents that the store may have.
    pub fn extents_max(&self) -> u32 {
        self.extents.max()
    }

    /// Blocks that may be written at once.
    pub(super) fn writes_max(&self) -> u64 {
        (limits::SPILL_BYTES_IN_FLIGHT_MAX / self.layout.extent_bytes).max(limits::SPILLS_IN_FLIGHT_MIN)
    }

    pub(super) fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Hands work to the mover. The caller wakes it when the lock is free again.
    pub(super) fn order(&self, job: Job) {
        // The channel closes only when the mover has ended, with the engine.
        let _mover_gone = self.jobs.send(job);
        self.pool.header().ring();
    }

    /// Bytes of reads under way or waiting for the window.
    pub fn queued_bytes(&self) -> u64 {
        let reading: usize = self.reads.values().map(|read| read.parts.len()).sum();
        (reading + self.window.waiting()) as u64 * self.layout.extent_bytes
    }

    /// Nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.reads.is_empty() && self.writes.is_empty() && self.window.waiting() == 0 && !self.growing
    }

    /// Hands reads to the disk, neighbours in one transfer.
    pub(super) fn read(&mut self, parts: Vec<ReadPart>) {
        let most = (limits::TRANSFER_BYTES_MAX / self.layout.extent_bytes).max(1) as usize;
        let mut rest = parts.into_iter().peekable();
        while let Some(first) = rest.next() {
            let mut run = vec![first];
            while let (Some(last), Some(next)) = (run.last(), rest.peek()) {
                let adjacent = next.slot.0 == last.slot.0 + 1
                    && next.extent.0 == last.extent.0 + 1
                    && same_segment(self.layout, last.extent, next.extent);
                if !adjacent || run.len() >= most {
                    break;
                }
                run.extend(rest.next());
            }
            let token = self.token();
            self.order(Job::Read {
                token,
                slot: run[0].slot,
                extent: run[0].extent,
                count: run.len() as u32,
                expected: run.iter().map(|part| (part.key, part.generation)).collect(),
                cache_generation: self.cache_generation,
            });
            self.reads.insert(token, Read { parts: run, started: Instant::now(), given_up: false, stale: false });
        }
    }

    /// Reads that took longer than a device may take and whose followers still wait.
    pub(super) fn overdue(&self, now: Instant) -> Vec<u64> {
        let deadline = Duration::from_millis(limits::DISK_DEADLINE_MS);
        let late = |read: &Read| !read.given_up && now.duration_since(read.started) > deadline;
        self.reads.iter().filter(|(_, read)| late(read)).map(|(token, _)| *token).collect()
    }
}
