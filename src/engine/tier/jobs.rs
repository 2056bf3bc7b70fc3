//! What engine and mover tell each other.

use super::transfer::{DescriptorRead, SealOrder, Trouble};
use crate::nvme::disk::Completion;
use kvcellar_block::descriptor::Lineage;
use kvcellar_block::{BlockKey, ExtentIndex, Generation, SlotIndex};

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
        /// The extents they describe.
        extents: Vec<ExtentIndex>,
        /// It is the trial of a disk that was out of service.
        trial: bool,
    },
    /// Make the store larger by a segment.
    Grow,
    /// Erase these extents.
    Erase(Vec<ExtentIndex>),
    /// Erase these extents, so that no crash brings them back.
    EraseDurably(Vec<ExtentIndex>),
    /// A transfer ended.
    Done(Completion),
}

/// What the mover tells the engine.
#[derive(Debug)]
pub enum Report {
    /// A read ended: for each block its lineage, or why it is not to be had.
    ReadEnded {
        /// Names the read.
        token: u64,
        /// One a block.
        outcomes: Vec<std::result::Result<Lineage, Trouble>>,
    },
    /// A write ended. `None`: well.
    WriteEnded {
        /// Names the write.
        token: u64,
        /// Why it failed.
        trouble: Option<Trouble>,
    },
    /// Descriptors were read.
    Described {
        /// Each extent with what was found.
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
    /// Of these extents, which nobody can read any more, some may still be there on disk.
    ErasedDurably {
        /// All.
        extents: Vec<ExtentIndex>,
        /// Those that could not be erased.
        failed: Vec<ExtentIndex>,
    },
    /// The store's directory is gone.
    StoreRemoved,
}
